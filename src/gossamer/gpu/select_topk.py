"""Exact top-k on the GPU, as ascending ids, without sorting.

Algorithm. Scores become unsigned keys of the same order (0: never selected). A radix search from the highest bits,
two a pass, finds the k-th largest key: three counts over the line a pass, 16 passes or fewer (it stops once a
candidate keeps exactly k). An ordered compaction then walks the line once: keys above the cut, and as many of the
equal ones as are missing, lowest ids first, go to the place that a ``tl.cumsum`` gives them; so ids come out
ascending and ties go to the lower id.

Parallelisation. One program per (sequence, head). Few long lines would leave the GPU idle, so these are cut into
chunks: a first launch takes the best k of each chunk (the best k of the line are among them), a second one the best k
of those.

Floor. ``4 * S`` bytes a line from memory; the passes read it again from the caches, which is what the time goes to.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.gpu import multiprocessors, on

CHUNK = 8192
"""Scores of a chunk: what 16 warps hold, 16 to a thread."""


@triton.jit
def _keys(scores, at, keep):
    score = tl.load(scores + at, mask=keep, other=float("-inf"))
    score = tl.where(score == 0.0, 0.0, score)  # -0.0 equals 0.0
    bits = score.to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    return tl.where(score > float("-inf"), key, 0)  # false for NaN too


@triton.jit(do_not_specialize=["scores_b", "scores_h", "rows", "k", "chunk"])
def _select(
    scores,
    ids,  # what the positions stand for, or None: themselves
    starts,
    lengths,
    indices,
    values,  # where to leave the selected scores too, or None
    counts,  # or None
    scores_b,
    scores_h,
    rows,
    k,
    chunk,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    batch, head = line // HEADS, line % HEADS
    low, high = part * chunk, tl.minimum((part + 1) * chunk, rows)
    if starts is not None:
        low = tl.maximum(low, tl.load(starts + batch))
    if lengths is not None:
        high = tl.minimum(high, tl.load(lengths + batch))
    offset = batch * scores_b + head * scores_h
    scores += offset
    if ids is not None:
        ids += offset
    place = (line * tl.num_programs(1) + part) * k
    indices += place
    n = tl.arange(0, BLOCK)

    one = tl.full([], 1, tl.uint32)
    cut = tl.full([], 0, tl.uint32)  # the highest key known to be kept by at least k
    above = tl.full([], 0, tl.int32)  # keys above what cut can still become
    shift = tl.where(high - low <= k, -2, 30)  # a line that fits is kept whole
    while shift >= 0:
        step = one << shift.to(tl.uint32)
        kept1 = tl.zeros([BLOCK], tl.int32)
        kept2 = tl.zeros([BLOCK], tl.int32)
        kept3 = tl.zeros([BLOCK], tl.int32)
        for at in range(low, high, BLOCK):
            key = _keys(scores, at + n, at + n < high)
            kept1 += (key >= cut + step).to(tl.int32)
            kept2 += (key >= cut + step + step).to(tl.int32)
            kept3 += (key >= cut + step + step + step).to(tl.int32)
        n1, n2, n3 = tl.sum(kept1, 0), tl.sum(kept2, 0), tl.sum(kept3, 0)
        above = tl.where(n3 >= k, above, tl.where(n2 >= k, n3, tl.where(n1 >= k, n2, n1)))
        cut += tl.where(n1 >= k, step, 0) + tl.where(n2 >= k, step, 0) + tl.where(n3 >= k, step, 0)
        exact = (
            (n1 == k) | (n2 == k) | (n3 == k)
        )  # then cut is the highest of them that k keys reach: all of those, no ties
        cut = tl.where(exact, cut - 1, cut)
        above = tl.where(exact, k, above)
        shift = tl.where(exact, -2, shift - 2)

    ties = tl.where(cut == 0, 0, k - above)  # equal keys still to take; key 0 is no score
    more_before = tl.full([], 0, tl.int32)
    ties_before = tl.full([], 0, tl.int32)
    for at in range(low, high, BLOCK):
        position = at + n
        key = _keys(scores, position, position < high)
        more = key > cut
        both = tl.where(more, 1, tl.where(key == cut, 65536, 0))  # two counts in one scan: a block has at most 8192
        scan = tl.cumsum(both, 0)
        tie = ties_before + (scan >> 16)
        take = more | ((key == cut) & (tie <= ties))
        slot = more_before + (scan & 65535) + tl.minimum(tie, ties) - 1
        found = position
        if ids is not None:
            found = tl.load(ids + position, mask=take, other=0)
        tl.store(indices + slot, found, mask=take)
        if values is not None:
            tl.store(values + place + slot, tl.load(scores + position, mask=take, other=0.0), mask=take)
        added = tl.sum(both, 0)
        more_before += added & 65535
        ties_before += added >> 16
    count = more_before + tl.minimum(ties_before, ties)
    if counts is not None:
        tl.store(counts + line, count)
    for at in range(count, k, BLOCK):
        tl.store(indices + at + n, tl.zeros([BLOCK], tl.int32), mask=at + n < k)
        if values is not None:
            tl.store(values + place + at + n, tl.full([BLOCK], float("-inf"), tl.float32), mask=at + n < k)


def select_topk(
    scores: Tensor,
    k: int,
    *,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    indices_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run :func:`gossamer.ops.select_topk` on checked tensors, into ``indices_out`` (contiguous) if given."""
    scores = scores if scores.stride(-1) == 1 else scores.contiguous()
    batch, heads, rows = scores.shape
    lines, device = batch * heads, scores.device
    indices = indices_out
    if indices is None:
        indices = torch.empty((batch, heads, k), dtype=torch.int32, device=device)
    counts = torch.empty((batch, heads), dtype=torch.int32, device=device)
    parts = -(-rows // CHUNK)
    with on(scores):
        if parts >= 2 and lines < multiprocessors(device) and parts * k <= rows // 2:
            best = torch.empty((batch, heads, parts * k), dtype=torch.float32, device=device)
            ids = torch.empty((batch, heads, parts * k), dtype=torch.int32, device=device)
            _launch(scores, None, starts, lengths, ids, best, None, rows, k, parts)
            _launch(best, ids, None, None, indices, None, counts, parts * k, k, 1)
        else:
            _launch(scores, None, starts, lengths, indices, None, counts, rows, k, 1)
    return indices, counts


def _launch(
    scores: Tensor,
    ids: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    indices: Tensor,
    values: Tensor | None,
    counts: Tensor | None,
    rows: int,
    k: int,
    parts: int,
) -> None:
    chunk = rows if parts == 1 else CHUNK
    block = max(128, min(8192, triton.next_power_of_2(chunk)))
    _select[(scores.shape[0] * scores.shape[1], parts)](
        scores,
        ids,
        starts,
        lengths,
        indices,
        values,
        counts,
        *scores.stride()[:2],
        rows,
        k,
        chunk,
        HEADS=scores.shape[1],
        BLOCK=block,
        num_warps=max(1, min(16, block // 512)),
        num_stages=1,
        enable_fp_fusion=True,
    )
