"""Quantised rows of a KV cache, and attention of one query per sequence over them.

    x̂ = code · step + zero,   code in 0 .. 2**bits − 1

Scales belong to a token (one step and zero for each row and head) or to a channel (one for each channel and head, for
every `group` rows in turn). Codes lie row by row, so that listed rows are as easy to read as a range of them. A word
is 4 bytes of a row; byte j of word i holds at bits ``n*bits`` the code of channel ``i*(32//bits) + 4*n + j``: shift and
mask give four neighbouring channels as bytes, what the dot-product instructions take (as in :mod:`gossamer.ops.labels`).

The attention never writes dequantised rows to memory. Scales leave the inner loop: with keys scaled per channel the
query takes the steps of a group once and the zeros become one number a head; with keys scaled per token the score of a
row is ``step · (q · code) + zero · Σq``. Values mirror that: a weight takes the step of its token and the zeros sum to
one number a head, or the sum of a group of rows is scaled by channel at its end. What is left is a product with codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gossamer.errors import InputError
from gossamer.ops import _checks
from gossamer.ops._dispatch import DTYPE_CODES, native, resolve, triton_call
from gossamer.ops.decode_attention import _reference as _plain_reference

_OP, _MODULE = "quantized_decode_attention", "quantized_kv"
BITS = (2, 4, 8)
Axis = Literal["token", "channel"]


@dataclass
class QuantizedRows:
    """Quantised key or value rows of one layer. Use :meth:`allocate`, fill with :func:`quantize_rows`.

    The layout is described at the head of the module.

    >>> storage = QuantizedRows.allocate(1, 1, 2, 8, bits=8)
    >>> quantize_rows(torch.arange(16.0).view(1, 1, 2, 8), storage, 0)
    >>> dequantize_rows(storage, 1, 2).round(decimals=1).flatten().tolist()
    [8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0]
    """

    codes: Tensor
    """uint8 [B, Hkv, capacity, d * bits / 8]."""
    step: Tensor
    """float32 or bfloat16, [B, Hkv, capacity] (axis token) or [B, Hkv, groups, d] (axis channel)."""
    zero: Tensor
    """As ``step``."""
    bits: int
    """Bits of a code: 2, 4 or 8."""
    axis: Axis
    """What has a scale of its own: a ``"token"``, or a ``"channel"`` of a group of rows."""
    group: int
    """Rows that share the scales of a channel; rows ``group * i`` on are group i. 1 for axis token."""

    @staticmethod
    def allocate(
        batch: int,
        heads: int,
        capacity: int,
        dim: int,
        *,
        bits: int,
        axis: Axis = "token",
        group: int | None = None,
        scales: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> QuantizedRows:
        """Return storage for ``capacity`` rows of ``dim`` channels; its contents are uninitialised.

        ``group`` (axis channel only) defaults to all rows. ``scales`` is the dtype of step and zero: codes are computed
        from the rounded scales, so bfloat16 costs under one part in a hundred of precision, and saves half their bytes.

        Raises
        ------
        InputError
            bits other than 2, 4, 8; a dim that does not fill whole words; a group below 1; another dtype.
        """
        check_layout("QuantizedRows", dim, bits, axis, group)
        if scales not in (torch.float32, torch.bfloat16):
            raise InputError(f"QuantizedRows: scales must be float32 or bfloat16, got {scales}")
        group = 1 if axis == "token" else max(capacity, 1) if group is None else group
        shape = (batch, heads, capacity) if axis == "token" else (batch, heads, -(-capacity // group), dim)
        codes = torch.empty(batch, heads, capacity, dim * bits // 8, dtype=torch.uint8, device=device)
        step, zero = (torch.empty(shape, dtype=scales, device=device) for _ in range(2))
        return QuantizedRows(codes, step, zero, bits, axis, group)

    @property
    def capacity(self) -> int:
        """Rows that fit."""
        return self.codes.shape[2]

    @property
    def dim(self) -> int:
        """Channels of a row, d."""
        return self.codes.shape[3] * 8 // self.bits

    def nbytes(self, rows: int) -> int:
        """Bytes of the first ``rows`` rows of all sequences and heads, scales of all their groups included."""
        return self.codes.shape[0] * self.codes.shape[1] * row_bytes(self, rows)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, step and zero."""
        return self.codes, self.step, self.zero

    def map(self, change: Callable[[Tensor], Tensor]) -> QuantizedRows:
        """Return rows of the same kind with every tensor changed (moved, picked from the batch)."""
        codes, step, zero = map(change, self.tensors())
        return QuantizedRows(codes, step, zero, self.bits, self.axis, self.group)

    def grow(self, capacity: int, rows: int) -> QuantizedRows:
        """Return storage for ``capacity`` rows with the first ``rows`` copied."""
        batch, heads = self.codes.shape[:2]
        fresh = QuantizedRows.allocate(
            batch,
            heads,
            capacity,
            self.dim,
            bits=self.bits,
            axis=self.axis,
            group=None if self.axis == "token" else self.group,
            scales=self.step.dtype,
            device=self.codes.device,
        )
        fresh.codes[:, :, :rows] = self.codes[:, :, :rows]
        groups = -(-rows // self.group)
        fresh.step[:, :, :groups] = self.step[:, :, :groups]
        fresh.zero[:, :, :groups] = self.zero[:, :, :groups]
        return fresh


def row_bytes(storage: QuantizedRows, rows: int) -> int:
    """Bytes of the first ``rows`` rows of one head: codes, and the scales of all their groups."""
    scales = -(-rows // storage.group) * (1 if storage.axis == "token" else storage.dim)
    return rows * storage.codes.shape[3] + 2 * scales * storage.step.element_size()


def check_layout(op: str, dim: int, bits: int, axis: str, group: int | None) -> None:
    """Check that rows of ``dim`` channels can be stored so.

    Raises
    ------
    InputError
        They cannot.
    """
    if bits not in BITS:
        raise InputError(f"{op}: bits must be 2, 4 or 8, got {bits}")
    if axis not in ("token", "channel"):
        raise InputError(f"{op}: axis must be 'token' or 'channel', got {axis!r}")
    if dim < 1 or dim % (32 // bits):
        raise InputError(f"{op}: {bits}-bit rows need a multiple of {32 // bits} channels, got {dim}")
    if group is not None and (axis == "token" or group < 1):
        raise InputError(f"{op}: a group of {group} rows: axis 'channel' takes 1 or more, axis 'token' none")


def quantize_rows(rows: Tensor, storage: QuantizedRows, first: int) -> None:
    """Quantise rows first .. first + n − 1 into the storage, in place.

    ``step = (max − min) / (2**bits − 1)`` and ``zero = min`` over the channels of a token or over the rows of a group,
    ``code = round((x − zero) / step)``. What is constant is exact.

    Parameters
    ----------
    rows
        [B, Hkv, n, d], any float dtype.
    storage
        With room for ``first + n`` rows.
    first
        Where they begin. With axis channel at the beginning of a group; a last part of a group takes its scales from the
        rows that are there, and has to be written again, whole, to hold more.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit, rows beyond the capacity, a beginning inside a group.
    """
    op = "quantize_rows"
    batch, heads, capacity, _ = storage.codes.shape
    if rows.dim() != 4 or rows.shape[:2] != (batch, heads) or rows.shape[3] != storage.dim:
        raise InputError(
            f"{op}: rows {list(rows.shape)} do not fit storage of {batch} sequences x {heads} heads x {storage.dim} channels"
        )
    if not rows.dtype.is_floating_point or rows.device != storage.codes.device:
        raise InputError(f"{op}: rows must be floats on {storage.codes.device}, got {rows.dtype} on {rows.device}")
    if not 0 <= first <= first + rows.shape[2] <= capacity:
        raise InputError(f"{op}: rows {first} .. {first + rows.shape[2]} do not fit a capacity of {capacity}")
    if first % storage.group:
        raise InputError(f"{op}: row {first} is inside a group of {storage.group} rows: begin at the group's first row")
    new = rows.shape[2]
    if not new:
        return
    run = torch.ops.gossamer.quantize_rows if torch.compiler.is_compiling() else _quantize
    run(rows, *storage.tensors(), storage.bits, storage.axis, storage.group, first)


def dequantize_rows(storage: QuantizedRows, first: int, last: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return rows first .. last − 1 as ``code * step + zero`` (float32, then rounded to ``dtype``), [B, Hkv, n, d].

    Raises
    ------
    InputError
        Rows outside the capacity.
    """
    if not 0 <= first <= last <= storage.capacity:
        raise InputError(f"dequantize_rows: rows {first} .. {last} are outside 0 .. {storage.capacity}")
    codes = unpack(storage.codes[:, :, first:last], storage.bits).float()
    if storage.axis == "token":
        step, zero = (x[:, :, first:last, None].float() for x in (storage.step, storage.zero))
    else:
        which = torch.arange(first, last, device=codes.device) // storage.group
        step, zero = (x.float().index_select(2, which) for x in (storage.step, storage.zero))
    return codes.mul_(step).add_(zero).to(dtype)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes uint8 [..., d] into bytes [..., d * bits / 8], in the order described at the head of the module.

    >>> pack(torch.arange(8, dtype=torch.uint8), 4).tolist()
    [64, 81, 98, 115]
    """
    parts = codes.unflatten(-1, (-1, 8 // bits, 4))
    packed = parts[..., 0, :].clone()
    for n in range(1, 8 // bits):
        packed |= parts[..., n, :] << (n * bits)
    flat: Tensor = packed.flatten(-2)
    return flat


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`pack`.

    >>> unpack(torch.tensor([64, 81, 98, 115], dtype=torch.uint8), 4).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)[:, None]
    words = packed.unflatten(-1, (-1, 1, 4))
    codes: Tensor = ((words >> shifts) & ((1 << bits) - 1)).flatten(-3)
    return codes


def scales_of(rows: Tensor, dim: int, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Step and zero over a dimension of float32 rows (kept, size 1), such that the codes cover all of it.

    In bfloat16 zero is rounded down and step up, so that the extremes stay within the codes.
    """
    low, high = rows.amin(dim, keepdim=True), rows.amax(dim, keepdim=True)
    levels = (1 << bits) - 1
    if dtype is torch.float32:
        return (high - low) / levels, low
    zero = _bfloat16(low, up=False)
    return _bfloat16((high - zero.float()) / levels, up=True), zero


def _bfloat16(x: Tensor, up: bool) -> Tensor:
    """Round float32 to bfloat16 towards one end."""
    raw = x.view(torch.int32)
    lower = raw & -65536  # towards zero
    inexact = (raw != lower) & ((x > 0) if up else (x < 0))
    return torch.where(inexact, lower + 65536, lower).view(torch.float32).to(torch.bfloat16)


def _codes(rows: Tensor, step: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes uint8 of float32 rows; a NaN becomes 0."""
    step, zero = step.float(), zero.float()
    by = torch.where(step > 0, step, 1.0).reciprocal()
    return ((rows - zero) * by).round_().clamp_(0, (1 << bits) - 1).nan_to_num_(0.0).to(torch.uint8)


def _quantize_reference(
    rows: Tensor, codes: Tensor, step: Tensor, zero: Tensor, bits: int, axis: str, group: int, first: int
) -> None:
    new = rows.shape[2]
    x = rows.detach().float()
    if axis == "token":
        by, low = scales_of(x, 3, bits, step.dtype)
        step[:, :, first : first + new], zero[:, :, first : first + new] = by.squeeze(3), low.squeeze(3)
        codes[:, :, first : first + new] = pack(_codes(x, by, low, bits), bits)
        return
    whole, at = new // group * group, first // group
    for part, begin in ((x[:, :, :whole], 0), (x[:, :, whole:], whole)):
        rows_here = part.shape[2]
        if not rows_here:
            continue
        grouped = part.unflatten(2, (-1, min(group, rows_here)))  # [B, Hkv, groups, rows, d]
        by, low = scales_of(grouped, 3, bits, step.dtype)
        place = slice(at + begin // group, at + begin // group + grouped.shape[2])
        step[:, :, place], zero[:, :, place] = by.squeeze(3), low.squeeze(3)
        codes[:, :, first + begin : first + begin + rows_here] = pack(
            _codes(grouped, by, low, bits).flatten(2, 3), bits
        )


def _quantize(
    rows: Tensor, codes: Tensor, step: Tensor, zero: Tensor, bits: int, axis: str, group: int, first: int
) -> None:
    _quantize_reference(rows, codes, step, zero, bits, axis, group, first)


def quantized_decode_attention(
    query: Tensor,
    key: QuantizedRows,
    value: QuantizedRows,
    *,
    recent: tuple[Tensor, Tensor] | None = None,
    split: int | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    indices: Tensor | None = None,
    counts: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Attend one query per sequence and head over quantised rows, and over the newest rows in full precision.

    Parameters
    ----------
    query
        [B, H, d], float32, bfloat16 or float16.
    key, value
        Quantised rows of the same capacity, heads and d; bits and axes may differ. H is a multiple of Hkv and query head
        h reads KV head ``h // (H // Hkv)``.
    recent
        Key and value [B, Hkv, R, d] of rows split .. split + R − 1, dtype of ``query``. Views are fine: only the inner
        stride must be 1.
    split
        Rows from this on lie in ``recent``, those before are quantised. Default: the capacity.
    starts, lengths
        int32 [B]: rows [start, length) of each sequence take part. Default 0 and ``split + R``. With ``indices`` they
        only narrow the ids allowed.
    indices, counts, scale, return_lse
        As in :func:`~gossamer.ops.decode_attention.decode_attention`.

    Returns
    -------
    [B, H, d] in the dtype of ``query``: what :func:`~gossamer.ops.decode_attention.decode_attention` gives for the
    dequantised rows. The native kernels hold the query, its steps folded in, to 15 bits of its largest channel (7 bits if
    it is bfloat16 and codes have 2 or 4 bits, which lose six times that and more themselves) and weights to 16 bits of the largest
    of a block of rows. With ``return_lse`` also the float32 log-sum-exp [B, H].

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit, ranges beyond the rows, row ids out of range.
    """
    _check(query, key, value, recent, split)
    batch, heads, dim = query.shape
    kv_heads = key.codes.shape[1]
    split = key.capacity if split is None else split
    starts = _checks.int32(_OP, "starts", starts, (batch,), query)
    lengths = _checks.int32(_OP, "lengths", lengths, (batch,), query)
    if indices is not None:
        if indices.dim() != 3 or indices.shape[1] not in (heads, kv_heads):
            raise InputError(f"{_OP}: indices must be [B, {heads} or {kv_heads}, k], got {list(indices.shape)}")
        indices = _checks.int32(_OP, "indices", indices, (batch, *indices.shape[1:]), query)
        assert indices is not None
        counts = _checks.int32(_OP, "counts", counts, tuple(indices.shape[:2]), query)
    elif counts is not None:
        raise InputError(f"{_OP}: counts say how many indices are used, so they need indices")
    scale = 1.0 / math.sqrt(dim) if scale is None else float(scale)
    run = torch.ops.gossamer.quantized_decode_attention if torch.compiler.is_compiling() else _run
    out, lse = run(
        query,
        *key.tensors(),
        *value.tensors(),
        None if recent is None else recent[0],
        None if recent is None else recent[1],
        [key.bits, key.axis == "channel", key.group, value.bits, value.axis == "channel", value.group, split],
        starts,
        lengths,
        indices,
        counts,
        scale,
        return_lse,
    )
    return (out, lse) if return_lse else out


def _check(
    query: Tensor,
    key: QuantizedRows,
    value: QuantizedRows,
    recent: tuple[Tensor, Tensor] | None,
    split: int | None,
) -> None:
    batch, heads, capacity, _ = key.codes.shape
    if value.codes.shape[:3] != key.codes.shape[:3] or value.dim != key.dim:
        raise InputError(
            f"{_OP}: keys [{batch}, {heads}, {capacity}, {key.dim}] and values {list(value.codes.shape[:3])} of "
            f"{value.dim} channels do not fit"
        )
    shape = query.shape
    if len(shape) != 3 or shape[0] != batch or shape[2] != key.dim or not heads or shape[1] % heads:
        raise InputError(f"{_OP}: query {list(shape)} does not fit rows [{batch}, {heads}, {capacity}, {key.dim}]")
    if not query.dtype.is_floating_point:
        raise InputError(f"{_OP}: query must be a float tensor, got {query.dtype}")
    for tensor in (*key.tensors(), *value.tensors(), *(recent or ())):
        if tensor.device != query.device:
            raise InputError(f"{_OP}: query is on {query.device}, rows are on {tensor.device}")
    if key.step.dtype is not value.step.dtype:
        raise InputError(
            f"{_OP}: scales of keys and values must share a dtype, got {key.step.dtype}, {value.step.dtype}"
        )
    if split is not None and not 0 <= split <= capacity:
        raise InputError(f"{_OP}: split must lie in 0 .. {capacity}, the capacity, got {split}")
    if recent is not None:
        new, values = recent
        if new.dim() != 4 or new.shape != values.shape or (*new.shape[:2], new.shape[3]) != (batch, heads, key.dim):
            raise InputError(
                f"{_OP}: recent rows {list(new.shape)}, {list(values.shape)} do not fit [{batch}, {heads}, R, {key.dim}]"
            )
        if new.dtype is not query.dtype or values.dtype is not query.dtype:
            raise InputError(f"{_OP}: recent rows must have the query's dtype, got {new.dtype}, {values.dtype}")


def _stored(codes: Tensor, step: Tensor, zero: Tensor, kind: list[int]) -> QuantizedRows:
    bits, channel, group = kind
    return QuantizedRows(codes, step, zero, bits, "channel" if channel else "token", group)


def _reference(
    query: Tensor,
    key: QuantizedRows,
    value: QuantizedRows,
    recent: tuple[Tensor, Tensor] | None,
    split: int,
    starts: Tensor | None,
    lengths: Tensor | None,
    indices: Tensor | None,
    counts: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    rows = []
    for i, storage in enumerate((key, value)):
        old = dequantize_rows(storage, 0, split)
        rows.append(old if recent is None else torch.cat([old, recent[i].float()], 2))
    out, lse = _plain_reference(query.float(), rows[0], rows[1], starts, lengths, indices, counts, scale)
    return out.to(query.dtype), lse


class NativeRows:
    """The native kernel's view of the rows of one layer, unpacked once; trusts its arguments."""

    def __init__(
        self, key: QuantizedRows, value: QuantizedRows, recent: tuple[Tensor, Tensor] | None, dtype: torch.dtype
    ) -> None:
        near = None if recent is None else (_checks.row_major(recent[0]), _checks.row_major(recent[1]))
        parts = [[x if x.stride(-1) == 1 else x.contiguous() for x in rows.tensors()] for rows in (key, value)]
        for _, step, zero in parts:
            assert step.dtype is zero.dtype is parts[0][1].dtype
        self.held = (near, parts)  # addresses stay good
        self._native = native().QuantizedPrepared(
            (
                *(x.data_ptr() for part in parts for x in part),
                *((0, 0) if near is None else (x.data_ptr() for x in near)),
            ),
            (
                *(s for codes, step, _ in parts for s in (*codes.stride()[:3], *(*step.stride(), 1)[:3])),
                *((0,) * 6 if near is None else (*near[0].stride()[:3], *near[1].stride()[:3])),
            ),
            (*key.codes.shape[:2], key.dim),
            tuple(n for rows in (key, value) for n in (rows.bits, 0 if rows.axis == "token" else rows.group)),
            DTYPE_CODES[dtype],
            DTYPE_CODES[key.step.dtype],
        )

    def attend(
        self,
        query: Tensor,
        rows: int,
        split: int,
        scale: float,
        starts: Tensor | None = None,
        lengths: Tensor | None = None,
        indices: Tensor | None = None,
        counts: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """Attend; returns the output and how many rows were listed (by their counts)."""
        query = _checks.row_major(query)
        out = torch.empty(query.shape, dtype=query.dtype)
        read = self._native.attend(
            query.data_ptr(),
            query.stride(0),
            query.stride(1),
            query.shape[1],
            out.data_ptr(),
            0 if lse is None or not lse.numel() else lse.data_ptr(),
            _checks.pointer(starts),
            _checks.pointer(lengths),
            rows,
            split,
            (0, 0, 0, 0)
            if indices is None
            else (indices.data_ptr(), _checks.pointer(counts), indices.shape[1], indices.shape[2]),
            scale,
            torch.get_num_threads(),
        )
        if read < 0:
            _checks.raise_status(_OP, -read)
        return out, read


def _run(
    query: Tensor,
    key_codes: Tensor,
    key_step: Tensor,
    key_zero: Tensor,
    value_codes: Tensor,
    value_step: Tensor,
    value_zero: Tensor,
    recent_key: Tensor | None,
    recent_value: Tensor | None,
    kinds: list[int],
    starts: Tensor | None,
    lengths: Tensor | None,
    indices: Tensor | None,
    counts: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    key = _stored(key_codes, key_step, key_zero, kinds[:3])
    value = _stored(value_codes, value_step, value_zero, kinds[3:6])
    recent = None if recent_key is None or recent_value is None else (recent_key, recent_value)
    backend = resolve(_OP, _MODULE, query)
    if backend == "native":
        prepared = NativeRows(key, value, recent, query.dtype)
        rows = kinds[6] + (0 if recent is None else recent[0].shape[2])
        lse = query.new_empty(query.shape[:2] if return_lse else (0,), dtype=torch.float32)
        out, _ = prepared.attend(query, rows, kinds[6], scale, starts, lengths, indices, counts, lse)
        return out, lse
    if backend == "triton":
        result: tuple[Tensor, Tensor] = triton_call(_OP, _MODULE)(
            query,
            key,
            value,
            recent=recent,
            split=kinds[6],
            starts=starts,
            lengths=lengths,
            indices=indices,
            counts=counts,
            scale=scale,
        )
    else:
        with torch.no_grad():
            result = _reference(query, key, value, recent, kinds[6], starts, lengths, indices, counts, scale)
    return result if return_lse else (result[0], query.new_empty((0,), dtype=torch.float32))


_custom = torch.library.custom_op("gossamer::quantized_decode_attention", _run, mutates_args=())


@_custom.register_fake
def _fake(
    query: Tensor,
    key_codes: Tensor,
    key_step: Tensor,
    key_zero: Tensor,
    value_codes: Tensor,
    value_step: Tensor,
    value_zero: Tensor,
    recent_key: Tensor | None,
    recent_value: Tensor | None,
    kinds: list[int],
    starts: Tensor | None,
    lengths: Tensor | None,
    indices: Tensor | None,
    counts: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    lse_shape = query.shape[:2] if return_lse else (0,)
    return query.new_empty(query.shape), query.new_empty(lse_shape, dtype=torch.float32)


_custom_quantize = torch.library.custom_op("gossamer::quantize_rows", _quantize, mutates_args=("codes", "step", "zero"))


@_custom_quantize.register_fake
def _fake_quantize(
    rows: Tensor, codes: Tensor, step: Tensor, zero: Tensor, bits: int, axis: str, group: int, first: int
) -> None:
    return None
