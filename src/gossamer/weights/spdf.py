"""SPDF: sparse pre-training, dense fine-tuning (Thangarasa et al., UAI 2023).

    phase 1   W ← m ⊙ W at the start, m random with exactly round(s·n) zeros in each matrix of the blocks, never changed;
              forward with W, gradients ⊙ m before clipping, the step, W ⊙ m
    phase 2   the mask goes, the zeros stay as values; all weights are trained by a fresh optimizer

    forward FLOPs of a token   F(s) = 24·L·d²·(1 − s) + 4·T·d·L + 2·d·V        backward twice that

Embeddings, the head, norms and biases stay dense. Initial weights are drawn from a truncated normal (std 0.02, cut at two
standard deviations; attention and MLP outputs 0.02 / √(2L)) and not rescaled for the sparsity. A sparse model sees as many
tokens as a dense one.

Decisions where the card leaves room:

* Masks have exact counts per matrix (the card's choice over Bernoulli). Each matrix draws from a generator of its own, seeded
  by its name, so a mask does not depend on the order of the layers; checkpoints hold the masks all the same.
* For gated MLPs and grouped-query attention F counts the block's matrices as they are; for a GPT it is the formula above.
* The dense part of variable SPDF warms up over a tenth of its steps to the same learning rate; its decay is the cosine of this
  library's plans, where the published one is linear.

Not built: real savings in training (dense kernels multiply the zeros; FLOPs and bytes are computed, not felt), the 125M to 6.7B
runs and their data sets, and beam search as in the paper's evaluation.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.errors import InputError, ModelError, UnknownNameError
from gossamer.hf import block_list, matrices
from gossamer.models import Plan, Training, block_batches, train
from gossamer.patterns import Masks, choose
from gossamer.patterns.criteria import random
from gossamer.registry import register
from gossamer.weights.base import Applied, Progress, WeightMethod, silent
from gossamer.weights.spdf_pretrain import SparsePretrain


def static_random_masks(
    model: nn.Module, sparsity: float, seed: int = 0, include: Callable[[str], bool] | None = None
) -> Masks:
    """Random masks with exactly ``round(sparsity · n)`` zeros in each prunable matrix; weights are not looked at.

    Raises:
        InputError: a share out of range.

    >>> from gossamer.models import tiny_model
    >>> set(static_random_masks(tiny_model("gpt2"), 0.75).shares().values())
    {0.75}
    """
    masks = {}
    for matrix in matrices(model, include=include):
        generator = torch.Generator().manual_seed(zlib.crc32(matrix.name.encode()) ^ seed)
        score = random(torch.empty(matrix.weight.shape), generator)
        masks[matrix.name] = matrix.unview(choose({"w": score}, sparsity)["w"]).to(matrix.parameter.device)
    return Masks(masks)


@torch.no_grad()
def initialize(model: nn.Module, std: float = 0.02, seed: int = 0) -> None:
    """Start a transformers model anew, in place: its family's own initial values, then matrices and embeddings drawn again.

    From a normal with this standard deviation, cut at two of them; attention and MLP outputs at ``std / sqrt(2 L)``.

    Raises:
        ModelError: it is no transformers model, or its blocks were not found.

    >>> from gossamer.models import tiny_model
    >>> model = tiny_model("gpt2")
    >>> initialize(model)
    >>> float(model.transformer.h[0].mlp.c_fc.weight.detach().abs().max()) <= 0.04
    True
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        raise ModelError(f"{type(model).__name__} cannot be started anew: it has no configuration")
    depth = len(block_list(model)[1])
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.load_state_dict(type(model)(config).state_dict())
    outputs = {m.parameter for m in matrices(model) if m.role in ("o", "down")}
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.Linear) or type(module).__name__ == "Conv1D":
            weight: Any = module.weight
            scale = std / (2 * depth) ** 0.5 if weight in outputs else std
            drawn = torch.empty(weight.shape)
            nn.init.trunc_normal_(drawn, 0.0, scale, -2 * scale, 2 * scale, generator)
            weight.copy_(drawn)


