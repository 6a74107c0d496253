"""The essential-sparsity study beside its curve: lottery tickets, how alike masks are, where weights went, and when zeros emerge.

Decisions are listed in `essential_sparsity`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from gossamer.errors import InputError, ModelError
from gossamer.hf import matrices
from gossamer.patterns import Masks, Structure
from gossamer.weights.gradual import PruneRule, even_shares, prune_retrain, state_of


def lottery_ticket(
    model: nn.Module,
    finetune: Callable[[nn.Module, Masks, int], None],
    sparsity: float,
    *,
    rounds: int | None = None,
    rule: PruneRule | None = None,
) -> Masks:
    """The lottery-ticket baseline: fine-tune, remove the smallest of what remains, rewind the rest to the checkpoint; again.

    Args:
        model: changed in place: it ends as the fine-tuned ticket (its weights before that are the checkpoint's, masked).
        finetune: trains it in place under the masks, round 0 dense.
        rounds: each removes the same count (default: a tenth of the weights a round).

    >>> from gossamer.models import tiny_model
    >>> round(lottery_ticket(tiny_model("llama"), lambda model, masks, step: None, 0.2).sparsity, 3)
    0.2
    """
    rule = PruneRule() if rule is None else rule
    start = state_of(model)
    dense = Masks({m.name: torch.ones_like(m.parameter, dtype=torch.bool) for m in rule.matrices(model)})
    finetune(model, dense, 0)
    shares = even_shares(sparsity, max(1, round(10 * sparsity)) if rounds is None else rounds)
    return prune_retrain(model, shares, lambda m, masks, phase: finetune(m, masks, phase + 1), rule, rewind=start)[-1]


def mask_similarity(one: Masks, two: Masks) -> dict[str, float]:
    """How alike two masks are: cosine, what independent random masks of their densities have, the excess over it, and the
    Jaccard index of the removed sets.

    Raises:
        InputError: no matrix is under both.

    >>> m = Masks({"w": torch.tensor([[True, False, True, False]])})
    >>> mask_similarity(m, m)
    {'cosine': 1.0, 'chance': 0.5, 'excess': 0.5, 'jaccard': 1.0}
    """
    names = [name for name in one if name in two]
    if not names:
        raise InputError("these masks have no matrix in common")
    a, b = (Masks({name: masks[name] for name in names}) for masks in (one, two))
    cosine, chance = a.cosine(b), math.sqrt((1 - a.sparsity) * (1 - b.sparsity))
    return {"cosine": cosine, "chance": chance, "excess": cosine - chance, "jaccard": a.jaccard(b)}


def layer_profile(model: nn.Module, masks: Masks) -> dict[str, dict[str, float]]:
    """Share removed of each matrix (`by_matrix`), of each role and of each layer.

    >>> from gossamer.models import tiny_model
    >>> from gossamer.weights.essential_sparsity import magnitude_mask
    >>> model = tiny_model("llama")
    >>> sorted(layer_profile(model, magnitude_mask(model, 0.3))["by_layer"])
    ['0', '1']
    """
    removed: dict[str, dict[str, list[int]]] = {"by_role": {}, "by_layer": {}}
    for matrix in matrices(model, include=lambda name: name in masks):
        mask = masks[matrix.name]
        for kind, key in (("by_role", matrix.role), ("by_layer", str(matrix.layer))):
            sums = removed[kind].setdefault(key, [0, 0])
            sums[0] += int((~mask).sum())
            sums[1] += mask.numel()
    shares = {kind: {key: gone / total for key, (gone, total) in part.items()} for kind, part in removed.items()}
    return {"by_matrix": masks.shares(), **shares}


def storage_bytes(masks: Masks, structure: str = "element", value_bytes: int = 4) -> dict[str, int]:
    """Bytes that the masked matrices take dense and sparse: values and a bitmask, or of N:M ceil(log2 C(M, N)) bits a group.

    >>> storage_bytes(Masks({"w": torch.tensor([[True, False] * 8])}))
    {'dense': 64, 'sparse': 34}
    """
    form = Structure.parse(structure)
    values = masks.kept * value_bytes
    if form.kind == "n:m":
        bits = masks.total // form.m * math.ceil(math.log2(math.comb(form.m, form.n)))
    else:
        bits = masks.total
    return {"dense": masks.total * value_bytes, "sparse": values + math.ceil(bits / 8)}


def zero_weights(model: nn.Module, tau: float | Mapping[str, float] = 0.0) -> dict[str, int]:
    """How many weights of each prunable matrix have |w| < τ, or are exactly zero where τ is 0.

    >>> from gossamer.models import tiny_model
    >>> sum(zero_weights(tiny_model("llama")).values())
    0
    """
    counts = {}
    for matrix in matrices(model):
        limit = tau[matrix.name] if isinstance(tau, Mapping) else tau
        size = matrix.weight.abs()
        counts[matrix.name] = int((size < limit).sum() if limit else (size == 0).sum())
    return counts


@dataclass(eq=False)
class ZeroWeightMonitor:
    """Counts near-zero weights while a model trains: essential sparsity appears as an abrupt rise.

    Attributes:
        model: looked at, never changed.
        tau: threshold as a share of each matrix's standard deviation now.
        every: steps between two counts.
        history: of each count `step`, `near` (|w| < τ) and `zero` (exactly), as shares of all.

    Raises:
        InputError: τ or `every` out of range.

    >>> from gossamer.models import tiny_model
    >>> monitor = ZeroWeightMonitor(tiny_model("llama"))
    >>> monitor(0)
    >>> monitor.history[0]["zero"]
    0.0
    """

    model: nn.Module
    tau: float = 1e-3
    every: int = 1
    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.tau > 0 or self.every < 1:
            raise InputError(f"a monitor needs tau > 0 and every >= 1, got {self.tau:g}, {self.every}")
        found = matrices(self.model)
        self._tau = {m.name: self.tau * float(m.weight.float().std(unbiased=False)) for m in found}
        if not all(math.isfinite(t) and t > 0 for t in self._tau.values()):
            raise ModelError("a monitor needs matrices with finite weights that are not all the same")
        self._total = sum(m.parameter.numel() for m in found)

    def __call__(self, step: int) -> None:
        """Count, if it is time; fits `after_step` of `train`."""
        if step % self.every == 0:
            near, zero = (sum(zero_weights(self.model, t).values()) for t in (self._tau, 0.0))
            self.history.append({"step": float(step), "near": near / self._total, "zero": zero / self._total})

    def follow(self, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        """Count after the optimizer's steps, in any training loop; what comes back stops it."""
        done = iter(range(2**62))
        return optimizer.register_step_post_hook(lambda *_: self(next(done))).remove

    def abrupt(self, window: int = 2, share: float = 0.5) -> dict[str, float] | None:
        """Where zeros emerge at once: the `window` counts in which the largest part of the whole rise falls.

        Returns `start`, `end` (steps) and `part` of the rise, or None where no window holds `share` of it.

        >>> from gossamer.models import tiny_model
        >>> m = ZeroWeightMonitor(tiny_model("llama"))
        >>> m.history = [{"step": float(i), "near": x, "zero": 0.0} for i, x in enumerate([0, 0, 0.01, 0.3, 0.31])]
        >>> m.abrupt(window=1)["start"]
        2.0
        """
        near = [point["near"] for point in self.history]
        rise = near[-1] - near[0] if near else 0.0
        if rise <= 0 or not 1 <= window < len(near):
            return None
        jumps = [near[i + window] - near[i] for i in range(len(near) - window)]
        i = max(range(len(jumps)), key=lambda j: jumps[j])
        if jumps[i] < share * rise:
            return None
        return {"start": self.history[i]["step"], "end": self.history[i + window]["step"], "part": jumps[i] / rise}
