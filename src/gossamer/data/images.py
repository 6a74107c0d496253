"""Images that need no network: scikit-learn's digits, with noise on images and labels.

from gossamer.data.images import add_noise, corrupt_labels, digits
data = digits()
noisy = corrupt_labels(data.train_labels, 0.4, 10, seed=0)
blurred = add_noise(data.test_images, "shot", severity=3, seed=0)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from gossamer.errors import InputError

Noise = Literal["gaussian", "impulse", "shot"]
NOISES: tuple[Noise, ...] = get_args(Noise)

#: Strength of severities 1 to 5, as in ImageNet-C (Hendrycks & Dietterich 2019): standard deviation; share of pixels
#: replaced; photons of a white pixel.
_STRENGTH: dict[str, tuple[float, ...]] = {
    "gaussian": (0.08, 0.12, 0.18, 0.26, 0.38),
    "impulse": (0.03, 0.06, 0.09, 0.17, 0.27),
    "shot": (60.0, 25.0, 12.0, 5.0, 3.0),
}


@dataclass(frozen=True)
class Images:
    """Images float32 ``[n, channels, height, width]`` in [0, 1] and labels int64 ``[n]``, in two disjoint parts."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int


@functools.cache
def digits(train: int = 900, seed: int = 0) -> Images:
    """The 1,797 handwritten digits of scikit-learn, ``[1, 8, 8]`` each, shuffled and cut after `train` of them.

    The same seed gives the same parts; the data are shared, so change copies only.

    Raises InputError without scikit-learn, or where a part would be empty.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("the digits come with scikit-learn: pip install 'gossamer-sparse[data]'") from None
    pixels, labels = load_digits(return_X_y=True)
    if not 0 < train < len(labels):
        raise InputError(f"digits: train must be between 1 and {len(labels) - 1}, got {train}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8)[order] / 16
    classes = torch.from_numpy(labels).long()[order]
    return Images(images[:train], classes[:train], images[train:], classes[train:], 10)


def add_noise(images: Tensor, kind: Noise, severity: int, seed: int = 0) -> Tensor:
    """Images in [0, 1] with the noise of ImageNet-C, clipped to [0, 1]; a new tensor, of the same shape and dtype.

    kind: `gaussian`, added to every pixel; `impulse`, salt and pepper in equal parts; `shot`, Poisson counts of photons.
    severity: 1 (light) to 5.

    Raises InputError for another kind or severity, and for images that are not floating point in [0, 1].
    """
    if kind not in NOISES or severity not in range(1, 6):
        raise InputError(f"add_noise: kind is one of {', '.join(NOISES)}, severity 1 to 5; got {kind!r}, {severity!r}")
    # A comparison that NaN fails.
    if not images.is_floating_point() or not bool(((images >= 0) & (images <= 1)).all()):
        raise InputError("add_noise: images must be floating point, finite, in [0, 1]")
    strength, generator = _STRENGTH[kind][severity - 1], torch.Generator(images.device).manual_seed(seed)
    if kind == "gaussian":
        noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
        return (images + strength * noise).clamp(0, 1)
    if kind == "shot":
        return (torch.poisson(images * strength, generator=generator) / strength).clamp(0, 1)
    draw = torch.rand(images.shape, generator=generator, device=images.device)
    pepper, salt = draw < strength / 2, (draw >= strength / 2) & (draw < strength)
    return images.masked_fill(pepper, 0).masked_fill(salt, 1)


def corrupt_labels(labels: Tensor, share: float, classes: int, seed: int = 0) -> Tensor:
    """Labels of which each is, with probability `share`, replaced by a uniform draw from all classes (the true one included).

    So about ``share·(1 − 1/classes)`` of them change.

    labels: int64 of any shape, in [0, classes). Raises InputError for others, or a share outside [0, 1].
    """
    if not 0 <= share <= 1 or classes < 1:
        raise InputError(f"corrupt_labels: share must be in [0, 1] and classes at least 1; got {share}, {classes}")
    if labels.dtype != torch.int64 or bool(((labels < 0) | (labels >= classes)).any()):
        raise InputError(f"corrupt_labels: labels must be int64 in [0, {classes})")
    generator = torch.Generator(labels.device).manual_seed(seed)
    replaced = torch.rand(labels.shape, generator=generator, device=labels.device) < share
    drawn = torch.randint(classes, labels.shape, generator=generator, device=labels.device)
    return torch.where(replaced, drawn, labels)


#: Kinds of `procedural`, by label.
KINDS = ("gradient", "blobs", "texture")


def procedural(count: int, seed: int = 0, size: int = 16) -> tuple[Tensor, Tensor]:
    """Made-up grey images float32 ``[count, 1, size, size]`` in [0, 1] and their kinds int64 ``[count]`` (see `KINDS`).

    Gradients run in any direction; blobs are one to three soft spots on a flat ground; textures are two crossed gratings.

    Raises InputError for a count or size below 1.

    >>> images, kinds = procedural(6, seed=0)
    >>> tuple(images.shape), int(kinds.max()) <= 2
    ((6, 1, 16, 16), True)
    """
    if count < 1 or size < 1:
        raise InputError(f"procedural: count and size are at least 1, got {count} and {size}")
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(len(KINDS), (count,), generator=generator)
    draw = torch.rand(
        count, 16, 1, 1, generator=generator
    )  # every image has the same number of dice, whatever its kind
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angle = 2 * torch.pi * draw[:, 0]
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    gradient = 0.5 + (0.2 + 0.3 * draw[:, 1]) * along + 0.4 * (draw[:, 2] - 0.5)
    blobs = 0.1 + 0.2 * draw[:, 3].expand_as(gradient)
    for spot in range(3):
        place = draw[:, 4 + 4 * spot : 8 + 4 * spot]
        width = 0.15 + 0.25 * place[:, 2]
        there = 1.0 if spot == 0 else (place[:, 3] > 0.4).float()
        distance = (x - 1.6 * place[:, 0] + 0.8) ** 2 + (y - 1.6 * place[:, 1] + 0.8) ** 2
        blobs = blobs + there * 0.7 * (-distance / (2 * width**2)).exp()
    pitch = 4 + 6 * draw[:, 1]
    texture = 0.5 + 0.25 * (pitch * along + 6 * draw[:, 2]).sin() + 0.25 * (pitch * across + 6 * draw[:, 3]).sin()
    images = torch.stack([gradient, blobs, texture], 1)[torch.arange(count), kinds]
    return images.clamp(0, 1)[:, None], kinds


#: Classes of `shapes`, by label.
SHAPES = ("disc", "ring", "square", "frame", "plus", "cross", "triangle", "bar", "column", "diamond")


def shapes(count: int, seed: int = 0, size: int = 12, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Drawn shapes float32 ``[count, 1, size, size]``, 1 on 0, and their classes int64 ``[count]`` (see `SHAPES`).

    Place and size vary. noise: standard deviation of what is added to every pixel; nothing is clipped.

    Raises InputError for a count or size below 1, or a noise that is negative or not finite.

    >>> images, classes = shapes(4, seed=0)
    >>> tuple(images.shape), bool(((images == 0) | (images == 1)).all())
    ((4, 1, 12, 12), True)
    """
    if count < 1 or size < 1 or not 0 <= noise < float("inf"):
        raise InputError(f"shapes: count and size are at least 1, noise at least 0; got {count}, {size} and {noise}")
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(len(SHAPES), (count,), generator=generator)
    place = torch.rand(count, 3, 1, 1, generator=generator)
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    radius = 0.45 + 0.25 * place[:, 0]
    x, y = x - 0.5 * place[:, 1] + 0.25, y - 0.5 * place[:, 2] + 0.25
    wide, across = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    round_, stroke = (x.square() + y.square()).sqrt(), 0.18
    inside = torch.stack(
        [
            round_ <= radius,
            (round_ - radius).abs() <= stroke,
            wide <= radius,
            (wide - radius).abs() <= stroke,
            (wide <= radius) & (across <= stroke),
            (wide <= radius) & ((x.abs() - y.abs()).abs() <= 1.4 * stroke),
            (y <= radius) & (y >= -radius) & (2 * x.abs() <= y + radius),
            (x.abs() <= 1.2 * radius) & (y.abs() <= stroke),
            (y.abs() <= 1.2 * radius) & (x.abs() <= stroke),
            x.abs() + y.abs() <= 1.2 * radius,
        ],
        1,
    )
    images = inside[torch.arange(count), classes][:, None].float()
    return images + noise * torch.randn(images.shape, generator=generator), classes
