"""What a reproduction is, how it is run and where its result goes."""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from gossamer.errors import OutputError, UnknownNameError
from gossamer.files import write_whole
from gossamer.measure.cost import machine, versions
from gossamer.registry import catalogue, methods, nearest, rows

Verdict = Literal["reproduced", "direction only", "not reproduced"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Outcome:
    """What an experiment showed.

    Attributes:
        verdict: by the reproduction's threshold.
        measured: one line with the numbers that decide.
        raw: every number behind it, JSON types.
        explanation: why, where the verdict is not `reproduced`.
    """

    verdict: Verdict
    measured: str
    raw: dict[str, Any]
    explanation: str = ""


@dataclass(frozen=True)
class Reproduction:
    """A system's experiment.

    Attributes:
        claim: the paper's claim, in one line.
        setting: what is run instead, in one line.
        threshold: what must hold, in one line; fixed before the run.
        seeds: of the reported run. Nothing is tuned on them.
        experiment: runs it.
    """

    slug: str
    claim: str
    setting: str
    threshold: str
    seeds: tuple[int, ...]
    experiment: Callable[[Progress], Outcome] = field(compare=False)


#: Modules of this folder that hold a `REPRODUCTION`.
_MODULES = (
    "a2sf",
    "alisa",
    "delta_activation",
    "dsee",
    "cats",
    "cfsp",
    "chess",
    "cpu_block_spmm",
    "double_sparsity",
    "ems",
    "hip_attention",
    "lantern",
    "lazy_neuron",
    "masksparsity",
    "minference",
    "pat",
    "ppd",
    "prosparse",
    "pst",
    "moe_x",
    "mohd",
    "seerattention",
    "sparsing_law",
    "spectr",
    "squarehead",
    "sirius",
    "slicegpt",
    "tidaldecode",
    "token_recycling",
    "tokenselect",
    "zipvl",
    "essential_sparsity",
    "spdf",
    "sparse_model_soups",
)


def reproductions() -> dict[str, Reproduction]:
    """All experiments by slug."""
    found = [import_module(f"gossamer.reproductions.{name}").REPRODUCTION for name in _MODULES]
    return {r.slug: r for r in found}


def results_folder() -> Path:
    """Where results lie: ``$GOSSAMER_RESULTS``, or ``results`` here."""
    return Path(os.environ.get("GOSSAMER_RESULTS", "results"))


def run(slug: str, progress: Progress = lambda what, done, total: None, folder: Path | None = None) -> dict[str, Any]:
    """Run one experiment and write ``<folder>/<slug>.json``; returns what was written.

    Raises:
        UnknownNameError: there is no such system, or it has no experiment yet.
        OutputError: the folder cannot be written; found out before the run.
    """
    known = reproductions()
    if slug not in known:
        if slug in catalogue() or slug in methods():
            raise UnknownNameError(f"{slug} has no reproduction yet; there are: {', '.join(known)}")
        raise UnknownNameError(f"no system is called {slug!r}{nearest(slug, [*known, *catalogue()])}")
    folder = folder if folder is not None else results_folder()
    _check_writable(folder)
    reproduction, start = known[slug], time.perf_counter()
    outcome = reproduction.experiment(progress)
    result = {
        "slug": slug,
        "claim": reproduction.claim,
        "setting": reproduction.setting,
        "threshold": reproduction.threshold,
        "seeds": list(reproduction.seeds),
        **asdict(outcome),
        "seconds": round(time.perf_counter() - start, 1),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
    }
    write_whole(folder / f"{slug}.json", json.dumps(result, indent=1) + "\n")
    return result


def scoreboard(folder: Path | None = None) -> list[dict[str, Any]]:
    """A row for each of the 65 systems: status from the registry, verdict from its result file (``-`` without one)."""
    folder = folder if folder is not None else results_folder()
    board = []
    for row in rows():
        if row["slug"] not in catalogue():
            continue
        result: dict[str, Any] = {}
        path = folder / f"{row['slug']}.json"
        if path.is_file():
            try:
                result = json.loads(path.read_text("utf-8"))
            except ValueError:
                result = {"verdict": "damaged result file"}
        board.append(
            {
                "slug": row["slug"],
                "status": row["status"],
                "verdict": result.get("verdict", "-"),
                "claim": result.get("claim", "-"),
                "measured": result.get("measured", "-"),
                "threshold": result.get("threshold", "-"),
            }
        )
    return board


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"cannot write results to {folder}: {error.strerror}") from None
