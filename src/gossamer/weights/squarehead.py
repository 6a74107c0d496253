"""SquareHead: sparse fine-tuning under a dense teacher (Kurtic et al. 2023, arXiv 2310.06927).

    dense fine-tuning → teacher;  then for each sparsity: one-shot SparseGPT → fine-tuning with the mask fixed and no clipping

The loss is in `squarehead_loss`, the 8-bit model and its bytes in `squarehead_runtime`.

Decisions where the card leaves room:

* Levels are chained: each prunes what the level before it trained (the card is unsure for MPT). For a start from the dense
  model, give one level. One-shot pruning moves weights on, so an entry may come back from one level to the next; the facts
  say how many did.
* Dropout is off in `SquareHead.apply`: against a teacher without it, the loss could not reach zero.

Not built: SmoothQuant's shifting of ranges from inputs to weights, kernels for GPUs, generation with beams, FSDP, and the 7B,
T5 and Whisper runs, and the block-by-block pruning of encoder-decoders (prune those by `second_order_prune`, with your inputs).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gossamer.calibration import Calibration
from gossamer.errors import InputError, ModelError, UnknownNameError
from gossamer.hf import matrices
from gossamer.hf.sparse import SparseLayers
from gossamer.models import Plan, block_batches, train
from gossamer.patterns import Masks
from gossamer.registry import Handle, register
from gossamer.weights.base import Applied, Progress, WeightMethod, copied, silent
from gossamer.weights.prune import SparseGPT
from gossamer.weights.squarehead_loss import SquareHeadLoss, forward, hidden_states
from gossamer.weights.squarehead_runtime import PackedModel


def fixed_masks(model: nn.Module, least: float = 0.1) -> Masks:
    """Where the linear weights of a pruned model's blocks are not zero, of those that have at least this share of zeros.

    >>> from gossamer.models import tiny_model
    >>> model = SparseGPT(sparsity=0.5).apply(tiny_model("llama"), torch.arange(64).view(1, 64)).model
    >>> len(fixed_masks(model)), fixed_masks(model).sparsity
    (14, 0.5)
    """
    found = {m.name: m.parameter.detach() != 0 for m in matrices(model)}
    return Masks({name: mask for name, mask in found.items() if 1 - float(mask.float().mean()) >= least})


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout does nothing inside, in training mode too; then every probability is as it was.

    >>> layer = nn.Dropout(0.5).train()
    >>> with without_dropout(layer):
    ...     float(layer(torch.ones(4)).sum())
    4.0
    >>> layer.p
    0.5
    """
    before: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or (name == "p" and "Dropout" in type(module).__name__)):
                before.append((module, name, value))
    try:
        for module, name, _ in before:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def sparse_finetune(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    levels: Sequence[float],
    prune: Callable[[nn.Module, float], Any],
    batches: Callable[[int], Iterable[Any]],
    plan: Plan,
    progress: Progress = silent,
) -> tuple[Masks, list[dict[str, Any]]]:
    """Through rising sparsities, in place: prune in one shot, hold the zeros, train; the learning rate starts again each time.

    Args:
        loss: of (model, batch); a `SquareHeadLoss`, or `language_loss` for plain cross-entropy.
        levels: sparsities, in order.
        prune: sets weights of the model to zero, called with a level.
        batches: of a level, by its number 0, 1, …
        plan: of every level. Its `clip` must be 0: gradients of masked weights distort the norm.

    Returns:
        The last masks, and of each level `sparsity`, `returned` (entries that the pruning brought back), `curve`,
        `final_loss`, and `parts` (of a `SquareHeadLoss`, at the last step).

    Raises:
        InputError: no levels, or a plan that clips.

    >>> from gossamer.models import tiny_model
    >>> model, text = tiny_model("llama"), torch.arange(64).view(4, 16)
    >>> masks, facts = sparse_finetune(
    ...     model, SquareHeadLoss(tiny_model("llama")), [0.5, 0.75],
    ...     lambda m, s: SparseGPT(sparsity=s).apply(m, text),
    ...     lambda level: block_batches(text, 2, 3, level), Plan(steps=3, warmup=1, clip=0.0),
    ... )
    >>> masks.sparsity, [level["sparsity"] for level in facts]
    (0.75, [0.5, 0.75])
    """
    if not levels or plan.clip:
        raise InputError("sparse fine-tuning needs a sparsity at least, and a plan with clip=0")
    masks, facts = Masks({}), []
    for number, level in enumerate(levels):
        model.eval()
        prune(model, level)
        before, masks = masks, fixed_masks(model, min(0.1, level / 2))  # a low level is held as well
        returned = sum(int((masks[n] & ~before[n]).sum()) for n in masks if n in before)
        training = train(model, batches(number), plan, masks=masks, loss=loss, progress=progress)
        fact: dict[str, Any] = {"sparsity": masks.sparsity, "returned": returned}
        fact |= {"curve": training.curve, "final_loss": training.final_loss}
        if isinstance(loss, SquareHeadLoss):
            fact["parts"] = {k: v for k, v in loss.parts.items() if not math.isnan(v)}
        facts.append(fact)
    return masks, facts


