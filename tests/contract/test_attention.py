"""The attention family's contract, for every method and a range of settings."""

from __future__ import annotations

from gossamer.registry import methods
from gossamer.testing import METHODS, AttentionContract


class TestAttention(AttentionContract):
    pass


def test_every_method_of_the_family_is_listed() -> None:
    registered = {slug for slug, method in methods().items() if method.__module__.startswith("gossamer.attention")}
    assert registered == {case.slug for case in METHODS}
