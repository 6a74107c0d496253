"""Argument checks shared by the operators: cheap enough for every call, and one line of message each."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.errors import InputError

STATUS = {
    1: "starts and lengths must satisfy 0 <= start <= length <= number of rows",
    2: "indices hold a row id outside the rows that may be read",
    3: "counts must lie in 0 .. indices.shape[-1]",
    4: "channels hold an id outside 0 .. head_dim - 1",
    5: "ids must ascend, without repeats, within the rows in use",
    6: "a row cannot be both merged and merged into",
}
"""What the native kernels report instead of crashing: they check values while they stream, Python checks shapes
before."""


def raise_status(op: str, status: int) -> None:
    """Turn a native status code into the error it stands for."""
    if status:
        raise InputError(f"{op}: {STATUS[status]}")


def int32(op: str, name: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """Return ``tensor`` as contiguous int32 after checking its shape and device; None passes."""
    if tensor is None:
        return None
    if tuple(tensor.shape) != shape:
        raise InputError(f"{op}: {name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != like.device:
        raise InputError(f"{op}: {name} is on {tensor.device}, the other tensors are on {like.device}")
    if tensor.dtype is torch.int32:
        return tensor if tensor.is_contiguous() else tensor.contiguous()
    if tensor.dtype is torch.int64:
        return tensor.to(torch.int32)
    raise InputError(f"{op}: {name} must be int32, got {tensor.dtype}")


def attention(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check that query [B,H,d] and key, value [B,Hkv,S,d] belong together."""
    q, k = query.shape, key.shape
    if len(q) != 3 or len(k) != 4 or value.shape != k:
        raise InputError(
            f"{op}: want query [B,H,d] and key, value [B,Hkv,S,d], got {list(q)}, {list(k)}, {list(value.shape)}"
        )
    if q[0] != k[0] or q[2] != k[3] or not k[1] or q[1] % k[1] or not q[2]:
        raise InputError(f"{op}: query {list(q)} does not fit key {list(k)} (same B and d, H a multiple of Hkv)")
    dtype, device = query.dtype, query.device
    if key.dtype is not dtype or value.dtype is not dtype or not dtype.is_floating_point:
        raise InputError(f"{op}: query, key, value must share one float dtype, got {dtype}, {key.dtype}, {value.dtype}")
    if key.device != device or value.device != device:
        raise InputError(f"{op}: query, key, value must share one device, got {device}, {key.device}, {value.device}")


def prefill(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check that query [B,H,T,d] and key, value [B,Hkv,S,d], T <= S, belong together."""
    q, k = query.shape, key.shape
    if len(q) != 4 or len(k) != 4 or value.shape != k:
        raise InputError(
            f"{op}: want query [B,H,T,d] and key, value [B,Hkv,S,d], got {list(q)}, {list(k)}, {list(value.shape)}"
        )
    if q[2] > k[2]:
        raise InputError(f"{op}: {q[2]} queries stand at the last rows of {k[2]}: there are more queries than rows")
    attention(op, query.select(2, 0) if q[2] else query.new_empty(q[0], q[1], q[3]), key, value)


def row_major(tensor: Tensor) -> Tensor:
    """Return ``tensor`` with inner stride 1 (a view where it already is: caches are, and must not be copied)."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def pointer(tensor: Tensor | None) -> int:
    """Return the address that a kernel takes; 0 stands for an absent tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def bounds(
    op: str, starts: Tensor | None, lengths: Tensor | None, batch: int, rows: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return checked int64 ``starts`` and ``lengths`` [B] for a reference (None: 0 and ``rows``). Reads them back: not
    for hot paths."""
    lo = torch.zeros(batch, dtype=torch.int64, device=device) if starts is None else starts.long()
    hi = torch.full((batch,), rows, dtype=torch.int64, device=device) if lengths is None else lengths.long()
    if bool(((lo < 0) | (hi < lo) | (hi > rows)).any()):
        raise_status(op, 1)
    return lo, hi


def inside(starts: Tensor, lengths: Tensor, rows: int) -> Tensor:
    """Return the mask [B,1,rows] of rows in [start, length)."""
    row = torch.arange(rows, device=starts.device)
    return ((row >= starts[:, None]) & (row < lengths[:, None])).unsqueeze(1)
