"""The four rules of inactivity on equal terms: at one price in perplexity, or at one share of neurons kept.

from gossamer.activations.sparsing_law_compare import compare_rules
compare_rules(model, ids, p=0.05)["cett"].ratio        # share that each rule keeps at 5 % more perplexity
compare_rules(model, ids, ratio=0.5)["fat"].ppl_ratio  # what keeping half costs
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from gossamer.activations.sparsing_law_cett import Progress, no_progress
from gossamer.activations.sparsing_law_search import RULES, Probe, RuleName, find_at_ppl, real_rows
from gossamer.errors import InputError


@dataclass(frozen=True)
class RuleResult:
    """One rule at the common price or ratio: its knob (see `Probe.setting`), share kept, perplexity over dense."""

    rule: RuleName
    knob: float
    ratio: float
    ppl_ratio: float
    ratio_by_layer: tuple[float, ...]


def compare_rules(
    model: nn.Module | Probe,
    ids: Tensor | None = None,
    p: float = 0.01,
    *,
    ratio: float | None = None,
    mask: Tensor | None = None,
    tolerance: float = 1e-4,
    progress: Progress = no_progress,
) -> dict[RuleName, RuleResult]:
    """The four rules on equal terms: at 1 + p of the dense perplexity, or, where `ratio` is given, at this share kept.

    `zeros` has nothing to set: it stands as it is, dense for an activation without zeros.

    Args:
        model: the model, with `ids` and `mask` as in `ppl_p_sparsity`; or a probe of it, whose runs are then shared.
        tolerance: width of the last interval of each rule's knob; with `ratio`, how near to it is near enough.

    Raises:
        As `ppl_p_sparsity`; InputError also for a ratio not between 0 and 1.
    """
    if ratio is not None and not 0 < ratio < 1:
        raise InputError(f"a share of neurons kept is between 0 and 1, got {ratio:g}")
    if isinstance(model, Probe):
        probe = model
    elif ids is None:
        raise InputError("compare_rules needs validation tokens")
    else:
        probe = Probe(model, real_rows(ids, mask), progress=progress)
    found: dict[RuleName, RuleResult] = {}
    for index, rule in enumerate(RULES):
        progress("comparing rules", index, len(RULES))
        if rule == "zeros":
            knob = 0.0
        elif ratio is None:
            knob = find_at_ppl([probe], p, rule, tolerance, progress)
        else:
            knob = find_at_ratio(probe, ratio, rule, tolerance)
        run = probe.at(rule, knob)
        found[rule] = RuleResult(rule, knob, run.ratio, run.ppl_ratio, run.kept)
    return found


def find_at_ratio(probe: Probe, ratio: float, rule: RuleName, tolerance: float = 1e-4, steps: int = 50) -> float:
    """The knob of `rule` at which the sparse run keeps this share of the neurons, up to `tolerance`.

    By false position (Illinois): the shares of most rules are nearly straight in their knobs, and every try is a forward.
    Where a share is jumped over or out of reach (more than is nonzero), it is the knob nearest to it.
    """
    if rule == "top-k":
        return 1 - ratio
    low, high = 0.0, 1.0
    above, below = probe.at(rule, low).ratio - ratio, probe.at(rule, high).ratio - ratio
    if above <= 0 or below >= 0:
        return low if above <= 0 else high
    found, side = low, 0
    for _ in range(steps):
        found = (low * below - high * above) / (below - above)
        miss = probe.at(rule, found).ratio - ratio
        if abs(miss) < tolerance or high - low < 1e-9:
            break
        if miss > 0:
            low, above = found, miss
            below = below / 2 if side > 0 else below
        else:
            high, below = found, miss
            above = above / 2 if side < 0 else above
        side = 1 if miss > 0 else -1
    return found
