"""Benchmarks of the operators that skip inputs or neurons of a linear layer: what `measure.bench` times, beside torch's dense
layer and our own.

A case is a list of ways to do the work: name, call, and the bytes that it cannot avoid reading.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gossamer import ops
from gossamer.ops.delta_linear import delta_linear, input_major

OPERATORS = ("channel_sparse_linear", "delta_linear", "sparse_mlp")
SHAPES = {
    "Llama-2-7B up": (4096, 11008),
    "Llama-2-7B down": (11008, 4096),
    "Mistral-7B up": (4096, 14336),
    "Mistral-7B down": (14336, 4096),
}
"""Weights [inputs, outputs]."""
CASES = ((1, (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)), (4, (0.1,)), (8, (0.1,)))
"""Rows, and the shares of the inputs that count: the same inputs in every row."""

MLPS = {"Llama-2-7B MLP": (4096, 11008), "Mistral-7B MLP": (4096, 14336)}
"""Gated MLPs [channels, neurons]."""
MLP_CASES = ((1, (0.1, 0.3, 0.5, 1.0)), (4, (0.3,)), (8, (0.3,)))
"""Rows, and the shares of the neurons that are kept: the same neurons in every row."""

Way = tuple[str, Callable[[], Any], int]


def cases(op: str, dtype: torch.dtype) -> Iterator[tuple[dict[str, Any], list[Way], list[Way]]]:
    """Yield for each shape and number of rows: what the rows of the result share, the ways, and the same ways in small."""
    make = {"channel_sparse_linear": _channels, "delta_linear": _deltas, "sparse_mlp": _mlps}[op]
    shapes = MLPS if op == "sparse_mlp" else SHAPES
    todo: tuple[tuple[int, tuple[float, ...]], ...] = MLP_CASES if op == "sparse_mlp" else CASES
    for name, (inputs, outputs) in shapes.items():
        for rows, shares in todo:
            shape = {"weight": name, "inputs": inputs, "outputs": outputs, "rows": rows}
            yield shape, make(dtype, rows, inputs, outputs, shares), make(dtype, rows, inputs, 16, shares)


def _dense(x: Tensor, weight: Tensor) -> list[Way]:
    nbytes = weight.numel() * weight.element_size()
    return [
        ("torch-linear", lambda: torch.nn.functional.linear(x, weight), nbytes),
        ("dense", lambda: ops.linear(x, weight), nbytes),
    ]


def _draw(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight [N, K], and an order of the inputs."""
    weight = torch.empty(outputs, inputs, dtype=dtype)
    ops.advise_huge_pages(weight)
    return torch.randn(rows, inputs).to(dtype), weight.normal_(std=inputs**-0.5), torch.randperm(inputs)


def _deltas(dtype: torch.dtype, rows: int, inputs: int, outputs: int, shares: tuple[float, ...]) -> list[Way]:
    x, weight, order = _draw(dtype, rows, inputs, outputs)
    turned, step, ways = input_major(weight), torch.tensor(0.1), _dense(x, weight)
    for share in shares:
        count = round(share * inputs)
        still = torch.randint(-50, 50, (rows, inputs)).int()
        moved = still.clone()
        moved[:, order[:count]] += 1
        frames, previous, output = itertools.cycle((moved, still)), still.clone(), torch.zeros(rows, outputs)

        def call(frames: Any = frames, previous: Tensor = previous, output: Tensor = output) -> Tensor:
            return delta_linear(output, next(frames), previous, turned, step)

        ways.append((f"{share:.0%} changed", call, count * outputs * turned.element_size()))
    return ways


def _channels(dtype: torch.dtype, rows: int, inputs: int, outputs: int, shares: tuple[float, ...]) -> list[Way]:
    x, weight, order = _draw(dtype, rows, inputs, outputs)
    turned, ways = input_major(weight), _dense(x, weight)
    scale = torch.full((inputs,), 0.01)
    stored: list[tuple[str, Tensor, Tensor | None]] = [("", turned, None)]
    if dtype is torch.bfloat16:
        small = torch.empty(inputs, outputs, dtype=torch.int8)
        ops.advise_huge_pages(small)
        stored.append((" int8", small.copy_(torch.randint(-127, 128, (inputs, outputs))), scale))
    threshold = torch.tensor(0.5)
    for share in shares:
        count = round(share * inputs)
        kept = torch.full((rows, inputs), 0.25, dtype=dtype)
        kept[:, order[:count]] = 1.0
        for name, matrix, scales in stored:

            def call(kept: Tensor = kept, matrix: Tensor = matrix, scales: Tensor | None = scales) -> Tensor:
                return ops.channel_sparse_linear(kept, matrix, threshold, scale=scales)

            ways.append((f"{share:.0%} kept{name}", call, count * outputs * matrix.element_size()))
    return ways


def _mlps(dtype: torch.dtype, rows: int, channels: int, neurons: int, shares: tuple[float, ...]) -> list[Way]:
    """Dense by torch and by our linear layer, then with thresholds that keep a share; in 8 bits too, where dense is 100 %."""
    gate, up, down = (_draw(dtype, rows, channels, neurons)[1] for _ in range(3))
    x, back = torch.randn(rows, channels).to(dtype), down.t().contiguous()
    order, nbytes, silu = torch.randperm(neurons), 3 * gate.numel() * gate.element_size(), torch.nn.functional.silu
    plain = torch.nn.functional.linear
    ways: list[Way] = [
        ("torch-linear", lambda: plain(silu(plain(x, gate)) * plain(x, up), back), nbytes),
        ("dense", lambda: ops.linear(silu(ops.linear(x, gate)) * ops.linear(x, up), back), nbytes),
    ]
    weights = ops.NeuronWeights(gate, up, down)
    stored = [("", weights, gate.element_size())]
    if dtype is torch.bfloat16:
        stored.append((" int8", weights.quantized(), 1))
    for share in shares:
        count = round(share * neurons)
        threshold = torch.full((neurons,), torch.inf)
        threshold[order[:count]] = 0.0
        for name, held, size in stored:

            def call(held: ops.NeuronWeights = held, threshold: Tensor = threshold) -> Tensor:
                return ops.sparse_mlp(x, held, threshold)

            ways.append((f"{share:.0%} kept{name}", call, (neurons + 2 * count) * channels * size))
    return ways
