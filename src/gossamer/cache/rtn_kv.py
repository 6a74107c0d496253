"""Round-to-nearest quantisation of the KV cache, keys per channel or per token, newest rows in full precision.

    step = (max − min) / (2^b − 1),   code = round((x − min) / step),   x̂ = code · step + min

over the rows of a group for each channel (keys, by default) or over the channels of a token (values). The layout of
KIVI (Liu et al., ICML 2024, arXiv 2402.02750), whose point is that keys have loud channels and values have not; with both
axes ``"token"`` it is the plain baseline. KIVI quantises values as soon as they leave the residual and keys a group at a
time; here both wait for a group.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import nn

from gossamer.cache.base import CacheMethod
from gossamer.calibration import Calibration
from gossamer.errors import InputError
from gossamer.hf import KVFormat, KVLayer, ModelShape, QuantizedKVLayer, StoragePolicy
from gossamer.hf.views import model_shape
from gossamer.registry import register


class QuantizedStorage(StoragePolicy):
    """Makes every layer a quantised one, and adds up what they hold."""

    def __init__(self, format: KVFormat, full_layers: frozenset[int] = frozenset()) -> None:
        self.format, self.full_layers, self.grouped = format, full_layers, format.grouped
        self.made: dict[int, weakref.ref[KVLayer]] = {}
        self.full_row_bytes = 0

    def layers(self, shape: ModelShape) -> list[Callable[[KVLayer | None], KVLayer]]:
        """A quantised layer for each layer of the model, but for those that stay as they are."""
        self.format.check(shape.head_dim)
        full = {layer % shape.layers for layer in self.full_layers}
        return [partial(self._make, i, i in full) for i in range(shape.layers)]

    def _make(self, index: int, full: bool, layer: KVLayer | None) -> KVLayer:
        made = (layer or KVLayer()) if full else QuantizedKVLayer.of(self.format, layer)
        self.made[index] = weakref.ref(made)
        return made

    def report(self) -> dict[str, Any]:
        """Bytes that the cache holds, and what its rows and the dropped ones would take in the model's dtype."""
        held = [layer for layer in (ref() for ref in self.made.values()) if layer is not None and layer.is_initialized]
        full = sum(
            2 * kv.batch * kv.heads * kv.get_seq_length() * kv.key_rows(0, 1).shape[3] * kv.dtype.itemsize
            for kv in held
            if kv.length
        )
        size = sum(kv.nbytes for kv in held)
        return {"kv_bytes_held": size, "kv_bytes_full": full, "kv_compression": full / size if size else 1.0}


@register("rtn-kv", slot="cache.storage", family="cache", name="RTN KV quantisation", baseline=True)
class RTNKV(CacheMethod):
    """Keep the KV cache in 2, 4 or 8 bits, rounded to nearest, with the newest tokens in full precision.

    Nothing is dropped, no calibration, and it stacks with any method that selects rows (and, with both axes "token", with
    those that drop them). 8 bits are hardly seen in the output; 4 bits want keys per channel; 2 bits are for large models.
    A decode step reads the codes, scales included, instead of the rows, by a kernel that never dequantises them to memory;
    a prompt attends to its own block in full precision and to earlier blocks dequantised. Methods that read all keys to
    choose (TidalDecode's selecting layers, TOVA, A2SF) dequantise them to do so.

    >>> RTNKV(bits=4).format().row_bytes(128) / (4 * 128)  # of the bytes of a bfloat16 row
    0.2734375
    """

    bits: Literal[2, 4, 8] = Field(4, description="bits of a key and, unless value_bits is set, of a value")
    value_bits: Literal[2, 4, 8] | None = Field(None, description="bits of a value (default: as keys)")
    key_axis: Literal["channel", "token"] = Field("channel", description="what has a scale of its own among keys")
    value_axis: Literal["channel", "token"] = Field("token", description="what has a scale of its own among values")
    group: int = Field(64, ge=1, le=65536, description="rows quantised together; per channel they share their scales")
    residual: int = Field(32, ge=0, description="newest rows that stay in full precision")
    scales: Literal["bfloat16", "float32"] = Field("bfloat16", description="dtype of the scales")
    full_layers: tuple[int, ...] = Field((), description="layers left in full precision; negative counts from the end")

    @model_validator(mode="after")
    def _fits(self) -> RTNKV:
        if self.residual + self.group > 65536:
            raise ValueError("residual and group are kept in full precision: together at most 65536 rows")
        return self

    def format(self) -> KVFormat:
        """How rows are stored."""
        return KVFormat(
            self.bits,
            self.value_bits or self.bits,
            self.key_axis,
            self.value_axis,
            self.group,
            self.residual,
            self.scales == "bfloat16",
        )

    def storage_policy(self, model: nn.Module, calibration: Calibration | None) -> StoragePolicy:
        """Quantised layers.

        Raises:
            InputError: head_dim does not fill whole words of codes, or a layer is named that is not there.
        """
        shape = model_shape(model)
        try:
            self.format().check(shape.head_dim)
        except InputError as error:
            raise InputError(f"rtn-kv: {error}") from None
        if any(not -shape.layers <= layer < shape.layers for layer in self.full_layers):
            raise InputError(f"rtn-kv: full_layers must lie in {-shape.layers} .. {shape.layers - 1}")
        return QuantizedStorage(self.format(), frozenset(self.full_layers))

    def io_bytes(self, length: int, shape: ModelShape, element_size: int) -> dict[str, int]:
        """Codes and scales of the quantised rows, and the full-precision rows."""
        old = max(0, (length - self.residual) // self.group * self.group)
        row = old * self.format().row_bytes(shape.head_dim) + (length - old) * 2 * shape.head_dim * element_size
        return {"rows": round(shape.kv_heads * row), "scores": 0}
