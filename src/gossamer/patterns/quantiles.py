"""Quantiles of magnitudes over more values than fit in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.errors import CalibrationError, InputError

# A non-negative float's bits, read as an integer, keep its order: their upper 20 bits count values in bins that are a
# 2048th of the value wide, over the whole range of float32.
_SHIFT = 12
_BINS = 1 << (31 - _SHIFT)
#: Quantiles that a table holds, one for each thousandth, so that a calibration serves every sparsity.
TABLE = 1001


class MagnitudeSketch:
    """A histogram of ``|x|`` whose bins are 2⁻¹¹ of the value wide; 4 MB, whatever is added.

    >>> sketch = MagnitudeSketch()
    >>> sketch.add(torch.arange(1.0, 101.0))
    >>> 50 <= sketch.quantile(0.5) <= 50 * (1 + 2**-11)
    True
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(_BINS, dtype=torch.int64)
        self.total = 0

    def add(self, values: Tensor) -> None:
        """Count the magnitudes of `values`, any shape and float dtype.

        Raises:
            CalibrationError: some are not finite.
        """
        flat = values.detach().float().abs().flatten().cpu()
        if not bool(torch.isfinite(flat).all()):
            raise CalibrationError("activations are not finite: check the model's weights and the texts")
        self.counts += torch.bincount(flat.view(torch.int32) >> _SHIFT, minlength=_BINS)
        self.total += flat.numel()

    def quantile(self, share: float) -> float:
        """The least threshold t, up to a bin, with at least `share` of the values ``<= t``; 0 for a share of 0.

        Raises:
            InputError: `share` is not in 0 .. 1, or nothing was added.
        """
        if not 0 <= share <= 1:
            raise InputError(f"a share must be in 0 .. 1, got {share:g}")
        return float(self._quantiles(torch.tensor([share], dtype=torch.float64)))

    def table(self) -> Tensor:
        """float32 ``[1001]``: the quantiles of 0, 0.001, … 1; see `threshold_at`."""
        return self._quantiles(torch.arange(TABLE, dtype=torch.float64) / (TABLE - 1))

    def _quantiles(self, shares: Tensor) -> Tensor:
        if not self.total:
            raise InputError("a quantile needs values")
        bins = torch.searchsorted(self.counts.cumsum(0).double(), shares * self.total - 1e-6)
        # The greatest float of the bin: everything counted in it is dropped.
        ends = ((bins << _SHIFT) | ((1 << _SHIFT) - 1)).to(torch.int32).view(torch.float32)
        return torch.where(shares == 0, 0.0, ends)


def threshold_at(table: Tensor, share: float) -> Tensor:
    """The threshold that drops `share`, float32 ``[...]``, from quantile tables ``[..., 1001]``; linear in between.

    >>> threshold_at(torch.linspace(0, 2, TABLE), 0.25)
    tensor(0.5000)
    """
    if not 0 <= share <= 1 or table.shape[-1] != TABLE:
        raise InputError(f"want tables of {TABLE} quantiles and a share in 0 .. 1, got {list(table.shape)}, {share:g}")
    place = share * (TABLE - 1)
    below = round(place) if abs(place - round(place)) < 1e-9 else int(place)
    low = table[..., below].float()
    return low if below >= place else low + (place - below) * (table[..., below + 1].float() - low)


def exact_quantile(values: Tensor, share: float) -> float:
    """The same from all the values at once: the order statistic that leaves `share` of them at or below it.

    >>> exact_quantile(torch.tensor([3.0, -1.0, 2.0, 4.0]), 0.5)
    2.0
    """
    if not 0 <= share <= 1 or not values.numel():
        raise InputError(f"a quantile needs values and a share in 0 .. 1, got {values.numel()} and {share:g}")
    k = round(share * values.numel())
    return float(values.abs().flatten().float().kthvalue(k).values) if k else 0.0
