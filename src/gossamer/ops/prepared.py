"""Attention over one layer's cache, prepared once for many decode steps.

The operators check and unpack their arguments at every call. In a decode loop, whose weights push everything else out of
the processor's caches from layer to layer, this costs several times what a short attention does. Here all that stays the
same between steps (storage, label cache, channels) is checked and unpacked when the object is made, and a step is one
native call. Wherever the native kernels would not run, the call goes to the operator and means the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gossamer.ops import _checks, _dispatch
from gossamer.ops._dispatch import DTYPE_CODES, native
from gossamer.ops.attention_weights import attention_weights
from gossamer.ops.decode_attention import decode_attention
from gossamer.ops.label_attention import Selection, label_attention
from gossamer.ops.labels import REDUCE_CODES, LabelCache, Reduce, _native_cache, append_labels, native_takes
from gossamer.ops.quantized_kv import (
    NativeRows,
    QuantizedRows,
    dequantize_rows,
    quantized_decode_attention,
    row_bytes,
)
from gossamer.ops.tree_attention import MAX_NODES, tree_attention


class Prepared(ABC):
    """What attention over one layer's cache offers, however the rows are stored."""

    batch: int
    kv_heads: int
    capacity: int
    dim: int
    dtype: torch.dtype
    row_bytes: int
    """Bytes of one key row and one value row as they are stored."""
    full_row_bytes: int
    """Bytes of one key row and one value row in the model's dtype."""

    @abstractmethod
    def rows(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The first rows [B, Hkv, length, d]: views, or copies where the storage is on another device or quantised."""

    @abstractmethod
    def dense(self, query: Tensor, length: int, *, scale: float, starts: Tensor | None = None) -> Tensor:
        """Attend rows [starts, length) as :func:`~gossamer.ops.decode_attention.decode_attention` does."""

    @abstractmethod
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
        """Attend listed rows only; returns the output and how many rows were read: the sum of the counts."""

    def weighted(
        self, query: Tensor, length: int, indices: Tensor, counts: Tensor, *, scale: float
    ) -> tuple[Tensor, Tensor, int]:
        """Attend listed rows as :func:`~gossamer.ops.attention_weights.attention_weights` does.

        Returns
        -------
        The output, the weights float32 [B, H, k], and how many rows were read: the sum of the counts.
        """
        out, weights = attention_weights(query, *self.rows(length, query.device), indices, counts, scale=scale)
        return out, weights, int(counts.sum())


def _starts_fit(starts: Tensor | None, batch: int) -> bool:
    return starts is None or (starts.dtype is torch.int32 and len(starts) == batch and starts.is_contiguous())


def _chosen_fit(indices: Tensor, counts: Tensor, batch: int, heads: int, kv_heads: int) -> bool:
    """Whether a selection can go to the native kernels as it is."""
    shape = indices.shape
    return (
        indices.dtype is torch.int32
        and counts.dtype is torch.int32
        and indices.is_cpu
        and counts.is_cpu
        and indices.is_contiguous()
        and counts.is_contiguous()
        and len(shape) == 3
        and shape[0] == batch
        and shape[1] in (heads, kv_heads)
        and shape[2] > 0
        and counts.shape == shape[:2]
    )


class PreparedAttention(Prepared):
    """Attention over the first rows of the storage of one layer.

    Parameters
    ----------
    key, value
        [B, Hkv, capacity, d], as they are stored. Neither may be resized or moved while this object is in use.

    >>> key, value = torch.zeros(1, 1, 16, 4), torch.ones(1, 1, 16, 4)
    >>> attention = PreparedAttention(key, value)
    >>> attention.dense(torch.zeros(1, 2, 4), 5, scale=0.5)[0, 1]
    tensor([1., 1., 1., 1.])
    """

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value
        self.dtype = key.dtype
        self.batch, self.kv_heads, self.capacity, self.dim = key.shape
        self.row_bytes = self.full_row_bytes = 2 * self.dim * key.element_size()
        self._shape: torch.Size | None = None  # of the queries that were seen to fit
        self._native: Any = None
        module = native()
        known = key.is_cpu and value.is_cpu and key.dtype in DTYPE_CODES and value.dtype is key.dtype
        known = known and not key.requires_grad and not value.requires_grad
        if module is not None and known and key.stride(-1) == value.stride(-1) == 1 and key.shape == value.shape:
            self._native = module.Prepared(
                (key.data_ptr(), value.data_ptr()),
                (0, 0, *key.stride()[:3], *value.stride()[:3]),
                (self.batch, 0, self.kv_heads, self.capacity, self.dim),
                DTYPE_CODES[key.dtype],
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.key, self.value)

    def fits(self, key: Tensor | None, value: Tensor | None) -> bool:
        """Whether this was made for these tensors."""
        return key is self.key and value is self.value

    def rows(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The first rows: views, or copies where the storage is on another device."""
        return self.key.narrow(2, 0, length).to(device), self.value.narrow(2, 0, length).to(device)

    def _takes(self, query: Tensor, length: int, starts: Tensor | None) -> bool:
        """Whether the shortcut is open for this call; False leaves every judgement to the operator."""
        if self._native is None or query.dtype is not self.dtype or query.requires_grad or not query.is_cpu:
            return False
        shape = query.shape
        if shape != self._shape:
            if len(shape) != 3 or shape[0] != self.batch or shape[2] != self.dim or shape[1] % self.kv_heads:
                return False
            self._shape = shape
        if not _starts_fit(starts, self.batch):
            return False
        return 0 <= length <= self.capacity and not _dispatch.is_forced() and not torch.compiler.is_compiling()

    def dense(self, query: Tensor, length: int, *, scale: float, starts: Tensor | None = None) -> Tensor:
        """Attend rows [starts, length) as :func:`~gossamer.ops.decode_attention.decode_attention` does."""
        if not self._takes(query, length, starts):
            return decode_attention(query, *self.rows(length, query.device), starts=starts, scale=scale)
        return self._attend(query, length, scale, starts, (0, 0, 0, 0))[0]

    def tree(self, query: Tensor, length: int, mask: Tensor, *, scale: float) -> Tensor:
        """Attend with the nodes of a tree, whose rows are the last of `length`, as
        :func:`~gossamer.ops.tree_attention.tree_attention` does; query and result are [B, H, n, d]."""
        batch, heads, nodes, dim = query.shape
        lines = query.reshape(batch, heads * nodes, dim)
        fits = mask.is_cpu and mask.dtype is torch.bool and mask.shape == (nodes, nodes) and nodes <= MAX_NODES
        if not fits or heads % self.kv_heads or not self._takes(lines, length - nodes, None):
            return tree_attention(query, *self.rows(length, query.device), mask, scale=scale)
        lines, mask = lines.contiguous(), mask.contiguous()
        out = torch.empty((batch, heads, nodes, dim), dtype=self.dtype)
        lse = torch.empty(batch * heads * nodes)
        status = self._native.attend_tree(
            lines.data_ptr(),
            heads,
            nodes,
            out.data_ptr(),
            lse.data_ptr(),
            mask.data_ptr(),
            length,
            scale,
            torch.get_num_threads(),
        )
        if status < 0:
            _checks.raise_status("tree_attention", -status)
        return out

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
        """Attend listed rows only; arguments as in :func:`~gossamer.ops.decode_attention.decode_attention`.

        Returns
        -------
        The output, and how many rows were read: the sum of the counts.
        """
        shape = indices.shape
        if not self._takes(query, length, starts) or not _chosen_fit(
            indices, counts, self.batch, query.shape[1], self.kv_heads
        ):
            key, value = self.rows(length, query.device)
            out = decode_attention(query, key, value, indices=indices, counts=counts, starts=starts, scale=scale)
            return out, int(counts.sum())
        return self._attend(query, length, scale, starts, (indices.data_ptr(), counts.data_ptr(), *shape[1:]))

    def weighted(
        self, query: Tensor, length: int, indices: Tensor, counts: Tensor, *, scale: float
    ) -> tuple[Tensor, Tensor, int]:
        """As in :class:`Prepared`, in one native call."""
        if not self._takes(query, length, None) or not _chosen_fit(
            indices, counts, self.batch, query.shape[1], self.kv_heads
        ):
            return super().weighted(query, length, indices, counts, scale=scale)
        query = _checks.row_major(query)
        out = torch.empty(query.shape, dtype=self.dtype)
        weights = torch.empty((*query.shape[:2], indices.shape[2]), dtype=torch.float32)
        read = self._native.attend_weights(
            query.data_ptr(),
            *query.stride()[:2],
            query.shape[1],
            out.data_ptr(),
            weights.data_ptr(),
            length,
            indices.data_ptr(),
            counts.data_ptr(),
            *indices.shape[1:],
            scale,
            torch.get_num_threads(),
        )
        if read < 0:
            _checks.raise_status("attention_weights", -read)
        return out, weights, read

    def _attend(
        self, query: Tensor, length: int, scale: float, starts: Tensor | None, chosen: tuple[int, ...]
    ) -> tuple[Tensor, int]:
        query = _checks.row_major(query)
        out = torch.empty(query.shape, dtype=self.dtype)
        strides = query.stride()
        read = self._native.attend(
            query.data_ptr(),
            strides[0],
            strides[1],
            query.shape[1],
            out.data_ptr(),
            0 if starts is None else starts.data_ptr(),
            length,
            *chosen,
            scale,
            torch.get_num_threads(),
        )
        if read < 0:
            _checks.raise_status("decode_attention", -read)
        return out, read


class PreparedLabelAttention(PreparedAttention):
    """:class:`PreparedAttention` with a label cache: :func:`~gossamer.ops.label_attention.label_attention` in one call
    that first writes the labels of the newest rows.

    Parameters
    ----------
    key, value
        As in :class:`PreparedAttention`.
    channels
        int32 [Hlab, r].
    labels
        The label cache, until a larger one replaces it.
    select, reduce, protect_last
        As in :func:`~gossamer.ops.label_attention.label_attention`.
    """

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        channels: Tensor,
        labels: LabelCache,
        *,
        select: Selection = "kv_head",
        reduce: Reduce | None = None,
        protect_last: bool = True,
    ) -> None:
        super().__init__(key, value)
        self.channels, self.labels = channels, labels
        self.select, self.protect_last = select, protect_last
        self.reduce: Reduce = reduce or ("sum" if select == "kv_head" else "none")
        self._buffer: Tensor | None = None
        self._chosen: tuple[Tensor, Tensor] | None = None
        self._lines = self._k = 0
        sound = (
            channels.dtype is torch.int32
            and channels.is_contiguous()
            and channels.shape == (labels.heads, labels.r)
            and channels.is_cpu
            and labels.codes.is_cpu
            and labels.codes.shape[0] == self.batch
            and labels.heads % self.kv_heads == 0
            and (self.reduce == "none") is (select == "query_head")
            and (labels.bits < 16 or labels.codes.dtype is key.dtype)
            and native_takes(labels)
        )
        if self._native is None or not sound:
            self._native = None
            return
        self.capacity = min(self.capacity, labels.capacity)
        self._native.set_labels(
            *_native_cache(labels), channels.data_ptr(), REDUCE_CODES[self.reduce], self.protect_last
        )

    def __reduce__(self) -> tuple[Any, ...]:
        how: dict[str, Any] = {"select": self.select, "reduce": self.reduce, "protect_last": self.protect_last}
        return partial(type(self), **how), (self.key, self.value, self.channels, self.labels)

    def attend(
        self,
        query: Tensor,
        length: int,
        k: int,
        *,
        append: tuple[int, int] = (0, 0),
        scale: float,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """Write the labels of rows [append[0], append[1]), then attend the best ``k`` of the first ``length`` rows.

        Returns
        -------
        The output, and how many rows were read, over all selections. What was selected is at :attr:`chosen`.
        """
        first, stop = append
        takes = self._takes(query, length, starts) and k > 0 and first >= 0 and stop <= self.capacity
        heads = query.shape[1]
        if not takes or self.labels.codes.shape[1] not in (heads, self.kv_heads):
            if first < stop:
                append_labels(self.labels, self.key.narrow(2, first, stop - first), self.channels, first)
            out, indices, counts = label_attention(
                query,
                *self.rows(length, query.device),
                self.channels,
                self.labels,
                k,
                starts=starts,
                scale=scale,
                select=self.select,
                reduce=self.reduce,
                protect_last=self.protect_last,
            )
            self._chosen = indices, counts
            return out, int(counts.sum())
        query = _checks.row_major(query)
        lines = self.batch * (heads if self.select == "query_head" else self.kv_heads)
        if self._buffer is None or self._buffer.shape[0] < lines * (k + 1):
            with torch.inference_mode(False):
                self._buffer = torch.empty(lines * (k + k // 4 + 16), dtype=torch.int32)
        self._lines, self._k, self._chosen = lines, k, None
        indices_at = self._buffer.data_ptr()
        out = torch.empty(query.shape, dtype=self.dtype)
        strides = query.stride()
        read = self._native.attend_labels(
            query.data_ptr(),
            strides[0],
            strides[1],
            heads,
            out.data_ptr(),
            0 if starts is None else starts.data_ptr(),
            length,
            indices_at,
            indices_at + 4 * lines * k,  # the counts lie behind them
            k,
            scale,
            first,
            stop,
            torch.get_num_threads(),
        )
        if read < 0:
            _checks.raise_status("label_attention", -read)
        return out, read

    @property
    def chosen(self) -> tuple[Tensor, Tensor]:
        """Indices and counts of the last call, as :func:`~gossamer.ops.label_attention.label_attention` returns them.

        Views of a buffer that the next call overwrites.
        """
        if self._chosen is None:
            assert self._buffer is not None
            size = self._lines * self._k
            indices = self._buffer[:size].view(self.batch, -1, self._k)
            self._chosen = indices, self._buffer[size : size + self._lines].view(self.batch, -1)
        return self._chosen


class PreparedQuantizedAttention(Prepared):
    """Attention over quantised rows of one layer and the newest rows in full.

    Parameters
    ----------
    key, value
        Quantised rows; neither may be resized or moved while this object is in use.
    recent
        Key and value storage [B, Hkv, R, d] of rows ``split`` on.
    split
        Where the quantised rows end; set :attr:`split` when more are.
    """

    def __init__(self, key: QuantizedRows, value: QuantizedRows, recent: tuple[Tensor, Tensor], split: int) -> None:
        self.key, self.value, self.recent, self.split = key, value, recent, split
        self.batch, self.kv_heads, self.capacity, self.dim = *key.codes.shape[:3], key.dim
        self.dtype = recent[0].dtype
        # Scales per channel are shared by a group: their part of one row, rounded up.
        self.row_bytes = sum(-(-row_bytes(x, x.group) // x.group) for x in (key, value))
        self.full_row_bytes = 2 * self.dim * recent[0].element_size()
        self._native: NativeRows | None = None
        if native() is not None and recent[0].is_cpu and key.codes.is_cpu and self.dtype in DTYPE_CODES:
            self._native = NativeRows(key, value, recent, self.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.key, self.value, self.recent, self.split)

    def fits(self, key: QuantizedRows, value: QuantizedRows, recent: tuple[Tensor, Tensor]) -> bool:
        """Whether this was made for these."""
        return key is self.key and value is self.value and recent[0] is self.recent[0] and recent[1] is self.recent[1]

    def rows(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The first rows, dequantised: copies."""
        return tuple(  # type: ignore[return-value]
            stored_rows(rows, near, self.split, 0, length).to(device)
            for rows, near in zip((self.key, self.value), self.recent, strict=True)
        )

    def dense(self, query: Tensor, length: int, *, scale: float, starts: Tensor | None = None) -> Tensor:
        """Attend rows [starts, length)."""
        if self._native is not None and self._takes(query, starts):
            return self._native.attend(query, length, min(self.split, length), scale, starts)[0]
        return self._general(query, length, scale, starts)

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
        """Attend listed rows only, and say how many."""
        if (
            self._native is not None
            and self._takes(query, starts)
            and _chosen_fit(indices, counts, self.batch, query.shape[1], self.kv_heads)
        ):
            return self._native.attend(
                query, length, min(self.split, length), scale, starts, indices=indices, counts=counts
            )
        return self._general(query, length, scale, starts, indices=indices, counts=counts), int(counts.sum())

    def _takes(self, query: Tensor, starts: Tensor | None) -> bool:
        shape = query.shape
        return (
            query.dtype is self.dtype
            and query.is_cpu
            and not query.requires_grad
            and len(shape) == 3
            and (shape[0], shape[2]) == (self.batch, self.dim)
            and shape[1] % self.kv_heads == 0
            and _starts_fit(starts, self.batch)
            and not _dispatch.is_forced()
            and not torch.compiler.is_compiling()
        )

    def _general(self, query: Tensor, length: int, scale: float, starts: Tensor | None, **how: Any) -> Tensor:
        split = min(self.split, length)
        near = self.recent[0].narrow(2, 0, length - split), self.recent[1].narrow(2, 0, length - split)
        out: Tensor = quantized_decode_attention(
            query, self.key, self.value, recent=near, split=split, starts=starts, scale=scale, **how
        )
        return out


def stored_rows(old: QuantizedRows | None, recent: Tensor, split: int, first: int, last: int) -> Tensor:
    """Rows first .. last - 1 of a layer whose rows before ``split`` are quantised, in the dtype of ``recent``."""
    if first >= split or old is None:
        return recent.narrow(2, first - split, last - first)
    parts = [dequantize_rows(old, first, min(last, split), recent.dtype)]
    if last > split:
        parts.append(recent.narrow(2, 0, last - split))
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]
