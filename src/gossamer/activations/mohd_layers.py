"""MoHD's linear maps, which read or write a routed width and skip its idle groups.

read:   y   = Σ_{i active} gain_i·W[:, group i]·x_i
write:  o_i = gain_i·(W[group i, :]·h + b_i) on active groups, 0 elsewhere; then the group fusion (`mohd_fusion`)
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.activations.mohd_fusion import Fusion, make_fusion
from gossamer.activations.mohd_routing import Routing, SubDimRouter
from gossamer.errors import InputError
from gossamer.ops.channel_sparse_linear import channel_sparse_linear
from gossamer.ops.linear import MAX_ROWS, linear

Side = Literal["in", "out"]


def _product(x: Tensor, weight: Tensor) -> Tensor:
    if len(x) > MAX_ROWS:
        return F.linear(x, weight)
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
    if len(rows) <= MAX_ROWS and weight.stride(0) == 1:  # laid out by inputs: the kernel skips those that are zero
        gated = routing.apply(x).reshape(-1, x.shape[-1])
        return channel_sparse_linear(gated, weight.t(), bias=bias).reshape(*x.shape[:-1], weight.shape[0])
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
