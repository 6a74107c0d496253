"""Training SeerAttention's gates: self-distillation on a frozen model, and v1's fine-tuning of gates and model together.

The ground truth of a layer is its own attention map, max-pooled to blocks (never averaged: that washes out needles) and
normalised row by row; `gossamer.ops.pooled_attention` makes it without the map:

    T[m, n] = max_{i in block m, j in block n} softmax(QKᵀ/√d)_ij,   T ← T / Σ_n T
    v2:  loss = KL(T ‖ softmax G), the mean over all elements, without the first quarter of the rows
    v1:  loss = MSE(softmax G, T) or SmoothL1, all rows
    total = 10 · Σ_layers loss            (fine-tuning: cross-entropy + 10 · Σ MSE)
    R:   T[i, n] = max over key block n and over the query heads of a group, normalised; KL on the last half of the rows

Because the model is frozen, what a layer's gate needs is computed once (pooled queries and keys, T in bfloat16), and every
gate then trains alone: `distil`. `GateTraining` is the same on the live model, for data too long to keep, and the
fine-tuning mode. AdamW, cosine with linear warm-up, weight decay 0.

R's rows: of the last half of a block of tokens at most `DECODE_ROWS` are kept, evenly spread; the queries of all would be
many times the size of everything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer import ops
from gossamer.attention.seer_gate import (
    HIDDEN,
    SeerDecodeGate,
    SeerGate,
    block_pools,
    choose_blocks,
    pooled_keys,
    pooled_states,
    query_positions,
    visible_blocks,
)
from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError, InputError, ModelError
from gossamer.hf import AttentionRuntime, LayerView, PrefillPolicy, dense_attention, model_shape
from gossamer.hf.rotary import Rotary
from gossamer.models import fingerprint

if TYPE_CHECKING:
    from gossamer.attention.seerattention import SeerAttention

Loss = Literal["kl", "mse", "smooth_l1"]
Progress = Callable[[str, int, int], None]
WEIGHT = 10.0  # of the gates' losses
DECODE_ROWS = 128


# -- formulas -----------------------------------------------------------------------------------------------------------


def normalised(pooled: Tensor) -> Tensor:
    """Rows of a pooled map as distributions; rows that see nothing stay 0.

    >>> normalised(torch.tensor([[0.5, 0.0], [0.6, 0.2]])).tolist()
    [[1.0, 0.0], [0.75, 0.25]]
    """
    return pooled / pooled.sum(-1, keepdim=True).clamp_min(torch.finfo(pooled.dtype).tiny)


def ground_truth(
    query: Tensor, key: Tensor, block: int, starts: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """T float32 ``[B, H, nq, nk]`` of rotated queries ``[B, H, T, d]`` and keys ``[B, Hkv, S, d]``."""
    return normalised(ops.pooled_attention(query, key, block, starts=starts, scale=scale))


def decode_ground_truth(query: Tensor, key: Tensor, block: int, starts: Tensor | None, scale: float) -> Tensor:
    """R's T float32 ``[B, Hkv, T, nk]``: per row the largest probability of a block, over the heads of a group."""
    pooled = ops.pooled_attention(query, key, 1, key_block=block, starts=starts, scale=scale)
    return normalised(pooled.unflatten(1, (key.shape[1], -1)).amax(2))


def gate_loss(scores: Tensor, target: Tensor, visible: Tensor, kind: Loss, skip: float = 0.25) -> Tensor:
    """The distillation loss of one layer.

    Args:
        scores, target: G and T ``[B, H, n, m]``.
        visible: boolean, broadcastable to them.
        kind: "kl" (PyTorch's KLDivLoss with its mean over all elements), "mse" or "smooth_l1".
        skip: share of the first rows that "kl" leaves out, for stability.
    """
    hidden = scores.masked_fill(~visible, HIDDEN)
    if kind == "kl":
        first = int(skip * scores.shape[2])
        logits, wanted = hidden[:, :, first:].log_softmax(-1), target[:, :, first:]
        return F.kl_div(logits, wanted, reduction="sum") / wanted.numel()
    weights = hidden.softmax(-1).masked_fill(~visible, 0.0)
    return F.mse_loss(weights, target) if kind == "mse" else F.smooth_l1_loss(weights, target)


def cosine(step: int, steps: int, warmup: int, floor: float = 0.0) -> float:
    """Factor on the learning rate at `step`: linear warm-up, then a cosine from 1 to `floor`.

    >>> [round(cosine(step, 100, 20), 3) for step in (0, 19, 20, 60, 100)]
    [0.05, 1.0, 1.0, 0.5, 0.0]
    """
    warmup = min(warmup, steps)
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# -- the frozen model, read once ----------------------------------------------------------------------------------------


