"""What may be said about a comparison: differences beyond noise, winners, ties, and where a method does not pay.

Two values count as different when they lie at least two standard errors of their difference apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from gossamer.measure.report.numbers import counted, human_bytes, listed, milliseconds, one_line, percent
from gossamer.measure.results import Comparison, Cost, Estimate, MethodResult, Quality, Spread

Value = Estimate | Spread | float

_ORACLES = frozenset({"exact-top-k"})


def noise(value: Value) -> float:
    """Standard error of a measured value; 0 for counted ones; NaN where it is unknown."""
    return value.stderr if isinstance(value, Estimate | Spread) else 0.0


def centre(value: Value) -> float:
    """The number itself."""
    if isinstance(value, Estimate):
        return value.mean
    return value.median if isinstance(value, Spread) else value


def differ(a: Value, b: Value) -> bool:
    """Whether the two lie at least two standard errors of their difference apart.

    An unknown error cannot show a difference. Treating the two as independent is conservative where both methods were
    measured on the same tokens: their errors move together there, so that a small real difference may pass for noise.

    >>> differ(Estimate(1.0, 0.1, 9), Estimate(1.2, 0.1, 9)), differ(1.0, 1.1)
    (False, True)
    """
    gap, doubt = abs(centre(a) - centre(b)), 2 * math.hypot(noise(a), noise(b))
    return gap > 0 and gap >= doubt  # False for NaN


def is_dense(row: MethodResult) -> bool:
    """Whether the row reads everything: our own dense kernel, or transformers as it is."""
    return row.slug == "dense" or row.slug.startswith("transformers")


def contenders(comparison: Comparison) -> list[MethodResult]:
    """The rows that claim a saving: measured, not dense, not the oracle that reads every key to choose."""
    return [m for m in comparison.methods if m.error is None and not is_dense(m) and m.slug not in _ORACLES]


def mean_of_tasks(quality: Quality | None, tasks: Sequence[str]) -> Estimate | None:
    """Mean accuracy; None where a task is missing, since such means do not compare."""
    if quality is None or not tasks or any(task not in quality.tasks for task in tasks):
        return None
    found = [quality.tasks[task] for task in tasks]
    if len(found) == 1:
        return found[0]
    error = math.sqrt(sum(e.stderr**2 for e in found)) / len(found)
    return Estimate(sum(e.mean for e in found) / len(found), error, sum(e.n for e in found))


@dataclass(frozen=True)
class Metric:
    """One thing to compare by."""

    key: str
    title: str
    low_is_good: bool
    of: Callable[[MethodResult], Value | None]

    def best(self, rows: Iterable[MethodResult]) -> tuple[MethodResult | None, list[MethodResult]]:
        """The best row and those that cannot be told from it."""
        known = [(row, value) for row in rows if (value := self.of(row)) is not None and not math.isnan(centre(value))]
        if not known:
            return None, []
        known.sort(key=lambda item: centre(item[1]) * (1 if self.low_is_good else -1))
        first, value = known[0]
        return first, [row for row, other in known[1:] if not differ(value, other)]


def _of_cost(read: Callable[[Cost], Value | None]) -> Callable[[MethodResult], Value | None]:
    return lambda row: read(row.cost) if row.cost is not None else None


def of_quality(read: Callable[[Quality], Estimate | None]) -> Callable[[MethodResult], Value | None]:
    """A reader of rows from a reader of their quality; None for a row without one."""
    return lambda row: read(row.quality) if row.quality is not None else None


def metrics(comparison: Comparison) -> dict[str, Metric]:
    """Everything that this comparison can be ranked by."""
    tasks = task_names(comparison)
    found = [
        Metric("kl", "KL from dense", True, of_quality(lambda q: q.kl)),
        Metric("agreement", "same token as dense", False, of_quality(lambda q: q.agreement)),
        Metric("perplexity", "perplexity", True, of_quality(lambda q: q.perplexity)),
        Metric("tasks", "task accuracy", False, lambda row: mean_of_tasks(row.quality, tasks)),
        Metric("token_ms", "time per token", True, _of_cost(lambda c: c.token_ms)),
        Metric("bytes_read", "bytes read per token", True, _of_cost(lambda c: c.bytes_read)),
        Metric("held", "bytes held", True, _of_cost(lambda c: float(c.kv_bytes_held + c.extra_bytes_held))),
    ]
    return {metric.key: metric for metric in found}


def task_names(comparison: Comparison) -> list[str]:
    """The tasks of all rows, in order of appearance."""
    names: dict[str, None] = {}
    for row in comparison.methods:
        if row.quality is not None:
            names |= dict.fromkeys(row.quality.tasks)
    return list(names)


def winners(comparison: Comparison) -> dict[str, MethodResult]:
    """By metric, the contender that beats every other contender by more than noise; a tie has no winner."""
    rows, won = contenders(comparison), {}
    for key, metric in metrics(comparison).items():
        first, ties = metric.best(rows)
        if first is not None and not ties and sum(metric.of(row) is not None for row in rows) > 1:
            won[key] = first
    return won


def yardstick(comparison: Comparison) -> MethodResult | None:
    """The row to judge a method's time by: our own dense kernel where it ran, else the reference."""
    for row in comparison.methods:
        if row.slug == "dense" and row.error is None and row.cost is not None and row.cost.token_ms is not None:
            return row
    row_or_none = comparison.reference_row
    return row_or_none if row_or_none is not None and row_or_none.cost is not None else None


