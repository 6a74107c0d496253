"""ALISA's cache in three tiers: recent tokens fast, older ones in a slow tier, the oldest deleted and computed again.

The layer's own storage is the fast tier: rows that the schedule moves leave it (`LayerView.keep`) for a slow store, INT8 or
INT4 by channel if asked, in blocks. Of deleted tokens only the layer's normed input x stays, and the rotation of their
position; ``K = RoPE(W_k·x)``, ``V = W_v·x`` give their rows again where they are selected. Tiers are ranges of token
numbers, ``[0, D)`` deleted, ``[D, C)`` slow, ``[C, n)`` fast, so a selection, which ascends, splits into three pieces.

A step's selection does not depend on its own query: the next layer's rows are fetched while this one computes. Rows move
after a step; in a block of known tokens decoded one by one they wait, so that the cache can be rolled back behind it.
Multi-turn prompts are read densely over all tiers. Layers with a sliding window, and `dense_layers`, stay fast.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from gossamer.attention.alisa import AlisaState, SparseWindowPolicy
from gossamer.attention.alisa_formulas import attend_packed, dequantise_channels, gather_rows, quantise_channels
from gossamer.attention.alisa_history import dense_rows
from gossamer.attention.alisa_schedule import Sizes
from gossamer.errors import InputError, ModelError
from gossamer.hf import AttentionRuntime, LayerView, PrefillPolicy, attention_views, dense_attention
from gossamer.hf.cache import allocate_near
from gossamer.hf.offload import Allocator, DoubleBuffer, Fetched, file_allocator, pinned_allocator

if TYPE_CHECKING:
    from gossamer.attention.alisa import Alisa


@dataclass(frozen=True)
class FixedTier:
    """A schedule without a plan: the newest `fast` tokens are fast, older ones slow, none deleted."""

    fast: int
    block: int
    kv_bits: int | None

    def tiers(self, tokens: int) -> tuple[int, int]:
        """``(D, C)`` with so many tokens cached.

        >>> FixedTier(fast=10, block=4, kv_bits=None).tiers(17)
        (0, 8)
        """
        blocks = min(-(-max(tokens - self.fast, 0) // self.block), max(tokens - 1, 0) // self.block)
        return 0, blocks * self.block

    def last_deleted(self) -> int:
        """None is."""
        return 0


class Store:
    """Rows of tokens ``[first, end)`` in the slow tier, ``[batch, heads, capacity, width]``."""

    def __init__(self, allocate: Allocator) -> None:
        self.allocate = allocate
        self.first = self.end = self.origin = 0  # origin: the token whose row is row 0 of the storage
        self.storage: Tensor | None = None

    def append(self, rows: Tensor) -> None:
        """Rows ``[batch, heads, new, width]`` of the next tokens."""
        new = rows.shape[2]
        if self.storage is None or self.end - self.origin + new > self.storage.shape[2]:
            kept = self.end - self.first
            fresh = self._fresh(rows, max(64, (kept + new) * 3 // 2))
            if self.storage is not None:
                fresh.narrow(2, 0, kept).copy_(self.storage.narrow(2, self.first - self.origin, kept))
            self.storage, self.origin = fresh, self.first
        self.storage.narrow(2, self.end - self.origin, new).copy_(rows)
        self.end += new

    def _fresh(self, like: Tensor, capacity: int) -> Tensor:
        with torch.inference_mode(False):  # written in and out of inference mode
            return self.allocate(like, capacity)

    def drop(self, before: int) -> None:
        """Forget the rows before a token; their place is given back once it is most of the storage."""
        self.first = max(self.first, before)
        if self.storage is not None and 2 * (self.first - self.origin) > self.storage.shape[2]:
            kept = self.storage.narrow(2, self.first - self.origin, self.end - self.first)
            fresh = self._fresh(kept, max(64, kept.shape[2] * 3 // 2))
            fresh.narrow(2, 0, kept.shape[2]).copy_(kept)
            self.storage, self.origin = fresh, self.first

    def cut(self, end: int) -> None:
        """Forget the rows from a token on."""
        self.end = max(self.first, min(self.end, end))

    def take(self, ids: Tensor) -> Tensor:
        """Rows ``[batch, heads, m, width]`` of tokens ``[batch, m]``."""
        assert self.storage is not None
        return gather_rows(self.storage, (ids - self.origin).to(self.storage.device))

    def reorder(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Follow a batch."""
        if self.storage is not None:
            picked = pick(self.storage)
            self.storage = self._fresh(picked, picked.shape[2])
            self.storage.copy_(picked)

    @property
    def nbytes(self) -> int:
        """Bytes of the storage."""
        return 0 if self.storage is None else self.storage.numel() * self.storage.element_size()


