"""ALISA's schedule: in which tier each token's keys and values lie, step by step, and what that costs.

With s prompt tokens and n = s + j tokens cached at step j, oldest tokens first in line for the slow tier:

    phase I    j < p1          all in fast memory
    phase II   p1 ≤ j < p2     the oldest C = α·n tokens in the slow tier, the others, recent ones, in fast memory
    phase III  j ≥ p2          of those C the oldest D = β·C deleted; a selected one is computed again from its layer input

    T^m_j = bytes of (θ^c_j + θ^g_j) tokens / B          θ^c: moved out at this step; θ^g: selected, in the slow tier
    total = Σ_j T^c_j + Σ_{j ≥ p1} T^m_j + Σ_{j ≥ p2} T^r_j

T^c and T^r come from a table that `profile` measures on this machine (or `roofline` derives from hardware constants); one
token's K and V are ``2·b·l·h·bytes``, the paper's ``4·b·l·h`` in fp16 without grouped queries.

Decisions: α·n is where tokens *are*, so a token crosses once and θ^c is the difference between two steps (the printed
formula would move all of them at each step, and could not keep every token in one place). Tokens move in blocks, which is
also what an INT8 scale belongs to. Layer inputs of tokens that will be deleted lie in the slow tier, written when the token
is new: reading one moves ``h`` values instead of ``2·h_kv``, so recomputation pays only where keys and values are wider than
that, the link slow, and the GEMM quick; the planner finds β = 0 elsewhere. θ^g is not known before the run: the k global
tokens are taken to lie evenly among the candidates.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import nn

from gossamer.attention.alisa_formulas import attend_packed
from gossamer.errors import InputError
from gossamer.files import write_whole
from gossamer.hf import model_shape
from gossamer.hf.views import text_config
from gossamer.models import cache_folder

Table = tuple[tuple[int, float], ...]
_STEPS = 17  # values tried for each unknown


def interpolate(table: Table, at: np.ndarray) -> np.ndarray:
    """A table ``((x, seconds), …)`` read at any x: straight lines between the entries, the last one's slope beyond.

    >>> interpolate(((0, 0.0), (10, 1.0)), np.array([5, 20])).tolist()
    [0.5, 2.0]
    """
    x, y = (np.array(column, dtype=float) for column in zip(*table, strict=True))
    slope = (y[-1] - y[-2]) / (x[-1] - x[-2]) if len(x) > 1 else 0.0
    seconds: np.ndarray = np.interp(at, x, y) + slope * np.maximum(at - x[-1], 0)
    return seconds


class Profile(BaseModel):
    """What a step costs on a machine, whole model and batch.

    Attributes:
        compute: attended tokens of each sequence → seconds of a decode step without transfers.
        recompute: tokens of each sequence → seconds to compute their keys and values again in all layers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    compute: Table
    recompute: Table

    @field_validator("compute", "recompute")
    @classmethod
    def _check(cls, table: Table) -> Table:
        ascending = all(a[0] < b[0] for a, b in itertools.pairwise(table))
        if not table or not ascending or any(x < 0 or seconds < 0 for x, seconds in table):
            raise ValueError("a table needs ascending sizes and seconds that are not negative")
        return table


