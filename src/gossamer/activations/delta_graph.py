"""A network as a graph of its layers: where Delta Activation Layers go, and what their changes cost."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from gossamer.activations.delta_activation_layers import Penalised
from gossamer.errors import ModelError

_RELU_MODULES = (nn.ReLU, nn.ReLU6)
_RELU_CALLS: tuple[Any, ...] = (F.relu, F.relu6, torch.relu, torch.relu_, "relu", "relu_")
LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Penalised) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule:
    """The model as a graph of its layers; parameters are shared with it.

    Raises:
        ModelError: what it does depends on the values of its input.
    """
    try:
        return fx.GraphModule(model, _Tracer().trace(model))
    except Exception as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"delta-activation cannot follow this model's forward ({why}): want one path of layers"
        ) from None


def fan_out(module: nn.Module) -> int:
    """Multiplications that one input of a linear map goes into: filters times the area of the kernel.

    >>> fan_out(nn.Conv2d(8, 16, 3)), fan_out(nn.Conv2d(8, 8, 3, groups=8)), fan_out(nn.Linear(8, 10))
    (144, 9, 10)
    """
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return module.out_channels // module.groups * int(torch.tensor(module.kernel_size).prod())
    return cast(nn.Linear, module).out_features


def is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the node is a ReLU, as a module, function or method."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _RELU_MODULES)
    return node.op in ("call_function", "call_method") and node.target in _RELU_CALLS


def node_fan_out(node: fx.Node, modules: dict[str, nn.Module]) -> int:
    """Sum over the linear maps that read the node, also through pools and sums, up to the next activation."""
    total, seen, waiting = 0, set[fx.Node](), list(node.users)
    while waiting:
        user = waiting.pop()
        if user in seen or is_relu(user, modules):
            continue
        seen.add(user)
        module = modules.get(str(user.target)) if user.op == "call_module" else None
        if isinstance(module, LINEAR):
            total += fan_out(module)
        elif not isinstance(module, Penalised):
            waiting += list(user.users)
    return total


def channels_of(node: fx.Node, modules: dict[str, nn.Module]) -> int | None:
    """Of a node's output: from the layer that made it, or for an input from the layer that reads it."""
    waiting, steps = [node], 0
    while waiting and steps < 1000:
        at, steps = waiting.pop(), steps + 1
        module = modules.get(str(at.target)) if at.op == "call_module" else None
        for kind, before, name in (
            (nn.Linear, "in_features", "out_features"),
            ((nn.Conv1d, nn.Conv2d), "in_channels", "out_channels"),
            ((nn.BatchNorm1d, nn.BatchNorm2d), "num_features", "num_features"),
        ):
            if isinstance(module, cast(Any, kind)):
                return int(getattr(module, before if node.op == "placeholder" else name))
        if at.target in (torch.cat, torch.concat):
            return None
        waiting += list(at.users)[::-1] if node.op == "placeholder" else list(at.all_input_nodes[:1])
    return None
