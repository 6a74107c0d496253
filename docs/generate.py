"""Write the parts of the documentation that are computed: a page for every system, the references, README's table.

python docs/generate.py            # pages, as a build of the site does by itself
python docs/generate.py --readme   # the table of families in README.md
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from gossamer.registry import FAMILIES, Method, System, catalogue, methods, rows

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BEGIN, END = "<!-- families: begin (python docs/generate.py --readme) -->", "<!-- families: end -->"
#: What the API reference covers. A package is documented through what it exports.
API = {
    "Core": ("registry", "calibration", "recipe", "generation", "errors"),
    "Plug points and patterns": ("hf", "patterns"),
    "Operators": ("ops",),
    "Families": ("attention", "cache"),
    "Models and data": ("models", "data"),
    "Measuring": ("measure", "reproductions"),
}
RAW_LINES = 250
READS = (
    "Two heads of layer 13 of SmolLM2 over 256 tokens of prose, at an eighth of what dense attention spends: a row is a query, a "
    "column a key, and the darker, the more weight dense attention gives (logarithmic). Orange is what this method read. "
    "`docs/pictures.py` draws it."
)


def write(path: Path, text: str) -> None:
    """Write a file only if that changes it, so that a second build has little to do."""
    text = text.rstrip() + "\n"
    if not path.is_file() or path.read_text("utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


def escape(text: object) -> str:
    """Plain text as Markdown, also inside a table."""
    return re.sub(r"([\\*_|<>\[\]{}$#~])", r"\\\1", str(text)).replace("\n", " ")


def table(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A Markdown table; cells are Markdown already."""
    head = list(head)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def prose(docstring: str | None) -> str:
    """A docstring as Markdown: examples become code, the rest passes."""
    result: list[str] = []
    example = False
    for line in inspect.cleandoc(docstring or "").splitlines():
        if line.startswith(">>>") and not example:
            result.append("```pycon")
            example = True
        elif example and not line.strip():
            result.append("```")
            example = False
        result.append(line)
    if example:
        result.append("```")
    return "\n".join(result)


# --- README ----------------------------------------------------------------------------------------------------------


def families() -> str:
    """The table of families with counts from the registry."""
    listed = rows()
    body = []
    for family, what in FAMILIES.items():
        mine = [row for row in listed if row["family"] == family]
        systems = [row for row in mine if row["slug"] in catalogue()]
        ready = sum(row["status"] == "available" for row in systems)
        names = (f"`{family}`", what, str(ready), str(len(systems) - ready), str(len(mine) - len(systems)))
        body.append(names)
    total = ["**all**", "", *(str(sum(int(row[i]) for row in body)) for i in (2, 3, 4))]
    return table(("Family", "Decides", "Available", "Planned", "Baselines"), [*body, total])


