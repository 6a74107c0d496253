"""Which neurons of an MLP, or input channels of a matrix, a token computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gossamer.errors import InputError


@dataclass(frozen=True, eq=False)
class NeuronRule:
    """What is kept of activations ``a [..., D]``; exactly one of the three forms is given.

    Attributes:
        threshold: float ``[]`` or ``[D]``: kept where ``|a| > threshold``. A NaN is kept, so that it is seen.
        count: so many of each token's largest ``|a|``.
        indices: int32 ``[n]``, ascending, no repeats: the same neurons for every token.
        on: what ``a`` is in a gated MLP: the activated gate (up and down are then skipped where it is dropped), or its
            product with up (which must be computed to be judged, so that only down is skipped).
        shared: with `count`, all tokens of a call keep the same neurons: those with the largest ``Σ_tokens |a|``.

    Raises:
        InputError: none or several forms, or one out of range.

    >>> NeuronRule(threshold=torch.tensor(0.5)).mask(torch.tensor([[0.1, -0.9, 0.5]]))
    tensor([[False,  True, False]])
    >>> NeuronRule(count=1).mask(torch.tensor([[0.1, -0.9, 0.5]]))
    tensor([[False,  True, False]])
    """

    threshold: Tensor | None = None
    count: int | None = None
    indices: Tensor | None = None
    on: Literal["gate", "product"] = "gate"
    shared: bool = False

    def __post_init__(self) -> None:
        forms = (self.threshold, self.count, self.indices)
        if sum(form is not None for form in forms) != 1:
            raise InputError("a neuron rule has one of threshold, count and indices")
        if self.threshold is not None and (self.threshold.ndim > 1 or bool((self.threshold < 0).any())):
            raise InputError("thresholds of neurons are [] or [D], and not negative")
        if self.threshold is not None:
            if bool(self.threshold.isnan().any()):
                raise InputError("a threshold of neurons is NaN")
            object.__setattr__(self, "threshold", self.threshold.float().contiguous())  # as kernels read it
        if self.count is not None and self.count < 0:
            raise InputError(f"a count of neurons must not be negative, got {self.count}")
        if self.shared and self.count is None:
            raise InputError("only a count of neurons is shared by the tokens of a call")
        if self.indices is not None and (
            self.indices.dtype is not torch.int32
            or self.indices.ndim != 1
            or bool((self.indices.diff() <= 0).any())
            or bool((self.indices[:1] < 0).any())
        ):
            raise InputError("indices of neurons are int32 [n], ascending and without repeats")
        if self.indices is not None:
            object.__setattr__(self, "indices", self.indices.contiguous())

    def check(self, size: int, device: torch.device) -> None:
        """Raise `InputError` unless the rule fits so many neurons on this device."""
        for part in (self.threshold, self.indices):
            if part is not None and part.device != device:
                raise InputError(f"a rule lies on {part.device}, the neurons on {device}")
        if self.threshold is not None and self.threshold.numel() not in (1, size):
            raise InputError(f"a rule has {self.threshold.numel()} thresholds for {size} neurons")
        if self.threshold is not None and self.threshold.ndim and self.threshold.numel() != size:
            raise InputError(f"a single threshold has shape [], not [1], for {size} neurons")
        if self.indices is not None and len(self.indices) and int(self.indices[-1]) >= size:
            raise InputError(f"a rule names neuron {int(self.indices[-1])} of {size}")

    def mask(self, a: Tensor) -> Tensor:
        """Bool ``[..., D]``: what is kept."""
        if self.threshold is not None:
            return ~(a.abs() <= self.threshold.to(a.dtype))
        if self.indices is not None:
            kept = torch.zeros(a.shape[-1], dtype=torch.bool, device=a.device)
            kept[self.indices.long()] = True
            return kept.expand(a.shape)
        count = min(self.count or 0, a.shape[-1])
        if self.shared:
            together = a.abs().reshape(-1, a.shape[-1]).sum(0)
            best = together.topk(count).indices.expand(*a.shape[:-1], count)
        else:
            best = a.abs().topk(count, dim=-1).indices
        return torch.zeros_like(a, dtype=torch.bool).scatter_(-1, best, True)
