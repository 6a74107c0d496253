"""ZipVL: each layer reads a prompt with its important tokens only, as many as hold a share τ of the attention mass, and
stores the others in fewer bits or not at all (He et al., 2024, arXiv 2410.08584).

A few probe queries (the last 64 and 64 random earlier ones) stand for all rows of the attention map A' of a layer:

    a_j = mean over heads of Σ_i A'_ij                    accumulated: sums to the number of probes        (eq. 6)
    p   = min{ p : the p largest a hold τ·Σ_j a_j }                        how many tokens are important
    ã_j = a_j / (probes that can see j)                   early tokens have no advantage                   (eq. 7)
    T   = the p largest ã, in order of position; U = the others                                        (eq. 8, 9)
    O[T] = causal attention of Q[T] over K[T], V[T];  O[U] = 0

T is one set for all heads of a layer. Tokens of U are not gone: the residual stream carries them, and the next layer
chooses anew. All positions keep their rotation. The cache then holds T in 4 bits and U in 2 (v1 of the paper,
``cache="quant"``), T alone (v2, ``"evict"``), or everything (``"none"``).

Where the card is unsure: probes are drawn for each layer from a seed; the last token is always in T (it takes the place of
the least important), so that the first logit is sane; τ = 1 means all tokens, also those whose weight underflows to 0; in
decode the attention over the last 100 positions is a softmax over these alone, which selects what a slice of the whole
row would; each sequence of a batch has its own T.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from gossamer.attention.base import AttentionMethod
from gossamer.calibration import Calibration
from gossamer.errors import InputError
from gossamer.hf import (
    CachePolicy,
    KVLayer,
    LayerView,
    ModelShape,
    PrefillPolicy,
    StoragePolicy,
    dense_attention,
    model_shape,
)
from gossamer.hf.mixed_precision import MixedPrecisionKV
from gossamer.ops.attention_statistics import attention_columns, attention_row
from gossamer.ops.quantized_kv import BITS, check_layout
from gossamer.patterns import AreaMeter, causal_pairs, resolve
from gossamer.registry import register

_SLACK = 1e-12  # of the total: sums of equal float32 scores are exact only up to rounding


def probe_positions(length: int, recent: int, earlier: int, generator: torch.Generator | None = None) -> Tensor:
    """Rows of a prompt that stand for all: the last `recent`, and `earlier` random ones of those before.

    Returns:
        int64, ascending and distinct; all rows where there are no more than that.

    >>> probe_positions(6, 2, 3, torch.Generator().manual_seed(0)).tolist()
    [0, 1, 3, 4, 5]
    >>> probe_positions(3, 2, 3).tolist()
    [0, 1, 2]
    """
    before = max(0, length - recent)
    drawn = torch.randperm(before, generator=generator)[:earlier].sort().values
    return torch.cat([drawn, torch.arange(before, length)])


def select_by_mass(scores: Tensor, tau: float) -> Tensor:
    """How many of the largest scores hold the share `tau` of their sum: the fewest that do.

    Args:
        scores: float ``[..., n]``, finite and not negative, n ≥ 1.
        tau: share in (0, 1]; 1 means all n, zeros included.

    Returns:
        int64 ``[...]``, in 1 .. n. Summed in float64, and compared up to rounding (1e-12 of the sum).

    Raises:
        InputError: `tau` out of range, no scores, or scores that are negative or not finite.

    >>> select_by_mass(torch.tensor([0.1, 0.6, 0.3]), 0.9)
    tensor(2)
    >>> select_by_mass(torch.full((40,), 1 / 40), 0.975)
    tensor(39)
    """
    if not 0 < tau <= 1:
        raise InputError(f"select_by_mass: tau must be above 0 and at most 1, got {tau}")
    if scores.dim() == 0 or scores.shape[-1] == 0:
        raise InputError(f"select_by_mass: want scores [..., n] with n at least 1, got {list(scores.shape)}")
    if not bool((scores.isfinite() & (scores >= 0)).all()):
        raise InputError("select_by_mass: scores must be finite and not negative")
    n = scores.shape[-1]
    if tau == 1:
        return torch.full(scores.shape[:-1], n, device=scores.device)
    held = scores.double().sort(-1, descending=True).values.cumsum(-1)
    short = held < held[..., -1:] * (tau - _SLACK)
    return short.sum(-1).add_(1).clamp_max_(n)


def probe_scores(query: Tensor, key: Tensor, probes: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Accumulated scores a (eq. 6) and normalised ones ã (eq. 7) of every token, from some rows of the attention map.

    Args:
        query: ``[batch, heads, m, d]``, the probes' queries; key: ``[batch, kv_heads, n, d]``.
        probes: int64 ``[m]``, positions of the probes; the last token must be among them, or the last columns that no probe
            sees are divided by 1.
        scale: on the logits (default ``1 / sqrt(d)``).

    Returns:
        Two of float32 ``[batch, n]``. The first sums to m.
    """
    received = attention_columns(query, key, positions=probes, scale=scale).sum(1) / query.shape[1]
    return received, received / probes_that_see(probes, key.shape[2])


