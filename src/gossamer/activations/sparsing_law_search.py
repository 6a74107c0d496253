"""PPL-p%: the one CETT for all layers at which perplexity rises by exactly p.

    c ∈ [0, 1]:  ε_l(c) for every layer → the model with all MLPs masked → r = exp(loss_sparse − loss_dense)
    r < 1 + p  →  c is the new lower bound, else the new upper bound;  at the end c is the middle

Both perplexity and sparsity rise with c. With several models (checkpoints of one run) c is shared and r is their mean.

from gossamer.activations.sparsing_law_search import ppl_p_sparsity
found = ppl_p_sparsity(model, ids, p=0.01)   # found.cett, found.layer_eps, found.activation_ratio [layers, tokens]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.activations.sparsing_law_cett import Progress, Recording, fat_rule, no_progress, top_k_rule, zeros_rule
from gossamer.errors import CalibrationError, InputError, ModelError
from gossamer.hf import FixedRules, MLPRuntime
from gossamer.patterns import NeuronRule

RuleName = Literal["zeros", "top-k", "fat", "cett"]
# What tells a setting of a rule from others, and what makes its rules.
Setting = tuple[Hashable, Callable[[], list[NeuronRule]]]
# Tokens of one forward: the logits of 1024 at a vocabulary of 50,000 are 0.2 GB.
_BATCH_TOKENS = 1024
RULES: tuple[RuleName, ...] = ("zeros", "top-k", "fat", "cett")


@dataclass(frozen=True)
class Run:
    """A sparse forward: perplexity over dense, and the share of neurons kept in each layer."""

    ppl_ratio: float
    kept: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Share of neurons kept, mean over layers."""
        return sum(self.kept) / len(self.kept)


@dataclass(frozen=True, eq=False)
class Measurement:
    """The sparsity of one model at one CETT.

    Attributes:
        cett: c.
        layer_eps: ε_l of every layer.
        rules: the same as thresholds on |a|.
        activation_ratio: float32 ``[layers, tokens]``: share kept on the dense model's activations.
        ppl: dense perplexity.
        run: of the forward with all layers masked. Its share kept is the one to report: later layers see what earlier
            ones left, so it differs a little from `activation_ratio`.
    """

    cett: float
    layer_eps: list[float]
    rules: list[NeuronRule]
    activation_ratio: Tensor
    ppl: float
    run: Run


