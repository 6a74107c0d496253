"""The linear plug point for decode: products of at most eight rows run on our kernel.

A decode step multiplies one row with every weight of the model, and is bound by the bytes of the weights; torch's matrix
libraries, made for many rows, reach a fraction of the memory's speed there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.ops.linear import MAX_ROWS, few_rows, takes


class _Forward:
    """Stands in for the `forward` of one layer. An object rather than a closure: a copy of the model gets a copy of it."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module

    def __call__(self, input: Tensor) -> Tensor:
        module = self.module
        # Looked up at every call: weights may be moved, pruned or replaced while this is attached.
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if type(weight) is nn.Parameter and type(input) is Tensor and weight.ndim == 2 and weight.shape[1]:
            shape, columns = input.shape, weight.shape[1]
            rows = input.numel() // columns
            if (
                0 < rows <= MAX_ROWS
                and shape[-1] == columns
                and takes(input, weight, bias)
                and not torch.compiler.is_compiling()
                and not torch.is_autocast_enabled("cpu")
            ):
                return few_rows(input, weight, bias, rows, (*shape[:-1], weight.shape[0]))
        return type(module).forward(module, input)


class DecodeLinear:
    """Routes the small products of a model's `nn.Linear` layers (the head included) to our kernel.

    That is: at most 8 rows, float32 or bfloat16, on the CPU, where no gradient is wanted; all else goes to torch as before.
    Weights are read where they lie, tied ones too, and nothing is copied. Hooks on the layers still run. Results differ
    from torch's by rounding.

    Args:
        model: any module; layers of subclasses of `nn.Linear`, or with a `forward` of their own, are left alone.

    Attributes:
        layers: the layers that were routed.

    >>> model = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
    >>> routed = DecodeLinear(model)
    >>> len(routed.layers)
    1
    >>> routed.detach()
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[nn.Linear] = []
        for module in model.modules():
            if type(module) is nn.Linear and "forward" not in module.__dict__:
                routed: Any = module
                routed.forward = _Forward(module)
                self.layers.append(module)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weight that one step reads through the routed layers."""
        return sum(layer.weight.numel() * layer.weight.element_size() for layer in self.layers)

    def detach(self) -> None:
        """Leave the layers as they were; safe to call twice."""
        while self.layers:
            layer = self.layers.pop()
            if isinstance(layer.__dict__.get("forward"), _Forward):
                del layer.__dict__["forward"]
