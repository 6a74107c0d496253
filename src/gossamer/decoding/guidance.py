"""Classifier-free guidance as part of a model: each forward reads the text with and without its condition.

The two branches are the rows of one batch, so a draft's tree, its acceptance and the cache are shared by both.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any, Self

import torch
from torch import Tensor, nn

from gossamer.errors import InputError

_GUIDED: weakref.WeakKeyDictionary[nn.Module, Guidance] = weakref.WeakKeyDictionary()


class Guidance:
    """While it is entered, the model's logits are u + scale (c - u), of the text (c) and the text without condition (u).

    Args:
        model: a causal language model; it takes one sequence at a time then.
        scale: 1 leaves the conditional law, 0 the unconditional one.
        conditions: ids of the tokens that condition.
        nothing: the id that stands for all of them in the second branch.

    Raises:
        InputError: no condition, a scale below 0, or (when entered) a model that is guided already.

    >>> from gossamer.models import tiny_model
    >>> model, ids = tiny_model("llama"), torch.tensor([[250, 3, 4]])
    >>> plain = model(ids).logits
    >>> with Guidance(model, 1.0, [250], 251):
    ...     torch.allclose(model(ids).logits, plain, atol=1e-5)
    True
    """

    def __init__(self, model: nn.Module, scale: float, conditions: Collection[int], nothing: int) -> None:
        if not conditions or not scale >= 0:
            raise InputError(f"guidance wants condition tokens and a scale of 0 or more, got {scale}")
        self.model, self.scale, self.nothing = model, scale, nothing
        self.conditions = torch.tensor(sorted(conditions))
        self._hooks: list[Any] = []

    def rows(self, ids: Tensor) -> Tensor:
        """Ids ``[2, n]`` of both branches, for ``[n]``."""
        return torch.stack([ids, ids.masked_fill(torch.isin(ids, self.conditions.to(ids.device)), self.nothing)])

    def combine(self, logits: Tensor) -> Tensor:
        """``[1, …]`` of both branches' logits ``[2, …]``."""
        return logits[1:] + self.scale * (logits[:1] - logits[1:])

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids = kwargs.pop("input_ids", None) if not args else args[0]
        if ids is None or ids.shape[0] != 1:
            raise InputError("guidance takes the token ids of one sequence")
        for name in ("position_ids", "attention_mask"):
            given = kwargs.get(name)
            if isinstance(given, Tensor) and given.shape[0] == 1:
                kwargs[name] = given.expand(2, *given.shape[1:])
        return args[1:], {**kwargs, "input_ids": self.rows(ids[0])}

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        output.logits = self.combine(output.logits)
        return output

    def __enter__(self) -> Self:
        if self.model in _GUIDED:
            raise InputError("the model is guided already")
        _GUIDED[self.model] = self
        before = self.model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
        self._hooks = [before, self.model.register_forward_hook(self._after)]
        return self

    def __exit__(self, *exc: object) -> None:
        _GUIDED.pop(self.model, None)
        while self._hooks:
            self._hooks.pop().remove()


def guidance_of(model: nn.Module) -> Guidance | None:
    """The guidance that a model is under, if any."""
    return _GUIDED.get(model)
