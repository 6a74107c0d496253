"""The `gossamer` command. Each error is one line that says what to do; ``--debug`` shows the trace."""

from __future__ import annotations

import json
import shlex
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from gossamer import __version__, cli_weights
from gossamer.cli_common import (
    DtypeOpt,
    Format,
    FormatOpt,
    ModelArg,
    SetOpt,
    ThreadsOpt,
    comma_names,
    emit,
    err,
    load_model,
    out,
    print_table,
    progress_bar,
    settings_of,
    writable,
)
from gossamer.errors import GossamerError, InputError

app = typer.Typer(
    name="gossamer",
    help="Make neural networks sparse, and measure what that saves and what it costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
#: Tasks of a study: a needle, and three of RULER's kinds.
STUDY_TASKS = "passkey,needle_kv,multi_needle,variable_tracking"

_debug = False


def _version(show: bool) -> None:
    if show:
        out.print(f"gossamer {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    global _debug
    _debug = debug


@app.command("list")
def list_(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    available: Annotated[bool, typer.Option("--available", help="Only what runs today.")] = False,
    format_: FormatOpt = Format.table,
) -> None:
    """List the systems of the catalogue and the baselines."""
    from gossamer.registry import FAMILIES, nearest, rows

    if family is not None and family not in FAMILIES:
        raise InputError(f"no family is called {family!r}{nearest(family, FAMILIES)}; there are: {', '.join(FAMILIES)}")
    chosen = [r for r in rows() if family in (None, r["family"]) and (not available or r["status"] == "available")]
    if format_ is Format.table:
        shown = [{**r, "baseline": "baseline" if r["baseline"] else ""} for r in chosen]
        emit(shown, format_)
        systems = [r for r in chosen if not r["baseline"]]
        ready = sum(r["status"] == "available" for r in systems)
        out.print(
            f"\n{len(systems)} systems ({ready} available), {len(chosen) - len(systems)} baselines. "
            "`gossamer show SLUG` tells more."
        )
    else:
        emit(chosen, format_)


def _about(method: Any) -> str:
    """A method's docstring as prose: no markup, no doctest, paragraphs on one line each."""
    import inspect

    paragraphs = (inspect.getdoc(method) or "").split("\n\n")
    return "\n\n".join(" ".join(p.split()) for p in paragraphs if not p.startswith(">>>")).replace("``", "")


@app.command()
def show(
    slug: Annotated[str, typer.Argument(help="A system or baseline.", metavar="SLUG")],
    format_: FormatOpt = Format.table,
) -> None:
    """Show one system: its paper, what it does, its settings, what its paper claims."""
    from dataclasses import asdict

    from gossamer.registry import catalogue, method, methods

    known = methods().get(slug)
    system = catalogue().get(slug)
    if system is None and known is None:
        method(slug)  # raises, with the nearest names
    facts: dict[str, Any] = {
        "slug": slug,
        "status": "available" if known else "planned",
        "baseline": bool(known and known.baseline),
    }
    if system is not None:
        facts.update({k: v for k, v in asdict(system).items() if k != "slug"})
    if known is not None:
        facts.update({"name": known.name, "family": known.family, "slot": known.slot})
        facts["settings"] = [
            {"name": n, "default": f.get_default(call_default_factory=True), "description": f.description or ""}
            for n, f in known.model_fields.items()
        ]
        facts["about"] = _about(known)
    if format_ is Format.json:
        print(json.dumps(facts, indent=1, default=str))
        return
    if format_ is Format.markdown:
        print(f"# {facts['name']}\n")
        for name, value in facts.items():
            if name not in ("name", "settings", "claims", "about"):
                print(f"- **{name}**: {', '.join(map(str, value)) if isinstance(value, list | tuple) else value}")
        if facts.get("about"):
            print(f"\n{facts['about']}")
        for title, part in (("Settings", "settings"), ("The paper's claims", "claims")):
            if facts.get(part):
                print(f"\n## {title}\n")
                emit([dict(row) for row in facts[part]], format_)
        return
    out.print(f"[bold]{facts['name']}[/bold]  ({facts['status']}{', baseline' if facts['baseline'] else ''})")
    if system is not None:
        out.print(
            f"{system.title}, {system.venue}" + ("" if str(system.year) in system.venue else f" ({system.year})"),
            highlight=False,
        )
        out.print(
            f"\n{system.summary}\n\nSparse: {system.sparse}\nWhen:   {system.when}   Needs: {', '.join(system.needs) or 'nothing'}",
            highlight=False,
        )
    out.print(f"Family: {facts['family']}   Slot: {facts['slot']}", highlight=False)
    if known is not None:
        out.print(f"\n{facts['about']}\n", highlight=False, markup=False)
        print_table([{**row, "default": str(row["default"])} for row in facts["settings"]], title="Settings")
    if system is not None and system.claims:
        out.print()
        print_table(
            [asdict(claim) for claim in system.claims], title="What the paper claims (literature, not measured here)"
        )


@app.command()
def compare(
    model: ModelArg = "smollm2",
    methods: Annotated[
        str | None, typer.Option(help="Slugs, with commas between (default: double-sparsity,streaming-llm,quest).")
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(help="A study instead: all available methods of these families, at equal budget, ranked."),
    ] = None,
    budget: Annotated[str, typer.Option(help="Budget of every method: a count of tokens or a fraction.")] = "1/16",
    recipe: Annotated[list[Path] | None, typer.Option(help="A recipe to measure too. May be repeated.")] = None,
    stack: Annotated[
        str | None, typer.Option(help="A method that every row uses too, dense among them (native-linear, say).")
    ] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens of context.")] = 4096,
    decode: Annotated[int, typer.Option(min=1, help="Known tokens decoded and scored per stretch of text.")] = 64,
    segments: Annotated[int, typer.Option(min=1, help="Stretches of text.")] = 2,
    tasks: Annotated[
        str | None,
        typer.Option(help=f"Tasks, with commas between; empty for none (default: passkey; in a study {STUDY_TASKS})."),
    ] = None,
    examples: Annotated[int | None, typer.Option(min=0, help="Prompts per task (default: 4; in a study 2).")] = None,
    text: Annotated[str, typer.Option(help="Evaluation text: prose, code, or a path.")] = "prose",
    latency: Annotated[
        float, typer.Option(min=0.05, help="Weights: also rank at this share of the dense time of a step.")
    ] = 0.8,
    seed: Annotated[int, typer.Option(help="Seed of texts and tasks.")] = 0,
    dtype: DtypeOpt = None,
    threads: ThreadsOpt = None,
    html: Annotated[Path | None, typer.Option(help="Write a report to this HTML file.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this JSON file.")] = None,
    format_: FormatOpt = Format.table,
) -> None:
    """Measure methods side by side on one model: quality kept, time and bytes saved."""
    from gossamer.hf import model_shape
    from gossamer.measure import report
    from gossamer.measure.compare import Plan, entries_of
    from gossamer.measure.compare import compare as run
    from gossamer.measure.rows import Entry
    from gossamer.measure.study import at_budget
    from gossamer.patterns.budget import check, parse
    from gossamer.recipe import Recipe, Step
    from gossamer.registry import make, method
    from gossamer.registry import methods as registered

    for path in (html, json_):
        if path is not None:
            writable(path)
    try:
        value = check(parse(budget))
    except ValueError as error:
        raise InputError(f"--budget {error}") from None
    if family == "weights":
        if html is not None or recipe or stack is not None or tasks:
            raise InputError(
                "a study of weights takes --budget, --methods, --latency, --text, --json and the like, not these"
            )
        slugs = comma_names(methods) if methods is not None else None
        cli_weights.study(model, slugs, value, latency, context, segments, text, seed, dtype, threads, json_, format_)
        return
    share = value if isinstance(value, float) else min(1.0, value / context)
    slugs = comma_names(methods or "double-sparsity,streaming-llm,quest")
    if family is not None:
        if methods is not None:
            raise InputError("give --methods or --family, not both")
        families = comma_names(family)
        for name in families:
            if not any(m.family == name for m in registered().values()):
                raise InputError(f"no method of the family {name!r} is available: see `gossamer list`")
        slugs = [s for s, m in registered().items() if m.family in families and s != "dense" and m.comparable]
    chosen: list[Any] = []
    for slug in slugs if family is None else ():
        names = ("tokens", "budget", "area") if isinstance(value, float) else ("tokens", "budget")  # an area is a share
        field = next((name for name in names if name in method(slug).model_fields), None)
        chosen.append(make(slug, **({field: value} if field else {})))
    plan = Plan(
        context=context,
        decode_tokens=decode,
        segments=segments,
        tasks=tuple(comma_names(tasks if tasks is not None else "passkey" if family is None else STUDY_TASKS)),
        examples=examples if examples is not None else 4 if family is None else 2,
        seed=seed,
        source=text,
        budget=share if family is not None else None,
    )
    recipes = [(path, Recipe.load(path)) for path in recipe or ()]
    with progress_bar() as progress:
        progress(f"loading {model}", 0, 1)
        loaded = load_model(model, dtype, threads)
        if family is not None:
            shape, size = model_shape(loaded.model), next(loaded.model.parameters()).element_size()
            chosen = [at_budget(slug, share, context, shape, size) for slug in slugs]
        entries = entries_of(loaded, chosen, progress)
        entries += [Entry(one, path.stem) for path, one in recipes]
        if stack is not None:
            entries = [Entry(Recipe((Step(make("dense")),)), method("dense").name), *entries]
            entries = [
                replace(e, recipe=Recipe((*e.recipe.steps, Step(make(stack))), e.recipe.folder)) for e in entries
            ]
        comparison = run(loaded, chosen, plan, progress, entries)
    comparison = replace(comparison, command=shlex.join(["gossamer", *sys.argv[1:]]))
    if json_ is not None:
        comparison.save(json_)
    if html is not None:
        report.html(comparison, html)
    if format_ is Format.json:
        print(json.dumps(comparison.to_dict(), indent=1))
    elif format_ is Format.markdown:
        print(report.to_markdown(comparison))
    else:
        report.table(comparison, out)
    for path in (html, json_):
        if path is not None:
            err.print(f"wrote {path}", highlight=False)


@app.command()
def calibrate(
    slug: Annotated[str, typer.Argument(help="A method that needs calibration.", metavar="SLUG")],
    model: ModelArg = "smollm2",
    output: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write (default: SLUG.safetensors).")
    ] = None,
    text: Annotated[str, typer.Option(help="Calibration text: prose, code, or a path.")] = "prose",
    blocks: Annotated[int, typer.Option(min=1, help="Blocks of tokens.")] = 16,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens in a block (default: what suits the method, or 512).")
    ] = None,
    import_: Annotated[
        Path | None, typer.Option("--import", help="Convert this file of the method's official release instead.")
    ] = None,
    set_: SetOpt = None,
    dtype: DtypeOpt = None,
    threads: ThreadsOpt = None,
) -> None:
    """Learn what a method needs from a text, and keep it in a file."""
    from gossamer.measure.compare import calibration_tokens, learn
    from gossamer.registry import make

    made: Any = make(slug, **settings_of(set_))
    if "calibration" not in made.needs:
        raise InputError(f"{slug} needs no calibration: attach it as it is")
    if import_ is not None and not hasattr(made, "import_calibration"):
        raise InputError(f"{slug} has no released calibration files to import")
    path = writable(output if output is not None else Path(f"{slug}.safetensors"))
    with progress_bar() as progress:
        progress(f"loading {model}", 0, 2)
        loaded = load_model(model, dtype, threads)
        progress("calibrating", 1, 2)
        if import_ is not None:
            calibration = made.import_calibration(import_, loaded.model)
        else:
            tokens = calibration_tokens(loaded, text, blocks, made, length)
            calibration = learn(made, loaded.model, tokens, progress)
    calibration.save(path)
    out.print(f"wrote {path} ({path.stat().st_size / 1e3:.0f} kB, for {loaded.name})", highlight=False)


