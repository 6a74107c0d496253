"""ALISA's memory of the last attention rows, and their running column sums.

A row is what one query gave to the tokens before it, summed over heads where heads decide together. The sums

    S_j = Σ_{i = low}^{n−1} AW[i, j]

follow a window of rows whose ends only move by what a step adds and drops. A row of a decode step is sparse and kept as
(ids, weights) in a ring. A row of the prompt is dense: its query is kept instead, ``H·d`` numbers for a row of n, and the
row is worked out again, a block of rows at a time, when it enters and when it leaves. Where the keys will not stay
(they move to another tier) the rows themselves are kept.

Weights are rounded to multiples of 2⁻³⁰ and summed in float64, so that adding and taking away are exact: the sums are those of
the rows in the window, whatever went through it before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_GRID = float(1 << 30)
_BLOCK = 32  # dense rows that are worked out together
SLACK = 128  # rows kept at least behind the window, so that a rollback finds them


def on_grid(weights: Tensor) -> Tensor:
    """Weights rounded to multiples of 2⁻³⁰, which float64 adds without error; float32."""
    return (weights.float() * _GRID).round_().mul_(1 / _GRID)


def dense_rows(
    query: Tensor, key: Tensor, first: int, scale: float, starts: Sequence[int] | None = None, per_head: bool = False
) -> Tensor:
    """Causal softmax rows of the queries at positions ``first … first + T − 1``, summed over heads.

    Args:
        query: ``[batch, heads, T, d]``; key: ``[batch, kv_heads, first + T, d]``.
        starts: first real row of each sequence; a query in the padding sees itself.
        per_head: keep the heads apart.

    Returns:
        float32 ``[lines, T, first + T]``; lines are sequences, or (sequence, head) pairs.
    """
    batch, heads, rows, dim = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, dim).float() * scale
    logits = (grouped @ key.float().transpose(2, 3)).view(batch, heads, rows, -1)
    later = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu_(1)
    logits[..., first:].masked_fill_(later, float("-inf"))  # only their own columns can be too late
    if starts is not None:
        column = torch.arange(first + rows, device=query.device)
        at = torch.arange(first, first + rows, device=query.device)[:, None]
        low = torch.tensor(starts, device=query.device)[:, None, None, None]
        logits.masked_fill_((column < low) & (column != at), float("-inf"))
    weights = logits.softmax(-1)
    return on_grid(weights.flatten(0, 1) if per_head else weights.sum(1))


@dataclass
class Dense:
    """Rows ``first … end − 1`` of a prompt: the queries ``[batch, heads, T, d]``, or the rows ``[lines, T, first + T]``."""

    first: int
    queries: Tensor | None
    rows: Tensor | None = None

    @property
    def end(self) -> int:
        """The row behind the last."""
        return self.first + (self.queries.shape[2] if self.queries is not None else self.held.shape[1])

    @property
    def held(self) -> Tensor:
        """The rows, where they are kept."""
        assert self.rows is not None
        return self.rows


class History:
    """Running sums over a window of attention rows.

    Args:
        lines: sequences, or sequences × heads where each head has a history of its own.
        device: where sums and rows lie.

    Attributes:
        sums: float64 ``[lines, capacity]``.
        low: first row counted, for each line.
        end: the row behind the last one counted.
        known: no row before this one can be found any more.
    """

    def __init__(self, lines: int, device: torch.device) -> None:
        self.lines, self.device = lines, device
        self.sums = self._new(lines, 0, dtype=torch.float64)
        self.ids = self._new(lines, 0, 0, dtype=torch.int32)
        self.weights = self._new(lines, 0, 0, dtype=torch.float32)
        self.dense: list[Dense] = []
        self.low = [0] * lines
        self.end = self.known = 0
        self.stale = False
        self._block: tuple[int, Tensor] | None = None
        #: Works out rows [a, b) of the queries given: ``make(queries, a, b)``. Set by the policy before each use.
        self.make: Callable[[Tensor, int, int], Tensor] | None = None

    def _new(self, *size: int, dtype: torch.dtype) -> Tensor:
        with torch.inference_mode(False):  # written in and out of inference mode
            return torch.zeros(*size, dtype=dtype, device=self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the sums and of all rows kept."""
        kept = [self.sums, self.ids, self.weights, *(d.queries if d.rows is None else d.rows for d in self.dense)]
        return sum(t.numel() * t.element_size() for t in kept if t is not None)

    # -- what goes in -------------------------------------------------------------------------------------------------

    def read(self, query: Tensor, first: int, rows: int) -> None:
        """A block of queries ``[batch, heads, T, d]`` at positions ``first …`` was read; keep its last `rows`.

        The sums are made when they are next asked for.
        """
        if first != self.end:
            self.forget(first)
        new, kept = query.shape[2], min(rows, query.shape[2])
        self.end = first + new
        if kept < new:  # nothing before this block is within reach any more
            self.known, self.dense = self.end - kept, []
        while self.dense and self.dense[0].end <= self.end - rows:
            self.known = max(self.known, self.dense.pop(0).end)
        self.dense.append(Dense(self.end - kept, query[:, :, new - kept :].detach().clone()))
        self.stale, self._block = True, None

    def forget(self, end: int) -> None:
        """Rows up to `end` are not known."""
        self.dense, self.end, self.known, self.stale = [], end, end, False
        self.low = [end] * self.lines
        self.sums.zero_()
        self._block = None

    def record(self, ids: Tensor, weights: Tensor, rows: int) -> None:
        """Append the row of one decode step.

        Args:
            ids: int32 ``[lines, m]``; weights: float32 ``[lines, m]``, 0 where an id does not count.
            rows: how many rows should stay within reach.
        """
        if self.end >= self.sums.shape[1]:
            self._grow_columns(self.end + 1)
        if rows > self.ids.shape[1] or ids.shape[1] > self.ids.shape[2]:
            self._grow_ring(rows, ids.shape[1])
        ring, m = self.ids.shape[1], ids.shape[1]
        slot, weights = self.end % ring, on_grid(weights)
        self.ids[:, slot, :m] = ids
        self.weights[:, slot, :m] = weights
        self.weights[:, slot, m:] = 0
        self.sums.scatter_add_(1, ids.long(), weights.double())
        self.end += 1
        self.known = max(self.known, self.end - ring)

    def _grow_columns(self, columns: int) -> None:
        fresh = self._new(self.lines, max(256, columns + columns // 8), dtype=torch.float64)
        fresh[:, : self.sums.shape[1]] = self.sums
        self.sums = fresh

    def _grow_ring(self, rows: int, width: int) -> None:
        old_ring, old_width = self.ids.shape[1:]
        ring = max(old_ring, rows + rows // 8)
        wide = old_width if width <= old_width else width + width // 8
        ids = self._new(self.lines, ring, wide, dtype=torch.int32)
        weights = self._new(self.lines, ring, wide, dtype=torch.float32)
        if old_ring:
            row = torch.arange(max(self.known, self.end - old_ring), self.end, device=self.device)
            ids[:, row % ring, :old_width] = self.ids[:, row % old_ring]
            weights[:, row % ring, :old_width] = self.weights[:, row % old_ring]
        self.ids, self.weights = ids, weights

    # -- the window ---------------------------------------------------------------------------------------------------

    def rewind(self, end: int) -> None:
        """Take back rows from `end` on."""
        if self.stale or end < max(self.low):
            self.stale = True  # so far back that summing again is simpler
        else:
            self._add(end, self.end, -1.0)
        self.end = end
        self._cut()

    def _cut(self) -> None:
        """Forget the dense rows from `end` on."""
        self._block = None
        kept = []
        for d in self.dense:
            if d.first < self.end < d.end:
                size = self.end - d.first
                queries = d.queries[:, :, :size] if d.queries is not None else None
                d = Dense(d.first, queries, d.rows[:, :size] if d.rows is not None else None)
            if d.end <= self.end and d.end > d.first:
                kept.append(d)
        self.dense = kept
        if self.known > self.end:
            self.forget(self.end)

    def window(self, low: list[int]) -> None:
        """Count the rows from `low` on, for each line; what is no longer known stays out."""
        low = [max(new, self.known) for new in low]
        if self.end > self.sums.shape[1]:
            self._grow_columns(self.end)
        if self.stale or min(low) >= max(self.end, 1):
            self.sums.zero_()
            self.low, self.stale = [self.end] * self.lines, False
        if low == self.low:
            return
        begin, stop = min(low + self.low), max(low + self.low)
        if len(set(low)) == len(set(self.low)) == 1:
            self._add(begin, stop, -1.0 if low[0] > self.low[0] else 1.0)
        else:
            row = torch.arange(begin, stop)
            old, new = (torch.tensor(x)[:, None] for x in (self.low, low))
            sign = ((row >= new) & (row < old)).double() - ((row >= old) & (row < new)).double()
            self._add(begin, stop, sign.to(self.device))
        self.low = low
        needed = min(low) - SLACK
        if self.dense and self.dense[0].end <= needed:
            self.known = max(self.known, self.dense[0].end)
            self.dense.pop(0)

    def _add(self, begin: int, stop: int, sign: float | Tensor) -> None:
        """Add rows [begin, stop) to the sums, times a sign, or one for each line and row ``[lines, rows]``."""

        def part(a: int, b: int) -> float | Tensor:
            return sign if isinstance(sign, float) else sign[:, a - begin : b - begin, None]

        at = begin
        if stop - begin == 1 and isinstance(sign, float) and not self.dense:  # what most steps do
            slot = at % self.ids.shape[1]
            weights = self.weights[:, slot].double()
            self.sums.scatter_add_(1, self.ids[:, slot].long(), weights if sign > 0 else weights.neg_())
            return
        while at < stop:
            inside = next((d for d in self.dense if d.first <= at < d.end), None)
            if inside is not None:
                end = min(stop, inside.end)
                for rows in self._dense(inside, at, end):
                    total = (rows.double() * part(at, at + rows.shape[1])).sum(1)
                    self.sums[:, : total.shape[1]] += total
                    at += rows.shape[1]
                continue
            end = min([stop, *(d.first for d in self.dense if d.first > at)])
            slots = torch.arange(at, end, device=self.device) % self.ids.shape[1]
            weights = self.weights[:, slots].double() * part(at, end)
            self.sums.scatter_add_(1, self.ids[:, slots].flatten(1).long(), weights.flatten(1))
            at = end

    def _dense(self, d: Dense, a: int, b: int) -> list[Tensor]:
        """Rows [a, b) of a prompt, in pieces ``[lines, T, columns]``."""
        if d.rows is not None:
            return [d.rows[:, a - d.first : b - d.first].to(self.device)]
        pieces = []
        while a < b:  # blocks lie on a grid, so that a row comes out the same whenever it is made
            first = max(a // _BLOCK * _BLOCK, d.first)
            last = min(a // _BLOCK * _BLOCK + _BLOCK, d.end)
            pieces.append(self._rows(d, first, last)[:, a - first : min(b, last) - first])
            a = min(b, last)
        return pieces

    def _rows(self, d: Dense, first: int, last: int) -> Tensor:
        if self._block is None or self._block[0] != first or self._block[1].shape[1] < last - first:
            assert self.make is not None and d.queries is not None
            rows = self.make(d.queries[:, :, first - d.first : last - d.first], first, last)
            self._block = (first, rows)
        return self._block[1]

    # -- what moves with the cache ------------------------------------------------------------------------------------

    def materialise(self, put: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> None:
        """Keep the prompt's rows instead of its queries, where the keys are about to move or working rows out again costs
        too much; `put` stores them somewhere. Rows of a lower precision count as they are stored, at the start and the end.
        """
        for d in self.dense:
            if d.rows is None:
                self._block = None
                pieces = (p.to(dtype or p.dtype) for p in self._dense(d, d.first, d.end))
                d.rows = put(torch.cat([torch.nn.functional.pad(p, (0, d.end - p.shape[2])) for p in pieces], 1))
                d.queries = self._block = None

    def reorder(self, pick: Callable[[Tensor], Tensor], batch: int) -> None:
        """Follow a batch of `batch` sequences that is reordered, repeated or thinned out."""

        def lines(t: Tensor) -> Tensor:
            return pick(t.unflatten(0, (batch, -1))).flatten(0, 1)

        self.low = [int(x) for x in lines(torch.tensor(self.low))]
        self.sums, self.ids, self.weights = lines(self.sums), lines(self.ids), lines(self.weights)
        for d in self.dense:
            d.queries = None if d.queries is None else pick(d.queries)
            d.rows = None if d.rows is None else lines(d.rows)
        self.lines, self._block = len(self.low), None
