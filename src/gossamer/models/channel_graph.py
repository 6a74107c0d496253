"""Which layers of a convolutional network share their channels: batch norms, producers, consumers, residual sums.

    graph = channel_graph(model, example)
    for group in graph.groups: print(group.norms, group.producers, group.consumers)

The model is traced by `torch.fx`. A *group* is a set of channels that must be cut together: a layer's outputs, what
per-channel operations make of them, and all that is added to them. A group can be cut where each of its producers (convolution
or linear) is followed by a batch norm of its own, so that a scale of zero silences the channel. Groups that reach the model's
input or output, an operation that mixes or moves channels (concatenation, grouped but not depthwise convolution, attention),
a producer without a norm, or a norm that does not stand right behind a producer, are left whole.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.errors import InputError, ModelError

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Norm = _BatchNorm

#: Modules that treat every channel alike and apart.
_PER_CHANNEL = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Hardswish, nn.Hardsigmoid),
    *(
        nn.Sigmoid,
        nn.Tanh,
        nn.Identity,
        nn.Dropout,
        nn.Dropout1d,
        nn.Dropout2d,
        nn.Dropout3d,
        nn.ZeroPad2d,
        nn.Upsample,
    ),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
)
#: Functions and methods that do, by name.
_PER_CHANNEL_NAMES = frozenset(
    (
        *(
            "relu",
            "relu_",
            "relu6",
            "leaky_relu",
            "elu",
            "gelu",
            "silu",
            "mish",
            "softplus",
            "hardswish",
            "hardsigmoid",
        ),
        *("sigmoid", "tanh", "dropout", "contiguous", "clone", "interpolate"),
        *(f"{kind}_pool{dims}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for dims in (1, 2, 3)),
    )
)
_JOINS = frozenset(("add", "iadd", "add_", "sub", "isub", "sub_", "mul", "imul", "mul_"))
_RESHAPES = frozenset(("flatten", "view", "reshape", "squeeze", "mean", "amax"))


@dataclass(frozen=True)
class Consumer:
    """A convolution or linear layer that reads a group's channels.

    Attributes:
        name: of the module.
        repeat: consecutive inputs that belong to one channel: H·W behind a flatten, else 1.
        norm: the batch norm right behind it, if it alone reads the layer.
    """

    name: str
    repeat: int = 1
    norm: str | None = None


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are cut together, by module names in the order of the run.

    Attributes:
        channels: how many.
        norms: batch norms over them; more than one where outputs are added or a depthwise convolution lies between.
        producers: layers whose outputs they are.
        depthwise: depthwise convolutions over them.
        consumers: layers that read them.
    """

    channels: int
    norms: tuple[str, ...]
    producers: tuple[str, ...]
    depthwise: tuple[str, ...]
    consumers: tuple[Consumer, ...]


