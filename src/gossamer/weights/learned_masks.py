"""Weights under a mask whose importance is learned with them: PST's factors, and the full-size baselines.

    product = M ⊙ W,  M = 0 for the `removed` smallest of S, else 1,  ∂L/∂S := ∂L/∂M = G ⊙ W   (G = ∂L/∂product)

The layer itself is not touched: its weight is computed anew in each forward (`torch.nn.utils.parametrize`), so any model
takes it, and `export` leaves a plain weight behind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gossamer.errors import InputError
from gossamer.hf import Matrix
from gossamer.patterns import Masks

#: Modules that are drawn new for a task, and so must be trained with whatever else is.
HEADS = re.compile(r"(^|\.)(classifier|score|pooler|qa_outputs)\.")


def smallest_removed(scores: Tensor, remove: int) -> Tensor:
    """Bool mask that drops exactly the `remove` smallest entries, the later of equal ones first.

    By selection rather than by sorting: this runs in every forward. (`patterns.keep_largest` ranks a whole model.)

    Raises:
        InputError: a score is NaN.

    >>> smallest_removed(torch.tensor([[2.0, 1.0], [1.0, 3.0]]), 1).tolist()
    [[True, True], [False, True]]
    """
    if remove == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    flat = scores.detach().reshape(-1)
    threshold = flat.kthvalue(remove).values
    if bool(threshold.isnan()) or bool(flat.isnan().any()):
        raise InputError("an importance is NaN: check the weights, or lower the learning rate")
    mask, equal = flat > threshold, flat == threshold
    stay = flat.numel() - remove - int(mask.sum())
    if stay:
        mask[equal.nonzero()[:stay, 0]] = True
    return mask.view(scores.shape)


class _StraightThrough(torch.autograd.Function):
    """The mask of a score; its gradient is the score's."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, remove: int) -> Tensor:
        return smallest_removed(scores, remove).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class Importance(nn.Module):
    """Base: a subclass gives `values`.

    Args:
        weight: ``[out, in]``, transposed ``[in, out]``.

    Attributes:
        shape: (out, in).
        removed: int64 buffer, how many entries are masked; saved with the model's state.
    """

    removed: Tensor

    def __init__(self, weight: Tensor, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        outputs, inputs = weight.shape[::-1] if transposed else weight.shape
        self.shape = (outputs, inputs)
        self.register_buffer("removed", torch.zeros((), dtype=torch.int64))
        self._cached: tuple[Any, Tensor] | None = None

    def values(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The weight and its importance, both ``[out, in]``, from the original weight ``[out, in]``."""
        raise NotImplementedError

    def set_sparsity(self, sparsity: float) -> None:
        """Mask int(out·in·sparsity) entries from now on."""
        self.removed.fill_(int(self.shape[0] * self.shape[1] * sparsity))

    def mask(self, weight: Tensor) -> Tensor:
        """What stays now, bool, as the weight lies."""
        with torch.no_grad():
            mask = smallest_removed(self.values(self._view(weight))[1], int(self.removed))
        return self._view(mask)

    def _view(self, weight: Tensor) -> Tensor:
        return weight.t() if self.transposed else weight

    def forward(self, weight: Tensor) -> Tensor:
        """M ⊙ W, as the weight lies and in its dtype. Without gradients it is made once and kept until something changes."""
        cached = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if cached:
            key = tuple((t.data_ptr(), t._version) for t in (weight, self.removed, *self.parameters()))
            if self._cached is not None and self._cached[0] == key:
                return self._cached[1]
        with torch.autocast(weight.device.type, enabled=False):  # a rank of scores in bfloat16 would be mostly ties
            updated, scores = self.values(self._view(weight))
            mask = cast(Tensor, _StraightThrough.apply(scores, int(self.removed)))  # type: ignore[no-untyped-call]
            product = self._view(mask * updated).to(weight.dtype).contiguous()
        self._cached = (key, product) if cached else None
        return product


class MagnitudeMask(Importance):
    """MaP, gradual magnitude pruning: all weights are trained, the importance is |W|. What is masked may come back."""

    def values(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """W and |W|."""
        return weight, weight.detach().abs()


class MovementMask(Importance):
    """MvP, movement pruning (Sanh et al., 2020): a score for every weight, from zero on, is trained with the weight."""

    def __init__(self, weight: Tensor, transposed: bool) -> None:
        super().__init__(weight, transposed)
        self.score = nn.Parameter(torch.zeros(self.shape, device=weight.device, dtype=weight.dtype))

    def values(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """W and S."""
        return weight, self.score


@dataclass(eq=False)
class LearnedMasks:
    """Learned masks on a model, ended by `export` or `remove`.

    >>> from gossamer.hf import matrices
    >>> model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    >>> masks = LearnedMasks.on(
    ...     model, matrices(model), lambda m: MagnitudeMask(m.parameter, m.transposed), train_weights=True
    ... )
    >>> masks.set_sparsity(0.5)
    >>> masks.export().shares(), int((model[0].weight == 0).sum())
    ({'0.weight': 0.5}, 12)
    """

    _model: nn.Module
    _layers: dict[str, tuple[nn.Module, Importance]]
    _wanted: list[tuple[nn.Parameter, bool]] = field(repr=False)
    _weights: bool

    @classmethod
    def on(
        cls,
        model: nn.Module,
        chosen: Iterable[Matrix],
        make: Callable[[Matrix], Importance],
        *,
        train_weights: bool = False,
    ) -> LearnedMasks:
        """Put masks on these matrices.

        Args:
            make: the importance of a matrix.
            train_weights: False freezes all of the model but its head (classifier, pooler) and what the masks learn.

        Raises:
            InputError: a weight is not finite.
        """
        chosen = list(chosen)
        for matrix in chosen:
            if not bool(matrix.parameter.isfinite().all()):
                raise InputError(f"{matrix.name} holds values that are NaN or infinite: check the model")
        made = [(matrix, make(matrix)) for matrix in chosen]
        wanted = [(p, p.requires_grad) for p in model.parameters()]
        if not train_weights:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(bool(HEADS.search(name)))
        for matrix, importance in made:
            parametrize.register_parametrization(matrix.module, "weight", importance)
        return cls(model, {m.name: (m.module, importance) for m, importance in made}, wanted, train_weights)

    def factors(self) -> Iterator[nn.Parameter]:
        """What the masks learn."""
        for _, importance in self._layers.values():
            yield from importance.parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        """All that is to be trained: what the masks learn, and what of the model is not frozen."""
        return (p for p in self._model.parameters() if p.requires_grad)

    def set_sparsity(self, sparsity: float) -> None:
        """Mask this share of every matrix from now on.

        Raises:
            InputError: it is not in 0 .. 1.
        """
        if not 0 <= sparsity < 1:
            raise InputError(f"a sparsity must lie in 0 .. 1, got {sparsity:g}")
        for _, importance in self._layers.values():
            importance.set_sparsity(sparsity)

    def masks(self) -> Masks:
        """What stays now, by the name of the model's parameter."""
        return Masks(
            {name: i.mask(cast(Any, m).parametrizations.weight.original) for name, (m, i) in self._layers.items()}
        )

    def export(self) -> Masks:
        """Leave M ⊙ W in the weights and nothing else; the masks."""
        masks = self.masks()
        self._end(keep=True)
        return masks

    def remove(self) -> None:
        """Take all off; frozen weights are what they were, bit for bit."""
        self._end(keep=False)

    def _end(self, keep: bool) -> None:
        for module, _ in self._layers.values():
            parametrize.remove_parametrizations(cast(Any, module), "weight", leave_parametrized=keep)
        self._layers = {}
        while self._wanted:
            parameter, wanted = self._wanted.pop()
            parameter.requires_grad_(wanted)
