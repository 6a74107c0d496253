"""TidalDecode (Yang et al., ICLR 2025): position persistent sparse attention.

Tokens that score high in one layer score high in the layers after it, so a few layers choose for all. With s₀ = `first`
and C = `reselect`, one decode step over S cached tokens (the new one included) does, for query head h of layer l:

    l < s₀                full attention
    l = s₀ or l ∈ C       full attention, and   z[h, j] = q[h]·K[h//g, j],   I[h] = top-k_j z[h, j]
    every other layer     o[h] = softmax_{j ∈ I[h]}(q[h]·K[h//g, j] / √d) · V[I[h]]

where I is the set of the latest selecting layer of this same step; it is never carried to the next step. A step reads
``(s₀ + 1 + |C|)·S + (L − s₀ − 1 − |C|)·min(k, S)`` tokens per head instead of ``L·S``.

Decisions where paper, accuracy code and CUDA code differ: sets are per query head and force nothing in, as in the
accuracy code (`keep_current` gives the CUDA code's k − 1 + the current token); equal scores go to the lower row. Layers
with a sliding window shorter than the context stay dense in their window; where such a layer should select, the next layer
that sees everything does. The last layer never selects, since nobody would use it. C comes from `calibrate`, which
measures the overlap of all layers' sets once, so that any `first` and number of `anchors` can be read from it.
"""

from __future__ import annotations

import itertools
from typing import Any, cast

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from gossamer import ops
from gossamer.attention.base import AttentionHandle, AttentionMethod
from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError, InputError, RecipeError
from gossamer.hf import (
    AttentionRuntime,
    DecodePolicy,
    LayerView,
    ModelShape,
    PrefillPolicy,
    SelectingPolicy,
    dense_attention,
    model_shape,
)
from gossamer.models import fingerprint
from gossamer.patterns import Budget, resolve
from gossamer.registry import register

PROBES = 32  # queries at the end of each calibration block whose sets are compared


def tokens_read(layers: int, first: int, reselections: int, length: int, k: int) -> int:
    """Tokens that one decode step reads per head, over all layers: the paper's count.

    >>> tokens_read(layers=32, first=2, reselections=1, length=1000, k=100) == 4 * 1000 + 28 * 100
    True
    """
    full = min(layers, first + 1 + reselections)
    return full * length + (layers - full) * min(k, length)


def set_overlap(masks: Tensor, k: int) -> Tensor:
    """Recall between layers' sets, ``R[a, l] = mean |I_a ∩ I_l| / k`` over heads and queries, float32 ``[layers, layers]``.

    Args:
        masks: bool ``[layers, heads, queries, rows]`` with k true rows in each line.
    """
    flat = masks.flatten(1).float()
    return flat @ flat.T / (k * masks.shape[1] * masks.shape[2])


def mean_recall(overlap: Tensor, first: int, reselect: tuple[int, ...]) -> float:
    """Mean recall of the layers after `first` by the set that each would use; a re-selecting layer counts with its own.

    >>> mean_recall(torch.tensor([[1, 0.4, 0.2], [0.4, 1, 0.6], [0.2, 0.6, 1]]), 0, (1,))
    0.8
    """
    anchors, total = (first, *reselect), 0.0
    for layer in range(first + 1, len(overlap)):
        total += float(overlap[max(a for a in anchors if a <= layer), layer])
    return round(total / max(1, len(overlap) - first - 1), 6)


def best_anchors(overlap: Tensor, first: int, count: int) -> tuple[int, ...]:
    """The `count` re-selection layers with the highest `mean_recall`, by dynamic programming (fewer in a small model).

    >>> best_anchors(torch.eye(6) + torch.diag(torch.ones(5), 1) * 0.5, first=1, count=2)
    (2, 4)
    """
    layers = len(overlap)
    count = max(0, min(count, layers - 1 - first))
    ahead = overlap.double().triu().cumsum(1)  # ahead[a, b − 1]: recall of layers a … b − 1, all served by a
    # value[b]: best total of the layers before b with so many anchors used; where[n][b]: the last of them.
    value = [float("-inf") if b <= first else float(ahead[first, b - 1]) for b in range(layers + 1)]
    where: list[list[int]] = []
    for _ in range(count):
        previous, value, chosen = value, [float("-inf")] * (layers + 1), [0] * (layers + 1)
        for a, b in itertools.combinations(range(first + 1, layers + 1), 2):
            total = previous[a] + float(ahead[a, b - 1])
            if total > value[b]:
                value[b], chosen[b] = total, a
        where.append(chosen)
    anchors, end = [], layers
    for chosen in reversed(where):
        end = chosen[end]
        anchors.append(end)
    return tuple(reversed(anchors))


