"""Column sums of the attention map on the GPU, in two passes over the logits and without storing them.

Algorithm. The first kernel finds the log-sum-exp of every query row (online softmax over key blocks); the second goes
column block by column block over all query rows that see it and adds ``w * exp(logit - lse)`` in registers. That makes the
products twice; keeping them (as the CPU kernels do in their cache) would cost more traffic than a tensor core needs to
make them again.

Parallelisation. One program per (sequence, query head, block of rows), then per (sequence, KV head, block of keys): no
atomics, so the sum does not depend on the order of programs.

Floor. ``4 * H * d`` operations a pair of query and visible key.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.gpu import on, operand


@triton.jit
def _visible(column, at, first, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, window):
    seen = (column >= first)[None, :] & (at >= first)[:, None]
    if CAUSAL:
        seen &= column[None, :] <= at[:, None]
    if WINDOW:
        seen &= column[None, :] > at[:, None] - window
    return seen


@triton.jit(do_not_specialize=["rows", "length", "window"])
def _rows(
    query,
    key,
    weights,
    positions,
    starts,
    lse,
    query_b,
    query_h,
    query_t,
    key_b,
    key_h,
    key_s,
    rows,
    length,
    window,
    scale,  # times log2(e)
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIM: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    batch, head = line // HEADS, line % HEADS
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    first = 0
    if starts is not None:
        first = tl.load(starts + batch)
    at = tl.load(positions + m, mask=m < rows, other=-1)
    w = tl.load(weights + batch * rows + m, mask=m < rows, other=0.0)
    used = (w != 0.0) & (at >= first)
    real = (m < rows)[:, None] & (d < DIM)[None, :]
    q = tl.load(
        query + batch * query_b + head * query_h + m.to(tl.int64)[:, None] * query_t + d[None, :], mask=real, other=0.0
    )
    q = q.to(DOT)
    key += batch * key_b + (head // GROUP) * key_h
    low, high = first, length
    if CAUSAL:
        high = tl.max(tl.where(used, at, -1), 0) + 1
    if WINDOW:
        low = tl.maximum(first, tl.min(tl.where(used, at, length), 0) + 1 - window)
    if tl.sum(used.to(tl.int32), 0) == 0:
        high = low
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for begin in range(low, high, BLOCK_N):
        column = begin + n
        inside = (column < high)[:, None] & (d < DIM)[None, :]
        k = tl.load(key + column.to(tl.int64)[:, None] * key_s + d[None, :], mask=inside, other=0.0).to(DOT)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = _visible(column, at, first, WINDOW, CAUSAL, window) & (column < high)[None, :]
        logits = tl.where(seen, logits, float("-inf"))
        new = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
        top = new
    top = tl.where(top == float("-inf"), 0.0, top)
    tl.store(lse + line * rows + m, top + tl.log2(tl.where(total == 0.0, 1.0, total)), mask=m < rows)


@triton.jit(do_not_specialize=["rows", "length", "window"])
def _columns(
    query,
    key,
    weights,
    positions,
    starts,
    lse,
    out,
    query_b,
    query_h,
    query_t,
    key_b,
    key_h,
    key_s,
    rows,
    length,
    window,
    scale,  # times log2(e)
    HEADS: tl.constexpr,  # KV heads
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIM: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    batch, head = line // HEADS, line % HEADS
    low = tl.program_id(1) * BLOCK_N
    column = low + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    first = 0
    if starts is not None:
        first = tl.load(starts + batch)
    inside = ((column >= first) & (column < length))[:, None] & (d < DIM)[None, :]
    place = key + batch * key_b + head * key_h + column.to(tl.int64)[:, None] * key_s + d[None, :]
    k = tl.load(place, mask=inside, other=0.0).to(DOT)
    acc = tl.zeros([BLOCK_N], tl.float32)
    for begin in range(0, rows, BLOCK_M):
        m = begin + tl.arange(0, BLOCK_M)
        at = tl.load(positions + m, mask=m < rows, other=-1)
        w = tl.load(weights + batch * rows + m, mask=m < rows, other=0.0)
        used = (w != 0.0) & (at >= first)
        meets = tl.sum(used.to(tl.int32), 0) > 0
        if CAUSAL:
            meets &= tl.max(tl.where(used, at, -1), 0) >= low
        if WINDOW:
            meets &= tl.min(tl.where(used, at, length), 0) - window < low + BLOCK_N
        if meets:
            seen = _visible(column, at, first, WINDOW, CAUSAL, window) & used[:, None]
            for g in range(GROUP):
                real = used[:, None] & (d < DIM)[None, :]
                near = query + batch * query_b + (head * GROUP + g) * query_h + d[None, :]
                q = tl.load(near + m.to(tl.int64)[:, None] * query_t, mask=real, other=0.0).to(DOT)
                total = tl.load(lse + (line * GROUP + g) * rows + m, mask=m < rows, other=0.0)
                logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
                part = tl.exp2(logits - total[:, None]) * w[:, None]
                acc += tl.sum(tl.where(seen, part, 0.0), 0)
    tl.store(out + line * length + column, acc, mask=column < length)


def attention_columns(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    positions: Tensor,
    *,
    starts: Tensor | None,
    scale: float,
    window: int,
    causal: bool,
) -> Tensor:
    """Run :func:`gossamer.ops.attention_statistics.attention_columns` on checked tensors; positions ascend."""
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    weights, positions = weights.contiguous(), positions.contiguous()
    batch, heads, rows, dim = query.shape
    kv_heads, length = key.shape[1:3]
    lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=query.device)
    out = torch.empty((batch, kv_heads, length), dtype=torch.float32, device=query.device)
    block_d = max(16, triton.next_power_of_2(dim))
    block = max(16, min(64, 16384 // (block_d * query.element_size())))
    common = {
        "GROUP": heads // kv_heads,
        "WINDOW": window > 0,
        "CAUSAL": causal,
        "DIM": dim,
        "DOT": operand(query),
        "BLOCK_D": block_d,
        "BLOCK_M": block,
        "BLOCK_N": block,
        "num_warps": 4,
        "num_stages": 2,
    }
    strides = (*query.stride()[:3], *key.stride()[:3])
    sizes = (rows, length, window, scale * 1.4426950408889634)
    given = (query, key, weights, positions, starts, lse)
    with on(query):
        _rows[(batch * heads, triton.cdiv(rows, block))](*given, *strides, *sizes, HEADS=heads, **common)
        _columns[(batch * kv_heads, triton.cdiv(length, block))](
            *given, out, *strides, *sizes, HEADS=kv_heads, **common
        )
    return out
