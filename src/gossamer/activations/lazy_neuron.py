"""The lazy neuron phenomenon: few ReLU neurons fire in trained transformers, and a top-k caps them (Li et al., ICLR 2023).

    f(x; K, V) = V·Top_k(σ(Kᵀx)),   σ = ReLU;   neuron i fires on a token where a_i = σ(Kᵀx)_i > 0
    percent nonzero of a layer = 100 · mean over tokens of nnz(a) / d_ff

Two halves: `activation_stats` measures any trained model; `LazyNeuron` keeps the k largest activations of every token in
every MLP, in training and inference, with the gradient through the kept ones only. `lazy_studies` holds the experiments.

Decisions where the card leaves room:

* In a gated MLP the activation map is the activated gate: it is what σ gives, and where it is zero up and down are not
  needed either. "Largest" is by magnitude, which for ReLU is by value.
* A neuron fires where its activation is not zero. After ReLU that is a > 0; of GELU or SiLU it says, truly, that nearly
  all do.
* Where a family has dropout between activation and second matrix (T5), the k are chosen after it, while training.
* Approximate top-k is the published one for accelerators (Chern et al. 2022): L buckets, the best of each, then the exact
  k of those, with L = ⌈1 / (1 − r^(1/(k−1)))⌉, for which the expected recall is at least r if the k best lie anywhere.
  Neuron i is in bucket i mod L. As there, buckets are made of equal size, so L may come out larger, and recall better.
  Gated decode steps on a kernel select exactly. A CPU gains nothing by it (of 65,536 neurons the best 128: 0.12 ms
  against 0.14 ms).
* k lives in the model's config as `lazy_neuron_k` once `topk_mlp` has set it; checkpoints then carry it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.activations.base import ActivationHandle, ActivationMethod
from gossamer.calibration import Calibration
from gossamer.errors import InputError, ModelError
from gossamer.hf import FixedRules, MLPView, NeuronPolicy, mlp_views
from gossamer.patterns import Budget, NeuronRule, resolve
from gossamer.registry import register

#: Where a model's config holds its k.
CONFIG_NAME = "lazy_neuron_k"


def topk_mask(a: Tensor, k: int) -> Tensor:
    """The k entries of largest magnitude of each token, boolean ``[..., D]``; any of those tied at the edge.

    >>> topk_mask(torch.tensor([0.0, 3.0, 1.0, 2.0]), 2)
    tensor([False,  True, False,  True])
    """
    return NeuronRule(count=k).mask(a)


def bucket_count(neurons: int, k: int, recall: float) -> int:
    """L: buckets of which the best entries hold, on average, at least `recall` of the k best of `neurons`.

    Two of the k best fall into one bucket with probability 1/L, so each survives with at least (1 − 1/L)^(k−1).

    >>> bucket_count(65536, 128, 0.95), bucket_count(3072, 128, 0.95)
    (2521, 3072)
    """
    if k < 1 or not 0 < recall <= 1:
        raise InputError(f"an approximate top-k needs k of at least 1 and a recall in (0, 1], got {k} and {recall:g}")
    if k >= neurons or recall == 1:
        return neurons
    needed = 1 if k == 1 else math.ceil(1 / (1 - recall ** (1 / (k - 1))))
    size = max(1, neurons // min(max(needed, k), neurons))
    return -(-neurons // size)


def approximate_topk_mask(a: Tensor, k: int, recall: float = 0.95) -> Tensor:
    """Of each bucket the largest magnitude, and of those the k largest: boolean ``[..., D]``, k entries a token."""
    neurons = a.shape[-1]
    buckets = bucket_count(neurons, k, recall)
    if buckets == neurons:
        return topk_mask(a, k)
    size = -(-neurons // buckets)
    padded = nn.functional.pad(a.detach().abs(), (0, buckets * size - neurons), value=-1.0)
    best, place = padded.unflatten(-1, (size, buckets)).max(-2)  # neuron i = place * buckets + bucket
    chosen = best.topk(k, dim=-1).indices
    index = place.gather(-1, chosen) * buckets + chosen
    return torch.zeros_like(a, dtype=torch.bool).scatter_(-1, index, True)


def keep_topk(a: Tensor, k: int, recall: float | None = None) -> Tensor:
    """Top_k(a): kept entries unchanged, the others zero; the gradient passes through the kept ones alone."""
    mask = topk_mask(a, k) if recall is None else approximate_topk_mask(a, k, recall)
    return torch.where(mask, a, 0)


def percent_nonzero(a: Tensor) -> float:
    """100 · mean over tokens of nnz(a) / D, for an activation map ``[..., D]``."""
    return 100 * float((a != 0).double().mean())


@dataclass(frozen=True, eq=False)
class LayerActivations:
    """What fired in one MLP.

    Attributes:
        name: of the MLP in the model.
        tokens: how many passed, padding not counted.
        fired: int64 ``[D]``, tokens on which each neuron fired.
        histogram: int64 ``[D + 1]``, tokens on which so many neurons fired.
    """

    name: str
    tokens: int
    fired: Tensor
    histogram: Tensor

    @property
    def percent(self) -> float:
        """Percent nonzero."""
        return 100 * self.count / len(self.fired)

    @property
    def count(self) -> float:
        """Neurons that fire on a token, on average: nnz."""
        return float(self.fired.sum()) / self.tokens

    @property
    def frequencies(self) -> Tensor:
        """float64 ``[D]``: share of tokens on which each neuron fires, largest first."""
        return self.fired.double().sort(descending=True).values / self.tokens

    @property
    def dead(self) -> int:
        """Neurons that never fired."""
        return int((self.fired == 0).sum())

    def share_over(self, k: int) -> float:
        """Share of tokens on which more than k neurons fire: only those are changed by a Top-k."""
        return float(self.histogram[k + 1 :].sum()) / self.tokens


@dataclass(frozen=True, eq=False)
class ActivationStats:
    """What fired in every MLP of a model, in the order of its modules."""

    layers: tuple[LayerActivations, ...]

    @property
    def percents(self) -> list[float]:
        """Percent nonzero of each layer."""
        return [layer.percent for layer in self.layers]

    @property
    def mean_percent(self) -> float:
        """The same, averaged over layers."""
        return sum(self.percents) / len(self.layers)

    def summary(self) -> list[dict[str, Any]]:
        """JSON for each layer: percent, count, dead neurons, and firing frequencies at the ends and the middle."""
        rows = []
        for layer in self.layers:
            f = layer.frequencies
            rows.append(
                {
                    "name": layer.name,
                    "percent": layer.percent,
                    "count": layer.count,
                    "dead": layer.dead,
                    "frequency_max": float(f[0]),
                    "frequency_median": float(f[len(f) // 2]),
                    "frequency_min": float(f[-1]),
                    "share_of_neurons_under_tenth": float((f < 0.1).double().mean()),
                }
            )
        return rows


class _Counter:
    """Counts one MLP's firing neurons; `tokens` (boolean, flat) says which rows are no padding, None all."""

    def __init__(self, view: MLPView) -> None:
        device = cast(Tensor, view.down.weight).device
        self.view, self.rows = view, 0
        self.fired = torch.zeros(view.neurons, dtype=torch.int64, device=device)
        self.histogram = torch.zeros(view.neurons + 1, dtype=torch.int64, device=device)

    def add(self, a: Tensor, tokens: Tensor | None) -> None:
        a = a.detach().reshape(-1, a.shape[-1])
        if tokens is not None:
            if len(tokens) != len(a):
                raise InputError(f"{self.view.name} sees {len(a)} tokens, the attention mask has {len(tokens)}")
            a = a[tokens.to(a.device)]
        if not bool(torch.isfinite(a).all()):
            raise InputError(f"activations of {self.view.name} are not finite: check the model's weights and the data")
        on = a != 0
        self.rows += len(a)
        self.fired += on.sum(0)
        self.histogram += torch.bincount(on.sum(1), minlength=len(self.histogram))


