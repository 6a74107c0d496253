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
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.errors import InputError, ModelError
from gossamer.models.channel_graph import ChannelGraph, Norm
from gossamer.patterns import Masks

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
    >>> from gossamer.models.channel_graph import channel_graph
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

    >>> from gossamer.models.resnet import ImagePlan
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
