"""ProSparse: a SiLU or GELU model trained on to have few active neurons (Song et al., arXiv 2402.13516, COLING 2025).

    x₁ = σ(x W_sᵀ) ⊙ (x W₁ᵀ)         FFN(x) = x₁ W₂ᵀ         sparsity = share of zeros in x₁
    1  σ := ReLU, and training goes on for T₀ steps
    2  L = L_lm + λ(t) Σ_layers ‖x₁‖₁,  λ flat at λ₁, then from peak to peak along half sine waves (`SineStages`)
    3  σ(z) := z if z >= t else 0       (FATReLU, no more training)

At decode the exact sparse FFN: z = W_s x; neurons with z < t are skipped, of the others one row of W₁ and one of W₂ is read.

Decisions where the card leaves room:

* The paper does not say how ‖·‖₁ is normalised. Default: the mean over tokens and neurons, summed over layers (`reduction`).
  The published λ are kept as they are printed; they do not transfer between reductions and widths, so tune λ.
* T_i count steps from the first one, those of step 1 included, as in the paper's table. Step number n has λ(n), so that the
  last step of a stage has the stage's peak.
* The 1B model's t and learning rate are not printed; its preset has those of the 7B model.
* The penalty looks at every MLP's down input, so plain MLPs (GPT-2, OPT) work alike: x₁ is their activated up.
* In bfloat16 the kernel compares the gate before it is rounded; a gate within half a step of t may fall on the other side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gossamer.activations.base import ActivationHandle, ActivationMethod
from gossamer.activations.penalty import Reduction, ffn_l1
from gossamer.activations.relufication import (
    activation_of,
    check_relu,
    relufy,
    shift_of,
    shift_relu,
    shift_threshold,
    strict_threshold,
)
from gossamer.calibration import Calibration
from gossamer.errors import InputError, ModelError, UnknownNameError
from gossamer.hf import FixedRules, mlp_views, watch
from gossamer.models.training import Plan, Training, train
from gossamer.patterns import NeuronRule, SineStages
from gossamer.registry import register

Progress = Callable[[str, int, int], None]


def ffn_flops(channels: int, neurons: int, sparsity: float) -> float:
    """Of one token in the exact sparse FFN: the gate is dense, up and down only of neurons that are not zero.

    >>> ffn_flops(4, 10, 0.0), ffn_flops(4, 10, 0.9)
    (240.0, 96.0)
    """
    return 2.0 * channels * neurons * (1 + 2 * (1 - sparsity))


def share_of_zeros(x1: Tensor) -> float:
    """Sparsity of intermediates ``[..., D]``; the same share of gate zeros wherever up is not 0.

    >>> share_of_zeros(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    0.75
    """
    return float((x1 == 0).double().mean())


def layer_sparsity(model: nn.Module, tokens: Tensor) -> list[float]:
    """Share of zeros in x₁ for each MLP over token blocks ``[count, block]``; the model's sparsity is their plain mean.

    Raises:
        CalibrationError: `tokens` is of another form, or the model is in training mode.
        ModelError: no MLP was found.
    """
    zeros = [[0, 0] for _ in mlp_views(model)]

    def see(layer: int, product: Tensor) -> None:
        zeros[layer][0] += int((product == 0).sum())
        zeros[layer][1] += product.numel()

    watch(model, tokens, {"mlp.product": see})
    return [found / max(1, total) for found, total in zeros]


def model_sparsity(model: nn.Module, tokens: Tensor) -> float:
    """Mean of `layer_sparsity`, every layer with the same weight."""
    layers = layer_sparsity(model, tokens)
    return sum(layers) / len(layers)


class FATReLURules(FixedRules):
    """Neurons whose ReLU output is not below t, in every MLP.

    >>> from gossamer.models import tiny_model
    >>> FATReLURules(tiny_model("llama"), 0.5).rule(0).mask(torch.tensor([0.25, 0.5, 1.0]))
    tensor([False,  True,  True])
    """

    def __init__(self, model: nn.Module, t: float) -> None:
        rules = []
        for view in mlp_views(model):
            weight = next(view.gate.parameters())
            dtype = weight.dtype if weight.is_floating_point() else torch.float32
            rules.append(NeuronRule(threshold=strict_threshold(t, dtype).to(weight.device)))
        super().__init__(rules)
        self.t = t

    def report(self) -> dict[str, Any]:
        """t."""
        return {"relu_threshold": self.t}


_PUBLISHED: dict[str, dict[str, Any]] = {
    "7b": {
        "relu_steps": 5000,
        "peaks": (5e-3, 5e-2, 5e-2, 2e-1, 2e-1),
        "ends": (6000, 10000, 12000, 16000, 16500),
        "threshold": 0.01,
        "lr": 3e-5,
    },
    "13b": {
        "relu_steps": 5500,
        "peaks": (5e-3, 1e-2, 1e-2, 2e-2, 2e-2),
        "ends": (6750, 10750, 11000, 15000, 16000),
        "threshold": 0.01,
        "lr": 5e-5,
    },
    "1b": {
        "relu_steps": 10000,
        "peaks": (1e-3, 5e-3, 5e-3, 5e-2, 5e-2),
        "ends": (15000, 20000, 25000, 35000, 95000),
        "threshold": 0.01,
        "lr": 3e-5,
        "sft_factor": 1e-2,
    },
}


@register("prosparse", slot="activations", family="activations", needs=["training"])
class ProSparse(ActivationMethod):
    """ReLU, a slowly rising L1 penalty, and a lifted threshold: most neurons of each token become exact zeros.

    Use it when a SiLU or GELU model can be trained on (tens of billions of tokens at the paper's scale). `train` runs the
    three steps; the checkpoint is an ordinary ReLU one. `attach` skips the zeros at decode: exact, and cheaper by up and
    down of the inactive neurons, so an MLP costs 1 + 2(1 − s) of its 3 matrices. Gains shrink in batches, where the union of
    the rows' neurons is read. Presets: ``ProSparse.preset("7b")``; baselines of equal length: ``.arm("vanilla")``.

    Paper: ProSparse: Introducing and Enhancing Intrinsic Activation Sparsity within Large Language Models, arXiv 2402.13516.

    >>> method = ProSparse.preset("7b").scaled(1650)
    >>> method.steps, method.schedule()(1600)
    (1650, 0.2)
    """

    comparable: ClassVar[bool] = False  # it is for models that were trained with it

    relu_steps: int = Field(5000, ge=0, description="T₀, steps of training with ReLU before the penalty")
    peaks: tuple[float, ...] = Field((5e-3, 5e-2, 5e-2, 2e-1, 2e-1), description="λ at the end of each stage")
    ends: tuple[int, ...] = Field(
        (6000, 10000, 12000, 16000, 16500), description="step at which each stage ends, counted from the first of all"
    )
    reduction: Reduction = Field("mean", description="of ‖x₁‖₁: mean over tokens and neurons, token: over tokens, sum")
    threshold: float | None = Field(
        None, ge=0, description="t of FATReLU, set after training; at attach it overrides the model's own"
    )
    bias: float = Field(
        0.0, ge=0, description="b, the shifted-ReLU baseline: max(z − b, 0) in place of ReLU (paper: 0.1)"
    )
    sft_factor: float = Field(
        1e-2, ge=0, description="constant λ of fine-tuning a sparse model: smaller than λ_S, not 0"
    )
    lr: float = Field(3e-5, gt=0, description="learning rate at its height, then a cosine")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.peaks or self.ends:
            self.schedule()
        elif not self.relu_steps:
            raise ValueError("training needs steps: relu_steps, or stages")
        if self.bias and self.threshold is not None:
            raise ValueError("a shifted ReLU (bias) has no threshold: choose one")
        return self

    @classmethod
    def preset(cls, size: Literal["7b", "13b", "1b"]) -> Self:
        """The published schedule of a model.

        Raises:
            UnknownNameError: there is none of that name.
        """
        if size not in _PUBLISHED:
            raise UnknownNameError(f"there is no published schedule {size!r}: choose from {', '.join(_PUBLISHED)}")
        return cls(**_PUBLISHED[size])

    def arm(self, kind: Literal["vanilla", "shifted", "fixed"], value: float = 0.1) -> Self:
        """A baseline with as many steps: step 1 alone; with `max(z − value, 0)`; or with a constant λ = value after step 1."""
        changes: dict[str, Any] = {"peaks": (value,), "ends": (self.steps,)}
        if kind != "fixed":
            changes = {"peaks": (), "ends": (), "relu_steps": self.steps, "threshold": None}
            changes["bias"] = value if kind == "shifted" else 0.0
        return type(self)(**{**self.model_dump(), **changes})

    def scaled(self, steps: int) -> Self:
        """The same stages over a run of `steps` steps.

        Raises:
            InputError: so few steps that a stage is left with none.
        """
        relu_steps, *ends = (round(border * steps / self.steps) for border in (self.relu_steps, *self.ends))
        return type(self)(**{**self.model_dump(), "relu_steps": relu_steps, "ends": tuple(ends)})

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return self.ends[-1] if self.ends else self.relu_steps

    def schedule(self) -> Callable[[float], float]:
        """λ of step 1, 2, …"""
        return SineStages(self.peaks, self.ends, self.relu_steps) if self.peaks or self.ends else _none

    def train(
        self,
        model: nn.Module,
        batches: Iterable[Tensor],
        plan: Plan | None = None,
        *,
        after_step: Callable[[int], None] | None = None,
        progress: Progress = lambda what, done, total: None,
    ) -> Training:
        """All three steps on a causal language model, in place; it is then saved as any other.

        Args:
            batches: int64 ``[batch, context + 1]``, as many as there are steps.
            plan: the optimizer's (default: AdamW, `lr`, a cosine); of `steps` steps, see `scaled`.

        Raises:
            InputError: another number of steps, too few batches, or a loss that is not finite.
            ModelError: no MLP was found, or its activation cannot be changed.
        """
        plan = plan or Plan(steps=self.steps, lr=self.lr)
        if plan.steps != self.steps:
            raise InputError(
                f"the stages end after {self.steps} steps, the plan has {plan.steps}: use .scaled({plan.steps})"
            )
        relufy(model)
        if self.bias:
            shift_relu(model, self.bias)
        with ffn_l1(model, self.schedule(), self.reduction) as penalty:
            result = train(model, batches, plan, penalty=penalty, after_step=after_step, progress=progress)
        if self.threshold is not None:
            shift_threshold(model, self.threshold)
        return result

    def finetune(
        self,
        model: nn.Module,
        batches: Iterable[Tensor],
        plan: Plan,
        *,
        progress: Progress = lambda what, done, total: None,
    ) -> Training:
        """Supervised fine-tuning of a sparse model, with the constant penalty `sft_factor`; its activation stays as it is.

        Raises:
            InputError: as `train`.
            ModelError: the model is no ReLU model.
        """
        check_relu(model)
        with ffn_l1(model, self.sft_factor, self.reduction) as penalty:
            return train(model, batches, plan, penalty=penalty, progress=progress)

    def neuron_policy(self, model: nn.Module, calibration: Calibration | None) -> FATReLURules:
        """The threshold, from the settings or else from the model's configuration."""
        kind, value = shift_of(model)
        if kind == "shiftrelu":
            if self.threshold is not None:
                raise ModelError("this model has a shifted ReLU: leave the threshold out")
            return FATReLURules(model, 0.0)
        return FATReLURules(model, value if self.threshold is None else self.threshold)

    def attach(self, model: nn.Module, calibration: Calibration | None = None) -> ActivationHandle:
        """Skip the zeros; the shift that the model's configuration remembers holds while attached, whoever loaded it.

        Raises:
            ModelError: the model's MLPs have no ReLU, or are under a policy already.
        """
        check_relu(model)
        kind, value = shift_of(model)
        # The rule does FATReLU's work on a plain ReLU, which is what the kernel knows.
        plain = activation_of(kind, value if kind == "shiftrelu" else 0.0)
        undo = [view.replace_activation(plain) for view in mlp_views(model)]
        try:
            handle = super().attach(model, calibration)
        except BaseException:
            for step in undo:
                step()
            raise
        handle.undo[:0] = undo
        assert handle.mlp is not None
        run = handle.mlp
        handle.reports.append(lambda: {"sparsity": 1 - run.report()["neurons_kept"]})
        return handle


def _none(t: float) -> float:
    return 0.0
