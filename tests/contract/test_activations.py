"""The activation family's contract, for every method and a range of settings."""

from __future__ import annotations

from pathlib import Path

from gossamer.activations import ActivationMethod
from gossamer.registry import methods
from gossamer.testing_activations import METHODS, ActivationContract

#: Their masks depend on more than the token: on the prompt. Their tests are their own.
EXEMPT = {"griffin", "sirius"}


class TestActivations(ActivationContract):
    pass


def test_every_post_training_method_of_the_family_keeps_the_contract() -> None:
    """In this file's list, or by a contract class in its own test file."""
    registered = {slug for slug, method in methods().items() if issubclass(method, ActivationMethod)}
    exact = Path(__file__).parents[1] / "exact"
    files = {slug: exact / f"test_{slug.replace('-', '_')}.py" for slug in registered}
    own = {slug for slug, file in files.items() if file.exists() and "(ActivationContract)" in file.read_text()}
    assert registered - EXEMPT == own | {case.slug for case in METHODS}
