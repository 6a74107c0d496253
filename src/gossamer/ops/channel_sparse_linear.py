"""A linear layer at the few rows of a decode step that reads only the weights of its large inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.errors import InputError
from gossamer.ops import _checks
from gossamer.ops._dispatch import DTYPE_CODES, native, resolve, triton_call
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
    run = torch.ops.gossamer.channel_sparse_linear if torch.compiler.is_compiling() else _run
    out: Tensor = run(x, weight, threshold, bias, scale, counts)
    return out


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
    if weight.stride(1) != 1 and weight.shape[1] > 1:
        raise InputError(f"{op}: weight needs inner stride 1, got strides {list(weight.stride())}")
    (rows, k), n = x.shape, weight.shape[1]
    for name, other, shape, dtype in (
        ("threshold", threshold, (k,), torch.float32),
        ("bias", bias, (n,), x.dtype),
        ("scale", scale, (k,), torch.float32),
        ("counts", counts, (rows + 1,), torch.int64),
        ("weight", weight, weight.shape, weight.dtype),
    ):
        if other is None:
            continue
        if other.shape != shape and not (other is threshold and other.dim() == 0):
            raise InputError(f"{op}: {name} must have shape {list(shape)}, got {list(other.shape)}")
        if other.dtype is not dtype:
            raise InputError(f"{op}: {name} must be {dtype}, got {other.dtype}")
        if other.device != x.device:
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


def _run(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    counts: Tensor | None,
) -> Tensor:
    backend = resolve(_OP, _OP, x, weight, bias, threshold, scale)
    if backend == "triton":
        found: Tensor = triton_call(_OP, _OP)(x, weight, threshold, bias, scale, counts)
        return found
    if backend != "native" or not (counts is None or counts.is_contiguous()):
        return _reference(x, weight, threshold, bias, scale, counts)
    threshold, bias, scale = (None if t is None else t.contiguous() for t in (threshold, bias, scale))
    return run_native(_checks.row_major(x), weight, threshold, bias, scale, counts)


def run_native(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    counts: Tensor | None,
) -> Tensor:
    """The native kernel without the checks: for callers that made them, once, for all their calls."""
    outputs = weight.shape[1]
    out = torch.empty(x.shape[0], outputs, dtype=x.dtype)
    native().channel_sparse_linear(
        tuple(_checks.pointer(t) for t in (x, weight, threshold, bias, scale, counts, out)),
        (x.stride(0), weight.stride(0), *x.shape, outputs),
        threshold is not None and threshold.dim() > 0,
        weight.dtype is torch.int8,
        DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
    )
    return out


_custom = torch.library.custom_op("gossamer::channel_sparse_linear", _run, mutates_args=("counts",))


@_custom.register_fake
def _fake(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    counts: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])
