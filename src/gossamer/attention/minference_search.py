"""MInference's offline search: which pattern each head gets, all candidates costing the kernel the same.

Paper (Alg. 1), per head on one sample, with t = kernel area of A-shape(1024, 4096):

    for each candidate: change the budget it moves, by steps of 50, while |area − t| ≥ ε
    best = argmin ‖ sparse(Q, K, V) − dense(Q, K, V) ‖  over the candidates

Candidates are those that the paper's search ends with (Table 7). Each names the budget that moves: k_s of
VS(30, ·), VS(100, ·) and VS(500, ·), k_v of VS(·, 200), k_b of BS; A-shape is at t by definition. A candidate whose least
budget costs more than (1 + ε)·t is out for that head.

`search="released"` is the official code's other search: candidates of fixed budgets, the best mean attention mass that the
token-level pattern retains over the rows from 2500 on, and the winner renamed: A-shape is stored as vertical-slash with the
same numbers, block-sparse as VS(1000, 6096). `search="released-outputs"` is its second variant: two more vertical-slash
candidates, and the fewest outputs that are off by more than 5e-3.

Numbers are for samples of 30,000 tokens; a shorter sample scales them down by its length, unless `scale` is given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from gossamer.attention import minference_patterns as patterns
from gossamer.attention.minference_run import (
    A_SHAPE,
    BLOCK_SPARSE,
    KINDS,
    UNIT,
    VERTICAL_SLASH,
    Heads,
    Online,
    Scores,
    areas,
    attend,
    estimate,
    fit,
    most_units,
    slash_lists,
)
from gossamer.calibration import Calibration
from gossamer.data import encode, make_task
from gossamer.errors import CalibrationError, InputError
from gossamer.hf import AttentionRuntime, LayerView, PrefillPolicy, dense_attention
from gossamer.hf.views import model_shape, text_config
from gossamer.models import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SLUG = "minference"
PAPER_SAMPLE = 30_000
OFF = 5e-3  # an output that differs by more counts as wrong (released-outputs)
RELEASED_BS = (1000, 6096)  # what the released search stores for a block-sparse head
_RELEASED_BLOCK = 32
_ROWS = 1 << 23  # probabilities held at a time in the released search

Search = Literal["paper", "released", "released-outputs"]


class Candidate(NamedTuple):
    """A pattern with budgets; `moves` says which of the two is fitted to the target area (both: their ratio stays)."""

    kind: int
    first: int
    second: int
    moves: Literal["first", "second", "both"] | None = None

    def scaled(self, scale: float) -> Candidate:
        """Budgets times `scale`, 1 at least (0 stays 0)."""
        first, second = (max(1, round(x * scale)) if x else 0 for x in (self.first, self.second))
        return self._replace(first=first, second=second)


#: Paper, Table 7, without the A-shape, which is the target.
PAPER_SPACE = (
    Candidate(VERTICAL_SLASH, 30, 2048, "second"),
    Candidate(VERTICAL_SLASH, 100, 1800, "second"),
    Candidate(VERTICAL_SLASH, 500, 1500, "second"),
    Candidate(VERTICAL_SLASH, 3000, 200, "first"),
    Candidate(BLOCK_SPARSE, 100, 0, "first"),
)
#: The released script's; its block-sparse candidate keeps an eighth of the blocks of 32.
RELEASED_SPACE = (
    Candidate(A_SHAPE, 100, 800),
    Candidate(VERTICAL_SLASH, 30, 800),
    Candidate(VERTICAL_SLASH, 100, 750),
    Candidate(VERTICAL_SLASH, 500, 700),
    Candidate(VERTICAL_SLASH, 3500, 100),
    Candidate(BLOCK_SPARSE, 0, 0),
)
RELEASED_MORE = (Candidate(VERTICAL_SLASH, 100, 800), Candidate(VERTICAL_SLASH, 1000, 4096))


@dataclass(frozen=True)
class Plan:
    """What is searched: the target A-shape, the candidates, ε and the step; token numbers before scaling."""

    search: Search = "paper"
    target: tuple[int, int] = (1024, 4096)
    epsilon: float = 0.02
    step: int = 50
    skip_rows: int = 2500
    scale: float = 1.0
    space: Sequence[Candidate] | None = None

    @property
    def candidates(self) -> list[Candidate]:
        """All of them, scaled; in the paper's search the target comes first."""
        if self.search == "paper":
            space = [Candidate(A_SHAPE, *self.target), *(PAPER_SPACE if self.space is None else self.space)]
        else:
            space = list(RELEASED_SPACE if self.space is None else self.space)
            if self.search == "released-outputs":
                space += RELEASED_MORE
        return [c.scaled(self.scale) for c in space]


