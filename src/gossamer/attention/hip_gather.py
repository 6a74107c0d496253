"""HiP with rows that must be gathered: a cache in a slower tier, and SelfExtend's positions (both of arXiv 2406.09827).

**Offload.** All rows lie in a file or in host memory; near the model are two banks, of keys that searches score and of rows
that attention reads, each with a page table from rows to places (a vector over all rows, the fast one of the paper's two).
What a step misses is fetched into the places that were not used for longest. Searches of neighbouring steps pass through the
same segments and a choice serves `refresh` steps, so that most is found near. The paper's setting for this is
``representative="last"`` and ``dense_layers=()``; layers that read everything keep their rows near.

**SelfExtend.** For contexts beyond the trained length, with the window W as neighbourhood and groups of G positions:

    distance i − j < W:  as it is;      else:  ⌊i/G⌋ + W − ⌊W/G⌋ − ⌊j/G⌋

in the search and in attention, dense layers included. The paper's neighbourhood is 1024 beside HiP's window of 256; here both
are `window`, so set that: then a key read outside the window is always a far one, and queries and keys each have two
rotations, not a rotation per pair. Cached keys stay rotated for their true positions and are turned on when they are read. A
search scores all its keys as far ones (those in the window of a block's first queries too). Layers with a sliding window of
their own never meet far keys and stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from gossamer import ops
from gossamer.attention.hip_attention import Chosen, HipAttention, HipPolicy, computed_area
from gossamer.errors import InputError
from gossamer.hf import LayerView, model_shape
from gossamer.hf.cache import allocate_near
from gossamer.hf.offload import file_allocator, pinned_allocator
from gossamer.hf.rotary import Rotary
from gossamer.ops.tree_search import take
from gossamer.patterns.hierarchy import HipIndex

_CHUNK = 1 << 22  # elements gathered or scored at a time


class TokenBank:
    """Near copies of some rows of a slower storage, the latest used of every KV head.

    Attributes:
        hits, misses: rows asked for that were near, and that were fetched.

    Args:
        slots: rows of a KV head; a call that needs more at once makes room for them.

    >>> slow = torch.arange(12.0).view(1, 1, 12, 1)
    >>> bank = TokenBank(4)
    >>> for ids in ([3, 7], [7, 9], [3, 9]):
    ...     (rows,) = bank.rows((slow,), torch.tensor(ids)[None, None], torch.device("cpu"))
    >>> rows.flatten().tolist(), bank.hits, bank.misses
    ([3.0, 9.0], 3, 3)
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.hits = self.misses = self._clock = 0
        self._near: list[Tensor] = []
        self._table = self._owner = self._used = torch.empty(0, dtype=torch.int64)

    def clear(self) -> None:
        """Forget all rows."""
        self._near = []

    def _open(self, slow: Sequence[Tensor], device: torch.device, slots: int) -> None:
        batch, heads, capacity, _ = slow[0].shape
        lines, at = batch * heads, slow[0].device
        with torch.inference_mode(False):  # written in and out of inference mode
            self._near = [x.new_zeros(lines, slots, x.shape[3], device=device) for x in slow]
            self._table = torch.full((lines, capacity), -1, device=at)
            self._owner, self._used = torch.full((lines, slots), -1, device=at), torch.zeros(lines, slots, device=at)

    def rows(
        self, slow: Sequence[Tensor], ids: Tensor, device: torch.device, valid: Tensor | None = None
    ) -> list[Tensor]:
        """Rows `ids` int64 ``[batch, heads, n]`` of each storage ``[batch, kv_heads, capacity, d]``: ``[batch, heads, n, d]``.

        Where `valid` is false, any row may come. A row that heads of a group share is fetched once.
        """
        batch, kv_heads, capacity, _ = slow[0].shape
        lines = batch * kv_heads
        where = ids.to(slow[0].device).reshape(lines, -1)
        asked = torch.ones_like(where, dtype=torch.bool) if valid is None else valid.to(where.device).reshape(lines, -1)
        wanted = [line[mask].unique() for line, mask in zip(where, asked, strict=True)]
        most = max(map(len, wanted), default=0)
        if not self._near or self._table.shape != (lines, capacity) or self._used.shape[1] < most:
            self._open(slow, device, max(self.slots, most))
        self._clock += 1
        for i, want in enumerate(wanted):
            place = self._table[i, want]
            self._used[i, place[place >= 0]] = self._clock
            missing = want[place < 0]
            self.hits, self.misses = self.hits + len(want) - len(missing), self.misses + len(missing)
            if not len(missing):
                continue
            free = self._used[i].argsort(stable=True)[: len(missing)]  # what this call found is the latest
            old = self._owner[i, free]
            self._table[i, old[old >= 0]] = -1
            self._table[i, missing], self._owner[i, free], self._used[i, free] = free, missing, self._clock
            for near, storage in zip(self._near, slow, strict=True):
                near[i, free.to(device)] = storage[i // kv_heads, i % kv_heads, missing].to(device)
        slots = self._table.gather(1, where).clamp_min(0).to(device)
        base = torch.arange(lines, device=device)[:, None] * self._used.shape[1]
        return [near.flatten(0, 1)[(base + slots).flatten()].view(*ids.shape, -1) for near in self._near]


class Gathered(Chosen):
    """A choice, and the banks of an offloaded layer."""

    def __init__(self, slots: int) -> None:
        self.scored, self.attended = TokenBank(slots), TokenBank(slots)
        self.seen = (0, 0, 0)

    def forget(self) -> None:
        """Rows may have changed: neither choice nor banks hold."""
        super().forget()
        self.empty()
        self.seen = (0, 0, 0)

    def follow(self, layer: LayerView, length: int) -> None:
        """Empty the banks unless the layer only grew (or steps of a teacher-forced block go on) since the last step."""
        rows, last, dropped = self.seen
        kv = layer.kv
        grew = kv.length > rows or (kv.length == rows and length > last)
        if not grew or kv.dropped != dropped:
            self.empty()
        self.seen = (kv.length, length, kv.dropped)

    def empty(self) -> None:
        """Nothing is near any more."""
        self.scored.clear()
        self.attended.clear()


class GatheringPolicy(HipPolicy):
    """Gathers what it scores and reads: through banks where the cache is offloaded, turned on where positions are extended.

    Args:
        far: the cache lies in the slower tier of the method's `offload`.
    """

    def __init__(self, method: HipAttention, model: nn.Module, far: bool) -> None:
        super().__init__(method)
        self.far = far
        self.rotary: Rotary | None = None
        if method.self_extend > 1:
            self.rotary = Rotary(model, "hip-attention", "use self_extend=1")
        layers = model_shape(model).layers
        if far:
            near = {i % layers for i in method.dense_layers}
            slow = file_allocator(method.offload_folder) if method.offload == "file" else pinned_allocator
            self.places = [allocate_near if i in near else slow for i in range(layers)]
        self.found = {"score": [0, 0], "attention": [0, 0]}  # rows that were near, and that were fetched

    def open(self, layer: LayerView) -> Gathered:
        """Nothing chosen, nothing near."""
        return Gathered(self.method.bank)

    def report(self) -> dict[str, Any]:
        """As `HipPolicy`, and of an offloaded cache the shares of rows found near: `score_hits` and `attention_hits`."""
        shares = {f"{name}_hits": hits / max(1, hits + misses) for name, (hits, misses) in self.found.items()}
        return {**super().report(), **(shares if self.far else {})}

    def bring(
        self,
        layer: LayerView,
        name: str,
        slow: Sequence[Tensor | None],
        ids: Tensor,
        device: torch.device,
        valid: Tensor | None = None,
    ) -> list[Tensor]:
        """Rows of an offloaded layer by way of the bank for "score" or "attention", float32; what was fetched is counted."""
        state = cast(Gathered, layer.state)
        bank = state.scored if name == "score" else state.attended
        storages, before = [x for x in slow if x is not None], (bank.hits, bank.misses)
        rows = [x.float() for x in bank.rows(storages, ids, device, valid)]
        fetched = bank.misses - before[1]
        self.found[name][0] += bank.hits - before[0]
        self.found[name][1] += fetched
        layer.runtime.stats.slow_bytes += fetched * sum(x.shape[3] * x.element_size() for x in storages)
        return rows

    # -- positions

    def far_queries(self, layer: LayerView, query: Tensor, at: Tensor) -> Tensor:
        """Queries ``[…, n, d]`` at the rows `at` ``[n]`` as they meet keys beyond the window."""
        if self.rotary is None or layer.window:
            return query
        window, group, at = self.method.window, self.method.self_extend, at + layer.kv.dropped
        return self.rotary.move(query, layer.index, at, at // group + window - window // group)

    def far_keys(self, layer: LayerView, key: Tensor, at: Tensor) -> Tensor:
        """Keys of the rows `at` as queries beyond the window meet them."""
        if self.rotary is None or layer.window:
            return key
        if layer.kv.dropped:
            raise InputError("hip-attention: self_extend needs all rows: leave cache methods that drop rows out")
        return self.rotary.move(key, layer.index, at, at // self.method.self_extend)

    # -- decode

    def observe(self, layer: LayerView, query: Tensor) -> None:
        """A block of tokens may stand where others were cropped, whoever served its attention: the banks are emptied."""
        cast(Gathered, layer.state).empty()

    def seek(self, layer: LayerView, query: Tensor, key: Tensor) -> HipIndex:
        """Search with keys that are gathered level by level."""
        at = torch.tensor([key.shape[2] - 1], device=query.device)

        def fetch(ids: Tensor) -> Tensor:
            if self.far:
                flat = self.bring(layer, "score", (layer.kv.key_storage,), ids.flatten(2), query.device)[0]
                return self.far_keys(layer, flat.view(*ids.shape, -1), ids)
            return self.far_keys(layer, take(key, ids), ids)

        return self.find(layer, self.far_queries(layer, query, at), key, 1, fetch)

    def decode(self, layer: LayerView, query: Tensor, length: int) -> Tensor:
        """Gather what was selected, and attend; everything in the dense layers."""
        m = self.method
        cast(Gathered, layer.state).follow(layer, length)
        if self.is_dense(layer, length):
            if self.rotary is None or length <= m.window or layer.window:
                return layer.dense_decode(query, length)
            key, value = (x.to(query.device) for x in layer.rows(length))
            layer.count(length * len(key) * key.shape[1], length)
            at = torch.arange(length, device=query.device)
            turned = self.far_queries(layer, query[:, :, None], at[-1:]), self.far_keys(layer, key, at)
            return self._extended(query[:, :, None], turned[0], key, turned[1], value, layer)[:, :, 0]
        ids, counts = self.select(layer, query, length)
        rows, used = ids.long(), torch.arange(ids.shape[2], device=ids.device) < counts[..., None]
        if self.far:
            storages = (layer.kv.key_storage, layer.kv.value_storage)
            key, value = self.bring(layer, "attention", storages, rows, query.device, used)
        else:
            key, value = (take(x, rows) for x in layer.rows(length))
        scores = (key @ query.float()[..., None])[..., 0]
        if self.rotary is not None and not layer.window:
            turned_query = self.far_queries(layer, query[:, :, None], torch.tensor([length - 1], device=query.device))
            beyond = (self.far_keys(layer, key, rows) @ turned_query.float().transpose(2, 3))[..., 0]
            scores = torch.where(rows > length - 1 - m.window, scores, beyond)
        weights = (scores * layer.scale).masked_fill(~used, -math.inf).softmax(2)
        layer.count_selected(ids, counts, length, self.score_bytes(layer, length))
        return (weights[:, :, None] @ value)[:, :, 0].to(query.dtype)

    # -- prefill

    def prefill(self, layer: LayerView, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `HipPolicy`; with extended positions the window and what is beyond it are merged by their log-sum-exps."""
        (batch, heads, new, _), length = query.shape, key.shape[2]
        if self.rotary is None or length <= self.method.window or layer.window:
            return super().prefill(layer, query, key, value)
        if isinstance(layer.state, Chosen):
            layer.state.forget()
        at = torch.arange(length, device=query.device)
        far_query, far_key = self.far_queries(layer, query, at[length - new :]), self.far_keys(layer, key, at)
        if self.is_dense(layer, length):
            self.meter.add(layer.index, 1.0, heads=heads, batch=batch, new=new, length=length)
            return self._extended(query, far_query, key, far_key, value, layer)
        index = self.find(layer, far_query, far_key, self.method.block_q)
        self.meter.add(layer.index, computed_area(index), batch=batch, new=new, length=length)
        self.evaluations += int(index.evaluations.sum())
        none = torch.zeros(batch, 1, index.layout.query_blocks, 1, dtype=torch.int32, device=query.device)
        near = ops.block_sparse_attention(
            query,
            key,
            value,
            none,
            counts=none[..., 0],
            block_size=self.method.block_q,
            key_block_size=1,
            window=self.method.window,
            starts=layer.starts,
            scale=layer.scale,
            return_lse=True,
        )
        far = beyond_window(far_query, far_key, value, index, layer.scale)
        out, _ = ops.merge_attention(*(torch.stack(pair) for pair in zip(near, far, strict=True)))
        if layer.starts is None:
            return out
        padding = at[length - new :] < layer.starts[:, None]
        itself = value[:, :, length - new :].repeat_interleave(heads // key.shape[1], 1)
        return torch.where(padding[:, None, :, None], itself, out)

    def _extended(
        self, query: Tensor, far_query: Tensor, key: Tensor, far_key: Tensor, value: Tensor, layer: LayerView
    ) -> Tensor:
        return extended_attention(query, far_query, key, far_key, value, self.method.window, layer.scale, layer.starts)


def extended_attention(
    query: Tensor,
    far_query: Tensor,
    key: Tensor,
    far_key: Tensor,
    value: Tensor,
    window: int,
    scale: float,
    starts: Tensor | None = None,
) -> Tensor:
    """Causal attention whose scores at distances from `window` on are those of the far queries and keys; some rows at a time.

    Args:
        query, far_query: ``[batch, heads, new, d]``, the last positions of key, far_key, value ``[batch, kv_heads, length, d]``.
        starts: int ``[batch]``, first real row; a query in the padding reads itself.

    >>> from gossamer.hf import dense_attention
    >>> x = torch.randn(1, 1, 9, 4)
    >>> torch.allclose(extended_attention(x, x, x, x, x, 3, 0.5), dense_attention(x, x, x, 0.5), atol=1e-6)
    True
    """
    new, (kv_heads, length) = query.shape[2], key.shape[1:3]
    step, outs = max(1, _CHUNK // (query.shape[0] * query.shape[1] * length)), []
    j = torch.arange(length, device=query.device)
    for begin in range(0, new, step):
        some = slice(begin, begin + step)
        i = torch.arange(length - new, length, device=query.device)[some, None]
        grouped = [x[:, :, some].float().unflatten(1, (kv_heads, -1)) for x in (query, far_query)]
        near, far = (q @ k.float().transpose(2, 3)[:, :, None] for q, k in zip(grouped, (key, far_key), strict=True))
        hidden = j > i
        if starts is not None:
            hidden = (hidden | (j < starts[:, None, None])) & (j != i)
            hidden = hidden[:, None, None]
        weights = (torch.where(i - j < window, near, far) * scale).masked_fill(hidden, -math.inf).softmax(-1)
        outs.append((weights @ value.float()[:, :, None]).flatten(1, 2).to(query.dtype))
    return torch.cat(outs, 2)


def beyond_window(query: Tensor, key: Tensor, value: Tensor, index: HipIndex, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of every query over the sinks and chosen keys outside its window: output and log-sum-exp (-inf: none)."""
    layout, size = index.layout, index.layout.block_q
    new, count, device = layout.new, layout.query_blocks, query.device
    queries = nn.functional.pad(query, (0, 0, 0, count * size - new)).unflatten(2, (count, size)).float() * scale
    first = layout.first(device)[:, None]
    sinks = first + torch.arange(layout.sink, device=device)
    width = layout.sink + index.blocks.shape[3] * layout.block_k
    step = max(1, _CHUNK // max(1, query.shape[0] * query.shape[1] * width * (query.shape[3] + size)))
    outs, lses = [], []
    for at in (slice(i, i + step) for i in range(0, count, step)):
        chosen, valid = index.rows(at)
        always = sinks[:, None, None].expand(len(chosen), *chosen.shape[1:3], -1)
        ids = torch.cat([always, chosen], 3)
        real = torch.cat([always < layout.length, valid], 3)[:, :, :, None]
        reach = layout.positions(device)[at, :, None] - layout.window
        keep = real & (ids[:, :, :, None] <= reach)
        ids = ids.clamp_max(layout.length - 1)
        logits = (queries[:, :, at] @ take(key, ids).transpose(3, 4)).masked_fill(~keep, -math.inf)
        lse = logits.logsumexp(4)
        weights = torch.exp(logits - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
        outs.append((weights @ take(value, ids)).to(query.dtype))
        lses.append(lse)
    out, lse = (torch.cat(x, 2).flatten(2, 3)[:, :, :new] for x in (outs, lses))
    return out, lse
