"""A KV cache in two precisions: important tokens in more bits, the others in fewer, the newest in full.

Keys are quantised per channel over the tokens of a part, values per token after a division by a factor per channel, which
takes away what outlier channels would cost every token ("channel-separable", Liu et al., ZipCache, arXiv 2405.14256):

    K:  x̂ = round((x − min)/Δ)·Δ + min,  Δ = (max − min)/(2^b − 1), over the tokens of a part for each head and channel
    V:  c_i = sqrt(max_j |V_ji|),  V/c the same way over the channels of each token,  times c_i again

Attention over a part runs on its codes; c is multiplied once, onto the part's output. Parts and the newest rows are
merged by their log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gossamer.errors import InputError
from gossamer.hf.cache import KVLayer, _round_up
from gossamer.hf.offload import Allocator
from gossamer.ops import Prepared, decode_attention, merge_attention
from gossamer.ops._dispatch import DTYPE_CODES, is_forced, native
from gossamer.ops.quantized_kv import (
    NativeRows,
    QuantizedRows,
    dequantize_rows,
    quantize_rows,
    quantized_decode_attention,
)

_STORED, _BESIDE = ("codes", "step", "zero"), ("factor", "counts", "positions")


def channel_factors(value: Tensor) -> Tensor:
    """c, the square root of the largest magnitude of each channel over the rows of ``[batch, kv_heads, n, d]``.

    Returns:
        float32 ``[batch, kv_heads, d]``; 1 for a channel of zeros.

    >>> channel_factors(torch.tensor([[[[4.0, 0.0], [-9.0, 0.0]]]])).tolist()
    [[[3.0, 1.0]]]
    """
    largest = value.detach().float().abs().amax(2)
    return torch.where(largest > 0, largest, 1.0).sqrt()


@dataclass
class Part:
    """Some tokens of one layer, quantised with parameters of their own; make it with `quantize_part`.

    Attributes:
        key: codes of the keys, scales per channel over all rows of the part.
        value: codes of the values over `factor`, scales per token.
        factor: c, float32 ``[batch, kv_heads, d]``.
        counts: int32 ``[batch]``, how many rows of each sequence count; the others repeat a row.
        positions: int64 ``[batch, n]``, which token each row is.
    """

    key: QuantizedRows
    value: QuantizedRows
    factor: Tensor
    counts: Tensor
    positions: Tensor

    @property
    def rows(self) -> int:
        """Rows stored for each sequence and head."""
        return self.positions.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and factors."""
        codes = self.key.nbytes(self.rows) + self.value.nbytes(self.rows)
        return codes + self.factor.numel() * self.factor.element_size()

    def map(self, change: Callable[[Tensor], Tensor]) -> Part:
        """The same part with every tensor changed (other sequences of the batch)."""
        key, value = self.key.map(change), self.value.map(change)
        return Part(key, value, change(self.factor), change(self.counts), change(self.positions))

    def dequantize(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, kv_heads, n, d]``."""
        value = dequantize_rows(self.value, 0, self.rows).mul_(self.factor.unsqueeze(2))
        return dequantize_rows(self.key, 0, self.rows, dtype), value.to(dtype)


def quantize_part(
    key: Tensor,
    value: Tensor,
    ids: Sequence[Tensor],
    bits: int,
    *,
    first: int = 0,
    scales: torch.dtype = torch.bfloat16,
) -> Part:
    """Quantise the rows `ids` of each sequence as one part.

    Args:
        key, value: ``[batch, kv_heads, n, d]``.
        ids: int64, one tensor a sequence, of any lengths. Shorter ones are filled up with a row that is there already,
            which changes no scale; a sequence without ids is filled with its row 0, and counts for nothing.
        bits: 2, 4 or 8.
        first: the token that row 0 is.
        scales: dtype of the scales, one pair a channel for keys and one a token for values.

    Raises:
        InputError: no rows at all, bits that there are not, or a head size that does not fill words of such codes.
    """
    batch, heads, _, dim = key.shape
    if len(ids) != batch or not any(map(len, ids)):
        raise InputError(f"quantize_part: want row ids for each of {batch} sequences, and some row at all")
    if not bool(key.isfinite().all() and value.isfinite().all()):
        raise InputError("quantize_part: keys and values must be finite")
    counts = torch.tensor([len(line) for line in ids], dtype=torch.int32, device=key.device)
    table = pad_sequence([*ids], batch_first=True, padding_value=-1)
    head = torch.stack([line[0] if len(line) else line.new_zeros(()) for line in ids])
    table = torch.where(table < 0, head[:, None], table)
    index = table[:, None, :, None].expand(-1, heads, -1, dim)
    key, value = key.gather(2, index), value.gather(2, index).float()
    with torch.inference_mode(False):  # storage made in inference mode could not be written outside it
        stored_key = QuantizedRows.allocate(
            batch, heads, table.shape[1], dim, bits=bits, axis="channel", scales=scales, device=key.device
        )
        stored_value = QuantizedRows.allocate(
            batch, heads, table.shape[1], dim, bits=bits, axis="token", scales=scales, device=key.device
        )
    factor = channel_factors(value)
    quantize_rows(key, stored_key, 0)
    quantize_rows(value / factor.unsqueeze(2), stored_value, 0)
    return Part(stored_key, stored_value, factor, counts, table + first)


class MixedPrecisionKV(KVLayer):
    """Keys and values of one layer: quantised parts, and the newest rows in full precision.

    Rows are numbered by token as in any `KVLayer`, nothing is dropped, but padding is not stored once it was compressed:
    it reads as zeros. `key_storage` and `value_storage` hold the rows from `split` on.

    Attributes:
        parts: two for each time that rows were compressed, in more bits and in fewer, unless one would be empty.
        split: rows that were compressed.

    Args:
        bits: of important tokens, and of the others.

    >>> layer = MixedPrecisionKV(bits=(4, 2))
    >>> keys, values = layer.update(torch.randn(1, 1, 8, 16), torch.randn(1, 1, 8, 16))
    >>> layer.compress([torch.tensor([0, 7])])
    >>> [(part.key.bits, part.rows) for part in layer.parts], layer.length, layer.recent
    ([(4, 2), (2, 6)], 8, 0)
    """

    def __init__(self, reserve: int = 0, allocate: Allocator | None = None, *, bits: tuple[int, int] = (4, 2)) -> None:
        super().__init__(reserve, allocate)
        self.bits = bits
        self.parts: list[Part] = []
        self.split = 0
        self._parts_bytes = 0

    @property
    def recent(self) -> int:
        """Rows in full precision: those since the last compression."""
        return self.length - self.split

    @property
    def recent_rows(self) -> tuple[Tensor, Tensor]:
        """Their keys and values ``[batch, kv_heads, recent, head_dim]`` (views)."""
        assert self.key_storage is not None and self.value_storage is not None
        return self.key_storage.narrow(2, 0, self.recent), self.value_storage.narrow(2, 0, self.recent)

    @classmethod
    def of(cls, bits: tuple[int, int], layer: KVLayer | None) -> MixedPrecisionKV:
        """This layer, or one in mixed precision with its rows, all of them recent."""
        if isinstance(layer, cls) and layer.bits == bits:
            return layer
        if layer is None:
            return cls(bits=bits)
        made = cls(layer.reserve, layer.allocate, bits=bits)
        if layer.is_initialized:
            with made._only_recent():
                KVLayer.update(made, layer.key_rows(0, layer.length), layer.value_rows(0, layer.length))
        made.dropped, made._kept = layer.dropped, layer._kept
        made.starts, made.row_positions, made.saved = layer.starts, layer.row_positions, layer.saved
        for runtime, parts in layer.states().items():
            made.carried[runtime] = parts
        return made

    @contextmanager
    def _only_recent(self) -> Iterator[None]:
        """Inside, `length` is that of the storage."""
        self.length -= self.split
        try:
            yield
        finally:
            self.length += self.split

    def key_rows(self, first: int, last: int) -> Tensor:
        """Key rows ``[batch, kv_heads, last - first, head_dim]``, dequantised where they are quantised."""
        return self._rows(0, first, last)

    def value_rows(self, first: int, last: int) -> Tensor:
        """Value rows, as `key_rows`."""
        return self._rows(1, first, last)

    def _rows(self, which: int, first: int, last: int) -> Tensor:
        recent = self.recent_rows[which]
        if first >= self.split:
            return recent.narrow(2, first - self.split, last - first)
        whole = recent.new_zeros(*recent.shape[:2], self.length, recent.shape[3])
        for part in self.parts:
            rows = part.dequantize(recent.dtype)[which]
            for b, count in enumerate(part.counts.tolist()):
                whole[b, :, part.positions[b, :count]] = rows[b, :, :count]
        whole[:, :, self.split :] = recent
        return whole.narrow(2, first, last - first)

    def compress(self, important: Sequence[Tensor], starts: Tensor | None = None) -> None:
        """Quantise all recent rows: those named in more bits, the others in fewer, and free what they took.

        Args:
            important: for each sequence int64 ids of rows, ascending, at least `split`.
            starts: int ``[batch]``, the first real row of each sequence; padding goes.

        Raises:
            InputError: ids outside the recent rows, or rows that are not finite.
        """
        key, value = self.recent_rows
        batch = key.shape[0]
        first = [0] * batch if starts is None else (starts - self.split).clamp(0, self.recent).tolist()
        high: list[Tensor] = []
        low: list[Tensor] = []
        for line, start in zip(important, first, strict=True):
            ids = line - self.split
            if len(ids) and not start <= int(ids.min()) <= int(ids.max()) < self.recent:
                raise InputError(f"rows to compress must lie within {self.split + start} .. {self.length}")
            other = torch.ones(self.recent, dtype=torch.bool, device=ids.device)
            other[ids], other[:start] = False, False
            high.append(ids)
            low.append(other.nonzero()[:, 0])
        for rows, bits in ((high, self.bits[0]), (low, self.bits[1])):
            if any(map(len, rows)):
                self.parts.append(quantize_part(key, value, rows, bits, first=self.split))
        self._parts_bytes = sum(part.nbytes for part in self.parts)
        if self.split == 0:
            seen, self.length = self.length, 0  # nothing to copy
            self._reallocate(_round_up(max(1, self.reserve - seen)))
            self.length = seen
        self.split = self.length

    # -- what a layer of a cache does -------------------------------------------------------------------------------------

    @property
    def keys(self) -> Tensor | None:
        """All keys, dequantised."""
        return None if self.key_storage is None else self.key_rows(0, self.length)

    @property
    def values(self) -> Tensor | None:
        """All values, dequantised."""
        return None if self.value_storage is None else self.value_rows(0, self.length)

    @property
    def nbytes(self) -> int:
        """Bytes that are stored: codes, scales and factors, and the recent rows."""
        with self._only_recent():
            return super().nbytes + self._parts_bytes

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append rows in full precision; returns all of them, dequantised.

        A single row that a runtime attends to after a compression returns placeholders of the right shape, full of NaN: the
        runtime reads what is stored, and dequantising all of it at every step would cost more than attention does.
        """
        with self._only_recent():
            recent = super().update(key_states, value_states)
        if not self.split:
            return recent
        runtime = self.reader() if self.reader is not None else None
        differentiable = torch.is_grad_enabled() and key_states.requires_grad
        if key_states.shape[2] > 1 or runtime is None or not runtime.attached or differentiable:
            return self.key_rows(0, self.length), self.value_rows(0, self.length)
        shape = (*key_states.shape[:2], self.length, key_states.shape[3])
        nothing = key_states.new_full((1, 1, 1, 1), math.nan).expand(shape)
        return nothing, nothing

    def whole(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All rows, dequantised: for calls that attend outside the kernels."""
        return self.key_rows(0, self.length), self.value_rows(0, self.length)

    def prepare(self, previous: Prepared | None) -> Prepared:
        """Attention over the parts and the recent rows."""
        if not isinstance(previous, MixedAttention) or previous.kv is not self:
            return MixedAttention(self)
        previous.refresh()
        return previous

    def move(self, allocate: Allocator) -> None:
        """Keep the recent rows in another place from now on."""
        with self._only_recent():
            super().move(allocate)

    def reset(self) -> None:
        """Drop everything."""
        super().reset()
        self.parts, self.split, self._parts_bytes = [], 0, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` rows, which must be in full precision still.

        Raises:
            InputError: they are not, or the number is positive.
        """
        if -tokens_to_remove > self.recent and self.split:
            raise InputError("cannot go back past rows that the cache has compressed: keep a copy, or start again")
        super().crop(tokens_to_remove)

    def keep(self, ids: Tensor) -> None:
        """Drop rows, as `KVLayer.keep`, before any were compressed.

        Raises:
            InputError: some are.
        """
        if self.split:
            raise InputError("this cache has compressed rows, which cannot be dropped: choose one method for the cache")
        super().keep(ids)

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `restored` needs beside the recent rows, for `gossamer.hf.snapshot`."""
        tensors: dict[str, Tensor] = {}
        for n, part in enumerate(self.parts):
            for side, rows in (("key", part.key), ("value", part.value)):
                tensors |= {f"{n}.{side}.{what}": x for what, x in zip(_STORED, rows.tensors(), strict=True)}
            tensors |= {f"{n}.{what}": getattr(part, what) for what in _BESIDE}
        return {"bits": self.bits, "split": self.split, "parts": [part.key.bits for part in self.parts]}, tensors

    @classmethod
    def restored(
        cls, facts: dict[str, Any], tensors: dict[str, Tensor], key: Tensor, value: Tensor
    ) -> MixedPrecisionKV:
        """A layer from what `snapshot` gave and its recent rows.

        Raises:
            ValueError, KeyError: they do not belong together.
        """
        high, low = facts["bits"]
        layer = cls(bits=(high, low))
        layer.update(key, value)
        for n, bits in enumerate(facts["parts"]):
            (codes, step, zero), value_rows = (
                [tensors[f"{n}.{side}.{what}"] for what in _STORED] for side in ("key", "value")
            )
            rows = codes.shape[2]
            sides = (
                QuantizedRows(codes, step, zero, bits, "channel", rows),
                QuantizedRows(value_rows[0], value_rows[1], value_rows[2], bits, "token", 1),
            )
            part = Part(*sides, *(tensors[f"{n}.{what}"] for what in _BESIDE))
            sizes = [
                (layer.batch, layer.heads, rows, layer.key_rows(0, 0).shape[3]),
                (layer.batch, layer.heads, 1, part.key.dim),
                (layer.batch, layer.heads, rows, part.value.dim),
                (layer.batch, layer.heads, rows),
            ]
            found = [(*x.codes.shape[:3], x.dim) for x in sides]
            shapes = [found[0], tuple(part.key.step.shape), found[1], tuple(part.value.step.shape)]
            if shapes != sizes or part.positions.shape != (layer.batch, rows) or bool((part.counts > rows).any()):
                raise ValueError("parts are damaged")
            layer.parts.append(part)
        layer.split = int(facts["split"])
        layer.length += layer.split
        layer._parts_bytes = sum(part.nbytes for part in layer.parts)
        return layer

    def _replace_batch(self, pick: Any) -> None:
        super()._replace_batch(pick)
        with torch.inference_mode(False):
            self.parts = [part.map(pick) for part in self.parts]
            self._parts_bytes = sum(part.nbytes for part in self.parts)


class MixedAttention(Prepared):
    """Attention over a `MixedPrecisionKV` as it is stored now: one partial attention a part, and one of the recent rows.

    Every compression adds two parts, so a step makes two calls more for each (with ZipVL: for 100 generated tokens).
    """

    def __init__(self, kv: MixedPrecisionKV) -> None:
        assert kv.key_storage is not None
        self.kv = kv
        self.batch, self.kv_heads, self.dim = kv.batch, kv.heads, kv.key_storage.shape[3]
        self.dtype = kv.dtype
        self.full_row_bytes = 2 * self.dim * kv.key_storage.element_size()
        self._parts: list[Part] | None = None
        self._count = 0
        self._native: list[NativeRows] | None = None
        self.refresh()

    def refresh(self) -> None:
        """Look at what is stored; `row_bytes` is the average of all rows, rounded."""
        kv = self.kv
        if self._parts is not kv.parts or self._count != len(kv.parts):
            self._parts, self._count = kv.parts, len(kv.parts)
            factors = [part.factor for part in kv.parts]
            ones = torch.ones(self.batch, self.kv_heads, self.dim)
            stacked = torch.stack([*factors, ones.to(factors[0].device) if factors else ones])
            self._factors = stacked.unsqueeze(3)  # of each part, and of the recent rows
            takes = native() is not None and self.dtype in DTYPE_CODES and all(x.is_cpu for x in factors)
            self._native = [NativeRows(x.key, x.value, None, self.dtype) for x in kv.parts] if takes else None
        self.capacity = kv.split + kv.capacity
        self.row_bytes = round(kv.nbytes / max(1, kv.length * self.batch * self.kv_heads))

    def rows(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The first rows, dequantised."""
        return self.kv.key_rows(0, length).to(device), self.kv.value_rows(0, length).to(device)

    def dense(self, query: Tensor, length: int, *, scale: float, starts: Tensor | None = None) -> Tensor:
        """Attend rows [starts, length) with `query` ``[batch, heads, head_dim]``."""
        kv = self.kv
        if length < kv.split:
            return decode_attention(query, *self.rows(length, query.device), starts=starts, scale=scale)
        outs, lses = [], []
        for i, part in enumerate(kv.parts):
            out, lse = self._part(i, part, query, scale)
            outs.append(out)
            lses.append(lse)
        if length > kv.split:
            key, value = (x.narrow(2, 0, length - kv.split) for x in kv.recent_rows)
            after = None if starts is None else (starts - kv.split).clamp_min(0)
            out, lse = decode_attention(query, key, value, starts=after, scale=scale, return_lse=True)
            if not outs:
                return out
            outs.append(out)
            lses.append(lse)
        grouped = torch.stack(outs).unflatten(2, (self.kv_heads, -1))
        scaled = (grouped * self._factors[: len(outs)]).flatten(2, 3)
        return merge_attention(scaled, torch.stack(lses))[0].to(query.dtype)

    def _part(self, i: int, part: Part, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attention over part i, before its factors, and its log-sum-exp."""
        fits = query.dtype is self.dtype and query.is_cpu and not query.requires_grad
        if self._native is None or not fits or is_forced() or torch.compiler.is_compiling():
            rows: tuple[Tensor, Tensor] = quantized_decode_attention(
                query, part.key, part.value, lengths=part.counts, scale=scale, return_lse=True
            )
            return rows
        lse = torch.empty(query.shape[:2])
        rows_of = self._native[i]
        return rows_of.attend(query, part.rows, part.rows, scale, lengths=part.counts, lse=lse)[0], lse

    def listed(
        self,
        query: Tensor,
        length: int,
        indices: Tensor,
        counts: Tensor,
        *,
        scale: float,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """Attend listed rows only, dequantised for the call; the output, and how many rows were read."""
        key, value = self.rows(length, query.device)
        out = decode_attention(query, key, value, indices=indices, counts=counts, starts=starts, scale=scale)
        return out, int(counts.sum())
