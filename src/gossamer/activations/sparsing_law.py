"""Sparsing Law: activation sparsity at a given price in perplexity (Luo et al., arXiv 2411.02335, ICML 2025).

A neuron is inactive for a token if what it adds to the MLP's output is small. Small means the same relative error in every
layer (CETT), and the error is the one at which validation perplexity rises by p (PPL-p%; p is 1 % by default):

    n_i = W_out[:, i]·a_i,  a_i = σ(W_gate[i]·x)·(W_in[i]·x)          what neuron i adds
    CETT_l(ε) = mean over tokens of ‖Σ_{‖n_i‖ ≤ ε} n_i‖ / ‖Σ_i n_i‖    the error of dropping the small ones
    ε_l: CETT_l(ε_l) = c in every layer;   c: perplexity(masked) / perplexity(dense) = 1 + p
    keep neuron i where |a_i| > θ_{l,i} = ε_l / ‖W_out,l[:, i]‖

The formulas and one layer's search are in `sparsing_law_cett`, the search of c in `sparsing_law_search`, the comparison with the
other rules in `sparsing_law_compare`, the scaling laws in `sparsing_law_fits`.

What it saves: the product a_i must be known before it can be judged, so gate and up are computed in full and only W_out's
columns are skipped, exactly and without a predictor. At most a third of an MLP's weights is not read. To skip W_in as well, a
rule on the gate alone is needed (CATS, CHESS), or a predictor.

Decisions where the card leaves room:

* Dropped is ‖n‖ ≤ ε, in the search as in the rule that runs, on the very same float comparison (|a| ≤ ε/‖W_out‖). The paper
  writes < for the rule; its search uses ≤, and the two differ only where a value sits on the threshold.
* c = 0 or a first candidate that errs too much gives ε = 0: then only exact zeros are dropped, which changes nothing.
* CETT of a token can fall as ε rises, where contributions cancel. The mean practically rises; the search holds its promise
  (error at ε ≤ c, at the next candidate > c) in any case.
* The share to report is that of the sparse forward; the one on dense activations is beside it.
* Biases of W_out belong to no neuron. Tokens whose output is zero don't count.
* Runs with equal thresholds are done once, and each layer's search starts from what it found before: the released loops repeat
  all 16 steps for each of 20 values of c.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gossamer.activations.base import ActivationHandle, ActivationMethod
from gossamer.activations.sparsing_law_cett import Progress, no_progress
from gossamer.activations.sparsing_law_search import Measurement, ppl_p_sparsity, real_rows, sparsity_at_share
from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError
from gossamer.hf import FixedRules, NeuronPolicy, mlp_views
from gossamer.models import fingerprint
from gossamer.patterns import NeuronRule
from gossamer.registry import register


@register("sparsing-law", slot="activations", family="activations", needs=["calibration"])
class SparsingLaw(ActivationMethod):
    """Drop neurons of small output, as many as a given rise of perplexity allows.

    Use it to say how sparse a model's activations are, in a number that compares across activations and models; or as a
    sparsifier whose price is known, with thresholds of equal error in every layer. It serves ReLU, SiLU and GELU MLPs, gated or
    plain. `calibrate` needs text alone: one dense pass, then some 20 masked ones over `max_tokens` tokens. At run time only
    W_out is skipped (see the module): a decode step saves at most a third of a gated MLP, half of a plain one.

    Paper: Sparsing Law: Towards Large Language Models with Greater Activation Sparsity, arXiv 2411.02335.

    >>> SparsingLaw(p=0.05).p
    0.05
    """

    p: float = Field(0.01, gt=0, le=10, description="rise of validation perplexity that the thresholds may cost")
    share: float | None = Field(
        None, gt=0, le=1, description="instead of p: the activation ratio to reach, whatever it costs"
    )
    tolerance: float = Field(1e-6, gt=0, lt=1, description="width of the last interval of the search for c")
    candidates: int = Field(65_536, ge=2, description="thresholds that each layer chooses from")
    max_tokens: int = Field(2048, ge=2, description="calibration tokens used at most; all activations are held at once")

    @model_validator(mode="after")
    def _no_int8(self) -> SparsingLaw:
        if self.int8:
            raise ValueError("int8 weights serve rules on the gate; this one judges products")
        return self

    @classmethod
    def with_share(cls, kept: float) -> SparsingLaw:
        """Settings with which tokens keep this share of the neurons."""
        return cls(share=kept, tolerance=1e-3)

    def calibrate(self, model: nn.Module, tokens: Tensor, progress: Progress = no_progress) -> Calibration:
        """Find c and the thresholds on the first `max_tokens` of token blocks ``[count, block]``.

        Best on a float32 model: a loss in bfloat16 is too coarse for 1 %. Facts: p, c, perplexity, ratios.

        Raises:
            InputError: `tokens` is not an integer matrix of blocks of at least two.
            ModelError: no causal language model, or no MLPs that are known.
            CalibrationError: something is not finite, or the model trains.
        """
        real_rows(tokens)
        length = min(tokens.shape[1], self.max_tokens)
        used = tokens[: max(1, self.max_tokens // length), :length]
        if self.share is None:
            found = ppl_p_sparsity(
                model, used, self.p, tolerance=self.tolerance, candidates=self.candidates, progress=progress
            )
        else:
            found = sparsity_at_share(
                model, used, self.share, tolerance=self.tolerance, candidates=self.candidates, progress=progress
            )
        return calibration_of(model, found, p=self.p if self.share is None else None, tokens=used.numel())

    def neuron_policy(self, model: nn.Module, calibration: Calibration | None) -> NeuronPolicy:
        """Fixed thresholds on the products.

        Raises:
            CalibrationError: none, of another model, or thresholds that don't fit.
        """
        calibration = self.require(calibration)
        calibration.check(fingerprint(model))
        device, rules = next(model.parameters()).device, []
        for view in mlp_views(model):
            threshold = calibration.tensors.get(f"threshold.{view.index}")
            if threshold is None or list(threshold.shape) != [view.neurons] or bool((threshold < 0).any()):
                raise CalibrationError(
                    f"sparsing-law: the calibration has no {view.neurons} thresholds for MLP {view.index}: calibrate again"
                )
            rules.append(NeuronRule(threshold=threshold.to(device), on="product"))
        return FixedRules(rules)


def calibration_of(model: nn.Module, found: Measurement, **facts: Any) -> Calibration:
    """A measurement as the calibration of `SparsingLaw`; `facts` are added to its own."""
    thresholds = {f"threshold.{i}": _threshold(rule).cpu() for i, rule in enumerate(found.rules)}
    return Calibration(
        "sparsing-law",
        fingerprint(model),
        {"epsilon": torch.tensor(found.layer_eps), **thresholds},
        {
            "cett": found.cett,
            "ppl": found.ppl,
            "ppl_ratio": found.run.ppl_ratio,
            "activation_ratio": found.run.ratio,
            "activation_ratio_by_layer": list(found.run.kept),
            "activation_ratio_dense_by_layer": found.activation_ratio.mean(-1).tolist(),
            **facts,
        },
    )


def apply_neuron_thresholds(model: nn.Module, found: Measurement) -> ActivationHandle:
    """Put a measurement's thresholds on the model it was made on, until the handle's end."""
    return SparsingLaw().attach(model, calibration_of(model, found))


def _threshold(rule: NeuronRule) -> Tensor:
    assert rule.threshold is not None
    return rule.threshold
