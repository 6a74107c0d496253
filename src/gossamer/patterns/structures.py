"""Structures of a pruned matrix: which entries of ``[out, in]`` live and die together, and how a ranking becomes a mask.

    element      every entry by itself              (unstructured)
    n:m          n entries of every m consecutive inputs of a row stay
    RxC          blocks of R outputs by C inputs, as 4x1
    row, column  an output, an input                 (a conv's filter is a row)
    rows:R       R consecutive outputs               (R = head_dim: an attention head)

Ranks break ties by index, the earlier entry stays, so counts are exact whatever the values, and masks of rising sparsity
are nested.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gossamer.errors import InputError

Reduce = Literal["sum", "mean", "max"]

_TEXT = re.compile(r"(?:(?P<n>\d+):(?P<m>\d+)|(?P<r>\d+)x(?P<c>\d+)|rows:(?P<rows>\d+))")


@dataclass(frozen=True)
class Structure:
    """A structure, read from its text by `parse`.

    Attributes:
        kind: element, n:m or block.
        n, m: of n:m.
        rows, columns: of a block; 0 stands for all of them.

    >>> Structure.parse("2:4"), Structure.parse("column").rows
    (Structure(kind='n:m', n=2, m=4, rows=1, columns=1), 0)
    """

    kind: Literal["element", "n:m", "block"] = "element"
    n: int = 0
    m: int = 0
    rows: int = 1
    columns: int = 1

    @classmethod
    def parse(cls, text: str | Structure) -> Structure:
        """Read ``element``, ``2:4``, ``4x1``, ``row``, ``column`` or ``rows:64``.

        Raises:
            InputError: it is none of these, or a size is zero.
        """
        if isinstance(text, Structure):
            return text
        if text in ("element", "unstructured"):
            return cls()
        if text == "row":
            return cls("block", rows=1, columns=0)
        if text == "column":
            return cls("block", rows=0, columns=1)
        found = _TEXT.fullmatch(text)
        numbers = {k: int(v) for k, v in found.groupdict().items() if v is not None} if found else {}
        if not numbers or min(numbers.values()) < 1 or numbers.get("n", 0) > numbers.get("m", 0):
            raise InputError(f"a structure is element, N:M, RxC, row, column or rows:R; got {text!r}")
        if "m" in numbers:
            return cls("n:m", n=numbers["n"], m=numbers["m"])
        if "rows" in numbers:
            return cls("block", rows=numbers["rows"], columns=0)
        return cls("block", rows=numbers["r"], columns=numbers["c"])

    def __str__(self) -> str:
        if self.kind == "n:m":
            return f"{self.n}:{self.m}"
        if self.kind == "element":
            return "element"
        if self.rows and self.columns:
            return f"{self.rows}x{self.columns}"
        return "column" if not self.rows else "row" if self.rows == 1 else f"rows:{self.rows}"

    def size(self, shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of one group in a matrix ``[out, in]``.

        Raises:
            InputError: groups do not tile the matrix.
        """
        outputs, inputs = shape
        rows, columns = (1, self.m) if self.kind == "n:m" else (self.rows or outputs, self.columns or inputs)
        if outputs % rows or inputs % columns:
            raise InputError(f"structure {self}: a matrix {outputs} x {inputs} is no multiple of {rows} x {columns}")
        return rows, columns

    def pool(self, score: Tensor, reduce: Reduce = "sum") -> Tensor:
        """Scores of the groups, ``[out / rows, in / columns]``, from scores of the entries ``[out, in]``.

        >>> Structure.parse("2x1").pool(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([[4., 6.]])
        """
        if self.kind != "block":
            return score
        rows, columns = self.size(score.shape)
        parts = score.reshape(score.shape[0] // rows, rows, score.shape[1] // columns, columns)
        pooled: Tensor = parts.amax((1, 3)) if reduce == "max" else getattr(parts, reduce)((1, 3))
        return pooled

    def expand(self, kept: Tensor, shape: Sequence[int]) -> Tensor:
        """The mask of the entries, bool ``[out, in]``, from that of the groups."""
        if self.kind != "block":
            return kept
        rows, columns = self.size(shape)
        return kept.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def nm_mask(score: Tensor, n: int, m: int) -> Tensor:
    """Keep the n largest of every m consecutive inputs: bool ``[out, in]``.

    Raises:
        InputError: the inputs are no multiple of m.

    >>> nm_mask(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), 2, 4)
    tensor([[False,  True,  True, False]])
    """
    Structure("n:m", n=n, m=m).size(score.shape)
    groups = score.reshape(-1, m)
    order = groups.sort(dim=1, descending=True, stable=True).indices
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, :n], True)
    return kept.view(score.shape)


_CHUNK = 1 << 22


def _sortable(x: Tensor) -> Tensor:
    """int32 keys that order as the float32 values do, -0 as +0."""
    bits = (x.float() + 0.0).view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _chunks(parts: Sequence[Tensor]) -> list[Tensor]:
    return [chunk for part in parts for chunk in part.reshape(-1).split(_CHUNK)]


def keep_largest(scores: Sequence[Tensor], remove: int) -> list[Tensor]:
    """Masks that drop the `remove` smallest of all scores together, the later of equal ones first; exact.

    Two passes over the bits of the scores (radix selection) find the threshold, so nothing is sorted or copied whole, and
    a model of any size is ranked in little memory. Scores are compared as float32.

    Args:
        scores: tensors of any shapes; finite, or infinite to force an entry out (-inf) or in (+inf).
        remove: how many go.

    Raises:
        InputError: more are to go than there are, or a score is NaN.

    >>> [mask.tolist() for mask in keep_largest([torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])], 1)]
    [[True, True], [False, True]]
    """
    total = sum(score.numel() for score in scores)
    if not 0 <= remove <= total:
        raise InputError(f"{remove} of {total} entries cannot be removed")
    if any(bool(score.isnan().any()) for score in scores):
        raise InputError("scores to prune by must not be NaN: check the weights and the calibration")
    if remove == 0:
        return [torch.ones_like(score, dtype=torch.bool) for score in scores]
    rank, high, below = remove, 0, 0
    for low_half in (False, True):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for chunk in _chunks(scores):
            keys = _sortable(chunk)
            if low_half:
                keys = keys[(keys >> 16) == high]
                digits = (keys & 0xFFFF).long()
            else:
                digits = ((keys >> 16) + (1 << 15)).long()
            counts += torch.bincount(digits, minlength=1 << 16).cpu()
        reached = counts.cumsum(0)
        digit = int(torch.searchsorted(reached, rank))
        before = int(reached[digit - 1]) if digit else 0
        rank, below = rank - before, below + before
        if low_half:
            threshold = (high << 16) | digit
        else:
            high = digit - (1 << 15)
    ties_to_drop = remove - below
    ties_seen, kept = 0, []
    ties = sum(int((_sortable(chunk) == threshold).sum()) for chunk in _chunks(scores))
    first_dropped = ties - ties_to_drop  # the later ones go
    for score in scores:
        keys = _sortable(score.reshape(-1))
        mask = keys > threshold
        equal = keys == threshold
        count = int(equal.sum())
        stay = min(max(first_dropped - ties_seen, 0), count)
        if stay:
            mask[equal.nonzero()[:stay, 0]] = True
        ties_seen += count
        kept.append(mask.view(score.shape))
    return kept
