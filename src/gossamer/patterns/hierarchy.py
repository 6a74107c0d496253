"""What a tree search over a prompt's keys searches and finds: the layout of sinks, window and searched region, and the vote of
several searches. The search itself is `gossamer.ops.tree_search` (HiP, arXiv 2406.09827).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.ops.tree_search import (
    Found,
    Representative,
    descend,
    halves,
    initial_segments,
    levels,
    pack,
    representatives,
    take,
)

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
    "search_together",
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


def search_together(
    voters: Tensor,
    key: Tensor,
    begin: Tensor,
    ends: Tensor,
    nodes: int,
    group: int,
    block: int = 1,
    step: int = 1,
    representative: Representative = "center",
) -> Found:
    """The tree search with pools of `group` neighbouring heads: of their ``2·N·G`` halves the best ``N·G`` go on.

    A head whose scores are high keeps more blocks than one whose scores are low, ``N·G`` together; scores of different heads
    are compared as they are. Arguments as in `gossamer.ops.tree_search`.

    Returns:
        `Found` with ``N·G`` slots a head, and of the scores taken each head's share.
    """
    (batch, heads, count, votes, dim), length = voters.shape, key.shape[2]
    pools, first, last = heads // group, begin.long()[:, None], ends.long()[None]
    blocks = ((last - first).clamp_min(0) + block - 1) // block
    offset = torch.arange(0, block, step, device=key.device)
    parts = []
    chunk = max(1, _POOLED // max(1, batch * heads * 2 * nodes * group * len(offset) * (dim + votes)))
    for at in (slice(i, i + chunk) for i in range(0, count, chunk)):
        lines = blocks[:, None, at].expand(batch, pools, -1)
        starts, sizes = (
            x.repeat(1, 1, 1, group) for x in initial_segments(lines, nodes)
        )  # every head begins with the same
        owner = torch.arange(group, device=key.device).repeat_interleave(nodes).expand_as(starts)
        some, limit = voters[:, :, at].float(), last[:, None, at, None, None]
        depth = levels(lines, nodes)
        for level in range(int(depth.max()) if depth.numel() else 0):
            starts, sizes = halves(starts, sizes)
            owner = torch.cat([owner, owner], -1)
            speaker = representatives(starts, sizes, representative)
            ids = (first[..., None, None] + speaker * block)[..., None] + offset
            every = ids.clamp_max(length - 1).flatten(3).repeat_interleave(group, 1)
            highest = (some @ take(key, every).transpose(3, 4)).amax(3).unflatten(3, (-1, len(offset)))
            scored = highest.unflatten(1, (pools, group)).masked_fill((ids >= limit)[:, :, None], -math.inf).amax(5)
            mine = scored.gather(2, owner[:, :, None])[:, :, 0].masked_fill(sizes < 1, -math.inf)
            # A finished line keeps what it has: it has no more than N blocks a head.
            best = mine.masked_fill((level >= depth)[..., None] & (sizes > 0), math.inf).topk(nodes * group).indices
            starts, sizes, owner = (x.gather(-1, best) for x in (starts, sizes, owner))
        one = [pack(starts, (sizes > 0) & (owner == g)) for g in range(group)]
        found = [torch.stack(x, 2).flatten(1, 2) for x in zip(*one, strict=True)]
        parts.append(Found(found[0], found[1], (2 * nodes * depth).repeat_interleave(group, 1)))
    return Found(*(torch.cat(x, 2) for x in zip(*parts, strict=True)))


_POOLED = 1 << 23  # elements held at a time by `search_together`


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
