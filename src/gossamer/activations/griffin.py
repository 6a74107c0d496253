"""GRIFFIN: contextual sparsity of MLP neurons, chosen by the prompt (coarse) or by each token (fine); no calibration.

Coarse ("CSparse"), of a prompt's products z_t = SiLU(W_g x_t) ⊙ (W_u x_t):

    ẑ_t = z_t / ‖z_t‖₂,   s_j = ‖ẑ_{:,j}‖₂ over the tokens,   kept = the int(ρD) largest s

Fine ("FSparse"), of each decoded token: the int((1−ρ)D) smallest |SiLU(W_g x)| are zeroed. A plain MLP's activated neurons
stand for both gate and product.

The prompt is read densely. s is summed in squares over the chunks of a prompt, and over the later turns of a conversation
that goes on in the same cache: what the model reads in blocks tells what it needs; what it decodes changes nothing.
Decisions where the paper is silent: a batch keeps one set of neurons, by s summed over its sequences (padding counts, as it
passes through the MLP like a token; at batch 1, the paper's setting, there is none). A cache that was filled while the
method was not attached has no statistic, and is decoded densely until it has read a block.
"""

from __future__ import annotations

import logging
from typing import Any, Literal, Self, cast
from weakref import WeakKeyDictionary

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.activations.base import ActivationHandle, ActivationMethod
from gossamer.calibration import Calibration
from gossamer.errors import ModelError
from gossamer.hf import MLPView, NeuronPolicy, mlp_views
from gossamer.hf.views import base_model
from gossamer.patterns import NeuronRule
from gossamer.registry import register

Pattern = Literal["coarse", "fine"]
Phase = Literal["auto", "prompt", "sparse", "full"]
logger = logging.getLogger("gossamer")


def kept_neurons(keep: float, neurons: int, pattern: Pattern) -> int:
    """How many of D neurons a share ρ keeps: int(ρD) of a prompt's set, D − int((1−ρ)D) of a token's.

    >>> kept_neurons(0.5, 7, "coarse"), kept_neurons(0.5, 7, "fine"), kept_neurons(0.9, 10, "fine")
    (3, 4, 9)
    """
    slack = 1e-9  # (1 − 0.9)·10 is 0.9999999999999998
    return int(keep * neurons + slack) if pattern == "coarse" else neurons - int((1 - keep) * neurons + slack)


def squared_shares(product: Tensor) -> Tensor:
    """float32 ``[D]``: ``Σ_t ẑ_t²`` of products ``[..., D]``, each token's of length 1; a token of zeros adds nothing.

    >>> squared_shares(torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]]))
    tensor([0.3600, 1.6400])
    """
    z = product.detach().reshape(-1, product.shape[-1]).float()
    lengths: Tensor = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return (z / lengths.clamp_min(1e-30)).square().sum(0)


def strongest(statistic: Tensor, count: int) -> Tensor:
    """int32 ``[count]``, ascending: the neurons with the largest s ``[D]``, the lower one first where they are equal.

    >>> strongest(torch.tensor([0.1, 0.7, 0.2, 0.7]), 2).tolist()
    [1, 3]
    """
    order = statistic.sort(descending=True, stable=True).indices
    return order[:count].sort().values.to(torch.int32)


class PromptStatistic:
    """What one prompt has shown so far: ``s²`` of every layer, and the rules made of it."""

    def __init__(self, layers: int) -> None:
        self.squares: list[Tensor | None] = [None] * layers
        self.rules: list[NeuronRule | None] = [None] * layers

    def add(self, layer: int, product: Tensor) -> None:
        """Take in a block ``[..., D]``."""
        shares, before = squared_shares(product), self.squares[layer]
        self.squares[layer] = shares if before is None else before.add_(shares)
        self.rules[layer] = None

    def rule(self, layer: int, count: int) -> NeuronRule | None:
        """The layer's neurons; None before the first block.

        Raises:
            ModelError: the activations were not finite.
        """
        squares = self.squares[layer]
        if self.rules[layer] is None and squares is not None:
            if not bool(torch.isfinite(squares).all()):
                raise ModelError(f"the activations of MLP {layer} are not finite: check the model's weights")
            self.rules[layer] = NeuronRule(indices=strongest(squares, count))
        return self.rules[layer]


