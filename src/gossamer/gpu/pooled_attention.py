"""The causal softmax map, max-pooled to blocks, on the GPU.

Algorithm. Each program keeps a tile of query rows and goes through their keys twice: once for the maximum and the sum of
every row's softmax, once for the largest probability in each key block. The second product costs less than to keep a maximum
per row and key block in memory, which would be S × n floats.

Parallelisation. One program per (sequence, query head, block of queries), or tile of rows where every row is a block; the
last rows first, they have most to read.

Floor. ``4 * d`` operations for each visible query–key pair, on the tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.gpu import on, operand

_LOG2_E = 1.4426950408889634


@triton.jit
def _logits(q, key, row, keep, position, scale, key_s, DIM: tl.constexpr, DOT: tl.constexpr, BLOCK_D: tl.constexpr):
    """Logits (base 2) of a tile of queries with the keys ``row`` where ``keep``; -inf where a query does not see a key."""
    d = tl.arange(0, BLOCK_D)
    inside = keep[:, None] & (d < DIM)[None, :]  # rows left out may be uninitialised: never read
    k = tl.load(key + row.to(tl.int64)[:, None] * key_s + d[None, :], mask=inside, other=0.0).to(DOT)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    return tl.where(keep[None, :] & (row[None, :] <= position[:, None]), logits, float("-inf"))


@triton.jit(do_not_specialize=["new", "rows", "tiles", "blocks", "columns"])
def _pool(
    query,
    key,
    starts,
    out,
    query_b,
    query_h,
    query_t,
    key_b,
    key_h,
    key_s,
    new,
    rows,
    tiles,
    blocks,  # of queries
    columns,
    scale,  # times log2(e)
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,  # queries of a program
    SINGLE: tl.constexpr,  # every query is a block
    KEYS: tl.constexpr,  # keys of a block
    DIM: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile = tiles - 1 - tl.program_id(0)
    line = tl.program_id(1).to(tl.int64)
    batch, head = line // HEADS, line % HEADS
    m, n, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    low = 0
    if starts is not None:
        low = tl.maximum(tl.load(starts + batch), 0)
    query += batch * query_b + head * query_h
    key += batch * key_b + (head // GROUP) * key_h
    for piece in range(0, BLOCK, BLOCK_M):
        within = piece + m
        at = tile * BLOCK + within
        real = (within < BLOCK) & (at < new)
        position = tl.where(real, at + rows - new, -1)
        last = tl.max(position, 0)
        inside = real[:, None] & (d < DIM)[None, :]
        q = tl.load(query + at.to(tl.int64)[:, None] * query_t + d[None, :], mask=inside, other=0.0).to(DOT)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for begin in range(low // BLOCK_N * BLOCK_N, last + 1, BLOCK_N):
            row = begin + n
            logits = _logits(q, key, row, (row >= low) & (row <= last), position, scale, key_s, DIM, DOT, BLOCK_D)
            peak = tl.maximum(top, tl.max(logits, 1))
            shift = tl.where(peak == float("-inf"), 0.0, peak)  # nothing seen yet: -inf minus -inf is NaN
            total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
            top = peak
        shift = tl.where(top == float("-inf"), 0.0, top)
        share = tl.where(total > 0.0, 1.0 / tl.where(total > 0.0, total, 1.0), 0.0)
        for column in range(low // KEYS, last // KEYS + 1):
            best = tl.full([BLOCK_M], float("-inf"), tl.float32)
            for begin in range(column * KEYS, tl.minimum(column * KEYS + KEYS, last + 1), BLOCK_N):
                row = begin + n
                keep = (row >= low) & (row <= last) & (row < column * KEYS + KEYS)
                logits = _logits(q, key, row, keep, position, scale, key_s, DIM, DOT, BLOCK_D)
                best = tl.maximum(best, tl.max(logits, 1))
            best = tl.exp2(best - shift) * share
            if SINGLE:
                tl.store(out + (line * blocks + at) * columns + column, best, mask=real)
            else:
                here = out + (line * blocks + tile) * columns + column
                value = tl.max(best, 0)
                if piece > 0:
                    value = tl.maximum(value, tl.load(here))
                tl.store(here, value)


def pooled_attention(
    query: Tensor, key: Tensor, block: int, key_block: int, *, starts: Tensor | None = None, scale: float
) -> Tensor:
    """Run :func:`gossamer.ops.pooled_attention` on checked tensors."""
    query = query if query.stride(-1) == 1 else query.contiguous()
    key = key if key.stride(-1) == 1 else key.contiguous()
    batch, heads, new, dim = query.shape
    kv_heads, rows = key.shape[1:3]
    block_d = max(16, triton.next_power_of_2(dim))
    most = 64 if block_d * query.element_size() <= 512 else 32
    single = block == 1
    size = most if single else block
    blocks, columns = triton.cdiv(new, block), triton.cdiv(rows, key_block)
    out = torch.zeros((batch, heads, blocks, columns), dtype=torch.float32, device=query.device)
    tiles = triton.cdiv(new, size)
    with on(query):
        _pool[(tiles, batch * heads)](
            query,
            key,
            starts,
            out,
            *query.stride()[:3],
            *key.stride()[:3],
            new,
            rows,
            tiles,
            blocks,
            columns,
            scale * _LOG2_E,
            HEADS=heads,
            GROUP=heads // kv_heads,
            BLOCK=size,
            SINGLE=single,
            KEYS=key_block,
            DIM=dim,
            DOT=operand(query, key),
            BLOCK_D=block_d,
            BLOCK_M=min(most, max(16, triton.next_power_of_2(size))),
            BLOCK_N=min(most, max(16, triton.next_power_of_2(key_block))),
            num_warps=4,
        )
    return out
