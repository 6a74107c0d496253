"""MoHD's formulas and layers: routing over sub-dimensions, gains, group fusion, and linear maps that skip idle groups.

A vector of width d is cut into N groups of d_e = d/N. Of these n_a = round(δN) are active for a token: the first
n_s = round(φN), which are shared, and the n_r = n_a − n_s best of the others.

    s = softmax(E·x),  g_i = s_i on the active groups, 0 elsewhere
    gain_i = α·g_i,    α = N·Σg ("sum"), n_a/Σg ("preserve": mean gain 1 on active groups) or 1 ("none")
    read:   y   = Σ_{i active} gain_i·W[:, group i]·x_i
    write:  o_i = gain_i·(W[group i, :]·h + b_i) on active groups, 0 elsewhere; then the group fusion (`mohd_fusion`)
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

from gossamer.activations.mohd_fusion import Fusion, make_fusion
from gossamer.activations.router import balance_loss, group_by_unit, softmax_gates, spread, top_units
from gossamer.errors import InputError
from gossamer.ops.linear import MAX_ROWS, linear

Scale = Literal["sum", "preserve", "none"]
Side = Literal["in", "out"]


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


def _product(x: Tensor, weight: Tensor) -> Tensor:
    if len(x) > MAX_ROWS:
        return F.linear(x, weight)
    if len(x) == 1 and weight.stride(0) == 1:  # laid out by input channels: the active ones lie together
        return torch.mv(weight, x[0]).unsqueeze(0)
    return linear(x, weight)


def read_active(x: Tensor, routing: Routing, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W·(gains ⊙ x) + b from the active groups of `x` alone.

    Args:
        x: ``[..., d]``.
        weight: ``[m, d]``; bias: ``[m]``.

    Returns:
        ``[..., m]``; equal to ``F.linear(routing.apply(x), weight, bias)`` up to rounding.
    """
    n = routing.gains.shape[-1]
    width = x.shape[-1] // n
    rows = x.reshape(-1, n, width)
    gains = routing.gains.reshape(-1, n, 1).to(x.dtype)
    out: Tensor | None = None
    for groups, tokens in routing.parts():
        part, gain = rows[:, groups], gains[:, groups]
        if tokens is not None:
            part, gain = part[tokens], gain[tokens]
        y = _product((part * gain).flatten(1), weight[:, groups.start * width : groups.stop * width])
        if tokens is None:
            out = y if out is None else out.add_(y)
        else:
            out = x.new_zeros(len(rows), weight.shape[0]) if out is None else out
            out.index_add_(0, tokens, y)
    assert out is not None  # a token has at least one group
    if bias is not None:
        out = out + bias
    return out.reshape(*x.shape[:-1], weight.shape[0])


def write_active(h: Tensor, routing: Routing, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """gains ⊙ (W·h + b), computing the active groups of the output alone; zeros elsewhere.

    Args:
        h: ``[..., m]``.
        weight: ``[d, m]``; bias: ``[d]``.

    Returns:
        ``[..., d]``; equal to ``routing.apply(F.linear(h, weight, bias))`` up to rounding.
    """
    n = routing.gains.shape[-1]
    width = weight.shape[0] // n
    rows = h.reshape(-1, h.shape[-1])
    gains = routing.gains.reshape(-1, n, 1).to(h.dtype)
    out = h.new_zeros(len(rows), n, width)
    for groups, tokens in routing.parts():
        where = slice(groups.start * width, groups.stop * width)
        y = _product(rows if tokens is None else rows[tokens], weight[where])
        if bias is not None:
            y = y + bias[where]
        y = y.reshape(len(y), -1, width)
        if tokens is None:
            out[:, groups] = y * gains[:, groups]
        else:
            out[tokens, groups] = y * gains[tokens, groups]
    return out.reshape(*h.shape[:-1], weight.shape[0])


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


class MoHDLinear(nn.Linear):
    """A linear map that reads (`side="in"`) or writes (`side="out"`) the routed width, and computes active groups alone.

    Without gradients on the CPU idle groups are skipped; else they are multiplied by zero, with the same result up to
    rounding.

    Args:
        in_features, out_features: of the map; `router.width` on the routed side.
        router: decides for this map; shared by the maps of a sub-layer, and not registered as part of it.
        side: which side is routed.
        fusion: group fusion behind a write.
        bias: whether there is one. A write's bias is gated like its product.

    Raises:
        InputError: the routed side has not the router's width, or a read is given a fusion.

    >>> router = SubDimRouter(64, 16)
    >>> MoHDLinear(64, 10, router)(torch.randn(3, 64)).shape
    torch.Size([3, 10])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        router: SubDimRouter,
        side: Side = "in",
        fusion: Fusion = "none",
        bias: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        routed = in_features if side == "in" else out_features
        if routed != router.width:
            raise InputError(f"mohd: a map whose {side} side is {routed} wide cannot take a router of {router.width}")
        if side == "in" and fusion != "none":
            raise InputError("mohd: group fusion follows a write: take side='out'")
        self.side, self.router = side, (router,)
        self.fusion = make_fusion(fusion, routed, router.groups)

    def forward(self, input: Tensor, routing: Routing | None = None) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``.

        Args:
            routing: whose groups are active; else the decision of the running sub-layer; else, for a read, the input is
                routed here.

        Raises:
            InputError: a write without any decision.
        """
        (router,) = self.router
        if routing is None:
            if router.decision is not None and (self.side == "out" or router.decision[0] is input):
                routing = router.decision[1]
            elif self.side == "in":
                routing = router(input)
            else:
                raise InputError("mohd: a write needs the routing of its sub-layer's input")
        skips = input.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if self.side == "in":
            if skips:
                return read_active(input, routing, self.weight, self.bias)
            return F.linear(routing.apply(input), self.weight, self.bias)
        if skips:
            out = write_active(input, routing, self.weight, self.bias)
        else:
            out = routing.apply(F.linear(input, self.weight, self.bias))
        fused: Tensor = self.fusion(out)
        return fused

    @property
    def active_weights(self) -> int:
        """Weights that a token multiplies with, δ·d·m; the fusion's and the router's not counted."""
        (router,) = self.router
        return self.weight.numel() * router.active_groups // router.groups

    @property
    def active_parameters(self) -> int:
        """The same and the bias, of which a write uses the active groups."""
        (router,) = self.router
        bias: Tensor | None = self.bias
        if bias is None:
            return self.active_weights
        used = router.active_groups if self.side == "out" else router.groups
        return self.active_weights + bias.numel() * used // router.groups