def forward_flops(layers: int, hidden: int, context: int, vocabulary: int, sparsity: float = 0.0) -> float:
    """F(s) of one token in a GPT whose MLP is four times as wide.

    Attention scores and values are not halved for causality; a look-up of embeddings is free.

    >>> dense, sparse = (forward_flops(24, 2048, 2048, 50257, s) for s in (0.0, 0.75))
    >>> round(dense / sparse, 3)
    2.494
    """
    if min(layers, hidden, context, vocabulary) < 1 or not 0 <= sparsity <= 1:
        raise InputError(f"FLOPs need positive sizes and a sparsity in 0 .. 1, got {sparsity:g}")
    return 24.0 * layers * hidden**2 * (1 - sparsity) + 4.0 * context * hidden * layers + 2.0 * hidden * vocabulary


def train_flops(layers: int, hidden: int, context: int, vocabulary: int, tokens: float, sparsity: float = 0.0) -> float:
    """FLOPs of training on so many tokens: forward, and twice that backward.

    >>> train_flops(1, 1, 1, 1, tokens=2)
    180.0
    """
    return 3 * tokens * forward_flops(layers, hidden, context, vocabulary, sparsity)


def model_flops(model: nn.Module, context: int, masks: Masks | None = None) -> float:
    """F of one token in this model, whatever its family: what its matrices keep, attention, and the head.

    >>> from gossamer.models import tiny_model
    >>> model_flops(tiny_model("gpt2"), 32) == forward_flops(2, 64, 32, 256) - 2 * 2 * 2 * 64 * 128
    True
    """
    found = matrices(model)
    active = sum(int(masks[m.name].sum()) if masks and m.name in masks else m.parameter.numel() for m in found)
    config: Any = model.config
    width = sum(m.weight.shape[1] for m in found if m.role == "o")  # heads · head_dim, of all layers
    head = float(config.hidden_size * config.vocab_size)
    return 2.0 * active + 4.0 * context * width + 2.0 * head


def training_bytes(model: nn.Module, masks: Masks | None = None, value_bytes: int = 4) -> int:
    """Bytes of weights, gradients and two moments if masked entries were not stored, with a bit an entry as index.

    >>> layer = nn.Linear(8, 4, bias=False)
    >>> training_bytes(layer), training_bytes(layer, Masks({"weight": torch.eye(4, 8).bool()}))
    (512, 68)
    """
    total = sum(p.numel() for p in model.parameters())
    gone = masks.total - masks.kept if masks else 0
    return 4 * value_bytes * (total - gone) + (masks.total // 8 if masks else 0)


def finetune(
    model: nn.Module, batches: Iterable[Any], plan: Plan, masks: Masks | None = None, progress: Progress = silent
) -> Training:
    """Phase 2: all weights are trained by a fresh optimizer, those that were masked from zero on.

    Args:
        batches: int64 ``[batch, length]``, or (inputs, targets) where a target of -100 (a prompt's) does not count.
        masks: given, what they remove stays zero: the paper's baseline of sparse fine-tuning.

    >>> from gossamer.models import tiny_model
    >>> model = tiny_model("gpt2")
    >>> SparsePretrain(model, static_random_masks(model, 0.5), Plan(steps=1)).done
    0
    >>> batches = block_batches(torch.arange(64).view(4, 16), 2, 2)
    >>> training = finetune(model, batches, Plan(steps=2, lr=0.01, warmup=1))
    >>> len(Masks.of(model, 0.4))
    0
    """
    return train(model, batches, plan, masks=masks, progress=progress)


_PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt2-small": {"sparsity": 0.75},
    "gpt3-xl": {"sparsity": 0.75, "lr": 2e-4, "batch": 512, "steps": 24796},
    "6.7b-variable": {
        "sparsity": 0.9,
        "lr": 3.6e-4,
        "batch": 1040,
        "steps": 62523,
        "warmup": 177 / 62523,
        "floor": 1.2e-5 / 3.6e-4,
        "dense_steps": 9379,
    },
}


