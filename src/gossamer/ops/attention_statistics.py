"""Column sums of the attention map: how much attention every key has received, without storing the map.

    A[k] = Σ_q w_q · softmax_k(q·K · scale)

summed over the query heads that share a KV head. Every score that accumulates attention is one choice of the row weights
w: 1 (H2O), α^(T−1−q) (A2SF), 1 for the last few rows (SnapKV, EMS, ALISA), 1 for chosen rows (ZipVL's probes). Rows are
taken in blocks, so the extra memory is ``B · H · block · S`` floats and never T × T; the cost is that of the scores,
``2 · B · H · S · d`` multiply-adds a row, and rows of weight 0 are skipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.errors import InputError
from gossamer.ops import _checks

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
        float [T], or [B, T]: the weight w of each query row. Default 1. Weights may underflow to 0 on purpose: a block
        whose weights are all 0 is not computed.
    starts
        int32 [B]: left padding, the first real row of each sequence. Rows of padding are neither counted nor seen.
    positions
        int [T]: where each query stands among the S rows, in any order. Default the last T positions.
    scale
        Factor on the logits. Default ``1 / sqrt(d)``.
    window
        Rows that a query sees, itself included. Default all.
    block
        Query rows taken at once; a choice of memory, not of values.
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
    _check(_OP, query, key, 4)
    batch, heads, rows, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    if block < 1 or (window is not None and (window < 1 or not causal)):
        raise InputError(f"{_OP}: block and window must be at least 1, and a window needs causal attention")
    if positions is None:
        if rows > length:
            raise InputError(f"{_OP}: {rows} queries cannot be the last of {length} rows")
        positions = torch.arange(length - rows, length, device=query.device)
    elif positions.shape != (rows,) or (rows and not 0 <= int(positions.min()) <= int(positions.max()) < length):
        raise InputError(f"{_OP}: positions must be [{rows}] within 0 .. {length - 1}, got {list(positions.shape)}")
    starts = _checks.int32(_OP, "starts", starts, (batch,), query)
    weights = _weights(row_weights, batch, rows, query.device)
    if starts is not None:
        weights = weights * (positions >= starts[:, None])
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, rows, dim)
    key, scale = key.float(), dim**-0.5 if scale is None else scale
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
        [B, Hkv, S, d], dtype of ``query``.
    starts
        int32 [B]: left padding, the first row of each sequence that is seen.
    scale
        Factor on the logits. Default ``1 / sqrt(d)``.
    window
        How many of the last rows are seen. Default all.

    Returns
    -------
    float32 [B, Hkv, S]; every line sums to ``H / Hkv``.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit.
    """
    op = "attention_row"
    _check(op, query, key, 3)
    batch, heads, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    starts = _checks.int32(op, "starts", starts, (batch,), query)
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, dim).float()
    logits = (grouped * (dim**-0.5 if scale is None else scale)) @ key.float().transpose(2, 3)
    if starts is not None or (window and window < length):
        column = torch.arange(length, device=query.device)
        hidden = column < (length - window if window else 0)
        if starts is not None:
            hidden = (hidden | (column < starts[:, None]))[:, None, None]
        logits = logits.masked_fill_(hidden, float("-inf"))
    return logits.softmax(-1).sum(2)


def _check(op: str, query: Tensor, key: Tensor, dims: int) -> None:
    q, k = query.shape, key.shape
    layout = "[B,H,T,d]" if dims == 4 else "[B,H,d]"
    if len(q) != dims or len(k) != 4:
        raise InputError(f"{op}: want query {layout} and key [B,Hkv,S,d], got {list(q)} and {list(k)}")
    _checks.attention(op, query.new_empty(()).expand(q[0], q[1], q[-1]), key, key)


def _weights(given: Tensor | None, batch: int, rows: int, device: torch.device) -> Tensor:
    """Row weights as float32 [B, T]."""
    if given is None:
        return torch.ones(batch, rows, device=device)
    if given.shape not in ((rows,), (batch, rows)):
        raise InputError(f"{_OP}: row_weights must be [{rows}] or [{batch}, {rows}], got {list(given.shape)}")
    return given.to(device=device, dtype=torch.float32).expand(batch, rows)
