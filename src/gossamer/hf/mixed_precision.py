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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gossamer.errors import InputError
from gossamer.hf.cache import KVLayer, _round_up
from gossamer.hf.offload import Allocator
from gossamer.ops import decode_attention, merge_attention
from gossamer.ops.quantized_kv import QuantizedRows, dequantize_rows, quantize_rows, quantized_decode_attention

if TYPE_CHECKING:
    from gossamer.hf.attention import LayerView


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

    def attend(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attention of one query per sequence ``[batch, heads, d]`` over this part, and its log-sum-exp ``[batch, heads]``."""
        out, lse = quantized_decode_attention(
            query, self.key, self.value, lengths=self.counts, scale=scale, return_lse=True
        )
        kv_heads = self.factor.shape[1]
        scaled = out.unflatten(1, (kv_heads, -1)) * self.factor.unsqueeze(2)
        return scaled.flatten(1, 2).to(query.dtype), lse


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

    @property
    def recent(self) -> int:
        """Rows in full precision: those since the last compression."""
        return self.length - self.split

    @property
    def recent_rows(self) -> tuple[Tensor, Tensor]:
        """Their keys and values ``[batch, kv_heads, recent, head_dim]`` (views)."""
        assert self.key_storage is not None and self.value_storage is not None
        return self.key_storage.narrow(2, 0, self.recent), self.value_storage.narrow(2, 0, self.recent)

    @contextmanager
    def _only_recent(self) -> Iterator[None]:
        """Inside, `length` is that of the storage."""
        self.length -= self.split
        try:
            yield
        finally:
            self.length += self.split

    def rows(self, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` keys and values ``[batch, kv_heads, length, head_dim]``, dequantised where they must be."""
        key, value = self.recent_rows
        if not self.split:
            return key.narrow(2, 0, length), value.narrow(2, 0, length)
        shape = (*key.shape[:2], self.length, key.shape[3])
        whole = key.new_zeros(shape), value.new_zeros(shape)
        for part in self.parts:
            for b, count in enumerate(part.counts.tolist()):
                at = part.positions[b, :count]
                for rows, new in zip(whole, part.dequantize(key.dtype), strict=True):
                    rows[b, :, at] = new[b, :, :count]
        for rows, new in zip(whole, (key, value), strict=True):
            rows[:, :, self.split :] = new
        return whole[0].narrow(2, 0, length), whole[1].narrow(2, 0, length)

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
        if self.split == 0:
            seen, self.length = self.length, 0  # nothing to copy
            self._reallocate(_round_up(self.reserve - seen))
            self.length = seen
        self.split = self.length

    # -- what a layer of a cache does -------------------------------------------------------------------------------------

    @property
    def keys(self) -> Tensor | None:
        """All keys, dequantised."""
        return None if self.key_storage is None else self.rows(self.length)[0]

    @property
    def values(self) -> Tensor | None:
        """All values, dequantised."""
        return None if self.value_storage is None else self.rows(self.length)[1]

    @property
    def nbytes(self) -> int:
        """Bytes that are stored: codes, scales and factors, and the recent rows."""
        with self._only_recent():
            return super().nbytes + sum(part.nbytes for part in self.parts)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append rows in full precision; returns all of them, dequantised.

        For a single row after a compression what returns has the shape alone (it is NaN): attention of one query reads what
        is stored, and dequantising all of it at every step would cost more than attention does.
        """
        with self._only_recent():
            recent = super().update(key_states, value_states)
        if not self.split:
            return recent
        if key_states.shape[2] > 1:
            return self.rows(self.length)
        shape = (*key_states.shape[:2], self.length, key_states.shape[3])
        nothing = key_states.new_full((1, 1, 1, 1), math.nan).expand(shape)
        return nothing, nothing

    def move(self, allocate: Allocator) -> None:
        """Keep the recent rows in another place from now on."""
        with self._only_recent():
            super().move(allocate)

    def reset(self) -> None:
        """Drop everything."""
        super().reset()
        self.parts, self.split = [], 0

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

    def _replace_batch(self, pick: Any) -> None:
        super()._replace_batch(pick)
        with torch.inference_mode(False):
            self.parts = [part.map(pick) for part in self.parts]


def mixed_precision(layer: LayerView, bits: tuple[int, int]) -> MixedPrecisionKV:
    """The layer's rows in a `MixedPrecisionKV`; if they lie in another, they move there, and it takes its place."""
    old = layer.kv
    if isinstance(old, MixedPrecisionKV):
        return old
    new = MixedPrecisionKV(old.reserve, old.allocate, bits=bits)
    new.key_storage, new.value_storage, new.length = old.key_storage, old.value_storage, old.length
    cache = layer.runtime._cache()
    cache.layers[layer.index] = layer.kv = new
    new.views[layer.runtime] = layer
    layer.prepared = MixedAttention(new)
    return new


class MixedAttention:
    """Attention over a `MixedPrecisionKV` as it is stored now: one partial attention a part, and one of the recent rows.

    Every compression adds two parts, so a step makes two calls more for each (with ZipVL: for 100 generated tokens).
    """

    def __init__(self, kv: MixedPrecisionKV) -> None:
        assert kv.key_storage is not None
        self.kv = kv
        self.batch, self.kv_heads, _, self.dim = kv.key_storage.shape
        self.row_bytes = 2 * self.dim * kv.key_storage.element_size()
        """Bytes of one key row and one value row in full precision."""

    def fits(self, key: Tensor | None, value: Tensor | None) -> bool:
        """PROVISIONAL"""
        return True

    def rows(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The first rows, dequantised."""
        key, value = self.kv.rows(length)
        return key.to(device), value.to(device)

    def dense(self, query: Tensor, length: int, *, scale: float, starts: Tensor | None = None) -> Tensor:
        """Attend rows [starts, length) with `query` ``[batch, heads, head_dim]``."""
        kv = self.kv
        if length < kv.split:
            return decode_attention(query, *self.rows(length, query.device), starts=starts, scale=scale)
        done = [part.attend(query, scale) for part in kv.parts]
        if length > kv.split:
            key, value = (x.narrow(2, 0, length - kv.split) for x in kv.recent_rows)
            after = None if starts is None else (starts - kv.split).clamp_min(0)
            done.append(decode_attention(query, key, value, starts=after, scale=scale, return_lse=True))
        if len(done) == 1:
            return done[0][0]
        outs, lses = zip(*done, strict=True)
        return merge_attention(torch.stack(outs), torch.stack(lses))[0]

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
