"""Language models with MoE-X layers in place of their MLPs, as transformers models of their own type.

Importing this module (or `gossamer.activations`) makes them known to transformers' Auto classes, so a trained model saves
with `save_pretrained` and loads with `AutoModelForCausalLM.from_pretrained` like any other, without remote code.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gossamer.activations.moe_x_layer import MoEXLayer
from gossamer.errors import ModelError, UnknownNameError
from gossamer.models import Plan


@dataclass
class ExpertSettings:
    """What a configuration says of its experts; the names and defaults of `MoEXLayer`."""

    n_experts: int = 8
    d_expert: int = 2048
    k: int = 2
    balance: float = 0.01
    router: str = "sparsity"
    activation: str = "relu"
    expert_bias: bool = False

    def layer(self, width: int, std: float, depth: int) -> MoEXLayer:
        """One layer with fresh weights; decoders are narrower by √(2·depth), as GPT-2's are."""
        kind: Any = {"router": self.router, "activation": self.activation}
        return MoEXLayer(
            width,
            self.n_experts,
            self.d_expert,
            self.k,
            balance=self.balance,
            bias=self.expert_bias,
            std=std,
            decoder_std=std / math.sqrt(2 * depth),
            **kind,
        )


class MoEXConfig(ExpertSettings, GPT2Config):  # type: ignore[misc]
    """GPT-2's configuration with experts.

    >>> MoEXConfig(n_embd=64, d_expert=32).n_experts
    8
    """

    model_type = "moe_x"


class MoEXLlamaConfig(ExpertSettings, LlamaConfig):  # type: ignore[misc]
    """Llama's configuration with experts; they are not gated.

    >>> MoEXLlamaConfig(hidden_size=64, d_expert=32).k
    2
    """

    model_type = "moe_x_llama"


class MoEXMistralConfig(ExpertSettings, MistralConfig):  # type: ignore[misc]
    """Mistral's configuration with experts; they are not gated."""

    model_type = "moe_x_mistral"


class MoEXQwen2Config(ExpertSettings, Qwen2Config):  # type: ignore[misc]
    """Qwen2's configuration with experts; they are not gated."""

    model_type = "moe_x_qwen2"


class MoEXQwen3Config(ExpertSettings, Qwen3Config):  # type: ignore[misc]
    """Qwen3's configuration with experts; they are not gated."""

    model_type = "moe_x_qwen3"


def decoder_blocks(model: Any) -> list[Any]:
    """The decoder layers of a model, those with an `mlp`."""
    base = model.base_model
    return list(base.h if hasattr(base, "h") else base.layers)


def _with_router_loss(forward: Any) -> Any:
    """In training, the loss that transformers works out from labels includes the balance of the routers."""

    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if self.training and getattr(output, "loss", None) is not None:
            output.loss = output.loss + router_penalty(self)(0)
        return output

    return wrapped


