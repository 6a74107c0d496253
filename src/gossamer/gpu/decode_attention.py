"""Attention of one query per sequence on the GPU: split over the context, merged by log-sum-exp.

Algorithm. Each program streams a slice of the rows of one KV head in blocks (online softmax in float32, base 2) and
writes its normalised output and log-sum-exp; a second small kernel merges the slices. With one slice (few rows, or
enough heads to fill the GPU) the first kernel writes the result itself and there is no second launch.

Parallelisation. One program per (sequence, KV head, slice), for all query heads of the group at once: ``tl.dot`` with
the group padded to 16 rows, so that keys are read once and never repeated. If every query head has its own rows, one
program per query head. Each sequence cuts its own range into equal slices, so ragged batches stay balanced.

Floor. ``2 * rows * Hkv * d * itemsize`` bytes a sequence (K and V of the attended rows, once), at the bandwidth of
the memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.gpu import multiprocessors, on, operand

ROWS_PER_SLICE = 256
"""A slice has at least so many rows: with fewer, the merging launch should cost more than it gains (an estimate)."""
MAX_SLICES = 64


@triton.jit(do_not_specialize=["rows", "slots", "slices"])
def _attend(
    query,
    key,
    value,
    starts,
    lengths,
    indices,
    counts,
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
    slots,
    slices,
    scale,  # times log2(e)
    HEADS: tl.constexpr,  # programs of a sequence
    GROUP: tl.constexpr,  # query heads of a program
    SHARE: tl.constexpr,  # programs of a KV head
    DIM: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)  # caches pass 2**31 elements
    part = tl.program_id(1)
    batch, head = line // HEADS, line % HEADS
    low, high = 0, rows
    if starts is not None:
        low = tl.maximum(tl.load(starts + batch), 0)
    if lengths is not None:
        high = tl.minimum(tl.load(lengths + batch), rows)
    first, last = low, high
    if indices is not None:
        first, last = 0, slots
        if counts is not None:
            last = tl.minimum(tl.load(counts + line), slots)
        indices += line * slots
    size = tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), slices), BLOCK_N) * BLOCK_N
    begin = first + part * size
    end = tl.minimum(begin + size, last)

    m, n, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    heads = head * GROUP + m
    real = (m < GROUP)[:, None] & (d < DIM)[None, :]
    q = tl.load(query + batch * query_b + heads[:, None] * query_h + d[None, :], mask=real, other=0.0).to(DOT)
    key += batch * key_b + (head // SHARE) * key_h
    value += batch * value_b + (head // SHARE) * value_h

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for at in range(begin, end, BLOCK_N):
        row = at + n
        keep = row < end
        if indices is not None:
            row = tl.load(indices + row, mask=keep, other=-1)
            keep &= (row >= low) & (row < high)
        at_row = row.to(tl.int64)[:, None]
        inside = keep[:, None] & (d < DIM)[None, :]  # rows left out may be uninitialised: never read
        k = tl.load(key + at_row * key_s + d[None, :], mask=inside, other=0.0).to(DOT)
        v = tl.load(value + at_row * value_s + d[None, :], mask=inside, other=0.0).to(DOT)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        logits = tl.where(keep[None, :], logits, float("-inf"))
        new = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: -inf minus -inf is NaN
        weight = tl.exp2(logits - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(weight, 1)
        acc = tl.dot(weight.to(DOT), v, acc * fade[:, None], input_precision="ieee")
        top = new

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    place = (batch * HEADS * GROUP + heads) * slices + part
    tl.store(out + place[:, None] * DIM + d[None, :], acc, mask=real)
    ln2: tl.constexpr = 0.6931471805599453
    logsum = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * ln2)
    tl.store(lse + place, logsum, mask=m < GROUP)


@triton.jit(do_not_specialize=["slices"])
def _merge(outs, lses, out, lse, slices, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr):
    line = tl.program_id(0).to(tl.int64)
    p, d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    place = line * slices + p
    part = tl.load(lses + place, mask=p < slices, other=float("-inf"))
    top = tl.max(part, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(part - shift)
    total = tl.sum(weight, 0)
    inside = (p < slices)[:, None] & (d < DIM)[None, :]
    x = tl.load(outs + place[:, None] * DIM + d[None, :], mask=inside, other=0.0)
    total = tl.where(total == 0.0, 1.0, total)  # all parts are empty: their outputs are zeros
    tl.store(out + line * DIM + d, tl.sum(weight[:, None] * x, 0) / total, mask=d < DIM)
    tl.store(lse + line, top + tl.log(total))


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    indices: Tensor | None = None,
    counts: Tensor | None = None,
    scale: float,
    return_lse: bool = False,
) -> Any:
    """Run :func:`gossamer.ops.decode_attention` on checked tensors; row ids out of range are skipped."""
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    batch, heads, dim = query.shape
    kv_heads, rows = key.shape[1:3]
    shared = indices is None or indices.shape[1] == kv_heads
    programs, group = (kv_heads, heads // kv_heads) if shared else (heads, 1)
    slots = 0 if indices is None else indices.shape[2]
    slices = _slices(batch * programs, rows if indices is None else slots, query.device)
    out = torch.empty((batch, heads, dim), dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, heads), dtype=torch.float32, device=query.device)
    parts, part_lse = out, lse
    if slices > 1:
        parts = torch.empty((batch, heads, slices, dim), dtype=torch.float32, device=query.device)
        part_lse = torch.empty((batch, heads, slices), dtype=torch.float32, device=query.device)
    block_d = max(16, triton.next_power_of_2(dim))
    # K and V blocks of 16 KiB each: three pipelined stages of two programs fit the shared memory of a multiprocessor.
    block_n = max(16, min(64, 16384 // (block_d * query.element_size())))
    with on(query):
        _attend[(batch * programs, slices)](
            query,
            key,
            value,
            starts,
            lengths,
            indices,
            counts,
            parts,
            part_lse,
            *query.stride()[:2],
            *key.stride()[:3],
            *value.stride()[:3],
            rows,
            slots,
            slices,
            scale * 1.4426950408889634,
            HEADS=programs,
            GROUP=group,
            SHARE=1 if shared else heads // kv_heads,
            DIM=dim,
            DOT=operand(query),
            BLOCK_D=block_d,
            BLOCK_M=max(16, triton.next_power_of_2(group)),
            BLOCK_N=block_n,
            num_warps=8
            if query.dtype is torch.float32
            else 4,  # float32 dots run outside the tensor cores: more registers
            num_stages=3,
            enable_fp_fusion=True,
        )
        if slices > 1:
            block_p = triton.next_power_of_2(slices)
            _merge[(batch * heads,)](
                parts,
                part_lse,
                out,
                lse,
                slices,
                DIM=dim,
                BLOCK_D=block_d,
                BLOCK_P=block_p,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return (out, lse) if return_lse else out


def _slices(programs: int, rows: int, device: torch.device) -> int:
    """Return into how many slices to cut a line: until two programs run on every multiprocessor."""
    wanted = -(-2 * multiprocessors(device) // max(programs, 1))
    return max(1, min(wanted, rows // ROWS_PER_SLICE, MAX_SLICES))