app.command()(cli_weights.apply)


@app.command()
def generate(
    model: ModelArg,
    prompt: Annotated[str, typer.Argument(help="The prompt, or - to read it from standard input.", metavar="PROMPT")],
    recipe: Annotated[Path | None, typer.Option(help="A recipe to run with.")] = None,
    tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to make at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy; above it, sample.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Mass to sample from.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    dtype: DtypeOpt = None,
    threads: ThreadsOpt = None,
) -> None:
    """Continue a prompt, streaming, with or without a recipe."""
    from gossamer.generation import generate as run
    from gossamer.recipe import Recipe

    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise InputError("the prompt is empty")
    loaded_recipe = Recipe.load(recipe) if recipe is not None else None
    loaded = load_model(model, dtype, threads)

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    run(
        loaded,
        text,
        loaded_recipe,
        max_new_tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chat=chat,
        write=write,
    )
    sys.stdout.write("\n")


@app.command()
def bench(
    op: Annotated[str | None, typer.Argument(help="An operator (default: list them).", metavar="OP")] = None,
    contexts: Annotated[str, typer.Option(help="Context lengths, with commas between.")] = "8192,32768",
    dtypes: Annotated[str, typer.Option(help="dtypes, with commas between.")] = "float32,bfloat16",
    ppd: Annotated[
        Path | None, typer.Option("--ppd", help="With decoding: a calibration of ppd, which is then timed too.")
    ] = None,
    threads: ThreadsOpt = None,
    format_: FormatOpt = Format.table,
) -> None:
    """Time an operator beside torch and our own dense kernel, and beside what the memory gives.

    `decoding` in place of an operator times drafting on SmolLM2 beside plain decoding.
    """
    import torch

    import gossamer.measure.bench as benches

    if op is None:
        out.print("operators: " + ", ".join(benches.OPERATORS), highlight=False)
        out.print("whole generations: decoding", highlight=False)
        return
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        lengths = tuple(int(c) for c in contexts.split(","))
    except ValueError:
        raise InputError(f"--contexts takes numbers with commas between, got {contexts!r}") from None
    names = tuple(d.strip() for d in dtypes.split(","))
    if op == "decoding":
        from gossamer.measure import bench_decoding

        with progress_bar() as progress:
            files = {"ppd": ppd} if ppd is not None else {}
            rows = bench_decoding.run(names, calibrations=files, progress=lambda what: progress(what, 0, 1))
        emit(rows, format_, right=("tokens_per_forward", "nodes_per_forward", "ms_per_token", "speedup"))
        return
    with progress_bar() as progress:
        progress(f"timing {op}", 0, 1)
        rows = benches.run(op, contexts=lengths, dtypes=names)
    emit(rows, format_, right=("ms", "context", "ratio_to_native_dense", "ratio_to_torch", "bandwidth_share"))