class ContextualNeurons(NeuronPolicy):
    """The neurons of a context: coarse or fine.

    Phases: `auto` reads blocks densely and decodes sparsely; a decoding loop names each pass itself: `prompt` (dense, and
    watched), `sparse` (whatever its shape), `full` (dense, and not watched).

    Args:
        views: the model's MLPs.
        keep: ρ.
        pattern: which.
        strict: the tokens of a block share one fine mask.
    """

    def __init__(self, views: list[MLPView], keep: float, pattern: Pattern, strict: bool = False) -> None:
        self.pattern, self.keep = pattern, keep
        self.counts = [kept_neurons(keep, view.neurons, pattern) for view in views]
        self.fine = [NeuronRule(count=count, shared=strict) for count in self.counts]
        self.seen: WeakKeyDictionary[Any, PromptStatistic] = WeakKeyDictionary()  # by cache
        self.now = PromptStatistic(len(views))
        self.warned = False
        self.enter("auto")

    def enter(self, phase: Phase) -> Self:
        """From now on the passes are of this phase."""
        self.phase = phase
        self.prompt = phase == "sparse"  # a rule holds for blocks too only where the phase says so
        self.watches = self.pattern == "coarse" and phase in ("auto", "prompt")
        return self

    def rule(self, layer: int) -> NeuronRule | None:
        """The context's or the token's neurons; None in dense phases."""
        if self.phase in ("prompt", "full"):
            return None
        if self.pattern == "fine":
            return self.fine[layer]
        found = self.now.rule(layer, self.counts[layer])
        if found is None and layer == 0 and not self.warned:
            self.warned = True
            logger.warning("this cache was filled while no method watched: decoding is dense until a block is read")
        return found

    def observe(self, layer: int, gate: Tensor, product: Tensor) -> None:
        """Add a block's products to the statistic."""
        self.now.add(layer, product)

    def follow(self, model: nn.Module) -> list[Any]:
        """Tell one prompt from another by the caches that pass; returns hooks to remove."""
        base = base_model(model)

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            cache = kwargs.get("past_key_values", kwargs.get("cache"))
            fresh = PromptStatistic(len(self.counts))
            empty = cache is None or cache.get_seq_length() == 0
            self.now = fresh if empty else self.seen.get(cache, fresh)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            cache = getattr(output, "past_key_values", getattr(output, "cache", None))
            if cache is not None:
                self.seen[cache] = self.now

        return [
            base.register_forward_pre_hook(before, with_kwargs=True),
            base.register_forward_hook(after),
        ]

    def report(self) -> dict[str, Any]:
        """The share that a sparse pass keeps."""
        return {"pattern": self.pattern, "keep": self.keep}


class ContextualMethod(ActivationMethod):
    """What GRIFFIN and the methods built on it set."""

    pattern: Pattern = Field(
        "coarse", description="coarse: a set for each prompt; fine: the largest gates of each token"
    )
    keep: float = Field(0.5, gt=0, le=1, description="ρ, the share of neurons kept")

    @classmethod
    def with_share(cls, kept: float) -> Self:
        """Settings with which tokens compute this share of the neurons."""
        return cls(keep=kept)

    def neuron_policy(self, model: nn.Module, calibration: Calibration | None) -> ContextualNeurons:
        """A policy of this model."""
        return ContextualNeurons(mlp_views(model), self.keep, self.pattern)

    def attach(self, model: nn.Module, calibration: Calibration | None = None) -> ActivationHandle:
        """Put the method on a model; the handle takes it off again, bit for bit.

        Raises:
            ModelError: the model has no MLP that it can serve, or one that is under a policy already.
        """
        handle = super().attach(model, calibration)
        assert handle.mlp is not None
        handle.undo += [hook.remove for hook in cast(ContextualNeurons, handle.mlp.policy).follow(model)]
        return handle


@register("griffin", slot="activations", family="activations", name="GRIFFIN", baseline=True)
class Griffin(ContextualMethod):
    """Keep for each prompt the MLP neurons that it used most, or for each token those with the largest gates.

    Training-free, for gated and plain MLPs, at batch 1. Summaries and answers about a text hardly suffer at half of the
    neurons; reasoning step by step does, which `sirius` repairs. A decode step reads ρ of the MLP's weights (coarse), or all
    gates and ρ of up and down (fine).

    Source: Dong et al., Prompt-prompted Adaptive Structured Pruning for Efficient LLM Generation (2024); the fine mode is
    that of Sirius (2024).

    >>> from gossamer.models import tiny_model
    >>> model = tiny_model("llama")
    >>> with Griffin(keep=0.25).attach(model) as handle:
    ...     out = model.generate(torch.arange(1, 9)[None], max_new_tokens=4, do_sample=False)
    >>> handle.mlp.policy.counts, handle.mlp.policy.keep
    ([32, 32], 0.25)
    """
