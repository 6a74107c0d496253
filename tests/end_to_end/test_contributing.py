"""The method that CONTRIBUTING shows is whole: it keeps the family's contract and passes its own examples."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CONTRIBUTING = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", CONTRIBUTING.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_the_new_method_keeps_the_contract(tmp_path: Path) -> None:
    method, contract = blocks()
    (tmp_path / "strided.py").write_text(method, "utf-8")
    (tmp_path / "test_strided.py").write_text(f"import strided\n\n{contract}", "utf-8")
    # A process of its own: the registry of this one stays as it is.
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--doctest-modules", "."]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    # Two examples in docstrings, and the family's promises.
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 12, done.stdout


def test_it_is_as_short_as_it_says() -> None:
    assert len(blocks()[0].splitlines()) < 90
