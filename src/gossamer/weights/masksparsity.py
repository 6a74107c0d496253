"""MaskSparsity as a method: mask, masked training, cut and fine-tuning of a classifier. Its formulas: `masksparsity_masks`."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gossamer.data.images import Images
from gossamer.errors import InputError
from gossamer.models.channel_cut import costs, cut_channels
from gossamer.models.channel_graph import channel_graph
from gossamer.models.resnet import ImagePlan, accuracy, train_images
from gossamer.patterns import Masks
from gossamer.registry import register
from gossamer.weights.base import Applied, Progress, WeightMethod, copied, silent
from gossamer.weights.masksparsity_masks import Choice, Kind, MaskedBNSparsity, bn_mask, least_strength, scale_gap


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
