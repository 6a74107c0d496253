"""A cache layer that keeps all but its newest rows quantised.

Rows before `split` are codes (`ops.QuantizedRows`), rows from there on are kept in full precision until there are enough
of them: at least `residual` stay, and `group` at a time are quantised, so that a decode step costs a copy of one row and
a quantisation of a group once in `group` steps. Both keys and values wait for this, also where their scales belong to
tokens.

Scales per channel are shared by the rows of a group, which then must stay together: such a layer can be cropped (the
rows that are left of an open group are dequantised and wait again), but `keep`, which drops rows of each head by itself,
needs scales per token for keys and values. Carrying a group number for every row instead would keep whole groups of
scales for the last row of each, more bytes than the codes that are left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer import ops
from gossamer.errors import InputError
from gossamer.hf.cache import KVLayer, _round_up
from gossamer.hf.offload import Allocator
from gossamer.ops.memory import advise_huge_pages
from gossamer.ops.prepared import stored_rows
from gossamer.ops.quantized_kv import Axis, check_layout


@dataclass(frozen=True)
class KVFormat:
    """How rows are stored.

    Attributes:
        key_bits, value_bits: bits of a code, 2, 4 or 8.
        key_axis, value_axis: what has scales of its own, each ``"token"`` or each ``"channel"`` of a group of rows.
        group: rows that are quantised together (and, per channel, share their scales).
        residual: newest rows that always stay in full precision.
        half_scales: whether step and zero are bfloat16 (codes are computed from the rounded ones).

    >>> KVFormat(4, 4).row_bytes(128)  # twice 64 bytes of codes, and scales
    140.0
    """

    key_bits: int
    value_bits: int
    key_axis: Axis = "channel"
    value_axis: Axis = "token"
    group: int = 64
    residual: int = 32
    half_scales: bool = True

    def check(self, head_dim: int) -> None:
        """Raise `InputError` if rows of this size can't be stored so."""
        for bits, axis in ((self.key_bits, self.key_axis), (self.value_bits, self.value_axis)):
            check_layout("quantised cache", head_dim, bits, axis, None)
        if self.group < 1 or self.residual < 0:
            raise InputError(
                f"quantised cache: a group of {self.group} rows and a residual of {self.residual} can't be"
            )

    @property
    def grouped(self) -> bool:
        """Whether rows share scales with their neighbours."""
        return "channel" in (self.key_axis, self.value_axis)

    def row_bytes(self, head_dim: int) -> float:
        """Bytes of one quantised key row and value row of one head, its part of shared scales included."""
        size = 2 if self.half_scales else 4
        scales = sum(
            2 * size * (head_dim / self.group if axis == "channel" else 1) for axis in (self.key_axis, self.value_axis)
        )
        return head_dim * (self.key_bits + self.value_bits) / 8 + scales


