"""Double Sparsity with the cache in a slower tier (the paper's "Double Sparsity-Offload").

All rows lie in a file or in host memory; the labels and the rows of two layers lie near the model. The rows that layer ℓ
will need are chosen while layer ℓ−1 runs, with a guess of its query,

    q̂_ℓ = RoPE(W_q^ℓ · x),   x = layer ℓ−1's normed attention input

because the input changes slowly from layer to layer. Attention itself then uses the true query. Layers that change much
(`sync_layers`: the first two and the last) choose with their own query and wait. The current token is not in the labels
yet when the choice is made, so it is always added: a selection of k rows is the best k − 1 past rows and the current one.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from gossamer import ops
from gossamer.attention.double_sparsity import DoubleSparsityPolicy
from gossamer.hf import AttentionRuntime, LayerView
from gossamer.hf.cache import allocate_near
from gossamer.hf.offload import DoubleBuffer, Fetched, file_allocator, pinned_allocator

if TYPE_CHECKING:
    from gossamer.attention.double_sparsity import DoubleSparsity


class OffloadPolicy(DoubleSparsityPolicy):
    """Selection one layer ahead, rows from the slow tier through a double buffer.

    Layers in `dense_layers` read everything at each step, so their rows stay near.
    """

    def __init__(self, method: DoubleSparsity, channels: list[Tensor]) -> None:
        super().__init__(method, channels)
        layers = len(channels)
        self.sync = {i % layers for i in method.sync_layers}
        near = {i % layers for i in method.dense_layers}
        slow = file_allocator(method.offload_folder) if method.offload == "file" else pinned_allocator
        self.places = [allocate_near if i in near else slow for i in range(layers)]
        self.slow = [i for i in range(layers) if i not in near]
        self.hooks: list[Any] = []
        self.pending: dict[int, Future[Fetched]] = {}
        self.guesses: dict[int, Tensor] = {}

    def attached(self, runtime: AttentionRuntime) -> None:
        """Watch the input of every layer whose successor is predicted."""
        self.runtime, self.buffer = runtime, DoubleBuffer()
        for view in runtime.views[:-1]:
            following = view.index + 1
            if following in self.slow and following not in self.sync and self.method.predict == "previous_layer":
                hook = self._predict(following)
                self.hooks.append(view.module.register_forward_pre_hook(hook, with_kwargs=True))

    def detached(self) -> None:
        """Stop watching and reading."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self.pending.clear()
        self.buffer.close()

    def _predict(self, layer_index: int) -> Any:
        view = self.runtime.views[layer_index]

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            layer = self.runtime.view_of(layer_index)
            if layer is None or torch.is_grad_enabled():
                return
            if hidden.shape[1] > 1:  # a block of tokens: kept for teacher forcing, where nothing is fetched ahead
                if self.runtime.teacher_forced:
                    self.guesses[layer_index] = view.project_query(hidden, kwargs.get("position_embeddings"))
                return
            past = layer.kv.length
            if self.is_dense(layer, past + 1):
                return
            guess = view.project_query(hidden, kwargs.get("position_embeddings"))[:, :, 0]
            self.pending[layer_index] = self.buffer.submit(lambda: self._fetch(layer, guess, past + 1))

        return hook

    def _fetch(self, layer: LayerView, query: Tensor, length: int) -> Fetched:
        """Choose the best ``k − 1`` rows before the current one and bring them near."""
        kv, wanted = layer.kv, self.budget(length) - 1
        assert kv.key_storage is not None and kv.value_storage is not None
        kv_heads = kv.key_storage.shape[1]
        together = self.method.select_per == "kv_head"
        if wanted == 0 or length == 1:
            ids = torch.zeros(query.shape[0], kv_heads, 0, dtype=torch.int32, device=query.device)
            counts = torch.zeros(query.shape[0], kv_heads, dtype=torch.int32, device=query.device)
        else:
            scores = ops.label_scores(
                query,
                self.channels[layer.index],
                self.labels(layer),
                length - 1,
                starts=layer.starts,
                reduce=self.method.group_reduce if together else "none",
                kv_heads=kv_heads,
            )
            ids, counts = ops.select_topk(scores, wanted, starts=layer.starts)
        if layer.runtime.trace is not None:
            current = torch.full_like(ids[..., :1], length - 1)
            layer.runtime.trace.append((layer.index, length, torch.cat([current, ids], 2), counts + 1))
        return self.buffer.fetch(layer.index % 2, kv.key_storage, kv.value_storage, ids, counts, query.device)

    def decode(self, layer: LayerView, query: Tensor, length: int) -> Tensor:
        """Wait for this layer's rows, add the current one, attend."""
        job = self.pending.pop(layer.index, None)
        if self.is_dense(layer, length):
            return layer.dense_decode(query, length)
        if job is not None:
            fetched = job.result()
            if fetched.ready is not None:
                torch.cuda.current_stream().wait_event(fetched.ready)
        else:
            fetched = self._fetch(layer, self._guess(layer, query, length), length)
        kv = layer.kv
        assert kv.key_storage is not None and kv.value_storage is not None
        fetched.key[:, :, 0] = kv.key_storage[:, :, length - 1]
        fetched.value[:, :, 0] = kv.value_storage[:, :, length - 1]
        if fetched.indices is None:
            out = ops.decode_attention(query, fetched.key, fetched.value, lengths=fetched.counts, scale=layer.scale)
        else:
            out = ops.decode_attention(
                query, fetched.key, fetched.value, indices=fetched.indices, counts=fetched.counts, scale=layer.scale
            )
        current = kv.key_storage.shape[0] * kv.key_storage.shape[1]
        labels = cast(ops.LabelCache, layer.state.cache) if layer.state.cache is not None else None
        layer.count(fetched.rows + current, length, labels.nbytes(length) if labels is not None else 0)
        layer.runtime.stats.slow_bytes += (fetched.rows + current) * layer.row_bytes()
        return out

    def _guess(self, layer: LayerView, query: Tensor, length: int) -> Tensor:
        """The query to choose with, where nothing was fetched ahead: predicted in a teacher-forced block, else the true one."""
        block = self.guesses.get(layer.index)
        if block is None or not layer.runtime.teacher_forced:
            return query
        position = length - 1 - (layer.kv.length - block.shape[2])
        return block[:, :, position] if 0 <= position < block.shape[2] else query
