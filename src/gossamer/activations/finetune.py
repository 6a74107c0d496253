"""Fine-tuning under a hard mask: the model learns to do without what its thresholds drop (CATS, section on fine-tuning).

The mask is applied in the forward pass. What it drops gives no gradient to its gate (no straight-through estimator), and the
thresholds stay as they were calibrated. By LoRA, merged afterwards, or in full.

    training, calibration = finetune(model, method, calibration, batches, Plan(steps=350, lr=1e-5, weight_decay=0.01))

Two extras of the released code, off by default: a penalty on activations just above and below the threshold, and a warm-up
that raises the thresholds by halves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.activations.base import ActivationMethod, Progress
from gossamer.calibration import Calibration
from gossamer.errors import InputError
from gossamer.hf import FixedRules
from gossamer.models import LoRA, Plan, Training, adapted, fingerprint, train
from gossamer.patterns import NeuronRule

#: Activations below this many times their threshold are penalised.
NEAR = 1.2


def near_threshold(a: Tensor, threshold: Tensor, norm: Literal["l1", "l2"]) -> Tensor:
    """Mean over all entries of |a| (l1) or a² (l2) where ``|a| < 1.2 threshold``; a scalar.

    >>> near_threshold(torch.tensor([1.0, -1.1, 3.0]), torch.tensor(1.0), "l1")
    tensor(0.7000)
    """
    size = a.abs() if norm == "l1" else a.square()
    return torch.where(a.abs() < NEAR * threshold, size, 0).mean()


def warmup_factor(step: int, length: int) -> float:
    """What thresholds are multiplied by at this step: 0.5 for `length` steps, then 1; 1 without a warm-up.

    >>> [warmup_factor(step, 40) for step in (0, 39, 40, 500)]
    [0.5, 0.5, 1.0, 1.0]
    """
    return min(1.0, 0.5 * (1 + step // length)) if length else 1.0


@dataclass(frozen=True, eq=False)
class _SeenRule(NeuronRule):
    """A rule that hands the activations that it judges to a list."""

    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def mask(self, a: Tensor) -> Tensor:
        """As before."""
        assert self.threshold is not None
        self.seen.append((a, self.threshold))
        return super().mask(a)


def finetune(
    model: nn.Module,
    method: ActivationMethod,
    calibration: Calibration,
    batches: Iterable[Tensor],
    plan: Plan,
    lora: LoRA | None = LoRA(),  # noqa: B008 (a value)
    *,
    penalty: float = 0.0,
    norm: Literal["l1", "l2"] = "l2",
    warmup: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> tuple[Training, Calibration]:
    """Train a model under a method's thresholds, in place.

    Args:
        model: a causal language model.
        method: one that keeps what exceeds thresholds, and its `calibration` on this model.
        batches: int64 ``[batch, tokens + 1]``, one for each step.
        plan: steps, learning rate and the like (paper: AdamW, 1e-5, weight decay 0.01, 350 to 1350 steps of 16 x 1024).
        lora: adapters to train, merged at the end; None trains the whole model.
        penalty: weight of `near_threshold` by `norm`, summed over layers, in the loss.
        warmup: steps with half the thresholds.

    Returns:
        The curve, and the calibration with the same thresholds for the model that was made.

    Raises:
        InputError: the method has no thresholds, or the loss is not finite.
        CalibrationError: the calibration does not fit.
        ModelError: no layer has a name that `lora` targets.
    """
    masked = method.model_copy(update={"mode": "mask", "int8": False})
    with masked.attach(model, calibration) as handle:
        rules: list[NeuronRule | None] = []
        policy = handle.mlp.policy if handle.mlp is not None else None
        if isinstance(policy, FixedRules):
            rules = policy.rules
        thresholds = [rule.threshold for rule in rules if rule is not None and rule.threshold is not None]
        if not thresholds or len(thresholds) != len(rules):
            raise InputError(f"{method.slug} has no thresholds of neurons to train under")
        seen: list[tuple[Tensor, Tensor]] = []

        def scale(step: int) -> None:
            factor = warmup_factor(step, warmup)
            for i, t in enumerate(thresholds):
                rules[i] = _SeenRule(threshold=t * factor, seen=seen) if penalty else NeuronRule(threshold=t * factor)

        def near(step: int) -> Tensor:
            losses = [near_threshold(a, t, norm) for a, t in seen]
            seen.clear()
            return penalty * torch.stack(losses).sum()

        scale(0)
        with adapted(model, lora) as trained:
            training = train(
                model,
                batches,
                plan,
                penalty=near if penalty else None,
                after_step=lambda step: scale(step + 1),
                parameters=trained,
                progress=progress,
            )
    facts = {**calibration.facts, "finetuned_steps": plan.steps}
    return training, replace(calibration, fingerprint=fingerprint(model), facts=facts)
