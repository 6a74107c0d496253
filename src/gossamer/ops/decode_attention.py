"""Attention of one query per sequence over a KV cache: all rows of a range, or only chosen rows.

The operator is bound by the bytes of K and V that it reads, ``2 * rows * Hkv * d * itemsize`` a sequence, so every
implementation reads each row once for all query heads that share it (grouped-query attention; keys are never repeated)
and accumulates in float32.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from gossamer.errors import InputError
from gossamer.ops import _checks
from gossamer.ops._dispatch import DTYPE_CODES, native, resolve, triton_call

_OP = "decode_attention"


@overload
def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    indices: Tensor | None = None,
    counts: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    indices: Tensor | None = None,
    counts: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    indices: Tensor | None = None,
    counts: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend one query per sequence and head over rows of a KV cache.

    Parameters
    ----------
    query
        [B, H, d], float32, bfloat16 or float16.
    key, value
        [B, Hkv, S, d], dtype of ``query``; H is a multiple of Hkv and query head h reads KV head ``h // (H // Hkv)``.
        Views of a larger cache are fine: only the inner stride must be 1. Rows that are not attended are never read.
    starts, lengths
        int32 [B]: rows [start, length) of each sequence take part. Default 0 and S. With ``indices`` they only narrow
        the ids allowed.
    indices
        int32 [B, Hsel, k], Hsel = H (rows per query head) or Hkv (rows shared by the group): ids of the rows to attend,
        in any order; a repeated id counts as often as it stands there. H == Hkv makes the two the same.
    counts
        int32 [B, Hsel]: only the first ``counts`` ids of each line are used, the rest may be anything. Default k.
    scale
        Factor on the logits. Default ``1 / sqrt(d)``.
    return_lse
        Also return the float32 log-sum-exp [B, H] of the scaled logits, so that parts can be merged
        (:func:`merge_attention`).

    Returns
    -------
    [B, H, d] in the dtype of ``query``. A head with nothing to attend gives zeros and log-sum-exp ``-inf``.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit, ranges beyond S, row ids out of range.
    """
    _checks.attention(_OP, query, key, value)
    batch, heads, dim = query.shape
    kv_heads = key.shape[1]
    starts = _checks.int32(_OP, "starts", starts, (batch,), query)
    lengths = _checks.int32(_OP, "lengths", lengths, (batch,), query)
    if indices is not None:
        if indices.dim() != 3 or indices.shape[1] not in (heads, kv_heads):
            raise InputError(f"{_OP}: indices must be [B, {heads} or {kv_heads}, k], got {list(indices.shape)}")
        indices = _checks.int32(_OP, "indices", indices, (batch, *indices.shape[1:]), query)
        assert indices is not None
        counts = _checks.int32(_OP, "counts", counts, tuple(indices.shape[:2]), query)
    elif counts is not None:
        raise InputError(f"{_OP}: counts say how many indices are used, so they need indices")
    scale = 1.0 / math.sqrt(dim) if scale is None else float(scale)
    run = torch.ops.gossamer.decode_attention if torch.compiler.is_compiling() else _run
    out, lse = run(query, key, value, starts, lengths, indices, counts, scale, return_lse)
    return (out, lse) if return_lse else out


def merge_attention(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge partial attentions over disjoint rows, by their log-sum-exp.

    Parameters
    ----------
    outs
        [P, ..., d], the P partial outputs.
    lses
        float32 [P, ...], their log-sum-exps; ``-inf`` marks an empty part.

    Returns
    -------
    The merged output [..., d] in the dtype of ``outs`` and its log-sum-exp [...].
    """
    if outs.shape[:-1] != lses.shape:
        raise InputError(f"merge_attention: outs {list(outs.shape)} and lses {list(lses.shape)} do not fit")
    total = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - total.masked_fill(total == -math.inf, 0.0)).unsqueeze(-1)
    return (weights * outs.float()).sum(0).to(outs.dtype), total


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    indices: Tensor | None,
    counts: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, heads, dim = query.shape
    kv_heads, rows = key.shape[1:3]
    group = heads // kv_heads
    lo, hi = _checks.bounds(_OP, starts, lengths, batch, rows, query.device)
    if indices is None:
        keep = _checks.inside(lo, hi, rows)[:, :, None]  # [B, 1, 1, S]
        k, v = key.unsqueeze(2), value.unsqueeze(2)
    else:
        slots = indices.shape[2]
        used = torch.full(indices.shape[:2], slots, device=query.device) if counts is None else counts.long()
        if bool(((used < 0) | (used > slots)).any()):
            _checks.raise_status(_OP, 3)
        keep = torch.arange(slots, device=query.device) < used[..., None]
        if bool((keep & ((indices < lo[:, None, None]) | (indices >= hi[:, None, None]))).any()):
            _checks.raise_status(_OP, 2)
        ids = indices.long().masked_fill(~keep, 0).view(batch, kv_heads, indices.shape[1] // kv_heads * slots, 1)
        keep = keep.view(batch, kv_heads, indices.shape[1] // kv_heads, slots)
        if rows:
            k, v = (x.gather(2, ids.expand(-1, -1, -1, dim)).view(*keep.shape, dim) for x in (key, value))
        else:
            k = v = query.new_zeros(*keep.shape, dim)
    # Rows outside the selection may be uninitialised: zero weights alone would let a NaN through.
    k, v = (x.float().masked_fill(~keep.unsqueeze(-1), 0.0) for x in (k, v))
    q = query.float().view(batch, kv_heads, group, 1, dim)
    logits = ((q @ k.transpose(-1, -2)).squeeze(-2) * scale).masked_fill(~keep, -math.inf)
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1))
    out = (weights.unsqueeze(-2) @ v).squeeze(-2)
    return out.reshape(batch, heads, dim).to(query.dtype), lse.reshape(batch, heads)


def _run_native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    indices: Tensor | None,
    counts: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    batch, heads, dim = query.shape
    query, key, value = _checks.row_major(query), _checks.row_major(key), _checks.row_major(value)
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:2] if return_lse else (0,), dtype=torch.float32)
    status = native().decode_attention(
        (query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(), lse.data_ptr()),
        (*map(_checks.pointer, (starts, lengths, indices, counts)),),
        (*query.stride()[:2], *key.stride()[:3], *value.stride()[:3]),
        (batch, heads, key.shape[1], key.shape[2], dim),
        (0, 0) if indices is None else (indices.shape[1], indices.shape[2]),
        scale,
        DTYPE_CODES[query.dtype],
        torch.get_num_threads(),
    )
    _checks.raise_status(_OP, status)
    return out, lse


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    indices: Tensor | None,
    counts: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    backend = resolve(_OP, _OP, query, key, value)
    if backend == "native":
        return _run_native(query, key, value, starts, lengths, indices, counts, scale, return_lse)
    if backend == "triton":
        result: tuple[Tensor, Tensor] = triton_call(_OP, _OP)(
            query,
            key,
            value,
            starts=starts,
            lengths=lengths,
            indices=indices,
            counts=counts,
            scale=scale,
            return_lse=True,
        )
    else:
        result = _reference(query, key, value, starts, lengths, indices, counts, scale)
    return result if return_lse else (result[0], query.new_empty((0,), dtype=torch.float32))


_custom = torch.library.custom_op("gossamer::decode_attention", _run, mutates_args=())


@_custom.register_fake
def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    indices: Tensor | None,
    counts: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    lse_shape = query.shape[:2] if return_lse else (0,)
    return query.new_empty(query.shape), query.new_empty(lse_shape, dtype=torch.float32)
