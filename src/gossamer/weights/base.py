"""The base of methods that change a model's weights for good: a model goes in, a model comes out that saves and loads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from gossamer.errors import InputError, ModelError
from gossamer.patterns import Masks
from gossamer.registry import Method

#: Takes (what is going on, steps done, steps in all).
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """No progress shown."""


@dataclass(eq=False)
class Applied:
    """What `WeightMethod.apply` returns.

    Attributes:
        model: the model to use from now on: the one that went in, changed, or another where the method rebuilds it.
        facts: what was done and what is left, JSON types: `sparsity` (share of zeros in the prunable matrices) or
            `parameters` (before, after), and what is the method's own.
        masks: where the method leaves zeros, to go on training under.
    """

    model: nn.Module
    facts: dict[str, Any] = field(default_factory=dict)
    masks: Masks | None = None


class WeightMethod(Method):
    """Base of these methods: one gives `apply`.

    A method that takes text says so in its `needs` (`calibration`: it looks at it; `training`: it also trains on it), and
    gets it as token blocks.
    """

    comparable: ClassVar[bool] = False  # attached to a run: no; `compare --family weights` applies them to copies

    def apply(self, model: nn.Module, tokens: Tensor | None = None, progress: Progress = silent) -> Applied:
        """Change a model, in place where its shapes stay.

        Args:
            model: in eval mode.
            tokens: int64 ``[blocks, length]`` of text, for methods that need it.

        Raises:
            ModelError: the model's family is not served.
            CalibrationError: the text is missing or of another form.
        """
        raise NotImplementedError

    def text(self, tokens: Tensor | None) -> Tensor:
        """The token blocks, or a one-line error.

        Raises:
            InputError: there are none, or they are of another form.
        """
        if tokens is None or tokens.dim() != 2 or not tokens.numel() or tokens.is_floating_point():
            got = "nothing" if tokens is None else f"{tokens.dtype} {list(tokens.shape)}"
            raise InputError(f"{self.slug} needs token blocks [blocks, length] of text, got {got}")
        return tokens

    @classmethod
    def with_kept(cls, share: float, model: nn.Module) -> Self:
        """Settings that leave this share of the parameters in the blocks' matrices, by count of what is not zero.

        Here: a `sparsity` of what is left. Methods that cut shapes say by formula which setting does it on this model.

        Raises:
            InputError: the method has no such setting.
        """
        if "sparsity" not in cls.model_fields:
            raise InputError(f"{cls.slug} cannot be set to a share of parameters")
        return cls(**{"sparsity": 1 - share})


def parameter_count(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def copied(model: nn.Module) -> nn.Module:
    """An independent copy of a model.

    Raises:
        ModelError: something on it cannot be copied (a method is attached).
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever a module holds
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}): detach methods first"
        ) from None
