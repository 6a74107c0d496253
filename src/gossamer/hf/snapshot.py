"""Save a cache and go on from it later: rows, positions, padding, and what policies can't compute again.

One safetensors file. Rows are stored as they are held (in the model's dtype, or as codes), so the continuation is the one
that would have been. Labels, page bounds and the like are computed anew from the rows; running sums over queries that are
gone (the scores of H2O and A2SF) are saved. Settings of methods are not: attach the same ones again.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.cache_utils import Cache

from gossamer import ops
from gossamer.errors import InputError
from gossamer.files import save_tensors
from gossamer.hf.cache import PARTS, GossamerCache, KVLayer, _round_up
from gossamer.hf.mixed_precision import MixedPrecisionKV
from gossamer.hf.quantized import KVFormat, QuantizedKVLayer
from gossamer.hf.views import model_shape
from gossamer.models import fingerprint

_FORMAT = 1
_PARTS = ("codes", "step", "zero")


def save_cache(cache: Cache, path: str | Path, model: nn.Module) -> Path:
    """Write a cache that a model with attached methods has filled; complete or not at all.

    Args:
        cache: a cache with Gossamer's layers (any that went through an attached model).
        path: the file; its folder is made.
        model: the model that filled it, whose fingerprint is stored.

    Raises:
        InputError: the cache holds nothing yet, layers of another kind, or rows that are offloaded.
        OutputError: the folder can't be written.
    """
    facts = []
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, KVLayer) or not layer.is_initialized:
            raise InputError("save_cache takes a cache that a model with attached methods has filled")
        facts.append(_describe(i, layer, tensors))
    if not facts:
        raise InputError("save_cache takes a cache that a model with attached methods has filled")
    header = {"format": _FORMAT, "fingerprint": fingerprint(model), "layers": facts}
    apart = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    return save_tensors(path, apart, {"gossamer": json.dumps(header)}, "the cache")


def load_cache(path: str | Path, model: nn.Module) -> GossamerCache:
    """Read what `save_cache` wrote, onto the model's device; pass it as ``past_key_values``.

    Attach the methods that filled it before or after: a state that was saved waits for the policy that can take it.

    Raises:
        InputError: no such file, damaged, or of another model.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no saved cache at {path}")
    device = next(model.parameters()).device
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["gossamer"])
            if header["format"] != _FORMAT:
                raise InputError(f"{path} has cache format {header['format']}, this version reads {_FORMAT}")
            found = fingerprint(model)
            if header["fingerprint"] != found:
                raise InputError(
                    f"the cache in {path} was filled by another model (its fingerprint {header['fingerprint']}, this "
                    f"model's {found})"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        cache = GossamerCache()
        for i, facts in enumerate(header["layers"]):
            cache.layers.append(_restore(i, facts, tensors, device))
        if len(cache.layers) != model_shape(model).layers:
            raise InputError(f"{path} holds {len(cache.layers)} layers, the model has {model_shape(model).layers}")
        return cache
    except InputError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, AssertionError, OSError) as error:
        raise InputError(f"{path} is damaged or no saved cache ({type(error).__name__}): save it again") from None


def _describe(index: int, layer: KVLayer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Put the tensors of a layer under its names, and return the rest."""
    name = f"{index}."
    facts: dict[str, Any] = {"length": layer.length, "dropped": layer.dropped, "kept": layer._kept}
    if isinstance(layer, QuantizedKVLayer):
        assert layer.recent is not None
        facts["quantized"], facts["split"] = asdict(layer.format), layer.split
        near = layer.length - layer.split
        for side, recent in zip(("key", "value"), layer.recent, strict=True):
            tensors[f"{name}{side}"] = recent[:, :, :near]
        for side, rows in zip(("key", "value"), layer.old or (), strict=False):
            groups = -(-layer.split // rows.group)
            for part, tensor in zip(_PARTS, rows.tensors(), strict=True):
                tensors[f"{name}{side}.{part}"] = tensor[:, :, : layer.split if part == "codes" else groups]
    else:
        split = 0
        if isinstance(layer, MixedPrecisionKV):
            split = layer.split
            facts["mixed"], parts_of = layer.snapshot()
            tensors |= {f"{name}parts.{key}": tensor for key, tensor in parts_of.items()}
        tensors[f"{name}key"] = layer.key_rows(split, layer.length)
        tensors[f"{name}value"] = layer.value_rows(split, layer.length)
    for what, value in (("positions", layer.row_positions), ("starts", layer.starts)):
        if value is not None:
            tensors[name + what] = value
    facts["states"] = {}
    waiting = [layer.saved, *layer.states().values()]
    for parts in waiting:
        for part, (held, covered) in parts.items():
            if part not in facts["states"]:  # of several runtimes, the first that has something
                facts["states"][part] = covered
                tensors.update({f"{name}{part}.{key}": value for key, value in held.items()})
    return facts


def _restore(index: int, facts: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> KVLayer:
    """A layer from its tensors and facts; what does not fit together is an error of some kind."""
    name, length = f"{index}.", int(facts["length"])
    key, value = tensors[f"{name}key"].to(device), tensors[f"{name}value"].to(device)
    layer: KVLayer
    if "quantized" in facts:
        quantized = QuantizedKVLayer(KVFormat(**facts["quantized"]))
        layer, split = quantized, int(facts["split"])
        quantized.lazy_initialization(key, value)
        assert quantized.recent is not None
        near = key.shape[2]
        for room, rows in zip(quantized.recent, (key, value), strict=True):
            room.narrow(2, 0, near).copy_(rows)
        if split:
            for side, storage in zip(
                ("key", "value"), quantized._store(_round_up(split + split // 4 + 1)), strict=True
            ):
                _fill(storage, [tensors[f"{name}{side}.{part}"] for part in _PARTS], split)
        if split + near != length:
            raise ValueError("rows are missing")
        quantized.split, quantized.length = split, length
    else:
        if "mixed" in facts:
            own = f"{name}parts."
            held = {what.removeprefix(own): x.to(device) for what, x in tensors.items() if what.startswith(own)}
            layer = MixedPrecisionKV.restored(facts["mixed"], held, key, value)
        else:
            layer = KVLayer()
            layer.update(key, value)
        if layer.length != length or value.shape != key.shape:
            raise ValueError("rows are missing")
    layer.dropped, layer._kept = int(facts["dropped"]), int(facts["kept"])
    layer.row_positions, starts = tensors.get(f"{name}positions"), tensors.get(f"{name}starts")
    if layer.row_positions is not None and layer.row_positions.shape != (layer.batch, layer.heads, layer._kept):
        raise ValueError("positions are missing")
    layer.starts = None if starts is None else starts.to(device)
    for part, covered in facts["states"].items():
        if part not in PARTS:
            raise ValueError("unknown state")
        own = f"{name}{part}."
        held = {key.removeprefix(own): value.to(device) for key, value in tensors.items() if key.startswith(own)}
        layer.saved[part] = held, int(covered)
    return layer


def _fill(storage: ops.QuantizedRows, parts: list[Tensor], rows: int) -> None:
    groups = -(-rows // storage.group)
    for to, part, count in zip(storage.tensors(), parts, (rows, groups, groups), strict=True):
        to[:, :, :count] = part.to(to.device)
