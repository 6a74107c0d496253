"""A comparison as a study: every method at one budget, ranked by what it keeps, each difference tested.

The budget means the same for every method of a kind:

    read   decode methods     bytes of keys and values that one step reads, over what dense attention reads
    held   cache methods      bytes of keys and values that stay in memory, over the full cache
    area   prefill methods    share of the causal attention map that is computed, so of its FLOPs
    neurons  activations      share of the MLPs' neurons that a decoded token computes

What it takes to choose (labels, page bounds, votes) is counted beside it, not in it. Two methods are told apart by the
differences of their losses on the same tokens, which move together: means over blocks of `BLOCK` consecutive tokens are the
samples, since neighbours in a text are not independent, and a difference counts from two standard errors on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from gossamer.hf import AttentionRuntime, ModelShape
from gossamer.measure.results import Place, Ranking
from gossamer.measure.rows import Measured
from gossamer.policies import PolicyMethod
from gossamer.registry import Method, make, method

Yardstick = Literal["read", "held", "area", "neurons"]

#: Consecutive tokens whose mean is one sample of a difference.
BLOCK = 16
#: Methods that read everything to choose: ceilings, not ranked.
ORACLES = frozenset({"exact-top-k"})
#: How far over the budget a method may lie and still count as within it.
SLACK = 0.1


def yardstick_of(runtime: AttentionRuntime) -> Yardstick | None:
    """By what an attached method's budget is counted; None where it only computes as dense attention does."""
    if runtime.cache is not None:
        return "held"
    if runtime.decode is not None:
        return "read"
    return "area" if runtime.prefill is not None else None


def at_budget(slug: str, budget: float, context: int, shape: ModelShape, element_size: int) -> Method:
    """A method with its settings such that it spends `budget`, a share of what dense attention spends.

    Layers that a method would leave dense become sparse too: two dense layers of thirty are more than a sixteenth.
    Methods whose queries select per head read several sets for each KV head and get as many rows fewer. What cannot be
    made so small keeps its least setting; the share that was measured tells.

    >>> from gossamer.hf import ModelShape
    >>> shape = ModelShape(layers=2, heads=4, kv_heads=2, head_dim=64)
    >>> at_budget("streaming-llm", 1 / 16, 4096, shape, 4).settings()
    {'tokens': 256}
    >>> at_budget("random", 1 / 16, 4096, shape, 4).settings()
    {'tokens': 128, 'dense_layers': []}
    >>> at_budget("h2o", 1 / 16, 4096, shape, 4).settings()
    {'budget': 0.0625}
    """
    cls = method(slug)
    if hasattr(cls, "with_share"):
        return cast(Method, cls.with_share(budget))
    fields = cls.model_fields
    settings: dict[str, Any] = {"dense_layers": ()} if "dense_layers" in fields else {}
    for name in ("area", "budget", cls.budget_setting):
        if name in fields:
            settings[name] = budget
    if "sample_tokens" in fields:  # a search over prompts longer than the study's would take longer than the study
        settings["sample_tokens"] = min(fields["sample_tokens"].default, max(256, context // 2))
    if "tokens" not in fields or not issubclass(cls, PolicyMethod):
        return make(slug, **settings)
    made = cls(**settings)
    if "attention.decode" not in made.slots:
        return made
    allowed = budget * context * shape.kv_heads * 2 * shape.head_dim * element_size

    def spends(rows: int) -> int:
        return made.with_rows(rows).io_bytes(context, shape, element_size)["rows"]

    low, high = 1, context  # the most rows that stay within the budget
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if spends(middle) <= allowed else (low, middle - 1)
    return made.with_rows(low)


def share_of(m: Measured, dense: Measured) -> float | None:
    """What a method was measured to spend of what dense attention spends, by its yardstick."""
    if m.yardstick == "held":
        return m.held_bytes / dense.held_bytes if dense.held_bytes else None
    if m.yardstick == "read":
        return m.read["kv"] / m.read["dense"] if m.read.get("dense") else None
    return m.neurons if m.yardstick == "neurons" else m.area


def rank(measured: Sequence[Measured], dense: Measured, budget: float) -> list[Ranking]:
    """Order the methods of each yardstick by KL on text, and by the log-probability of the tasks' answers."""
    rankings = []
    for kind in ("read", "held", "area", "neurons"):
        group = [m for m in measured if m.error is None and m is not dense and m.yardstick == kind]
        if not group:
            continue
        kl = {id(m): _blocks([d.kl(s) for d, s in zip(dense.scores, m.scores, strict=True)]) for m in group}
        rankings.append(_ranking("KL from dense on text", True, kind, budget, group, kl, dense))
        if all(m.task_scores for m in group):
            answers = {
                id(m): torch.stack([s.log_prob.mean() for scores in m.task_scores.values() for s in scores])
                for m in group
            }
            rankings.append(_ranking("log-probability of answers", False, kind, budget, group, answers, dense))
    return rankings


def _blocks(losses: Sequence[Tensor]) -> Tensor:
    """Means over blocks of consecutive tokens of each stretch; the last block of a stretch may be shorter."""
    return torch.cat([torch.stack([part.mean() for part in loss.split(BLOCK)]) for loss in losses])


def _ranking(
    metric: str,
    low_is_good: bool,
    kind: Yardstick,
    budget: float,
    group: Sequence[Measured],
    samples: dict[int, Tensor],
    dense: Measured,
) -> Ranking:
    sign = 1 if low_is_good else -1
    shares = {id(m): share_of(m, dense) for m in group}

    def is_ranked(m: Measured) -> bool:
        share = shares[id(m)]
        return m.entry.method.slug not in ORACLES and (share is None or share <= budget * (1 + SLACK))

    ordered = sorted(group, key=lambda m: (not is_ranked(m), sign * float(samples[id(m)].mean())))
    ranked = [m for m in ordered if is_ranked(m)]
    places = []
    for m in ordered:
        mine, share = samples[id(m)], shares[id(m)]
        better = sum(beats(sign * samples[id(other)], sign * mine) for other in ranked if other is not m)
        places.append(
            Place(
                label=m.entry.label,
                rank=1 + better if is_ranked(m) else None,
                value=float(mine.mean()),
                stderr=float(mine.std() / math.sqrt(len(mine))) if len(mine) > 1 else math.nan,
                share=share,
                over=share is not None and share > budget * (1 + SLACK),
            )
        )
    return Ranking(metric=metric, yardstick=kind, budget=budget, samples=len(samples[id(ordered[0])]), places=places)


def beats(a: Tensor, b: Tensor) -> bool:
    """Whether the losses `a` lie below `b`, sample by sample, by two standard errors of their mean difference.

    >>> beats(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, 2.6, 3.4]))
    True
    >>> beats(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, 0.5, 9.0]))
    False
    """
    gain = b - a
    if len(gain) < 2:
        return False
    return bool(gain.mean() > 0 and gain.mean() >= 2 * gain.std() / math.sqrt(len(gain)))
