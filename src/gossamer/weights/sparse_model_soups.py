"""Sparse Model Soups: prune, retrain copies under one mask, average them, and again (Zimmer et al., ICLR 2024).

    q = 1 − (1 − S)^(1/P)                 share of what remains that each of P phases removes
    phase:  M ← M ∧ largest (1 − q) of |θ|;   θ ← M ⊙ θ
            θ_j ← retrain(θ, setting j) under M, j = 1 … m;   θ ← merge(θ_1 … θ_m);   batch norms recalibrated

Copies of one pruned model share its zeros, so their average is as sparse as each of them, and better.

Decisions where the card leaves room:

* After phase p exactly round(s_p·N) weights are gone, s_p = 1 − (1 − q)^p; so a phase removes round(q·remaining) or one more or
  less, and rounding does not add up.
* The paper's values for varied weight decay, length and learning rate are not given: copy j has 2^(j − (m − 1)/2) times the
  setting's, so the middle one has it as it is.
* The running mean makes the average of equal models bit-equal to them.
* Batch norms see the recalibration batches one by one with equal weight; dropout stays off.

Not built: mixed precision (AMP) in the retrainings, and copies in parallel processes: they run one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gossamer.errors import InputError, ModelError
from gossamer.models import block_batches, language_loss, token_loss, train
from gossamer.patterns import Masks, Scope
from gossamer.registry import register
from gossamer.weights.base import Applied, Progress, WeightMethod, copied, silent
from gossamer.weights.gradual import PruneRule, prune_retrain, remaining_shares
from gossamer.weights.sparse_model_soups_retrain import Retraining, Schedule, adaptive_start

State = dict[str, Tensor]
#: Higher is better.
Score = Callable[[nn.Module], float]


def average(models: Iterable[nn.Module], masks: Masks | None = None) -> State:
    """The mean of models as a state: weights, biases, batch norms and their statistics; counters are the first one's.

    One model at a time, so an iterator needs the memory of one.

    Args:
        masks: applied to each model's values before; without it supports may differ, and the mean is then less sparse.

    Raises:
        ModelError: models of different shapes, or masks of another model.
        InputError: no model, or a value that is not finite.

    >>> one, two = nn.Linear(1, 1), nn.Linear(1, 1)
    >>> _ = one.weight.data.fill_(1.0), two.weight.data.fill_(3.0)
    >>> average([one, two])["weight"]
    tensor([[2.]])
    """
    mean: State = {}
    for count, model in enumerate(models, 1):
        state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        for name, mask in (masks or {}).items():
            if name not in state or state[name].shape != mask.shape:
                raise ModelError(f"these masks are of another model: {name} {list(mask.shape)} is not in this one")
            state[name].masked_fill_(~mask.to(state[name].device), 0)
        if count == 1:
            mean = state
        if set(state) != set(mean) or any(state[n].shape != mean[n].shape for n in mean):
            raise ModelError("models of different shapes cannot be averaged")
        for name, value in state.items():
            if value.is_floating_point():
                if not bool(value.isfinite().all()):
                    raise InputError(f"model {count} of the soup has values that are not finite in {name}")
                mean[name] += (value - mean[name]) / count
    if not mean:
        raise InputError("a soup needs one model or more")
    return mean


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, inputs: Sequence[Any], fraction: float = 0.2) -> None:
    """Measure batch-norm statistics anew over the first share of these inputs; a model without them is left alone.

    Args:
        inputs: what the model takes, batch by batch, not shuffled.
        fraction: of the batches, rounded up.

    Raises:
        InputError: there are batch norms and no inputs, or a share out of range.

    >>> norm = nn.BatchNorm1d(1)
    >>> recalibrate_batchnorm(norm, [torch.tensor([[1.0], [3.0]])], 1.0)
    >>> norm.running_mean
    tensor([2.])
    """
    norms = cast("list[Any]", _batch_norms(model))
    if not norms:
        return
    if not len(inputs) or not 0 < fraction <= 1:
        raise InputError(f"batch norms need inputs to be recalibrated on, and a share in 0 .. 1; got {fraction:g}")
    momentum, training = [norm.momentum for norm in norms], model.training
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
        norm.train()
    for batch in inputs[: math.ceil(fraction * len(inputs))]:
        model(batch)
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value
    model.train(training)


@dataclass(frozen=True)
class Soup:
    """A merge: the state, which candidates are in it, and its score where there is one."""

    state: State
    kept: tuple[int, ...]
    score: float | None = None


def uniform_soup(candidates: Sequence[nn.Module], masks: Masks | None = None) -> Soup:
    """The mean of all.

    >>> uniform_soup([nn.Linear(1, 1), nn.Linear(1, 1)]).kept
    (0, 1)
    """
    return Soup(average(candidates, masks), tuple(range(len(candidates))))


def greedy_soup(
    candidates: Sequence[nn.Module],
    score: Score,
    masks: Masks | None = None,
    recalibrate: Callable[[nn.Module], None] = lambda model: None,
) -> Soup:
    """From the best candidate on, each next one joins if the mean with it scores at least as well as the best so far.

    Args:
        score: on validation data, not test data.
        recalibrate: of batch norms; done to each trial, as to the candidates.

    Raises:
        InputError: no candidates.

    >>> one, two = nn.Linear(1, 1), nn.Linear(1, 1)
    >>> _ = one.weight.data.fill_(1.0), two.weight.data.fill_(2.0)
    >>> greedy_soup([one, two], lambda m: m.weight.item()).kept
    (1,)
    """
    scores = [score(candidate) for candidate in candidates]
    order = sorted(range(len(candidates)), key=lambda i: (-scores[i], i))
    if not order:
        raise InputError("a soup needs one model or more")
    kept, best = [order[0]], scores[order[0]]
    state, trial = average([candidates[kept[0]]], masks), copied(candidates[kept[0]])
    for i in order[1:]:
        trial.load_state_dict(average([candidates[j] for j in (*kept, i)], masks))
        recalibrate(trial)
        now = score(trial)
        if now >= best:
            kept, best = [*kept, i], now
            state = {name: value.detach().clone() for name, value in trial.state_dict().items()}
    return Soup(state, tuple(kept), best)


def average_and_reprune(models: Sequence[nn.Module], sparsity: float, rule: PruneRule | None = None) -> Masks:
    """The baseline of independent runs: the first model becomes the mean of all, and is pruned to the sparsity again.

    >>> models = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)) for _ in range(2)]
    >>> average_and_reprune(models, 0.5).sparsity
    0.5
    """
    models[0].load_state_dict(average(models))
    masks = (PruneRule() if rule is None else rule).masks(models[0], sparsity)
    masks.apply(models[0])
    return masks


def distances(models: Sequence[nn.Module]) -> dict[str, float]:
    """Whether candidates lie in one basin: L2 between pairs, the angle of pairs in degrees, and L2 to their barycentre.

    >>> one, two = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    >>> _ = one.weight.data.copy_(torch.tensor([[3.0, 0.0]])), two.weight.data.copy_(torch.tensor([[0.0, 4.0]]))
    >>> found = distances([one, two])
    >>> found["l2_max"], round(found["angle_max"], 3), found["centre_max"]
    (5.0, 90.0, 2.5)
    """
    vectors = torch.stack([_vector(model) for model in models])
    centre = (vectors - vectors.mean(0)).norm(dim=1)
    pairs = [(i, j) for i in range(len(models)) for j in range(i)]
    l2 = [float((vectors[i] - vectors[j]).norm()) for i, j in pairs]
    cosines = [float((vectors[i] @ vectors[j]) / (vectors[i].norm() * vectors[j].norm())) for i, j in pairs]
    angles = [math.degrees(math.acos(max(-1.0, min(1.0, c)))) for c in cosines]
    return {
        "l2_mean": sum(l2) / max(1, len(l2)),
        "l2_max": max(l2, default=0.0),
        "angle_mean": sum(angles) / max(1, len(angles)),
        "angle_max": max(angles, default=0.0),
        "centre_min": float(centre.min()),
        "centre_max": float(centre.max()),
    }


def _vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def ensemble(models: Sequence[nn.Module], inputs: Any) -> Tensor:
    """Mean probabilities of classifiers ``[batch, classes]``: what averaging predictions, at m times the cost, would give.

    >>> tuple(ensemble([nn.Linear(2, 3), nn.Linear(2, 3)], torch.ones(4, 2)).shape)
    (4, 3)
    """
    with torch.no_grad():
        return torch.stack([model(inputs).softmax(-1) for model in models]).mean(0)


def classifier_report(probabilities: Tensor, labels: Tensor, bins: int = 15) -> dict[str, float]:
    """Accuracy, that of the worst class, and calibration error, expected (ECE) and largest (MCE) over bins of confidence.

    >>> p = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
    >>> {k: round(v, 3) for k, v in classifier_report(p, torch.tensor([0, 1])).items()}
    {'accuracy': 0.5, 'worst_class': 0.0, 'ece': 0.35, 'mce': 0.6}
    """
    if probabilities.dim() != 2 or len(probabilities) != len(labels) or not len(labels):
        raise InputError(f"a report needs probabilities [n, classes] and n labels, got {list(probabilities.shape)}")
    confidence, guess = probabilities.max(1)
    right = (guess == labels).float()
    which = (confidence * bins).ceil().long().clamp(1, bins)
    gaps, weights = [], []
    for b in which.unique():
        inside = which == b
        gaps.append(abs(float(right[inside].mean() - confidence[inside].mean())))
        weights.append(int(inside.sum()) / len(labels))
    return {
        "accuracy": float(right.mean()),
        "worst_class": min(float(right[labels == c].mean()) for c in labels.unique()),
        "ece": sum(g * w for g, w in zip(gaps, weights, strict=True)),
        "mce": max(gaps),
    }


def validation_split(count: int, share: float = 0.1, seed: int = 42) -> tuple[Tensor, Tensor]:
    """Indices for training and for validation, disjoint; at least one each.

    >>> [len(part) for part in validation_split(50)]
    [45, 5]
    """
    held = max(1, round(share * count))
    if held >= count:
        raise InputError(f"{count} examples are too few to hold {share:g} of them out")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[held:].sort().values, order[:held].sort().values


@dataclass(frozen=True)
class Setting:
    """How one copy is retrained: exactly one thing differs between copies. `lr` is the value that the schedule starts at."""

    seed: int
    weight_decay: float
    steps: int
    lr: float


#: Retrains a model in place under the masks.
Retrain = Callable[[nn.Module, Masks, Setting], None]


@register("sparse-model-soups", slot="weights", family="weights", needs=["training"])
class SparseModelSoups(WeightMethod):
    """Prune in phases; in each, retrain several copies of the pruned model and go on with their average.

    Averaging models that were pruned separately destroys their zeros. Copies of one pruned model, retrained under its mask
    with another seed (or weight decay, length, learning rate), have the same zeros and lie in one basin: their mean is exactly as
    sparse as each, generalises better, and costs no more at inference.

    Use it where a dense model can be retrained: training costs `copies` times the retraining of plain iterative pruning
    (`copies` 1). A uniform soup takes all; a greedy one, the better choice where copies are of unequal quality, takes what helps
    on held-out data. Watch `distances` in the facts: a large learning rate can drive copies apart.

    `apply` prunes a language model and retrains it with AdamW on the token blocks that are given, a tenth of them held out for
    validation; the paper's optimizer is SGD, which its classifiers use. `run` takes any model and your own retraining: see
    `sparse_model_soups_retrain.retrainer` for classifiers with SGD, and `soup_of` for one phase alone, as in methods that
    prune while they train.

    Zimmer, Spiegel, Pokutta, 2024: "Sparse Model Soups: A Recipe for Improved Pruning via Model Averaging".

    >>> from gossamer.models import tiny_model
    >>> method = SparseModelSoups(sparsity=0.75, phases=2, copies=2, steps=2, batch=2)
    >>> applied = method.apply(tiny_model("llama"), torch.arange(128).view(8, 16))
    >>> [round(phase["sparsity"], 2) for phase in applied.facts["phases"]]
    [0.5, 0.75]
    """

    sparsity: float = Field(0.9, ge=0, lt=1, description="share of the prunable weights that is gone at the end")
    phases: int = Field(3, ge=1, description="P, prune-retrain cycles")
    copies: int = Field(3, ge=1, description="m, retrainings averaged in each")
    vary: Literal["seed", "weight_decay", "length", "lr"] = Field("seed", description="what differs between copies")
    merge: Literal["uniform", "greedy"] = Field("uniform", description="all copies, or those that help")
    criterion: Literal["magnitude", "random"] = Field("magnitude", description="what goes")
    scope: Scope = Field("global", description="who competes: global, matrix or erk")
    schedule: Schedule = Field("LLR", description="learning rate of a retraining: FT, LRW, SLR, CLR, LLR or ALLR")
    steps: int = Field(200, ge=1, description="T_r, of one retraining")
    total_steps: int = Field(2000, ge=1, description="T, of the dense training (for LRW, SLR and ALLR)")
    batch: int = Field(16, ge=1, description="token blocks a step")
    lr: float = Field(1e-3, gt=0, description="largest learning rate of the dense training")
    min_lr: float = Field(1e-5, gt=0, description="its smallest")
    weight_decay: float = Field(0.0, ge=0, description="of the optimizer")
    bn_fraction: float = Field(0.2, gt=0, le=1, description="share of the batches that batch norms are recalibrated on")
    seed: int = Field(0, ge=0, description="of the first copy")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr is larger than lr {self.lr:g}")
        if self.schedule == "FT" and self.vary == "lr":
            raise ValueError("FT trains at min_lr, so a varied lr would change nothing")
        return self

    def settings_of(self, phase: int, lr: float | None = None) -> list[Setting]:
        """Of the copies of a phase.

        >>> [s.steps for s in SparseModelSoups(vary="length", copies=3, steps=100).settings_of(0)]
        [50, 100, 200]
        """
        base = Setting(self.seed + 1000 * phase, self.weight_decay, self.steps, self.lr if lr is None else lr)
        found = []
        for j in range(self.copies):
            factor = 2.0 ** (j - (self.copies - 1) / 2)
            values = asdict(base)
            if self.vary == "seed":
                values["seed"] += j
            elif self.vary == "weight_decay":
                values["weight_decay"] *= factor
            elif self.vary == "length":
                values["steps"] = max(1, round(base.steps * factor))
            else:
                values["lr"] *= factor
            found.append(Setting(**values))
        return found

    def plan(self, setting: Setting) -> Retraining:
        """The learning rates of one retraining."""
        return Retraining(
            steps=setting.steps,
            lr=setting.lr,
            weight_decay=setting.weight_decay,
            schedule=self.schedule,
            low=min(self.min_lr, setting.lr),
            total_steps=self.total_steps,
        )

    def soup_of(
        self,
        model: nn.Module,
        masks: Masks,
        retrain: Retrain,
        settings: Sequence[Setting],
        *,
        score: Score | None = None,
        inputs: Sequence[Any] = (),
    ) -> dict[str, Any]:
        """One phase without its pruning: copies are retrained and merged into `model`, which is pruned already.

        Returns the facts: settings, scores of candidates and soup, which were kept, and `distances`.

        Raises:
            InputError: greedy without a score.
        """
        if self.merge == "greedy" and score is None:
            raise InputError("a greedy soup needs a score on validation data")

        def recalibrate(m: nn.Module) -> None:
            recalibrate_batchnorm(m, inputs, self.bn_fraction)

        candidates = []
        for setting in settings:
            candidate = copied(model)
            retrain(candidate, masks, setting)
            masks.apply(candidate)
            recalibrate(candidate)
            candidates.append(candidate.eval())
        if self.merge == "greedy":
            assert score is not None
            soup = greedy_soup(candidates, score, masks, recalibrate)
        else:
            soup = uniform_soup(candidates, masks)
        model.load_state_dict(soup.state)
        recalibrate(model)
        model.eval()
        facts: dict[str, Any] = {
            "settings": [asdict(s) for s in settings],
            "kept": list(soup.kept),
            "distances": distances(candidates),
        }
        if score is not None:
            scores = [score(candidate) for candidate in candidates]
            facts |= {
                "scores": scores,
                "mean": sum(scores) / len(scores),
                "best": max(scores),
                "soup": score(model),
            }
        return facts

    def run(
        self,
        model: nn.Module,
        retrain: Retrain,
        *,
        score: Score | None = None,
        inputs: Sequence[Any] = (),
        include: Callable[[str], bool] | None = None,
        after_phase: Callable[[nn.Module, int], None] = lambda model, phase: None,
        progress: Progress = silent,
    ) -> Applied:
        """All phases, in place, on any model.

        Args:
            retrain: trains a copy in place under masks with a setting.
            score: on validation data, higher is better; needed for greedy soups.
            inputs: training inputs in their order, for batch norms.
            include: what is pruned, by parameter name (default: the blocks of a transformers model; of another model
                every linear and convolution).
            after_phase: sees the soup of each phase.

        Raises:
            InputError: greedy without a score, or batch norms without inputs.
        """
        if include is None and not hasattr(model, "config"):
            include = _everything
        shares = remaining_shares(self.sparsity, self.phases)
        phases: list[dict[str, Any]] = []
        before = [_vector(model)]

        def phase_of(m: nn.Module, masks: Masks, phase: int) -> None:
            progress(f"phase {phase + 1} of {self.phases}", phase, self.phases)
            start = self.lr
            if self.schedule == "ALLR":
                q = 1 - (1 - self.sparsity) ** (1 / self.phases)
                start = adaptive_start(before[0], _vector(m), q, self.lr, self.steps, self.total_steps)
            settings = self.settings_of(phase, start)
            facts = self.soup_of(m, masks, retrain, settings, score=score, inputs=inputs)
            before[0] = _vector(m)
            phases.append({"sparsity": masks.sparsity, **facts})
            after_phase(m, phase)

        masks = prune_retrain(model, shares, phase_of, PruneRule(self.criterion, "element", self.scope, include))[-1]
        facts = {"sparsity": masks.sparsity, "prunable": masks.total, "kept": masks.kept, "phases": phases}
        return Applied(model, facts, masks)

    def apply(self, model: nn.Module, tokens: Tensor | None = None, progress: Progress = silent) -> Applied:
        """See `WeightMethod.apply`; the text is trained on, a tenth of its blocks scores. Scores are minus nats a token."""
        text = self.text(tokens)
        rows, held = validation_split(len(text))

        def retrain(m: nn.Module, masks: Masks, setting: Setting) -> None:
            batches = block_batches(text[rows], self.batch, setting.steps, setting.seed)
            train(m, batches, self.plan(setting), masks=masks, loss=language_loss, progress=progress)

        return self.run(model, retrain, score=lambda m: -token_loss(m, text[held]), progress=progress)


def _everything(name: str) -> bool:
    return True
