"""Attention of a prompt on the GPU over chosen key blocks, and over columns and diagonals.

Algorithm. Each program keeps a tile of queries and goes through the keys that its row block reads (online softmax in
float32, base 2): blocks by their ids, or squares by their first keys and then single columns, 64 of them gathered into one
dense tile, which softmax does not mind. What a row block reads is found by small kernels before: ``_compact`` turns a
boolean mask into ids, ``_walk`` makes squares and columns of a row block from the lists of its head.

Parallelisation. One program per (sequence, query head, tile of queries), the last rows first: they have most to read.

Floor. ``4 * d`` operations for each query–key pair of the chosen pieces, on the tensor cores.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.gpu import on, operand

_LOG2_E = 1.4426950408889634


@triton.jit
def _fold(
    q,
    key,
    value,
    row,
    keep,
    after,
    until,
    scale,
    top,
    total,
    acc,
    key_s,
    value_s,
    DIM: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Fold the keys ``row`` where ``keep`` into the running softmax of queries that see after < row <= until."""
    d = tl.arange(0, BLOCK_D)
    at_row = row.to(tl.int64)[:, None]
    inside = keep[:, None] & (d < DIM)[None, :]  # rows left out may be uninitialised: never read
    k = tl.load(key + at_row * key_s + d[None, :], mask=inside, other=0.0).to(DOT)
    v = tl.load(value + at_row * value_s + d[None, :], mask=inside, other=0.0).to(DOT)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    seen = (row[None, :] > after[:, None]) & (row[None, :] <= until[:, None])
    logits = tl.where(keep[None, :] & seen, logits, float("-inf"))
    new = tl.maximum(top, tl.max(logits, 1))
    shift = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: -inf minus -inf is NaN
    weight = tl.exp2(logits - shift[:, None])
    fade = tl.exp2(top - shift)
    total = total * fade + tl.sum(weight, 1)
    acc = tl.dot(weight.to(DOT), v, acc * fade[:, None], input_precision="ieee")
    return new, total, acc


