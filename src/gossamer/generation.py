"""Generating text from a prompt, with or without a recipe."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers.generation.streamers import TextStreamer

from gossamer.errors import InputError
from gossamer.models import LoadedModel
from gossamer.recipe import Recipe


class _Callback(TextStreamer):
    """Hands each finished piece of text to a function."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers for every piece."""
        self.write(text)


def generate(
    loaded: LoadedModel,
    prompt: str,
    recipe: Recipe | None = None,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    write: Callable[[str], None] | None = None,
) -> str:
    """Continue a prompt and return the new text.

    Args:
        recipe: methods to run with (None: the plain model).
        temperature: 0 decodes greedily; above it, samples with this temperature and `top_p`.
        chat: wrap the prompt in the tokenizer's chat template.
        write: called with each piece of text as it is made.

    Raises:
        InputError: the prompt is empty or a number is out of range.
    """
    if not prompt.strip():
        raise InputError("the prompt is empty")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    if temperature < 0 or not 0 < top_p <= 1:
        raise InputError("temperature must not be negative, and top_p must be above 0 and at most 1")
    tokenizer: Any = loaded.tokenizer
    if chat:
        if not tokenizer.chat_template:
            raise InputError(f"{loaded.name} has no chat template: leave out --chat")
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling.update(temperature=temperature, top_p=top_p)
        torch.manual_seed(seed)
    model: Any = loaded.model
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with recipe.attach(model) if recipe is not None else nullcontext() as handle:
        run = getattr(handle, "generator", None) or model.generate
        out = run(
            **inputs.to(model.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            streamer=_Callback(tokenizer, write) if write is not None else None,
            return_dict_in_generate=False,
            **sampling,
        )
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