def timed_beside(comparison: Comparison) -> list[MethodResult]:
    """Timed rows to give speeds against: the reference, our dense kernel, transformers as it is."""
    transformers = [row for row in comparison.methods if row.slug.startswith("transformers") and row.error is None]
    found: list[MethodResult] = []
    for row in (comparison.reference_row, yardstick(comparison), *transformers[:1]):
        if row is not None and row.cost is not None and row.cost.token_ms is not None and row not in found:
            found.append(row)
    return found


def speedup(row: MethodResult, reference: MethodResult | None) -> str:
    """How many times faster than the reference; ≈ where that is within noise."""
    if row is reference or reference is None or row.cost is None or reference.cost is None:
        return ""
    ours, theirs = row.cost.token_ms, reference.cost.token_ms
    if ours is None or theirs is None or ours.median <= 0:
        return ""
    return f"{'' if differ(ours, theirs) else '≈'}{theirs.median / ours.median:.2f}×"


def headroom(row: MethodResult | None) -> tuple[float, float] | None:
    """Attention's share of a step, and how much faster the step were with free attention."""
    if row is None or row.cost is None or row.cost.attention_ms is None or row.cost.token_ms is None:
        return None
    step = row.cost.token_ms.median
    share = row.cost.attention_ms.median / step if step > 0 else math.nan
    return (share, 1 / (1 - share)) if 0 <= share < 1 else None


def headline(comparison: Comparison) -> str:
    """What was measured, on what.

    >>> headline(Comparison("smollm2", 8192, 64, 0, "float32", 2, "1/16", {}, {}, "", None, [], "dense"))
    'Nothing measured on smollm2'
    """
    model = comparison.model
    if len(model) > 48:  # a path: its end says most
        model = model.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    ran = [m for m in comparison.methods if m.error is None]
    if not ran:
        return f"Nothing measured on {model}"
    return f"{counted(len(ran), 'way')} to attend to {comparison.context:,} tokens with {model}"


@dataclass(frozen=True)
class Remark:
    """One sentence for the reader.

    Attributes:
        kind: `pay` where a method does not pay and why, `noise` for ties, `method` for its own note, `error` if it
            did not run.
        text: the sentence.
    """

    kind: Literal["pay", "noise", "method", "error"]
    text: str


