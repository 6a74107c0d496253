"""Attention of one query per sequence over quantised rows on the GPU; layout and contract: gossamer.ops.quantized_kv.

Algorithm. As decode_attention: each program streams a slice of the rows of one KV head, a second kernel merges the slices.
Codes are unpacked in registers; where scales belong to a token they are applied to scores and weights, so that the
products are with codes (exact in bfloat16); where they belong to a channel the rows are dequantised in registers. Rows that
are not quantised are read by decode_attention's own kernel, and the two results are merged by their log-sum-exp.

Parallelisation. One program per (sequence, KV head, slice) for all query heads of the group.

Floor. ``rows * Hkv * (d * (key bits + value bits) / 8 + scales)`` bytes a sequence. A byte that holds several codes is
asked for by as many lanes, which the first-level cache answers.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.gpu import on, operand
from gossamer.gpu.decode_attention import _merge, _slices, decode_attention


class Rows(Protocol):
    """What is read of a :class:`gossamer.ops.QuantizedRows`."""

    codes: Tensor
    step: Tensor
    zero: Tensor
    bits: int
    axis: Any
    group: int


@triton.jit
def _codes(codes, row, keep, stride, DIM: tl.constexpr, BITS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Codes of these rows in channel order, float32 [rows, channels]."""
    d = tl.arange(0, BLOCK_D)
    a_word: tl.constexpr = 32 // BITS
    at = d // a_word * 4 + d % 4
    inside = keep[:, None] & (d < DIM)[None, :]
    packed = tl.load(codes + row[:, None] * stride + at[None, :], mask=inside, other=0).to(tl.int32)
    if BITS < 8:
        packed = (packed >> (d % a_word // 4 * BITS)[None, :]) & ((1 << BITS) - 1)
    return packed.to(tl.float32)


@triton.jit
def _channels(x, scale, zero, row, keep, stride, GROUP_ROWS, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Dequantise codes whose scales belong to the channels of a group of rows."""
    d = tl.arange(0, BLOCK_D)
    inside = keep[:, None] & (d < DIM)[None, :]
    at = (row // GROUP_ROWS)[:, None] * stride + d[None, :]
    step = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
    return x * step + tl.load(zero + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "slots", "slices", "key_group", "value_group"])
def _attend_codes(
    query,
    key,
    key_step,
    key_zero,
    value,
    value_step,
    value_zero,
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
    key_scale_b,
    key_scale_h,
    key_scale_s,
    value_b,
    value_h,
    value_s,
    value_scale_b,
    value_scale_h,
    value_scale_s,
    rows,
    slots,
    slices,
    key_group,
    value_group,
    scale,  # times log2(e)
    HEADS: tl.constexpr,  # programs of a sequence
    GROUP: tl.constexpr,  # query heads of a program
    SHARE: tl.constexpr,  # programs of a KV head
    DIM: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    KEY_CHANNEL: tl.constexpr,
    VALUE_CHANNEL: tl.constexpr,
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
    q = tl.load(query + batch * query_b + heads[:, None] * query_h + d[None, :], mask=real, other=0.0)
    mass = tl.sum(q.to(tl.float32), 1)
    q = q.to(DOT)
    kv = head // SHARE
    key += batch * key_b + kv * key_h
    value += batch * value_b + kv * value_h
    key_step += batch * key_scale_b + kv * key_scale_h
    key_zero += batch * key_scale_b + kv * key_scale_h
    value_step += batch * value_scale_b + kv * value_scale_h
    value_zero += batch * value_scale_b + kv * value_scale_h

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    shift_all = tl.zeros([BLOCK_M], tl.float32)  # what the zeros of the values add to every channel
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for at in range(begin, end, BLOCK_N):
        row = at + n
        keep = row < end
        if indices is not None:
            row = tl.load(indices + row, mask=keep, other=-1)
            keep &= (row >= low) & (row < high)
        row = row.to(tl.int64)
        k = _codes(key, row, keep, key_s, DIM, KEY_BITS, BLOCK_D)
        if KEY_CHANNEL:
            k = _channels(k, key_step, key_zero, row, keep, key_scale_s, key_group, DIM, BLOCK_D)
        logits = tl.dot(q, tl.trans(k.to(DOT)), input_precision="ieee")
        if not KEY_CHANNEL:
            step = tl.load(key_step + row, mask=keep, other=0.0).to(tl.float32)
            zero = tl.load(key_zero + row, mask=keep, other=0.0).to(tl.float32)
            logits = logits * step[None, :] + mass[:, None] * zero[None, :]
        logits = tl.where(keep[None, :], logits * scale, float("-inf"))
        new = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: -inf minus -inf is NaN
        weight = tl.exp2(logits - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(weight, 1)
        v = _codes(value, row, keep, value_s, DIM, VALUE_BITS, BLOCK_D)
        if VALUE_CHANNEL:
            v = _channels(v, value_step, value_zero, row, keep, value_scale_s, value_group, DIM, BLOCK_D)
        else:
            step = tl.load(value_step + row, mask=keep, other=0.0).to(tl.float32)
            zero = tl.load(value_zero + row, mask=keep, other=0.0).to(tl.float32)
            shift_all = shift_all * fade + tl.sum(weight * zero[None, :], 1)
            weight = weight * step[None, :]
        acc = tl.dot(weight.to(DOT), v.to(DOT), acc * fade[:, None], input_precision="ieee")
        top = new

    empty = total == 0.0
    acc = (acc + shift_all[:, None]) / tl.where(empty, 1.0, total)[:, None]
    place = (batch * HEADS * GROUP + heads) * slices + part
    tl.store(out + place[:, None] * DIM + d[None, :], acc, mask=real)
    ln2: tl.constexpr = 0.6931471805599453
    logsum = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * ln2)
    tl.store(lse + place, logsum, mask=m < GROUP)


def quantized_decode_attention(
    query: Tensor,
    key: Rows,
    value: Rows,
    *,
    recent: tuple[Tensor, Tensor] | None,
    split: int,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    indices: Tensor | None = None,
    counts: Tensor | None = None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Run :func:`gossamer.ops.quantized_decode_attention` on checked tensors; row ids out of range are skipped."""
    query = query if query.stride(-1) == 1 else query.contiguous()
    old = _quantized(query, key, value, split, starts, lengths, indices, counts, scale)
    if recent is None or not recent[0].shape[2]:
        return old
    new = decode_attention(
        query,
        *recent,
        starts=None if starts is None else (starts - split).clamp_min(0),
        lengths=None if lengths is None else (lengths - split).clamp_min(0),
        indices=None if indices is None else indices - split,  # negative ids are skipped
        counts=counts,
        scale=scale,
        return_lse=True,
    )
    outs, lses = torch.stack([old[0], new[0]]), torch.stack([old[1], new[1]])
    total = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - total.masked_fill(total == -torch.inf, 0.0)).unsqueeze(-1)
    return (weights * outs.float()).sum(0).to(query.dtype), total


def _quantized(
    query: Tensor,
    key: Rows,
    value: Rows,
    rows: int,
    starts: Tensor | None,
    lengths: Tensor | None,
    indices: Tensor | None,
    counts: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, heads, dim = query.shape
    kv_heads = key.codes.shape[1]
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
    with on(query):
        _attend_codes[(batch * programs, slices)](
            query,
            key.codes,
            key.step,
            key.zero,
            value.codes,
            value.step,
            value.zero,
            starts,
            lengths,
            indices,
            counts,
            parts,
            part_lse,
            *query.stride()[:2],
            *key.codes.stride()[:3],
            *_scale_strides(key),
            *value.codes.stride()[:3],
            *_scale_strides(value),
            rows,
            slots,
            slices,
            key.group,
            value.group,
            scale * 1.4426950408889634,
            HEADS=programs,
            GROUP=group,
            SHARE=1 if shared else heads // kv_heads,
            DIM=dim,
            KEY_BITS=key.bits,
            VALUE_BITS=value.bits,
            KEY_CHANNEL=key.axis == "channel",
            VALUE_CHANNEL=value.axis == "channel",
            DOT=operand(query),
            BLOCK_D=block_d,
            BLOCK_M=max(16, triton.next_power_of_2(group)),
            BLOCK_N=max(16, min(64, 8192 // (block_d * query.element_size()))),
            num_warps=8 if query.dtype is torch.float32 else 4,
            num_stages=2,
            enable_fp_fusion=True,
        )
        if slices > 1:
            _merge[(batch * heads,)](
                parts,
                part_lse,
                out,
                lse,
                slices,
                DIM=dim,
                BLOCK_D=block_d,
                BLOCK_P=triton.next_power_of_2(slices),
                num_warps=4,
                enable_fp_fusion=True,
            )
    return out, lse


def _scale_strides(rows: Rows) -> tuple[int, int, int]:
    strides = (*rows.step.stride(), 1)
    return strides[0], strides[1], strides[2]
