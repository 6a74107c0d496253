"""The sparse gated MLP of a decode step on the GPU.

Algorithm. `_gate` dots x with every neuron's gate row and activates; which neurons each row keeps is then known.
`_product` owns blocks of neurons and loads the rows of up only where some row of x keeps the neuron (masked loads; no list
is made, so nothing waits for a count). `_down` owns tiles of (neurons, channels), loads the kept rows of down, and adds
their weighted sum to a float32 result atomically.

Parallelisation. One program per block of neurons; for `_down` per block of neurons and channels.

Floor. ``(D + 2 kept) * d * itemsize`` bytes read: ``(3 - 2 s) / 3`` of dense at a share s of dropped neurons.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.gpu import on

if TYPE_CHECKING:
    from gossamer.ops.sparse_mlp import NeuronWeights

_ACTIVATIONS = {"silu": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3}


@triton.jit
def _dot(x, weight, x_row, w_row, rows, neuron, keep, channels, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """[M, N]: products of the rows of x with weight rows `neuron`, which are read where `keep`."""
    m, k = tl.arange(0, M), tl.arange(0, K)
    total = tl.zeros((M, N), dtype=tl.float32)
    for at in range(0, channels, K):
        inside = at + k < channels
        lines = tl.load(x + m[:, None] * x_row + at + k[None, :], mask=(m < rows)[:, None] & inside[None, :], other=0.0)
        place = weight + neuron.to(tl.int64)[:, None] * w_row + at + k[None, :]
        part = tl.load(place, mask=keep[:, None] & inside[None, :], other=0)
        total += tl.sum(lines.to(tl.float32)[:, None, :] * part.to(tl.float32)[None, :, :], axis=2)
    return total


@triton.jit
def _finish(total, scale, bias, neuron, keep):
    """Products as the layer makes them: scaled, with their bias."""
    if scale is not None:
        total *= tl.load(scale + neuron, mask=keep, other=0.0)[None, :]
    if bias is not None:
        total += tl.load(bias + neuron, mask=keep, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def _gate(
    x,
    weight,
    scale,
    bias,
    indices,
    out,
    x_row,
    w_row,
    rows,
    neurons,
    considered,
    channels,
    ACTIVATION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    place = tl.program_id(0) * N + tl.arange(0, N)
    keep = place < considered
    neuron = place
    if indices is not None:
        neuron = tl.load(indices + place, mask=keep, other=0)
        keep &= (neuron >= 0) & (neuron < neurons)
    g = _finish(_dot(x, weight, x_row, w_row, rows, neuron, keep, channels, M, N, K), scale, bias, neuron, keep)
    if ACTIVATION == 0:
        g = g * tl.sigmoid(g)
    elif ACTIVATION == 1:
        g = tl.where(g < 0, 0.0, g)
    elif ACTIVATION == 2:
        g = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    else:
        g = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    m = tl.arange(0, M)
    tl.store(out + m[:, None] * neurons + neuron[None, :], g, mask=(m < rows)[:, None] & keep[None, :])


@triton.jit
def _product(
    x,
    weight,
    scale,
    bias,
    kept,
    gate,
    x_row,
    w_row,
    rows,
    neurons,
    channels,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    neuron = tl.program_id(0) * N + tl.arange(0, N)
    m = tl.arange(0, M)
    real = (m < rows)[:, None] & (neuron < neurons)[None, :]
    place = m[:, None] * neurons + neuron[None, :]
    mine = tl.load(kept + place, mask=real, other=0)
    some = tl.max(mine, axis=0) > 0
    if tl.max(tl.max(mine, axis=0), axis=0) > 0:
        u = _finish(_dot(x, weight, x_row, w_row, rows, neuron, some, channels, M, N, K), scale, bias, neuron, some)
        g = tl.load(gate + place, mask=real, other=0.0)
        tl.store(gate + place, tl.where(mine > 0, g * u, 0.0), mask=real)
    else:
        tl.store(gate + place, tl.zeros((M, N), dtype=tl.float32), mask=real)


@triton.jit
def _down(
    product, weight, scale, kept, out, w_row, rows, neurons, channels, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):
    neuron = tl.program_id(0) * N + tl.arange(0, N)
    column = tl.program_id(1) * K + tl.arange(0, K)
    m = tl.arange(0, M)
    real = (m < rows)[:, None] & (neuron < neurons)[None, :]
    place = m[:, None] * neurons + neuron[None, :]
    some = tl.max(tl.load(kept + place, mask=real, other=0), axis=0) > 0
    h = tl.load(product + place, mask=real, other=0.0)
    if scale is not None:
        h *= tl.load(scale + neuron, mask=neuron < neurons, other=0.0)[None, :]
    inside = column < channels
    at = weight + neuron.to(tl.int64)[:, None] * w_row + column[None, :]
    part = tl.load(at, mask=some[:, None] & inside[None, :], other=0).to(tl.float32)
    total = tl.sum(h[:, :, None] * part[None, :, :], axis=1)
    tl.atomic_add(out + m[:, None] * channels + column[None, :], total, mask=(m < rows)[:, None] & inside[None, :])


def sparse_mlp(
    x: Tensor,
    weights: NeuronWeights,
    threshold: Tensor | None,
    count: int | None,
    indices: Tensor | None,
    counts: Tensor | None,
) -> Tensor:
    """As :func:`gossamer.ops.sparse_mlp.sparse_mlp`, which has checked the arguments."""
    rows, channels = x.shape
    neurons = weights.neurons
    x = x if x.stride(-1) == 1 else x.contiguous()
    considered = neurons if indices is None else len(indices)
    gate = torch.zeros((rows, neurons), dtype=torch.float32, device=x.device)
    out = torch.zeros((rows, channels), dtype=torch.float32, device=x.device)
    lines: Any = {"M": triton.next_power_of_2(rows)}
    sizes: Any = {**lines, "N": 16, "K": 128 if rows <= 2 else 32}
    with on(x):
        if considered:
            launch: Any = _gate[(triton.cdiv(considered, 16),)]
            launch(
                x,
                weights.gate,
                weights.gate_scale,
                weights.gate_bias,
                indices,
                gate,
                x.stride(0),
                weights.gate.stride(0),
                rows,
                neurons,
                considered,
                channels,
                ACTIVATION=_ACTIVATIONS[weights.activation],
                **sizes,
            )
        kept = _kept(gate, threshold, count, indices)
        launch = _product[(triton.cdiv(neurons, 16),)]
        launch(
            x,
            weights.up,
            weights.up_scale,
            weights.up_bias,
            kept,
            gate,
            x.stride(0),
            weights.up.stride(0),
            rows,
            neurons,
            channels,
            **sizes,
        )
        launch = _down[(triton.cdiv(neurons, 32), triton.cdiv(channels, 128))]
        launch(
            gate,
            weights.down,
            weights.down_scale,
            kept,
            out,
            weights.down.stride(0),
            rows,
            neurons,
            channels,
            **lines,
            N=32,
            K=128,
        )
    if weights.down_bias is not None:
        out += weights.down_bias
    if counts is not None:
        counts[:-1] = kept.sum(-1)
        counts[-1] = kept.amax(0).sum()
    return out.to(x.dtype)


def _kept(gate: Tensor, threshold: Tensor | None, count: int | None, indices: Tensor | None) -> Tensor:
    """int8 ``[rows, D]``: 1 where a row keeps a neuron."""
    if threshold is not None:
        return (~(gate.abs() <= threshold)).to(torch.int8)
    kept = torch.zeros(gate.shape, dtype=torch.int8, device=gate.device)
    if indices is not None:
        kept[:, indices.long()] = 1
        return kept
    order = gate.abs().sort(dim=-1, descending=True, stable=True).indices
    return kept.scatter_(-1, order[:, : min(count or 0, gate.shape[1])], 1)
