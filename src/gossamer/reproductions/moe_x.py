"""MoE-X on bytes: do the router's scores foresee sparsity, and do single units come to mean more at the same loss?

Setting of the system's card: a GPT-2 of 128 channels and three layers on 5 MB of source code as bytes, from scratch, equal
steps, two seeds. Arms: a dense GELU MLP of 256 units, mixtures of 8 experts of 128 units with two active (as many active
units) behind a learned router, with ReLU and with GELU, and MoE-X. The learned router chooses, gates and balances as
MoE-X does; only its scores differ.

Coverage is over all units of all layers, labels being classes of bytes and of places in words and lines that hold for at
least 0.5 % of the tokens. F1 of classifiers that were chosen on one half of the text and tested on the other stands beside
it, and so does each arm before training; they decide nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.activations.moe_x import MoEX
from gossamer.activations.moe_x_layer import MoEXLayer, true_l0
from gossamer.activations.moe_x_metrics import Coverage, best_f1_coverage, byte_labels, classifier_f1
from gossamer.activations.moe_x_models import moe_layers, router_penalty
from gossamer.data import byte_batches, byte_corpus
from gossamer.models import Plan, bits_per_byte, byte_model, train
from gossamer.reproductions.base import Outcome, Progress, Reproduction

SEEDS = (0, 1)
STEPS, BATCH, CONTEXT, BYTES = 1000, 8, 128, 5_000_000
STRETCHES, FREQUENT = 128, 0.005
THRESHOLDS = {"correlation": -0.9, "loss": 1.01, "f1": 0.05}
ARMS: dict[str, MoEX | None] = {
    "dense GELU": None,
    "Switch ReLU": MoEX(router="linear", start="fresh"),
    "Switch GELU": MoEX(router="linear", activation="gelu", start="fresh"),
    "MoE-X": MoEX(start="fresh"),
}


def _model(arm: MoEX | None, seed: int) -> Any:
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    dense = byte_model("gpt2", seed, hidden_size=128, intermediate_size=256, **still)
    return dense if arm is None else arm.model_copy(update={"seed": seed}).apply(dense)


@contextmanager
def _inputs(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """What the modules are given in the forwards meanwhile, flattened to ``[tokens, width]``."""
    seen: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, -2))) for m in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _best(coverages: list[Coverage], values: list[Tensor]) -> float:
    """Mean over labels of the values in the layer whose coverage of that label is best."""
    layer = torch.stack([c.f1 for c in coverages]).argmax(0)
    return float(torch.stack(values).gather(0, layer[None]).mean())


@torch.no_grad()
def _study(model: Any, tokens: Tensor, labels: Tensor) -> dict[str, Any]:
    """Coverage and, of layers with experts, correlation and firing, on tokens ``[stretches, context]``."""
    sparse = any(isinstance(m, MoEXLayer) for m in model.modules())
    layers: list[Any] = list(moe_layers(model)) if sparse else [block.mlp.c_proj for block in model.transformer.h]
    with _inputs(layers) as seen:
        model(tokens, use_cache=False)
    whole, first, carried = [], [], []
    facts: dict[str, Any] = {}
    for layer, x in zip(layers, seen, strict=True):
        hidden = x
        if sparse:
            _, info = layer(x, return_hidden=True)
            hidden = info.hidden
            l0 = true_l0(x, layer.encoder, layer.encoder_bias).float()
            pairs = torch.stack([info.scores.flatten(), l0.flatten()])
            facts.setdefault("correlation", []).append(float(torch.corrcoef(pairs)[0, 1]))
            facts.setdefault("firing", []).append(float(l0.gather(-1, info.units).mean()) / layer.d_expert)
            facts.setdefault("firing_all_experts", []).append(float(l0.mean()) / layer.d_expert)
            share = torch.bincount(info.units.flatten(), minlength=layer.n_experts) / len(x)
            facts.setdefault("share_of_tokens", []).append(share.tolist())
            facts.setdefault("mean_best_gate", []).append(float(info.gates[:, 0].mean()))
        half = len(hidden) // 2
        whole.append(best_f1_coverage(hidden, labels))
        first.append(best_f1_coverage(hidden[:half], labels[:half]))
        carried.append(classifier_f1(hidden[half:], labels[half:], first[-1], hidden[:half].amax(0)))
    facts["f1"] = _best(whole, [c.f1 for c in whole])
    facts["f1_other_half"] = _best(first, carried)
    facts["f1_by_layer"] = [c.score for c in whole]
    facts["f1_by_label"] = torch.stack([c.f1 for c in whole]).amax(0).tolist()
    return facts


def _tell(progress: Progress, who: str, what: str, done: int, total: int) -> None:
    progress(f"{who}: {what}", done, total)


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def _experiment(progress: Progress) -> Outcome:
    training, held_out = byte_corpus(BYTES)
    starts = torch.linspace(0, len(held_out) - CONTEXT - 1, STRETCHES).long()
    tokens = held_out[starts[:, None] + torch.arange(CONTEXT)].long()
    named = {name: flags.flatten() for name, flags in byte_labels(tokens).items()}
    named = {name: flags for name, flags in named.items() if float(flags.float().mean()) >= FREQUENT}
    labels = torch.stack(list(named.values()), 1)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    for seed in SEEDS:
        for name, arm in ARMS.items():
            model = _model(arm, seed)
            before = _study(model, tokens, labels)["f1"]
            done = train(
                model,
                byte_batches(training, BATCH, CONTEXT, STEPS, seed),
                Plan(steps=STEPS),
                penalty=None if arm is None else router_penalty(model),
                progress=functools.partial(_tell, progress, f"{name}, seed {seed}"),
            )
            facts = _study(model, tokens, labels)
            loss = bits_per_byte(model, held_out, CONTEXT)
            runs[name].append({"bits": loss, "f1_untrained": before, **facts, "curve": done.curve})
    bits = {name: _mean([r["bits"] for r in of]) for name, of in runs.items()}
    f1 = {name: _mean([r["f1"] for r in of]) for name, of in runs.items()}
    kinds = [name for name, arm in ARMS.items() if arm is not None]
    correlation = {name: _mean([_mean(r["correlation"]) for r in runs[name]]) for name in kinds}
    firing = {name: _mean([_mean(r["firing"]) for r in runs[name]]) for name in kinds}
    gain = f1["MoE-X"] - f1["dense GELU"]
    checks = {
        "correlation": correlation["MoE-X"] <= THRESHOLDS["correlation"],
        "fewer_fire": firing["MoE-X"] < firing["Switch ReLU"],
        "loss": bits["MoE-X"] <= THRESHOLDS["loss"] * bits["dense GELU"],
        "f1": gain >= THRESHOLDS["f1"],
    }
    failed = [name for name, held in checks.items() if not held]
    direction = correlation["MoE-X"] < -0.5 and checks["fewer_fire"] and gain > 0
    return Outcome(
        verdict="reproduced" if not failed else "direction only" if direction else "not reproduced",
        measured=(
            f"score against true L0 {correlation['MoE-X']:.3f} (learned router {correlation['Switch ReLU']:.3f}); units "
            f"firing {firing['MoE-X']:.3f} (learned router {firing['Switch ReLU']:.3f}); bits per byte "
            f"{bits['MoE-X']:.3f} (dense {bits['dense GELU']:.3f}, Switch ReLU {bits['Switch ReLU']:.3f}, Switch GELU "
            f"{bits['Switch GELU']:.3f}); best F1 {f1['MoE-X']:.3f} (dense {f1['dense GELU']:.3f}, Switch ReLU "
            f"{f1['Switch ReLU']:.3f}, Switch GELU {f1['Switch GELU']:.3f})"
        ),
        raw={
            "bits_per_byte": bits,
            "f1": f1,
            "correlation": correlation,
            "firing": firing,
            "labels": {name: float(flags.float().mean()) for name, flags in named.items()},
            "runs": runs,
            "checks": checks,
        },
        explanation=f"failed: {', '.join(failed)}" if failed else "",
    )


REPRODUCTION = Reproduction(
    slug="moe-x",
    claim="scores foresee true L0 (correlation below -0.95), and units say more than a dense model's at no worse loss",
    setting=(
        f"byte GPT-2 of 128 channels and 3 layers, 8 experts of 128 with 2 active against 256 dense units, {STEPS} steps "
        f"of {BATCH} x {CONTEXT} bytes of source code, dropout 0"
    ),
    threshold=(
        "means over seeds and layers: correlation <= -0.9, fewer units fire than behind the learned router (ReLU), bits "
        "per byte <= dense + 1 %, mean best F1 of a unit >= dense + 0.05"
    ),
    seeds=SEEDS,
    experiment=_experiment,
)
