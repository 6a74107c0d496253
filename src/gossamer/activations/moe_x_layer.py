"""MoE-X's formulas and its layer: experts, a router that needs no weights, and what it says about a forward.

`gossamer.activations.moe_x` tells what they are and which decisions they follow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.activations.router import balance_loss, group_by_unit, softmax_gates, spread, top_units
from gossamer.errors import InputError
from gossamer.ops import channel_sparse_linear
from gossamer.ops.linear import DTYPES, MAX_ROWS, few_rows, takes

Router = Literal["sparsity", "linear"]
Activation = Literal["relu", "gelu"]
EPS = 1e-6


class Statistics(NamedTuple):
    """What the router knows of the experts, in float32 (float64 of float64 weights).

    Attributes:
        mean, variance: ``[M, d]``, over the units of each expert, per input dimension.
        bias_mean, bias_variance: ``[M]``, of the encoder's bias; zeros without one.
    """

    mean: Tensor
    variance: Tensor
    bias_mean: Tensor
    bias_variance: Tensor


def expert_statistics(encoder: Tensor, bias: Tensor | None = None) -> Statistics:
    """Mean and population variance over the units of each expert; differentiable.

    Args:
        encoder: W_enc ``[M, D, d]``, a row a unit.
        bias: ``[M, D]`` or None.

    >>> expert_statistics(torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])).variance.tolist()
    [[1.0, 0.0]]
    """
    wide = _wide(encoder)
    shift = wide.new_zeros(wide.shape[:2]) if bias is None else _wide(bias)
    return Statistics(wide.mean(1), wide.var(1, correction=0), shift.mean(1), shift.var(1, correction=0))


def firing_z(x: Tensor, statistics: Statistics) -> Tensor:
    """z ``[..., M]`` of tokens x ``[..., d]``: mean over √2 standard deviations of a unit's pre-activation."""
    with torch.autocast(x.device.type, enabled=False):  # erf is steep: half precision would reorder experts
        x = _wide(x)
        mean = x @ statistics.mean.T + statistics.bias_mean
        variance = (x * x) @ statistics.variance.T + statistics.bias_variance
        return mean / torch.sqrt(2 * (variance + EPS))


def firing_probability(x: Tensor, statistics: Statistics) -> Tensor:
    """P ``[..., M]``: the share of each expert's units that is expected to fire; D·P is the expected L0."""
    return 0.5 * (1 + torch.erf(firing_z(x, statistics)))


def sparsity_scores(x: Tensor, statistics: Statistics) -> Tensor:
    """r ``[..., M]`` in [−1, 1], −erf z = −(2P − 1): higher means sparser; differentiable in x and the weights."""
    return -torch.erf(firing_z(x, statistics))


@torch.no_grad()
def true_l0(x: Tensor, encoder: Tensor, bias: Tensor | None = None) -> Tensor:
    """Units that fire in every expert, int64 ``[..., M]``: what the score estimates, at the price of running them all."""
    shifts = [None] * len(encoder) if bias is None else list(bias)
    return torch.stack([(F.linear(x, w, b) > 0).sum(-1) for w, b in zip(encoder, shifts, strict=True)], -1)


@dataclass(frozen=True)
class MoEXInfo:
    """What happened inside a layer in one forward.

    Attributes:
        hidden: h ``[..., M·D]``, gated, with zeros for experts that were not chosen.
        scores: ``[..., M]``, of the router.
        units: int64 ``[..., k]``, the chosen experts, best first.
        gates: ω ``[..., k]``.
        l0: int64 ``[..., k]``, units that are not zero in each chosen expert.
        aux_loss: the balance loss with its coefficient, a scalar.
    """

    hidden: Tensor
    scores: Tensor
    units: Tensor
    gates: Tensor
    l0: Tensor
    aux_loss: Tensor