def readme(path: Path = ROOT / "README.md") -> str:
    """README with its table brought up to date."""
    text = path.read_text("utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{families()}\n\n{END}{after}"


# --- Systems ---------------------------------------------------------------------------------------------------------


def _kind(schema: dict[str, Any]) -> str:
    """What values a setting takes, in words."""
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        kinds = {option.get("type") for option in schema["anyOf"]}
        if kinds == {"integer", "number"}:
            return "count or fraction"
        return " or ".join(_kind(option) for option in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}s"
    names = {
        "integer": "whole number",
        "number": "number",
        "boolean": "true or false",
        "string": "text",
        "null": "none",
    }
    kind = names.get(schema.get("type", ""), "value")
    signs = (("minimum", "≥"), ("exclusiveMinimum", "\\>"), ("maximum", "≤"), ("exclusiveMaximum", "\\<"))
    bounds = [f"{sign} {schema[key]:g}" for key, sign in signs if key in schema]
    return kind + (f" {' and '.join(bounds)}" if bounds else "")


def settings(cls: type[Method]) -> str:
    """The table of a method's hyperparameters."""
    properties = cls.model_json_schema().get("properties", {})
    if not properties:
        return "This method has no settings."
    body = [
        (f"`{name}`", _kind(facts), f"`{json.dumps(facts.get('default'))}`", escape(facts.get("description", "")))
        for name, facts in properties.items()
    ]
    return table(("Setting", "Values", "Default", "Meaning"), body)


def usage(cls: type[Method]) -> str:
    """How a method is called, from Python and from the shell."""
    needs = "calibration" in cls.needs
    name = cls.slug
    python = [f'method = gossamer.make("{name}")']
    shell = []
    if needs:
        python.append("calibration = method.calibrate(loaded.model, gossamer.calibration_tokens(loaded))")
        shell.append(f"gossamer calibrate {name} smollm2")
    attach = "loaded.model, calibration" if needs else "loaded.model"
    python += [f"with method.attach({attach}) as handle:", "    ...  # loaded.model.generate(…)"]
    shell.append(f"gossamer compare smollm2 --methods {name}")
    lines = ["import gossamer", "", 'loaded = gossamer.load("smollm2")', *python]
    return "```python\n" + "\n".join(lines) + "\n```\n\n```sh\n" + "\n".join(shell) + "\n```"


def result(slug: str, folder: Path) -> str:
    """What the recorded reproduction found, or how to run it."""
    path = folder / f"{slug}.json"
    if not path.is_file():
        return f"Not run yet. `gossamer reproduce {slug}` runs the experiment, where there is one."
    found = json.loads(path.read_text("utf-8"))
    names = ("claim", "setting", "threshold", "measured", "verdict", "explanation")
    facts = [(name.capitalize(), escape(found[name])) for name in names if found.get(name)]
    if found.get("seeds"):
        facts.append(("Seeds", ", ".join(map(str, found["seeds"]))))
    if found.get("seconds"):
        facts.append(("Time", f"{found['seconds']:.0f} s"))
    if found.get("versions"):
        facts.append(("Versions", escape(", ".join(f"{k} {v}" for k, v in found["versions"].items()))))
    text = table(("", ""), facts)
    raw = json.dumps(found.get("raw", {}), indent=1, ensure_ascii=False)
    if found.get("raw") and raw.count("\n") < RAW_LINES:
        text += f"\n\nAll numbers of the run:\n\n```json\n{raw}\n```"
    return text + f"\n\nThe whole record is `results/{slug}.json`."


# --- Drafts ----------------------------------------------------------------------------------------------------------

DRAFTS = {
    "token-recycling": "The released template of 80 candidates: children take the ranks from 0 on, from left to right.",
    "ppd": (
        "The tree of state 3 for 30 candidates and prompt tokens, made of the accuracies that the reproduction counted. A node is "
        "the fuller, the likelier its path; small hollow ones are prompt tokens, which guess for the next step."
    ),
    "spectr": "Eight independent drafts of four tokens; equal ones are not merged.",
    "lantern": "The static tree of 25 candidates that LANTERN++ names first.",
}


def acceptance(slug: str, folder: Path) -> str:
    """What became of drafts in a system's recorded reproduction, as a table; empty where there is none."""
    path = folder / f"{slug}.json"
    if slug not in DRAFTS or not path.is_file():
        return ""
    raw = json.loads(path.read_text("utf-8"))["raw"]
    if slug == "token-recycling":
        steps = sum(raw["accepted"].values())
        shares = [(count, f"{times / steps:.1%}") for count, times in raw["accepted"].items()]
        return table(
            ("Candidates accepted in a step", *(count for count, _ in shares)),
            [["Share of steps", *(s for _, s in shares)]],
        )
    if slug == "ppd":
        named = [("trained prompt tokens", raw["top10"]["trained"]), ("untrained", raw["top10"]["untrained"])]
        accuracy = table(
            ("Right among the ten best guesses", "2 ahead", "3 ahead", "4 ahead"),
            ((name, *(f"{a:.2f}" for a in found)) for name, found in named),
        )
        return (
            accuracy
            + "\n\n"
            + table(
                ("Tree of 30", "Tokens a step"),
                ((name, f"{tokens:.2f}") for name, tokens in raw["tokens_walked"].items()),
            )
        )
    if slug == "spectr":
        return table(
            ("Drafts", "Tokens a forward", "Chance that a position accepts", "No rule can do more than"),
            (
                (
                    k,
                    f"{run['tokens_per_forward']:.2f}",
                    f"{run['p_acc_with_k_drafts']:.3f}",
                    f"{run['upper_bound_with_k_drafts']:.3f}",
                )
                for k, run in raw["by_drafts"].items()
            ),
        )
    return table(
        ("Seed", "Neighbours", "k", "delta", "Tokens a call", "Accepted of tested", "Fréchet distance"),
        (
            (
                str(run["seed"]),
                arm["table"],
                str(arm["k"]),
                f"{arm['delta']:g}",
                f"{arm['tokens_per_call']:.2f}",
                f"{arm['accepted'] / max(1, arm['tested']):.1%}",
                f"{arm['fid']:.4f}",
            )
            for run in raw["runs"]
            for arm in run["arms"]
        ),
    )


def drafted(slug: str, results: Path, up: str = "..") -> list[str]:
    """A system's tree with what became of its drafts, where they are known; `up` leads to the folder of the documentation."""
    if slug not in DRAFTS:
        return []
    found = acceptance(slug, results)
    return [f"![A tree that {slug} drafts]({up}/_static/trees/{slug}.svg)", DRAFTS[slug], *([found] if found else [])]


def drafts(out: Path, results: Path) -> None:
    """The trees of all systems that draft, for the guide."""
    parts = []
    for slug in DRAFTS:
        parts += [f"### [{catalogue()[slug].name}](../systems/{slug}.md)", *drafted(slug, results)]
    write(out, "\n\n".join(parts))


def page(slug: str, system: System | None, cls: type[Method] | None, results: Path) -> str:
    """One system or baseline."""
    name = system.name if system else cls.name if cls else slug
    parts = [f"# {escape(name)}"]
    status = "available" if cls else "planned"
    if cls and cls.baseline:
        status += "; a baseline, which systems are compared with"
    facts = [("Slug", f"`{slug}`"), ("Status", status)]
    if system:
        year = "" if str(system.year) in system.venue else f" ({system.year})"
        parts += [f"*{escape(system.title)}*, {escape(system.venue)}{year}.", escape(system.summary)]
        facts.append(("Sparse", escape(system.sparse)))
        facts.append(("When", escape(system.when)))
        facts.append(("Kind", escape(system.kind)))
    family = cls.family if cls else system.family if system else ""
    slot = cls.slot if cls else system.slot if system else "none"
    needs = sorted(cls.needs) if cls else list(system.needs) if system else []
    facts += [
        ("Family", f"{family}: {FAMILIES[family]}"),
        ("Slot", f"`{slot}`"),
        ("Needs", ", ".join(needs) or "nothing"),
    ]
    parts.append(table(("", ""), facts))
    if cls:
        parts += ["## The method", prose(cls.__doc__)]
        module = sys.modules[cls.__module__]
        alone = sum(other.__module__ == cls.__module__ for other in methods().values()) == 1
        if alone and module.__doc__:
            parts += ["### Formulas", prose(module.__doc__)]
        if (HERE / "_static" / "reads" / f"{slug}.png").is_file():
            parts += ["### What it reads", f"![What {slug} reads](../_static/reads/{slug}.png)", READS]
        if slug in DRAFTS:
            parts += ["### What it drafts", *drafted(slug, results)]
        parts += ["### Settings", settings(cls), "### Use", usage(cls)]
    if system and system.claims:
        parts += [
            "## What the paper claims",
            "These figures are the paper's own. None of them was measured here.",
            table(
                ("Figure", "Of", "Setting"),
                ((f"{c.value:g} {escape(c.unit)}", escape(c.metric), escape(c.setting)) for c in system.claims),
            ),
        ]
    if system:
        parts += ["## What was reproduced", result(slug, results)]
    return "\n\n".join(parts)


def systems(out: Path, results: Path) -> None:
    """A page for every row of the catalogue and every baseline, and an index by family."""
    known, listed = methods(), rows()
    for row in listed:
        slug = row["slug"]
        write(out / f"{slug}.md", page(slug, catalogue().get(slug), known.get(slug), results))
    ready = sum(row["status"] == "available" for row in listed if row["slug"] in catalogue())
    text = [
        "# Systems",
        f"{len(catalogue())} published systems, and the baselines that they are compared with. "
        f"Available today: {ready}. `gossamer list` shows the same in the terminal.",
    ]
    for family, what in FAMILIES.items():
        mine = sorted(
            (row for row in listed if row["family"] == family), key=lambda row: (row["baseline"], row["slug"])
        )
        if not mine:
            continue
        body = []
        for row in mine:
            status = "baseline" if row["baseline"] else row["status"]
            system = catalogue().get(row["slug"])
            summary = system.summary if system else inspect.cleandoc(known[row["slug"]].__doc__ or "").splitlines()[0]
            body.append((f"[{escape(row['name'])}]({row['slug']}.md)", status, escape(summary)))
        toc = "\n".join(row["slug"] for row in mine)
        text += [
            f"## {family.capitalize()}",
            what[0].upper() + what[1:] + ".",
            table(("System", "Status", "In short"), body),
            f"```{{toctree}}\n:hidden:\n\n{toc}\n```",
        ]
    write(out / "index.md", "\n\n".join(text))
    expected = {row["slug"] for row in listed} | {"index"}
    for stale in out.glob("*.md"):
        if stale.stem not in expected:
            stale.unlink()


# --- Command and API -------------------------------------------------------------------------------------------------


def commands(out: Path) -> None:
    """The reference of the command, from the command itself."""
    import typer

    from gossamer.cli import app

    root: Any = typer.main.get_command(app)
    parts = []
    for name, command in root.commands.items():
        context = typer.Context(command, info_name=f"gossamer {name}", resilient_parsing=True)
        usage_line = command.get_usage(context).removeprefix("Usage: ")
        parts += [f"## {name}", inspect.cleandoc(command.help or ""), f"```text\n{usage_line}\n```"]
        records = [parameter.get_help_record(context) for parameter in command.params if not parameter.hidden]
        body = [("`" + left.replace("|", "\\|") + "`", escape(right)) for left, right in filter(None, records)]
        if body:
            parts.append(table(("Argument or option", "Meaning"), body))
    write(out, "\n\n".join(parts))


def api(out: Path) -> None:
    """A page of the API reference for each part of the library."""
    pages = []
    for title, names in API.items():
        parts = [f"# {title}"]
        for name in names:
            module = import_module(f"gossamer.{name}")
            if not (module.__doc__ or "").strip():
                continue  # nothing there yet
            options = [":members:", ":show-inheritance:", ":exclude-members: model_config"]
            if getattr(module, "__all__", None):
                options.append(":imported-members:")
            directive = "\n   ".join([f".. automodule:: gossamer.{name}", *options])
            parts += [f"## gossamer.{name}", f"```{{eval-rst}}\n{directive}\n```"]
        stem = re.sub(r"\W+", "-", title.lower())
        pages.append(stem)
        write(out / f"{stem}.md", "\n\n".join(parts))
    write(out / "index.md", "# Modules\n\n```{toctree}\n\n" + "\n".join(pages) + "\n```")


def public(out: Path) -> None:
    """What `import gossamer` offers, with the first line of each docstring."""
    import gossamer

    body = []
    for name in sorted(gossamer.__all__, key=str.lower):
        if name.startswith("_"):
            continue
        thing = getattr(gossamer, name)
        body.append((f"`gossamer.{name}`", escape(prose(thing.__doc__).splitlines()[0]), f"`{thing.__module__}`"))
    write(out, table(("Name", "What it is", "Defined in"), body))


def picture(out: Path) -> None:
    """The picture of a report, where there is one."""
    there = (HERE / "_static" / "report.png").is_file()
    write(out, "![A report](_static/report.png)" if there else "")


def site(docs: Path = HERE, results: Path = ROOT / "results") -> None:
    """Everything that the site needs."""
    systems(docs / "systems", results)
    commands(docs / "_build" / "generated" / "commands.md")
    public(docs / "_build" / "generated" / "public.md")
    picture(docs / "_build" / "generated" / "picture.md")
    drafts(docs / "_build" / "generated" / "drafts.md", results)
    api(docs / "api" / "generated")


def main() -> None:
    """Run from the shell."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--readme", action="store_true", help="bring the table in README.md up to date, and nothing else"
    )
    if parser.parse_args().readme:
        write(ROOT / "README.md", readme())
    else:
        site()


if __name__ == "__main__":
    main()
