"""Time per token on a real model at long contexts: transformers, our dense kernel, and sparse attention.

    python benchmarks/end_to_end.py [--contexts 8192,32768] [--dtypes float32,bfloat16] [--stack native-linear] [--json FILE]
    python benchmarks/end_to_end.py --methods double-sparsity,tidaldecode,tokenselect,hip-attention --contexts 32768,131072

Reading a long prompt takes hours on a small machine, and only its length matters for time, so the cache is filled by
repeating the keys and values of a real prompt of 2,048 tokens. Nothing about quality can be read off these runs.
Rounds are interleaved; times are medians with their quartiles.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import gossamer
from gossamer.data import split, text, token_blocks
from gossamer.hf import AttentionRuntime, GossamerCache
from gossamer.measure import cost
from gossamer.measure.results import Spread
from gossamer.recipe import Recipe, Step

PROMPT = 2048
#: Ways to decode, each at a sixteenth of the tokens.
WAYS: dict[str, dict[str, Any]] = {
    "double-sparsity": {"select_per": "kv_head", "dense_layers": ()},
    "double-sparsity, per query head": {"select_per": "query_head", "dense_layers": ()},
    "tidaldecode": {},
    "tokenselect": {"phases": "decode"},
    "hip-attention": {"phases": "decode", "dense_layers": ()},
    "quest": {"dense_layers": ()},
    "alisa": {"dense_layers": ()},
}
TOKENS = 1 / 16


def filled_cache(model: Any, prompt: torch.Tensor, context: int, room: int) -> GossamerCache:
    """A cache of `context` rows that repeat the prompt's."""
    runtime = AttentionRuntime(model)
    try:
        short = GossamerCache(reserve=PROMPT)
        with torch.no_grad():
            model(prompt, past_key_values=short, use_cache=True, logits_to_keep=1)
    finally:
        runtime.detach()
    long = GossamerCache(reserve=context + room)
    for index, layer in enumerate(short.layers):
        for start in range(0, context, PROMPT):
            rows = min(PROMPT, context - start)
            long.update(layer.keys[:, :, :rows], layer.values[:, :, :rows], index)
    return long


def recipes(loaded: Any, names: list[str], stack: str | None) -> dict[str, Recipe]:
    """What is timed, by name: our dense kernel and the named ways, each with the method `stack` beside it."""
    beside = (Step(gossamer.make(stack)),) if stack else ()
    made, learned = {"dense": Recipe((Step(gossamer.make("dense")), *beside))}, {}
    for name in names:
        slug = name.split(",")[0]
        fields = gossamer.method(slug).model_fields
        settings = {key: value for key, value in WAYS[name].items() if key in fields}
        method: Any = gossamer.make(slug, **({"tokens": TOKENS} if "tokens" in fields else {}), **settings)
        if "calibration" in method.needs and slug not in learned:
            learned[slug] = method.calibrate(loaded.model, gossamer.calibration_tokens(loaded, blocks=2))
        made[name] = Recipe((Step(method, learned.get(slug)), *beside))
    return made


def measure(loaded: Any, ours: dict[str, Recipe], context: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    """One row per way to decode, at one context."""
    model = loaded.model
    prompt = token_blocks(loaded.tokenizer, split(text("prose"), "evaluation"), PROMPT, 1)
    cache = filled_cache(model, prompt, context, rounds * (steps + 2))
    times = {name: cost.StepTimes() for name in ours}
    plain = {way: cost.StepTimes() for way in cost.TRANSFORMERS_WAYS}
    for _ in range(rounds):
        cost.time_transformers(model, cache, 1, steps, plain)
        for name, recipe in ours.items():
            with recipe.attach(model) as handle:
                cost.time_steps(model, handle.runtime, cache, 1, steps, times[name])
    best = min(plain, key=lambda way: cost.summarise_steps(plain[way].step))
    base, dense = (cost.summarise_steps(t.step) for t in (plain[best], times["dense"]))
    attention = cost.summarise_steps(times["dense"].attention)
    rows = []
    for name, t in {f"transformers ({best})": plain[best], **times}.items():
        spread = Spread.of(t.step)
        rows.append(
            {
                "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
                "context": context,
                "variant": name,
                "ms": round(spread.median, 2),
                "low": round(spread.low, 2),
                "high": round(spread.high, 2),
                "attention_ms": round(cost.summarise_steps(t.attention), 2) if t.attention else None,
                "ratio_to_transformers": round(base / spread.median, 2),
                "ratio_to_native_dense": round(dense / spread.median, 2),
                "attention_ratio": round(attention / cost.summarise_steps(t.attention), 2) if t.attention else None,
            }
        )
    return rows


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--contexts", default="8192,32768")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--methods", default="double-sparsity", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--stack", help="a method that every row of ours uses too, such as native-linear")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    rows = []
    for dtype in args.dtypes.split(","):
        loaded = gossamer.load(args.model, dtype=dtype)
        names = [name for name in WAYS if name.split(",")[0] in args.methods.split(",")]
        ours = recipes(loaded, names, args.stack)
        for context in map(int, args.contexts.split(",")):
            for row in measure(loaded, ours, context, args.steps, args.rounds):
                rows.append(row)
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
