"""Models whose matrices have widths of their own in each layer: the family's model, reshaped by one entry of its configuration.

A copy of this file lies in every folder that such a model is saved to. With it, plain transformers loads the folder:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

`gossamer.models.load` reads the same folders without running code from them. The file needs torch and transformers only.

The configuration stays the family's own. Its entry `reshaped` says what differs from the sizes in the rest of it:

    linears     {module: [outputs, inputs, has a bias]}
    embeddings  {module: width}
    norms       {module: width}     norms without gain; their mean divides by this width, whatever the width of what they see
    shortcuts   {block: [[inputs, outputs], …]}     matrices on the residual path, one for each sub-layer (parallel block: one)

`hidden_size` stays that of the model before, because head sizes follow from it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    GemmaForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralForCausalLM,
    OPTForCausalLM,
    Phi3ForCausalLM,
    PhiForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)


@dataclass(frozen=True)
class Places:
    """Where a pre-norm family keeps its parts.

    Attributes:
        blocks, final_norm, embeddings: dotted names in the model; embeddings are all tables that are summed.
        norms: of a block; one norm means that attention and MLP stand side by side.
        attention: of a block.
        mlp: of a block; empty where `fc1`, `activation_fn` and `fc2` lie in the block itself.
    """

    blocks: str = "model.layers"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    attention: str = "self_attn"
    mlp: str = "mlp"
    final_norm: str = "model.norm"
    embeddings: tuple[str, ...] = ("model.embed_tokens",)


#: By model type: the families whose blocks can carry shortcuts.
PLACES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3"), Places()),
    "phi": Places(norms=("input_layernorm",), final_norm="model.final_layernorm"),
    "opt": Places(
        "model.decoder.layers",
        ("self_attn_layer_norm", "final_layer_norm"),
        mlp="",
        final_norm="model.decoder.final_layer_norm",
        embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    ),
    "gpt2": Places(
        "transformer.h",
        ("ln_1", "ln_2"),
        "attn",
        final_norm="transformer.ln_f",
        embeddings=("transformer.wte", "transformer.wpe"),
    ),
}


class PlainNorm(nn.Module):
    """``x · rsqrt(Σ x² / width + eps)``: a root-mean-square norm without gain, whose width may not be that of its input."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        """``[..., any]`` to the same; computed in float32 at least."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.width + self.eps)).to(x.dtype)


