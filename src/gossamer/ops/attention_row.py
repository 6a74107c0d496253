"""The attention row of one query per sequence, summed over the query heads that share a KV head; alone, or together with
the attention output from the same pass over the cache.

Cache methods ask at each decode step what the newest query attended to. The row is bound by the bytes of the keys, which
are read once for all query heads of a group; with the output, keys and values are read once for both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gossamer.errors import InputError
from gossamer.ops import _checks
from gossamer.ops._dispatch import DTYPE_CODES, native, resolve, triton_call

_ROW, _BOTH = "attention_row", "decode_attention_with_row"
_MODULE = "attention_row"


def attention_row(
    query: Tensor,
    key: Tensor,
    *,
    starts: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Softmax attention of one query per sequence, summed over the query heads of each KV head.

    Parameters
    ----------
    query
        [B, H, d], float32, bfloat16 or float16; it stands at the last of the S rows.
    key
        [B, Hkv, S, d], dtype of ``query``. Views of a larger cache are fine.
    starts
        int32 [B]: left padding, the first row of each sequence that is seen.
    scale
        Factor on the logits. Default ``1 / sqrt(d)``.
    window
        How many of the last rows are seen. Default all.

    Returns
    -------
    float32 [B, Hkv, S]; every line sums to ``H / Hkv``, or to 0 where nothing is seen.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit, starts outside ``0 .. S``, ``window`` below 1.
    """
    if query.dim() != 3 or key.dim() != 4:
        raise InputError(
            f"{_ROW}: want query [B,H,d] and key [B,Hkv,S,d], got {list(query.shape)} and {list(key.shape)}"
        )
    _checks.attention(_ROW, query, key, key)
    starts, scale = _range(_ROW, query, starts, scale, window)
    run = torch.ops.gossamer.attention_row if torch.compiler.is_compiling() else _run_row
    row: Tensor = run(query, key, starts, scale, window or 0)
    return row


def decode_attention_with_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    starts: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`gossamer.ops.decode_attention` over all rows, and :func:`attention_row`, in one pass over the cache.

    Parameters
    ----------
    query, starts, scale, window
        As in :func:`attention_row`.
    key, value
        [B, Hkv, S, d], dtype of ``query``. Views of a larger cache are fine.

    Returns
    -------
    The output [B, H, d] in the dtype of ``query``, and the row, float32 [B, Hkv, S].

    Raises
    ------
    InputError
        As :func:`attention_row`.
    """
    _checks.attention(_BOTH, query, key, value)
    starts, scale = _range(_BOTH, query, starts, scale, window)
    run = torch.ops.gossamer.decode_attention_with_row if torch.compiler.is_compiling() else _run_both
    out, row = run(query, key, value, starts, scale, window or 0)
    return out, row


def _range(
    op: str, query: Tensor, starts: Tensor | None, scale: float | None, window: int | None
) -> tuple[Tensor | None, float]:
    if window is not None and window < 1:
        raise InputError(f"{op}: window must be at least 1, got {window}")
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    return _checks.int32(op, "starts", starts, (query.shape[0],), query), scale


def _reference(query: Tensor, key: Tensor, starts: Tensor | None, scale: float, window: int) -> Tensor:
    """Attention of every query head, float32 [B, Hkv, group, S]."""
    batch, heads, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, dim).float()
    logits = (grouped * scale) @ key.float().transpose(2, 3)
    if starts is None and not 0 < window < length:
        return logits.softmax(-1)
    column = torch.arange(length, device=query.device)
    hidden = (column < (length - window if window else 0)).expand(batch, -1)
    if starts is not None:
        if bool(((starts < 0) | (starts > length)).any()):
            _checks.raise_status(_ROW, 1)
        hidden = hidden | (column < starts[:, None])
    hidden = hidden[:, None, None]
    probs = logits.masked_fill_(hidden, -math.inf).softmax(-1)
    return probs.masked_fill(hidden, 0.0)  # where nothing is seen, the softmax is not a number


def _narrow(starts: Tensor | None, window: int, length: int) -> tuple[int, Tensor | None]:
    """The first row that the window lets through, and the starts counted from there."""
    first = length - window if 0 < window < length else 0
    return first, starts if starts is None or not first else (starts - first).clamp_min_(0)


def _run_row(query: Tensor, key: Tensor, starts: Tensor | None, scale: float, window: int) -> Tensor:
    backend = resolve(_ROW, _MODULE, query, key)
    length = key.shape[2]
    if backend == "reference" or not length:
        return _reference(query, key, starts, scale, window).sum(2)
    first, starts = _narrow(starts, window, length)
    shape = (query.shape[0], key.shape[1], length)
    row = torch.zeros(shape, device=query.device) if first else torch.empty(shape, device=query.device)
    key = key.narrow(2, first, length - first) if first else key
    if backend == "native":
        _run_native(query, key, None, None, row, first, starts, scale)
    else:
        triton_call(_ROW, _MODULE)(query, key, row.narrow(2, first, length - first), starts=starts, scale=scale)
    return row


def _run_both(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    backend = resolve(_BOTH, _MODULE, query, key, value)
    length = key.shape[2]
    if backend == "reference" or not length:
        probs = _reference(query, key, starts, scale, window)
        hidden = (probs == 0).all(2)[..., None]  # rows that are not seen may be uninitialised
        out = probs @ value.float().masked_fill(hidden, 0.0)
        return out.reshape(query.shape).to(query.dtype), probs.sum(2)
    first, starts = _narrow(starts, window, length)
    shape = (query.shape[0], key.shape[1], length)
    row = torch.zeros(shape, device=query.device) if first else torch.empty(shape, device=query.device)
    if first:
        key, value = key.narrow(2, first, length - first), value.narrow(2, first, length - first)
    out = query.new_empty(query.shape)
    if backend == "native":
        _run_native(query, key, value, out, row, first, starts, scale)
    else:
        part = row.narrow(2, first, length - first)
        out = triton_call(_BOTH, _MODULE)(query, key, value, part, starts=starts, scale=scale)
    return out, row


def _run_native(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    out: Tensor | None,
    row: Tensor,
    first: int,
    starts: Tensor | None,
    scale: float,
) -> None:
    query, key = _checks.row_major(query), _checks.row_major(key)
    value = None if value is None else _checks.row_major(value)
    like = key if value is None else value
    status = native().attention_row(
        (
            query.data_ptr(),
            key.data_ptr(),
            _checks.pointer(value),
            _checks.pointer(out),
            row.data_ptr() + 4 * first,
            _checks.pointer(starts),
        ),
        (*query.stride()[:2], *key.stride()[:3], *like.stride()[:3]),
        (query.shape[0], query.shape[1], key.shape[1], key.shape[2], query.shape[2], row.shape[2]),
        scale,
        DTYPE_CODES[query.dtype],
        torch.get_num_threads(),
    )
    _checks.raise_status(_ROW, status)


_row = torch.library.custom_op("gossamer::attention_row", _run_row, mutates_args=())
_both = torch.library.custom_op("gossamer::decode_attention_with_row", _run_both, mutates_args=())


@_row.register_fake
def _row_fake(query: Tensor, key: Tensor, starts: Tensor | None, scale: float, window: int) -> Tensor:
    return key.new_empty(key.shape[:3], dtype=torch.float32)


@_both.register_fake
def _both_fake(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape[:3], dtype=torch.float32)