class _WithExperts:
    """What the model classes below add to those of transformers."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        base: Any = super()
        base.__init__(config, *args, **kwargs)
        model: Any = self
        for block in decoder_blocks(model):
            block.mlp = config.layer(config.hidden_size, config.initializer_range, config.num_hidden_layers)
        model.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        base: Any = super()
        base._init_weights(module)
        if isinstance(module, MoEXLayer):
            module.reset_parameters()


class MoEXForCausalLM(_WithExperts, GPT2LMHeadModel):  # type: ignore[misc]
    """GPT-2 with MoE-X layers: what the paper trains.

    >>> model = MoEXForCausalLM(MoEXConfig(vocab_size=256, n_embd=32, n_layer=1, n_head=2, d_expert=16))
    >>> model.transformer.h[0].mlp
    MoEXLayer(32, n_experts=8, d_expert=16, k=2, router=sparsity, activation=relu)
    """

    config_class = MoEXConfig
    forward = _with_router_loss(GPT2LMHeadModel.forward)


class MoEXLlamaForCausalLM(_WithExperts, LlamaForCausalLM):  # type: ignore[misc]
    """Llama with MoE-X layers instead of its gated MLPs.

    >>> sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "d_expert": 16}
    >>> MoEXLlamaForCausalLM(MoEXLlamaConfig(vocab_size=256, **sizes)).model.layers[0].mlp.d_expert
    16
    """

    config_class = MoEXLlamaConfig
    forward = _with_router_loss(LlamaForCausalLM.forward)


class MoEXMistralForCausalLM(_WithExperts, MistralForCausalLM):  # type: ignore[misc]
    """Mistral with MoE-X layers instead of its gated MLPs."""

    config_class = MoEXMistralConfig
    forward = _with_router_loss(MistralForCausalLM.forward)


class MoEXQwen2ForCausalLM(_WithExperts, Qwen2ForCausalLM):  # type: ignore[misc]
    """Qwen2 with MoE-X layers instead of its gated MLPs."""

    config_class = MoEXQwen2Config
    forward = _with_router_loss(Qwen2ForCausalLM.forward)


class MoEXQwen3ForCausalLM(_WithExperts, Qwen3ForCausalLM):  # type: ignore[misc]
    """Qwen3 with MoE-X layers instead of its gated MLPs."""

    config_class = MoEXQwen3Config
    forward = _with_router_loss(Qwen3ForCausalLM.forward)


class Classes(NamedTuple):
    """The configuration and model class with experts of a dense model type."""

    config: Any
    model: Any


#: By the `model_type` of the dense model.
CLASSES = {
    "gpt2": Classes(MoEXConfig, MoEXForCausalLM),
    "llama": Classes(MoEXLlamaConfig, MoEXLlamaForCausalLM),
    "mistral": Classes(MoEXMistralConfig, MoEXMistralForCausalLM),
    "qwen2": Classes(MoEXQwen2Config, MoEXQwen2ForCausalLM),
    "qwen3": Classes(MoEXQwen3Config, MoEXQwen3ForCausalLM),
}
for _classes in CLASSES.values():
    AutoConfig.register(_classes.config.model_type, _classes.config, exist_ok=True)
    AutoModelForCausalLM.register(_classes.config, _classes.model, exist_ok=True)


def moe_layers(model: nn.Module) -> list[MoEXLayer]:
    """The MoE-X layers of a model, in order.

    Raises:
        ModelError: there are none.
    """
    layers = [module for module in model.modules() if isinstance(module, MoEXLayer)]
    if not layers:
        raise ModelError(f"{type(model).__name__} has no MoE-X layers: make it with `MoEX(...).apply(model)`")
    return layers


def router_penalty(model: nn.Module) -> Callable[[int], Tensor]:
    """The `penalty` for `gossamer.models.train`: the balance losses of the last forward, summed over layers.

    A loss that transformers works out from labels in training has it already.

    Raises:
        ModelError: the model has no MoE-X layers; later, that no forward in training mode came before a call.
    """
    layers = moe_layers(model)

    def penalty(step: int) -> Tensor:
        losses = [layer.aux_loss for layer in layers]
        for layer in layers:
            layer.aux_loss = None  # one forward, one loss: the graph is not held longer
        found = [loss for loss in losses if loss is not None]
        if len(found) < len(losses):
            raise ModelError("the balance loss needs a forward with gradients in training mode before each step")
        return torch.stack(found).sum()

    return penalty


@dataclass(frozen=True)
class Preset:
    """A row of the paper's table of settings; all have 8 experts with 2 active, no dropout, AdamW and clipping at 1.

    Attributes:
        layers, heads, width: of the decoder.
        dense_units: of the dense baseline's MLP; the experts have half, so that as many parameters are active.
        vocabulary, context, batch, warmup, steps: of the training.

    >>> preset("chess").config().d_expert
    2048
    """

    layers: int
    heads: int
    width: int
    dense_units: int
    vocabulary: int
    context: int
    batch: int
    warmup: int
    steps: int

    def config(self, **overrides: Any) -> MoEXConfig:
        """The model's configuration."""
        sizes = {
            "n_layer": self.layers,
            "n_head": self.heads,
            "n_embd": self.width,
            "n_inner": self.dense_units,
            "d_expert": self.dense_units // 2,
            "vocab_size": self.vocabulary,
            "n_positions": self.context,
        }
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        special = {} if self.vocabulary == 50257 else {"bos_token_id": None, "eos_token_id": None}
        return MoEXConfig(**{**sizes, **dropout, **special, **overrides})

    def plan(self) -> Plan:
        """The learning rate's course, from 3e-4 to 3e-5."""
        return Plan(steps=self.steps, lr=3e-4, warmup=self.warmup, floor=0.1, clip=1.0)


#: `chess` has 600,000 steps in the paper's table (60,000 are stated elsewhere) and 4096 dense units; for text the card
#: gives no units: GPT-2's four times the width are taken.
PRESETS = {
    "chess": Preset(8, 8, 512, 4096, 32, 1023, 100, 2000, 600_000),
    "fineweb-small": Preset(12, 12, 768, 3072, 50257, 1024, 320, 5000, 100_000),
    "fineweb-medium": Preset(24, 16, 1024, 4096, 50257, 1024, 320, 5000, 100_000),
}


def preset(name: str) -> Preset:
    """A row by name: chess, fineweb-small or fineweb-medium.

    Raises:
        UnknownNameError: another name.
    """
    if name not in PRESETS:
        raise UnknownNameError(f"no MoE-X preset is called {name!r}: choose from {', '.join(PRESETS)}")
    return PRESETS[name]
