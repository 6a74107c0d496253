"""The attention plug point: one function registered with transformers, one runtime per attached model.

Order of a call: the runtime's hook on the decoder gives the call's cache our storage (`cache.adopt`); each attention
block stores its keys and values and calls `_attention` below, which finds the block's runtime and layer, and hands a
single query to the decode policy and a block of queries to the prefill policy. Without policies attention is dense, by our
own kernels; torch's serve where they do not.
"""

from __future__ import annotations

import inspect
import logging
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import flash_attention_mask, sdpa_mask

from gossamer import ops
from gossamer.errors import InputError, ModelError
from gossamer.hf.cache import PARTS, Derived, KVLayer, adopt
from gossamer.hf.policy import TEACHER_FORCED, CachePolicy, DecodePolicy, PrefillPolicy, StoragePolicy
from gossamer.hf.quantized import QuantizedKVLayer
from gossamer.hf.views import attention_views, base_model, model_shape
from gossamer.patterns import Tree

NAME = "gossamer"
_BLOCK = 64  # side of a block of our prefill kernel
logger = logging.getLogger("gossamer")
# The model holds its runtime (by its hook), this table does not: a model that is dropped while attached is freed.
_RUNTIMES: weakref.WeakKeyDictionary[nn.Module, weakref.ref[AttentionRuntime]] = weakref.WeakKeyDictionary()


@dataclass
class DecodeStats:
    """What decode steps read, summed since `reset`; all sizes in bytes, counted from the selections themselves.

    The dense figures are those of the model without any method: all tokens seen, in full precision.
    """

    steps: int = 0
    kv_bytes: int = 0
    score_bytes: int = 0
    dense_bytes: int = 0
    slow_bytes: int = 0
    rows: int = 0
    dense_rows: int = 0

    def reset(self) -> None:
        """Start again from zero."""
        self.__init__()  # type: ignore[misc]


