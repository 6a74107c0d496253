"""A small image tokenizer (VQ-VAE) and a class-conditional transformer over its codes.

    tokenizer = image_tokenizer(seed=0)
    train_tokenizer(tokenizer, images, steps=1500)
    codes = tokenizer.encode(images)                       # int64 [n, 64]
    model = code_model(classes=3)                          # a Llama over 256 codes, 3 classes and "no class"
    train(model, code_batches(codes, kinds, 64, 1500, seed=0), Plan(steps=1500))

A text of `code_model` is a class token and then an image's codes, row by row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from gossamer.errors import InputError
from gossamer.models.training import byte_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel as CodeModel


class ImageTokenizerConfig(PretrainedConfig):  # type: ignore[misc]
    """Sizes of an `ImageTokenizer`; images are twice as high and wide as their codes."""

    model_type = "gossamer_image_tokenizer"
    codes: int = 256
    dim: int = 8
    width: int = 32
    channels: int = 1
    side: int = 8  # codes in a row, and rows


class ImageTokenizer(PreTrainedModel):  # type: ignore[misc]
    """VQ-VAE: each 2 x 2 block with its surroundings becomes the nearest of a codebook's vectors.

    Attributes:
        codebook: float ``[codes, dim]``.
    """

    config_class = ImageTokenizerConfig

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__(config)
        width, dim = config.width, config.dim
        self.encoder = nn.Sequential(
            nn.Conv2d(config.channels, width, 4, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, dim, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.ConvTranspose2d(width, config.channels, 4, stride=2, padding=1),
        )
        self.codebook = nn.Parameter(torch.randn(config.codes, dim))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own first weights."""

    def nearest(self, latents: Tensor) -> Tensor:
        """Codes int64 ``[n, side * side]`` of latents ``[n, dim, side, side]``."""
        flat = latents.flatten(2).transpose(1, 2)
        return torch.cdist(flat, self.codebook[None]).argmin(-1)

    def vectors(self, codes: Tensor) -> Tensor:
        """``[n, dim, side, side]`` of codes ``[n, side * side]``."""
        side = self.config.side
        found: Tensor = self.codebook[codes].transpose(1, 2).unflatten(2, (side, side))
        return found

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes int64 ``[n, side * side]`` of images float ``[n, channels, 2 side, 2 side]``.

        Raises:
            InputError: images of another size.
        """
        wanted = (self.config.channels, 2 * self.config.side, 2 * self.config.side)
        if images.dim() != 4 or tuple(images.shape[1:]) != wanted:
            raise InputError(
                f"this tokenizer reads images [n, {', '.join(map(str, wanted))}], got {list(images.shape)}"
            )
        return torch.cat([self.nearest(self.encoder(part)) for part in images.split(512)])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images in [0, 1] of codes int64 ``[n, side * side]``.

        Raises:
            InputError: another number of codes, or ids that are no codes.
        """
        if codes.dim() != 2 or codes.shape[1] != self.config.side**2:
            raise InputError(f"an image has {self.config.side**2} codes, got {list(codes.shape)}")
        if bool(((codes < 0) | (codes >= self.config.codes)).any()):
            raise InputError(f"codes lie in 0 .. {self.config.codes - 1}")
        images: Tensor = self.decoder(self.vectors(codes)).clamp(0, 1)
        return images


def image_tokenizer(seed: int = 0, **overrides: Any) -> ImageTokenizer:
    """A fresh tokenizer in eval mode; `overrides` are fields of `ImageTokenizerConfig`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: ImageTokenizer = ImageTokenizer(ImageTokenizerConfig(**overrides)).eval()
        return model


def train_tokenizer(
    model: ImageTokenizer, images: Tensor, steps: int, *, batch: int = 64, lr: float = 2e-3, seed: int = 0
) -> list[float]:
    """Train in place; the gradient passes straight through the codebook, and codes that nothing uses move to latents.

    Returns:
        The reconstruction's mean squared error of every step.
    """
    generator, curve = torch.Generator().manual_seed(seed), []
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, lr / 20)
    used = torch.zeros(model.config.codes)
    model.train()
    for step in range(steps):
        picked = images[torch.randint(len(images), (batch,), generator=generator)]
        latents = model.encoder(picked)
        codes = model.nearest(latents.detach())
        vectors = model.vectors(codes)
        decoded = model.decoder(latents + (vectors - latents).detach())
        error = F.mse_loss(decoded, picked)
        loss = error + F.mse_loss(vectors, latents.detach()) + 0.25 * F.mse_loss(latents, vectors.detach())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        curve.append(float(error.detach()))
        used += torch.bincount(codes.flatten(), minlength=len(used))
        if step % 50 == 0 and step < 0.7 * steps:
            dead = (used == 0).nonzero()[:, 0]
            flat = latents.detach().flatten(2).transpose(1, 2).flatten(0, 1)
            with torch.no_grad():
                model.codebook[dead] = flat[torch.randint(len(flat), (len(dead),), generator=generator)]
            used.zero_()
    model.eval()
    return curve


def code_model(classes: int, codes: int = 256, seed: int = 0, **overrides: Any) -> CodeModel:
    """A Llama over codes (ids 0 .. codes - 1), class tokens behind them, and "no class" last: 4 layers of width 128."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "max_position_embeddings": 128, **overrides}
    return byte_model("llama", seed, vocab_size=codes + classes + 1, **sizes)


def code_batches(
    codes: Tensor,
    kinds: Tensor,
    batch: int,
    steps: int,
    seed: int,
    size: int = 256,
    classes: int = 3,
    drop: float = 0.1,
) -> Iterator[Tensor]:
    """Training batches int64 ``[batch, 1 + codes of an image]``; with chance `drop` the class is "no class" (for guidance)."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(codes), (batch,), generator=generator)
        named = size + kinds[rows]
        named[torch.rand(batch, generator=generator) < drop] = size + classes
        yield torch.cat([named[:, None], codes[rows]], 1)