class Found(NamedTuple):
    """The best pattern of each head, its score (lower is better) and its kernel area ``[heads]``."""

    heads: Heads
    score: Tensor
    area: Tensor


def candidate_heads(
    candidate: Candidate, scores: Scores, online: Online, length: int, heads: int, goal: float, plan: Plan
) -> tuple[Heads, Tensor]:
    """A candidate for every head with the budget that moves fitted to `goal`, and its kernel area ``[heads]``."""
    device = next(s.device for s in scores if s is not None)
    made = Heads.uniform(candidate.kind, candidate.first, candidate.second, heads).to(device)
    if candidate.moves is None:
        return made, areas(scores, made, online, length)
    moves, step = candidate.moves, max(1, round(plan.step * plan.scale))
    if moves == "both":
        step, most = 1, most_units(made, length)
    elif candidate.kind == BLOCK_SPARSE:
        step, most = 1, torch.full_like(made.first, -(-length // online.block_size))
    else:
        most = torch.full_like(made.first, max(length, step))

    def with_budget(budget: Tensor) -> Heads:
        return made.scaled(budget / UNIT) if moves == "both" else made._replace(**{moves: budget})

    def area_of(budget: Tensor, exact: bool = False) -> Tensor:
        return areas(scores, with_budget(budget), online, length, exact=exact)

    least = torch.ones_like(most)
    budget, _ = fit(area_of, goal, least, most, step, plan.epsilon)
    area = area_of(budget, exact=True)
    if bool((area > goal * (1 + plan.epsilon)).any()):  # the estimate of the area was a little low: by the index, then
        budget, _ = fit(lambda b: area_of(b, exact=True), goal, least, budget, step, plan.epsilon)
        area = area_of(budget, exact=True)
    return with_budget(budget), area


def search_layer(
    query: Tensor, key: Tensor, value: Tensor, scale: float, online: Online, plan: Plan
) -> tuple[Found, Tensor]:
    """Search one layer on one prompt (batch 1); also returns its dense output.

    Args:
        query: ``[1, heads, length, d]``; key, value: ``[1, kv_heads, length, d]``.
    """
    dense = dense_attention(query, key, value, scale)
    if plan.search == "released":
        return _released(query, key, scale, online, plan), dense
    length, count = key.shape[2], query.shape[1]
    goal = patterns.a_shape_area(length, *plan.candidates[0][1:3], online.block_size)
    scores = estimate(query, key, torch.tensor([VERTICAL_SLASH, BLOCK_SPARSE]), online, scale)
    tried, errors, shares = [], [], []
    for candidate in plan.candidates:
        at, known = online, scores
        if plan.search == "paper":
            heads, area = candidate_heads(candidate, scores, online, length, count, goal, plan)
        else:
            if candidate.kind == BLOCK_SPARSE:
                at = replace(online, block_size=_RELEASED_BLOCK)
                candidate = candidate._replace(first=max(1, -(-length // _RELEASED_BLOCK) // 8))
                known = estimate(query, key, torch.tensor([BLOCK_SPARSE]), at, scale)
            heads = Heads.uniform(*candidate[:3], count).to(query.device)
            area = areas(known, heads, at, length)
        out, _ = attend(query, key, value, heads, known, at, scale)
        off = (out - dense).float()[0]
        if plan.search == "paper":
            error = off.flatten(1).norm(dim=1).masked_fill(area > goal * (1 + plan.epsilon), math.inf)
        else:
            error = (off.abs() > OFF).flatten(1).sum(1).float()
        tried.append(heads)
        errors.append(error)
        shares.append(area)
    found = _best(tried, torch.stack(errors), torch.stack(shares))
    return (found if plan.search == "paper" else _renamed(found)), dense


def _best(tried: Sequence[Heads], errors: Tensor, shares: Tensor) -> Found:
    """The candidate with the least error for each head; the earlier one of equals."""
    winner = errors.argsort(dim=0, stable=True)[:1]
    heads = Heads(*(torch.stack([h[i] for h in tried]).gather(0, winner)[0] for i in range(3)))
    return Found(heads, errors.gather(0, winner)[0], shares.gather(0, winner)[0])


def _renamed(found: Found) -> Found:
    """As the released script stores its winners: every pattern becomes vertical-slash."""
    kind, first, second = found.heads
    block = kind == BLOCK_SPARSE
    first, second = torch.where(block, RELEASED_BS[0], first), torch.where(block, RELEASED_BS[1], second)
    return found._replace(heads=Heads(torch.full_like(kind, VERTICAL_SLASH), first, second))


def retained_mass(query: Tensor, key: Tensor, scale: float, masks: Sequence[Any], first_row: int) -> Tensor:
    """Mean attention mass that token-level masks keep over the rows from `first_row` on: float32 ``[masks, heads]``.

    `masks` are functions of a slice of rows that give boolean ``[heads or 1, rows, length]``.
    """
    heads, length, kv_heads = query.shape[1], key.shape[2], key.shape[1]
    step, kept = max(1, _ROWS // (heads * length)), torch.zeros(len(masks), heads, device=query.device)
    for begin in range(first_row, length, step):
        rows = slice(begin, min(begin + step, length))
        grouped = query[0, :, rows].float().unflatten(0, (kv_heads, -1)).flatten(1, 2) * scale
        logits = (grouped @ key[0].float().transpose(1, 2)).unflatten(1, (heads // kv_heads, -1)).flatten(0, 1)
        i, j = (
            torch.arange(rows.start, rows.stop, device=query.device)[:, None],
            torch.arange(length, device=query.device),
        )
        weights = logits.masked_fill_(j > i, -math.inf).softmax(-1)
        for number, mask in enumerate(masks):
            kept[number] += (weights * mask(rows)).sum((1, 2))
    return kept / max(1, length - first_row)


def token_mask(heads: Heads, scores: Scores, online: Online, length: int) -> Any:
    """The token-level mask of one candidate as a function of a slice of rows, for `retained_mass`."""
    kind, device = int(heads.kind[0]), heads.kind.device
    j = torch.arange(length, device=device)
    if kind == VERTICAL_SLASH:
        columns, distances = (patterns.members(ids, length)[0] for ids in slash_lists(scores, heads, online))
    if kind == BLOCK_SPARSE:
        assert scores.blocks is not None
        blocks = patterns.choose_blocks(scores.blocks, heads.first)[0]

    def mask(rows: slice) -> Tensor:
        i = torch.arange(rows.start, rows.stop, device=device)[:, None]
        if kind == A_SHAPE:
            return ((i - j < int(heads.second[0])) | (j < int(heads.first[0])))[None]
        if kind == BLOCK_SPARSE:
            return blocks[:, i // online.block_size, j // online.block_size]
        return columns[:, None] | distances[:, (i - j).clamp_min(0)]

    return mask


def _released(query: Tensor, key: Tensor, scale: float, online: Online, plan: Plan) -> Found:
    """The released script's first search, with its winners renamed."""
    length, count = key.shape[2], query.shape[1]
    small = replace(online, block_size=_RELEASED_BLOCK)
    slash = estimate(query, key, torch.tensor([VERTICAL_SLASH]), online, scale)
    block = estimate(query, key, torch.tensor([BLOCK_SPARSE]), small, scale)
    tried, masks, shares = [], [], []
    for candidate in plan.candidates:
        at, scores = online, slash
        if candidate.kind == BLOCK_SPARSE:
            at, scores = small, block
            candidate = candidate._replace(first=max(1, -(-length // _RELEASED_BLOCK) // 8))
        heads = Heads.uniform(*candidate[:3], count).to(query.device)
        tried.append(heads)
        masks.append(token_mask(heads, scores, at, length))
        shares.append(areas(scores, heads, at, length))
    first_row = min(round(plan.skip_rows * plan.scale), length - 1)
    mass = retained_mass(query, key, scale, masks, first_row)
    return _renamed(_best(tried, -mass, torch.stack(shares)))


class _Searcher(PrefillPolicy):
    """Searches every layer as the sample passes through it, densely."""

    def __init__(self, online: Online, plan: Plan) -> None:
        self.online, self.plan = online, plan
        self.found: dict[int, Found] = {}

    def prefill(self, layer: LayerView, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Search, and pass the dense output on."""
        if layer.window and layer.window < key.shape[2]:
            raise CalibrationError(
                "minference: this model has layers with a window of their own: calibration not supported"
            )
        self.found[layer.index], out = search_layer(query, key, value, layer.scale, self.online, self.plan)
        return out


def sample(tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int = 0) -> Tensor:
    """The paper's kind of sample, one KV-retrieval prompt of about `tokens` tokens: int64 ``[1, length]``."""
    prompt, answer = encode(tokenizer, make_task("needle_kv", tokenizer, tokens, 1, seed)[0])
    return torch.tensor([prompt + answer])


def search(model: nn.Module, tokens: Tensor, online: Online, plan: Plan) -> Calibration:
    """Search all layers on the sample `tokens` int64 ``[blocks, block]``, joined into one prompt.

    Raises:
        InputError: `tokens` is no integer matrix, too short for the target, or the model is in training mode.
        CalibrationError: layers that were never reached, or scores that are not finite.
    """
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.numel() < 2 * online.block_size:
        raise InputError(
            f"minference: the sample must be an integer matrix of {2 * online.block_size} tokens or more, "
            f"got {list(tokens.shape)} {tokens.dtype}"
        )
    if model.training:
        raise InputError("calibration needs the model as it will run: call model.eval() first")
    ids = tokens.reshape(1, -1).to(next(model.parameters()).device)
    if plan.search == "paper" and sum(plan.candidates[0][1:3]) >= ids.shape[1]:
        n_init, n_local = plan.candidates[0][1:3]
        raise InputError(
            f"minference: the target A-shape({n_init}, {n_local}) covers the sample of {ids.shape[1]} tokens: take a longer "
            "sample or a smaller target"
        )
    shape, searcher = model_shape(model), _Searcher(online, plan)
    runtime, call = AttentionRuntime(model, prefill=searcher), cast(Any, model)
    try:
        with torch.no_grad():
            call(ids, use_cache=True, logits_to_keep=1)
    finally:
        runtime.detach()
    if len(searcher.found) < shape.layers:
        raise CalibrationError("calibration did not reach every layer: this model's attention is not supported")
    found = [searcher.found[i] for i in range(shape.layers)]
    facts = {
        "search": plan.search,
        "sample_tokens": ids.shape[1],
        "scale": plan.scale,
        "target": list(plan.target),
        "epsilon": plan.epsilon,
        "block_size": online.block_size,
        "last_q": online.last_q,
    }
    score = torch.stack([f.score for f in found]).float().cpu()
    area = torch.stack([f.area for f in found]).float().cpu()
    return as_calibration(model, [f.heads for f in found], score, facts, area)


def as_calibration(
    model: nn.Module, layers: Sequence[Heads], score: Tensor, facts: dict[str, Any], area: Tensor | None = None
) -> Calibration:
    """The artifact: `kind` int64 ``[layers, heads]`` (places in `KINDS`), `budget` int64 ``[layers, heads, 2]``, `score`."""
    tensors = {
        "kind": torch.stack([h.kind for h in layers]).cpu(),
        "budget": torch.stack([torch.stack([h.first, h.second], -1) for h in layers]).cpu(),
        "score": score,
    }
    if area is not None:
        tensors["area"] = area
    return Calibration(SLUG, fingerprint(model), tensors, facts)


def heads_of(calibration: Calibration, layers: int, heads: int) -> list[Heads]:
    """The patterns of every layer.

    Raises:
        CalibrationError: another shape, an unknown pattern, or a budget below 1.
    """
    kind, budget = calibration.tensors.get("kind"), calibration.tensors.get("budget")
    if kind is None or budget is None or kind.shape != (layers, heads) or budget.shape != (layers, heads, 2):
        raise CalibrationError(
            f"this {SLUG} calibration does not fit a model of {layers} layers and {heads} heads: calibrate again"
        )
    if kind.is_floating_point() or budget.is_floating_point():
        raise CalibrationError(f"this {SLUG} calibration is damaged: its patterns are not whole numbers")
    kind, budget = kind.long(), budget.long()
    needed = torch.stack([torch.ones_like(kind), (kind != BLOCK_SPARSE).long()], -1)
    if bool(((kind < 0) | (kind >= len(KINDS))).any()) or bool((budget < needed).any()):
        raise CalibrationError(f"this {SLUG} calibration is damaged: an unknown pattern, or a budget below 1")
    return [Heads(k, b[:, 0], b[:, 1]) for k, b in zip(kind, budget, strict=True)]


# -- the official config files ----------------------------------------------------------------------------------------

_NAMES = {"stream_llm": A_SHAPE, "vertical_and_slash": VERTICAL_SLASH, "block_sparse": BLOCK_SPARSE}
_RELEASED_K_B = 100  # what the released kernel uses whatever the file says


def export_config(calibration: Calibration) -> list[dict[str, list[Any]]]:
    """A calibration as the official config files hold it: per layer, head id → [pattern, first, second, score]."""
    names = {kind: name for name, kind in _NAMES.items()}
    kind, budget, score = (calibration.tensors[name] for name in ("kind", "budget", "score"))
    return [
        {str(h): [names[int(kind[i, h])], *budget[i, h].tolist(), float(score[i, h])] for h in range(kind.shape[1])}
        for i in range(kind.shape[0])
    ]


def import_config(path: str | Path, model: nn.Module, default: tuple[int, int] = (1000, 6096)) -> Calibration:
    """Read a config file of the official release, or one that `export_config` made (JSON).

    Heads that it lacks are vertical-slash with the `default` budgets. A block-sparse head takes its first number as k_b
    where the second is 0, as written here, and 100, as the released kernel does, otherwise.

    Raises:
        CalibrationError: unreadable, or not of this model's shape.
    """
    shape = model_shape(model)
    try:
        data = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CalibrationError(f"cannot read the pattern file {path}: {error}") from None
    if not isinstance(data, list) or len(data) != shape.layers or not all(isinstance(row, dict) for row in data):
        raise CalibrationError(f"{path} does not fit this model: it wants a list of {shape.layers} layers")
    layers, scores = [], torch.zeros(shape.layers, shape.heads)
    for index, row in enumerate(data):
        heads = Heads.uniform(VERTICAL_SLASH, *default, shape.heads)
        for name, entry in row.items():
            head = int(name) if str(name).isdecimal() else shape.heads
            if head >= shape.heads or not _is_entry(entry):
                raise CalibrationError(f"{path}: layer {index} has an entry {name!r} that fits no head of this model")
            kind, first, second = _NAMES[entry[0]], entry[1], entry[2]
            if kind == BLOCK_SPARSE:
                first, second = (first if second == 0 else _RELEASED_K_B), 0
            heads.kind[head], heads.first[head], heads.second[head] = kind, first, second
            scores[index, head] = float(entry[3]) if len(entry) > 3 else 0.0
        layers.append(heads)
    return as_calibration(model, layers, scores, {"imported": Path(path).name})


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) in (3, 4)
        and entry[0] in _NAMES
        and all(type(x) is int and 0 <= x < 1 << 31 for x in entry[1:3])
        and entry[1] > 0
        and (entry[2] > 0 or _NAMES[entry[0]] == BLOCK_SPARSE)
        and all(isinstance(x, int | float) for x in entry[3:])
    )


def sample_length(model: nn.Module, wanted: int) -> int:
    """`wanted` tokens, or as many as the model has positions for."""
    return min(wanted, getattr(text_config(model), "max_position_embeddings", None) or wanted)
