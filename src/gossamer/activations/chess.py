"""CHESS: a gate threshold for each channel, and masked inputs of the query and output projections (He et al., EMNLP 2024).

Dropping neuron i of a gated MLP costs about |gate_i · up_i|. up_i is not known yet when the gate is, so its moment over a
calibration text stands for it:

    abs:  S = |gate| · E|up_i|,      τ_i = T / E|up_i|              T = s-quantile of S in the layer
    sq:   S = gate² · E[up_i²],      τ_i = √(T / E[up_i²])

A neuron is kept where |gate_i| > τ_i. In attention the query projection reads h · 1[|h| > t_in] and the output projection
o · 1[|o| > t_out], with the s-quantiles of |h| and |o| of the layer; keys and values read the whole h. Masks hold for prompts
and for decode steps; nothing kept is rescaled.

Decisions where the card leaves room:

* The moment is "sq", as in the code released with the paper; "abs" is the later release's. Both are calibrated at once.
* Quantiles are those of all values pooled; `quantiles="mean"` averages quantiles and moments over groups of blocks, as both
  releases do (the first: groups of 4 windows, the second: 1 document).
* Moments are raised to 1e-8 of their mean: a dead channel gets a huge, finite threshold.
* Equality drops, as in the first release.
* An MLP without a gate has no product to judge: its part is refused there; CATS serves those.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.activations.base import ActivationMethod, Progress, device_of
from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError, ModelError
from gossamer.hf import FixedRules, NeuronPolicy, attention_projections, mlp_views, watch
from gossamer.hf.taps import Tap
from gossamer.models import fingerprint
from gossamer.patterns import MagnitudeSketch, NeuronRule, threshold_at
from gossamer.registry import register

Moment = Literal["abs", "sq"]
MOMENTS: tuple[Moment, ...] = ("abs", "sq")


def clamp_moment(moment: Tensor) -> Tensor:
    """Moments ``[..., D]`` raised to 1e-8 of their layer's mean, so that they divide."""
    floor = moment.double().mean(-1, keepdim=True) * 1e-8
    return moment.maximum(floor.to(moment.dtype).clamp_min(torch.finfo(torch.float32).tiny))


def importance(gate: Tensor, moment: Tensor, kind: Moment) -> Tensor:
    """S, float32 like ``gate [N, D]``: the expected size (abs) or square (sq) of each product, for moments ``[D]``.

    >>> importance(torch.tensor([[2.0, -1.0]]), torch.tensor([1.0, 3.0]), "abs")
    tensor([[2., 3.]])
    """
    size = gate.float().abs() if kind == "abs" else gate.float().square()
    return size * moment


def channel_thresholds(total: Tensor, moment: Tensor, kind: Moment) -> Tensor:
    """τ ``[..., D]`` from T ``[...]`` and the clamped moments ``[..., D]``."""
    ratio = total[..., None] / moment
    return ratio if kind == "abs" else ratio.sqrt()


def layer_bytes(
    mlp: tuple[int, int],
    projections: tuple[int, int, int],
    kept: tuple[float, float, float] = (1.0, 1.0, 1.0),
    element_size: int = 4,
) -> float:
    """Bytes of weights that one layer reads for a token.

    Args:
        mlp: d and D.
        projections: weights of the query, the output, and both key and value matrices.
        kept: shares of neurons, of the query's and of the output's inputs that are kept.
    """
    (channels, neurons), (query, output, key_value) = mlp, projections
    mlp_part = channels * neurons * (1 + 2 * kept[0])
    return element_size * (mlp_part + kept[1] * query + kept[2] * output + key_value)


