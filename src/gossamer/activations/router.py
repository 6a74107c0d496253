"""Routing that modules with experts, or groups of dimensions, share: scores → the best k → gates → balance → dispatch.

    chosen   = the first `shared` units, then the k − shared best scores of the others
    gates    = softmax over the chosen scores, 0 elsewhere        (top-k first, then softmax)
    balance  = (n − shared) · Σ_{i ≥ shared} f_i · p_i            (Switch Transformers' form)

f_i is the share of tokens that chose unit i (they sum to k), p_i the mean probability that the router gave it. At even use
the balance is (k − shared) · Σ_{i ≥ shared} p_i, and it grows as tokens crowd on units with high probability. Its gradient
flows through p alone. "Unit" is an expert or a group; every token routes by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.errors import InputError


def top_units(scores: Tensor, k: int, shared: int = 0) -> Tensor:
    """The units of each token, int64 ``[..., k]``: the shared ones, then the best of the rest; ties go to the lowest index.

    Args:
        scores: ``[..., n]``, higher is better; those of shared units are not looked at.
        k: units per token, the shared ones counted.
        shared: how many units, from index 0 on, every token gets.

    Raises:
        InputError: not 0 ≤ shared ≤ k ≤ n, or k is 0.

    >>> top_units(torch.tensor([0.1, 0.3, 0.9, 0.3]), 2).tolist()
    [2, 1]
    >>> top_units(torch.tensor([0.1, 0.3, 0.9, 0.3]), 3, shared=1).tolist()
    [0, 2, 1]
    """
    n = scores.shape[-1] if scores.ndim else 0
    if not 0 <= shared <= k <= n or k < 1:
        raise InputError(
            f"cannot choose k={k} of {n} units with {shared} shared: it takes shared <= k <= units, k >= 1"
        )
    best = scores.detach()[..., shared:].argsort(dim=-1, descending=True, stable=True)[..., : k - shared] + shared
    if not shared:
        return best
    always = torch.arange(shared, device=scores.device).expand(*scores.shape[:-1], shared)
    return torch.cat([always, best], -1)


def unit_mask(units: Tensor, n: int) -> Tensor:
    """Boolean ``[..., n]``, true at the chosen units ``[..., k]``.

    >>> unit_mask(torch.tensor([2, 0]), 4).tolist()
    [True, False, True, False]
    """
    return torch.zeros(*units.shape[:-1], n, dtype=torch.bool, device=units.device).scatter_(-1, units, True)


def softmax_gates(scores: Tensor, units: Tensor) -> Tensor:
    """Gates ``[..., k]`` of the chosen units: the softmax of their scores alone, at least in float32; differentiable.

    >>> softmax_gates(torch.tensor([1.0, 1.0, 9.0]), torch.tensor([0, 1])).tolist()
    [0.5, 0.5]
    """
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).gather(-1, units).softmax(-1)


def spread(values: Tensor, units: Tensor, n: int) -> Tensor:
    """Values of the chosen units ``[..., k]`` at their places in ``[..., n]``, zeros elsewhere; differentiable.

    >>> spread(torch.tensor([0.75, 0.25]), torch.tensor([2, 0]), 4).tolist()
    [0.25, 0.0, 0.75, 0.0]
    """
    return values.new_zeros(*values.shape[:-1], n).scatter(-1, units, values)


def load_shares(units: Tensor, n: int) -> Tensor:
    """f float32 ``[n]``: the share of tokens that chose each unit; they sum to k.

    >>> load_shares(torch.tensor([[0, 1], [0, 2]]), 3).tolist()
    [1.0, 0.5, 0.5]
    """
    tokens = units.numel() // units.shape[-1]
    return torch.bincount(units.flatten(), minlength=n).float() / max(1, tokens)


def balance_loss(probabilities: Tensor, units: Tensor, shared: int = 0) -> Tensor:
    """(n − shared) · Σ_{i ≥ shared} f_i · p_i, a scalar of at least float32, without a coefficient.

    Args:
        probabilities: ``[..., n]`` that the router gave to all units, chosen or not; gradients flow here.
        units: ``[..., k]`` as `top_units` chose them, of the same tokens.
        shared: units that need no balance because every token has them.

    Raises:
        InputError: the two are not about the same tokens.

    >>> balance_loss(torch.full((4, 4), 0.25), torch.tensor([[0], [1], [2], [3]])).item()
    1.0
    """
    if probabilities.shape[:-1] != units.shape[:-1]:
        raise InputError(
            f"probabilities {tuple(probabilities.shape)} and units {tuple(units.shape)} are not of the same tokens"
        )
    n = probabilities.shape[-1]
    mean = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32)).reshape(-1, n).mean(0)
    return (n - shared) * (load_shares(units, n) * mean)[shared:].sum()


def group_by_unit(units: Tensor, n: int) -> tuple[Tensor, list[int]]:
    """Dispatch: which choices go to each unit, in order of the units.

    Args:
        units: ``[tokens, k]``.
        n: number of units.

    Returns:
        ``order`` int64 ``[tokens · k]``: places in ``units.flatten()`` sorted by unit, tokens of one unit in their order, so
        that ``order // k`` are the tokens and ``gates.flatten()[order]`` their gates; and how many choices each unit got.

    >>> order, counts = group_by_unit(torch.tensor([[1, 0], [1, 2]]), 4)
    >>> (order // 2).tolist(), counts
    ([0, 0, 1, 1], [1, 2, 1, 0])
    """
    flat = units.flatten()
    counts: list[int] = torch.bincount(flat, minlength=n).tolist()
    return torch.argsort(flat, dim=0, stable=True), counts
