"""ALISA on SmolLM2: are half recent and half recently attended tokens enough, when every row of every layer is sparse?

Setting of the system's card: 2 texts of 512 tokens, no dense prompt: each row reads only its own set, from the first token
on; perplexity of the tokens behind position 128. Beside sparse window attention (SWA): a window of as many recent tokens
(local, which grows with the text too), every (1/r)-th token counted from the current one (strided), SWA with a set for each
query head. Two more of the paper's pictures: the cosine between a row and the same row's best tokens of equal number
(by head), and the rank correlation of the average attention each token receives with the dense model's.

INT8: one text step by step with all but about the last 64 tokens in an 8-bit tier, against the same text without it; decides
nothing. Schedule: OPT-30B on an 80 GB card with a 60 GB model, batch 64, 128 + 512 tokens, times from a roofline table of
the card's published constants; nothing of it was measured. It must go through its phases in order, and delete tokens below
some bandwidth of the link and not above.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from gossamer.attention.alisa import Alisa, SparseWindowPolicy
from gossamer.attention.alisa_formulas import half_budget
from gossamer.attention.alisa_schedule import AlisaPlan, Sizes, alisa_plan, roofline, simulate
from gossamer.data import split, text, token_blocks
from gossamer.hf import AttentionRuntime, LayerView, PrefillPolicy, dense_attention
from gossamer.models import load
from gossamer.reproductions.base import Outcome, Progress, Reproduction

LENGTH, FROM, TEXTS, SEED = 512, 128, 2, 0
THRESHOLDS = {"swa20_of_local20": 0.5, "swa20_of_dense": 1.4, "swa40_of_dense": 1.12}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {"ratio": 1.0}),
    "SWA 0.2": ("swa", {"ratio": 0.2}),
    "SWA 0.2 per head": ("swa", {"ratio": 0.2, "head_reduce": False}),
    "local 0.2": ("local", {"ratio": 0.2}),
    "strided 0.2": ("strided", {"ratio": 0.2}),
    "SWA 0.4": ("swa", {"ratio": 0.4}),
    "local 0.4": ("local", {"ratio": 0.4}),
    "strided 0.4": ("strided", {"ratio": 0.4}),
}
OPT_30B = Sizes(layers=48, hidden=7168, heads=56, kv_heads=56, head_dim=128, intermediate=4 * 7168)
H100: dict[str, Any] = {
    "flops": 400e12,
    "memory": 2.6e12,
    "launch": 2e-5,
}  # dense fp16 at a usual share of the peak; bytes and seconds
FAST_BYTES, BATCH, PROMPT, OUTPUT = 16_000_000_000, 64, 128, 512
BANDWIDTHS = tuple(1e9 * b for b in (2, 4, 8, 12, 16, 20, 24, 32, 48, 64, 128))


class Rows(SparseWindowPolicy):
    """SWA; notes how near rows are to their best tokens, and what each token receives, behind position `FROM`."""

    def __init__(self, method: Alisa) -> None:
        super().__init__(method)
        self.cosines: list[float] = []
        self.received: dict[int, Tensor] = {}

    def attend(
        self, layer: LayerView, query: Tensor, length: int, ids: Tensor, counts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As the method does, with notes."""
        out, weights = super().attend(layer, query, length, ids, counts)
        if length > FROM:
            received = self.received.setdefault(layer.index, torch.zeros(LENGTH, dtype=torch.float64))
            received.scatter_add_(0, ids.long().flatten(), weights.double().flatten())
            if length % 8 == 0:
                key, _ = layer.rows(length)
                logits = (query.view(key.shape[1], -1, key.shape[3]) @ key[0].transpose(1, 2) * layer.scale).flatten(
                    0, 1
                )
                mask = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids.long().expand(len(logits), -1), True)
                self.cosines.append(cosine_to_best(logits, mask))
        return out, weights


