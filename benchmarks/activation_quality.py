"""Post-training activation methods on SmolLM2 at equal measured sparsity: what they keep, and the time per token.

    python benchmarks/activation_quality.py              # all of it; --only known, written or time for a part
    python benchmarks/activation_quality.py --only time  # at the settings found, which are read from the file; an idle machine

First table (known): text, decoded token by token by `gossamer.compare`, and its passkeys. Calibrated methods are set again
until they drop of these tokens what the row says; nothing but that share is looked at. All rows run on our dense kernel where
they are dense. CATS, CHESS, top-k and random masks hold in prompts too; GRIFFIN reads them densely, as published.

Second table (written): text that the model writes itself. Known tokens leave Sirius nothing to correct, so it is compared with
GRIFFIN, the sparse model that it corrects: shares of generated tasks (counting on in steps, copying a table) that are answered
in full, all of them ones that the dense model answers; and prose, judged by the dense model.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any

import gossamer
from gossamer.activations.sirius import density_of
from gossamer.calibration import Calibration
from gossamer.measure.compare import Plan, calibration_tokens, compare, learn
from gossamer.measure.cost import machine, versions
from gossamer.measure.results import Spread
from gossamer.measure.rows import Entry
from gossamer.recipe import Recipe, Step
from gossamer.reproductions.sirius import BEGINNINGS, TASKS, Writer

LEVELS = (0.3, 0.5, 0.7)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "CHESS": ("chess", {}),
    "CHESS, with attention": ("chess", {"parts": "both"}),
    "CATS": ("cats", {}),
    "top-k of each token": ("top-k-neurons", {}),
    "GRIFFIN, of each token": ("griffin", {"pattern": "fine"}),
    "GRIFFIN, of the prompt": ("griffin", {"pattern": "coarse"}),
    "random": ("random-neurons", {}),
}
CORRECTED = ("sirius", "griffin")
QUALITY = Plan(
    context=256, decode_tokens=256, segments=3, tasks=("passkey",), examples=6, steps=1, rounds=1, transformers=False
)
SETTLING = Plan(**{**vars(QUALITY), "tasks": ()})
TURNS = 1  # of setting calibrated methods to the sparsity that a row stands for
EXAMPLES, PROSE = 6, 32  # of each task; tokens of prose after each of five beginnings
Way = tuple[str, str, float]  # slug, pattern, sparsity


def made(slug: str, settings: dict[str, Any], sparsity: float) -> Any:
    """The method at a share of dropped neurons."""
    fields = gossamer.method(slug).model_fields
    return gossamer.make(slug, **settings, **({"keep": 1 - sparsity} if "keep" in fields else {"sparsity": sparsity}))


def entries(asked: dict[tuple[str, float], float], learned: dict[str, Calibration]) -> list[Entry]:
    """Dense, and every method at the sparsity asked of it; all on our dense kernel where they are dense."""
    native = Step(gossamer.make("native-linear"))
    found = [Entry(Recipe((Step(gossamer.make("dense")), native)), "dense")]
    for (name, level), sparsity in asked.items():
        slug, settings = METHODS[name]
        step = Step(made(slug, settings, sparsity), learned.get(slug))
        found.append(Entry(Recipe((step, native)), f"{name} {level}"))
    return found


def calibrated(loaded: Any) -> dict[str, Calibration]:
    """What methods learned, by slug: the most that any setting of theirs needs."""
    found = {}
    for slug, settings in METHODS.values():
        method = gossamer.make(slug, **settings)
        if "calibration" in method.needs:
            found[slug] = learn(method, loaded.model, calibration_tokens(loaded, blocks=8, method=method))
    return found


def settle(loaded: Any, learned: dict[str, Calibration]) -> dict[tuple[str, float], float]:
    """Sparsities to ask for, so that the measured ones are those of `LEVELS`."""
    asked = {(name, level): level for name in METHODS for level in LEVELS}
    for _ in range(TURNS):
        loose = {key: sparsity for key, sparsity in asked.items() if METHODS[key[0]][0] in learned}
        found = compare(loaded, [], SETTLING, entries=entries(loose, learned))
        for key, row in zip(loose, found.methods[1:], strict=True):
            asked[key] = min(1.0, max(0.0, asked[key] + key[1] - 1 + row.cost.neurons_kept))
    return asked


def known_text(loaded: Any) -> list[dict[str, Any]]:
    """Rows of the first table, without times."""
    learned = calibrated(loaded)
    asked = settle(loaded, learned)
    found = compare(loaded, [], QUALITY, entries=entries(asked, learned)).methods
    rows = []
    for key, row in zip([("dense", 0.0), *asked], found, strict=True):
        assert row.error is None, row.error
        quality, cost = row.quality, row.cost
        rows.append(
            {
                "method": key[0],
                "level": key[1],
                "asked": asked.get(key),
                "sparsity": None if cost.neurons_kept is None else 1 - cost.neurons_kept,
                "weights_read": cost.weight_bytes_read / found[0].cost.weight_bytes_read,
                "perplexity": vars(quality.perplexity),
                "ratio": quality.perplexity.mean / found[0].quality.perplexity.mean,
                "kl": quality.kl and vars(quality.kl),
                "agreement": quality.agreement and vars(quality.agreement),
                "passkey": vars(quality.tasks["passkey"]),
            }
        )
    return rows


def ways() -> list[Way]:
    """Sirius and GRIFFIN at every level, by the prompt's and by each token's neurons."""
    return [(slug, pattern, level) for pattern in ("coarse", "fine") for level in LEVELS for slug in CORRECTED]


def examples(run: Writer, name: str) -> list[tuple[str, str]]:
    """The first so many of a task that the dense model answers in full."""
    found: list[tuple[str, str]] = []
    for seed in range(10 * EXAMPLES):
        example = TASKS[name](random.Random(f"benchmark {name} {seed}"))
        if run.solved(None, [example])["solved"]:
            found.append(example)
        if len(found) == EXAMPLES:
            break
    return found


def written_text(run: Writer) -> list[dict[str, Any]]:
    """Rows of the second table, without times."""
    prompts = [run.tokenizer(text, return_tensors="pt").input_ids for text in BEGINNINGS]
    tasks = {name: examples(run, name) for name in TASKS}
    rows = []
    for way in [None, *ways()]:
        method = None if way is None else made(way[0], {"pattern": way[1]}, way[2])
        row: dict[str, Any] = dict(zip(("method", "pattern", "level"), way or ("dense", "", 0.0), strict=True))
        row["solved"] = {name: run.solved(method, some) for name, some in tasks.items()}
        texts = [run.generate(method, ids, PROSE) for ids in prompts]
        row["perplexity"] = math.exp(
            statistics.fmean(run.nll(out.sequences, ids.shape[1]) for out, ids in zip(texts, prompts, strict=True))
        )
        if way and way[0] == "sirius":
            row["aal"] = statistics.fmean(n for out in texts for n in out.advances.tolist())
            row["weights_read"] = statistics.fmean(out.effective_density for out in texts)
        else:
            row["weights_read"] = density_of(run.model, 1 - row["level"], row["pattern"]) if way else 1.0
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def add_times(run: Writer, result: dict[str, Any], steps: int, rounds: int) -> dict[str, Any]:
    """The rows of both tables with milliseconds per token, those of each table in turns."""
    asked = {(row["method"], row["level"]): row["asked"] for row in result["known_text"][1:]}
    plan = Plan(**{**vars(SETTLING), "segments": 1, "decode_tokens": 8, "steps": steps, "rounds": rounds})
    found = compare(run.loaded, [], plan, entries=entries(asked, calibrated(run.loaded))).methods
    for row, timed in zip(result["known_text"], found, strict=True):
        row["ms"] = vars(timed.cost.token_ms)
    ids = run.tokenizer(BEGINNINGS[0], return_tensors="pt").input_ids
    times: list[list[float]] = [[] for _ in result["written_text"]]
    for _ in range(rounds):
        for row, spent in zip(result["written_text"], times, strict=True):
            method = None
            if row["pattern"]:
                method = made(row["method"], {"pattern": row["pattern"]}, row["level"])
            start = time.perf_counter()
            run.generate(method, ids, PROSE)
            spent.append(1e3 * (time.perf_counter() - start) / PROSE)
    for row, spent in zip(result["written_text"], times, strict=True):
        row["ms"] = vars(Spread.of(spent))
    return result


def show(result: dict[str, Any]) -> None:
    """Both tables, as Markdown."""

    def ms(row: dict[str, Any]) -> str:
        return f"{row['ms']['median']:.1f}" if "ms" in row else "–"

    print("\n| method | sparsity | weights read | perplexity | same next token | passkeys | ms per token |")
    print("|" + " --- |" * 7)
    for row in result.get("known_text", []):
        sparsity = "–" if row["sparsity"] is None else f"{100 * row['sparsity']:.1f} %"
        same = "–" if row["agreement"] is None else f"{100 * row['agreement']['mean']:.0f} %"
        print(
            f"| {row['method']} | {sparsity} | {100 * row['weights_read']:.0f} % | {row['perplexity']['mean']:.1f} "
            f"(×{row['ratio']:.2f}) | {same} | {100 * row['passkey']['mean']:.0f} % | {ms(row)} |"
        )
    print(
        "\n| method | neurons | sparsity | counting | table | advance | prose's perplexity | weights read | ms per token |"
    )
    print("|" + " --- |" * 9)
    for row in result.get("written_text", []):
        solved = row["solved"]
        advance = " / ".join(f"{s['aal']:.1f}" for s in solved.values() if "aal" in s)
        print(
            f"| {row['method']} | {row['pattern']} | {100 * row['level']:.0f} % | {100 * solved['counting']['solved']:.0f} % "
            f"| {100 * solved['table']['solved']:.0f} % | {advance or '–'} | {row['perplexity']:.2f} "
            f"| {row['weights_read']:.2f} | {ms(row)} |"
        )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", choices=["known", "written", "time"], help="a part; the others' numbers stay in the file"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args(argv)
    parts: dict[str, Any] = {
        "known": lambda: {"known_text": known_text(run.loaded)},
        "written": lambda: {"written_text": written_text(run)},
        "time": lambda: add_times(run, result, args.steps, args.rounds),
    }
    result: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    run = Writer()
    for part in [args.only] if args.only else parts:
        result |= parts[part]()
        result |= {f"{part}_on": {**machine(), **versions()}}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    return result


if __name__ == "__main__":
    main()
