"""SeerAttention on SmolLM2: does a small gate, distilled from the model's own attention, find the blocks that matter?

Setting of the system's card: blocks of 32, sequences of 1024 tokens of prose, gates as wide as a head (64), all 30 layers;
targets of 20 sequences cached once, then each gate alone: KL, AdamW 1e-3 cosine, 20 warm-up steps, 150 steps of 4. Tested on
the second half of 3 unseen sequences with ways of choosing equally many blocks in every row; no row is dense, no diagonal is
forced but for the mean-pooled scores. Recall is the attention mass in the chosen blocks, under dense attention, averaged over
layers, heads and rows. Beside that, which the thresholds leave out: a sequence whose last quarter repeats its first, where what
is needed lies outside a window, and three layers trained with v1's squared error.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from gossamer import ops
from gossamer.attention import seer_distill as distill
from gossamer.attention.seer_decode import SeerDecodePolicy
from gossamer.attention.seer_gate import block_pools, choose_blocks, pooled_keys, visible_blocks
from gossamer.attention.seerattention import SeerAttention, SeerPolicy
from gossamer.calibration import Calibration
from gossamer.data import split, text, token_blocks
from gossamer.hf import AttentionRuntime, LayerView, PrefillPolicy, dense_attention, model_shape
from gossamer.models import fingerprint, load
from gossamer.reproductions.base import Outcome, Progress, Reproduction

LENGTH, BLOCK, TRAINED_ON, TEXTS, SEED = 1024, 32, 20, 3, 0
METHOD = SeerAttention(block_size=BLOCK, last_block_dense=0, steps=150, batch=4, lr=1e-3, warmup=20, seed=SEED)
AREAS = (0.5, 0.3, 0.2)
MSE_LAYERS = (4, 9, 14)
#: Blocks that a decode step reads, of up to 32: an eighth and a quarter of the context.
STEP_BLOCKS = (4, 8)
#: Recall at 0.3 over mean-pooled scores (absolute) and of the oracle's (times); perplexity at 0.3 of the mean-pooled (times) and
#: of the window's (times), at 0.5 of dense (times).
THRESHOLDS = {"over_mean": 0.15, "of_oracle": 0.95, "ppl_of_mean": 0.7, "ppl_of_window": 1.03, "ppl_of_dense": 1.10}

Kind = Literal["gate", "oracle", "window", "mean", "untrained"]


def fixed_scores(kind: Kind, query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Block scores ``[B, H, n, n]`` that need no gate, for rotated queries and keys."""
    n, device = -(-query.shape[2] // BLOCK), query.device
    if kind == "oracle":
        return ops.pooled_attention(query, key, BLOCK, scale=scale)
    at = torch.arange(n, device=device)
    if kind == "window":  # the row's own block, the first block, then the nearest
        scores: Tensor = (at - at[:, None]).float().expand(*query.shape[:2], n, n).clone()
        scores[..., 0] = 0.5
        scores.diagonal(dim1=2, dim2=3).fill_(1.0)
        return scores
    q, k = block_pools(query, BLOCK, ("avg",)), block_pools(key, BLOCK, ("avg",))
    scores = (q.unflatten(1, (key.shape[1], -1)) @ k.transpose(2, 3)[:, :, None]).flatten(1, 2)
    scores.diagonal(dim1=2, dim2=3).fill_(torch.inf)
    return scores


class _Chooser(SeerPolicy):
    """Prefill with the blocks that one of the ways chooses."""

    def __init__(self, trained: SeerPolicy, untrained: SeerPolicy, kind: Kind, area: float) -> None:
        super().__init__(METHOD.model_copy(update={"area": area}), trained.gates, trained.rotary, trained.wide)
        self.kind, self.gated = kind, {"gate": trained, "untrained": untrained}

    def scores(self, layer: LayerView, query: Tensor, key: Tensor) -> Tensor:
        """Those of this way."""
        gated = self.gated.get(self.kind)
        if gated is not None:
            return SeerPolicy.scores(gated, layer, query, key)
        return fixed_scores(self.kind, query, key, layer.scale)


class _Probe(SeerPolicy):
    """Attends densely; notes the attention mass of the second half's rows that lies in the blocks of each way."""

    def __init__(self, ways: dict[tuple[str, float], _Chooser]) -> None:
        one = next(iter(ways.values()))
        super().__init__(METHOD, one.gates, one.rotary, one.wide)
        self.ways = ways
        self.recall: dict[tuple[str, float], list[float]] = {way: [] for way in ways}

    def prefill(self, layer: LayerView, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Dense, with notes."""
        mass, half = block_mass(query, key, layer.scale), query.shape[2] // BLOCK // 2
        for way, chooser in self.ways.items():
            mask = chooser.mask(layer, query, key)[:, :, half:]
            self.recall[way].append(float((mass * mask).sum(-1).mean()))
        return dense_attention(query, key, value, layer.scale)


def block_mass(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention of the second half's rows by key block, averaged over the rows of a query block: ``[B, H, n/2, n]``."""
    length, group = query.shape[2], query.shape[1] // key.shape[1]
    half = length // 2
    later = torch.ones(length - half, length, dtype=torch.bool, device=query.device).triu(half + 1)
    parts = []
    for head in range(query.shape[1]):
        scores = query[:, head, half:].float() @ key[:, head // group].float().transpose(1, 2) * scale
        weights = scores.masked_fill_(later, -math.inf).softmax(-1)
        parts.append(weights.unflatten(2, (-1, BLOCK)).sum(3).unflatten(1, (-1, BLOCK)).mean(2))
    return torch.stack(parts, 1)


def _loss(model: Any, ids: Tensor, policy: PrefillPolicy | None, tail: int) -> float:
    runtime = AttentionRuntime(model, prefill=policy)
    try:
        with torch.no_grad():
            logits = model(ids[None], use_cache=True, logits_to_keep=tail + 1).logits[0, :-1].float()
    finally:
        runtime.detach()
    return float(nn.functional.cross_entropy(logits, ids[-tail:]))


def _policy(model: nn.Module, tensors: dict[str, Tensor]) -> SeerPolicy:
    facts = METHOD.model_dump(include={"block_size", "gate"})
    calibration = Calibration("seerattention", fingerprint(model), tensors, facts)
    return cast(SeerPolicy, METHOD.policies(model, calibration)["prefill"])


def squared_error_recall(model: nn.Module, collector: distill.Collector) -> dict[int, float]:
    """`target_recall` of gates that were trained with v1's squared error, for three layers."""
    method = METHOD.model_copy(update={"loss": "mse"})
    _, wide = method.rotaries(model)
    result = {}
    for layer in MSE_LAYERS:
        generator = torch.Generator().manual_seed(SEED + layer)
        gate = method.prefill_gate(model_shape(model), generator)
        with torch.enable_grad():
            distill.train_gate(method, gate, collector.prefill_samples[layer], wide, layer, LENGTH)
        result[layer] = target_recall(gate, collector.prefill_samples[layer], wide, layer)
    return result


def target_recall(gate: Any, samples: distill.Samples, wide: Any, layer: int) -> float:
    """Share of T (second half of the rows) in the blocks that a gate chooses at area 0.3, on the training sequences."""
    visible = visible_blocks(LENGTH, LENGTH, BLOCK, None, torch.device("cpu"))
    with torch.no_grad():
        scores = gate(torch.cat(samples.query), torch.cat(samples.key), wide, layer, BLOCK)
        mask = choose_blocks(scores, visible, area=0.3)
    half = mask.shape[2] // 2
    return float((torch.cat(samples.target).float() * mask)[:, :, half:].sum(-1).mean())


class _DecodeProbe(PrefillPolicy):
    """Attends densely; notes the mass of the second half's rows in the blocks that a decode step would read."""

    def __init__(self, policy: SeerDecodePolicy) -> None:
        self.policy = policy
        self.recall: dict[tuple[str, int], list[float]] = {}

    def prefill(self, layer: LayerView, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Dense, with notes."""
        p, length, kv_heads = self.policy, query.shape[2], key.shape[1]
        at, blocks = torch.arange(length // 2, length), torch.arange(length // BLOCK)
        own, gate, late = at[:, None] // BLOCK, p.gates[layer.index], query[:, :, length // 2 :]
        pooled = pooled_keys(layer, key, 0, length, BLOCK, gate.k_pools, p.rotary)
        plain = p.rotary.plain(late.float(), layer.index, at)
        window = torch.where(blocks == 0, 1.0, 0.0) + blocks / (2 * len(blocks))
        ways = {
            "gate": gate(plain, pooled, p.wide, layer.index, BLOCK, at),
            "oracle": distill.decode_ground_truth(late, key, BLOCK, None, layer.scale),
            "window": window.expand(len(query), kv_heads, len(at), -1),
        }
        weights = late.float().unflatten(1, (kv_heads, -1)) @ key.float().transpose(2, 3)[:, :, None] * layer.scale
        weights = weights.masked_fill(torch.arange(length) > at[:, None], -math.inf).softmax(-1)
        mass = weights.unflatten(4, (-1, BLOCK)).sum(5)
        for name, scores in ways.items():
            ranked = scores.masked_fill(blocks >= own, -math.inf)
            for count in STEP_BLOCKS:
                keep = (blocks == own).expand_as(ranked).clone()
                keep.scatter_(3, ranked.topk(count - 1, dim=3).indices, True)
                kept = float((mass * keep[:, :, None]).sum(-1).mean())
                self.recall.setdefault((name, count), []).append(kept)
        return dense_attention(query, key, value, layer.scale)


def decode_recall(model: nn.Module, train: Tensor, test: Tensor, progress: Progress) -> dict[str, float]:
    """Mass kept by decode gates trained on `train`, by the true best blocks, and by the first and nearest ones."""
    method = METHOD.model_copy(update={"phases": "decode"})
    policy = cast(SeerDecodePolicy, method.policies(model, distill.calibrate(method, model, train, progress))["decode"])
    probe = _DecodeProbe(policy)
    for ids in test:
        _loss(model, ids, probe, LENGTH // 2)
    return {f"{name} {count}": sum(values) / len(values) for (name, count), values in probe.recall.items()}


def _experiment(progress: Progress) -> Outcome:
    loaded = load("smollm2")
    model, prose = loaded.model, text("prose")
    train = token_blocks(loaded.tokenizer, split(prose, "calibration"), LENGTH, TRAINED_ON, seed=SEED)
    test = token_blocks(loaded.tokenizer, split(prose, "evaluation"), LENGTH, TEXTS, seed=SEED)
    collector = distill.collect(METHOD, model, train, progress)
    tensors, history = distill.distil(METHOD, model, collector, LENGTH, progress)
    fresh = torch.Generator().manual_seed(SEED)
    untrained = {
        f"prefill.{i}.{name}": p.detach()
        for i in range(model_shape(model).layers)
        for name, p in METHOD.prefill_gate(model_shape(model), fresh).named_parameters()
    }
    progress("squared error on three layers", 0, 1)
    trained, blank = _policy(model, tensors), _policy(model, untrained)
    of_targets = {
        "mse": squared_error_recall(model, collector),
        "kl": {i: target_recall(trained.gates[i], collector.prefill_samples[i], trained.wide, i) for i in MSE_LAYERS},
    }
    ways = {(kind, area): _Chooser(trained, blank, kind, area) for area in AREAS for kind in get_args(Kind)}
    run = [way for way in ways if way[1] != 0.2 or way[0] in ("gate", "oracle", "window")]
    run = [way for way in run if way[0] != "untrained" or way[1] == 0.3]
    recall: dict[tuple[str, float], list[float]] = {way: [] for way in ways}
    loss: dict[tuple[str, float], list[float]] = {way: [] for way in [("dense", 1.0), *run]}
    total = TEXTS * (len(run) + 1) + 5
    for index, ids in enumerate(test):
        progress("dense, with recall", index * (len(run) + 1), total)
        probe = _Probe(ways)
        loss["dense", 1.0].append(_loss(model, ids, probe, LENGTH // 2))
        for way, shares in probe.recall.items():
            recall[way].append(sum(shares) / len(shares))
        for offset, way in enumerate(run):
            progress(f"{way[0]} at {way[1]}", index * (len(run) + 1) + offset + 1, total)
            loss[way].append(_loss(model, ids, ways[way], LENGTH // 2))
    repeated = torch.cat([test[0][: 3 * LENGTH // 4], test[0][: LENGTH // 4]])
    echo = {}
    for offset, kind in enumerate(("dense", "gate", "oracle", "window", "mean")):
        progress(f"repeated passage: {kind}", total - 5 + offset, total)
        policy = None if kind == "dense" else ways[cast(Kind, kind), 0.3]
        echo[kind] = math.exp(_loss(model, repeated, policy, LENGTH // 4 - 1))
    del collector, ways, trained, blank
    steps = decode_recall(model, train, test, progress)
    return _outcome(recall, loss, echo, of_targets, history, steps)


def _outcome(
    recall: Any,
    loss: Any,
    echo: dict[str, float],
    of_targets: Any,
    history: dict[str, list[float]],
    steps: dict[str, float],
) -> Outcome:
    kept = {way: sum(values) / len(values) for way, values in recall.items()}
    ppl = {way: math.exp(sum(values) / len(values)) for way, values in loss.items()}
    gate, mean, window, oracle = (kept[kind, 0.3] for kind in ("gate", "mean", "window", "oracle"))
    checks = {
        "over_mean": gate >= mean + THRESHOLDS["over_mean"],
        "of_oracle": gate >= THRESHOLDS["of_oracle"] * oracle,
        "ppl_of_mean": ppl["gate", 0.3] <= THRESHOLDS["ppl_of_mean"] * ppl["mean", 0.3],
        "ppl_of_window": ppl["gate", 0.3] <= THRESHOLDS["ppl_of_window"] * ppl["window", 0.3],
        "ppl_of_dense": ppl["gate", 0.5] <= THRESHOLDS["ppl_of_dense"] * ppl["dense", 1.0],
    }
    failed = [name for name, held in checks.items() if not held]
    direction = gate > mean and ppl["gate", 0.3] < ppl["mean", 0.3]
    measured = (
        f"at 0.3 of the area: attention mass gate {gate:.3f}, oracle {oracle:.3f}, window {window:.3f}, mean-pooled {mean:.3f}, "
        f"untrained {kept['untrained', 0.3]:.3f}; perplexity dense {ppl['dense', 1.0]:.2f}, gate {ppl['gate', 0.3]:.2f}, oracle "
        f"{ppl['oracle', 0.3]:.2f}, window {ppl['window', 0.3]:.2f}, mean-pooled {ppl['mean', 0.3]:.1f}; at 0.5: gate "
        f"{ppl['gate', 0.5]:.2f}, window {ppl['window', 0.5]:.2f}; repeated passage at 0.3: dense {echo['dense']:.2f}, gate "
        f"{echo['gate']:.2f}, window {echo['window']:.2f}; decode steps of {STEP_BLOCKS[0]} blocks: attention mass gate "
        f"{steps[f'gate {STEP_BLOCKS[0]}']:.3f}, oracle {steps[f'oracle {STEP_BLOCKS[0]}']:.3f}, window "
        f"{steps[f'window {STEP_BLOCKS[0]}']:.3f}"
    )
    return Outcome(
        verdict="reproduced" if not failed else "direction only" if direction else "not reproduced",
        measured=measured,
        raw={
            "recall": {f"{kind} {area}": value for (kind, area), value in kept.items()},
            "recall_of_texts": {f"{kind} {area}": values for (kind, area), values in recall.items()},
            "perplexity": {f"{kind} {area}": value for (kind, area), value in ppl.items()},
            "loss": {f"{kind} {area}": values for (kind, area), values in loss.items()},
            "repeated_passage_perplexity": echo,
            "target_recall_of_layers": of_targets,
            "training_loss": {name: [values[0], values[-1]] for name, values in history.items()},
            "decode_recall": steps,
            "checks": checks,
        },
        explanation=f"failed: {', '.join(failed)}" if failed else "",
    )


REPRODUCTION = Reproduction(
    slug="seerattention",
    claim="gates on pooled queries and keys, distilled from the model's own attention, pick the blocks that matter",
    setting=(
        "SmolLM2-135M-Instruct, prose in 1024 tokens, blocks of 32, gates of all 30 layers trained on 20 sequences (KL, 150 "
        "steps of 4), tested on the second half of 3 others"
    ),
    threshold=(
        "at 0.3 of the area: attention mass >= mean-pooled + 0.15 and >= 0.95x oracle, perplexity <= 0.7x mean-pooled and "
        "<= 1.03x sink + window; at 0.5: perplexity <= 1.10x dense"
    ),
    seeds=(SEED,),
    experiment=_experiment,
)
