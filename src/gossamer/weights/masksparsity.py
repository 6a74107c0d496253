"""MaskSparsity (Jiang et al., 2022): first which channels go, then only their batch-norm scales are driven to zero.

    dense ──global L1──> scales γ ──threshold, votes──> mask
    dense ──L1 on the scales of masked channels only──> cut ──fine-tuning──> small dense network

    ∂γ += λ · sign(γ) · (1 − keep)          between the backward pass and the step

Network slimming is the first line with keep = 0 everywhere: it shrinks what stays as well. Here what stays trains freely.
How far a scale travels in a run is λ · Σ lr / (1 − momentum), so a short run needs a larger λ (`least_strength`).

Decisions: the masked run starts from the dense weights, as the release's README does (the paper doesn't say). Released code
leaves the shift β of a doomed channel alone, and the constant relu(β) is lost at the cut; here `shifts` pushes β too and the
cut absorbs what is left; set both False for the release's behaviour. "ratio" keeps the largest scales of each layer, "first"
its first channels, as the release's uniform masks. Not built: distributed training (add the same term on each rank after the
all-reduce), and the published recipes' data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gossamer.data.images import Images
from gossamer.errors import InputError, ModelError
from gossamer.models.channel_cut import costs, cut_channels
from gossamer.models.channel_graph import ChannelGraph, Norm, channel_graph
from gossamer.models.resnet import ImagePlan, accuracy, train_images
from gossamer.patterns import Masks
from gossamer.registry import register
from gossamer.weights.base import Applied, Progress, WeightMethod, copied, silent

Kind = Literal["l1", "l2", "smoothl1"]
Choice = Literal["th", "ot", "ratio", "first", "global"]


def sparsity_gradient(scale: Tensor, keep: Tensor, strength: float, kind: Kind = "l1", lr: float = 0.0) -> Tensor:
    """What is added to the gradient of γ ``[channels]``: λ·sign(γ), λ·γ, or λ·γ below lr·λ and λ·sign(γ) above; 0 where kept.

    >>> sparsity_gradient(torch.tensor([-2.0, 0.5]), torch.tensor([False, True]), 0.1).tolist()
    [-0.10000000149011612, 0.0]
    """
    pull = scale if kind == "l2" else scale.sign()
    if kind == "smoothl1":
        pull = torch.where(scale.abs() < lr * strength, scale, pull)
    return (strength * pull).masked_fill(keep, 0)


def energy_threshold(scale: Tensor, percent: float = 1e-4, silent: float = 1e-3) -> float:
    """The "OT" threshold on |γ|: what lies below holds at most `percent` of Σγ²; all lies below if max |γ| < `silent`.

    It is put between the last scale that still fits and the next one; of equal scales all stay or none.

    >>> round(energy_threshold(torch.tensor([3.0, 0.01, 4.0])), 3)
    1.505
    """
    size = scale.detach().abs().double().sort().values
    if float(size[-1]) < silent:
        return math.inf
    below = int((size.square().cumsum(0) <= percent * size.square().sum()).sum())
    while below and size[below - 1] == size[below]:  # equal scales stay together
        below -= 1
    return float(size[0]) / 2 if below == 0 else float(size[below - 1] + size[below]) / 2


def with_least(keep: Tensor, scale: Tensor, least: int) -> Tensor:
    """At least so many channels kept: those of the largest |γ| (the earlier of equal ones)."""
    if int(keep.sum()) >= min(least, len(keep)):
        return keep
    order = scale.detach().abs().sort(descending=True, stable=True).indices
    return torch.zeros_like(keep).index_fill_(0, order[:least], True)


def group_vote(prune: Sequence[Tensor]) -> Tensor:
    """Which channels ``[channels]`` a group prunes, from what each member wants to.

    A channel has as many votes as members that want to prune it. Of the sets {votes ≥ i}, i = members … 1, the first that is no
    smaller than the least wish of a member.

    >>> group_vote([torch.tensor(w).bool() for w in ([1, 1, 0], [0, 1, 1], [0, 1, 0])]).tolist()
    [False, True, False]
    """
    votes = torch.stack(list(prune)).sum(0)
    least = min(int(p.sum()) for p in prune)
    return next(votes >= i for i in range(len(prune), 0, -1) if int((votes >= i).sum()) >= least)


def bn_mask(
    model: nn.Module,
    graph: ChannelGraph,
    method: Choice = "th",
    *,
    th: float = 0.01,
    percent: float = 1e-4,
    ratio: float = 0.5,
    min_channels: int = 1,
) -> Masks:
    """Which channels stay, by the name of each norm's scale; norms whose outputs are added get one mask by vote.

    Args:
        method: "th": |γ| > th; "ot": `energy_threshold`; "ratio": the share `ratio` of largest |γ| of each norm; "first": its
            first channels; "global": the share `ratio` of largest |γ| of all norms together (network slimming).
        min_channels: kept of each group at least.

    Raises:
        InputError: settings out of range, or scales that are not finite.
        ModelError: the graph is of another model.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 1, 1))
    >>> net[1].weight.data = torch.tensor([1.0, 0.001])
    >>> bn_mask(net, channel_graph(net, torch.zeros(1, 1, 2, 2)))["1.weight"].tolist()
    [True, False]
    """
    if not 0 < ratio <= 1 or not 0 <= percent < 1 or not th >= 0 or min_channels < 1:
        raise InputError(
            f"bn_mask: ratio in (0, 1], percent in [0, 1), th from 0, min_channels from 1; got {ratio}, {percent}, {th}, "
            f"{min_channels}"
        )
    scales = bn_scales(model, graph)
    overall = torch.cat(list(scales.values())).abs().sort(descending=True).values
    bar = float(overall[max(1, round(ratio * len(overall))) - 1])

    def keeps(scale: Tensor) -> Tensor:
        count = max(1, round(ratio * len(scale)))
        if method == "first":
            return torch.arange(len(scale)) < count
        if method == "ratio":
            return with_least(torch.zeros(len(scale), dtype=torch.bool), scale, count)
        if method == "global":
            return scale.abs() >= bar
        return scale.abs() > (th if method == "th" else energy_threshold(scale, percent))

    masks: dict[str, Tensor] = {}
    for group in graph.groups:
        members = [scales[name] for name in group.norms]
        wishes = [with_least(keeps(scale), scale, min_channels) for scale in members]
        keep = ~group_vote([~wish for wish in wishes])
        keep = with_least(keep, torch.stack(members).abs().sum(0), min_channels)
        masks.update({f"{name}.weight": keep for name in group.norms})
    return Masks(masks)


def bn_scales(model: nn.Module, graph: ChannelGraph) -> dict[str, Tensor]:
    """γ ``[channels]`` of every norm of the graph's groups, on the CPU, by module name.

    Raises:
        InputError: not finite.
        ModelError: the graph is of another model.
    """
    modules = dict(model.named_modules())
    scales = {}
    for group in graph.groups:
        for name in group.norms:
            norm = modules.get(name)
            if not isinstance(norm, Norm) or norm.num_features != group.channels:
                raise ModelError(
                    f"this channel graph is of another model: {name} is no norm of {group.channels} channels"
                )
            scales[name] = norm.weight.detach().float().cpu()
            if not bool(scales[name].isfinite().all()):
                raise InputError(
                    f"the scales of {name} are not finite: the training diverged, or the weights are damaged"
                )
    return scales


def least_strength(travel: float, distance: float = 1.0) -> float:
    """The λ that takes a scale of size `distance` to zero in a run of this `ImagePlan.travel`, if nothing pulls it back.

    >>> round(least_strength(ImagePlan(epochs=10, lr=0.1, batch=64).travel(1024)), 4)  # 160 steps, mean lr 0.05
    0.0124
    """
    return distance / travel


class MaskedBNSparsity:
    """The term of the masked training: call `add_grad` after ``loss.backward()`` (after unscaling, before clipping).

    Args:
        masks: True keeps, by the name of each norm's scale; all False is network slimming, all True changes nothing.
        lam: λ.
        kind: l1, l2 or smoothl1.
        lr: for smoothl1.
        shifts: push the shift β of the doomed channels as well.

    Raises:
        ModelError: the masks are of another model.
        InputError: a strength that is negative or not finite.

    >>> norm = nn.BatchNorm1d(2)
    >>> regulariser = MaskedBNSparsity(norm, Masks({"weight": torch.tensor([True, False])}), lam=0.1)
    >>> norm.weight.grad = torch.zeros(2)
    >>> regulariser.add_grad(), norm.weight.grad.tolist()
    (0.1, [0.0, 0.10000000149011612])
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masks,
        lam: float = 5e-4,
        kind: Kind = "l1",
        lr: float = 0.1,
        shifts: bool = False,
    ) -> None:
        if not (math.isfinite(lam) and lam >= 0):
            raise InputError(f"the strength of the sparsity term is a number from 0, got {lam}")
        self.lam, self.kind, self.lr = lam, kind, lr
        self._terms: list[tuple[nn.Parameter, Tensor]] = list(masks.parameters(model))
        if shifts:
            names = [name.removesuffix("weight") + "bias" for name in masks]
            self._terms += list(Masks(dict(zip(names, masks.values(), strict=True))).parameters(model))

    @torch.no_grad()
    def add_grad(self) -> float:
        """Add the term to the gradients of the doomed scales (frozen ones are passed over); returns λ Σ |γ| of them."""
        total = 0.0
        for parameter, keep in self._terms:
            if parameter.grad is None:
                continue
            parameter.grad[~keep] += sparsity_gradient(parameter, keep, self.lam, self.kind, self.lr)[~keep]
            total += self.lam * float(parameter[~keep].abs().sum())
        return total


