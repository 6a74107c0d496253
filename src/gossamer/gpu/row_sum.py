"""Sums of listed rows of a matrix, each times a factor: what the products that skip inputs share on the GPU.

Algorithm. The inputs are cut into segments. A kernel of the operator lists the inputs of each segment that count, with their
factors; here each program sums the listed rows of one segment over a block of columns, and torch adds the segments up, in
their order: no atomics, so the same input gives the same bits.

Parallelisation. One program per (block of columns, segment).

Floor. The listed rows, once; the lists, once per block of columns, come from L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.gpu import on

SEGMENT = 512
_COLUMNS = 128


@triton.jit(do_not_specialize=["columns"])
def _sum_rows(
    weight,
    ids,
    factors,
    counts,
    out,
    weight_k,
    columns,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    LENGTH: tl.constexpr,  # of a segment
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    segment = tl.program_id(1)
    m, n = tl.arange(0, PADDED), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    count = tl.load(counts + segment)
    total = tl.zeros([PADDED, BLOCK_N], tl.float32)
    for begin in range(0, count, BLOCK_K):
        i = begin + tl.arange(0, BLOCK_K)
        k = tl.load(ids + segment * LENGTH + i, mask=i < count, other=0).to(tl.int64)
        inside = (i < count)[:, None] & (n < columns)[None, :]
        rows = tl.load(weight + k[:, None] * weight_k + n[None, :], mask=inside, other=0.0).to(tl.float32)
        at = factors + (segment * LENGTH + i)[:, None] * ROWS + m[None, :]
        factor = tl.load(at, mask=(i < count)[:, None] & (m < ROWS)[None, :], other=0.0)
        total += tl.sum(factor[:, :, None] * rows[:, None, :], 0)
    place = out + (segment * ROWS + m)[:, None] * columns + n[None, :]
    tl.store(place, total, mask=(m < ROWS)[:, None] & (n < columns)[None, :])


def lists(inputs: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for the ids [S, SEGMENT], the factors [S, SEGMENT, M] and the counts [S] of all segments."""
    segments = triton.cdiv(inputs, SEGMENT)
    return (
        torch.empty(segments, SEGMENT, dtype=torch.int32, device=device),
        torch.empty(segments, SEGMENT, rows, dtype=torch.float32, device=device),
        torch.empty(segments, dtype=torch.int32, device=device),
    )


def sum_rows(weight: Tensor, ids: Tensor, factors: Tensor, counts: Tensor) -> Tensor:
    """Return float32 [M, N]: the listed rows of ``weight`` [K, N], inner stride 1, times their factors."""
    segments, rows, columns = len(ids), factors.shape[2], weight.shape[1]
    padded = triton.next_power_of_2(rows)
    out = torch.empty(segments, rows, columns, dtype=torch.float32, device=weight.device)
    if out.numel():
        with on(weight):
            _sum_rows[(triton.cdiv(columns, _COLUMNS), segments)](
                weight,
                ids,
                factors,
                counts,
                out,
                weight.stride(0),
                columns,
                ROWS=rows,
                PADDED=padded,
                LENGTH=SEGMENT,
                BLOCK_K=max(8, 64 // padded),
                BLOCK_N=_COLUMNS,
                num_warps=4,
            )
    return out.sum(0)
