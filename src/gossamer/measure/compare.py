"""Run methods on one model, on equal terms, and put what they cost beside what they keep."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.attention import AttentionHandle, AttentionMethod
from gossamer.attention.base import attach as attach_attention
from gossamer.calibration import Calibration
from gossamer.data import encode, make_task, split, text, token_blocks
from gossamer.errors import GossamerError, InputError
from gossamer.hf import AttentionRuntime, model_shape
from gossamer.measure import cost as costs
from gossamer.measure.quality import Scores, Segment, decode_known, prefill, segments_of, task_segments
from gossamer.measure.results import Comparison, Cost, Estimate, MethodResult, Quality, Selection, Spread
from gossamer.models import LoadedModel

#: Blocks and block length of the calibration that `compare` makes when none is given.
CALIBRATION_BLOCKS, CALIBRATION_BLOCK = 16, 512
BINS = 64


@dataclass
class Entry:
    """One row to measure: a method with what it learned, under a label."""

    method: AttentionMethod
    label: str
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        context: tokens before the decoded ones.
        decode_tokens: known tokens decoded and scored per segment.
        segments: stretches of the evaluation text.
        tasks: task names (`gossamer.data.TASKS`).
        examples: prompts per task.
        steps, rounds: timed decode steps in each of the interleaved rounds.
        seed: of segments, tasks and everything else.
        source: evaluation text (`prose`, `code`, or a path).
        transformers: also time the untouched model.
    """

    context: int = 4096
    decode_tokens: int = 64
    segments: int = 2
    tasks: tuple[str, ...] = ("passkey",)
    examples: int = 4
    steps: int = 8
    rounds: int = 3
    seed: int = 0
    source: str = "prose"
    transformers: bool = True

    def __post_init__(self) -> None:
        for name in ("context", "decode_tokens", "segments", "steps", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.context < 2:
            raise InputError(f"context must be 2 or more, got {self.context}")
        if self.examples < 0:
            raise InputError(f"examples must not be negative, got {self.examples}")


Progress = Callable[[str, int, int], None]  # what is going on, steps done, steps in all


def _no_progress(what: str, done: int, total: int) -> None:
    return None


def calibration_tokens(loaded: LoadedModel, source: str = "prose", blocks: int = CALIBRATION_BLOCKS) -> Tensor:
    """Token blocks for calibration, from the part of a text that evaluation never sees."""
    return token_blocks(loaded.tokenizer, split(text(source), "calibration"), CALIBRATION_BLOCK, blocks)


def entries_of(
    loaded: LoadedModel, methods: Sequence[AttentionMethod], progress: Progress = _no_progress
) -> list[Entry]:
    """Entries with labels that tell them apart; methods that need a calibration share one per slug, made here."""
    made: dict[str, Calibration] = {}
    entries = []
    for index, method in enumerate(methods):
        if "calibration" in method.needs and method.slug not in made:
            progress(f"calibrating {method.slug}", index, len(methods))
            made[method.slug] = method.calibrate(loaded.model, calibration_tokens(loaded))
        label = method.name
        if any(m.slug == method.slug and m != method for m in methods):
            label += " (" + ", ".join(f"{k}={v}" for k, v in method.settings().items()) + ")"
        entries.append(Entry(method, label, made.get(method.slug)))
    return entries


class _Measured:
    """Everything gathered for one entry."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.scores: list[Scores] = []
        self.task_scores: dict[str, list[Scores]] = {}
        self.times = costs.StepTimes()
        self.prefill_ms: list[float] = []
        self.selection: Selection | None = None
        self.notes: list[str] = []
        self.error: str | None = None
        self.read: dict[str, float] = {}
        self.extra_bytes = 0
        self.overhead: float | None = None
        self.peak: int | None = None

    def attach(self, loaded: LoadedModel) -> AttentionHandle:
        return attach_attention(loaded.model, [(self.entry.method, self.entry.calibration)])


def compare(
    loaded: LoadedModel,
    methods: Sequence[AttentionMethod],
    plan: Plan = Plan(),
    progress: Progress = _no_progress,
    entries: list[Entry] | None = None,
) -> Comparison:
    """Measure methods beside the dense model; the dense reference is added when it is not among them.

    A method that fails is reported with its error; the others go on.

    Raises:
        InputError: the plan does not fit the text.
    """
    from gossamer.registry import make

    entries = entries if entries is not None else entries_of(loaded, methods, progress)
    if not any(e.method.slug == "dense" for e in entries):
        dense: Any = make("dense")
        entries = [Entry(dense, dense.name), *entries]
    entries.sort(key=lambda e: e.method.slug != "dense")  # dense first: it makes the shared prefill
    measured = [_Measured(e) for e in entries]
    blocks = token_blocks(
        loaded.tokenizer,
        split(text(plan.source), "evaluation"),
        plan.context + plan.decode_tokens,
        plan.segments,
        seed=plan.seed,
    )
    segments = segments_of(blocks, plan.context, plan.decode_tokens)
    tasks = {
        name: task_segments(
            [
                encode(loaded.tokenizer, e)
                for e in make_task(name, loaded.tokenizer, plan.context, plan.examples, plan.seed)
            ]
        )
        for name in plan.tasks
        if plan.examples
    }
    total = (len(segments) + sum(map(len, tasks.values()))) * (1 + len(measured)) + plan.rounds * len(measured)
    done = 0

    def tick(what: str) -> None:
        nonlocal done
        done += 1
        progress(what, done, total)

    for index, segment in enumerate(segments):
        last = index == len(segments) - 1
        cache = _run_segment(loaded, measured, segment, tick, "text", picture=last)
        if last:
            timing = _time(loaded, measured, cache, plan, tick)
    for name, examples in tasks.items():
        for segment in examples:
            _run_segment(loaded, measured, segment, tick, name)
    rows = [_row(loaded, m, measured[0], cache, plan) for m in measured]
    if timing is not None:
        rows.insert(0, timing)
    return Comparison(
        model=loaded.name,
        context=plan.context,
        decode_tokens=plan.decode_tokens,
        seed=plan.seed,
        dtype=str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        budget=_budget(entries),
        machine=costs.machine(),
        versions=costs.versions(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        bandwidth_gbs=_bandwidth(),
        methods=rows,
        reference=measured[0].entry.label,
    )


def _run_segment(
    loaded: LoadedModel,
    measured: list[_Measured],
    segment: Segment,
    tick: Callable[[str], None],
    kind: str,
    picture: bool = False,
) -> Any:
    """Score every entry on one segment; returns the dense cache of its context."""
    shared: Any = None
    reserve = len(segment.context) + len(segment.continuation) + 64
    for m in measured:
        if m.error is not None:
            tick(f"{m.entry.label}: skipped")
            continue
        try:
            with m.attach(loaded) as handle:
                runtime = handle.runtime
                cache = shared
                if cache is None or runtime.prefill is not None:
                    start = time.perf_counter()
                    cache = prefill(loaded.model, segment.context, reserve)
                    m.prefill_ms.append(1e3 * (time.perf_counter() - start))
                    tick(f"reading {len(segment.context)} tokens")
                if shared is None:
                    shared = cache
                runtime.stats.reset()
                with runtime.recording() if picture else nullcontext(None) as trace:
                    scores = decode_known(loaded.model, runtime, cache, segment)
                if kind == "text":
                    m.scores.append(scores)
                    _count(m, runtime, model_shape(loaded.model).layers)
                    if trace:
                        m.selection = picture_of(trace, model_shape(loaded.model).layers)
                else:
                    m.task_scores.setdefault(kind, []).append(scores)
                m.notes += [note for note in sorted(runtime._said) if note not in m.notes]
                if picture:
                    m.extra_bytes = sum(_state_bytes(layer.views.get(runtime)) for layer in cache.layers)
        except GossamerError as error:
            if m is measured[0]:
                raise
            m.error = str(error)
        tick(f"{m.entry.label} on {kind}")
    return shared


def _count(m: _Measured, runtime: AttentionRuntime, layers: int) -> None:
    stats = runtime.stats
    tokens = stats.steps / layers
    for name, value in (("kv", stats.kv_bytes), ("score", stats.score_bytes), ("dense", stats.dense_bytes)):
        m.read[name] = value / tokens


def _state_bytes(view: Any) -> int:
    """Bytes of tensors that a policy keeps for one layer beside the cache."""

    def total(thing: Any, depth: int = 0) -> int:
        if isinstance(thing, Tensor):
            return thing.numel() * thing.element_size()
        if depth < 3 and hasattr(thing, "__dict__"):
            return sum(total(v, depth + 1) for v in vars(thing).values())
        return 0

    return total(view.state) if view is not None and view.state is not None else 0


def picture_of(trace: Sequence[tuple[int, int, Tensor, Tensor]], layers: int, bins: int = BINS) -> Selection:
    """What selections read: per layer and head, the share of each stretch of the context that was read, over all steps.

    Layers that never selected read everything.
    """
    heads = max(indices.shape[1] for _, _, indices, _ in trace)
    read, there = torch.zeros(layers, heads, bins), torch.zeros(layers, heads, bins)
    for layer, length, indices, counts in trace:
        edges = torch.arange(length) * bins // length
        size = torch.bincount(edges, minlength=bins).float()
        valid = torch.arange(indices.shape[2]) < counts[0, :, None]
        where = (indices[0].long() * bins // length).clamp_max(bins - 1)
        hits = torch.zeros(indices.shape[1], bins).scatter_add_(1, where, valid.float())
        repeat = heads // indices.shape[1]
        read[layer] += hits.repeat_interleave(repeat, 0)
        there[layer] += size
    density = torch.where(there > 0, read / there.clamp_min(1), torch.ones(()))
    rounded = [[[round(float(x), 4) for x in head] for head in layer] for layer in density]
    return Selection(layers=list(range(layers)), heads=heads, bins=bins, density=rounded)


def _time(
    loaded: LoadedModel, measured: list[_Measured], cache: Any, plan: Plan, tick: Callable[[str], None]
) -> MethodResult | None:
    """Interleaved timing of all entries after the shared cache, and of the untouched model."""
    plain = {how: costs.StepTimes() for how in costs.TRANSFORMERS_WAYS} if plan.transformers else {}
    for _ in range(plan.rounds):
        costs.time_transformers(loaded.model, cache, 1, plan.steps, plain)
        for m in measured:
            if m.error is None:
                with m.attach(loaded) as handle, costs.peak_memory() as peak:
                    costs.time_steps(loaded.model, handle.runtime, cache, 1, plan.steps, m.times)
                m.peak = max([m.peak or 0, *peak]) or None
            tick(f"timing {m.entry.label}")
    for m in measured:
        if m.error is None:
            m.overhead = costs.overhead_ms(loaded.model, lambda m=m: m.attach(loaded).runtime)  # type: ignore[misc]
    timed = {name: times for name, times in plain.items() if times.step}
    if not timed:
        return None
    best = min(timed, key=lambda name: costs.summarise_steps(timed[name].step))
    held = int(cache.nbytes)
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
            weight_bytes_read=costs.weight_bytes(loaded.model),
            peak_memory=None,
            formula_bytes=None,
        ),
        selection=None,
        notes=[
            "the untouched model, by the fastest of "
            + ", ".join(f"{how} ({costs.summarise_steps(t.step):.0f} ms)" for how, t in timed.items())
        ],
        error=None,
    )


def share(samples: Sequence[float]) -> Estimate:
    """An estimate from samples that are 0 or 1."""
    return Estimate.of_share(round(sum(samples)), len(samples))


def _row(loaded: LoadedModel, m: _Measured, dense: _Measured, cache: Any, plan: Plan) -> MethodResult:
    method, shape = m.entry.method, model_shape(loaded.model)
    quality = Quality(kl=None, agreement=None, perplexity=None, tasks={}, task_logprob={})
    if m.error is None:
        pairs = list(zip(dense.scores, m.scores, strict=True))
        loss = torch.cat([-s.log_prob for s in m.scores])
        nll = Estimate.of(loss.tolist())
        ppl = float(torch.tensor(nll.mean).exp())
        quality = Quality(
            kl=None if m is dense else Estimate.of(torch.cat([d.kl(s) for d, s in pairs]).tolist()),
            agreement=None if m is dense else share(torch.cat([d.agreement(s) for d, s in pairs]).tolist()),
            perplexity=Estimate(mean=ppl, stderr=ppl * nll.stderr, n=nll.n),
            tasks={t: share([float(s.exact) for s in scores]) for t, scores in m.task_scores.items()},
            task_logprob={
                t: Estimate.of([float(s.log_prob.mean()) for s in scores]) for t, scores in m.task_scores.items()
            },
        )
        if m.times.first and m.times.step:
            extra = costs.summarise_steps(m.times.first) - costs.summarise_steps(m.times.step)
            if m.extra_bytes and extra > 0:
                m.notes.append(
                    f"preparing {plan.context} cached tokens took {extra:.0f} ms once, not counted in the time per token"
                )
    element = next(loaded.model.parameters()).element_size()
    dense_layers = len({i % shape.layers for i in getattr(method, "dense_layers", ())})
    per_layer = method.io_bytes(plan.context + plan.decode_tokens // 2, shape, element)
    return MethodResult(
        slug=method.slug,
        label=m.entry.label,
        settings=method.model_dump(mode="json"),
        baseline=method.baseline,
        quality=quality,
        cost=Cost(
            prefill_ms=Spread.of(m.prefill_ms or dense.prefill_ms),
            token_ms=Spread.of(m.times.step) if m.times.step else None,
            attention_ms=Spread.of(m.times.attention) if m.times.attention else None,
            overhead_ms=m.overhead,
            kv_bytes_held=int(cache.nbytes),
            extra_bytes_held=m.extra_bytes,
            kv_bytes_read=m.read.get("kv", 0.0),
            score_bytes_read=m.read.get("score", 0.0),
            dense_bytes_read=m.read.get("dense", 0.0),
            weight_bytes_read=costs.weight_bytes(loaded.model),
            peak_memory=m.peak,
            formula_bytes={**per_layer, "sparse_layers": shape.layers - dense_layers},
        ),
        selection=m.selection,
        notes=m.notes,
        error=m.error,
    )


def _budget(entries: Sequence[Entry]) -> str:
    values = {getattr(e.method, "tokens", None) for e in entries} - {None}
    return ", ".join(sorted(f"1/{1 / v:g}" if isinstance(v, float) and v < 1 else f"{v:g}" for v in values)) or "full"


def _bandwidth() -> float | None:
    """Read bandwidth of this machine in GB/s, measured now; None without the native kernels."""
    from gossamer.measure.bandwidth import measure_bandwidth

    try:
        return float(measure_bandwidth())
    except GossamerError:
        return None
