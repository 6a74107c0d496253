"""What an attention or cache method plugs into a model: policies for prefill, for decode, for the cache.

A policy is made by a method's `attach`, belongs to one model, and keeps per-cache state on the cache layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gossamer.hf.offload import Allocator

if TYPE_CHECKING:
    from gossamer.hf.attention import AttentionRuntime, LayerView
    from gossamer.hf.cache import KVLayer
    from gossamer.hf.views import ModelShape


#: Whether blocks of tokens stand for decode steps, for parts of a model that have no `AttentionRuntime` to ask.
TEACHER_FORCED: ContextVar[bool] = ContextVar("TEACHER_FORCED", default=False)


class Policy:
    """What all three kinds share."""

    def open(self, layer: LayerView) -> Any:
        """State for a cache layer that this policy has not seen; kept on that layer's view (default: none)."""
        return None

    def report(self) -> dict[str, Any]:
        """Facts about the run so far, by name, for the handle's report (default: none)."""
        return {}


class PrefillPolicy(Policy, ABC):
    """Chooses which keys a block of new queries reads. Its state is at ``layer.prefill_state``."""

    @abstractmethod
    def prefill(self, layer: LayerView, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend `query` ``[batch, heads, new, head_dim]`` to `key`, `value` ``[batch, kv_heads, length, head_dim]``.

        The queries stand at the last `new` positions. Returns ``[batch, heads, new, head_dim]``.
        """


class DecodePolicy(Policy, ABC):
    """Chooses which cached keys one new query reads. Its state is at ``layer.state``."""

    #: Where each layer's rows are kept (None: in memory, on the model's device).
    places: list[Allocator] | None = None
    #: Whether `observe` must see the prompt: a cache that was filled without this policy then lacks what it needs.
    watches_prompt: bool = False

    def attached(self, runtime: AttentionRuntime) -> None:
        """Called once when the policy is on its model (default: nothing to do)."""

    def detached(self) -> None:
        """Called once when it is taken off; undo what `attached` did (default: nothing)."""

    def observe(self, layer: LayerView, query: Tensor) -> None:
        """Called when a block of queries ``[batch, heads, new, head_dim]``, whose rows are the last of the layer, was
        attended by whatever serves prefill (default: nothing to do)."""

    @abstractmethod
    def decode(self, layer: LayerView, query: Tensor, length: int) -> Tensor:
        """Attend `query` ``[batch, heads, head_dim]`` to rows ``[layer.starts, length)`` of ``layer.kv``.

        Rows from `length` on may hold later tokens (a teacher-forced chunk stores them first): never read them.
        Returns ``[batch, heads, head_dim]``.
        """


class CachePolicy(Policy, ABC):
    """Chooses what the cache of a layer keeps: rows are dropped, merged or re-encoded after they were attended.

    Its state is at ``layer.cache_state``.

    Attributes:
        drops: whether it drops rows, one head differently from another.
        rewrites: whether it changes rows where they lie (merging), for which they must be there in full precision.
    """

    drops: bool = True
    rewrites: bool = False

    @abstractmethod
    def update(self, layer: LayerView, query: Tensor) -> None:
        """Called when `query` ``[batch, heads, new, head_dim]``, whose rows are the last `new` of the layer, was attended.

        May drop rows with `layer.keep`. New tokens keep counting their positions from all tokens seen, and kept rows keep
        the rotation that they were stored with.
        """


class StoragePolicy(Policy, ABC):
    """Chooses how the rows of each layer are stored."""

    #: Whether rows share scales with their neighbours, so that they can't be dropped one by one.
    grouped: bool = False

    @abstractmethod
    def layers(self, shape: ModelShape) -> list[Callable[[KVLayer | None], KVLayer]]:
        """For each layer, what makes its storage from the layer that is there (None: a new one).

        Raises:
            InputError: the model's rows can't be stored so.
        """


class SelectingPolicy(DecodePolicy):
    """A decode policy that names rows; gathering and attending are done here.

    Subclasses give `budget` and `select`. Where the budget covers the context, attention is dense and exact.
    """

    def __init__(self, dense_layers: frozenset[int] = frozenset(), min_length: int = 0) -> None:
        self.dense_layers = dense_layers
        self.min_length = min_length

    @abstractmethod
    def budget(self, length: int) -> int:
        """Rows that a selection keeps at this context length."""

    @abstractmethod
    def select(self, layer: LayerView, query: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Row ids int32 ``[batch, heads or kv_heads, k]`` and how many of them count, int32 ``[batch, heads or kv_heads]``."""

    def score_bytes(self, layer: LayerView, length: int) -> int:
        """Bytes that `select` reads to choose, over all sequences (default: none)."""
        return 0

    def reads_all(self, layer: LayerView) -> bool:
        """Whether this is one of the dense layers; negative numbers count from the last."""
        return layer.index in self.dense_layers or layer.index - layer.runtime.shape.layers in self.dense_layers

    def is_dense(self, layer: LayerView, length: int) -> bool:
        """Whether this layer reads everything at this length."""
        if self.reads_all(layer) or length < self.min_length or (layer.window and layer.window < length):
            return True
        if self.budget(length) >= length:
            layer.runtime.say_once(
                f"context of {length} tokens is within the budget of {self.budget(length)}: attention is dense"
            )
            return True
        return False

    def decode(self, layer: LayerView, query: Tensor, length: int) -> Tensor:
        """Dense where `is_dense` says so, otherwise only the selected rows."""
        if self.is_dense(layer, length):
            return layer.dense_decode(query, length)
        indices, counts = self.select(layer, query, length)
        out, rows = layer.attention().listed(query, length, indices, counts, scale=layer.scale)
        layer.count_selected(indices, counts, length, self.score_bytes(layer, length), rows)
        return out
