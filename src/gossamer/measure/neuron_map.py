"""What an activation method computes, as a map: which neurons (or input channels) each token of a text kept, layer by layer.

The masks are those that the method's own run counts, so they hold for any attached method. Nothing is drawn here.

with CATS(sparsity=0.5).attach(model, calibration) as handle:
    seen = neuron_map(model, handle, tokens)
seen.share          # [layers, tokens]: rows of a picture
seen.frequency[3]   # [D]: how often each neuron of layer 3 was kept
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.activations.base import ActivationHandle
from gossamer.errors import InputError
from gossamer.hf import GossamerCache
from gossamer.hf.channels import Meter
from gossamer.hf.policy import TEACHER_FORCED
from gossamer.ops.linear import MAX_ROWS

Part = Literal["mlp", "channels"]


@dataclass(frozen=True, eq=False)
class NeuronMap:
    """Which neurons were kept on a text.

    Attributes:
        names: dotted name of each layer's module.
        share: float32 ``[layers, tokens]``: share of the layer's neurons that the token kept; 1 in a dense layer.
        frequency: for each layer float32 ``[D]``: share of the tokens that kept the neuron.
    """

    names: tuple[str, ...]
    share: Tensor
    frequency: tuple[Tensor, ...]

    @property
    def kept(self) -> Tensor:
        """Share kept by layer, float32 ``[layers]``."""
        return self.share.mean(-1)

    def sorted_frequency(self, points: int = 64) -> Tensor:
        """Float32 ``[layers, points]``: each layer's frequencies from the busiest neuron to the rarest, at evenly spaced ranks.

        Layers of different sizes then have rows of one length.

        Raises:
            InputError: fewer than two points.
        """
        if points < 2:
            raise InputError(f"a curve needs at least two points, got {points}")
        curves = []
        for frequency in self.frequency:
            ranks = torch.linspace(0, len(frequency) - 1, points).round().long()
            curves.append(frequency.sort(descending=True).values[ranks])
        return torch.stack(curves)


def neuron_map(
    model: nn.Module, handle: ActivationHandle, tokens: Tensor, prompt: int = 0, part: Part = "mlp"
) -> NeuronMap:
    """Read a text under an attached activation method and note what it kept.

    Args:
        model: the model that `handle` is attached to.
        tokens: int64 ``[n]``.
        prompt: so many tokens come first as a prompt, for methods that learn from it; the map has none of them.
        part: the MLPs' neurons, or the input channels of the other linear layers that the method has rules for.

    The tokens after the prompt are read as one block in which each stands for a decode step.

    Raises:
        InputError: no such part on the handle, too short a text (a block has more than eight tokens), or a negative prompt.
    """
    run = handle.mlp if part == "mlp" else handle.channels
    if run is None:
        raise InputError(f"this handle has no {part}: the method leaves them alone, or was detached")
    count = len(tokens) - prompt if tokens.dim() == 1 else 0
    if prompt < 0 or count <= MAX_ROWS:
        raise InputError(f"a map needs tokens [n], at least {MAX_ROWS + 1} of them after the prompt of {prompt}")
    masks: list[list[Tensor]] = [[] for _ in run.meters]
    call: Any = model
    device = next(model.parameters()).device
    ids = tokens[None].to(device)
    with torch.no_grad():
        cache = GossamerCache(reserve=len(tokens)) if prompt else None
        if prompt:
            call(ids[:, :prompt], past_key_values=cache, use_cache=True)
        forced = TEACHER_FORCED.set(True)
        try:
            for meter, seen in zip(run.meters, masks, strict=True):
                meter.watch = seen.append
            call(ids[:, prompt:], past_key_values=cache, use_cache=bool(prompt))
        finally:
            TEACHER_FORCED.reset(forced)
            for meter in run.meters:
                meter.watch = None
    layers = [_mask(meter, seen, count) for meter, seen in zip(run.meters, masks, strict=True)]
    return NeuronMap(
        _names(model, run),
        torch.stack([mask.mean(1) for mask in layers]),
        tuple(mask.mean(0) for mask in layers),
    )


def _mask(meter: Meter, seen: list[Tensor], count: int) -> Tensor:
    """Float32 ``[tokens, D]``; a layer that counted nothing ran densely."""
    if not seen:
        return torch.ones(count, meter.size)
    return torch.cat(seen).float().cpu()


def _names(model: nn.Module, run: Any) -> tuple[str, ...]:
    if hasattr(run, "views"):
        return tuple(view.name for view in run.views)
    names = {module: name for name, module in model.named_modules()}
    return tuple(names[module] for module, _ in run.chosen)
