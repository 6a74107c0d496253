"""Attention of one query per sequence over listed rows, together with the weight that each row received.

Methods that learn from attention (which rows the last queries looked at) need the softmax weights that a fused kernel
otherwise throws away. It reads what :func:`~gossamer.ops.decode_attention.decode_attention` reads, ``2 * k * Hkv * d``
elements a sequence, and writes ``H * k`` floats more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gossamer.errors import InputError
from gossamer.ops import _checks
from gossamer.ops._dispatch import DTYPE_CODES, native, resolve
from gossamer.ops.decode_attention import decode_attention

_OP = "attention_weights"


def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend one query per sequence and head over listed rows, and return what each of them received.

    Parameters
    ----------
    query
        [B, H, d], float32, bfloat16 or float16.
    key, value
        [B, Hkv, S, d], dtype of ``query``; views of a larger cache are fine.
    indices
        int32 [B, Hsel, k], Hsel = H or Hkv: ids of the rows to attend; a repeated id counts as often as it stands there.
    counts
        int32 [B, Hsel]: only the first ``counts`` ids of each line are used, the rest may be anything. Default k.
    scale
        Factor on the logits. Default ``1 / sqrt(d)``.

    Returns
    -------
    The output [B, H, d] in the dtype of ``query``, and float32 weights [B, H, k]: each line sums to 1 over the ids that
    count and is 0 behind them (all 0 where none does).

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit, row ids out of range.
    """
    _checks.attention(_OP, query, key, value)
    batch, heads, dim = query.shape
    if indices.dim() != 3 or indices.shape[1] not in (heads, key.shape[1]):
        raise InputError(f"{_OP}: indices must be [B, {heads} or {key.shape[1]}, k], got {list(indices.shape)}")
    listed = _checks.int32(_OP, "indices", indices, (batch, *indices.shape[1:]), query)
    assert listed is not None
    counts = _checks.int32(_OP, "counts", counts, tuple(listed.shape[:2]), query)
    scale = 1.0 / math.sqrt(dim) if scale is None else float(scale)
    run = torch.ops.gossamer.attention_weights if torch.compiler.is_compiling() else _run
    out, weights = run(query, key, value, listed, counts, scale)
    return out, weights


def _reference(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = decode_attention(
        query, key, value, indices=indices, counts=counts, scale=scale, return_lse=True
    )  # which also checks the ids
    batch, heads, dim = query.shape
    kv_heads, slots = key.shape[1], indices.shape[2]
    used = torch.full(indices.shape[:2], slots, device=query.device) if counts is None else counts
    keep = torch.arange(slots, device=query.device) < used[..., None]
    lines = indices.shape[1] // kv_heads  # of one KV head
    ids = indices.long().masked_fill(~keep, 0).view(batch, kv_heads, lines * slots, 1)
    if not key.shape[2] or not slots:
        return out, query.new_zeros(batch, heads, slots, dtype=torch.float32)
    rows = key.gather(2, ids.expand(-1, -1, -1, dim)).view(batch, kv_heads, lines, slots, dim).float()
    keep = keep.view(batch, kv_heads, lines, 1, slots)
    rows = rows.masked_fill(~keep.transpose(3, 4), 0.0)  # an unused row may be uninitialised
    grouped = query.float().view(batch, kv_heads, lines, -1, dim)
    logits = (grouped @ rows.transpose(3, 4) * scale).masked_fill(~keep, -math.inf)
    base = lse.masked_fill(lse == -math.inf, 0.0).view(batch, kv_heads, lines, -1, 1)
    return out, torch.exp(logits - base).view(batch, heads, slots)


def _run_native(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, dim = query.shape
    query, key, value = _checks.row_major(query), _checks.row_major(key), _checks.row_major(value)
    out = query.new_empty(query.shape)
    weights = torch.empty((batch, heads, indices.shape[2]), dtype=torch.float32)
    if not indices.numel():
        return out.zero_(), weights
    status = native().decode_attention_weights(
        (query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(), weights.data_ptr()),
        (indices.data_ptr(), _checks.pointer(counts)),
        (*query.stride()[:2], *key.stride()[:3], *value.stride()[:3]),
        (batch, heads, key.shape[1], key.shape[2], dim),
        (indices.shape[1], indices.shape[2]),
        scale,
        DTYPE_CODES[query.dtype],
        torch.get_num_threads(),
    )
    _checks.raise_status(_OP, status)
    return out, weights


def _run(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    if resolve("decode_attention", "decode_attention", query, key, value) == "native":
        return _run_native(query, key, value, indices, counts, scale)
    # On a GPU the output comes from the Triton kernel of decode_attention, the weights from its log-sum-exp.
    return _reference(query, key, value, indices, counts, scale)


_custom = torch.library.custom_op("gossamer::attention_weights", _run, mutates_args=())


@_custom.register_fake
def _fake(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty((*query.shape[:2], indices.shape[2]), dtype=torch.float32)
