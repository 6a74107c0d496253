"""PAT as a method: pruning-aware tuning of a decoder on text, then the exact merge. The formulas are in `pat_tuning`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.models.lora import LoRA
from gossamer.models.training import Plan, block_batches, train
from gossamer.registry import register
from gossamer.weights.base import Applied, Progress, WeightMethod, parameter_count, silent
from gossamer.weights.pat_tuning import HOLD, Gate, PATTuning, Variant

#: Every linear layer of a Llama-like block.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@register("pat", slot="weights", family="weights", needs=["training"])
class PAT(WeightMethod):
    """Fine-tune a decoder and learn meanwhile which hidden channels it can lose; a narrower plain model comes out.

    Use it when a model of the Llama, Qwen, Mistral or Gemma kind is to be tuned on your text anyway and should come out smaller.
    At a quarter of the hidden channels every matrix, the embedding and the head are a quarter smaller, and the model runs with
    plain transformers: no kernel, no mask. The KV cache stays as large as it was (heads are not pruned). Training costs what
    LoRA costs plus 4·d·r_h FLOPs a token for each of the 2·layers + 1 mixing modules.

    The count of channels is pulled to its target and comes out near it; choose `keep` with the GEMM's multiple in mind. The
    mask is learned at the speed of `lr`: proxies must travel some 0.5 before 0.8 of the milestone, so a run of a few hundred
    steps needs a rate of 1e-3 and more where the paper's 30,000 steps need 5e-5. See `facts["separation"]`: the spread of the
    proxies at that step. LayerNorm models (GPT-2) are refused: convert them to RMSNorm first.

    Not built: gradient checkpointing, the paged optimizer, and the instruction template of the released code (the text is
    trained on as it is given).

    Paper: PAT: Pruning-Aware Tuning for Large Language Models, AAAI 2025, arXiv 2408.14721.

    >>> from gossamer.models import tiny_model
    >>> applied = PAT(keep=0.75, steps=60, lr=0.02).apply(tiny_model("llama"), torch.arange(128).view(4, 32))
    >>> applied.model.config.hidden_size == applied.facts["hidden_size"]["after"] < 64
    True
    """

    keep: float = Field(0.75, gt=0, le=1, description="share of the hidden channels to keep; N is this share of them")
    hsm_rank: float | int = Field(
        0.05, gt=0, description="r_h, inner width of the mixing modules: share of hidden or count"
    )
    lora_rank: int = Field(20, ge=0, description="of the adapters on all linear layers; 0: none")
    lora_alpha: float = Field(4.0, gt=0, description="their scale is alpha / rank")
    lora_dropout: float = Field(
        0.05, ge=0, lt=1, description="share of input channels that each step leaves out of them"
    )
    steps: int = Field(1000, ge=4, description="of training (paper: 30,000 for Llama-2-7B)")
    milestone: float = Field(1 / 3, gt=0, le=1, description="share of the steps after which the mask is settled")
    batch: int = Field(8, ge=1, description="rows of text a step (paper: 128)")
    lr: float = Field(1e-3, gt=0, description="of all that is trained (paper: 5e-5 at 30,000 steps)")
    warmup: int = Field(100, ge=0, description="steps of warm-up; a tenth of the run at most")
    clip: float = Field(0.3, ge=0, description="largest norm of the gradient; 0: any")
    variant: Variant = Field("code", description="formulas of the released code, or of the paper")
    gate: Gate = Field("unified", description="unified: the mask is learned; fixed: the last channels fade out")
    seed: int = Field(0, ge=0, description="of the modules and of the order of the text")

    @classmethod
    def with_kept(cls, share: float, model: nn.Module) -> Self:
        """The matrices of the blocks shrink as the hidden size does."""
        return cls(keep=share)

    def attach_tuning(self, model: nn.Module) -> PATTuning:
        """The modules on a model, for a training loop of your own.

        Raises:
            ModelError: the family is not supported, or weights that are not finite.
        """
        lora = LoRA(self.lora_rank, self.lora_alpha, self.lora_dropout, TARGETS, self.seed) if self.lora_rank else None
        return PATTuning(
            model, self.keep, self.hsm_rank, lora, self.steps, self.milestone, self.variant, self.gate, self.seed
        )

    def plan(self) -> Plan:
        """AdamW, warm-up, cosine to zero."""
        return Plan(
            self.steps, self.lr, min(self.warmup, self.steps // 10), floor=0.0, betas=(0.9, 0.999), clip=self.clip
        )

    def tune(self, model: nn.Module, batches: Iterator[Tensor], progress: Progress = silent) -> tuple[PATTuning, Any]:
        """Train on batches int64 ``[batch, context + 1]``; the modules are still on, for `PATTuning.merge`.

        Returns:
            The modules, and facts: the curve, how many channels were open at a hundred steps, the spread of the proxies when
            they settle.

        Raises:
            InputError: too few batches, or a loss that is not finite.
        """
        tuning = self.attach_tuning(model)
        open_: list[int] = []
        facts: dict[str, Any] = {"open": open_}

        def after(step: int) -> None:
            if step % max(1, self.steps // 100) == 0 or step == self.steps - 1:
                open_.append(len(tuning.kept()))
            tuning.step(step + 1)
            if step + 1 == int(HOLD * tuning.milestone):
                facts["separation"] = float(tuning.proxy.detach().std())

        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)  # of the adapters' dropout
                done = train(
                    model,
                    batches,
                    self.plan(),
                    penalty=lambda step: tuning.loss(),
                    after_step=after,
                    parameters=list(tuning.parameters()),
                    progress=progress,
                )
        except BaseException:
            tuning.detach()
            raise
        facts["curve"] = done.curve
        return tuning, facts

    def apply(self, model: nn.Module, tokens: Tensor | None = None, progress: Progress = silent) -> Applied:
        """Tune on blocks of text and merge; a new model comes back, and the adapters are left merged into the old one.

        Raises:
            InputError: no text, or no channel was kept.
            ModelError: the family is not supported.
        """
        text = self.text(tokens)
        before, width = parameter_count(model), int(getattr(getattr(model, "config", None), "hidden_size", 0))
        tuning, facts = self.tune(model, block_batches(text, self.batch, self.steps, self.seed), progress)
        target = tuning.keep
        try:
            small = tuning.merge(progress)
        finally:
            tuning.detach()
        facts["parameters"] = {"before": before, "after": parameter_count(small)}
        facts["hidden_size"] = {"before": width, "target": target, "after": cast(Any, small).config.hidden_size}
        return Applied(small, facts)