@dataclass
class LayerView:
    """What a policy sees of one layer: its cache rows, and how to attend to all of them."""

    index: int
    runtime: AttentionRuntime
    kv: KVLayer
    scale: float
    window: int | None = None
    starts: Tensor | None = None
    state: Any = None
    prefill_state: Any = None
    cache_state: Any = None
    prepared: ops.Prepared | None = None

    def attention(self) -> ops.Prepared:
        """Attention over this layer's rows as they are stored now, prepared for many steps."""
        self.prepared = self.kv.prepare(self.prepared)
        return self.prepared

    def keep(self, ids: Tensor) -> None:
        """Drop all rows but these, int ``[batch, kv_heads, n]`` ascending per head (see `KVLayer.keep`).

        Where a sequence is shorter than n, its padding must make up the number, with the lowest ids.
        """
        if self.starts is not None:
            padding = (ids < self.starts[:, None, None]).sum(2, dtype=torch.int32)
            self.kv.starts = padding[:, 0].contiguous()
        self.kv.keep(ids)

    def rows(self, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` key and value rows ``[batch, kv_heads, length, head_dim]``.

        Views of a full-precision cache, dequantised copies of a quantised one: what follows the rows should ask for new
        ones only, with `key_rows`.
        """
        return self.kv.key_rows(0, length), self.kv.value_rows(0, length)

    def key_rows(self, first: int, last: int) -> Tensor:
        """Key rows `first` to `last - 1` (a view, or a dequantised copy of just these)."""
        return self.kv.key_rows(first, last)

    def dense_decode(self, query: Tensor, length: int) -> Tensor:
        """Attend to every visible row, and count what that reads."""
        attention = self.attention()
        visible = min(length, self.window) if self.window else length
        self.count(visible * attention.batch * attention.kv_heads, length)
        if visible < length and isinstance(self.kv, QuantizedKVLayer):  # no copy of what the window doesn't see
            starts = torch.full((attention.batch,), length - visible, dtype=torch.int32, device=query.device)
            if self.starts is not None:
                starts = torch.maximum(starts, self.starts)
            return attention.dense(query, length, scale=self.scale, starts=starts)
        if visible < length:
            key, value = attention.rows(length, query.device)
            return dense_decode(query, key, value, self.scale, self.starts, self.window)
        return attention.dense(query, length, scale=self.scale, starts=self.starts)

    def row_bytes(self) -> int:
        """Bytes of one key row and one value row."""
        return self.attention().row_bytes

    def count(self, rows: int, length: int, score_bytes: int = 0) -> None:
        """Account for one decode step of this layer that read `rows` key–value rows."""
        attention, stats = self.attention(), self.runtime.stats
        seen = length + self.kv.dropped  # a dense model would read what was dropped, and in full precision
        row_bytes, dense_rows = attention.row_bytes, seen * attention.batch * attention.kv_heads
        stats.steps += 1
        stats.rows += rows
        stats.dense_rows += dense_rows
        stats.kv_bytes += rows * row_bytes
        stats.dense_bytes += dense_rows * attention.full_row_bytes
        stats.score_bytes += score_bytes

    def record(self, indices: Tensor, counts: Tensor, length: int) -> None:
        """Keep a selection where the runtime records them."""
        trace = self.runtime.trace
        if trace is not None:
            trace.append((self.index, length, indices.detach().clone(), counts.detach().clone()))

    def count_selected(
        self, indices: Tensor, counts: Tensor, length: int, score_bytes: int = 0, rows: int | None = None
    ) -> None:
        """Account for a selection of `rows` (default: the sum of `counts`), and record it."""
        self.record(indices, counts, length)
        self.count(int(counts.sum()) if rows is None else rows, length, score_bytes)


def _groups(query: Tensor, kv_heads: int) -> Tensor:
    """``[batch, heads, new, d]`` as ``[batch, kv_heads, group, new, d]``."""
    batch, heads, new, dim = query.shape
    return query.reshape(batch, kv_heads, heads // kv_heads, new, dim)


def visible_mask(new: int, length: int, starts: Tensor | None, window: int | None, device: torch.device) -> Tensor:
    """Boolean ``[batch or 1, 1, new, length]``: which rows the last `new` positions may read."""
    position = torch.arange(length - new, length, device=device)[:, None]
    row = torch.arange(length, device=device)[None, :]
    mask = row <= position
    if window:
        mask = mask & (row > position - window)
    mask = mask[None, None]
    if starts is not None:
        mask = mask & (row >= starts.to(device)[:, None, None, None])
        # A query in the padding sees nothing, which softmax turns into NaN: let it see itself.
        mask = mask | (row == position)
    return mask


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    starts: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    causal: bool = True,
    dropout: float = 0.0,
) -> Tensor:
    """Exact attention of the last `new` positions; differentiable. By our prefill kernel where it serves, else by torch's.

    Args:
        query: ``[batch, heads, new, head_dim]``; key, value: ``[batch, kv_heads, length, head_dim]``.
        scale: factor on the scores.
        starts: int ``[batch]``, first real row of each left-padded sequence.
        window: rows that a position sees, itself included (None: all).
        softcap: scores become ``softcap * tanh(score / softcap)``.
        mask: boolean, broadcastable to ``[batch, heads, new, length]``; overrides `starts` and `window`.

    Returns:
        ``[batch, heads, new, head_dim]``.
    """
    kv_heads, length, new = key.shape[1], key.shape[2], query.shape[2]
    window = window if window and window < length else None
    simple = causal and mask is None and starts is None and softcap is None and not dropout
    if simple and new >= _BLOCK and ops.runs_natively(query, key, value):
        return _dense_in_blocks(query, key, value, scale, window)
    plain = mask is None and starts is None and window is None and causal
    if mask is None and causal and not (plain and new in (1, length)):
        mask = visible_mask(new, length, starts, window, query.device)
    grouped = _groups(query, kv_heads)
    if softcap is not None:
        scores = torch.einsum("bkgtd,bksd->bkgts", grouped.float(), key.float()) * scale
        scores = softcap * torch.tanh(scores / softcap)
        if mask is None:
            mask = visible_mask(new, length, None, None, query.device)
        scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
        return torch.einsum("bkgts,bksd->bkgtd", scores.softmax(-1), value.float()).flatten(1, 2).to(query.dtype)
    # One call per position in the group: keys are shared, never repeated.
    is_causal = plain and new == length and new > 1
    outs = [
        F.scaled_dot_product_attention(
            grouped[:, :, i], key, value, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=scale
        )
        for i in range(grouped.shape[2])
    ]
    return outs[0] if len(outs) == 1 else torch.stack(outs, 2).flatten(1, 2)


def _dense_in_blocks(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """Exact attention by our own prefill kernel: all heads of a group read a key together, bfloat16 is multiplied as such, and
    neither a chunk of a prompt nor a window needs a mask of positions."""
    blocks = torch.full((1, 1, -(-query.shape[2] // _BLOCK), -(-key.shape[2] // _BLOCK)), window is None)
    blocks = blocks.expand(query.shape[0], -1, -1, -1)
    return ops.block_sparse_attention(query, key, value, blocks, block_size=_BLOCK, window=window, scale=scale)


def dense_decode(
    query: Tensor, key: Tensor, value: Tensor, scale: float, starts: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Exact attention of one query per sequence ``[batch, heads, head_dim]`` by our kernel."""
    length = key.shape[2]
    if window and window < length:
        first = length - window
        starts = (starts - first).clamp_min(0) if starts is not None else None
        key, value = key.narrow(2, first, window), value.narrow(2, first, window)
    return ops.decode_attention(query, key, value, starts=starts, scale=scale)


@dataclass(eq=False)
class AttentionRuntime:
    """Attaches attention policies to one model, and takes them off again.

    Args:
        model: a decoder-only transformers model.
        decode: policy for single queries (None: dense, our kernel).
        prefill: policy for blocks of queries (None: dense, torch's kernel).
        cache: policy for what the cache keeps (None: everything).
        storage: policy for how rows are stored (None: in the model's dtype).

    Attributes:
        stats: what decode steps have read.
        trace: when a list, every selection is appended as ``(layer, length, indices, counts)``.
        tree: when one is there, the new tokens are its nodes: each sees what is cached, its ancestors and itself.
        teacher_forced: when true, a block of new tokens is decoded query by query, each with its own selection, as
            if the tokens had come one at a time.
    """

    model: nn.Module
    decode: DecodePolicy | None = None
    prefill: PrefillPolicy | None = None
    cache: CachePolicy | None = None
    storage: StoragePolicy | None = None
    stats: DecodeStats = field(default_factory=DecodeStats)
    trace: list[tuple[int, int, Tensor, Tensor]] | None = None
    tree: Tree | None = None
    teacher_forced: bool = False

    def __post_init__(self) -> None:
        self.shape = model_shape(self.model)
        self.views = attention_views(self.model)
        model: Any = self.model
        if not getattr(model, "_supports_attention_backend", False) and not model._can_set_attn_implementation():
            raise ModelError(f"{type(model).__name__} is not supported: it does not use the attention interface")
        if not all(getattr(view.module, "is_causal", True) for view in self.views):
            raise ModelError(f"{type(model).__name__} is not supported: its attention is not causal")
        if any(view.module in _RUNTIMES for view in self.views):
            raise ModelError(
                "this model has attention methods attached already: detach them, or stack them in one recipe"
            )
        self.said: dict[str, str] = {}  # remarks made so far
        self._self = weakref.ref(self)
        #: Of the tokens of the running forward, as its caller gave them; None: they count from the cache's length.
        self.position_ids: Tensor | None = None
        self._cache: Any = None
        self._nodes_mask: tuple[tuple[int, int, int | None], Tensor] | None = None
        self._read = 0
        self._mask: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        self._layers = None if self.storage is None else self.storage.layers(self.shape)  # may refuse the model
        known = inspect.signature(base_model(self.model).forward).parameters
        self._cache_name = "cache" if "cache" in known else "past_key_values"  # renamed in transformers 5.24
        self._config = model.config.get_text_config(decoder=True)
        self._previous = self._config._attn_implementation
        self._config._attn_implementation = NAME
        for view in self.views:
            _RUNTIMES[view.module] = weakref.ref(self)
        self._places = self.decode.places if self.decode is not None else None
        self._hook: Any = base_model(self.model).register_forward_pre_hook(self._before_forward, with_kwargs=True)
        if self.decode is not None:
            self.decode.attached(self)

    @property
    def attached(self) -> bool:
        """Whether the policies are still on the model."""
        return self._hook is not None

    def detach(self) -> None:
        """Leave the model as it was; safe to call twice."""
        if self._hook is None:
            return
        self._hook.remove()
        if self.decode is not None:
            self.decode.detached()
        self._hook = self._cache = None
        self._config._attn_implementation = self._previous
        for view in self.views:
            _RUNTIMES.pop(view.module, None)

    def say_once(self, message: str) -> None:
        """Log a message the first time it comes up."""
        key = re.sub(r"\d+", "", message)  # once for every length
        if key not in self.said:
            self.said[key] = message
            logger.warning(message)

    @contextmanager
    def teacher_forcing(self) -> Iterator[None]:
        """Inside, blocks of new tokens are decoded query by query, each selecting for itself."""
        previous, self.teacher_forced = self.teacher_forced, True
        token = TEACHER_FORCED.set(True)
        try:
            yield
        finally:
            self.teacher_forced = previous
            TEACHER_FORCED.reset(token)

    @contextmanager
    def tree_forward(self, tree: Tree, read: int = 0) -> Iterator[None]:
        """Inside, blocks of new tokens are the nodes of a tree.

        Args:
            read: so many of its first nodes are the cache's last rows already; the new tokens are the others.

        Raises:
            InputError: a policy is attached, for which a node is no step of its own.
        """
        if self.decode is not None or self.cache is not None or self.storage is not None:
            raise InputError("trees of candidates need exact attention: leave sparse attention and cache methods out")
        previous, self.tree, self._read = (self.tree, self._read), tree, read
        token = TEACHER_FORCED.set(True)  # each node is a decode step
        try:
            yield
        finally:
            (self.tree, self._read), self._nodes_mask = previous, None
            TEACHER_FORCED.reset(token)

    @contextmanager
    def recording(self) -> Iterator[list[tuple[int, int, Tensor, Tensor]]]:
        """Inside, selections are kept in the list that this yields."""
        previous, self.trace = self.trace, []
        try:
            yield self.trace
        finally:
            self.trace = previous

    def _before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if len(args) > 1:  # a cache may be given by its place
            names = list(inspect.signature(module.forward).parameters)
            args, kwargs = args[:1], {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}
        cache = kwargs.get(self._cache_name)
        self.position_ids = kwargs.get("position_ids")
        self._mask = (None, None, None)
        self._cache = None
        if cache is not None:
            self._cache = weakref.ref(self._adopt(cache))  # it is the caller's to keep
            return args, kwargs
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self._config, "use_cache", False)
        if not use_cache or module.training:
            return args, kwargs
        cache = self._adopt(DynamicCache(config=self._config))
        self._cache = weakref.ref(cache)
        return args, {**kwargs, self._cache_name: cache}

    def _adopt(self, cache: Any) -> Any:
        cache = adopt(cache, self._places, self._layers)
        for layer in cache.layers:
            layer.reader = self._self
        return cache

    def view_of(self, index: int) -> LayerView | None:
        """This call's view of a layer, once the layer has been reached with this cache."""
        cache = self._cache() if self._cache is not None else None
        return cache.layers[index].views.get(self) if cache is not None and index < len(cache.layers) else None

    def _layer(self, module: nn.Module, scale: float, window: int | None, starts: Tensor | None) -> LayerView | None:
        index: int = module.layer_idx  # type: ignore[assignment]
        cache = self._cache() if self._cache is not None else None
        if cache is None:
            return None
        kv: KVLayer = cache.layers[index]
        view: LayerView | None = kv.views.get(self)
        if view is None:
            view = kv.views[self] = LayerView(index, self, kv, scale, window)
            if self.decode is not None:
                view.state = self.decode.open(view)
            if self.prefill is not None:
                both: object = self.decode
                view.prefill_state = view.state if self.prefill is both else self.prefill.open(view)
            if self.cache is not None:
                view.cache_state = self.cache.open(view)
            for part in PARTS:  # what a changed batch or a saved cache left for this view
                state, carried = getattr(view, part), kv.claim(self, part)
                if carried is not None and isinstance(state, Derived):
                    state.restore(*carried)
        view.starts = starts if not kv.dropped else kv.starts if starts is not None else None
        return view

    def _padding(self, mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Split a padding mask ``[batch, length]`` into `starts` (left padding) or a mask for anything else."""
        if self._mask[0] is mask:  # one mask serves all layers of a forward
            return self._mask[1], self._mask[2]
        starts: Tensor | None = None
        holes: Tensor | None = None
        if mask.ndim == 2:
            first = mask.int().argmax(dim=1)
            if bool((mask.sum(1) == mask.shape[1] - first).all()):
                starts = first.to(torch.int32)
            else:
                holes = mask.bool()
        else:
            holes = mask
        self._mask = (mask, starts, holes)
        return starts, holes

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        window: int | None,
        softcap: float | None,
        dropout: float,
    ) -> Tensor:
        """Attention of one block of one forward; returns ``[batch, heads, new, head_dim]``."""
        starts, holes = (None, None) if mask is None else self._padding(mask)
        new, length = query.shape[2], key.shape[2]
        differentiable = query.requires_grad and torch.is_grad_enabled()
        if new > 1 or holes is not None or softcap is not None or differentiable:
            key, value = self._whole(module, key, value)
        branching = self.tree is not None and (new > 1 or self._read > 0)
        if branching and (softcap is not None or holes is not None or starts is not None):
            if holes is not None or starts is not None:
                raise InputError("trees of candidates are for one sequence without padding")
            assert self.tree is not None
            holes = self._node_mask(self.tree, length, window, query.device)
        if holes is not None or softcap is not None or differentiable:
            return self._exact(query, key, value, scale, starts, window, softcap, holes, dropout)
        if branching:
            return self._nodes(module, query, key, value, scale, window)
        layer = self._layer(module, scale, window, starts)
        if layer is None:
            return dense_attention(query, key, value, scale, starts=starts, window=window, dropout=dropout)
        if new == 1:
            out = self._step(layer, query.squeeze(2), length).unsqueeze(2)
        elif self.teacher_forced:
            out = self._steps(layer, query, length)
        else:
            key, value = key.to(query.device), value.to(query.device)  # from a slower tier, if they lie in one
            if self.prefill is not None:
                out = self.prefill.prefill(layer, query, key, value)
            else:
                out = dense_attention(query, key, value, scale, starts=layer.starts, window=window, dropout=dropout)
            if self.decode is not None:
                self.decode.observe(layer, query)
        if self.cache is not None:
            self.cache.update(layer, query)
        return out

    def _whole(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The rows themselves, where the cache handed out placeholders for them."""
        cache = self._cache() if self._cache is not None else None
        kv = cache.layers[module.layer_idx] if cache is not None else None
        return kv.whole(key, value) if kv is not None else (key, value)

    def _step(self, layer: LayerView, query: Tensor, length: int) -> Tensor:
        if self.decode is None:
            return layer.dense_decode(query, length)
        return self.decode.decode(layer, query, length)

    def _steps(self, layer: LayerView, query: Tensor, length: int) -> Tensor:
        """Each query of a block by itself, with the rows that it would have seen."""
        if self.cache is not None:
            raise InputError("a cache that drops rows cannot be teacher-forced in a block: feed the tokens one by one")
        starts, new, outs = layer.starts, query.shape[2], []
        for t, rows in enumerate(range(length - new + 1, length + 1)):
            if starts is not None:
                layer.starts = starts.clamp_max(rows - 1)  # a query in the padding reads itself
            outs.append(self._step(layer, query[:, :, t], rows))
        return torch.stack(outs, dim=2)

    def _node_mask(self, tree: Tree, length: int, window: int | None, device: torch.device) -> Tensor:
        """Bool ``[1, 1, nodes, length]``: what the nodes, which are the last rows, may read; kept for a forward's layers."""
        key = (id(tree), length, window)
        if self._nodes_mask is not None and self._nodes_mask[0] == key:
            return self._nodes_mask[1]
        past = length - tree.size
        positions = torch.cat([torch.arange(past), past + tree.positions])
        new = tree.mask[self._read :]
        mask = torch.cat([torch.ones(len(new), past, dtype=torch.bool), new], dim=1)
        if window:
            mask &= positions > positions[past + self._read :, None] - window
        self._nodes_mask = (key, mask[None, None].to(device))
        return self._nodes_mask[1]

    def _nodes(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Attention of a tree's nodes: all of them read the cached rows together, each key once, and their ancestors."""
        tree, length = self.tree, key.shape[2]
        assert tree is not None
        batch, heads, nodes, dim = query.shape
        if nodes != tree.size - self._read:
            raise InputError(f"{nodes} new tokens for a tree of {tree.size - self._read}")
        past, kv_heads = length - tree.size, key.shape[1]
        near = window is not None and past + max(tree.depths) >= window
        if not past or near or self._read:
            mask = self._node_mask(tree, length, window if near else None, query.device)
            mask = mask.expand(1, heads // kv_heads, -1, -1).reshape(1, 1, -1, length)
            grouped = query.reshape(batch, kv_heads, -1, dim)
            out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
            return out.view(batch, heads, nodes, dim)
        layer, mask = self._layer(module, scale, window, None), tree.mask.to(query.device)
        attention = layer.attention() if layer is not None else None
        if isinstance(attention, ops.PreparedAttention):
            return attention.tree(query, length, mask, scale=scale)
        return ops.tree_attention(query, key, value, mask, scale=scale)

    def _exact(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        starts: Tensor | None,
        window: int | None,
        softcap: float | None,
        holes: Tensor | None,
        dropout: float,
    ) -> Tensor:
        """The cases that kernels do not serve: gaps in the padding, capped scores, gradients."""
        if holes is not None:
            if self.decode is not None or self.prefill is not None or self.cache is not None:
                self.say_once("the attention mask is not plain left padding: attention is dense")
            new, length = query.shape[2], key.shape[2]
            if holes.ndim == 2:
                holes = visible_mask(new, length, None, window, query.device) & holes[:, None, None, :length]
                holes = holes | torch.eye(length, dtype=torch.bool, device=query.device)[length - new :]
            elif holes.dtype != torch.bool:
                holes = holes == 0
        elif self.decode is not None or self.prefill is not None or self.cache is not None:
            if softcap is not None:
                self.say_once("this model caps its attention scores: attention is dense")
            elif not self.model.training:
                self.say_once("gradients are on: attention is dense; use torch.no_grad() to run the method")
        return dense_attention(
            query, key, value, scale, starts=starts, window=window, softcap=softcap, mask=holes, dropout=dropout
        )


def attached_runtime(model: nn.Module) -> AttentionRuntime | None:
    """The runtime that serves a model's attention now, if any."""
    found = _RUNTIMES.get(attention_views(model)[0].module)
    return found() if found is not None else None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls; returns ``[batch, new, heads, head_dim]``."""
    found = _RUNTIMES.get(module)
    runtime = found() if found is not None else None
    if runtime is None:
        raise ModelError(
            "this model's attention is set to 'gossamer' but nothing is attached: use gossamer.attach(model, …)"
        )
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise ModelError(
            f"{type(module).__name__} is not supported: it adds sinks or a position bias to its attention scores"
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = runtime.attention(module, query, key, value, attention_mask, scale, sliding_window, softcap, dropout)
    return out.transpose(1, 2).contiguous(), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """No mask for a plain causal batch, else the padding mask ``[batch, length]``: the runtime does the rest.

    What is neither causal nor a window (packed sequences, chunks, overlays) comes as a boolean mask of four dimensions.
    """
    local, config = kwargs.get("local_size"), kwargs.get("config")
    plain = local is None or (
        local == getattr(config, "sliding_window", None) and not getattr(config, "attention_chunk_size", None)
    )
    if plain and kwargs.get("allow_is_causal_skip", True):
        return flash_attention_mask(*args, **kwargs)  # type: ignore[no-any-return]
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return sdpa_mask(*args, **kwargs)  # type: ignore[no-any-return]


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)

__all__ = [
    "AttentionRuntime",
    "DecodeStats",
    "InputError",
    "LayerView",
    "attached_runtime",
    "dense_attention",
    "dense_decode",
    "visible_mask",
]
