"""Block SpMM on CPUs: linear weights pruned in 4x1 blocks under distillation, and run in 8 bits on a kernel made for them.

    score      S ← decay · S + |W ⊙ ∂L/∂W| at every step (SNIP with momentum); a block's is the sum of its four
    ranking    one for all matrices, none of which loses more than `cap` of its blocks; what is gone stays gone
    schedule   s_i of n prunings: exp 1 − (1 − s)^{i/n}, cos s (1 − cos(π i / 2n)), linear s i/n, cube s (i/n)³
    loss       λ · MSE(last hidden state, the dense model's), and nothing else
    runtime    8-bit weights, inputs quantised as calibrated; layers of at least 70 % zero blocks only

"An Efficient Sparse Inference Software Accelerator for Transformer-based Language Models on CPUs", Shen et al. 2023,
arXiv 2306.16601. The kernel is `csrc/sparse_linear.cpp`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError, InputError, ModelError
from gossamer.hf import Matrix, masks_for, matrices
from gossamer.hf.sparse import SparseLayers
from gossamer.models import MaskHolder, block_batches, fingerprint
from gossamer.patterns import Masks, choose
from gossamer.patterns.criteria import magnitude, momentum
from gossamer.registry import Handle, register
from gossamer.weights.base import Applied, Progress, WeightMethod, copied, silent

Decay = Literal["exp", "cos", "linear", "cube"]


def sparsity_at(i: int, n: int, target: float, decay: Decay = "exp") -> float:
    """The sparsity after pruning i of n, from a dense start.

    Raises:
        InputError: a count or the target is out of range.

    >>> [round(sparsity_at(i, 2, 0.75), 3) for i in range(3)]
    [0.0, 0.5, 0.75]
    """
    if n < 1 or not 0 <= i <= n or not 0 <= target < 1:
        raise InputError(
            f"a schedule wants 0 <= i <= n, n >= 1 and a target in 0 .. 1, got i {i}, n {n}, target {target:g}"
        )
    if i == n:
        return target
    x = i / n
    if decay == "exp":
        return float(1 - (1 - target) ** x)
    if decay == "cos":
        return target * (1 - math.cos(math.pi * x / 2))
    return target * (x if decay == "linear" else x**3)


def activation_range(low: float, high: float) -> tuple[float, int]:
    """(scale, zero point) that map 0 and ``[low, high]`` to 0 .. 255.

    Raises:
        CalibrationError: the range is not finite.

    >>> scale, zero = activation_range(-1.0, 4.1)
    >>> round(scale, 6), zero
    (0.02, 50)
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CalibrationError("the range of an input is not finite: check the model's weights and the text")
    if low == high:
        return 1.0, 0
    scale = (high - low) / 255
    return scale, round(-low / scale)


def last_hidden_state(model: nn.Module, tokens: Tensor) -> Tensor:
    """``[batch, length, hidden]`` of a transformers model, with or without a head.

    Raises:
        ModelError: the model has none.
    """
    out = getattr(model, "base_model", model)(input_ids=tokens)
    hidden = getattr(out, "last_hidden_state", None)
    if hidden is None:
        raise ModelError(f"{type(model).__name__} gives no last hidden state to distil")
    return hidden  # type: ignore[no-any-return]