class _Recorder(PrefillPolicy):
    """Top-k sets of the last queries of a block, for every layer, while attention stays dense."""

    def __init__(self, k: int, probes: int) -> None:
        self.k, self.probes = k, probes
        self.masks: dict[int, Tensor] = {}

    def prefill(self, layer: LayerView, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keep this layer's sets ``[heads, probes, rows]`` (none of a windowed layer), then attend densely."""
        grouped = query[0, :, -self.probes :].unflatten(0, (key.shape[1], -1)).float()
        scores = (grouped @ key[0, :, None].float().transpose(2, 3)).flatten(0, 1)
        if not bool(torch.isfinite(scores).all()):
            raise CalibrationError(f"attention scores of layer {layer.index} are not finite: check the model's weights")
        rows, mask = scores.shape[2], torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        if not layer.window or layer.window >= rows:
            later = torch.ones(self.probes, rows, dtype=torch.bool, device=scores.device).triu(rows - self.probes + 1)
            mask.scatter_(2, scores.masked_fill(later, float("-inf")).topk(self.k).indices, True)
        self.masks[layer.index] = mask
        return dense_attention(query, key, value, layer.scale, starts=layer.starts, window=layer.window)


class TidalPolicy(SelectingPolicy):
    """Full, selecting and sparse layers; sets go from layer to layer within a step.

    Attributes:
        selecting: layers that choose.
        sets: per context length, ids ``[batch, heads, k]`` and counts ``[batch, heads]`` of the latest selecting layer.
            An entry lives from that layer to the last one; a teacher-forced block holds one for each of its queries.
        tokens_read: tokens read per head by each layer, over all steps and sequences.
    """

    def __init__(self, method: TidalDecode, reselect: tuple[int, ...], layers: int) -> None:
        super().__init__(frozenset(range(method.first)))
        self.method, self.reselect, self.last = method, reselect, layers - 1
        self.selecting = frozenset((method.first, *reselect))
        self.sets: dict[int, tuple[Tensor, Tensor]] = {}
        self.tokens_read = [0] * layers

    def detached(self) -> None:
        """Forget the sets."""
        self.sets.clear()

    def budget(self, length: int) -> int:
        """Rows per query head."""
        return resolve(self.method.tokens, length)

    def choose(self, layer: LayerView, query: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The rows with this layer's highest true scores, per query head."""
        key, _ = layer.rows(length)
        scores = ops.key_scores(query, key.to(query.device))
        if self.method.keep_current:
            scores[:, :, -1] = float("inf")
        return ops.select_topk(scores, self.budget(length), starts=layer.starts)

    def select(self, layer: LayerView, query: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The rows that the latest selecting layer of this step chose."""
        return self.sets[length]

    def decode(self, layer: LayerView, query: Tensor, length: int) -> Tensor:
        """Attend by this layer's role.

        Raises:
            RecipeError: a cache method dropped rows, so that a row id means another token in each layer.
        """
        stats, heads = layer.runtime.stats, layer.runtime.shape.kv_heads
        before, full = stats.rows, self.is_dense(layer, length)
        if layer.kv.dropped and not full:
            raise RecipeError(
                "tidaldecode cannot run with a cache method that drops rows: layers share row numbers, choose one of the two"
            )
        if layer.index in self.selecting:
            self.sets.pop(length, None)  # should a window keep this layer from choosing, the next one does
        if full or length not in self.sets:
            out = layer.dense_decode(query, length)
            if not full and layer.index < self.last:
                self.sets[length] = self.choose(layer, query, length)
                stats.score_bytes += length * layer.kv.nbytes // (2 * layer.kv.length)  # all keys, once more
        else:
            out, heads = super().decode(layer, query, length), query.shape[1]
        if layer.index == self.last:
            self.sets.pop(length, None)
        self.tokens_read[layer.index] += (stats.rows - before) // heads
        return out


@register("tidaldecode", slot="attention.decode", family="attention", needs=["calibration"])
class TidalDecode(AttentionMethod):
    """Choose the top tokens exactly in a few full-attention layers, and let all other layers read only those.

    For long contexts and deep models: a step reads ``(first + 1 + |reselect|)·S`` tokens in full layers and k in each of
    the others; selecting layers read their keys once more to choose. Memory for the cache is not saved. Sets persist well
    in large models; in small ones give several `anchors`. With `reselect` given no calibration is needed.

    Paper: TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention, ICLR 2025.

    >>> TidalDecode(tokens=256, first=2, reselect=[13]).reselect
    (13,)
    """

    tokens: Budget = Field(1 / 16, description="k, rows read per query head: a count or a fraction of the context")
    first: int = Field(2, ge=0, description="s₀, first layer that selects; those before it read everything")
    reselect: tuple[int, ...] | None = Field(
        None, description="C, later layers that select anew (13 for Llama-3-8B, 7 for Llama-2-7B); none: calibrated"
    )
    anchors: int = Field(1, ge=0, description="how many re-selection layers to take from the calibration")
    keep_current: bool = Field(False, description="the current token always takes one of the k places")

    @field_validator("reselect")
    @classmethod
    def _check_reselect(cls, value: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        if value is not None:
            steps = itertools.pairwise((info.data.get("first", -1), *value))
            if any(after <= before for before, after in steps):
                raise ValueError(f"layers must ascend and lie after first={info.data.get('first')}")
        return value

    def calibrate(self, model: nn.Module, tokens: Tensor) -> Calibration:
        """Measure how far the layers' top-k sets overlap, on the last queries of token blocks ``[count, block]``.

        k is this method's budget for a block, at most an eighth of it (beyond that every set overlaps every other).
        The result ranks candidates for any `first` and any number of `anchors`; see `recalls`.

        Raises:
            InputError: `tokens` is not an integer matrix with blocks of 16 tokens at least, or the model is in training.
            CalibrationError: scores are not finite, or layers were never reached.
        """
        if tokens.ndim != 2 or tokens.is_floating_point() or not len(tokens) or tokens.shape[1] < 16:
            raise InputError(
                f"calibration tokens must be an integer matrix [blocks, 16 or more], got {list(tokens.shape)} {tokens.dtype}"
            )
        if model.training:
            raise InputError("calibration needs the model as it will run: call model.eval() first")
        shape, size = model_shape(model), tokens.shape[1]
        k, probes = min(resolve(self.tokens, size), size // 8), min(PROBES, size // 4)
        recorder = _Recorder(k, probes)
        runtime, call = AttentionRuntime(model, prefill=recorder), cast(Any, model)
        overlap = torch.zeros(shape.layers, shape.layers)
        try:
            with torch.no_grad():
                for block in tokens:
                    recorder.masks.clear()
                    call(block[None].to(next(model.parameters()).device), use_cache=True)
                    if len(recorder.masks) < shape.layers:
                        raise CalibrationError(
                            "calibration did not reach every layer: this model's attention is not supported"
                        )
                    masks = torch.stack([recorder.masks[i] for i in range(shape.layers)])
                    overlap += set_overlap(masks, k).cpu() / len(tokens)
        finally:
            runtime.detach()
        facts = {"blocks": len(tokens), "block": size, "layers": shape.layers, "k": k, "probes": probes}
        return Calibration(self.slug, fingerprint(model), {"overlap": overlap}, facts)

    def recalls(self, calibration: Calibration) -> dict[int, float]:
        """Mean recall of the layers after `first` for each single re-selection layer: what the paper's probe compares."""
        overlap = self.require(calibration).tensors["overlap"]
        return {c: mean_recall(overlap, self.first, (c,)) for c in range(self.first + 1, len(overlap))}

    def layers_of(self, shape: ModelShape, calibration: Calibration | None) -> tuple[int, ...]:
        """The re-selection layers C for a model: those given, or the best by the calibration.

        Raises:
            InputError: the model has no such layers.
            CalibrationError: none were given, and no calibration of such a model.
        """
        if self.first > shape.layers:
            raise InputError(f"tidaldecode: first={self.first}, but this model has {shape.layers} layers")
        if self.reselect is not None:
            if self.reselect and self.reselect[-1] >= shape.layers:
                raise InputError(
                    f"tidaldecode: reselect names layer {self.reselect[-1]}, but this model's last is {shape.layers - 1}"
                )
            return self.reselect
        if not self.anchors or self.first >= shape.layers - 1:
            return ()
        overlap = self.require(calibration).tensors.get("overlap")
        if overlap is None or overlap.shape != (shape.layers, shape.layers):
            raise CalibrationError(f"this calibration does not fit a model of {shape.layers} layers: calibrate again")
        return best_anchors(overlap, self.first, self.anchors)

    def decode_policy(self, model: nn.Module, calibration: Calibration | None) -> DecodePolicy:
        """A policy with this model's layer roles."""
        if calibration is not None and self.reselect is None:
            self.require(calibration).check(fingerprint(model))
        shape = model_shape(model)
        return TidalPolicy(self, self.layers_of(shape, calibration), shape.layers)

    def io_bytes(self, length: int, shape: ModelShape, element_size: int) -> dict[str, int]:
        """Of a layer that reuses a set: k rows per query head, nothing to choose (`tokens_read` counts a whole step)."""
        rows = min(resolve(self.tokens, length), length)
        return {"rows": rows * shape.heads * 2 * shape.head_dim * element_size, "scores": 0}


def correct(
    model: nn.Module,
    handle: AttentionHandle,
    cache: Any,
    input_ids: Tensor,
    since: int,
    attention_mask: Tensor | None = None,
) -> int:
    """KV cache correction: recompute, in one dense prefill, the rows of the tokens from `since` on, and overwrite them.

    Rows of tokens that were decoded sparsely differ a little from those of a dense model, and the difference piles up.
    Call it between `generate` calls (or every T steps of a loop of your own); T may be thousands. It costs a prefill of
    the tokens since the last correction. Nothing is counted as decoding.

    Args:
        handle: of the methods attached to `model`.
        cache: the cache that `model` filled.
        input_ids: int64 ``[batch, n]``, the tokens in the cache from the first one on (more are ignored: the last token
            that `generate` made is not in the cache yet).
        since: rows before this one are right: the prompt's length, later what the last call returned.
        attention_mask: int ``[batch, n]``, where the prompt was padded on the left.

    Returns:
        How many rows are right now: `since` of the next call.

    Raises:
        InputError: too few tokens, a row outside the cache, a handle that is not on this model, or a cache method that
            drops rows.
    """
    runtime, length = handle.runtime, cache.get_seq_length()
    if runtime.model is not model or not runtime.attached:
        raise InputError("correct: the handle is not attached to this model")
    if runtime.cache is not None:
        raise InputError("correct: a cache method drops rows, so they cannot be recomputed")
    if input_ids.ndim != 2 or input_ids.shape[1] < length:
        raise InputError(
            f"correct: the cache holds {length} tokens, input_ids must be [batch, {length} or more], "
            f"got {list(input_ids.shape)}"
        )
    if not 0 <= since <= length:
        raise InputError(f"correct: since must lie in 0 .. {length}, got {since}")
    if since == length:
        return int(length)
    batch = cache.layers[0].keys.shape[0]
    if len(input_ids) != batch or (attention_mask is not None and attention_mask.shape != input_ids.shape):
        raise InputError(f"correct: the cache holds {batch} sequences, input_ids and attention_mask must fit it")
    extra: dict[str, Any] = {}
    if attention_mask is not None:
        mask = attention_mask[:, :length]
        extra = {"attention_mask": mask, "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)[:, since:]}
    known = [layer for layer in cache.layers if runtime in getattr(layer, "views", ())]
    saved = runtime.decode, runtime.prefill, runtime.stats, runtime.teacher_forced
    cache.crop(since - length)
    runtime.decode, runtime.prefill, runtime.stats, runtime.teacher_forced = None, None, type(saved[2])(), False
    try:
        with torch.no_grad():
            cast(Any, model)(input_ids[:, since:length], past_key_values=cache, use_cache=True, **extra)
    finally:
        runtime.decode, runtime.prefill, runtime.stats, runtime.teacher_forced = saved
        for layer in cache.layers:  # views opened meanwhile lack the policies' state
            if layer not in known:
                layer.views.pop(runtime, None)
    return int(length)
