"""Running the patterns of a layer's heads: find each head's keys for this prompt, then one kernel call per kind of pattern.

Heads of a layer may differ in pattern and budget. No head is looped over and no key is repeated: each kernel runs over all
heads, and a head of the other kind costs it one block per row of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from gossamer import ops
from gossamer.attention import minference_patterns as patterns
from gossamer.hf import LayerView, PrefillPolicy, dense_attention
from gossamer.patterns import AreaMeter, causal_pairs
from gossamer.patterns.budget import parse

#: A share of the causal area, `0.0625` or `"1/16"`.
Area = Annotated[float, BeforeValidator(parse), Field(gt=0, le=1)]

KINDS = ("a-shape", "vertical-slash", "block-sparse")
A_SHAPE, VERTICAL_SLASH, BLOCK_SPARSE = range(3)
UNIT = 1024  # factors on budgets are fitted in steps of 1/UNIT


class Heads(NamedTuple):
    """The pattern of every query head of a layer, int64 ``[heads]`` each.

    kind: place in `KINDS`; first: n_init, k_v or k_b; second: n_local, k_s or 0.
    """

    kind: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def uniform(cls, kind: int, first: int, second: int, heads: int) -> Heads:
        """The same pattern for all heads."""
        return cls(*(torch.full((heads,), x, dtype=torch.int64) for x in (kind, first, second)))

    def to(self, device: torch.device) -> Heads:
        """On this device."""
        return Heads(*(x.to(device) for x in self))

    def scaled(self, factor: float | Tensor) -> Heads:
        """Budgets times `factor` (one, or ``[heads]``), 1 at least."""
        one, two = ((x * factor).long().clamp_min(1) for x in (self.first, self.second))
        return Heads(self.kind, one, two)

    def slashes_scaled(self, factor: float) -> Heads:
        """The vertical-slash budgets times `factor`."""
        return self.scaled(torch.where(self.kind == VERTICAL_SLASH, factor, 1.0))

    def cover(self, length: int, block_size: int) -> Tensor:
        """Which heads read everything at this length: boolean ``[heads]``."""
        a_shape = (self.kind == A_SHAPE) & (self.second >= length)
        slash = (self.kind == VERTICAL_SLASH) & ((self.first >= length) | (self.second >= length))
        return a_shape | slash | (self.kind == BLOCK_SPARSE) & (self.first >= -(-length // block_size))


@dataclass(frozen=True)
class Online:
    """How positions are found: L witnesses, forced sinks and local band, block size B (the kernels' too).

    `dense_rows`: last queries that read everything, rounded up to whole blocks (Tri-shape; block patterns only).
    """

    last_q: int = 64
    sinks: int = 30
    local: int = 100
    block_size: int = 64
    dense_rows: int = 0

    def budgets(self, k_v: Tensor, k_s: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Clamped: the sinks and half of the local band at least, the length at most (30 and 50 as released)."""
        return k_v.clamp(self.sinks, None).clamp(1, length), k_s.clamp(self.local // 2, None).clamp(1, length)


class Scores(NamedTuple):
    """What was estimated online; None for kinds that no head has. Vertical and slash scores with sinks and band in front."""

    vertical: Tensor | None
    slash: Tensor | None
    blocks: Tensor | None


def estimate(
    query: Tensor, key: Tensor, kinds: Tensor, online: Online, scale: float, starts: Tensor | None = None
) -> Scores:
    """Score the prompt for the kinds of patterns among `kinds` int ``[heads]``."""
    vertical = slash = blocks = None
    if bool((kinds == VERTICAL_SLASH).any()):
        raw = patterns.vertical_slash_scores(query, key, scale, online.last_q, starts)
        vertical, slash = patterns.force(*raw, online.sinks, online.local, starts)
    if bool((kinds == BLOCK_SPARSE).any()):
        blocks = patterns.block_scores(query, key, online.block_size, starts)
    return Scores(vertical, slash, blocks)


def slash_lists(scores: Scores, heads: Heads, online: Online) -> tuple[Tensor, Tensor]:
    """Columns and distances of the vertical-slash heads, int32 ``[batch, heads, k]``; heads of another kind get one of each."""
    vertical, slash = scores.vertical, scores.slash
    assert vertical is not None and slash is not None
    k_v, k_s = online.budgets(heads.first, heads.second, vertical.shape[-1])
    mine = heads.kind == VERTICAL_SLASH
    return patterns.choose(vertical, slash, torch.where(mine, k_v, 1), torch.where(mine, k_s, 1))


def block_mask(scores: Scores, heads: Heads, online: Online, length: int, starts: Tensor | None = None) -> Tensor:
    """The blocks of the A-shape and block-sparse heads, boolean ``[batch, heads, blocks, blocks]``; none for other heads."""
    kind, size = heads.kind[:, None, None], online.block_size
    masks = []
    if bool((kind == A_SHAPE).any()):
        a_shape = patterns.a_shape_blocks(length, heads.first, heads.second, size, starts)
        masks.append(a_shape & (kind == A_SHAPE))
    if scores.blocks is not None:
        k_b = torch.where(heads.kind == BLOCK_SPARSE, heads.first, 1)
        masks.append(patterns.choose_blocks(scores.blocks, k_b) & (kind == BLOCK_SPARSE))
    mask = masks[0] if len(masks) == 1 else masks[0] | masks[1]
    if online.dense_rows:
        mask[:, :, max(0, length - online.dense_rows) // size :] = True
        mask = mask.tril()
    return mask


def slash_area(verticals: Tensor, slashes: Tensor, length: int, block_size: int, exact: bool = True) -> Tensor:
    """Share of the causal pairs in the kernel's pieces, float64 ``[heads]``: the mean over the batch.

    Counted by the kernel's index, or without `exact` by `minference_patterns.slash_area`.
    """
    if not exact:
        columns, distances = (patterns.members(ids, length) for ids in (verticals, slashes))
        return patterns.slash_area(columns, distances, block_size).mean(0)
    index = ops.vertical_slash_index(verticals, slashes, length, block_size)
    begin = torch.arange(index.ranges.shape[2], device=slashes.device) * block_size
    rows = (length - begin).clamp_max(block_size)
    # Distance 0 is always in: the last square reaches the block's end, and all of the block's own keys are in squares.
    # That spares going through all pieces, as `index.pairs()` must.
    last = index.ranges.gather(3, (index.range_counts.long() - 1)[..., None])[..., 0] + block_size
    before = block_size * index.range_counts.long() + index.column_counts - (last - begin)
    pairs = (rows * before + rows * (rows + 1) // 2).sum(2)
    return pairs.double().mean(0) / causal_pairs(length)


def areas(
    scores: Scores, heads: Heads, online: Online, length: int, starts: Tensor | None = None, exact: bool = True
) -> Tensor:
    """Share of the causal pairs that the kernels compute, float64 ``[heads]``: the mean over the batch."""
    area = torch.zeros(len(heads.kind), dtype=torch.float64, device=heads.kind.device)
    mine = heads.kind == VERTICAL_SLASH
    if bool(mine.any()):
        slashes = slash_area(*slash_lists(scores, heads, online), length, online.block_size, exact)
        area = torch.where(mine, slashes, area)
    if not bool(mine.all()):
        if exact:
            mask = block_mask(scores, heads, online, length, starts)
            blocks = patterns.block_area(mask, length, online.block_size).mean(0)
        else:
            blocks = quick_block_area(heads, online, length)
        area = torch.where(mine, area, blocks)
    return area


def quick_block_area(heads: Heads, online: Online, length: int) -> Tensor:
    """The area of A-shape and block-sparse heads from their budgets alone, float64 ``[heads]``, in O(blocks).

    Exact for A-shape without padding. Block-sparse heads with a choice are taken not to choose their own block, which is half.
    """
    size, device = online.block_size, heads.kind.device
    i = torch.arange(-(-length // size), device=device)
    rows, a_shape = (length - i * size).clamp_max(size), (heads.kind == A_SHAPE)[:, None]
    first, second = heads.first[:, None], heads.second[:, None]
    nearest = torch.div(i * size - second + 1, size, rounding_mode="floor").clamp_min(0)
    count = torch.where(
        a_shape, i - nearest + 1 + torch.minimum((first + size - 1) // size, nearest), first.minimum(i + 1)
    )
    if online.dense_rows:
        count = torch.where(i >= max(0, length - online.dense_rows) // size, i + 1, count)
    own = (a_shape | (count > i)).long()
    pairs = rows * size * (count - own) + own * (rows * (rows + 1) // 2)
    return pairs.sum(1).double() / causal_pairs(length)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Heads,
    scores: Scores,
    online: Online,
    scale: float,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a whole prompt by the patterns of its heads.

    Args:
        query: ``[batch, heads, length, d]``; key, value: ``[batch, kv_heads, length, d]``.

    Returns:
        ``[batch, heads, length, d]``, and the area that each head computed, float64 ``[heads]``.
    """
    length, size = key.shape[2], online.block_size
    mine = heads.kind == VERTICAL_SLASH
    out = area = None
    if bool(mine.any()):
        lists = slash_lists(scores, heads, online)
        out = ops.vertical_slash_attention(query, key, value, *lists, block_size=size, starts=starts, scale=scale)
        area = slash_area(*lists, length, size)
    if not bool(mine.all()):
        mask = block_mask(scores, heads, online, length, starts).expand(len(query), -1, -1, -1)
        blocks = ops.block_sparse_attention(query, key, value, mask, block_size=size, starts=starts, scale=scale)
        block_area = patterns.block_area(mask, length, size).mean(0)
        out = blocks if out is None else torch.where(mine[:, None, None], out, blocks)
        area = block_area if area is None else torch.where(mine, area, block_area)
    assert out is not None and area is not None
    return out, area


def fit(
    area_of: Callable[[Tensor], Tensor], goal: float, low: Tensor, high: Tensor, step: int = 1, tolerance: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The largest multiple of `step` in ``[low, high]`` whose area is at most ``goal·(1 + tolerance)``, head by head.

    The paper changes a budget by one step until the area fits; areas grow with budgets, so this halves the interval instead.

    Args:
        area_of: areas ``[heads]`` of budgets int64 ``[heads]``.

    Returns:
        budgets int64 ``[heads]`` and whether any budget fits, boolean ``[heads]`` (where none does: the smallest).
    """
    limit = goal * (1 + tolerance)
    least, most = -(-low // step), high // step
    least_fits = area_of(least * step) <= limit
    while bool((least < most).any()):
        middle = (least + most + 1) // 2
        fits = area_of(middle * step) <= limit
        least, most = torch.where(fits, middle, least), torch.where(fits, most, middle - 1)
    return least * step, least_fits


def most_units(heads: Heads, length: int) -> Tensor:
    """The factor, in units, with which the larger budget of each head covers `length` tokens: int64 ``[heads]``."""
    return -(-length * UNIT // torch.maximum(heads.first, heads.second)) + 1


def fit_area(
    scores: Scores, heads: Heads, online: Online, length: int, goal: float, starts: Tensor | None = None
) -> Heads:
    """Budgets of every head scaled, both alike, until its kernel area is just below `goal` (or as small as it gets)."""

    def area_of(factor: Tensor) -> Tensor:
        return areas(scores, heads.scaled(factor / UNIT), online, length, starts, exact=False)

    most = most_units(heads, length)
    factor, _ = fit(area_of, goal, torch.ones_like(most), most)
    return heads.scaled(factor / UNIT)


class PatternPolicy(PrefillPolicy):
    """Reads a prompt by the patterns of its heads.

    A call that is not a whole prompt (a later chunk, a later turn) has no last queries to judge by, and is dense.

    Args:
        layers: the patterns of each layer; None: a dense layer.
        area: scale every head's budgets until its kernel computes about this share of the causal area (None: as they are).
    """

    def __init__(self, slug: str, layers: Sequence[Heads | None], online: Online, area: float | None = None) -> None:
        self.slug, self.layers, self.online, self.area = slug, layers, online, area
        self.meter = AreaMeter()

    def prefill(self, layer: LayerView, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Estimate, choose and attend; dense where `dense_because` gives a reason."""
        heads, size = self.layers[layer.index], {"batch": len(query), "new": query.shape[2], "length": key.shape[2]}
        reason = self.dense_because(layer, heads, query, key)
        if heads is None or reason is not None:
            if reason is not None:
                layer.runtime.say_once(f"{self.slug}: {reason}: attention is dense")
            self.meter.add(layer.index, 1.0, heads=query.shape[1], **size)
            return dense_attention(query, key, value, layer.scale, starts=layer.starts, window=layer.window)
        out, area = self.attend(layer, heads.to(query.device), query, key, value)
        self.meter.add(layer.index, area, **size)
        return out

    def attend(
        self, layer: LayerView, heads: Heads, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The output and the area of each head."""
        starts, length = layer.starts, key.shape[2]
        scores = self.scores(layer, heads, query, key)
        if self.area is not None:
            heads = fit_area(scores, heads, self.online, length, self.area, starts)
        return attend(query, key, value, heads, scores, self.online, layer.scale, starts)

    def scores(self, layer: LayerView, heads: Heads, query: Tensor, key: Tensor) -> Scores:
        """What places the patterns of this prompt's heads."""
        return estimate(query, key, heads.kind, self.online, layer.scale, layer.starts)

    def dense_because(self, layer: LayerView, heads: Heads | None, query: Tensor, key: Tensor) -> str | None:
        """Why this call reads everything, or None."""
        new, length = query.shape[2], key.shape[2]
        if new != length:
            return f"{new} queries are a later part of {length} tokens, and patterns need a whole prompt"
        if layer.window and layer.window < length:
            return f"a layer has a window of {layer.window} tokens of its own"
        if length <= self.online.block_size:
            return f"a prompt of {length} tokens is one block"
        if heads is not None and self.area is None and bool(heads.cover(length, self.online.block_size).all()):
            return f"the budgets cover a prompt of {length} tokens"
        return None

    def report(self) -> dict[str, Any]:
        """`prefill_area` and `prefill_area_of_heads`; see `gossamer.patterns.AreaMeter`."""
        return self.meter.report()
