"""MaskSparsity on noisy digits: does a network keep its accuracy when only the doomed scales are driven to zero?

The card's setting: a dense network, then L1 on all scales to find a mask of half the channels of each layer, then from the same
dense weights, with as many epochs and the same strength, (a) L1 on the doomed scales alone and (b) on all of them; both are cut
by the same mask and not fine-tuned. It is run for the card's CNN of three convolutions and for a small residual network,
whose added norms vote: each there wants to lose a quarter of its channels, and the vote makes it more. Digits carry noise
(severity 5 of 5), so that there is accuracy to lose. Strength, epochs and the quarter were chosen on seeds 100 and 101: half
the strength leaves scales of 0.05 and more, and a half instead of a quarter leaves the voted layers of the ResNet so narrow
that their doomed channels fight back. At this strength global L1 can kill the ResNet; its mask is then by index.

Beside it: the cut as in the released code, where shifts are neither pushed nor absorbed, the same with absorption, and the cut
architecture trained from scratch for as many epochs as dense and masked training have together. They decide nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.data.images import Images, add_noise, digits
from gossamer.models.channel_cut import costs, cut_channels
from gossamer.models.channel_graph import ChannelGraph, channel_graph
from gossamer.models.resnet import ImagePlan, accuracy, small_resnet, train_images
from gossamer.patterns import Masks
from gossamer.reproductions.base import Outcome, Progress, Reproduction
from gossamer.weights.base import copied
from gossamer.weights.masksparsity import MaskSparsity
from gossamer.weights.masksparsity_masks import bn_mask, scale_gap

SEEDS, EPOCHS, SEVERITY = (0, 1, 2), 12, 5
THRESHOLDS = {"pruned": 0.02, "kept": 1.10, "drop": 0.01, "ahead": 0.05}
METHOD = MaskSparsity(choose="ratio", epochs=EPOCHS)
#: Share of its channels that each norm wants to keep.
RATIOS = {"three convolutions": 0.5, "ResNet": 0.75}


def three_convolutions(seed: int) -> nn.Module:
    """The card's 24–48–48 channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU()),
            *(nn.Conv2d(24, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(48, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
            *(nn.Flatten(), nn.Linear(48, 10)),
        )


NETS: dict[str, Any] = {
    "three convolutions": three_convolutions,
    "ResNet": lambda seed: small_resnet((16, 32), 1, seed=seed),
}


def noisy(seed: int) -> Images:
    """Digits with noise, another draw for each seed."""
    data = digits(seed=seed)
    return Images(
        add_noise(data.train_images, "gaussian", SEVERITY, seed),
        data.train_labels,
        add_noise(data.test_images, "gaussian", SEVERITY, seed + 1),
        data.test_labels,
        data.classes,
    )


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def _scales(model: nn.Module, masks: Masks) -> dict[str, Any]:
    sizes: dict[str, list[Tensor]] = {"pruned": [], "kept": []}
    for parameter, keep in masks.parameters(model):
        sizes["pruned"].append(parameter.detach().abs()[~keep])
        sizes["kept"].append(parameter.detach().abs()[keep])
    means: dict[str, Any] = {f"mean_{k}": float(torch.cat(v).mean()) for k, v in sizes.items()}
    return {**means, "largest_pruned": float(torch.cat(sizes["pruned"]).max()), "by_norm": scale_gap(model, masks)}


def one(build: Any, seed: int, method: MaskSparsity) -> dict[str, Any]:
    """All arms of one network and seed."""
    data, dense = noisy(seed), build(seed)
    method = method.model_copy(update={"seed": seed})
    plan = ImagePlan(method.epochs, seed=seed)
    train_images(dense, data.train_images, data.train_labels, plan)
    example = data.train_images[:2]
    graph: ChannelGraph = channel_graph(dense, example)
    everything = Masks({f"{n}.weight": torch.zeros(g.channels) for g in graph.groups for n in g.norms})

    def right(model: nn.Module) -> float:
        return accuracy(model, data.test_images, data.test_labels)

    def regularised(masks: Masks, how: MaskSparsity) -> tuple[nn.Module, list[dict[str, float]]]:
        model = copied(dense)
        return model, how.regularise(model, masks, data)

    everywhere, curve_b = regularised(everything, method)
    masks = bn_mask(everywhere, graph, "ratio", ratio=method.ratio)
    masked, curve_a = regularised(masks, method)
    as_released, _ = regularised(masks, method.model_copy(update={"shifts": False}))
    some = data.train_images[:256]
    cut = cut_channels(masked, graph, masks, some)
    before, after = costs(dense, example), costs(cut, example)
    scratch = cut_channels(build(seed + 1000), graph, masks)  # the cut architecture, untrained
    train_images(scratch, data.train_images, data.train_labels, ImagePlan(2 * method.epochs, seed=seed))
    return {
        "lambda": method.strength(len(data.train_images)),
        "dense": right(dense),
        "masked": {"before": right(masked), "after": right(cut), **_scales(masked, masks), "curve": curve_a},
        "global": {
            "before": right(everywhere),
            "after": right(cut_channels(everywhere, graph, masks, some)),
            **_scales(everywhere, masks),
            "curve": curve_b,
        },
        "shifts_left_alone": {
            "before": right(as_released),
            "after": right(cut_channels(as_released, graph, masks)),
            "after_absorbed": right(cut_channels(as_released, graph, masks, some)),
        },
        "scratch": right(scratch),
        "flops": [before.flops, after.flops],
        "parameters": [before.params, after.params],
    }


def _experiment(progress: Progress) -> Outcome:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in NETS}
    checks, parts = {}, []
    for index, (name, build) in enumerate(NETS.items()):
        for number, seed in enumerate(SEEDS):
            progress(f"{name}, seed {seed}", index * len(SEEDS) + number, len(NETS) * len(SEEDS))
            runs[name].append(one(build, seed, METHOD.model_copy(update={"ratio": RATIOS[name]})))
        of = runs[name]
        a_before, a_after, b_before, b_after = (
            _mean([r[arm][when] for r in of]) for arm in ("masked", "global") for when in ("before", "after")
        )
        pruned = _mean([r["masked"]["mean_pruned"] for r in of])
        kept_a, kept_b = (_mean([r[arm]["mean_kept"] for r in of]) for arm in ("masked", "global"))
        checks[name] = {
            "pruned": pruned <= THRESHOLDS["pruned"],
            "kept": kept_a >= THRESHOLDS["kept"] * kept_b,
            "drop": a_before - a_after <= THRESHOLDS["drop"],
            "ahead": a_before >= b_before + THRESHOLDS["ahead"],
        }
        left = _mean([r["shifts_left_alone"]["before"] - r["shifts_left_alone"]["after"] for r in of])
        parts.append(
            f"{name}: dense {_mean([r['dense'] for r in of]):.3f}, masked {a_before:.3f} and {a_after:.3f} after the cut "
            f"(released code's cut would lose {left:.3f}), global {b_before:.3f} and {b_after:.3f}, from scratch "
            f"{_mean([r['scratch'] for r in of]):.3f}; mean scale of pruned {pruned:.4f}, of kept {kept_a:.2f} against "
            f"{kept_b:.2f}; {1 - of[0]['flops'][1] / of[0]['flops'][0]:.0%} fewer FLOPs"
        )
    failed = [f"{name}: {check}" for name, of in checks.items() for check, held in of.items() if not held]
    direction = all(of["kept"] and of["pruned"] for of in checks.values())
    return Outcome(
        verdict="reproduced" if not failed else "direction only" if direction else "not reproduced",
        measured="; ".join(parts),
        raw={"runs": runs, "checks": checks},
        explanation=f"failed: {', '.join(failed)}" if failed else "",
    )


REPRODUCTION = Reproduction(
    slug="masksparsity",
    claim="ResNet-110 on CIFAR-10: 63 % fewer FLOPs without loss; the kept channels stay strong and the cut costs nothing",
    setting=(
        f"a CNN of three convolutions and a small ResNet on noisy 8 x 8 digits, {EPOCHS} epochs of each training, half of the "
        "channels (ResNet: a quarter and the vote), no fine-tuning, 3 seeds"
    ),
    threshold=(
        "for both networks, means over seeds: |scale| of pruned channels <= 0.02; of kept ones at least 1.1 times global L1's; "
        "at most 1 point lost at the cut; before the cut at least 5 points above global L1"
    ),
    seeds=SEEDS,
    experiment=_experiment,
)
