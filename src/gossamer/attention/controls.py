"""Controls that every comparison needs: everything, the best selection there is, the worst sensible one.

They are no products: `exact-top-k` reads every key to choose, so it saves nothing; it bounds the quality that any
score can reach at a budget. `random` bounds it from below.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer import ops
from gossamer.attention.base import AttentionMethod
from gossamer.calibration import Calibration
from gossamer.hf import DecodePolicy, LayerView, ModelShape, SelectingPolicy
from gossamer.patterns import Budget, resolve
from gossamer.registry import register


@register("dense", slot="attention.decode", family="attention", name="Dense (our kernel)", baseline=True)
class Dense(AttentionMethod):
    """Exact attention over the whole cache by the native kernel: what sparsity must beat.

    >>> Dense().settings()
    {}
    """


class ExactTopKPolicy(SelectingPolicy):
    """Rows by true score, per query head."""

    def __init__(self, tokens: int | float, dense_layers: frozenset[int]) -> None:
        super().__init__(dense_layers)
        self.tokens = tokens

    def budget(self, length: int) -> int:
        """Rows kept per query head."""
        return resolve(self.tokens, length)

    def scores(self, layer: LayerView, query: Tensor, length: int) -> Tensor:
        """``[batch, heads, length]``."""
        key, _ = layer.rows(length)
        return ops.key_scores(query, key.to(query.device))

    def score_bytes(self, layer: LayerView, length: int) -> int:
        """All keys."""
        key, _ = layer.rows(length)
        return key.numel() * key.element_size()

    def select(self, layer: LayerView, query: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Top rows by `scores`."""
        return ops.select_topk(self.scores(layer, query, length), self.budget(length), starts=layer.starts)


class RandomPolicy(ExactTopKPolicy):
    """Rows by chance: the same for the same seed, layer and length, whatever was drawn before."""

    def __init__(self, tokens: int | float, dense_layers: frozenset[int], seed: int) -> None:
        super().__init__(tokens, dense_layers)
        self.seed, self.generator = seed, torch.Generator()

    def scores(self, layer: LayerView, query: Tensor, length: int) -> Tensor:
        """Uniform noise."""
        self.generator.manual_seed((self.seed * 1_000_003 + layer.index) * 1_000_003 + length)
        return torch.rand(query.shape[0], query.shape[1], length, generator=self.generator).to(query.device)

    def score_bytes(self, layer: LayerView, length: int) -> int:
        """Nothing is read to draw."""
        return 0


@register("exact-top-k", slot="attention.decode", family="attention", name="Exact top-k (oracle)", baseline=True)
class ExactTopK(AttentionMethod):
    """The k keys with the highest true score, per query head: the ceiling for score-based selection, not a saving.

    >>> ExactTopK(tokens=64).tokens
    64
    """

    tokens: Budget = Field(1 / 16, description="rows read per query head: a count or a fraction of the context")
    dense_layers: tuple[int, ...] = Field((0, 1), description="layers that read everything")

    def decode_policy(self, model: nn.Module, calibration: Calibration | None) -> DecodePolicy:
        """A policy that scores with full keys."""
        return ExactTopKPolicy(self.tokens, frozenset(self.dense_layers))

    def io_bytes(self, length: int, shape: ModelShape, element_size: int) -> dict[str, int]:
        """All keys to choose, then the chosen rows."""
        row = shape.head_dim * element_size
        return {
            "rows": min(resolve(self.tokens, length), length) * shape.heads * 2 * row,
            "scores": length * shape.kv_heads * row,
        }


@register("random", slot="attention.decode", family="attention", name="Random tokens", baseline=True)
class Random(AttentionMethod):
    """Uniformly random keys, per query head: what a budget is worth without a score.

    >>> Random(tokens=64, seed=1).seed
    1
    """

    tokens: Budget = Field(1 / 16, description="rows read per query head: a count or a fraction of the context")
    dense_layers: tuple[int, ...] = Field((0, 1), description="layers that read everything")
    seed: int = Field(0, description="seed of the selection")

    def decode_policy(self, model: nn.Module, calibration: Calibration | None) -> DecodePolicy:
        """A policy that draws rows."""
        return RandomPolicy(self.tokens, frozenset(self.dense_layers), self.seed)

    def io_bytes(self, length: int, shape: ModelShape, element_size: int) -> dict[str, int]:
        """The chosen rows only."""
        rows = min(resolve(self.tokens, length), length)
        return {"rows": rows * shape.heads * 2 * shape.head_dim * element_size, "scores": 0}
