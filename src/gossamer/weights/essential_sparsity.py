"""Essential sparsity: the share of a checkpoint's smallest weights that costs nothing (Jaiswal et al., NeurIPS 2023).

    one-shot magnitude pruning:  of all |w| in the blocks' matrices together the round(s·N) smallest go
    s is essential if            E(m ⊙ θ) >= E(θ) − ε   and   E(P_ρ(m) ⊙ θ) < E(θ) − ε

The curve of quality over sparsity is flat, then turns down; the turn is found on a grid and, if wanted, between two of its
points by bisection. Masks come from the checkpoint alone, are the same for every task, and are nested.

Decisions where the card leaves room:

* Random pruning with ERK densities draws exact counts, not Bernoulli entries, so that arms at one s remove as many weights.
* "Zero" in the emergence monitor is |w| < τ with τ = 1e-3 of the matrix's standard deviation when watching began; exact zeros
  are counted beside it. The paper gives no threshold.
* Lottery tickets remove a tenth of the original count in each round (the paper gives no number).
* On text, quality is perplexity and ε is relative: ppl <= (1 + ε) · ppl₀. Scores of tasks use the paper's absolute ε.

Not built: the paper's BERT, ViT and MMLU runs with their data sets; the functions take any model and any evaluation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from gossamer.errors import InputError, ModelError
from gossamer.models import token_loss
from gossamer.patterns import Masks, Scope, Structure
from gossamer.registry import register
from gossamer.weights.base import Applied, Progress, WeightMethod, copied, silent
from gossamer.weights.essential_sparsity_study import layer_profile, storage_bytes
from gossamer.weights.gradual import PruneRule

#: Prunes a model in place at a sparsity (or in an N:M structure) and returns where it did.
Prune = Callable[[nn.Module, "float | str"], Masks]


def magnitude_mask(
    model: nn.Module,
    sparsity: float = 0.5,
    *,
    scope: Scope = "global",
    structure: str = "element",
    include: Callable[[str], bool] | None = None,
) -> Masks:
    """What one-shot magnitude pruning leaves of a checkpoint, which is not changed.

    Args:
        sparsity: share of the prunable weights; exactly round(s·N) go, the later of equal ones first. N:M has its own.
        scope: one ranking (`global`, the paper's), or one for each matrix, at the same share or by its shape (`erk`).
        structure: element or N:M (of M consecutive inputs the N largest stay).
        include: which matrices, by parameter name (default: those of the blocks).

    Raises:
        InputError: a share out of range, an unknown name, or a weight that is NaN.

    >>> from gossamer.models import tiny_model
    >>> magnitude_mask(tiny_model("llama"), 0.25).sparsity
    0.25
    """
    share = sparsity if Structure.parse(structure).kind == "element" else sparsity_of(structure)
    return PruneRule("magnitude", structure, scope, include).masks(model, share)


def magnitude_prune(model: nn.Module, point: float | str) -> Masks:
    """Prune in place at a sparsity, or in an N:M structure given as text: the default of `sparsity_curve`.

    >>> from gossamer.models import tiny_model
    >>> magnitude_prune(tiny_model("llama"), "1:4").sparsity
    0.75
    """
    share = sparsity_of(point)
    masks = magnitude_mask(model, share, structure=point if isinstance(point, str) else "element")
    masks.apply(model)
    return masks


def sparsity_of(point: float | str) -> float:
    """Of a point of a grid: itself, or 1 − N/M.

    >>> sparsity_of("1:4"), sparsity_of(0.3)
    (0.75, 0.3)
    """
    if not isinstance(point, str):
        if not 0 <= point < 1:
            raise InputError(f"a point of a sparsity grid lies in 0 .. 1, got {point:g}")
        return point
    form = Structure.parse(point)
    if form.kind != "n:m":
        raise InputError(f"a point of a sparsity grid is a share or N:M, got {point!r}")
    return 1 - form.n / form.m


@dataclass(frozen=True)
class Point:
    """One point of a curve: its sparsity, the score of each seed, and what was asked for (a share or N:M)."""

    sparsity: float
    scores: tuple[float, ...]
    asked: float | str

    @property
    def score(self) -> float:
        """Mean over the seeds."""
        return sum(self.scores) / len(self.scores)


@dataclass(frozen=True)
class Essential:
    """Where a curve turns down.

    Attributes:
        sparsity: the essential sparsity; None if quality never fell.
        searched: the largest sparsity that was looked at.

    >>> str(Essential(0.3, 0.5)), str(Essential(None, 0.5))
    ('0.3', '> 0.5')
    """

    sparsity: float | None
    searched: float

    def __str__(self) -> str:
        return f"> {self.searched:g}" if self.sparsity is None else f"{self.sparsity:g}"


def essential_sparsity(grid: Sequence[float], scores: Sequence[float], epsilon: float = 1.0) -> Essential:
    """The largest sparsity up to which no score is more than ε below the first, and after which the next one is.

    Args:
        grid: sparsities, rising from 0.
        scores: E at each, higher is better.
        epsilon: in the scores' unit.

    Raises:
        InputError: a grid that does not rise from 0, another number of scores, or a dense score that is not finite.

    >>> str(essential_sparsity([0, 0.1, 0.2, 0.3, 0.4, 0.5], [0, 0, -0.5, -0.9, -3, -10]))
    '0.3'
    """
    if not grid or len(grid) != len(scores) or grid[0] != 0 or any(a >= b for a, b in itertools.pairwise(grid)):
        raise InputError(f"a curve needs a score for each sparsity of a grid that rises from 0, got {list(grid)}")
    if not math.isfinite(scores[0]) or not epsilon >= 0:
        raise InputError(f"a turn needs a finite dense score and epsilon >= 0, got {scores[0]}, {epsilon}")
    for before, score in zip(grid, scores[1:], strict=False):
        if not score >= scores[0] - epsilon:  # a NaN is a drop
            return Essential(before, grid[-1])
    return Essential(None, grid[-1])


def sparsity_curve(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    grid: Sequence[float | str],
    *,
    prune: Prune = magnitude_prune,
    finetune: Callable[[nn.Module, Masks, int], None] | None = None,
    seeds: Sequence[int] = (0,),
    progress: Progress = silent,
) -> list[Point]:
    """Quality at each sparsity: a fresh copy is pruned, fine-tuned under its masks if asked, and evaluated. The model stays.

    Args:
        evaluate: higher is better.
        grid: sparsities from 0 on (0 is run with the same fine-tuning), or N:M structures, each once.
        prune: another way to prune, as SparseGPT: ``lambda m, s: SparseGPT(sparsity=s).apply(m, tokens).masks``.
        finetune: trains the copy in place under the masks, with a seed; they are applied again after it.
        seeds: of the fine-tuning; three or more where ε is within the noise of seeds.

    Raises:
        InputError: a point that is no share and no N:M.

    >>> from gossamer.models import tiny_model
    >>> curve = sparsity_curve(tiny_model("llama"), lambda m: 1 - Masks.of(m).sparsity, [0.0, 0.5, "1:4"])
    >>> [point.sparsity for point in curve]
    [0.0, 0.5, 0.75]
    """
    points = sorted(grid, key=sparsity_of)
    curve: list[Point] = []
    for asked in points:
        scores = []
        for seed in seeds:
            progress(f"sparsity {asked}", len(curve), len(points))
            copy = copied(model)
            masks = prune(copy, asked)
            if finetune is not None:
                finetune(copy, masks, seed)
                masks.apply(copy)
            scores.append(evaluate(copy))
            if finetune is None:
                break  # nothing depends on the seed
        curve.append(Point(sparsity_of(asked), tuple(scores), asked))
    return curve


def refined(
    curve: Sequence[Point], score: Callable[[float], float], epsilon: float, resolution: float
) -> tuple[Essential, list[Point]]:
    """The turn of a curve to a finer resolution than its grid: bisection between the last good point and the first bad one.

    Takes it that quality falls once between the two. Returns the turn and the curve with the new points.

    >>> curve = [Point(s, (-(10 * s) ** 2,), s) for s in (0.0, 0.1, 0.2)]
    >>> turn, _ = refined(curve, lambda s: -((10 * s) ** 2), epsilon=1.44, resolution=0.02)
    >>> str(turn)
    '0.1125'
    """
    points = list(curve)
    turn = essential_sparsity([p.sparsity for p in points], [p.score for p in points], epsilon)
    if turn.sparsity is None:
        return turn, points
    low = turn.sparsity
    high = min(p.sparsity for p in points if p.sparsity > low)
    while high - low > resolution:
        middle = (low + high) / 2
        points.append(Point(middle, (score(middle),), middle))
        if points[-1].score >= points[0].score - epsilon:
            low = middle
        else:
            high = middle
    return Essential(low, turn.searched), sorted(points, key=lambda p: p.sparsity)


@register("essential-sparsity", slot="weights", family="weights", needs=["calibration"])
class EssentialSparsity(WeightMethod):
    """Remove the smallest weights of a checkpoint in one shot: as many as cost nothing, or as many as asked.

    Pretrained transformers lose a share of their smallest weights for free; beyond a turning point quality drops sharply. With
    `sparsity` left open the turn is found on the text that is given: perplexity over a grid of sparsities, then bisection
    down to `resolution`; what is removed is the largest share whose perplexity stays within ``1 + epsilon`` of the dense
    one's. With a number, or an N:M structure, no text is needed and pruning takes seconds.

    Use it as the free baseline that any other pruning must beat, and to see how prunable a checkpoint is. It makes zeros, not
    speed: that comes with sparse kernels, and 2:4 hardware for N:M. The turn of a model that is evaluated as it is comes much
    earlier than the paper's 30 to 50 %, which are after fine-tuning: some 20 % for small, heavily trained decoders. The search
    runs the text once for each point, on a copy of the model.

    Jaiswal, Liu, Chen, Wang, 2023: "The Emergence of Essential Sparsity in Large Pre-trained Models: The Weights that Matter".
    `sparsity_curve` takes fine-tuning or another pruner; `essential_sparsity_study` has `lottery_ticket`, `mask_similarity`,
    `layer_profile` and `ZeroWeightMonitor`.

    >>> from gossamer.models import tiny_model
    >>> round(EssentialSparsity(sparsity=0.3).apply(tiny_model("llama")).facts["sparsity"], 3)
    0.3
    """

    sparsity: float | None = Field(None, ge=0, lt=1, description="share to remove; none: found on the text")
    structure: str = Field("element", pattern=r"^(element|[1-9]\d*:[1-9]\d*)$", description="element or N:M")
    scope: Scope = Field("global", description="who competes: global (the paper's), matrix or erk")
    epsilon: float = Field(0.01, ge=0, description="of the search: relative growth of perplexity that is no loss")
    step: float = Field(0.1, gt=0, lt=1, description="of the search's grid")
    limit: float = Field(0.9, gt=0, lt=1, description="the largest sparsity searched")
    resolution: float = Field(
        0.025, gt=0, description="the search goes on by bisection until the turn is known so well"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        try:
            form = Structure.parse(self.structure)
        except InputError as error:
            raise ValueError(str(error)) from None
        if form.kind == "n:m" and self.sparsity is not None:
            raise ValueError("N:M has its sparsity in itself: leave sparsity out")
        return self

    def masks(self, model: nn.Module, sparsity: float) -> Masks:
        """What stays at a sparsity, without changing the model."""
        return magnitude_mask(model, sparsity, scope=self.scope, structure=self.structure)

    def apply(self, model: nn.Module, tokens: Tensor | None = None, progress: Progress = silent) -> Applied:
        """See `WeightMethod.apply`; the text is needed where the turn is to be found.

        Raises:
            InputError: no sparsity, no N:M and no text.
        """
        found: dict[str, Any] = {}
        if self.structure != "element":
            share = sparsity_of(self.structure)
        elif self.sparsity is not None:
            share = self.sparsity
        else:
            share, found = self._search(model, self.text(tokens), progress)
        masks = self.masks(model, share)
        masks.apply(model)
        profile = layer_profile(model, masks)
        facts = {
            "sparsity": masks.sparsity,
            "prunable": masks.total,
            "kept": masks.kept,
            "share_of_parameters": (masks.total - masks.kept) / sum(p.numel() for p in model.parameters()),
            "by_role": profile["by_role"],
            "by_layer": profile["by_layer"],
            "storage": storage_bytes(masks, self.structure, next(iter(masks.parameters(model)))[0].element_size()),
            **found,
        }
        return Applied(model, facts, masks)

    def _search(self, model: nn.Module, tokens: Tensor, progress: Progress) -> tuple[float, dict[str, Any]]:
        """The turn on this text: the grid up to the first point that costs too much, then bisection."""

        def loss(share: float) -> float:
            copy = copied(model)
            self.masks(copy, share).apply(copy)
            return -token_loss(copy, tokens)

        dense = -token_loss(model, tokens)
        if not math.isfinite(dense):
            raise ModelError("the model's perplexity on this text is not finite: check its weights")
        curve, allowed = [Point(0.0, (dense,), 0.0)], math.log1p(self.epsilon)
        while curve[-1].score >= dense - allowed and curve[-1].sparsity + self.step <= self.limit + 1e-9:
            share = round(len(curve) * self.step, 9)
            progress("searching the turn", len(curve), round(self.limit / self.step))
            curve.append(Point(share, (loss(share),), share))
        turn, curve = refined(curve, loss, allowed, self.resolution)
        points = [{"sparsity": p.sparsity, "perplexity": math.exp(-p.score)} for p in curve]
        return (
            turn.searched if turn.sparsity is None else turn.sparsity,
            {"essential_sparsity": str(turn), "epsilon": self.epsilon, "curve": points},
        )
