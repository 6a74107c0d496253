"""Drafting with the first layers of the model itself, its own norm and head behind them: no second model, no memory.

    draft:   token by token through the first k layers, their keys and values in the same cache behind the text's
    verify:  the rows of the draft leave the cache, and the whole model reads root and draft in one forward

The first k layers write the same rows in drafting as in verifying, so drafting needs no pass over the prompt and no cache of
its own. A draft ends where the head behind layer k is no longer sure enough: a token is worth drafting only while the chance
that all so far are right is greater than what the small forward costs.

A baseline after self-speculative decoding (Zhang et al. 2024) and LayerSkip (Elhoushi et al. 2024), whose models are trained
to leave early; most others say little behind a third of their layers. Verification reads the draft anew from the first layer on;
carrying the hidden states of the drafted tokens over is not built.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import Field
from torch import nn

from gossamer.calibration import Calibration
from gossamer.decoding.base import Context, Draft, Drafter, DraftingMethod, Target, Verdict, plain
from gossamer.decoding.sizing import Sizer
from gossamer.decoding.sources import vocabulary_of
from gossamer.errors import InputError
from gossamer.hf import block_list
from gossamer.hf.views import text_config
from gossamer.patterns import Tree
from gossamer.registry import register


def layers_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the decoder layers' list, and the list's name.

    Raises:
        ModelError: there is no such list.
    """
    parent, _, name = block_list(model)[0].rpartition(".")
    return model.get_submodule(parent), name


@contextmanager
def first_layers(model: nn.Module, count: int) -> Iterator[None]:
    """Inside, the model has its first `count` layers only; the modules are the same, with all that is attached to them.

    >>> from gossamer.models import tiny_model
    >>> model = tiny_model("llama")
    >>> with first_layers(model, 1):
    ...     print(len(model.model.layers))
    1
    """
    parent, name = layers_of(model)
    layers: Any = getattr(parent, name)
    setattr(parent, name, layers[:count])
    try:
        yield
    finally:
        setattr(parent, name, layers)


class EarlyExitDrafter(Drafter):
    """A chain of what the first layers would say.

    Args:
        model: the target.
        layers: k.
        length: longest chain.
        adapt: whether chains end, or are left out, where they don't pay.
    """

    #: Steps without a draft, after which one is made all the same, to learn from.
    EXPLORE = 64

    def __init__(self, model: nn.Module, layers: int, length: int, adapt: bool = True) -> None:
        self.model, self.layers, self.length, self.adapt = model, layers, length, adapt
        parent, name = layers_of(model)
        weights = [sum(p.numel() for p in layer.parameters()) for layer in getattr(parent, name)]
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        #: What a forward through the exit reads, over one of the whole model.
        self.share = (sum(weights[:layers]) + head.weight.numel()) / (sum(weights) + head.weight.numel())
        self.guesses: list[float] = []
        self.idle = 0

    @property
    def sized(self) -> bool:
        """Whether drafts may be shorter, or left out, where they don't pay."""
        return self.adapt

    def propose(self, context: Context, tree: Tree) -> Draft:
        """A chain of full length."""
        return self._chain(context, min(self.length, context.room - 1), None)

    def plan(self, context: Context, sizer: Sizer) -> Draft:
        """A chain that ends where the next token is not worth its forward; none where the first most often is not."""
        self.idle += 1
        if self.idle < self.EXPLORE and sizer.confidence.chance(FIRST, 0.6) < self.share * sizer.rate:
            return plain(context)
        self.idle = 0
        return self._chain(context, min(self.length, context.room - 1), sizer)

    def _chain(self, context: Context, length: int, sizer: Sizer | None) -> Draft:
        model: Any = self.model
        cache, start = context.cache, context.cache.get_seq_length()
        tokens, self.guesses, chance = [int(context.ids[-1])], [], 1.0
        try:
            with first_layers(self.model, self.layers):
                while len(tokens) <= length:
                    if sizer is not None and chance < self.share * sizer.rate:
                        break
                    given = torch.tensor([tokens[-1:]], device=context.ids.device)
                    places = torch.tensor([[start + len(tokens) - 1]], device=given.device)
                    out = model(given, past_key_values=cache, use_cache=True, position_ids=places)
                    law = out.logits[0, -1].float().softmax(-1)
                    guess, token = (found.item() for found in law.max(-1))
                    if sizer is not None:
                        chance *= sizer.confidence.chance(_kind(guess), guess)
                    self.guesses.append(guess)
                    tokens.append(int(token))
        finally:
            for layer in cache.layers[: self.layers]:
                layer.crop(start - layer.get_seq_length())
        return Draft(Tree.chain(len(tokens) - 1), tokens) if len(tokens) > 1 else plain(context)

    def learn(self, target: Target, verdict: Verdict, sizer: Sizer) -> None:
        """How often tokens of which the exit was so sure were right."""
        if self.guesses:
            sizer.confidence.learn(FIRST, len(verdict.path) > 1)
        for depth, guess in enumerate(self.guesses[: target.draft.tree.size - 1], 1):
            sizer.confidence.learn(_kind(guess), depth < len(verdict.path))
            if depth >= len(verdict.path):
                break

    def observe(self, target: Target, verdict: Verdict) -> None:
        """Nothing is kept."""
        self.guesses = []


#: The class that the first token of a draft counts in, whatever its guess.
FIRST = "exit", "first"


def _kind(guess: float) -> tuple[str, int]:
    return "exit", int(guess * 10)


@register("early-exit", slot="drafting", family="decoding", name="Early exit", baseline=True)
class EarlyExit(DraftingMethod):
    """Draft with the first layers of the model itself, in the same cache; lossless, no training, no memory.

    A baseline, for models that were trained to leave early. Where drafts cost more time than they give, decoding is plain.

    >>> EarlyExit(layers=10).settings()
    {'layers': 10}
    """

    layers: int | None = Field(None, ge=1, description="layers that draft (default: a third)")
    length: int = Field(4, ge=1, le=32, description="longest draft")
    adapt: bool = Field(True, description="shorten drafts and leave them out where they don't pay")

    def drafter(self, model: nn.Module, calibration: Calibration | None) -> EarlyExitDrafter:
        """As `DraftingMethod`.

        Raises:
            InputError: not so many layers.
            ModelError: a model without a language-model head, or whose blocks were not found.
        """
        vocabulary_of(model)
        layers_of(model)
        count = int(text_config(model).num_hidden_layers)
        layers = self.layers or max(1, count // 3)
        if layers > count:
            raise InputError(f"{self.slug}: an early exit is behind layer 1 to {count} of this model, got {layers}")
        return EarlyExitDrafter(model, layers, self.length, self.adapt)