@dataclass(frozen=True)
class ChannelGraph:
    """The groups that can be cut, and the batch norms of those that cannot."""

    groups: tuple[ChannelGroup, ...]
    left_whole: tuple[str, ...]

    @property
    def norms(self) -> tuple[str, ...]:
        """Batch norms whose channels can be cut."""
        return tuple(name for group in self.groups for name in group.norms)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients meanwhile; each module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Spaces:
    """Sets of channels that are the same (union-find), with what is known of each."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.channels: list[int] = []
        self.frozen: list[bool] = []

    def new(self, channels: int, frozen: bool = False) -> int:
        self.parent.append(len(self.parent))
        self.channels.append(channels)
        self.frozen.append(frozen)
        return len(self.parent) - 1

    def root(self, space: int) -> int:
        while self.parent[space] != space:
            space = self.parent[space]
        return space

    def freeze(self, space: int) -> None:
        self.frozen[self.root(space)] = True

    def join(self, a: int, b: int) -> None:
        a, b = self.root(a), self.root(b)
        if a != b:
            self.parent[b] = a
            self.frozen[a] |= self.frozen[b]


def channel_graph(model: nn.Module, example: Tensor) -> ChannelGraph:
    """Trace a network and find its groups of channels. The model is not changed.

    Args:
        model: any `nn.Module` that `torch.fx` can trace (no branches on values of tensors), called with one tensor.
        example: float ``[batch, channels, …]``, an input of the right shape.

    Raises:
        ModelError: it cannot be traced or does not run on the example, or no channel can be cut.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    >>> channel_graph(net, torch.zeros(1, 1, 4, 4)).groups[0].consumers
    (Consumer(name='4', repeat=4, norm=None),)
    """
    if not isinstance(example, Tensor) or example.dim() < 2 or not example.is_floating_point():
        raise InputError("a channel graph needs an example batch of floats [batch, channels, …]")
    with evaluating(model):
        try:
            traced = fx.symbolic_trace(model)
            ShapeProp(traced).propagate(example)
        except Exception as error:  # whatever the model's code raises under a proxy
            reason = " ".join(str(error).split())[:160]
            raise ModelError(f"{type(model).__name__} cannot be traced on {list(example.shape)}: {reason}") from None
    return _Reader(traced).graph()


class _Reader:
    """One walk over a traced graph."""

    def __init__(self, traced: fx.GraphModule) -> None:
        self.traced, self.spaces = traced, _Spaces()
        self.modules: dict[str, nn.Module] = dict(traced.named_modules(remove_duplicate=False))
        self.at: dict[fx.Node, tuple[int, int]] = {}  # node → (space, repeat)
        self.producers: list[tuple[int, str]] = []
        self.depthwise: list[tuple[int, str]] = []
        self.consumers: list[tuple[int, Consumer]] = []
        self.norms: list[tuple[int, str]] = []

    def graph(self) -> ChannelGraph:
        called: list[nn.Module] = []
        for node in self.traced.graph.nodes:
            self._visit(node)
            if node.op == "call_module":
                module = self.modules[node.target]
                if any(module is other for other in called):  # one weight in two places
                    self._freeze_around(node)
                    for other in self.traced.graph.nodes:
                        if other.op == "call_module" and self.modules[other.target] is module and other in self.at:
                            self._freeze_around(other)
                elif next(module.parameters(), None) is not None:
                    called.append(module)
        roots = list(dict.fromkeys(self.spaces.root(space) for space, _ in self.norms))
        groups = [
            ChannelGroup(
                self.spaces.channels[root],
                self._names(self.norms, root),
                self._names(self.producers, root),
                self._names(self.depthwise, root),
                tuple(consumer for space, consumer in self.consumers if self.spaces.root(space) == root),
            )
            for root in roots
            if not self.spaces.frozen[root]
        ]
        if not groups:
            raise ModelError(f"{type(self.traced).__name__} has no channels that can be cut by batch norms")
        whole = [name for space, name in self.norms if self.spaces.frozen[self.spaces.root(space)]]
        return ChannelGraph(tuple(groups), tuple(whole))

    def _names(self, pairs: list[tuple[int, str]], root: int) -> tuple[str, ...]:
        return tuple(name for space, name in pairs if self.spaces.root(space) == root)

    def _shape(self, node: Any) -> tuple[int, ...] | None:
        meta = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
        return tuple(meta.shape) if meta is not None and hasattr(meta, "shape") else None

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if n in self.at]

    def _freeze_around(self, node: fx.Node) -> None:
        for other in (*self._inputs(node), node):
            if other in self.at:
                self.spaces.freeze(self.at[other][0])

    def _norm_behind(self, node: fx.Node) -> str | None:
        """The batch norm that alone reads this node."""
        users = list(node.users)
        if len(users) == 1 and users[0].op == "call_module":
            norm = self.modules[cast(str, users[0].target)]
            if isinstance(norm, Norm) and norm.affine and norm.track_running_stats:
                return cast(str, users[0].target)
        return None

    def _unknown(self, node: fx.Node) -> None:
        """An operation that is not understood: what goes in and what comes out stays whole."""
        self._freeze_around(node)
        shape = self._shape(node)
        if shape is not None:
            self.at[node] = (self.spaces.new(shape[1] if len(shape) > 1 else 1, frozen=True), 1)

    def _visit(self, node: fx.Node) -> None:
        shape = self._shape(node)
        if node.op == "output":
            self._freeze_around(node)
        elif node.op == "call_module":
            self._module(node, self.modules[cast(str, node.target)])
        elif shape is None:
            for other in self._inputs(node):
                if node.op == "call_function" and node.target in (getattr, operator.getitem):
                    continue
                if node.op == "call_method" and node.target in ("size", "dim"):
                    continue
                self.spaces.freeze(self.at[other][0])  # several outputs
        elif node.op in ("call_function", "call_method"):
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            self._function(node, name, shape)
        else:  # placeholder, get_attr
            self._unknown(node)

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        name, inputs, shape = cast(str, node.target), self._inputs(node), self._shape(node)
        if len(inputs) != 1 or shape is None:
            self._unknown(node)
            return
        space, repeat = self.at[inputs[0]]
        if isinstance(module, Conv) and module.groups == 1 and repeat == 1:
            self.consumers.append((space, Consumer(name, 1, self._norm_behind(node))))
            self._produce(node, name, module.out_channels)
        elif isinstance(module, Conv) and module.groups == module.in_channels == module.out_channels:
            self.depthwise.append((space, name))
            self.at[node] = (space, repeat)
        elif isinstance(module, nn.Linear) and len(shape) == 2:
            self.consumers.append((space, Consumer(name, repeat, self._norm_behind(node))))
            self._produce(node, name, module.out_features)
        elif isinstance(module, Norm) and module.affine and module.track_running_stats and repeat == 1:
            source = inputs[0]
            layer = self.modules[source.target] if source.op == "call_module" else None  # type: ignore[index]
            if not isinstance(layer, Conv | nn.Linear) or len(source.users) > 1:
                self.spaces.freeze(space)
            self.norms.append((space, name))
            self.at[node] = (space, repeat)
        elif isinstance(module, _PER_CHANNEL):
            self.at[node] = (space, repeat)
        elif isinstance(module, nn.Flatten):
            self._reshaped(node, inputs[0], shape)
        else:
            self._unknown(node)

    def _produce(self, node: fx.Node, name: str, channels: int) -> None:
        space = self.spaces.new(channels, frozen=self._norm_behind(node) is None)
        self.producers.append((space, name))
        self.at[node] = (space, 1)

    def _function(self, node: fx.Node, name: str, shape: tuple[int, ...]) -> None:
        inputs = self._inputs(node)
        scalars = all(isinstance(arg, fx.Node | int | float) for arg in node.args)
        if name in _PER_CHANNEL_NAMES and len(inputs) == 1:
            self.at[node] = self.at[inputs[0]]
        elif name in _RESHAPES and len(inputs) == 1:
            self._reshaped(node, inputs[0], shape)
        elif name in _JOINS and len(inputs) == 1 and scalars and "mul" in name and len(node.all_input_nodes) == 1:
            self.at[node] = self.at[inputs[0]]  # times a number, or by itself
        elif name in _JOINS and len(inputs) == 2 and scalars:
            (a, repeat), (b, other) = (self.at[n] for n in inputs)
            widths = {(s or (0, 0))[1] for s in (self._shape(n) for n in inputs) if s is None or len(s) > 1}
            if repeat != other or len(widths) != 1:
                self._unknown(node)
                return
            self.spaces.join(a, b)
            self.at[node] = (a, repeat)
        else:
            self._unknown(node)

    def _reshaped(self, node: fx.Node, source: fx.Node, shape: tuple[int, ...]) -> None:
        """Same channels where only places are flattened or averaged: ``[n, C, …]`` to ``[n, C · places]`` or ``[n, C, …]``."""
        space, repeat = self.at[source]
        before, channels = self._shape(source), self.spaces.channels[self.spaces.root(space)]
        averaged = getattr(node.target, "__name__", node.target) in ("mean", "amax")
        if before is None or len(shape) < 2 or before[0] != shape[0] or (averaged and before[:2] != shape[:2]):
            self._unknown(node)
        elif len(shape) == 2 and shape[1] % channels == 0 and before[1] == channels * repeat:
            self.at[node] = (space, shape[1] // channels)
        elif before[:2] == shape[:2]:
            self.at[node] = (space, repeat)
        else:
            self._unknown(node)
