"""The attention family's contract, for every method and a range of settings."""

from __future__ import annotations

from pathlib import Path

from gossamer.registry import methods
from gossamer.testing import METHODS, AttentionContract

#: ZipVL leaves tokens out of attention, queries among them: such a query attends to nothing. Its tests are its own.
EXEMPT = {"zipvl"}


class TestAttention(AttentionContract):
    pass


def test_every_method_of_the_family_keeps_the_contract() -> None:
    """In this file's list, or by a contract class in its own test file."""
    registered = {slug for slug, method in methods().items() if method.__module__.startswith("gossamer.attention")}
    exact = Path(__file__).parents[1] / "exact"
    files = {slug: exact / f"test_{slug.replace('-', '_')}.py" for slug in registered}
    own = {slug for slug, file in files.items() if file.exists() and "(AttentionContract)" in file.read_text()}
    # Some files hold several methods: their cases name them.
    texts = [text for file in exact.glob("*.py") if "(AttentionContract)" in (text := file.read_text())]
    own |= {slug for slug in registered if any(f'Case("{slug}"' in text for text in texts)}
    assert registered - EXEMPT == own | {case.slug for case in METHODS}
