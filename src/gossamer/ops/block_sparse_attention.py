"""Causal attention of a prompt that computes only chosen blocks of the attention matrix.

The operator is bound by arithmetic: ``4 * d`` operations for every query–key pair of a chosen block, so time follows
the chosen area as long as blocks are large enough to fill the vector units (64 × 64 and up; smaller blocks are joined
into tiles as far as heads and neighbours allow).
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from gossamer.errors import InputError
from gossamer.ops import _checks
from gossamer.ops._dispatch import DTYPE_CODES, native, resolve, triton_call
from gossamer.ops._masked import masked_attention

_OP = "block_sparse_attention"
_GPU = "prefill_attention"
_STATUS = {
    1: "starts must lie in 0 .. number of rows",
    2: "blocks must hold ids of key blocks, each line ascending, none twice",
    3: "counts must lie in 0 .. blocks.shape[-1]",
}


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    *,
    counts: Tensor | None = None,
    block_size: int = 64,
    key_block_size: int | None = None,
    window: int | None = None,
    starts: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    *,
    counts: Tensor | None = None,
    block_size: int = 64,
    key_block_size: int | None = None,
    window: int | None = None,
    starts: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    *,
    counts: Tensor | None = None,
    block_size: int = 64,
    key_block_size: int | None = None,
    window: int | None = None,
    starts: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend blocks of queries to chosen blocks of keys; causal by token, inside the blocks too.

    Parameters
    ----------
    query
        [B, H, T, d], float32, bfloat16 or float16: the last T of the S positions. Query block i holds queries
        ``i * block_size`` and on, counted from the first query.
    key, value
        [B, Hkv, S, d], dtype of ``query``; H is a multiple of Hkv and query head h reads KV head ``h // (H // Hkv)``.
        Views of a larger cache are fine: only the inner stride must be 1.
    blocks
        bool [B, Hsel, nq, nk] with ``nq = ceil(T / block_size)`` and ``nk = ceil(S / key_block_size)``: which key blocks
        each query block attends. Or, with ``counts``, int32 [B, Hsel, nq, k]: their ids, ascending and none twice.
        Hsel is H, or Hkv (shared by the heads of a group, which lets small blocks of several heads form one tile), or 1.
        What lies in the future of a query is left out whatever the blocks say.
    counts
        int32 [B, Hsel, nq]: how many ids of each line are used; the rest may be anything.
    block_size, key_block_size
        Queries and keys of a block; ``key_block_size`` defaults to ``block_size``.
    window
        Each query also reads the last ``window`` positions up to its own, whatever the blocks say. Default none.
    starts
        int32 [B], rows of left padding: never read. Default 0.
    scale
        Factor on the logits. Default ``1 / sqrt(d)``.
    return_lse
        Also return the float32 log-sum-exp [B, H, T] of the scaled logits, so that parts over disjoint keys can be merged
        (:func:`~gossamer.ops.merge_attention`).

    Returns
    -------
    [B, H, T, d] in the dtype of ``query``. A query that sees nothing gives zeros and log-sum-exp ``-inf``.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit, block sizes below 1, a window below 1, ids or counts out of range, ids
        that do not ascend, ``starts`` beyond S.

    Examples
    --------
    >>> x = torch.ones(1, 1, 128, 16)
    >>> diagonal = torch.eye(2, dtype=torch.bool)[None, None]
    >>> out, lse = block_sparse_attention(x, x, x, diagonal, return_lse=True)
    >>> round(float(lse[0, 0, 64] - 4), 3), round(float(lse[0, 0, 65] - 4), 3)  # one key, then two
    (0.0, 0.693)
    """
    _checks.prefill(_OP, query, key, value)
    key_block_size = block_size if key_block_size is None else key_block_size
    if block_size < 1 or key_block_size < 1:
        raise InputError(f"{_OP}: block sizes must be 1 or more, got {block_size} and {key_block_size}")
    if window is not None and window < 1:
        raise InputError(f"{_OP}: window must be 1 or more, got {window}")
    batch, heads, new, dim = query.shape
    kv_heads, length = key.shape[1:3]
    query_blocks, key_blocks = -(-new // block_size), -(-length // key_block_size)
    shape = (*blocks.shape[:3], key_blocks if counts is None else blocks.shape[-1])
    if blocks.dim() != 4 or shape[0] != batch or shape[1] not in (1, kv_heads, heads) or shape[2] != query_blocks:
        wanted = f"[{batch}, {heads}, {kv_heads} or 1, {query_blocks}, {key_blocks if counts is None else 'k'}]"
        raise InputError(f"{_OP}: blocks must be {wanted}, got {list(blocks.shape)}")
    if counts is None:
        if blocks.dtype is not torch.bool:
            raise InputError(f"{_OP}: blocks must be bool, or ids with counts, got {blocks.dtype} without counts")
        if tuple(blocks.shape) != shape:
            raise InputError(f"{_OP}: blocks must have {key_blocks} columns, got {blocks.shape[-1]}")
        if blocks.device != query.device:
            raise InputError(f"{_OP}: blocks is on {blocks.device}, the other tensors are on {query.device}")
    else:
        checked = _checks.int32(_OP, "blocks", blocks, shape, query)
        assert checked is not None
        blocks = checked
        counts = _checks.int32(_OP, "counts", counts, shape[:3], query)
    starts = _checks.int32(_OP, "starts", starts, (batch,), query)
    scale = 1.0 / math.sqrt(dim) if scale is None else float(scale)
    run = torch.ops.gossamer.block_sparse_attention if torch.compiler.is_compiling() else _run
    out, lse = run(query, key, value, blocks, counts, block_size, key_block_size, window, starts, scale, return_lse)
    return (out, lse) if return_lse else out


def block_mask(blocks: Tensor, counts: Tensor | None, key_blocks: int) -> Tensor:
    """Return bool [B, Hsel, nq, nk] for ``blocks`` in either form; ids out of range or not ascending raise InputError."""
    if counts is None:
        return blocks
    slots = blocks.shape[-1]
    if bool(((counts < 0) | (counts > slots)).any()):
        raise InputError(f"{_OP}: {_STATUS[3]}")
    used = torch.arange(slots, device=blocks.device) < counts[..., None]
    falls = used[..., 1:] & (blocks[..., 1:] <= blocks[..., :-1])
    if bool((used & ((blocks < 0) | (blocks >= key_blocks))).any()) or bool(falls.any()):
        raise InputError(f"{_OP}: {_STATUS[2]}")
    mask = torch.zeros(*blocks.shape[:3], key_blocks + 1, dtype=torch.bool, device=blocks.device)
    return mask.scatter_(3, blocks.long().masked_fill(~used, key_blocks), True)[..., :key_blocks]


def _reference(
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
    length = key.shape[2]
    if starts is not None and bool(((starts < 0) | (starts > length)).any()):
        raise InputError(f"{_OP}: {_STATUS[1]}")
    chosen = block_mask(blocks, counts, -(-length // key_block_size))
    column = torch.arange(length, device=query.device) // key_block_size

    def mask(rows: slice) -> Tensor:
        row = torch.arange(rows.start, rows.stop, device=query.device)
        tokens: Tensor = chosen[:, :, row // block_size][..., column]
        if window is not None:
            position = row + length - query.shape[2]
            tokens = tokens | (torch.arange(length, device=query.device) > position[:, None] - window)
        return tokens

    return masked_attention(query, key, value, mask, starts, scale, step=block_size)


def _run_native(
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
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    batch, heads, new, dim = query.shape
    query, key, value, blocks = map(_checks.row_major, (query, key, value, blocks))
    out = query.new_empty((batch, heads, new, dim))
    lse = query.new_empty((batch, heads, new) if return_lse else (0,), dtype=torch.float32)
    here = _checks.pointer(blocks)
    status = native().block_sparse_attention(
        (*map(_checks.pointer, (query, key, value, out, lse, starts)),),
        (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3]),
        (batch, heads, key.shape[1], new, key.shape[2], dim, block_size),
        (here if counts is None else 0, 0 if counts is None else here, _checks.pointer(counts)),
        (*blocks.stride()[:3], blocks.shape[1], blocks.shape[3], key_block_size, min(window or 0, key.shape[2])),
        scale,
        DTYPE_CODES[query.dtype],
        torch.get_num_threads(),
    )
    if status:
        raise InputError(f"{_OP}: {_STATUS[status]}")
    return out, lse


def _run(
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
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    backend = resolve(_OP, _GPU, query, key, value)
    if backend == "native":
        return _run_native(
            query, key, value, blocks, counts, block_size, key_block_size, window, starts, scale, return_lse
        )
    call = triton_call(_OP, _GPU) if backend == "triton" else _reference
    out, lse = call(query, key, value, blocks, counts, block_size, key_block_size, window, starts, scale)
    return out, lse.float() if return_lse else query.new_empty((0,), dtype=torch.float32)


_custom = torch.library.custom_op("gossamer::block_sparse_attention", _run, mutates_args=())


@_custom.register_fake
def _fake(
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
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    lse_shape = query.shape[:3] if return_lse else (0,)
    return query.new_empty(query.shape), query.new_empty(lse_shape, dtype=torch.float32)
