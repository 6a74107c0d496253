"""A linear layer whose weight is stored without its zeros: as fast as what is left of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.errors import InputError
from gossamer.ops import _checks
from gossamer.ops._dispatch import DTYPE_CODES, native, resolve, triton_call
from gossamer.ops.sparse_formats import SparseWeight
from gossamer.ops.sparse_mlp import ACTIVATIONS

_OP = "sparse_linear"
_CODES = {name: code for code, name in enumerate(("silu", "relu", "gelu", "gelu_tanh"))}


def sparse_linear(
    x: Tensor,
    weight: SparseWeight,
    bias: Tensor | None = None,
    activation: str | None = None,
    added: Tensor | None = None,
) -> Tensor:
    """Compute ``activation(x @ W.T + bias + added)`` for a sparse ``W``.

    Parameters
    ----------
    x
        [..., in], any number of rows. float32 and bfloat16 run on the native kernels, other floats on the reference. With
        8-bit weights x is rounded to 8 bits first (see `quantize_rows_to_uint8`), and the sums are exact integers before
        scales are applied. uint8 are inputs that are quantised already: the integers themselves come back.
    weight
        See `pack`. Of the dtype of ``x``, or int8.
    bias
        [out] in the dtype of ``x``, or None.
    activation
        ``"relu"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"`` or None.
    added
        [..., out] in the dtype of ``x``: a residual, added before the activation.

    Returns
    -------
    [..., out] in the dtype of ``x``, accumulated in float32; int32 for uint8.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit, an unknown activation, or uint8 with anything but a plain 8-bit product.

    >>> from gossamer.ops.sparse_formats import pack
    >>> w = torch.zeros(4, 8)
    >>> w[:, 5] = torch.tensor([1.0, 2.0, 3.0, -4.0])
    >>> sparse_linear(torch.ones(1, 8), pack(w, "4x1"), activation="relu")
    tensor([[1., 2., 3., 0.]])
    """
    _check(x, weight, bias, activation, added)
    if torch.compiler.is_compiling():
        w = weight
        parts = (
            w.values,
            w.columns,
            w.pointers,
            w.masks,
            w.offsets,
            w.counts,
            w.scale,
            w.sums,
            w.act_scale,
            w.act_zero,
        )
        traced: Tensor = torch.ops.gossamer.sparse_linear(x, *parts, w.format, *w.shape, bias, activation, added)
        return traced
    return _run(x, weight, bias, activation, added)


def quantize_rows_to_uint8(x: Tensor, weight: SparseWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Round inputs ``[N, in]`` as `sparse_linear` does for an 8-bit weight: ``q = round(x / scale) + zero`` in 0 .. 255.

    Returns:
        (uint8 [N, in], float32 scale [N], int32 zero [N]). Without an ``act_scale`` in the weight, a row's range reaches from
        its smallest element (or 0) to its largest (or 0). A row that is not finite has a NaN for its scale.

    >>> from gossamer.ops.sparse_formats import pack
    >>> q, scale, zero = quantize_rows_to_uint8(torch.tensor([[-1.0, 0.0, 4.1]]), pack(torch.ones(1, 3), "bitmask", int8=True))
    >>> q.tolist(), zero.tolist()
    ([[0, 50, 255]], [50])
    """
    x = x.float()
    wrong = ~torch.isfinite(x).all(1) if x.shape[1] else torch.zeros(len(x), dtype=torch.bool, device=x.device)
    if weight.act_scale is not None and weight.act_zero is not None:
        scale, zero = weight.act_scale.expand(len(x)), weight.act_zero.int().expand(len(x))
    else:
        low = x.amin(1).clamp_max(0) if x.shape[1] else x.new_zeros(len(x))
        span = x.amax(1).clamp_min(0) - low if x.shape[1] else x.new_zeros(len(x))
        scale = torch.where(span > 0, span / 255, 1.0)
        zero = torch.where(wrong, 0.0, (-low / scale).round()).int()
    inverse = torch.where(wrong, 0.0, 1.0 / scale)
    q = (torch.where(wrong[:, None], 0.0, x) * inverse[:, None]).clamp(-512, 512).round().int() + zero[:, None]
    return q.clamp(0, 255).to(torch.uint8), torch.where(wrong, torch.nan, scale), zero


def _check(x: Tensor, w: SparseWeight, bias: Tensor | None, activation: str | None, added: Tensor | None) -> None:
    outputs, inputs = w.shape
    if x.dim() < 1 or x.shape[-1] != inputs:
        raise InputError(f"{_OP}: want x [..., {inputs}] for a weight {list(w.shape)}, got {list(x.shape)}")
    if activation is not None and activation not in _CODES:
        raise InputError(f"{_OP}: the activation is one of {', '.join(_CODES)} or None, not {activation!r}")
    if x.dtype is torch.uint8:
        if not w.int8 or bias is not None or activation is not None or added is not None:
            raise InputError(f"{_OP}: uint8 inputs take an 8-bit weight, and no bias, activation or added")
    elif not x.dtype.is_floating_point or (not w.int8 and w.values.dtype is not x.dtype):
        raise InputError(f"{_OP}: x is {x.dtype}, the weight is {w.values.dtype}")
    if w.values.device != x.device:
        raise InputError(f"{_OP}: the weight is on {w.values.device}, x on {x.device}")
    for name, other, shape in (("bias", bias, (outputs,)), ("added", added, (*x.shape[:-1], outputs))):
        if other is None:
            continue
        if tuple(other.shape) != tuple(shape):
            raise InputError(f"{_OP}: {name} must have shape {list(shape)}, got {list(other.shape)}")
        if other.dtype is not x.dtype or other.device != x.device:
            raise InputError(f"{_OP}: {name} must be {x.dtype} on {x.device}, got {other.dtype} on {other.device}")


