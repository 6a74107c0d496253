"""A2SF: accumulative attention scores with a forgetting factor (2024, arXiv 2407.20485).

Ranking cached tokens by the attention that they have received favours the early ones, which have been added up longest.
A2SF lets the sum fade at every step,

    A_t = α · A_(t−1) + S_t

with S_t the attention row of step t over the tokens that are still there, so that a token is judged by its recent
attention: α = 1 is H2O's sum, α = 0 the last query alone. Each KV head drops its lowest token, one a step.

Decisions, where the paper leaves something open: the rows of the query heads of a group are summed, and each KV head
decides for all of them; the step that drops a token still reads it; the newest token may go at once; of equal scores the
oldest token goes; a budget given as a fraction is of all tokens seen so far, and of the whole block while one is read.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gossamer.cache.base import (
    CacheMethod,
    EvictingPolicy,
    Part,
    RowScores,
    budget_of,
    part_of,
    protect,
    survivors,
)
from gossamer.calibration import Calibration
from gossamer.errors import InputError
from gossamer.hf import CachePolicy, LayerView, ModelShape, PrefillPolicy, dense_attention
from gossamer.ops.attention_statistics import attention_columns, attention_row
from gossamer.patterns import Budget
from gossamer.registry import register


def fading_weights(alpha: float, rows: int) -> Tensor:
    """Weight α^(rows−1−q) of each row: the recursion A = α·A + S written as one sum. float32 ``[rows]``.

    >>> fading_weights(0.5, 3).tolist()
    [0.25, 0.5, 1.0]
    """
    return torch.tensor(alpha, dtype=torch.float64).pow(torch.arange(rows - 1, -1, -1)).float()


def eviction_mask(
    probs: Tensor, budget: int, alpha: float, *, recent: int = 0, sink: int = 0, kv_heads: int | None = None
) -> Tensor:
    """What each query of a whole sequence sees, by the paper's procedure: the truth for the cache.

    Args:
        probs: dense attention rows after the softmax, ``[..., heads, n, n]``, causal.
        budget: tokens kept after each step.
        kv_heads: heads whose query groups decide together (default: every head for itself).

    Returns:
        Boolean ``[..., kv_heads, n, n]``.

    Raises:
        InputError: the rows are not square, or the heads don't divide into groups.
    """
    if probs.dim() < 3 or probs.shape[-1] != probs.shape[-2] or probs.shape[-3] % (kv_heads or 1):
        raise InputError(f"want attention [..., heads, n, n] of {kv_heads or 'any'} KV heads, got {list(probs.shape)}")
    heads, length = probs.shape[-3], probs.shape[-1]
    groups = probs.float().unflatten(-3, (kv_heads or heads, -1))  # [..., kv_heads, group, n, n]
    mask = torch.ones(length, length, dtype=torch.bool, device=probs.device).tril()
    mask = mask.expand(*groups.shape[:-3], length, length).clone()
    keep = torch.ones(mask.shape[:-1], dtype=torch.bool, device=probs.device)
    total = torch.zeros(mask.shape[:-1], device=probs.device)
    for t in range(length - 1):
        row = groups[..., t, :] * keep.unsqueeze(-2)
        total = alpha * total + (row / row.sum(-1, keepdim=True)).sum(-2)
        if t >= budget:
            there = total[..., : t + 1].masked_fill(~keep[..., : t + 1], torch.inf)
            there[..., :sink] = torch.inf
            there[..., t + 1 - recent :] = torch.inf
            keep.scatter_(-1, there.argmin(-1, keepdim=True), False)
            mask[..., t + 1, :] &= keep
    return mask


def read_by_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    *,
    budget: int,
    alpha: float,
    recent: int = 0,
    sink: int = 0,
    starts: Tensor | None = None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Read a block of new tokens as if they came one at a time, each dropping a token after the budget is full.

    Only the survivors are ever read: the work is ``new · (budget + 1)`` rows in `new` sequential steps, the extra memory
    ``budget + 1`` rows.

    Args:
        query: ``[batch, heads, new, d]``, the last `new` of the rows; key, value: ``[batch, kv_heads, rows, d]``.
        scores: float32 ``[batch, kv_heads, rows]`` before this block, 0 for its rows.
        starts: int ``[batch]``, rows of padding in front; they are the first to go.

    Returns:
        The output ``[batch, heads, new, d]``, the ids of the rows left (int64 ``[batch, kv_heads, min(rows, budget)]``,
        ascending) and their scores.
    """
    batch, heads, new, dim = query.shape
    kv_heads, rows = key.shape[1], key.shape[2]
    old = rows - new
    together = min(new, max(1, budget + 1 - old))  # until the budget is full, nothing goes: those rows need no loop
    seen = old + together
    block = query[:, :, :together]
    out = dense_attention(block, key[:, :, :seen], value[:, :, :seen], scale, starts=starts)
    columns = attention_columns(
        block, key[:, :, :seen], row_weights=fading_weights(alpha, together), starts=starts, scale=scale
    )
    scores = scores[:, :, :seen] * alpha**together + columns
    if seen <= budget:
        return out, torch.arange(seen, device=key.device).expand(batch, kv_heads, -1), scores
    ids = survivors(protect(scores, recent=recent, sink=sink, starts=starts), budget)
    # Survivors lie in slots, in any order: the new row takes the place of the one that went.
    place = torch.cat([ids, ids.new_full((batch, kv_heads, 1), -1)], 2)
    total = torch.cat([scores.gather(2, ids), scores.new_zeros(batch, kv_heads, 1)], 2)
    index = place.clamp_min(0)[..., None].expand(-1, -1, -1, dim)
    near_key, near_value = key.gather(2, index).float(), value.gather(2, index).float()
    free = ids.new_full((batch, kv_heads, 1), budget)
    grouped = (query.float() * scale).reshape(batch, kv_heads, heads // kv_heads, new, dim)
    outs = [out]
    first = None if starts is None else starts[:, None, None]
    for row in range(seen, rows):
        wide = free[..., None].expand(-1, -1, -1, dim)
        near_key.scatter_(2, wide, key[:, :, row : row + 1].float())
        near_value.scatter_(2, wide, value[:, :, row : row + 1].float())
        place.scatter_(2, free, row)
        total.scatter_(2, free, 0.0)
        logits = grouped[:, :, :, row - old] @ near_key.transpose(2, 3)
        if first is not None:  # a query in the padding reads itself, and counts for nothing
            logits.masked_fill_(((place < first) & (place != row)).unsqueeze(2), -torch.inf)
        probs = logits.softmax(-1)
        outs.append((probs @ near_value).flatten(1, 2).unsqueeze(2).to(query.dtype))
        total.mul_(alpha).add_(probs.sum(2))
        if first is not None:
            total.masked_fill_(place < first, 0.0)
        lowest = protect(total, recent=recent, sink=sink, starts=starts, rows=place)
        tied = lowest == lowest.amin(2, keepdim=True)
        free = place.masked_fill(~tied, rows).argmin(2, keepdim=True)
    place.scatter_(2, free, rows)  # the last to go
    ids, order = place.sort(2)
    return torch.cat(outs, 2), ids[:, :, :budget], total.gather(2, order)[:, :, :budget]


class ScoredPolicy(EvictingPolicy):
    """Keeps the scores, and drops the lowest."""

    def __init__(self, method: A2SF) -> None:
        super().__init__()
        self.method = method

    def open(self, layer: LayerView) -> RowScores:
        """No scores yet."""
        return RowScores()

    def evict(self, layer: LayerView, query: Tensor) -> None:
        """Account for the block's attention, and drop what is above the budget."""
        method, kv, new = self.method, layer.kv, query.shape[2]
        state = cast(RowScores, layer.cache_state)
        budget, recent, sink = method.plan(kv.length + kv.dropped)
        key, _ = layer.rows(kv.length)
        key = key.to(query.device)
        if new == 1:
            if method.mode == "prefill":
                return
            received = attention_row(query[:, :, 0], key, starts=layer.starts, scale=layer.scale)
            layer.runtime.stats.score_bytes += key.numel() * key.element_size()
        elif method.mode == "step" and method.prompt == "rows":
            return  # `RowReader` has dropped them
        else:
            weights = fading_weights(method.alpha, new)
            received = attention_columns(query, key, row_weights=weights, starts=layer.starts, scale=layer.scale)
        scores = received if method.mode == "prefill" else state.add_to(received, method.alpha**new)
        if kv.length > budget:
            ids = survivors(protect(scores, recent=recent, sink=sink, starts=layer.starts), budget)
            layer.keep(ids)
            scores = scores.gather(2, ids)
        state.store(scores)


class RowReader(PrefillPolicy):
    """Reads a prompt by the paper's procedure, in which its later tokens don't see what was dropped before them."""

    def __init__(self, method: A2SF) -> None:
        self.method = method

    def prefill(self, layer: LayerView, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Read the block row by row and leave the survivors."""
        if layer.window:
            return dense_attention(query, key, value, layer.scale, starts=layer.starts, window=layer.window)
        method, kv, state = self.method, layer.kv, cast(RowScores, layer.cache_state)
        budget, recent, sink = method.plan(kv.length + kv.dropped)
        scores = state.upto(key[..., 0].float())
        with torch.no_grad():
            out, ids, scores = read_by_rows(
                query,
                key,
                value,
                scores,
                budget=budget,
                alpha=method.alpha,
                recent=recent,
                sink=sink,
                starts=layer.starts,
                scale=layer.scale,
            )
        if ids.shape[2] < kv.length:
            layer.keep(ids)
        state.store(scores)
        return out


@register("a2sf", slot="cache", family="cache")
class A2SF(CacheMethod):
    """Hold the cache at a budget: each KV head drops the token whose fading sum of received attention is lowest.

    For generation in bounded memory with no training and no data. Best where what matters is what was read lately;
    sinks survive by themselves. It can't bring back what it dropped: where the context must stay readable, use a method
    that selects instead.

    Cost of a step: one more read of the kept keys for the scores, and a copy of the kept rows for the eviction. With
    ``mode="step"`` a prompt of T tokens is read in T sequential steps of budget + 1 rows each, as in the paper's
    evaluation (``prompt="rows"``), or densely, scored in one pass that costs as much as the prompt's scores, and cut to
    the budget at once (``prompt="block"``: faster, and free to run with any prefill method). ``mode="prefill"``
    cuts after each block of more than one token (a prompt, a chunk of it, a turn), scored by that block alone, and lets
    generated tokens stay.

    Layers with a sliding window keep their window. A rolled-back step must not have dropped rows, and a reordered batch
    (beam search) starts its scores afresh.

    >>> A2SF(budget=256, alpha=0.1, sink=4).plan(1000)
    (256, 0, 4)
    >>> A2SF(budget=0.2).plan(384)
    (77, 0, 0)
    """

    budget: Budget = Field(0.2, description="rows kept per KV head: a count, or a fraction of the tokens seen")
    alpha: float = Field(0.2, ge=0, le=1, description="forgetting factor of the sum, per token; 1 forgets nothing")
    recent: Part = Field(0, description="newest rows that can't go: a count, or a fraction of the budget")
    sink: int = Field(0, ge=0, description="first rows that can't go")
    mode: Literal["step", "prefill"] = Field("step", description="drop one row a step, or cut after each prompt only")
    prompt: Literal["rows", "block"] = Field("rows", description="in mode step: how a block of new tokens is read")

    @model_validator(mode="after")
    def _fits(self) -> A2SF:
        if isinstance(self.budget, int) and self.sink + part_of(self.recent, self.budget) > self.budget:
            raise ValueError(f"the budget of {self.budget} has no room for the sinks and recent rows that must stay")
        return self

    def plan(self, tokens: int) -> tuple[int, int, int]:
        """Rows kept when so many tokens have been seen, and how many of them are recent rows and sinks that can't go.

        A fraction of few tokens makes room for the sinks and for recent rows given as a count.
        """
        fixed = self.sink + (self.recent if isinstance(self.recent, int) else 0)
        budget = max(budget_of(self.budget, tokens), fixed)
        return budget, min(part_of(self.recent, budget), budget - self.sink), self.sink

    def cache_policy(self, model: nn.Module, calibration: Calibration | None) -> CachePolicy:
        """A policy with scores per cache layer."""
        return ScoredPolicy(self)

    def prefill_policy(self, model: nn.Module, calibration: Calibration | None) -> PrefillPolicy | None:
        """The row-by-row reading of prompts, where it is asked for."""
        return RowReader(self) if self.mode == "step" and self.prompt == "rows" else None

    def mask_for(self, probs: Tensor, kv_heads: int | None = None) -> Tensor:
        """What each query of a whole sequence sees (`eviction_mask`), from dense attention ``[..., heads, n, n]``."""
        budget, recent, sink = self.plan(probs.shape[-1])
        return eviction_mask(probs, budget, self.alpha, recent=recent, sink=sink, kv_heads=kv_heads)

    def held_rows(self, length: int) -> int:
        """The budget, once it is full."""
        return min(length, self.plan(length)[0])

    def io_bytes(self, length: int, shape: ModelShape, element_size: int) -> dict[str, int]:
        """The kept rows and the new one, and their keys again for the scores."""
        rows = self.held_rows(length - 1) + 1
        row = shape.kv_heads * shape.head_dim * element_size
        return {"rows": 2 * rows * row, "scores": rows * row if self.mode == "step" else 0}
