"""ALISA (Zhao et al., ISCA 2024): half the tokens by place, half by what the last queries looked at, and a cache in tiers.

Sparse window attention, per layer, at a step with n tokens cached and caching ratio r:

    k   = ⌊n·r/2 + 1/2⌋
    S_j = Σ_heads Σ_{i=n−k}^{n−1} AW[i, j]            attention of the last k rows
    I_l = {n−k, …, n−1}                               locally static
    I_g = argtop-k of S_j over j ∉ I_l                globally dynamic
    I   = I_g ∪ I_l ∪ {n}
    AW[n, I] = softmax(q_n·K_I / √d),  AW[n, others] = 0,  o = AW[n, I]·V_I

The set is shared by all heads of a layer. Nothing is evicted, so k grows with n; but rows are sparse, so a token that was
left out for k rows has no score and does not return by itself. The window of rows moves by one row added and at most one
dropped a step (`alisa_history`); where rows lie, and which are computed again, is the schedule's (`alisa_schedule`,
`alisa_tiers`).

Decisions where the paper is silent or printed badly: k is rounded half up; while k is 0 everything is attended; equal
scores go to the lower token; each sequence of a batch has its own set, and its own k where padding makes it shorter; the
last k rows of the prompt, dense as they are (or recomputed as dense where another method read the prompt sparsely), begin
the history; with grouped queries all query heads are summed. Layers with a sliding window shorter than the context stay
dense in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gossamer.attention.alisa_formulas import choose, half_budget
from gossamer.attention.alisa_history import SLACK, History, dense_rows
from gossamer.attention.alisa_schedule import AlisaPlan
from gossamer.attention.base import AttentionMethod
from gossamer.calibration import Calibration
from gossamer.errors import RecipeError
from gossamer.hf import LayerView, ModelShape, SelectingPolicy
from gossamer.hf.cache import Derived
from gossamer.registry import register


class AlisaState(Derived):
    """What one cache layer keeps: its history of attention rows.

    Attributes:
        moved: tokens that are no longer in the layer's storage, because they went to another tier.
    """

    def __init__(self) -> None:
        self.history: History | None = None
        self.batch = self.moved = 0

    def reorder(self, pick: Callable[[Tensor], Tensor]) -> bool:
        """Take the rows of each sequence along."""
        if self.history is not None:
            self.history.reorder(pick, self.batch)
            self.batch = int(pick(torch.arange(self.batch)).shape[0])
        return True


class SparseWindowPolicy(SelectingPolicy):
    """Sparse window attention; remembers the last attention rows of every layer."""

    watches_prompt = True

    def __init__(self, method: Alisa) -> None:
        super().__init__(frozenset(method.dense_layers))
        self.method = method

    def open(self, layer: LayerView) -> AlisaState:
        """No history yet."""
        return AlisaState()

    def budget(self, length: int) -> int:
        """Both halves and the current token."""
        k = half_budget(self.method.ratio, length - 1)
        return length if k == 0 else min(2 * k + 1, length)

    def window(self, cached: int) -> int:
        """Attention rows that are summed."""
        rows = half_budget(self.method.ratio, cached)
        return rows if self.method.history_rows is None else min(self.method.history_rows, cached)

    def reach(self, cached: int) -> int:
        """Rows that are kept: the window, and some behind it for a rollback."""
        return self.window(cached) + SLACK

    def is_exempt(self, layer: LayerView, length: int) -> bool:
        """Whether this layer reads everything at this length, and will at any later one."""
        return self.reads_all(layer) or bool(layer.window and layer.window < length)

    def lines(self, query: Tensor) -> int:
        """Histories of a batch."""
        return query.shape[0] if self.method.head_reduce else query.shape[0] * query.shape[1]

    def observe(self, layer: LayerView, query: Tensor) -> None:
        """Keep the last queries of the prompt."""
        state, length = cast(AlisaState, layer.state), layer.kv.length
        if not self.is_exempt(layer, length) and self.remembers():
            tokens = length + state.moved
            self.history(layer, query, tokens - query.shape[2]).read(query, tokens - query.shape[2], self.reach(tokens))
            state.rows = length

    def remembers(self) -> bool:
        """Whether a history is needed: not where everything is read at any length."""
        return self.method.ratio < 1

    def history(self, layer: LayerView, query: Tensor, cached: int) -> History:
        """This layer's history with exactly `cached` rows.

        Raises:
            RecipeError: a cache method dropped rows, so that ids mean other tokens than the history's.
        """
        state = cast(AlisaState, layer.state)
        if layer.kv.dropped != state.moved:
            raise RecipeError("alisa cannot run with a cache method that drops rows: choose one of the two")
        if state.history is None:
            state.history = History(self.lines(query), query.device)
            state.batch = query.shape[0]
        history = state.history
        known = min(state.rows + state.moved, cached)
        if known < history.end:
            history.rewind(known)
        if history.end < cached:
            layer.runtime.say_once(
                "alisa has not seen the attention of the tokens in this cache: they start without a score"
            )
            history.forget(cached)
        return history

    def chosen(self, layer: LayerView, history: History, query: Tensor, cached: int) -> tuple[Tensor, Tensor | None]:
        """Ids int32 ``[lines, m]`` of the attended tokens; counts int32 ``[lines]`` where lines differ, else None."""
        heads = history.lines // query.shape[0]
        starts = self.starts(layer, query.shape[0])

        def make(queries: Tensor, first: int, last: int) -> Tensor:
            key, _ = layer.rows(last)
            padding = starts if any(starts) else None
            return dense_rows(queries, key.to(query.device), first, layer.scale, padding, heads > 1)

        history.make = make
        if self.method.prompt_rows == "stored":
            history.materialise(lambda rows: rows, torch.float16)
        history.window([cached - self.window(cached - s) for s in starts for _ in range(heads)])
        groups = sorted(set(starts))
        picked = []
        for start in groups:
            scores = history.sums
            if len(groups) > 1:
                scores = scores[[i * heads + h for i, s in enumerate(starts) if s == start for h in range(heads)]]
            picked.append(choose(scores, half_budget(self.method.ratio, cached - start), start, cached))
        if len(groups) == 1:
            return picked[0], None
        ids = torch.zeros(history.lines, max(p.shape[1] for p in picked), dtype=torch.int32, device=query.device)
        counts = torch.zeros(history.lines, dtype=torch.int32, device=query.device)
        for start, part in zip(groups, picked, strict=True):
            at = [i * heads + h for i, s in enumerate(starts) if s == start for h in range(heads)]
            ids[at, : part.shape[1]] = part
            counts[at] = part.shape[1]
        return ids, counts

    def starts(self, layer: LayerView, batch: int) -> list[int]:
        """First real token of each sequence."""
        return [0] * batch if layer.starts is None else [int(s) for s in layer.starts]

    def select(self, layer: LayerView, query: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The rows that `decode` would attend, the same for all heads of a layer unless heads decide alone."""
        history = self.history(layer, query, length - 1)
        ids, counts = self.chosen(layer, history, query, length - 1)
        return self.listed(layer, ids, counts)

    def listed(self, layer: LayerView, ids: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ids and counts as operators take them, ``[batch, kv_heads or heads, m]``."""
        shape = layer.runtime.shape
        batch = cast(AlisaState, layer.state).batch
        heads = shape.kv_heads if self.method.head_reduce else shape.heads
        lines = ids.view(batch, -1, ids.shape[1]).expand(-1, heads, -1).contiguous()
        if counts is None:
            return lines, torch.full(lines.shape[:2], ids.shape[1], dtype=torch.int32, device=ids.device)
        return lines, counts.view(batch, -1).expand(-1, heads).contiguous()

    def decode(self, layer: LayerView, query: Tensor, length: int) -> Tensor:
        """Choose from the rows before, attend, and remember this row."""
        if (self.is_exempt(layer, length) or not self.remembers()) and self.is_dense(layer, length):
            return layer.dense_decode(query, length)
        history = self.history(layer, query, length - 1)
        ids, counts = self.chosen(layer, history, query, length - 1)
        out, weights = self.attend(layer, query, length, ids, counts)
        history.record(ids, weights, self.reach(length))
        cast(AlisaState, layer.state).rows = length
        return out

    def attend(
        self, layer: LayerView, query: Tensor, length: int, ids: Tensor, counts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Output ``[batch, heads, d]`` and weights float32 ``[lines, m]`` of the rows `ids`."""
        indices, used = self.listed(layer, ids, counts)
        out, weights, rows = layer.attention().weighted(query, length, indices, used, scale=layer.scale)
        layer.count_selected(indices, used, length, self.score_bytes(layer, length), rows)
        return out, weights.sum(1) if self.method.head_reduce else weights.flatten(0, 1)

    def score_bytes(self, layer: LayerView, length: int) -> int:
        """The sums, in float64."""
        return cast(AlisaState, layer.state).history.lines * (length - 1) * 8  # type: ignore[union-attr]


@register("alisa", slot="attention.decode", family="attention")
class Alisa(AttentionMethod):
    """Attend to the most recent tokens and to those that the last queries looked at; nothing is evicted.

    For long generations where the KV cache outgrows fast memory: a step reads a fraction `ratio` of the tokens, the same for
    all heads of a layer. The history costs about ``8·k·2k`` bytes a layer and sequence (k is half of the tokens read), as much
    as the fp32 keys and values of a small model. After a prompt of n tokens its last k rows leave one by one: working them
    out again costs about a dense step each, keeping them ``2·k·n`` bytes (`prompt_rows`).

    Paper: ALISA: Accelerating Large Language Model Inference via Sparsity-Aware KV Caching, ISCA 2024.

    >>> Alisa(ratio=0.4).ratio
    0.4
    """

    budget_setting: ClassVar[str] = "ratio"

    ratio: float = Field(0.2, gt=0, le=1, description="r, KV caching ratio: share of the cached tokens attended")
    history_rows: int | None = Field(None, ge=1, description="attention rows that are summed (default: k, which grows)")
    prompt_rows: Literal["recomputed", "stored"] = Field(
        "recomputed",
        description="a prompt's rows, as they leave the window: worked out again from its queries, or kept in half precision",
    )
    head_reduce: bool = Field(True, description="one set for all heads of a layer; false: each query head has its own")
    dense_layers: tuple[int, ...] = Field((), description="layers that read everything")
    offload: Literal["none", "file", "host"] = Field(
        "none", description="slow tier for old tokens: none, a memory-mapped file, or pinned host memory"
    )
    offload_folder: str | None = Field(None, description="folder of the file (default: the system's temporary folder)")
    plan: AlisaPlan | None = Field(None, description="offload: the schedule, from `alisa_plan`")
    fast_tokens: int | None = Field(None, ge=1, description="offload without a plan: tokens kept in fast memory")
    kv_bits: Literal[4, 8] | None = Field(
        None, description="offload without a plan: bits of a value in the slow tier (default: the model's own)"
    )
    block: int = Field(64, ge=1, description="offload without a plan: tokens that move together")

    @model_validator(mode="after")
    def _check_tiers(self) -> Alisa:
        if self.offload == "none" and any(x is not None for x in (self.plan, self.fast_tokens, self.kv_bits)):
            raise ValueError("plan, fast_tokens and kv_bits are about a slow tier: set offload to 'file' or 'host'")
        if self.offload != "none":
            if (self.plan is None) == (self.fast_tokens is None):
                raise ValueError("offload needs either a plan (see alisa_plan) or fast_tokens")
            if self.plan is not None and self.kv_bits is not None:
                raise ValueError("kv_bits is part of the plan: give it to alisa_plan")
            if self.plan is not None and self.plan.ratio != self.ratio:
                raise ValueError(f"the plan was made for ratio={self.plan.ratio:g}")
            if not self.head_reduce:
                raise ValueError("offload needs one set for all heads (head_reduce=True)")
        return self

    def decode_policy(self, model: nn.Module, calibration: Calibration | None) -> SparseWindowPolicy:
        """A policy with an empty history.

        Raises:
            InputError: the plan was made for another model.
            ModelError: the plan deletes tokens, and this family's keys can't be computed again.
        """
        if self.offload == "none":
            return SparseWindowPolicy(self)
        from gossamer.attention.alisa_tiers import TieredPolicy  # it builds on this file

        return TieredPolicy(self, model)

    def policies(self, model: nn.Module, calibration: Calibration | None) -> dict[str, Any]:
        """With a slow tier, blocks of tokens are read by the same policy, which knows where older rows lie."""
        policy = self.decode_policy(model, calibration)
        return {"decode": policy} if self.offload == "none" else {"decode": policy, "prefill": policy}

    def io_bytes(self, length: int, shape: ModelShape, element_size: int) -> dict[str, int]:
        """2k + 1 rows once per KV head (or query head), and the local sums."""
        k = half_budget(self.ratio, length - 1)
        rows = length if k == 0 else min(2 * k + 1, length)
        heads, lines = (shape.kv_heads, 1) if self.head_reduce else (shape.heads, shape.heads)
        return {"rows": rows * heads * 2 * shape.head_dim * element_size, "scores": lines * (length - 1) * 8}
