"""Low-rank adapters on chosen weights: W + (α/r)·B·A, trained in place of W, then merged or taken off (Hu et al., 2021)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gossamer.errors import InputError, ModelError


class LowRank(nn.Module):
    """What is added to one weight ``[out, in]`` (transposed: ``[in, out]``): zero at first.

    Dropout falls on input channels, one draw for a step: the adapter then sees whatever input the layer sees, masked or not.
    """

    def __init__(self, weight: Tensor, lora: LoRA, transposed: bool, generator: torch.Generator) -> None:
        super().__init__()
        inputs, outputs = weight.shape if transposed else weight.shape[::-1]
        bound = 1 / math.sqrt(inputs)  # torch's spread of a new linear layer
        a = torch.rand(lora.rank, inputs, generator=generator) * 2 * bound - bound
        self.a = nn.Parameter(a.to(weight.device, weight.dtype))
        self.b = nn.Parameter(torch.zeros(outputs, lora.rank, device=weight.device, dtype=weight.dtype))
        self.scale, self.dropout, self.transposed = lora.alpha / lora.rank, lora.dropout, transposed

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with the adapter's product added."""
        a: Tensor = self.a
        if self.training and self.dropout:
            a = a * F.dropout(a.new_ones(a.shape[1]), self.dropout)
        delta = self.scale * (self.b @ a)
        return weight + (delta.t() if self.transposed else delta)


@dataclass(frozen=True)
class LoRA:
    """Which weights get adapters, and of which form.

    Attributes:
        rank: r, the adapter's inner width.
        alpha: its product is multiplied by alpha / rank.
        dropout: share of the input channels that each training step leaves out of the adapters.
        targets: last parts of the names of the layers (`nn.Linear` or `Conv1D`) that get one.
        seed: of the first weights.

    >>> from gossamer.models import tiny_model
    >>> adapters = LoRA(rank=4, targets=("gate_proj",)).attach(tiny_model("llama"))
    >>> sum(p.numel() for p in adapters.parameters())
    1536
    >>> adapters.merge()
    """

    rank: int = 64
    alpha: float = 16
    dropout: float = 0.1
    targets: tuple[str, ...] = ("q_proj", "k_proj", "gate_proj", "down_proj")
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1 or not math.isfinite(self.alpha):
            raise InputError(
                f"LoRA needs a rank of at least 1 and a dropout in 0 .. 1, got {self.rank}, {self.dropout}"
            )

    def attach(self, model: nn.Module) -> Adapters:
        """Put adapters on a model, whose own parameters are frozen until they are merged or removed.

        Raises:
            ModelError: no layer has one of these names, or one has no plain matrix of floats.
        """
        chosen = [m for name, m in model.named_modules() if name.rpartition(".")[2] in self.targets]
        if not chosen:
            raise ModelError(
                f"{type(model).__name__} has no layer called {', '.join(self.targets)}: set LoRA(targets=…)"
            )
        if any(not isinstance(w := getattr(m, "weight", None), nn.Parameter) or w.ndim != 2 for m in chosen):
            raise ModelError(f"LoRA needs plain matrices; {', '.join(self.targets)} of {type(model).__name__} are not")
        generator, frozen = torch.Generator().manual_seed(self.seed), []
        for parameter in model.parameters():
            frozen.append((parameter, parameter.requires_grad))
            parameter.requires_grad_(False)
        made = []
        for module in chosen:
            low = LowRank(cast(Tensor, module.weight), self, type(module).__name__ == "Conv1D", generator)
            parametrize.register_parametrization(module, "weight", low)
            made.append((module, low))
        return Adapters(made, frozen)


@dataclass(eq=False)
class Adapters:
    """Adapters on a model: trained by `parameters`, ended by `merge` or `remove`."""

    _layers: list[tuple[nn.Module, LowRank]]
    _frozen: list[tuple[nn.Parameter, bool]] = field(repr=False)

    def parameters(self) -> Iterator[nn.Parameter]:
        """A and B of every layer."""
        for _, low in self._layers:
            yield from (low.a, low.b)

    def merge(self) -> None:
        """Add the products to the weights and take the adapters off."""
        for _, low in self._layers:
            low.eval()
        self._end(merged=True)

    def remove(self) -> None:
        """Take the adapters off; the weights are what they were, bit for bit."""
        self._end(merged=False)

    def _end(self, merged: bool) -> None:
        while self._layers:
            module, _ = self._layers.pop()
            parametrize.remove_parametrizations(cast(Any, module), "weight", leave_parametrized=merged)
        while self._frozen:
            parameter, wanted = self._frozen.pop()
            parameter.requires_grad_(wanted)


@contextmanager
def adapted(model: nn.Module, lora: LoRA | None) -> Iterator[list[nn.Parameter] | None]:
    """Adapters while the block trains: merged at its end; if it fails they are taken off, and the model is in eval mode.

    Yields what to train: the adapters, or None without `lora`, when the whole model is.

    Raises:
        ModelError: as `LoRA.attach`.

    >>> layer = nn.Sequential(nn.Linear(4, 2))
    >>> with adapted(layer, LoRA(rank=2, targets=("0",))) as trained:
    ...     [tuple(p.shape) for p in trained]
    [(2, 4), (2, 2)]
    """
    adapters = lora.attach(model) if lora is not None else None
    try:
        yield None if adapters is None else list(adapters.parameters())
    except BaseException:
        if adapters is not None:
            adapters.remove()
        model.eval()
        raise
    if adapters is not None:
        adapters.merge()