def probes_that_see(probes: Tensor, length: int) -> Tensor:
    """How many probes stand at or after each of `length` tokens, at least 1; int64 ``[length]``.

    >>> probes_that_see(torch.tensor([1, 3]), 4).tolist()
    [2, 2, 1, 1]
    """
    at = torch.zeros(length, dtype=torch.int64, device=probes.device).index_add_(0, probes, torch.ones_like(probes))
    return at.flip(0).cumsum(0).flip(0).clamp_min_(1)


def important(normalised: Tensor, count: int) -> Tensor:
    """T: positions of the `count` largest of ``[n]`` scores, ascending; of equals the earlier ones.

    >>> important(torch.tensor([0.2, 0.5, 0.2, 0.9]), 3).tolist()
    [0, 1, 3]
    """
    return normalised.argsort(stable=True, descending=True)[:count].sort().values


def sparse_attention(query: Tensor, key: Tensor, value: Tensor, ids: Tensor, scale: float) -> Tensor:
    """Causal attention among the tokens `ids` alone, zeros elsewhere.

    Args:
        query: ``[batch, heads, n, d]``; key, value: ``[batch, kv_heads, n, d]``, all n tokens of the prompt.
        ids: int64 ``[p]``, ascending: since they keep their order, the causal mask of the p tokens is a triangle.

    Returns:
        ``[batch, heads, n, d]``.
    """
    query_t, key_t, value_t = (x.index_select(2, ids) for x in (query, key, value))
    out = dense_attention(query_t, key_t, value_t, scale)
    return torch.zeros_like(query).index_copy_(2, ids, out)


def rows_to_keep(chosen: list[Tensor], scores: Tensor) -> Tensor:
    """Rows of a batch that stay in the cache, which holds as many rows of every sequence.

    A sequence that needs fewer than another fills up with its padding and, where it has too little, with its next best
    tokens.

    Args:
        chosen: T of each sequence, int64.
        scores: ã ``[batch, n]``, ``-inf`` in the padding.

    Returns:
        int64 ``[batch, max p]``, ascending.

    >>> scores = torch.tensor([[0.1, 0.3, 0.2, 0.9], [-torch.inf, 0.1, 0.2, 0.9]])
    >>> rows_to_keep([torch.tensor([3]), torch.tensor([2, 3])], scores).tolist()
    [[1, 3], [2, 3]]
    >>> rows_to_keep([torch.tensor([1, 2, 3]), torch.tensor([2, 3])], scores).tolist()
    [[1, 2, 3], [0, 2, 3]]
    """
    rank = scores.masked_fill(scores == -torch.inf, 2.0)  # a token's mean attention is at most 1
    for line, ids in zip(rank, chosen, strict=True):
        line[ids] = torch.inf
    order = rank.argsort(stable=True, dim=-1, descending=True)
    return order[:, : max(map(len, chosen))].sort(-1).values


class Choice:
    """What a layer chose for the prompt that it has just read, until the cache is updated with it.

    Attributes:
        ids: T of each sequence, int64 in rows of the cache; None where the last block was read densely.
        scores: ã ``[batch, rows]``, ``-inf`` in the padding.
    """

    def __init__(self) -> None:
        self.ids: list[Tensor] | None = None
        self.scores: Tensor | None = None


