"""EMS: adaptive evict-then-merge by global-local importance (2024, arXiv 2412.08521).

    s = max( Σ_i A[i, j],  aligned Σ_(last w rows i) A[i, j] )        attention that token j received, ever and lately
    R = cos(k_i, k_j) · cos(v_i, v_j)                                 how redundant token i is beside a kept token j

Of the tokens before the last w, each KV head keeps the B − w with the highest s as centers. The next ones are merged into
the center that they resemble most, or into a zero class, that is evicted, where even that one is less similar than τ; the
rest is evicted. Merging and evicting are then one scatter for all heads (`gossamer.cache.merging` has the parts).

The paper's text was not to be had when this was written: the score's two sides and their mean alignment, the three
categories, the product of cosines, the zero class, and weighted merging with separate key norms are known from its
abstracts and reviews. The rest is a reconstruction [R], and no figure of the paper can be claimed for it. Each such choice
is a setting, or stands here:

* [R] The rows of the query heads of a group are averaged. Of equal scores the earlier token is the more important.
* [R] w = 32 (`window`), the larger of both scores (`combine`), no pooling (`pool`), γ = 1 (`gamma`), τ = 0.6 (`tau`),
  cosines clamped at 0 (`clamp`), keys compared as they are cached (`similarity`). ``similarity="prerope"`` turns them back
  for the comparison only; what is merged are the cached keys. A center wins against the zero class at R = τ.
* [R] A merged center carries on the running sums of its members, global and local: attention received is conserved. To
  carry on the combined s instead would count the local part again at every compression, and grow without end.
* [R] The weights of a merge are s. They begin afresh at each compression. An entry counts once in the softmax, as published.
  With ``bias="log(members)"``, which is not the paper's, how many tokens an entry stands for is carried on, and its logit is
  raised by the logarithm, in attention and in the scores: identical tokens keep their mass (`merged_mass`).
* [R] A block of several tokens is compressed at once to B rows, a generated token when there are B + c (`every`).
  All heads end with B rows, in the order of their positions: per-head adaptation is in which tokens merge, and with `mass`
  in how many are candidates.
* A sequence shorter than the budget keeps its padding as the rows that are left over; padding is neither center nor member.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from gossamer.cache.base import CacheMethod, EvictingPolicy, budget_of
from gossamer.cache.merged_mass import MassPolicy, widen
from gossamer.cache.merging import Combine, Norms, choose_merges, global_local_score
from gossamer.calibration import Calibration
from gossamer.hf import CachePolicy, LayerView, ModelShape
from gossamer.hf.cache import Derived
from gossamer.hf.rotary import Rotary
from gossamer.ops import merge_rows
from gossamer.ops.attention_statistics import attention_columns, attention_row
from gossamer.patterns import Budget
from gossamer.registry import register

# -- formulas -----------------------------------------------------------------------------------------------------------


def last_rows(query: Tensor, key: Tensor, starts: Tensor | None, scale: float) -> Tensor:
    """Attention rows of the last queries, averaged over the heads of a group.

    Args:
        query: ``[batch, heads, r, d]``, standing at the last r of the n rows of key ``[batch, kv_heads, n, d]``.
        starts: int ``[batch]``, rows of padding in front, neither seen nor counted.

    Returns:
        float32 ``[batch, kv_heads, r, n]``; 0 for queries in the padding.
    """
    count, length = query.shape[2], key.shape[2]
    grouped = query.unflatten(1, (key.shape[1], -1)).float() * scale
    logits = torch.einsum("bkgrd,bksd->bkgrs", grouped, key.float())
    column = torch.arange(length, device=query.device)
    position = column[length - count :, None]
    hidden = (column > position)[None, None, None]
    if starts is not None:
        hidden = hidden | (column < starts[:, None, None, None, None])
    rows = logits.masked_fill(hidden, torch.finfo(torch.float32).min).softmax(-1).mean(2)
    return rows if starts is None else rows * (position >= starts[:, None, None, None])


# -- the policy ---------------------------------------------------------------------------------------------------------


class RunningSums(Derived):
    """Attention that each row of a cache layer received: from all queries, and from each of the last w.

    The query at position t has the line ``t mod w`` of `ring`, so that a token decoded again after a crop takes the place of
    the one removed; what a removed query added to `total` stays. `tensors` and `restore` let a cache take the sums along to
    another batch (beam search) or to a file; a fresh state starts from 0.
    """

    total: Tensor | None = None  # float32 [batch, kv_heads, capacity]
    ring: Tensor | None = None  # float32 [batch, kv_heads, w, capacity]
    members: Tensor | None = None  # float32 [batch, kv_heads, rows at the last merge], tokens that a row stands for

    def counts(self, rows: int) -> Tensor | None:
        """Tokens that each of the first `rows` rows stands for; None where nothing was merged, or it isn't asked for."""
        if self.members is None:
            return None
        known = min(self.members.shape[2], rows)
        return F.pad(self.members[..., :known], (0, rows - known), value=1.0)

    def read(self, like: Tensor, window: int, rows: int) -> tuple[Tensor, Tensor]:
        """Both for the first `rows` rows, 0 where nothing is known; batch, heads and device of `like`."""
        if self.total is None or self.ring is None:
            total = torch.zeros(*like.shape[:2], rows, device=like.device)
            return total, total.new_zeros(*like.shape[:2], window, rows)
        known = min(self.rows, rows)
        return F.pad(self.total[..., :known], (0, rows - known)), F.pad(self.ring[..., :known], (0, rows - known))

    def store(self, total: Tensor, ring: Tensor, capacity: int) -> None:
        """Keep these, in storage that is made once for `capacity` rows."""
        rows = total.shape[-1]
        if self.total is None or self.ring is None or self.total.shape[-1] < max(rows, capacity):
            with torch.inference_mode(False):  # written in and out of inference mode
                self.total = torch.empty(*total.shape[:-1], max(rows, capacity), device=total.device)
                self.ring = torch.empty(*ring.shape[:-1], max(rows, capacity), device=total.device)
        self.total[..., :rows], self.ring[..., :rows], self.rows = total, ring, rows

    def append(self, row: Tensor, line: int, capacity: int, window: int) -> None:
        """Account for the newest query's row ``[batch, kv_heads, rows]``."""
        rows = row.shape[-1]
        if self.total is None or self.ring is None or self.total.shape[-1] < rows:
            self.store(*self.read(row, window, rows), max(capacity, rows + window))
        assert self.total is not None and self.ring is not None
        if self.rows < rows:
            self.total[..., self.rows : rows] = 0
            self.ring[..., self.rows : rows] = 0
        self.total[..., :rows] += row
        self.ring[:, :, line, :rows] = row
        self.rows = rows

    def tensors(self) -> dict[str, Tensor]:
        """The sums of the rows that are there."""
        counted = {} if self.members is None else {"members": self.members}
        if self.total is None or self.ring is None:
            return counted
        return {"total": self.total[..., : self.rows], "ring": self.ring[..., : self.rows], **counted}

    def restore(self, tensors: dict[str, Tensor], rows: int) -> None:
        """Take back what `tensors` gave."""
        self.members = tensors.get("members")
        if "total" in tensors:
            self.store(tensors["total"], tensors["ring"], rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return sum(x.numel() * x.element_size() for x in (self.total, self.ring, self.members) if x is not None)


class MergingPolicy(EvictingPolicy):
    """Keeps the sums, and compresses when there are too many rows."""

    def __init__(self, method: EMS, rotary: Rotary | None) -> None:
        super().__init__()
        self.method, self.rotary = method, rotary
        #: Whether rows are changed, and not only dropped: they must then be stored as they are.
        self.rewrites = method.tau <= 1 and (method.gamma > 0 or method.mass is not None)
        self.candidates = self.merged = 0
        self.sums: dict[int, int] = {}

    def open(self, layer: LayerView) -> RunningSums:
        """No sums yet."""
        return RunningSums()

    def evict(self, layer: LayerView, query: Tensor) -> None:
        """Account for the block's attention, and compress what is above the budget."""
        method, kv, new = self.method, layer.kv, query.shape[2]
        state, seen = cast(RunningSums, layer.cache_state), kv.length + kv.dropped
        window, (budget, every) = method.window, method.plan(seen)
        if new == 1 and not every:
            return
        key = layer.rows(kv.length)[0].to(query.device)
        group, asked, scored = query.shape[1] // key.shape[1], query, key
        members = state.counts(kv.length)
        if members is not None:
            asked, scored = widen(query, key, members, layer.scale)
        if new == 1:
            row = attention_row(asked[:, :, 0], scored, starts=layer.starts, scale=layer.scale) / group
            state.append(row, (seen - 1) % window, budget + every, window)
            layer.runtime.stats.score_bytes += key.numel() * key.element_size()
            self.sums[layer.index] = state.nbytes
            if kv.length < budget + every:
                return
            total, ring = state.read(row, window, kv.length)
        else:
            if not every:
                state.rows = 0
            total, ring = state.read(key, window, kv.length)
            total = total + attention_columns(asked, scored, starts=layer.starts, scale=layer.scale) / group
            last = asked[:, :, -window:]
            lines = torch.arange(seen - last.shape[2], seen, device=query.device) % window
            ring = ring.index_copy(2, lines, last_rows(last, scored, layer.starts, layer.scale))
        if kv.length > budget:
            total, ring = self.compress(layer, key, total, ring, budget)
        if every:
            state.store(total, ring, budget + every)
            self.sums[layer.index] = state.nbytes

    def compress(
        self, layer: LayerView, key: Tensor, total: Tensor, ring: Tensor, budget: int
    ) -> tuple[Tensor, Tensor]:
        """Leave `budget` rows; returns the sums of these."""
        method, kv = self.method, layer.kv
        older = kv.length - method.window
        value = layer.rows(kv.length)[1].to(key.device)
        local = ring.sum(2)
        score = global_local_score(total[..., :older], local[..., :older], combine=method.combine, pool=method.pool)
        unrotate = None
        if self.rotary is not None:
            rotary, positions = self.rotary, kv.positions.to(key.device).long()

            def unrotate(rows: Tensor, ids: Tensor) -> Tensor:
                return rotary.undo(rows, layer.index, positions.gather(2, ids))

        choice = choose_merges(
            key,
            value,
            score,
            budget=budget,
            window=method.window,
            gamma=method.gamma,
            tau=method.tau,
            mass=method.mass,
            clamp=method.clamp,
            starts=layer.starts,
            unrotate=unrotate,
        )
        merged = int((choice.classes > 0).sum())
        if merged:
            for rows, keep_norm in zip(layer.rows(kv.length), (method.norms == "separate", False), strict=True):
                weights, members, targets = (
                    x.to(rows.device) for x in (choice.weights, choice.members, choice.targets())
                )
                merge_rows(rows, weights, members, targets, keep_norm=keep_norm)
        if method.bias == "log(members)":
            state = cast(RunningSums, layer.cache_state)
            before = state.counts(kv.length)
            stands = torch.ones_like(choice.weights) if before is None else before
            state.members = choice.carry(stands.unsqueeze(2))[:, :, 0]
        layer.keep(choice.ids)
        self.candidates += int(choice.candidates.sum())
        self.merged += merged
        both = choice.carry(torch.cat([total.unsqueeze(2), ring], 2))
        return both[:, :, 0], both[:, :, 1:]

    def report(self) -> dict[str, Any]:
        """As `EvictingPolicy.report`; the bytes of the running sums, and the share of candidates that was merged."""
        share = self.merged / self.candidates if self.candidates else 0.0
        return {**super().report(), "score_bytes_held": sum(self.sums.values()), "merged_share": share}


@register("ems", slot="cache", family="cache")
class EMS(CacheMethod):
    """Hold the cache at a budget: each KV head keeps the tokens that were read most, ever or lately, and merges similar ones.

    For very small budgets with no training and no data. A global sum alone favours early tokens, the last window alone late
    ones. What is evicted can't come back; what is merged is blurred. `combine` "global" or "local" and ``tau=2`` (nothing
    merges) or ``gamma=0`` give the plain evictions to compare with.

    Cost: a prompt is read densely, and scored by one more pass over its scores. A generated token reads the kept keys once
    more for its attention row; every `every` tokens the layer is compressed: a sort, a product of candidates × centers and
    one scatter. Memory: up to ``budget + every`` rows, and ``(window + 1) · (budget + every)`` floats per KV head for the
    sums, which is about ``window / (2 · head_dim)`` of keys and values in float32.

    ``every=0`` compresses prompts only, each scored by its own block, and lets generated tokens stay. Layers with a sliding
    window keep their window. A rolled-back step must not have dropped rows. A prompt read in chunks is compressed after
    each.

    ``bias="log(members)"`` takes attention in prefill and decode, so that no method that selects rows goes beside it. A step
    then copies the kept rows to float32, and trees of candidates (speculative decoding) are read without the bias.

    Settings marked [R] in the module's text are this library's reconstruction of an unavailable paper (arXiv 2412.08521).

    >>> EMS(budget=128).plan(1000)
    (128, 32)
    >>> EMS(budget=0.25, window=16, every=0).plan(400)
    (100, 0)
    """

    budget: Budget = Field(256, description="rows kept per KV head: a count, or a fraction of the tokens seen")
    window: int = Field(32, ge=1, description="last rows: always kept, and the queries of the local score")
    combine: Combine = Field("max", description="how the global and the local score are joined; or one alone")
    pool: int = Field(1, ge=1, le=255, description="neighbours whose scores are averaged; odd (SnapKV: 7)")
    gamma: float = Field(1.0, ge=0, description="candidates for merging, as a multiple of the kept older rows")
    mass: float | None = Field(
        None, gt=0, le=1, description="instead of gamma: candidates of a head up to this share of its scores (0.9)"
    )
    tau: float = Field(
        0.6, ge=0, description="a candidate less similar than this to all kept rows is evicted; above 1: all"
    )
    similarity: Literal["rope", "prerope"] = Field(
        "rope", description="compare keys as cached, or before their rotation"
    )
    clamp: bool = Field(True, description="negative cosines count as 0")
    norms: Norms = Field("separate", description="merge directions and norms of keys apart, or average the keys")
    every: int | None = Field(None, ge=0, description="generated tokens between compressions (None: window; 0: none)")
    bias: Literal["none", "log(members)"] = Field(
        "none", description="count a merged row once, or add the logarithm of the tokens it stands for to its logit"
    )

    @property
    def slots(self) -> tuple[str, ...]:
        """The cache; attention too where merged rows are read with a bias."""
        return ("cache",) if self.bias == "none" else ("cache", "attention.prefill", "attention.decode")

    @model_validator(mode="after")
    def _fits(self) -> EMS:
        if self.pool % 2 == 0:
            raise ValueError("pool must be odd")
        if isinstance(self.budget, int) and self.budget <= self.window:
            raise ValueError(f"the window of {self.window} rows stays, so the budget must be above that")
        return self

    def plan(self, tokens: int) -> tuple[int, int]:
        """Rows kept when so many tokens have been seen, and after how many generated ones they are cut to that again."""
        return max(budget_of(self.budget, tokens), self.window + 1), self.window if self.every is None else self.every

    def cache_policy(self, model: nn.Module, calibration: Calibration | None) -> CachePolicy:
        """A policy with running sums per cache layer.

        Raises:
            ModelError: keys are to be compared before their rotation, and this model's can't be turned back.
        """
        rotary = Rotary(model, "ems", "use similarity='rope'") if self.similarity == "prerope" else None
        return MergingPolicy(self, rotary)

    def policies(self, model: nn.Module, calibration: Calibration | None) -> dict[str, Any]:
        """The cache's, and with a bias one that reads merged rows with it."""
        policy, mass = self.cache_policy(model, calibration), MassPolicy()
        return {"cache": policy} if self.bias == "none" else {"cache": policy, "decode": mass, "prefill": mass}

    def held_rows(self, length: int) -> int:
        """The budget, after a prompt of this length."""
        return min(length, self.plan(length)[0])

    def io_bytes(self, length: int, shape: ModelShape, element_size: int) -> dict[str, int]:
        """The kept rows and the new one, and their keys again for the scores; compressions come on top."""
        rows = self.held_rows(length - 1) + 1
        row = shape.kv_heads * shape.head_dim * element_size
        return {"rows": 2 * rows * row, "scores": 0 if self.every == 0 else rows * row}