class TieredState(AlisaState):
    """The history of a layer, its slow rows, and what deleted rows are computed from."""

    def __init__(self, slow: Allocator) -> None:
        super().__init__()
        self.deleted = 0
        self.padding: list[int] | None = None  # first real tokens; the layer's own numbers change when rows move
        self.key, self.value, self.inputs = Store(slow), Store(slow), Store(slow)
        self.scales: list[Store] = [Store(allocate_near) for _ in range(4)]  # λ and z of key and value, one row a block
        self.rotations: Store | None = None  # cos and sin, shared by layers that share them
        self.owns_rotations = self.checked = False

    def reorder(self, pick: Callable[[Tensor], Tensor]) -> bool:
        """Take the rows of each sequence along."""
        for store in (self.key, self.value, self.inputs, *self.scales):
            store.reorder(pick)
        if self.rotations is not None and self.owns_rotations:
            self.rotations.reorder(pick)
        if self.padding is not None:
            self.padding = [int(x) for x in pick(torch.tensor(self.padding))]
        return super().reorder(pick)


@dataclass
class Job:
    """A selection and its rows on the way."""

    state: TieredState
    tokens: int
    future: Future[Any]


class TieredPolicy(SparseWindowPolicy, PrefillPolicy):
    """Sparse window attention over three tiers; one object for decode and for blocks of tokens.

    Attributes:
        moved_rows, loaded_rows, recomputed_rows: tokens times layers and sequences so far, each one row of every KV head.
        moved_bytes, loaded_bytes, input_bytes: what crossed between the tiers: rows out, rows in, layer inputs both ways.
    """

    def __init__(self, method: Alisa, model: nn.Module) -> None:
        super().__init__(method)
        fixed = FixedTier(method.fast_tokens or 1, method.block, method.kv_bits)
        self.schedule = method.plan if method.plan is not None else fixed
        self.slow = file_allocator(method.offload_folder) if method.offload == "file" else pinned_allocator
        if method.plan is not None:
            sizes, plan = Sizes.of(model), method.plan
            if (sizes.layers, sizes.hidden, sizes.kv_width) != (plan.layers, plan.hidden, plan.kv_width):
                raise InputError("alisa: this plan was made for another model: make one with alisa_plan")
        self.recomputes = self.schedule.last_deleted() > 0
        if self.recomputes and not all(hasattr(v.module, "k_proj") for v in attention_views(model)):
            raise ModelError(
                f"alisa cannot compute keys of {type(model).__name__} again: use a plan with beta=0, or fast_tokens"
            )
        self.hooks: list[Any] = []
        self.given: dict[int, tuple[Tensor, tuple[Tensor, Tensor] | None]] = {}
        self.jobs: dict[int, Job] = {}
        self.tables: dict[int, tuple[Tensor, Store]] = {}
        self.whole: dict[int, Tensor] = {}
        self.moved_rows = self.loaded_rows = self.recomputed_rows = 0
        self.moved_bytes = self.loaded_bytes = self.input_bytes = 0

    def open(self, layer: LayerView) -> TieredState:
        """Nothing moved yet."""
        return TieredState(self.slow)

    def remembers(self) -> bool:
        """Always: rows must be found again wherever they lie."""
        return True

    def attached(self, runtime: AttentionRuntime) -> None:
        """Watch the inputs of the layers whose rows may be deleted."""
        self.runtime, self.buffer = runtime, DoubleBuffer()
        for view in runtime.views if self.recomputes else ():
            self.hooks.append(view.module.register_forward_pre_hook(self._keep_input(view.index), with_kwargs=True))

    def detached(self) -> None:
        """Stop watching and reading."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self.given.clear()
        self.tables.clear()
        self.jobs.clear()
        self.whole.clear()
        self.buffer.close()

    def report(self) -> dict[str, Any]:
        """What moved so far."""
        return {
            "rows_moved_out": self.moved_rows,
            "rows_loaded": self.loaded_rows,
            "rows_recomputed": self.recomputed_rows,
            "bytes_between_tiers": self.moved_bytes + self.loaded_bytes + self.input_bytes,
        }

    def is_tiered(self, layer: LayerView) -> bool:
        """Whether this layer's rows move."""
        return not self.reads_all(layer) and not layer.window

    def starts(self, layer: LayerView, batch: int) -> list[int]:
        """First real token of each sequence, also once rows have moved."""
        state = cast(TieredState, layer.state)
        return state.padding if state.moved and state.padding is not None else super().starts(layer, batch)

    # -- layer inputs ---------------------------------------------------------------------------------------------------

    def _keep_input(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            if index == 0:  # another forward: its rotations are other tensors
                self.tables.clear()
            self.given[index] = (hidden.detach(), kwargs.get("position_embeddings"))

        return hook

    def capture(self, layer: LayerView) -> None:
        """Store the inputs of the newest tokens that will be deleted some time."""
        given = self.given.get(layer.index)
        state = cast(TieredState, layer.state)
        if given is None or not self.is_tiered(layer):
            return
        hidden, rotation = given
        first = layer.kv.length + state.moved - hidden.shape[1]
        stop = min(self.schedule.last_deleted(), first + hidden.shape[1])
        if rotation is not None and state.rotations is None:
            self._share_rotations(layer, state, rotation)
        for store, rows in self._inputs(state, hidden, rotation):
            store.cut(max(first, state.deleted))
            if store.end == first and first < stop:
                store.append(rows[:, None, : stop - first])
        if not state.checked and first < stop:
            self._check(layer, state, hidden, rotation)
        if first < stop:
            self.input_bytes += hidden[:, : stop - first].numel() * hidden.element_size()
        del self.given[layer.index]
        if layer.index == self.runtime.shape.layers - 1:
            self.given.clear()

    def _inputs(
        self, state: TieredState, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> list[tuple[Store, Tensor]]:
        parts = [(state.inputs, hidden)]
        if rotation is not None and state.rotations is not None and state.owns_rotations:
            parts.append((state.rotations, torch.cat(rotation, -1).expand(hidden.shape[0], -1, -1)))
        return parts

    def _share_rotations(self, layer: LayerView, state: TieredState, rotation: tuple[Tensor, Tensor]) -> None:
        """One table of cos and sin for all layers that were given the same."""
        found = self.tables.get(id(rotation[0]))
        if found is not None and found[0] is rotation[0]:
            state.rotations = found[1]
        else:
            state.rotations, state.owns_rotations = Store(self.slow), True
            self.tables[id(rotation[0])] = (rotation[0], state.rotations)

    def _check(
        self, layer: LayerView, state: TieredState, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> None:
        """Keys computed again must be those that the model cached."""
        turn = None if rotation is None else (rotation[0][:, -1:], rotation[1][:, -1:])
        key, value = self.runtime.views[layer.index].project_key_value(hidden[:, -1:], turn)
        held = layer.rows(layer.kv.length)
        bound = 1e-4 if key.dtype is torch.float32 else 0.1
        for again, rows in zip((key, value), held, strict=True):
            row = rows[:, :, -1:].to(again.device)
            if again.shape != row.shape or not torch.allclose(again.float(), row.float(), atol=bound, rtol=bound):
                raise ModelError(
                    f"alisa cannot compute keys and values of {type(self.runtime.model).__name__} again: "
                    "use a plan with beta=0, or fast_tokens"
                )
        state.checked = True

    # -- rows from all tiers ----------------------------------------------------------------------------------------------

    def _split(self, state: TieredState, ids: Tensor, valid: Tensor | None) -> tuple[Any, ...]:
        """Columns of `ids` ``[batch, m]`` that any sequence has in each tier, and which of them count."""
        counts = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        gone, old = (ids < state.deleted) & counts, (ids < state.moved) & counts
        ends = torch.stack([gone.sum(1), old.sum(1), counts.sum(1)])
        low, high = ends.amin(1).tolist(), ends.amax(1).tolist()
        masks = (gone, old & ~gone, counts & ~old)
        pieces = []
        for (a, b), mask in zip(((0, high[0]), (low[0], high[1]), (low[1], high[2])), masks, strict=True):
            b = b if bool(mask[:, a:b].any()) else a  # sequences may differ in where nothing is
            pieces.append((ids[:, a:b], mask[:, a:b]))
        return tuple(pieces)

    def _load(self, layer: LayerView, ids: Tensor, valid: Tensor | None, device: torch.device) -> tuple[Any, Any, Any]:
        """Inputs of the selected deleted tokens and rows of the slow ones, brought near; safe on another thread."""
        state = cast(TieredState, layer.state)
        gone, old, _ = pieces = self._split(state, ids, valid)
        inputs = fetched = None
        if gone[0].shape[1]:
            at = gone[0].clamp(0, state.deleted - 1)
            turn = None if state.rotations is None else state.rotations.take(at)[:, 0].to(device)
            inputs = state.inputs.take(at)[:, 0].to(device), turn
        if old[0].shape[1]:
            key, value = state.key.storage, state.value.storage
            assert key is not None and value is not None
            at = old[0].clamp(state.deleted, state.moved - 1) - state.key.origin
            heads = key.shape[1]
            counts = old[1].sum(1, dtype=torch.int32)[:, None].expand(-1, heads)
            fetched = self.buffer.fetch(
                layer.index % 2, key, value, at[:, None].expand(-1, heads, -1).to(torch.int32), counts, device
            )
        return pieces, inputs, fetched

    def _assemble(
        self, layer: LayerView, pieces: Any, inputs: Any, fetched: Fetched | None, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids and validity ``[batch, m]``, keys and values ``[batch, kv_heads, m, d]`` of the three pieces, packed."""
        state, keys, values = cast(TieredState, layer.state), [], []
        gone, old, new = pieces
        kv = layer.kv
        assert kv.key_storage is not None and kv.value_storage is not None
        heads = kv.key_storage.shape[1]
        if inputs is not None:
            hidden, turn = inputs
            rotation = None if turn is None else tuple(turn.chunk(2, -1))
            key, value = self.runtime.views[layer.index].project_key_value(hidden, rotation)
            keys.append(key)
            values.append(value)
            count = int(gone[1].sum())
            self.recomputed_rows += count
            self.input_bytes += count * hidden.shape[-1] * hidden.element_size()
        if fetched is not None:
            if fetched.ready is not None:
                torch.cuda.current_stream().wait_event(fetched.ready)
            for rows, scales, into in (
                (fetched.key, state.scales[:2], keys),
                (fetched.value, state.scales[2:], values),
            ):
                near = rows[:, :, 1:]
                if self.schedule.kv_bits is not None:
                    block = old[0].clamp(state.deleted, state.moved - 1) // self.schedule.block
                    near = dequantise_channels(near, *(s.take(block) for s in scales)).to(kv.key_storage.dtype)
                into.append(near)
            self.loaded_rows += fetched.rows // heads
            self.loaded_bytes += fetched.rows * 2 * fetched.key.shape[3] * fetched.key.element_size()
        if new[0].shape[1]:
            at = (new[0] - state.moved).clamp(min=0)
            keys.append(gather_rows(kv.key_storage, at))
            values.append(gather_rows(kv.value_storage, at))
        used = [piece for piece in pieces if piece[0].shape[1]]
        ids, valid = (torch.cat([piece[i] for piece in used], 1) for i in range(2))
        return ids, valid, torch.cat(keys, 2), torch.cat(values, 2)

    # -- decode ------------------------------------------------------------------------------------------------------------

    def _ready(self, layer: LayerView, query: Tensor, tokens: int) -> tuple[Any, Any, Any]:
        """Choose for the step with `tokens` cached, and load."""
        history = self.history(layer, query, tokens)
        ids, counts = self.chosen(layer, history, query, tokens)
        valid = None if counts is None else torch.arange(ids.shape[1], device=ids.device) < counts[:, None]
        return self._load(layer, ids, valid, query.device)

    def decode(self, layer: LayerView, query: Tensor, length: int) -> Tensor:
        """Attend to the selected rows of all tiers, then move what the schedule moves."""
        if not self.is_tiered(layer):
            return super().decode(layer, query, length) if layer.window else layer.dense_decode(query, length)
        state, runtime = cast(TieredState, layer.state), layer.runtime
        tokens = length - 1 + state.moved
        self.capture(layer)
        job = self.jobs.pop(layer.index, None)
        if job is not None and job.state is state and job.tokens == tokens:
            pieces, inputs, fetched = job.future.result()
        else:
            if job is not None:
                job.future.cancel() or job.future.exception()  # it writes to buffers: wait for it
            pieces, inputs, fetched = self._ready(layer, query, tokens)
        stepwise = not runtime.teacher_forced and length == layer.kv.length
        if stepwise:
            self._prefetch(layer, query)
        before = self.loaded_bytes + self.input_bytes
        ids, valid, key, value = self._assemble(layer, pieces, inputs, fetched, query.device)
        out, weights = attend_packed(query, key, value, None if bool(valid.all()) else valid, layer.scale, False)
        history = state.history
        assert history is not None
        history.record(ids, weights, self.reach(tokens + 1))
        state.rows = length
        rows = int(valid.sum()) * key.shape[1]
        if runtime.trace is not None:
            # Valid ids first, as operators take them.
            order = (~valid).to(torch.int8).sort(dim=1, stable=True).indices
            counts = valid.sum(1, dtype=torch.int32)
            layer.record(*self.listed(layer, ids.gather(1, order), counts), tokens + 1)
        layer.count(rows, length, self.score_bytes(layer, tokens + 1))  # `count` adds the rows that moved away
        runtime.stats.slow_bytes += self.loaded_bytes + self.input_bytes - before
        if stepwise:
            self.shift(layer, tokens + 1)
        return out

    def _prefetch(self, layer: LayerView, query: Tensor) -> None:
        """Start loading the next layer's rows."""
        following = self.runtime.view_of(layer.index + 1)
        if following is None or not self.is_tiered(following):
            return
        state = cast(TieredState, following.state)
        tokens = layer.kv.length - 1 + cast(TieredState, layer.state).moved
        if not state.moved or following.kv.length + state.moved != tokens:  # its new row comes later in this step
            return
        like = torch.empty_like(query)
        self.jobs[following.index] = Job(
            state, tokens, self.buffer.submit(lambda: cast(Any, self._ready(following, like, tokens)))
        )

    def shift(self, layer: LayerView, tokens: int) -> None:
        """Put every token where the schedule wants it with so many cached."""
        state = cast(TieredState, layer.state)
        deleted, moved = self.schedule.tiers(tokens)
        if moved > state.moved:
            self._move(layer, state, moved)
        if self.recomputes:
            deleted = min(deleted, state.moved, state.inputs.end // self.schedule.block * self.schedule.block)
            if deleted > state.deleted:
                state.deleted = deleted
                state.key.drop(deleted)
                state.value.drop(deleted)

    def _move(self, layer: LayerView, state: TieredState, moved: int) -> None:
        kv, count = layer.kv, moved - state.moved
        key, value = layer.rows(count)
        batch, heads = key.shape[:2]
        if not state.moved:
            state.padding = None if layer.starts is None else self.starts(layer, batch)
            if state.history is not None:
                state.history.materialise(self._put)
        bits = self.schedule.kv_bits
        for rows, store, scales in ((key, state.key, state.scales[:2]), (value, state.value, state.scales[2:])):
            if bits is None:
                stored = rows
            else:
                blocks = rows.unflatten(2, (-1, self.schedule.block))
                codes, step, zero = quantise_channels(blocks, bits)
                stored = codes.flatten(2, 3)
                scales[0].append(step[:, :, :, 0])
                scales[1].append(zero[:, :, :, 0])
            store.append(stored)
            self.moved_bytes += stored.numel() * stored.element_size()
        self.moved_rows += count * batch
        length = kv.length
        layer.keep(torch.arange(count, length, device=key.device).expand(batch, heads, -1))
        state.moved, state.rows = moved, length - count

    def _put(self, rows: Tensor) -> Tensor:
        """Attention rows of the prompt ``[lines, T, columns]`` into the slow tier."""
        with torch.inference_mode(False):
            place = self.slow(rows[:, None], rows.shape[1])
        place.copy_(rows[:, None])
        return place[:, 0]

    # -- blocks of tokens ---------------------------------------------------------------------------------------------------

    def prefill(self, layer: LayerView, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Dense, over the rows of all tiers."""
        state = cast(TieredState, layer.prefill_state)
        if not state.moved:
            return dense_attention(query, key, value, layer.scale, starts=layer.starts, window=layer.window)
        everything = torch.arange(layer.kv.length + state.moved, dtype=torch.int32, device=query.device)
        pieces = self._load(layer, everything.expand(query.shape[0], -1), None, query.device)
        _, _, key, value = self._assemble(layer, *pieces, query.device)
        self.whole[layer.index] = key
        starts = None
        if state.padding is not None:
            starts = torch.tensor(state.padding, dtype=torch.int32, device=query.device)
        return dense_attention(query, key, value, layer.scale, starts=starts)

    def observe(self, layer: LayerView, query: Tensor) -> None:
        """Keep the last queries of the prompt, or, when older keys have moved, the rows that they make."""
        self.capture(layer)
        super().observe(layer, query)
        state, whole = cast(TieredState, layer.state), self.whole.pop(layer.index, None)
        if whole is not None and state.history is not None:
            padding = state.padding

            def make(queries: Tensor, first: int, last: int) -> Tensor:
                return dense_rows(queries, whole[:, :, :last], first, layer.scale, padding)

            state.history.make = make
            state.history.materialise(self._put)
