"""Delta inference: a trained network with Delta Activation Layers, run on streams of frames.

z_t = z_{t−1} + W δ_t,   y_t = q · round(f(z_t)/q),   δ_{t+1} comes from whole codes c = y/q

Every linear map keeps its output z and its last input, as integer codes where that comes straight from a Delta Activation
Layer; what did not change is exactly zero and is not multiplied. Everything else (activations, pools, sums, softmax) is
computed from the reconstructed y. The first frame is the change from zero. Batch norms behind a linear map are folded into it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from gossamer.activations.delta_activation_layers import DeltaActivationLayer, delta_layers, quantise
from gossamer.activations.delta_graph import LINEAR, fan_out, trace
from gossamer.errors import InputError, ModelError
from gossamer.ops import channel_sparse_linear
from gossamer.ops.delta_linear import MAX_ROWS, delta_linear, input_major
from gossamer.registry import Handle

_MAX_CODE = 2**30
_KEEPS_CODES: tuple[Any, ...] = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten)
_KEEPS_CODES_CALLS: tuple[Any, ...] = (torch.flatten, F.dropout, "flatten", "contiguous")
_POOLS: tuple[Any, ...] = (nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool2d, F.max_pool1d, F.max_pool2d)


class _State:
    """One linear map of the graph: its weights as the kernels want them, its running output, its last input.

    Attributes:
        fan_out: multiplications an input goes into.
        nonzero, elements: inputs that changed, and all, over the frames that were not a stream's first.
        macs, last_macs: multiplications in all frames, and in the last one.
    """

    def __init__(self, module: nn.Module, source: DeltaActivationLayer | None) -> None:
        self.module, self.source, self.fan_out = cast(Any, module), source, fan_out(module)
        bias = self.module.bias
        self.bias = torch.zeros(self.outputs) if bias is None else bias.detach().float().clone()
        self.nonzero = self.elements = self.macs = self.last_macs = 0
        self.before: Tensor | None = None
        self.fresh: list[bool] = []

    @property
    def outputs(self) -> int:
        return int(getattr(self.module, "out_features", 0) or self.module.out_channels)

    def step_of(self, x: Tensor) -> Tensor | None:
        """The step of each input channel of the map, or one value; None where the input is no whole number of steps."""
        raise NotImplementedError

    def add(self, now: Tensor, step: Tensor | None) -> Tensor:
        """Add what changed to the running output, remember ``now``; returns how much changed in each stream [B]."""
        raise NotImplementedError

    def start(self, x: Tensor) -> None:
        """Room for the running output."""
        raise NotImplementedError

    def output(self) -> Tensor:
        """A copy of the running output, as the layer's forward gives it."""
        raise NotImplementedError

    def clear(self, stream: int) -> None:
        """Let the next frame of this stream be its first."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        step = self.step_of(x)
        if self.before is None:
            self.before = torch.zeros_like(x, dtype=torch.float32 if step is None else torch.int32)
            self.start(x)
            self.fresh = [True] * len(x)
        if x.shape != self.before.shape:
            raise InputError(f"these streams have inputs {list(self.before.shape)}, got {list(x.shape)}: reset first")
        if step is None:
            now = x.float()
        else:
            codes = torch.round(x.float() / (step if step.dim() == 0 else self.spread(step)))
            if codes.numel() and float(codes.abs().amax()) > _MAX_CODE:
                raise InputError("an activation is more than 2**30 steps: the steps are too small for these frames")
            now = codes.to(torch.int32)
        size = x.numel() // len(x)
        self.last_macs = 0
        for changed, first in zip(self.add(now, step).tolist(), self.fresh, strict=True):
            self.last_macs += self.fan_out * (size if first else changed)
            if not first:
                self.nonzero, self.elements = self.nonzero + changed, self.elements + size
        self.macs += self.last_macs
        self.fresh = [False] * len(x)
        return self.output().to(x.dtype)

    def spread(self, step: Tensor) -> Tensor:
        """Steps of channels, to broadcast with the input."""
        return step

    def nbytes(self) -> int:
        """What is kept between frames."""
        raise NotImplementedError


class _LinearState(_State):
    """z [B · n, N], and the last input [B, ..., K]."""

    def __init__(self, module: nn.Module, source: DeltaActivationLayer | None) -> None:
        super().__init__(module, source)
        weight = self.module.weight
        self.weight = input_major(weight if source is not None else weight.float())

    def step_of(self, x: Tensor) -> Tensor | None:
        if self.source is None:
            return None
        step = self.source.step
        if step.dim() == 0:
            return step
        if x.dim() != 2 or x.shape[1] % step.numel():
            return None
        return step.flatten().repeat_interleave(
            x.shape[1] // step.numel()
        )  # flattened: each channel's neurons together

    def start(self, x: Tensor) -> None:
        self.z = self.bias.to(x.device).expand(x.numel() // x.shape[-1], -1).clone()

    def add(self, now: Tensor, step: Tensor | None) -> Tensor:
        assert self.before is not None
        rows, before = now.flatten(0, -2), self.before.flatten(0, -2)
        if step is None:
            change = rows - before
            for z, part in zip(self.z.split(MAX_ROWS), change.split(MAX_ROWS), strict=True):
                z += channel_sparse_linear(part, self.weight.float())
            self.before = now.clone()
            return change.count_nonzero(1).view(len(now), -1).sum(1)
        parts = zip(*(t.split(MAX_ROWS) for t in (self.z, rows, before)), strict=True)
        counts = [delta_linear(z, codes, last, self.weight, step) for z, codes, last in parts]
        return torch.cat(counts).view(len(now), -1).sum(1)

    def output(self) -> Tensor:
        assert self.before is not None
        return self.z.clone().view(*self.before.shape[:-1], -1)

    def clear(self, stream: int) -> None:
        assert self.before is not None
        self.before[stream] = 0
        self.z.view(len(self.before), -1, self.z.shape[1])[stream] = self.bias.to(self.z.device)
        self.fresh[stream] = True

    def nbytes(self) -> int:
        return 4 * (self.z.numel() + (0 if self.before is None else self.before.numel()))


class _ConvState(_State):
    """z [B · H' · W' + 1, N], channels last, the last row for what falls outside; and the last input [B, C, H, W].

    Each changed position is multiplied with the weights of the channels that changed, for every place of the kernel at
    once, and the products are added to the outputs that see it. One-dimensional maps have height 1.
    """

    def __init__(self, module: nn.Module, source: DeltaActivationLayer | None, break_even: float) -> None:
        super().__init__(module, source)
        m, self.break_even = self.module, break_even
        if m.padding_mode != "zeros" or isinstance(m.padding, str):
            raise ModelError("delta inference takes convolutions padded by a number of zeros, no other padding")
        self.flat = isinstance(module, nn.Conv1d)
        lift = (lambda pair: (1, *pair), lambda pair: (0, *pair)) if self.flat else (tuple, tuple)
        self.kernel, self.stride, self.dilation = (lift[0](p) for p in (m.kernel_size, m.stride, m.dilation))
        self.padding, self.groups = lift[1](m.padding), m.groups
        weight = m.weight.detach().float()
        self.weight = weight.unsqueeze(2) if self.flat else weight  # [N, C/g, kh, kw]
        # [g, C/g, places of the kernel * N/g]
        by_input = self.weight.unflatten(0, (self.groups, -1)).flatten(3).permute(0, 2, 3, 1)
        self.by_input = by_input.flatten(2).contiguous()

    def step_of(self, x: Tensor) -> Tensor | None:
        if self.source is None:
            return None
        step = self.source.step
        return step if step.dim() in (0, 1) or step.dim() == x.dim() - 1 else None

    def spread(self, step: Tensor) -> Tensor:
        if step.dim() > 1:
            return step
        return step.view(-1, 1) if self.flat else step.view(-1, 1, 1)

    def start(self, x: Tensor) -> None:
        size = (1, x.shape[2]) if self.flat else tuple(x.shape[2:])
        parts = zip(size, self.padding, self.dilation, self.kernel, self.stride, strict=True)
        self.size = [(n + 2 * pad - apart * (k - 1) - 1) // stride + 1 for n, pad, apart, k, stride in parts]
        self.z = self.bias.to(x.device).expand(len(x) * self.size[0] * self.size[1] + 1, -1).clone()

    def _outputs(self) -> Tensor:
        assert self.before is not None
        return self.z[:-1].view(len(self.before), *self.size, -1)

    def add(self, now: Tensor, step: Tensor | None) -> Tensor:
        assert self.before is not None
        changed, delta = now != self.before, (now - self.before).float()
        if step is not None:
            delta = delta * self.spread(step)
        self.before, counts = now, changed.flatten(1).sum(1)
        if self.flat:
            changed, delta = changed.unsqueeze(2), delta.unsqueeze(2)
        where = changed.any(1)
        total = int(where.sum())
        if total > self.break_even * where.numel():
            more = F.conv2d(delta, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
            self._outputs().add_(more.permute(0, 2, 3, 1))
        elif total:
            self._scatter(delta, changed, where)
        return counts

    def _scatter(self, delta: Tensor, changed: Tensor, where: Tensor) -> None:
        at = where.nonzero()  # [P, 3]: stream, row, column
        batch, row, column = at.unbind(1)
        values, weight = delta.permute(0, 2, 3, 1)[batch, row, column], self.by_input
        if self.groups == 1:
            channels = changed.any(0).flatten(1).any(1).nonzero().flatten()
            values, weight = values[:, channels], weight[:, channels]
        products = torch.bmm(values.unflatten(1, (self.groups, -1)).transpose(0, 1), weight)  # [g, P, places * N/g]
        places = self.kernel[0] * self.kernel[1]
        products = products.unflatten(2, (places, -1)).permute(1, 2, 0, 3).reshape(-1, self.outputs)
        target, inside = batch[:, None] * 1, torch.ones(1, 1, dtype=torch.bool, device=at.device)
        for axis, position in enumerate((row, column)):
            offsets = torch.arange(self.kernel[axis], device=at.device) * self.dilation[axis]
            offsets = offsets.repeat_interleave(self.kernel[1]) if axis == 0 else offsets.repeat(self.kernel[0])
            moved = position[:, None] + self.padding[axis] - offsets
            out = moved.div(self.stride[axis], rounding_mode="floor")
            inside = inside & (moved % self.stride[axis] == 0) & (out >= 0) & (out < self.size[axis])
            target = target * self.size[axis] + out
        outside = len(self.z) - 1
        self.z.index_add_(0, torch.where(inside, target, outside).flatten(), products)

    def output(self) -> Tensor:
        out = self._outputs().permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
        return out.squeeze(2) if self.flat else out

    def clear(self, stream: int) -> None:
        assert self.before is not None
        self.before = self.before.clone()
        self.before[stream] = 0
        self._outputs()[stream] = self.bias.to(self.z.device)
        self.fresh[stream] = True

    def nbytes(self) -> int:
        return 4 * (self.z.numel() + (0 if self.before is None else self.before.numel()))


class DeltaInference(fx.Interpreter):
    """A network with Delta Activation Layers as a machine with state: `step` takes the next frame of each stream.

    Args:
        model: made by `DeltaActivation.apply`, in eval mode; its weights are copied.
        break_even: share of changed positions above which a convolution multiplies all of them.

    Raises:
        ModelError: no such layers, training mode, layers that emit or sum differences, parameters that are not finite, or
            a convolution that is padded by something else than zeros.

    Attributes:
        states: the linear maps, by the name of their layer.
    """

    def __init__(self, model: nn.Module, break_even: float = 0.25) -> None:
        layers = [layer for layer in delta_layers(model) if isinstance(layer, DeltaActivationLayer)]
        if not layers:
            raise ModelError(
                "this model has no Delta Activation Layers: make it with DeltaActivation.apply and train it"
            )
        if model.training:
            raise ModelError("delta inference needs the model in eval mode: call eval() first")
        if any(layer.output or layer.sigma for layer in layers):
            raise ModelError("delta inference takes layers that emit values (output=0, sigma=False)")
        if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
            raise ModelError("this model has parameters that are not finite")
        traced = trace(model)
        super().__init__(traced)
        self.extra_traceback = False  # errors stay one line
        self.states: dict[str, _State] = {}
        self._plan: dict[fx.Node, Callable[[Tensor], Tensor]] = {}
        self._modules = dict(traced.named_modules())
        for node in traced.graph.nodes:
            module = self._modules.get(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, DeltaActivationLayer):
                self._plan[node] = _Reconstruction(module)
            elif isinstance(module, LINEAR):
                folded, norm = self._fold(node, module)
                source = self._source(node.args[0])
                state = (
                    _LinearState(folded, source)
                    if isinstance(folded, nn.Linear)
                    else _ConvState(folded, source, break_even)
                )
                self._plan[node] = self.states[node.name] = state
                if norm is not None:
                    self._plan[norm] = lambda x: x

    def _module(self, node: Any) -> nn.Module | None:
        return self._modules.get(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None

    def _fold(self, node: fx.Node, module: nn.Module) -> tuple[nn.Module, fx.Node | None]:
        users = list(node.users)
        norm = self._module(users[0]) if len(users) == 1 else None
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) and norm.running_mean is not None:
            if isinstance(module, nn.Linear):
                return fuse_linear_bn_eval(module, norm), users[0]
            return fuse_conv_bn_eval(cast(Any, module), norm), users[0]
        return module, None

    def _source(self, node: Any) -> DeltaActivationLayer | None:
        """The layer whose codes reach this node unchanged, each still in its channel."""
        pooled = False
        while isinstance(node, fx.Node):
            module = self._module(node)
            if isinstance(module, DeltaActivationLayer):
                mixes = (pooled or module.pool > 1) and module.theta.dim() > 1
                return None if mixes else module
            pools = isinstance(module, _POOLS[:3]) or node.target in _POOLS[3:]
            if not (pools or isinstance(module, _KEEPS_CODES) or node.target in _KEEPS_CODES_CALLS):
                return None
            pooled, node = pooled or pools, node.args[0]
        return None

    def run_node(self, n: fx.Node) -> Any:
        """A node of the graph: by its state, if it has one."""
        if n not in self._plan:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        return self._plan[n](cast(Tensor, args[0]))

    @torch.no_grad()
    def step(self, frame: Tensor) -> Tensor:
        """The network's output ``[B, ...]`` for the next frame ``[B, ...]`` of B streams.

        Raises:
            InputError: a frame that is not finite, or of another shape than the one before.
        """
        if not bool(torch.isfinite(frame).all()):
            raise InputError("this frame holds values that are not finite")
        return cast(Tensor, self.run(frame))

    def reset(self, stream: int | None = None) -> None:
        """Let the next frame be the first one again, of all streams or of one; counts stay.

        Raises:
            InputError: there is no such stream.
        """
        for state in self.states.values():
            if stream is None:
                state.before = None
            elif state.before is None or not 0 <= stream < len(state.before):
                raise InputError(f"there is no stream {stream} to reset")
            else:
                state.clear(stream)

    @property
    def macs(self) -> int:
        """Multiplications of all frames so far, first frames in full."""
        return sum(state.macs for state in self.states.values())

    @property
    def last_macs(self) -> int:
        """Those of the last frame."""
        return sum(state.last_macs for state in self.states.values())

    def report(self) -> dict[str, Any]:
        """Densities of the changes (first frames left out), multiplications, and bytes kept between frames."""
        states = self.states.values()
        elements = sum(s.elements for s in states)
        weighted = sum(s.elements * s.fan_out for s in states)
        return {
            "density": sum(s.nonzero for s in states) / elements if elements else 1.0,
            "weighted_density": sum(s.nonzero * s.fan_out for s in states) / weighted if weighted else 1.0,
            "density_by_layer": {n: s.nonzero / s.elements for n, s in self.states.items() if s.elements},
            "macs": self.macs,
            "macs_last_frame": self.last_macs,
            "state_bytes": sum(s.nbytes() for s in states if s.before is not None),
        }


class _Reconstruction:
    """A Delta Activation Layer on one frame: y, from the whole activation."""

    def __init__(self, layer: DeltaActivationLayer) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        layer, clips = self.layer, self.layer.activate(x.unsqueeze(1))
        return layer.neighbours(quantise(clips, layer.per_axis(layer.theta, clips.dim() - 2))).squeeze(1)


@dataclass(eq=False)
class StreamHandle(Handle):
    """A network attached to streams: each call of the model is the next frame.

    Attributes:
        stream: the machine with its state.
    """

    stream: DeltaInference = field(kw_only=True)

    @classmethod
    def of(cls, model: nn.Module, stream: DeltaInference) -> StreamHandle:
        """Route the model's calls to the stream.

        Raises:
            ModelError: it is attached already.
        """
        if "forward" in model.__dict__:
            raise ModelError("this model's forward is taken already: detach the other method first")
        routed: Any = model
        routed.forward = stream.step
        return cls([lambda: model.__dict__.pop("forward", None)], [stream.report], stream=stream)

    def reset(self, stream: int | None = None) -> None:
        """See `DeltaInference.reset`."""
        self.stream.reset(stream)