def _run(x: Tensor, w: SparseWeight, bias: Tensor | None, activation: str | None, added: Tensor | None) -> Tensor:
    raw = x.dtype is torch.uint8
    # uint8 is nothing that `resolve` knows; the scale of the weight stands in, which is always float32.
    backend = resolve(_OP, _OP, w.scale if raw and w.scale is not None else x, bias, added)
    if backend == "triton" and _triton_takes(w):
        found: Tensor = triton_call(_OP, _OP)(x, w, bias, activation, added)
        return found
    if backend != "native":
        return _reference(x, w, bias, activation, added)
    outputs, inputs = w.shape
    shape = x.shape
    x = x.reshape(-1, inputs)
    x, rows = (x if x.stride(1) == 1 or inputs <= 1 else x.contiguous()), x.shape[0]
    bias = None if bias is None else bias.contiguous()
    added_rows = 0
    if added is not None:
        added = _checks.row_major(added.reshape(-1, outputs))
        added_rows = added.stride(0)
    out = torch.empty((*shape[:-1], outputs), dtype=torch.int32 if raw else x.dtype)
    addresses, description = w.native
    native().sparse_linear(
        addresses,
        description,
        (
            x.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if added is None else added.data_ptr(),
            out.data_ptr(),
        ),
        (
            x.stride(0),
            added_rows,
            rows,
            -1 if activation is None else _CODES[activation],
            int(raw),
            DTYPE_CODES.get(x.dtype, 0),
        ),
        torch.get_num_threads(),
    )
    return out


def _triton_takes(w: SparseWeight) -> bool:
    return w.format == "4x1" and not w.int8


def _reference(x: Tensor, w: SparseWeight, bias: Tensor | None, activation: str | None, added: Tensor | None) -> Tensor:
    if not w.int8:
        out = F.linear(x.float(), w.to_dense().float())
    else:
        rows, integers = x.reshape(-1, w.shape[1]), w.integers()
        raw = x.dtype is torch.uint8
        q, scale, zero = (rows, None, None) if raw else quantize_rows_to_uint8(rows, w)
        total = (q.double() @ integers.double().T).to(torch.int32)  # exact: far below 2^53
        if scale is None or zero is None or w.sums is None or w.scale is None:
            return total.view(*x.shape[:-1], w.shape[0])
        total = total - w.sums * zero[:, None]
        out = (total.float() * (w.scale * scale[:, None])).view(*x.shape[:-1], w.shape[0])
    if bias is not None:
        out = out + bias.float()
    if added is not None:
        out = out + added.float()
    if activation is not None:
        out = ACTIVATIONS[activation](out)
    return out.to(x.dtype)


def _traced(
    x: Tensor,
    values: Tensor,
    columns: Tensor | None,
    pointers: Tensor | None,
    masks: Tensor | None,
    offsets: Tensor | None,
    counts: Tensor | None,
    scale: Tensor | None,
    sums: Tensor | None,
    act_scale: Tensor | None,
    act_zero: Tensor | None,
    format: str,
    outputs: int,
    inputs: int,
    bias: Tensor | None,
    activation: str | None,
    added: Tensor | None,
) -> Tensor:
    weight = object.__new__(SparseWeight)  # its tensors come from one that was checked when it was made
    parts = {
        "format": format,
        "shape": (outputs, inputs),
        "values": values,
        "columns": columns,
        "pointers": pointers,
        "masks": masks,
        "offsets": offsets,
        "counts": counts,
        "scale": scale,
        "sums": sums,
        "act_scale": act_scale,
        "act_zero": act_zero,
    }
    for name, part in parts.items():
        object.__setattr__(weight, name, part)
    return _run(x, weight, bias, activation, added)


_custom = torch.library.custom_op("gossamer::sparse_linear", _traced, mutates_args=())


@_custom.register_fake
def _fake(
    x: Tensor,
    values: Tensor,
    columns: Tensor | None,
    pointers: Tensor | None,
    masks: Tensor | None,
    offsets: Tensor | None,
    counts: Tensor | None,
    scale: Tensor | None,
    sums: Tensor | None,
    act_scale: Tensor | None,
    act_zero: Tensor | None,
    format: str,
    outputs: int,
    inputs: int,
    bias: Tensor | None,
    activation: str | None,
    added: Tensor | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs), dtype=torch.int32 if x.dtype is torch.uint8 else x.dtype)
