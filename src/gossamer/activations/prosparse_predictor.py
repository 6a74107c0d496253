"""The activation predictor of approximate engines (PowerInfer, Deja Vu), as ProSparse trains it: one small net a layer.

    p = σ(W_b relu(W_a x))                         active where p > cutoff
    loss = BCE(p, 1[x₁ ≠ 0]) on (x, x₁) pairs, 95 % for training; of all epochs the one with the best recall is kept
    recall = |predicted ∩ active| / |active|       predicted sparsity = share predicted inactive

A predicted neuron is computed exactly, one that was missed is lost: the engine is as good as its recall, and as fast as its
predicted sparsity allows after the predictors' own weights are read.

Decisions where the card leaves room:

* The two layers have biases. Their inner width is `hidden`; the paper does not print it.
* Best recall alone would choose a net that predicts everything; the epochs compete under one cutoff and one loss, which
  keeps them comparable, and both numbers are in the calibration's facts.
* Every token computes its own neurons, in prompts and in batches alike. Only a single row skips the others' weights; several
  rows compute all and zero, because the kernel takes one list of neurons. (Engines compute the union of the rows.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gossamer.activations.base import ActivationHandle, ActivationMethod
from gossamer.activations.relufication import check_relu
from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError, InputError
from gossamer.hf import MLPView, NeuronPolicy, mlp_views, watch
from gossamer.models import fingerprint
from gossamer.patterns import NeuronRule
from gossamer.registry import register

#: Bytes of pairs that are held at a time; a model whose layers need more is read several times.
_HELD = 2 << 30


def recall(predicted: Tensor, active: Tensor) -> float:
    """Share of the active neurons that were predicted, of bool tensors of one shape; 1 where none is active.

    >>> recall(torch.tensor([True, True, False]), torch.tensor([True, False, True]))
    0.5
    """
    total = int(active.sum())
    return int((predicted & active).sum()) / total if total else 1.0


def predicted_sparsity(predicted: Tensor) -> float:
    """Share predicted inactive.

    >>> predicted_sparsity(torch.tensor([True, False, False, False]))
    0.75
    """
    return float((~predicted).double().mean())


class ActivationPredictor(nn.Module):
    """Two linear layers with ReLU between: logits ``[..., D]`` of a layer's neurons from its MLP's input ``[..., d]``.

    >>> ActivationPredictor(8, 4, 32)(torch.zeros(3, 8)).shape
    torch.Size([3, 32])
    """

    def __init__(self, channels: int, hidden: int, neurons: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(channels, hidden), nn.Linear(hidden, neurons)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        out: Tensor = self.second(torch.relu(self.first(x)))
        return out


@dataclass(frozen=True)
class Fit:
    """A trained predictor, what it does on the held-out pairs, the epoch it is of, and all epochs' numbers."""

    predictor: ActivationPredictor
    recall: float
    sparsity: float
    epoch: int
    history: list[dict[str, float]]


