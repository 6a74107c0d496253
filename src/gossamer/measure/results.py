"""What a comparison found: plain data that `compare` fills, `report` shows and JSON keeps.

    comparison.save("run.json")
    comparison = Comparison.load("run.json")

A value that was not measured is ``None``; nothing is filled in for it. Sizes are bytes, times milliseconds, shares lie
in 0..1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from gossamer.errors import InputError
from gossamer.files import write_whole

_FORMAT = 1
_IQR_OF_A_NORMAL = 1.349  # quartile distance of a normal distribution, in standard deviations
_MEDIAN_INEFFICIENCY = 1.2533  # standard error of a median over that of a mean
_Z = 2  # standard errors that make a difference in a report
_NO_SAMPLES = "an estimate needs at least one sample"


@dataclass(frozen=True)
class Spread:
    """A timing: its median and its 25th and 75th percentile over `n` runs."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, samples: Iterable[float]) -> Spread:
        """From raw samples.

        >>> Spread.of([1.0, 2.0, 3.0, 4.0, 5.0])
        Spread(median=3.0, low=2.0, high=4.0, n=5)
        """
        values = _samples(samples)
        low, median, high = (float(x) for x in np.percentile(values, [25, 50, 75]))
        return cls(median, low, high, len(values))

    @property
    def stderr(self) -> float:
        """Standard error of the median, from the quartiles as if normal; NaN for fewer than two runs."""
        if self.n < 2:
            return math.nan
        return _MEDIAN_INEFFICIENCY * (self.high - self.low) / _IQR_OF_A_NORMAL / math.sqrt(self.n)


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` samples and its standard error (NaN when one sample leaves it unknown)."""

    mean: float
    stderr: float
    n: int

    @classmethod
    def of(cls, samples: Iterable[float]) -> Estimate:
        """From raw samples.

        >>> Estimate.of([1.0, 3.0])
        Estimate(mean=2.0, stderr=1.0, n=2)
        """
        values = _samples(samples)
        n = len(values)
        return cls(float(values.mean()), float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan, n)

    @classmethod
    def of_share(cls, successes: int, n: int) -> Estimate:
        """From `n` samples that are each a success or not.

        The mean is the share p that was observed. Its standard error is such that two of them reach from p to the
        farther end of Wilson's interval, (z |1/2 − p| + √(n p (1 − p) + z²/4)) / (n + z²) with z = 2, so that none or
        all of a few samples do not look certain.

        >>> Estimate.of_share(4, 4)
        Estimate(mean=1.0, stderr=0.25, n=4)

        Raises:
            InputError: no samples, or a count outside 0..n.
        """
        if n < 1:
            raise InputError(_NO_SAMPLES)
        if not 0 <= successes <= n:
            raise InputError(f"{successes} successes of {n} samples: there must be 0 to {n}")
        p = successes / n
        reach = _Z * abs(0.5 - p) + math.sqrt(n * p * (1 - p) + _Z**2 / 4)
        return cls(p, reach / (n + _Z**2), n)


@dataclass(frozen=True)
class Cost:
    """What one method costs in time and bytes, on the machine of the comparison.

    Attributes:
        prefill_ms: the whole prompt.
        token_ms: one decode step.
        attention_ms: attention's part of that step: kernels, selection, and the plug point around them.
        overhead_ms: of `attention_ms`, what the plug point adds around the kernels.
        kv_bytes_held: keys and values kept.
        extra_bytes_held: what the method keeps beside them (labels, page bounds).
        kv_bytes_read: keys and values read per token.
        score_bytes_read: read per token to choose them.
        dense_bytes_read: what dense attention reads per token at this context.
        weight_bytes_read: parameters read per token.
        peak_memory: of the process, in bytes.
        formula_bytes: what the method's own formula gives, for whoever checks the counts against it; not shown.
        prefill_area: share of the causal attention map that the prompt's attention computed; None where dense.
        neurons_kept: share of the MLPs' neurons that decoded tokens computed; None where dense.
    """

    prefill_ms: Spread | None = None
    token_ms: Spread | None = None
    attention_ms: Spread | None = None
    overhead_ms: float | None = None
    kv_bytes_held: int = 0
    extra_bytes_held: int = 0
    kv_bytes_read: float = 0.0
    score_bytes_read: float = 0.0
    dense_bytes_read: float = 0.0
    weight_bytes_read: int = 0
    peak_memory: int | None = None
    formula_bytes: dict[str, float] | None = None
    prefill_area: float | None = None
    neurons_kept: float | None = None

    @property
    def bytes_read(self) -> float:
        """Everything attention reads per token: the rows and what it takes to choose them."""
        return self.kv_bytes_read + self.score_bytes_read

    @property
    def share_read(self) -> float | None:
        """`bytes_read` over what dense attention reads."""
        return self.bytes_read / self.dense_bytes_read if self.dense_bytes_read else None

    @property
    def model_ms(self) -> float | None:
        """What of a decode step is not attention."""
        if self.token_ms is None or self.attention_ms is None:
            return None
        return max(0.0, self.token_ms.median - self.attention_ms.median)


@dataclass(frozen=True)
class Quality:
    """How close a method stays to the dense model.

    Attributes:
        kl: KL divergence of the next-token distribution from the dense model's, in nats per token; None for dense rows,
            which are the reference.
        agreement: share of positions with the dense model's most likely token; likewise.
        perplexity: on text.
        tasks: accuracy by task.
        task_logprob: mean log-probability of the right answer by task.
    """

    kl: Estimate | None = None
    agreement: Estimate | None = None
    perplexity: Estimate | None = None
    tasks: dict[str, Estimate] = field(default_factory=dict)
    task_logprob: dict[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class Selection:
    """What was read, in a picture: ``density[layer][head][bin]``.

    Each value is the share of the rows in that stretch of the context that the head read, averaged over the decode
    steps looked at. Stretches are equally long; the first begins at the start of the context.

    Attributes:
        layers: index of each pictured layer in the model.
        heads: heads per layer (query heads, or KV heads where a group selects together).
        bins: stretches of the context.
        density: the picture.
    """

    layers: list[int]
    heads: int
    bins: int
    density: list[list[list[float]]]

    def __post_init__(self) -> None:
        fits = len(self.density) == len(self.layers) and all(
            len(heads) == self.heads and all(len(bins) == self.bins for bins in heads) for heads in self.density
        )
        if not fits:
            raise InputError(
                f"a selection's density must be [{len(self.layers)} layers][{self.heads} heads][{self.bins} bins]"
            )


@dataclass(frozen=True)
class MethodResult:
    """One row of a comparison.

    Attributes:
        slug: name in the registry; `transformers` for the model as transformers runs it.
        label: what a reader sees.
        settings: the method's hyperparameters, JSON types only.
        baseline: whether it is there to be compared with.
        quality: None where the method did not run.
        cost: None where the method did not run.
        selection: None for dense methods, or where nothing was pictured.
        notes: honest remarks, one sentence each, such as "context within the budget: dense".
        error: why the method did not run, one line.
    """

    slug: str
    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    baseline: bool = False
    quality: Quality | None = None
    cost: Cost | None = None
    selection: Selection | None = None
    notes: list[str] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class PaperFigure:
    """A number from the literature: not measured here, and shown as such."""

    slug: str
    value: float
    unit: str
    metric: str
    setting: str
    source: str = ""


@dataclass(frozen=True)
class Place:
    """A method's place in a ranking.

    Attributes:
        label: of its row.
        rank: 1 + how many of the ranked methods are better by more than noise; methods may share a rank. None for what
            is not ranked: oracles, and methods over the budget.
        value: the mean.
        stderr: its standard error; NaN where one sample leaves it unknown.
        share: what it was measured to spend of what dense attention spends.
        over: whether that is more than the budget.
    """

    label: str
    rank: int | None
    value: float
    stderr: float
    share: float | None
    over: bool


@dataclass(frozen=True)
class Ranking:
    """Methods that share a yardstick, best first.

    Attributes:
        metric: by what they are ordered.
        yardstick: what the budget counts: KV bytes `read` per token, KV bytes `held`, the `area` of attention that
            prefill computes, or `neurons` computed.
        budget: share of what dense attention spends.
        samples: independent samples that a difference rests on.
        places: the order, those without a rank last.
    """

    metric: str
    yardstick: str
    budget: float
    samples: int
    places: list[Place]


@dataclass(frozen=True)
class Comparison:
    """Methods side by side, measured in one run.

    Attributes:
        model: name or path.
        context: tokens before the first decode step.
        decode_tokens: decode steps measured.
        seed: of data and sampling.
        dtype: of the cache and the model, as torch spells it.
        threads: compute threads.
        budget: the budget in words, such as "1/16 of the context".
        machine: facts about it (cpu, cores, memory, system …).
        versions: of gossamer, torch, transformers, python ….
        created: ISO 8601.
        bandwidth_gbs: read bandwidth measured in the run, 10^9 bytes a second.
        methods: the rows.
        reference: slug or label of the row that the ratios are against.
        command: what to type to run it again.
        literature: the papers' own figures for the methods shown, if wanted.
        rankings: the order of the methods at one budget, where the comparison was made as a study.
    """

    model: str
    context: int
    decode_tokens: int
    seed: int
    dtype: str
    threads: int
    budget: str
    machine: dict[str, Any]
    versions: dict[str, str]
    created: str
    bandwidth_gbs: float | None
    methods: list[MethodResult]
    reference: str
    command: str = ""
    literature: list[PaperFigure] = field(default_factory=list)
    rankings: list[Ranking] = field(default_factory=list)

    @property
    def reference_row(self) -> MethodResult | None:
        """The row that the ratios are against; None where it is missing or did not run."""
        for row in self.methods:
            if self.reference in (row.slug, row.label):
                return row if row.error is None else None
        return None

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; NaN and infinities become strings."""
        return {"format": _FORMAT, **json.loads(_adapter().dump_json(self))}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Comparison:
        """The inverse of `to_dict`.

        Raises:
            InputError: not a comparison, or one of another format.
        """
        if not isinstance(data, dict) or "methods" not in data:
            raise InputError("this is not a comparison: it has no `methods`")
        if (found := data.get("format", _FORMAT)) != _FORMAT:
            raise InputError(f"this comparison has format {found}, this version reads {_FORMAT}")
        try:
            return _adapter().validate_python({k: v for k, v in data.items() if k != "format"})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            reason = first["msg"].splitlines()[0].removeprefix("Value error, ")
            raise InputError(f"this is not a comparison: {where}: {reason}") from None

    def save(self, path: str | Path) -> Path:
        """Write JSON, complete or not at all.

        Raises:
            OutputError: the file cannot be written.
        """
        return write_whole(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Read a file that `save` wrote.

        Raises:
            InputError: missing, damaged, or not a comparison.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from None
        except ValueError:
            raise InputError(f"{path} is damaged or not JSON: run the comparison again") from None
        try:
            return cls.from_dict(data)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


def _samples(samples: Iterable[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    values = np.asarray(list(samples), dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise InputError(_NO_SAMPLES)
    return values


@cache
def _adapter() -> TypeAdapter[Comparison]:
    return TypeAdapter(Comparison)


for _record in (Spread, Estimate, Cost, Quality, Selection, MethodResult, PaperFigure, Place, Ranking, Comparison):
    setattr(_record, "__pydantic_config__", ConfigDict(ser_json_inf_nan="strings"))  # noqa: B010 (unknown to mypy)
