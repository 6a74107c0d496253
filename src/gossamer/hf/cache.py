"""The key–value cache: layers that own preallocated storage in grouped-query layout.

A layer plugs into any ``transformers`` cache object, so `generate`, chunked prefill, multi-turn use and
beam search keep working while the storage underneath is ours: rows of one KV head lie together, appending a token
writes one row, and capacity doubles when it runs out (an amortised O(1) copy per token).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from gossamer import ops
from gossamer.errors import InputError
from gossamer.hf.offload import Allocator
from gossamer.ops.compact_rows import compact_rows
from gossamer.ops.memory import advise_huge_pages

_ROUND = 256  # capacities are multiples of this many rows


def _round_up(rows: int) -> int:
    return -(-rows // _ROUND) * _ROUND


def allocate_near(like: Tensor, capacity: int) -> Tensor:
    """Storage for `capacity` rows in memory, on the device of `like` ``[batch, kv_heads, *, head_dim]``."""
    storage = like.new_empty(like.shape[0], like.shape[1], capacity, like.shape[3])
    advise_huge_pages(storage)  # scattered row reads are bound by the TLB with small pages
    return storage


class Derived:
    """Something computed from a layer's first `rows` rows (labels, page bounds) that must follow its edits.

    A policy that keeps such state subclasses this and, before use, extends it from `rows` to the current length.
    The layer lowers `rows` when it is cropped. When its batch changes (beam search) or the cache is saved, what the rows
    can't give again is taken along by `tensors` and handed to a fresh state by `restore`; the rest is computed anew. A state
    that is too large or too interwoven for that may follow a batch by itself, with `reorder`.
    """

    rows: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """What can't be computed from the rows, by name; the batch is the first dimension (default: nothing)."""
        return {}

    def restore(self, tensors: dict[str, Tensor], rows: int) -> None:
        """Take back what `tensors` gave (picked for a new batch, or read from a file), which covers `rows` rows."""

    def reorder(self, pick: Callable[[Tensor], Tensor]) -> bool:
        """Follow a batch that is reordered, repeated or thinned out: `pick` maps a tensor ``[batch, …]`` to its new batch.

        Returns whether it did (default: no; see `tensors`).
        """
        return False


#: What a state gave up: its tensors, and how many rows they cover.
Carried = tuple[dict[str, Tensor], int]
PARTS = ("state", "prefill_state", "cache_state")
"""Where a view keeps the state of each policy."""


