"""What the methods of this family share: budgets, evictions and per-row state."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, BeforeValidator
from torch import Tensor

from gossamer.hf import CachePolicy, LayerView, ModelShape
from gossamer.hf.cache import Derived
from gossamer.patterns.budget import parse
from gossamer.policies import PolicyMethod


def budget_of(budget: int | float, total: int) -> int:
    """Rows that a cache budget allows after `total` tokens: a count, or a fraction rounded half up, at least 1.

    >>> budget_of(0.2, 384), budget_of(0.5, 5), budget_of(256, 10)
    (77, 3, 256)
    """
    return budget if isinstance(budget, int) else max(1, math.floor(budget * total + 0.5))


def _part(value: int | float) -> int | float:
    if isinstance(value, int) and value < 0:
        raise ValueError("a count must be 0 or more")
    if isinstance(value, float) and not 0 <= value <= 1:
        raise ValueError("a fraction of the budget must lie in 0 .. 1; write a count without a point")
    return value


#: Field type for a part of a budget: a count, or a fraction of the budget; 0 is allowed.
Part = Annotated[int | float, BeforeValidator(parse), AfterValidator(_part)]


def part_of(part: int | float, budget: int) -> int:
    """Rows that a part of a budget means.

    >>> part_of(0.5, 77), part_of(4, 77)
    (38, 4)
    """
    return part if isinstance(part, int) else int(part * budget)


def protect(
    scores: Tensor, *, recent: int = 0, sink: int = 0, starts: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """Scores in which protected rows can't be lowest, and padding always is.

    Args:
        scores: float32 ``[batch, kv_heads or 1, n]``.
        recent: newest rows that are kept.
        sink: first real rows that are kept.
        starts: int ``[batch]``, how many rows of padding lie in front.
        rows: int ``[batch, kv_heads, n]``, which row each score belongs to, and -1 for none (default ``0 … n−1``; the
            newest is then ``n − 1``, else the highest).

    >>> protect(torch.tensor([[[3.0, 2.0, 1.0, 0.0]]]), recent=1, sink=1).tolist()
    [[[inf, 2.0, 1.0, inf]]]
    """
    if not recent and not sink and starts is None:
        return scores
    if rows is None and starts is None:  # every decode step of a sequence without padding
        scores = scores.clone()
        scores[..., max(scores.shape[-1] - recent, 0) :] = math.inf
        scores[..., :sink] = math.inf
        return scores
    last: int | Tensor = scores.shape[-1] - 1
    if rows is None:
        rows = torch.arange(scores.shape[-1], device=scores.device)
    elif recent:
        last = rows.amax(-1, keepdim=True)
    first: int | Tensor = 0 if starts is None else starts.to(scores.device)[:, None, None]
    if recent:
        scores = scores.masked_fill(rows > last - recent, math.inf)
    if sink:
        scores = scores.masked_fill(rows < first + sink, math.inf)
    if starts is not None:
        scores = scores.masked_fill(rows < first, -math.inf)
    return scores


def survivors(scores: Tensor, keep: int) -> Tensor:
    """Ids of the rows that stay when all but `keep` with the lowest scores go; of equals the first goes first.

    Args:
        scores: ``[..., n]`` with ``n > keep``.

    Returns:
        int64 ``[..., keep]``, ascending.

    >>> survivors(torch.tensor([3.0, 1.0, 2.0, 1.0]), 2).tolist()
    [0, 2]
    >>> survivors(torch.tensor([3.0, 1.0, 2.0, 1.0]), 3).tolist()
    [0, 2, 3]
    """
    length = scores.shape[-1]
    if keep == length - 1:
        gone = scores.argmin(-1, keepdim=True)
        ids = torch.arange(keep, device=scores.device)
        return ids + (ids >= gone)
    order = scores.argsort(dim=-1, stable=True)
    return order[..., length - keep :].sort(-1).values


class RowScores(Derived):
    """One float32 score for each row of a cache layer ``[batch, kv_heads, rows]``, kept in step with its edits.

    After a crop the scores of the removed rows are gone; what their queries added to other rows stays. A changed batch
    (beam search) starts from 0: rows unknown to it have score 0.
    """

    scores: Tensor | None = None

    def upto(self, like: Tensor) -> Tensor:
        """The scores, with 0 for rows not seen before; shape and device of `like` ``[batch, kv_heads, rows]``."""
        if self.scores is None:
            return torch.zeros_like(like)
        known = self.scores[:, :, : self.rows]
        return F.pad(known, (0, like.shape[2] - known.shape[2]))

    def add_to(self, received: Tensor, fade: float) -> Tensor:
        """The scores times `fade` plus what a step or a block `received` ``[batch, kv_heads, rows]``, which is written over."""
        if self.scores is not None and self.rows:
            received[:, :, : self.rows].add_(self.scores[:, :, : self.rows], alpha=fade)
        return received

    def store(self, scores: Tensor) -> None:
        """Keep these, which cover all rows."""
        self.scores, self.rows = scores, scores.shape[2]


class EvictingPolicy(CachePolicy):
    """A cache policy that drops rows. Subclasses give `evict`.

    A layer with a sliding window keeps exactly what its window can still see, which changes no output.
    """

    def __init__(self) -> None:
        self.held: dict[int, tuple[int, int, int]] = {}

    @abstractmethod
    def evict(self, layer: LayerView, query: Tensor) -> None:
        """As `update`, for a layer without a window."""

    def update(self, layer: LayerView, query: Tensor) -> None:
        """Drop rows, and note what is left."""
        kv = layer.kv
        if layer.window:
            if layer.index not in self.held:
                layer.runtime.say_once("layers with a sliding window keep what their window sees, whatever the budget")
            if kv.length >= 2 * layer.window:  # not at every step: a drop copies what stays
                assert kv.key_storage is not None
                ids = torch.arange(kv.length - layer.window, kv.length, device=query.device)
                layer.keep(ids.expand(*kv.key_storage.shape[:2], -1))
        else:
            with torch.no_grad():
                self.evict(layer, query)
        self.held[layer.index] = (kv.length, kv.length + kv.dropped, kv.nbytes)

    def report(self) -> dict[str, Any]:
        """Rows and bytes held after the last step, over all layers, beside the tokens seen."""
        rows, seen, size = (sum(column) for column in zip(*self.held.values(), strict=True)) if self.held else (0, 0, 0)
        return {"kv_bytes_held": size, "cache_rows_kept": rows / seen if seen else 1.0}


class CacheMethod(PolicyMethod):
    """Base of the family: a method gives a `cache_policy`, and a `prefill_policy` where it changes how the prompt is read."""

    def held_rows(self, length: int) -> int:
        """Rows per KV head that the cache holds after a prompt of this length (default: all)."""
        return length

    def io_bytes(self, length: int, shape: ModelShape, element_size: int) -> dict[str, int]:
        """Bytes that one decode step of one layer and one sequence reads: the last of `length` tokens, after a prompt of
        the others.

        Returns:
            ``{"rows": key and value rows, "scores": what is read to decide what to drop}``.
        """
        rows = self.held_rows(length - 1) + 1
        return {"rows": rows * shape.kv_heads * 2 * shape.head_dim * element_size, "scores": 0}
