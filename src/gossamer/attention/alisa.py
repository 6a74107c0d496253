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

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gossamer import ops
from gossamer.attention.alisa_history import SLACK, History, dense_rows
from gossamer.attention.base import AttentionMethod
from gossamer.calibration import Calibration
from gossamer.errors import RecipeError
from gossamer.hf import LayerView, ModelShape, SelectingPolicy
from gossamer.hf.cache import Derived
from gossamer.registry import register


def half_budget(ratio: float, cached: int) -> int:
    """k, the size of each half for `cached` tokens: ``⌊n·r/2 + 1/2⌋``.

    >>> [half_budget(0.2, n) for n in (1, 4, 5, 64, 512)]
    [0, 0, 1, 6, 51]
    """
    return math.floor(cached * ratio / 2 + 0.5)


def choose(scores: Tensor, k: int, first: int, cached: int) -> Tensor:
    """The attended tokens I of lines that all begin at row `first`, with the current token at row `cached`.

    Args:
        scores: ``[lines, ≥ cached]``, the local sums S.
        k: size of each half; with 0, or where both halves cover everything, all tokens are taken.

    Returns:
        int32 ``[lines, m]``, ascending: I_g, I_l and the current token.

    >>> choose(torch.tensor([[5.0, 1.0, 4.0, 9.0, 9.0]]), k=2, first=0, cached=5).tolist()
    [[0, 2, 3, 4, 5]]
    """
    lines = scores.shape[0]
    if k == 0 or 2 * k >= cached - first:
        whole = torch.arange(first, cached + 1, dtype=torch.int32, device=scores.device)
        return whole.expand(lines, -1)
    best, _ = ops.select_topk(scores[:, None, first : cached - k].float(), k)
    local = torch.arange(cached - k, cached + 1, dtype=torch.int32, device=scores.device)
    return torch.cat([best[:, 0] + first, local.expand(lines, -1)], dim=1)


def gather_rows(storage: Tensor, ids: Tensor) -> Tensor:
    """Rows ``ids`` of a cache ``[batch, kv_heads, capacity, d]``, packed: ``[batch, kv_heads or heads, m, d]``.

    Args:
        ids: int ``[lines, m]``, one line for each sequence, or one for each (sequence, query head).
    """
    batch, kv_heads, capacity, dim = storage.shape
    per_head = ids.shape[0] // batch
    if batch == per_head == 1:
        return storage[0].index_select(1, ids[0])[None]
    heads = kv_heads if per_head == 1 else per_head
    kv = torch.arange(heads, device=ids.device) // (heads // kv_heads)
    base = (torch.arange(batch, device=ids.device)[:, None] * kv_heads + kv)[..., None] * capacity
    flat = (base + ids.view(batch, per_head, -1)).flatten()
    return storage.reshape(-1, dim).index_select(0, flat).view(batch, heads, -1, dim)


def attend_packed(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scale: float, per_head: bool
) -> tuple[Tensor, Tensor]:
    """Attention over packed rows, and the weights it gave them.

    Args:
        query: ``[batch, heads, d]``; key, value: ``[batch, kv_heads or heads, m, d]``.
        valid: bool ``[lines, m]``: which slots count (None: all).
        per_head: whether each head has a line of its own, else their weights are summed.

    Returns:
        Output ``[batch, heads, d]`` and weights float32 ``[lines, m]``.
    """
    batch, heads, dim = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, dim)
    logits = (grouped.float() * scale) @ key.float().transpose(2, 3)
    if valid is not None:
        logits = logits.masked_fill(~valid.view(batch, -1, 1, key.shape[2]), float("-inf"))
        value = value.masked_fill(~valid.view(batch, -1, key.shape[2], 1), 0)  # an unused slot may hold anything
    weights = logits.softmax(-1)
    out = (weights @ value.float()).to(query.dtype).view(batch, heads, dim)
    return out, weights.flatten(0, 2) if per_head else weights.sum((1, 2))


