"""Merging rows of a cache on the GPU.

Algorithm. The sources are sorted by target, so that those of one target lie side by side; a program walks them, sums in
float32 and writes the target. The order is fixed: no atomics.

Parallelisation. One program per (sequence, KV head, source), of which the first of each target works.

Floor. Reading sources and targets and writing targets, once each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.gpu import on


@triton.jit
def _add(data, weight, KEEP_NORM: tl.constexpr):
    # What a row adds to the sum, and its weight or weight times length.
    measure = weight
    if KEEP_NORM:
        size = tl.sqrt(tl.sum(data * data, 0))
        measure = weight * size
        weight = tl.where(size == 0.0, 0.0, weight / tl.where(size == 0.0, 1.0, size))
    return data * weight, measure


@triton.jit(do_not_specialize=["length", "count"])
def _join(
    rows,
    scores,
    sources,
    targets,
    ends,
    total,
    rows_b,
    rows_h,
    rows_s,
    length,
    count,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    KEEP_NORM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    sources += line * count
    targets += line * count
    scores += line * length
    rows += line // HEADS * rows_b + line % HEADS * rows_h
    target = tl.load(targets + i)
    before = -1
    if i > 0:
        before = tl.load(targets + i - 1)
    if (target >= 0) & (target < length) & (target != before):
        whole = tl.load(scores + target)
        place = rows + target.to(tl.int64) * rows_s + d
        old = tl.load(place, mask=d < DIM, other=0.0).to(tl.float32)
        acc, measure = _add(old, whole, KEEP_NORM)
        for j in range(i, tl.load(ends + line * count + i)):
            source = tl.load(sources + j)
            if (source >= 0) & (source < length):
                weight = tl.load(scores + source)
                data = tl.load(rows + source.to(tl.int64) * rows_s + d, mask=d < DIM, other=0.0).to(tl.float32)
                part, more = _add(data, weight, KEEP_NORM)
                acc += part
                measure += more
                whole += weight
        tl.store(total + line * length + target, whole)
        size = whole
        factor = 1.0
        if KEEP_NORM:
            size = tl.sqrt(tl.sum(acc * acc, 0))
            factor = measure
        if whole != 0.0 and size != 0.0:
            scale = factor / whole / size if KEEP_NORM else factor / whole
            tl.store(place, acc * scale, mask=d < DIM)


def merge_rows(rows: Tensor, scores: Tensor, sources: Tensor, targets: Tensor, keep_norm: bool) -> Tensor:
    """Run :func:`gossamer.ops.merge_rows` on checked tensors; ids out of range are skipped."""
    if rows.stride(3) != 1:
        packed = rows.contiguous()
        total = merge_rows(packed, scores, sources, targets, keep_norm)
        rows.copy_(packed)
        return total
    batch, heads, length, dim = rows.shape
    count = sources.shape[2]
    scores = scores.contiguous()
    total = scores.clone()
    if not count:
        return total
    targets, order = targets.sort(dim=2, stable=True)
    sources = sources.gather(2, order)
    ends = torch.searchsorted(targets, targets, right=True, out_int32=True)
    with on(rows):
        _join[(batch * heads, count)](
            rows,
            scores,
            sources,
            targets,
            ends,
            total,
            *rows.stride()[:3],
            length,
            count,
            HEADS=heads,
            DIM=dim,
            KEEP_NORM=keep_norm,
            BLOCK_D=triton.next_power_of_2(dim),
            num_warps=1,
        )
    return total