@register("cpu-block-spmm", slot="weights", family="weights", needs=["training"])
class CPUBlockSpMM(WeightMethod):
    """Prune linear weights in 4x1 blocks (four outputs at one input) while training on the dense model's hidden states.

    For encoders and small decoders that run on CPUs at 70 to 90 % zeros, prompts or batches rather than single rows. `apply`
    trains: it needs some thousand steps of text for its best. Then `attach` puts the layers that are sparse enough on the
    block kernel, in 8 bits with `calibrate`'s input ranges, or with a range for each row where there is no calibration. A
    forward of such a layer costs about the share of blocks that is kept. ``gossamer.hf.sparse.save_sparse`` writes the
    packed model.

    Decisions where the sources differ: the score decays by 0.9 and adds with weight 1, as their code does; an entry that is
    gone never returns; dropout is off; the learning rate is constant. Not built: fused layernorm and a network that stays
    transposed from layer to layer (each call turns its inputs into tiles, which costs 5 to 40 % of a call); code made for
    one weight (JIT); AMX; group lasso; the runtime's rounding of outputs to 8 bits for the next layer.

    >>> from gossamer.models import tiny_model
    >>> method = CPUBlockSpMM(sparsity=0.8, steps=4, every=1, cooldown=1, batch=2)
    >>> applied = method.apply(tiny_model("llama"), torch.arange(64).view(4, 16))
    >>> round(applied.facts["sparsity"], 2)
    0.8
    >>> with method.attach(applied.model) as handle:
    ...     list(handle.report()["formats"])
    ['4x1']
    """

    sparsity: float = Field(0.9, ge=0, lt=1, description="share of the blocks to remove, of all matrices together")
    decay: Decay = Field("exp", description="how the sparsity rises: exp, cos, linear or cube")
    criterion: Literal["snip_momentum", "magnitude"] = Field("snip_momentum", description="what a block is worth")
    momentum: float = Field(0.9, ge=0, lt=1, description="decay of the score")
    cap: float = Field(0.98, gt=0, le=1, description="largest share that one matrix loses")
    steps: int = Field(3000, ge=1, description="optimizer steps")
    every: int = Field(100, ge=1, description="steps between two prunings")
    cooldown: int = Field(1000, ge=0, description="steps after the last pruning")
    batch: int = Field(16, ge=1, description="token blocks a step")
    lr: float = Field(5e-5, gt=0, description="of AdamW, constant")
    weight_decay: float = Field(5e-5, ge=0, description="of AdamW")
    distill: float = Field(2.0, gt=0, description="λ, the weight of the loss")
    seed: int = Field(0, description="of the order of the text")
    int8: bool = Field(True, description="run in 8 bits when attached")
    least: float = Field(0.7, ge=0, le=1, description="zero blocks from which a layer runs on the block kernel")

    def apply(self, model: nn.Module, tokens: Tensor | None = None, progress: Progress = silent) -> Applied:
        """Prune and train in place; see `WeightMethod.apply`.

        Raises:
            InputError: there is no text, no step for a pruning, or a matrix whose outputs are no multiple of 4.
            ModelError: the model has no last hidden state, or the loss is not finite.
        """
        text = self.text(tokens)
        prunings = (self.steps - self.cooldown) // self.every
        if prunings < 1:
            raise InputError(
                f"{self.slug}: {self.steps} steps with {self.cooldown} of cooldown leave none of {self.every}"
            )
        chosen = matrices(model)
        teacher = copied(model).eval().requires_grad_(False)
        masks = Masks({m.name: torch.ones_like(m.parameter, dtype=torch.bool) for m in chosen})
        wanted = {p: p.requires_grad for p in model.parameters()}
        training = model.training
        for parameter in wanted:
            parameter.requires_grad_(True)
        model.eval()  # without dropout, as the teacher
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        holder = MaskHolder(model, masks, optimizer)
        scores: dict[str, Tensor] = {}
        losses = []
        try:
            for step, batch in enumerate(block_batches(text, self.batch, self.steps, self.seed)):
                progress("pruning under distillation", step, self.steps)
                with torch.no_grad():
                    goal = last_hidden_state(teacher, batch)
                loss = self.distill * F.mse_loss(last_hidden_state(model, batch), goal)
                if not bool(loss.isfinite()):
                    raise ModelError(f"{self.slug}: the loss is not finite at step {step}: lower the learning rate")
                optimizer.zero_grad()
                loss.backward()
                losses.append(float(loss.detach()))
                self._score(chosen, scores)
                optimizer.step()
                done = step + 1
                if done % self.every == 0 and done // self.every <= prunings:
                    share = sparsity_at(done // self.every, prunings, self.sparsity, self.decay)
                    holder.update(self._masks(chosen, scores, share, holder.masks))
        finally:
            holder.release()
            for parameter, before in wanted.items():
                parameter.requires_grad_(before)
                parameter.grad = None
            model.train(training)
        masks = holder.masks
        facts = {
            "sparsity": masks.sparsity,
            "prunable": masks.total,
            "kept": masks.kept,
            "losses": losses[:: self.every],
        }
        return Applied(model, {**facts, "final_loss": losses[-1]}, masks)

    def calibrate(self, model: nn.Module, tokens: Tensor) -> Calibration:
        """The range of every layer's inputs over token blocks, for the 8-bit runtime: call it on the pruned model.

        Raises:
            CalibrationError: an input is not finite.
        """
        tokens = self.text(tokens)
        ranges: dict[str, Tensor] = {}
        hooks = []
        for matrix in matrices(model):

            def see(_: nn.Module, args: tuple[Tensor, ...], name: str = matrix.name.removesuffix(".weight")) -> None:
                low, high = args[0].detach().float().aminmax()
                now = torch.stack([low, high])
                before = ranges.get(name, now)
                ranges[name] = torch.stack([torch.minimum(before[0], low), torch.maximum(before[1], high)])

            hooks.append(matrix.module.register_forward_pre_hook(see))
        try:
            with torch.no_grad():
                for batch in tokens.split(self.batch):
                    last_hidden_state(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return Calibration(self.slug, fingerprint(model), ranges, {"blocks": len(tokens), "length": tokens.shape[1]})

    def attach(self, model: nn.Module, calibration: Calibration | None = None) -> Handle:
        """Run the layers that are sparse enough on the block kernel; the handle takes them off again.

        Raises:
            ModelError: no layer is sparse enough.
            CalibrationError: it is another model's.
        """
        ranges: dict[str, tuple[float, int]] | None = None
        if calibration is not None:
            self.require(calibration).check(fingerprint(model))
            ranges = {n: activation_range(*t.tolist()) for n, t in calibration.tensors.items()}
        layers = SparseLayers(model, "4x1", int8=self.int8, thresholds={"4x1": self.least}, inputs=ranges)
        if not layers.layers:
            raise ModelError(f"{self.slug}: no layer has {self.least:.0%} zero blocks: apply it first")
        return Handle(undo=[layers.detach], reports=[layers.report])

    def _score(self, chosen: list[Matrix], scores: dict[str, Tensor]) -> None:
        if self.criterion == "magnitude":
            return
        for m in chosen:
            gradient = m.parameter.grad
            if gradient is not None:
                scores[m.name] = momentum(scores.get(m.name), m.weight, m.view(gradient), self.momentum)

    def _masks(self, chosen: list[Matrix], scores: dict[str, Tensor], share: float, before: Masks) -> Masks:
        if self.criterion == "magnitude":
            scores = {m.name: magnitude(m.weight) for m in chosen}
        among = Masks({m.name: m.view(before[m.name]) for m in chosen})
        return masks_for(chosen, choose(scores, share, "4x1", cap=self.cap, among=among)) & before
