"""The softmax row of one query per sequence on the GPU, alone or with the attention output.

Algorithm. Each program streams a slice of the keys (and values) of one KV head, as in
:mod:`gossamer.gpu.decode_attention`, and keeps the logits; a second kernel knows the log-sum-exp of all slices and turns
logits into the row.

Parallelisation. One program per (sequence, KV head, slice), for all query heads of the group; then one per (sequence, KV
head, block of rows).

Floor. The bytes of the keys (and values), once, and ``12 * H`` bytes a row for writing and reading logits and row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.gpu import on, operand
from gossamer.gpu.decode_attention import _merge, _slices

ROWS = 256
"""Rows of a program of the second kernel."""


@triton.jit(do_not_specialize=["rows", "slices"])
def _read(
    query,
    key,
    value,
    starts,
    kept,
    out,
    lse,
    query_b,
    query_h,
    key_b,
    key_h,
    key_s,
    value_b,
    value_h,
    value_s,
    rows,
    slices,
    scale,  # times log2(e)
    HEADS: tl.constexpr,  # KV heads
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    batch, head = line // HEADS, line % HEADS
    first = 0
    if starts is not None:
        first = tl.minimum(tl.maximum(tl.load(starts + batch), 0), rows)
    size = tl.cdiv(tl.cdiv(rows - first, slices), BLOCK_N) * BLOCK_N
    begin = first + part * size
    end = tl.minimum(begin + size, rows)

    m, n, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    heads = head * GROUP + m
    real = (m < GROUP)[:, None] & (d < DIM)[None, :]
    q = tl.load(query + batch * query_b + heads[:, None] * query_h + d[None, :], mask=real, other=0.0).to(DOT)
    key += batch * key_b + head * key_h
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if value is not None:
        value += batch * value_b + head * value_h
    kept += (line * GROUP + m)[:, None] * rows
    for at in range(begin, end, BLOCK_N):
        row = at + n
        keep = row < end
        at_row = row.to(tl.int64)[:, None]
        inside = keep[:, None] & (d < DIM)[None, :]
        k = tl.load(key + at_row * key_s + d[None, :], mask=inside, other=0.0).to(DOT)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        tl.store(kept + row[None, :], logits, mask=(m < GROUP)[:, None] & keep[None, :])
        logits = tl.where(keep[None, :], logits, float("-inf"))
        new = tl.maximum(top, tl.max(logits, 1))
        weight = tl.exp2(logits - new[:, None])
        fade = tl.exp2(top - new)
        total = total * fade + tl.sum(weight, 1)
        if value is not None:
            v = tl.load(value + at_row * value_s + d[None, :], mask=inside, other=0.0).to(DOT)
            acc = tl.dot(weight.to(DOT), v, acc * fade[:, None], input_precision="ieee")
        top = new

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    place = (line * GROUP + m) * slices + part
    if value is not None:
        tl.store(out + place[:, None] * DIM + d[None, :], acc / total[:, None], mask=real)
    ln2: tl.constexpr = 0.6931471805599453
    tl.store(lse + place, tl.where(empty, float("-inf"), (top + tl.log2(total)) * ln2), mask=m < GROUP)


@triton.jit(do_not_specialize=["rows", "slices"])
def _weigh(
    kept,
    lses,
    starts,
    row,
    row_b,
    row_h,
    rows,
    slices,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    batch, head = line // HEADS, line % HEADS
    m, p = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_P)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = 0
    if starts is not None:
        first = tl.load(starts + batch)
    heads = line * GROUP + m
    mask = (m < GROUP)[:, None] & (p < slices)[None, :]
    part = tl.load(lses + heads[:, None] * slices + p[None, :], mask=mask, other=float("-inf"))
    top = tl.max(part, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    log2e: tl.constexpr = 1.4426950408889634
    total = tl.sum(tl.exp2((part - top[:, None]) * log2e), 1)
    lse = top * log2e + tl.log2(tl.where(total == 0.0, 1.0, total))
    inside = (m < GROUP)[:, None] & ((n >= first) & (n < rows))[None, :]
    logits = tl.load(kept + heads[:, None] * rows + n[None, :], mask=inside, other=float("-inf"))
    weight = tl.sum(tl.exp2(logits - lse[:, None]), 0)
    tl.store(row + batch * row_b + head * row_h + n, weight, mask=n < rows)


def attention_row(query: Tensor, key: Tensor, row: Tensor, *, starts: Tensor | None, scale: float) -> None:
    """Run :func:`gossamer.ops.attention_row.attention_row` on checked tensors, into ``row`` [B,Hkv,S]."""
    _run(query, key, None, row, starts, scale)


def decode_attention_with_row(
    query: Tensor, key: Tensor, value: Tensor, row: Tensor, *, starts: Tensor | None, scale: float
) -> Tensor:
    """Run :func:`gossamer.ops.attention_row.decode_attention_with_row` on checked tensors, the row into ``row``."""
    return _run(query, key, value, row, starts, scale)


def _run(query: Tensor, key: Tensor, value: Tensor | None, row: Tensor, starts: Tensor | None, scale: float) -> Tensor:
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    if value is not None and value.stride(-1) != 1:
        value = value.contiguous()
    batch, heads, dim = query.shape
    kv_heads, rows = key.shape[1:3]
    group, lines = heads // kv_heads, batch * kv_heads
    slices = _slices(lines, rows, query.device)
    kept = torch.empty((batch, heads, rows), dtype=torch.float32, device=query.device)
    lses = torch.empty((batch, heads, slices), dtype=torch.float32, device=query.device)
    out = torch.empty((batch, heads, dim), dtype=query.dtype, device=query.device)
    parts = out
    if value is not None and slices > 1:
        parts = torch.empty((batch, heads, slices, dim), dtype=torch.float32, device=query.device)
    block_d, block_m = max(16, triton.next_power_of_2(dim)), max(16, triton.next_power_of_2(group))
    block_p = triton.next_power_of_2(slices)
    with on(query):
        _read[(lines, slices)](
            query,
            key,
            value,
            starts,
            kept,
            parts,
            lses,
            *query.stride()[:2],
            *key.stride()[:3],
            *(key if value is None else value).stride()[:3],
            rows,
            slices,
            scale * 1.4426950408889634,
            HEADS=kv_heads,
            GROUP=group,
            DIM=dim,
            DOT=operand(query),
            BLOCK_D=block_d,
            BLOCK_M=block_m,
            BLOCK_N=max(16, min(64, 16384 // (block_d * query.element_size()))),
            num_warps=8 if query.dtype is torch.float32 else 4,
            num_stages=3,
        )
        _weigh[(lines, triton.cdiv(rows, ROWS))](
            kept,
            lses,
            starts,
            row,
            *row.stride()[:2],
            rows,
            slices,
            HEADS=kv_heads,
            GROUP=group,
            BLOCK_M=triton.next_power_of_2(group),
            BLOCK_P=block_p,
            BLOCK_N=ROWS,
            num_warps=4,
        )
        if value is not None and slices > 1:
            lse = torch.empty((batch, heads), dtype=torch.float32, device=query.device)
            _merge[(batch * heads,)](
                parts, lses, out, lse, slices, DIM=dim, BLOCK_D=block_d, BLOCK_P=block_p, num_warps=4
            )
    return out