@contextmanager
def watching(model: nn.Module, see: Callable[[MLPView, Tensor], None]) -> Iterator[list[MLPView]]:
    """While it lasts, `see` gets each MLP's view and activation map ``[..., D]``, before any Top-k that is attached."""
    views = mlp_views(model)
    handles: list[Any] = []

    def plain(view: MLPView, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        see(view, args[0])

    def gated(view: MLPView, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        see(view, view.activation(view.gate_and_up(args[0])[0]))

    try:
        for view in views:
            target, hook = (view.owner, gated) if view.gated else (view.down, plain)
            handles.append(target.register_forward_pre_hook(partial(hook, view)))
        yield views
    finally:
        for handle in handles:
            handle.remove()


def activation_stats(model: nn.Module, loader: Iterable[Tensor | Mapping[str, Tensor]]) -> ActivationStats:
    """Which neurons fire, pooled over all tokens of a loader; in eval mode, dense, and with no trace left.

    With a `LazyNeuron` attached this still counts what fires before the cap.

    Args:
        model: a transformers model with MLPs that `mlp_views` knows.
        loader: batches: token ids or images, or mappings of what the model takes. Where a mapping has an
            `attention_mask` (`decoder_attention_mask` for a decoder beside an encoder) padding is left out.

    Raises:
        ModelError: no MLP was found, or one was never reached.
        InputError: no batch, or activations that are not finite.
    """
    call, training, masks = cast(Any, model), model.training, dict[bool, Tensor | None]()
    both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    counters: dict[str, _Counter] = {}

    def see(view: MLPView, a: Tensor) -> None:
        counters[view.name].add(a, masks[both and "decoder" in view.name.split(".")])

    batches = 0
    try:
        model.eval()
        with watching(model, see) as views, torch.no_grad():
            counters.update({view.name: _Counter(view) for view in views})
            for batch in loader:
                batches += 1
                given = dict(batch) if isinstance(batch, Mapping) else {call.main_input_name: batch}
                if both and "decoder_input_ids" not in given:
                    given["decoder_input_ids"] = given["input_ids"]
                for decoder, key in ((False, "attention_mask"), (True, "decoder_attention_mask")):
                    mask = given.get(key)
                    masks[decoder] = None if mask is None else mask.reshape(-1).bool()
                call(**given)
    finally:
        model.train(training)
    if not batches:
        raise InputError("activation_stats: the loader gave no batch")
    for counter in counters.values():
        if not counter.rows:
            raise ModelError(f"{counter.view.name} was never reached: give batches that run the whole model")
    return ActivationStats(
        tuple(LayerActivations(c.view.name, c.rows, c.fired.cpu(), c.histogram.cpu()) for c in counters.values())
    )


@dataclass(frozen=True, eq=False)
class TopKRule(NeuronRule):
    """The k largest of each token; zeros among them are not counted as kept. `recall` makes it approximate."""

    recall: float | None = None

    def mask(self, a: Tensor) -> Tensor:
        """Bool ``[..., D]``."""
        k = cast(int, self.count)
        kept = topk_mask(a, k) if self.recall is None else approximate_topk_mask(a, k, self.recall)
        return kept & (a != 0)


@register("lazy-neuron", slot="activations", family="activations", needs=["training"])
class LazyNeuron(ActivationMethod):
    """Top-k transformer: of every token's MLP activations the k largest count, in training and inference.

    Use it to train models that resist wrong labels, or that fire few neurons by construction: attach it before training
    (`topk_mlp`), leave the recipe as it is, and keep it attached in use. On a ReLU model trained without it, it costs
    nothing where k is above what fires anyway (`activation_stats`), and accuracy below. A decode step then reads k/D of the
    second matrix (and of up, in a gated MLP); the first is computed whole. Blocks of tokens gain no time.

    Without `k` the model's own is used: the one that `topk_mlp` wrote into its config.

    Paper: The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in Transformers, ICLR 2023.

    >>> from gossamer.models import tiny_model
    >>> model = tiny_model("gpt2", activation_function="relu")
    >>> with LazyNeuron(k=8).attach(model) as handle:
    ...     _ = model(torch.arange(12)[None])
    ...     handle.report()["neurons_kept"] <= 8 / 128
    True
    """

    k: Budget | None = Field(
        None, description="neurons kept per token in every MLP, a count or a fraction (paper: 128; ViT-21k: 256)"
    )
    recall: float | None = Field(
        None, gt=0, le=1, description="recall target of an approximate top-k (paper, on TPU: 0.95); exact without"
    )

    @classmethod
    def with_share(cls, kept: float) -> Self:
        """Settings with which tokens compute this share of the neurons."""
        return cls(k=float(kept))

    def neuron_policy(self, model: nn.Module, calibration: Calibration | None) -> NeuronPolicy:
        """The same k in every MLP.

        Raises:
            InputError: no k is given, and the model has none of its own; or k is above every MLP's width.
        """
        k = self.k
        if k is None:  # through the settings, so that a config is checked as they are
            k = LazyNeuron(k=getattr(getattr(model, "config", None), CONFIG_NAME, None)).k
        if k is None:
            raise InputError("lazy-neuron: this model has no k of its own: set k (128 for widths of 3072)")
        widths = [view.neurons for view in mlp_views(model)]
        if k > max(widths):
            raise InputError(f"lazy-neuron: k must be 1 to {max(widths)}, the width of the MLPs; got {k}")
        return FixedRules([TopKRule(count=min(resolve(k, width), width), recall=self.recall) for width in widths])


def topk_mlp(model: nn.Module, k: int | float, recall: float | None = None) -> ActivationHandle:
    """Make a model a Top-k transformer for training: attached, and k in its config, so that its checkpoints carry it.

    After `from_pretrained`, ``LazyNeuron().attach(model)`` runs it with the same k.

    Raises:
        InputError: k is out of range.
        ModelError: the model has no config, or no MLP that is known.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise ModelError(f"{type(model).__name__} has no config to keep k in: attach LazyNeuron(k={k}) instead")
    handle = LazyNeuron(k=k, recall=recall, mode="mask").attach(model)
    setattr(config, CONFIG_NAME, k)
    return handle
