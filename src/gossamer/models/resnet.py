"""Residual networks of the CIFAR kind for small images, and the SGD loop that trains an image classifier.

    model = small_resnet(widths=(16, 32, 64), blocks=1, classes=10)
    training = train_images(model, images, labels, ImagePlan(epochs=8, lr=0.1))

A ResNet-56 is ``small_resnet(blocks=9, channels=3)``, a ResNet-110 ``blocks=18`` (He et al., 2016), with 1×1 projections where
the width changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.errors import InputError
from gossamer.models.channel_graph import evaluating
from gossamer.models.training import Training


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norms, added to their input; ``[batch, in, h, w]`` to ``[batch, out, h', w']``."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """One block."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class SmallResNet(nn.Module):
    """Convolution, stages of residual blocks (each but the first halves height and width), mean, linear head."""

    def __init__(self, widths: Sequence[int], blocks: int, channels: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        layers, inputs = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(BasicBlock(inputs, width, 2 if stage and not block else 1))
                inputs = width
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[batch, classes]`` of images float ``[batch, channels, height, width]``."""
        hidden = self.blocks(F.relu(self.bn(self.conv(x))))
        return cast(Tensor, self.head(hidden.mean((2, 3))))


def small_resnet(
    widths: Sequence[int] = (16, 32, 64), blocks: int = 1, channels: int = 1, classes: int = 10, seed: int = 0
) -> SmallResNet:
    """An untrained residual network; the same seed gives the same weights.

    Raises:
        InputError: sizes below one.

    >>> sum(p.numel() for p in small_resnet(blocks=9, channels=3).parameters())  # ResNet-56
    855770
    """
    if not widths or min(*widths, blocks, channels, classes) < 1:
        raise InputError("a residual network needs widths, blocks, channels and classes of at least 1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallResNet(widths, blocks, channels, classes)


@dataclass(frozen=True)
class ImagePlan:
    """SGD with Nesterov momentum over shuffled epochs.

    Attributes:
        lr: learning rate at first.
        milestones: epochs after which it falls to a tenth, as ImageNet recipes have them; () for a cosine to zero.
    """

    epochs: int
    lr: float = 0.1
    batch: int = 64
    momentum: float = 0.9
    weight_decay: float = 1e-4
    milestones: tuple[int, ...] = ()
    seed: int = 0

    def rate(self, step: int, per_epoch: int) -> float:
        """Learning rate of step 0, 1, …

        >>> [round(ImagePlan(3, 1.0, milestones=(1, 2)).rate(step, 2), 9) for step in (0, 2, 5)]
        [1.0, 0.1, 0.01]
        """
        if self.milestones:
            return self.lr / math.pow(10, sum(step // per_epoch >= m for m in self.milestones))
        return self.lr * 0.5 * (1 + math.cos(math.pi * step / (self.epochs * per_epoch)))

    def travel(self, images: int) -> float:
        """Σ lr / (1 − momentum): how far a constant gradient of 1 moves a parameter over the whole run."""
        per_epoch = -(-images // self.batch)
        return sum(self.rate(s, per_epoch) for s in range(self.epochs * per_epoch)) / (1 - self.momentum)


def train_images(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    plan: ImagePlan,
    *,
    before_step: Callable[[], float] = lambda: 0.0,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Training:
    """Train a classifier that gives logits, in place, by cross-entropy; it comes back in eval mode.

    Args:
        images: float ``[n, channels, height, width]``; labels: int64 ``[n]``.
        before_step: called between the backward pass and the step; may change gradients; what it returns is in the curve as
            `penalty` and nowhere else.

    Returns:
        A point of the curve for each epoch: means of `loss` and `penalty`.

    Raises:
        InputError: images and labels that do not belong together, or a loss that is not finite.
    """
    if len(images) != len(labels) or not len(images) or labels.dtype != torch.int64:
        raise InputError(
            f"images {list(images.shape)} need as many int64 labels, got {labels.dtype} {list(labels.shape)}"
        )
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=plan.lr,
        momentum=plan.momentum,
        weight_decay=plan.weight_decay,
        nesterov=plan.momentum > 0,
    )
    generator, training, step = torch.Generator().manual_seed(plan.seed), Training(), 0
    per_epoch = -(-len(images) // plan.batch)
    model.train()
    for epoch in range(plan.epochs):
        losses, penalties = [], []
        for chosen in torch.randperm(len(images), generator=generator).tensor_split(per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = plan.rate(step, per_epoch)
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            penalties.append(before_step())
            optimizer.step()
            losses.append(float(loss.detach()))
            step += 1
        if not math.isfinite(sum(losses)):
            raise InputError(f"the loss is not finite in epoch {epoch}: check the images, or lower the learning rate")
        means = (sum(part) / len(part) for part in (losses, penalties))
        training.curve.append({"step": float(step), **dict(zip(("loss", "penalty"), means, strict=True))})
        progress("training", epoch + 1, plan.epochs)
    model.eval()
    return training


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 512) -> float:
    """Share of images that a classifier of logits gets right, in eval mode."""
    with evaluating(model):
        right = sum(
            int((model(x).argmax(-1) == y).sum()) for x, y in zip(images.split(batch), labels.split(batch), strict=True)
        )
    return right / len(labels)
