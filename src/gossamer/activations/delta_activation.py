"""Delta Activation Layer: activations that are steady in time, so that a stream computes only what changed.

A network that reads frame after frame repeats most of its work. A layer after each ReLU quantises the activations with a
learned step and penalises the L1 norm of their changes, each weighted by the multiplications it goes into:

L = L_task + Σ_layers rate · n_out · mean |y_t − y_{t−1}|,   y = q · round(x/q)

`DeltaActivation.apply` puts the layers into a network, `over_frames` runs it on clips, `penalty` is added to the loss, and
`DeltaActivation.attach` runs the trained network on a stream: each linear map keeps its output and adds W δ
(`delta_stream`). Training for temporal sparsity in deep neural networks, application in video processing (2021).

Departures: differences are emitted with their plus sign, and without the background the first frame is zero (the released
code turns the sign and repeats the first difference). The step of a layer that is exactly 0 learns as a positive one.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.fx.passes.shape_prop import ShapeProp

from gossamer.activations.delta_activation_layers import (
    DeltaActivationLayer,
    Penalised,
    Per,
    SpatialL1Layer,
    delta_layers,
)
from gossamer.activations.delta_graph import channels_of, is_relu, node_fan_out, trace
from gossamer.activations.delta_stream import DeltaInference, StreamHandle
from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError, InputError, ModelError
from gossamer.registry import Method, register


class _Inserting(Method):
    """What the method and its baseline share: a layer behind every ReLU."""

    comparable: ClassVar[bool] = False  # it is for networks over time

    def _layer(self, shape: tuple[int, ...], fan: int, is_input: bool) -> Penalised:
        raise NotImplementedError

    def _insert(self, model: nn.Module, example: Tensor | None, on_input: bool) -> nn.Module:
        if delta_layers(model):
            raise ModelError(f"{self.slug}: this model has such layers already")
        traced = trace(model)
        if example is not None:
            with torch.no_grad():
                ShapeProp(traced).propagate(example)
        modules, count = dict(traced.named_modules()), 0
        for node in list(traced.graph.nodes):
            is_input = node.op == "placeholder"
            if not (is_relu(node, modules) or (is_input and on_input)) or not node.users:
                continue
            meta = node.meta.get("tensor_meta")
            channels = channels_of(node, modules)
            if meta is None and channels is None:
                raise ModelError(f"{self.slug}: cannot tell the channels of {node.name}: pass an example of the input")
            shape = (channels,) if meta is None else tuple(meta.shape[1:])
            name = f"delta_{count}"
            traced.add_submodule(name, self._layer(cast(Any, shape), max(1, node_fan_out(node, modules)), is_input))
            with traced.graph.inserting_after(node):
                new = traced.graph.call_module(name, (node,))
            node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
            count += 1
        if not count:
            raise ModelError(f"{self.slug}: this model has no ReLU to put a layer behind")
        traced.graph.lint()
        traced.recompile()
        return traced


@register("delta-activation", slot="activations", family="activations", needs=["training"])
class DeltaActivation(_Inserting):
    """Train activations to change rarely over time, then compute only the changes.

    Use it for video and other input that changes slowly, with a network of convolutions and linear layers that reads one
    frame at a time. `apply` before fine-tuning; `attach` afterwards, to run on a stream. A step of the stream costs
    Σ n_out · nnz(δ) multiplications instead of Σ n_out · size, and keeps for each linear map its last input and output.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> method = DeltaActivation(step_init=0.5, rate=1e-2)
    >>> steady = method.apply(net).eval()
    >>> frame = torch.randn(1, 4)
    >>> with method.attach(steady) as handle:
    ...     first, second = steady(frame), steady(frame)
    >>> handle.report()["macs"], handle.report()["macs_last_frame"]
    (48, 0)
    """

    step_init: float = Field(0.1, ge=1e-6, description="|θ| of every layer at the start")
    input_step: float | None = Field(None, ge=1e-6, description="that of the input, if it has another scale")
    per: Per = Field("channel", description="what has a step of its own: layer, channel, neuron")
    rate: float = Field(1e-3, ge=0, description="of the penalty; it is multiplied by n_out")
    trainable: bool = Field(True, description="whether steps learn")
    on_input: bool = Field(
        True, description="whether the input is quantised too; without that the first layer is dense"
    )
    break_even: float = Field(
        0.25, ge=0, le=1, description="share of changed positions above which a convolution is dense"
    )

    def _layer(self, shape: tuple[int, ...], fan: int, is_input: bool) -> Penalised:
        step = self.input_step if is_input and self.input_step is not None else self.step_init
        return DeltaActivationLayer(shape, step, self.per, self.rate, fan, trainable=self.trainable, frames=1)

    def apply(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        """A network with a layer behind every ReLU, and on its input. Parameters are shared with ``model``.

        Args:
            model: one whose forward `torch.fx` can follow, applied to frames ``[batch, channels, ...]``.
            example: a batch of frames, needed for steps per neuron and where channels cannot be told from the layers.

        Raises:
            ModelError: it cannot be followed, has no ReLU, or has such layers already.
            InputError: steps per neuron without an example.
        """
        if self.per == "neuron" and example is None:
            raise InputError("delta-activation: steps per neuron need an example of the input: apply(model, example)")
        return self._insert(model, example, self.on_input)

    def attach(self, model: nn.Module, calibration: Calibration | None = None) -> StreamHandle:
        """Run a network that `apply` made on streams: each call is the next frame of a batch of them.

        The network must be in eval mode. Its weights are copied in the order that the kernels read, once; parameters that
        change afterwards count from the next `attach`.

        Raises:
            ModelError: it has none of these layers, is in training mode, or is attached already.
            CalibrationError: a calibration was given; this method has none.
        """
        if calibration is not None:
            raise CalibrationError("delta-activation has no calibration: what it learns are parameters of the model")
        return StreamHandle.of(model, DeltaInference(model, self.break_even))


@register("spatial-l1", slot="activations", family="activations", name="Spatial L1", baseline=True, needs=["training"])
class SpatialL1(_Inserting):
    """Train activations to be small, frame by frame: the baseline of the Delta Activation Layer.

    >>> net = SpatialL1(rate=1e-2).apply(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    >>> [type(layer).__name__ for layer in delta_layers(net)]
    ['SpatialL1Layer']
    """

    rate: float = Field(4e-4, ge=0, description="of the penalty; it is multiplied by n_out")

    def _layer(self, shape: tuple[int, ...], fan: int, is_input: bool) -> Penalised:
        return SpatialL1Layer(self.rate, fan, frames=1)

    def apply(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        """As `DeltaActivation.apply`; the input is left alone."""
        return self._insert(model, example, on_input=False)


def over_frames(model: nn.Module, clips: Tensor) -> Tensor:
    """Apply a network of frames to clips ``[batch, time, ...]``; the result is ``[batch, time, ...]``."""
    layers = delta_layers(model)
    before = [layer.frames for layer in layers]
    try:
        for layer in layers:
            layer.frames = clips.shape[1]
        return cast(Tensor, model(clips.flatten(0, 1)).unflatten(0, clips.shape[:2]))
    finally:
        for layer, frames in zip(layers, before, strict=True):
            layer.frames = frames


@torch.no_grad()
def set_steps(model: nn.Module, clips: Tensor, share: float = 0.5) -> None:
    """Start each learned step at a share of the layer's mean positive activation on ``clips``, in the order of the network.

    Raises:
        InputError: ``share`` is not positive, or a layer is never positive.
    """
    if share <= 0:
        raise InputError(f"share must be positive, got {share}")

    def measure(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        layer = cast(DeltaActivationLayer, layer)
        positive = args[0][args[0] > 0]
        if not positive.numel():
            raise InputError("a layer has no positive activation on these clips: it needs other clips or a fixed step")
        layer.theta.fill_(float(positive.mean()) * share)

    layers = [layer for layer in delta_layers(model) if isinstance(layer, DeltaActivationLayer)]
    hooks = [layer.register_forward_pre_hook(measure) for layer in layers]
    try:
        over_frames(model, clips)
    finally:
        for hook in hooks:
            hook.remove()