class MoEXLayer(nn.Module):
    """The MoE-X layer, in place of an MLP; with other settings the Switch-style layers it is compared with.

    Tokens are grouped by expert, and each expert runs once on its tokens: k·D of the M·D units are computed. In training
    mode `aux_loss` holds the balance loss of the last forward (see `gossamer.activations.moe_x_models.router_penalty`).
    In eval mode without gradients the router's statistics are kept until the weights change.

    Args:
        d_model: d, width of tokens.
        n_experts: M.
        d_expert: D, units of an expert.
        k: experts a token runs through.
        balance: coefficient of the balance loss.
        router: ``sparsity`` (−erf, no weights) or ``linear`` (a learned matrix).
        activation: of the experts, ``relu`` or ``gelu`` (tanh form).
        bias: whether encoder and output have biases.
        std, decoder_std: spread of fresh weights (default of the second: the first).

    Shapes: ``[..., d] → [..., d]``, any float dtype; scores and gates are float32.

    Raises:
        InputError: a size below one, k above M, or an unknown router or activation.

    >>> layer = MoEXLayer(16, n_experts=4, d_expert=8, k=2)
    >>> y, info = layer(torch.ones(3, 16), return_hidden=True)
    >>> tuple(y.shape), tuple(info.hidden.shape), tuple(info.l0.shape)
    ((3, 16), (3, 32), (3, 2))
    """

    encoder_bias: nn.Parameter | None
    output_bias: nn.Parameter | None
    router: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        n_experts: int = 8,
        d_expert: int = 2048,
        k: int = 2,
        *,
        balance: float = 0.01,
        router: Router = "sparsity",
        activation: Activation = "relu",
        bias: bool = False,
        std: float = 0.02,
        decoder_std: float | None = None,
    ) -> None:
        super().__init__()
        if min(d_model, n_experts, d_expert) < 1 or not 1 <= k <= n_experts:
            raise InputError(
                f"an MoE-X layer needs sizes of at least 1 and 1 <= k <= n_experts; got d_model={d_model}, "
                f"n_experts={n_experts}, d_expert={d_expert}, k={k}"
            )
        if router not in ("sparsity", "linear") or activation not in ("relu", "gelu"):
            raise InputError(f"unknown router {router!r} (sparsity, linear) or activation {activation!r} (relu, gelu)")
        if not (math.isfinite(balance) and balance >= 0):
            raise InputError(f"balance is a coefficient of at least 0; got {balance}")
        self.d_model, self.n_experts, self.d_expert, self.k = d_model, n_experts, d_expert, k
        self.balance, self.activation = balance, activation
        self.std, self.decoder_std = std, std if decoder_std is None else decoder_std
        self.encoder = nn.Parameter(torch.empty(n_experts, d_expert, d_model))
        self.decoder = nn.Parameter(torch.empty(n_experts, d_expert, d_model))
        self.encoder_bias = nn.Parameter(torch.empty(n_experts, d_expert)) if bias else None
        self.output_bias = nn.Parameter(torch.empty(d_model)) if bias else None
        self.router = nn.Parameter(torch.empty(n_experts, d_model)) if router == "linear" else None
        self.aux_loss: Tensor | None = None
        self._kept: tuple[Any, Statistics] | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights: normal, biases zero."""
        nn.init.normal_(self.encoder, std=self.std)
        nn.init.normal_(self.decoder, std=self.decoder_std)
        if self.router is not None:
            nn.init.normal_(self.router, std=self.std)
        for bias in (self.encoder_bias, self.output_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to the last forward: a loss inside a graph can't be copied."""
        return {**self.__dict__, "aux_loss": None, "_kept": None}

    def extra_repr(self) -> str:
        """Sizes, router and activation."""
        router = "sparsity" if self.router is None else "linear"
        return (
            f"{self.d_model}, n_experts={self.n_experts}, d_expert={self.d_expert}, k={self.k}, router={router}, "
            f"activation={self.activation}"
        )

    def train(self, mode: bool = True) -> MoEXLayer:
        """As in torch; the kept statistics are dropped."""
        self._kept = None
        super().train(mode)
        return self

    def statistics(self) -> Statistics:
        """The router's view of the current weights; kept in eval mode without gradients, where it would cost more than
        the experts themselves at each step of decoding."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return expert_statistics(self.encoder, self.encoder_bias)
        used = [p for p in (self.encoder, self.encoder_bias) if p is not None]
        key = [(p.data_ptr(), p.dtype, None if p.is_inference() else p._version) for p in used]
        if self._kept is None or self._kept[0] != key:
            self._kept = key, expert_statistics(self.encoder, self.encoder_bias)
        return self._kept[1]

    def scores(self, x: Tensor) -> Tensor:
        """The router's scores ``[..., M]``, at least float32."""
        if self.router is None:
            return sparsity_scores(x, self.statistics())
        with torch.autocast(x.device.type, enabled=False):
            return _wide(x) @ _wide(self.router).T

    def forward(self, x: Tensor, return_hidden: bool = False) -> Any:
        """y, or (y, `MoEXInfo`) with `return_hidden`.

        Raises:
            InputError: x is not ``[..., d_model]``.
        """
        if x.ndim < 1 or x.shape[-1] != self.d_model:
            raise InputError(f"an MoE-X layer of width {self.d_model} cannot take a tensor {tuple(x.shape)}")
        flat = x.reshape(-1, self.d_model)
        scores = self.scores(flat)
        units = top_units(scores, self.k)
        gates = softmax_gates(scores, units)
        order, counts = group_by_unit(units, self.n_experts)
        parts = self._experts(flat[order // self.k], counts)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))

        def choices(rows: list[Tensor]) -> Tensor:
            """From the order of experts to ``[tokens, k, width]``."""
            return torch.cat(rows)[back].view(len(flat), self.k, rows[0].shape[-1])

        each = choices([self._decode(j, hidden) for j, hidden in parts])
        y = (gates.to(each.dtype).unsqueeze(-1) * each).sum(1)
        if self.output_bias is not None:
            y = y + self.output_bias
        y = y.view(*x.shape[:-1], self.d_model)
        # Where nothing is trained or asked, the loss is not worked out.
        wanted = self.training and torch.is_grad_enabled()
        loss = self.balance * balance_loss(scores.softmax(-1), units) if wanted or return_hidden else None
        self.aux_loss = loss if wanted else None
        if not return_hidden:
            return y
        assert loss is not None
        chosen = choices([hidden for _, hidden in parts])
        hidden = (gates.to(chosen.dtype).unsqueeze(-1) * chosen).transpose(1, 2)
        places = units.unsqueeze(1).expand(-1, self.d_expert, -1)
        wide = spread(hidden, places, self.n_experts).transpose(1, 2)  # [tokens, M, D]

        def shaped(part: Tensor) -> Tensor:
            return part.reshape(*x.shape[:-1], math.prod(part.shape[1:]))

        l0 = (chosen != 0).sum(-1)
        return y, MoEXInfo(shaped(wide), shaped(scores), shaped(units), shaped(gates), shaped(l0), loss)

    def _experts(self, tokens: Tensor, counts: list[int]) -> list[tuple[int, Tensor]]:
        """(expert, its activations ``[count, D]``); `tokens` come grouped by expert, and experts without any are left out.

        With no token at all the first expert stands in, with no row, so that shapes and dtypes come out right.
        """
        parts = []
        for j, part in enumerate(tokens.split(counts)):
            if len(part) or (j == 0 and not len(tokens)):
                weight, bias = self.encoder[j], None if self.encoder_bias is None else self.encoder_bias[j]
                if 0 < len(part) <= MAX_ROWS and takes(part, weight, bias):
                    hidden = few_rows(part, weight, bias, len(part), (len(part), self.d_expert))
                else:
                    hidden = F.linear(part, weight, bias)
                parts.append((j, F.relu(hidden) if self.activation == "relu" else F.gelu(hidden, approximate="tanh")))
        return parts

    def _decode(self, j: int, hidden: Tensor) -> Tensor:
        """``[count, d]``; at the few rows of a decode step only the rows of units that fire are read."""
        weight = self.decoder[j]
        few = 0 < len(hidden) <= MAX_ROWS and self.activation == "relu" and not torch.is_grad_enabled()
        if few and hidden.dtype in DTYPES and hidden.dtype is weight.dtype and not torch.compiler.is_compiling():
            return channel_sparse_linear(hidden, weight)
        return hidden @ weight


def _wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