@register("chess", slot="activations", family="activations", needs=["calibration"])
class CHESS(ActivationMethod):
    """Skip neurons by a gate threshold for each channel, low where up is large; optionally mask attention's inputs too.

    Use it where one threshold per layer (`cats`) loses too much: at equal sparsity it costs the same and is nearer to the
    dense model, above all from 70 % on. `parts="both"` also reads less of the query and output projections. Needs gated MLPs
    (Llama, Mistral, Qwen, Gemma, Phi-3) for the MLP's part, separate query and output matrices for attention's; the latter
    alone stacks with another method on the MLPs.

    Paper: CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and Selective Sparsification, arXiv 2409.01366.

    >>> CHESS(parts="attention").slots
    ('activations.attention',)
    """

    sparsity: float = Field(0.5, ge=0, le=1, description="s, share of gate activations (and inputs) that are dropped")
    moment: Moment = Field("sq", description="of up: mean square (sq) or mean magnitude (abs)")
    parts: Literal["mlp", "attention", "both"] = Field(
        "mlp", description="what is made sparse: MLPs, the query's and output's inputs in attention, or both"
    )
    quantiles: Literal["pooled", "mean"] = Field(
        "pooled", description="of all calibration values, or means over groups of blocks as released"
    )
    group: int = Field(4, ge=1, description="blocks of a group, where quantiles are means")

    @property
    def slots(self) -> tuple[str, ...]:
        """Of the parts."""
        names = {"mlp": "activations", "attention": "activations.attention"}
        return tuple(name for part, name in names.items() if self.parts in (part, "both"))

    def calibrate(self, model: nn.Module, tokens: Tensor, progress: Progress | None = None) -> Calibration:
        """Two passes over token blocks ``[count, block]``: moments of up, then the scores that they weigh.

        What the model has is learned, both parts and both moments, so that one calibration serves all settings but
        `quantiles`.

        Raises:
            CalibrationError: no token blocks, a model in training mode, or activations that are not finite.
            ModelError: the model lacks what `parts` asks for.
        """
        views, taps = mlp_views(model), ["mlp.up"]
        if not all(view.gated for view in views):
            if self.parts != "attention":
                raise ModelError(f"{self.slug} needs gated MLPs, and {type(model).__name__} has plain ones: use cats")
            taps = []
        try:
            attention_projections(model)
            taps += ["attention.input", "attention.output"]
        except ModelError:
            if self.parts != "mlp":
                raise
        groups = tokens.split(self.group) if self.quantiles == "mean" and tokens.dim() == 2 else [tokens]
        found = [_first_pass(model, group, cast(list[Tap], taps), progress) for group in groups]
        tensors = {name: torch.stack([part[name] for part in found]).mean(0).float() for name in found[0]}
        if "mlp.up" in taps:
            tables = [_second_pass(model, group, tensors, progress) for group in groups]
            for kind in MOMENTS:
                tensors[f"scores.{kind}"] = torch.stack([part[kind] for part in tables]).mean(0)
        facts = {"tokens": tokens.numel(), "quantiles": self.quantiles}
        return Calibration(self.slug, fingerprint(model), tensors, facts)

    def thresholds(self, calibration: Calibration) -> Tensor:
        """τ of every layer, float32 ``[L, D]``."""
        total = threshold_at(calibration.tensors[f"scores.{self.moment}"], self.sparsity)
        return channel_thresholds(total, clamp_moment(calibration.tensors[f"moment.{self.moment}"]), self.moment)

    def learned(self, model: nn.Module, calibration: Calibration | None, *names: str) -> Calibration:
        """As in `ActivationMethod`, and with this setting of `quantiles`."""
        calibration = super().learned(model, calibration, *names)
        made = calibration.facts.get("quantiles")
        if made != self.quantiles:
            raise CalibrationError(f"{self.slug}: calibrated with quantiles={made}: set that, or calibrate again")
        return calibration

    def neuron_policy(self, model: nn.Module, calibration: Calibration | None) -> NeuronPolicy | None:
        """A threshold for each neuron, where MLPs are served.

        Raises:
            CalibrationError: none, of another method or model, for other quantiles, or without the MLPs.
        """
        if self.parts == "attention":
            return None
        calibration = self.learned(model, calibration, f"scores.{self.moment}", f"moment.{self.moment}")
        views = mlp_views(model)
        return FixedRules(
            NeuronRule(threshold=t.to(device_of(v.down)))
            for t, v in zip(self.thresholds(calibration), views, strict=True)
        )

    def channel_rules(self, model: nn.Module, calibration: Calibration | None) -> list[tuple[nn.Module, NeuronRule]]:
        """Thresholds for the inputs of the query and output projections, where attention is served.

        Raises:
            CalibrationError: as above, or without attention.
        """
        if self.parts == "mlp":
            return []
        calibration = self.learned(model, calibration, "attention.input", "attention.output")
        t_in, t_out = (
            threshold_at(calibration.tensors[f"attention.{side}"], self.sparsity) for side in ("input", "output")
        )
        rules = []
        for layer, pair in enumerate(attention_projections(model)):
            for module, t in zip(pair, (t_in[layer], t_out[layer]), strict=True):
                rules.append((module, NeuronRule(threshold=t.to(device_of(module)))))
        return rules


def _first_pass(model: nn.Module, tokens: Tensor, taps: list[Tap], progress: Progress | None) -> dict[str, Tensor]:
    """Moments of up, float64 ``[L, D]``, and quantile tables of attention's inputs, ``[L, 1001]``."""
    sums: dict[str, dict[int, Tensor]] = {kind: {} for kind in MOMENTS}
    sketches: dict[Tap, dict[int, MagnitudeSketch]] = {tap: {} for tap in taps if tap != "mlp.up"}

    def up(layer: int, values: Tensor) -> None:
        for kind in MOMENTS:
            size = values.double().abs() if kind == "abs" else values.double().square()
            sums[kind][layer] = sums[kind].get(layer, 0) + size.sum(0).cpu()

    def see(tap: Tap, layer: int, values: Tensor) -> None:
        sketches[tap].setdefault(layer, MagnitudeSketch()).add(values)

    watchers = {tap: up if tap == "mlp.up" else partial(see, tap) for tap in taps}
    watch(model, tokens, watchers, *([progress] if progress else []))
    found: dict[str, Tensor] = {tap: _stack({i: s.table() for i, s in by.items()}) for tap, by in sketches.items()}
    if "mlp.up" in taps:
        found |= {f"moment.{kind}": _stack(sums[kind]) / tokens.numel() for kind in MOMENTS}
    return found


def _second_pass(
    model: nn.Module, tokens: Tensor, tensors: dict[str, Tensor], progress: Progress | None
) -> dict[Moment, Tensor]:
    """Quantile tables of the scores, ``[L, 1001]``, by moment."""
    moments = {kind: clamp_moment(tensors[f"moment.{kind}"]) for kind in MOMENTS}
    sketches: dict[Moment, dict[int, MagnitudeSketch]] = {kind: {} for kind in MOMENTS}

    def gate(layer: int, values: Tensor) -> None:
        for kind in MOMENTS:
            scores = importance(values, moments[kind][layer].to(values.device), kind)
            sketches[kind].setdefault(layer, MagnitudeSketch()).add(scores)

    watch(model, tokens, {"mlp.gate": gate}, *([progress] if progress else []))
    return {kind: _stack({i: s.table() for i, s in by.items()}) for kind, by in sketches.items()}


def _stack(by_layer: dict[int, Tensor]) -> Tensor:
    return torch.stack([by_layer[layer] for layer in sorted(by_layer)])
