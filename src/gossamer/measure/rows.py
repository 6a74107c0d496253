"""From what one method showed in a run to its row of the comparison."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.hf import AttentionRuntime, model_shape
from gossamer.measure import cost as costs
from gossamer.measure.quality import Scores
from gossamer.measure.results import Cost, Estimate, MethodResult, Quality, Selection, Spread
from gossamer.policies import PolicyMethod
from gossamer.recipe import Recipe

#: Stretches that the context is cut into for the picture of what was read.
BINS = 64


@dataclass
class Entry:
    """One row to measure: a recipe under a label. The first method gives the row its slug and settings."""

    recipe: Recipe
    label: str

    @property
    def method(self) -> Any:
        """The first method."""
        return self.recipe.steps[0].method


@dataclass
class Measured:
    """Everything gathered for one entry."""

    entry: Entry
    scores: list[Scores] = field(default_factory=list)
    task_scores: dict[str, list[Scores]] = field(default_factory=dict)
    times: costs.StepTimes = field(default_factory=costs.StepTimes)
    prefill_ms: list[float] = field(default_factory=list)
    selection: Selection | None = None
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    read: dict[str, float] = field(default_factory=dict)
    held_bytes: int = 0
    extra_bytes: int = 0
    overhead: float | None = None
    peak: int | None = None
    yardstick: str | None = None
    area: float | None = None
    kept: list[float] = field(default_factory=list)
    skipped: list[float] = field(default_factory=list)

    @property
    def neurons(self) -> float | None:
        """Share of the neurons that decoded tokens computed, over all stretches of text."""
        return statistics.fmean(self.kept) if self.kept else None

    @property
    def skipped_bytes(self) -> int:
        """Bytes of weights that a decode step does not read, likewise."""
        return round(statistics.fmean(self.skipped)) if self.skipped else 0

    def count(self, runtime: AttentionRuntime, cache: Any) -> None:
        """Take over what decode steps read, per token, and what the cache and the policies hold."""
        stats, layers = runtime.stats, runtime.shape.layers
        tokens = max(stats.steps / layers, 1)
        for name, value in (("kv", stats.kv_bytes), ("score", stats.score_bytes), ("dense", stats.dense_bytes)):
            self.read[name] = value / tokens
        self.held_bytes = int(cache.nbytes)
        self.extra_bytes = sum(_state_bytes(layer.views.get(runtime)) for layer in cache.layers)

    def count_neurons(self, report: dict[str, Any]) -> None:
        """Take over what an activation method kept in a stretch, and the weights that a decode step does not read for it."""
        if (kept := report.get("neurons_kept", report.get("channels_kept"))) is not None:
            self.yardstick = self.yardstick or "neurons"
            self.kept.append(kept)
            pairs = (("mlp_bytes_dense", "mlp_bytes_read"), ("channel_bytes_dense", "channel_bytes_read"))
            self.skipped.append(sum(report.get(dense, 0) - report.get(read, 0) for dense, read in pairs))

    def note(self, messages: Sequence[str]) -> None:
        """Add remarks that are not there yet."""
        self.notes += [message for message in messages if message not in self.notes]


def _state_bytes(view: Any) -> int:
    """Bytes of tensors that policies keep for one layer beside the cache."""

    def total(thing: Any, depth: int = 0) -> int:
        if isinstance(thing, Tensor):
            return thing.numel() * thing.element_size()
        if depth < 3 and hasattr(thing, "__dict__"):
            return sum(total(value, depth + 1) for value in vars(thing).values())
        return 0

    states = {id(s): s for s in (view.state, view.prefill_state, view.cache_state)} if view is not None else {}
    return sum(total(state) for state in states.values())


def picture_of(trace: Sequence[tuple[int, int, Tensor, Tensor]], layers: int, bins: int = BINS) -> Selection:
    """What selections read: per layer and head, the share of each stretch of the context that was read, over all steps.

    Layers that never selected read everything.
    """
    heads = max(indices.shape[1] for _, _, indices, _ in trace)
    read, there = torch.zeros(layers, heads, bins), torch.zeros(layers, heads, bins)
    for layer, length, indices, counts in trace:
        size = torch.bincount(torch.arange(length) * bins // length, minlength=bins).float()
        valid = torch.arange(indices.shape[2]) < counts[0, :, None]
        where = (indices[0].long() * bins // length).clamp_max(bins - 1)
        hits = torch.zeros(indices.shape[1], bins).scatter_add_(1, where, valid.float())
        read[layer] += hits.repeat_interleave(heads // indices.shape[1], 0)
        there[layer] += size
    density = torch.where(there > 0, read / there.clamp_min(1), torch.ones(()))
    rounded = [[[round(float(x), 4) for x in head] for head in layer] for layer in density]
    return Selection(layers=list(range(layers)), heads=heads, bins=bins, density=rounded)


def share(samples: Sequence[float]) -> Estimate:
    """An estimate from samples that are 0 or 1."""
    return Estimate.of_share(round(sum(samples)), len(samples))


def quality_of(m: Measured, dense: Measured) -> Quality:
    """Quality of one row beside the dense one, over the same tokens."""
    pairs = list(zip(dense.scores, m.scores, strict=True))
    loss = Estimate.of(torch.cat([-s.log_prob for s in m.scores]).tolist())
    ppl = float(torch.tensor(loss.mean).exp())
    return Quality(
        kl=None if m is dense else Estimate.of(torch.cat([d.kl(s) for d, s in pairs]).tolist()),
        agreement=None if m is dense else share(torch.cat([d.agreement(s) for d, s in pairs]).tolist()),
        perplexity=Estimate(mean=ppl, stderr=ppl * loss.stderr, n=loss.n),
        tasks={t: share([float(s.exact) for s in scores]) for t, scores in m.task_scores.items()},
        task_logprob={t: Estimate.of([float(s.log_prob.mean()) for s in ss]) for t, ss in m.task_scores.items()},
    )


def row_of(model: nn.Module, m: Measured, dense: Measured, context: int) -> MethodResult:
    """The row of a method; without quality and cost if it failed."""
    method = m.entry.method
    quality, cost = None, None
    if m.error is None:
        quality, cost = quality_of(m, dense), _cost(model, m, dense, context)
        extra = costs.summarise_steps(m.times.first) - cost.token_ms.median if cost.token_ms else 0.0
        if m.extra_bytes and extra > 0:
            m.note([f"preparing {context} cached tokens took {extra:.0f} ms once, not counted in the time per token"])
    return MethodResult(
        slug=method.slug,
        label=m.entry.label,
        settings={
            name: value for step in m.entry.recipe.steps for name, value in step.method.model_dump(mode="json").items()
        },
        baseline=method.baseline,
        quality=quality,
        cost=cost,
        selection=m.selection,
        notes=m.notes,
        error=m.error,
    )


def _cost(model: nn.Module, m: Measured, dense: Measured, context: int) -> Cost:
    formula: dict[str, float] | None = None
    if len(m.entry.recipe.steps) == 1 and isinstance(m.entry.method, PolicyMethod):
        element = next(model.parameters()).element_size()
        formula = dict(m.entry.method.io_bytes(context, model_shape(model), element))
    return Cost(
        prefill_ms=Spread.of(m.prefill_ms or dense.prefill_ms),
        token_ms=Spread.of(m.times.step) if m.times.step else None,
        attention_ms=Spread.of(m.times.attention) if m.times.attention else None,
        overhead_ms=m.overhead,
        kv_bytes_held=m.held_bytes,
        extra_bytes_held=m.extra_bytes,
        kv_bytes_read=m.read.get("kv", 0.0),
        score_bytes_read=m.read.get("score", 0.0),
        dense_bytes_read=m.read.get("dense", 0.0),
        weight_bytes_read=costs.weight_bytes(model) - m.skipped_bytes,
        peak_memory=m.peak,
        formula_bytes=formula,
        prefill_area=m.area,
        neurons_kept=m.neurons,
    )


def transformers_row(model: nn.Module, timed: dict[str, costs.StepTimes], held: int) -> MethodResult:
    """The untouched model by the fastest of the ways that were timed."""
    best = min(timed, key=lambda way: costs.summarise_steps(timed[way].step))
    ways = ", ".join(f"{way} ({costs.summarise_steps(times.step):.0f} ms)" for way, times in timed.items())
    return MethodResult(
        slug="transformers",
        label=f"transformers ({best})",
        settings={},
        baseline=True,
        quality=Quality(kl=None, agreement=None, perplexity=None, tasks={}, task_logprob={}),
        cost=Cost(
            prefill_ms=None,
            token_ms=Spread.of(timed[best].step),
            attention_ms=None,
            overhead_ms=None,
            kv_bytes_held=held,
            extra_bytes_held=0,
            kv_bytes_read=float(held),
            score_bytes_read=0.0,
            dense_bytes_read=float(held),
            weight_bytes_read=costs.weight_bytes(model),
            peak_memory=None,
            formula_bytes=None,
        ),
        selection=None,
        notes=[f"the untouched model, by the fastest of {ways}"],
        error=None,
    )
