"""The commands of weight methods: `apply`, and `compare --family weights`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gossamer.cli_common import (
    DtypeOpt,
    Format,
    FormatOpt,
    ModelArg,
    SetOpt,
    ThreadsOpt,
    emit,
    err,
    load_model,
    out,
    print_table,
    progress_bar,
    settings_of,
    writable,
)
from gossamer.errors import InputError

#: Shares of kept parameters at which a study looks for what a latency allows, beside the budget.
SHARES = (0.9, 0.7, 0.5, 0.3)


def apply(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the slug of a weight method.", metavar="RECIPE")],
    model: ModelArg,
    folder: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.", metavar="OUT")],
    set_: SetOpt = None,
    text: Annotated[str, typer.Option(help="Calibration or training text: prose, code, or a path.")] = "prose",
    blocks: Annotated[int, typer.Option(min=1, help="Blocks of that text.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a block.")] = 512,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure the result beside the model.")
    ] = True,
    dtype: DtypeOpt = None,
    threads: ThreadsOpt = None,
    format_: FormatOpt = Format.table,
) -> None:
    """Prune a model for good: write a model folder, with a card of what was done and measured."""
    from gossamer.applying import Text, apply_recipe, recipe_of
    from gossamer.measure.weights import Plan

    chosen = recipe_of(recipe, settings_of(set_))
    writable(folder.with_name(f"{folder.name}.json"))
    with progress_bar() as progress:
        progress(f"loading {model}", 0, 3)
        loaded = load_model(model, dtype, threads)
        plan = Plan(source=text) if measure else None
        card = apply_recipe(loaded, chosen, folder, Text(text, blocks, length), measure=plan, progress=progress)
    if format_ is Format.json:
        print(json.dumps(card, indent=1))
        return
    measured = card["measured"]
    if measured is not None:
        rows: list[dict[str, Any]] = []
        for name in ("dense", "applied"):
            row = measured[name]
            rows.append(
                {
                    "": name,
                    "parameters": f"{row['parameters']:,}",
                    "not zero": f"{row['nonzero']:,}",
                    "perplexity": f"{row['perplexity']:.4g}",
                    "decode": f"{row['decode']:.2f}x ({row['way']})" if row["decode"] is not None else "1x",
                    "prefill": f"{row['prefill']:.2f}x" if row["prefill"] is not None else "1x",
                }
            )
        emit(rows, format_)
    err.print(f"wrote {folder}", highlight=False)


def study(
    model: str,
    slugs: Sequence[str] | None,
    budget: float | int,
    latency: float,
    context: int,
    segments: int,
    text: str,
    seed: int,
    dtype: str | None,
    threads: int | None,
    json_: Path | None,
    format_: Format,
) -> None:
    """Weight methods at equal parameters, and at equal measured latency."""
    from gossamer.measure import weights

    if not isinstance(budget, float):
        raise InputError("--budget of weights is the share of parameters kept: a fraction like 1/2")
    plan = weights.Plan(context=min(context, 512), segments=max(segments, 4), source=text, seed=seed)
    with progress_bar() as progress:
        progress(f"loading {model}", 0, 1)
        loaded = load_model(model, dtype, threads)
        shares = sorted({*SHARES, budget}, reverse=True)
        chosen = weights.study_methods(loaded.model, shares, slugs)
        rows = weights.compare_weights(loaded, chosen, plan, progress)
    if json_ is not None:
        weights.save_rows(rows, json_, {"model": loaded.name, "budget": budget, "latency": latency, "seed": seed})
    if format_ is not Format.table:
        emit([row.shown() for row in rows], format_)
    else:
        print_table([row.shown() for row in rows], title=f"{loaded.name}: what is kept of the blocks' parameters")
        for title, places in (
            (f"Ranked by KL with {budget:.3g} of the parameters", weights.ranked(rows, budget)),
            (f"Ranked by KL with at most {latency:.3g} of the dense time of a step", weights.at_latency(rows, latency)),
        ):
            out.print()
            shown = [{"rank": rank, **row.shown()} for rank, row in places]
            if shown:
                print_table(shown, title=title)
            else:
                out.print(f"{title}: none")
    if json_ is not None:
        err.print(f"wrote {json_}", highlight=False)