class Masked(PrefillPolicy):
    """A pattern that is known beforehand, bool ``[n, n]``, read in one forward; the same notes."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.cosines: list[float] = []
        self.received: dict[int, Tensor] = {}

    def prefill(self, layer: LayerView, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Masked attention, with notes."""
        grouped = query[0].unflatten(0, (key.shape[1], -1))
        logits = (grouped @ key[0].unsqueeze(1).transpose(2, 3)).flatten(0, 1) * layer.scale
        weights = logits.masked_fill(~self.mask, -torch.inf).softmax(-1)
        self.received[layer.index] = weights[:, FROM:].double().sum((0, 1))
        for length in range(FROM // 8 * 8 + 8, len(self.mask) + 1, 8):
            row = logits[:, length - 1, :length]
            self.cosines.append(cosine_to_best(row, self.mask[length - 1, :length].expand_as(row)))
        return dense_attention(query, key, value, layer.scale, mask=self.mask)


def pattern(kind: str, ratio: float) -> Tensor:
    """bool ``[LENGTH, LENGTH]`` of the rows that read as many tokens as SWA (local), or every (1/r)-th (strided)."""
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    seen = distance >= 0
    if kind == "local":
        budget = [2 * half_budget(ratio, n) + 1 if half_budget(ratio, n) else n + 1 for n in range(LENGTH)]
        return seen & (distance < torch.tensor(budget)[:, None])
    if kind == "strided":
        kept = torch.zeros(LENGTH + 1, dtype=torch.bool)
        kept[(torch.arange(math.ceil(LENGTH * ratio)) / ratio).long().clamp_max(LENGTH)] = True
        return seen & kept[distance.clamp_min(0)]
    return seen


def cosine_to_best(logits: Tensor, mask: Tensor) -> float:
    """Mean over heads of the cosine between a row over its tokens and over as many of its best ones, ``[heads, n]``."""
    best = torch.zeros_like(mask).scatter_(1, logits.topk(int(mask[0].sum())).indices, True)
    got, want = (logits.masked_fill(~m, -torch.inf).softmax(-1) for m in (mask, best))
    return float(torch.nn.functional.cosine_similarity(got, want, dim=-1).mean())


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation; equal values share no rank, which among hundreds of distinct sums does not matter.

    >>> spearman(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([0.0, 2.0, 3.0]))
    1.0
    """
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def _perplexity(log_probs: Tensor, tokens: Tensor) -> float:
    """Of the tokens behind position `FROM`; `log_probs` ``[length, vocabulary]``."""
    picked = log_probs[FROM:-1].gather(1, tokens[FROM + 1 :, None])
    return float((-picked).mean().exp())


def _run(model: Any, tokens: Tensor, kind: str, settings: dict[str, Any]) -> tuple[float, Rows | Masked]:
    notes: Rows | Masked
    if kind == "swa":
        notes = Rows(Alisa(**settings))
        runtime = AttentionRuntime(model, decode=notes)
    else:
        notes = Masked(pattern(kind, **settings))
        runtime = AttentionRuntime(model, prefill=notes)
    try:
        with torch.no_grad(), runtime.teacher_forcing() if kind == "swa" else nullcontext():
            logits = model(tokens[None], use_cache=True).logits[0]
    finally:
        runtime.detach()
    return _perplexity(logits.float().log_softmax(-1), tokens), notes


def _step_by_step(model: Any, tokens: Tensor, method: Alisa) -> float:
    with method.attach(model), torch.no_grad():
        cache, rows = None, []
        for token in tokens[None].split(1, 1):
            out = model(token, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0, 0].float().log_softmax(-1))
    return _perplexity(torch.stack(rows), tokens)


def _schedule() -> dict[str, Any]:
    """OPT-30B's plans over bandwidths: switches, times, and what phase III and INT8 give."""
    profile = roofline(OPT_30B, BATCH, PROMPT + OUTPUT, **H100)
    found: dict[str, Any] = {}
    for bandwidth in BANDWIDTHS:
        how: dict[str, Any] = {"fast_bytes": FAST_BYTES, "bandwidth": bandwidth, "profile": profile}
        plan = alisa_plan(OPT_30B, BATCH, PROMPT, OUTPUT, **how)
        small = alisa_plan(OPT_30B, BATCH, PROMPT, OUTPUT, **how, kv_bits=8)
        kept: AlisaPlan = plan.model_copy(update={"beta": 0.0, "p2": OUTPUT})
        simulation = simulate(plan)
        found[f"{bandwidth / 1e9:g} GB/s"] = {
            **{name: getattr(plan, name) for name in ("alpha", "beta", "p1", "p2")},
            "phases": simulation.phases,
            "seconds": simulation.seconds,
            "gigabytes": simulation.bytes / 1e9,
            "gain_of_recomputation": simulate(kept).seconds / simulation.seconds,
            "gain_of_int8": simulation.seconds / simulate(small).seconds,
            "int8_beta": small.beta,
        }
    return found


def _experiment(progress: Progress) -> Outcome:
    loaded = load("smollm2")
    texts = token_blocks(loaded.tokenizer, split(text("prose"), "evaluation"), LENGTH, TEXTS, seed=SEED)
    losses: dict[str, list[float]] = {name: [] for name in RUNS}
    cosines: dict[str, list[float]] = {name: [] for name in RUNS}
    ranks: dict[str, list[float]] = {name: [] for name in RUNS}
    for tokens in texts:
        dense: dict[int, Tensor] = {}
        for index, (name, (kind, settings)) in enumerate(RUNS.items()):
            progress(name, index, len(RUNS))
            value, notes = _run(loaded.model, tokens, kind, settings)
            losses[name].append(math.log(value))
            dense = dense or notes.received
            cosines[name] += notes.cosines
            ranks[name] += [spearman(notes.received[i], dense[i]) for i in dense]
    progress("INT8", len(RUNS), len(RUNS))
    tiered: dict[str, Any] = {"offload": "host", "fast_tokens": 64, "block": 32}
    int8 = _step_by_step(loaded.model, texts[0], Alisa(**tiered, kv_bits=8))
    perplexity = {name: math.exp(sum(values) / len(values)) for name, values in losses.items()}
    schedule = _schedule()
    betas = [entry["beta"] > 0 for entry in schedule.values()]
    figures = {
        "swa20_of_local20": perplexity["SWA 0.2"] / perplexity["local 0.2"],
        "swa20_of_dense": perplexity["SWA 0.2"] / perplexity["dense"],
        "swa40_of_dense": perplexity["SWA 0.4"] / perplexity["dense"],
    }
    failed = [name for name, figure in figures.items() if figure >= THRESHOLDS[name]]
    if betas != sorted(betas, reverse=True) or all(betas) or not any(betas):
        failed.append("recomputation pays below some bandwidth only")
    if any(entry["phases"] != sorted(entry["phases"]) for entry in schedule.values()):
        failed.append("phases in order")
    means = {name: sum(values) / len(values) for name, values in cosines.items() if values}
    rho = {name: sum(values) / len(values) for name, values in ranks.items()}
    direction = figures["swa20_of_local20"] < 1 and perplexity["SWA 0.4"] < perplexity["local 0.4"]
    highest = max((b for b, pays in zip(BANDWIDTHS, betas, strict=True) if pays), default=0.0) / 1e9
    at20 = schedule["20 GB/s"]
    return Outcome(
        verdict="reproduced" if not failed else "direction only" if direction else "not reproduced",
        measured=(
            f"perplexity dense {perplexity['dense']:.2f}; r=0.2: SWA {perplexity['SWA 0.2']:.2f}, per head "
            f"{perplexity['SWA 0.2 per head']:.2f}, local {perplexity['local 0.2']:.1f}, strided "
            f"{perplexity['strided 0.2']:.0f}; r=0.4: SWA {perplexity['SWA 0.4']:.2f}, local {perplexity['local 0.4']:.1f}, "
            f"strided {perplexity['strided 0.4']:.0f}; cosine to the best tokens {means['SWA 0.2']:.3f} (local "
            f"{means['local 0.2']:.3f}); simulated OPT-30B: recomputation pays up to {highest:g} GB/s, "
            f"{at20['gain_of_recomputation']:.2f}x at 20"
        ),
        raw={
            "figures": figures,
            "thresholds": THRESHOLDS,
            "perplexity": perplexity,
            "loss_by_text": losses,
            "cosine_to_best": means,
            "spearman_to_dense": rho,
            "perplexity_of_the_first_text": {"SWA 0.2": math.exp(losses["SWA 0.2"][0]), "with an INT8 tier": int8},
            "tokens_attended_at_the_end": {str(r): 2 * half_budget(r, LENGTH - 1) + 1 for r in (0.2, 0.4)},
            "simulated_opt_30b": schedule,
            "simulated_constants": {**H100, "fast_bytes": FAST_BYTES, "batch": BATCH},
        },
        explanation=f"failed: {', '.join(failed)}" if failed else "",
    )


REPRODUCTION = Reproduction(
    slug="alisa",
    claim="at 80 % KV sparsity near dense, where local and strided attention collapse; recomputation gains on a slow link",
    setting="SmolLM2-135M-Instruct, 2 texts of 512 tokens, every row of every layer sparse, perplexity behind token 128",
    threshold=(
        "perplexity: SWA(0.2) < 0.5x local(0.2) and < 1.4x dense, SWA(0.4) < 1.12x dense; simulated schedule: phases in "
        "order, and recomputation only below some bandwidth"
    ),
    seeds=(SEED,),
    experiment=_experiment,
)
