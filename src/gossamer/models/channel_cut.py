"""Cutting channels out of a convolutional network: smaller plain layers, their cost, and files that need no Gossamer.

    small = cut_channels(model, graph, masks, absorb=example)
    print(costs(model, example).flops, costs(small, example).flops)
    save_cut(small, "folder")                        # model.safetensors, channels.json
    model = load_cut(build_the_dense_model(), "folder")

`channels.json` holds ``{layer: [in, out, groups]}`` of every convolution, linear layer and batch norm that differs from the
dense model or not. Any program can use it: build the network with these widths (a builder of your own that takes them), or
build the dense one and replace the layers by ones of these widths, then ``load_state_dict(load_file("model.safetensors"))``.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gossamer.errors import InputError, ModelError
from gossamer.files import save_tensors, write_whole
from gossamer.models.channel_graph import ChannelGraph, ChannelGroup, Conv, Norm, evaluating
from gossamer.patterns import Masks


@dataclass(frozen=True)
class LayerCost:
    """FLOPs of one image (a multiply-add is two) and parameters; `bias` is the part of them that has no input side."""

    flops: float
    params: int
    bias: int = 0


@dataclass(frozen=True)
class Costs:
    """By layer: convolutions 2·places·K·C_in·C_out/groups, linear layers 2·in·out; of norms only the parameters."""

    layers: dict[str, LayerCost]

    @property
    def flops(self) -> float:
        """Of one image."""
        return sum(layer.flops for layer in self.layers.values())

    @property
    def params(self) -> int:
        """Of these layers."""
        return sum(layer.params for layer in self.layers.values())


def costs(model: nn.Module, example: Tensor) -> Costs:
    """Count the layers' work on an input ``[batch, channels, …]`` by running it once.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    >>> counted = costs(net, torch.zeros(1, 1, 4, 4))
    >>> counted.flops, counted.params
    (288.0, 48)
    """
    found: dict[str, LayerCost] = {}

    def look(name: str, module: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        before = found.get(name, LayerCost(0.0, 0)).flops
        params = sum(p.numel() for p in module.parameters())
        if isinstance(module, Norm):
            found[name] = LayerCost(0.0, params, params)
            return
        places = math.prod(out.shape[2:]) if isinstance(module, Conv) else math.prod(out.shape[1:-1])
        bias = module.bias.numel() if module.bias is not None else 0
        found[name] = LayerCost(before + 2.0 * places * module.weight.numel(), params, bias)

    handles = [
        module.register_forward_hook(partial(look, name))
        for name, module in model.named_modules()
        if isinstance(module, Conv | nn.Linear | Norm)
    ]
    try:
        with evaluating(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return Costs(found)


def costs_after(dense: Costs, graph: ChannelGraph, masks: Masks) -> Costs:
    """The formula: what a layer costs is multiplied by the kept shares of its inputs and of its outputs."""
    layers = dict(dense.layers)

    def scale(name: str, share: float, inputs: bool) -> None:
        old = layers[name]
        bias = old.bias if inputs else round(old.bias * share)
        layers[name] = LayerCost(old.flops * share, round((old.params - old.bias) * share) + bias, bias)

    for group in graph.groups:
        share = float(group_mask(group, masks).double().mean())
        for name in (*group.norms, *group.producers, *group.depthwise):
            scale(name, share, inputs=False)
        for consumer in group.consumers:
            scale(consumer.name, share, inputs=True)
    return Costs(layers)


def group_mask(group: ChannelGroup, masks: Mapping[str, Tensor]) -> Tensor:
    """The one mask ``[channels]`` of a group; all True where `masks` doesn't name its norms.

    Args:
        masks: bool by the name of a norm's scale, ``bn1.weight``.

    Raises:
        InputError: the norms of the group have different masks, of another length, or one that keeps nothing.
    """
    found = [masks[f"{name}.weight"].bool() for name in group.norms if f"{name}.weight" in masks]
    if not found:
        return torch.ones(group.channels, dtype=torch.bool)
    first = found[0]
    if len(found) < len(group.norms) or any(m.shape != first.shape or not torch.equal(m, first) for m in found):
        raise InputError(f"the channels of {', '.join(group.norms)} are added, so these norms need one mask")
    if first.dim() != 1 or not bool(first.any()):
        raise InputError(f"the mask of {group.norms[0]} must keep a channel and be one row, got {list(first.shape)}")
    return first.cpu()


def cut_channels(model: nn.Module, graph: ChannelGraph, masks: Masks, absorb: Tensor | None = None) -> nn.Module:
    """A copy of the model without the masked channels: ordinary layers, fewer channels; the model itself stays as it is.

    Where scale and shift of a removed channel are zero, the outputs in eval mode are the same. A shift β ≠ 0 leaves a constant
    behind (relu(β) after a ReLU); with `absorb` what the readers make of these constants goes into their bias, or into the
    running mean behind them. That is exact away from zero-padded borders.

    Args:
        graph: of this model.
        masks: bool by the name of each norm's scale; norms of one group have the same. Masks of a model that is cut by them
            already (as many channels as they keep) change nothing.
        absorb: an input ``[batch, channels, …]`` on which the constants are measured; None leaves them out.

    Raises:
        InputError: masks that do not fit.
        ModelError: the masks name a norm whose channels cannot be cut.

    >>> from gossamer.models.channel_graph import channel_graph
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    >>> graph = channel_graph(net, torch.zeros(1, 1, 2, 2))
    >>> cut_channels(net, graph, Masks({"1.weight": torch.tensor([True, False, True, True])}))[3]
    Conv2d(3, 2, kernel_size=(1, 1), stride=(1, 1))
    """
    known = {f"{name}.weight" for name in graph.norms}
    strange = [name for name in masks if name not in known]
    if strange:
        raise ModelError(f"channels of {strange[0]} cannot be cut: it is no batch norm of a group of this model")
    small = copy.deepcopy(model)
    modules: dict[str, Any] = dict(small.named_modules())
    chosen = []
    for group in graph.groups:
        keep = group_mask(group, masks)
        width = modules[group.norms[0]].num_features
        if len(keep) != width and int(keep.sum()) != width:
            raise InputError(f"the mask of {group.norms[0]} has {len(keep)} channels, the norm {width}")
        if len(keep) == width and not bool(keep.all()):
            chosen.append((group, keep))
    if absorb is not None and chosen:
        _absorb(small, modules, chosen, absorb)
    for group, keep in chosen:
        for name in group.norms:
            resize(modules[name], keep, keep)
        for name in group.producers:
            resize(modules[name], None, keep)
        for name in group.depthwise:
            resize(modules[name], keep, keep)
        for consumer in group.consumers:
            resize(modules[consumer.name], keep.repeat_interleave(consumer.repeat), None)
    return small


@torch.no_grad()
def _absorb(small: nn.Module, modules: dict[str, Any], chosen: list[tuple[ChannelGroup, Tensor]], x: Tensor) -> None:
    """Silence the channels, see which constants reach the readers, and put their effect where it belongs."""
    for group, keep in chosen:
        for name in group.norms:
            modules[name].weight.masked_fill_(~keep.to(modules[name].weight.device), 0)
    seen: dict[str, Tensor] = {}

    def look(consumer: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[consumer] = args[0].transpose(0, 1).flatten(1).mean(1)

    readers = [(consumer, keep) for group, keep in chosen for consumer in group.consumers]
    handles = [modules[c.name].register_forward_pre_hook(partial(look, c.name)) for c, _ in readers]
    try:
        with evaluating(small):
            small(x)
    finally:
        for handle in handles:
            handle.remove()
    for consumer, keep in readers:
        layer = modules[consumer.name]
        gone = (~keep).repeat_interleave(consumer.repeat).to(layer.weight.device)
        kernel = layer.weight.flatten(2).sum(2) if layer.weight.dim() > 2 else layer.weight
        change = kernel @ seen[consumer.name].to(kernel.dtype).masked_fill(~gone, 0)
        if layer.bias is None and consumer.norm is not None:
            modules[consumer.norm].running_mean -= change
        elif layer.bias is None:
            layer.bias = nn.Parameter(change)
        else:
            layer.bias += change


def resize(module: nn.Module, inputs: Tensor | None, outputs: Tensor | None) -> None:
    """Cut a convolution, linear layer or batch norm in place to the kept inputs and outputs (bool, None: all).

    Raises:
        ModelError: another kind of layer.
    """
    m: Any = module
    if isinstance(m, Norm):
        keep = cast(Tensor, outputs)
        m.num_features = int(keep.sum())
        for name in ("running_mean", "running_var"):
            setattr(m, name, getattr(m, name)[keep.to(m.weight.device)].clone())
    elif isinstance(m, Conv | nn.Linear):
        depthwise = isinstance(m, Conv) and m.groups > 1
        if inputs is not None:
            if not depthwise:
                _keep(m, "weight", inputs, 1)
            setattr(m, "in_channels" if isinstance(m, Conv) else "in_features", int(inputs.sum()))
        if depthwise and outputs is not None:
            m.groups = int(outputs.sum())
        if outputs is None:
            return
        setattr(m, "out_channels" if isinstance(m, Conv) else "out_features", int(outputs.sum()))
    else:
        raise ModelError(f"{type(m).__name__} has no channels that can be cut")
    _keep(m, "weight", cast(Tensor, outputs), 0)
    if m.bias is not None:
        _keep(m, "bias", cast(Tensor, outputs), 0)


def _keep(module: nn.Module, name: str, keep: Tensor, dim: int) -> None:
    old = cast(nn.Parameter, getattr(module, name))
    index = keep.nonzero()[:, 0].to(old.device)
    setattr(module, name, nn.Parameter(old.detach().index_select(dim, index).clone(), old.requires_grad))


def widths(model: nn.Module) -> dict[str, list[int]]:
    """``{layer: [in, out, groups]}`` of every convolution, linear layer and batch norm.

    >>> widths(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)))
    {'0': [1, 4, 1], '1': [4, 4, 1]}
    """
    found: dict[str, list[int]] = {}
    for name, m in model.named_modules():
        if isinstance(m, Norm):
            found[name] = [m.num_features, m.num_features, 1]
        elif isinstance(m, Conv):
            found[name] = [m.in_channels, m.out_channels, m.groups]
        elif isinstance(m, nn.Linear):
            found[name] = [m.in_features, m.out_features, 1]
    return found


def save_cut(model: nn.Module, folder: str | Path) -> Path:
    """Write ``model.safetensors`` and ``channels.json``; the folder comes back.

    Raises:
        OutputError: it cannot be written.
    """
    folder = Path(folder)
    write_whole(folder / "channels.json", json.dumps(widths(model), indent=1) + "\n", "the model")
    save_tensors(folder / "model.safetensors", model.state_dict(), what="the model")
    return folder


def load_cut(model: nn.Module, folder: str | Path) -> nn.Module:
    """Give a freshly built dense model the widths and weights of a cut one, in place.

    Raises:
        InputError: files that are missing or damaged.
        ModelError: they are of another network.
    """
    folder = Path(folder)
    try:
        wanted: dict[str, list[int]] = json.loads((folder / "channels.json").read_text("utf-8"))
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} holds no cut model, or is damaged ({type(error).__name__})") from None
    modules = dict(model.named_modules())
    now = widths(model)
    if set(now) != set(wanted) or any(w > n for k in wanted for w, n in zip(wanted[k], now[k], strict=True)):
        raise ModelError(f"the widths in {folder} are of another network than {type(model).__name__}")
    for name, (inputs, outputs, _) in wanted.items():
        if now[name][:2] != [inputs, outputs]:
            resize(modules[name], torch.arange(now[name][0]) < inputs, torch.arange(now[name][1]) < outputs)
        if f"{name}.bias" in weights and getattr(modules[name], "bias", None) is None:
            cast(Any, modules[name]).bias = nn.Parameter(torch.empty_like(weights[f"{name}.bias"]))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ModelError(
            f"the weights in {folder} do not fit {type(model).__name__}: {' '.join(str(error).split())[:160]}"
        ) from None
    return model
