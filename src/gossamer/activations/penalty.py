"""A penalty on what a model computes, times a schedule: read during the forward, added to the loss.

    L = L_lm + λ(step) · Σ_modules term(value of the module)

ProSparse's is the L1 norm of the FFN intermediates (`ffn_l1`); deltas between tokens, or a router's balance, are other
terms on other modules' values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.errors import InputError
from gossamer.hf import mlp_views

Reduction = Literal["mean", "token", "sum"]


def l1(x: Tensor, reduction: Reduction = "mean") -> Tensor:
    """``‖x‖₁`` of activations ``[..., tokens, D]``, a scalar summed in float32.

    Args:
        reduction: `mean` over tokens and neurons, `token` a sum over neurons and a mean over tokens, `sum` over all. The
            gradient is ``sign(x)`` over tokens·D, over tokens, or as it is; 0 where x is 0.

    >>> x = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    >>> [float(l1(x, r)) for r in ("mean", "token", "sum")]
    [1.5, 3.0, 6.0]
    """
    if reduction not in get_args(Reduction):
        raise InputError(f"a reduction is one of {', '.join(get_args(Reduction))}, not {reduction!r}")
    total = x.abs().sum(dtype=torch.float32)
    return total / {"mean": max(1, x.numel()), "token": max(1, x.numel() // max(1, x.shape[-1])), "sum": 1}[reduction]


class ActivationPenalty:
    """Sees the values of some modules in each forward that wants gradients, and makes a penalty of them.

    Call it after the forward, with the step: it returns λ(step) times the sum of the terms, on the autograd graph, or the
    number 0.0 where λ is 0, so that such a step is bit for bit one without a penalty. It is what `models.train` takes as
    `penalty`. Only the terms are held, not the values. A module that runs twice in a forward counts twice; a new forward of
    the model starts afresh. Padding counts as tokens.

    Args:
        model: the model whose forward is one step.
        modules: whose values are penalised.
        term: a scalar from a value.
        factor: λ, a number or a function of time. Time is ``step + 1``, so that the last of n steps has the end's value.
        of: the value is the module's first input or its (first) output.

    Raises:
        InputError: no modules.

    >>> layer = nn.Linear(2, 2, bias=False)
    >>> nn.init.eye_(layer.weight).requires_grad
    True
    >>> with ActivationPenalty(layer, [layer], l1, factor=0.5, of="output") as penalty:
    ...     _ = layer(torch.tensor([[1.0, -3.0]]))
    ...     float(penalty(step=0).detach())
    1.0
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Iterable[nn.Module],
        term: Callable[[Tensor], Tensor],
        factor: float | Callable[[float], float] = 1.0,
        of: Literal["input", "output"] = "input",
    ) -> None:
        chosen = list(modules)
        if not chosen:
            raise InputError("a penalty needs modules to look at")
        self.term, self.factor = term, factor
        self._terms: list[Tensor] = []
        # A module that is the model itself must be seen after the list is emptied: hooks run in this order.
        self._hooks: list[Any] = [model.register_forward_pre_hook(self._begin)]
        for module in chosen:
            if of == "input":
                self._hooks.append(module.register_forward_pre_hook(self._see_input))
            else:
                self._hooks.append(module.register_forward_hook(self._see_output))

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._terms.clear()

    def _see_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            self._terms.append(self.term(args[0]))

    def _see_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            self._terms.append(self.term(output[0] if isinstance(output, tuple) else output))

    def scale(self, step: int) -> float:
        """λ of step 0, 1, …"""
        return self.factor(step + 1) if callable(self.factor) else self.factor

    def __call__(self, step: int = 0) -> Tensor | float:
        """The penalty of the last forward.

        Raises:
            InputError: no forward with gradients came before.
        """
        if not self._terms:
            raise InputError("a penalty is asked for after a forward in training, and once for each")
        total, scale = sum(self._terms[1:], self._terms[0]), self.scale(step)
        self._terms.clear()
        return scale * total if scale else 0.0

    def detach(self) -> None:
        """Look no longer; safe to call twice."""
        while self._hooks:
            self._hooks.pop().remove()
        self._terms.clear()

    def __enter__(self) -> ActivationPenalty:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()


def ffn_l1(
    model: nn.Module, factor: float | Callable[[float], float] = 1.0, reduction: Reduction = "mean"
) -> ActivationPenalty:
    """The L1 penalty on x₁, the input of every MLP's down matrix (gate × up; in a plain MLP the activated up), over all layers.

    Raises:
        ModelError: no MLP was found.
        InputError: no such reduction.
    """
    l1(torch.zeros(1, 1), reduction)  # a wrong name is said here, not in the first forward
    return ActivationPenalty(model, [view.down for view in mlp_views(model)], partial(l1, reduction=reduction), factor)
