"""Time per token on a real model at long contexts: transformers, our dense kernel, and sparse attention.

    python benchmarks/end_to_end.py [--contexts 8192,32768] [--dtypes float32,bfloat16] [--json FILE]

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

PROMPT = 2048
SPARSE = {"select_per": "kv_head", "dense_layers": ()}


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


def measure(loaded: Any, calibration: Any, context: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    """One row per way to decode, at one context."""
    model = loaded.model
    prompt = token_blocks(loaded.tokenizer, split(text("prose"), "evaluation"), PROMPT, 1)
    cache = filled_cache(model, prompt, context, rounds * (steps + 2))
    ours = {
        "dense": (gossamer.make("dense"), None),
        "double-sparsity": (gossamer.make("double-sparsity", **SPARSE), calibration),
        "double-sparsity, per query head": (
            gossamer.make("double-sparsity", **{**SPARSE, "select_per": "query_head"}),
            calibration,
        ),
    }
    times = {name: cost.StepTimes() for name in ours}
    plain = {way: cost.StepTimes() for way in cost.TRANSFORMERS_WAYS}
    for _ in range(rounds):
        cost.time_transformers(model, cache, 1, steps, plain)
        for name, (method, learned) in ours.items():
            with method.attach(model, learned) as handle:
                cost.time_steps(model, handle.runtime, cache, 1, steps, times[name])
    best = min(plain, key=lambda way: cost.summarise_steps(plain[way].step))
    base, dense = (cost.summarise_steps(t.step) for t in (plain[best], times["dense"]))
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
            }
        )
    return rows


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--contexts", default="8192,32768")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    rows = []
    for dtype in args.dtypes.split(","):
        loaded = gossamer.load(args.model, dtype=dtype)
        method: Any = gossamer.make("double-sparsity")
        calibration = method.calibrate(loaded.model, gossamer.calibration_tokens(loaded, blocks=2))
        for context in map(int, args.contexts.split(",")):
            for row in measure(loaded, calibration, context, args.steps, args.rounds):
                rows.append(row)
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
