"""A linear layer with a weight of 4x1 blocks, on the GPU.

Algorithm. A program multiplies the blocks of a few block rows with a tile of tokens. Blocks come in chunks: the inputs that
they name are gathered from x, one row of x transposed for each block, and multiplied by the four outputs of the blocks with
``tl.dot``; what of its tile the four outputs leave empty is zero, since the tensor cores take no fewer than 16 columns.

Parallelisation. One program per (block row, tile of tokens).

Floor. The blocks once for each tile of tokens; x once for each block row, mostly from L2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.gpu import on, operand

if TYPE_CHECKING:
    from gossamer.ops.sparse_formats import SparseWeight

_CHUNK = 64
_ACTIVATIONS = {None: -1, "silu": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3}


@triton.jit(do_not_specialize=["tokens", "outputs"])
def _multiply_blocks(
    x,
    values,
    columns,
    pointers,
    bias,
    added,
    out,
    x_n,
    x_k,
    added_n,
    added_m,
    tokens,
    outputs,
    ACTIVATION: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, 16)
    begin, end = tl.load(pointers + row).to(tl.int64), tl.load(pointers + row + 1).to(tl.int64)
    total = tl.zeros([BLOCK_N, 16], tl.float32)
    for first in range(begin, end, CHUNK):
        i = first + tl.arange(0, CHUNK)
        k = tl.load(columns + i, mask=i < end, other=0).to(tl.int64) & 0xFFFF
        weight = tl.load(values + i[:, None] * 4 + r[None, :], mask=(i < end)[:, None] & (r < 4)[None, :], other=0.0)
        inside = (n < tokens)[:, None] & (i < end)[None, :]
        taken = tl.load(x + n.to(tl.int64)[:, None] * x_n + k[None, :] * x_k, mask=inside, other=0.0)
        total = tl.dot(taken.to(OPERAND), weight.to(OPERAND), total, input_precision="ieee")
    m = row * 4 + r
    inside = (n < tokens)[:, None] & ((r < 4) & (m < outputs))[None, :]
    if bias is not None:
        total += tl.load(bias + m, mask=(r < 4) & (m < outputs), other=0.0).to(tl.float32)[None, :]
    if added is not None:
        at = added + n.to(tl.int64)[:, None] * added_n + m[None, :] * added_m
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == 0:
        total = total / (1.0 + tl.exp(-total))
    elif ACTIVATION == 1:
        total = tl.where(total < 0.0, 0.0, total)
    elif ACTIVATION == 2:
        total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
    elif ACTIVATION == 3:
        inner = 1.5957691216057308 * (total + 0.044715 * total * total * total)
        total = total / (1.0 + tl.exp(-inner))
    tl.store(out + n.to(tl.int64)[:, None] * outputs + m[None, :], total, mask=inside)


def sparse_linear(
    x: Tensor, w: SparseWeight, bias: Tensor | None, activation: str | None, added: Tensor | None
) -> Tensor:
    """Run :func:`gossamer.ops.sparse_linear` on checked tensors and a weight of 4x1 blocks that is not in 8 bits."""
    outputs, inputs = w.shape
    out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    rows, added = x.reshape(-1, inputs), None if added is None else added.reshape(-1, outputs)
    tokens = rows.shape[0]
    assert w.columns is not None
    if not out.numel():
        return out
    block = 64 if tokens > 32 else 16 if tokens <= 16 else 32
    with on(x):
        _multiply_blocks[(triton.cdiv(outputs, 4), triton.cdiv(tokens, block))](
            rows,
            w.values,
            w.columns.view(torch.int16),  # the kernel takes the sign off again
            w.pointers,
            None if bias is None else bias.contiguous(),
            added,
            out,
            *rows.stride(),
            *((0, 0) if added is None else added.stride()),
            tokens,
            outputs,
            ACTIVATION=_ACTIVATIONS[activation],
            OPERAND=operand(rows, w.values),
            BLOCK_N=block,
            CHUNK=_CHUNK,
            num_warps=4,
        )
    return out