@app.command()
def reproduce(
    slug: Annotated[str | None, typer.Argument(help="A system.", metavar="SLUG")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every system that has an experiment.")] = False,
    output: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the result (default: results).")
    ] = None,
) -> None:
    """Run the small experiment of a system and judge its paper's claim."""
    from gossamer import reproductions

    if (slug is None) == (not all_):
        raise typer.BadParameter("name one system, or pass --all")
    for name in reproductions.reproductions() if all_ else [slug]:
        assert name is not None
        with progress_bar() as progress:
            result = reproductions.run(name, progress, output)
        out.print(f"[bold]{name}[/bold]: {result['verdict']}", highlight=False)
        for part in ("claim", "setting", "threshold", "measured", "explanation"):
            if result[part]:
                out.print(f"  {part:<11} {result[part]}", highlight=False)


@app.command()
def scoreboard(
    output: Annotated[Path | None, typer.Option("--results", help="Folder of results (default: results).")] = None,
    format_: FormatOpt = Format.table,
) -> None:
    """Show all systems with the verdict of their reproduction."""
    from gossamer import reproductions

    rows = reproductions.scoreboard(output)
    if format_ is Format.table:
        emit([{k: r[k] for k in ("slug", "status", "verdict", "measured")} for r in rows], format_)
    else:
        emit(rows, format_)


def main() -> None:
    """Run the command; errors of ours are one line and exit code 1, usage errors 2."""
    try:
        app()
    except GossamerError as error:
        if _debug:
            traceback.print_exc()
        err.print(f"gossamer: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("gossamer: interrupted")
        sys.exit(1)


if __name__ == "__main__":
    main()
