"""A recipe: methods in order, at most one in each slot, written as YAML.

methods:
  - double-sparsity:
      tokens: 1/16
      calibration: double-sparsity.safetensors
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from gossamer.calibration import Calibration
from gossamer.decoding import AcceptanceMethod, DraftingMethod, Engine
from gossamer.errors import GossamerError, RecipeError
from gossamer.policies import PolicyHandle, PolicyMethod, attach
from gossamer.registry import SLOTS, Handle, Method, make


@dataclass(frozen=True)
class Step:
    """One method of a recipe, with what it learned (or where that lies)."""

    method: Method
    calibration: Calibration | None = None
    calibration_path: str | None = None

    def load_calibration(self, folder: Path) -> Calibration | None:
        """The calibration, read from its file if need be; relative paths start at the recipe's folder."""
        if self.calibration is None and self.calibration_path is not None:
            return Calibration.load(folder / self.calibration_path)
        return self.calibration


@dataclass(frozen=True)
class Recipe:
    """Methods that run together.

    Raises:
        RecipeError: it is empty, or two methods take the same slot.

    >>> from gossamer.registry import make
    >>> print(Recipe((Step(make("quest", tokens=256)),)).to_yaml(), end="")
    methods:
    - quest:
        tokens: 256
    """

    steps: tuple[Step, ...]
    folder: Path = field(default=Path("."), compare=False)

    def __post_init__(self) -> None:
        if not self.steps:
            raise RecipeError("a recipe needs at least one method")
        taken: dict[str, str] = {}
        for step in self.steps:
            for slot in step.method.slots:
                if slot != "none" and slot in taken:
                    raise RecipeError(f"{taken[slot]} and {step.method.slug} both take the slot {slot}: choose one")
                taken[slot] = step.method.slug

    @classmethod
    def of(cls, *methods: Method | tuple[Method, Calibration | None]) -> Recipe:
        """A recipe from methods, or (method, calibration) pairs."""
        return cls(tuple(Step(*m) if isinstance(m, tuple) else Step(m) for m in methods))

    @classmethod
    def parse(cls, data: Any, folder: Path = Path(".")) -> Recipe:
        """A recipe from what a YAML file holds.

        Raises:
            RecipeError: it is not of that form.
        """
        entries = data.get("methods") if isinstance(data, dict) else None
        if not isinstance(entries, list) or not isinstance(data, dict) or set(data) - {"methods"}:
            raise RecipeError("a recipe is a mapping with one key, `methods`, that holds a list")
        steps = []
        for entry in entries:
            if isinstance(entry, str):
                entry = {entry: {}}
            if not isinstance(entry, dict) or len(entry) != 1:
                raise RecipeError(f"each method of a recipe is a name, or a name with its settings; got {entry!r}")
            ((slug, settings),) = entry.items()
            if settings is not None and not isinstance(settings, dict):
                raise RecipeError(f"the settings of {slug} must be a mapping; got {settings!r}")
            settings = dict(settings or {})
            path = settings.pop("calibration", None)
            steps.append(Step(make(str(slug), **settings), calibration_path=path))
        return cls(tuple(steps), folder)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a YAML file.

        Raises:
            RecipeError: unreadable or malformed.
        """
        path = Path(path)
        try:
            data = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RecipeError(f"cannot read the recipe {path}: {str(error).splitlines()[0]}") from None
        try:
            return cls.parse(data, path.parent)
        except GossamerError as error:
            raise RecipeError(f"{path}: {error}") from None

    def to_yaml(self) -> str:
        """The recipe as a YAML file holds it; calibrations as paths."""
        entries: list[Any] = []
        for step in self.steps:
            settings = step.method.settings()
            if step.calibration_path:
                settings["calibration"] = step.calibration_path
            entries.append({step.method.slug: settings} if settings else step.method.slug)
        return yaml.safe_dump({"methods": entries}, sort_keys=False)

    def attach(self, model: nn.Module) -> PolicyHandle:
        """Put every method on the model, parameters first and the run last; the handle takes them off in reverse.

        Raises:
            RecipeError: a method cannot be attached to a run.
        """
        steps = sorted(self.steps, key=lambda step: SLOTS.index(step.method.slot))
        calibrated, engine = _engine([(step.method, step.load_calibration(self.folder)) for step in steps])
        policies = [(method, learned) for method, learned in calibrated if isinstance(method, PolicyMethod)]
        others = [(method, learned) for method, learned in calibrated if not isinstance(method, PolicyMethod)]
        for method, _ in others:
            if not hasattr(method, "attach"):
                raise RecipeError(f"{method.slug} changes a model for good and cannot be attached to a run")
        handles: list[Handle] = []
        try:
            for method, learned in others:
                attachable: Any = method
                handles.append(attachable.attach(model, learned))
            run = attach(model, policies)  # without policies: dense, by our kernel
        except BaseException:
            for handle in reversed(handles):
                handle.detach()
            raise
        run.undo[:0] = [handle.detach for handle in handles]
        run.reports += [handle.report for handle in handles]
        run.generator = next((handle.generator for handle in handles if handle.generator is not None), None)
        if engine is not None:
            made = engine(model)
            run.generator = made.generate
            run.reports.append(made.report)
        return run


Calibrated = list[tuple[Method, Calibration | None]]


def _engine(calibrated: Calibrated) -> tuple[Calibrated, Callable[[nn.Module], Engine] | None]:
    """The methods that are not about drafting, and what makes the engine of those that are.

    Raises:
        RecipeError: an acceptance rule without a drafter, or methods for which a node of a tree is no decode step.
    """
    drafting = [(m, learned) for m, learned in calibrated if isinstance(m, DraftingMethod)]
    rules = [(m, found) for m, found in calibrated if isinstance(m, AcceptanceMethod)]
    if not drafting:
        if rules:
            raise RecipeError(f"{rules[0][0].slug} accepts drafts: the recipe needs a method that makes them")
        return calibrated, None
    ((method, learned),) = drafting
    others = [(m, c) for m, c in calibrated if not isinstance(m, DraftingMethod | AcceptanceMethod)]
    for other, _ in others:
        if isinstance(other, PolicyMethod) and set(other.slots) - {"attention.prefill"} and other.slug != "dense":
            raise RecipeError(
                f"{method.slug} verifies several tokens at once and needs exact attention; {other.slug} does not keep it: "
                "leave one of them out"
            )

    def engine(model: nn.Module) -> Engine:
        rule = rules[0][0].rule_for(model, rules[0][1]) if rules else method.rule()
        return Engine(model, method.drafter(model, learned), rule)

    return others, engine
