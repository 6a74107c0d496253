"""Sparse Model Soups on a small CNN: is the average of retrained copies better than the copies, at exactly their sparsity?

Setting of the system's card: three convolutions (24, 48, 48 channels) with batch norms on drawn 12 x 12 shapes of ten classes
under noise of 0.9, 2,500 to train and 4,000 to test. Dense: 10 epochs of SGD from 0.1. Then three phases to 95 %: SMS with three
copies of 4 epochs (LLR), IMP (one copy), IMP of three times the length. Three seeds. Two poolings between the convolutions keep
it to minutes; the card's accuracy levels are therefore not these.

Sizes and thresholds were set before any run. Test accuracy decides nothing inside a run: the soups are uniform. SMS above IMP
is not asked for: at this size it is within noise, as the card says.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.data.images import shapes
from gossamer.models import class_loss, train
from gossamer.reproductions.base import Outcome, Progress, Reproduction
from gossamer.weights.sparse_model_soups import SparseModelSoups
from gossamer.weights.sparse_model_soups_merge import classifier_report
from gossamer.weights.sparse_model_soups_retrain import Retraining, retrainer, shuffled_batches

SEEDS = (0, 1, 2)
TRAIN, TEST, NOISE, HARDER, BATCH = 2500, 4000, 0.9, 1.1, 64
EPOCH, DENSE, RETRAIN = 40, 10, 4
LR, LOW, DECAY = 0.1, 1e-3, 5e-4
SMS = SparseModelSoups(
    sparsity=0.95,
    phases=3,
    copies=3,
    steps=RETRAIN * EPOCH,
    total_steps=DENSE * EPOCH,
    lr=LR,
    min_lr=LOW,
    weight_decay=DECAY,
)
ARMS = {
    "SMS": SMS,
    "IMP": SMS.model_copy(update={"copies": 1}),
    "IMP x3": SMS.model_copy(update={"copies": 1, "steps": 3 * SMS.steps}),
}
LIMITS = {"gain": 0.003}


def small_cnn(seed: int) -> nn.Sequential:
    """Three convolutions with batch norms, for 12 x 12 images of ten classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 24), (24, 48), (48, 48)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if outputs == 24 or inputs == 24 else []
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))


@torch.no_grad()
def _report(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    return classifier_report(torch.cat([model(part).softmax(-1) for part in images.split(500)]), labels)


def one_seed(seed: int, progress: Progress) -> dict[str, Any]:
    """All numbers of one seed; accuracies are shares."""
    images, labels = shapes(TRAIN, 10 * seed + 1, noise=NOISE)
    test = shapes(TEST, 10 * seed + 2, noise=NOISE)
    harder = shapes(TEST, 10 * seed + 3, noise=HARDER)
    dense = small_cnn(seed)
    plan = Retraining(DENSE * EPOCH, lr=LR, low=LOW, schedule="CLR", weight_decay=DECAY)
    optimizer = torch.optim.SGD(dense.parameters(), lr=LR, momentum=0.9, weight_decay=DECAY, nesterov=True)
    batches = shuffled_batches(images, labels, BATCH, plan.steps, seed)
    train(dense, batches, plan, loss=class_loss, optimizer=optimizer, progress=progress)
    found: dict[str, Any] = {"dense": _report(dense, *test), "dense_harder": _report(dense, *harder), "arms": {}}
    for name, settings in ARMS.items():
        method = settings.model_copy(update={"seed": seed})
        model = copy.deepcopy(dense)
        retrain = retrainer(lambda s, steps: shuffled_batches(images, labels, BATCH, steps, s), method.plan)
        applied = method.run(
            model,
            retrain,
            score=lambda m: _report(m, *test)["accuracy"],
            inputs=images.split(125),
            progress=progress,
        )
        found["arms"][name] = {
            "phases": applied.facts["phases"],
            "zeros": sum(
                int((p == 0).sum()) for n, p in model.named_parameters() if applied.masks and n in applied.masks
            ),
            "prunable": applied.facts["prunable"],
            "test": _report(model, *test),
            "harder": _report(model, *harder),
        }
    return found


def judge(raw: dict[str, Any]) -> Outcome:
    """The verdict by `LIMITS`."""
    runs = list(raw.values())
    phases = range(SMS.phases)
    gains = [
        [run["arms"]["SMS"]["phases"][p]["soup"] - run["arms"]["SMS"]["phases"][p]["mean"] for p in phases]
        for run in runs
    ]
    mean_gain = [sum(gain[p] for gain in gains) / len(gains) for p in phases]
    final = {name: [run["arms"][name]["test"]["accuracy"] for run in runs] for name in ARMS}
    mean = {name: sum(values) / len(values) for name, values in final.items()}
    harder = {name: sum(run["arms"][name]["harder"]["accuracy"] for run in runs) / len(runs) for name in ARMS}
    exact = all(arm["zeros"] >= round(SMS.sparsity * arm["prunable"]) for run in runs for arm in run["arms"].values())
    checks = {
        "soups beat their mean candidate": min(mean_gain) >= LIMITS["gain"],
        "SMS beats IMP x3": mean["SMS"] > mean["IMP x3"],
        "sparsity is exact": exact,
    }
    failed = [name for name, held in checks.items() if not held]
    shown = " / ".join(f"{100 * gain:+.2f}" for gain in mean_gain)
    positive = sum(gain > 0 for seed in gains for gain in seed)
    return Outcome(
        verdict="reproduced" if not failed else "direction only" if min(mean_gain) > 0 and exact else "not reproduced",
        measured=(
            f"soup over mean candidate {shown} points after phases 1 / 2 / 3 ({positive} of {len(gains) * SMS.phases} positive); "
            f"at 95 %: "
            + ", ".join(f"{name} {100 * value:.1f}" for name, value in mean.items())
            + "; under more noise: "
            + ", ".join(f"{name} {100 * value:.1f}" for name, value in harder.items())
        ),
        raw={"seeds": raw, "gains": gains, "final": final, "checks": checks},
        explanation=f"failed: {', '.join(failed)}" if failed else "",
    )


def _experiment(progress: Progress) -> Outcome:
    return judge({str(seed): one_seed(seed, progress) for seed in SEEDS})


REPRODUCTION = Reproduction(
    slug="sparse-model-soups",
    claim="the average of copies retrained from one pruned model beats them and longer retraining, at the same sparsity",
    setting="3-conv CNN with batch norms on noisy drawn shapes (10 classes), 3 phases to 95 %, 3 copies of 4 epochs, 3 seeds",
    threshold=(
        "soup - mean candidate >= 0.3 points in each phase, averaged over seeds; SMS above IMP x3 on average at 95 %; the soup has "
        "all the zeros of its mask"
    ),
    seeds=SEEDS,
    experiment=_experiment,
)