def real_rows(ids: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """The rows of ``ids [B, T]`` without the padding that `mask` (1 = real) marks, on either side.

    Raises:
        InputError: forms that don't fit, or a row with fewer than two tokens.
    """
    if ids.dim() != 2 or not ids.numel() or ids.is_floating_point():
        raise InputError(f"validation tokens are an integer matrix [rows, tokens], got {list(ids.shape)}")
    if mask is not None and mask.shape != ids.shape:
        raise InputError(f"the mask must have the tokens' shape {list(ids.shape)}, got {list(mask.shape)}")
    rows = list(ids) if mask is None else [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
    if min(len(row) for row in rows) < 2:
        raise InputError("every row of validation tokens needs at least two that are no padding")
    return rows


def _batches(rows: Sequence[Tensor]) -> list[Tensor]:
    """Rows of one length together, so many that a forward stays small: ``[b, length]`` each."""
    lengths: dict[int, list[Tensor]] = {}
    for row in rows:
        lengths.setdefault(len(row), []).append(row)
    return [b for length, same in lengths.items() for b in torch.stack(same).split(max(1, _BATCH_TOKENS // length))]


class Probe:
    """A model, its rows, its dense run, and every sparse run so far.

    Raises:
        ModelError: no causal language model, or no MLPs that are known.
        CalibrationError: it trains, or its activations or loss are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[Tensor],
        candidates: int = 65_536,
        progress: Progress = no_progress,
    ) -> None:
        config, head = getattr(model, "config", None), getattr(model, "get_output_embeddings", lambda: None)
        if config is None or getattr(config, "is_encoder_decoder", False) or head() is None:
            raise ModelError(f"{type(model).__name__} is no causal language model: it has no perplexity to hold")
        device = next(model.parameters()).device
        rows = [row.to(device) for row in rows]
        self.model, self.batches = model, _batches(rows)
        self.recording = Recording(model, rows, candidates, progress)
        self.loss = self._loss()
        if not math.isfinite(self.loss):
            raise CalibrationError("the dense model's loss is not finite: check its weights and the text")
        self._runs: dict[Hashable, Run] = {}

    @torch.no_grad()
    def _loss(self) -> float:
        """Mean cross-entropy of the next token, in nats, over all rows."""
        call: Any = self.model
        total, count = 0.0, 0
        for batch in self.batches:
            logits = call(batch, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            total += float(F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").double())
            count += len(logits)
        return total / count

    def run(self, rules: Sequence[NeuronRule]) -> Run:
        """Perplexity ratio and shares kept under these rules; the model is as before afterwards."""
        runtime = MLPRuntime(self.model, FixedRules(rules), mode="mask")
        try:
            ratio = math.exp(min(self._loss() - self.loss, 700.0))
            kept = runtime.report()["neurons_kept_by_layer"]
        finally:
            runtime.detach()
        if math.isnan(ratio):
            raise CalibrationError("the sparse model's loss is not finite: check its weights and the text")
        return Run(ratio, tuple(kept))

    def setting(self, rule: RuleName, x: float) -> Setting:
        """What a rule's one number in 0 … 1 (0 dense, 1 sparsest) stands for.

        `cett`: c. `top-k`: share dropped. `fat`: the quantile of all layers' |s| that ε is. `zeros` has no number.
        """
        recording = self.recording
        if rule == "cett":
            indices = recording.indices(x)
            return indices, lambda: recording.rules(recording.epsilons(indices))
        if rule == "top-k":
            counts = tuple(round((1 - x) * view.neurons) for view in recording.views)
            return counts, lambda: [top_k_rule(count) for count in counts]
        epsilon = recording.gates.quantile(x) if rule == "fat" else 0.0
        return epsilon, lambda: [fat_rule(epsilon) if rule == "fat" else zeros_rule()] * len(recording.views)

    def at(self, rule: RuleName, x: float) -> Run:
        """The run at a number of a rule's knob; runs that differ in nothing are done once."""
        state, make = self.setting(rule, x)
        if (rule, state) not in self._runs:
            self._runs[rule, state] = self.run(make())
        return self._runs[rule, state]

    def measure(self, c: float) -> Measurement:
        """The sparsity at this CETT."""
        epsilons = self.recording.epsilons(self.recording.indices(c))
        return Measurement(
            c,
            epsilons,
            self.recording.rules(epsilons),
            self.recording.activation_ratio(epsilons),
            math.exp(min(self.loss, 700.0)),
            self.at("cett", c),
        )


def bisect_knob(dense: Callable[[float], bool], tolerance: float = 1e-6, low: float = 0.0, high: float = 1.0) -> float:
    """The x in ``[low, high]`` where `dense` turns from true to false, up to `tolerance`: the middle of what is left.

    >>> round(bisect_knob(lambda x: x < 0.3), 5)
    0.3
    """
    if not 0 < tolerance < 1:
        raise InputError(f"a tolerance must be between 0 and 1, got {tolerance:g}")
    while high - low >= tolerance:
        middle = (low + high) / 2
        if dense(middle):
            low = middle
        else:
            high = middle
    return (low + high) / 2


def find_at_ppl(
    probes: Sequence[Probe],
    p: float,
    rule: RuleName = "cett",
    tolerance: float = 1e-6,
    progress: Progress = no_progress,
) -> float:
    """The knob of `rule` at which perplexity, mean over the probes, is 1 + p of dense: for `cett` the shared c.

    Raises:
        InputError: no probe, or p not above 0.
    """
    if not probes or not p > 0 or not math.isfinite(p):
        raise InputError(f"PPL-p% needs at least one model and a p above 0, got {len(probes)} models and {p:g}")
    steps = math.ceil(math.log2(1 / tolerance)) if 0 < tolerance < 1 else 0
    done = 0

    def dense(x: float) -> bool:
        nonlocal done
        progress(f"{rule}: the sparsity that costs {p:.1%}", done, steps)
        done += 1
        return sum(probe.at(rule, x).ppl_ratio for probe in probes) / len(probes) < 1 + p

    return bisect_knob(dense, tolerance)


def ppl_p_sparsity(
    model: nn.Module,
    ids: Tensor,
    p: float = 0.01,
    *,
    mask: Tensor | None = None,
    tolerance: float = 1e-6,
    candidates: int = 65_536,
    progress: Progress = no_progress,
) -> Measurement:
    """The activation ratio of a model at the price of p more perplexity, and the thresholds that give it.

    Args:
        model: a transformers causal language model in eval mode, best in float32: a loss in bfloat16 is too coarse for 1 %.
        ids: validation tokens, int64 ``[rows, tokens]``; some 2000 in all.
        p: rise of perplexity, 0.01 for PPL-1%.
        mask: 1 where a token is real; padding is dropped before anything runs.
        tolerance: width of the last interval of c.
        candidates: thresholds that each layer chooses from.

    Raises:
        InputError: tokens, p or tolerance out of form.
        ModelError: no causal language model, or no MLPs that are known.
        CalibrationError: something is not finite, or the model trains.
    """
    probe = Probe(model, real_rows(ids, mask), candidates, progress)
    return probe.measure(find_at_ppl([probe], p, "cett", tolerance, progress))


def sparsity_at_share(
    model: nn.Module,
    ids: Tensor,
    share: float,
    *,
    tolerance: float = 1e-6,
    candidates: int = 65_536,
    progress: Progress = no_progress,
) -> Measurement:
    """The CETT at which a model keeps this share of its neurons, and what that costs; arguments as in `ppl_p_sparsity`.

    Raises:
        InputError: a share that is not in 0 … 1; otherwise as `ppl_p_sparsity`.
    """
    if not 0 < share <= 1:
        raise InputError(f"a share of neurons is above 0 and at most 1, got {share:g}")
    probe, done = Probe(model, real_rows(ids), candidates, progress), 0

    def dense(x: float) -> bool:
        nonlocal done
        progress(f"cett: the error that keeps {share:.0%} of the neurons", done, math.ceil(math.log2(1 / tolerance)))
        done += 1
        return probe.at("cett", x).ratio > share

    return probe.measure(bisect_knob(dense, tolerance))


def ppl_p_checkpoints(
    models: Sequence[nn.Module],
    ids: Tensor,
    p: float = 0.01,
    *,
    tuned: int = 5,
    mask: Tensor | None = None,
    tolerance: float = 1e-6,
    candidates: int = 65_536,
    progress: Progress = no_progress,
) -> list[Measurement]:
    """The activation ratio in the course of a training: c is tuned on the last checkpoints together and used for all.

    Args:
        models: checkpoints of one run, oldest first.
        tuned: so many of the last ones share the search; the dense activations of these are held at once.
        others: as in `ppl_p_sparsity`.

    Raises:
        As `ppl_p_sparsity`; InputError also where `tuned` is not in 1 … models.
    """
    if not 1 <= tuned <= len(models):
        raise InputError(f"c can be tuned on 1 to {len(models)} of these checkpoints, not on {tuned}")
    rows = real_rows(ids, mask)
    last = [Probe(model, rows, candidates, progress) for model in models[-tuned:]]
    c = find_at_ppl(last, p, "cett", tolerance, progress)
    early = [Probe(model, rows, candidates, progress).measure(c) for model in models[:-tuned]]
    return early + [probe.measure(c) for probe in last]