_T5_LEVELS = (0.5, 0.67, 0.75, 0.8, 0.83, 0.86, 0.88)
_PUBLISHED: dict[str, dict[str, Any]] = {
    "mpt-40": {"sparsity": 0.4, "lr": 3e-5, "epochs": 2},
    "mpt-50": {"sparsity": 0.5, "lr": 3e-5, "epochs": 2},
    "mpt-60": {"sparsity": 0.6, "lr": 1e-4, "epochs": 2},
    "mpt-70": {"sparsity": 0.7, "lr": 8e-5, "epochs": 4},
    "mpt-80": {"sparsity": 0.8, "lr": 1e-4, "epochs": 4},
    **{f"mpt-{nm}": {"structure": nm, "lr": 1e-4, "epochs": 4} for nm in ("2:4", "16:32", "16:64")},
    "t5": {
        "sparsity": 0.9,
        "levels": _T5_LEVELS,
        "lr": 2e-3,
        "epochs": 3,
        "batch": 128,
        "weight_decay": 1e-4,
        "warmup": 300,
        "eps": 1e-8,
    },
    "whisper": {
        "sparsity": 0.9,
        "levels": _T5_LEVELS,
        "lr": 2e-4,
        "epochs": 6,
        "warmup": 50,
        "ce": 0.5,
        "eps": 1e-8,
    },
}


