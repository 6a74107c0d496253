"""CHESS on SmolLM2: do channel thresholds close a good part of what CATS loses, and does masking Q and O cost little?

Setting of the system's card: calibrated on 8 blocks of 512 tokens of prose, perplexity on 8 others of the same text, at 50 and
70 %. The measure is the share of CATS's loss (logarithm of its perplexity over the dense model's) that CHESS takes back.
Active parameters are those of a layer's seven matrices that a token needs, from the shares that were measured. Speed: one
token through an MLP of random weights, d = 2048 and D = 8192 in fp32, one thread, against the faster of torch's and our dense
products.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from gossamer.activations import ActivationMethod
from gossamer.activations.chess import channel_thresholds, clamp_moment, importance, layer_bytes
from gossamer.calibration import Calibration
from gossamer.hf import mlp_views, model_shape
from gossamer.models import load
from gossamer.patterns import exact_quantile
from gossamer.registry import make
from gossamer.reproductions.base import Outcome, Progress, Reproduction
from gossamer.reproductions.neuron_runs import Read, mlp_times, read, texts

SEED = 0
LEVELS = (0.5, 0.7)
THRESHOLDS = {"closed": 0.25, "same_sparsity": 0.02, "both": 1.45, "speedup": 1.3}


def _methods() -> dict[str, ActivationMethod]:
    found: dict[str, Any] = {}
    for level in LEVELS:
        found[f"cats {level}"] = make("cats", sparsity=level)
        for moment in ("sq", "abs"):
            found[f"chess {moment} {level}"] = make("chess", sparsity=level, moment=moment)
        found[f"chess both {level}"] = make("chess", sparsity=level, parts="both")
    found["chess attention 0.5"] = make("chess", parts="attention")
    found["chess sq 0.5 mean quantiles"] = make("chess", quantiles="mean", group=1)
    return cast(dict[str, ActivationMethod], found)


def _fit(gate: Tensor, up: Tensor) -> Tensor:
    """Channel thresholds at 70 %."""
    moment = clamp_moment(up.square().mean(0))
    return channel_thresholds(torch.tensor(exact_quantile(importance(gate, moment, "sq"), 0.7)), moment, "sq")


def _experiment(progress: Progress) -> Outcome:
    loaded = load("smollm2")
    model = loaded.model
    calibration_text, evaluation = texts(loaded.tokenizer, SEED)
    learned: dict[tuple[str, str], Calibration] = {}
    reads: dict[str, Read] = {"dense": read(model, evaluation, None)}
    methods = _methods()
    for index, (name, method) in enumerate(methods.items()):
        progress(name, index, len(methods))
        key = method.slug, getattr(method, "quantiles", "")
        if key not in learned:
            learned[key] = method.calibrate(model, calibration_text)
        reads[name] = read(model, evaluation, method, learned[key])
    progress("speed", 0, 1)
    speed = mlp_times(_fit, threads=1)
    loss = {name: math.log(r.perplexity / reads["dense"].perplexity) for name, r in reads.items()}
    closed = {
        f"{moment} {level}": 1 - loss[f"chess {moment} {level}"] / loss[f"cats {level}"]
        for moment in ("sq", "abs")
        for level in LEVELS
    }
    apart = {key: abs(reads[f"chess {key}"].sparsity - reads[f"cats {key.split()[1]}"].sparsity) for key in closed}
    view, shape = mlp_views(model)[0], model_shape(model)
    square = view.channels * shape.heads * shape.head_dim
    sizes = (square, square, 2 * view.channels * shape.kv_heads * shape.head_dim)
    active = {
        name: shape.layers * layer_bytes((view.channels, view.neurons), sizes, (r.neurons, r.queries, r.outputs), 1)
        for name, r in reads.items()
    }
    both = math.exp(loss["chess both 0.5"])
    checks = {
        "closed": all(share >= THRESHOLDS["closed"] for share in closed.values()),
        "same_sparsity": all(difference <= THRESHOLDS["same_sparsity"] for difference in apart.values()),
        "both": both <= THRESHOLDS["both"],
        "fewer_parameters": active["chess both 0.5"] < active["cats 0.5"],
        "both_beats_cats": loss["chess both 0.5"] < loss["cats 0.5"],
        "speedup": speed["speedup"] >= THRESHOLDS["speedup"],
    }
    failed = [name for name, held in checks.items() if not held]
    ratio = {name: math.exp(value) for name, value in loss.items()}
    return Outcome(
        verdict="reproduced"
        if not failed
        else "direction only"
        if all(share > 0 for share in closed.values())
        else "not reproduced",
        measured=(
            f"perplexity x{ratio['chess sq 0.5']:.3f} at 50 % (CATS x{ratio['cats 0.5']:.3f}: {closed['sq 0.5']:.0%} of its "
            f"loss taken back; abs {closed['abs 0.5']:.0%}), x{ratio['chess sq 0.7']:.2f} at 70 % (CATS "
            f"x{ratio['cats 0.7']:.2f}: {closed['sq 0.7']:.0%}; abs {closed['abs 0.7']:.0%}); with Q and O x{both:.3f} at "
            f"{active['chess both 0.5'] / active['dense']:.0%} of the parameters (CATS "
            f"{active['cats 0.5'] / active['dense']:.0%}); MLP at 70 % {speed['speedup']:.2f} times faster than the best "
            f"dense (bound {speed['bound']:.2f})"
        ),
        raw={
            "reads": {name: r.as_dict() for name, r in reads.items()},
            "ratio": ratio,
            "closed": closed,
            "sparsity_apart": apart,
            "active_parameters": active,
            "speed": speed,
            "checks": checks,
        },
        explanation=f"failed: {', '.join(failed)}" if failed else "",
    )


REPRODUCTION = Reproduction(
    slug="chess",
    claim="less lost than CATS at equal sparsity, with fewer active parameters when Q and O are masked too; 1.27x decoding",
    setting="SmolLM2-135M-Instruct, 4096 + 4096 tokens of prose; MLP speed with random weights, d 2048, D 8192, fp32",
    threshold=(
        "at least 25 % of CATS's log-perplexity loss taken back at 50 and at 70 %, by both moments at the same sparsity; with Q "
        "and O masked x1.45 at most and below CATS with fewer parameters; MLP at 70 % at least 1.3 times faster on a thread"
    ),
    seeds=(SEED,),
    experiment=_experiment,
)
