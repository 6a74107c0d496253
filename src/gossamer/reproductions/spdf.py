"""SPDF on byte models: does dense fine-tuning make up for sparse pre-training, and more so in a wider model?

GPTs over bytes (3 layers, 4 heads, context 96; width 48 and twice that) are pre-trained on Python sources at sparsity 0, 0.5
and 0.75, on the same bytes, then fine-tuned on English prose for a tenth of the steps: dense, and sparse under the same masks.

The card's setting is larger (5 MB or more per run); sizes were cut before any run to what one core does in some minutes.
Learning rates are this library's usual ones for models of this size, not tuned. "About half at 50 %" is read as at most 0.7 of
the gap at 75 %.
"""

from __future__ import annotations

import copy
from typing import Any

from gossamer.data import byte_batches, byte_corpus
from gossamer.models import Plan, bits_per_byte, byte_model
from gossamer.reproductions.base import Outcome, Progress, Reproduction
from gossamer.weights.spdf import finetune, initialize, model_flops, static_random_masks
from gossamer.weights.spdf_pretrain import SparsePretrain

SEED = 0
WIDTHS, SPARSITIES = (48, 96), (0.0, 0.5, 0.75)
LAYERS, BATCH, CONTEXT = 3, 16, 96
STEPS, TUNING = 600, 60
PRETRAIN = Plan(STEPS, lr=2e-3, warmup=90, weight_decay=0.1)
FINETUNE = Plan(TUNING, lr=1e-3, warmup=6, floor=0.0, weight_decay=0.01, betas=(0.9, 0.999))
LIMITS = {"closed": 0.30, "gap_0.75": 0.10, "gap_0.5_of_0.75": 0.7}


def _one(width: int, sparsity: float, seed: int, progress: Progress) -> dict[str, Any]:
    """Bits per byte of one width at one sparsity."""
    code, code_held = byte_corpus(2_000_000)
    prose, prose_held = byte_corpus(400_000, "prose")
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": LAYERS}
    model = byte_model("gpt2", seed, **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    initialize(model, seed=seed)
    masks = static_random_masks(model, sparsity, seed)
    run = SparsePretrain(model, masks, PRETRAIN)
    training = run.run(byte_batches(code, BATCH, CONTEXT, STEPS, seed), progress=progress)
    found: dict[str, Any] = {
        "pretrained": bits_per_byte(model, code_held, CONTEXT),
        "prose_before": bits_per_byte(model, prose_held, CONTEXT),
        "forward_flops": model_flops(model, CONTEXT, masks),
        "sparsity_of_the_model": (masks.total - masks.kept) / sum(p.numel() for p in model.parameters()),
        "curve": training.curve,
    }
    for way in ("dense", "sparse") if sparsity else ("dense",):
        tuned = copy.deepcopy(model)
        batches = byte_batches(prose, BATCH, CONTEXT, TUNING, seed + 1)
        finetune(tuned, batches, FINETUNE, masks if way == "sparse" else None, progress)
        found[way] = bits_per_byte(tuned, prose_held, CONTEXT)
    return found


def experiment(seed: int, progress: Progress) -> dict[str, Any]:
    """All numbers for one seed, by width and sparsity."""
    return {
        str(width): {str(sparsity): _one(width, sparsity, seed, progress) for sparsity in SPARSITIES}
        for width in WIDTHS
    }


def judge(raw: dict[str, Any]) -> Outcome:
    """The verdict by `LIMITS`."""
    gaps: dict[str, dict[str, float]] = {}
    for width, arms in raw.items():
        base = arms["0.0"]
        gaps[width] = {"pretrained": arms["0.75"]["pretrained"] - base["pretrained"]}
        for s in ("0.5", "0.75"):
            for way in ("dense", "sparse"):
                gaps[width][f"{way} {s}"] = arms[s][way] - base["dense"]
    narrow, wide = (gaps[str(w)] for w in WIDTHS)
    closed = {w: 1 - g["dense 0.75"] / g["sparse 0.75"] if g["sparse 0.75"] > 0 else 0.0 for w, g in gaps.items()}
    checks = {
        "sparse pre-training costs": narrow["pretrained"] > 0 and wide["pretrained"] > 0,
        "dense fine-tuning closes 30 %": closed[str(WIDTHS[1])] >= LIMITS["closed"],
        "the gap at 75 % is small": wide["dense 0.75"] <= LIMITS["gap_0.75"],
        "at 50 % about half": wide["dense 0.5"] <= LIMITS["gap_0.5_of_0.75"] * wide["dense 0.75"],
        "wider is closer": wide["dense 0.75"] < narrow["dense 0.75"],
    }
    failed = [name for name, held in checks.items() if not held]
    direction = checks["sparse pre-training costs"] and all(
        g[f"dense {s}"] < g[f"sparse {s}"] for g in gaps.values() for s in ("0.5", "0.75")
    )
    lines = "; ".join(
        f"width {w}: pre-training {g['pretrained']:+.3f}, fine-tuned dense {g['dense 0.75']:+.3f} (50 %: {g['dense 0.5']:+.3f}),"
        f" sparse {g['sparse 0.75']:+.3f}"
        for w, g in gaps.items()
    )
    flops = raw[str(WIDTHS[1])]["0.0"]["forward_flops"] / raw[str(WIDTHS[1])]["0.75"]["forward_flops"]
    return Outcome(
        verdict="reproduced" if not failed else "direction only" if direction else "not reproduced",
        measured=f"gap to dense in bits/byte at 75 %: {lines}; {flops:.2f}x fewer pre-training FLOPs, by formula",
        raw={"widths": raw, "gaps": gaps, "closed": closed, "checks": checks},
        explanation=f"failed: {', '.join(failed)}" if failed else "",
    )


def _experiment(progress: Progress) -> Outcome:
    return judge(experiment(SEED, progress))


REPRODUCTION = Reproduction(
    slug="spdf",
    claim="GPT-3 XL pre-trained at 75 % sparsity (2.5x fewer FLOPs) and fine-tuned dense is as good; larger models lose less",
    setting=(
        "byte GPTs (3 layers, width 48 and 96, context 96), 600 steps of 1,536 bytes of Python sources at 0 / 50 / 75 %, then "
        "60 steps on English prose, dense and sparse"
    ),
    threshold=(
        "sparse pre-training costs bits; at width 96 and 75 % dense fine-tuning closes >= 30 % of sparse fine-tuning's gap and "
        "leaves <= 0.10 bits/byte, at 50 % <= 0.7 of that; the gap is smaller than at width 48"
    ),
    seeds=(SEED,),
    experiment=_experiment,
)