def fit_predictor(
    x: Tensor,
    active: Tensor,
    hidden: int,
    *,
    epochs: int = 10,
    batch: int = 256,
    lr: float = 1e-3,
    cutoff: float = 0.5,
    seed: int = 0,
) -> Fit:
    """Train one layer's predictor on pairs, the last 5 % of them (after a shuffle) held out; the epoch of best recall is kept.

    Args:
        x: MLP inputs ``[n, d]``.
        active: bool ``[n, D]``, where x₁ is not 0.

    Raises:
        InputError: fewer than 20 pairs, or shapes that don't fit.
        CalibrationError: `x` is not finite.
    """
    if x.dim() != 2 or active.dim() != 2 or len(x) != len(active) or len(x) < 20 or active.dtype is not torch.bool:
        raise InputError(
            f"a predictor needs x [n,d] and bool [n,D], n >= 20; got {list(x.shape)}, {list(active.shape)}"
        )
    if not bool(torch.isfinite(x).all()):
        raise CalibrationError("inputs of an MLP are not finite: check the model's weights and the texts")
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        net = ActivationPredictor(x.shape[1], hidden, active.shape[1]).to(x.device)
        order = torch.randperm(len(x)).to(x.device)
        held = max(1, len(x) // 20)
        training, testing = order[held:], order[:held]
        optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
        history: list[dict[str, float]] = []
        best: dict[str, Tensor] = {}
        for _ in range(epochs):
            for part in training[torch.randperm(len(training)).to(x.device)].split(batch):
                loss = F.binary_cross_entropy_with_logits(net(x[part].float()), active[part].float())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                predicted = net(x[testing].float()).sigmoid() > cutoff
            found = {"recall": recall(predicted, active[testing]), "sparsity": predicted_sparsity(predicted)}
            if not history or found["recall"] > max(point["recall"] for point in history):
                best = {name: value.clone() for name, value in net.state_dict().items()}
            history.append(found)
    net.load_state_dict(best)
    chosen = max(range(epochs), key=lambda e: history[e]["recall"])
    return Fit(
        net.requires_grad_(False).eval(), history[chosen]["recall"], history[chosen]["sparsity"], chosen, history
    )


@dataclass(frozen=True, eq=False)
class PredictedRule(NeuronRule):
    """What was predicted for each token; with a single row also the `indices` that a kernel takes.

    Attributes:
        predicted: bool, of the shape of the activations.

    >>> rule = PredictedRule(indices=torch.tensor([1], dtype=torch.int32), predicted=torch.tensor([False, True]))
    >>> rule.mask(torch.tensor([3.0, 0.1]))
    tensor([False,  True])
    """

    predicted: Tensor | None = None

    def mask(self, a: Tensor) -> Tensor:
        """The prediction."""
        assert self.predicted is not None
        return self.predicted.reshape(a.shape)


class PredictedNeurons(NeuronPolicy):
    """Computes the neurons that each layer's predictor names from the MLP's input.

    >>> from gossamer.models import tiny_model
    >>> view, net = mlp_views(tiny_model("llama"))[0], ActivationPredictor(64, 8, 128)
    >>> policy = PredictedNeurons([net], cutoff=0.5)
    >>> policy.see(view, view.owner, (torch.ones(1, 1, 64),))
    >>> policy.rule(0).indices.tolist() == (net(torch.ones(64)) > 0).nonzero()[:, 0].tolist()
    True
    """

    def __init__(self, predictors: list[ActivationPredictor], cutoff: float) -> None:
        self.predictors = predictors
        self.logit = float(torch.logit(torch.tensor(cutoff)))
        self._rules: list[NeuronRule | None] = [None] * len(predictors)

    def see(self, view: MLPView, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Predict from the input of a layer's MLP; a hook that runs before it."""
        x, predictor = args[0].detach(), self.predictors[view.index]
        predicted = predictor(x.to(predictor.first.weight.dtype)) > self.logit
        single = predicted.numel() == predicted.shape[-1]
        indices = predicted.flatten().nonzero()[:, 0] if single else predicted.new_zeros(0)
        # Rules on the product are never gathered, so that several rows are masked.
        self._rules[view.index] = PredictedRule(
            indices=indices.to(torch.int32), on="gate" if single else "product", predicted=predicted
        )

    def rule(self, layer: int) -> NeuronRule | None:
        """What was last predicted."""
        return self._rules[layer]

    def report(self) -> dict[str, Any]:
        """`predictor_bytes`, which a decode step reads besides the MLPs' weights."""
        sizes = (p.numel() * p.element_size() for net in self.predictors for p in net.parameters())
        return {"predictor_bytes": sum(sizes)}


@register(
    "relu-predictor",
    slot="activations",
    family="activations",
    name="Predicted ReLU neurons",
    baseline=True,
    needs=["calibration"],
)
class ReLUPredictor(ActivationMethod):
    """Decode only the neurons that small nets predict to be active: the approximate engine that ProSparse is measured with.

    Use it to see what prediction loses and costs against the exact skip of `prosparse`, which needs no predictor. It also
    skips the gate's rows, so it can gain more: the MLP costs 3(1 − s) of its 3 matrices, and the predictor on top.

    >>> ReLUPredictor(hidden=64).cutoff
    0.5
    """

    comparable: ClassVar[bool] = False  # it is for ReLU models

    hidden: int = Field(256, ge=1, description="inner width of the predictors")
    cutoff: float = Field(0.5, gt=0, lt=1, description="probability above which a neuron is computed")
    epochs: int = Field(10, ge=1, description="passes over the pairs")
    pair_batch: int = Field(256, ge=1, description="pairs of a training step")
    predictor_lr: float = Field(1e-3, gt=0, description="learning rate of the predictors (AdamW)")
    seed: int = Field(0, ge=0, description="of first weights, split and order")

    def calibrate(self, model: nn.Module, tokens: Tensor) -> Calibration:
        """Train a predictor for each MLP on token blocks ``[count, block]`` (paper: 400,000 tokens).

        Raises:
            ModelError: the MLPs are no ReLU ones.
            CalibrationError: `tokens` is of another form, or activations are not finite.
        """
        check_relu(model)
        views = mlp_views(model)
        size = next(model.parameters()).element_size()
        pair = max(v.channels * size + v.neurons for v in views)
        group = max(1, _HELD // (pair * max(1, tokens.numel())))
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {"recall": [], "sparsity": [], "pairs": tokens.numel(), "hidden": self.hidden}
        for begin in range(0, len(views), group):
            for view, (x, active) in self._pairs(model, tokens, views[begin : begin + group]).items():
                fit = fit_predictor(
                    x,
                    active,
                    self.hidden,
                    epochs=self.epochs,
                    batch=self.pair_batch,
                    lr=self.predictor_lr,
                    cutoff=self.cutoff,
                    seed=self.seed,
                )
                tensors |= {f"{view.index}.{name}": value.cpu() for name, value in fit.predictor.state_dict().items()}
                facts["recall"].append(fit.recall)
                facts["sparsity"].append(fit.sparsity)
        return Calibration(self.slug, fingerprint(model), tensors, facts)

    @staticmethod
    def _pairs(model: nn.Module, tokens: Tensor, views: list[MLPView]) -> dict[MLPView, tuple[Tensor, Tensor]]:
        chosen = {view.index for view in views}
        inputs: dict[int, list[Tensor]] = {i: [] for i in chosen}
        actives: dict[int, list[Tensor]] = {i: [] for i in chosen}

        def keep(layer: int, values: Tensor, into: dict[int, list[Tensor]], active: bool) -> None:
            if layer in chosen:
                into[layer].append(values != 0 if active else values.clone())

        watch(
            model,
            tokens,
            {
                "mlp.input": partial(keep, into=inputs, active=False),
                "mlp.product": partial(keep, into=actives, active=True),
            },
        )
        return {view: (torch.cat(inputs[view.index]), torch.cat(actives[view.index])) for view in views}

    def neuron_policy(self, model: nn.Module, calibration: Calibration | None) -> PredictedNeurons:
        """The policy with this model's predictors.

        Raises:
            CalibrationError: none, of another model, or damaged.
            ModelError: the MLPs are no ReLU ones.
        """
        learned = self.require(calibration)
        learned.check(fingerprint(model))
        check_relu(model)
        predictors = []
        for view in mlp_views(model):
            names = ("first.weight", "first.bias", "second.weight", "second.bias")
            state = {name: learned.tensors.get(f"{view.index}.{name}") for name in names}
            hidden = state["first.bias"].numel() if state["first.bias"] is not None else 1
            with torch.device("meta"):  # no weights are drawn: attaching leaves the random numbers alone
                net = ActivationPredictor(view.channels, hidden, view.neurons)
            try:
                net.load_state_dict(state, assign=True)
            except (RuntimeError, AttributeError) as error:
                raise CalibrationError(
                    f"the predictor of {view.name} is damaged ({type(error).__name__}): calibrate again"
                ) from None
            parameter = next(view.down.parameters())
            predictors.append(net.to(parameter.device, parameter.dtype).requires_grad_(False).eval())
        return PredictedNeurons(predictors, self.cutoff)

    def attach(self, model: nn.Module, calibration: Calibration | None = None) -> ActivationHandle:
        """Put the predictors before the MLPs; the handle takes them off again.

        Raises:
            ModelError: the MLPs are no ReLU ones, or are under a policy already.
            CalibrationError: as `neuron_policy`.
        """
        handle = super().attach(model, calibration)
        assert handle.mlp is not None
        policy = handle.mlp.policy
        assert isinstance(policy, PredictedNeurons)
        for view in handle.mlp.views:
            target = view.owner if view.gated else view.up
            handle.undo.append(target.register_forward_pre_hook(partial(policy.see, view)).remove)
        return handle
