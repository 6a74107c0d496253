"""What the library holds: the catalogue of systems, the registry of methods, and their common base."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module, metadata, resources
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError, InputError, UnknownNameError

Slot = Literal[
    "weights",
    "activations",
    "activations.attention",
    "attention.prefill",
    "attention.decode",
    "cache",
    "cache.storage",
    "tokens",
    "drafting",
    "acceptance",
    "objective",
    "none",
]
#: Order in which a recipe applies its methods: parameters first, the run last.
SLOTS: tuple[str, ...] = Slot.__args__  # type: ignore[attr-defined]

FAMILIES: dict[str, str] = {
    "attention": "which keys a query reads, in prefill and decode",
    "cache": "what the KV cache keeps, where, and at which precision",
    "activations": "which neurons and channels are computed",
    "weights": "which parameters exist: pruning, masks, slicing, sparse training, search",
    "decoding": "drafting and verifying several tokens at once",
    "tokens": "which tokens are carried on: dropping, merging, summarising",
    "features": "sparse autoencoders: training and analysis",
    "tokenizers": "learned and compressed tokenizations of text and images",
    "retrieval": "learned sparse retrieval",
    "objectives": "losses that ask for sparsity, or that train sparse models well",
}


@dataclass(frozen=True)
class Claim:
    """One figure that a paper claims: literature, never a measurement of ours."""

    value: float
    unit: str
    metric: str
    setting: str


@dataclass(frozen=True)
class System:
    """One row of the catalogue."""

    slug: str
    name: str
    title: str
    year: int
    venue: str
    family: str
    kind: str
    slot: str
    sparse: str
    when: str
    needs: tuple[str, ...]
    summary: str
    claims: tuple[Claim, ...] = ()


@cache
def catalogue() -> dict[str, System]:
    """All 65 systems by slug, in alphabetical order."""
    text = resources.files("gossamer").joinpath("catalogue.toml").read_text("utf-8")
    rows = tomllib.loads(text)["system"]
    systems = [
        System(**{**row, "needs": tuple(row["needs"]), "claims": tuple(Claim(**c) for c in row.get("claims", ()))})
        for row in rows
    ]
    return {system.slug: system for system in sorted(systems, key=lambda s: s.slug)}


class Method(BaseModel):
    """Base of every method: a frozen set of hyperparameters, checked when it is made, and nothing else.

    Subclasses are decorated with `register`, which fills the class attributes below. What a method learns lives in its
    `Calibration`; what it does while it runs lives on the `Handle` that `attach` returns.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    slug: ClassVar[str] = ""
    name: ClassVar[str] = ""
    family: ClassVar[str] = ""
    slot: ClassVar[Slot] = "none"
    baseline: ClassVar[bool] = False
    #: The setting that takes a budget as a share of what dense attention spends, if it is not called `tokens`.
    budget_setting: ClassVar[str] = ""
    #: Whether `compare` can measure it on a model as it is: attached, and fed known tokens.
    comparable: ClassVar[bool] = True
    #: What `attach` or `apply` requires, as data: "calibration", "training", "gradients", "draft-model", …
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "settings"
            message = first["msg"].removeprefix("Value error, ")
            if first["type"] == "extra_forbidden":
                message = "no such setting" + nearest(where, type(self).model_fields)
            got = "" if first["type"] == "extra_forbidden" else f" (got {first['input']!r})"
            raise InputError(f"{self.slug or type(self).__name__}: {where}: {message}{got}") from None

    @property
    def slots(self) -> tuple[str, ...]:
        """The places in a recipe that the method takes with these settings; `slot` unless it serves several phases."""
        return (self.slot,)

    def settings(self) -> dict[str, Any]:
        """Hyperparameters that differ from their defaults: what a recipe file stores."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def require(self, calibration: Calibration | None) -> Calibration:
        """The calibration, or a one-line error that says how to get it."""
        if calibration is None:
            raise CalibrationError(
                f"{self.slug} needs a calibration: make one with `gossamer calibrate {self.slug} MODEL`"
            )
        if calibration.method != self.slug:
            raise CalibrationError(f"this calibration was made for {calibration.method}, not for {self.slug}")
        return calibration


@dataclass(eq=False)
class Handle:
    """Methods attached to a model: a context manager whose end, like `detach`, restores the model bit for bit.

    Attributes:
        generator: stands in for the model's `generate` where a method has a decoding loop of its own.
    """

    undo: list[Callable[[], None]] = field(default_factory=list)
    reports: list[Callable[[], dict[str, Any]]] = field(default_factory=list)
    generator: Callable[..., Any] | None = field(default=None, kw_only=True)

    def detach(self) -> None:
        """Undo, last first; safe to call twice."""
        while self.undo:
            self.undo.pop()()

    def report(self) -> dict[str, Any]:
        """What was kept and what it cost since attaching (or the last reset), by name."""
        result: dict[str, Any] = {}
        for part in self.reports:
            result.update(part())
        return result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()


M = TypeVar("M", bound=type[Method])
_METHODS: dict[str, type[Method]] = {}
#: Modules that register the methods of this package, one family a line. Nothing is found by walking folders.
_BUILT_IN: tuple[str, ...] = (
    "gossamer.attention",
    "gossamer.cache",
    "gossamer.activations",
    "gossamer.weights",
    "gossamer.decoding",
)
_loaded: set[str] = set()


def register(
    slug: str,
    *,
    slot: Slot,
    family: str,
    name: str | None = None,
    baseline: bool = False,
    needs: Iterable[str] = (),
) -> Callable[[M], M]:
    """Class decorator: put a `Method` into the registry under its slug.

    Args:
        slug: lower-case name with hyphens, as in the catalogue.
        slot: the place in a recipe that the method takes.
        family: one of `FAMILIES`.
        name: display name (default: the catalogue's).
        baseline: true for methods that the catalogue's systems are compared with; they are outside the 65.
        needs: what running it requires, as data.

    Raises:
        InputError: the slug is taken, the slot or family is unknown, or the class has no docstring.
    """

    def add(cls: M) -> M:
        if slot not in SLOTS or family not in FAMILIES:
            raise InputError(f"{slug}: unknown slot {slot!r} or family {family!r}")
        taken = _METHODS.get(slug)
        if taken and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InputError(f"the method {slug!r} is registered twice: by {taken.__module__} and {cls.__module__}")
        if not cls.__doc__:
            raise InputError(f"{slug}: a method needs a docstring")
        system = catalogue().get(slug)
        cls.slug, cls.slot, cls.family = slug, slot, family
        cls.name = name or (system.name if system else slug)
        cls.baseline, cls.needs = baseline, frozenset(needs)
        _METHODS[slug] = cls
        return cls

    return add


def _load_all() -> None:
    for module in _BUILT_IN:
        if module not in _loaded:
            _loaded.add(module)
            import_module(module)
    for entry in metadata.entry_points(group="gossamer.methods"):
        if entry.value not in _loaded:
            _loaded.add(entry.value)
            entry.load()


def methods() -> dict[str, type[Method]]:
    """All registered methods by slug, those of other packages included."""
    _load_all()
    return dict(sorted(_METHODS.items()))


def nearest(word: str, names: Iterable[str]) -> str:
    """``"; did you mean a, b?"`` or nothing.

    >>> nearest("doublesparse", ["quest", "double-sparsity"])
    '; did you mean double-sparsity?'
    >>> nearest("doubel", ["quest", "double-sparsity"])
    '; did you mean double-sparsity?'
    """

    def likeness(name: str) -> float:
        """Of the whole name, or of its beginning: people type the first word."""
        return max(difflib.SequenceMatcher(None, word, part).ratio() for part in (name, name[: len(word)]))

    ranked = sorted(set(names), key=lambda name: (-likeness(name), name))
    close = [name for name in ranked[:3] if likeness(name) >= 0.6]
    return f"; did you mean {', '.join(close)}?" if close else ""


def method(slug: str) -> type[Method]:
    """The class registered under a slug.

    Raises:
        UnknownNameError: it is planned but not there yet, or unknown (with the nearest names).
    """
    known = methods()
    if slug in known:
        return known[slug]
    if slug in catalogue():
        raise UnknownNameError(f"{slug} is in the catalogue but not available yet: see `gossamer list`")
    raise UnknownNameError(f"no method is called {slug!r}{nearest(slug, [*known, *catalogue()])}")


def make(slug: str, **settings: Any) -> Method:
    """A method with these settings: ``make("double-sparsity", tokens=1/16)``."""
    return method(slug)(**settings)


def rows() -> list[dict[str, Any]]:
    """The catalogue and the baselines as `gossamer list` shows them."""
    known = methods()
    result = [
        {
            "slug": s.slug,
            "name": s.name,
            "family": s.family,
            "slot": known[s.slug].slot if s.slug in known else s.slot,
            "status": "available" if s.slug in known else "planned",
            "baseline": False,
        }
        for s in catalogue().values()
    ]
    result += [
        {
            "slug": m.slug,
            "name": m.name,
            "family": m.family,
            "slot": m.slot,
            "status": "available",
            "baseline": m.baseline,
        }
        for m in known.values()
        if m.slug not in catalogue()
    ]
    return result
