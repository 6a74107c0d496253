"""CATS: neurons whose gate is small are skipped, by one threshold for each layer (Lee et al., COLM 2024).

    a = |act(x W_g)|,  t = min{ t' : F(t') ≥ k },  y = (act(x W_g) · 1[a > t] ⊙ x W_u) W_d

F is the distribution of a over the tokens and neurons of a calibration text, k the share to drop. W_g is always read, and
of W_u and W_d what the gate lets through: (3 − 2k)/3 of the weights. Nothing kept is rescaled.

Decisions where the card leaves room:

* F is a sketch with bins a 2048th of the value wide, kept as a table of the quantiles of every thousandth; a calibration
  serves all sparsities. The released histogram (999 bins on −1 … 1, `compat="released"`) is stored beside it.
* Equality drops, as in the released code: t = 0 drops exact zeros only.
* A plain MLP ``act(x W_u) W_d`` is judged by its only activation; W_d alone is then read in part.
* The released histogram has an edge below zero next to it; such thresholds count as 0. At k = 1 it has no bin: its last
  edge, 1, is taken, so it can't drop larger values.

Not built: the SVD predictor, which is off in the released code.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.activations.base import ActivationMethod, Progress, device_of
from gossamer.calibration import Calibration
from gossamer.errors import InputError
from gossamer.hf import FixedRules, NeuronPolicy, mlp_views, watch
from gossamer.models import fingerprint
from gossamer.patterns import MagnitudeSketch, NeuronRule, threshold_at
from gossamer.registry import register

#: Inner edges of the released histogram; its first and last bins are open.
EDGES = 998


def cats(a: Tensor, threshold: Tensor | float) -> Tensor:
    """``a`` where ``|a| > threshold``, else 0.

    >>> cats(torch.tensor([0.1, -0.4, 0.3]), 0.3)
    tensor([ 0.0000, -0.4000,  0.0000])
    """
    return torch.where(a.abs() > threshold, a, 0)


def released_counts(a: Tensor) -> Tensor:
    """int64 ``[999]``: how many of ``|a|`` lie in each bin ``[edge, next edge)`` of the released histogram."""
    edges = torch.linspace(-1, 1, EDGES)
    return torch.bincount(torch.bucketize(a.detach().float().abs().flatten().cpu(), edges, right=True), minlength=999)


def released_threshold(counts: Tensor, share: float) -> Tensor:
    """float32 ``[...]``: the left edge of the first bin of ``counts [..., 999]`` whose cumulative share exceeds `share`.

    Raises:
        InputError: a histogram of another size, or an empty one.
    """
    if counts.shape[-1] != EDGES + 1 or not bool((counts.sum(-1) > 0).all()):
        raise InputError(f"want counts of {EDGES + 1} bins, not all zero, got {list(counts.shape)}")
    above = counts.cumsum(-1).double() > share * counts.sum(-1, keepdim=True)
    first = torch.where(above.any(-1), above.int().argmax(-1), EDGES)
    return torch.linspace(-1, 1, EDGES)[(first - 1).clamp_min(0)].clamp_min(0)


def weight_bytes(channels: int, neurons: int, kept: int, element_size: int = 4) -> int:
    """Bytes of weights that a gathered gated MLP reads for one token: d·D for the gate, 2·d for each neuron kept."""
    return (channels * neurons + 2 * channels * kept) * element_size


@register("cats", slot="activations", family="activations", needs=["calibration"])
class CATS(ActivationMethod):
    """Skip the neurons whose activated gate is small, by one threshold for each layer.

    Use it to speed up decoding at batch 1 without training: at 50 % a 7B model loses about a point of accuracy, small models
    more. Works on every gated and plain MLP of transformers. A decode step reads (3 − 2k)/3 of a gated MLP's weights, so
    1.5 times faster at best at k = 0.5; a batch reads what any of its rows keeps. `activations.finetune`
    adapts the weights to the mask.

    Paper: CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models, arXiv 2404.08763.

    >>> from gossamer.models import tiny_model
    >>> model, method = tiny_model("llama"), CATS(sparsity=0.5)
    >>> calibration = method.calibrate(model, torch.arange(64).view(2, 32))
    >>> with method.attach(model, calibration) as handle:
    ...     _ = model(torch.arange(32)[None])
    ...     round(handle.report()["neurons_kept"], 1)
    0.5
    """

    sparsity: float = Field(0.5, ge=0, le=1, description="k, share of gate activations that are dropped")
    compat: Literal["paper", "released"] = Field(
        "paper", description="'released': thresholds from the official script's histogram, at most 1"
    )

    def calibrate(self, model: nn.Module, tokens: Tensor, progress: Progress | None = None) -> Calibration:
        """Count ``|act(gate)|`` of every layer over token blocks ``[count, block]`` (paper: 500 texts).

        Raises:
            CalibrationError: no token blocks, a model in training mode, or activations that are not finite.
            ModelError: the model has no MLP that is known.
        """
        layers = len(mlp_views(model))
        sketches = [MagnitudeSketch() for _ in range(layers)]
        counts = torch.zeros(layers, EDGES + 1, dtype=torch.int64)

        def see(layer: int, gate: Tensor) -> None:
            sketches[layer].add(gate)
            counts[layer] += released_counts(gate)

        watch(model, tokens, {"mlp.gate": see}, *([progress] if progress else []))
        tensors = {"gate": torch.stack([sketch.table() for sketch in sketches]), "released": counts}
        return Calibration(self.slug, fingerprint(model), tensors, {"tokens": tokens.numel()})

    def thresholds(self, calibration: Calibration) -> Tensor:
        """t of every layer, float32 ``[L]``."""
        if self.compat == "released":
            return released_threshold(calibration.tensors["released"], self.sparsity)
        return threshold_at(calibration.tensors["gate"], self.sparsity)

    def neuron_policy(self, model: nn.Module, calibration: Calibration | None) -> NeuronPolicy:
        """One scalar threshold for each layer.

        Raises:
            CalibrationError: none, or of another method or model.
        """
        thresholds = self.thresholds(self.learned(model, calibration, "gate", "released"))
        views = mlp_views(model)
        return FixedRules(NeuronRule(threshold=t.to(device_of(v.down))) for t, v in zip(thresholds, views, strict=True))