def scale_gap(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, dict[str, list[float]]]:
    """|γ| of pruned and kept channels of each norm: ``[min, median, max]``, empty where there are none.

    A clear gap around the threshold (pruned ≤ 1e-3, kept ≥ 0.1) says that the cut is safe; look at it while a run goes on,
    from the `progress` of `train_images`, say.
    """
    gaps: dict[str, dict[str, list[float]]] = {}
    for name, (parameter, keep) in zip(masks, Masks(masks).parameters(model), strict=True):
        parts = {"pruned": parameter.detach().abs()[~keep], "kept": parameter.detach().abs()[keep]}
        gaps[name] = {k: [float(f) for f in (v.min(), v.median(), v.max())] if len(v) else [] for k, v in parts.items()}
    return gaps


@register("masksparsity", slot="weights", family="weights", needs=["training", "images"])
class MaskSparsity(WeightMethod):
    """Shrink a convolutional network: choose the channels, drive only those to zero, cut them out, fine-tune.

    Use it for networks with batch norms (ResNets, VGGs, MobileNets) and labelled images. The result is a smaller network of
    ordinary dense layers: no kernel is needed, and conv FLOPs fall by (1 − a)(1 − b) where shares a and b of its inputs and
    outputs are gone. It costs two more trainings (one to find the mask, one under it), and a short fine-tuning. Save it with
    `gossamer.models.channel_cut.save_cut`: plain safetensors and a table of widths, which load without Gossamer.

    Paper: Pruning-aware Sparse Regularization for Network Pruning, Machine Intelligence Research 2023, arXiv 2201.06776.

    >>> from gossamer.models.resnet import small_resnet
    >>> from gossamer.data.images import digits
    >>> applied = MaskSparsity(choose="ratio", epochs=1, finetune_epochs=0).apply(small_resnet((4, 8)), digits(100))
    >>> applied.facts["parameters"]["after"] < 0.5 * applied.facts["parameters"]["before"]
    True
    """

    choose: Choice = Field("th", description="how the mask is read off the scales: th, ot, ratio, first or global")
    th: float = Field(0.01, ge=0, description="scales up to here are pruned (choose = th)")
    percent: float = Field(1e-4, ge=0, lt=1, description="share of the energy Σγ² that may go (choose = ot)")
    ratio: float = Field(0.5, gt=0, le=1, description="share of channels to keep (choose = ratio, first or global)")
    min_channels: int = Field(1, ge=1, description="kept of each layer at least")
    lam: float | None = Field(
        None,
        gt=0,
        description="λ; None: the paper's 5e-4, or 8 times what a free scale needs in a run of this length, if more",
    )
    kind: Kind = Field("l1", description="of the term: l1, l2 or smoothl1")
    shifts: bool = Field(True, description="push the shifts of doomed channels to zero as well (released code: no)")
    absorb: bool = Field(True, description="put the constants that shifts leave into the readers (released code: no)")
    epochs: int = Field(100, ge=1, description="of the global and of the masked sparsity training, each")
    finetune_epochs: int = Field(20, ge=0, description="after the cut")
    lr: float = Field(0.1, gt=0, description="learning rate of the sparsity trainings at first")
    finetune_lr: float = Field(0.01, gt=0, description="learning rate of the fine-tuning at first")
    milestones: tuple[int, ...] = Field(
        (), description="epochs at which lr falls to a tenth (paper: 30, 60, 90); () cosine"
    )
    batch: int = Field(64, ge=2, description="images a step")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD (Nesterov)")
    weight_decay: float = Field(1e-4, ge=0, description="of all parameters, kept or not")
    seed: int = Field(0, ge=0, description="of the order of the images")

    @model_validator(mode="after")
    def _sorted(self) -> MaskSparsity:
        if any(b <= a for a, b in zip((0, *self.milestones), self.milestones, strict=False)):
            raise ValueError("milestones are epochs in rising order")
        return self

    def plan(self) -> ImagePlan:
        """Of one sparsity training."""
        return ImagePlan(self.epochs, self.lr, self.batch, self.momentum, self.weight_decay, self.milestones, self.seed)

    def strength(self, images: int) -> float:
        """λ on so many training images."""
        return self.lam if self.lam is not None else max(5e-4, 8 * least_strength(self.plan().travel(images)))

    def regularise(
        self, model: nn.Module, masks: Masks, data: Images, progress: Progress = silent
    ) -> list[dict[str, float]]:
        """One training with the term on what `masks` prune, in place; the curve."""
        term = MaskedBNSparsity(model, masks, self.strength(len(data.train_images)), self.kind, self.lr, self.shifts)
        return train_images(
            model, data.train_images, data.train_labels, self.plan(), before_step=term.add_grad, progress=progress
        ).curve

    def find(self, model: nn.Module, data: Images, progress: Progress = silent) -> Masks:
        """The mask: of a copy of the model after training with the term on all scales."""
        graph = channel_graph(model, data.train_images[:2])
        everything = Masks(
            {f"{name}.weight": torch.zeros(g.channels, dtype=torch.bool) for g in graph.groups for name in g.norms}
        )
        found = copied(model)
        self.regularise(found, everything, data, progress)
        return bn_mask(
            found,
            graph,
            self.choose,
            th=self.th,
            percent=self.percent,
            ratio=self.ratio,
            min_channels=self.min_channels,
        )

    def apply(
        self,
        model: nn.Module,
        tokens: Tensor | Images | None = None,
        progress: Progress = silent,
        masks: Masks | None = None,
    ) -> Applied:
        """Mask, masked training, cut and fine-tuning of a trained dense classifier; another, smaller model comes back.

        Args:
            model: gives logits for images; it stays as it is.
            tokens: images and labels, as `gossamer.data.images.Images`.
            masks: from any other source, in place of the global training.

        Raises:
            InputError: no images, or images that are not finite.
            ModelError: the model cannot be traced or has no channels that can be cut; masks of another model.
        """
        if not isinstance(tokens, Images):
            raise InputError(f"{self.slug} trains on labelled images: give gossamer.data.images.Images")
        data = tokens
        if not bool(data.train_images.isfinite().all()):
            raise InputError(f"{self.slug}: the images are not finite")
        example = data.train_images[:2]
        graph = channel_graph(model, example)
        if masks is None:
            masks = self.find(model, data, lambda what, done, total: progress("global sparsity", done, total))
        trained = copied(model)
        curve = self.regularise(
            trained, masks, data, lambda what, done, total: progress("masked sparsity", done, total)
        )
        rest = data.train_images[: 4 * self.batch] if self.absorb else None
        small = cut_channels(trained, graph, masks, rest).eval()
        facts: dict[str, Any] = {
            "lambda": self.strength(len(data.train_images)),
            "accuracy": {"dense": accuracy(model, data.test_images, data.test_labels)},
            "curve": curve,
            "scales": scale_gap(trained, masks),
            "channels": {name: [int(mask.sum()), len(mask)] for name, mask in masks.items()},
            "left_whole": list(graph.left_whole),
        }
        facts["accuracy"]["before_cut"] = accuracy(trained, data.test_images, data.test_labels)
        facts["accuracy"]["after_cut"] = accuracy(small, data.test_images, data.test_labels)
        if self.finetune_epochs:
            plan = ImagePlan(
                self.finetune_epochs,
                self.finetune_lr,
                self.batch,
                self.momentum,
                self.weight_decay,
                seed=self.seed,
            )
            facts["finetune_curve"] = train_images(
                small, data.train_images, data.train_labels, plan, progress=progress
            ).curve
            facts["accuracy"]["finetuned"] = accuracy(small, data.test_images, data.test_labels)
        before, after = costs(model, example), costs(small, example)
        facts["parameters"] = {"before": before.params, "after": after.params}
        facts["flops"] = {"before": before.flops, "after": after.flops}
        return Applied(small, facts)
