"""What the commands share: how they load, show progress, print rows, and read settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from gossamer.errors import InputError, OutputError

out, err = Console(), Console(stderr=True)


class Format(StrEnum):
    """How to print rows."""

    table = "table"
    json = "json"
    markdown = "markdown"


ModelArg = Annotated[
    str, typer.Argument(help="smollm2 (the default model), a folder, a GGUF file, or a hub id.", metavar="MODEL")
]
FormatOpt = Annotated[Format, typer.Option("--format", "-f", help="How to print.")]
SetOpt = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="A setting, as name=value. May be repeated.", metavar="NAME=VALUE"),
]
DtypeOpt = Annotated[str | None, typer.Option(help="float32 or bfloat16 (default: the model's own).")]
ThreadsOpt = Annotated[int | None, typer.Option(min=1, help="Threads to compute with (default: all cores).")]


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, fed with (what, done, total)."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(task, description=what[:48], completed=done, total=total)


def print_table(rows: Sequence[dict[str, Any]], title: str | None = None, right: Sequence[str] = ()) -> None:
    """Rows as a terminal table."""
    table = Table(title=title, box=None, pad_edge=False, header_style="bold")
    for name in rows[0] if rows else ():
        table.add_column(name.replace("_", " "), justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*("" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    out.print(table)


def emit(rows: Sequence[dict[str, Any]], format_: Format, right: Sequence[str] = ()) -> None:
    """Rows as a terminal table, JSON, or a Markdown table."""
    if format_ is Format.json:
        print(json.dumps(list(rows), indent=1))
    elif format_ is Format.markdown:
        names = list(rows[0]) if rows else []
        print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
        for row in rows:
            print("| " + " | ".join(str(value).replace("|", "\\|") for value in row.values()) + " |")
    else:
        print_table(rows, right=right)


def comma_names(text: str) -> list[str]:
    """What stands between commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def settings_of(pairs: Sequence[str] | None) -> dict[str, Any]:
    """``name=value`` pairs; values are read as YAML, so numbers, lists and booleans come out as such."""
    import yaml

    result: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InputError(f"--set takes name=value, got {pair!r}")
        result[name.strip()] = yaml.safe_load(value)
    return result


def load_model(model: str, dtype: str | None, threads: int | None) -> Any:
    """A model by name, after setting the number of threads."""
    import torch

    from gossamer.models import load

    if threads is not None:
        torch.set_num_threads(threads)
    return load(model, dtype=dtype)


def writable(path: Path) -> Path:
    """Fail before the work, not after it, if a file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".{path.name}.probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from None
    return path
