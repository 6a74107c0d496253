"""Training small models in minutes: one loop for every method that trains, with its penalties and its curve.

model = byte_model("llama", hidden_size=96, intermediate_size=256, num_hidden_layers=3)
training = train(model, byte_batches(data, 16, 96, 2000, seed=0), Plan(steps=2000, lr=1e-3))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.errors import InputError
from gossamer.models.checkpoints import next_checkpoint, resumable
from gossamer.models.masked import MaskHolder
from gossamer.models.tiny import tiny_model
from gossamer.patterns import Masks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Plan", "Training", "bits_per_byte", "byte_model", "resumable", "train"]

#: How often the curve takes a point.
_POINTS = 50


@dataclass(frozen=True)
class Plan:
    """AdamW with a linear warm-up and a cosine to `floor` times the learning rate.

    Attributes:
        steps: optimizer steps; the batches must be as many.
        lr: learning rate at its height.
        warmup: steps of linear warm-up.
        floor: share of `lr` at the end.
        weight_decay, betas: of AdamW.
        clip: largest norm of the gradient; 0 leaves it alone.
    """

    steps: int
    lr: float = 1e-3
    warmup: int = 50
    floor: float = 0.1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, …

        >>> [round(Plan(steps=100, lr=1.0, warmup=10).rate(s), 3) for s in (0, 9, 10, 55, 99)]
        [0.1, 1.0, 1.0, 0.542, 0.1]
        """
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


@dataclass
class Training:
    """What a run showed: points of its curve, each with `step`, `loss` (of the model, nats) and `penalty`."""

    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def final_loss(self) -> float:
        """Mean loss over the last tenth of the curve."""
        tail = self.curve[-max(1, len(self.curve) // 10) :]
        return sum(point["loss"] for point in tail) / len(tail)


def byte_model(family: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A small transformer over bytes, at the usual spread of weights, ready to train: `tiny_model` with other defaults.

    The card's size: hidden 96, three layers, four heads without grouping, MLP 256, context up to 256.
    """
    sizes = {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.02,
    }
    return tiny_model(family, seed, **{**sizes, **overrides})


def train(
    model: nn.Module,
    batches: Iterable[Tensor],
    plan: Plan,
    *,
    penalty: Callable[[int], Tensor | float] | None = None,
    after_step: Callable[[int], None] | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
    masks: Masks | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Training:
    """Train a causal language model in place on batches int64 ``[batch, context + 1]``; it comes back in eval mode.

    Args:
        penalty: called after each forward with the step (0, 1, …); what it returns is added to the loss.
        after_step: called after each optimizer step.
        parameters: what is trained (default: all that want gradients).
        masks: what they remove is zero from the first step to the last.

    Raises:
        InputError: fewer batches than steps, or a loss that is not finite.
    """
    chosen = [p for p in (model.parameters() if parameters is None else parameters) if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay)
    holder = MaskHolder(model, masks, optimizer) if masks is not None else None
    every, training, step = max(1, plan.steps // _POINTS), Training(), -1
    call: Any = model
    model.train()
    # What a penalty or a hook remembers is not in a checkpoint: such runs start again.
    saver = next_checkpoint(model, optimizer, str(plan)) if penalty is None and after_step is None else None
    start = saver.load(training.curve) if saver is not None else 0
    for step, batch in zip(range(plan.steps), batches, strict=False):
        if step < start:
            continue
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        logits = call(batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        extra = penalty(step) if penalty is not None else 0.0
        optimizer.zero_grad(set_to_none=True)
        (loss + extra).backward()
        if plan.clip:
            torch.nn.utils.clip_grad_norm_(chosen, plan.clip)
        optimizer.step()
        if after_step is not None:
            after_step(step)
        if step % every == 0 or step == plan.steps - 1:
            point = {
                "step": float(step),
                "loss": float(loss.detach()),
                "penalty": float(torch.as_tensor(extra).detach()),
            }
            if not math.isfinite(point["loss"]):
                raise InputError(f"the loss is not finite at step {step}: lower the learning rate or the penalty")
            training.curve.append(point)
            progress("training", step + 1, plan.steps)
        if saver is not None:
            saver.after(step, plan.steps, training.curve)
    if holder is not None:
        holder.release()
    model.eval()
    if step + 1 < plan.steps:
        raise InputError(f"the batches ended after {step + 1} of {plan.steps} steps")
    return training


@torch.no_grad()
def bits_per_byte(model: nn.Module, data: Tensor, context: int = 96, batch: int = 32, count: int = 16) -> float:
    """Mean bits per byte over `count` batches of stretches spread evenly over `data`; the same ones each time."""
    needed = batch * count
    if len(data) <= context + needed:
        raise InputError(f"{len(data)} bytes are too few for {needed} stretches of {context + 1}")
    starts = torch.linspace(0, len(data) - context - 1, needed).long()
    call: Any = model
    total = 0.0
    for part in starts.split(batch):
        tokens = data[part[:, None] + torch.arange(context + 1)].long()
        logits = call(tokens[:, :-1], use_cache=False).logits
        total += float(F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()))
    return total / count / math.log(2)
