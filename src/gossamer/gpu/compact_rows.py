"""Dropping rows of a cache in place on the GPU.

Algorithm. A row only moves forward: block by block of rows, a program reads all rows of the block before it writes any of
them, and never writes where a later block still reads.

Parallelisation. One program per (sequence, KV head, slab of 64 columns).

Floor. Reading and writing the rows that move, once each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.gpu import on

ROWS = 32
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit(do_not_specialize=["kept", "length"])
def _compact(
    storage,
    ids,
    storage_b,
    storage_h,
    storage_s,
    kept,
    length,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    storage += line // HEADS * storage_b + line % HEADS * storage_h + w[None, :]
    for begin in range(0, kept, BLOCK_N):
        to = begin + tl.arange(0, BLOCK_N)
        row = tl.load(ids + line * kept + to, mask=to < kept, other=-1).to(tl.int64)
        inside = ((row >= 0) & (row < length) & (row != to))[:, None] & (w < WIDTH)[None, :]
        moved = tl.load(storage + row[:, None] * storage_s, mask=inside)
        tl.debug_barrier()  # all of them are read
        tl.store(storage + to.to(tl.int64)[:, None] * storage_s, moved, mask=inside)


def compact_rows(storage: Tensor, ids: Tensor, length: int) -> None:
    """Run :func:`gossamer.ops.compact_rows` on checked tensors; ids out of range are skipped."""
    if storage.dim() == 3:
        storage = storage.unsqueeze(3)
    if storage.shape[3] > 1 and storage.stride(3) != 1:
        packed = storage.contiguous()
        compact_rows(packed, ids, length)
        storage.copy_(packed)
        return
    bits = storage.view(_BITS[storage.element_size()])  # any dtype moves alike, and a NaN keeps its bits
    ids = ids.contiguous()
    batch, heads, kept = ids.shape
    width = storage.shape[3]
    block = min(64, triton.next_power_of_2(width))
    if not kept:
        return
    with on(storage):
        _compact[(batch * heads, triton.cdiv(width, block))](
            bits,
            ids,
            *bits.stride()[:3],
            kept,
            length,
            HEADS=heads,
            WIDTH=width,
            BLOCK_N=ROWS,
            BLOCK_W=block,
            num_warps=4,
            num_stages=1,
        )