class AlisaState(Derived):
    """What one cache layer keeps: its history of attention rows."""

    def __init__(self) -> None:
        self.history: History | None = None
        self.batch = 0

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
        rows = self.window(cached)
        return rows + max(SLACK, rows // 2)

    def is_exempt(self, layer: LayerView, length: int) -> bool:
        """Whether this layer reads everything at this length, and will at any later one."""
        return self.reads_all(layer) or bool(layer.window and layer.window < length)

    def lines(self, query: Tensor) -> int:
        """Histories of a batch."""
        return query.shape[0] if self.method.head_reduce else query.shape[0] * query.shape[1]

    def observe(self, layer: LayerView, query: Tensor) -> None:
        """Keep the last queries of the prompt."""
        length = layer.kv.length
        if not self.is_exempt(layer, length) and self.method.ratio < 1:
            history = self.history(layer, query, length - query.shape[2])
            history.read(query, length - query.shape[2], self.reach(length))
            cast(AlisaState, layer.state).rows = length

    def history(self, layer: LayerView, query: Tensor, cached: int) -> History:
        """This layer's history with exactly `cached` rows.

        Raises:
            RecipeError: a cache method dropped rows, so that ids mean other tokens than the history's.
        """
        state = cast(AlisaState, layer.state)
        if layer.kv.dropped:
            raise RecipeError("alisa cannot run with a cache method that drops rows: choose one of the two")
        if state.history is None:
            state.history = History(self.lines(query), query.device)
            state.batch = query.shape[0]
        history = state.history
        known = min(state.rows, cached)
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
        starts = [0] * query.shape[0] if layer.starts is None else [int(s) for s in layer.starts]

        def make(queries: Tensor, first: int, last: int) -> Tensor:
            key, _ = layer.rows(last)
            padding = None if layer.starts is None else starts
            return dense_rows(queries, key.to(query.device), first, layer.scale, padding, heads > 1)

        history.make = make
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
        if self.is_dense(layer, length) and (self.is_exempt(layer, length) or self.method.ratio == 1):
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
        key, value = layer.rows(length)
        valid = None
        if counts is not None:
            valid = torch.arange(ids.shape[1], device=ids.device) < counts[:, None]
        per_head = not self.method.head_reduce
        out, weights = attend_packed(
            query, gather_rows(key, ids), gather_rows(value, ids), valid, layer.scale, per_head
        )
        layer.count_selected(*self.listed(layer, ids, counts), length, self.score_bytes(layer, length))
        return out, weights

    def score_bytes(self, layer: LayerView, length: int) -> int:
        """The sums, in float64."""
        return cast(AlisaState, layer.state).history.lines * (length - 1) * 8  # type: ignore[union-attr]


@register("alisa", slot="attention.decode", family="attention")
class Alisa(AttentionMethod):
    """Attend to the most recent tokens and to those that the last queries looked at; nothing is evicted.

    For long generations where the KV cache outgrows fast memory: a step reads a fraction `ratio` of the tokens, the same for
    all heads of a layer. The history costs about ``8·k·2k`` bytes a layer and sequence (k is half of the tokens read).

    Paper: ALISA: Accelerating Large Language Model Inference via Sparsity-Aware KV Caching, ISCA 2024.

    >>> Alisa(ratio=0.4).ratio
    0.4
    """

    ratio: float = Field(0.2, gt=0, le=1, description="r, KV caching ratio: share of the cached tokens attended")
    history_rows: int | None = Field(None, ge=1, description="attention rows that are summed (default: k, which grows)")
    head_reduce: bool = Field(True, description="one set for all heads of a layer; false: each query head has its own")
    dense_layers: tuple[int, ...] = Field((), description="layers that read everything")

    def decode_policy(self, model: nn.Module, calibration: Calibration | None) -> SparseWindowPolicy:
        """A policy with an empty history."""
        return SparseWindowPolicy(self)

    def io_bytes(self, length: int, shape: ModelShape, element_size: int) -> dict[str, int]:
        """2k + 1 rows once per KV head (or query head), and the local sums."""
        k = half_budget(self.ratio, length - 1)
        rows = length if k == 0 else min(2 * k + 1, length)
        heads, lines = (shape.kv_heads, 1) if self.head_reduce else (shape.heads, shape.heads)
        return {"rows": rows * heads * 2 * shape.head_dim * element_size, "scores": lines * (length - 1) * 8}
