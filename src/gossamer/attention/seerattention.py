"""SeerAttention: learned gates that pick the blocks of attention to compute (Gao et al., arXiv 2410.13276, NeurIPS 2025).

For every query block of b tokens a small gate (`seer_gate`) scores the key blocks; the best are computed, the rest skipped:

    mask = top-k of G with k = ⌊(1 − √(1 − ρ))·n⌋,  or softmax(G) > τ;  ∧ causal;  the last query blocks keep everything
    out  = exact softmax attention over the kept blocks, causal by token

Gates learn from the frozen model itself (`seer_distill`), or come from a release (`seer_import`); `seer_decode` is the decode
variant, SeerAttention-R.

Decisions where the card leaves room:

* Gates see unrotated states: the rotation is undone with the model's own embedding at the positions of the running
  forward. That holds for families with head norms, for chunks, crops and left padding alike, and costs one pass over Q
  and the new K; hooks on the projections would be exact in bfloat16, but blind to what a cache held before.
* A query block starts at the first new query of a call, key blocks at row 0: give chunks of a prompt that are multiples of b.
  k is counted from all key blocks, so a chunk behind a long context computes a larger share than ρ.
* `last_block_dense` is the number of query blocks at the end of a call that keep everything (v2: 2; v1: 0, or 1 when on).
* Neither mode forces the diagonal or the first block. A row whose threshold keeps nothing gets its best block.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import AliasChoices, BeforeValidator, Field, field_validator
from torch import Tensor, nn

from gossamer import ops
from gossamer.attention import seer_gate as gates
from gossamer.attention.base import AttentionMethod
from gossamer.attention.seer_decode import SeerDecodePolicy
from gossamer.attention.seer_distill import Progress, calibrate
from gossamer.attention.seer_gate import SeerDecodeGate, SeerGate, load_gate, parse_gate
from gossamer.attention.seer_import import import_gates
from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError, InputError
from gossamer.hf import LayerView, ModelShape, PrefillPolicy, dense_attention, model_shape
from gossamer.hf.rotary import Rotary
from gossamer.models import fingerprint
from gossamer.patterns import AreaMeter, Budget, causal_pairs, resolve
from gossamer.patterns.budget import parse
from gossamer.registry import register


class SeerPolicy(PrefillPolicy):
    """Scores blocks with the layer's gate, keeps the best, attends to those."""

    def __init__(self, method: SeerAttention, layers: list[SeerGate], rotary: Rotary, wide: Rotary) -> None:
        self.method, self.gates, self.rotary, self.wide = method, layers, rotary, wide
        self.meter = AreaMeter()

    def open(self, layer: LayerView) -> gates.BlockStore:
        """No block pooled yet."""
        return gates.BlockStore()

    def report(self) -> dict[str, Any]:
        """`prefill_area` and `prefill_area_of_heads`; see `gossamer.patterns.AreaMeter`. The gates' scores are not in it."""
        return self.meter.report()

    def is_dense(self, layer: LayerView, length: int) -> bool:
        """Whether this layer reads everything."""
        dense = self.method.dense_layers
        window = bool(layer.window and layer.window < length)
        return window or layer.index in dense or layer.index - len(self.gates) in dense

    def scores(self, layer: LayerView, query: Tensor, key: Tensor) -> Tensor:
        """G ``[B, H, nq, nk]`` for rotated queries and keys."""
        block, gate, length = self.method.block_size, self.gates[layer.index], key.shape[2]
        state = cast(gates.BlockStore, layer.prefill_state)

        def make(begin: int, end: int) -> Tensor:
            return gates.pooled_keys(layer, key, begin, end, block, gate.k_pools, self.rotary)

        k = state.extend(length, block, make)
        if length % block:
            k = torch.cat([k, make(length // block * block, length)], 2)
        offset = length - query.shape[2]
        positions = gates.query_positions(layer, query.shape[2], offset, query.device)
        q = gates.pooled_states(layer, query, positions, offset, block, gate.q_pools, self.rotary)
        scored: Tensor = gate(q, k, self.wide, layer.index, block, offset)
        return scored

    def mask(self, layer: LayerView, query: Tensor, key: Tensor) -> Tensor:
        """The blocks to compute, boolean ``[B, H, nq, nk]``."""
        m, new, length, device = self.method, query.shape[2], key.shape[2], query.device
        visible = gates.visible_blocks(new, length, m.block_size, layer.starts, device)
        first = length - new + torch.arange(visible.shape[2], device=device)[:, None] * m.block_size
        if layer.starts is not None:  # what the first real query of a row sees
            first = torch.maximum(first, layer.starts.to(device).view(-1, 1, 1, 1))
        aligned = visible & (torch.arange(visible.shape[3], device=device) * m.block_size <= first)
        return gates.choose_blocks(
            self.scores(layer, query, key),
            visible,
            area=m.area,
            threshold=m.threshold,
            last_dense=m.last_block_dense,
            aligned=aligned,
        )

    def prefill(self, layer: LayerView, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Gate, then block-sparse attention; dense in the dense layers and under a sliding window."""
        (batch, heads, new, _), length, block = query.shape, key.shape[2], self.method.block_size
        size = {"batch": batch, "new": new, "length": length}
        if self.is_dense(layer, length):
            self.meter.add(layer.index, 1.0, heads=heads, **size)
            return dense_attention(query, key, value, layer.scale, starts=layer.starts, window=layer.window)
        mask = self.mask(layer, query, key)
        pairs = gates.pair_counts(new, length, block, torch.device("cpu"))
        computed = (mask.sum(0).cpu() * pairs).sum((1, 2)).double()
        self.meter.add(layer.index, computed / (batch * causal_pairs(length, new)), **size)
        return ops.block_sparse_attention(
            query, key, value, mask, block_size=block, starts=layer.starts, scale=layer.scale
        )


@register("seerattention", slot="attention.prefill", family="attention", needs=["calibration"])
class SeerAttention(AttentionMethod):
    """Block-sparse prefill by learned gates: pooled queries and keys predict where a model's own attention has its maxima.

    Use it for long prompts when a short distillation is affordable: `calibrate` trains the gates of every layer on the
    frozen model's attention, without labels. The gates cost about 1/b² of QKᵀ, and attention the share `area` of the causal
    triangle, so prefill of a few thousand tokens on gains. Decode is dense, unless `phases` asks for the decode gates
    (SeerAttention-R), which read whole blocks up to a token budget per KV head.

    Paper: SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs, arXiv 2410.13276.

    >>> SeerAttention(nz_ratio=0.3).area
    0.3
    """

    area: Annotated[float, BeforeValidator(parse)] = Field(
        0.5,
        gt=0,
        le=1,
        validation_alias=AliasChoices("area", "nz_ratio"),
        description="ρ (nz_ratio), share of the causal area that the row budget covers",
    )
    threshold: float | None = Field(
        None, ge=-1, lt=1, description="τ, instead: blocks whose softmax score is above it (5e-4 … 5e-3)"
    )
    block_size: int = Field(64, ge=1, description="b, tokens of a block of queries and of keys")
    last_block_dense: int = Field(
        2, ge=0, description="query blocks at the end that keep everything (v2: 2, v1: 0 or 1)"
    )
    dense_layers: tuple[int, ...] = Field((), description="layers that read everything; negative counts from the end")
    phases: Literal["prefill", "decode", "both"] = Field("prefill", description="which attention it takes over")
    tokens: Budget = Field(4096, description="decode: rows read per KV head, in whole blocks: a count or a fraction")
    decode_threshold: float | None = Field(
        None, ge=-1, lt=1, description="decode, instead: blocks whose softmax score is above it"
    )
    gate: str = Field("Qavg_Kmaxminavg", description="poolings of queries and keys (v2's; v1: Qavg_Kmaxmin)")
    gate_dim: int | None = Field(None, ge=2, description="Dg, the gate's width (default: head_dim)")
    force_double: bool = Field(False, description="map the pooled queries also where the shortcut needs no map")
    loss: Literal["kl", "mse", "smooth_l1"] = Field(
        "kl", description="distillation loss: kl (v2), mse or smooth_l1 (v1)"
    )
    init: Literal["normal", "xavier"] = Field(
        "normal", description="gate weights at the start: N(0, 0.02) or Xavier (v1)"
    )
    steps: int = Field(150, ge=0, description="training steps of each gate (paper: 500, on 524 million tokens)")
    batch: int = Field(4, ge=1, description="sequences of a training step (paper: 16)")
    lr: float = Field(1e-3, gt=0, description="learning rate at its height; cosine, to 0 (decode gates: to 1e-5)")
    warmup: int = Field(20, ge=0, description="training steps of linear warm-up")
    seed: int = Field(0, ge=0, description="of the gates' first weights and the order of the training sequences")

    @field_validator("gate")
    @classmethod
    def _known_pools(cls, gate: str) -> str:
        parse_gate(gate)
        return gate

    @field_validator("gate_dim")
    @classmethod
    def _even(cls, width: int | None) -> int | None:
        if width is not None and width % 2:
            raise ValueError("must be even to be rotated")
        return width

    #: Tokens of a calibration block that suit it: at 512 a map has only a few blocks to choose from.
    calibration_length: ClassVar[int] = 1024

    def served(self, phase: Literal["prefill", "decode"]) -> bool:
        """Whether it takes over this phase."""
        return self.phases in (phase, "both")

    def prefill_gate(self, shape: ModelShape, generator: torch.Generator | None = None) -> SeerGate:
        """A layer's gate with fresh weights."""
        sizes = (shape.heads, shape.kv_heads, shape.head_dim)
        return SeerGate(*sizes, self.gate, self.gate_dim, self.force_double, self.init, generator)

    def decode_gate(self, shape: ModelShape, generator: torch.Generator | None = None) -> SeerDecodeGate:
        """A layer's decode gate with fresh weights."""
        return SeerDecodeGate(
            shape.heads, shape.kv_heads, shape.head_dim, self.gate, self.gate_dim, self.init, generator
        )

    def rotaries(self, model: nn.Module) -> tuple[Rotary, Rotary]:
        """The model's rotary embedding, and the same as wide as the gates.

        Raises:
            ModelError: the model has none that can be undone.
        """
        rotary = Rotary(model, self.slug, "its gates need unrotated queries and keys")
        width = model_shape(model).head_dim if self.gate_dim is None else self.gate_dim
        return rotary, rotary if width == model_shape(model).head_dim else rotary.of_width(width)

    def calibrate(self, model: nn.Module, tokens: Tensor, progress: Progress | None = None) -> Calibration:
        """Distil the gates of the phases served on token blocks ``[count, block]``; `progress` takes (what, done, total).

        Raises:
            InputError: `tokens` is not an integer matrix, or its blocks are no longer than one block of the gate.
            ModelError: the family cannot be served.
            CalibrationError: activations or gates are not finite, or layers were never reached.
        """
        return calibrate(self, model, tokens, progress)

    def import_calibration(self, path: str | Path, model: nn.Module) -> Calibration:
        """Read gates of the official release (safetensors, or the folder that holds them); see `seer_import`."""
        return import_gates(self, path, model)

    def policies(self, model: nn.Module, calibration: Calibration | None) -> dict[str, Any]:
        """Policies of the phases served, with this model's gates.

        Raises:
            CalibrationError: none, of another model, for other settings, or without the gates that are asked for.
        """
        calibration, shape = self.require(calibration), model_shape(model)
        calibration.check(fingerprint(model))
        for name in ("block_size", "gate"):
            made = calibration.facts.get(name)
            if made != getattr(self, name):
                raise CalibrationError(
                    f"seerattention: these gates were trained with {name}={made}: set that, or calibrate"
                )
        rotary, wide = self.rotaries(model)
        device = next(model.parameters()).device
        policies: dict[str, Any] = {}
        for phase in ("prefill", "decode"):
            if self.phases not in (phase, "both"):
                continue
            if not any(name.startswith(f"{phase}.") for name in calibration.tensors):
                raise CalibrationError(
                    f"seerattention: this calibration has no {phase} gates: calibrate with phases={phase}"
                )
            fresh: Any = self.prefill_gate if phase == "prefill" else self.decode_gate
            layers = [
                load_gate(fresh(shape).to(device), calibration.tensors, f"{phase}.{i}") for i in range(shape.layers)
            ]
            kind: Any = SeerPolicy if phase == "prefill" else SeerDecodePolicy
            policies[phase] = kind(self, layers, rotary, wide)
        return policies

    def io_bytes(self, length: int, shape: ModelShape, element_size: int) -> dict[str, int]:
        """Decode: chosen blocks per KV head, and a compressed key (float32) per whole block; dense without `phases`."""
        if not self.served("decode"):
            return super().io_bytes(length, shape, element_size)
        if self.decode_threshold is not None:
            raise InputError("seerattention: what a threshold reads depends on the data")
        size, whole = self.block_size, (length - 1) // self.block_size
        rows = min(self.blocks(length) - 1, whole) * size + length - whole * size
        width = shape.head_dim if self.gate_dim is None else self.gate_dim
        return {
            "rows": rows * shape.kv_heads * 2 * shape.head_dim * element_size,
            "scores": whole * shape.kv_heads * width * 4,
        }

    def blocks(self, length: int) -> int:
        """Key blocks of a decode step: the budget in whole blocks, at least two (one scored, one open)."""
        return max(2, -(-resolve(self.tokens, length) // self.block_size))