@triton.jit(do_not_specialize=["new", "rows", "tiles", "slots", "singles", "window"])
def _prefill(
    query,
    key,
    value,
    ids,  # first keys of squares, or ids of key blocks
    counts,
    columns,
    column_counts,
    starts,
    out,
    lse,
    query_b,
    query_h,
    query_t,
    key_b,
    key_h,
    key_s,
    value_b,
    value_h,
    value_s,
    ids_b,
    ids_h,
    ids_t,
    new,
    rows,
    tiles,
    slots,
    singles,
    window,
    scale,  # times log2(e)
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a KV head
    SELECT: tl.constexpr,  # query heads of a line of ids
    BLOCK: tl.constexpr,  # queries of a row block
    PIECES: tl.constexpr,  # tiles of a row block
    KEYS: tl.constexpr,  # keys of a piece
    STEP: tl.constexpr,  # positions from one id to the next
    DIM: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile = tiles - 1 - tl.program_id(0)
    line = tl.program_id(1).to(tl.int64)
    batch, head = line // HEADS, line % HEADS
    block = tile // PIECES
    m, n, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    within = tile % PIECES * BLOCK_M + m
    at = block * BLOCK + within
    real = (within < BLOCK) & (at < new)
    position = tl.where(real, at + rows - new, -1)
    last = tl.max(position, 0)
    # A key in the window of a query counts there and not among the chosen ones.
    none, until = tl.full([BLOCK_M], -1, tl.int32), position - window
    low = 0
    if starts is not None:
        low = tl.maximum(tl.load(starts + batch), 0)

    place = real[:, None] & (d < DIM)[None, :]
    here = query + batch * query_b + head * query_h + at.to(tl.int64)[:, None] * query_t + d[None, :]
    q = tl.load(here, mask=place, other=0.0).to(DOT)
    key += batch * key_b + (head // GROUP) * key_h
    value += batch * value_b + (head // GROUP) * value_h
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    select = head // SELECT
    lines = tiles // PIECES
    count = tl.minimum(tl.load(counts + (batch * (HEADS // SELECT) + select) * lines + block), slots)
    ids += batch * ids_b + select * ids_h + block.to(tl.int64) * ids_t
    for i in range(0, count):
        first = tl.load(ids + i) * STEP
        for part in range(0, KEYS, BLOCK_N):
            row = first + part + n
            keep = (part + n < KEYS) & (row >= low) & (row <= last - window)
            top, total, acc = _fold(
                q, key, value, row, keep, none, until, scale, top, total, acc, key_s, value_s, DIM, DOT, BLOCK_D
            )
    if columns is not None:
        lone = (batch * HEADS + head) * lines + block
        count = tl.minimum(tl.load(column_counts + lone), singles)
        columns += lone * singles
        for i in range(0, count, BLOCK_N):
            row = tl.load(columns + i + n, mask=i + n < count, other=-1)
            keep = (row >= low) & (row <= last)
            top, total, acc = _fold(
                q, key, value, row, keep, none, position, scale, top, total, acc, key_s, value_s, DIM, DOT, BLOCK_D
            )
    if window > 0:
        first = tl.min(tl.where(real, position, last), 0)
        for i in range(tl.maximum(first - window + 1, low), last + 1, BLOCK_N):
            row = i + n
            keep = row <= last
            top, total, acc = _fold(
                q, key, value, row, keep, until, position, scale, top, total, acc, key_s, value_s, DIM, DOT, BLOCK_D
            )

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    to = line * new + at
    tl.store(out + to[:, None] * DIM + d[None, :], acc / total[:, None], mask=place)
    ln2: tl.constexpr = 0.6931471805599453
    tl.store(lse + to, tl.where(empty, float("-inf"), (top + tl.log2(total)) * ln2), mask=real)


@triton.jit(do_not_specialize=["columns", "lines", "before"])
def _compact(mask, ids, counts, mask_b, mask_h, mask_t, columns, lines, before, HEADS: tl.constexpr, BLOCK: tl.constexpr,
             KEYS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Ids of the chosen blocks of one line, without those that lie behind its last query."""
    line = tl.program_id(0).to(tl.int64)
    block = line % lines
    mask += line // lines // HEADS * mask_b + line // lines % HEADS * mask_h + block * mask_t
    end = tl.minimum((before + (block + 1) * BLOCK - 1) // KEYS + 1, columns)
    found = end * 0
    for i in range(0, end, CHUNK):
        j = i + tl.arange(0, CHUNK)
        chosen = (tl.load(mask + j, mask=j < end, other=0) != 0).to(tl.int32)
        tl.store(ids + line * columns + found + tl.cumsum(chosen, 0) - 1, j, mask=chosen != 0)
        found += tl.sum(chosen, 0)
    tl.store(counts + line, found)


@triton.jit(do_not_specialize=["vertical_count", "slash_count", "lines", "max_ranges"])
def _walk(
    verticals,
    slashes,
    ranges,
    range_counts,
    columns,
    column_counts,
    vertical_count,
    slash_count,
    lines,
    max_ranges,
    SIZE: tl.constexpr,
):
    """Squares and columns of one row block; see :mod:`gossamer.ops.vertical_slash_attention`."""
    line = tl.program_id(0).to(tl.int64)
    verticals += line // lines * vertical_count
    slashes += line // lines * slash_count
    ranges += line * max_ranges
    columns += line * vertical_count
    last = ((line % lines + 1) * SIZE).to(tl.int32)
    far: tl.constexpr = 2147483647
    squares, singles, v = last * 0, last * 0, last * 0
    end = last * 0 - SIZE - 1
    before = last * 0 - 1
    # One turn more than there are slashes: the last takes the columns behind all squares.
    for s in range(0, slash_count + 1):
        slash = tl.load(slashes + s, mask=s < slash_count, other=far)
        stop = tl.maximum(last - tl.minimum(slash, last), SIZE)
        new = (slash < last) & (stop > end)
        begin = tl.where(stop > end + SIZE, stop - SIZE, end)
        until = tl.where(s == slash_count, last, tl.where(new, begin, 0))
        vertical = tl.load(verticals + v, mask=v < vertical_count, other=far)
        while vertical < until:
            if (vertical >= end) & (vertical != before):
                tl.store(columns + singles, vertical)
                singles += 1
                before = vertical
            v += 1
            vertical = tl.load(verticals + v, mask=v < vertical_count, other=far)
        if new:
            tl.store(ranges + squares, begin)
            squares += 1
            end = begin + SIZE
    tl.store(range_counts + line, squares)
    tl.store(column_counts + line, singles)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    counts: Tensor | None,
    block_size: int,
    key_block_size: int,
    window: int | None,
    starts: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Run :func:`gossamer.ops.block_sparse_attention` on checked tensors; ids out of range are skipped."""
    blocks = blocks if blocks.stride(-1) == 1 else blocks.contiguous()
    if counts is None:
        lines, columns = blocks.shape[:3], blocks.shape[3]
        ids = torch.empty(blocks.shape, dtype=torch.int32, device=query.device)
        counts = torch.empty(lines, dtype=torch.int32, device=query.device)
        if counts.numel():
            with on(query):
                _compact[(counts.numel(),)](
                    blocks.view(torch.uint8),
                    ids,
                    counts,
                    *blocks.stride()[:3],
                    columns,
                    lines[2],
                    key.shape[2] - query.shape[2],
                    HEADS=lines[1],
                    BLOCK=block_size,
                    KEYS=key_block_size,
                    CHUNK=max(16, min(1024, triton.next_power_of_2(columns))),
                    num_warps=4,
                    enable_fp_fusion=True,
                )
        blocks = ids
    size, window = key_block_size, min(window or 0, key.shape[2])
    return _launch(query, key, value, blocks, counts, None, None, block_size, size, size, window, starts, scale)


def vertical_slash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    verticals: Tensor,
    slashes: Tensor,
    block_size: int,
    starts: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Run :func:`gossamer.ops.vertical_slash_attention` on checked tensors."""
    index = vertical_slash_index(verticals, slashes, key.shape[2], block_size)
    return _launch(query, key, value, *index, block_size, block_size, 1, 0, starts, scale)


def vertical_slash_index(
    verticals: Tensor, slashes: Tensor, length: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run :func:`gossamer.ops.vertical_slash_index` on checked tensors; the order of the lists is trusted."""
    lines = (*verticals.shape[:2], -(-length // block_size))
    width = min(slashes.shape[2], lines[2])
    ranges, columns = slashes.new_zeros(*lines, width), slashes.new_zeros(*lines, verticals.shape[2])
    range_counts, column_counts = slashes.new_zeros(lines), slashes.new_zeros(lines)
    if range_counts.numel():
        with on(verticals):
            _walk[(range_counts.numel(),)](
                verticals,
                slashes,
                ranges,
                range_counts,
                columns,
                column_counts,
                verticals.shape[2],
                slashes.shape[2],
                lines[2],
                width,
                SIZE=block_size,
                num_warps=1,
                enable_fp_fusion=True,
            )
    return ranges, range_counts, columns, column_counts


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ids: Tensor,
    counts: Tensor,
    columns: Tensor | None,
    column_counts: Tensor | None,
    block_size: int,
    keys: int,
    step: int,
    window: int,
    starts: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    batch, heads, new, dim = query.shape
    out: Any = torch.empty((batch, heads, new, dim), dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, heads, new), dtype=torch.float32, device=query.device)
    if not out.numel():
        return out, lse
    block_d = max(16, triton.next_power_of_2(dim))
    wide = block_d * query.element_size()
    block_m = max(16, min(64, triton.next_power_of_2(block_size)))
    block_n = max(16, min(64, triton.next_power_of_2(keys), 16384 // wide))
    pieces = -(-block_size // block_m)
    tiles = counts.shape[2] * pieces
    with on(query):
        _prefill[(tiles, batch * heads)](
            query,
            key,
            value,
            ids,
            counts,
            columns,
            column_counts,
            starts,
            out,
            lse,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *ids.stride()[:3],
            new,
            key.shape[2],
            tiles,
            ids.shape[3],
            0 if columns is None else columns.shape[3],
            window,
            scale * _LOG2_E,
            HEADS=heads,
            GROUP=heads // key.shape[1],
            SELECT=heads // ids.shape[1],
            BLOCK=block_size,
            PIECES=pieces,
            KEYS=keys,
            STEP=step,
            DIM=dim,
            DOT=operand(query),
            BLOCK_D=block_d,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=8 if wide > 256 else 4,
            num_stages=2,
            enable_fp_fusion=True,
        )
    return out, lse