@register("squarehead", slot="weights", family="weights", needs=["calibration", "training"])
class SquareHead(WeightMethod):
    """Prune a fine-tuned model in one shot, then train what is left so that every block's output follows the dense model's.

    For a model with one task, at 50 to 80 % zeros, where cross-entropy alone loses too much: the loss compares hidden states
    block by block, each scaled by the teacher's energy. `apply` fine-tunes the model densely on the text (set
    `dense_epochs` to 0 if it is fine-tuned), copies it as the teacher, and goes through `levels` and `sparsity`, each by
    SparseGPT and a fine-tuning with fixed zeros. A step costs a third more than plain training, and a second model's
    memory. What comes out is a plain model with zeros; `attach` runs it without them: a bit for each weight, and 8-bit values
    (float values with `int8` off). That pays where memory is the limit, a row or few at a time; see
    `squarehead_runtime` for the bytes and a roofline. For own data, classifiers and encoder-decoders use `SquareHeadLoss`
    and `sparse_finetune`.

    The defaults are those of MPT-7B at 70 %; `SquareHead.published` has the others. In a small model check the fact
    `teacher_energy`: `eps` must be far below it.

    Kurtic et al., 2023: "Sparse Finetuning for Inference Acceleration of Large Language Models".

    >>> from gossamer.models import tiny_model
    >>> method = SquareHead(sparsity=0.75, epochs=1, dense_epochs=1, batch=2)
    >>> applied = method.apply(tiny_model("llama"), torch.arange(64).view(4, 16))
    >>> applied.facts["sparsity"]
    0.75
    >>> with method.attach(applied.model) as handle:
    ...     handle.report()["formats"]
    {'bitmask': 14}
    """

    sparsity: float = Field(
        0.7, ge=0, lt=1, description="share of each matrix that is zero at the end; N:M has its own"
    )
    levels: tuple[float, ...] = Field((), description="rising sparsities that are gone through before")
    structure: str = Field("element", pattern=r"^(element|[1-9]\d*:[1-9]\d*)$", description="element or N:M")
    samples: int = Field(512, ge=1, description="token blocks that SparseGPT looks at")
    block_size: int = Field(128, ge=1, description="columns that SparseGPT ranks together")
    dense_epochs: int = Field(2, ge=0, description="over the text, to make the teacher; 0: the model is fine-tuned")
    epochs: int = Field(4, ge=1, description="over the text, at each sparsity")
    batch: int = Field(32, ge=1, description="token blocks a step")
    lr: float = Field(8e-5, gt=0, description="at its height, then linear to 0; anew for each sparsity")
    warmup: int = Field(20, ge=0, description="steps of warm-up; a tenth of the steps if that is less")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    ce: float = Field(1.0, ge=0, description="weight of the cross-entropy")
    kl: float = Field(0.0, ge=0, description="weight of the logits' divergence")
    squarehead: float = Field(1.0, ge=0, description="weight of the hidden states' distance")
    eps: Literal["bf16"] | float = Field("bf16", description="added to a block's energy: bf16 (0.0078) or a number")
    temperature: float = Field(1.0, gt=0, description="of the logits' divergence")
    seed: int = Field(0, description="of the order of the text")
    int8: bool = Field(True, description="8-bit weights and inputs when attached")
    least: float = Field(0.5, ge=0, le=1, description="zeros from which a layer runs packed")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        ways = (*self.levels, self.sparsity)
        if not all(0 < a < b for a, b in itertools.pairwise(ways)) or (self.levels and self.structure != "element"):
            raise ValueError("levels must rise to the sparsity, and N:M has none")
        if not (self.ce or self.kl or self.squarehead) or not (self.eps == "bf16" or 0 <= self.eps < math.inf):
            raise ValueError("one weight at least must be positive, and eps bf16 or a number of at least 0")
        return self

    @classmethod
    def published(cls, name: str) -> Self:
        """The recipe mpt-40 to mpt-80, mpt-2:4, mpt-16:32, mpt-16:64, t5 or whisper (the last two for `sparse_finetune`).

        Raises:
            UnknownNameError: another name.

        >>> SquareHead.published("t5").levels
        (0.5, 0.67, 0.75, 0.8, 0.83, 0.86, 0.88)
        """
        if name not in _PUBLISHED:
            raise UnknownNameError(f"squarehead has recipes for {', '.join(_PUBLISHED)}, not {name!r}")
        return cls(**_PUBLISHED[name])

    def plan(self, blocks: int, epochs: int) -> Plan:
        """Of a training that goes so many times over so many token blocks."""
        steps = epochs * -(-blocks // self.batch)
        warmup = min(self.warmup, steps // 10)
        return Plan(steps, self.lr, warmup, 0.0, self.weight_decay, (0.9, 0.999), clip=0.0, decay="linear")

    def loss(self, teacher: nn.Module) -> SquareHeadLoss:
        """The loss with these settings."""
        return SquareHeadLoss(teacher, self.ce, self.kl, self.squarehead, eps=self.eps, temperature=self.temperature)

    def apply(self, model: nn.Module, tokens: Tensor | None = None, progress: Progress = silent) -> Applied:
        """Fine-tune, prune and train in place; see `WeightMethod.apply`. The text is trained on.

        Raises:
            InputError: there is no text, or a loss is not finite.
            ModelError: its blocks or hidden states were not found, or no parameter wants a gradient.
        """
        text = self.text(tokens)
        if not any(p.requires_grad for p in model.parameters()):
            raise ModelError(f"{self.slug}: the model is frozen: call model.requires_grad_() first")
        sparse = self.plan(len(text), self.epochs)
        facts: dict[str, Any] = {}
        with without_dropout(model):
            if self.dense_epochs:
                dense = self.plan(len(text), self.dense_epochs)
                batches = block_batches(text, self.batch, dense.steps, self.seed)
                training = train(model, batches, dense, progress=progress)
                facts["dense"] = {"curve": training.curve, "final_loss": training.final_loss}
            loss = self.loss(copied(model))
            with torch.no_grad():
                states = hidden_states(forward(loss.teacher, {"input_ids": text[:1]}, hidden=True))
            facts["teacher_energy"] = [float(h.float().square().mean()) for h in states]

            def prune(student: nn.Module, level: float) -> None:
                settings = {"structure": self.structure, "block_size": self.block_size}
                SparseGPT(sparsity=level, **settings).apply(student, text[: self.samples], progress)

            def batches_of(level: int) -> Iterator[Tensor]:
                return block_batches(text, self.batch, sparse.steps, self.seed + 1 + level)

            ways = (*self.levels, self.sparsity)
            masks, facts["levels"] = sparse_finetune(model, loss, ways, prune, batches_of, sparse, progress)
        packed = PackedModel.of(model, int8=self.int8)
        facts |= {"sparsity": masks.sparsity, "prunable": masks.total, "kept": masks.kept}
        facts["weight_bytes"] = {
            "dense": packed.dense_bytes,
            "packed": packed.nbytes,
            "formula": packed.predicted_bytes,
        }
        return Applied(model, facts, masks)

    def attach(self, model: nn.Module, calibration: Calibration | None = None) -> Handle:
        """Run the layers with zeros enough on the bitmask kernel; the handle takes them off again.

        Raises:
            ModelError: no layer is sparse enough.
        """
        layers = SparseLayers(model, "bitmask", int8=self.int8, thresholds={"bitmask": self.least})
        if not layers.layers:
            raise ModelError(f"{self.slug}: no layer has {self.least:.0%} zeros: apply it first")
        return Handle(undo=[layers.detach], reports=[layers.report])
