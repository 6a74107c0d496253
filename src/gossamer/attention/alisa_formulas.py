"""ALISA's formulas: budgets, the two halves, attention over packed rows, channel-wise quantisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gossamer import ops


def half_budget(ratio: float, cached: int) -> int:
    """k, the size of each half for `cached` tokens: ``⌊n·r/2 + 1/2⌋``.

    >>> [half_budget(0.2, n) for n in (1, 4, 5, 64, 512)]
    [0, 0, 1, 6, 51]
    """
    return math.floor(cached * ratio / 2 + 0.5)


def choose(scores: Tensor, k: int, first: int, cached: int) -> Tensor:
    """The attended tokens I of lines that all begin at row `first`, with the current token at row `cached`.

    Args:
        scores: ``[lines, ≥ cached]``, the local sums S.
        k: size of each half; with 0, or where both halves cover everything, all tokens are taken.

    Returns:
        int32 ``[lines, m]``, ascending: I_g, I_l and the current token.

    >>> choose(torch.tensor([[5.0, 1.0, 4.0, 9.0, 9.0]]), k=2, first=0, cached=5).tolist()
    [[0, 2, 3, 4, 5]]
    """
    lines = scores.shape[0]
    if k == 0 or 2 * k >= cached - first:
        whole = torch.arange(first, cached + 1, dtype=torch.int32, device=scores.device)
        return whole.expand(lines, -1)
    best, _ = ops.select_topk(scores[:, None, first : cached - k].float(), k)
    local = torch.arange(cached - k, cached + 1, dtype=torch.int32, device=scores.device)
    return torch.cat([best[:, 0] + first if first else best[:, 0], local.expand(lines, -1)], dim=1)


def gather_rows(storage: Tensor, ids: Tensor) -> Tensor:
    """Rows ``ids`` of a cache ``[batch, kv_heads, capacity, d]``, packed: ``[batch, kv_heads or heads, m, d]``.

    Args:
        ids: int ``[lines, m]``, one line for each sequence, or one for each (sequence, query head).
    """
    batch, kv_heads, capacity, dim = storage.shape
    per_head = ids.shape[0] // batch
    if batch == per_head == 1:
        return storage[0].index_select(1, ids[0])[None]
    heads = kv_heads if per_head == 1 else per_head
    kv = torch.arange(heads, device=ids.device) // (heads // kv_heads)
    base = (torch.arange(batch, device=ids.device)[:, None] * kv_heads + kv)[..., None] * capacity
    flat = (base + ids.view(batch, per_head, -1)).flatten()
    return storage.reshape(-1, dim).index_select(0, flat).view(batch, heads, -1, dim)


def attend_packed(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scale: float, per_head: bool
) -> tuple[Tensor, Tensor]:
    """Attention over packed rows, and the weights it gave them.

    Args:
        query: ``[batch, heads, d]``; key, value: ``[batch, kv_heads or heads, m, d]``.
        valid: bool ``[lines, m]``: which slots count (None: all).
        per_head: whether each head has a line of its own, else their weights are summed.

    Returns:
        Output ``[batch, heads, d]`` and weights float32 ``[lines, m]``.
    """
    batch, heads, dim = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, dim)
    logits = (grouped.float() * scale) @ key.float().transpose(2, 3)
    if valid is not None:
        logits = logits.masked_fill(~valid.view(batch, -1, 1, key.shape[2]), float("-inf"))
        value = value.masked_fill(~valid.view(batch, -1, key.shape[2], 1), 0)  # an unused slot may hold anything
    weights = logits.softmax(-1)
    out = (weights @ value.float()).to(query.dtype).view(batch, heads, dim)
    return out, weights.flatten(0, 2) if per_head else weights.sum((1, 2))


def quantise_channels(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Affine codes of each channel over the tokens it is given with.

        λ = (max − min) / (2^b − 1),  z = −round(min / λ),  x_q = clamp(round(x / λ + z), 0, 2^b − 1)

    Args:
        x: ``[…, tokens, d]``.
        bits: 4 or 8.

    Returns:
        Codes uint8 ``[…, tokens, d]`` (two in a byte, ``d / 2``, with 4 bits), λ and z float32 ``[…, 1, d]``. A constant
        channel, whose λ would be 0, has λ = 1 and the constant in z's place, and comes back as it was.

    >>> codes, step, zero = quantise_channels(torch.tensor([[0.0, 3.0], [1.0, 3.0]]))
    >>> dequantise_channels(codes, step, zero).tolist()
    [[0.0, 3.0], [1.0, 3.0]]
    """
    x = x.float()
    low, high = x.amin(-2, keepdim=True), x.amax(-2, keepdim=True)
    top = (1 << bits) - 1
    step = (high - low) / top
    flat = step == 0
    step = torch.where(flat, 1.0, step)
    # −round(min/λ) as printed; a constant channel stores −min itself, so that λ·(0 − z) is the constant.
    zero = torch.where(flat, -low, -(low / step).round())
    codes = torch.where(flat, 0.0, (x / step + zero).round().clamp_(0, top)).to(torch.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return codes, step, zero


def dequantise_channels(codes: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """``x̂ = λ·(x_q − z)``, float32 ``[…, tokens, d]``; shapes as `quantise_channels` gives them."""
    if codes.shape[-1] < step.shape[-1]:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return step * (codes.float() - zero)
