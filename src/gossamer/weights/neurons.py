"""Structured pruning of MLPs: what each neuron does on text, and cutting neurons out for good. Shared by its methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from gossamer.errors import CalibrationError, InputError, ModelError
from gossamer.hf import Matrix, MLPView, block_list, blocks, matrices, mlp_views
from gossamer.models.reshaped import CLASSES, linear_weight, set_linear, settle
from gossamer.patterns import keep_largest
from gossamer.weights.base import Progress, silent

#: Takes the hidden states before and after a block, ``[tokens, hidden]``; returns one number per token.
Change = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class NeuronFacts:
    """What one MLP's neurons did, float64; ``[n]`` each.

    Attributes:
        norm: ``sqrt(Σ A² / sequences)`` of what `down` reads.
        mean, variance: of it over tokens.
        change: mean over tokens of how far the whole block changed the hidden state.
    """

    norm: Tensor
    mean: Tensor
    variance: Tensor
    change: float


def views_of(model: nn.Module) -> list[MLPView]:
    """One MLP for each block.

    Raises:
        ModelError: the family's widths can't be stored, or it has another number of MLPs.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in CLASSES or not hasattr(model, "lm_head"):
        raise ModelError(f"neurons of {kind} models cannot be cut: it takes a language model of {', '.join(CLASSES)}")
    views = mlp_views(model)
    if len(views) != len(block_list(model)[1]):
        raise ModelError(f"{kind} has {len(views)} MLPs in {len(block_list(model)[1])} blocks: one each is needed")
    return views


def neuron_facts(
    model: nn.Module, tokens: Tensor, change: Change = lambda x, y: x.new_zeros(len(x)), progress: Progress = silent
) -> list[NeuronFacts]:
    """One dense pass over token blocks int64 ``[sequences, length]``, block by block.

    Raises:
        CalibrationError: an activation is not finite.
    """
    found = []
    for view, stage in zip(views_of(model), blocks(model, tokens, progress), strict=True):
        sums = torch.zeros(2, view.neurons, dtype=torch.float64)

        def see(matrix: Matrix, x: Tensor, view: MLPView = view, sums: Tensor = sums) -> None:
            if matrix.module is view.down:
                wide = x.double()
                sums += torch.stack([wide.sum(0), wide.square().sum(0)]).to(sums.device)

        with stage.watching(see):
            stage.outputs = stage.run()
        count = tokens.numel()
        if not bool(sums.isfinite().all()):
            raise CalibrationError(f"activations of {view.name} are not finite: check the model's weights and the text")
        turns = [change(x[0].float(), y[0].float()) for x, y in zip(stage.inputs, stage.outputs, strict=True)]
        mean = sums[0] / count
        variance = (sums[1] / count - mean.square()).clamp(min=0)
        found.append(
            NeuronFacts((sums[1] / len(tokens)).sqrt(), mean, variance, float(torch.cat(turns).double().mean()))
        )
    return found


def ratio_for(model: nn.Module, share: float) -> float:
    """The share of all neurons that must go for the blocks' matrices to keep `share` of their entries.

    Raises:
        InputError: the MLPs do not hold so much.

    >>> from gossamer.models import tiny_model
    >>> round(ratio_for(tiny_model("llama"), 0.8), 3)
    0.3
    """
    found = matrices(model)
    inside = sum(m.weight.numel() for m in found)
    mlps = sum(m.weight.numel() for m in found if m.role in ("gate", "up", "gate_up", "down"))
    ratio = (1 - share) * inside / mlps if mlps else 1.0
    if not 0 <= ratio < 1:
        raise InputError(
            f"MLPs hold {mlps / inside:.0%} of the blocks' weights: cutting neurons cannot leave {share:.0%}"
        )
    return ratio


def rounded_width(exact: float, neurons: int, round_to: int) -> int:
    """The nearest multiple of `round_to`, at least one and at most all; with 1, ⌊exact⌋. All stays all.

    >>> rounded_width(1000.0, 1536, 128), rounded_width(10.0, 1536, 128), rounded_width(99.7, 100, 1)
    (1024, 128, 99)
    """
    if exact >= neurons - 1e-6:
        return neurons
    near = int(exact + 1e-6) if round_to == 1 else int((exact + round_to / 2) // round_to) * round_to
    return min(neurons, max(round_to, near))


def top_neurons(score: Tensor, count: int) -> Tensor:
    """Ids of the largest scores, ascending; of equal ones the earlier. int64 ``[count]``."""
    return keep_largest([score], score.numel() - count)[0].nonzero()[:, 0]


def global_widths(scores: Sequence[Tensor], ratio: float) -> list[int]:
    """How many neurons of each MLP stay when all compete after ``(score − mean) / std`` within their block."""
    standard = [(s.double() - s.double().mean()) / s.double().std().clamp(min=1e-12) for s in scores]
    masks = keep_largest(standard, round(ratio * sum(s.numel() for s in scores)))
    return [int(mask.sum()) for mask in masks]


@torch.no_grad()
def cut_neurons(model: nn.Module, kept: Sequence[Tensor], added: Sequence[Tensor] | None = None) -> None:
    """Keep only these neurons of each MLP, in place; the model then saves and loads with these widths.

    Where all MLPs stay equally wide the model remains the family's own, with another `intermediate_size`.

    Args:
        kept: ids for each MLP, int64, distinct.
        added: what each MLP's output gains from now on, ``[hidden]``, put into the bias of `down`.

    Raises:
        InputError: ids that are none, or not one list for each MLP.

    >>> from gossamer.models import tiny_model
    >>> model = tiny_model("llama")
    >>> cut_neurons(model, [torch.arange(100), torch.arange(90)])
    >>> [layer.mlp.down_proj.in_features for layer in model.model.layers]
    [100, 90]
    """
    views = views_of(model)
    if len(kept) != len(views) or (added is not None and len(added) != len(views)):
        raise InputError(f"{len(views)} MLPs need as many lists of neurons, got {len(kept)}")
    for view, ids in zip(views, kept, strict=True):
        if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= view.neurons or len(ids.unique()) != len(ids):
            raise InputError(f"{view.name}: keep one or more distinct neurons of 0 .. {view.neurons - 1}")
    for index, (view, ids) in enumerate(zip(views, kept, strict=True)):
        down: Any = view.down
        ids = ids.to(down.weight.device)
        sources = {id(m): m for m in (view.gate, view.up)}.values()
        rows = torch.cat([ids, ids + view.neurons]) if view.gated and view.gate is view.up else ids
        bias = down.bias
        if added is not None:
            gain = added[index].to(down.weight.device, torch.float64)
            bias = gain if bias is None else bias.double() + gain
        for source in sources:
            other = cast(Any, source).bias
            set_linear(source, linear_weight(source)[rows], None if other is None else other.detach()[rows])
        set_linear(down, linear_weight(down)[:, ids], None if bias is None else bias.detach())
    config = cast(Any, model).config
    widths = {len(ids) for ids in kept}
    if len(widths) == 1 and hasattr(config, "intermediate_size"):
        config.intermediate_size = widths.pop()
    settle(model)


def width_facts(before: Sequence[int], model: nn.Module, parameters: int) -> dict[str, Any]:
    """Facts that each of these methods gives: widths, share of the neurons that went, parameters before and after."""
    after = [view.neurons for view in views_of(model)]
    return {
        "widths": after,
        "neurons_removed": 1 - sum(after) / sum(before),
        "parameters": {"before": parameters, "after": sum(p.numel() for p in model.parameters())},
    }
