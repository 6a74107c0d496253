"""Llama with mixed hidden dimensions: a configuration, a model, and what they cost. Importing this registers both.

Reading "residual" (R): each sub-layer has a router over the residual width; the query, key and value (or gate and up)
projections read the active groups, the output (or down) projection writes the same groups, then group fusion, then the
residual sum. Heads and MLP neurons keep their own widths.

Reading "neurons" (F): attention stays dense; in the MLP h = W_gate·u is routed, gated and fused before the activation:

    y = W_down·(act(Fusion(gains ⊙ h)) ⊙ W_up·u)

Idle groups of h are zero behind the activation unless a Monarch fusion mixes them, so W_up and W_down skip them too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP
from transformers.utils import can_return_tuple

from gossamer.activations.mohd_fusion import BlockFusion, Fusion, MonarchFusion, make_fusion
from gossamer.activations.mohd_layers import MoHDLinear, Side
from gossamer.activations.mohd_routing import Scale, SubDimRouter, group_counts

READINGS = ("residual", "neurons")


@strict
class MoHDConfig(LlamaConfig):  # type: ignore[misc]
    """Llama's configuration, and how its dimensions are mixed.

    Fields beyond Llama's: `groups` (N), `active` (δ), `shared` (φ), `scale` ("sum", "preserve", "none"), `fusion`
    ("monarch", "block", "none"), `reading` ("residual", "neurons"), `balance_weight` (λ_b).

    >>> MoHDConfig(hidden_size=64, num_attention_heads=4, groups=8).groups
    8
    """

    model_type = "mohd"

    groups: int = 16
    active: float = 0.5
    shared: float = 0.375
    scale: str = "preserve"
    fusion: str = "monarch"
    reading: str = "residual"
    balance_weight: float = 0.01

    def validate_mixing(self) -> None:
        """Part of the checks that transformers runs when a configuration is made."""
        group_counts(self.groups, self.active, self.shared)
        width = self.hidden_size if self.reading == "residual" else self.intermediate_size
        if width % self.groups:
            raise ValueError(f"the routed width {width} is no multiple of groups={self.groups}")
        choices = {"scale": Scale, "fusion": Fusion, "reading": None}
        for name, kind in choices.items():
            known = READINGS if kind is None else kind.__args__  # type: ignore[attr-defined]
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}")

    def router(self) -> SubDimRouter:
        """A router over the routed width."""
        width = self.hidden_size if self.reading == "residual" else self.intermediate_size
        scale: Any = self.scale
        return SubDimRouter(width, self.groups, self.active, self.shared, scale)


def _route(block: Any, names: tuple[str, ...], side: Side, fusion: Any = "none") -> None:
    """Put routed maps of the same sizes in the place of a sub-layer's projections."""
    for name in names:
        old: nn.Linear = getattr(block, name)
        bias = old.bias is not None
        setattr(block, name, MoHDLinear(old.in_features, old.out_features, block.router, side, fusion, bias))


