"""Double Sparsity on SmolLM2: is 1/16 of tokens and of channel bytes near-lossless, and is it the score that does it?

Setting of the system's card: calibrate on 3 blocks of 512 tokens of one part of a text; read 1024 tokens of another part
densely, then decode 96 known tokens, each query with its own selection; layers 0 and 1 dense; k = 64 tokens, r = 16 of 64
channels, 4 bits, labels per query head as published. The metric is KL(dense ‖ sparse) of the next-token distributions.
"""

from __future__ import annotations

from typing import Any

import torch

from gossamer.attention import AttentionMethod
from gossamer.calibration import Calibration
from gossamer.data import encode, make_task, split, text, token_blocks
from gossamer.measure.quality import decode_known, prefill, segments_of, task_segments
from gossamer.models import load
from gossamer.registry import make
from gossamer.reproductions.base import Outcome, Progress, Reproduction

CONTEXT, SCORED, SEGMENTS, SEED = 1024, 96, 2, 0
THRESHOLDS = {"absolute": 0.12, "of_sinks_recent": 1 / 5, "of_random": 1 / 10, "of_released": 0.6}
SETTING: dict[str, Any] = {
    "tokens": 64,
    "channels": 16,
    "label_bits": 4,
    "labels_per": "query_head",
    "dense_layers": (0, 1),
}


def _methods() -> dict[str, Any]:
    ds = "double-sparsity"
    return {
        "dense": make("dense"),
        "exact top-k": make("exact-top-k", tokens=64),
        "qk": make(ds, **SETTING),
        "q": make(ds, **SETTING, stat="q"),
        "k": make(ds, **SETTING, stat="k"),
        "qk as released": make(ds, **SETTING, compat="released"),
        "qk, labels per KV head": make(ds, **{**SETTING, "labels_per": "kv_head"}),
        "qk, all layers sparse": make(ds, **{**SETTING, "dense_layers": ()}),
        "sinks + recent": make("streaming-llm", tokens=64, sinks=4, dense_layers=(0, 1)),
        "random channels": make(ds, **SETTING),
        "random tokens": make("random", tokens=64),
    }


def _experiment(progress: Progress) -> Outcome:
    loaded = load("smollm2")
    model = loaded.model
    prose = text("prose")
    blocks = token_blocks(loaded.tokenizer, split(prose, "calibration"), 512, 3)
    progress("calibrating", 0, 1)
    methods = _methods()
    calibration = methods["qk"].calibrate(model, blocks)
    learned: dict[str, Calibration | None] = {
        name: calibration if method.slug == "double-sparsity" else None for name, method in methods.items()
    }
    learned["random channels"] = _random_channels(calibration)
    evaluation = token_blocks(loaded.tokenizer, split(prose, "evaluation"), CONTEXT + SCORED, SEGMENTS, seed=SEED)
    kl: dict[str, list[float]] = {name: [] for name in methods}
    loss: dict[str, list[float]] = {name: [] for name in methods}
    passkey: dict[str, dict[str, float]] = {"exact": dict.fromkeys(methods, 0), "log_prob": dict.fromkeys(methods, 0.0)}
    segments = segments_of(evaluation, CONTEXT, SCORED)
    questions = task_segments(
        [encode(loaded.tokenizer, e) for e in make_task("passkey", loaded.tokenizer, 900, 6, SEED)]
    )
    work = [("text", s) for s in segments] + [("passkey", s) for s in questions]
    for index, (kind, segment) in enumerate(work):
        cache: Any = None
        reference: Any = None
        for name, method in methods.items():
            progress(f"{kind}: {name}", index, len(work))
            with _attach(method, model, learned[name]) as handle:
                if cache is None:
                    cache = prefill(model, segment.context, CONTEXT + SCORED)
                scores = decode_known(model, handle.runtime, cache, segment)
            reference = scores if name == "dense" else reference
            if kind == "text":
                kl[name].append(float(reference.kl(scores).mean()))
                loss[name].append(float(-scores.log_prob.mean()))
            else:
                passkey["exact"][name] += int(scores.exact)
                passkey["log_prob"][name] += float(scores.log_prob.mean()) / len(questions)
    mean = {name: sum(values) / len(values) for name, values in kl.items()}
    ppl = {name: float(torch.tensor(values).mean().exp()) for name, values in loss.items()}
    checks = {
        "absolute": mean["qk"] < THRESHOLDS["absolute"],
        "of_sinks_recent": mean["qk"] < THRESHOLDS["of_sinks_recent"] * mean["sinks + recent"],
        "of_random": mean["qk"] < THRESHOLDS["of_random"] * mean["random channels"],
        "of_released": mean["qk"] < THRESHOLDS["of_released"] * mean["qk as released"],
    }
    better = mean["qk"] < min(mean[n] for n in ("sinks + recent", "random channels", "qk as released"))
    failed = [name for name, held in checks.items() if not held]
    measured = (
        f"KL {mean['qk']:.3f} (exact top-k {mean['exact top-k']:.3f}, released statistic {mean['qk as released']:.3f}, "
        f"sinks + recent {mean['sinks + recent']:.3f}, random channels {mean['random channels']:.2f}); "
        f"perplexity {ppl['dense']:.1f} -> {ppl['qk']:.1f}"
    )
    return Outcome(
        verdict="reproduced" if not failed else "direction only" if better else "not reproduced",
        measured=measured,
        raw={
            "kl": kl,
            "kl_mean": mean,
            "perplexity": ppl,
            "passkey": passkey,
            "checks": checks,
            "questions": len(questions),
        },
        explanation=f"failed: {', '.join(failed)}" if failed else "",
    )


def _attach(method: AttentionMethod, model: Any, calibration: Calibration | None) -> Any:
    return method.attach(model, calibration)


def _random_channels(calibration: Calibration) -> Calibration:
    """The same calibration with meaningless scores: each head's label channels are drawn."""
    generator = torch.Generator().manual_seed(SEED)
    tensors = {name: torch.rand(t.shape, generator=generator) for name, t in calibration.tensors.items()}
    return Calibration(calibration.method, calibration.fingerprint, tensors, {"random": SEED})


REPRODUCTION = Reproduction(
    slug="double-sparsity",
    claim="near-lossless at 1/16 of tokens and of channel bytes, without training",
    setting="SmolLM2-135M-Instruct, 1024 tokens read densely, 96 decoded on 2 stretches of prose; k=64, r=16 of 64, 4 bits",
    threshold="KL < 0.12, < 1/5 of sinks + recent, < 1/10 of random channels, < 0.6 of the released statistic",
    seeds=(SEED,),
    experiment=_experiment,
)
