"""What a tree search over a prompt's keys searches and finds: the layout of sinks, window and searched region, and the vote of
several searches. The search itself is `gossamer.ops.tree_search` (HiP, arXiv 2406.09827).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.ops.tree_search import Found, Representative, descend, initial_segments, levels, pack, representatives

__all__ = [
    "Found",
    "HipIndex",
    "Layout",
    "Representative",
    "descend",
    "initial_segments",
    "levels",
    "pack",
    "representatives",
    "vote",
]


def vote(members: list[Found], threshold: int = 1) -> Found:
    """Blocks that at least `threshold` of several searches chose; 1 is their union. ``[..., N·members]`` slots.

    >>> one = Found(torch.tensor([1, 3]), torch.tensor(2), torch.tensor(4))
    >>> two = Found(torch.tensor([3, 0]), torch.tensor(1), torch.tensor(4))
    >>> union, both = vote([one, two]), vote([one, two], 2)
    >>> union.blocks.tolist(), int(union.counts), both.blocks.tolist(), int(both.counts)
    ([1, 3, 0, 0], 2, [3, 0, 0, 0], 1)
    """
    slot = torch.arange(members[0].blocks.shape[-1], device=members[0].blocks.device)
    ids = torch.cat([m.blocks.masked_fill(slot >= m.counts[..., None], -1) for m in members], -1).sort(-1).values
    chosen = ids >= 0
    chosen[..., 1:] &= ids[..., 1:] != ids[..., :-1]
    if threshold > 1:  # the ids are sorted: a block with enough votes is still the same that many places on
        chosen[..., : 1 - threshold] &= ids[..., threshold - 1 :] == ids[..., : 1 - threshold]
        chosen[..., 1 - threshold :] = False
    return Found(*pack(ids, chosen), torch.stack([m.evaluations for m in members]).sum(0))


@dataclass(frozen=True)
class Layout:
    """Which keys are sinks, window and searched region for each block of queries.

    Attributes:
        new, length: queries, which stand at the last `new` of `length` positions.
        starts: int ``[batch]``, first real row of each sequence, or None for 0.
        causal: false for encoders: everything is searched, with neither sinks nor window.
    """

    new: int
    length: int
    block_q: int = 32
    block_k: int = 2
    window: int = 256
    sink: int = 16
    starts: Tensor | None = None
    causal: bool = True

    @property
    def query_blocks(self) -> int:
        """Blocks of queries; the last may be short."""
        return -(-self.new // self.block_q)

    def positions(self, device: torch.device) -> Tensor:
        """Position of each query ``[query blocks, block_q]``; the last block is filled up with the last query."""
        filled = torch.arange(self.query_blocks * self.block_q, device=device).clamp_max(self.new - 1)
        return (filled + self.length - self.new).view(-1, self.block_q)

    def first(self, device: torch.device) -> Tensor:
        """First real key ``[batch or 1]``."""
        return (
            torch.zeros(1, dtype=torch.int64, device=device) if self.starts is None else self.starts.long().to(device)
        )

    def region(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Searched keys: begin ``[batch or 1, 1]`` and end ``[1, query blocks]``; none where end ≤ begin."""
        last = self.positions(device)[:, -1]
        begin, end = self.first(device)[:, None], torch.full_like(last, self.length)
        return (begin + self.sink, (last + 1 - self.window)[None]) if self.causal else (begin, end[None])


@dataclass(frozen=True)
class HipIndex:
    """The keys that blocks of queries read.

    Attributes:
        blocks: int32 ``[batch, heads, query blocks, N]``, chosen key blocks ascending, counted from the searched region's
            beginning; slots beyond `counts` are 0.
        counts: int32 ``[batch, heads, query blocks]``.
        evaluations: int64 ``[batch, heads, query blocks]``, representatives scored.
    """

    layout: Layout
    blocks: Tensor
    counts: Tensor
    evaluations: Tensor

    def rows(self, at: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Rows of the chosen blocks, int64 ``[batch, heads, query blocks, N·block_k]`` ascending, and which of them count."""
        layout, blocks = self.layout, self.blocks[:, :, at].long()
        begin, end = layout.region(blocks.device)
        offset = torch.arange(layout.block_k, device=blocks.device)
        ids = (begin[..., None, None] + blocks * layout.block_k)[..., None] + offset
        used = torch.arange(blocks.shape[3], device=ids.device) < self.counts[:, :, at, None]
        valid = used[..., None] & (ids < end[:, None, at, None, None])
        return ids.flatten(3).clamp_max(layout.length - 1), valid.flatten(3)

    def to_mask(self) -> Tensor:
        """What every query reads, boolean ``[batch, heads, new, length]``: for pictures and tests, not for long contexts."""
        layout, (ids, valid) = self.layout, self.rows()
        new, length, device = layout.new, layout.length, ids.device
        chosen = torch.zeros(*ids.shape[:3], length + 1, dtype=torch.bool, device=device)
        chosen = chosen.scatter_(3, ids.masked_fill(~valid, length), True)[..., :length]
        chosen = chosen.repeat_interleave(layout.block_q, 2)[:, :, :new]
        if not layout.causal:
            return chosen
        i, j = layout.positions(device).flatten()[:new, None], torch.arange(length, device=device)
        start = layout.first(device)[:, None, None]
        always = (j >= start) & ((j < start + layout.sink) | (j > i - layout.window)) | (i == j)
        return (chosen | always[:, None]) & (j <= i)
