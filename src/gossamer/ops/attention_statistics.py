"""Column sums of the attention map: how much attention every key has received, without storing the map.

    A[k] = Σ_q w_q · softmax_k(q·K · scale)

summed over the query heads that share a KV head. Every score that accumulates attention is one choice of the row weights
w: 1 (H2O), α^(T−1−q) (A2SF), 1 for the last few rows (SnapKV, EMS, ALISA), 1 for chosen rows (ZipVL's probes). Rows are
taken in blocks, so the map is never stored whole: the extra memory is a block of 64 rows a thread (native) or of ``block``
rows a head (reference). The cost is that of the scores, ``2 · B · H · S · d`` operations a row, half for a causal prompt;
what a block of rows cannot see is skipped, and so are rows of weight 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gossamer.errors import InputError
from gossamer.ops import _checks
from gossamer.ops._dispatch import DTYPE_CODES, native, resolve, triton_call
from gossamer.ops.attention_row import attention_row

__all__ = ["attention_columns", "attention_row"]

_OP = "attention_columns"
_HIDDEN = torch.finfo(torch.float32).min  # not -inf: a row that sees nothing must stay finite, its weight is 0


def attention_columns(
    query: Tensor,
    key: Tensor,
    *,
    row_weights: Tensor | None = None,
    starts: Tensor | None = None,
    positions: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    block: int = 128,
    causal: bool = True,
) -> Tensor:
    """Sum softmax attention rows into columns, weighted by row.

    Parameters
    ----------
    query
        [B, H, T, d], float32, bfloat16 or float16.
    key
        [B, Hkv, S, d], dtype of ``query``; H is a multiple of Hkv and query head h reads KV head ``h // (H // Hkv)``.
        Views of a larger cache are fine.
    row_weights
        float [T], or [B, T]: the weight w of each query row. Default 1. Weights may underflow to 0 on purpose: rows of
        weight 0 are not computed (by the reference: blocks of them).
    starts
        int32 [B]: left padding, the first real row of each sequence. Rows of padding are neither counted nor seen.
    positions
        int [T]: where each query stands among the S rows, in any order. Default the last T positions.
    scale
        Factor on the logits. Default ``1 / sqrt(d)``.
    window
        Rows that a query sees, itself included. Default all.
    block
        Query rows that the reference takes at once; a choice of memory, not of values.
    causal
        Whether a query sees only rows up to its own position. Without it ``window`` has no meaning and ``positions``
        only tell padding from real rows.

    Returns
    -------
    float32 [B, Hkv, S]; 0 where nothing was received. Without padding and with weights 1 each line sums to
    ``T · H / Hkv``.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit, positions outside S, ``block`` below 1.
    """
    q, k = query.shape, key.shape
    if len(q) != 4 or len(k) != 4:
        raise InputError(f"{_OP}: want query [B,H,T,d] and key [B,Hkv,S,d], got {list(q)} and {list(k)}")
    _checks.attention(_OP, query.new_empty(()).expand(q[0], q[1], q[-1]), key, key)
    if block < 1 or (window is not None and (window < 1 or not causal)):
        raise InputError(f"{_OP}: block and window must be at least 1, and a window needs causal attention")
    if positions is None and q[2] > k[2]:
        raise InputError(f"{_OP}: {q[2]} queries cannot be the last of {k[2]} rows")
    positions = _checks.int32(_OP, "positions", positions, (q[2],), query)
    starts = _checks.int32(_OP, "starts", starts, (q[0],), query)
    if row_weights is not None:
        if row_weights.shape not in ((q[2],), (q[0], q[2])):
            raise InputError(f"{_OP}: row_weights must be [{q[2]}] or [{q[0]}, {q[2]}], got {list(row_weights.shape)}")
        row_weights = row_weights.to(device=query.device, dtype=torch.float32).expand(q[0], -1)
    scale = 1.0 / math.sqrt(q[3]) if scale is None else float(scale)
    run = torch.ops.gossamer.attention_columns if torch.compiler.is_compiling() else _run
    columns: Tensor = run(query, key, row_weights, starts, positions, scale, window or 0, block, causal)
    return columns


def _reference(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    starts: Tensor | None,
    positions: Tensor,
    scale: float,
    window: int,
    block: int,
    causal: bool,
) -> Tensor:
    batch, heads, rows, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    if starts is not None:
        weights = weights * (positions >= starts[:, None])
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, rows, dim)
    key = key.float()
    column = torch.arange(length, device=query.device)
    total = torch.zeros(batch, kv_heads, length, device=query.device)
    busy = (weights != 0).any(0)
    for first in range(0, rows, block):
        last = min(first + block, rows)
        if not bool(busy[first:last].any()):
            continue
        at = positions[first:last]
        low, high = 0, length
        if causal:  # columns that no query of the block sees are not computed
            high = int(at.max()) + 1
            low = max(0, int(at.min()) + 1 - window) if window else 0
        seen = column[low:high]
        hidden = torch.zeros(1, 1, last - first, high - low, dtype=torch.bool, device=query.device)
        if causal:
            hidden = hidden | (seen > at[:, None])
        if window:
            hidden = hidden | (seen <= at[:, None] - window)
        if starts is not None:
            hidden = hidden | (seen < starts[:, None, None, None])
        logits = (grouped[:, :, :, first:last].float() * scale).flatten(2, 3) @ key[:, :, low:high].transpose(2, 3)
        logits = logits.unflatten(2, (-1, last - first)).masked_fill_(hidden.unsqueeze(2), _HIDDEN)
        probs = logits.softmax(-1)
        total[:, :, low:high] += torch.einsum("bt,bkgts->bks", weights[:, first:last], probs)
    return total


def _run(
    query: Tensor,
    key: Tensor,
    weights: Tensor | None,
    starts: Tensor | None,
    positions: Tensor | None,
    scale: float,
    window: int,
    block: int,
    causal: bool,
) -> Tensor:
    batch, heads, rows, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    backend = resolve(_OP, "attention_statistics", query, key, weights)
    order = None
    if positions is None:
        positions = torch.arange(length - rows, length, dtype=torch.int32, device=query.device)
    elif rows and not 0 <= int(positions.min()) <= int(positions.max()) < length:
        raise InputError(f"{_OP}: positions must lie within 0 .. {length - 1}")
    elif backend != "reference" and bool((positions.diff() < 0).any()):
        positions, order = positions.sort(stable=True)
    if weights is None:
        weights = torch.ones(batch, rows, device=query.device)
    if backend == "reference" or not rows:
        return _reference(query, key, weights, starts, positions, scale, window, block, causal)
    weights = weights.contiguous() if order is None else weights[:, order]
    if backend == "triton":
        call = triton_call(_OP, "attention_statistics")
        query = query if order is None else query[:, :, order]
        columns: Tensor = call(query, key, weights, positions, starts=starts, scale=scale, window=window, causal=causal)
        return columns
    query, key = _checks.row_major(query), _checks.row_major(key)
    out = torch.empty(batch, kv_heads, length)
    order = None if order is None else order.to(torch.int32)
    tensors = (query, key, out, weights, starts, positions, order)
    status = native().attention_columns(
        tuple(map(_checks.pointer, tensors)),
        (*query.stride()[:3], *key.stride()[:3]),
        (batch, heads, kv_heads, rows, length, dim, window),
        scale,
        causal,
        DTYPE_CODES[query.dtype],
        torch.get_num_threads(),
    )
    _checks.raise_status(_OP, status)
    return out


_custom = torch.library.custom_op("gossamer::attention_columns", _run, mutates_args=())


@_custom.register_fake
def _fake(
    query: Tensor,
    key: Tensor,
    weights: Tensor | None,
    starts: Tensor | None,
    positions: Tensor | None,
    scale: float,
    window: int,
    block: int,
    causal: bool,
) -> Tensor:
    return key.new_empty(key.shape[:3], dtype=torch.float32)
