"""Exact scores of one query per sequence against a KV cache: what a selection by true score ranks by.

Bound by the bytes of the keys, ``S * Hkv * d * itemsize`` a sequence: every key is read once for all query heads that share
it. The counterpart on labels, a fraction of the bytes, is :func:`~gossamer.ops.labels.label_scores`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gossamer.errors import InputError
from gossamer.ops import _checks
from gossamer.ops._dispatch import DTYPE_CODES, native, resolve, triton_call
from gossamer.ops.labels import REDUCE_CODES, Reduce

_OP = "key_scores"


def key_scores(
    query: Tensor,
    key: Tensor,
    *,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    reduce: Reduce = "none",
) -> Tensor:
    """Score every row of a range: unscaled query-key products.

    Parameters
    ----------
    query
        [B, H, d], float32, bfloat16 or float16.
    key
        [B, Hkv, S, d], dtype of ``query``; H is a multiple of Hkv. Views of a larger cache are fine: only the inner
        stride must be 1.
    starts, lengths
        int32 [B]: rows outside [start, length) score ``-inf`` and are not read. Default 0 and S.
    reduce
        ``"none"``: a score per query head. ``"max"``, ``"sum"``: one per KV head, over the query heads that share it.

    Returns
    -------
    float32 [B, H or Hkv, S].

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit, ranges beyond S.

    >>> key_scores(torch.ones(1, 2, 4), torch.full((1, 1, 3, 4), 0.5), reduce="sum")
    tensor([[[4., 4., 4.]]])
    """
    _checks.attention(_OP, query, key, key)
    if reduce not in REDUCE_CODES:
        raise InputError(f"{_OP}: reduce must be none, max or sum, got {reduce!r}")
    starts = _checks.int32(_OP, "starts", starts, (query.shape[0],), query)
    lengths = _checks.int32(_OP, "lengths", lengths, (query.shape[0],), query)
    run = torch.ops.gossamer.key_scores if torch.compiler.is_compiling() else _run
    scores: Tensor = run(query, key, starts, lengths, reduce)
    return scores


def _reference(query: Tensor, key: Tensor, starts: Tensor | None, lengths: Tensor | None, reduce: str) -> Tensor:
    batch, heads, dim = query.shape
    kv_heads, rows = key.shape[1:3]
    inside = _checks.inside(*_checks.bounds(_OP, starts, lengths, batch, rows, query.device), rows)  # [B, 1, S]
    # Rows outside may be uninitialised, and a NaN there would spread through a product.
    clean = key.float().masked_fill(~inside[..., None], 0.0)
    scores = query.float().view(batch, kv_heads, heads // kv_heads, dim) @ clean.transpose(2, 3)
    scores = scores.flatten(1, 2) if reduce == "none" else scores.amax(2) if reduce == "max" else scores.sum(2)
    return scores.masked_fill(~inside, -math.inf)


def _run(query: Tensor, key: Tensor, starts: Tensor | None, lengths: Tensor | None, reduce: str) -> Tensor:
    backend = resolve(_OP, _OP, query, key)
    if backend == "triton":
        result: Tensor = triton_call(_OP, _OP)(query, key, starts=starts, lengths=lengths, reduce=reduce)
        return result
    if backend == "reference":
        return _reference(query, key, starts, lengths, reduce)
    query, key = _checks.row_major(query), _checks.row_major(key)
    batch, heads, dim = query.shape
    kv_heads, rows = key.shape[1:3]
    out = torch.empty((batch, heads if reduce == "none" else kv_heads, rows), dtype=torch.float32)
    status = native().key_scores(
        (query.data_ptr(), key.data_ptr(), out.data_ptr(), _checks.pointer(starts), _checks.pointer(lengths)),
        (*query.stride()[:2], *key.stride()[:3]),
        (batch, heads, kv_heads, rows, dim),
        REDUCE_CODES[reduce],
        DTYPE_CODES[query.dtype],
        torch.get_num_threads(),
    )
    _checks.raise_status(_OP, status)
    return out


_custom = torch.library.custom_op("gossamer::key_scores", _run, mutates_args=())


@_custom.register_fake
def _fake(query: Tensor, key: Tensor, starts: Tensor | None, lengths: Tensor | None, reduce: str) -> Tensor:
    heads = query.shape[1] if reduce == "none" else key.shape[1]
    return query.new_empty((query.shape[0], heads, key.shape[2]), dtype=torch.float32)
