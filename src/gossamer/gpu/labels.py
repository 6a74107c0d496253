"""Writing the label cache and scoring from it on the GPU; the layout is documented in :mod:`gossamer.ops.labels`.

Algorithm. ``append_labels``: gather the channels of 16 tokens, quantise each token, shift its codes into 32-bit
words, write the tile. ``label_scores``: gather the label channels of the query and quantise them to int8 in every
program (r values: cheaper than a launch), read words, spread them to codes in channel order (a word holds
neighbouring channels, so this is one shift and one reshape), and multiply: exact int8 ``tl.dot`` for a group of
queries, plain multiply-adds for a single one (one head, or the sum over the group).

Parallelisation. One program per (sequence, label head, tile) to write, per (sequence, head of the result, block of
tokens) to score.

Floor. Scoring reads ``tokens * Hlab * (r * bits / 8 + 8)`` bytes (codes, step, zero; r * itemsize for float labels)
and writes ``4 * tokens * Hsel``. Writing reads the keys.

What rounds to codes is compiled without fused multiply-adds, to agree with the reference to the last bit.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.errors import BackendError
from gossamer.gpu import on, operand

TILE = 16


class Labels(Protocol):
    """What is read of a :class:`gossamer.ops.LabelCache`."""

    codes: Tensor
    step: Tensor | None
    zero: Tensor | None
    bits: int
    r: int


@triton.jit
def _round(x):
    # Half to even, as torch does: adding 1.5 * 2**23 leaves no fraction bits (|x| < 2**22).
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _sum(x):
    # Over the first axis, in float64: what is rounded to codes must not depend on the order of a sum.
    return tl.sum(x.to(tl.float64), 0).to(tl.float32)


@triton.jit(do_not_specialize=["first", "tokens", "tiles"])
def _append(
    key,
    channels,
    codes,
    step,
    zero,
    key_b,
    key_h,
    key_t,
    codes_b,
    codes_h,
    codes_t,
    step_b,
    step_h,
    step_t,
    first,
    tokens,
    tiles,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,  # label heads of a KV head
    DIM: tl.constexpr,
    R: tl.constexpr,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,  # bits of a code's container, 0: floats
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,  # channels
):
    program = tl.program_id(0)
    line = (program // tiles).to(tl.int64)
    batch, head = line // HEADS, line % HEADS
    tile = (first // 16 + program % tiles).to(tl.int64)
    lane, c = tl.arange(0, 16), tl.arange(0, BLOCK)
    row = tile * 16 + lane - first
    keep = (row >= 0) & (row < tokens)
    ids = tl.load(channels + head * R + c, mask=c < R, other=-1)
    real = keep[:, None] & ((ids >= 0) & (ids < DIM))[None, :]
    at = batch * key_b + (head // SHARE) * key_h + row[:, None] * key_t + ids[None, :]
    x = tl.load(key + at, mask=real, other=0.0)
    codes += batch * codes_b + head * codes_h + tile * codes_t
    if BITS < 16:
        x = x.to(tl.float32)
        levels: tl.constexpr = (1 << BITS) - 1
        low = tl.min(tl.where((c < R)[None, :], x, float("inf")), 1)
        span = tl.max(tl.where((c < R)[None, :], x, float("-inf")), 1) - low
        span = tl.where(span == 0.0, 1.0, span)
        top = tl.zeros_like(span) + levels
        x = _round((x - low[:, None]) * tl.div_rn(top, span)[:, None])
        x = tl.minimum(tl.maximum(x, 0.0), levels)
        unit = tl.div_rn(span, top)
        if SIZE == 0:
            x = x * unit[:, None] + low[:, None]
        else:
            a_word: tl.constexpr = 32 // SIZE
            s = c % a_word
            code = tl.where((c < R)[None, :], x, 0.0).to(tl.int32) << (8 * (s % 4) + (s // 4) * SIZE)[None, :]
            words = tl.sum(tl.reshape(code, (16, BLOCK // a_word, a_word)), 2)  # disjoint bits: the sum is their union
            w = tl.arange(0, BLOCK // a_word)
            tl.store(codes + w[None, :] * 16 + lane[:, None], words, mask=keep[:, None] & (w < WORDS)[None, :])
            at_step = batch * step_b + head * step_h + tile * step_t + lane
            tl.store(step + at_step, unit, mask=keep)
            tl.store(zero + at_step, low, mask=keep)
    if SIZE == 0:
        tl.store(codes + c[None, :] * 16 + lane[:, None], x, mask=keep[:, None] & (c < R)[None, :])


@triton.jit(do_not_specialize=["length"])
def _score(
    query,
    channels,
    codes,
    step,
    zero,
    starts,
    lengths,
    out,
    query_b,
    query_h,
    codes_b,
    codes_h,
    codes_t,
    step_b,
    step_h,
    step_t,
    length,
    HEADS: tl.constexpr,  # programs of a sequence
    LABELS: tl.constexpr,  # label heads of a program
    GROUP: tl.constexpr,  # query heads of a label head
    DIM: tl.constexpr,
    R: tl.constexpr,
    SIZE: tl.constexpr,
    WORDS: tl.constexpr,
    REDUCE: tl.constexpr,
    PROTECT: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    batch, head = line // HEADS, line % HEADS
    token = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    low, high = 0, length
    if starts is not None:
        low = tl.load(starts + batch)
    if lengths is not None:
        high = tl.minimum(tl.load(lengths + batch), length)
    keep = (token >= low) & (token < high)
    tile, lane = token // 16, token % 16
    used = ((tile * 16 + 15 >= low) & (tile * 16 < high))[None, :]  # whole tiles, so that loads are vectors
    m, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    codes += batch * codes_b + tile.to(tl.int64)[None, :] * codes_t + lane[None, :]
    SINGLE: tl.constexpr = (GROUP == 1) | (REDUCE == "sum")
    for i in tl.static_range(LABELS):
        labels = head * LABELS + i
        ids = tl.load(channels + labels * R + c, mask=c < R, other=-1)
        at = batch * query_b + (labels * GROUP + m)[:, None] * query_h + ids[None, :]
        real = (m < GROUP)[:, None] & ((ids >= 0) & (ids < DIM))[None, :]
        q = tl.load(query + at, mask=real, other=0.0)
        if SIZE == 0:
            inside = (c < R)[:, None] & used
            x = tl.load(codes + labels * codes_h + c[:, None] * 16, mask=inside, other=0.0)
            if SINGLE:
                score = tl.sum(_sum(q)[:, None] * x.to(tl.float32), 0)
            else:
                score = tl.dot(q.to(DOT), x.to(DOT), input_precision="ieee")
        else:
            a_word: tl.constexpr = 32 // SIZE
            w, s = tl.arange(0, BLOCK_K // a_word), tl.arange(0, a_word)
            inside = (w < WORDS)[:, None] & used
            words = tl.load(codes + labels * codes_h + w[:, None] * 16, mask=inside, other=0)
            spread = words[:, None, :] >> (8 * (s % 4) + (s // 4) * SIZE)[None, :, None]
            x = tl.reshape(spread & ((1 << SIZE) - 1), (BLOCK_K, BLOCK_N))
            at_step = batch * step_b + labels * step_h + tile.to(tl.int64) * step_t + lane
            unit = tl.load(step + at_step, mask=keep, other=0.0)
            base = tl.load(zero + at_step, mask=keep, other=0.0)
            q = q.to(tl.float32)
            if SINGLE:
                q = _sum(q)
                top = tl.max(tl.abs(q), 0)
                whole = _round(q * tl.div_rn(127.0, tl.where(top > 0.0, top, 1.0))).to(tl.int32)
                product = tl.sum(whole[:, None] * x, 0)
                score = tl.div_rn(top, 127.0) * unit * product.to(tl.float32) + base * _sum(q)
            else:
                top = tl.max(tl.abs(q), 1)
                limit = tl.zeros_like(top) + 127.0
                whole = _round(q * tl.div_rn(limit, tl.where(top > 0.0, top, 1.0))[:, None]).to(tl.int32)
                if SIZE == 8:  # int8 takes 0 .. 255 less 128
                    product = tl.dot(whole.to(tl.int8), (x - 128).to(tl.int8)) + 128 * tl.sum(whole, 1)[:, None]
                else:
                    product = tl.dot(whole.to(tl.int8), x.to(tl.int8))
                score = tl.div_rn(top, limit)[:, None] * unit[None, :] * product.to(tl.float32)
                score += base[None, :] * tl.sum(q, 1)[:, None]
        if (REDUCE == "max") & (not SINGLE):
            score = tl.max(tl.where((m < GROUP)[:, None], score, float("-inf")), 0)
        if i == 0:
            result = score
        elif REDUCE == "max":
            result = tl.maximum(result, score)
        else:
            result += score
    current = keep & (token == high - 1)
    if SINGLE | (REDUCE == "max"):
        result = tl.where(keep, result, float("-inf"))
        if PROTECT:
            result = tl.where(current, float("inf"), result)
        tl.store(out + line * length + token, result, mask=token < length)
    else:
        result = tl.where(keep[None, :], result, float("-inf"))
        if PROTECT:
            result = tl.where(current[None, :], float("inf"), result)
        at_out = (line * GROUP + m)[:, None] * length + token[None, :]
        tl.store(out + at_out, result, mask=(m < GROUP)[:, None] & (token < length)[None, :])


def append_labels(labels: Labels, key: Tensor, channels: Tensor, start: int) -> None:
    """Run :func:`gossamer.ops.append_labels` on checked tensors; channel ids out of range count as zeros."""
    key = key if key.stride(-1) == 1 else key.contiguous()
    batch, kv_heads, tokens, dim = key.shape
    heads = labels.codes.shape[1]
    if not tokens or not batch:
        return
    tiles = (start + tokens - 1) // TILE - start // TILE + 1
    with on(key):
        tensors, strides, layout = _layout(labels)
        _append[(batch * heads * tiles,)](
            key,
            channels,
            *tensors,
            *key.stride()[:3],
            *strides,
            start,
            tokens,
            tiles,
            HEADS=heads,
            SHARE=heads // kv_heads,
            DIM=dim,
            R=labels.r,
            BITS=labels.bits,
            BLOCK=_channel_block(labels, 1),
            **layout,
            num_warps=1 if labels.r <= 64 else 4,
            enable_fp_fusion=False,
        )


def label_scores(
    query: Tensor,
    channels: Tensor,
    labels: Labels,
    length: int,
    *,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    reduce: str = "none",
    kv_heads: int,
    protect_last: bool = False,
) -> Tensor:
    """Run :func:`gossamer.ops.label_scores` on checked tensors; with ``protect_last`` the last row scores ``+inf``."""
    query = query if query.stride(-1) == 1 else query.contiguous()
    batch, heads, dim = query.shape
    label_heads = labels.codes.shape[1]
    group = heads // label_heads
    programs = label_heads if reduce == "none" else kv_heads
    out = torch.empty(
        (batch, heads if reduce == "none" else kv_heads, length), dtype=torch.float32, device=query.device
    )
    single = group == 1 or reduce == "sum"
    block_k = _channel_block(labels, 1 if single else (32 if labels.step is not None else 16))
    block_n = max(32, min(256, 8192 // block_k))
    with on(query):
        tensors, strides, layout = _layout(labels)
        _score[(batch * programs, triton.cdiv(length, block_n))](
            query,
            channels,
            *tensors,
            starts,
            lengths,
            out,
            *query.stride()[:2],
            *strides,
            length,
            HEADS=programs,
            LABELS=label_heads // programs,
            GROUP=group,
            DIM=dim,
            R=labels.r,
            REDUCE=reduce,
            PROTECT=protect_last,
            DOT=operand(query, labels.codes),
            BLOCK_M=triton.next_power_of_2(group) if single else max(16, triton.next_power_of_2(group)),
            BLOCK_K=block_k,
            BLOCK_N=block_n,
            **layout,
            num_warps=4,
            enable_fp_fusion=labels.step is None,  # float labels round nothing
        )
    return out


def _layout(labels: Labels) -> tuple[tuple[Any, ...], tuple[int, ...], dict[str, int]]:
    """Return (tensors, strides, constants) that describe a cache to the kernels: packed codes as 32-bit words."""
    codes, step, zero = labels.codes, labels.step, labels.zero
    if codes.stride()[3:] != ((TILE, 1) if step is None else (4 * TILE, 4, 1)):
        raise BackendError("triton label kernels need contiguous tiles")
    if step is None or zero is None:
        return (codes, None, None), (*codes.stride()[:3], 0, 0, 0), {"SIZE": 0, "WORDS": 0}
    if step.stride() != zero.stride() or step.stride(-1) != 1:
        raise BackendError("triton label kernels need step and zero with the same strides, tokens contiguous")
    words = codes.view(torch.int32)
    size = 1 << (labels.bits - 1).bit_length()
    constants = {"SIZE": size, "WORDS": words.shape[3]}
    return (words, step, zero), (*words.stride()[:3], *step.stride()[:3]), constants


def _channel_block(labels: Labels, least: int) -> int:
    """Return the channels that a program handles: r up to whole words and a power of two."""
    a_word = 1 if labels.step is None else 32 >> (labels.bits - 1).bit_length()
    return max(least, a_word, int(triton.next_power_of_2(labels.r)))