@register("spdf", slot="weights", family="weights", needs=["training"])
class SPDF(WeightMethod):
    """Pre-train with most block weights fixed at zero, then fine-tune all of them.

    Pre-training costs far more than fine-tuning. A random mask on the blocks' matrices, drawn once before the first step, takes
    half or three quarters of their products away; the fine-tuned model is dense, and its zeroed weights have learned. The gap to
    dense pre-training grows with the sparsity and the task's difficulty, and shrinks with the model's size.

    `apply` starts the model anew (set `fresh` to false for a model that was made just now), trains it under the mask on the text
    for `steps`, and then, with `dense_steps`, without it on the same text (variable SPDF). What comes back is a plain model:
    train it on your task with `finetune`. The masks come back too, for going on sparse. The defaults are those of GPT-2 Small;
    `SPDF.published` has the larger recipes.

    Use it to plan pre-training on hardware that skips zeros. Here nothing is faster: dense kernels multiply the zeros, so the
    facts state the FLOPs and bytes that such hardware would save, and the sparsity of the whole model beside that of its
    matrices. Do not mask a trained model with it.

    Thangarasa et al., 2023: "SPDF: Sparse Pre-training and Dense Fine-tuning for Large Language Models".

    >>> from gossamer.models import tiny_model
    >>> method = SPDF(steps=2, batch=2)
    >>> applied = method.apply(tiny_model("gpt2"), torch.arange(64).view(4, 16))
    >>> round(applied.facts["sparsity"], 3), applied.facts["training_flops_ratio"] < 1
    (0.75, True)
    """

    sparsity: float = Field(0.75, ge=0, lt=1, description="share of each block matrix that is zero while pre-training")
    seed: int = Field(0, ge=0, description="of masks, initial weights and batches")
    steps: int = Field(4778, ge=1, description="of sparse pre-training")
    batch: int = Field(256, ge=1, description="token blocks a step")
    lr: float = Field(6e-4, gt=0, description="learning rate at its height")
    warmup: float = Field(716 / 4778, ge=0, lt=1, description="share of the steps that warm up")
    floor: float = Field(0.1, ge=0, le=1, description="share of the learning rate at the end")
    weight_decay: float = Field(0.1, ge=0, description="of AdamW")
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0 leaves it alone")
    dense_steps: int = Field(0, ge=0, description="steps of dense pre-training after it (variable SPDF)")
    fresh: bool = Field(True, description="start from new weights")
    std: float = Field(0.02, gt=0, description="of new weights")

    @classmethod
    def published(cls, name: str) -> Self:
        """The recipe of gpt2-small, gpt3-xl or 6.7b-variable.

        Raises:
            UnknownNameError: another name.

        >>> SPDF.published("6.7b-variable").dense_steps
        9379
        """
        if name not in _PUBLISHED:
            raise UnknownNameError(f"spdf has recipes for {', '.join(_PUBLISHED)}, not {name!r}")
        return cls(**_PUBLISHED[name])

    def plan(self) -> Plan:
        """Of phase 1."""
        return self._plan(self.steps, self.warmup)

    def _plan(self, steps: int, warmup: float) -> Plan:
        return Plan(
            steps=steps,
            lr=self.lr,
            warmup=round(warmup * steps),
            floor=self.floor,
            weight_decay=self.weight_decay,
            clip=self.clip,
        )

    def apply(self, model: nn.Module, tokens: Tensor | None = None, progress: Progress = silent) -> Applied:
        """See `WeightMethod.apply`; the text is trained on."""
        text = self.text(tokens)
        if self.fresh:
            initialize(model, self.std, self.seed)
        masks = static_random_masks(model, self.sparsity, self.seed)
        run = SparsePretrain(model, masks, self.plan())
        training = run.run(block_batches(text, self.batch, self.steps, self.seed), progress=progress)
        curve, per_step = training.curve, self.batch * (text.shape[1] - 1)
        dense, sparse = (model_flops(model, text.shape[1], m) for m in (None, masks))
        if self.dense_steps:
            batches = block_batches(text, self.batch, self.dense_steps, self.seed + 1)
            more = train(model, batches, self._plan(self.dense_steps, 0.1), progress=progress)
            curve = curve + [{**point, "step": point["step"] + self.steps} for point in more.curve]
        total = sum(p.numel() for p in model.parameters())
        facts = {
            "sparsity": masks.sparsity,
            "sparsity_of_the_model": (masks.total - masks.kept) / total,
            "tokens": (self.steps + self.dense_steps) * per_step,
            "training_flops": 3 * per_step * (self.steps * sparse + self.dense_steps * dense),
            "training_flops_ratio": (self.steps * sparse + self.dense_steps * dense)
            / ((self.steps + self.dense_steps) * dense),
            "forward_flops": {"dense": dense, "sparse": sparse},
            "training_bytes": {"dense": training_bytes(model), "sparse": training_bytes(model, masks)},
            "final_loss": curve[-1]["loss"],
            "curve": curve,
        }
        return Applied(model, facts, None if self.dense_steps else masks)
