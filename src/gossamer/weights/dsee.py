"""DSEE: tune a frozen model by a low-rank and a few-entries update, then mask the model by the size of that update.

    final weight = S1 ⊙ W + (α/r)·(B A + S2)

    stage 1  tune A, B, the N entries of S2 and the head
    prune    S1: query and value by |ΔW|, all else by |W|, two global rankings; or whole heads, the same number a layer
    stage 2  tune on under S1

Ω, the support of S2, comes from W ≈ U V + S before training: the places of the largest |W − U V|.
Chen et al.: "DSEE: Dually Sparsity-Embedded Efficient Tuning of Pre-trained Language Models" (2021; ACL 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.errors import InputError, ModelError
from gossamer.hf import Matrix, matrices
from gossamer.models import Plan, Training, block_batches, fingerprint, train
from gossamer.registry import register
from gossamer.weights.base import Applied, Progress, WeightMethod, parameter_count, silent
from gossamer.weights.dsee_layers import Adapted, Update, support
from gossamer.weights.dsee_tuning import HEADS, Mode, Piece, Tuned


def trained_count(layers: int, outputs: int, inputs: int, rank: int, entries: int, head: int = 0) -> int:
    """Trained parameters: layers·2·(r(o + i) + N) and the head.

    >>> trained_count(12, 768, 768, 16, 64, head=1538)  # BERT-base
    592898
    """
    return layers * 2 * (rank * (outputs + inputs) + entries) + head


@register("dsee", slot="weights", family="weights", needs=["training"])
class DSEE(WeightMethod):
    """Tune half a per cent of a model to a task, then prune the frozen rest by what the tuning changed.

    Query and value get an update of low rank plus N free entries; all else is frozen. After a first stage of tuning the
    frozen weights are masked (query and value by the size of their update, the others by their own), or whole heads are
    removed, those whose updates are smallest. A second stage of tuning makes up for it.

    Use it to keep many tasks of one base model: each is a small file (`save_task`: factors, entries, mask bits, head).
    It costs a fine-tuning with few gradients, and a decomposition of every query and value matrix before it. Time is saved
    only by sparse kernels on S1 ⊙ W with the update apart; `merge` makes a plain checkpoint, in which the update fills
    the zeros of query and value. Heads save time on any kernel, where they are cut off for real: in families whose
    configuration names the head size (Llama and its like). 25 % of the heads are some 8 % of a BERT layer's products.

    `apply` is the whole way for a causal language model on token blocks. For a classifier:

        tuned = dsee.adapt(model)        # tuned.parameters() are what to train
        ...stage 1...
        tuned.prune(0.2, 0.2)            # or tuned.prune_heads(3)
        ...stage 2...
        tuned.save_task("task.safetensors"); tuned.merge()

    Decisions. The pooler is in no group: frozen, not pruned. Ω is exactly N places, of |W − U V| with one outer iteration
    (the release's loop of 100 empties S; its scripts differ). The factor α/r stands on both terms in all modes. Masks are
    global, as published; `cap` spares matrices that would go whole. Fused query-key-value matrices (GPT-2, which the
    paper has and the release has not) are adapted in their query and value rows. Not built: the earlier paper's L1
    slimming of heads and neurons.

    Paper: Chen et al., 2021, "DSEE: Dually Sparsity-Embedded Efficient Tuning of Pre-trained Language Models" (ACL 2023).

    >>> from gossamer.models import tiny_model
    >>> dsee = DSEE(rank=2, entries=8, ratio_other=0.5, steps=2, steps_after=2, batch=2)
    >>> applied = dsee.apply(tiny_model("llama"), torch.arange(64).view(4, 16))
    >>> applied.facts["trained"], round(applied.facts["masked"]["other"], 3)
    (928, 0.5)
    """

    rank: int = Field(16, ge=1, description="r, of the update B A")
    alpha: float = Field(32.0, gt=0, description="the update is multiplied by alpha / rank")
    entries: int = Field(64, ge=0, description="N, free entries of each update; 0 is plain LoRA")
    support: Literal["decompose", "magnitude", "random"] = Field("decompose", description="where the free entries lie")
    outer_iters: int = Field(1, ge=1, description="of the decomposition: its rank is 1, 6, 11, … up to `rank`")
    ratio_update: float = Field(0.2, ge=0, lt=1, description="share of query and value weights to mask")
    ratio_other: float = Field(0.2, ge=0, lt=1, description="share of the other weights of the blocks to mask")
    mode: Mode = Field("ABS", description="what query and value are ranked by")
    cap: float = Field(1.0, gt=0, le=1, description="no matrix loses more than this share")
    heads: int = Field(0, ge=0, description="key/value heads to remove in every layer, instead of masking entries")
    steps: int = Field(300, ge=1, description="optimizer steps of stage 1 in `apply`")
    steps_after: int = Field(300, ge=1, description="optimizer steps of stage 2 in `apply`")
    batch: int = Field(16, ge=1, description="token blocks a step")
    lr: float = Field(5e-4, gt=0, description="AdamW's learning rate at its height, in both stages")
    seed: int = Field(0, description="of factors, supports, random masks and the order of the blocks")

    def adapt(self, model: nn.Module, include: Callable[[str], bool] | None = None) -> Tuned:
        """Put updates on query and value of every block and freeze all but them and the head.

        Args:
            include: decides by dotted parameter name which matrices may be masked; by default those of the blocks.

        Raises:
            ModelError: the model has no query and value matrices under known names.
            InputError: a weight is not finite, or smaller than the entries it should get.

        >>> from gossamer.models import tiny_model
        >>> tuned = DSEE(rank=4, entries=10).adapt(tiny_model("gpt2"))
        >>> sum(p.numel() for p in tuned.parameters()) == trained_count(2, 64, 64, 4, 10)
        True
        """
        chosen = matrices(model, include=include)
        for matrix in chosen:
            if matrix.role == "conv" or not bool(matrix.parameter.isfinite().all()):
                raise InputError(f"{matrix.name} is a convolution, or holds values that are NaN or infinite")
        found = [piece for matrix in chosen for piece in _pieces(matrix)]
        if not any(p.role in ("q", "v") for p in found):
            raise ModelError(f"{type(model).__name__} is not supported: it has no query and value matrices by name")
        generator = torch.Generator().manual_seed(self.seed)
        layers = {}
        for matrix in chosen:
            name = matrix.name.removesuffix(".weight")
            mine = [p for p in found if p.name == name and p.role in ("q", "v")]
            layers[name] = Adapted(matrix.module, [self._update(matrix.weight, p, generator) for p in mine])
        mark = fingerprint(getattr(model, "base_model", model)) if hasattr(model, "config") else ""
        wanted = [(p, p.requires_grad) for p in model.parameters()]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(bool(HEADS.search(name)))
        for name, layer in layers.items():
            model.set_submodule(name, layer.train(model.training))
        return Tuned(model, layers, found, mark, wanted)

    def _update(self, weight: Tensor, piece: Piece, generator: torch.Generator) -> Update:
        rows = weight[piece.start : piece.stop]
        index = support(rows, self.entries, self.support, self.outer_iters, self.rank, generator)
        return Update(rows, piece.start, self.rank, self.alpha, index, generator)

    def apply(self, model: nn.Module, tokens: Tensor | None = None, progress: Progress = silent) -> Applied:
        """Both stages and the pruning between them, merged, in place; see `WeightMethod.apply`.

        Raises:
            InputError: the text is missing or of another form, or the loss is not finite.
            ModelError: the model has no query and value matrices under known names.
        """
        text, before = self.text(tokens), parameter_count(model)
        tuned = self.adapt(model)

        def stage(steps: int, seed: int) -> Training:
            plan = Plan(steps, lr=self.lr, warmup=0, floor=0.0, betas=(0.9, 0.999), decay="linear")
            batches = block_batches(text, self.batch, steps, seed)
            return train(model, batches, plan, parameters=tuned.parameters(), progress=progress)

        try:
            first = stage(self.steps, self.seed)
            if self.heads:
                removed = tuned.prune_heads(self.heads, "WABS" if self.mode == "WABS" else "ABS")
            else:
                removed = {}
                tuned.prune(self.ratio_update, self.ratio_other, self.mode, self.cap, self.seed)
            second = stage(self.steps_after, self.seed + 1)
        except BaseException:
            tuned.remove()
            model.eval()
            raise
        trained = sum(p.numel() for p in tuned.parameters())
        masked, flops = tuned.masked_shares(), tuned.flops()
        masks = tuned.merge()
        facts = {
            "sparsity": _zeros(model),
            "masked": masked,
            "trained": trained,
            "heads_removed": {str(layer): heads for layer, heads in removed.items()},
            "flops": flops,
            "parameters": {"before": before, "after": parameter_count(model)},
            "curve": [first.curve, second.curve],
        }
        return Applied(model, facts, masks)


def _pieces(matrix: Matrix) -> list[Piece]:
    """The rows of a matrix by role: query, key and value lie one behind the other in a fused one."""
    name, rows = matrix.name.removesuffix(".weight"), matrix.weight.shape[0]
    if matrix.role != "qkv":
        return [Piece(matrix.layer, matrix.role, name, 0, rows)]
    if not matrix.transposed:  # other families interleave heads, or share key/value heads
        raise ModelError(f"{name} is a fused matrix whose rows are not known: dsee serves GPT-2's")
    third = rows // 3
    return [Piece(matrix.layer, role, name, i * third, (i + 1) * third) for i, role in enumerate("qkv")]


def _zeros(model: nn.Module) -> float:
    parts = [(int((m.parameter == 0).sum()), m.parameter.numel()) for m in matrices(model)]
    return sum(z for z, _ in parts) / sum(n for _, n in parts)