class QuantizedKVLayer(KVLayer):
    """Keys and values of one decoder layer, quantised but for the newest rows.

    `keys`, `values`, `key_rows` and `value_rows` are dequantised copies. While a runtime is attached to the model, `update`
    returns placeholders of the right shape (the runtime reads the codes); otherwise it returns the rows, dequantised
    before the present block and exact within it.

    Attributes:
        format: how rows are stored.
        split: rows that are quantised.
        old: quantised keys and values, or None before the first group.
        recent: full-precision keys and values ``[batch, kv_heads, room, head_dim]`` of rows `split` on.

    >>> layer = QuantizedKVLayer(KVFormat(8, 8, group=4, residual=0))
    >>> key, _ = layer.update(torch.ones(1, 1, 6, 8), torch.ones(1, 1, 6, 8))
    >>> layer.split, layer.length, key.shape[2]
    (4, 6, 6)
    """

    def __init__(self, format: KVFormat, reserve: int = 0, **_: Any) -> None:
        super().__init__(reserve)
        self.format = format
        self.split = 0
        self.old: tuple[ops.QuantizedRows, ops.QuantizedRows] | None = None
        self.recent: tuple[Tensor, Tensor] | None = None
        self._block: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, format: KVFormat, layer: KVLayer | None) -> KVLayer:
        """This layer, or a quantised one with its rows.

        Raises:
            InputError: the layer dropped rows and this format ties rows together.
        """
        if isinstance(layer, cls) and layer.format == format:
            return layer
        made = cls(format, reserve=0 if layer is None else layer.reserve)
        if layer is None or not layer.is_initialized:
            return made
        if layer.dropped and format.grouped:
            raise InputError(
                "this cache has dropped rows: scales per channel can't be shared by what is left, use key_axis='token'"
            )
        made.update(layer.key_rows(0, layer.length), layer.value_rows(0, layer.length))
        made._block = None
        made.dropped, made._kept = layer.dropped, layer._kept
        made.starts, made.row_positions = layer.starts, layer.row_positions
        made.saved = layer.saved
        for runtime, parts in layer.states().items():
            made.carried[runtime] = parts
        return made

    @property
    def is_initialized(self) -> bool:
        """Whether storage exists yet."""
        return self.recent is not None

    @property
    def batch(self) -> int:
        """Sequences held."""
        assert self.recent is not None
        return self.recent[0].shape[0]

    @property
    def heads(self) -> int:
        """KV heads."""
        assert self.recent is not None
        return self.recent[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows as they are attended."""
        assert self.recent is not None
        return self.recent[0].dtype

    @property
    def keys(self) -> Tensor | None:
        """All key rows (a dequantised copy)."""
        return self.key_rows(0, self.length) if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        """All value rows (a dequantised copy)."""
        return self.value_rows(0, self.length) if self.is_initialized else None

    def key_rows(self, first: int, last: int) -> Tensor:
        """Key rows, dequantised where they are quantised."""
        return self._rows(0, first, last)

    def value_rows(self, first: int, last: int) -> Tensor:
        """Value rows, dequantised where they are quantised."""
        return self._rows(1, first, last)

    def _rows(self, which: int, first: int, last: int) -> Tensor:
        assert self.recent is not None
        return stored_rows(self.old[which] if self.old else None, self.recent[which], self.split, first, last)

    @property
    def capacity(self) -> int:
        """Rows that fit before the next growth of what follows the rows."""
        if self.recent is None:
            return 0
        return (self.old[0].capacity if self.old else 0) + self.recent[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the used rows: codes, scales and full-precision rows."""
        if self.recent is None:
            return 0
        near = self.length - self.split
        size = sum(x.element_size() * x.shape[0] * x.shape[1] * x.shape[3] * near for x in self.recent)
        return size + (sum(rows.nbytes(self.split) for rows in self.old) if self.old else 0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate room for the newest rows.

        Raises:
            InputError: rows of this size can't be stored so.
        """
        self.format.check(key_states.shape[3])
        room = self.format.residual + self.format.group
        with torch.inference_mode(False):  # storage made in inference mode could not be written outside it
            self.recent = tuple(x.new_empty(*x.shape[:2], room, x.shape[3]) for x in (key_states, value_states))  # type: ignore[assignment]

    def prepare(self, previous: ops.Prepared | None) -> ops.Prepared:
        """Attention over codes and newest rows."""
        assert self.recent is not None
        old = self.old or self._store(_round_up(max(self.reserve, 1)))
        if not isinstance(previous, ops.PreparedQuantizedAttention) or not previous.fits(*old, self.recent):
            return ops.PreparedQuantizedAttention(*old, self.recent, self.split)
        previous.split = self.split
        return previous

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append rows ``[batch, kv_heads, new, head_dim]``; see the class for what is returned.

        Raises:
            InputError: rows of another batch or of other heads.
        """
        if self.recent is None:
            self.lazy_initialization(key_states, value_states)
        assert self.recent is not None
        self._check(key_states, value_states)
        earlier = self.length
        new = key_states.shape[2]
        self._block = (key_states, value_states)
        with torch.no_grad():
            self._append(key_states, value_states)
        runtime = self.reader() if self.reader is not None else None
        if runtime is not None and runtime.attached:
            like = key_states.new_empty(1).expand(*key_states.shape[:2], earlier + new, key_states.shape[3])
            if new == 1:
                self._block = None
            return like, like
        whole = self.whole(key_states, value_states)
        self._block = None
        return whole

    def whole(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All rows: dequantised before the block of the last `update`, exact within it; the block is then let go."""
        block, self._block = self._block, None
        new = 0 if block is None else block[0].shape[2]
        parts = [self._rows(i, 0, self.length - new) for i in (0, 1)]
        if block is None:
            return parts[0], parts[1]
        if new == self.length:
            return block
        return torch.cat([parts[0], block[0]], 2), torch.cat([parts[1], block[1]], 2)

    def _check(self, key_states: Tensor, value_states: Tensor) -> None:
        assert self.recent is not None
        if key_states.shape[0] != self.batch:
            raise InputError(
                f"the cache holds {self.batch} sequences, this step has {key_states.shape[0]}: "
                "start a new cache for a new batch"
            )
        for held, states in zip(self.recent, (key_states, value_states), strict=True):
            if states.shape[1] != held.shape[1] or states.shape[3] != held.shape[3]:
                raise InputError(
                    f"the cache holds {held.shape[1]} heads of {held.shape[3]}, this step has {states.shape[1]} of "
                    f"{states.shape[3]}: a cache belongs to one model"
                )

    def _append(self, key_states: Tensor, value_states: Tensor) -> None:
        assert self.recent is not None
        near, new, group = self.length - self.split, key_states.shape[2], self.format.group
        flush = max(0, (near + new - self.format.residual) // group * group)
        states = (key_states, value_states)
        if flush:
            old = self._room(self.split + flush)
            rest = near + new - flush
            for rows, held, fresh in zip(old, self.recent, states, strict=True):
                line = torch.cat([held.narrow(2, 0, near), fresh], 2) if near else fresh
                ops.quantize_rows(line.narrow(2, 0, flush), rows, self.split)
                held.narrow(2, 0, rest).copy_(line.narrow(2, flush, rest))
            self.split += flush
        else:
            for held, fresh in zip(self.recent, states, strict=True):
                held.narrow(2, near, new).copy_(fresh)
        self.length += new

    def _room(self, rows: int) -> tuple[ops.QuantizedRows, ops.QuantizedRows]:
        """Quantised storage with room for so many rows."""
        if self.old is None:
            return self._store(_round_up(max(self.reserve, rows + rows // 4 + 1)))
        if rows > self.old[0].capacity:
            self._reallocate(_round_up(max(rows, 2 * self.old[0].capacity)))
        return self.old

    def _store(self, capacity: int) -> tuple[ops.QuantizedRows, ops.QuantizedRows]:
        assert self.recent is not None
        f, like = self.format, self.recent[0]

        def make(bits: int, axis: Axis) -> ops.QuantizedRows:
            return ops.QuantizedRows.allocate(
                self.batch,
                self.heads,
                capacity,
                like.shape[3],
                bits=bits,
                axis=axis,
                group=f.group if axis == "channel" else None,
                scales=torch.bfloat16 if f.half_scales else torch.float32,
                device=like.device,
            )

        with torch.inference_mode(False):
            self.old = make(f.key_bits, f.key_axis), make(f.value_bits, f.value_axis)
        self._advise()
        return self.old

    def _advise(self) -> None:
        for rows in self.old or ():
            for part in rows.tensors():
                advise_huge_pages(part)

    def _reallocate(self, capacity: int) -> None:
        if self.old is not None:
            with torch.inference_mode(False):
                self.old = tuple(rows.grow(capacity, self.split) for rows in self.old)  # type: ignore[assignment]
            self._advise()

    def move(self, allocate: Allocator) -> None:
        """Quantised rows stay in memory.

        Raises:
            InputError: another place is asked for.
        """
        if self.allocate is not allocate:
            raise InputError("quantised rows can't be offloaded: leave out the offload or the quantised storage")

    def reset(self) -> None:
        """Drop all rows and storage."""
        self.old = self.recent = self._block = None
        self.split = 0
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` rows; what is left of an open group is dequantised and waits again."""
        super().crop(tokens_to_remove)
        self._block = None
        if self.length >= self.split:
            return
        first = self.length // self.format.group * self.format.group if self.format.grouped else self.length
        assert self.recent is not None and self.old is not None
        for rows, held in zip(self.old, self.recent, strict=True):
            held.narrow(2, 0, self.length - first).copy_(ops.dequantize_rows(rows, first, self.length, held.dtype))
        self.split = first

    def keep(self, ids: Tensor) -> None:
        """Drop all rows but these, in place; scales must belong to tokens. See `KVLayer.keep`.

        Heads may keep different numbers of quantised rows. As many as the head with most stay quantised; the others fill
        up with their oldest full-precision rows.

        Raises:
            InputError: the ids do not ascend within ``[0, length)``, or rows share scales per channel.
        """
        assert self.recent is not None
        if self.format.grouped:
            raise InputError(
                "rows with scales per channel can't be dropped one by one: use key_axis='token', value_axis='token'"
            )
        ids = self._kept_ids(ids)
        rows, near = ids.shape[2], self.length - self.split
        split = int((ids < self.split).sum(2).max()) if self.split else 0
        if self.split:
            taken = ids[:, :, :split]
            if bool((taken >= self.split).any()):  # some head hands over full-precision rows
                for old, held in zip(self._room(self.length), self.recent, strict=True):
                    ops.quantize_rows(held.narrow(2, 0, near), old, self.split)
            assert self.old is not None
            for old in self.old:
                index = taken[..., None].expand(-1, -1, -1, old.codes.shape[3])
                old.codes.narrow(2, 0, split).copy_(old.codes.gather(2, index))
                for part in (old.step, old.zero):
                    part.narrow(2, 0, split).copy_(part.gather(2, taken))
        for held in self.recent:
            index = (ids[:, :, split:] - self.split)[..., None].expand(-1, -1, -1, held.shape[3])
            held.narrow(2, 0, rows - split).copy_(held.gather(2, index))
        self.split = split
        self._block = None
        self._note_kept(rows)

    def _replace_batch(self, pick: Any) -> None:
        if self.recent is None:
            return
        with torch.inference_mode(False), torch.no_grad():
            self.recent = tuple(pick(x) for x in self.recent)
            if self.old is not None:
                self.old = tuple(rows.map(pick) for rows in self.old)  # type: ignore[assignment]
        self._block = None
        self._pick_states(pick)
