"""Dropping rows of a cache in place: the rows that stay move forward, one after another, and nothing else is copied."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.errors import InputError
from gossamer.ops import _checks
from gossamer.ops._dispatch import native, resolve, triton_call

_OP = "compact_rows"


def compact_rows(storage: Tensor, ids: Tensor, *, length: int | None = None) -> None:
    """Move rows ``ids`` of each head to the front, in place; what lies behind them afterwards is left over.

    The cost is one move of the rows behind the first dropped one. The native kernel needs no temporary memory: a row only
    ever moves forward, over rows that have moved already.

    Parameters
    ----------
    storage
        [B, Hkv, capacity, w] of any dtype (also packed codes), or [B, Hkv, capacity] for one number a row. Views are
        fine: heads and rows may lie apart.
    ids
        int32 or int64 [B, Hkv, n], ascending and distinct for each head.
    length
        Rows in use; ids lie below it. Default the capacity.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit, ids that do not ascend within ``[0, length)``. Nothing has moved then.

    >>> rows = torch.arange(5.0).view(1, 1, 5, 1)
    >>> compact_rows(rows, torch.tensor([[[1, 2, 4]]]))
    >>> rows.flatten()[:3].tolist()
    [1.0, 2.0, 4.0]
    """
    shape = storage.shape
    if storage.dim() not in (3, 4) or ids.dim() != 3 or ids.shape[:2] != shape[:2]:
        raise InputError(
            f"{_OP}: want storage [B,Hkv,capacity,w] and ids [B,Hkv,n], got {list(shape)}, {list(ids.shape)}"
        )
    if ids.dtype not in (torch.int32, torch.int64) or ids.device != storage.device:
        raise InputError(f"{_OP}: ids must be int32 or int64 on {storage.device}, got {ids.dtype} on {ids.device}")
    length = shape[2] if length is None else length
    if not 0 <= length <= shape[2] or ids.shape[2] > length:
        raise InputError(f"{_OP}: cannot keep {ids.shape[2]} of {length} rows in storage for {shape[2]}")
    run = torch.ops.gossamer.compact_rows if torch.compiler.is_compiling() else _run
    run(storage, ids, length)


def _reference(storage: Tensor, ids: Tensor, length: int) -> None:
    rows = ids.shape[2]
    if rows == 0:
        return
    ascending = rows < 2 or bool((ids.diff(dim=2) > 0).all())
    if not ascending or bool((ids[..., 0] < 0).any()) or bool((ids[..., -1] >= length).any()):
        _checks.raise_status(_OP, 5)
    index = ids.long()
    if storage.dim() == 4:
        index = index[..., None].expand(-1, -1, -1, storage.shape[3])
    storage.narrow(2, 0, rows).copy_(storage.gather(2, index))


def _run(storage: Tensor, ids: Tensor, length: int) -> None:
    # Any dtype moves alike: the backend is chosen by the device alone.
    backend = resolve(_OP, _OP, torch.empty(0, dtype=torch.float32, device=storage.device), storage)
    if storage.requires_grad:  # autograd must hear of the change, also where gradients are off for the moment
        backend = "reference"
    if backend == "triton":
        triton_call(_OP, _OP)(storage, ids, length)
    elif backend == "native" and (storage.dim() == 3 or storage.stride(3) == 1):
        _run_native(storage, ids, length)
    else:
        _reference(storage, ids, length)


def _run_native(storage: Tensor, ids: Tensor, length: int) -> None:
    ids, size = ids.contiguous(), storage.element_size()
    width = storage.shape[3] if storage.dim() == 4 else 1
    status = native().compact_rows(
        storage.data_ptr(),
        ids.data_ptr(),
        (*(s * size for s in storage.stride()[:3]), width * size),
        (*ids.shape, length),
        ids.element_size(),
        torch.get_num_threads(),
    )
    _checks.raise_status(_OP, status)


_custom = torch.library.custom_op("gossamer::compact_rows", _run, mutates_args=("storage",))


@_custom.register_fake
def _fake(storage: Tensor, ids: Tensor, length: int) -> None:
    return None
