"""CFSP on SmolLM2: do block importances and relative weights choose better neurons than Wanda's score?

Setting of the system's card: 16 blocks of 512 tokens of prose to calibrate, no rounding of widths, no recovery, 10, 20 and 30 %
of the neurons cut; perplexity on 6 other blocks of the same text. One dense pass serves all. The released default ranks neurons
by activations alone (`norm_axis="column"`); "row" is the other reading.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gossamer.data import split, text, token_blocks
from gossamer.models import load
from gossamer.models.reshaped import linear_weight
from gossamer.reproductions.base import Outcome, Progress, Reproduction
from gossamer.reproductions.neuron_runs import read
from gossamer.weights.base import copied
from gossamer.weights.cfsp import block_shares, change, fine_score
from gossamer.weights.neuron_baselines import magnitude_score, wanda_score
from gossamer.weights.neurons import (
    NeuronFacts,
    cut_neurons,
    neuron_facts,
    rounded_width,
    top_neurons,
    views_of,
    width_facts,
)

SEED = 0
RATIOS = (0.1, 0.2, 0.3)
THRESHOLDS = {"gain": 0.02, "within": 0.05, "far_below": 10.0}

Score = Callable[[Any, NeuronFacts], Tensor]


def _fine(norm_axis: Any) -> Score:
    return lambda view, facts: fine_score(
        linear_weight(view.down), linear_weight(view.up), linear_weight(view.gate), facts.norm, norm_axis=norm_axis
    )


#: By name: (whether blocks get shares by importance, score).
METHODS: dict[str, tuple[bool, Score]] = {
    "uniform, activations": (False, _fine("column")),
    "cfsp released": (True, _fine("column")),
    "cfsp row": (True, _fine("row")),
    "uniform, row": (False, _fine("row")),
    "wanda-sp": (False, lambda view, facts: wanda_score(linear_weight(view.down), facts.norm)),
    "magnitude-sp": (False, lambda view, facts: magnitude_score(linear_weight(view.down))),
}


def _experiment(progress: Progress) -> Outcome:
    model, tokenizer, _ = load("smollm2")
    prose = text("prose")
    calibration = token_blocks(tokenizer, split(prose, "calibration"), 512, 16)
    evaluation = token_blocks(tokenizer, split(prose, "evaluation"), 512, 6, seed=SEED)
    dense = read(model, evaluation, None).perplexity
    found = neuron_facts(model, calibration, change, progress)
    importance = [facts.change for facts in found]
    views = views_of(model)
    widths = [view.neurons for view in views]
    parameters = sum(p.numel() for p in model.parameters())
    perplexity: dict[str, float] = {"dense": dense}
    cuts: dict[str, Any] = {}
    for name, (by_importance, score) in METHODS.items():
        scores = [score(view, facts) for view, facts in zip(views, found, strict=True)]
        for ratio in RATIOS:
            key = f"{name} {ratio:g}"
            progress(key, len(cuts), len(METHODS) * len(RATIOS))
            shares = block_shares(importance if by_importance else [0.0] * len(views), ratio)[0]
            kept = [
                top_neurons(s, rounded_width(n * share, n, 1))
                for s, n, share in zip(scores, widths, shares, strict=True)
            ]
            small = copied(model)
            cut_neurons(small, kept)
            perplexity[key] = read(small, evaluation, None).perplexity
            cuts[key] = width_facts(widths, small, parameters)
            del small
    p = {name: perplexity[f"{name} 0.2"] for name in METHODS}
    wanda = p["wanda-sp"]
    checks = {
        "row_gains": p["cfsp row"] <= (1 - THRESHOLDS["gain"]) * wanda,
        "uniform_near": p["uniform, activations"] <= (1 + THRESHOLDS["within"]) * wanda,
        "released_near": p["cfsp released"] <= (1 + THRESHOLDS["within"]) * wanda,
        "magnitude_far": all(
            THRESHOLDS["far_below"] * value < p["magnitude-sp"] for name, value in p.items() if name != "magnitude-sp"
        ),
    }
    failed = [name for name, held in checks.items() if not held]
    direction = p["cfsp row"] < wanda and checks["magnitude_far"]
    at = {r: perplexity[f"cfsp row {r:g}"] for r in RATIOS}
    return Outcome(
        verdict="reproduced" if not failed else "direction only" if direction else "not reproduced",
        measured=(
            f"perplexity {dense:.2f} dense; at 20 % {p['cfsp row']:.2f} by rows ({p['cfsp row'] / wanda - 1:+.1%} against "
            f"Wanda-SP's {wanda:.2f}), {p['cfsp released']:.2f} as released, {p['uniform, activations']:.2f} with equal widths, "
            f"{p['magnitude-sp']:.3g} by magnitude; by rows {at[0.1]:.2f} at 10 %, {at[0.3]:.2f} at 30 %"
        ),
        raw={"perplexity": perplexity, "importance": importance, "cuts": cuts, "checks": checks},
        explanation=f"failed: {', '.join(failed)}" if failed else "",
    )


REPRODUCTION = Reproduction(
    slug="cfsp",
    claim="better than Magnitude-SP, Wanda-SP and FLAP at every budget, from one forward pass",
    setting="SmolLM2-135M-Instruct, 30 MLPs of 1536 neurons, 16 x 512 tokens to calibrate, perplexity on 6 x 512; no recovery",
    threshold=(
        "at 20 %: allocation with row-relative scores at least 2 % below uniform Wanda-SP, the released default and uniform "
        "activation norms within 5 % of it, and all at least ten times below uniform weight norms"
    ),
    seeds=(SEED,),
    experiment=_experiment,
)
