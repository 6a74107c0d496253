"""Prefill of one attention layer, the search for positions included: MInference's patterns beside dense attention.

    python benchmarks/minference_layer.py [--lengths 8192,32768,65536] [--patterns vertical-slash,…] [--json FILE]

Queries and keys are noise with planted structure, so that there are columns and diagonals to find: scores fall with
distance, and one key in 256 is liked by all queries. Only time and area can be read off these runs.
Dense is torch's fused kernel. Rounds are interleaved; times are the fastest of the rounds and their median. Long lengths
take long on a small machine: dense attention of 64K tokens and 9 heads is 5 TFLOP, half a minute on two cores.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gossamer.attention import minference_run as running
from gossamer.attention.minference_run import A_SHAPE, BLOCK_SPARSE, VERTICAL_SLASH, Heads, Online
from gossamer.hf import dense_attention

PATTERNS = {
    "vertical-slash": (VERTICAL_SLASH, 1000, 6096),
    "vertical-slash-small": (VERTICAL_SLASH, 30, 800),
    "a-shape": (A_SHAPE, 1024, 4096),
    "block-sparse": (BLOCK_SPARSE, 100, 1),
}


def states(length: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Query ``[1, heads, length, dim]``, key and value ``[1, kv_heads, length, dim]``."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads, length, dim, generator=generator)
    key, value = torch.randn(2, 1, kv_heads, length, dim, generator=generator)
    query[..., 0], key[..., 0] = dim**0.5, torch.arange(length) / 200  # a key 200 tokens farther back scores 1 less
    liked = torch.randperm(length, generator=generator)[: max(4, length // 256)]
    key[:, :, liked, 1] += length / 200 + 4  # as much as the nearest
    query[..., 1] = dim**0.5
    return tuple(x.to(dtype) for x in (query, key, value))


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(length: int, patterns: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per way, at one length."""
    dtype, online = getattr(torch, args.dtype), Online(block_size=args.block_size)
    query, key, value = states(length, args.heads, args.kv_heads, args.dim, dtype)
    scale, areas = 1 / math.sqrt(args.dim), {"dense": 1.0}
    times: dict[str, list[float]] = {"dense": [], **{name: [] for name in patterns}}
    finding: dict[str, list[float]] = {name: [] for name in patterns}
    for _ in range(args.rounds):
        times["dense"].append(timed(lambda: dense_attention(query, key, value, scale)))
        for name in patterns:
            heads = Heads.uniform(*PATTERNS[name], args.heads)
            begin = time.perf_counter()
            scores = running.estimate(query, key, heads.kind, online, scale)
            if args.area is not None:
                heads = running.fit_area(scores, heads, online, length, args.area)
            finding[name].append(time.perf_counter() - begin)
            _, area = running.attend(query, key, value, heads, scores, online, scale)
            times[name].append(time.perf_counter() - begin)
            areas[name] = float(area.mean())
    dense = min(times["dense"])
    flops = 4 * args.dim * args.heads * length * (length + 1) / 2
    return [
        {
            "length": length,
            "dtype": args.dtype,
            "way": name,
            "seconds": round(min(seconds), 4),
            "median": round(statistics.median(seconds), 4),
            "finding": round(min(finding[name]), 4) if name in finding else 0.0,
            "area": round(areas[name], 4),
            "speedup": round(dense / min(seconds), 2),
            "bound": round(1 / areas[name], 2),
            "gflops": round(areas[name] * flops / min(seconds) / 1e9, 1),
        }
        for name, seconds in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="8192,32768,65536")
    parser.add_argument("--patterns", default=",".join(PATTERNS), help=f"of {', '.join(PATTERNS)}")
    parser.add_argument("--area", type=float, help="fit every pattern to this share of the causal area")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    patterns = [name.strip() for name in args.patterns.split(",") if name.strip()]
    unknown = [name for name in patterns if name not in PATTERNS]
    if unknown:
        parser.error(f"unknown pattern {unknown[0]}: choose from {', '.join(PATTERNS)}")
    rows: list[dict[str, Any]] = []
    print(f"{'length':>7} {'way':<21} {'s':>8} {'finding':>8} {'area':>7} {'speed-up':>8} {'bound':>6} {'GFLOP/s':>8}")
    with torch.no_grad():
        for length in (int(x) for x in args.lengths.split(",")):
            for row in measure(length, patterns, args):
                rows.append(row)
                print(
                    f"{row['length']:>7} {row['way']:<21} {row['seconds']:>8.3f} {row['finding']:>8.3f} {row['area']:>7.4f} "
                    f"{row['speedup']:>8.2f} {row['bound']:>6.1f} {row['gflops']:>8.1f}",
                    flush=True,
                )
    if args.json is not None:
        args.json.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
