"""MInference's three patterns as pure functions: which keys each query reads, and how they are found (see `minference`).

One head, post-rotary ``Q, K`` of S tokens, blocks of B, the last L queries as witnesses:

    A-shape(n_init, n_local):  keep(i, j) = j ≤ i and (i − j < n_local or j < n_init)
    vertical-slash(k_v, k_s):  Â = softmax(Q[−L:] Kᵀ/√d, causal)           [L, S], fp32
                               v_j = Σ_r Â[r, j],  s_δ = Σ_r Â[r, q_r − δ],  q_r = S − L + r
                               keep(i, j) = j ≤ i and (j ∈ top-k_v of v or i − j ∈ top-k_s of s)
    block-sparse(k_b):         top-k_b of mean_B(Q) · mean_B(K) over the causal blocks of each query block

The first `sinks` columns and the first `local` distances are always among the best. What a kernel computes is a superset,
made of whole blocks: areas here are shares of the ``S(S+1)/2`` causal pairs that lie inside the blocks and columns computed.
Everything is per query head and vectorised over heads; with left padding, columns count from a sequence's first real row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.patterns import causal_pairs

_CHUNK = 1 << 24  # elements of Â held at a time: 64 MB
_FORCED = 1e6  # above any sum of probabilities, and exact in float32 with a rank added


# -- token-level masks: the definitions, for tests, pictures and the released search ----------------------------------


def a_shape_mask(length: int, n_init: int, n_local: int) -> Tensor:
    """What A-shape keeps, boolean ``[length, length]``.

    >>> a_shape_mask(5, n_init=1, n_local=2).int()[4].tolist()
    [1, 0, 0, 1, 1]
    """
    i, j = torch.arange(length)[:, None], torch.arange(length)
    keep: Tensor = (j <= i) & ((i - j < n_local) | (j < n_init))
    return keep


def vertical_slash_mask(verticals: Tensor, slashes: Tensor, length: int) -> Tensor:
    """What the columns and distances ``[..., k]`` keep by definition, boolean ``[..., length, length]``.

    >>> vertical_slash_mask(torch.tensor([1]), torch.tensor([0]), 4).int().tolist()[3]
    [0, 1, 0, 1]
    """
    i, j = torch.arange(length)[:, None], torch.arange(length)
    column, distance = (members(x, length) for x in (verticals, slashes))
    keep: Tensor = (j <= i) & (column[..., None, :] | distance[..., (i - j).clamp_min(0)])
    return keep


def members(ids: Tensor, length: int) -> Tensor:
    """Which of ``0 … length − 1`` are in `ids` ``[..., k]``: boolean ``[..., length]``."""
    found = torch.zeros(*ids.shape[:-1], length, dtype=torch.bool, device=ids.device)
    return found.scatter_(-1, ids.long(), True)


# -- vertical-slash: scores and choice --------------------------------------------------------------------------------


def last_attention(query: Tensor, key: Tensor, last_q: int, scale: float, starts: Tensor | None = None) -> Tensor:
    """Â, the attention of the last `last_q` queries: float32 ``[batch, heads, last_q, length]``.

    Args:
        query: ``[batch, heads, new, d]``; key: ``[batch, kv_heads, length, d]``; the queries are its last positions.
        starts: int ``[batch]``, first real row; the padding gets nothing, and queries in it attend to nothing.
    """
    last_q, length, kv_heads = min(last_q, query.shape[2]), key.shape[2], key.shape[1]
    grouped = query[:, :, -last_q:].float().unflatten(1, (kv_heads, -1)).flatten(2, 3) * scale
    scores: Tensor = (grouped @ key.float().transpose(2, 3)).unflatten(2, (-1, last_q)).flatten(1, 2)
    later = torch.ones(last_q, last_q, dtype=torch.bool, device=query.device).triu(1)
    scores[..., length - last_q :].masked_fill_(later, -torch.inf)
    if starts is not None:
        row = torch.arange(length, device=query.device)
        scores.masked_fill_(row < starts.to(query.device)[:, None, None, None], -torch.inf)
        return scores.softmax(-1).nan_to_num_(0.0)
    return scores.softmax(-1)


def vertical_scores(attention: Tensor) -> Tensor:
    """v_j = Σ_r Â[r, j]: ``[..., last_q, length]`` → ``[..., length]``."""
    return attention.sum(-2)


def slash_scores(attention: Tensor) -> Tensor:
    """s_δ = Σ_r Â[r, q_r − δ] for every distance δ: ``[..., last_q, length]`` → ``[..., length]``.

    A shear: padded with `last_q` zeros on the left and read with rows one longer, diagonals become columns.

    >>> slash_scores(torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]])).tolist()[:2]
    [1.2000000476837158, 0.699999988079071]
    """
    last_q, length = attention.shape[-2:]
    padded = F.pad(attention, (last_q, 0)).contiguous()
    width = length + last_q
    sheared = padded.as_strided((*padded.shape[:-2], last_q, length + 1), (*padded.stride()[:-2], width + 1, 1))
    sums: Tensor = sheared.sum(-2)
    return sums[..., 1:].flip(-1)


def vertical_slash_scores(
    query: Tensor, key: Tensor, scale: float, last_q: int = 64, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Both scores of every head, float32 ``[batch, heads, length]`` each; Â is held for a few KV heads at a time."""
    group, kv_heads = query.shape[1] // key.shape[1], key.shape[1]
    per_head = query.shape[0] * group * min(last_q, query.shape[2]) * key.shape[2]
    step = max(1, _CHUNK // per_head)
    parts = []
    for at in range(0, kv_heads, step):
        heads = slice(at * group, (at + step) * group)
        seen = last_attention(query[:, heads], key[:, at : at + step], last_q, scale, starts)
        parts.append((vertical_scores(seen), slash_scores(seen)))
    vertical, slash = (torch.cat(scores, 1) for scores in zip(*parts, strict=True))
    return vertical, slash


def force(
    vertical: Tensor, slash: Tensor, sinks: int = 30, local: int = 100, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Copies of the scores ``[batch, heads, length]`` in which sinks and the local band lead, nearest first.

    The released code sets them to +∞; here they are ranked, so that a budget smaller than the band keeps its nearest part
    and distance 0 is always in (what the column part of the kernel needs to be causal).
    """
    length, device = vertical.shape[-1], vertical.device
    row = torch.arange(length, device=device)
    first = torch.zeros(1, dtype=torch.int64, device=device) if starts is None else starts.long().to(device)
    column = (row - first[:, None])[:, None]  # counted from the first real row
    rank = _FORCED - row.float()
    led = torch.where((column >= 0) & (column < sinks), _FORCED - column.float(), vertical)
    return led.masked_fill(column < 0, -torch.inf), torch.where(row < local, rank, slash)


def choose(vertical: Tensor, slash: Tensor, k_v: Tensor, k_s: Tensor) -> tuple[Tensor, Tensor]:
    """The best columns, ascending, and distances, descending, of scores ``[batch, heads, length]``; int32 ``[…, k]``.

    Args:
        k_v, k_s: int ``[heads]``, budgets of each head, at most `length`; k is the largest of them.

    A head with a smaller budget is filled up with the last column and distance 0, which cost nothing: distance 0 is among
    the distances of every head, and the last column is in its own block. So are places whose score is ``-inf``.
    """
    length = vertical.shape[-1]
    found = []
    for scores, budget, filler in ((vertical, k_v, length - 1), (slash, k_s, 0)):
        budget = budget.to(scores.device)
        best = scores.topk(int(budget.max()), dim=-1)
        over = torch.arange(best.indices.shape[-1], device=scores.device) >= budget[:, None]
        found.append(best.indices.masked_fill(over | (best.values == -torch.inf), filler).to(torch.int32))
    return found[0].sort(-1).values, found[1].sort(-1, descending=True).values


# -- block-sparse and A-shape: block masks ----------------------------------------------------------------------------


def block_scores(query: Tensor, key: Tensor, block_size: int = 64, starts: Tensor | None = None) -> Tensor:
    """Ā, products of block means: float32 ``[batch, heads, blocks, blocks]``, −∞ above the diagonal.

    The last block is filled up with zeros, as published; so are rows of the padding, and blocks that are all padding are
    −∞ except to themselves.
    """
    length, kv_heads, device = key.shape[2], key.shape[1], key.device
    blocks = -(-length // block_size)
    means = []
    for states in (query, key):
        states = states.float()
        if starts is not None:
            real = torch.arange(length, device=device) >= starts.to(device)[:, None]
            states = states * real[:, None, :, None]
        padded = F.pad(states, (0, 0, 0, blocks * block_size - length))
        means.append(padded.unflatten(2, (blocks, block_size)).mean(3))
    grouped = means[0].unflatten(1, (kv_heads, -1)).flatten(2, 3)
    scores: Tensor = (grouped @ means[1].transpose(2, 3)).unflatten(2, (-1, blocks)).flatten(1, 2)
    scores.masked_fill_(torch.ones(blocks, blocks, dtype=torch.bool, device=device).triu(1), -torch.inf)
    if starts is not None:
        end = torch.arange(1, blocks + 1, device=device) * block_size
        padding = (end <= starts.to(device)[:, None])[:, None, None]
        other = ~torch.eye(blocks, dtype=torch.bool, device=device)
        scores.masked_fill_(padding & other, -torch.inf)
    return scores


def choose_blocks(scores: Tensor, k_b: Tensor) -> Tensor:
    """The `k_b` (int ``[heads]``) best key blocks of each query block as a mask: boolean ``[batch, heads, blocks, blocks]``."""
    blocks = scores.shape[-1]
    budget = k_b.to(scores.device).clamp_max(blocks)
    best = scores.topk(int(budget.max()), dim=-1)
    rank = torch.arange(best.indices.shape[-1], device=scores.device)
    keep = (rank < budget[:, None, None]) & (best.values > -torch.inf)
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(-1, best.indices, keep)


def a_shape_blocks(
    length: int, n_init: Tensor, n_local: Tensor, block_size: int = 64, starts: Tensor | None = None
) -> Tensor:
    """Blocks that hold any key of A-shape, boolean ``[batch or 1, heads, blocks, blocks]``; `n_init`, `n_local` int ``[heads]``.

    The window's far edge and the sinks' end are rounded outwards to whole blocks: at most ``block_size − 1`` keys each.

    >>> a_shape_blocks(8, torch.tensor([1]), torch.tensor([2]), block_size=2).int()[0, 0].tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    """
    device = n_init.device
    block = torch.arange(-(-length // block_size), device=device)
    i, j = block[:, None], block
    first = torch.zeros(1, dtype=torch.int64, device=device) if starts is None else starts.long().to(device)
    first, n_init, n_local = first[:, None, None, None], n_init[:, None, None], n_local[:, None, None]
    nearest = i * block_size - (j + 1) * block_size + 1  # distance of a block's last key from the first query
    begin, end = j * block_size, (j + 1) * block_size
    near = (nearest < n_local) & (end > first)
    early = (begin < first + n_init) & (end > first)
    blocks: Tensor = ((near | early) & (j <= i)) | (i == j)
    return blocks


# -- areas ------------------------------------------------------------------------------------------------------------


def block_area(mask: Tensor, length: int, block_size: int) -> Tensor:
    """Share of the causal pairs in the blocks of a mask ``[..., blocks, blocks]``: float64 ``[...]``."""
    blocks = mask.shape[-1]
    rows = torch.full((blocks,), block_size, dtype=torch.int64, device=mask.device)
    rows[-1] = length - (blocks - 1) * block_size
    whole = mask.tril(-1).sum(-1) * (rows * block_size)
    own = mask.diagonal(dim1=-2, dim2=-1) * (rows * (rows + 1) // 2)
    return (whole.sum(-1) + own.sum(-1)).double() / causal_pairs(length)


def a_shape_area(length: int, n_init: int, n_local: int, block_size: int = 64) -> float:
    """Kernel-level area of A-shape.

    >>> a_shape_area(64, 64, 1), round(a_shape_area(65536, 1024, 4096), 3)
    (1.0, 0.151)
    """
    blocks = a_shape_blocks(length, torch.tensor([n_init]), torch.tensor([n_local]), block_size)
    return float(block_area(blocks, length, block_size)[0, 0])


def slash_area(verticals: Tensor, slashes: Tensor, block_size: int = 64) -> Tensor:
    """Kernel-level area of columns and distances given as masks ``[..., length]``: float64 ``[...]``, in O(length).

    In distances ``t`` from a row block's last query, the squares of all row blocks lie alike: each run of the union of
    ``[δ, δ + B)`` is filled up to whole squares on its near side. What that misses (squares cut by the prompt's beginning, and
    runs that a filled-up one reaches) is small; `ops.vertical_slash_index` counts exactly, for tens of times the work.
    """
    length, size, device = slashes.shape[-1], block_size, slashes.device
    blocks = -(-length // size)
    padded = blocks * size
    near = F.pad(slashes, (0, padded - length)).int()
    total = near.cumsum(-1)
    covered = total - F.pad(total, (size, 0))[..., :padded] > 0
    # Ends of the runs, in order: as many begin as end. A run of n is filled up to a multiple of B.
    edges = F.pad(covered.int(), (1, 1)).diff(dim=-1)
    *line, begin = (edges == 1).nonzero(as_tuple=True)
    *_, end = (edges == -1).nonzero(as_tuple=True)
    filled = torch.zeros(edges.shape, dtype=torch.int32, device=device)
    one = torch.ones_like(begin, dtype=torch.int32)
    filled.index_put_((*line, (begin - (begin - end) % size).clamp_min(0)), one, accumulate=True)
    filled.index_put_((*line, end), -one, accumulate=True)
    covered = filled.cumsum(-1)[..., :padded] > 0
    t = torch.arange(padded, device=device)
    rows = (t + 1).clamp_max(size).double()  # of a row block that may read the key at t
    squares = (covered * rows * (blocks - t // size)).sum(-1)
    # Row block i meets column j at t = (i + 1)·B − 1 − j: of equal remainders, all blocks from j's own on.
    alone = (~covered * rows).unflatten(-1, (blocks, size)).cumsum(-2).flip(-1, -2).flatten(-2)
    columns = (F.pad(verticals, (0, padded - length)) * alone).sum(-1)
    area: Tensor = (squares + columns) / causal_pairs(padded)
    return area
