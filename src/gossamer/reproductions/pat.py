"""PAT on a byte model: tuned on other text and a quarter narrower, is it better than cutting first and tuning then?

A Llama-like byte model of width 128 learns Python sources, then is tuned on English prose for the same steps in five ways:
(a) PAT, (b) a rotation of the residual stream to its principal axes and a cut of the least (SliceGPT with one rotation for all
blocks, so that a plain model comes out), then LoRA, (c) a cut of the channels with the smallest rows in what writes them, then
LoRA, (d) LoRA without a cut, and PAT with the fixed mask. LoRA alone has rank 26 where PAT has 20, which makes up for the
mixing modules' parameters. All are measured as the plain dense models that come out.

Rate of learning and rank of the mixing modules were chosen on another seed (100), with a model of two layers. The paper's rank,
5 % of the width, is 200 for 1024 doomed channels there and 6 for 32 here; at that seed it left 0.73 of the gap, and 20 % (26)
left 0.33. The first seed also runs with 5 %, which decides nothing.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, cast

import torch
from torch import Tensor

from gossamer.data import byte_batches, byte_corpus
from gossamer.hf import cut_hidden, writers
from gossamer.models import LoRA, bits_per_byte, byte_model, train
from gossamer.models.training import Plan
from gossamer.reproductions.base import Outcome, Progress, Reproduction
from gossamer.weights.base import parameter_count
from gossamer.weights.pat import PAT, TARGETS

SEEDS, BASE_STEPS, STEPS, BATCH, CONTEXT, WIDTH, KEEP = (0, 1), 500, 400, 8, 64, 128, 0.75
THRESHOLDS = {"count": 0.02, "merged": 1e-4, "gap": 0.7}
METHOD = PAT(keep=KEEP, hsm_rank=0.2, steps=STEPS, lr=5e-3, warmup=40)
LORA_RANK, NARROW = 26, "PAT, rank 5 %"
ARMS = ("PAT", "fixed mask", "rotation", "magnitude", "no cut")
CHANGES: dict[str, dict[str, Any]] = {"PAT": {}, "fixed mask": {"gate": "fixed"}, NARROW: {"hsm_rank": 0.05}}
BASE_PLAN = Plan(BASE_STEPS, lr=2e-3)


def base(seed: int, data: Tensor) -> Any:
    """The dense model, trained on sources."""
    model = byte_model(seed=seed, hidden_size=WIDTH, intermediate_size=344, num_hidden_layers=4)
    train(model, byte_batches(data, BATCH, CONTEXT, BASE_STEPS, seed), BASE_PLAN)
    return model


@torch.no_grad()
def by_magnitude(model: Any, count: int) -> Any:
    """Keep the channels whose rows in embedding, o_proj and down_proj are largest."""
    energy = torch.zeros(WIDTH)
    for place in writers(model):
        weight = cast(Tensor, place.weight)
        energy += weight.square().sum(0 if isinstance(place, torch.nn.Embedding) else 1)
    return cut_hidden(model, energy.topk(count).indices)


@torch.no_grad()
def by_rotation(model: Any, count: int, batch: Tensor) -> Any:
    """Keep the principal axes of the normed residual stream: gains into the readers, one rotation for the whole model."""
    model = copy.deepcopy(model)
    inner = model.model
    pairs = [(inner.norm, [model.lm_head])]
    for block in inner.layers:
        a, m = block.self_attn, block.mlp
        pairs += [(block.input_layernorm, [a.q_proj, a.k_proj, a.v_proj])]
        pairs += [(block.post_attention_layernorm, [m.gate_proj, m.up_proj])]
    for norm, readers in pairs:
        for reader in readers:
            reader.weight.mul_(norm.weight)
        norm.weight.fill_(1)
    gram = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)

    def look(norm: Any, args: Any, out: Tensor) -> None:
        flat = out.double().flatten(0, 1)
        gram.add_(flat.T @ flat)

    hooks = [norm.register_forward_hook(look) for norm, _ in pairs]
    model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    axes = torch.linalg.eigh(gram).eigenvectors.flip(1)
    for _, readers in pairs:
        for reader in readers:
            reader.weight.copy_(reader.weight.double() @ axes)
    return cut_hidden(model, torch.arange(count), [axes.T] * len(writers(model)))


def tuned_by_lora(model: Any, batches: Any, seed: int, rank: int) -> list[dict[str, float]]:
    """LoRA on all linear layers, merged; the curve."""
    adapters = LoRA(rank, METHOD.lora_alpha * rank / METHOD.lora_rank, METHOD.lora_dropout, TARGETS, seed).attach(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        curve = train(model, batches, METHOD.plan(), parameters=list(adapters.parameters())).curve
    adapters.merge()
    return curve


def one(
    seed: int,
    arms: tuple[str, ...] = ARMS,
    method: PAT = METHOD,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, dict[str, Any]]:
    """Every arm of a seed: bits per byte of held-out prose, and what it was made of."""
    sources, _ = byte_corpus(2_000_000)
    prose, held_out = byte_corpus(2_000_000, "prose")
    dense = base(seed, sources)
    measure = functools.partial(bits_per_byte, data=held_out, context=CONTEXT, count=8)
    count = round(KEEP * WIDTH)
    found: dict[str, dict[str, Any]] = {"before": {"bits": measure(dense), "parameters": parameter_count(dense)}}
    for done, arm in enumerate(arms):
        progress(f"seed {seed}: {arm}", done, len(arms))
        batches = byte_batches(prose, BATCH, CONTEXT, STEPS, seed)
        model = copy.deepcopy(dense)
        if arm in CHANGES:
            how = method.model_copy(update={"seed": seed, **CHANGES[arm]})
            tuning, facts = how.tune(model, batches)
            facts["masked_bits"] = measure(model)
            facts["trained"] = sum(p.numel() for p in tuning.parameters() if p.requires_grad)
            model = tuning.merge()
        else:
            if arm == "magnitude":
                model = by_magnitude(model, count)
            elif arm == "rotation":
                model = by_rotation(model, count, next(byte_batches(prose, 64, CONTEXT, 1, seed))[:, :-1])
            facts = {"cut_bits": measure(model), "curve": tuned_by_lora(model, batches, seed, LORA_RANK)}
        found[arm] = {**facts, "bits": measure(model), "hidden": model.config.hidden_size}
        found[arm]["parameters"] = parameter_count(model)
    return found


def _experiment(progress: Progress) -> Outcome:
    runs = [one(seed, (*ARMS, NARROW) if seed == SEEDS[0] else ARMS, progress=progress) for seed in SEEDS]
    bits = {arm: sum(r[arm]["bits"] for r in runs) / len(runs) for arm in ("before", *ARMS)}
    a, b, c, d, fixed = (bits[arm] for arm in ("PAT", "rotation", "magnitude", "no cut", "fixed mask"))
    target = round(KEEP * WIDTH)
    kept = [r["PAT"]["hidden"] for r in runs]
    apart = max(abs(r[arm]["masked_bits"] - r[arm]["bits"]) for r in runs for arm in ("PAT", "fixed mask"))
    checks = {
        "count": all(abs(k - target) <= THRESHOLDS["count"] * target for k in kept),
        "merged": apart <= THRESHOLDS["merged"],
        "below_magnitude": a <= c,
        "gap": a - d <= THRESHOLDS["gap"] * (c - d),
        "below_fixed": a <= fixed,
    }
    failed = [name for name, held in checks.items() if not held]
    return Outcome(
        verdict="reproduced" if not failed else "direction only" if a < c and checks["merged"] else "not reproduced",
        measured=(
            f"bits per byte of held-out prose: PAT {a:.3f} ({', '.join(map(str, kept))} of {WIDTH} channels, target {target}; "
            f"first seed {runs[0]['PAT']['bits']:.3f}, with rank 5 % {runs[0][NARROW]['bits']:.3f}), "
            f"fixed mask {fixed:.3f}, rotation and LoRA {b:.3f}, magnitude and LoRA {c:.3f}, LoRA without a cut {d:.3f}; before "
            f"{bits['before']:.3f}; masked and merged apart by {apart:.1e}"
        ),
        raw={"runs": runs, "bits": bits, "checks": checks},
        explanation=f"failed: {', '.join(failed)}" if failed else "",
    )


REPRODUCTION = Reproduction(
    slug="pat",
    claim="Llama-2-7B at 25 % fewer hidden channels tuned by PAT beats LoRA-64 without a cut (60.02 against 58.76)",
    setting=(
        f"byte model of width {WIDTH} and 4 layers, {BASE_STEPS} steps on sources, then {STEPS} steps on prose of "
        f"{BATCH} x {CONTEXT} bytes at 25 % fewer channels, {len(SEEDS)} seeds"
    ),
    threshold=(
        "channels within 2 % of the target; merged = masked to 1e-4 bits; PAT no worse than magnitude and LoRA, at most 0.7 "
        "of its gap to LoRA without a cut, and no worse than the fixed mask"
    ),
    seeds=SEEDS,
    experiment=_experiment,
)
