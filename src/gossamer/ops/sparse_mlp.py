"""A gated MLP at the few rows of a decode step that computes only the neurons whose gate is large."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.errors import InputError
from gossamer.ops._checks import raise_status
from gossamer.ops._dispatch import DTYPE_CODES, native, resolve, triton_call
from gossamer.ops.linear import MAX_ROWS

_OP = "sparse_mlp"

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
"""What the gate may be activated by."""
_CODES = {name: code for code, name in enumerate(("silu", "relu", "gelu", "gelu_tanh"))}


@dataclass(frozen=True, eq=False)
class NeuronWeights:
    """The weights of a gated MLP of D neurons over d channels, each neuron's in one row of each matrix.

    Attributes:
        gate, up, down: [D, d], inner stride 1, of one dtype: float32, bfloat16, or int8 with scales. `down` is the
            transpose of the layer's weight.
        gate_bias, up_bias: [D] or None. down_bias: [d] or None.
        gate_scale, up_scale, down_scale: float32 [D] where the weights are int8: row j is ``weight[j] * scale[j]``.
        activation: one of `ACTIVATIONS`.

    Raises:
        InputError: shapes, dtypes or the activation do not fit.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gate_scale: Tensor | None = None
    up_scale: Tensor | None = None
    down_scale: Tensor | None = None
    activation: str = "silu"

    def __post_init__(self) -> None:
        neurons, channels = self.gate.shape if self.gate.dim() == 2 else (-1, -1)
        for name in ("gate", "up", "down"):
            weight = getattr(self, name)
            if list(weight.shape) != [neurons, channels] or weight.dtype is not self.gate.dtype:
                raise InputError(f"{_OP}: gate, up and down must be [D,d] of one dtype; {name} is {list(weight.shape)}")
            scale = getattr(self, f"{name}_scale")
            if (scale is not None) != (weight.dtype is torch.int8):
                raise InputError(f"{_OP}: int8 weights have scales and others have none; see {name}")
            if scale is not None and list(scale.shape) != [neurons]:
                raise InputError(f"{_OP}: {name}_scale must have shape [{neurons}], got {list(scale.shape)}")
            bias, size = getattr(self, f"{name}_bias"), channels if name == "down" else neurons
            if bias is not None and list(bias.shape) != [size]:
                raise InputError(f"{_OP}: {name}_bias must have shape [{size}], got {list(bias.shape)}")
        if self.activation not in ACTIVATIONS:
            raise InputError(f"{_OP}: the activation is one of {', '.join(ACTIVATIONS)}, not {self.activation}")

    @property
    def neurons(self) -> int:
        """D."""
        return self.gate.shape[0]

    @property
    def channels(self) -> int:
        """d."""
        return self.gate.shape[1]

    @cached_property
    def pointers(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the native kernel is told of these weights: addresses, then strides and sizes."""
        tensors: list[int] = []
        for name in ("gate", "up", "down"):
            parts = (getattr(self, name + part) for part in ("", "_bias", "_scale"))
            tensors += [0 if part is None else part.data_ptr() for part in parts]
        strides = (self.gate.stride(0), self.up.stride(0), self.down.stride(0))
        return tuple(tensors), (*strides, self.neurons, self.channels, _CODES[self.activation])

    def quantized(self) -> NeuronWeights:
        """A copy with int8 weights, rounded to nearest with one scale for each neuron and matrix."""
        made = {}
        for name in ("gate", "up", "down"):
            weight = getattr(self, name).float()
            scale = weight.abs().amax(-1).clamp_min(1e-12) / 127
            made[name], made[f"{name}_scale"] = (weight / scale[:, None]).round().to(torch.int8), scale
        biases = {name: getattr(self, name) for name in ("gate_bias", "up_bias", "down_bias")}
        return NeuronWeights(**made, **biases, activation=self.activation)


def sparse_mlp(
    x: Tensor,
    weights: NeuronWeights,
    threshold: Tensor | None = None,
    count: int | None = None,
    indices: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Compute ``Σ_j g_j u_j down_j + bias`` over the kept neurons; ``g = act(gate x)``, ``u = up x``.

    Parameters
    ----------
    x
        [M, d], 1 to 8 rows, float32 or bfloat16 (others: reference).
    weights
        See `NeuronWeights`; of the dtype of ``x``, or int8.
    threshold
        float32 [] or [D]: neuron j is kept for a row where ``|g_j| > threshold_j``, or where ``g_j`` is NaN.
    count
        So many of the largest ``|g|`` of each row are kept, the lower index first where they are equal.
    indices
        int32 [n], ascending and without repeats: only these neurons exist, the gate included.
    counts
        int64 [M + 1], is overwritten: neurons kept for each row, and neurons kept for any.

    Up and down are read for neurons that some row keeps; each row is made of its own neurons.

    Returns
    -------
    [M, d] in the dtype of ``x``, accumulated in float32.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit, more than 8 rows, or not exactly one of the three rules.

    >>> eye = torch.eye(2)
    >>> weights = NeuronWeights(eye, eye, eye, activation="relu")
    >>> sparse_mlp(torch.tensor([[3.0, 1.0]]), weights, threshold=torch.tensor(2.0))
    tensor([[9., 0.]])
    """
    if x.dim() != 2 or x.shape[1] != weights.channels:
        raise InputError(f"{_OP}: want x [M,{weights.channels}], got {list(x.shape)}")
    if not 1 <= x.shape[0] <= MAX_ROWS:
        raise InputError(f"{_OP}: takes 1 to {MAX_ROWS} rows, got {x.shape[0]}")
    if sum(rule is not None for rule in (threshold, count, indices)) != 1:
        raise InputError(f"{_OP}: give one of threshold, count and indices")
    if threshold is not None and list(threshold.shape) not in ([], [weights.neurons]):
        raise InputError(f"{_OP}: threshold must have shape [] or [{weights.neurons}], got {list(threshold.shape)}")
    if indices is not None and indices.dim() != 1:
        raise InputError(f"{_OP}: indices must be [n], got {list(indices.shape)}")
    if counts is not None and list(counts.shape) != [x.shape[0] + 1]:
        raise InputError(f"{_OP}: counts must have shape [{x.shape[0] + 1}], got {list(counts.shape)}")
    biases = (weights.gate_bias, weights.up_bias, weights.down_bias)
    for name, other, dtype in (
        ("threshold", threshold, torch.float32),
        ("indices", indices, torch.int32),
        ("counts", counts, torch.int64),
        ("weights", weights.gate, weights.gate.dtype),
        *(("a bias", bias, x.dtype) for bias in biases),
    ):
        if other is not None and (other.dtype is not dtype or other.device != x.device):
            raise InputError(f"{_OP}: {name} must be {dtype} on {x.device}, got {other.dtype} on {other.device}")
    if weights.gate.dtype not in (x.dtype, torch.int8) or not x.dtype.is_floating_point:
        raise InputError(f"{_OP}: x is {x.dtype}, the weights are {weights.gate.dtype}")
    if torch.compiler.is_compiling():
        parts = [getattr(weights, name + part) for name in ("gate", "up", "down") for part in ("", "_bias", "_scale")]
        traced: Tensor = torch.ops.gossamer.sparse_mlp(x, *parts, weights.activation, threshold, count, indices, counts)
        return traced
    return _run(x, weights, threshold, count, indices, counts)


def _run(
    x: Tensor,
    weights: NeuronWeights,
    threshold: Tensor | None,
    count: int | None,
    indices: Tensor | None,
    counts: Tensor | None,
) -> Tensor:
    backend = resolve(_OP, _OP, x, weights.gate, weights.up, weights.down)
    if backend == "triton":
        out: Tensor = triton_call(_OP, _OP)(x, weights, threshold, count, indices, counts)
        return out
    if backend == "native" and _native_takes(weights):
        threshold, indices = (None if t is None else t.contiguous() for t in (threshold, indices))
        if counts is None or counts.is_contiguous():
            return run_native(x.contiguous(), weights, threshold, count, indices, counts)
    return _reference(x, weights, threshold, count, indices, counts)


def _native_takes(weights: NeuronWeights) -> bool:
    parts = [getattr(weights, name + part) for name in ("gate", "up", "down") for part in ("", "_bias", "_scale")]
    return all(part.is_cpu and part.stride(-1) == 1 for part in parts if part is not None)


def run_native(
    x: Tensor,
    weights: NeuronWeights,
    threshold: Tensor | None,
    count: int | None,
    indices: Tensor | None,
    counts: Tensor | None,
) -> Tensor:
    """The native kernel without the checks: for callers that made them, once, for all their calls."""
    rows, channels = x.shape
    out = torch.empty((rows, channels), dtype=x.dtype)
    if counts is None:
        counts = torch.empty(rows + 1, dtype=torch.int64)
    tensors, sizes = weights.pointers
    if indices is not None:
        count = len(indices)
    status = native().sparse_mlp(
        tensors,
        (*sizes, DTYPE_CODES[x.dtype], int(weights.gate.dtype is torch.int8)),
        x.data_ptr(),
        out.data_ptr(),
        counts.data_ptr(),
        0 if threshold is None else threshold.data_ptr(),
        0 if threshold is None or threshold.ndim == 0 else 1,
        0 if indices is None else indices.data_ptr(),
        count or 0,
        rows,
        torch.get_num_threads(),
    )
    raise_status(_OP, status)
    return out


def _reference(
    x: Tensor,
    weights: NeuronWeights,
    threshold: Tensor | None,
    count: int | None,
    indices: Tensor | None,
    counts: Tensor | None,
) -> Tensor:
    def project(name: str) -> Tensor:
        matrix, scale, bias = (getattr(weights, name + part) for part in ("", "_scale", "_bias"))
        out: Tensor = x.float() @ matrix.float().T
        out = out if scale is None else out * scale
        return out if bias is None else out + bias.float()

    gate = ACTIVATIONS[weights.activation](project("gate"))
    if threshold is not None:
        kept = ~(gate.abs() <= threshold.float())
    else:
        kept = torch.zeros_like(gate, dtype=torch.bool)
        if indices is not None:
            kept[:, indices.long()] = True
        else:
            order = gate.abs().sort(dim=-1, descending=True, stable=True).indices
            kept.scatter_(-1, order[:, : min(count or 0, weights.neurons)], True)
    down = weights.down.float() if weights.down_scale is None else weights.down.float() * weights.down_scale[:, None]
    out = torch.where(kept, gate * project("up"), 0.0) @ down
    if weights.down_bias is not None:
        out = out + weights.down_bias.float()
    if counts is not None:
        counts[:-1] = kept.sum(-1)
        counts[-1] = kept.any(0).sum()
    return out.to(x.dtype)


def _traced(
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor | None,
    gate_scale: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    up_scale: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    down_scale: Tensor | None,
    activation: str,
    threshold: Tensor | None,
    count: int | None,
    indices: Tensor | None,
    counts: Tensor | None,
) -> Tensor:
    weights = NeuronWeights(
        gate, up, down, gate_bias, up_bias, down_bias, gate_scale, up_scale, down_scale, activation=activation
    )
    return _run(x, weights, threshold, count, indices, counts)


_custom = torch.library.custom_op("gossamer::sparse_mlp", _traced, mutates_args=("counts",))


@_custom.register_fake
def _fake(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)