@dataclass(frozen=True)
class Sizes:
    """What the costs of a model depend on; ``kv_width`` is kv_heads × head_dim."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int

    @property
    def kv_width(self) -> int:
        """Values of one key."""
        return self.kv_heads * self.head_dim

    @classmethod
    def of(cls, model: nn.Module) -> Sizes:
        """Of a transformers model.

        Raises:
            ModelError: it is no decoder-only transformer.
        """
        shape, config = model_shape(model), text_config(model)
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
        return cls(shape.layers, config.hidden_size, shape.heads, shape.kv_heads, shape.head_dim, inner)


class AlisaPlan(BaseModel):
    """Where tokens lie at each step: the schedule {α, β, p1, p2} for one model, batch and length.

    Attributes:
        alpha: share of the cached tokens in the slow tier from step p1 on.
        beta: share of those that is deleted from step p2 on.
        block: tokens that move together.
        element_size: bytes of a value in fast memory; ``kv_bits``: bits of one in the slow tier (None: the same).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    layers: int = Field(ge=1)
    hidden: int = Field(ge=1)
    kv_width: int = Field(ge=1)
    batch: int = Field(ge=1)
    prompt: int = Field(ge=1)
    output: int = Field(ge=1)
    fast_bytes: int = Field(ge=0)
    bandwidth: float = Field(gt=0)
    profile: Profile
    ratio: float = Field(0.2, gt=0, le=1)
    element_size: int = Field(2, ge=1, le=8)
    kv_bits: Literal[4, 8] | None = None
    block: int = Field(64, ge=1)
    alpha: float = Field(1.0, ge=0, le=1)
    beta: float = Field(0.0, ge=0, le=1)
    p1: int = Field(0, ge=0)
    p2: int = Field(0, ge=0)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "settings"
            raise InputError(
                f"alisa plan: {where}: {first['msg'].removeprefix('Value error, ')} (got {str(first['input'])[:80]})"
            ) from None

    @model_validator(mode="after")
    def _ordered(self) -> AlisaPlan:
        if self.p2 < self.p1:
            raise ValueError("p2 must not come before p1")
        return self

    @property
    def token_bytes(self) -> int:
        """K and V of one token in fast memory, all layers and sequences: the paper's ``4·b·l·h``."""
        return 2 * self.batch * self.layers * self.kv_width * self.element_size

    @property
    def slow_bytes(self) -> float:
        """The same in the slow tier."""
        if self.kv_bits is None:
            return float(self.token_bytes)
        return 2 * self.batch * self.layers * self.kv_width * self.kv_bits / 8

    @property
    def scale_bytes(self) -> float:
        """Scales and zero points of a slow token, its share of its block's; they stay in fast memory."""
        return 0.0 if self.kv_bits is None else 2 * self.batch * self.layers * self.kv_width * 8 / self.block

    @property
    def input_bytes(self) -> int:
        """The inputs of all layers for one token and every sequence."""
        return self.batch * self.layers * self.hidden * self.element_size

    def tiers(self, tokens: int) -> tuple[int, int]:
        """``(D, C)`` with so many tokens cached: tokens before D are deleted, those before C slow, the others fast."""
        deleted, slow = self._tiers(np.array([tokens]))
        return int(deleted[0]), int(slow[0])

    def last_deleted(self) -> int:
        """Tokens from this one on are never deleted, so their layer inputs need not be kept."""
        return self.tiers(self.prompt + self.output)[0]

    def _tiers(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        step, block = tokens - self.prompt, self.block
        share = np.ceil(np.round(self.alpha * tokens / block, 9))
        slow = np.minimum(share, np.maximum(tokens - 1, 0) // block).astype(int) * block
        slow = np.where(step >= self.p1, slow, 0)
        planned = np.minimum(slow, self._end_slow())
        deleted = np.floor(np.round(self.beta * planned / block, 9)).astype(int) * block
        return np.where(step >= self.p2, deleted, 0), slow

    def _end_slow(self) -> int:
        """C at the end of what was planned; a run that goes on deletes no more."""
        end = self.prompt + self.output
        return min(math.ceil(round(self.alpha * end / self.block, 9)), (end - 1) // self.block) * self.block


@dataclass(frozen=True)
class Step:
    """What one step moves and costs; token counts are of one sequence (loads are expectations)."""

    step: int
    phase: Literal["I", "II", "III"]
    fast: int
    slow: int
    deleted: int
    moved_out: int
    loaded: float
    recomputed: float
    kv_bytes: float
    input_bytes: float
    compute_seconds: float
    transfer_seconds: float
    recompute_seconds: float

    @property
    def seconds(self) -> float:
        """All three, one after the other."""
        return self.compute_seconds + self.transfer_seconds + self.recompute_seconds


@dataclass(frozen=True)
class Simulation:
    """All steps of a plan."""

    steps: tuple[Step, ...]

    @property
    def seconds(self) -> float:
        """Of the whole generation, prefill not counted."""
        return sum(s.seconds for s in self.steps)

    @property
    def bytes(self) -> float:
        """That cross the link."""
        return sum(s.kv_bytes + s.input_bytes for s in self.steps)

    @property
    def phases(self) -> list[str]:
        """Phases in the order in which they come, each once."""
        return list(dict.fromkeys(s.phase for s in self.steps))


def _columns(plan: AlisaPlan) -> dict[str, np.ndarray]:
    """The numbers of `simulate`, one array a column."""
    j = np.arange(plan.output)
    n = plan.prompt + j
    deleted, slow = plan._tiers(n)
    k = np.floor(n * plan.ratio / 2 + 0.5).astype(int)
    everything = (k == 0) | (2 * k >= n)
    others = np.maximum(n - k, 1)

    def selected(end: np.ndarray) -> np.ndarray:
        """Expected attended tokens before `end`: global ones evenly among the candidates, local ones if so deep."""
        part = k * np.minimum(end, n - k) / others + np.maximum(end - (n - k), 0)
        return np.where(everything, end, part)

    recomputed = selected(deleted)
    loaded = selected(slow) - recomputed
    moved = np.diff(slow, prepend=0)
    kept = plan.last_deleted()
    written = np.where(j == 0, np.minimum(kept, plan.prompt), 0) + (n < kept)
    kv_bytes = plan.slow_bytes * (moved + loaded)
    input_bytes = plan.input_bytes * (written + recomputed)
    return {
        "n": n,
        "slow": slow - deleted,
        "deleted": deleted,
        "moved": moved,
        "loaded": loaded,
        "recomputed": recomputed,
        "kv_bytes": kv_bytes,
        "input_bytes": input_bytes,
        "compute": interpolate(plan.profile.compute, np.where(everything, n, 2 * k) + 1),
        "transfer": (kv_bytes + input_bytes) / plan.bandwidth,
        "recompute": np.where(recomputed > 0, interpolate(plan.profile.recompute, recomputed), 0.0),
    }


def total_seconds(plan: AlisaPlan) -> float:
    """`simulate(plan).seconds`, quicker."""
    c = _columns(plan)
    return float((c["compute"] + c["transfer"] + c["recompute"]).sum())


def simulate(plan: AlisaPlan) -> Simulation:
    """Every step of a plan under its cost model.

    >>> table = Profile(compute=((1, 0.01),), recompute=((0, 0.0), (100, 0.01)))
    >>> plan = alisa_plan(Sizes(2, 8, 2, 2, 4, 16), 1, 64, 64, fast_bytes=96 * 64, bandwidth=1e6, profile=table, block=4)
    >>> plan.p1, simulate(plan).phases[0]
    (33, 'I')
    """
    c = _columns(plan)
    steps = []
    for j in range(plan.output):
        phase: Literal["I", "II", "III"] = "I" if j < plan.p1 else "II" if j < plan.p2 else "III"
        slow, deleted = int(c["slow"][j]), int(c["deleted"][j])
        steps.append(
            Step(
                j,
                phase,
                int(c["n"][j]) - slow - deleted,
                slow,
                deleted,
                int(c["moved"][j]),
                *(float(c[x][j]) for x in ("loaded", "recomputed", "kv_bytes", "input_bytes")),
                *(float(c[x][j]) for x in ("compute", "transfer", "recompute")),
            )
        )
    return Simulation(tuple(steps))


def alisa_plan(
    model: nn.Module | Sizes,
    batch: int,
    prompt: int,
    output: int,
    *,
    fast_bytes: int,
    bandwidth: float,
    profile: Profile | None = None,
    ratio: float = 0.2,
    element_size: int | None = None,
    kv_bits: Literal[4, 8] | None = None,
    block: int = 64,
) -> AlisaPlan:
    """The schedule with the least total time, by greedy search.

    p1 is the first step at which the keys and values of all tokens exceed `fast_bytes`. From (α = 1, β = 0) on, the best
    α and then the best (β, p2) are taken in turn until neither helps, so the result is never worse than that start.

    Args:
        model: the model, or its `Sizes`.
        batch, prompt, output: sequences, their tokens before and during generation.
        fast_bytes: what fast memory has for keys and values.
        bandwidth: of the link between the tiers, bytes per second.
        profile: of this machine (default: `profile_machine`, measured once and kept in a file).
        ratio: of the attention, as in `Alisa`.
        element_size: bytes of a value (default: of the model's, 2 for `Sizes`).
        kv_bits: of the slow tier.
        block: tokens that move together.

    Raises:
        InputError: sizes out of range, or fast memory that can't hold a block and the current token.
    """
    if not isinstance(model, Sizes) and element_size is None:
        element_size = next(model.parameters()).element_size()
    sizes = model if isinstance(model, Sizes) else Sizes.of(model)
    values: dict[str, Any] = {
        "layers": sizes.layers,
        "hidden": sizes.hidden,
        "kv_width": sizes.kv_width,
        "batch": batch,
        "prompt": prompt,
        "output": output,
        "fast_bytes": fast_bytes,
        "bandwidth": bandwidth,
        "ratio": ratio,
        "element_size": 2 if element_size is None else element_size,
        "kv_bits": kv_bits,
        "block": block,
    }
    empty = Profile(compute=((1, 0.0),), recompute=((1, 0.0),))
    plan = AlisaPlan(**values, profile=empty, p1=output, p2=output)  # bad values fail before anything is measured
    end, room = prompt + output, fast_bytes // plan.token_bytes
    if profile is None:
        profile = profile_machine(sizes, batch, end)
    p1 = max(0, room + 1 - prompt)
    if p1 >= output:
        return AlisaPlan(**values, profile=profile, alpha=0.0, p1=output, p2=output)
    if room < block + 1:
        raise InputError(
            f"alisa plan: fast memory holds {room} tokens: give it {block + 1} at least, or choose a smaller block"
        )
    # (1 − α)·n·token + α·n·scale ≤ fast_bytes, with n tokens at the end
    least = (plan.token_bytes - fast_bytes / (end - 1)) / (plan.token_bytes - plan.scale_bytes)
    if plan.scale_bytes >= plan.token_bytes or least > 1:
        raise InputError(
            f"alisa plan: scales of blocks of {block} tokens leave no room in {fast_bytes} bytes: choose a larger block"
        )

    def make(alpha: float, beta: float, p2: int) -> AlisaPlan:
        return AlisaPlan(**values, profile=profile, alpha=alpha, beta=beta, p1=p1, p2=p2)

    best = make(1.0, 0.0, output)
    seconds = total_seconds(best)
    alphas = [least + (1 - least) * i / (_STEPS - 1) for i in range(_STEPS)]
    betas = [i / (_STEPS - 1) for i in range(_STEPS)]
    switches = sorted({p1 + round((output - p1) * i / (_STEPS - 1)) for i in range(_STEPS)})
    while True:
        before = seconds
        for unknown in ("alpha", "beta and p2"):
            if unknown == "alpha":
                tried = [make(alpha, best.beta, best.p2) for alpha in alphas]
            else:
                tried = [make(best.alpha, beta, p2) for beta in betas for p2 in switches]
            costs = [total_seconds(candidate) for candidate in tried]
            if min(costs) < seconds:
                seconds, best = min(costs), tried[costs.index(min(costs))]
        if seconds >= before:
            return best


# -- the table ----------------------------------------------------------------------------------------------------------


def roofline(
    sizes: Sizes, batch: int, longest: int, *, flops: float, memory: float, element_size: int = 2, launch: float = 0.0
) -> Profile:
    """A table from hardware constants: the slower of arithmetic and memory for weights and attention, never measured.

    Args:
        longest: tokens up to which the table goes.
        flops: per second; memory: bytes per second of fast memory; launch: seconds that a layer costs in any case.
    """
    h, width = sizes.hidden, sizes.heads * sizes.head_dim
    weights = 2 * h * width + 2 * h * sizes.kv_width + 2 * h * sizes.intermediate
    compute, recompute = [], []
    for tokens in _grid(longest):
        linear = max(2 * batch * weights / flops, weights * element_size / memory)
        rows = max(4 * batch * tokens * width / flops, 2 * batch * tokens * sizes.kv_width * element_size / memory)
        compute.append((tokens, sizes.layers * (linear + rows + launch)))
        gemm = max(4 * batch * tokens * h * sizes.kv_width / flops, 2 * h * sizes.kv_width * element_size / memory)
        recompute.append((tokens, sizes.layers * (gemm + launch)))
    return Profile(compute=tuple(compute), recompute=tuple(recompute))


def _grid(longest: int) -> list[int]:
    """1, 2, 4, … and the longest."""
    return sorted({min(1 << i, longest) for i in range(longest.bit_length() + 1)})


def profile_machine(
    model: nn.Module | Sizes, batch: int, longest: int, *, folder: Path | None = None, repeats: int = 5
) -> Profile:
    """Measure the table on this machine, with one layer's shapes in fp32, and keep it in a file for the next time.

    Raises:
        OutputError: the file cannot be written.
    """
    sizes = model if isinstance(model, Sizes) else Sizes.of(model)
    if batch < 1 or longest < 1 or repeats < 1:
        raise InputError("profile_machine: batch, longest and repeats must be 1 or more")
    key = json.dumps([vars(sizes), batch, longest, torch.get_num_threads(), torch.__version__])
    path = (folder or cache_folder() / "profiles") / f"alisa-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if path.is_file():
        try:
            return Profile.model_validate_json(path.read_text("utf-8"))
        except (OSError, ValueError):
            pass  # damaged: measure again
    profile = _measure(sizes, batch, longest, repeats)
    write_whole(path, profile.model_dump_json(), "the profile")
    return profile


def _measure(sizes: Sizes, batch: int, longest: int, repeats: int) -> Profile:
    generator = torch.Generator().manual_seed(0)
    h, width, kv, inner = sizes.hidden, sizes.heads * sizes.head_dim, sizes.kv_width, sizes.intermediate

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(columns**-0.5)

    projections = [weight(width, h), weight(2 * kv, h), weight(h, width), weight(inner, h), weight(h, inner)]
    compute, recompute = [], []
    with torch.inference_mode():
        for tokens in _grid(longest):
            x = torch.randn(batch, h, generator=generator)
            key, value = torch.randn(2, batch, sizes.kv_heads, tokens, sizes.head_dim, generator=generator)
            old = torch.randn(batch * tokens, h, generator=generator)

            def step(x: torch.Tensor = x, key: torch.Tensor = key, value: torch.Tensor = value) -> None:
                q, k, o, up, down = projections
                query = F.linear(x, q).view(batch, sizes.heads, sizes.head_dim)
                F.linear(x, k)
                out, _ = attend_packed(query, key, value, None, 1.0, False)
                F.linear(F.linear(F.linear(out.flatten(1), o), up), down)

            def again(old: torch.Tensor = old) -> None:
                F.linear(old, projections[1])

            compute.append((tokens, sizes.layers * _seconds(step, repeats)))
            recompute.append((tokens, sizes.layers * _seconds(again, repeats)))
    return Profile(compute=tuple(compute), recompute=tuple(recompute))


def _seconds(work: Callable[[], None], repeats: int) -> float:
    """The median of some runs, after one to warm up."""
    times: Sequence[float] = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        times = [*times, time.perf_counter() - start]
    return float(np.median(times[1:]))


__all__ = [
    "AlisaPlan",
    "Profile",
    "Simulation",
    "Sizes",
    "Step",
    "alisa_plan",
    "interpolate",
    "profile_machine",
    "roofline",
    "simulate",
    "total_seconds",
]