def remarks(comparison: Comparison) -> list[Remark]:
    """What the numbers do not say by themselves: failures, where a method does not pay and why, ties, notes."""
    found = [Remark("error", f"{m.label} did not run: {one_line(m.error)}") for m in comparison.methods if m.error]
    found += [Remark("pay", text) for text in _where_it_does_not_pay(comparison)]
    if not comparison.rankings:  # they say it better, from paired samples
        found += [Remark("noise", text) for text in _ties(comparison)]
    notes: dict[str, list[str]] = {}
    for row in comparison.methods:
        for note in row.notes:
            notes.setdefault(one_line(note), []).append(row.label)
    found += [Remark("method", f"{listed(labels)}: {note}") for note, labels in notes.items()]
    return found


def _where_it_does_not_pay(comparison: Comparison) -> list[str]:
    found = []
    base = yardstick(comparison)
    ceiling = headroom(base)
    if base is not None and base.cost is not None and ceiling is not None:
        share, gain = ceiling
        found.append(
            f"At {comparison.context:,} tokens attention is {percent(share)} of a decode step of {base.label}: "
            f"attention that cost nothing would make the step {gain:.2f} times faster, no more."
        )
    for row in contenders(comparison):
        if row.cost is None:
            continue
        if base is not None and base.cost is not None:
            found += _slower(row, row.cost, base, base.cost)
        share_read = row.cost.share_read
        if row.cost.neurons_kept is None and share_read is not None and share_read >= 1:  # neurons save weights instead
            found.append(f"{row.label} reads {share_read:.2f} times what dense attention reads: it saves no traffic.")
        held = row.cost.kv_bytes_held + row.cost.extra_bytes_held
        if base is not None and base.cost is not None and 0 < base.cost.kv_bytes_held < held:
            more = held / base.cost.kv_bytes_held - 1
            found.append(
                f"{row.label} holds {percent(more)} more than dense: it keeps all keys and values, and "
                f"{human_bytes(row.cost.extra_bytes_held)} to choose among them."
            )
    return found


def _slower(row: MethodResult, cost: Cost, base: MethodResult, dense: Cost) -> list[str]:
    """Why a method gains no time, as far as the measured parts tell."""
    if cost.token_ms is None or dense.token_ms is None:
        return []
    ours, theirs = cost.token_ms.median, dense.token_ms.median
    if ours < theirs and differ(cost.token_ms, dense.token_ms):
        return []
    slower = differ(cost.token_ms, dense.token_ms)
    verdict = "is slower than" if slower else "is not measurably faster than"
    text = f"{row.label} {verdict} {base.label} ({milliseconds(ours)} against {milliseconds(theirs)} ms a token)"
    if cost.attention_ms is None or dense.attention_ms is None:
        return [f"{text}."]
    a, b = cost.attention_ms.median, dense.attention_ms.median
    if a < b:
        return [f"{text}: its attention saves {milliseconds(b - a)} ms of a {milliseconds(theirs)} ms step."]
    text += f": its attention takes {milliseconds(a)} ms against {milliseconds(b)}"
    if (cost.overhead_ms or 0) > (dense.overhead_ms or 0):
        text += f" (overhead {milliseconds(cost.overhead_ms)} against {milliseconds(dense.overhead_ms)})"
    if cost.share_read is not None and cost.share_read < 1:
        text += (
            f", although it reads {percent(cost.share_read)} of the bytes; choosing and gathering cost more than that "
            "saves here"
        )
    return [f"{text}."]


def _ties(comparison: Comparison) -> list[str]:
    found = []
    rows, reference = contenders(comparison), comparison.reference_row
    for key, metric in metrics(comparison).items():
        first, ties = metric.best(rows)
        if first is not None and ties and key not in ("bytes_read", "held"):
            names = listed([first.label, *(row.label for row in ties)])
            found.append(f"Within noise of the best {metric.title}: {names}.")
    if reference is not None:
        for key in ("perplexity", "tasks", "token_ms"):
            metric = metrics(comparison)[key]
            if (theirs := metric.of(reference)) is None:
                continue
            same = [r.label for r in rows if (v := metric.of(r)) is not None and not differ(v, theirs)]
            if same:
                found.append(f"Within noise of {reference.label} in {metric.title}: {listed(same)}.")
    return found
