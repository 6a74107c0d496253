"""Tree search for the best of many blocks of keys: hold N segments, halve each, score one representative per half, keep the
best N.

Finds (nearly) the best N of M blocks with ``2N * ceil(log2(M / N))`` scores instead of M, where near blocks score alike (HiP,
arXiv 2406.09827). A *line* is one search; the reference takes all lines down together, a level at a time. Integer arithmetic
throughout: halving floats would lose blocks or make them twice. What a level reads hangs on the level before, so a search is
bound by the latency of scattered rows, and by arithmetic where many queries vote.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gossamer.errors import InputError
from gossamer.ops import _checks
from gossamer.ops._dispatch import DTYPE_CODES, native, resolve

_OP = "tree_search"
_CHUNK = 1 << 21  # elements that the reference gathers at a time: 8 MB, which stay in the processor's cache

Representative = Literal["center", "first", "last"]
#: Scores float ``[..., 2N]`` of halves that start at and hold ``[..., 2N]`` blocks; what is said of empty ones is not used.
Score = Callable[[Tensor, Tensor], Tensor]
#: Key rows float32 ``[batch, heads, …, d]`` by int64 ids ``[batch, heads, …]``.
Fetch = Callable[[Tensor], Tensor]


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


def representatives(starts: Tensor, sizes: Tensor, which: str) -> Tensor:
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


def take(rows: Tensor, ids: Tensor) -> Tensor:
    """Rows of ``[batch, kv_heads, length, d]`` by int64 ids ``[batch, heads, …]``, float32 ``[batch, heads, …, d]``.

    Heads that share a KV head read its rows in place; nothing else is copied, also from a view of a larger cache.
    """
    if rows.stride(3) != 1 or rows.stride(2) == 0 or rows.stride(0) % rows.stride(2) or rows.stride(1) % rows.stride(2):
        rows = rows.contiguous()
    batch, kv_heads, length, dim = rows.shape
    of_batch, of_head = rows.stride(0) // rows.stride(2), rows.stride(1) // rows.stride(2)
    flat = rows.as_strided(((batch - 1) * of_batch + (kv_heads - 1) * of_head + length, dim), (rows.stride(2), 1))
    head = torch.arange(ids.shape[1], device=ids.device) // (ids.shape[1] // kv_heads)
    base = torch.arange(batch, device=ids.device)[:, None] * of_batch + head * of_head
    ids = ids + base.view(batch, -1, *[1] * (ids.dim() - 2))
    return flat.index_select(0, ids.flatten()).view(*ids.shape, dim).float()


def tree_search(
    voters: Tensor,
    key: Tensor,
    begin: Tensor,
    ends: Tensor,
    nodes: int,
    *,
    block: int = 1,
    step: int = 1,
    representative: Representative = "center",
) -> Found:
    """Find the best blocks of keys (nearly) for every line of voters.

    Parameters
    ----------
    voters
        [B, H, n, v, d]: n lines of v queries that choose together, float32, bfloat16 or float16.
    key
        [B, Hkv, S, d], dtype of ``voters``; H is a multiple of Hkv. Views of a larger cache are fine.
    begin
        int32 [B]: the row at which block 0 of each sequence begins.
    ends
        int32 [n]: the row behind the last one that each line searches, at most S; nothing is searched where it is not
        behind ``begin``. The last block may be short.
    nodes
        N, the blocks that a line keeps.
    block, step
        Rows of a block, and which of them are scored: every ``step``-th.
    representative
        The block that speaks for a segment: its ``"center"``, ``"first"`` or ``"last"``.

    Returns
    -------
    ``Found``: blocks int32 [B, H, n, N] ascending, counts int32 and evaluations int64 [B, H, n]. Of equal scores any may win.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit, a number below 1, rows out of range.

    >>> key = -(torch.arange(64.0) - 41.6).abs().view(1, 1, 64, 1)  # near keys score alike, and best around row 41
    >>> found = tree_search(torch.ones(1, 1, 1, 1, 1), key, torch.tensor([0]), torch.tensor([64]), 4)
    >>> found.blocks.tolist(), int(found.counts), int(found.evaluations)
    ([[[[40, 41, 42, 43]]]], 4, 32)
    """
    v, k = voters.shape, key.shape
    fits = len(v) == 5 and len(k) == 4 and v[0] == k[0] and v[4] == k[3] and k[1] and v[1] % k[1] == 0 and v[3]
    if not fits or key.dtype is not voters.dtype or not key.dtype.is_floating_point or key.device != voters.device:
        raise InputError(
            f"{_OP}: want voters [B,H,n,v,d] and key [B,Hkv,S,d] of one dtype, got {list(v)} and {list(k)}"
        )
    if min(nodes, block, step) < 1 or representative not in _SPEAKERS:
        raise InputError(
            f"{_OP}: nodes, block and step must be 1 or more, and the representative center, first or last"
        )
    first = _checks.int32(_OP, "begin", begin, (v[0],), voters)
    last = _checks.int32(_OP, "ends", ends, (v[2],), voters)
    assert first is not None and last is not None
    run = torch.ops.gossamer.tree_search if torch.compiler.is_compiling() else _run
    return Found(*run(voters, key, first, last, nodes, block, step, representative))


_SPEAKERS: dict[str, int] = {"center": 0, "first": 1, "last": 2}


def _run(
    voters: Tensor, key: Tensor, begin: Tensor, ends: Tensor, nodes: int, block: int, step: int, representative: str
) -> tuple[Tensor, Tensor, Tensor]:
    if resolve(_OP, _OP, voters, key) != "native":
        return reference(voters, key, begin, ends, nodes, block, step, representative)
    voters, key = voters.contiguous(), _checks.row_major(key)
    batch, heads, lines, votes, dim = voters.shape
    blocks = torch.empty((batch, heads, lines, nodes), dtype=torch.int32)
    counts = torch.empty((batch, heads, lines), dtype=torch.int32)
    evaluations = torch.empty((batch, heads, lines), dtype=torch.int64)
    tensors = (voters, key, begin, ends, blocks, counts, evaluations)
    status = native().tree_search(
        tuple(t.data_ptr() for t in tensors),
        key.stride()[:3],
        (batch, heads, *key.shape[1:3], dim),
        (lines, votes, nodes, block, step, _SPEAKERS[representative]),
        DTYPE_CODES[voters.dtype],
        torch.get_num_threads(),
    )
    _checks.raise_status(_OP, status)
    return blocks, counts, evaluations


def reference(
    voters: Tensor,
    key: Tensor,
    begin: Tensor,
    ends: Tensor,
    nodes: int,
    block: int,
    step: int,
    representative: str,
    jitter: int = 0,
    generator: torch.Generator | None = None,
    fetch: Fetch | None = None,
) -> Found:
    """The search in PyTorch, arguments as in :func:`tree_search`; with `jitter` splits move at random (see `descend`).

    `fetch` brings the keys that are scored (default: `take` from `key`).
    """
    length, (batch, heads, count) = key.shape[2], voters.shape[:3]
    if bool((begin < 0).any()) or bool((ends > length).any()):
        _checks.raise_status(_OP, 1)
    first, last = begin.long()[:, None], ends.long()[None]
    blocks = ((last - first).clamp_min(0) + block - 1) // block
    lines = blocks[:, None].expand(batch, heads, count)
    offset = torch.arange(0, block, step, device=voters.device)
    bring: Fetch = (lambda ids: take(key, ids)) if fetch is None else fetch

    def score(at: slice) -> Score:
        some, limit = voters[:, :, at].float(), last[:, None, at, None, None]

        def best(segment: Tensor, size: Tensor) -> Tensor:
            speaker = representatives(segment, size, representative)
            ids = (first[..., None, None] + speaker * block)[..., None] + offset
            keys = bring(ids.clamp_max(length - 1).flatten(3))
            highest: Tensor = (some @ keys.transpose(3, 4)).amax(3).unflatten(3, (-1, len(offset)))
            masked: Tensor = highest.masked_fill(ids >= limit, -math.inf)
            return masked.amax(4)

        return best

    size = max(1, _CHUNK // max(1, batch * heads * 2 * nodes * len(offset) * key.shape[3]))
    chunks = [slice(at, at + size) for at in range(0, count, size)]
    parts = [descend(lines[:, :, at], nodes, score(at), jitter, generator) for at in chunks]
    return Found(*(torch.cat(tensors, 2) for tensors in zip(*parts, strict=True)))


_custom = torch.library.custom_op("gossamer::tree_search", _run, mutates_args=())


@_custom.register_fake
def _fake(
    voters: Tensor, key: Tensor, begin: Tensor, ends: Tensor, nodes: int, block: int, step: int, representative: str
) -> tuple[Tensor, Tensor, Tensor]:
    lines = voters.shape[:3]
    return (
        voters.new_empty((*lines, nodes), dtype=torch.int32),
        voters.new_empty(lines, dtype=torch.int32),
        voters.new_empty(lines, dtype=torch.int64),
    )