class ShortcutBlock:
    """Mixed in before a family's block: its residual path goes through a matrix at each sub-layer.

    y = x·S_attention + Attention(Norm(x));  out = y·S_mlp + MLP(Norm(y));  parallel: out = y + MLP(Norm(x))

    Dropout that a family applies to its residual sums is left out.
    """

    places: Places
    attention_shortcut: nn.Linear
    mlp_shortcut: nn.Linear

    def attend(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The first sub-layer: y."""
        kwargs |= zip(("past_key_values", "attention_mask"), args, strict=False)  # as GPT-2 hands them over
        normed = getattr(self, self.places.norms[0])(hidden_states)
        out = getattr(self, self.places.attention)(normed, **kwargs)[0]
        shortcut: Tensor = self.attention_shortcut(hidden_states)
        y: Tensor = shortcut + out
        return y

    def feed(self, y: Tensor) -> Tensor:
        """The second sub-layer of a sequential block."""
        shortcut: Tensor = self.mlp_shortcut(y)
        return shortcut + self._mlp(getattr(self, self.places.norms[1])(y))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the family's block."""
        y = self.attend(hidden_states, *args, **kwargs)
        if len(self.places.norms) == 1:
            return y + self._mlp(getattr(self, self.places.norms[0])(hidden_states))
        return self.feed(y)

    def _mlp(self, x: Tensor) -> Tensor:
        block: Any = self
        out: Tensor = block.mlp(x) if self.places.mlp else block.fc2(block.activation_fn(block.fc1(x)))
        return out


@cache
def _with_shortcuts(block_class: type, places: Places) -> type:
    """The class under its own name, which transformers looks for when it spreads a model over devices."""
    return type(block_class.__name__, (ShortcutBlock, block_class), {"places": places})


def add_shortcuts(block: Any, sizes: list[list[int]], places: Places) -> None:
    """Give a block shortcuts of these sizes ``[inputs, outputs]``, without values yet."""
    weight = next(block.parameters())
    if not isinstance(block, ShortcutBlock):
        kind: Any = type(block)
        block.__class__ = _with_shortcuts(kind, places)
    for name, (inputs, outputs) in zip(("attention_shortcut", "mlp_shortcut"), sizes, strict=False):
        setattr(block, name, nn.Linear(inputs, outputs, bias=False, device=weight.device, dtype=weight.dtype))


def linear_weight(module: nn.Module) -> Tensor:
    """The weight ``[outputs, inputs]`` of an `nn.Linear` or of transformers' `Conv1D`, without gradient."""
    owner: Any = module
    weight: Tensor = owner.weight.detach()
    return weight.t() if type(module).__name__ == "Conv1D" else weight


def set_linear(module: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Other weights ``[outputs, inputs]`` and bias ``[outputs]``, in sizes of their own and the module's dtype."""
    like = module.weight
    is_conv = type(module).__name__ == "Conv1D"
    value = (weight.t() if is_conv else weight).to(like.dtype).contiguous()
    module.weight = nn.Parameter(value, requires_grad=like.requires_grad)
    module.bias = None if bias is None else nn.Parameter(bias.to(like.dtype), requires_grad=like.requires_grad)
    outputs, inputs = weight.shape
    if is_conv:
        module.nf, module.nx = outputs, inputs
    else:
        module.out_features, module.in_features = outputs, inputs


def set_embedding(module: Any, weight: Tensor) -> None:
    """Another table ``[entries, width]``, in the module's dtype."""
    like = module.weight
    module.weight = nn.Parameter(weight.to(like.dtype).contiguous(), requires_grad=like.requires_grad)
    module.embedding_dim = weight.shape[1]


def replace_norm(model: nn.Module, name: str, width: int) -> None:
    """A norm without gain in the place of one; its eps stays."""
    old: Any = model.get_submodule(name)
    eps = next((getattr(old, key) for key in ("variance_epsilon", "eps") if hasattr(old, key)), None)
    if eps is None:
        raise ValueError(f"{name} is no norm")
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, PlainNorm(width, eps))


def reshape(model: Any, spec: dict[str, Any]) -> None:
    """Give the parts of a fresh model of the family the sizes that `spec` (see above) says; what changes has no values yet.

    Raises:
        AttributeError, ValueError: it names what is not there.
    """
    for name, (outputs, inputs, bias) in spec.get("linears", {}).items():
        module = model.get_submodule(name)
        empty = module.weight.new_empty
        set_linear(module, empty(outputs, inputs), empty(outputs) if bias else None)
    for name, width in spec.get("embeddings", {}).items():
        module = model.get_submodule(name)
        set_embedding(module, module.weight.new_empty(len(module.weight), width))
    for name, width in spec.get("norms", {}).items():
        replace_norm(model, name, width)
    for name, sizes in spec.get("shortcuts", {}).items():
        add_shortcuts(model.get_submodule(name), sizes, PLACES[model.config.model_type])


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def describe(model: Any) -> dict[str, Any]:
    """What differs in a changed model from a fresh one of its configuration; empty where nothing does.

    >>> from transformers import LlamaConfig
    >>> config = LlamaConfig(hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    >>> model = LlamaForCausalLM(config)
    >>> set_linear(model.lm_head, torch.zeros(9, 7), None)
    >>> describe(model)
    {'linears': {'lm_head': [9, 7, False]}}
    """
    family = CLASSES[model.config.model_type].__mro__[2]
    with torch.device("meta"):
        fresh = dict(family(copy.deepcopy(model.config)).named_modules())
    linears, embeddings, norms, shortcuts = {}, {}, {}, {}
    for name, module in model.named_modules():
        if isinstance(module, PlainNorm):
            norms[name] = module.width
        elif isinstance(module, ShortcutBlock):
            paths = [getattr(module, key, None) for key in ("attention_shortcut", "mlp_shortcut")]
            shortcuts[name] = [[path.in_features, path.out_features] for path in paths if path is not None]
        elif isinstance(module, nn.Embedding) and module.weight.shape[1] != fresh[name].weight.shape[1]:
            embeddings[name] = module.weight.shape[1]
        elif _is_linear(module) and name in fresh:
            size, before = linear_weight(module).shape, linear_weight(fresh[name]).shape
            if size != before or (module.bias is None) != (fresh[name].bias is None):
                linears[name] = [*size, module.bias is not None]
    parts = {"linears": linears, "embeddings": embeddings, "norms": norms, "shortcuts": shortcuts}
    return {key: value for key, value in parts.items() if value}


def settle(model: Any) -> None:
    """After a change of shapes, in place: the model gets the entry in its configuration, and the class, that it loads by.

    A model whose shapes fit its configuration again is the family's own, and plain transformers loads it.
    """
    reshaped = CLASSES[model.config.model_type]
    spec = describe(model)
    if spec:
        model.config.reshaped = spec
        model.__class__ = reshaped
    else:
        model.__class__ = reshaped.__mro__[2]
        for entry in ("reshaped", "auto_map"):
            if hasattr(model.config, entry):
                delattr(model.config, entry)


class Reshaped:
    """Mixed in before a family's causal language model: builds it, then reshapes it as `config.reshaped` says."""

    _auto_class = "AutoModelForCausalLM"  # a saved folder carries this file

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        reshape(self, config.reshaped)


class ReshapedLlamaForCausalLM(Reshaped, LlamaForCausalLM):  # type: ignore[misc]
    """Llama with widths of its own."""


class ReshapedMistralForCausalLM(Reshaped, MistralForCausalLM):  # type: ignore[misc]
    """Mistral with widths of its own."""


class ReshapedQwen2ForCausalLM(Reshaped, Qwen2ForCausalLM):  # type: ignore[misc]
    """Qwen2 with widths of its own."""


class ReshapedQwen3ForCausalLM(Reshaped, Qwen3ForCausalLM):  # type: ignore[misc]
    """Qwen3 with widths of its own."""


class ReshapedGemmaForCausalLM(Reshaped, GemmaForCausalLM):  # type: ignore[misc]
    """Gemma with widths of its own."""


class ReshapedGemma3ForCausalLM(Reshaped, Gemma3ForCausalLM):  # type: ignore[misc]
    """Gemma 3 (text) with widths of its own."""


class ReshapedPhiForCausalLM(Reshaped, PhiForCausalLM):  # type: ignore[misc]
    """Phi with widths of its own."""


class ReshapedPhi3ForCausalLM(Reshaped, Phi3ForCausalLM):  # type: ignore[misc]
    """Phi-3 with widths of its own."""


class ReshapedOPTForCausalLM(Reshaped, OPTForCausalLM):  # type: ignore[misc]
    """OPT with widths of its own."""


class ReshapedGPT2LMHeadModel(Reshaped, GPT2LMHeadModel):  # type: ignore[misc]
    """GPT-2 with widths of its own."""


#: By model type.
CLASSES: dict[str, type] = {
    "llama": ReshapedLlamaForCausalLM,
    "mistral": ReshapedMistralForCausalLM,
    "qwen2": ReshapedQwen2ForCausalLM,
    "qwen3": ReshapedQwen3ForCausalLM,
    "gemma": ReshapedGemmaForCausalLM,
    "gemma3_text": ReshapedGemma3ForCausalLM,
    "phi": ReshapedPhiForCausalLM,
    "phi3": ReshapedPhi3ForCausalLM,
    "opt": ReshapedOPTForCausalLM,
    "gpt2": ReshapedGPT2LMHeadModel,
}
