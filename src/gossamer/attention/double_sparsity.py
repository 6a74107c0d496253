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

import json
import re
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer import ops
from gossamer.attention.base import AttentionMethod
from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError, InputError
from gossamer.hf import (
    AttentionRuntime,
    DecodePolicy,
    LayerView,
    ModelShape,
    PrefillPolicy,
    SelectingPolicy,
    dense_attention,
)
from gossamer.hf.cache import Derived
from gossamer.hf.views import attention_views, model_shape
from gossamer.models import fingerprint
from gossamer.ops.labels import container_bits
from gossamer.patterns import Budget, resolve
from gossamer.registry import register

Statistic = Literal["qk", "q", "k"]


def magnitude(states: Tensor) -> Tensor:
    """Mean over tokens of |x|: ``[batch, heads, tokens, d]`` → ``[heads, d]``."""
    return states.abs().float().mean(dim=(0, 2))


def _own_products(query: Tensor, key: Tensor) -> Tensor:
    """|q·k| per channel of each token with itself, contiguous ``[batch, heads, tokens, d]``."""
    grouped: Tensor = query.unflatten(1, (key.shape[1], -1))
    return (grouped * key.unsqueeze(2)).flatten(1, 2).abs().float()


def product_magnitude(query: Tensor, key: Tensor) -> Tensor:
    """Mean over tokens of |q·k| per channel, each token with itself: → ``[heads, d]``; keys ``[batch, kv_heads, tokens, d]``."""
    return _own_products(query, key).mean(dim=(0, 2))


def released_product_magnitude(query: Tensor, key: Tensor) -> Tensor:
    """The released script's qk statistic: the head axis is not moved before flattening, so "heads" mix positions."""
    product = _own_products(query, key)
    return product.reshape(-1, product.shape[1], product.shape[3]).mean(dim=0)


def channel_order(score: Tensor) -> Tensor:
    """Channels by falling score, ties by number: ``[heads, d]`` → int64 ``[heads, d]``, each row a permutation."""
    return score.argsort(dim=-1, descending=True, stable=True)


