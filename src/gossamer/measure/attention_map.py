"""What a method reads, as a map: the weight that every query gave to every key, whatever the method does inside.

Attention is linear in its values. If the value of token j is the unit vector e_j, the output of a query is its row of
weights. A model's values have head_dim channels, so the keys are taken head_dim at a time, one run of the text for each
part: layers before the one looked at run as they always do, the values of that layer are replaced, and what the layers
after it make of the result does not matter. This needs nothing of the method, and shows what was really computed: rows that
were evicted, merged or never read have no weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.errors import InputError, ModelError
from gossamer.hf import GossamerCache, attention_views, model_shape
from gossamer.policies import PolicyHandle

Feed = Literal["block", "teacher", "tokens"]


def attention_map(
    model: nn.Module, handle: PolicyHandle, tokens: Tensor, layer: int, prompt: int = 0, feed: Feed | None = None
) -> Tensor:
    """The attention weights of one layer over a text, under attached methods.

    Args:
        model: the model that `handle` is attached to.
        tokens: int64 ``[n]``.
        layer: which layer to look at.
        prompt: so many tokens are read as one block first; the map has rows for the others only.
        feed: how the tokens after the prompt come: as one `block` (prefill methods), as a block that decodes query by query
            (`teacher`: decode methods), or one by one (`tokens`: cache methods). Default by what is attached.

    Returns:
        float32 ``[heads, n - prompt, n]``. Weights below what the model's dtype can tell from 0 are 0.

    Raises:
        InputError: no such layer, or nothing after the prompt.
        ModelError: the layer's values do not come from a projection called `v_proj`.
    """
    shape, runtime = model_shape(model), handle.runtime
    if not 0 <= layer < shape.layers:
        raise InputError(f"this model has layers 0 to {shape.layers - 1}, not {layer}")
    if not 0 <= prompt < len(tokens):
        raise InputError(f"a prompt of {prompt} leaves nothing of {len(tokens)} tokens to look at")
    if feed is None:
        feed = "tokens" if runtime.cache is not None else "teacher" if runtime.decode is not None else "block"
    module: Any = attention_views(model)[layer].module
    if not hasattr(module, "v_proj") or not hasattr(module, "o_proj"):
        raise ModelError(f"{type(module).__name__} has no projections v_proj and o_proj: its map cannot be read")
    parts = [
        _weights(model, runtime, module, tokens, start, prompt, feed, shape.heads, shape.head_dim)
        for start in range(0, len(tokens), shape.head_dim)
    ]
    return torch.cat(parts, dim=2)[:, :, : len(tokens)]


def _weights(
    model: Any, runtime: Any, module: Any, tokens: Tensor, start: int, prompt: int, feed: Feed, heads: int, dim: int
) -> Tensor:
    """``[heads, n - prompt, head_dim]``: weights on tokens ``start .. start + head_dim``."""
    seen = 0

    def values(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        nonlocal seen
        new = out.shape[1]
        unit = torch.zeros(new, dim, dtype=out.dtype, device=out.device)
        at = torch.arange(seen, seen + new, device=out.device)
        inside = (at >= start) & (at < start + dim)
        unit[inside, at[inside] - start] = 1.0
        seen += new
        return unit.repeat(1, out.shape[2] // dim).expand_as(out)

    outputs: list[Tensor] = []

    def result(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        outputs.append(args[0][0].unflatten(-1, (heads, dim)).transpose(0, 1).float())

    cache = GossamerCache(reserve=len(tokens))
    hooks = [module.v_proj.register_forward_hook(values), module.o_proj.register_forward_pre_hook(result)]
    try:
        with torch.no_grad():
            if prompt:
                model(tokens[None, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
                outputs.clear()
            rest = tokens[None, prompt:]
            with _feeding(runtime, feed):
                for piece in rest.split(1, dim=1) if feed == "tokens" else (rest,):
                    model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(outputs, dim=1)


@contextmanager
def _feeding(runtime: Any, feed: Feed) -> Iterator[None]:
    if feed == "teacher":
        with runtime.teacher_forcing():
            yield
    else:
        yield