@dataclass
class Samples:
    """What one layer's gate learns from: inputs, T in bfloat16, and R's row numbers (None for the prefill gate)."""

    query: list[Tensor]
    key: list[Tensor]
    target: list[Tensor]
    rows: Tensor | None = None


class Collector(PrefillPolicy):
    """Attends densely and keeps what the gates of every layer learn from."""

    def __init__(self, method: SeerAttention, layers: int, rotary: Rotary, gate: SeerGate) -> None:
        self.method, self.rotary, self.gate = method, rotary, gate
        self.prefill_samples = [Samples([], [], []) for _ in range(layers)]
        self.decode_samples = [Samples([], [], []) for _ in range(layers)]

    def prefill(self, layer: LayerView, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Note pooled states and the ground truth, then attend."""
        block, length = self.method.block_size, query.shape[2]
        if not bool(torch.isfinite(query).all() and torch.isfinite(key).all()):
            raise CalibrationError(
                f"seerattention: attention states of layer {layer.index} are not finite: check the model"
            )
        positions = query_positions(layer, length, 0, query.device)
        pooled = pooled_keys(layer, key, 0, length, block, self.gate.k_pools, self.rotary)
        if self.method.served("prefill"):
            samples = self.prefill_samples[layer.index]
            samples.query.append(pooled_states(layer, query, positions, 0, block, self.gate.q_pools, self.rotary))
            samples.key.append(pooled)
            samples.target.append(ground_truth(query, key, block, scale=layer.scale).bfloat16())
        if self.method.served("decode"):
            samples = self.decode_samples[layer.index]
            half = length // 2
            rows = torch.linspace(half, length - 1, min(DECODE_ROWS, length - half), device=query.device).long()
            truth = decode_ground_truth(query[:, :, half:], key, block, None, layer.scale)
            plain = self.rotary.plain(query[:, :, rows].float(), layer.index, positions[..., rows])
            samples.query.append(plain.to(query.dtype))
            samples.key.append(pooled)
            samples.target.append(truth[:, :, rows - half].bfloat16())
            samples.rows = rows
        return dense_attention(query, key, value, layer.scale, window=layer.window)


def collect(method: SeerAttention, model: nn.Module, tokens: Tensor, progress: Progress) -> Collector:
    """Run the frozen model once over token blocks ``[count, block]``.

    Raises:
        InputError: `tokens` is not an integer matrix, its blocks are no longer than a gate's block, or the model trains.
        CalibrationError: activations are not finite, or a layer was never reached.
    """
    if tokens.ndim != 2 or tokens.numel() == 0 or tokens.is_floating_point():
        raise InputError(
            f"calibration tokens must be a non-empty integer matrix [blocks, length], got {list(tokens.shape)}"
        )
    if tokens.shape[1] <= method.block_size:
        raise InputError(
            f"seerattention: token blocks of {tokens.shape[1]} leave no choice between blocks of {method.block_size}: "
            "give longer ones"
        )
    if model.training:
        raise InputError("calibration needs the model as it will run: call model.eval() first")
    shape = model_shape(model)
    collector = Collector(method, shape.layers, method.rotaries(model)[0], method.prefill_gate(shape))
    runtime, call = AttentionRuntime(model, prefill=collector), _call(model)
    try:
        with torch.no_grad():
            for index, row in enumerate(tokens):
                progress("reading the model's attention", index, len(tokens))
                call(row[None].to(next(model.parameters()).device), use_cache=True, logits_to_keep=1)
    finally:
        runtime.detach()
    served = collector.prefill_samples if method.served("prefill") else collector.decode_samples
    missing = [i for i, samples in enumerate(served) if not samples.target]
    if missing:
        raise CalibrationError(
            f"seerattention: layer {missing[0]} computed no plain causal attention: it has no gate to learn"
        )
    return collector


def _call(model: nn.Module) -> Any:
    return model


# -- every gate alone ---------------------------------------------------------------------------------------------------


def train_gate(
    method: SeerAttention, gate: SeerGate | SeerDecodeGate, samples: Samples, wide: Rotary, layer: int, length: int
) -> list[float]:
    """Train one layer's gate on its samples; returns the loss of every step.

    Raises:
        CalibrationError: the loss is not finite.
    """
    decode = isinstance(gate, SeerDecodeGate)
    query, key, target = (torch.cat(part) for part in (samples.query, samples.key, samples.target))
    optimizer = torch.optim.AdamW(gate.parameters(), lr=method.lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(method.seed * 1_000_003 + layer)
    visible = _visible(method, samples, length, query.device)
    floor = min(1.0, 1e-5 / method.lr) if decode else 0.0
    order, losses = torch.empty(0, dtype=torch.long), []
    for step in range(method.steps):
        if len(order) < min(method.batch, len(query)):
            order = torch.cat([order, torch.randperm(len(query), generator=generator)])
        pick, order = order[: method.batch], order[method.batch :]
        for group in optimizer.param_groups:
            group["lr"] = method.lr * cosine(step, method.steps, method.warmup, floor)
        if isinstance(gate, SeerDecodeGate):
            assert samples.rows is not None
            scores = gate(query[pick], key[pick], wide, layer, method.block_size, samples.rows)
            loss = gate_loss(scores, target[pick].float(), visible, method.loss, 0.0)
        else:
            loss = gate_loss(
                gate(query[pick], key[pick], wide, layer, method.block_size), target[pick].float(), visible, method.loss
            )
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise CalibrationError(f"seerattention: the loss of layer {layer} is not finite at step {step}: lower lr")
        optimizer.zero_grad()
        (WEIGHT * loss).backward()
        optimizer.step()
    return losses


def _visible(method: SeerAttention, samples: Samples, length: int, device: torch.device) -> Tensor:
    if samples.rows is None:
        return visible_blocks(length, length, method.block_size, None, device)
    begin = torch.arange(-(-length // method.block_size), device=device) * method.block_size
    return (begin <= samples.rows.to(device)[:, None])[None, None]


def distil(
    method: SeerAttention, model: nn.Module, collector: Collector, length: int, progress: Progress
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Train the gates of all layers and phases; returns their weights by ``phase.layer.name``, and their losses."""
    shape, (_, wide) = model_shape(model), method.rotaries(model)
    device = next(model.parameters()).device
    tensors: dict[str, Tensor] = {}
    history: dict[str, list[float]] = {}
    phases = [phase for phase in ("prefill", "decode") if method.phases in (phase, "both")]
    for turn, phase in enumerate(phases):
        generator = torch.Generator().manual_seed(method.seed)
        for layer in range(shape.layers):
            progress(f"training {phase} gates", turn * shape.layers + layer, len(phases) * shape.layers)
            gate: Any = (method.prefill_gate if phase == "prefill" else method.decode_gate)(shape, generator)
            samples = (collector.prefill_samples if phase == "prefill" else collector.decode_samples)[layer]
            with torch.enable_grad():
                history[f"{phase}.{layer}"] = train_gate(method, gate.to(device), samples, wide, layer, length)
            tensors.update({f"{phase}.{layer}.{name}": p.detach().cpu() for name, p in gate.named_parameters()})
    return tensors, history


def calibrate(method: SeerAttention, model: nn.Module, tokens: Tensor, progress: Progress | None = None) -> Calibration:
    """See `SeerAttention.calibrate`."""
    progress = progress or (lambda what, done, total: None)
    collector = collect(method, model, tokens, progress)
    tensors, history = distil(method, model, collector, tokens.shape[1], progress)
    facts = {
        **method.model_dump(include={"block_size", "gate", "gate_dim", "loss", "init", "steps", "batch", "lr", "seed"}),
        "sequences": len(tokens),
        "length": tokens.shape[1],
        "loss_first": {name: losses[0] for name, losses in history.items() if losses},
        "loss_last": {name: losses[-1] for name, losses in history.items() if losses},
    }
    return Calibration(method.slug, fingerprint(model), tensors, facts)


# -- the live model -----------------------------------------------------------------------------------------------------


class GateTraining(AttentionRuntime):
    """Gates beside a live model: run it on whole sequences, then take `loss` (with the logits, when fine-tuning).

    Distillation (the default): attention stays dense and the logits unchanged; gates see detached states, so that only they
    get gradients. Fine-tuning (v1): attention computes the blocks that the gates choose (top-k; the choice itself has no
    gradient), T comes from the dense map without gradients, and all weights train.

    Args:
        model: a decoder; freeze it (``requires_grad_(False)``) to distil.
        method: settings; `area`, `last_block_dense` and `loss` count.
        gates: one `SeerGate` a layer.
        fine_tune: the second mode.

    Use it as a context manager: leaving it takes the gates off.

    >>> from gossamer.models import tiny_model
    >>> from gossamer.attention.seerattention import SeerAttention
    >>> model, method = tiny_model("llama").requires_grad_(False), SeerAttention(block_size=8)
    >>> gates = [method.prefill_gate(model_shape(model)) for _ in range(2)]
    >>> with GateTraining(model, method, gates) as training:
    ...     logits = model(torch.arange(40)[None]).logits
    ...     training.loss().backward()
    >>> gates[0].wk.grad.shape
    torch.Size([4, 48, 16])
    """

    def __init__(
        self, model: nn.Module, method: SeerAttention, gates: Sequence[SeerGate], fine_tune: bool = False
    ) -> None:
        if len(gates) != model_shape(model).layers:
            raise InputError(f"seerattention: {len(gates)} gates for {model_shape(model).layers} layers")
        self.rotary, self.wide = method.rotaries(model)
        self.method, self.gates, self.fine_tune = method, gates, fine_tune
        self.losses: dict[int, Tensor] = {}
        super().__init__(model)

    def __enter__(self) -> GateTraining:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def loss(self, logits: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """10 · Σ of the layers' losses of the last forward; with `logits` and `labels`, cross-entropy of the next token added.

        Raises:
            InputError: no forward since the last call, or a loss that is not finite.
        """
        if not self.losses:
            raise InputError("seerattention: run the model on a batch first")
        total = WEIGHT * torch.stack(list(self.losses.values())).sum()
        self.losses = {}
        if logits is not None and labels is not None:
            total = total + F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        if not bool(torch.isfinite(total)):
            raise InputError("seerattention: the loss is not finite: lower the learning rate, check the model")
        return total

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
        """Dense or gated attention of one layer of a whole sequence, its loss noted."""
        starts, holes = (None, None) if mask is None else self._padding(mask)
        if holes is not None or softcap is not None:
            raise ModelError("seerattention: gates train on plain causal attention, at most left-padded")
        if query.shape[2] != key.shape[2]:
            raise InputError("seerattention: gates train on whole sequences: pass use_cache=False and no cache")
        layer, block, length = int(module.layer_idx), self.method.block_size, query.shape[2]  # type: ignore[arg-type]
        with torch.no_grad():
            target = ground_truth(query.detach(), key.detach(), block, starts, scale)
            positions = self.position_ids
            at = torch.arange(length, device=query.device) if positions is None else positions[:, None]
            pools = [
                block_pools(self.rotary.plain(x.detach().float(), layer, at), block, names, starts)
                for x, names in ((query, self.gates[layer].q_pools), (key, self.gates[layer].k_pools))
            ]
        visible = visible_blocks(length, length, block, starts, query.device)
        scores = self.gates[layer](*pools, self.wide, layer, block)
        kind = "mse" if self.fine_tune and self.method.loss == "kl" else self.method.loss
        self.losses[layer] = gate_loss(scores, target, visible, kind)
        if not self.fine_tune or (window and window < length):
            return dense_attention(query, key, value, scale, starts=starts, window=window, dropout=dropout)
        with torch.no_grad():
            blocks = choose_blocks(
                scores,
                visible,
                area=self.method.area,
                threshold=self.method.threshold,
                last_dense=self.method.last_block_dense,
            )
        return masked_attention(query, key, value, blocks, block, scale, starts, dropout)


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    block: int,
    scale: float,
    starts: Tensor | None,
    dropout: float,
) -> Tensor:
    """Attention over the kept blocks, with gradients through them; the mask is made a group position at a time."""
    length, group = query.shape[2], query.shape[1] // key.shape[1]
    row = torch.arange(length, device=query.device)
    seen = row <= row[:, None]
    if starts is not None:
        seen = seen & (row >= starts.to(query.device).view(-1, 1, 1, 1)) | torch.eye(
            length, dtype=torch.bool, device=row.device
        )
    outs = []
    for g in range(group):
        kept = blocks[:, g::group].repeat_interleave(block, 2)[:, :, :length].repeat_interleave(block, 3)[..., :length]
        if starts is not None:  # queries in the padding read themselves: softmax over nothing has no gradient
            kept = kept | torch.eye(length, dtype=torch.bool, device=row.device)
        outs.append(
            F.scaled_dot_product_attention(
                query[:, g::group], key, value, attn_mask=kept & seen, dropout_p=dropout, scale=scale
            )
        )
    return torch.stack(outs, 2).flatten(1, 2)


def train_live(
    training: GateTraining,
    batches: Iterable[Tensor],
    steps: int,
    lr: float | None = None,
    schedule: Literal["cosine", "linear"] = "cosine",
    warmup: int = 20,
    progress: Progress | None = None,
) -> list[float]:
    """Train on token batches int64 ``[B, S]``: the gates, and when fine-tuning the model too; returns every step's loss.

    Paper: distillation lr 1e-3 cosine; fine-tuning lr 1e-5 linear, 400 steps of 8 sequences of 32k after 1000 steps of v1
    distillation, with gradient checkpointing (switch it on with the model's own ``gradient_checkpointing_enable``).
    """
    parameters = [p for gate in training.gates for p in gate.parameters()]
    if training.fine_tune:
        parameters += [p for p in training.model.parameters() if p.requires_grad]
    rate = lr if lr is not None else 1e-5 if training.fine_tune else training.method.lr
    optimizer, losses, call = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0), [], _call(training.model)
    for step, batch in zip(range(steps), batches, strict=False):
        if progress is not None:
            progress("training gates on the live model", step, steps)
        factor = cosine(step, steps, warmup)
        if schedule == "linear" and step >= warmup:
            factor = (steps - step) / max(1, steps - min(warmup, steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        logits = call(batch, use_cache=False).logits
        loss = training.loss(logits, batch) if training.fine_tune else training.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