class KVLayer(CacheLayerMixin):
    """Keys and values of one decoder layer: storage ``[batch, kv_heads, capacity, head_dim]``, of which `length` rows are used.

    `keys` and `values` are views of the used rows; nothing is copied to read them. Rows may be dropped with `keep`: the
    others then move together, and their token positions are kept beside them.

    Attributes:
        length: rows stored.
        dropped: tokens seen that are no longer stored.
        starts: int32 ``[batch]``, rows of padding left at the front of each sequence, once rows were dropped.

    Args:
        reserve: rows to allocate at the first update at least (default: a quarter more than that update needs).
        allocate: makes storage like a tensor ``[batch, kv_heads, *, head_dim]`` with so many rows (default: in memory, on
            the tensor's device). `gossamer.hf.offload` has slower and larger places.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, reserve: int = 0, allocate: Allocator | None = None, **_: Any) -> None:
        self.reserve = reserve
        self.allocate = allocate or allocate_near
        self.length = 0
        self.dropped = 0
        self.starts: Tensor | None = None
        self.row_positions: Tensor | None = None
        self._kept = 0  # rows that were there when some were last dropped
        self.key_storage: Tensor | None = None
        self.value_storage: Tensor | None = None
        # What each attached runtime keeps for this layer; another one, attached later, starts afresh.
        self.views: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        # What waits for the next view of a runtime, by part, and for the first of any: states of another batch or a file.
        self.carried: weakref.WeakKeyDictionary[Any, dict[str, Carried]] = weakref.WeakKeyDictionary()
        self.saved: dict[str, Carried] = {}
        # The runtime that reads this layer now, if any: it may do with less than `update` returns.
        self.reader: Any = None

    # The names that transformers reads.
    @property
    def is_initialized(self) -> bool:
        """Whether storage exists yet."""
        return self.key_storage is not None

    @property
    def keys(self) -> Tensor | None:
        """Used key rows ``[batch, kv_heads, length, head_dim]`` (a view)."""
        return None if self.key_storage is None else self.key_storage.narrow(2, 0, self.length)

    @property
    def values(self) -> Tensor | None:
        """Used value rows ``[batch, kv_heads, length, head_dim]`` (a view)."""
        return None if self.value_storage is None else self.value_storage.narrow(2, 0, self.length)

    @property
    def capacity(self) -> int:
        """Rows that fit before the next growth."""
        return 0 if self.key_storage is None else self.key_storage.shape[2]

    @property
    def batch(self) -> int:
        """Sequences held; there must be storage."""
        assert self.key_storage is not None
        return self.key_storage.shape[0]

    @property
    def heads(self) -> int:
        """KV heads; there must be storage."""
        assert self.key_storage is not None
        return self.key_storage.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows as they are attended; there must be storage."""
        assert self.key_storage is not None
        return self.key_storage.dtype

    def whole(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All rows for a call that attends outside the kernels, given what the last `update` returned: here just that."""
        return key, value

    def key_rows(self, first: int, last: int) -> Tensor:
        """Key rows ``[batch, kv_heads, last - first, head_dim]`` (a view)."""
        assert self.key_storage is not None
        return self.key_storage.narrow(2, first, last - first)

    def value_rows(self, first: int, last: int) -> Tensor:
        """Value rows ``[batch, kv_heads, last - first, head_dim]`` (a view)."""
        assert self.value_storage is not None
        return self.value_storage.narrow(2, first, last - first)

    def prepare(self, previous: ops.Prepared | None) -> ops.Prepared:
        """Attention over the rows as they are stored now; the previous one, where that still holds."""
        assert self.key_storage is not None and self.value_storage is not None
        if not isinstance(previous, ops.PreparedAttention) or not previous.fits(self.key_storage, self.value_storage):
            return ops.PreparedAttention(self.key_storage, self.value_storage)
        return previous

    @property
    def nbytes(self) -> int:
        """Bytes of the used rows of keys and values."""
        if self.key_storage is None or self.value_storage is None:
            return 0
        per_row = sum(
            s.element_size() * s.shape[0] * s.shape[1] * s.shape[3] for s in (self.key_storage, self.value_storage)
        )
        return per_row * self.length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate storage that fits a first update of this shape."""
        rows = key_states.shape[2]
        capacity = _round_up(max(self.reserve, rows + rows // 4 + 1))
        self.key_storage, self.value_storage = (self._storage(t, capacity) for t in (key_states, value_states))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append rows ``[batch, kv_heads, new, head_dim]``; returns views of all used rows."""
        if self.key_storage is None or self.value_storage is None:
            self.lazy_initialization(key_states, value_states)
        assert self.key_storage is not None and self.value_storage is not None
        new = key_states.shape[2]
        if key_states.shape[0] != self.key_storage.shape[0]:
            raise InputError(
                f"the cache holds {self.key_storage.shape[0]} sequences, this step has {key_states.shape[0]}: "
                "start a new cache for a new batch"
            )
        for storage, states in ((self.key_storage, key_states), (self.value_storage, value_states)):
            if states.shape[1] != storage.shape[1] or states.shape[3] != storage.shape[3]:
                raise InputError(
                    f"the cache holds {storage.shape[1]} heads of {storage.shape[3]}, this step has {states.shape[1]} of "
                    f"{states.shape[3]}: a cache belongs to one model"
                )
        if torch.is_grad_enabled() and (key_states.requires_grad or self.key_storage.requires_grad):
            # Rows that a graph remembers must not be written over.
            self.key_storage = torch.cat([self.key_storage.narrow(2, 0, self.length), key_states], 2)
            self.value_storage = torch.cat([self.value_storage.narrow(2, 0, self.length), value_states], 2)
            self.length += new
            return self.key_storage, self.value_storage
        if self.length + new > self.capacity:
            self._grow(self.length + new)
        self.key_storage.narrow(2, self.length, new).copy_(key_states)
        self.value_storage.narrow(2, self.length, new).copy_(value_states)
        self.length += new
        return self.key_storage.narrow(2, 0, self.length), self.value_storage.narrow(2, 0, self.length)

    def _storage(self, like: Tensor, capacity: int) -> Tensor:
        with torch.inference_mode(False):  # storage made in inference mode could not be written outside it
            return self.allocate(like, capacity)

    def move(self, allocate: Allocator) -> None:
        """Keep the rows in another place from now on."""
        if self.allocate is not allocate:
            self.allocate = allocate
            if self.key_storage is not None:
                self._reallocate(self.capacity)

    def _grow(self, rows: int) -> None:
        self._reallocate(_round_up(max(rows, 2 * self.capacity)))

    def _reallocate(self, capacity: int) -> None:
        for name in ("key_storage", "value_storage"):
            old = getattr(self, name)
            fresh = self._storage(old, capacity)
            fresh.narrow(2, 0, self.length).copy_(old.narrow(2, 0, self.length))
            setattr(self, name, fresh)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that the next mask covers, and the position of the first."""
        return self.length + self.dropped + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen: the position of the next one."""
        return self.length + self.dropped

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Drop all rows and storage."""
        self.key_storage = self.value_storage = self.row_positions = self.starts = None
        self.length = self.dropped = 0
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` rows."""
        if tokens_to_remove > 0:
            raise InputError("crop takes a negative number: how many rows to remove from the end")
        if self.dropped and -tokens_to_remove > self.length - self._kept:
            raise InputError("cannot go back past rows that the cache has dropped: keep a copy, or start again")
        self.length = max(0, self.length + tokens_to_remove)
        self._touch(self.length)

    def accept(self, start: int, ids: Tensor) -> None:
        """Of the rows from `start` on keep these, in place, as if the others had never come.

        Args:
            ids: integer ``[n]``, ascending, counted from `start`.

        Raises:
            InputError: the ids do not ascend within the rows there, or rows were dropped among them.
        """
        assert self.key_storage is not None and self.value_storage is not None
        tail, kept = self.length - start, len(ids)
        if not 0 <= start <= self.length or (self.dropped and start < self._kept):
            raise InputError(f"cannot go back to row {start} of {self.length}: rows were dropped, or it is not there")
        places = ids.tolist()
        if any(b <= a for a, b in pairwise([-1, *places])) or (places and places[-1] >= tail):
            raise InputError(f"cannot accept these of {tail} rows: ids must ascend within them, got {places}")
        first = sum(place == i for i, place in enumerate(places))  # so many stay where they are
        if first < kept:
            for storage in (self.key_storage, self.value_storage):
                rows = storage.narrow(2, start, tail)
                rows.narrow(2, first, kept - first).copy_(rows.index_select(2, ids[first:].to(storage.device)))
        self.length = start + kept
        self._touch(start)

    @property
    def positions(self) -> Tensor:
        """Token position of every used row, int32 ``[batch, kv_heads, length]``."""
        batch, heads = self.batch, self.heads
        if self.row_positions is None:
            return torch.arange(self.length, dtype=torch.int32).expand(batch, heads, -1)
        fresh = torch.arange(self._kept, self.length, dtype=torch.int32) + self.dropped
        return torch.cat([self.row_positions, fresh.expand(batch, heads, -1)], dim=2)

    def keep(self, ids: Tensor) -> None:
        """Drop all rows but these, in place.

        Args:
            ids: integer ``[batch, kv_heads, n]``, ascending and distinct per head: every head keeps n rows of its own.

        Raises:
            InputError: the ids do not ascend within ``[0, length)``.
        """
        assert self.key_storage is not None and self.value_storage is not None
        rows = ids.shape[-1]
        if ids.shape[:2] != self.key_storage.shape[:2] or rows > self.length:
            raise InputError(
                f"rows to keep must ascend within 0 .. {self.length} for each of {self.key_storage.shape[1]} heads, "
                f"got {list(ids.shape)}"
            )
        places = self.key_storage.device, self.value_storage.device
        compact_rows(self.key_storage, ids.to(places[0]), length=self.length)  # refuses ids that do not ascend
        compact_rows(self.value_storage, ids.to(places[1]), length=self.length)
        self.row_positions = self.positions.gather(2, ids.cpu().long()).to(torch.int32)
        self._note_kept(rows)

    def _kept_ids(self, ids: Tensor) -> Tensor:
        """The ids that `keep` was given, checked, as int64; positions follow them."""
        ids, rows = ids.long(), ids.shape[2]
        ascending = rows < 2 or bool((ids.diff(dim=2) > 0).all())
        if ids.shape[:2] != (self.batch, self.heads) or not ascending or (rows and not _within(ids, self.length)):
            raise InputError(f"rows to keep must ascend within 0 .. {self.length} for each of {ids.shape[1]} heads")
        self.row_positions = self.positions.gather(2, ids.cpu()).to(torch.int32)
        return ids

    def _note_kept(self, rows: int) -> None:
        self.dropped += self.length - rows
        self.length = self._kept = rows
        self._touch(0)

    def _touch(self, unchanged_rows: int) -> None:
        for view in self.views.values():
            for state in (getattr(view, part) for part in PARTS):
                if isinstance(state, Derived):
                    state.rows = min(state.rows, unchanged_rows)

    def _forget(self) -> None:
        self.views.clear()
        self.carried.clear()
        self.saved.clear()

    def states(self) -> dict[Any, dict[str, Carried]]:
        """What the states of each runtime can't compute again, by part (and what waits for a view of it)."""
        result: dict[Any, dict[str, Carried]] = {runtime: dict(parts) for runtime, parts in self.carried.items()}
        for runtime, view in self.views.items():
            for part in PARTS:
                state = getattr(view, part)
                tensors = state.tensors() if isinstance(state, Derived) else {}
                if tensors:
                    result.setdefault(runtime, {})[part] = tensors, state.rows
        return result

    def claim(self, runtime: Any, part: str) -> Carried | None:
        """What waits for this part of a new view of a runtime; it is handed out once."""
        waiting = self.carried.get(runtime)
        if waiting and part in waiting:
            return waiting.pop(part)
        return self.saved.pop(part, None)

    def _replace_batch(self, pick: Any) -> None:
        if self.key_storage is None or self.value_storage is None:
            return
        gradients = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):  # written in and out of inference mode
            self.key_storage, self.value_storage = pick(self.key_storage), pick(self.value_storage)
        self._pick_states(pick)

    def _pick_states(self, pick: Any) -> None:
        """Let what belongs to the sequences follow them; states are opened anew and take back what was carried."""
        self.row_positions = None if self.row_positions is None else pick(self.row_positions)
        self.starts = None if self.starts is None else pick(self.starts)

        def picked(parts: dict[str, Carried]) -> dict[str, Carried]:
            return {part: ({k: pick(t) for k, t in tensors.items()}, rows) for part, (tensors, rows) in parts.items()}

        with torch.inference_mode(False):
            followed = {runtime: view for runtime, view in self.views.items() if _follows(view, pick)}
        others = {runtime: parts for runtime, parts in self.states().items() if runtime not in followed}
        carried, saved = {runtime: picked(parts) for runtime, parts in others.items()}, picked(self.saved)
        self._forget()  # shapes of derived state follow the batch: rebuild it
        self.views.update(followed)
        self.carried.update(carried)
        self.saved = saved

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick sequences for beam search."""
        self._replace_batch(lambda s: s.index_select(0, beam_idx.to(s.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._replace_batch(lambda s: s.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences only."""
        self._replace_batch(lambda s: s[indices.to(s.device) if isinstance(indices, Tensor) else indices, ...])


def _follows(view: Any, pick: Callable[[Tensor], Tensor]) -> bool:
    """Whether all states of a view have followed a batch by themselves."""
    states = {id(s): s for s in (getattr(view, part) for part in PARTS) if s is not None}
    return bool(states) and all(isinstance(s, Derived) and s.reorder(pick) for s in states.values())


class GossamerCache(Cache):
    """A cache of `KVLayer`, for those who make one by hand; `generate` gets them without asking.

    Args:
        reserve: rows to allocate at once in each layer (say, prompt + new tokens), so that nothing grows later.
    """

    def __init__(self, reserve: int = 0) -> None:
        super().__init__(layers=[])
        self.reserve = reserve

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to one layer, creating it if it is new."""
        while len(self.layers) <= layer_idx:
            self.layers.append(KVLayer(self.reserve))
        return self.layers[layer_idx].update(key_states, value_states)  # type: ignore[no-any-return]

    @property
    def nbytes(self) -> int:
        """Bytes of all used rows."""
        return sum(layer.nbytes for layer in self.layers)


def _within(ids: Tensor, length: int) -> bool:
    return bool((ids[..., 0] >= 0).all()) and bool((ids[..., -1] < length).all())


def adopt(
    cache: Any,
    places: Sequence[Allocator] | None = None,
    layers: Sequence[Callable[[KVLayer | None], KVLayer]] | None = None,
) -> Any:
    """Give a transformers cache our storage, in place, keeping what it holds.

    Works on `DynamicCache` and caches like it, so a user's own object goes on being the one that fills.

    Args:
        places: where each layer's rows go (None: in memory); rows that lie elsewhere are moved.
        layers: makes each layer, from the one that is there (None: `KVLayer`); it may return that one.

    Raises:
        InputError: for caches that own their storage in another way (static, quantized, offloaded).
    """
    if not isinstance(cache, GossamerCache):
        if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False):
            raise InputError(
                f"cannot attach to a {type(cache).__name__}: pass a DynamicCache, a GossamerCache, or no cache"
            )
        if cache.layer_class_to_replicate is not None:
            cache.layer_class_to_replicate = KVLayer
        for i, layer in enumerate(cache.layers):
            if not isinstance(layer, KVLayer):
                cache.layers[i] = _converted(layer)
    if layers is not None:
        for i, make in enumerate(layers):
            old = cache.layers[i] if i < len(cache.layers) else None
            made = make(old)
            if old is None:
                made.reserve = getattr(cache, "reserve", 0)
                cache.layers.append(made)
            else:
                cache.layers[i] = made
    if places is not None:
        while len(cache.layers) < len(places):
            cache.layers.append(KVLayer(getattr(cache, "reserve", 0)))
        for layer, place in zip(cache.layers, places, strict=True):
            layer.move(place)
    return cache


def _converted(layer: Any) -> KVLayer:
    """A layer of ours with the contents of transformers' one."""
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise InputError(f"cannot attach to a cache layer of type {type(layer).__name__}")
    ours = KVLayer()
    if layer.is_initialized and layer.get_seq_length() > 0:
        if layer.get_seq_length() != layer.keys.shape[2]:
            raise InputError("cannot attach to a sliding-window cache that has already dropped rows: start a new one")
        ours.update(layer.keys, layer.values)
    return ours
