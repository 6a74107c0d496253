"""The attention map max-pooled to blocks, without storing the map.

    T[m, n] = max over i in query block m, j in key block n of softmax_j(q_i · K · scale)

the ground truth of learned block gates, and a picture of a map at any size. The cost is that of the scores,
``2 · B · H · T · S · d`` multiply-adds (half of it for a causal square); the native kernel holds one tile of scores and one
row maximum per key block and row, the reference a strip of rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.errors import InputError
from gossamer.ops import _checks
from gossamer.ops._dispatch import DTYPE_CODES, native, resolve, triton_call

_OP = "pooled_attention"
_HIDDEN = torch.finfo(
    torch.float32
).min  # not -inf: a row that sees nothing must stay finite, it is set to 0 afterwards
_ROWS = 256  # query rows of a strip of the reference


def pooled_attention(
    query: Tensor,
    key: Tensor,
    block: int,
    *,
    key_block: int | None = None,
    starts: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Pool the causal softmax map by its maximum over blocks of queries and keys.

    Parameters
    ----------
    query
        [B, H, T, d], float32, bfloat16 or float16: the last T of the S positions.
    key
        [B, Hkv, S, d], dtype of ``query``; H is a multiple of Hkv and query head h reads KV head ``h // (H // Hkv)``.
        Views of a larger cache are fine.
    block
        Queries of a block, counted from the first query; the last block may be smaller. 1 keeps every row.
    key_block
        Keys of a block, counted from row 0. Default ``block``.
    starts
        int32 [B]: left padding, the first real row of each sequence. Rows of padding neither see nor are seen.
    scale
        Factor on the logits. Default ``1 / sqrt(d)``.

    Returns
    -------
    float32 [B, H, ⌈T/block⌉, ⌈S/key_block⌉]: probabilities, 0 where nothing is visible. They are not normalised: a row
    sums to anything between 1 / (keys in a block) and the number of blocks.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit, more queries than keys, blocks below 1.

    >>> x = torch.zeros(1, 1, 4, 8)
    >>> pooled_attention(x, x, 2)
    tensor([[[[1.0000, 0.0000],
              [0.3333, 0.3333]]]])
    """
    key_block = block if key_block is None else key_block
    q, k = query.shape, key.shape
    if len(q) != 4 or len(k) != 4:
        raise InputError(f"{_OP}: want query [B,H,T,d] and key [B,Hkv,S,d], got {list(q)} and {list(k)}")
    _checks.attention(_OP, query.new_empty(()).expand(q[0], q[1], q[3]), key, key)
    if q[2] > k[2]:
        raise InputError(f"{_OP}: {q[2]} queries cannot be the last of {k[2]} rows")
    if block < 1 or key_block < 1:
        raise InputError(f"{_OP}: block and key_block must be at least 1, got {block} and {key_block}")
    starts = _checks.int32(_OP, "starts", starts, (q[0],), query)
    scale = q[3] ** -0.5 if scale is None else scale
    run = torch.ops.gossamer.pooled_attention if torch.compiler.is_compiling() else _run
    out: Tensor = run(query, key, block, key_block, starts, scale)
    return out


def _reference(query: Tensor, key: Tensor, block: int, key_block: int, starts: Tensor | None, scale: float) -> Tensor:
    batch, heads, new, dim = query.shape
    kv_heads, length = key.shape[1:3]
    first, _ = _checks.bounds(_OP, starts, None, batch, length, query.device)
    first = first.view(-1, 1, 1, 1, 1)
    columns = -(-length // key_block)
    grouped, keys = query.reshape(batch, kv_heads, heads // kv_heads, new, dim), key.float()
    strip = max(1, _ROWS // block) * block
    parts = []
    for begin in range(0, new, strip):
        end = min(begin + strip, new)
        high = length - new + end  # columns from here on are seen by no query of the strip
        position = torch.arange(length - new + begin, high, device=query.device)[:, None]
        row = torch.arange(high, device=query.device)
        seen = (row <= position) & (row >= first)
        logits = (grouped[:, :, :, begin:end].float() * scale).flatten(2, 3) @ keys[:, :, :high].transpose(2, 3)
        logits = logits.unflatten(2, (-1, end - begin)).masked_fill(~seen, _HIDDEN)
        weights = logits.softmax(-1).masked_fill(position < first, 0.0)
        weights = F.pad(weights, (0, columns * key_block - high, 0, -(end - begin) % block))
        parts.append(weights.unflatten(-1, (columns, key_block)).unflatten(3, (-1, block)).amax((4, 6)).flatten(1, 2))
    if not parts:
        return query.new_zeros((batch, heads, 0, columns), dtype=torch.float32)
    return torch.cat(parts, 2)


def _run_native(query: Tensor, key: Tensor, block: int, key_block: int, starts: Tensor | None, scale: float) -> Tensor:
    batch, heads, new, dim = query.shape
    kv_heads, length = key.shape[1:3]
    query, key = _checks.row_major(query), _checks.row_major(key)
    # Blocks above the diagonal are not visited: they stay 0.
    out = torch.zeros((batch, heads, -(-new // block), -(-length // key_block)), dtype=torch.float32)
    status = native().pooled_attention(
        (query.data_ptr(), key.data_ptr(), out.data_ptr(), _checks.pointer(starts)),
        (*query.stride()[:3], *key.stride()[:3]),
        (batch, heads, kv_heads, new, length, dim, block, key_block),
        scale,
        DTYPE_CODES[query.dtype],
        torch.get_num_threads(),
    )
    _checks.raise_status(_OP, status)
    return out


def _run(query: Tensor, key: Tensor, block: int, key_block: int, starts: Tensor | None, scale: float) -> Tensor:
    backend = resolve(_OP, _OP, query, key)
    if backend == "native" and query.numel():
        return _run_native(query, key, block, key_block, starts, scale)
    if backend == "triton" and query.numel():
        out: Tensor = triton_call(_OP, _OP)(query, key, block, key_block, starts=starts, scale=scale)
        return out
    return _reference(query, key, block, key_block, starts, scale)


_custom = torch.library.custom_op("gossamer::pooled_attention", _run, mutates_args=())


@_custom.register_fake
def _fake(query: Tensor, key: Tensor, block: int, key_block: int, starts: Tensor | None, scale: float) -> Tensor:
    rows, columns = -(-query.shape[2] // block), -(-key.shape[2] // key_block)
    return query.new_empty((query.shape[0], query.shape[1], rows, columns), dtype=torch.float32)