class ZipPolicy(PrefillPolicy, CachePolicy, StoragePolicy):
    """Reads a prompt with the important tokens of each layer, and has the cache keep them, or keep them in more bits."""

    def __init__(self, method: ZipVL) -> None:
        self.method = method
        self.drops = method.cache == "evict"
        #: Of the last prompt, by layer: p / n of each sequence, and the probes' scores over the pairs of causal attention.
        self.ratios: dict[int, list[float]] = {}
        self.probed: dict[int, float] = {}
        self.meter = AreaMeter()
        self.held: dict[int, tuple[int, int, int]] = {}

    def open(self, layer: LayerView) -> Choice:
        """Nothing chosen."""
        return Choice()

    def layers(self, shape: ModelShape) -> list[Callable[[KVLayer | None], KVLayer]]:
        """Storage in mixed precision."""
        return [partial(MixedPrecisionKV.of, self.method.bits)] * shape.layers

    def prefill(self, layer: LayerView, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Sparse where the block is a whole prompt; dense where rows came before it, or the layer has a window."""
        state = cast(Choice, layer.prefill_state)
        state.ids = None
        if layer.window or query.shape[2] != key.shape[2]:
            why = (
                "what a layer with a sliding window sees"
                if layer.window
                else "a block of tokens that follows cached ones"
            )
            layer.runtime.say_once(f"zipvl: {why} is read densely, and its rows are kept as they are")
            size = {"batch": len(query), "new": query.shape[2], "length": key.shape[2]}
            self.meter.add(layer.index, 1.0, heads=query.shape[1], **size)
            if layer.window:
                self.ratios[layer.index], self.probed[layer.index] = [1.0], 0.0
            return dense_attention(query, key, value, layer.scale, starts=layer.starts, window=layer.window)
        return self._sparse(layer, state, query, key, value)

    @torch.no_grad()
    def _sparse(self, layer: LayerView, state: Choice, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        m, (batch, heads, rows, _) = self.method, query.shape
        first = [0] * batch if layer.starts is None else layer.starts.clamp_max(rows - 1).tolist()
        out, chosen = torch.zeros_like(query), []
        scores = torch.full((batch, rows), -torch.inf, device=query.device)
        ratios, pairs, probed = [], 0, 0
        for b, start in enumerate(first):  # sequences differ in how many tokens they keep
            one, n = slice(b, b + 1), rows - start
            q, k, v = (x[one, :, start:] for x in (query, key, value))
            generator = torch.Generator().manual_seed((m.seed * 1_000_003 + layer.index) * 1_000_003 + n)
            probes = probe_positions(n, *m.probes, generator).to(query.device)
            accumulated, normalised = probe_scores(q.index_select(2, probes), k, probes, layer.scale)
            count = m.count(accumulated[0])
            normalised[0, -1] = torch.inf  # the last token gives the first logit
            ids = important(normalised[0], count)
            out[one, :, start:] = sparse_attention(q, k, v, ids, layer.scale)
            scores[b, start:] = normalised[0]
            chosen.append(ids + start)
            ratios.append(count / n)
            pairs += causal_pairs(count)
            probed += int((probes + 1).sum())
        state.ids, state.scores = chosen, scores
        total = batch * causal_pairs(rows)
        self.meter.add(layer.index, pairs / total, batch=batch, new=rows, length=rows, heads=heads)
        self.ratios[layer.index], self.probed[layer.index] = ratios, probed / total
        return out

    @torch.no_grad()
    def update(self, layer: LayerView, query: Tensor) -> None:
        """After a prompt, keep its important tokens, or keep them in more bits; then compress every `interval` new rows."""
        state, kv = cast(Choice, layer.prefill_state), layer.kv
        chosen, state.ids = state.ids, None
        if self.method.cache == "evict":
            if chosen is not None:
                assert state.scores is not None
                keep = rows_to_keep(chosen, state.scores)
                layer.keep(keep[:, None].expand(kv.batch, kv.heads, -1))
        elif isinstance(kv, MixedPrecisionKV) and not layer.window:
            if chosen is not None:
                kv.compress(chosen, layer.starts)
            elif kv.recent >= self.method.interval:
                kv.compress(self._recent(layer, kv, query[:, :, -1]), layer.starts)
        state.scores = None
        self.held[layer.index] = (kv.length, kv.length + kv.dropped, kv.nbytes)

    def _recent(self, layer: LayerView, kv: MixedPrecisionKV, query: Tensor) -> list[Tensor]:
        """T of the rows in full precision, by the attention of one query ``[batch, heads, d]`` over them alone."""
        key, _ = kv.recent_rows
        first = None if layer.starts is None else (layer.starts - kv.split).clamp(0, kv.recent - 1)
        scores = attention_row(query, key, starts=first, scale=layer.scale).sum(1) / query.shape[1]
        chosen = []
        for line, start in zip(scores, [0] * len(scores) if first is None else first.tolist(), strict=True):
            real = line[start:]
            chosen.append(important(real, self.method.count(real)) + start + kv.split)
        return chosen

    def report(self) -> dict[str, Any]:
        """Ratios of the last prompt by layer, their mean, the share of attention computed, and what the cache holds.

        ``prefill_area`` and ``prefill_area_of_heads`` are those of every prefill method (`gossamer.patterns.AreaMeter`): a
        triangle of p tokens in one of n. ``probe_area`` comes on top: the probes' scores of the last prompt, in the same unit.
        """
        if not self.ratios:
            return self.meter.report()
        ratios = [sum(r) / len(r) for _, r in sorted(self.ratios.items())]
        facts: dict[str, Any] = {
            "ratios": ratios,
            "prefill_ratio": sum(ratios) / len(ratios),
            "probe_area": sum(self.probed.values()) / len(self.probed),
            **self.meter.report(),
        }
        if self.held:
            rows, seen, size = (sum(column) for column in zip(*self.held.values(), strict=True))
            facts |= {"kv_bytes_held": size, "cache_rows_kept": rows / seen}
        return facts


@register("zipvl", slot="attention.prefill", family="attention")
class ZipVL(AttentionMethod):
    """Read long prompts with the important tokens of each layer only, found by their share of the attention mass.

    Needs neither calibration nor training. Made for prompts of many image tokens, most of which few queries look at: there
    half to two thirds of the tokens go. Text keeps more of them and pays more for each that goes: keep `tau` high there
    (SmolLM2, 768 tokens: 0.87 of them at 0.99, KL 0.10; at 0.96 a fixed `ratio` of the same mean does as well).

    Cost of a prompt of n tokens: ``m·n`` scores for the m probes and one sort of n numbers a layer, then attention over p
    tokens: ``(p/n)²`` of causal attention, and up to ``2·m/n`` of its scores for the probes. Below about a thousand tokens
    that is no gain. Decode reads the whole cache, which ``"evict"`` cuts to the important tokens.

    Takes the prefill phase, and the cache unless ``cache="none"``. A prompt counts as one where nothing was cached before:
    later blocks (turns, chunks after the first) are read densely, and layers with a sliding window too.

    Paper: ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification and KV Cache Compression,
    arXiv 2410.08584 (v1 quantises the cache, v2 evicts).

    >>> ZipVL(tau=0.5).count(torch.tensor([0.1, 0.6, 0.2, 0.1]))
    1
    >>> ZipVL(ratio=0.75).count(torch.tensor([0.1, 0.6, 0.2, 0.1]))
    3
    """

    tau: float = Field(0.975, gt=0, le=1, description="τ, share of attention mass that the tokens of a layer hold")
    probes: tuple[int, int] = Field(
        (64, 64), description="queries that estimate it: the last ones, and random earlier ones"
    )
    cache: Literal["quant", "evict", "none"] = Field(
        "quant", description="other tokens in the cache: in fewer bits (v1), dropped (v2), or as they are"
    )
    bits: tuple[int, int] = Field((4, 2), description="b_h and b_l, bits of important tokens and of others: 2, 4 or 8")
    interval: int = Field(100, ge=1, description="new tokens that are compressed together; they wait in full precision")
    ratio: float | None = Field(None, gt=0, le=1, description="a fixed share of tokens in all layers, instead of τ")
    seed: int = Field(0, ge=0, lt=1 << 20, description="of the random probes")

    @field_validator("probes")
    @classmethod
    def _last_is_a_probe(cls, probes: tuple[int, int]) -> tuple[int, int]:
        if probes[0] < 1 or probes[1] < 0:
            raise ValueError("want at least 1 recent probe, and 0 or more random ones")
        return probes

    @field_validator("bits")
    @classmethod
    def _known_bits(cls, bits: tuple[int, int]) -> tuple[int, int]:
        if not set(bits) <= set(BITS) or bits[0] < bits[1]:
            raise ValueError("want two of 2, 4 and 8, the first not the smaller")
        return bits

    def count(self, accumulated: Tensor) -> int:
        """p, how many tokens are important, from their accumulated scores ``[n]``."""
        if self.ratio is not None:
            return resolve(self.ratio, len(accumulated))
        return int(select_by_mass(accumulated, self.tau))

    def policies(self, model: nn.Module, calibration: Calibration | None) -> dict[str, Any]:
        """One policy for all phases.

        Raises:
            InputError: the model's heads do not fill words of such codes.
        """
        if self.cache == "quant":
            for bits in self.bits:
                check_layout("zipvl", model_shape(model).head_dim, bits, "token", None)
        phases = {"none": ("prefill",), "evict": ("prefill", "cache"), "quant": ("prefill", "cache", "storage")}
        return dict.fromkeys(phases[self.cache], ZipPolicy(self))

    def io_bytes(self, length: int, shape: ModelShape, element_size: int) -> dict[str, int]:
        """What the cache holds, and the new row: all but the last of `length` tokens were the prompt.

        How many tokens τ keeps is known only when the prompt was read: without `ratio` this is an upper bound.
        """
        prompt, channels = length - 1, shape.kv_heads * shape.head_dim
        count = prompt if self.ratio is None else resolve(self.ratio, prompt)
        full = 2 * channels * element_size
        if self.cache != "quant":
            return {"rows": ((count if self.cache == "evict" else prompt) + 1) * full, "scores": 0}
        total = full
        for rows, bits in zip((count, prompt - count), self.bits, strict=True):
            if rows:  # codes; two scales of a token in bfloat16; those of the keys' channels, and the values' factors
                total += rows * (2 * channels * bits // 8 + 4 * shape.kv_heads) + channels * (4 + 4)
        return {"rows": total, "scores": 0}
