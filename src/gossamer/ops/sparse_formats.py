"""Weights with zeros, stored without them: the formats that :func:`gossamer.ops.sparse_linear` multiplies with.

Each is built once from a dense weight ``W [out, in]`` and keeps what is not zero. Which one pays depends on how the zeros lie
and on the rows of a call:

``"4x1"``
    Four outputs at one input are kept or dropped together. The fastest for many rows: four outputs share what is read of
    ``x``. In 8 bits, four kept blocks of a block row stand side by side, as VNNI instructions take them (grouped BSR).
``"1x4"``
    One output at four neighbouring inputs. Fast for few rows; for many, nothing that is read is shared.
``"stream"``
    Any zeros: the values of a row, where each lies in its group of 32 inputs (2-byte values: 64) in one byte, and how many a
    group has. The fastest for few rows.
``"bitmask"``
    Any zeros: one bit for each weight, and the values of a row. The smallest up to 87 % zeros. In 8 bits, 64 weights are
    expanded and multiplied at a time.
``"csr"``
    Any zeros: the inputs and values of a row. The smallest for very few weights among many.
``"2:4"`` and any other ``"N:M"``
    At most N of every M neighbouring inputs: as the bitmask, with nothing to say where a row begins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import InputError
from gossamer.ops.memory import advise_huge_pages

FORMATS = ("4x1", "1x4", "csr", "bitmask", "stream")
"""Formats by name; ``"N:M"`` besides."""
INT8_FORMATS = ("4x1", "bitmask")
"""Formats that hold 8-bit values."""
MAX_INPUTS = 1 << 16
SLACK = 64
"""Zeros behind the values of a bitmask or stream: whole vectors are loaded before it is known how many elements count."""
_CODES = {"4x1": 0, "1x4": 1, "csr": 2, "bitmask": 3, "stream": 4}
_TENSORS = ("values", "columns", "pointers", "masks", "offsets", "counts", "scale", "sums", "act_scale", "act_zero")
_LONG = 4 << 20  # bytes from which huge pages are asked for
_CHUNK = 1 << 22  # weights that become masks at a time: they need eight bytes each on the way


def parse_nm(name: str) -> tuple[int, int] | None:
    """``(N, M)`` of a format called ``"N:M"``, or None for other names.

    >>> parse_nm("2:4"), parse_nm("csr")
    ((2, 4), None)
    """
    match = re.fullmatch(r"(\d+):(\d+)", name)
    return (int(match[1]), int(match[2])) if match else None


def block_sparsity(weight: Tensor, format: str = "4x1") -> float:
    """Share of the blocks of a dense ``weight [out, in]`` that are all zero; of single weights where a format has no blocks.

    A last block that the weight does not fill counts as one.

    >>> block_sparsity(torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), "4x1")
    0.5
    """
    high, wide = {"4x1": (4, 1), "1x4": (1, 4)}.get(format, (1, 1))
    kept = weight != 0
    if high > 1 or wide > 1:
        rows, inputs = -weight.shape[0] % high, -weight.shape[1] % wide
        kept = torch.nn.functional.pad(kept, (0, inputs, 0, rows))
        kept = kept.view(kept.shape[0] // high, high, -1, wide).any(3).any(1)
    return 1.0 - float(kept.sum()) / max(1, kept.numel())


@dataclass(frozen=True, eq=False)
class SparseWeight:
    """The non-zero part of ``W [out, in]``; see :func:`pack`, which makes it. B stands for block rows, n for blocks.

    Attributes:
        format: one of `FORMATS` or ``"N:M"``.
        shape: (out, in).
        values: float32, bfloat16 or another float, or int8. ``"4x1"`` [n, 4]: the four outputs of each block; in 8 bits
            [groups, 4 outputs, 4 blocks], a block row's last group filled up with zeros. ``"1x4"`` [n, 4]: four inputs.
            ``"csr"`` [n]. ``"bitmask"``, ``"stream"`` and N:M [n + 64]: row after row, and 64 zeros.
        columns: uint16 [n], or [groups, 4]: the input of a block (``"1x4"``: divided by 4), ascending in a block row; what
            fills up a group repeats the last. None for masks and streams.
        pointers: int32 [B + 1]: where a block row begins, in blocks (8-bit ``"4x1"``: groups). None for N:M.
        masks: int64 [out, ceil(in / 64)]: bit k % 64 of word k // 64 is set where input k is kept. None for others.
        offsets: uint8 [n + 64], of a stream: the input of a value, counted from the beginning of its group; 64 zeros.
        counts: uint8 [out, ceil(in / group)], of a stream: values of each group of inputs.
        scale: float32 [out], with int8: a weight is ``value * scale``.
        sums: int32 [out], with int8: the sum of an output's values, which a zero point of the inputs multiplies.
        act_scale, act_zero: float32 [] with int8, or None: inputs are quantised to ``round(x / act_scale) + act_zero`` in
            0 .. 255. None: each row of x gets its own, from its smallest and largest element.

    Raises:
        InputError: tensors that do not fit together, or name inputs that do not exist.
    """

    format: str
    shape: tuple[int, int]
    values: Tensor
    columns: Tensor | None = None
    pointers: Tensor | None = None
    masks: Tensor | None = None
    offsets: Tensor | None = None
    counts: Tensor | None = None
    scale: Tensor | None = None
    sums: Tensor | None = None
    act_scale: Tensor | None = None
    act_zero: Tensor | None = None

    def __post_init__(self) -> None:
        _check(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has tensors of its own, so addresses that are kept with these must not go along."""
        return SparseWeight.from_tensors, (self.format, self.shape, self.tensors())

    @property
    def int8(self) -> bool:
        """Whether values and inputs are multiplied in 8 bits."""
        return self.values.dtype is torch.int8

    @property
    def slack(self) -> int:
        """Zeros behind the values."""
        return SLACK if self.masks is not None or self.offsets is not None else 0

    @property
    def group(self) -> int:
        """Inputs that share a count of a stream."""
        return 128 // self.values.element_size()

    @property
    def grouped(self) -> bool:
        """Whether four blocks stand side by side."""
        return self.int8 and self.format == "4x1"

    def tensors(self) -> dict[str, Tensor]:
        """What is there, by name: what a file holds."""
        return {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}

    @classmethod
    def from_tensors(cls, format: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> SparseWeight:
        """The inverse of `tensors`, checked.

        Raises:
            InputError: a tensor is missing, unknown, or does not fit.
        """
        unknown = set(tensors) - set(_TENSORS)
        if unknown or "values" not in tensors:
            raise InputError(
                f"sparse weight: want tensors among {', '.join(_TENSORS)}, got {', '.join(sorted(tensors))}"
            )
        return cls(format, (int(shape[0]), int(shape[1])), **tensors)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @cached_property
    def nnz(self) -> int:
        """Stored weights that are not zero."""
        return int((self.values != 0).sum())

    @property
    def sparsity(self) -> float:
        """Share of the weights that are zero."""
        return 1.0 - self.nnz / max(1, self.shape[0] * self.shape[1])

    @cached_property
    def multiplied(self) -> int:
        """Stored weights, zeros inside blocks and groups included: the products that a row of x costs."""
        return int(self.values.numel()) - self.slack

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """``W [out, in]``; float32 (of ``dtype``) from 8 bits, with the scales applied.

        >>> w = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
        >>> bool((pack(w, "bitmask").to_dense() == w).all())
        True
        """
        dense = self.integers() if self.int8 else _dense(self)
        if self.scale is not None:
            dense = dense.float() * self.scale[:, None]
        return dense if dtype is None else dense.to(dtype)

    def integers(self) -> Tensor:
        """int8 ``[out, in]``: the values as they are stored in 8 bits."""
        if not self.int8:
            raise InputError("sparse weight: it holds no 8-bit values")
        return _dense(self)

    def row(self) -> Tensor:
        """int64 [n]: the block row of each block (8 bits ``"4x1"``: of each group)."""
        assert self.pointers is not None
        counts = self.pointers.diff().long()
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)

    def column(self) -> Tensor:
        """int64 [n]: the input of each value or block (``"1x4"``: divided by 4; [groups, 4] in groups); not of masks."""
        if self.offsets is None or self.counts is None:
            assert self.columns is not None
            return self.columns.long()
        counts = self.counts.long()
        starts = self.group * torch.arange(counts.shape[1], device=counts.device).expand_as(counts)
        return self.offsets[: len(self.offsets) - SLACK] + torch.repeat_interleave(starts.flatten(), counts.flatten())

    @cached_property
    def kept_per_row(self) -> int:
        """Values of a row of N:M."""
        n, m = parse_nm(self.format) or (0, 1)
        return self.shape[1] // m * n

    @cached_property
    def native(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the kernels are told of it: addresses, then the code of the format and sizes."""
        parts = [getattr(self, name) for name in _TENSORS]
        code = _CODES["bitmask" if parse_nm(self.format) else self.format]
        addresses = tuple(0 if t is None else t.data_ptr() for t in parts)
        return addresses, (*self.shape, code, self.kept_per_row, int(self.int8), self.multiplied)


def pack(
    weight: Tensor,
    format: str = "4x1",
    *,
    int8: bool = False,
    act_scale: float | None = None,
    act_zero: float = 0,
) -> SparseWeight:
    """Store a dense weight ``[out, in]`` in a format, dropping its zeros (blocks that are all zero).

    Args:
        weight: any float dtype, which the values keep; any strides; at most 65,536 inputs.
        format: ``"4x1"``, ``"1x4"``, ``"csr"``, ``"bitmask"``, ``"stream"`` or ``"N:M"``.
        int8: round to 8 bits, symmetric, one scale for each output; zeros stay zeros. ``"4x1"`` and ``"bitmask"`` only.
        act_scale, act_zero: how inputs are quantised, if not by each row itself; with ``int8`` only.

    Raises:
        InputError: the weight is no float matrix, has too many inputs, does not keep to N:M, or (8 bits) is not finite.

    >>> weight = torch.zeros(4, 8)
    >>> weight[:, 5] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    >>> packed = pack(weight, "4x1")
    >>> packed.columns.tolist(), packed.values.tolist(), packed.pointers.tolist()
    ([5], [[1.0, 2.0, 3.0, 4.0]], [0, 1])
    """
    if weight.dim() != 2 or not weight.dtype.is_floating_point:
        raise InputError(f"sparse weight: want floats [out, in], got {weight.dtype} {list(weight.shape)}")
    if format not in FORMATS and parse_nm(format) is None:
        raise InputError(f"sparse weight: the format is one of {', '.join(FORMATS)} or N:M such as 2:4, not {format!r}")
    if act_scale is not None and not int8:
        raise InputError("sparse weight: act_scale goes with int8=True")
    weight = weight.detach()
    extra: dict[str, Any] = {}
    if int8:
        if format not in INT8_FORMATS:
            raise InputError(f"sparse weight: 8 bits go with {' and '.join(INT8_FORMATS)}, not with {format}")
        if not bool(torch.isfinite(weight).all()):
            raise InputError("sparse weight: the weight has NaN or infinite elements, which 8 bits cannot hold")
        scale = (
            weight.float().abs().amax(1).clamp_min(1e-12) / 127
            if weight.numel()
            else weight.new_ones(len(weight)).float()
        )
        weight = (weight.float() / scale[:, None]).round().clamp_(-127, 127).to(torch.int8)
        extra = {"scale": scale, "sums": weight.sum(1, dtype=torch.int32)}
        if act_scale is not None:
            extra["act_scale"] = torch.tensor(float(act_scale), device=weight.device)
            extra["act_zero"] = torch.tensor(float(act_zero), device=weight.device)
    shape = (weight.shape[0], weight.shape[1])
    _check_shape(format, shape)
    return SparseWeight(format, shape, **{k: settled(t) for k, t in _packed(weight, format).items()}, **extra)


def settled(tensor: Tensor) -> Tensor:
    """The tensor, or if it is long a copy in huge pages: a weight that streams past meets a new page all the time."""
    if not tensor.is_cpu or tensor.numel() * tensor.element_size() < _LONG:
        return tensor
    placed = torch.empty_like(tensor)
    advise_huge_pages(placed)
    return placed.copy_(tensor)


def _packed(weight: Tensor, format: str) -> dict[str, Tensor]:
    outputs, inputs = weight.shape
    nm = parse_nm(format)
    if format == "bitmask" or nm is not None:
        kept = weight != 0 if nm is None else _kept_of_groups(weight, *nm)
        found = {"values": torch.cat([weight[kept], weight.new_zeros(SLACK)]), "masks": _masks(kept)}
        return found if nm is not None else {**found, "pointers": _pointers(kept.sum(1))}
    if format == "stream":
        group = 128 // weight.element_size()
        kept = weight != 0
        counts = torch.nn.functional.pad(kept, (0, -inputs % group)).view(outputs, -1, group).sum(2).to(torch.uint8)
        offsets = (kept.nonzero()[:, 1] % group).to(torch.uint8)
        return {
            "values": torch.cat([weight[kept], weight.new_zeros(SLACK)]),
            "offsets": torch.cat([offsets, offsets.new_zeros(SLACK)]),
            "counts": counts,
            "pointers": _pointers(kept.sum(1)),
        }
    if format == "csr":
        kept = weight != 0
        columns = kept.nonzero()[:, 1].to(torch.uint16)
        return {"values": weight[kept], "columns": columns, "pointers": _pointers(kept.sum(1))}
    if format == "1x4":
        blocks = torch.nn.functional.pad(weight, (0, -inputs % 4)).view(outputs, -1, 4)
        kept = (blocks != 0).any(2)
    else:
        blocks = torch.nn.functional.pad(weight, (0, 0, 0, -outputs % 4)).view(-1, 4, inputs).transpose(1, 2)
        kept = (blocks != 0).any(2)
    values, columns, counts = blocks[kept], kept.nonzero()[:, 1], kept.sum(1)
    if weight.dtype is not torch.int8:
        return {"values": values.contiguous(), "columns": columns.to(torch.uint16), "pointers": _pointers(counts)}
    return _groups(values, columns, counts)


def _groups(values: Tensor, columns: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Blocks [n, 4] as groups of four, block row by block row; the places left over repeat the last column with zeros."""
    groups = (counts + 3) // 4
    pointers, starts = _pointers(groups), counts.cumsum(0) - counts
    rows = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    place = 4 * pointers[:-1].long()[rows] + torch.arange(len(rows), device=counts.device) - starts[rows]
    last = columns[(starts + counts - 1).clamp(0, len(columns) - 1)] if len(columns) else torch.zeros_like(counts)
    filled = torch.repeat_interleave(last, 4 * groups)
    filled[place] = columns
    wide = values.new_zeros(len(filled), 4)
    wide[place] = values
    return {
        "values": wide.view(-1, 4, 4).transpose(1, 2).contiguous(),
        "columns": filled.view(-1, 4).to(torch.uint16),
        "pointers": pointers,
    }


def _pointers(counts: Tensor) -> Tensor:
    ends = counts.cumsum(0)
    if len(ends) and int(ends[-1]) >= 1 << 31:
        raise InputError("sparse weight: more than 2^31 values are too many for one weight")
    return torch.cat([ends.new_zeros(1), ends]).to(torch.int32)


def _masks(kept: Tensor) -> Tensor:
    rows, inputs = kept.shape
    words = -(-inputs // 64)
    bit = torch.ones((), dtype=torch.int64, device=kept.device) << torch.arange(64, device=kept.device)
    out = torch.empty(rows, words, dtype=torch.int64, device=kept.device)
    step = max(1, _CHUNK // max(1, inputs))
    for i in range(0, rows, step):
        part = torch.nn.functional.pad(kept[i : i + step], (0, 64 * words - inputs)).view(-1, words, 64)
        out[i : i + step] = (part * bit).sum(2)
    return out


def _kept_of_groups(weight: Tensor, n: int, m: int) -> Tensor:
    """bool [out, in] with exactly n of every m inputs: all that are not zero, and the first zeros to fill up."""
    groups = weight.view(weight.shape[0], -1, m) != 0
    if bool((groups.sum(2) > n).any()):
        raise InputError(f"sparse weight: some {m} neighbouring inputs hold more than {n} weights: it is not {n}:{m}")
    order = groups.to(torch.uint8).sort(dim=2, descending=True, stable=True).indices[:, :, :n]
    return torch.zeros_like(groups).scatter_(2, order, True).view(weight.shape)


def _bits(packed: SparseWeight) -> Tensor:
    assert packed.masks is not None
    shift = torch.arange(64, device=packed.masks.device)
    chunks = packed.masks.split(max(1, _CHUNK // max(1, packed.shape[1])))
    parts = [((words[..., None] >> shift) & 1).bool().flatten(1)[:, : packed.shape[1]] for words in chunks]
    return torch.cat(parts) if parts else packed.masks.new_zeros(packed.shape, dtype=torch.bool)


def _dense(packed: SparseWeight) -> Tensor:
    outputs, inputs = packed.shape
    values = packed.values
    if packed.masks is not None:
        dense = values.new_zeros(outputs, inputs)
        dense[_bits(packed)] = values[: len(values) - SLACK]
        return dense
    rows, columns = packed.row(), packed.column()
    if packed.format in ("csr", "stream"):
        dense = values.new_zeros(outputs, inputs)
        dense[rows, columns] = values[: len(columns)]
        return dense
    if packed.format == "1x4":
        wide = values.new_zeros(outputs, -(-inputs // 4), 4)
        wide[rows, columns] = values
        return wide.flatten(1)[:, :inputs].contiguous()
    tall = values.new_zeros(-(-outputs // 4), inputs, 4)
    if packed.grouped:  # places that fill up a group name a column that is there already, and must not overwrite it
        blocks = values.transpose(1, 2).reshape(-1, 4)
        tall.index_put_((rows.repeat_interleave(4), columns.flatten()), blocks, accumulate=True)
    else:
        tall[rows, columns] = values
    return tall.transpose(1, 2).reshape(-1, inputs)[:outputs].contiguous()


def _check_shape(format: str, shape: tuple[int, int]) -> None:
    outputs, inputs = shape
    if outputs < 0 or inputs < 0 or inputs > MAX_INPUTS:
        raise InputError(f"sparse weight: takes up to {MAX_INPUTS} inputs, got {list(shape)}")
    nm = parse_nm(format)
    if nm is not None and (not 1 <= nm[0] <= nm[1] or inputs % nm[1]):
        raise InputError(
            f"sparse weight: {format} needs 1 <= N <= M and inputs in whole groups of {nm[1]}, got {inputs}"
        )


def _check(w: SparseWeight) -> None:
    def want(fits: object, what: str) -> None:
        if not fits:
            raise InputError(f"sparse weight {w.format} {list(w.shape)}: {what}")

    nm = parse_nm(w.format)
    want(w.format in FORMATS or nm is not None, f"the format is one of {', '.join(FORMATS)} or N:M")
    _check_shape(w.format, w.shape)
    outputs, inputs = w.shape
    blocked, masked, stream = w.format in ("4x1", "1x4"), w.format == "bitmask" or nm is not None, w.format == "stream"
    want(
        w.values.dtype.is_floating_point or (w.int8 and w.format in INT8_FORMATS), f"values cannot be {w.values.dtype}"
    )
    dims = 3 if w.grouped else 2 if blocked else 1
    want(w.values.dim() == dims and tuple(w.values.shape[1:]) == (4,) * (dims - 1), "values have the wrong shape")
    block_rows = -(-outputs // 4) if w.format == "4x1" else outputs
    count = len(w.values) - (SLACK if masked or stream else 0)
    rules: tuple[tuple[str, bool, torch.dtype, tuple[int, ...]], ...] = (
        ("columns", not (masked or stream), torch.uint16, (count, 4) if w.grouped else (count,)),
        ("pointers", nm is None, torch.int32, (block_rows + 1,)),
        ("masks", masked, torch.int64, (outputs, -(-inputs // 64))),
        ("offsets", stream, torch.uint8, (count + SLACK,)),
        ("counts", stream, torch.uint8, (outputs, -(-inputs // w.group))),
        ("scale", w.int8, torch.float32, (outputs,)),
        ("sums", w.int8, torch.int32, (outputs,)),
        ("act_scale", w.int8 and w.act_scale is not None, torch.float32, ()),
        ("act_zero", w.int8 and w.act_scale is not None, torch.float32, ()),
    )
    for name, needed, dtype, shape in rules:
        tensor = getattr(w, name)
        want((tensor is not None) == needed, f"{name} {'is missing' if needed else 'does not belong here'}")
        if tensor is not None:
            want(tensor.dtype is dtype and tuple(tensor.shape) == shape, f"{name} must be {dtype} {list(shape)}")
            want(tensor.device == w.values.device, f"{name} and the values are on different devices")
    for name, tensor in w.tensors().items():
        want(tensor.is_contiguous(), f"{name} must be contiguous")
    if w.values.is_meta:
        return
    if w.pointers is not None:
        ordered = int(w.pointers[0]) == 0 and int(w.pointers[-1]) == count and bool((w.pointers.diff() >= 0).all())
        want(ordered, "pointers must ascend from 0 to the number of values")
    if w.columns is not None and w.columns.numel():
        limit = -(-inputs // 4) if w.format == "1x4" else inputs
        want(int(w.columns.to(torch.int32).max()) < limit, "columns name an input that is not there")
    if w.masks is not None:
        bits = _bit_counts(w.masks)
        if inputs % 64 and w.masks.numel():
            want(not bool((w.masks[:, -1] >> (inputs % 64)).any()), "masks name an input that is not there")
        wanted = w.pointers.diff() if w.pointers is not None else torch.full_like(bits, w.kept_per_row)
        want(
            count == int(bits.sum()) and bool((bits == wanted).all()),
            "masks keep another number of values than there are",
        )
    if w.offsets is not None and w.counts is not None and w.pointers is not None:
        counted = w.counts.sum(1, dtype=torch.int64)
        want(bool((counted == w.pointers.diff()).all()), "counts keep another number of values than there are")
        want(count == 0 or int(w.column().max()) < inputs, "offsets name an input that is not there")
        want(not w.offsets.numel() or int(w.offsets.max()) < w.group, "offsets name an input that is not there")
    if w.act_scale is not None and w.act_zero is not None:
        scale, zero = float(w.act_scale), float(w.act_zero)
        want(0 < scale < float("inf") and zero in range(256), "act_scale must be positive and act_zero in 0 .. 255")


def _bit_counts(masks: Tensor) -> Tensor:
    """int64 [rows]: the bits that are set in a row of words."""
    x = masks
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return sum(((x >> shift) & 0xFF).sum(1) for shift in range(0, 64, 8)) + masks.new_zeros(len(masks))
