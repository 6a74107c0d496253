"""What activation methods are compared with: ReLU in the activation's place, each token's largest gates, and chance."""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field
from torch import nn

from gossamer.activations.base import ActivationHandle, ActivationMethod, device_of
from gossamer.calibration import Calibration
from gossamer.hf import FixedRules, NeuronPolicy, mlp_views
from gossamer.patterns import NeuronRule
from gossamer.registry import register


def kept_count(sparsity: float, neurons: int) -> int:
    """Neurons of D that a share to drop leaves.

    >>> kept_count(0.7, 128)
    38
    """
    return round((1 - sparsity) * neurons)


@register("relufication", slot="activations", family="activations", name="ReLUfication", baseline=True)
class ReLUfication(ActivationMethod):
    """The activation replaced by ReLU, whose exact zeros are skipped; the model is not trained for it.

    The share that is dropped can't be chosen, and models that were trained with another activation lose most of what they
    know. A baseline; ReLU models proper are trained (ProSparse).

    >>> from gossamer.models import tiny_model
    >>> model = tiny_model("llama")
    >>> with ReLUfication().attach(model) as handle:
    ...     _ = model(torch.arange(32)[None])
    ...     0.3 < handle.report()["neurons_kept"] < 0.7
    True
    """

    def neuron_policy(self, model: nn.Module, calibration: Calibration | None) -> NeuronPolicy:
        """What is not zero."""
        return FixedRules(NeuronRule(threshold=torch.zeros((), device=device_of(v.down))) for v in mlp_views(model))

    def attach(self, model: nn.Module, calibration: Calibration | None = None) -> ActivationHandle:
        """Put ReLU into every MLP and skip its zeros, until the handle puts the old activation back."""
        handle = super().attach(model, calibration)
        handle.undo[:0] = [view.replace_activation(nn.ReLU()) for view in mlp_views(model)]
        return handle

    @classmethod
    def with_share(cls, kept: float) -> Self:
        """The method as it is: the share that is measured tells."""
        return cls()


@register("top-k-neurons", slot="activations", family="activations", name="Top-k neurons", baseline=True)
class TopKNeurons(ActivationMethod):
    """For each token, the neurons with the largest gates: the same number in every layer and for every token.

    >>> TopKNeurons(sparsity=0.7).sparsity
    0.7
    """

    sparsity: float = Field(0.5, ge=0, le=1, description="share of neurons that each token drops")

    def neuron_policy(self, model: nn.Module, calibration: Calibration | None) -> NeuronPolicy:
        """A count of neurons."""
        return FixedRules(NeuronRule(count=kept_count(self.sparsity, view.neurons)) for view in mlp_views(model))


@register("random-neurons", slot="activations", family="activations", name="Random neurons", baseline=True)
class RandomNeurons(ActivationMethod):
    """The same neurons for every token, drawn at random in each layer: what a share of neurons is worth without choosing.

    A sparser draw of the same seed is part of a denser one. The gates of the others aren't read either.

    >>> RandomNeurons(sparsity=0.7, seed=1).seed
    1
    """

    sparsity: float = Field(0.5, ge=0, le=1, description="share of neurons that are left out")
    seed: int = Field(0, ge=0, description="of the draw")

    def neuron_policy(self, model: nn.Module, calibration: Calibration | None) -> NeuronPolicy:
        """The beginning of a shuffle of each layer's neurons."""
        generator = torch.Generator().manual_seed(self.seed)
        rules = []
        for view in mlp_views(model):
            chosen = torch.randperm(view.neurons, generator=generator)[: kept_count(self.sparsity, view.neurons)]
            rules.append(NeuronRule(indices=chosen.sort().values.to(device_of(view.down), torch.int32)))
        return FixedRules(rules)

    def io_bytes(self, channels: int, neurons: int, kept: float, element_size: int, gated: bool = True) -> float:
        """All matrices of a gated MLP are read in part."""
        return channels * element_size * (3 * kept if gated else neurons + kept)
