"""SquareHead's runtime in numbers: weights as a bit each and the values that are not zero, their bytes, and a roofline.

    bytes a weight    (1 − s) · b / 8 + 1 / 8           b bits a value; scales and row pointers come on top
    useful            b (1 − s) + 1 < b
    decode at best    4 / bytes a weight                over dense float32, where memory is the limit

The formats and kernels are those of `gossamer.ops.sparse_linear` (``"bitmask"`` and N:M); nothing here is timed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from gossamer.errors import InputError
from gossamer.hf import matrices
from gossamer.ops.sparse_formats import SparseWeight, pack, parse_nm


def bytes_per_weight(sparsity: float, bits: int = 8) -> float:
    """Of a bitmask with values of so many bits.

    Raises:
        InputError: a share out of range, or no bits.

    >>> bytes_per_weight(0.75, 8)
    0.375
    """
    if not 0 <= sparsity <= 1 or bits < 1:
        raise InputError(f"a sparsity must lie in 0 .. 1 and bits be positive, got {sparsity:g}, {bits}")
    return (1 - sparsity) * bits / 8 + 1 / 8


def is_smaller(sparsity: float, bits: int = 8) -> bool:
    """Whether the bitmask is smaller than dense values of as many bits.

    >>> is_smaller(0.125, 8), is_smaller(0.13, 8)
    (False, True)
    """
    return 8 * bytes_per_weight(sparsity, bits) < bits


def ideal_decode_speedup(sparsity: float, bits: int = 8) -> float:
    """Over dense float32, for one row at a time, if only the bytes of weights take time.

    >>> [round(ideal_decode_speedup(s, b), 1) for s, b in ((0.6, 8), (0.75, 8), (0.75, 32))]
    [7.6, 10.7, 3.6]
    """
    return 4 / bytes_per_weight(sparsity, bits)


def packed_bytes(shape: tuple[int, int], kept: int, bits: int = 8, overhead: bool = True) -> int:
    """Bytes of a bitmask of ``[out, in]`` that keeps so many values.

    Args:
        overhead: count what the library's format adds: masks filled up to 64 inputs, a pointer a row, 64 values of slack and, in
            8 bits, a scale and a sum of each row. Without it: the formula, and a float32 scale of each row in 8 bits.

    Raises:
        InputError: more is kept than there is.

    >>> packed_bytes((2, 128), 64), packed_bytes((2, 128), 64, overhead=False)
    (188, 104)
    """
    outputs, inputs = shape
    if not 0 <= kept <= outputs * inputs:
        raise InputError(f"a weight {list(shape)} cannot keep {kept} values")
    scales = 4 * outputs if bits == 8 else 0
    if not overhead:
        return math.ceil(kept * bits / 8 + outputs * inputs / 8) + scales
    masks, pointers = 8 * outputs * -(-inputs // 64), 4 * (outputs + 1)
    return (kept + 64) * bits // 8 + masks + pointers + 2 * scales


def quantize_weights(model: nn.Module) -> dict[str, float]:
    """Round the linear weights of a model's blocks to 8 bits, in place: symmetric, a scale for each output, so zeros stay.

    The weights stay floats that 8 bits hold exactly; `SquareHead.attach` runs them (and rounds inputs, row by row).

    Returns:
        The relative error ‖W − Ŵ‖ / ‖W‖ of each matrix.

    Raises:
        InputError: a weight is not finite.

    >>> from gossamer.models import tiny_model
    >>> max(quantize_weights(tiny_model("llama")).values()) < 0.02
    True
    """
    errors = {}
    for matrix in matrices(model):
        weight = matrix.weight.float()
        rounded = pack(weight, "bitmask", int8=True).to_dense()
        errors[matrix.name] = float((weight - rounded).norm() / weight.norm().clamp_min(1e-12))
        matrix.write(rounded)
    return errors


@dataclass(frozen=True, eq=False)
class PackedModel:
    """The block matrices of a model, packed: how many bytes they take, and what that can be worth.

    Attributes:
        weights: by parameter name.

    >>> from gossamer.models import tiny_model
    >>> from gossamer.weights.prune import Magnitude
    >>> packed = PackedModel.of(Magnitude(sparsity=0.75).apply(tiny_model("llama")).model)
    >>> packed.roofline(bandwidth=1e10, flops=1e11)["bound"]
    'memory'
    """

    weights: Mapping[str, SparseWeight]

    @classmethod
    def of(cls, model: nn.Module, int8: bool = True, format: str = "bitmask") -> PackedModel:
        """Pack a model's matrices; the model is not changed.

        Args:
            int8: 8-bit values; float values otherwise, as they are.
            format: ``"bitmask"`` or N:M (not in 8 bits).

        Raises:
            InputError: another format, or a weight that does not fit it.
        """
        if format != "bitmask" and parse_nm(format) is None:
            raise InputError(f"the format is bitmask or N:M, not {format!r}")
        return cls({m.name: pack(m.weight, format, int8=int8) for m in matrices(model)})

    @cached_property
    def nbytes(self) -> int:
        """Of all packed weights, measured."""
        return sum(w.nbytes for w in self.weights.values())

    @property
    def dense_bytes(self) -> int:
        """Of the same weights as dense float32."""
        return 4 * self._entries

    @property
    def predicted_bytes(self) -> int:
        """By the formula, with the scales."""
        found = self.weights.values()
        return sum(packed_bytes(w.shape, w.nnz, 8 * w.values.element_size(), overhead=False) for w in found)

    @property
    def sparsity(self) -> float:
        """Share of zeros; in 8 bits with what was rounded to zero."""
        return 1 - sum(w.nnz for w in self.weights.values()) / self._entries

    @property
    def _entries(self) -> int:
        return sum(w.shape[0] * w.shape[1] for w in self.weights.values())

    def tensors(self) -> dict[str, Tensor]:
        """What a safetensors file of them holds."""
        return {f"{name}.{part}": t for name, w in self.weights.items() for part, t in w.tensors().items()}

    def roofline(self, bandwidth: float, flops: float, rows: int = 1) -> dict[str, Any]:
        """The least time of one pass over all weights, packed and dense float32, at the same limits.

        Counts weights' bytes only (inputs are small beside them at few rows), and the products of kept weights, as a kernel
        does that skips zeros.

        Args:
            bandwidth: bytes a second.
            flops: operations a second; a multiply-add is two.
            rows: tokens of a pass: 1 in decoding.

        Returns:
            `seconds`, `dense_seconds`, `speedup`, `bound` (memory or compute), and `rows_at_balance`: from there on the
            packed pass is limited by compute, and bytes no longer tell its time.

        Raises:
            InputError: a limit or rows that are not positive.
        """
        if not (0 < bandwidth < math.inf and 0 < flops < math.inf) or rows < 1:
            raise InputError("a roofline needs a positive bandwidth, positive flops and a row at least")
        kept = sum(w.nnz for w in self.weights.values())
        reading, computing = self.nbytes / bandwidth, 2 * kept * rows / flops
        dense = max(self.dense_bytes / bandwidth, 2 * self._entries * rows / flops)
        seconds = max(reading, computing)
        return {
            "seconds": seconds,
            "dense_seconds": dense,
            "speedup": dense / seconds,
            "bound": "memory" if reading >= computing else "compute",
            "rows_at_balance": self.nbytes * flops / (bandwidth * 2 * max(1, kept)),
        }
