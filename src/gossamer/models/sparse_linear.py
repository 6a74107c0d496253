"""A linear layer that holds its weight without the zeros, in `state_dict` and in files as well."""

from __future__ import annotations

import json
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from gossamer.errors import InputError, ModelError
from gossamer.ops.sparse_formats import SparseWeight, pack, settled
from gossamer.ops.sparse_linear import sparse_linear

SPEC = "sparse_spec"
"""Name of the buffer that says which format the others are in: JSON as bytes. It marks a `SparseLinear` in a file."""


class SparseLinear(nn.Module):
    """``x @ W.T + bias`` with a `SparseWeight`, on the kernels of :func:`gossamer.ops.sparse_linear`; for inference.

    The tensors of the weight are buffers, so they move, copy, save and load with the model; a state dict of another format
    or another number of values loads too. `to` another dtype packs the weight again.

    Attributes:
        in_features, out_features, bias: as in `nn.Linear`.

    >>> linear = nn.Linear(8, 4)
    >>> _ = linear.weight.data.mul_(torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 1]))
    >>> sparse = SparseLinear.from_dense(linear, "4x1")
    >>> with torch.no_grad():
    ...     bool(torch.allclose(sparse(torch.ones(2, 8)), linear(torch.ones(2, 8)), atol=1e-6))
    True
    >>> sparse.packed.nnz
    8
    """

    def __init__(self, weight: SparseWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise InputError(f"SparseLinear: bias must have shape [{self.out_features}], got {list(bias.shape)}")
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._hold(weight)

    @classmethod
    def from_dense(
        cls,
        linear: nn.Module,
        format: str = "4x1",
        *,
        int8: bool = False,
        act_scale: float | None = None,
        act_zero: float = 0,
    ) -> Self:
        """Pack a layer's weight; settings as in `pack`. The bias is shared.

        Args:
            linear: `nn.Linear` or transformers' `Conv1D`.

        Raises:
            InputError: the weight does not fit the format.
            ModelError: it is no linear layer.
        """
        turned = type(linear).__name__ == "Conv1D"
        if not isinstance(linear, nn.Linear) and not turned:
            raise ModelError(f"SparseLinear is made from nn.Linear or Conv1D, not from {type(linear).__name__}")
        weight = cast(Tensor, linear.weight)
        packed = pack(weight.t() if turned else weight, format, int8=int8, act_scale=act_scale, act_zero=act_zero)
        return cls(packed, cast("Tensor | None", linear.bias))

    @classmethod
    def empty(cls, in_features: int, out_features: int, bias: bool = True, dtype: torch.dtype | None = None) -> Self:
        """A layer of zeros, to load a state dict into."""
        dtype = dtype or torch.get_default_dtype()
        weight = pack(torch.zeros(out_features, in_features, dtype=dtype), "csr")
        return cls(weight, torch.zeros(out_features, dtype=dtype) if bias else None)

    @property
    def packed(self) -> SparseWeight:
        """The weight."""
        return self._packed

    def to_dense(self) -> nn.Linear:
        """A plain layer with the same weight (8 bits: with what they stand for)."""
        like = self.bias if self.bias is not None else None
        dtype = (
            self._packed.values.dtype if not self._packed.int8 else like.dtype if like is not None else torch.float32
        )
        dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self._packed.to_dense(dtype))
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone())
        return dense

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``.

        Raises:
            InputError: a gradient is wanted.
        """
        if input.requires_grad and torch.is_grad_enabled():
            raise InputError("SparseLinear has no gradient: train the dense layer (`to_dense`), or use torch.no_grad()")
        return sparse_linear(input, self._packed, self.bias)

    def extra_repr(self) -> str:
        """As in `nn.Linear`, and the format."""
        w = self._packed
        kind = f"{w.format}{' int8' if w.int8 else ''}, sparsity={w.sparsity:.3f}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kind}"

    def _hold(self, weight: SparseWeight) -> None:
        for name in [name for name in self._buffers if name != SPEC]:
            del self._buffers[name]
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)
        spec = json.dumps({"format": weight.format, "shape": list(weight.shape)}).encode()
        self.register_buffer(SPEC, torch.tensor(list(spec), dtype=torch.uint8))
        self._packed = weight

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = self._packed
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        held = {name: tensor for name, tensor in self._buffers.items() if name != SPEC and tensor is not None}
        kept = ("scale", "act_scale", "act_zero")
        if held["values"].dtype is not before.values.dtype:
            device = held["values"].device
            self._hold(pack(before.to_dense(held["values"].dtype).to(device), before.format))
        else:
            held = {name: tensor.float() if name in kept else tensor for name, tensor in held.items()}
            self._hold(SparseWeight.from_tensors(before.format, before.shape, held))
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        spec = state_dict.get(prefix + SPEC)
        if spec is None:
            missing.append(prefix + SPEC)
            return
        format, shape = read_spec(spec)
        if shape != (self.out_features, self.in_features):
            raise InputError(
                f"SparseLinear: {prefix[:-1] or 'the file'} holds a weight {list(shape)}, this layer is "
                f"[{self.out_features}, {self.in_features}]"
            )
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        device = self._packed.values.device
        tensors = {k: settled(v.detach().to(device).contiguous()) for k, v in own.items() if k not in (SPEC, "bias")}
        self._hold(SparseWeight.from_tensors(format, shape, tensors))
        if (self.bias is None) == ("bias" in own):
            raise InputError(f"SparseLinear: {prefix[:-1] or 'the file'} and this layer differ in having a bias")
        if self.bias is not None:
            self.bias = nn.Parameter(own["bias"].detach().to(device).clone(), requires_grad=False)


def read_spec(spec: Tensor) -> tuple[str, tuple[int, int]]:
    """(format, shape) from the buffer that a file marks a sparse layer with.

    Raises:
        InputError: it is damaged.
    """
    try:
        facts = json.loads(bytes(spec.cpu().tolist()))
        return str(facts["format"]), (int(facts["shape"][0]), int(facts["shape"][1]))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"a sparse layer's description is damaged ({type(error).__name__})") from None
