"""How a pruned model is retrained: the learning-rate schedules of pruning's literature, and SGD for classifiers.

    FT     constant at the smallest rate of the dense training               LRW    the last T_r steps of its schedule again
    SLR    its whole schedule, compressed to T_r                             CLR    a cosine from its largest to its smallest rate
    LLR    linear from its largest rate to 0                                 ALLR   LLR from a start that fits the damage

All but FT and LRW warm up over a tenth of the steps, along a cosine from 0 to their first value. The dense schedule is taken to
be a cosine from the largest to the smallest rate, unless another is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.errors import InputError
from gossamer.models import Plan, class_loss, train
from gossamer.patterns import Masks

Schedule = Literal["FT", "LRW", "SLR", "CLR", "LLR", "ALLR"]
SCHEDULES: tuple[str, ...] = Schedule.__args__  # type: ignore[attr-defined]


def _cosine(done: float, start: float, end: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Retraining(Plan):
    """A plan whose learning rate follows one of the schedules; `lr` is the largest rate, or ALLR's start.

    Attributes:
        schedule: which one.
        low: smallest rate of the dense training.
        total_steps: T, its steps.
        dense: its rate at each step (default: a cosine from `lr` to `low`).

    Raises:
        InputError: an unknown schedule, or rates and steps out of range.

    >>> [round(Retraining(steps=10, lr=1.0, schedule="LLR").rate(t), 3) for t in range(10)]
    [1.0, 1.0, 0.889, 0.778, 0.667, 0.556, 0.444, 0.333, 0.222, 0.111]
    """

    schedule: Schedule = "LLR"
    low: float = 0.0
    total_steps: int = 1
    dense: Callable[[int], float] | None = None
    clip: float = 0.0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise InputError(f"a retraining schedule is one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        if self.steps < 1 or self.total_steps < 1 or not 0 <= self.low <= self.lr < math.inf:
            raise InputError(
                f"a retraining needs steps, and rates with 0 <= low <= lr; got {self.steps}, {self.low:g}, {self.lr:g}"
            )

    def original(self, step: int) -> float:
        """The dense training's rate at its step."""
        if self.dense is not None:
            return self.dense(step)
        return _cosine(step / max(1, self.total_steps - 1), self.lr, self.low)

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, …"""
        if self.schedule == "FT":
            return self.low
        if self.schedule == "LRW":
            return self.original(max(0, self.total_steps - self.steps) + min(step, self.total_steps - 1))
        warmup = round(0.1 * self.steps)
        if step < warmup:
            return _cosine((step + 1) / warmup, 0.0, self._at(0.0))
        return self._at((step - warmup) / (self.steps - warmup))

    def _at(self, done: float) -> float:
        """The schedule proper, after its warm-up."""
        if self.schedule == "SLR":
            return self.original(round(done * (self.total_steps - 1)))
        if self.schedule == "CLR":
            return _cosine(done, self.lr, self.low)
        return self.lr * (1 - done)


def adaptive_start(before: Tensor, after: Tensor, q: float, lr: float, steps: int, total_steps: int) -> float:
    """ALLR's first rate: ``lr · ‖θ − θ_pruned‖ / (‖θ‖ √q)``, between ``lr · min(T_r / T, 1)`` and lr.

    Args:
        before, after: all parameters as one vector, before and after pruning.
        q: share of the remaining weights that the phase removed.
        lr: largest rate of the dense training.

    >>> adaptive_start(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0]), 1.0, 0.1, 10, 100)
    0.08...
    """
    if before.shape != after.shape or not 0 <= q <= 1:
        raise InputError(f"an adaptive start compares two vectors of one length, and q lies in 0 .. 1; got {q:g}")
    norm = float(before.norm()) * math.sqrt(q)
    start = lr * float((before - after).norm()) / norm if norm else 0.0
    return min(max(start, lr * min(steps / total_steps, 1.0)), lr)


def shuffled_batches(
    images: Tensor, labels: Tensor, batch: int, steps: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` batches of a labelled set, shuffled anew each time all were seen; the last of a round may be smaller.

    >>> [len(y) for _, y in shuffled_batches(torch.rand(5, 2), torch.arange(5), 2, 4, seed=0)]
    [2, 2, 1, 2]
    """
    generator, parts = torch.Generator().manual_seed(seed), list[Tensor]()
    for _ in range(steps):
        if not parts:
            parts = list(torch.randperm(len(labels), generator=generator).split(batch))
        rows = parts.pop(0)
        yield images[rows], labels[rows]


def retrainer(
    batches: Callable[[int, int], Iterable[Any]],
    plan: Callable[[Any], Plan],
    *,
    momentum: float = 0.9,
    loss: Callable[[nn.Module, Any], Tensor] = class_loss,
) -> Callable[[nn.Module, Masks, Any], None]:
    """A retraining by SGD for `SparseModelSoups.run`: Nesterov's where there is weight decay, as in the dense training.

    Args:
        batches: makes the batches of a seed and a number of steps.
        plan: of a setting, as `SparseModelSoups.plan`.

    >>> from gossamer.weights.sparse_model_soups import SparseModelSoups
    >>> x, y = torch.rand(8, 2), torch.arange(8) % 2
    >>> sms = SparseModelSoups(sparsity=0.5, phases=1, copies=2, steps=3, lr=0.1, min_lr=0.01)
    >>> retrain = retrainer(lambda seed, steps: shuffled_batches(x, y, 4, steps, seed), sms.plan)
    >>> sms.run(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)), retrain).facts["sparsity"]
    0.5
    """

    def retrain(model: nn.Module, masks: Masks, setting: Any) -> None:
        its = plan(setting)
        optimizer = torch.optim.SGD(
            model.parameters(),
            lr=its.lr,
            momentum=momentum,
            weight_decay=its.weight_decay,
            nesterov=its.weight_decay > 0 and momentum > 0,
        )
        made = batches(setting.seed, its.steps)
        train(model, made, its, masks=masks, loss=loss, optimizer=optimizer)

    return retrain
