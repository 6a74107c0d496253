"""Soups: averages of models, uniform and greedy, batch norms that fit them, and what tells whether a soup is good."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from gossamer.errors import InputError, ModelError
from gossamer.patterns import Masks
from gossamer.weights.base import copied
from gossamer.weights.gradual import PruneRule

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
    vectors = torch.stack([parameter_vector(model) for model in models])
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


def parameter_vector(model: nn.Module) -> Tensor:
    """All parameters as one vector, float64."""
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
