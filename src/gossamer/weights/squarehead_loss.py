"""SquareHead's loss: a student's blocks follow those of a frozen dense teacher, each scaled by the teacher's energy.

    D_l    mean((h_l^S − h_l^T)²) / (mean((h_l^T)²) + ε)     h_l: output of block l; means over chosen tokens and width
    loss   λ_CE · CE + λ_KL · KL + λ_SQ · Σ_l D_l            a sum over blocks, all of one weight
    KL     T² / n · Σ KL(softmax(z^T / T) ‖ softmax(z^S / T))  over the n positions with a target

The sum over blocks lets λ_SQ = 1 dominate the cross-entropy at the start, which is intended.

Decisions where the card leaves room:

* In a decoder, position t has a target if token t + 1 counts and neither is padding, for CE, KL and ``tokens="answer"`` alike.
* An encoder's blocks (of an encoder-decoder) are compared at all positions, padding too, as in the released code; a
  decoder's there where a label counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.errors import InputError, ModelError

Eps = Literal["bf16"] | float
Tokens = Literal["attention", "answer"]
BF16_EPS = 2.0**-7
IGNORED = -100


def square_head(student: Tensor, teacher: Tensor, chosen: Tensor | None = None, eps: Eps = "bf16") -> Tensor:
    """D of one block, float32 scalar: squared error over the teacher's energy.

    Args:
        student, teacher: hidden states ``[batch, length, hidden]``.
        chosen: bool ``[batch, length]``, the tokens that count (default: all). Others are not looked at.
        eps: added to the energy; ``"bf16"`` is 2⁻⁷. Keep it far below the energy, or the loss is not normalised.

    Raises:
        InputError: shapes that differ, no token chosen, or a negative eps.

    >>> h = torch.ones(1, 2, 4)
    >>> float(square_head(3 * h, h, eps=0.0))
    4.0
    """
    if student.shape != teacher.shape or (chosen is not None and chosen.shape != student.shape[:-1]):
        raise InputError(
            f"square_head: hidden states {list(student.shape)} and {list(teacher.shape)} must be alike, tokens "
            f"{None if chosen is None else list(chosen.shape)} must fit"
        )
    if chosen is not None:
        student, teacher = student[chosen.bool()], teacher[chosen.bool()]
    if not teacher.numel():
        raise InputError("square_head: no token is chosen")
    goal = teacher.float()
    return (student.float() - goal).square().mean() / (goal.square().mean() + _eps(eps))


def _eps(eps: Eps) -> float:
    value = BF16_EPS if eps == "bf16" else float(eps)
    if not (0 <= value < math.inf):
        raise InputError(f"eps must be 'bf16' or a number of at least 0, got {eps!r}")
    return value


def logit_divergence(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """The KL term, scalar: mean over positions that have a target, times T².

    Args:
        student, teacher: logits ``[..., classes]``.
        targets: int64 ``[...]``; -100 doesn't count. The positions' own targets, shifted already.

    Raises:
        InputError: shapes that differ, no target, or a temperature that is not positive.

    >>> z = torch.tensor([[0.0, 0.0], [5.0, 1.0]])
    >>> t = torch.tensor([[math.log(3.0), 0.0], [9.0, 9.0]])
    >>> round(float(logit_divergence(z, t, torch.tensor([1, -100]))), 4)  # log 2 - H(3/4)
    0.1308
    """
    if student.shape != teacher.shape or targets.shape != student.shape[:-1] or not 0 < temperature < math.inf:
        raise InputError(
            f"logits {list(student.shape)}, {list(teacher.shape)}, targets {list(targets.shape)} and temperature "
            f"{temperature:g} do not fit"
        )
    counted = targets != IGNORED
    if not bool(counted.any()):
        raise InputError("no position has a target")
    mine, goal = (F.log_softmax(z[counted].float() / temperature, dim=-1) for z in (student, teacher))
    return F.kl_div(mine, goal, log_target=True, reduction="sum") * temperature**2 / counted.sum()


class SquareHeadLoss:
    """The whole loss against a frozen teacher; `train(model, batches, plan, loss=SquareHeadLoss(teacher), masks=masks)`.

    A batch is int64 ``[batch, length + 1]`` (bytes or tokens), a pair (inputs, targets), or a mapping as transformers models
    take it: ``input_ids`` (or what the model has), ``attention_mask``, ``labels``. Labels of a model that generates are
    shifted here, those of others are not; a classifier's are ``[batch]``.

    Args:
        teacher: dense, fine-tuned on the same task, with the student's shape. It is put in eval mode and frozen.
        ce, kl, squarehead: weights of the parts. MPT and T5: 1, 0, 1; Whisper: 0.5, 0, 1; plain distillation: 1, 1, 0.
        eps: of `square_head`: ``"bf16"`` as for MPT, 1e-8 as for T5 and Whisper.
        tokens: whose hidden states are compared: `attention` (all but padding) or `answer` (those with a target).
        temperature: of the KL part.

    Attributes:
        parts: `ce`, `kl`, `squarehead` of the last call, without their weights; NaN where it was not computed.
        layers: D of each block in the last call; an encoder's before its decoder's.

    Raises:
        InputError: weights, eps or temperature out of range, or an unknown choice of tokens.

    >>> from gossamer.models import tiny_model
    >>> teacher, student = tiny_model("llama"), tiny_model("llama")
    >>> loss = SquareHeadLoss(teacher)
    >>> value = loss(student, torch.arange(34).view(2, 17))
    >>> loss.parts["squarehead"], len(loss.layers)
    (0.0, 2)
    """

    def __init__(
        self,
        teacher: nn.Module,
        ce: float = 1.0,
        kl: float = 0.0,
        squarehead: float = 1.0,
        eps: Eps = "bf16",
        tokens: Tokens = "attention",
        temperature: float = 1.0,
    ) -> None:
        weights = (ce, kl, squarehead)
        if not all(0 <= w < math.inf for w in weights) or not any(weights) or not 0 < temperature < math.inf:
            raise InputError(
                f"weights must be at least 0 and not all 0, the temperature positive; got {weights}, {temperature:g}"
            )
        if tokens not in ("attention", "answer"):
            raise InputError(f"tokens is attention or answer, got {tokens!r}")
        _eps(eps)
        self.teacher = teacher.eval().requires_grad_(False)
        self.ce, self.kl, self.squarehead = weights
        self.eps, self.tokens, self.temperature = eps, tokens, temperature
        self.parts: dict[str, float] = {}
        self.layers: list[float] = []

    def __call__(self, student: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch, scalar.

        Raises:
            InputError: a batch of another form, or one in which nothing counts.
            ModelError: teacher and student differ in shape, or give no hidden states.
        """
        if not all(hasattr(m, "can_generate") for m in (student, self.teacher)):
            raise ModelError("teacher and student must be transformers models; use square_head on others' features")
        if student is self.teacher:
            raise InputError("teacher and student are one model: train a copy of it")
        inputs, targets, attended = _read(student, batch)
        out = forward(student, inputs, hidden=self.squarehead > 0)
        nothing = out.logits.new_full((), math.nan)
        parts = {"ce": nothing, "kl": nothing, "squarehead": nothing}
        if self.ce:
            parts["ce"] = F.cross_entropy(out.logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED)
        if self.kl or self.squarehead:
            with torch.no_grad():
                goal = forward(self.teacher, inputs, hidden=self.squarehead > 0)
            if out.logits.shape != goal.logits.shape:
                raise ModelError(f"the teacher's logits {list(goal.logits.shape)} are not like the student's")
            if self.kl:
                parts["kl"] = logit_divergence(out.logits, goal.logits, targets, self.temperature)
            if self.squarehead:
                distances = self._distances(out, goal, targets, attended)
                self.layers = [float(d.detach()) for d in distances]
                parts["squarehead"] = torch.stack(distances).sum()
        self.parts = {name: float(part.detach()) for name, part in parts.items()}
        weighted = ((self.ce, parts["ce"]), (self.kl, parts["kl"]), (self.squarehead, parts["squarehead"]))
        return torch.stack([weight * part for weight, part in weighted if weight]).sum()

    def _distances(self, out: Any, goal: Any, targets: Tensor, attended: Tensor | None) -> list[Tensor]:
        mine, its = hidden_states(out), hidden_states(goal)
        if [h.shape for h in mine] != [h.shape for h in its]:
            raise ModelError("teacher and student must have the same number of blocks and the same width")
        encoders = len((getattr(out, "encoder_hidden_states", None) or ())[1:])
        answer = targets != IGNORED
        if encoders:
            chosen: list[Tensor | None] = [None] * encoders + [answer] * (len(mine) - encoders)
        elif self.tokens == "attention":
            chosen = [attended] * len(mine)
        else:
            if targets.dim() < 2:
                raise InputError('tokens="answer" needs a target for each position, not one for each sequence')
            chosen = [answer if attended is None else answer & attended] * len(mine)
        return [square_head(s, t, c, self.eps) for s, t, c in zip(mine, its, chosen, strict=True)]


