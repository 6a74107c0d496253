"""MInference on SmolLM2: at equal kernel area, do placed columns and diagonals keep what a static shape loses?

Setting of the system's card: windows of 2048 tokens of prose, B=16, 4 sinks, 16 local slashes, 64 witnesses, every head of
every policy at about 15 % of the causal area, counted at kernel level. Policies: A-shape, vertical-slash (k_v : k_s = 64 : 24,
as in the card's trial), block-sparse, and each head's own by the search. The search is the paper's, run on the first window,
among these three and the candidates of its Table 7 scaled by 2048/30000; masses and perplexities are of the other windows.

(a) Attention mass that the kernel-level pattern keeps of a dense run, rows of the second half, mean over heads and layers.
(b) Perplexity of the second half with the whole prompt read sparsely.
(c) A passkey in 2048 tokens, outside A-shape's sinks and window: the prompt is read sparsely, its last token included, so that
    the first digit comes from sparse attention alone; the other digits are then decoded densely, as the paper does.

Settings were tried on two windows of another seed, where searched kept less mass than vertical-slash (0.839, 0.866) at a lower
perplexity (6.2, 6.5; dense 4.5). The thresholds are the card's, and stayed.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from gossamer import ops
from gossamer.attention import minference_run as running
from gossamer.attention import minference_search as searching
from gossamer.attention.minference_run import A_SHAPE, BLOCK_SPARSE, KINDS, VERTICAL_SLASH, Heads, Online, PatternPolicy
from gossamer.attention.minference_search import Candidate, Plan
from gossamer.data import encode, split, text, token_blocks
from gossamer.data.tasks import passkey
from gossamer.hf import AttentionRuntime, GossamerCache, LayerView, PrefillPolicy, dense_attention
from gossamer.models import load
from gossamer.reproductions.base import Outcome, Progress, Reproduction

SEED = 0
WINDOW, WINDOWS, AREA = 2048, 4, 0.15
ONLINE = Online(last_q=64, sinks=4, local=16, block_size=16)
#: A-shape of about 15 % of the causal area.
TARGET = (32, 112)
#: k_v and k_s of the uniform vertical-slash; scaled to the area.
RATIO = (64, 24)
SCALE = WINDOW / searching.PAPER_SAMPLE
DEPTHS = (0.25, 0.5)
#: "mass": VS over A-shape, at least; "perplexity": searched over dense, at most.
THRESHOLDS = {"mass": 0.03, "perplexity": 1.10}


def plan() -> Plan:
    """The paper's search with Table 7 scaled to the window, and the uniform vertical-slash, at this experiment's target."""
    space = [Candidate(VERTICAL_SLASH, *RATIO, "both"), *(c.scaled(SCALE) for c in searching.PAPER_SPACE)]
    return Plan(target=TARGET, step=1, space=space)


class _Probe(PrefillPolicy):
    """Attends densely; notes the mass that each policy would keep of the second half's queries, and its area."""

    def __init__(self, ways: dict[str, list[Heads]]) -> None:
        self.ways = ways
        self.mass: dict[str, list[float]] = {name: [] for name in ways}
        self.area: dict[str, list[float]] = {name: [] for name in ways}

    def prefill(self, layer: LayerView, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Dense, with notes."""
        length, group = key.shape[2], query.shape[1] // key.shape[1]
        half = length // 2
        kinds = torch.tensor([VERTICAL_SLASH, BLOCK_SPARSE])
        scores = running.estimate(query, key, kinds, ONLINE, layer.scale)
        grouped = query[:, :, half:].unflatten(1, (-1, group))
        weights = (grouped @ key.unsqueeze(2).transpose(3, 4) * layer.scale).flatten(1, 2)
        later = torch.ones(length - half, length, dtype=torch.bool).triu(half + 1)
        weights = weights.masked_fill_(later, -math.inf).softmax(-1)
        for name, layers in self.ways.items():
            heads = running.fit_area(scores, layers[layer.index], ONLINE, length, AREA)
            kept = (weights * kernel_mask(scores, heads, length)[:, :, half:]).sum(-1)
            self.mass[name].append(float(kept.mean()))
            self.area[name].append(float(running.areas(scores, heads, ONLINE, length).mean()))
        return dense_attention(query, key, value, layer.scale, starts=layer.starts, window=layer.window)


def kernel_mask(scores: running.Scores, heads: Heads, length: int) -> Tensor:
    """What the kernels compute for the heads of a layer, boolean ``[batch, heads, length, length]``."""
    mine = (heads.kind == VERTICAL_SLASH)[:, None, None]
    mask = torch.zeros(1, len(heads.kind), length, length, dtype=torch.bool)
    if bool(mine.any()):
        lists = running.slash_lists(scores, heads, ONLINE)
        mask = mask | ops.vertical_slash_index(*lists, length, ONLINE.block_size).to_mask() & mine
    if not bool(mine.all()):
        blocks = running.block_mask(scores, heads, ONLINE, length)
        tokens = blocks.repeat_interleave(ONLINE.block_size, 2).repeat_interleave(ONLINE.block_size, 3)
        mask = mask | tokens[..., :length, :length]
    return mask


def _policy(layers: list[Heads] | None) -> PatternPolicy | None:
    return None if layers is None else PatternPolicy("minference", layers, ONLINE, AREA)


def _loss(model: Any, ids: Tensor, policy: PrefillPolicy | None) -> float:
    """Cross-entropy of the second half."""
    half, runtime = len(ids) // 2, AttentionRuntime(model, prefill=policy)
    try:
        with torch.no_grad():
            logits: Tensor = model(ids[None], use_cache=True, logits_to_keep=half + 1).logits[0, :-1].float()
    finally:
        runtime.detach()
    return float(torch.nn.functional.cross_entropy(logits, ids[-half:]))


def _answer(model: Any, prompt: Tensor, answer: Tensor, policy: PrefillPolicy | None) -> Tensor:
    """Log-probabilities ``[answer, vocabulary]``: the first by the prompt's prefill, the others decoded."""
    runtime, cache = AttentionRuntime(model, prefill=policy), GossamerCache(reserve=len(prompt) + len(answer))
    try:
        with torch.no_grad():
            first = model(prompt[None], past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0]
            with runtime.teacher_forcing():
                rest = model(answer[None, :-1], past_key_values=cache, use_cache=True).logits[0]
    finally:
        runtime.detach()
    return torch.cat([first, rest]).float().log_softmax(-1)


def _experiment(progress: Progress) -> Outcome:
    loaded = load("smollm2")
    model, tokenizer = loaded.model, loaded.tokenizer
    blocks = token_blocks(tokenizer, split(text("prose"), "evaluation"), WINDOW, WINDOWS, seed=SEED)
    names = ("a-shape", "vertical-slash", "block-sparse", "searched")
    total = 1 + (WINDOWS - 1) * (1 + len(names)) + len(DEPTHS) * (1 + len(names))
    progress("searching on the first window", 0, total)
    calibration = searching.search(model, blocks[:1], ONLINE, plan())
    kinds = calibration.tensors["kind"]
    layers, heads = kinds.shape
    ways = {
        "a-shape": [Heads.uniform(A_SHAPE, *TARGET, heads)] * layers,
        "vertical-slash": [Heads.uniform(VERTICAL_SLASH, *RATIO, heads)] * layers,
        "block-sparse": [Heads.uniform(BLOCK_SPARSE, 10, 1, heads)] * layers,
        "searched": searching.heads_of(calibration, layers, heads),
    }
    probe, done = _Probe(ways), 1
    loss: dict[str, list[float]] = {"dense": [], **{name: [] for name in names}}
    areas: dict[str, list[float]] = {name: [] for name in names}
    for window in blocks[1:]:
        for name in loss:
            progress(f"perplexity: {name}", done, total)
            policy = _policy(ways.get(name))
            loss[name].append(_loss(model, window, probe if policy is None else policy))
            if policy is not None:
                areas[name].append(policy.report()["prefill_area"])
            done += 1
    asked: dict[str, list[float]] = {name: [] for name in loss}
    right: dict[str, list[float]] = {name: [] for name in loss}
    for number, depth in enumerate(DEPTHS):
        example = passkey(tokenizer, WINDOW, number + 1, SEED, depth)[number]
        prompt, answer = (torch.tensor(x) for x in encode(tokenizer, example))
        for name in loss:
            progress(f"passkey: {name}", done, total)
            log_probs = _answer(model, prompt, answer, _policy(ways.get(name)))
            asked[name].append(float(log_probs.gather(1, answer[:, None]).mean()))
            right[name].append(float((log_probs.argmax(-1) == answer).float().mean()))
            done += 1
    mass = {name: sum(x) / len(x) for name, x in probe.mass.items()}
    ppl = {name: math.exp(sum(x) / len(x)) for name, x in loss.items()}
    full = {name: sum(x == 1.0 for x in shares) for name, shares in right.items()}
    checks = {
        "mass of searched": mass["searched"] >= mass["vertical-slash"],
        "mass of vertical-slash": mass["vertical-slash"] >= mass["a-shape"] + THRESHOLDS["mass"],
        "perplexity": ppl["searched"] <= THRESHOLDS["perplexity"] * ppl["dense"],
        "block-sparse worst": ppl["block-sparse"] == max(ppl.values()),
        "retrieval": full["dense"] == full["vertical-slash"] == len(DEPTHS) and full["a-shape"] == 0,
    }
    failed = [name for name, held in checks.items() if not held]
    direction = checks["mass of vertical-slash"] and ppl["searched"] < min(ppl["a-shape"], ppl["block-sparse"])
    chosen = Counter(KINDS[int(kind)] for kind in kinds.flatten())
    measured = (
        f"mass kept at {AREA:.0%} area: searched {mass['searched']:.3f}, vertical-slash {mass['vertical-slash']:.3f}, A-shape "
        f"{mass['a-shape']:.3f}, block-sparse {mass['block-sparse']:.3f}; perplexity: dense {ppl['dense']:.2f}, searched "
        f"{ppl['searched']:.2f}, vertical-slash {ppl['vertical-slash']:.2f}, A-shape {ppl['a-shape']:.2f}, block-sparse "
        f"{ppl['block-sparse']:.2f}; passkeys of {len(DEPTHS)}: "
        + ", ".join(f"{name} {full[name]}" for name in right)
        + "; heads: "
        + ", ".join(f"{kind} {chosen[kind]}" for kind in KINDS)
    )
    return Outcome(
        verdict="reproduced" if not failed else "direction only" if direction else "not reproduced",
        measured=measured,
        raw={
            "mass": mass,
            "mass_of_layers": probe.mass,
            "area": {name: sum(x) / len(x) for name, x in areas.items()},
            "area_on_dense_states": {name: sum(x) / len(x) for name, x in probe.area.items()},
            "loss": loss,
            "perplexity": ppl,
            "passkey": {"depths": DEPTHS, "log_prob": asked, "digits_right": right},
            "patterns": searching.export_config(calibration),
            "heads": dict(chosen),
            "checks": checks,
        },
        explanation=f"failed: {', '.join(failed)}" if failed else "",
    )


REPRODUCTION = Reproduction(
    slug="minference",
    claim="a pattern per head, found offline and placed online, keeps what static patterns of equal cost lose in prefill",
    setting=(
        "SmolLM2-135M-Instruct, 4 windows of 2048 tokens of prose, B=16, 4 sinks, 16 local slashes, 64 witnesses, 15 % of the "
        "causal area at kernel level; search on window 1, test on 2-4; 2 passkeys in 2048 tokens"
    ),
    threshold=(
        "mass searched >= vertical-slash >= A-shape + 0.03; perplexity searched <= 1.10x dense, block-sparse worst of all; "
        "dense and vertical-slash answer both passkeys, A-shape none"
    ),
    seeds=(SEED,),
    experiment=_experiment,
)
