"""The layers of Delta Activation: quantise, take differences over time, ask for few of them.

y = q · round(x/q),  δ_t = y_t − y_{t−1},  penalty = rate · n_out · mean |δ|

The step q = |θ| is learned with a gradient of its own: rounding is straight-through, the division by q passes nothing to q,
and the multiplication passes its gradient with the sign turned. So the penalty, which wants smaller differences, makes steps
coarser, and the loss of the task pushes back.

Time is the second axis, ``[batch, time, channels, ...]``, or is folded into the first one, ``[batch · frames, channels, ...]``,
as networks see it that are applied to each frame.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.errors import InputError

MIN_STEP = 1e-6
"""Steps stay above this: x is divided by them."""

Per = Literal["layer", "channel", "neuron"]
Activation = Literal["none", "relu", "softmax"]


class _Quantise(torch.autograd.Function):
    """Forward: (x, θ) → q · round(x/q). Backward: (g, −sign(θ) Σ g · round(x/q))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor) -> Tensor:
        step = theta.abs().clamp_min(MIN_STEP)
        codes = torch.round(x / step)
        ctx.save_for_backward(codes, theta)
        return codes * step

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        codes, theta = ctx.saved_tensors
        (grad,) = grads
        if not ctx.needs_input_grad[1]:
            return grad, None
        sign = torch.where(theta < 0, -1.0, 1.0).to(grad.dtype)
        return grad, -sign * (grad * codes).sum_to_size(theta.shape)


def quantise(x: Tensor, theta: Tensor) -> Tensor:
    """Round ``x`` to multiples of ``|theta|``, half to even; ``theta`` broadcasts to ``x`` and shares its gradient so.

    >>> quantise(torch.tensor([0.24, 0.25, 0.75, -1.1]), torch.tensor(0.5)).tolist()
    [0.0, 0.0, 1.0, -1.0]
    """
    out: Tensor = _Quantise.apply(x, theta)  # type: ignore[no-untyped-call]
    return out


def differences(y: Tensor) -> Tensor:
    """δ of ``[batch, time, ...]``: one frame less, the first is not counted.

    >>> differences(torch.tensor([[[1.0], [3.0], [3.0]]])).flatten().tolist()
    [2.0, 0.0]
    """
    return y[:, 1:] - y[:, :-1]


def delta_penalty(delta: Tensor, rate: float, fan_out: int) -> Tensor:
    """``rate · fan_out · mean |δ|``, 0 where there are no differences.

    >>> delta_penalty(torch.tensor([1.0, -3.0]), rate=0.5, fan_out=3)
    tensor(3.)
    """
    return delta.abs().mean() * (rate * fan_out) if delta.numel() else delta.new_zeros(())


