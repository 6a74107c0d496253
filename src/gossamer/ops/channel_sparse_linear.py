"""A linear layer at the few rows of a decode step that reads only the weights of its large inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.errors import InputError
from gossamer.ops.linear import MAX_ROWS

_OP = "channel_sparse_linear"


def channel_sparse_linear(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Multiply ``(x where |x| > threshold, else 0) @ weight + bias``.

    Parameters
    ----------
    x
        [M, K], 1 to 8 rows, float32 or bfloat16 (others: reference).
    weight
        [K, N], one row for each input channel, inner stride 1; dtype of ``x``, or int8 with ``scale``. A row is read where
        some row of ``x`` keeps its channel.
    threshold
        float32 [] or [K]; None: 0, so that exact zeros are skipped. A NaN in ``x`` is kept.
    bias
        [N] in the dtype of ``x``, or None.
    scale
        float32 [K]: channel k's weights are ``weight[k] * scale[k]``.
    counts
        int64 [M + 1], is overwritten: channels kept for each row, and channels kept for any.

    Returns
    -------
    [M, N] in the dtype of ``x``, accumulated in float32.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit, or more than 8 rows.

    >>> channel_sparse_linear(torch.tensor([[1.0, 0.1]]), torch.tensor([[1.0, 2.0], [50.0, 50.0]]), torch.tensor(0.5))
    tensor([[1., 2.]])
    """
    check(_OP, x, weight, threshold, bias, scale, counts)
    return _reference(x, weight, threshold, bias, scale, counts)


def check(
    op: str,
    x: Tensor,
    weight: Tensor,
    threshold: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    counts: Tensor | None,
) -> None:
    """Raise `InputError` for arguments that do not fit."""
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[0]:
        raise InputError(f"{op}: want x [M,K] and weight [K,N], got {list(x.shape)}, {list(weight.shape)}")
    if not 1 <= x.shape[0] <= MAX_ROWS:
        raise InputError(f"{op}: takes 1 to {MAX_ROWS} rows, got {x.shape[0]}")
    if not x.dtype.is_floating_point:
        raise InputError(f"{op}: takes floats, got {x.dtype}")
    if weight.dtype is not x.dtype and not (weight.dtype is torch.int8 and scale is not None):
        raise InputError(f"{op}: weight is {weight.dtype}, x is {x.dtype}; int8 weights need a scale")
    k, n = weight.shape
    for name, other, shapes in (
        ("threshold", threshold, ([], [k])),
        ("bias", bias, ([n],)),
        ("scale", scale, ([k],)),
        ("counts", counts, ([x.shape[0] + 1],)),
    ):
        if other is not None and list(other.shape) not in shapes:
            raise InputError(f"{op}: {name} must have shape {shapes[-1]}, got {list(other.shape)}")
    for name, other in (("weight", weight), ("threshold", threshold), ("bias", bias), ("scale", scale)):
        if other is not None and other.device != x.device:
            raise InputError(f"{op}: {name} is on {other.device}, x on {x.device}")


def _reference(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    counts: Tensor | None,
) -> Tensor:
    a = x.float()
    kept = ~(a.abs() <= (0.0 if threshold is None else threshold.float()))
    matrix = weight.float() if scale is None else weight.float() * scale[:, None]
    out = torch.where(kept, a, 0.0) @ matrix
    if bias is not None:
        out = out + bias.float()
    if counts is not None:
        counts[:-1] = kept.sum(-1)
        counts[-1] = kept.any(0).sum()
    return out.to(x.dtype)
