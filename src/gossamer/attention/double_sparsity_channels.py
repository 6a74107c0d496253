"""Double Sparsity's channels: which ones carry a head's scores (the formulas are in `double_sparsity`)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError, InputError
from gossamer.hf import AttentionRuntime, LayerView, PrefillPolicy, dense_attention
from gossamer.hf.views import attention_views, model_shape
from gossamer.models import fingerprint

SLUG = "double-sparsity"
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


def _pre_rope_hook(recorder: _Recorder, name: str, heads: int) -> Any:
    """A forward hook that adds the magnitudes of a projection's (or head norm's) output."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.ndim == 4 and output.shape[1] == heads != output.shape[2]:  # Gemma norms heads that it has moved
            recorder.add(name, magnitude(output))
        else:
            recorder.add(name, magnitude(output.reshape(*output.shape[:2], heads, -1).transpose(1, 2)))

    return hook


def calibrate(model: nn.Module, tokens: Tensor) -> Calibration:
    """All channel statistics of a model on token blocks int64 ``[count, block]``, one block per forward.

    Raises:
        InputError: `tokens` is not a non-empty integer matrix, or the model is in training mode.
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
                    hook = _pre_rope_hook(recorder, f"{kind}.{view.index}", heads)
                    hooks.append(source.register_forward_hook(hook))
        with torch.no_grad():
            for block in tokens:
                model(block[None].to(next(model.parameters()).device), use_cache=True)
    finally:
        runtime.detach()
        for handle in hooks:
            handle.remove()
    if f"qk.{shape.layers - 1}" not in recorder.sums:
        raise CalibrationError("calibration reached no attention layer: this model's attention is not supported")
    facts = {"blocks": tokens.shape[0], "block": tokens.shape[1], "layers": shape.layers}
    return Calibration(SLUG, fingerprint(model), {k: v.cpu() for k, v in recorder.sums.items()}, facts)


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
    return Calibration(SLUG, fingerprint(model), tensors, {"imported": Path(path).name})
