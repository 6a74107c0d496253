"""Quest: query-aware page selection (Tang et al., ICML 2024, arXiv 2406.10774).

Keys lie in pages of 16. Each page keeps its per-channel minimum m and maximum M. A page's score bounds from above the
score of every key in it:

    u(page) = Σ_c max(q_c · m_c, q_c · M_c)  =  relu(q)·M + min(q, 0)·m

The pages with the highest u are read whole, per query head; the page being filled is always read.
"""

from __future__ import annotations

from typing import cast

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer import ops
from gossamer.attention.base import AttentionMethod
from gossamer.calibration import Calibration
from gossamer.hf import DecodePolicy, LayerView, ModelShape, SelectingPolicy
from gossamer.hf.cache import Derived
from gossamer.patterns import Budget, resolve
from gossamer.registry import register


def page_bounds(key: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Minimum and maximum per channel of each whole page of `key` ``[batch, kv_heads, pages·page_size, d]``."""
    pages = key.unflatten(2, (-1, page_size))
    return pages.amin(3), pages.amax(3)


def page_scores(query: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Upper bounds u ``[batch, heads, pages]`` for `query` ``[batch, heads, d]`` and bounds ``[batch, kv_heads, pages, d]``."""
    grouped = query.unflatten(1, (low.shape[1], -1)).float()
    u: Tensor = grouped.clamp_min(0) @ high.float().transpose(2, 3) + grouped.clamp_max(0) @ low.float().transpose(2, 3)
    return u.flatten(1, 2)


class PageBounds(Derived):
    """Bounds of the whole pages so far; storage grows by doubling."""

    low: Tensor | None = None
    high: Tensor | None = None

    def extend(self, key: Tensor, page_size: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """Bring the bounds up to the last whole page of rows and return those of all whole pages; `key` holds the rows
        from `first` on, none of them later than the first that has no bounds yet."""
        done, pages = self.rows // page_size, (first + key.shape[2]) // page_size
        if self.low is None or self.low.shape[2] < pages:
            shape = (key.shape[0], key.shape[1], max(64, 2 * pages), key.shape[3])
            old_low, old_high = self.low, self.high
            with torch.inference_mode(False):  # to be written in any mode
                self.low, self.high = key.new_empty(shape), key.new_empty(shape)
            if old_low is not None and old_high is not None:
                self.low[:, :, :done], self.high[:, :, :done] = old_low[:, :, :done], old_high[:, :, :done]
        assert self.high is not None
        if pages > done:
            fresh = page_bounds(key[:, :, done * page_size - first : pages * page_size - first], page_size)
            self.low[:, :, done:pages], self.high[:, :, done:pages] = fresh
        self.rows = pages * page_size
        return self.low[:, :, :pages], self.high[:, :, :pages]


class QuestPolicy(SelectingPolicy):
    """Scores whole pages, adds the open one."""

    def __init__(self, method: Quest) -> None:
        super().__init__(frozenset(method.dense_layers))
        self.method = method

    def open(self, layer: LayerView) -> PageBounds:
        """Empty bounds."""
        return PageBounds()

    def budget(self, length: int) -> int:
        """Rows in the selected pages: the token budget in whole pages, at least two (one scored, one open)."""
        size = self.method.page_size
        return max(2, -(-resolve(self.method.tokens, length) // size)) * size

    def score_bytes(self, layer: LayerView, length: int) -> int:
        """Two bounds for every page before the current token's."""
        attention, pages = layer.attention(), (length - 1) // self.method.page_size
        return pages * attention.batch * attention.kv_heads * attention.full_row_bytes

    def select(self, layer: LayerView, query: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Rows of the best pages and of the open page, per query head."""
        size, state = self.method.page_size, cast(PageBounds, layer.state)
        done = state.rows // size * size
        low, high = state.extend(layer.key_rows(done, layer.kv.length), size, done)
        whole = (length - 1) // size  # pages that end before the current token's page
        scores = page_scores(query, low[:, :, :whole], high[:, :, :whole])
        first = layer.starts.to(torch.int32) // size if layer.starts is not None else None
        pages, counts = ops.select_topk(scores, min(self.budget(length) // size - 1, whole), starts=first)
        offset = torch.arange(size, dtype=torch.int32, device=pages.device)
        opened = torch.arange(whole * size, length, dtype=torch.int32, device=pages.device)
        batch, heads, _ = pages.shape
        # Open page first: the unused slots of short sequences are then the last ones, as `counts` promises.
        rows = torch.cat([opened.expand(batch, heads, -1), (pages[..., None] * size + offset).flatten(2)], dim=2)
        counts = counts * size + len(opened)
        if layer.starts is not None:  # a page may straddle the end of the padding: drop its padded rows
            slot = torch.arange(rows.shape[2], device=rows.device)
            real = (rows >= layer.starts[:, None, None]) & (slot < counts[..., None])
            rows = rows.gather(2, real.int().argsort(dim=2, descending=True, stable=True))
            counts = real.sum(2, dtype=torch.int32)
        return rows.contiguous(), counts


@register("quest", slot="attention.decode", family="attention", name="Quest", baseline=True)
class Quest(AttentionMethod):
    """Read the 16-token pages whose key bounds promise the highest scores.

    No calibration; reads 2/page_size of the keys to choose. Good where important tokens cluster.

    >>> Quest(tokens=256).page_size
    16
    """

    tokens: Budget = Field(1 / 16, description="rows read per query head: a count or a fraction of the context")
    page_size: int = Field(16, ge=1, le=1024, description="keys in a page")
    dense_layers: tuple[int, ...] = Field((0, 1), description="layers that read everything")

    def decode_policy(self, model: nn.Module, calibration: Calibration | None) -> DecodePolicy:
        """A policy with page bounds per cache layer."""
        return QuestPolicy(self)

    def io_bytes(self, length: int, shape: ModelShape, element_size: int) -> dict[str, int]:
        """Selected pages per query head, and two bounds per page and KV head."""
        row, whole = shape.head_dim * element_size, (length - 1) // self.page_size
        pages = max(2, -(-resolve(self.tokens, length) // self.page_size))
        rows = min(pages - 1, whole) * self.page_size + length - whole * self.page_size
        return {"rows": rows * shape.heads * 2 * row, "scores": 2 * whole * shape.kv_heads * row}