def label_scores_per(score: Tensor, kv_heads: int, labels_per: Literal["kv_head", "query_head"], heads: int) -> Tensor:
    """Bring a statistic to the heads that have labels: summed over each group, or repeated for its query heads."""
    if labels_per == "kv_head":
        return score if score.shape[0] == kv_heads else score.unflatten(0, (kv_heads, -1)).sum(1)
    return score if score.shape[0] == heads else score.repeat_interleave(heads // score.shape[0], 0)


def interleaved_channels(channels: Tensor, head_dim: int) -> Tensor:
    """Channel numbers of half-split rotary checkpoints in the interleaved layout: c → (2c mod d) + ⌊2c/d⌋.

    >>> interleaved_channels(torch.arange(4), 4).tolist()
    [0, 2, 1, 3]
    """
    return (2 * channels) % head_dim + (2 * channels) // head_dim


class _Recorder(PrefillPolicy):
    """Collects the qk statistics of each layer while attention stays dense."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def prefill(self, layer: LayerView, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Add this block, then attend densely."""
        self.add(f"qk.{layer.index}", product_magnitude(query, key))
        self.sums[f"qk_released.{layer.index}"] = released_product_magnitude(query, key)  # the last block only
        return dense_attention(query, key, value, layer.scale, starts=layer.starts, window=layer.window)

    def add(self, name: str, value: Tensor) -> None:
        """Sum over blocks."""
        self.sums[name] = self.sums[name] + value if name in self.sums else value


class Labels(Derived):
    """The label cache of one layer, following its rows."""

    cache: ops.LabelCache | None = None


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

    def labels(self, layer: LayerView) -> ops.LabelCache:
        """Labels of all rows in the cache: new rows, of prefill and decode alike, are appended here."""
        state, kv, channels = cast(Labels, layer.state), layer.kv, self.channels[layer.index]
        assert kv.key_storage is not None
        if state.cache is None or state.cache.capacity < kv.length:
            with torch.inference_mode(False):  # written in and out of inference mode
                key = kv.key_storage
                if state.cache is None:
                    heads, r = channels.shape
                    state.cache = ops.LabelCache.allocate(
                        key.shape[0], heads, kv.capacity, r, self.method.label_bits, key.dtype, channels.device
                    )
                state.cache = state.cache.grow(kv.capacity)
        if state.rows < kv.length:
            new = kv.key_storage.narrow(2, state.rows, kv.length - state.rows).to(channels.device)
            ops.append_labels(state.cache, new, channels, state.rows)
            state.rows = kv.length
        return state.cache

    def select(self, layer: LayerView, query: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The rows that `decode` would attend."""
        _, indices, counts = self._attend(layer, query, length)
        return indices, counts

    def decode(self, layer: LayerView, query: Tensor, length: int) -> Tensor:
        """Dense where asked; otherwise score, select and attend."""
        if self.is_dense(layer, length):
            return layer.dense_decode(query, length)
        out, indices, counts = self._attend(layer, query, length)
        labels = cast(ops.LabelCache, layer.state.cache)
        layer.count_selected(indices, counts, length, labels.nbytes(length))
        return out

    def _attend(self, layer: LayerView, query: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
        labels = self.labels(layer)
        key, value = layer.rows(length)
        return ops.label_attention(
            query,
            key,
            value,
            self.channels[layer.index],
            labels,
            self.budget(length),
            starts=layer.starts,
            scale=layer.scale,
            select=self.method.select_per,
            reduce=self.method.group_reduce if self.method.select_per == "kv_head" else None,
            protect_last=self.method.keep_current,
        )


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
    stat: Statistic = Field("qk", description="calibration statistic that ranks channels")
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
        """Rank the channels of every head on token blocks ``[count, block]``, one block per forward.

        All statistics are kept, so one calibration serves every `stat`.

        Raises:
            InputError: `tokens` is not a non-empty integer matrix.
            CalibrationError: activations are not finite, or layers were never reached.
        """
        if tokens.ndim != 2 or tokens.numel() == 0 or tokens.is_floating_point():
            raise InputError(
                f"calibration tokens must be a non-empty integer matrix [blocks, length], got {tuple(tokens.shape)}"
            )
        if model.training:
            raise InputError("calibration needs the model as it will run: call model.eval() first")
        shape, recorder = model_shape(model), _Recorder()
        runtime = AttentionRuntime(model, prefill=recorder)
        hooks: list[Any] = []
        try:
            for view in attention_views(model):
                for kind, source, heads in (("q", view.q_source, shape.heads), ("k", view.k_source, shape.kv_heads)):
                    if source is not None:
                        hooks.append(
                            source.register_forward_hook(_pre_rope_hook(recorder, f"{kind}.{view.index}", heads))
                        )
            with torch.no_grad():
                for block in tokens:
                    model(block[None].to(next(model.parameters()).device), use_cache=True)
        finally:
            runtime.detach()
            for hook in hooks:
                hook.remove()
        if f"qk.{shape.layers - 1}" not in recorder.sums:
            raise CalibrationError("calibration reached no attention layer: this model's attention is not supported")
        facts = {"blocks": tokens.shape[0], "block": tokens.shape[1], "layers": shape.layers}
        return Calibration(self.slug, fingerprint(model), {k: v.cpu() for k, v in recorder.sums.items()}, facts)

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
        calibration = self.require(calibration)
        calibration.check(fingerprint(model))
        device = next(model.parameters()).device
        channels = [c.to(device) for c in self.label_channels(calibration, model_shape(model))]
        if self.offload == "none":
            return DoubleSparsityPolicy(self, channels)
        from gossamer.attention.double_sparsity_offload import OffloadPolicy  # it builds on this file

        return OffloadPolicy(self, channels)

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


def _pre_rope_hook(recorder: _Recorder, name: str, heads: int) -> Any:
    """A forward hook that adds the magnitudes of a projection's (or head norm's) output."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.ndim == 4 and output.shape[1] == heads != output.shape[2]:  # Gemma norms heads that it has moved
            recorder.add(name, magnitude(output))
        else:
            recorder.add(name, magnitude(output.reshape(*output.shape[:2], heads, -1).transpose(1, 2)))

    return hook


def import_channels(path: str | Path, model: nn.Module) -> Calibration:
    """Read a channel file of the official release (JSON, ``model.layers.i.self_attn.{q,k,qk}_proj`` → ``[heads][d]``).

    It holds rankings, not statistics: a channel's score becomes d minus its rank, which keeps every head's order; groups
    then vote by rank.

    Raises:
        CalibrationError: unreadable, another shape than the model, or rows that are no permutations.
    """
    shape = model_shape(model)
    try:
        data: dict[str, list[list[int]]] = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CalibrationError(f"cannot read the channel file {path}: {error}") from None
    if not isinstance(data, dict):
        raise CalibrationError(f"{path} is no channel file: it holds no named layers")
    tensors: dict[str, Tensor] = {}
    for name, rows in data.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.self_attn\.(q|k|qk)_proj", name)
        if match is None:
            raise CalibrationError(f"{path}: unexpected entry {name!r}")
        layer, stat = int(match[1]), match[2]
        heads = shape.kv_heads if stat == "k" else shape.heads
        whole = list(range(shape.head_dim))
        if (
            layer >= shape.layers
            or not isinstance(rows, list)
            or len(rows) != heads
            or not all(isinstance(row, list) and sorted(row, key=str) == sorted(whole, key=str) for row in rows)
        ):
            raise CalibrationError(f"{path}: {name} does not fit this model ({heads} heads, {shape.head_dim} channels)")
        rank = torch.tensor(rows).argsort(dim=-1)
        tensors[f"{stat}.{layer}"] = (shape.head_dim - rank).float()
    stats = {name.split(".")[0] for name in tensors}
    missing = [f"{s}.{i}" for s in stats for i in range(shape.layers) if f"{s}.{i}" not in tensors]
    if missing or not tensors:
        raise CalibrationError(f"{path}: no channels for {missing[0] if missing else 'any layer'}")
    return Calibration("double-sparsity", fingerprint(model), tensors, {"imported": Path(path).name})
