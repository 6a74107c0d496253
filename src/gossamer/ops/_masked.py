"""Attention under a boolean mask in plain PyTorch: the truth for the operators that skip part of a prompt's attention."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_ELEMENTS = 1 << 24
"""Logits held at a time: 64 MB, whatever the length of the prompt."""


def causal(rows: slice, new: int, length: int, device: torch.device) -> Tensor:
    """Which keys the queries ``rows`` of ``new`` may see, the last of ``length`` positions: bool [rows, length]."""
    position = torch.arange(rows.start, rows.stop, device=device) + length - new
    return torch.arange(length, device=device) <= position[:, None]


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Callable[[slice], Tensor],
    starts: Tensor | None,
    scale: float,
    step: int = 1,
) -> tuple[Tensor, Tensor]:
    """Softmax over the keys that ``mask`` and causality leave, a few queries at a time.

    Parameters
    ----------
    query, key, value
        [B, H, T, d] and [B, Hkv, S, d] twice.
    mask
        Gives bool [B, Hsel, rows, S] for a slice of queries; Hsel is 1, Hkv or H.
    starts
        Rows before these are never read.
    step
        Slices begin at multiples of it.

    Returns
    -------
    [B, H, T, d] in the dtype of ``query`` and the log-sum-exp [B, H, T]; zeros and ``-inf`` where nothing is visible.
    """
    batch, heads, new, dim = query.shape
    kv_heads, length = key.shape[1:3]
    group, device = heads // kv_heads, query.device
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    k, v = key.to(wide).unsqueeze(2), value.to(wide).unsqueeze(2)
    real = None
    if starts is not None:  # padding may be uninitialised: zero weights alone would let a NaN through
        real = torch.arange(length, device=device) >= starts[:, None]
        k, v = (x.masked_fill(~real[:, None, None, :, None], 0.0) for x in (k, v))
    q = query.to(wide).view(batch, kv_heads, group, new, dim) if new else query.new_zeros(0)
    outs, lses = [], []
    chunk = max(1, _ELEMENTS // max(1, batch * heads * length * step)) * step
    for begin in range(0, new, chunk):
        rows = slice(begin, min(begin + chunk, new))
        keep = mask(rows) & causal(rows, new, length, device)
        if real is not None:
            keep = keep & real[:, None, None]
        split = (kv_heads, group) if keep.shape[1] == heads else (keep.shape[1], 1)
        keep = keep.unflatten(1, split)
        logits = (q[:, :, :, rows] @ k.transpose(-1, -2) * scale).masked_fill(~keep, -math.inf)
        lse = torch.logsumexp(logits, dim=-1)
        weights = torch.exp(logits - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1))
        outs.append((weights @ v).flatten(1, 2))
        lses.append(lse.flatten(1, 2))
    if not new:
        return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=wide)
    return torch.cat(outs, 2).to(query.dtype), torch.cat(lses, 2)
