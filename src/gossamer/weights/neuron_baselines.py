"""One-shot structured pruning of MLPs by other scores: Magnitude-SP, Wanda-SP, FLAP. What CFSP is compared with.

    Magnitude-SP  ‖W_down[:, j]‖₂                        each MLP keeps the same share
    Wanda-SP      mean_i |W_down[i, j]| · ‖A_j‖          all compete, scores standardised in each MLP
    FLAP          Var(A_j) · ‖W_down[:, j]‖²             the same; what is cut is replaced by its mean, in a bias

Only MLPs are cut here; the originals of the last two also cut attention heads.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.models.reshaped import linear_weight
from gossamer.registry import register
from gossamer.weights.base import Applied, Progress, WeightMethod, parameter_count, silent
from gossamer.weights.neurons import (
    NeuronFacts,
    cut_neurons,
    global_widths,
    neuron_facts,
    ratio_for,
    rounded_width,
    top_neurons,
    views_of,
    width_facts,
)

Spread = Literal["uniform", "global"]


def magnitude_score(down: Tensor) -> Tensor:
    """Length of each neuron's output vector, float64 ``[n]``, of W_down ``[hidden, n]``.

    >>> magnitude_score(torch.tensor([[3.0, 1.0], [4.0, 0.0]])).tolist()
    [5.0, 1.0]
    """
    length: Tensor = torch.linalg.vector_norm(down.double(), dim=0)
    return length


def wanda_score(down: Tensor, norm: Tensor) -> Tensor:
    """``mean_i |W_ij| · ‖A_j‖``, float64 ``[n]``.

    >>> wanda_score(torch.tensor([[1.0, -2.0], [1.0, 0.0]]), torch.tensor([3.0, 5.0])).tolist()
    [3.0, 5.0]
    """
    return down.double().abs().mean(0) * norm.double().to(down.device)


def fluctuation_score(down: Tensor, variance: Tensor) -> Tensor:
    """``Var(A_j) · ‖W_ij‖²``, float64 ``[n]``.

    >>> fluctuation_score(torch.tensor([[3.0, 1.0], [4.0, 0.0]]), torch.tensor([2.0, 7.0])).tolist()
    [50.0, 7.0]
    """
    return variance.double().to(down.device) * down.double().square().sum(0)


class NeuronPruning(WeightMethod):
    """Base: a score for each neuron, and who competes."""

    sparsity: float = Field(0.2, ge=0, lt=1, description="share of the MLPs' neurons that goes")
    spread: Spread = Field("global", description="each MLP keeps the same share, or all compete after standardising")
    round_to: int = Field(1, ge=1, description="widths are multiples of this")

    def score(self, down: Tensor, facts: NeuronFacts | None) -> Tensor:
        """What each neuron is worth, ``[n]``."""
        raise NotImplementedError

    def compensation(self, down: Tensor, facts: NeuronFacts, gone: Tensor) -> Tensor | None:
        """What takes the place of the neurons ``gone`` (bool ``[n]``) in the MLP's output."""
        return None

    @classmethod
    def with_kept(cls, share: float, model: nn.Module) -> Self:
        """Only neurons go, so more of them than of the blocks' weights."""
        return cls(sparsity=ratio_for(model, share))

    def apply(self, model: nn.Module, tokens: Tensor | None = None, progress: Progress = silent) -> Applied:
        """See `WeightMethod.apply`."""
        views, parameters = views_of(model), parameter_count(model)
        facts: list[NeuronFacts | None] = [None] * len(views)
        if "calibration" in self.needs:
            facts = list(neuron_facts(model, self.text(tokens), progress=progress))
        downs, before = [linear_weight(view.down) for view in views], [view.neurons for view in views]
        scores = [self.score(down, fact) for down, fact in zip(downs, facts, strict=True)]
        exact = (
            [float(w) for w in global_widths(scores, self.sparsity)]
            if self.spread == "global"
            else [(1 - self.sparsity) * n for n in before]
        )
        kept = [
            top_neurons(s, rounded_width(width, s.numel(), self.round_to))
            for s, width in zip(scores, exact, strict=True)
        ]
        added = []
        for down, fact, ids in zip(downs, facts, kept, strict=True):
            gone = torch.ones(down.shape[1], dtype=torch.bool, device=down.device).index_fill(0, ids, False)
            extra = self.compensation(down, fact, gone) if fact is not None else None
            if extra is not None:
                added.append(extra)
        cut_neurons(model, kept, added or None)
        return Applied(model, width_facts(before, model, parameters))


@register("magnitude-sp", slot="weights", family="weights", name="Magnitude-SP", baseline=True)
class MagnitudeSP(NeuronPruning):
    """Cut the MLP neurons whose output vectors are shortest. Needs no text, and loses far more than the others.

    >>> from gossamer.models import tiny_model
    >>> MagnitudeSP(sparsity=0.25).apply(tiny_model("llama")).facts["widths"]
    [96, 96]
    """

    spread: Spread = Field("uniform", description="each MLP keeps the same share, or all compete after standardising")

    def score(self, down: Tensor, facts: NeuronFacts | None) -> Tensor:
        """``‖W_down[:, j]‖``."""
        return magnitude_score(down)


@register("wanda-sp", slot="weights", family="weights", name="Wanda-SP", baseline=True, needs=["calibration"])
class WandaSP(NeuronPruning):
    """Cut the MLP neurons of least weight times activation: Wanda's score (Sun et al., 2023), summed over a neuron's outputs.

    >>> from gossamer.models import tiny_model
    >>> WandaSP(sparsity=0.25, spread="uniform").apply(tiny_model("llama"), torch.arange(64).view(1, 64)).facts["widths"]
    [96, 96]
    """

    def score(self, down: Tensor, facts: NeuronFacts | None) -> Tensor:
        """``mean_i |W_ij| · ‖A_j‖``."""
        assert facts is not None
        return wanda_score(down, facts.norm)


@register("flap", slot="weights", family="weights", name="FLAP", baseline=True, needs=["calibration"])
class FLAP(NeuronPruning):
    """Cut the MLP neurons that fluctuate least, and put their means into a bias.

    An et al., 2024: "Fluctuation-based Adaptive Structured Pruning for Large Language Models". A neuron that always gives the
    same is replaced by a constant without loss.

    >>> from gossamer.models import tiny_model
    >>> model = FLAP(sparsity=0.25).apply(tiny_model("llama"), torch.arange(64).view(1, 64)).model
    >>> model.model.layers[0].mlp.down_proj.bias.shape
    torch.Size([64])
    """

    def score(self, down: Tensor, facts: NeuronFacts | None) -> Tensor:
        """``Var(A_j) · ‖W_ij‖²``."""
        assert facts is not None
        return fluctuation_score(down, facts.variance)

    def compensation(self, down: Tensor, facts: NeuronFacts, gone: Tensor) -> Tensor:
        """``W_down (mean A ⊙ gone)``."""
        return down.double() @ (facts.mean.to(down.device) * gone)
