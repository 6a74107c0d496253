"""Lazy Neuron in minutes: a Top-k resists wrong labels, and neurons fall silent while a model learns.

**Wrong labels.** A small vision transformer (16 patches of 2 x 2, width 32, 2 heads, 2 blocks, MLP 256, ReLU, mean pooling)
learns 900 of scikit-learn's digits, of which 40 % have a label drawn from all ten, and is tested on 897 clean ones: dense,
Top-32 and Top-8, the recipe unchanged (Adam 1e-3, batch 60, 70 epochs).

What was chosen on seeds 100 to 105, none of which is reported: blocks with the norms after the sums, and 70 epochs, since at
60 the dense arm fitted 68 to 78 % of its noisy labels. With the norms first, as in ViT, a Top-8 memorises as fast as the
dense net at this size, and had nothing to gain (-4 points at 40 epochs, six seeds); that arm is run and written down too,
for the first seeds, and decides nothing.

**Emergence.** A plain ReLU byte model (3 layers, width 96, MLP 512, context 96) learns Python's library for 800 steps at a
learning rate of 2e-3; percent nonzero is counted on held-out text.

Written down without a threshold: noisy images and calibration (the card: they need scale), the causes on digits (random
labels, random images, fresh images), and the sign of the first gradients.
"""

from __future__ import annotations

from typing import Any

from gossamer.activations.lazy_studies import (
    CAUSES,
    byte_emergence,
    cause_study,
    gradient_signs,
    robustness,
    two_layer_gradients,
)
from gossamer.data.bytes import byte_corpus
from gossamer.data.images import digits
from gossamer.models.training import Plan
from gossamer.models.vit import small_vit
from gossamer.reproductions.base import Outcome, Progress, Reproduction

SEEDS = (0, 1, 2, 3, 4, 5)
#: Of these seeds also the arm with the norms first, and the emergence.
FEW = SEEDS[:2]
NOISE, EPOCHS, ARMS = 0.4, 70, {"dense": None, "top32": 32, "top8": 8}
STEPS, RATE, BYTES = 800, 2e-3, 2_000_000
THRESHOLDS = {"gain": 0.015, "fit": 0.7, "mean": 0.75, "deep": 0.65}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _label_noise(progress: Progress) -> dict[str, Any]:
    """Every arm's runs by seed; norms after the sums, and first."""
    data = digits()
    plan = [("norms_after", seed, name) for seed in SEEDS for name in ARMS]
    plan += [("norms_first", seed, name) for seed in FEW for name in ("dense", "top8")]
    runs: dict[str, dict[str, list[Any]]] = {}
    for index, (blocks, seed, name) in enumerate(plan):
        progress(f"{blocks} {name} seed {seed}", index, len(plan))
        first = blocks == "norms_first"
        run = robustness(data, ARMS[name], label_noise=NOISE, epochs=EPOCHS, seed=seed, norm_first=first)
        runs.setdefault(blocks, {}).setdefault(name, []).append(run)
    return runs


def _experiment(progress: Progress) -> Outcome:
    runs = _label_noise(progress)
    corpus, emerged = byte_corpus(BYTES), []
    for index, seed in enumerate(FEW):
        progress(f"emergence seed {seed}", index, len(FEW))
        emerged.append(byte_emergence(corpus, Plan(steps=STEPS, lr=RATE), seed=seed))
    causes = []
    for index, cause in enumerate(CAUSES):
        progress(f"cause: {cause}", index, len(CAUSES))
        causes.append(cause_study(digits(), cause, epochs=40, seed=SEEDS[0], norm_first=False))

    after = runs["norms_after"]
    means = {
        blocks: {
            name: {key: _mean([r[key] for r in arm]) for key in ("clean", "fit", "ece")} for name, arm in of.items()
        }
        for blocks, of in runs.items()
    }
    arms = means["norms_after"]
    gains = [a["clean"] - b["clean"] for a, b in zip(after["top8"], after["dense"], strict=True)]
    gain = _mean(gains)
    spread = (sum((g - gain) ** 2 for g in gains) / (len(gains) - 1)) ** 0.5 / len(gains) ** 0.5
    first, last = ([_mean([e.curve[place]["percents"][i] for e in emerged]) for i in range(3)] for place in (0, -1))
    left, deep = sum(last) / sum(first), [b / a for a, b in zip(first, last, strict=True)][1:]
    checks = {
        "top8_over_dense": gain >= THRESHOLDS["gain"],
        "dense_fits": arms["dense"]["fit"] > THRESHOLDS["fit"],
        "mean_share": left <= THRESHOLDS["mean"],
        "deep_shares": max(deep) <= THRESHOLDS["deep"],
    }
    failed = [name for name, held in checks.items() if not held]
    other = means["norms_first"]
    percents = " / ".join(f"{b:.0f}" for b in last)
    return Outcome(
        verdict="reproduced" if not failed else "direction only" if gain > 0 and left < 1 else "not reproduced",
        measured=(
            f"40 % wrong labels: dense {100 * arms['dense']['clean']:.1f} %, Top-32 {100 * arms['top32']['clean']:.1f}, "
            f"Top-8 {100 * arms['top8']['clean']:.1f} ({100 * gain:+.1f} ± {100 * spread:.1f}; with norms first "
            f"{100 * (other['top8']['clean'] - other['dense']['clean']):+.1f}); neurons that fire "
            f"{_mean(first):.0f} % → {percents} % by layer, {left:.2f} of the start"
        ),
        raw={
            "means": means,
            "gains": gains,
            "gain_standard_error": spread,
            "runs": runs,
            "emergence": [
                {
                    "seed": seed,
                    "curve": e.curve,
                    "train": e.train.summary() if e.train else None,
                    "held_out": e.held_out.summary() if e.held_out else None,
                }
                for seed, e in zip(FEW, emerged, strict=True)
            ],
            "shares_left": {"mean": left, "deep": deep},
            "causes": causes,
            "first_gradients": {
                "two_layers": {loss: two_layer_gradients(loss) for loss in ("cross_entropy", "squared")},
                "vit": gradient_signs(small_vit(norm_first=False), digits().train_images, digits().train_labels),
            },
            "checks": checks,
        },
        explanation=f"failed: {', '.join(failed)}" if failed else "",
    )


REPRODUCTION = Reproduction(
    slug="lazy-neuron",
    claim="neurons fall silent in training (T5 3 %, ViT 6 % nonzero); a Top-k is sturdier at 40 % wrong labels (+2.7 points)",
    setting="digits with 40 % of labels replaced, a small ViT dense and Top-k, 6 seeds; a ReLU byte model, 800 steps, 2 seeds",
    threshold=(
        "Top-8 ≥ dense + 1.5 points on clean tests, where dense fits > 70 % of the noisy labels; share of firing neurons "
        "≤ 0.75 of the start, each deep layer ≤ 0.65"
    ),
    seeds=SEEDS,
    experiment=_experiment,
)
