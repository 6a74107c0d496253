"""How far two sets of small images lie apart: the Fréchet distance of Gaussians over random convolutional features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.errors import InputError


def random_features(images: Tensor, width: int = 16, seed: int = 0) -> Tensor:
    """Means and spreads, over places, of two random layers with ReLU, float64 ``[n, 2 * width]``.

    Args:
        images: float ``[n, channels, height, width]``, at least 8 pixels high and wide.
        seed: of the layers; compare only what was made with one seed.
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(width, images.shape[1], 3, 3, generator=generator) / (9 * images.shape[1]) ** 0.5
    second = torch.randn(width, width, 3, 3, generator=generator) / (4.5 * width) ** 0.5
    hidden = F.conv2d(images.float() - 0.5, first, stride=2, padding=1).relu()
    hidden = F.conv2d(hidden, second, padding=1).relu().flatten(2).double()
    return torch.cat([hidden.mean(-1), hidden.std(-1)], 1)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Between Gaussians fitted to features ``[n, d]`` and ``[m, d]``: |mean difference|² + tr(A + B - 2 (AB)^½).

    Raises:
        InputError: fewer than two rows, or other widths.

    >>> a = torch.tensor([[0.0, 0], [1, 1], [0, 1], [1, 0]])
    >>> round(frechet_distance(a, a), 6), round(frechet_distance(a, a + 2), 6)
    (0.0, 8.0)
    """
    if min(len(first), len(second)) < 2 or first.shape[1:] != second.shape[1:]:
        raise InputError(
            f"features are [n, d] with two rows at least, got {list(first.shape)} and {list(second.shape)}"
        )
    a, b = first.double().T.cov(), second.double().T.cov()
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp_min(0).sqrt().sum()
    apart = (first.double().mean(0) - second.double().mean(0)).square().sum()
    return max(0.0, float(apart + a.trace() + b.trace() - 2 * cross))
