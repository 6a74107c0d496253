"""Run methods on one model, on equal terms, and put what they cost beside what they keep."""

from __future__ import annotations

import datetime
import gc
import inspect
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.calibration import Calibration
from gossamer.data import encode, make_task, split, text, token_blocks
from gossamer.errors import GossamerError, InputError
from gossamer.measure import cost as costs
from gossamer.measure.quality import Segment, decode_known, prefill, segments_of, task_segments
from gossamer.measure.results import Comparison, MethodResult, PaperFigure
from gossamer.measure.rows import Entry, Measured, picture_of, row_of, transformers_row
from gossamer.measure.study import rank, yardstick_of
from gossamer.models import LoadedModel
from gossamer.recipe import Recipe, Step
from gossamer.registry import Method, catalogue, make

#: Blocks and block length of the calibration that `compare` makes when none is given.
CALIBRATION_BLOCKS, CALIBRATION_BLOCK = 16, 512
#: Slots whose methods change what a prompt leaves in the cache, so that it can't be shared with the dense model.
CHANGES_PROMPTS = frozenset({"weights", "activations"})
#: Tokens of the prompt that such a method reads again before it is timed.
PROMPT = 32


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
        budget: rank the methods at this share of what dense attention spends (None: no ranking).
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
    budget: float | None = None

    def __post_init__(self) -> None:
        for name in ("context", "decode_tokens", "segments", "steps", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.context < 2:
            raise InputError(f"context must be 2 or more, got {self.context}")
        if self.examples < 0:
            raise InputError(f"examples must not be negative, got {self.examples}")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise InputError(f"a study's budget is a share in 0 .. 1, got {self.budget:g}")


Progress = Callable[[str, int, int], None]  # what is going on, steps done, steps in all


def _no_progress(what: str, done: int, total: int) -> None:
    return None


def calibration_tokens(
    loaded: LoadedModel,
    source: str = "prose",
    blocks: int = CALIBRATION_BLOCKS,
    method: Any = None,
    length: int | None = None,
) -> Tensor:
    """Token blocks for calibration: a method's own sample if it makes one, or a text's part that evaluation never sees.

    `length`: tokens in a block (default: the method's `calibration_length`, or 512).
    """
    if hasattr(method, "calibration_sample"):
        sample: Tensor = method.calibration_sample(loaded.model, loaded.tokenizer)
        return sample
    if length is None:
        length = int(getattr(method, "calibration_length", CALIBRATION_BLOCK))
    return token_blocks(loaded.tokenizer, split(text(source), "calibration"), length, blocks)


def learn(method: Any, model: Any, tokens: Tensor, progress: Progress = _no_progress) -> Calibration:
    """`method.calibrate`, which tells of its progress where it can."""
    telling = "progress" in inspect.signature(method.calibrate).parameters
    made: Calibration = method.calibrate(model, tokens, **({"progress": progress} if telling else {}))
    return made


def entries_of(loaded: LoadedModel, methods: Sequence[Method], progress: Progress = _no_progress) -> list[Entry]:
    """Entries with labels that tell them apart; methods that need a calibration share one per slug, made here."""
    made: dict[str, Calibration] = {}
    entries = []
    for index, method in enumerate(methods):
        if "calibration" in method.needs and method.slug not in made:
            progress(f"calibrating {method.slug}", index, len(methods))
            made[method.slug] = learn(method, loaded.model, calibration_tokens(loaded, method=method), progress)
        label = method.name
        if any(m.slug == method.slug and m != method for m in methods):
            label += " (" + ", ".join(f"{k}={v}" for k, v in method.settings().items()) + ")"
        entries.append(Entry(Recipe((Step(method, made.get(method.slug)),)), label))
    return entries


def compare(
    loaded: LoadedModel,
    methods: Sequence[Method],
    plan: Plan = Plan(),
    progress: Progress = _no_progress,
    entries: list[Entry] | None = None,
) -> Comparison:
    """Measure methods beside the dense model; the dense reference is added when it is not among them.

    Args:
        methods: one row each, calibrated here where they need it; ignored when `entries` are given.
        entries: rows with calibrations of their own, or whole recipes.

    A method that fails is reported with its error; the others go on.

    Raises:
        InputError: the plan does not fit the text.
    """
    entries = list(entries) if entries is not None else entries_of(loaded, methods, progress)
    if not any(entry.method.slug == "dense" for entry in entries):
        entries = [Entry(Recipe((Step(make("dense")),)), make("dense").name), *entries]
    entries.sort(key=lambda entry: entry.method.slug != "dense")  # dense first: it makes the shared prefill
    measured = [Measured(entry) for entry in entries]
    size = plan.context + plan.decode_tokens
    prose = split(text(plan.source), "evaluation")
    blocks = token_blocks(loaded.tokenizer, prose, size, plan.segments, seed=plan.seed)
    work = [("text", segment) for segment in segments_of(blocks, plan.context, plan.decode_tokens)]
    for task in plan.tasks if plan.examples else ():
        examples = make_task(task, loaded.tokenizer, plan.context, plan.examples, plan.seed)
        work += [(task, segment) for segment in task_segments([encode(loaded.tokenizer, e) for e in examples])]
    run = _Run(loaded, measured, plan, progress, (len(work) + plan.rounds) * len(measured))
    timing = None
    for index, (kind, segment) in enumerate(work):
        timed = index == plan.segments - 1  # the last stretch of text
        caches = run.score(kind, segment, picture=timed)
        if timed:
            timing = run.time(caches, segment)
        del caches
        gc.collect()  # a cache and what methods keep for it refer to each other, and are large
    rows = [row_of(loaded.model, m, measured[0], plan.context) for m in measured]
    return Comparison(
        model=loaded.name,
        context=plan.context,
        decode_tokens=plan.decode_tokens,
        seed=plan.seed,
        dtype=str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        budget=_budget(entries, plan),
        machine=costs.machine(),
        versions=costs.versions(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        bandwidth_gbs=_bandwidth(),
        methods=([timing] if timing else []) + rows,
        reference=measured[0].entry.label,
        literature=_literature(entries),
        rankings=rank(measured, measured[0], plan.budget) if plan.budget is not None else [],
    )


@dataclass
class _Run:
    """The working part of `compare`: scores and times all entries, and says how far it is."""

    loaded: LoadedModel
    measured: list[Measured]
    plan: Plan
    progress: Progress
    total: int
    done: int = 0

    def _tick(self, what: str) -> None:
        self.done += 1
        self.progress(what, self.done, self.total)

    def score(self, kind: str, segment: Segment, picture: bool) -> list[Any]:
        """Score every entry on one segment; returns the cache of each (shared where prefill is dense)."""
        shared: Any = None
        caches: list[Any] = []
        reserve = len(segment.context) + len(segment.continuation) + 64
        for m in self.measured:
            self._tick(f"{m.entry.label} on {kind}")
            caches.append(None)
            if m.error is not None:
                continue
            try:
                with self._attached(m) as handle:
                    runtime, cache = handle.runtime, shared
                    watches = runtime.decode is not None and runtime.decode.watches_prompt
                    own = runtime.prefill is not None or runtime.cache is not None or watches or _changes_prompts(m)
                    if own or cache is None:
                        chunk = len(segment.context) if own else 4096  # a sparse prefill sees the whole prompt
                        start = time.perf_counter()
                        cache = prefill(self.loaded.model, segment.context, reserve, chunk)
                        m.prefill_ms.append(1e3 * (time.perf_counter() - start))
                    if not own:
                        shared = cache
                    m.yardstick = yardstick_of(runtime)
                    if runtime.prefill is not None and kind == "text":
                        m.area = runtime.prefill.report().get("prefill_area")
                    runtime.stats.reset()
                    with runtime.recording() if picture else nullcontext(None) as trace:
                        scores = decode_known(self.loaded.model, runtime, cache, segment)
                    if kind == "text":
                        m.scores.append(scores)
                        m.count(runtime, cache)
                        m.count_neurons(handle.report())
                        if trace:
                            m.selection = picture_of(trace, runtime.shape.layers)
                    else:
                        m.task_scores.setdefault(kind, []).append(scores)
                    m.note(list(runtime.said.values()))
                    caches[-1] = cache
            except GossamerError as error:
                if m is self.measured[0]:
                    raise
                m.error = str(error)
        return caches

    def _attached(self, m: Measured) -> Any:
        return m.entry.recipe.attach(self.loaded.model)

    def time(self, caches: list[Any], segment: Segment) -> MethodResult | None:
        """Interleaved timing of all entries on their caches, and of the untouched model on the dense one."""
        model, plan = self.loaded.model, self.plan
        ways = {way: costs.StepTimes() for way in costs.TRANSFORMERS_WAYS} if plan.transformers else {}
        for _ in range(plan.rounds):
            costs.time_transformers(model, caches[0], 1, plan.steps, ways)
            for m, cache in zip(self.measured, caches, strict=True):
                self._tick(f"timing {m.entry.label}")
                if m.error is None:
                    with self._attached(m) as handle, costs.peak_memory() as peak:
                        if _changes_prompts(m):  # what it chooses while a prompt is read, it has not chosen yet
                            prefill(model, segment.context[-PROMPT:], PROMPT)
                        costs.time_steps(model, handle.runtime, cache, 1, plan.steps, m.times)
                    m.peak = max([m.peak or 0, *peak]) or None
        for m in self.measured:
            if m.error is None:
                m.overhead = costs.overhead_ms(model, lambda m=m: self._attached(m))  # type: ignore[misc]
        timed = {way: times for way, times in ways.items() if times.step}
        return transformers_row(model, timed, int(caches[0].nbytes)) if timed else None


def _changes_prompts(m: Measured) -> bool:
    return any(step.method.slot in CHANGES_PROMPTS for step in m.entry.recipe.steps)


def _budget(entries: Sequence[Entry], plan: Plan) -> str:
    if plan.budget is not None:
        return f"1/{1 / plan.budget:g} of dense attention, the same for all"
    values = {getattr(e.method, "tokens", None) for e in entries} - {None}
    return ", ".join(sorted(f"1/{1 / v:g}" if isinstance(v, float) and v < 1 else f"{v:g}" for v in values)) or "full"


def _literature(entries: Sequence[Entry]) -> list[PaperFigure]:
    """What the papers of the methods shown claim."""
    systems = [catalogue()[e.method.slug] for e in entries if e.method.slug in catalogue()]
    return [
        PaperFigure(s.slug, c.value, c.unit, c.metric, c.setting, f"{s.title} ({s.venue})")
        for s in dict.fromkeys(systems)
        for c in s.claims
    ]


def _bandwidth() -> float:
    """Read bandwidth of this machine in GB/s, measured now."""
    from gossamer.measure.bandwidth import measure_bandwidth

    return measure_bandwidth() / 1e9
