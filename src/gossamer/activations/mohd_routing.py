"""MoHD's routing: which groups of dimensions a token uses, and with what gain.

A vector of width d is cut into N groups of d_e = d/N. Of these n_a = round(δN) are active for a token: the first
n_s = round(φN), which are shared, and the n_r = n_a − n_s best of the others.

    s = softmax(E·x),  g_i = s_i on the active groups, 0 elsewhere
    gain_i = α·g_i,    α = N·Σg ("sum"), n_a/Σg ("preserve": mean gain 1 on active groups) or 1 ("none")
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.activations.router import balance_loss, group_by_unit, softmax_gates, spread, top_units
from gossamer.errors import InputError

Scale = Literal["sum", "preserve", "none"]


def group_counts(groups: int, active: float, shared: float) -> tuple[int, int]:
    """(n_a, n_s): active groups and, among them, shared ones, each rounded to the nearest, halves up.

    Args:
        groups: N, at least 1.
        active: δ, share of the groups that a token uses, above 0.
        shared: φ, share of the groups that every token uses, 0 to δ.

    Raises:
        InputError: a share is out of range, or no group would be active.

    >>> group_counts(16, 0.5, 0.375)
    (8, 6)
    """
    if groups < 1 or not 0 < active <= 1 or not 0 <= shared <= active:
        raise InputError(
            f"mohd: want groups >= 1 and 0 <= shared <= active <= 1, active > 0; got {groups}, {shared}, {active}"
        )
    used = math.floor(active * groups + 0.5)
    if not used:
        raise InputError(f"mohd: active={active} of {groups} groups leaves none: raise active or groups")
    return used, math.floor(shared * groups + 0.5)


def group_gains(logits: Tensor, units: Tensor, scale: Scale = "preserve") -> Tensor:
    """α·g, float32 ``[..., N]`` with zeros outside the active groups; differentiable in the logits.

    Args:
        logits: ``[..., N]``, E·x.
        units: active groups, int64 ``[..., n_a]``.
        scale: what α is; "preserve" is the softmax over the active groups alone, times n_a.

    >>> group_gains(torch.zeros(4), torch.tensor([0, 2])).tolist()
    [1.0, 0.0, 1.0, 0.0]
    >>> group_gains(torch.zeros(4), torch.tensor([0, 2]), "sum").tolist()
    [0.5, 0.0, 0.5, 0.0]
    """
    n = logits.shape[-1]
    if scale == "preserve":  # n_a·g/Σg, with no sum that could underflow
        return spread(units.shape[-1] * softmax_gates(logits, units), units, n)
    gates = logits.float().softmax(-1).gather(-1, units)
    if scale == "sum":
        gates = gates * n * gates.sum(-1, keepdim=True)
    return spread(gates, units, n)


@dataclass(frozen=True, eq=False)
class Routing:
    """Which groups each token uses, and how strongly.

    Attributes:
        units: int64 ``[..., n_a]``, the shared groups first.
        gains: float32 ``[..., N]``, 0 outside `units`.
        shared: n_s; groups 0 to n_s − 1 are in every token's units.
    """

    units: Tensor
    gains: Tensor
    shared: int

    def apply(self, x: Tensor) -> Tensor:
        """`x` ``[..., d]`` times its groups' gains: the masked form, in the dtype of `x`."""
        grouped: Tensor = x.unflatten(-1, (self.gains.shape[-1], -1))
        return (grouped * self.gains.to(x.dtype).unsqueeze(-1)).flatten(-2)

    def plain(self) -> Routing:
        """The same groups, all with gain 1."""
        ones = torch.ones_like(self.units, dtype=self.gains.dtype)
        return Routing(self.units, spread(ones, self.units, self.gains.shape[-1]), self.shared)

    def parts(self) -> Iterator[tuple[slice, Tensor | None]]:
        """The work without idle groups: (groups, tokens), tokens None for all; of the flattened leading dimensions.

        First the shared groups for all tokens, then each other group with those that chose it. A single token's groups
        come as runs of neighbours.
        """
        n, k = self.gains.shape[-1], self.units.shape[-1]
        units = self.units.reshape(-1, k)
        if len(units) == 1:
            chosen = sorted(units[0].tolist())
            for _, run in itertools.groupby(enumerate(chosen), key=lambda pair: pair[1] - pair[0]):
                members = [group for _, group in run]
                yield slice(members[0], members[-1] + 1), None
            return
        if self.shared:
            yield slice(0, self.shared), None
        if k == self.shared:
            return
        order, counts = group_by_unit(units[:, self.shared :], n)
        for group, tokens in enumerate((order // (k - self.shared)).split(counts)):
            if len(tokens):
                yield slice(group, group + 1), tokens


class SubDimRouter(nn.Module):
    """Chooses each token's groups from the token's own state.

    Args:
        width: d, a multiple of `groups`.
        groups: N.
        active: δ; shared: φ, as in `group_counts`.
        scale: α, as in `group_gains`.

    Attributes:
        balance: the balance loss of the last training forward, without a coefficient; `take_balance` fetches it.
        decision: the running sub-layer's routing, and the state that it was made from.

    Raises:
        InputError: the width is no multiple of the groups, or a share is out of range.

    >>> router = SubDimRouter(64, 16)
    >>> router(torch.randn(2, 5, 64)).units.shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self, width: int, groups: int = 16, active: float = 0.5, shared: float = 0.375, scale: Scale = "preserve"
    ) -> None:
        super().__init__()
        self.active_groups, self.shared_groups = group_counts(groups, active, shared)
        if width % groups:
            raise InputError(f"mohd: a width of {width} cannot be cut into {groups} equal groups")
        self.width, self.groups, self.scale = width, groups, scale
        self.centroids = nn.Parameter(torch.empty(groups, width))
        self.decision: tuple[Tensor, Routing] | None = None
        self.balance: Tensor | None = None
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draw the centroids from N(0, 1/d)."""
        self.centroids.normal_(0.0, self.width**-0.5)

    def forward(self, x: Tensor) -> Routing:
        """Route `x` ``[..., d]``; logits and gains in float32."""
        if x.shape[-1] != self.width:
            raise InputError(f"mohd: the router takes states of width {self.width}, got {tuple(x.shape)}")
        logits = F.linear(x.float(), self.centroids.float())
        units = top_units(logits, self.active_groups, self.shared_groups)
        if self.training and torch.is_grad_enabled():
            self.balance = balance_loss(logits.softmax(-1), units, self.shared_groups)
        return Routing(units, group_gains(logits, units, self.scale), self.shared_groups)

    @contextmanager
    def deciding(self, x: Tensor) -> Iterator[Routing]:
        """Route `x` once for all maps of a sub-layer, which find the decision here while the block runs."""
        routing = self(x)
        self.decision = (x, routing)
        try:
            yield routing
        finally:
            self.decision = None

    def take_balance(self) -> Tensor | None:
        """The balance loss of the last training forward, once."""
        found, self.balance = self.balance, None
        return found
