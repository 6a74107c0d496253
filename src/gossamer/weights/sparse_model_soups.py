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

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from gossamer.errors import InputError
from gossamer.models import block_batches, language_loss, token_loss, train
from gossamer.patterns import Masks, Scope
from gossamer.registry import register
from gossamer.weights.base import Applied, Progress, WeightMethod, copied, silent
from gossamer.weights.gradual import PruneRule, prune_retrain, remaining_shares
from gossamer.weights.sparse_model_soups_merge import (
    Score,
    distances,
    greedy_soup,
    parameter_vector,
    recalibrate_batchnorm,
    uniform_soup,
    validation_split,
)
from gossamer.weights.sparse_model_soups_retrain import Retraining, Schedule, adaptive_start


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

    >>> import torch
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
        before = [parameter_vector(model)]

        def phase_of(m: nn.Module, masks: Masks, phase: int) -> None:
            progress(f"phase {phase + 1} of {self.phases}", phase, self.phases)
            start = self.lr
            if self.schedule == "ALLR":
                q = 1 - (1 - self.sparsity) ** (1 / self.phases)
                start = adaptive_start(before[0], parameter_vector(m), q, self.lr, self.steps, self.total_steps)
            settings = self.settings_of(phase, start)
            facts = self.soup_of(m, masks, retrain, settings, score=score, inputs=inputs)
            before[0] = parameter_vector(m)
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
