"""Double Sparsity (Yang et al., 2024, arXiv 2408.07092): few channels find the tokens, few tokens are attended.

Offline, per layer, over calibration tokens t (sums over blocks):

    q :  s[h, c] = mean_t |q_pre[t, h, c]|           before rotary embedding
    k :  s[h, c] = mean_t |k_pre[t, h, c]|           before rotary embedding, one row per KV head
    qk:  s[h, c] = mean_t |q[t, h, c] · k[t, h//g, c]|   after it: each token attends to itself
    C[h] = argsort_c s[h, ·], descending; the first r channels are the labels

Each step, per head:

    L[t, h, :] = K[t, h//g, C[h, :r]]                kept to b bits per token and head
    ŝ[j] = Σ_{c ∈ C[h,:r]} q[c] · L[j, c]
    I    = top-k of ŝ
    o    = softmax_{j ∈ I}(q · K[j] / √d) · V[I]

Departures from the released code, which `compat="released"` restores: its qk statistic mixes heads (a reshape without
moving the head axis) and keeps only the last block. Decisions where the paper is silent: the current token is always
attended (`keep_current`); with grouped queries, labels are per KV head with s summed over the group.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer import ops
from gossamer.attention.base import AttentionMethod
from gossamer.attention.double_sparsity_channels import (
    Statistic,
    calibrate,
    channel_order,
    import_channels,
    label_scores_per,
)
from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError, InputError
from gossamer.hf import DecodePolicy, LayerView, ModelShape, SelectingPolicy
from gossamer.hf.cache import Derived
from gossamer.hf.views import model_shape
from gossamer.models import fingerprint
from gossamer.ops.labels import container_bits
from gossamer.patterns import Budget, resolve
from gossamer.registry import register


class Labels(Derived):
    """The label cache of one layer, following its rows."""

    cache: ops.LabelCache | None = None
    prepared: ops.PreparedLabelAttention | None = None


class DoubleSparsityPolicy(SelectingPolicy):
    """Scores with the label cache and attends to the best rows in one kernel call."""

    def __init__(self, method: DoubleSparsity, channels: list[Tensor]) -> None:
        super().__init__(frozenset(method.dense_layers), method.min_length)
        self.method, self.channels = method, channels

    def open(self, layer: LayerView) -> Labels:
        """No labels yet."""
        return Labels()

    def budget(self, length: int) -> int:
        """Rows kept per selection."""
        return resolve(self.method.tokens, length)

    def room(self, layer: LayerView) -> ops.LabelCache:
        """A label cache with room for all rows, those that it has filled in place."""
        state, kv, channels = cast(Labels, layer.state), layer.kv, self.channels[layer.index]
        if state.cache is None or state.cache.capacity < kv.length:
            with torch.inference_mode(False):  # written in and out of inference mode
                if state.cache is None:
                    heads, r = channels.shape
                    state.cache = ops.LabelCache.allocate(
                        kv.batch, heads, kv.capacity, r, self.method.label_bits, kv.dtype, channels.device
                    )
                state.cache = state.cache.grow(kv.capacity)
        return state.cache

    def labels(self, layer: LayerView) -> ops.LabelCache:
        """Labels of all rows in the cache: new rows, of prefill and decode alike, are appended here."""
        state, kv, channels = cast(Labels, layer.state), layer.kv, self.channels[layer.index]
        cache = self.room(layer)
        if state.rows < kv.length:
            new = layer.key_rows(state.rows, kv.length).to(channels.device)
            ops.append_labels(cache, self.label_keys(new), channels, state.rows)
            state.rows = kv.length
        return cache

    def label_keys(self, key: Tensor) -> Tensor:
        """What labels are picked from: the keys ``[batch, kv_heads, new, head_dim]`` themselves."""
        return key

    def select(self, layer: LayerView, query: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The rows that `decode` would attend."""
        if layer.kv.key_storage is None:
            return self._best(layer, query, length)
        self.attend(layer, query, length)
        attention = cast(Labels, layer.state).prepared
        assert attention is not None
        indices, counts = attention.chosen
        return indices.clone(), counts.clone()

    def _best(self, layer: LayerView, query: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """`select` by itself: rows that are stored in another way (quantised) are attended by their own kernel."""
        scores = ops.label_scores(
            self.label_queries(query),
            self.channels[layer.index],
            self.labels(layer),
            length,
            starts=layer.starts,
            reduce=self.method.group_reduce if self.method.select_per == "kv_head" else "none",
            kv_heads=layer.kv.heads,
        )
        if self.method.keep_current:
            scores[..., length - 1] = torch.inf
        return ops.select_topk(scores, self.budget(length), starts=layer.starts)

    def score_bytes(self, layer: LayerView, length: int) -> int:
        """Labels of all rows."""
        return self.labels(layer).nbytes(length)

    def label_queries(self, query: Tensor) -> Tensor:
        """What label channels are picked from: the query ``[batch, heads, head_dim]`` itself."""
        return query

    def decode(self, layer: LayerView, query: Tensor, length: int) -> Tensor:
        """Dense where asked; otherwise score, select and attend."""
        if layer.kv.key_storage is None:
            return super().decode(layer, query, length)
        if self.is_dense(layer, length):
            return layer.dense_decode(query, length)
        out, rows = self.attend(layer, query, length)
        state = cast(Labels, layer.state)
        assert state.cache is not None and state.prepared is not None
        if layer.runtime.trace is not None:
            layer.record(*state.prepared.chosen, length)
        layer.count(rows, length, state.cache.nbytes(length))
        return out

    def attend(self, layer: LayerView, query: Tensor, length: int) -> tuple[Tensor, int]:
        """Label the new rows, score, select and attend, in one call; returns the output and the rows read."""
        state, kv = cast(Labels, layer.state), layer.kv
        attention = state.prepared
        if (
            attention is None
            or attention.labels is not state.cache
            or attention.capacity < kv.length
            or not attention.fits(kv.key_storage, kv.value_storage)
        ):
            assert kv.key_storage is not None and kv.value_storage is not None
            attention = state.prepared = ops.PreparedLabelAttention(
                kv.key_storage,
                kv.value_storage,
                self.channels[layer.index],
                self.room(layer),
                select=self.method.select_per,
                reduce=self.method.group_reduce if self.method.select_per == "kv_head" else None,
                protect_last=self.method.keep_current,
            )
        new = (state.rows, kv.length)
        out, rows = attention.attend(
            query, length, self.budget(length), append=new, scale=layer.scale, starts=layer.starts
        )
        state.rows = kv.length
        return out, rows


class NeighbourPolicy(DoubleSparsityPolicy):
    """Without a calibration: a label channel is the mean of γ neighbouring channels, of the key and of the query."""

    def label_keys(self, key: Tensor) -> Tensor:
        """Keys with their channels averaged in groups: ``[batch, kv_heads, new, r]``."""
        pooled: Tensor = key.unflatten(-1, (self.channels[0].shape[1], -1)).mean(-1)
        return pooled

    def label_queries(self, query: Tensor) -> Tensor:
        """The query with its channels averaged in groups."""
        return self.label_keys(query)

    def select(self, layer: LayerView, query: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The best rows by the averaged channels."""
        return self._best(layer, query, length)

    def decode(self, layer: LayerView, query: Tensor, length: int) -> Tensor:
        """Select, then attend."""
        return SelectingPolicy.decode(self, layer, query, length)


@register("double-sparsity", slot="attention.decode", family="attention", needs=["calibration"])
class DoubleSparsity(AttentionMethod):
    """Post-training sparse attention for decode: a small label cache finds the tokens, exact attention reads only those.

    Nothing is evicted, so the whole context stays reachable. A step reads ``S·r·b/8`` label bytes and ``2·k·d`` elements
    per head instead of ``2·S·d``; it pays once attention is a visible part of a step (thousands of tokens).

    Paper: Post-Training Sparse Attention with Double Sparsity, arXiv 2408.07092.

    >>> DoubleSparsity(tokens="1/16").tokens
    0.0625
    """

    tokens: Budget = Field(1 / 16, description="k, rows attended per selection: a count or a fraction of the context")
    channels: Budget = Field(
        1 / 4, description="r, label channels: a count or a fraction of head_dim (1/γ in the paper)"
    )
    label_bits: int = Field(4, ge=1, le=16, description="b, bits of a label value; 16 keeps the model's dtype")
    stat: Statistic | Literal["neighbours"] = Field(
        "qk", description="statistic that ranks channels; 'neighbours' averages neighbouring channels, uncalibrated"
    )
    labels_per: Literal["kv_head", "query_head"] = Field("kv_head", description="heads that have labels of their own")
    select_per: Literal["kv_head", "query_head"] = Field("query_head", description="heads that select for themselves")
    group_reduce: Literal["sum", "max"] = Field(
        "sum", description="how a KV head's queries vote when they select together"
    )
    dense_layers: tuple[int, ...] = Field(
        (0, 1), description="layers that read everything; negative counts from the end"
    )
    min_length: int = Field(0, ge=0, description="contexts shorter than this are read densely")
    keep_current: bool = Field(True, description="always attend the current token (the paper forces nothing in)")
    compat: Literal["paper", "released"] = Field(
        "paper", description="'released': the qk statistic of the official script"
    )
    offload: Literal["none", "file", "host"] = Field(
        "none", description="where all rows lie: near the model, in a memory-mapped file, or in pinned host memory"
    )
    offload_folder: str | None = Field(None, description="folder of the file (default: the system's temporary folder)")
    sync_layers: tuple[int, ...] = Field(
        (0, 1, -1), description="offload: layers that choose with their own query and wait"
    )
    predict: Literal["previous_layer", "none"] = Field(
        "previous_layer", description="offload: choose one layer ahead, or ('none') make every layer wait"
    )

    def calibrate(self, model: nn.Module, tokens: Tensor) -> Calibration:
        """Rank the channels of every head on token blocks ``[count, block]``; one calibration serves every `stat`.

        Raises:
            InputError: `tokens` is not a non-empty integer matrix.
            CalibrationError: activations are not finite, or layers were never reached.
        """
        return calibrate(model, tokens)

    def import_calibration(self, path: str | Path, model: nn.Module) -> Calibration:
        """Read a channel file (JSON) of the official release; see `double_sparsity_channels.import_channels`."""
        return import_channels(path, model)

    def label_channels(self, calibration: Calibration, shape: ModelShape) -> list[Tensor]:
        """The label channels of every layer, int32 ``[label heads, r]``.

        Raises:
            CalibrationError: the calibration lacks this statistic.
        """
        r = min(resolve(self.channels, shape.head_dim), shape.head_dim)
        stat = "qk_released" if self.stat == "qk" and self.compat == "released" else self.stat
        result = []
        for layer in range(shape.layers):
            score = calibration.tensors.get(f"{stat}.{layer}")
            if score is None:
                known = sorted({name.split(".")[0] for name in calibration.tensors})
                raise CalibrationError(
                    f"this calibration has no {stat} statistic for layer {layer}, only {', '.join(known)}"
                )
            if score.shape not in ((shape.heads, shape.head_dim), (shape.kv_heads, shape.head_dim)):
                raise CalibrationError(
                    f"this calibration's {stat}.{layer} has shape {list(score.shape)}: calibrate again"
                )
            score = label_scores_per(score, shape.kv_heads, self.labels_per, shape.heads)
            result.append(channel_order(score)[:, :r].to(torch.int32).contiguous())
        return result

    def decode_policy(self, model: nn.Module, calibration: Calibration | None) -> DecodePolicy:
        """A policy with this model's label channels."""
        if self.stat == "neighbours":
            return self._uncalibrated(model)
        calibration = self.require(calibration)
        calibration.check(fingerprint(model))
        device = next(model.parameters()).device
        channels = [c.to(device) for c in self.label_channels(calibration, model_shape(model))]
        if self.offload == "none":
            return DoubleSparsityPolicy(self, channels)
        from gossamer.attention.double_sparsity_offload import OffloadPolicy  # it builds on this file

        return OffloadPolicy(self, channels)

    def _uncalibrated(self, model: nn.Module) -> DecodePolicy:
        shape = model_shape(model)
        r = min(resolve(self.channels, shape.head_dim), shape.head_dim)
        if shape.head_dim % r or self.labels_per != "kv_head" or self.offload != "none":
            raise InputError(
                f"double-sparsity: stat='neighbours' needs channels that divide head_dim ({r} of {shape.head_dim}), "
                "labels_per='kv_head' and no offload"
            )
        device = next(model.parameters()).device
        channels = torch.arange(r, dtype=torch.int32, device=device).expand(shape.kv_heads, r).contiguous()
        return NeighbourPolicy(self, [channels] * shape.layers)

    def io_bytes(self, length: int, shape: ModelShape, element_size: int) -> dict[str, int]:
        """The paper's count, ``S·r·b/8 + 2·k·d·bytes`` per head; packed labels add 8 bytes of scale per token and head."""
        r = min(resolve(self.channels, shape.head_dim), shape.head_dim)
        label_heads = shape.kv_heads if self.labels_per == "kv_head" else shape.heads
        select_heads = shape.kv_heads if self.select_per == "kv_head" else shape.heads
        bits = container_bits(self.label_bits) or 8 * element_size
        k = min(resolve(self.tokens, length), length)
        return {
            "rows": k * select_heads * 2 * shape.head_dim * element_size,
            "scores": length * r * bits * label_heads // 8,
            "scales": length * label_heads * 8 if self.label_bits <= 8 else 0,
        }
