"""PST: fine-tune and prune at once, and train only small factors of the update and of the importance.

    W_t = W + β·U V                                   the update is of low rank, W is frozen
    S_t = |W_t| + α₁·A B + α₂·(R·1ᵀ + 1·Cᵀ)           importance: magnitude, low rank, whole rows and columns
    M_t = 0 for the int(o·i·v_t) smallest of S_t in each matrix, else 1
    y   = x (M_t ⊙ W_t)ᵀ + b                          straight through: ∂L/∂S := ∂L/∂M

Movement pruning's score is Σ −lr·(∂L/∂W ⊙ W), a matrix as large as the weight. PST learns the same thing, in factors.
Li et al., 2022: "Parameter-Efficient Sparsity for Large Language Models Fine-Tuning" (IJCAI 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gossamer.errors import InputError
from gossamer.hf import Matrix, matrices
from gossamer.models import Plan, block_batches, train
from gossamer.patterns.schedules import cubic, ramp
from gossamer.registry import register
from gossamer.weights.base import Applied, Progress, WeightMethod, silent
from gossamer.weights.learned_masks import Importance, LearnedMasks


def sparsity_at(
    step: float, steps: float, final: float, initial: float = 0.0, warmup: float = 0.1, cooldown: float = 0.3
) -> float:
    """v_t: `initial` for the first share `warmup` of the steps, `final` for the last share `cooldown`, a cubic between.

    >>> [round(sparsity_at(t, 1000, 0.9), 4) for t in (100, 250, 400, 700)]
    [0.0, 0.5203, 0.7875, 0.9]
    """
    if step <= warmup * steps:
        return initial
    if step > (1 - cooldown) * steps:
        return final
    way = (step - warmup * steps) / ((1 - warmup - cooldown) * steps)
    return ramp(min(way, 1.0), initial, final, cubic)  # rounding may take the last step over the end


def importance(
    weight: Tensor, a: Tensor, b: Tensor, r: Tensor, c: Tensor, alpha1: float = 1.0, alpha2: float = 1.0
) -> Tensor:
    """S = |W| + α₁·A B + α₂·(R·1ᵀ + 1·Cᵀ).

    weight ``[out, in]``, a ``[out, rank]``, b ``[rank, in]``, r ``[out]``, c ``[in]``.

    >>> one = torch.ones
    >>> importance(-one(2, 2), one(2, 1), one(1, 2), torch.tensor([0.0, 5.0]), torch.zeros(2)).tolist()
    [[2.0, 2.0], [7.0, 7.0]]
    """
    return weight.abs() + alpha1 * (a @ b) + alpha2 * (r[:, None] + c)


class Factors(Importance):
    """U, V, A, B, R and C of one weight: U and A drawn from N(0, 1), the others zero.

    They are float32 also where the weight is narrower: an update at a fine-tuning rate is lost in bfloat16.
    """

    def __init__(self, weight: Tensor, pst: PST, transposed: bool, generator: torch.Generator) -> None:
        super().__init__(weight, transposed)
        self.alpha1, self.alpha2, self.beta, self.detached = pst.alpha1, pst.alpha2, pst.beta, pst.detach_magnitude
        outputs, inputs = self.shape
        device, dtype = weight.device, torch.promote_types(weight.dtype, torch.float32)

        def drawn(rank: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(outputs, rank, generator=generator).to(device, dtype))

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

        self.u, self.v = drawn(pst.weight_rank), zeros(pst.weight_rank, inputs)
        self.a, self.b = drawn(pst.mask_rank), zeros(pst.mask_rank, inputs)
        self.r, self.c = zeros(outputs), zeros(inputs)

    def values(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """W_t and S_t."""
        updated = weight + self.beta * (self.u @ self.v)
        seen = updated.detach() if self.detached else updated
        return updated, importance(seen, self.a, self.b, self.r, self.c, self.alpha1, self.alpha2)


@register("pst", slot="weights", family="weights", needs=["training", "gradients"])
class PST(WeightMethod):
    """Fine-tune a frozen model to a task and prune it on the way, training a few per cent of its size.

    Every matrix of the blocks gets a low-rank update, and an importance made of its magnitude, a low-rank part and one
    number a row and a column. The least important entries are masked in each forward, more of them as the sparsity
    rises along a cubic curve; masks are made anew each time, so what was masked may come back. At the end the factors
    are multiplied out: a plain checkpoint, of exactly int(out·in·sparsity) zeros in every matrix.

    Use it to adapt a pre-trained model to a task and get it sparse at once, where memory for gradients and optimizer is
    short: (out + in)(weight_rank + mask_rank + 1) trained numbers a matrix, instead of out·in or twice that. It is not
    cheap in time: each forward makes the whole weight and score of every matrix and ranks it. With enough memory, train
    all weights.

    `apply` is the whole way for a causal language model on token blocks. For a classifier or a loop of your own:

        masks = pst.convert(model)                       # freezes the model; masks.parameters() are what to train
        schedule = pst.scheduler(masks, total_steps)     # schedule.step() after optimizer.step()
        masks.export()                                   # plain weights with zeros

    Decisions. The task head (a classifier, its pooler) is trained, as the paper says; the released script leaves it as
    it was drawn. |W_t| inside S_t passes a gradient on to W_t, as released; `detach_magnitude` stops it. The default
    rate is for some hundreds of steps (the paper: 1e-4, five epochs). No weight decay, no
    dropout on the factors. Equal scores: the earlier entry stays. Label smoothing of the paper's GPT-2 runs is not built.

    Paper: Li et al., 2022, "Parameter-Efficient Sparsity for Large Language Models Fine-Tuning" (IJCAI 2022).

    >>> from gossamer.models import tiny_model
    >>> applied = PST(sparsity=0.5, steps=4, batch=2).apply(tiny_model("llama"), torch.arange(64).view(4, 16))
    >>> applied.facts["sparsity"], applied.facts["trained"]
    (0.5, 34816)
    """

    sparsity: float = Field(0.9, ge=0, lt=1, description="v_f: share of every matrix that is zero at the end")
    initial: float = Field(0.0, ge=0, lt=1, description="v_0: share during the warm-up")
    weight_rank: int = Field(8, ge=1, description="r1, of the update U V")
    mask_rank: int = Field(8, ge=1, description="r2, of the importance A B")
    alpha1: float = Field(1.0, ge=0, description="of A B in the importance")
    alpha2: float = Field(1.0, ge=0, description="of the rows and columns in the importance")
    beta: float = Field(1.0, gt=0, description="of the update")
    warmup: float = Field(0.1, ge=0, lt=1, description="t_i: first share of the steps, at the initial sparsity")
    cooldown: float = Field(0.3, ge=0, lt=1, description="t_f: last share of the steps, at the final sparsity")
    detach_magnitude: bool = Field(False, description="no gradient through |W| in the importance")
    steps: int = Field(600, ge=1, description="optimizer steps of `apply`")
    batch: int = Field(16, ge=1, description="token blocks a step")
    lr: float = Field(5e-4, gt=0, description="AdamW's learning rate at its height")
    seed: int = Field(43, description="of the factors and of the order of the blocks")

    @model_validator(mode="after")
    def _in_order(self) -> PST:
        if self.warmup + self.cooldown >= 1:
            raise ValueError(f"warmup and cooldown must leave steps between them, got {self.warmup} + {self.cooldown}")
        if self.initial > self.sparsity:
            raise ValueError(f"initial must not be above sparsity, got {self.initial} > {self.sparsity}")
        return self

    def convert(self, model: nn.Module, include: Callable[[str], bool] | None = None) -> LearnedMasks:
        """Put factors on the model's matrices and freeze all but them and the head.

        Args:
            include: decides by dotted parameter name; by default all matrices of the blocks (see `gossamer.hf.matrices`).

        Raises:
            ModelError: it has no such matrix.
            InputError: a weight is not finite.

        >>> model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
        >>> masks = PST(weight_rank=2, mask_rank=1).convert(model)
        >>> sum(p.numel() for p in masks.factors())
        40
        """
        generator = torch.Generator().manual_seed(self.seed)

        def make(matrix: Matrix) -> Importance:
            return Factors(matrix.parameter.detach(), self, matrix.transposed, generator)

        masks = LearnedMasks.on(model, matrices(model, include=include), make)
        masks.set_sparsity(self.initial)
        return masks

    def scheduler(self, masks: LearnedMasks, steps: int) -> Scheduler:
        """What raises the sparsity in `steps` optimizer steps."""
        return Scheduler(masks, self, steps)

    def apply(self, model: nn.Module, tokens: Tensor | None = None, progress: Progress = silent) -> Applied:
        """Fine-tune a causal language model on the blocks and prune it, in place; see `WeightMethod.apply`.

        Raises:
            InputError: the text is missing or of another form, or the loss is not finite.
        """
        batches = block_batches(self.text(tokens), self.batch, self.steps, self.seed)
        masks = self.convert(model)
        try:
            schedule = self.scheduler(masks, self.steps)
            training = train(
                model,
                batches,
                Plan(self.steps, lr=self.lr, warmup=0, floor=0.0, betas=(0.9, 0.999), clip=0.0, decay="linear"),
                parameters=masks.parameters(),
                after_step=lambda step: schedule.step(),
                progress=progress,
            )
        except BaseException:
            masks.remove()
            model.eval()
            raise
        trained = sum(p.numel() for p in masks.parameters())
        final = masks.export()
        facts = {
            "sparsity": final.sparsity,
            "prunable": final.total,
            "kept": final.kept,
            "trained": trained,
            "trained_share": trained / final.total,
            "curve": training.curve,
        }
        return Applied(model, facts, final)


@dataclass(eq=False)
class Scheduler:
    """Sets v_t of all matrices after each optimizer step; `t` counts them, and is all that a resumed run must restore.

    >>> masks = PST(sparsity=0.5).convert(model := nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)))
    >>> schedule = PST(sparsity=0.5).scheduler(masks, 10)
    >>> for _ in range(10): schedule.step()
    >>> schedule.final, masks.masks()["0.weight"].sum().item()
    (True, 16)
    """

    masks: LearnedMasks
    pst: PST
    steps: int
    t: int = field(default=0)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"a schedule needs at least one step, got {self.steps}")

    def step(self) -> None:
        """One optimizer step more is done."""
        self.t += 1
        self.masks.set_sparsity(self.at(self.t))

    def at(self, t: int) -> float:
        """v_t."""
        p = self.pst
        return sparsity_at(min(t, self.steps), self.steps, p.sparsity, p.initial, p.warmup, p.cooldown)

    @property
    def final(self) -> bool:
        """Whether the final sparsity is reached; the best checkpoint may be chosen from here on only."""
        return self.t > (1 - self.pst.cooldown) * self.steps or self.pst.initial == self.pst.sparsity

    def callback(self) -> Any:
        """A `transformers.TrainerCallback` that calls `step` after each optimizer step."""
        from transformers import TrainerCallback

        schedule = self

        class Step(TrainerCallback):  # type: ignore[misc]
            def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                schedule.step()

        return Step()