class Penalised(nn.Module):
    """A layer that adds to the loss and counts what is not zero.

    Attributes:
        penalty: of the last forward, with its graph.
        fan_out: multiplications that one activation of this layer goes into.
        frames: frames of each clip, where time is folded into the batch; None where it is the second axis.
    """

    def __init__(self, rate: float, fan_out: int, frames: int | None) -> None:
        super().__init__()
        if rate < 0 or fan_out < 1:
            raise InputError(f"a penalty needs rate >= 0 and fan_out >= 1, got {rate} and {fan_out}")
        self.rate, self.fan_out, self.frames = rate, fan_out, frames
        self.penalty = torch.zeros(())
        self.reset_counts()

    def reset_counts(self) -> None:
        """Forget what `density` is made of."""
        self.nonzero, self.elements = torch.zeros((), dtype=torch.int64), 0

    def density(self) -> float:
        """Share of elements that were not zero since the last reset; 0 before the first."""
        return int(self.nonzero) / self.elements if self.elements else 0.0

    def _clips(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or (self.frames is None and x.dim() < 3):
            raise InputError(f"want [batch, time, channels, ...] or frames folded into the batch, got {list(x.shape)}")
        if self.frames is None:
            return x
        if x.shape[0] % self.frames:
            raise InputError(f"{x.shape[0]} frames are not clips of {self.frames}")
        return x.reshape(-1, self.frames, *x.shape[1:])

    def _record(self, counted: Tensor) -> None:
        self.penalty = delta_penalty(counted, self.rate, self.fan_out)
        with torch.no_grad():
            self.nonzero = self.nonzero.to(counted.device) + counted.count_nonzero()
            self.elements += counted.numel()

    def __getstate__(self) -> dict[str, Any]:  # a penalty hangs on a graph, which no copy can take along
        return {**self.__dict__, "penalty": torch.zeros(())}


class DeltaActivationLayer(Penalised):
    """Quantise activations with a learned step, and penalise their changes over time.

    Args:
        shape: of one frame's activations, channels first: ``(C,)`` or ``(C, H, W)``. Only C matters unless ``per`` is neuron.
        step_init: |θ| at the start.
        per: what has a step of its own: the layer, each channel, each neuron.
        rate, fan_out: of the penalty; see `delta_penalty`.
        trainable: whether the step learns.
        sigma: the input holds differences: sum them over time first.
        bias: a trainable bias for each channel, added after that.
        activation: applied after the bias; softmax is over channels.
        pool: side of a maximum over neighbours, stride 1, of the quantised values (needs ``H, W``); 1 for none.
        output: 0: y. 1: y_0, then δ_t. 2: δ_t alone, zeros for the first frame. Those of 1 and 2 keep the shape.
        frames: see `Penalised`.

    Raises:
        InputError: a setting out of range, or an input that does not fit.

    >>> layer = DeltaActivationLayer((1,), step_init=0.5, rate=1.0, fan_out=4)
    >>> layer(torch.tensor([[[0.4], [1.1]]])).flatten().tolist()
    [0.5, 1.0]
    >>> layer.penalty.item(), layer.density()
    (2.0, 1.0)
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        step_init: float = 0.1,
        per: Per = "channel",
        rate: float = 1e-3,
        fan_out: int = 1,
        *,
        trainable: bool = True,
        sigma: bool = False,
        bias: bool = False,
        activation: Activation = "none",
        pool: int = 1,
        output: int = 0,
        frames: int | None = None,
    ) -> None:
        super().__init__(rate, fan_out, frames)
        if not shape or min(shape) < 1 or not MIN_STEP <= step_init < float("inf"):
            raise InputError(f"want a shape of positive sizes and a step >= {MIN_STEP}, got {shape} and {step_init}")
        if output not in (0, 1, 2) or pool < 1 or pool % 2 == 0:
            raise InputError(f"output is 0, 1 or 2 and pool an odd side, got {output} and {pool}")
        sizes = {"layer": (), "channel": shape[:1], "neuron": shape}
        if per not in sizes or activation not in ("none", "relu", "softmax"):
            raise InputError(
                f"per is one of {', '.join(sizes)}, activation none, relu or softmax; got {per}, {activation}"
            )
        self.shape, self.per, self.sigma, self.activation, self.pool, self.output = (
            shape,
            per,
            sigma,
            activation,
            pool,
            output,
        )
        self.theta = nn.Parameter(torch.full(sizes[per], float(step_init)), requires_grad=trainable)
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None

    @property
    def step(self) -> Tensor:
        """q, of the shape of θ."""
        return self.theta.detach().abs().clamp_min(MIN_STEP)

    def per_axis(self, values: Tensor, dims: int) -> Tensor:
        """θ, q or the bias, to broadcast with ``[..., C, ...]`` whose last `dims` axes are those of a frame."""
        if values.dim() > 1 and values.dim() != dims:
            raise InputError(f"steps of neurons {list(values.shape)} do not fit activations of {dims} axes")
        return values if values.dim() != 1 else values.view(-1, *[1] * (dims - 1))

    def activate(self, clips: Tensor) -> Tensor:
        """What is quantised, of ``[batch, time, C, ...]``."""
        dims = clips.dim() - 2
        if clips.shape[2] != self.shape[0]:
            raise InputError(
                f"this layer has {self.shape[0]} channels, the input {list(clips.shape)} has {clips.shape[2]}"
            )
        x = clips.cumsum(1) if self.sigma else clips
        if self.bias is not None:
            x = x + self.per_axis(self.bias, dims)
        if self.activation != "none":
            x = x.relu() if self.activation == "relu" else x.softmax(2)
        return x

    def neighbours(self, y: Tensor) -> Tensor:
        """The maximum of quantised neighbours: values of the same grid."""
        if self.pool == 1:
            return y
        if y.dim() != 5:
            raise InputError(f"a maximum over neighbours needs frames of channels, height, width, got {list(y.shape)}")
        return F.max_pool2d(y.flatten(0, 1), self.pool, 1, self.pool // 2).view_as(y)

    def forward(self, x: Tensor) -> Tensor:
        """Quantised activations or their differences, of the shape of the input."""
        clips = self.activate(self._clips(x))
        y = self.neighbours(quantise(clips, self.per_axis(self.theta, clips.dim() - 2)))
        delta = differences(y)
        self._record(delta)
        if self.output:
            y = torch.cat([y[:, :1] if self.output == 1 else torch.zeros_like(y[:, :1]), delta], 1)
        return y if self.frames is None else y.flatten(0, 1)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.shape}, per={self.per}, rate={self.rate}, fan_out={self.fan_out}, output={self.output}"


class SpatialL1Layer(Penalised):
    """The baseline: the same penalty on the activations themselves, nothing quantised; the first frame counts too.

    >>> layer = SpatialL1Layer(rate=0.5, fan_out=4)
    >>> _ = layer(torch.tensor([[[0.0], [3.0]]]))
    >>> layer.penalty.item(), layer.density()
    (3.0, 0.5)
    """

    def __init__(self, rate: float = 4e-4, fan_out: int = 1, frames: int | None = None) -> None:
        super().__init__(rate, fan_out, frames)

    def forward(self, x: Tensor) -> Tensor:
        """The input."""
        self._record(self._clips(x))
        return x


def delta_layers(model: nn.Module) -> list[Penalised]:
    """The penalised layers of a model, in its order."""
    return [module for module in model.modules() if isinstance(module, Penalised)]


def penalty(model: nn.Module) -> Tensor:
    """Sum of the penalties of the last forward: what is added to the loss of the task."""
    layers = delta_layers(model)
    return torch.stack([layer.penalty for layer in layers]).sum() if layers else torch.zeros(())


def network_density(model: nn.Module, weighted: bool = False) -> float:
    """Non-zeros over elements of all layers since the last reset; ``weighted``: each by its multiplications."""
    layers = delta_layers(model)
    weights = [layer.fan_out if weighted else 1 for layer in layers]
    total = sum(w * layer.elements for w, layer in zip(weights, layers, strict=True))
    found = sum(w * int(layer.nonzero) for w, layer in zip(weights, layers, strict=True))
    return found / total if total else 0.0
