"""What an entry of a weight matrix is worth: pure scores ``[out, in]``, larger is kept.

Second-order pruning, which also moves what it keeps, is in `second_order`; scores that are learned stay with their methods.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.errors import InputError


def magnitude(weight: Tensor) -> Tensor:
    """|w|, in float32: ties that a narrow dtype makes are broken by index."""
    return weight.detach().float().abs()


def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in 0 .. 1, from the generator."""
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """|w · ∂L/∂w|: what removing the entry changes of the loss, to first order (Molchanov et al. 2017)."""
    return (weight.detach().float() * gradient.float()).abs()


def movement(weight: Tensor, gradient: Tensor) -> Tensor:
    """−w · ∂L/∂w: one step's share of movement pruning's score, whose sum over steps is the score (Sanh et al. 2020)."""
    return -(weight.detach().float() * gradient.float())


def activation_aware(weight: Tensor, input_norm: Tensor) -> Tensor:
    """|w_ij| · ‖x_j‖ (Wanda, Sun et al. 2023); `input_norm` float32 ``[in]`` over the calibration tokens.

    Raises:
        InputError: the norms are of another width.

    >>> activation_aware(torch.tensor([[1.0, -2.0]]), torch.tensor([3.0, 1.0]))
    tensor([[3., 2.]])
    """
    if input_norm.shape != weight.shape[1:]:
        raise InputError(f"norms of {list(input_norm.shape)} do not fit a weight {list(weight.shape)}")
    return weight.detach().float().abs() * input_norm.float()


def momentum(score: Tensor | None, weight: Tensor, gradient: Tensor, decay: float = 0.9) -> Tensor:
    """SNIP with momentum: ``decay · score + |w · ∂L/∂w|``, updated every step; None starts at zero."""
    now = taylor(weight, gradient)
    return now if score is None else decay * score + now
