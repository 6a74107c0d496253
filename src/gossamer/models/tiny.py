"""Small random language models of the families Gossamer supports, for tests and examples: no download, milliseconds.

Weights are drawn with a larger spread than usual, because at the usual spread a random model attends uniformly and
every choice of keys looks equally good.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

import torch

from gossamer.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    # No end token: `generate` then always makes as many tokens as it is asked for.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}

# family → (transformers config class, what differs from _COMMON)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {"num_hidden_layers": 3}),
    # 4 heads of 32 channels are 128, twice the hidden size.
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    # One KV head for all query heads, as in Gemma 2B.
    "gemma": ("GemmaConfig", {"head_dim": 16, "num_key_value_heads": 1}),
    # Three layers with a window of 16 tokens, then one that sees everything.
    "gemma3": (
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 4,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
    ),
    # As many KV heads as heads (it has no grouped-query attention), learned positions, no gate in the MLP.
    "gpt2": ("GPT2Config", {}),
}

_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


def tiny_model(family: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A small random causal language model, fp32, on the CPU, in eval mode; it has no tokenizer.

    family: llama, qwen2, qwen3, mistral, gemma, gemma3 or gpt2.
    seed: of the weights. The same seed gives the same weights; the global random state is not touched.
    overrides: fields of the family's transformers config, e.g. `num_hidden_layers=4`, `sliding_window=8`.

    Defaults: vocabulary 256, hidden size 64, 2 layers (qwen2 3, gemma3 4), 4 query heads, 2 KV heads (gemma 1, gpt2 4).
    Raises UnknownNameError for another family and InputError for settings that transformers refuses.
    """
    import transformers

    if family not in FAMILIES:
        near = difflib.get_close_matches(family, FAMILIES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(FAMILIES)}"
        raise UnknownNameError(f"unknown model family {family!r}: {hint}")
    config_name, special = FAMILIES[family]
    settings = {**_COMMON, **special, **overrides}
    if family == "gpt2":
        settings.pop("num_key_value_heads")
        settings = {_GPT2_NAMES.get(key, key): value for key, value in settings.items()}
    # The layer pattern is one entry a layer; a different number of layers repeats it.
    types = settings.get("layer_types")
    if types and "layer_types" not in overrides:
        count = settings["num_hidden_layers"]
        settings["layer_types"] = [types[layer % len(types)] for layer in range(count)]
    try:
        config = getattr(transformers, config_name)(**settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # transformers checks settings in many places, with error classes of many kinds
        raise InputError(f"a tiny {family} model cannot be made so: {' '.join(str(error).split())}") from error
    return model.eval()
