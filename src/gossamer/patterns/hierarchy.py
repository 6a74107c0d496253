"""Tree search for the best of many blocks: hold N segments, halve each, score one representative per half, keep the best N.

Finds (nearly) the best N of M blocks with ``2N·⌈log₂(M/N)⌉`` scores instead of M, where near blocks score alike (HiP,
arXiv 2406.09827). A *line* is one search; all lines of a tensor go down together, and the only loop is over levels.
Integer arithmetic throughout: halving floats would lose blocks or make them twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Representative = Literal["center", "first", "last"]
#: Scores float ``[..., 2N]`` of halves that start at and hold ``[..., 2N]`` blocks; what is said of empty ones is not used.
Score = Callable[[Tensor, Tensor], Tensor]


class Found(NamedTuple):
    """Chosen blocks: int32 ``[..., N]`` ascending (slots beyond the count are 0), int32 counts and int64 scores taken ``[...]``."""

    blocks: Tensor
    counts: Tensor
    evaluations: Tensor


def initial_segments(blocks: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """Starts and sizes int64 ``[..., nodes]`` that part ``[...]`` blocks evenly; sizes are 0 or 1 where there are too few.

    >>> starts, sizes = initial_segments(torch.tensor([10, 2]), 4)
    >>> starts.tolist(), sizes.tolist()
    ([[0, 2, 5, 7], [0, 0, 1, 1]], [[2, 3, 2, 3], [0, 1, 0, 1]])
    """
    edges = blocks.long()[..., None] * torch.arange(nodes + 1, device=blocks.device) // nodes
    return edges[..., :-1], edges.diff(dim=-1)


def levels(blocks: Tensor, nodes: int) -> Tensor:
    """Halvings until every segment holds one block, int64 ``[...]``: ``⌈log₂ of the largest first segment⌉``.

    >>> levels(torch.tensor([0, 4, 5, 8, 9, 16, 17]), 4).tolist()
    [0, 0, 1, 1, 2, 2, 3]
    """
    largest = (blocks.long() + nodes - 1) // nodes
    return torch.frexp((largest - 1).clamp_min(0).double())[1].long()  # the bit length of largest − 1


def halves(starts: Tensor, sizes: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Left halves, then right ones, ``[..., 2N]``: left holds ``⌊size/2⌋`` (+ `shift`, inside the segment), right the rest.

    >>> halves(torch.tensor([4]), torch.tensor([5]))
    (tensor([4, 6]), tensor([2, 3]))
    """
    left = sizes // 2
    if shift is not None:  # both halves of a segment of two or more stay non-empty
        left = torch.where(sizes > 1, (left + shift).clamp_min(1).minimum(sizes - 1), left)
    return torch.cat([starts, starts + left], -1), torch.cat([left, sizes - left], -1)


def representatives(starts: Tensor, sizes: Tensor, which: Representative) -> Tensor:
    """The block that speaks for each segment."""
    if which == "center":
        return starts + sizes // 2
    return starts if which == "first" else (starts + sizes - 1).maximum(starts)


def descend(
    blocks: Tensor, nodes: int, score: Score, jitter: int = 0, generator: torch.Generator | None = None
) -> Found:
    """Search every line for its best `nodes` blocks; lines that have no more than that keep all, unscored.

    Args:
        blocks: int ``[...]``, blocks of each line.
        score: see `Score`; called once a level with all lines.
        jitter: move each split by a random −jitter … jitter (an ensemble's members differ by it).
        generator: for the jitter, on the CPU.
    """
    starts, sizes = initial_segments(blocks, nodes)
    depth, evaluations, level = levels(blocks, nodes), torch.zeros_like(blocks, dtype=torch.int64), 0
    while True:
        # Even splits end after `depth` levels whatever the scores; a finished line only keeps what it has.
        open_lines = sizes.amax(-1) > 1 if jitter else level < depth
        if not bool(open_lines.any()):
            break
        shift = None
        if jitter:
            drawn = torch.randint(-jitter, jitter + 1, sizes.shape, generator=generator)
            shift = drawn.to(sizes.device)
        starts, sizes = halves(starts, sizes, shift)
        scores = score(starts, sizes).masked_fill(sizes < 1, float("-inf"))
        best = scores.topk(nodes, dim=-1, sorted=False).indices
        starts, sizes = starts.gather(-1, best), sizes.gather(-1, best)
        evaluations += 2 * nodes * open_lines
        level += 1
    return Found(*pack(starts, sizes > 0), evaluations)


def pack(ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The valid ids of each line ascending and first, the rest 0: int32 ``[..., N]`` and counts int32 ``[...]``."""
    last = torch.iinfo(torch.int32).max
    packed = ids.masked_fill(~valid, last).sort(-1).values
    return packed.masked_fill(packed == last, 0).to(torch.int32), valid.sum(-1, dtype=torch.int32)


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
