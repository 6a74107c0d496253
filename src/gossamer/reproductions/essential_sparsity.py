"""Essential sparsity: the smallest weights of a checkpoint are free up to a turn, and fine-tuning would remove the same ones.

(a) SmolLM2-135M-Instruct, 6 x 256 tokens of held-out technical English, no fine-tuning: one-shot magnitude pruning at 0, .1, …,
    .6 by one global ranking; beside it one ranking a matrix, random pruning, and 2:4.
(b) A language model over bytes is trained on Python sources (task A), pruned, and fine-tuned on English prose (task B) at each
    sparsity; lottery tickets of task B (a tenth of the weights a round, rewound to the checkpoint) are compared with the masks
    that the checkpoint alone gives.

Sizes and thresholds were set before any run. "A clear turn at 0.2 to 0.3" is read as: the first sparsity of the grid whose
perplexity is more than 1.15 times the dense one's is 0.3 or 0.4.
"""

from __future__ import annotations

import copy
import math
from typing import Any

from torch import nn

from gossamer.data import byte_batches, byte_corpus, split, text, token_blocks
from gossamer.models import Plan, bits_per_byte, byte_model, load, token_loss, train
from gossamer.patterns import Masks
from gossamer.registry import make
from gossamer.reproductions.base import Outcome, Progress, Reproduction
from gossamer.weights.essential_sparsity import essential_sparsity, magnitude_mask, sparsity_curve
from gossamer.weights.essential_sparsity_study import layer_profile, lottery_ticket, mask_similarity

SEED = 0
GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
PER_MATRIX, RANDOM, NM = (0.3, 0.5), (0.1, 0.3), "2:4"
BLOCK, BLOCKS = 256, 6
SIZES = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3}
BATCH, CONTEXT, STEPS, TUNING = 16, 96, 600, 100
TUNED, TICKET = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), 0.3
LIMITS = {"ratio_0.1": 1.05, "ratio_0.2": 1.15, "random": 20.0, "cosine": 0.9}


def _smollm2(progress: Progress) -> dict[str, Any]:
    loaded = load("smollm2")
    model = loaded.model
    ids = token_blocks(loaded.tokenizer, split(text("prose"), "evaluation"), BLOCK, BLOCKS, seed=SEED)

    def quality(m: nn.Module) -> float:
        return -token_loss(m, ids)

    def by(slug: str, **settings: Any) -> Any:
        def prune(m: nn.Module, s: float | str) -> Masks:
            masks = make(slug, sparsity=s, **settings).apply(m).masks  # type: ignore[attr-defined]
            assert isinstance(masks, Masks)
            return masks

        return prune

    curve = sparsity_curve(model, quality, [*GRID, NM], progress=progress)
    extra = {
        "per_matrix": sparsity_curve(
            model, quality, PER_MATRIX, prune=by("magnitude", scope="matrix"), progress=progress
        ),
        "random": sparsity_curve(model, quality, RANDOM, prune=by("random-weights", seed=SEED), progress=progress),
    }
    arms = {
        "global": [p for p in curve if p.asked != NM],
        "n:m": [p for p in curve if p.asked == NM],
        **extra,
    }
    perplexity = {name: {str(p.asked): math.exp(-p.score) for p in points} for name, points in arms.items()}
    masks = {s: magnitude_mask(model, s) for s in (0.2, 0.4)}
    turns = {
        str(epsilon): str(essential_sparsity(GRID, [p.score for p in arms["global"]], math.log1p(epsilon)))
        for epsilon in (0.01, 0.05, 0.15)
    }
    profile = layer_profile(model, masks[0.2])
    return {
        "tokens": ids.numel(),
        "perplexity": perplexity,
        "turn_by_epsilon": turns,
        "nested": masks[0.4].within(masks[0.2]),
        "removed_at_0.2": {"by_role": profile["by_role"], "by_layer": profile["by_layer"]},
    }


