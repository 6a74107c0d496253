"""Exact scores against whole keys on the GPU.

Algorithm. Each program multiplies the query heads of one KV head (padded to 16 rows for ``tl.dot``) with a block of its
keys, and reduces over the group if asked to. Keys are read once and never repeated.

Parallelisation. One program per (sequence, KV head, block of rows).

Floor. ``S * Hkv * d * itemsize`` bytes read and ``4 * S * Hsel`` written a sequence.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.gpu import on, operand


@triton.jit(do_not_specialize=["rows"])
def _key_scores(
    query,
    key,
    starts,
    lengths,
    out,
    query_b,
    query_h,
    key_b,
    key_h,
    key_s,
    rows,
    HEADS: tl.constexpr,  # KV heads
    GROUP: tl.constexpr,
    REDUCE: tl.constexpr,
    DIM: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)  # caches pass 2**31 elements
    batch, head = line // HEADS, line % HEADS
    low, high = 0, rows
    if starts is not None:
        low = tl.load(starts + batch)
    if lengths is not None:
        high = tl.minimum(tl.load(lengths + batch), rows)
    m, n, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    row = tl.program_id(1) * BLOCK_N + n
    keep = (row >= low) & (row < high)
    heads = head * GROUP + m
    real = (m < GROUP)[:, None] & (d < DIM)[None, :]
    q = tl.load(query + batch * query_b + heads[:, None] * query_h + d[None, :], mask=real, other=0.0).to(DOT)
    at = key + batch * key_b + head * key_h + row.to(tl.int64)[:, None] * key_s + d[None, :]
    k = tl.load(at, mask=keep[:, None] & (d < DIM)[None, :], other=0.0).to(DOT)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if REDUCE == 0:
        scores = tl.where(keep[None, :], scores, float("-inf"))
        place = (batch * HEADS * GROUP + heads)[:, None] * rows + row[None, :]
        tl.store(out + place, scores, mask=(m < GROUP)[:, None] & (row < rows)[None, :])
    else:
        if REDUCE == 1:
            best = tl.max(tl.where((m < GROUP)[:, None], scores, float("-inf")), 0)
        else:
            best = tl.sum(scores, 0)  # padded heads scored 0
        tl.store(out + line * rows + row, tl.where(keep, best, float("-inf")), mask=row < rows)


def key_scores(
    query: Tensor, key: Tensor, *, starts: Tensor | None = None, lengths: Tensor | None = None, reduce: str = "none"
) -> Tensor:
    """As :func:`gossamer.ops.key_scores.key_scores`, which has checked the arguments."""
    batch, heads, dim = query.shape
    kv_heads, rows = key.shape[1:3]
    query = query if query.stride(-1) == 1 else query.contiguous()
    key = key if key.stride(-1) == 1 else key.contiguous()
    group, block_d = heads // kv_heads, max(16, triton.next_power_of_2(dim))
    out = torch.empty((batch, heads if reduce == "none" else kv_heads, rows), dtype=torch.float32, device=query.device)
    block = 128 if block_d <= 128 else 64
    launch: Any = _key_scores[(batch * kv_heads, triton.cdiv(rows, block))]
    if not out.numel():
        return out
    with on(query):
        launch(
            query,
            key,
            starts,
            lengths,
            out,
            *query.stride()[:2],
            *key.stride()[:3],
            rows,
            HEADS=kv_heads,
            GROUP=group,
            REDUCE={"none": 0, "max": 1, "sum": 2}[reduce],
            DIM=dim,
            DOT=operand(query, key),
            BLOCK_D=block_d,
            BLOCK_M=max(16, triton.next_power_of_2(group)),
            BLOCK_N=block,
        )
    return out