class MoHDAttention(LlamaAttention):  # type: ignore[misc]
    """Llama's attention; its projections read and write the groups that its router chose for each token."""

    def __init__(self, config: MoHDConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.router = config.router()
        _route(self, ("q_proj", "k_proj", "v_proj"), "in")
        _route(self, ("o_proj",), "out", config.fusion)

    # Around the call rather than in forward, which methods may replace.
    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As Llama's; one decision for all four projections."""
        with self.router.deciding(hidden_states):
            return super().__call__(hidden_states, *args, **kwargs)


class MoHDMLP(LlamaMLP):  # type: ignore[misc]
    """Llama's MLP between the active groups of the residual width."""

    def __init__(self, config: MoHDConfig) -> None:
        super().__init__(config)
        self.router = config.router()
        _route(self, ("gate_proj", "up_proj"), "in")
        _route(self, ("down_proj",), "out", config.fusion)

    def __call__(self, x: Tensor) -> Any:
        """``[batch, tokens, hidden]`` to the same; one decision for all three maps."""
        with self.router.deciding(x):
            return super().__call__(x)


class MoHDNeuronMLP(nn.Module):
    """A gated MLP with its neurons in groups, routed by the gate's output (reading "neurons").

    It is no `LlamaMLP` and calls its activation otherwise, so that methods for those, which would pass over the routing,
    refuse it.
    """

    def __init__(self, config: MoHDConfig) -> None:
        super().__init__()
        fusion: Any = config.fusion
        width, neurons, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.router = config.router()
        self.fusion = make_fusion(fusion, neurons, config.groups)
        self.activation = ACT2FN[config.hidden_act]
        self.skips = config.fusion != "monarch"
        self.gate_proj = nn.Linear(width, neurons, bias=bias)
        self.up_proj = nn.Linear(width, neurons, bias=bias)
        self.down_proj = nn.Linear(neurons, width, bias=bias)
        if self.skips:
            _route(self, ("up_proj",), "out")
            _route(self, ("down_proj",), "in")

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, tokens, hidden]`` to the same."""
        h = self.gate_proj(x)
        routing = self.router(h)
        active = self.activation(self.fusion(routing.apply(h)))
        plain = (routing.plain(),) if self.skips else ()
        out: Tensor = self.down_proj(active * self.up_proj(x, *plain), *plain)
        return out


class MoHDDecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """Llama's layer with one or both sub-layers routed."""

    def __init__(self, config: MoHDConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.reading == "residual":
            self.self_attn = MoHDAttention(config, layer_idx)
            self.mlp: nn.Module = MoHDMLP(config)
        else:
            self.mlp = MoHDNeuronMLP(config)


@torch.no_grad()
def _init_mixing(module: nn.Module) -> None:
    """Fresh routers and fusions, where a checkpoint has not filled them."""
    if isinstance(module, SubDimRouter | MonarchFusion | BlockFusion) and not all(
        getattr(p, "_is_hf_initialized", False) for p in module.parameters(recurse=False)
    ):
        module.reset()


class MoHDModel(LlamaModel):  # type: ignore[misc]
    """Llama's decoder with routed layers."""

    config_class = MoHDConfig
    _no_split_modules = ("MoHDDecoderLayer",)

    def __init__(self, config: MoHDConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(MoHDDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        _init_mixing(module)


class MoHDForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """A causal language model whose tokens use a part of its hidden dimensions each.

    Saves and loads like any transformers model once `gossamer.activations` is imported.

    >>> config = MoHDConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=99)
    >>> MoHDForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 99])
    """

    config_class = MoHDConfig
    _no_split_modules = ("MoHDDecoderLayer",)

    def __init__(self, config: MoHDConfig) -> None:
        super().__init__(config)
        self.model = MoHDModel(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        _init_mixing(module)

    def routers(self) -> list[SubDimRouter]:
        """All routers, in layer order, attention before MLP."""
        return [module for module in self.modules() if isinstance(module, SubDimRouter)]

    def balance_loss(self, step: int = 0) -> Tensor:
        """λ_b times the sum of the routers' balance losses in the last training forward; 0 where there was none.

        It is taken: a second call gives 0. Fits `gossamer.models.train(..., penalty=model.balance_loss)`; a forward
        with `labels` adds it to its loss by itself while the model trains.
        """
        parts = [part for part in (router.take_balance() for router in self.routers()) if part is not None]
        total = torch.stack(parts).sum() if parts else torch.zeros((), device=self.device)
        weight: float = self.config.balance_weight
        return weight * total

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(self, input_ids: Tensor | None = None, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """As Llama's."""
        out = super().forward(input_ids, *args, labels=labels, **kwargs)
        if labels is not None and self.training:
            out.loss = out.loss + self.balance_loss()
        return out


@dataclass(frozen=True)
class MoHDCost:
    """What a token costs, of a MoHD model or of a dense Llama to set beside it.

    Attributes:
        parameters: all there are; tied ones once.
        active: those that a token uses: one row of an untied embedding, the active share of routed maps, all else whole.
        routed: parameters of the routed maps, fusions excluded; routed_active: the active ones, δ·routed but for biases.
        router: parameters of all routers, N·d each; fusion: of all fusions.
        flops: of the products for a token, the head's included and attention's over the cache left out: two for each active
            weight of a linear map, a router or a fusion.
    """

    parameters: int
    active: int
    routed: int
    routed_active: int
    router: int
    fusion: int
    flops: int


def costs(model: PreTrainedModel) -> MoHDCost:
    """Counts what a model's token costs; see `MoHDCost`."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    maps = [module for module in linears if isinstance(module, MoHDLinear)]
    routed = sum(p.numel() for m in maps for p in m.parameters(recurse=False))
    routed_active = sum(m.active_parameters for m in maps)
    router = sum(m.centroids.numel() for m in model.modules() if isinstance(m, SubDimRouter))
    fusions = [m for m in model.modules() if isinstance(m, MonarchFusion | BlockFusion)]
    fusion = sum(p.numel() for m in fusions for p in m.parameters())
    total = sum(p.numel() for p in model.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    unread = 0 if head is embedding else embedding.numel() - embedding.shape[1]
    products = sum(m.active_weights if isinstance(m, MoHDLinear) else m.weight.numel() for m in linears)
    flops = 2 * (products + router + sum(m.cost for m in fusions))
    return MoHDCost(total, total - unread - routed + routed_active, routed, routed_active, router, fusion, flops)


AutoConfig.register("mohd", MoHDConfig, exist_ok=True)
AutoModel.register(MoHDConfig, MoHDModel, exist_ok=True)
AutoModelForCausalLM.register(MoHDConfig, MoHDForCausalLM, exist_ok=True)
