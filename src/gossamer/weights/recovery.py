"""Recovery after pruning: low-rank adapters on every matrix of the blocks are trained on text, then merged."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from gossamer.errors import InputError
from gossamer.hf import block_list, matrices
from gossamer.models import LoRA, Plan, block_batches, token_loss, train
from gossamer.weights.base import Progress, silent


class Recovery(BaseModel):
    """How a pruned model is trained again; no steps, no recovery. Defaults are those of SliceGPT's release.

    A step's batch is 12 sequences, which the release sums from four of three. A part of the text is held out; the adapters
    that do best on it are the ones that stay.

    >>> Recovery(steps=100).rank
    32
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int = Field(0, ge=0, description="optimizer steps; 0: none")
    rank: int = Field(32, ge=1, description="of the adapters; where blocks differ, the mean")
    alpha: float = Field(10.0, gt=0, description="adapters are scaled by alpha / rank")
    dropout: float = Field(
        0.05, ge=0, lt=1, description="share of the input channels that a step leaves out of the adapters"
    )
    lr: float = Field(2e-4, gt=0, description="learning rate at its height")
    warmup: int = Field(400, ge=0, description="steps of warm-up; a tenth of the steps if that is less")
    batch: int = Field(12, ge=1, description="sequences in a step")
    patience: int = Field(5, ge=1, description="evaluations without gain that end the training")
    every: int = Field(20, ge=1, description="steps between evaluations")
    held_out: float = Field(0.125, gt=0, lt=1, description="share of the sequences that is only evaluated on")
    shortcuts: bool = Field(False, description="adapters on SliceGPT's shortcut matrices too")
    head: bool = Field(False, description="an adapter on the head too")
    seed: int = Field(0, description="of adapters and batches")


def recover(
    model: nn.Module,
    tokens: Tensor,
    settings: Recovery,
    ranks: Sequence[int] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train adapters on a model's blocks and merge them, in place.

    Args:
        tokens: int64 ``[sequences, length]``.
        ranks: of the adapters in each block, 0 for none (default: the settings' rank everywhere). Adapters are scaled by
            ``alpha / mean rank`` in every block.

    Returns:
        `loss` (held out; before and after, nats), `steps`, `parameters` (trained), `ranks`, `curve`.

    Raises:
        InputError: fewer than two sequences, not one rank for each block, or an adapter on a head with the embeddings' weights.

    >>> from gossamer.models import tiny_model
    >>> facts = recover(tiny_model("llama"), torch.arange(64).view(4, 16), Recovery(steps=2, rank=2, batch=2))
    >>> facts["steps"], facts["ranks"]
    (2, [2, 2])
    """
    _, layers = block_list(model)
    ranks = [settings.rank] * len(layers) if ranks is None else list(ranks)
    if len(ranks) != len(layers) or min(ranks) < 0 or not any(ranks):
        raise InputError(f"ranks must be one for each of {len(layers)} blocks, and not all zero, got {ranks}")
    if len(tokens) < 2 or tokens.shape[1] < 2:
        raise InputError(f"a recovery needs two sequences of two tokens at least, got {list(tokens.shape)}")
    ends: Any = model
    if settings.head and ends.lm_head.weight is ends.get_input_embeddings().weight:
        raise InputError(
            "an adapter on a head that shares the embeddings' weights would change both: leave recovery.head off"
        )
    held = min(len(tokens) - 1, max(1, round(settings.held_out * len(tokens))))
    kept_out, training_text = tokens[:held], tokens[held:]
    names = {m.name.split(".")[-2] for m in matrices(model) if m.role != "linear"}
    names |= {"attention_shortcut", "mlp_shortcut"} if settings.shortcuts else set()
    wanted = {p: p.requires_grad for p in model.parameters()}
    before = token_loss(model, kept_out)
    parts: list[tuple[nn.Module, int, tuple[str, ...]]] = [
        (layer, rank, tuple(sorted(names))) for layer, rank in zip(layers, ranks, strict=True) if rank
    ]
    if settings.head:
        parts.append((model, settings.rank, ("lm_head",)))
    model.requires_grad_(False)
    adapters = [
        LoRA(rank, settings.alpha * rank / settings.rank, settings.dropout, targets, settings.seed + i).attach(part)
        for i, (part, rank, targets) in enumerate(parts)
    ]
    trained = list(itertools.chain.from_iterable(a.parameters() for a in adapters))
    for parameter in trained:  # attaching the head's froze the others'
        parameter.requires_grad_(True)
    best, worse, evaluations = (before, [p.detach().clone() for p in trained]), 0, []

    def stop(step: int) -> bool:
        nonlocal best, worse
        if (step + 1) % settings.every and step + 1 < settings.steps:
            return False
        model.eval()
        loss = token_loss(model, kept_out)
        model.train()
        evaluations.append({"step": step + 1, "loss": loss})
        better = math.isfinite(loss) and loss < best[0]
        worse = 0 if better else worse + 1
        if better:
            best = (loss, [p.detach().clone() for p in trained])
        return worse >= settings.patience

    plan = Plan(
        steps=settings.steps,
        lr=settings.lr,
        warmup=min(settings.warmup, settings.steps // 10),
        floor=0.0,
        weight_decay=1e-2,
        decay="linear",
    )
    batches = block_batches(training_text, settings.batch, settings.steps, settings.seed)
    try:
        training = train(model, batches, plan, parameters=trained, stop=stop, progress=progress)
    finally:
        model.eval()
        with torch.no_grad():
            for parameter, value in zip(trained, best[1], strict=True):
                parameter.copy_(value)
        for adapter in reversed(adapters):
            adapter.merge()
        for parameter in model.parameters():
            parameter.requires_grad_(wanted.get(parameter, True))
    return {
        "loss": {"before": before, "after": best[0]},
        "steps": evaluations[-1]["step"] if evaluations else 0,
        "parameters": sum(p.numel() for p in trained),
        "ranks": ranks,
        "curve": training.curve,
        "evaluations": evaluations,
    }
