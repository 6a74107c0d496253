"""The catalogue's rows, the registry's manners, and what a method's settings refuse."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import Field

import gossamer.registry as registry
from gossamer.errors import InputError, UnknownNameError
from gossamer.registry import FAMILIES, SLOTS, Handle, Method, catalogue, make, method, methods, register, rows

SLUGS = (Path(__file__).parent.parent / "data" / "slugs.txt").read_text().split()

#: Their cards claim a direction, and no figure that could be verified.
WITHOUT_FIGURES = {"gradient-sae", "random-pruning", "random-search", "sparse-model-soups"}


@pytest.fixture
def clean() -> Iterator[None]:
    """Whatever the test registers is gone afterwards."""
    methods()
    known, loaded = dict(registry._METHODS), set(registry._loaded)
    yield
    registry._METHODS.clear()
    registry._METHODS.update(known)
    registry._loaded.clear()
    registry._loaded.update(loaded)


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# -- the catalogue ----------------------------------------------------------------------------------------------------


def test_the_catalogue_is_the_65_cards() -> None:
    assert len(SLUGS) == 65
    assert list(catalogue()) == sorted(SLUGS)


@pytest.mark.parametrize("slug", SLUGS)
def test_a_row_is_well_formed(slug: str) -> None:
    system = catalogue()[slug]
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug)
    assert system.slug == slug
    assert system.family in FAMILIES
    assert system.slot in SLOTS
    assert 2015 <= system.year <= 2026
    for name in ("name", "title", "venue", "kind", "sparse", "when", "summary"):
        text = getattr(system, name)
        assert text.strip() == text != ""
        assert "\n" not in text
    assert isinstance(system.needs, tuple)
    assert all(re.fullmatch(r"[a-z0-9-]+", need) for need in system.needs)
    assert bool(system.claims) is (slug not in WITHOUT_FIGURES)
    for claim in system.claims:
        assert isinstance(claim.value, int | float)
        assert not isinstance(claim.value, bool)
        assert math.isfinite(claim.value)
        assert all(text.strip() == text != "" for text in (claim.unit, claim.metric, claim.setting))


def test_rows_of_the_list() -> None:
    table = rows()
    assert {r["slug"] for r in table if r["slug"] in catalogue()} == set(SLUGS)
    assert len({r["slug"] for r in table}) == len(table)
    for row in table:
        assert row.keys() == {"slug", "name", "family", "slot", "status", "baseline"}
        assert row["status"] == ("available" if row["slug"] in methods() else "planned")
        assert row["baseline"] is (row["slug"] not in catalogue())
    status = {r["slug"]: r["status"] for r in table}
    assert status["double-sparsity"] == "available"
    assert {"dense", "streaming-llm", "quest"} <= {r["slug"] for r in table if r["baseline"]}


# -- looking up -------------------------------------------------------------------------------------------------------


def test_unknown_names_suggest_the_nearest() -> None:
    for wrong, near in (("double-sparsty", "double-sparsity"), ("quests", "quest"), ("streamingllm", "streaming-llm")):
        with pytest.raises(UnknownNameError, match=f"no method is called '{wrong}'; did you mean {near}") as caught:
            method(wrong)
        one_line(caught)
    with pytest.raises(UnknownNameError) as caught:
        make("zzzzzzzzz")
    assert one_line(caught) == "no method is called 'zzzzzzzzz'"
    with pytest.raises(UnknownNameError) as caught:
        method("a\nb")
    one_line(caught)


def test_planned_names_say_so() -> None:
    planned = [r["slug"] for r in rows() if r["status"] == "planned"]
    for slug in planned[:3]:
        with pytest.raises(UnknownNameError, match=f"{slug} is in the catalogue but not available yet") as caught:
            make(slug)
        one_line(caught)


def test_every_method_says_what_it_is() -> None:
    for slug, cls in methods().items():
        assert cls.slug == slug
        assert cls.name
        assert cls.family in FAMILIES
        assert cls.slot in SLOTS
        assert cls.__doc__
        assert all(field.description for field in cls.model_fields.values()), slug
        assert cls.baseline is (slug not in catalogue())
        if slug in catalogue():
            system = catalogue()[slug]
            assert (cls.name, cls.family, cls.slot) == (system.name, system.family, system.slot)
    assert method("double-sparsity").needs == {"calibration"}
    assert list(methods()) == sorted(methods())


# -- registering ------------------------------------------------------------------------------------------------------


def define(slug: str = "mine", doc: str | None = "A method.", **kwargs: Any) -> type[Method]:
    class Mine(Method):
        __doc__ = doc
        strength: int = Field(3, ge=0, description="how much")

    return register(slug, **{"slot": "cache", "family": "cache", **kwargs})(Mine)


@pytest.mark.usefixtures("clean")
def test_register_fills_the_class() -> None:
    cls = define(name="Mine", baseline=True, needs=["training"])
    assert method("mine") is cls
    assert (cls.slug, cls.name, cls.slot, cls.family, cls.baseline) == ("mine", "Mine", "cache", "cache", True)
    assert cls.needs == {"training"}
    assert make("mine", strength=5).settings() == {"strength": 5}
    assert define(slug="h2o-of-mine").name == "h2o-of-mine"
    row = {"slug": "mine", "name": "Mine", "family": "cache", "slot": "cache", "status": "available", "baseline": True}
    assert row in rows()


@pytest.mark.usefixtures("clean")
def test_registering_twice_is_refused() -> None:
    first = define()
    assert define() is method("mine")  # the same class again, as on a reload

    class Other(Method):
        """Another."""

    with pytest.raises(InputError, match="'mine' is registered twice") as caught:
        register("mine", slot="cache", family="cache")(Other)
    one_line(caught)
    namesake = type(first.__name__, (Method,), {"__doc__": "Of another package.", "__module__": "elsewhere"})
    namesake.__qualname__ = first.__qualname__
    with pytest.raises(InputError, match=r"registered twice: by .* and elsewhere"):
        register("mine", slot="cache", family="cache")(namesake)
    assert method("mine").__module__ == __name__


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(
    "bad",
    [{"slot": "sideways"}, {"family": "unknown"}, {"doc": None}, {"doc": ""}],
    ids=lambda b: next(iter(b.items())),
)
def test_bad_registrations_leave_nothing(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        define(**bad)
    assert "mine" in one_line(caught)
    assert "mine" not in methods()


@pytest.mark.usefixtures("clean")
def test_entry_points_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = ModuleType("gossamer_plugin_of_a_test")
    source = '''
from gossamer.registry import Method, register

@register("plugged-in", slot="cache", family="cache")
class PluggedIn(Method):
    """From elsewhere."""
'''
    plugin.__dict__["__name__"] = plugin.__name__
    imports: list[str] = []

    def load(self: EntryPoint) -> Any:
        imports.append(self.value)
        exec(source, plugin.__dict__)
        return plugin

    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    monkeypatch.setattr(EntryPoint, "load", load)
    entry = EntryPoint("plugged-in", plugin.__name__, "gossamer.methods")
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: [entry] if group == "gossamer.methods" else [])
    assert "plugged-in" in methods()
    assert make("plugged-in").slug == "plugged-in"
    methods()
    assert imports == [plugin.__name__]  # once
    row = next(r for r in rows() if r["slug"] == "plugged-in")
    assert row["status"] == "available"
    assert row["baseline"] is False


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("clean")
def test_settings_are_checked_at_once_in_one_line() -> None:
    define()
    for bad in ({"strength": -1}, {"strength": "much\nmore"}, {"strenght": 3}, {"strength": None}):
        with pytest.raises(InputError) as caught:
            make("mine", **bad)
        assert one_line(caught).startswith("mine: ")
    with pytest.raises(InputError, match=r"strenght: no such setting; did you mean strength\?"):
        make("mine", strenght=3)


@pytest.mark.usefixtures("clean")
def test_methods_are_values() -> None:
    define()
    one = make("mine", strength=4)
    assert one == make("mine", strength=4) != make("mine")
    assert hash(one) == hash(make("mine", strength=4))
    with pytest.raises(ValueError, match="frozen"):
        one.strength = 5  # type: ignore[attr-defined]
    assert make("mine").settings() == {}


def test_handles_undo_last_first_and_once() -> None:
    done: list[int] = []
    handle = Handle(undo=[lambda: done.append(1), lambda: done.append(2)], reports=[lambda: {"a": 1}, lambda: {"b": 2}])
    assert handle.report() == {"a": 1, "b": 2}
    with pytest.raises(KeyError), handle:
        raise KeyError
    handle.detach()
    assert done == [2, 1]
