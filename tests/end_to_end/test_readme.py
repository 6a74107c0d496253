"""What README shows is true: its table is up to date, its commands exist, its Python runs."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gossamer.errors import ModelError
from gossamer.models import smollm2_file

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


def blocks(file: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", file.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_families_is_up_to_date(generate: ModuleType) -> None:
    assert generate.readme(README) == README.read_text("utf-8"), "run: python docs/generate.py --readme"


def test_every_system_has_a_page(generate: ModuleType, tmp_path: Path) -> None:
    generate.systems(tmp_path / "systems", tmp_path / "results")
    written = {page.stem for page in (tmp_path / "systems").glob("*.md")}
    assert written == {row["slug"] for row in generate.rows()} | {"index"}


def test_a_result_is_on_its_page(generate: ModuleType, tmp_path: Path) -> None:
    found = {
        "verdict": "direction only",
        "measured": "KL 0.2 | sinks 0.9",
        "raw": {"kl": [0.2]},
        "versions": {"torch": "2"},
    }
    (tmp_path / "double-sparsity.json").write_text(json.dumps(found), "utf-8")
    generate.systems(tmp_path / "systems", tmp_path)
    page = (tmp_path / "systems" / "double-sparsity.md").read_text("utf-8")
    assert "direction only" in page
    assert r"KL 0.2 \| sinks 0.9" in page


def _commands() -> list[list[str]]:
    files = [README, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "guide").glob("*.md"))]
    lines = [line for file in files for block in blocks(file, "sh") for line in block.splitlines()]
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for words in split if words[:1] == ["gossamer"]]


def test_the_commands_exist() -> None:
    """Every `gossamer` line in README and the guide names a command that there is, and options that it has."""
    import typer

    from gossamer.cli import app

    root: Any = typer.main.get_command(app)
    for words in _commands():
        rest = [word for word in words[1:] if word not in ("--debug", "--version")]
        if not rest:
            continue
        assert rest[0] in root.commands, " ".join(words)
        options = {option for parameter in root.commands[rest[0]].params for option in parameter.opts} | {"--help"}
        used = {word.split("=")[0] for word in rest if word.startswith("-") and word != "-"}
        assert used <= options, " ".join(words)


@pytest.mark.slow
def test_the_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        smollm2_file()
    except ModelError as error:
        pytest.skip(str(error))
    (code,) = blocks(README, "python")
    names: dict[str, Any] = {}
    exec(compile(code, str(README), "exec"), names)
    report = names["handle"].report()
    assert 0 < report["rows_kept"] < 1
    assert "kv_bytes_read" in capsys.readouterr().out


@pytest.mark.parametrize(
    "page", ["concepts.md", *(f"guide/{p.name}" for p in sorted((ROOT / "docs" / "guide").glob("*.md")))]
)
def test_the_guide_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of each page, from top to bottom; pages use small random models, so this is quick."""
    code = "\n".join(blocks(ROOT / "docs" / page, "python"))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {"__name__": page})
