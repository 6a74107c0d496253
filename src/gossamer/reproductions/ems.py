"""EMS on SmolLM2: is attention received ever and lately a better judge than either alone, and what does merging do?

Setting of the system's card: a prompt of 768 tokens read densely, each KV head cut once to B rows (window 32), 96 known
tokens decoded one by one at their true positions, mean KL(dense ‖ compressed) over 2 stretches of prose. The three claims
are judged on plain evictions (τ = 2) and on merging with τ = 0.8. The paper's text was not available: this shows the
direction of the library's reconstruction of it, and no figure of the paper can be claimed. What else is possible is written
down beside it and decides nothing: other thresholds and settings of the merge, SnapKV and H2O's sum at the same B, and
compressions that go on every 32 generated tokens.
"""

from __future__ import annotations

from typing import Any

from gossamer.cache.base import CacheMethod
from gossamer.cache.ems import EMS
from gossamer.cache.h2o import H2O
from gossamer.cache.snapkv import SnapKV
from gossamer.data import split, text, token_blocks
from gossamer.hf import AttentionRuntime
from gossamer.measure.quality import Scores, Segment, decode_known, prefill, segments_of
from gossamer.models import load
from gossamer.reproductions.base import Outcome, Progress, Reproduction

PROMPT, SCORED, SEGMENTS, WINDOW, SEED = 768, 96, 2, 32, 0
BUDGETS = (128, 64)
#: "global": KL of the combined score below this share of the global score's at B = 128; "merging": change of KL by τ = 0.8.
THRESHOLDS = {"global": 0.9, "merging": 0.02}


def _methods(budget: int) -> dict[str, CacheMethod]:
    def ems(**settings: Any) -> EMS:
        return EMS(**{"budget": budget, "window": WINDOW, "tau": 2.0, "every": 0, **settings})

    return {
        "local": ems(combine="local"),
        "global": ems(combine="global"),
        "max": ems(),
        "sum": ems(combine="sum"),
        "max, pooled": ems(pool=7),
        "merge 0.5": ems(tau=0.5),
        "merge 0.6": ems(tau=0.6),
        "merge 0.8": ems(tau=0.8),
        "merge 0.5, averaged keys": ems(tau=0.5, norms="averaged"),
        "merge 0.6, before rotation": ems(tau=0.6, similarity="prerope"),
        "merge 0.6, to 0.9 of the mass": ems(tau=0.6, mass=0.9),
        "max, every 32": ems(every=32),
        "merge 0.6, every 32": ems(tau=0.6, every=32),
        "SnapKV": SnapKV(budget=budget, window=WINDOW),
        "H2O": H2O(budget=budget, mode="prefill"),
    }


def _scores(model: Any, method: CacheMethod | None, segment: Segment) -> tuple[Scores, float]:
    """Of one segment, and the share of candidates merged."""
    if method is None:
        runtime = AttentionRuntime(model)
        try:
            return decode_known(model, runtime, prefill(model, segment.context, PROMPT + SCORED), segment), 0.0
        finally:
            runtime.detach()
    with method.attach(model) as handle:
        cache = prefill(model, segment.context, PROMPT + SCORED)
        scores = decode_known(model, handle.runtime, cache, segment)
        return scores, float(handle.report().get("merged_share", 0.0))


def _experiment(progress: Progress) -> Outcome:
    loaded = load("smollm2")
    model, tokenizer = loaded.model, loaded.tokenizer
    context = PROMPT + 1  # the harness decodes the last token of a context
    blocks = token_blocks(tokenizer, split(text("prose"), "evaluation"), context + SCORED, SEGMENTS, seed=SEED)
    kl: dict[int, dict[str, list[float]]] = {b: {name: [] for name in _methods(b)} for b in BUDGETS}
    merged: dict[int, dict[str, list[float]]] = {b: {name: [] for name in _methods(b)} for b in BUDGETS}
    total, done = SEGMENTS * len(BUDGETS) * len(_methods(BUDGETS[0])), 0
    for segment in segments_of(blocks, context, SCORED):
        dense, _ = _scores(model, None, segment)
        for budget in BUDGETS:
            for name, method in _methods(budget).items():
                progress(f"B={budget}: {name}", done, total)
                scores, share = _scores(model, method, segment)
                kl[budget][name].append(float(dense.kl(scores).mean()))
                merged[budget][name].append(share)
                done += 1
    mean = {b: {name: sum(v) / len(v) for name, v in found.items()} for b, found in kl.items()}
    wide, tight = mean[BUDGETS[0]], mean[BUDGETS[1]]
    change = max(abs(mean[b]["merge 0.8"] / mean[b]["max"] - 1) for b in BUDGETS)
    checks = {
        "below global at 128": wide["max"] < THRESHOLDS["global"] * wide["global"],
        "best at 64": tight["max"] <= min(tight["local"], tight["global"]),
        "merging neutral": change < THRESHOLDS["merging"],
    }
    failed = [name for name, held in checks.items() if not held]
    direction = all(mean[b]["max"] < mean[b]["global"] for b in BUDGETS)
    figures = "; ".join(
        f"KL at {b}: combined {m['max']:.3f}, global {m['global']:.3f}, local {m['local']:.3f}, merging (0.8) "
        f"{m['merge 0.8']:.3f}"
        for b, m in mean.items()
    )
    return Outcome(
        verdict="reproduced" if not failed else "direction only" if direction else "not reproduced",
        measured=f"{figures}; merging changes KL by at most {change:.1%}",
        raw={
            "kl": {str(b): m for b, m in mean.items()},
            "kl_by_segment": {str(b): m for b, m in kl.items()},
            "merged_share": {str(b): {n: sum(v) / len(v) for n, v in m.items()} for b, m in merged.items()},
            "merging_change": change,
            "thresholds": THRESHOLDS,
            "checks": checks,
        },
        explanation=f"failed: {', '.join(failed)}" if failed else "",
    )


REPRODUCTION = Reproduction(
    slug="ems",
    claim="global and local importance together choose better than either, most at tight budgets; merging loses less",
    setting="SmolLM2-135M-Instruct, 768 tokens of prose cut once to 128 or 64 rows per KV head, 96 decoded, 2 stretches",
    threshold=(
        "KL of the combined score < 0.9 x global at B=128 and <= both alone at B=64; merging (tau 0.8) changes KL by < 2 %"
    ),
    seeds=(SEED,),
    experiment=_experiment,
)