def _read(model: Any, batch: Any) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """(the model's inputs, targets of its positions, tokens that are no padding)."""
    if isinstance(batch, Tensor) and batch.dim() == 2 and batch.shape[1] > 1:
        return {"input_ids": batch[:, :-1]}, batch[:, 1:], None
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return {"input_ids": batch[0]}, batch[1], None
    if not isinstance(batch, Mapping) or "labels" not in batch:
        raise InputError("a batch is [batch, length + 1], (inputs, targets), or a mapping with labels")
    inputs, targets = {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
    attended = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
    if getattr(model.config, "is_encoder_decoder", False):
        if "decoder_input_ids" not in inputs:
            inputs["labels"] = targets  # the model shifts them to its decoder's inputs
    elif targets.dim() == 2 and model.can_generate():
        targets = F.pad(targets[:, 1:], (0, 1), value=IGNORED)
        if attended is not None:  # neither a padded token as target nor one to predict from, whatever the labels say
            targets = targets.masked_fill(~(attended & F.pad(attended[:, 1:], (0, 1))), IGNORED)
    return inputs, targets, attended


def forward(model: Any, inputs: Mapping[str, Tensor], hidden: bool) -> Any:
    """What the model gives for its inputs, without a cache."""
    caches = {"use_cache": False} if model.can_generate() else {}
    return model(**inputs, **caches, output_hidden_states=hidden, return_dict=True)


def hidden_states(out: Any) -> list[Tensor]:
    """Outputs of the blocks without the embeddings; an encoder's before its decoder's."""
    stacks = [getattr(out, name, None) for name in ("encoder_hidden_states", "decoder_hidden_states", "hidden_states")]
    states = [h for stack in stacks if stack for h in stack[1:]]
    if not states:
        raise ModelError("the model gives no hidden states")
    return states
