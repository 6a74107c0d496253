"""ProSparse on a byte model: does an L1 penalty make many more zeros than ReLU alone, at little loss, and does the shift help?

Setting of the system's card: three gated layers of width 96 with 256 neurons, trained 2000 steps with SiLU on Python sources;
then arms of 2000 more steps from the same weights, on the same batches, with the same plan: ReLU alone, ReLU with a fixed λ,
ReLU with ProSparse's stages. Every arm has λ = 0 for its first 15 %.

λ of both L1 arms, the stages and the thresholds of the sweep come from the card's own pilot (fixed 0.5; stages that end at
15, 25, 55, 85 and 100 % with peak 1.0). Nothing was tuned here. "Zeros grow only while λ > 0" is read as: while λ is 0 (step 1
after the shock of the swap, and the whole rest of the ReLU arm) held-out zeros grow by at most 5 points, and in the rest of
the progressive arm by at least 20.

Whether progressive beats fixed λ at equal zeros decides nothing: the card saw the fixed factor ahead at this size.

What the run showed: ReLU alone already has 61 % zeros on this text (46 % in the card's pilot, whose bits per byte were higher),
so both L1 arms reach the pilot's 80 % but gain 18 and 20 points, not 25. They cost 0.3 and 0.9 % of the bits where 5 were
allowed: a larger λ was not tried, since it would be tuned on the reported seed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from gossamer.activations.prosparse import ProSparse, layer_sparsity
from gossamer.activations.prosparse_predictor import ReLUPredictor
from gossamer.activations.relufication import shift_threshold
from gossamer.data.bytes import byte_batches, byte_corpus
from gossamer.models.training import Plan, bits_per_byte, byte_model, train
from gossamer.reproductions.base import Outcome, Progress, Reproduction

SEED, STEPS, BATCH, CONTEXT = 0, 2000, 16, 96
SHIFTS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
STAGED = ProSparse(relu_steps=300, peaks=(0.025, 0.25, 1.0, 1.0), ends=(500, 1100, 1700, 2000))
ARMS: dict[str, ProSparse] = {
    "relu": STAGED.arm("vanilla"),
    "fixed 0.5": STAGED.arm("fixed", 0.5),
    "progressive 1.0": STAGED,
}
THRESHOLDS = {
    "zeros_gain": 0.25,
    "bits_ratio": 1.05,
    "growth_without": 0.05,
    "growth_with": 0.20,
    "shift_zeros": 0.005,
    "shift_bits_ratio": 1.001,
}
#: Steps after the swap of the activation that count as its shock.
SHOCK, EVERY = 50, 50


def held_out_blocks(data: Tensor, count: int = 24) -> Tensor:
    """Token blocks ``[count, CONTEXT]`` spread evenly over the held-out bytes."""
    starts = torch.linspace(0, len(data) - CONTEXT - 1, count).long()
    return data[starts[:, None] + torch.arange(CONTEXT)].long()


def experiment(seed: int, progress: Progress, arms: dict[str, ProSparse] | None = None) -> dict[str, Any]:
    """All numbers for one seed; `arms` by name."""
    arms = ARMS if arms is None else arms
    data, held = byte_corpus(2_000_000)
    few, many = held_out_blocks(held), held_out_blocks(held, 160)
    plan = Plan(steps=STEPS, lr=1e-3)

    def batches(part: int) -> Any:
        return byte_batches(data, BATCH, CONTEXT, STEPS, seed=2 * seed + part)

    start = byte_model("llama", seed)
    pretraining = train(start, batches(0), plan, progress=progress)
    raw: dict[str, Any] = {
        "pretrained": {"bits_per_byte": bits_per_byte(start, held), "curve": pretraining.curve},
        "arms": {},
    }
    for name, method in arms.items():
        model = copy.deepcopy(start)
        zeros: list[tuple[int, float]] = []

        def after_step(step: int, model: Any = model, zeros: list[tuple[int, float]] = zeros) -> None:
            if step % EVERY == EVERY - 1 or step == 0:
                model.eval()
                layers = layer_sparsity(model, few)
                model.train()
                zeros.append((step + 1, sum(layers) / len(layers)))

        training = method.train(model, batches(1), plan, after_step=after_step, progress=progress)
        layers = layer_sparsity(model, many)
        found: dict[str, Any] = {
            "bits_per_byte": bits_per_byte(model, held),
            "zeros": sum(layers) / len(layers),
            "zeros_by_layer": layers,
            "zeros_while_training": zeros,
            "curve": training.curve,
            "shifts": {},
        }
        for t in SHIFTS:
            shift_threshold(model, t)
            layers = layer_sparsity(model, many)
            found["shifts"][str(t)] = {
                "zeros": sum(layers) / len(layers),
                "zeros_by_layer": layers,
                "bits_per_byte": bits_per_byte(model, held),
            }
        shift_threshold(model, 0.0)
        if method is STAGED:
            found |= _engines(model, data, many)
        raw["arms"][name] = found
    return raw


def _engines(model: Any, data: Tensor, blocks: Tensor) -> dict[str, Any]:
    """Greedy decoding by the exact engine at t = 0.02, and the predictor of the approximate one."""
    shift_threshold(model, 0.02)
    prompt = blocks[:1, :32]
    plain = model.generate(prompt, max_new_tokens=64, do_sample=False)
    with STAGED.attach(model) as handle:
        same = float((model.generate(prompt, max_new_tokens=64, do_sample=False) == plain).float().mean())
        exact = {"tokens_that_agree": same, **handle.report()}
    starts = torch.linspace(0, len(data) - CONTEXT - 1, 400).long()
    tokens = data[starts[:, None] + torch.arange(CONTEXT)].long()
    facts = ReLUPredictor(hidden=96, epochs=5).calibrate(model, tokens).facts
    shift_threshold(model, 0.0)
    return {"exact_engine": exact, "predictor": facts}


def judge(raw: dict[str, Any]) -> Outcome:
    """The verdict by `THRESHOLDS`."""
    arms, limits = raw["arms"], THRESHOLDS
    relu = arms["relu"]
    penalised = {name: arms[name] for name in ("fixed 0.5", "progressive 1.0")}
    good = [
        name
        for name, arm in penalised.items()
        if arm["zeros"] >= relu["zeros"] + limits["zeros_gain"]
        and arm["bits_per_byte"] <= limits["bits_ratio"] * relu["bits_per_byte"]
    ]
    at = {name: dict(arms[name]["zeros_while_training"]) for name in ("relu", "progressive 1.0")}
    first, grown = STAGED.relu_steps, at["progressive 1.0"]
    growth = {
        "step 1": grown[first] - grown[SHOCK],
        "relu, the rest": at["relu"][STEPS] - at["relu"][first],
        "progressive, the rest": grown[STEPS] - grown[first],
    }
    gains = {
        f"{name}, t {t}": (
            shift["zeros"] - arms[name]["zeros"],
            shift["bits_per_byte"] / arms[name]["bits_per_byte"],
        )
        for name in penalised
        for t, shift in arms[name]["shifts"].items()
    }
    free = {
        name: gain
        for name, (gain, ratio) in gains.items()
        if gain >= limits["shift_zeros"] and ratio <= limits["shift_bits_ratio"]
    }
    checks = {
        "an L1 arm gains zeros": bool(good),
        "no growth without penalty": max(growth["step 1"], growth["relu, the rest"]) <= limits["growth_without"],
        "growth with penalty": growth["progressive, the rest"] >= limits["growth_with"],
        "shift": bool(free),
    }
    failed = [name for name, held in checks.items() if not held]
    more = all(arm["zeros"] > relu["zeros"] + 0.1 for arm in penalised.values())
    lines = "; ".join(f"{name} {arm['zeros']:.3f} / {arm['bits_per_byte']:.3f}" for name, arm in arms.items())
    best = max(free, key=lambda name: free[name], default=None)
    shift = (
        f"shift ({best}) +{100 * free[best]:.1f} points at {gains[best][1]:.4f} times the bits"
        if best
        else "no free shift"
    )
    return Outcome(
        verdict="reproduced" if not failed else "direction only" if more else "not reproduced",
        measured=(
            f"zeros / bits per byte: {lines}; {shift}; growth of zeros: step 1 {growth['step 1']:+.3f}, ReLU after it "
            f"{growth['relu, the rest']:+.3f}, progressive after it {growth['progressive, the rest']:+.3f}"
        ),
        raw={**raw, "growth": growth, "shift_gains": gains, "checks": checks},
        explanation=f"failed: {', '.join(failed)}" if failed else "",
    )


def _experiment(progress: Progress) -> Outcome:
    return judge(experiment(SEED, progress))


REPRODUCTION = Reproduction(
    slug="prosparse",
    claim="ReLU and a progressive L1 penalty bring LLaMA-2-7B to 88% zeros at its level, a threshold of 0.01 to 89%",
    setting=(
        "byte model (3 layers, d 96, 256 neurons, context 96, batch 16) on 2 MB of Python sources; 2000 steps with SiLU, then "
        "arms of 2000 steps on the same batches; λ as in the card's pilot (mean over tokens and neurons, summed over layers)"
    ),
    threshold=(
        "an L1 arm has >= 25 points more zeros than ReLU alone at <= 1.05x its bits/byte; while λ = 0 zeros grow <= 5 points, "
        "in the penalised part of the progressive arm >= 20; some t adds >= 0.5 points at <= 1.001x the bits/byte"
    ),
    seeds=(SEED,),
    experiment=_experiment,
)
