"""The linear layer at the few rows of a decode step, where the bytes of the weight are the whole cost."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.errors import InputError
from gossamer.ops._dispatch import DTYPE_CODES, is_forced, native, resolve

_OP = "linear"
DTYPES = tuple(DTYPE_CODES)
"""What the native kernel takes."""
MAX_ROWS = 8
"""Rows that the native kernel takes; more of them are work for a matrix library."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply ``x @ weight.T + bias``, reading the weight once for all rows.

    Parameters
    ----------
    x
        [M, K], 1 to 8 rows; float32 or bfloat16 run on the native kernel, other floats on the reference.
    weight
        [N, K] as in ``torch.nn.Linear``, dtype of ``x``, any row stride with inner stride 1. Never copied.
    bias
        [N] or None.

    Returns
    -------
    [M, N] in the dtype of ``x``, accumulated in float32.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit, or more than 8 rows.

    >>> linear(torch.ones(1, 3), torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]]))
    tensor([[6., 1.]])
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise InputError(f"{_OP}: want x [M,K] and weight [N,K], got {list(x.shape)}, {list(weight.shape)}")
    if not 1 <= x.shape[0] <= MAX_ROWS:
        raise InputError(f"{_OP}: takes 1 to {MAX_ROWS} rows, got {x.shape[0]}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"{_OP}: bias must have shape {list(weight.shape[:1])}, got {list(bias.shape)}")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and (other.dtype is not x.dtype or other.device != x.device):
            raise InputError(f"{_OP}: {name} is {other.dtype} on {other.device}, x is {x.dtype} on {x.device}")
    if not x.dtype.is_floating_point:
        raise InputError(f"{_OP}: takes floats, got {x.dtype}")
    run = torch.ops.gossamer.linear if torch.compiler.is_compiling() else _run
    out: Tensor = run(x, weight, bias)
    return out


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether :func:`few_rows` serves these tensors: plain, on the CPU, without gradients, no backend forced."""
    dtype = weight.dtype
    return (
        x.dtype is dtype
        and dtype in DTYPE_CODES
        and x.is_cpu
        and weight.is_cpu
        and weight.layout is torch.strided
        and weight.stride(1) == 1
        and x.is_contiguous()
        and (bias is None or (bias.dtype is dtype and bias.is_cpu and bias.is_contiguous()))
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not is_forced()
        and native() is not None
    )


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, shape: tuple[int, ...]) -> Tensor:
    """The native kernel on ``x`` with ``rows`` rows in any leading dimensions; the result has ``shape``. Checks nothing:
    see :func:`takes`."""
    outputs, columns = weight.shape
    out = torch.empty(shape, dtype=weight.dtype)
    native().linear(
        x.data_ptr(),
        columns,
        weight.data_ptr(),
        weight.stride(0),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows,
        columns,
        outputs,
        DTYPE_CODES[weight.dtype],
        torch.get_num_threads(),
    )
    return out


def _run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    backend = resolve(_OP, _OP, x, weight, bias)
    if backend != "native" or weight.stride(-1) != 1:
        return F.linear(x, weight, bias)
    bias = None if bias is None else bias.contiguous()
    return few_rows(x.contiguous(), weight, bias, x.shape[0], (x.shape[0], weight.shape[0]))


_custom = torch.library.custom_op("gossamer::linear", _run, mutates_args=())


@_custom.register_fake
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