def _bytes(progress: Progress) -> dict[str, Any]:
    code, _ = byte_corpus(2_000_000)
    prose, held = byte_corpus(400_000, "prose")
    model = byte_model("llama", SEED, **SIZES)
    pretraining = train(model, byte_batches(code, BATCH, CONTEXT, STEPS, SEED), Plan(STEPS, lr=2e-3), progress=progress)

    def finetune(m: nn.Module, masks: Masks, seed: int) -> None:
        batches = byte_batches(prose, BATCH, CONTEXT, TUNING, 1000 + seed)
        train(m, batches, Plan(TUNING, lr=1e-3, warmup=10, floor=0.0), masks=masks, progress=progress)

    def quality(m: nn.Module) -> float:
        return -bits_per_byte(m, held, CONTEXT)

    tuned = sparsity_curve(model, quality, TUNED, finetune=finetune, progress=progress)
    as_is = sparsity_curve(model, quality, TUNED, progress=progress)
    similar = {}
    for share in (0.1, 0.2, TICKET):
        rounds = round(10 * share)
        ticket = lottery_ticket(copy.deepcopy(model), finetune, share, rounds=rounds)
        similar[str(share)] = mask_similarity(ticket, magnitude_mask(model, share))
    return {
        "curve": pretraining.curve,
        "bits_tuned": {str(p.asked): -p.score for p in tuned},
        "bits_as_is": {str(p.asked): -p.score for p in as_is},
        "turn_tuned": str(essential_sparsity(TUNED, [p.score for p in tuned], 0.01 * -tuned[0].score)),
        "turn_as_is": str(essential_sparsity(TUNED, [p.score for p in as_is], 0.01 * -as_is[0].score)),
        "ticket_similarity": similar,
    }


def judge(real: dict[str, Any], small: dict[str, Any]) -> Outcome:
    """The verdict by `LIMITS`."""
    ppl = real["perplexity"]
    dense = ppl["global"]["0.0"]
    ratio = {s: value / dense for s, value in ppl["global"].items()}
    cosines = [s["cosine"] for s in small["ticket_similarity"].values()]
    checks = {
        "10 % are free": ratio["0.1"] <= LIMITS["ratio_0.1"],
        "20 % cost little": ratio["0.2"] <= LIMITS["ratio_0.2"],
        "a turn at 0.2 to 0.3": real["turn_by_epsilon"]["0.15"] in ("0.2", "0.3"),
        "random is far worse": ppl["random"]["0.1"] / ppl["global"]["0.1"] >= LIMITS["random"],
        "nested": real["nested"],
        "tickets are alike": min(cosines) > LIMITS["cosine"],
    }
    failed = [name for name, held in checks.items() if not held]
    direction = checks["random is far worse"] and ratio["0.1"] < ratio["0.3"] < ratio["0.6"]
    shown = ", ".join(f"{float(s):.0%} x{r:.3g}" for s, r in ratio.items() if s != "0.0")
    return Outcome(
        verdict="reproduced" if not failed else "direction only" if direction else "not reproduced",
        measured=(
            f"SmolLM2 perplexity {dense:.2f}; removing {shown}; per matrix 30% x{ppl['per_matrix']['0.3'] / dense:.3g}; "
            f"random 10% x{ppl['random']['0.1'] / dense:.3g}; 2:4 x{ppl['n:m'][NM] / dense:.3g}; turn (5 %) "
            f"{real['turn_by_epsilon']['0.05']}. Byte model: turn (1 %) {small['turn_as_is']} as it is, {small['turn_tuned']} "
            f"fine-tuned; ticket and checkpoint masks have cosine {min(cosines):.3f} or more up to 30 %"
        ),
        raw={"smollm2": real, "ratio": ratio, "bytes": small, "checks": checks},
        explanation=f"failed: {', '.join(failed)}" if failed else "",
    )


def _experiment(progress: Progress) -> Outcome:
    return judge(_smollm2(progress), _bytes(progress))


REPRODUCTION = Reproduction(
    slug="essential-sparsity",
    claim="some 30 to 50 % of a checkpoint's smallest weights go in one shot for free, then quality turns; lottery masks are alike",
    setting=(
        "(a) SmolLM2-135M, 1536 tokens of prose, no fine-tuning, 0 to 60 %; (b) a byte model (d 64, 3 layers) trained on code, "
        "pruned, fine-tuned on prose, and its lottery tickets"
    ),
    threshold=(
        "(a) perplexity at 10 % <= 1.05x, at 20 % <= 1.15x, last grid point within 1.15x is 0.2 or 0.3, random 10 % >= 20x worse "
        "than magnitude 10 %, mask(0.4) inside mask(0.2); (b) cosine of ticket and checkpoint masks > 0.9 at 10, 20, 30 %"
    ),
    seeds=(SEED,),
    experiment=_experiment,
)
