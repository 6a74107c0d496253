"""Benchmarks of linear layers with sparse weights: what `measure.bench` times, beside torch's dense layer and our own, its CSR
product and its 8-bit layers.

A case is a list of ways to do the work: name, call, and the bytes that it cannot avoid reading.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gossamer import ops
from gossamer.ops.linear import MAX_ROWS

OPERATORS = ("sparse_linear",)
PROMPTS = {"BERT attention": (768, 768), "BERT up": (768, 3072), "BERT down": (3072, 768)}
"""Weights [inputs, outputs] that are multiplied with many rows."""
TOKENS = 128
DECODES = {"Llama-2-7B up": (4096, 11008), "Llama-2-7B down": (11008, 4096)}
"""Weights that are multiplied with few."""
ROWS = (1, 2, 4, 8)
PROMPT_SHARES = (0.3, 0.4, 0.5, 0.65, 0.7, 0.8, 0.9)
DECODE_SHARES = (0.5, 0.6, 0.8)

Way = tuple[str, Callable[[], Any], int]


def cases(op: str, dtype: torch.dtype) -> Iterator[tuple[dict[str, Any], list[Way], list[Way]]]:
    """Yield for each shape and number of rows: what the rows of the result share, the ways, and the same ways in small."""
    for name, (inputs, outputs) in PROMPTS.items():
        shape = {"weight": name, "inputs": inputs, "outputs": outputs, "rows": TOKENS}
        yield shape, _prompt(dtype, TOKENS, inputs, outputs), _prompt(dtype, TOKENS, 64, 16)
    for name, (inputs, outputs) in DECODES.items():
        large, small = _Decode(dtype, inputs, outputs), _Decode(dtype, 64, 16)
        for rows in ROWS:
            shape = {"weight": name, "inputs": inputs, "outputs": outputs, "rows": rows}
            yield shape, large.ways(rows), small.ways(rows)


def blocked(weight: Tensor, share: float, format: str) -> Tensor:
    """The weight with a share of zeros, in random blocks of the format."""
    high, wide = {"4x1": (4, 1), "1x4": (1, 4)}.get(format, (1, 1))
    kept = torch.rand(-(-weight.shape[0] // high), -(-weight.shape[1] // wide)) >= share
    kept = kept.repeat_interleave(high, 0).repeat_interleave(wide, 1)[: weight.shape[0], : weight.shape[1]]
    return weight * kept


def _sparse(name: str, x: Tensor, weight: ops.SparseWeight) -> Way:
    return name, lambda: ops.sparse_linear(x, weight), weight.nbytes


def _dense(x: Tensor, weight: Tensor) -> list[Way]:
    nbytes = weight.numel() * weight.element_size()
    ways: list[Way] = [("torch-linear", lambda: torch.nn.functional.linear(x, weight), nbytes)]
    if x.shape[0] <= MAX_ROWS:
        ways.append(("dense", lambda: ops.linear(x, weight), nbytes))
    return ways


def _prompt(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> list[Way]:
    x, weight = torch.randn(rows, inputs).to(dtype), (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    ways = _dense(x, weight)
    if dtype is torch.float32:
        ways += eight_bits(x, weight)
    for share in PROMPT_SHARES:
        blocks = blocked(weight, share, "4x1")
        ways.append(_sparse(f"4x1 {share:.0%}", x, ops.pack(blocks)))
        small = ops.pack(blocks, int8=True)
        ways.append(_sparse(f"4x1 {share:.0%} int8", x, small))
        ways.append(_sparse(f"4x1 {share:.0%} product", torch.randint(0, 256, x.shape, dtype=torch.uint8), small))
        if share >= 0.5:
            single = blocked(weight, share, "csr")
            for format, pattern in (("1x4", blocked(weight, share, "1x4")), ("csr", single), ("stream", single)):
                ways.append(_sparse(f"{format} {share:.0%}", x, ops.pack(pattern, format)))
        if share >= 0.8 and dtype is torch.float32:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # CSR tensors are "in beta state"
                rows_of = blocks.to_sparse_csr()
            turned, nbytes = x.T.contiguous(), int((blocks != 0).sum()) * 12
            ways.append((f"torch csr {share:.0%}", lambda a=rows_of, b=turned: a @ b, nbytes))  # type: ignore[misc]
    return ways


def eight_bits(x: Tensor, weight: Tensor) -> list[Way]:
    """What torch has for dense layers in 8 bits: the dynamically quantised layer, and the plain integer product."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation notices of torch.ao
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data.copy_(weight)
        quantised = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(linear), {torch.nn.Linear}, torch.qint8)
    a = torch.randint(-127, 128, x.shape, dtype=torch.int8)
    b = torch.randint(-127, 128, (weight.shape[1], weight.shape[0]), dtype=torch.int8)
    return [
        ("torch dynamic int8", lambda: quantised(x), weight.numel()),
        ("torch int_mm", lambda: torch._int_mm(a, b), weight.numel()),
    ]


class _Decode:
    """The weights of one shape; rows of x come and go."""

    def __init__(self, dtype: torch.dtype, inputs: int, outputs: int) -> None:
        self.dtype, self.inputs = dtype, inputs
        self.weight = torch.empty(outputs, inputs, dtype=dtype)
        ops.advise_huge_pages(self.weight)
        self.weight.normal_(std=inputs**-0.5)
        self.packed: dict[str, ops.SparseWeight] = {}
        for share in DECODE_SHARES:
            single = blocked(self.weight, share, "csr")
            self.packed[f"stream {share:.0%}"] = ops.pack(single, "stream")
            if share == DECODE_SHARES[-1]:
                self.packed[f"bitmask {share:.0%}"] = ops.pack(single, "bitmask")
                self.packed[f"bitmask {share:.0%} int8"] = ops.pack(single, "bitmask", int8=True)
            self.packed[f"4x1 {share:.0%}"] = ops.pack(blocked(self.weight, share, "4x1"))

    def ways(self, rows: int) -> list[Way]:
        x = torch.randn(rows, self.inputs).to(self.dtype)
        return [*_dense(x, self.weight), *(_sparse(name, x, packed) for name, packed in self.packed.items())]
