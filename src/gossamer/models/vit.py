"""A small vision transformer for images of a few pixels, and the loop that trains it.

    model = small_vit(hidden_size=32, intermediate_size=256, num_hidden_layers=2)
    curve = train_classifier(model, images, labels, epochs=40, batch=60, lr=1e-3, seed=0)

Its blocks are those of transformers' ViT, so every plug point for MLPs and linear layers finds them, and it saves and loads
as a transformers checkpoint (`SmallViT.from_pretrained`). It differs in pooling: the mean over patches, no class token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.vit.modeling_vit import ViTLayer, ViTPatchEmbeddings, ViTPreTrainedModel

from gossamer.errors import InputError


class SmallViTConfig(ViTConfig):  # type: ignore[misc]
    """ViT's configuration under a type of its own.

    norm_first: layer norms before attention and MLP, as in ViT; else after them, as in the first transformer.
    """

    model_type = "gossamer_small_vit"
    norm_first: bool = True


class PostNormLayer(ViTLayer):  # type: ignore[misc]
    """ViT's layer with the norms after the sums."""

    def forward(self, hidden: Tensor) -> Tensor:
        """``[batch, tokens, width]``, the same shape back."""
        hidden = self.layernorm_before(hidden + self.dropout(self.attention(hidden)[0]))
        normed: Tensor = self.layernorm_after(hidden + self.dropout(self.mlp(hidden)))
        return normed


class SmallViT(ViTPreTrainedModel):  # type: ignore[misc]
    """Patches, learned positions, transformer blocks, mean over patches, a linear head.

    Called with ``pixel_values`` float ``[batch, channels, height, width]``; returns ``logits`` ``[batch, classes]``.
    """

    config_class = SmallViTConfig

    def __init__(self, config: SmallViTConfig) -> None:
        super().__init__(config)
        self.patch_embeddings = ViTPatchEmbeddings(config)
        self.position_embeddings = nn.Parameter(torch.empty(1, self.patch_embeddings.num_patches, config.hidden_size))
        layer = ViTLayer if config.norm_first else PostNormLayer
        self.layers = nn.ModuleList(layer(config) for _ in range(config.num_hidden_layers))
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layernorm = nn.LayerNorm(width, eps=eps) if config.norm_first else nn.Identity()
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own first weights, which go by a layer's width: the usual spread of 0.02 is made for wide models."""
        if module is self:
            nn.init.trunc_normal_(self.position_embeddings, std=self.config.initializer_range)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> ImageClassifierOutput:
        """Logits of the classes."""
        hidden = self.patch_embeddings(pixel_values) + self.position_embeddings
        for layer in self.layers:
            hidden = layer(hidden)
        return ImageClassifierOutput(logits=self.classifier(self.layernorm(hidden).mean(1)))


def small_vit(seed: int = 0, **overrides: Any) -> SmallViT:
    """A fresh `SmallViT`, fp32, in eval mode; the global random state is not touched.

    Defaults: images of 8 x 8 x 1 in patches of 2 (16 tokens), width 32, 2 layers, 2 heads, MLP 256, ReLU, 10 classes.
    overrides: fields of `SmallViTConfig`, and `num_labels`.

    Raises InputError for settings that transformers refuses.
    """
    settings = {
        "image_size": 8,
        "patch_size": 2,
        "num_channels": 1,
        "hidden_size": 32,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": "relu",
        "num_labels": 10,
        **overrides,
    }
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: SmallViT = SmallViT(SmallViTConfig(**settings)).eval()
            return model
    except Exception as error:  # transformers checks settings in many places, with error classes of many kinds
        raise InputError(f"a small ViT cannot be made so: {' '.join(str(error).split())}") from error


def train_classifier(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch: int = 60,
    lr: float = 1e-3,
    seed: int = 0,
    draw: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    after_epoch: Callable[[int], None] | None = None,
) -> list[dict[str, float]]:
    """Train a classifier in place by Adam at a constant rate; it comes back in eval mode.

    Args:
        images, labels: float ``[n, channels, height, width]``, int64 ``[n]``.
        seed: of the order of the examples.
        draw: called with (step, images, labels) of each batch, gives the batch to train on instead: fresh data.
        after_epoch: called after each epoch with its number (0, 1, …).

    Returns:
        A point an epoch: `epoch`, `loss` (nats) and `accuracy` on the labels trained with, both while training.

    Raises:
        InputError: sizes that don't fit, or a loss that is not finite.
    """
    if len(images) != len(labels) or min(epochs, batch, len(labels)) < 1:
        raise InputError(f"cannot train {epochs} epochs on {len(images)} images and {len(labels)} labels by {batch}")
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    generator, curve, step = torch.Generator().manual_seed(seed), [], 0
    call: Any = model
    for epoch in range(epochs):
        model.train()
        loss_sum = right = torch.zeros(())
        for rows in torch.randperm(len(labels), generator=generator).split(batch):
            x, y = images[rows], labels[rows]
            if draw is not None:
                x, y = draw(step, x, y)
            logits = call(x).logits
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            loss_sum = loss_sum + loss.detach() * len(rows)
            right = right + (logits.detach().argmax(-1) == y).sum()
        point = {"epoch": float(epoch), "loss": float(loss_sum) / len(labels), "accuracy": float(right) / len(labels)}
        if not math.isfinite(point["loss"]):
            raise InputError(f"the loss is not finite in epoch {epoch}: lower the learning rate")
        curve.append(point)
        if after_epoch is not None:
            after_epoch(epoch)
    model.eval()
    return curve


@torch.no_grad()
def class_probabilities(model: nn.Module, images: Tensor, batch: int = 512) -> Tensor:
    """Softmax of the logits, float32 ``[n, classes]``."""
    call: Any = model
    return torch.cat([call(part).logits.float().softmax(-1) for part in images.split(batch)])
