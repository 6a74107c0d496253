"""Drafting on a real model: tokens a forward, what a forward costs, and the net speed beside plain decoding in one runtime.

Every prompt is decoded by all ways in turn before the next one, greedily, with native linear layers and our attention under
all of them. Plain decoding is the faster of transformers' `generate` and the engine's own loop without drafts. A drafter's
state lives on from prompt to prompt; it is warmed first, on prompts that are not timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.calibration import Calibration
from gossamer.data.prompts import QUESTIONS, REPEATING
from gossamer.decoding import PPD, Drafter, DraftingMethod, Engine, ForwardCost, TokenRecycling
from gossamer.decoding.cost import measure
from gossamer.errors import InputError
from gossamer.models import load
from gossamer.patterns import Tree
from gossamer.recipe import Recipe, Step
from gossamer.registry import make, method

#: Drafters that are compared where none are named.
DRAFTERS = ("prompt-lookup", "token-recycling", "early-exit")
WARM = 4
"""Questions that warm the drafters' states, untimed."""
KINDS = {"repeating": REPEATING, "questions": QUESTIONS[WARM:]}


def run(
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    drafters: Sequence[str] = DRAFTERS,
    *,
    model: str = "smollm2",
    new_tokens: int = 96,
    prompts: int = 6,
    calibrations: Mapping[str, Path] | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> list[dict[str, Any]]:
    """Rows by dtype, kind of prompt and way: ``tokens_per_forward, nodes_per_forward, ms_per_token, speedup`` (total time of plain
    decoding over this way's), ``low, high`` (of the prompts' own ratios), ``same_text`` (prompts with plain's text; bfloat16
    rounds otherwise with more rows, so ties can fall differently), and ``forward_cost`` of 8 tokens over that of one.

    Args:
        calibrations: files of drafters that need one; those drafters are compared too.

    Raises:
        InputError: a method that does not draft, or one that needs a calibration and has none.
    """
    files = dict(calibrations or {})
    chosen: dict[str, tuple[DraftingMethod, Calibration | None]] = {}
    for slug in dict.fromkeys([*drafters, *files]):
        made = make(slug)
        if not isinstance(made, DraftingMethod):
            raise InputError(f"{slug} does not draft: name methods with the slot drafting")
        if "calibration" in method(slug).needs and slug not in files:
            raise InputError(f"{slug} needs a calibration: make one with `gossamer calibrate {slug}` and give its file")
        chosen[slug] = made, Calibration.load(files[slug]) if slug in files else None
        if slug == TokenRecycling.slug:
            chosen["its table alone"] = TokenRecycling(lookup=False), chosen[slug][1]
    rows = []
    for name in dtypes:
        loaded = load(model)
        call: Any = loaded.model.to(getattr(torch, name))
        with Recipe((Step(make("native-linear")),)).attach(call):
            cost = measure(call)
            engines = {"plain": Engine(call, Drafter(), tree=Tree.chain(0))}
            for way, (made, calibration) in chosen.items():
                engines[way] = Engine(call, _drafter(made, call, calibration, cost), made.rule(), cost=cost)
            for kind, texts in KINDS.items():
                for question in QUESTIONS[:WARM] if kind == "repeating" else ():
                    for engine in engines.values():
                        _decode(call, _ids(loaded, question), new_tokens, engine)
                found: dict[str, list[tuple[float, int, int, int, bool]]] = {way: [] for way in ("generate", *engines)}
                for text in texts[:prompts]:
                    progress(f"{name}, {kind}: {text[:30]}…")
                    ids = _ids(loaded, text)
                    plain: Tensor | None = None
                    for way in found:
                        seconds, out, engine_ = *_decode(call, ids, new_tokens, engines.get(way)), engines.get(way)
                        plain = out if plain is None else plain
                        stats = engine_.stats if engine_ is not None else None
                        forwards, nodes = (stats.forwards, stats.nodes) if stats else (out.shape[1] - ids.shape[1],) * 2
                        found[way].append(
                            (seconds, out.shape[1] - ids.shape[1], forwards, nodes, bool(torch.equal(out, plain)))
                        )
                rows += _rows(name, kind, found, cost.ratio(8))
    return rows


def _drafter(made: DraftingMethod, model: Any, calibration: Calibration | None, cost: ForwardCost) -> Drafter:
    return made.drafter(model, calibration, cost) if isinstance(made, PPD) else made.drafter(model, calibration)


def _ids(loaded: Any, text: str) -> Tensor:
    ids: Tensor = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    return ids


def _decode(model: Any, ids: Tensor, new_tokens: int, engine: Engine | None) -> tuple[float, Tensor]:
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    settings["pad_token_id"] = model.generation_config.eos_token_id
    start = time.perf_counter()
    out: Tensor = model.generate(ids, **settings, **({} if engine is None else {"custom_generate": engine}))
    return time.perf_counter() - start, out


def _rows(
    dtype: str, kind: str, found: dict[str, list[tuple[float, int, int, int, bool]]], ratio: float
) -> list[dict[str, Any]]:
    total = {way: sum(part[0] for part in parts) for way, parts in found.items()}
    base = min(("generate", "plain"), key=lambda way: total[way])
    rows = []
    for way, parts in found.items():
        ratios = [b[0] / w[0] for b, w in zip(found[base], parts, strict=True)]
        tokens = sum(part[1] for part in parts)
        rows.append(
            {
                "dtype": dtype,
                "prompts": kind,
                "way": way,
                "tokens_per_forward": round(tokens / sum(part[2] for part in parts), 2),
                "nodes_per_forward": round(sum(part[3] for part in parts) / sum(part[2] for part in parts), 2),
                "ms_per_token": round(1e3 * total[way] / tokens, 2),
                "speedup": round(total[base] / total[way], 2),
                "low": round(min(ratios), 2),
                "median": round(statistics.median(ratios), 2),
                "high": round(max(ratios), 2),
                "same_text": f"{sum(part[4] for part in parts)}/{len(parts)}",
                "forward_cost": round(ratio, 2),
            }
        )
    return rows
