"""How the time of one HiP layer grows with the prompt, beside dense attention: a fitted exponent.

    python benchmarks/hip_growth.py [--lengths 4096,8192,16384,32768,65536,131072] [--dense-up-to 32768]

One KV head with two query heads, synthetic states, search and attention together. Dense time grows with the square of the
length, so it is measured up to `--dense-up-to` only. The exponent is the slope of log time over log length.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from gossamer.attention.hip_attention import attention, search
from gossamer.measure.bench import synthetic_cache


def timed(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds after one untimed call."""
    call()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def slope(times: dict[int, float]) -> float:
    """Least-squares slope of log time over log length."""
    x, y = ([math.log(v) for v in values] for values in (times.keys(), times.values()))
    mx, my = statistics.fmean(x), statistics.fmean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="4096,8192,16384,32768,65536,131072")
    parser.add_argument("--dense-up-to", type=int, default=32768)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args(argv)
    hip: dict[int, float] = {}
    dense: dict[int, float] = {}
    torch.manual_seed(0)
    for length in map(int, args.lengths.split(",")):
        key, value = synthetic_cache(length, 1, args.head_dim, torch.float32)
        query = torch.randn(1, 2, length, args.head_dim)

        def run(query: torch.Tensor = query, key: torch.Tensor = key, value: torch.Tensor = value) -> torch.Tensor:
            return attention(query, key, value, search(query, key))

        hip[length] = timed(run, args.repeats)
        line = f"{length:>7} tokens  HiP {hip[length] * 1e3:8.0f} ms"
        if length <= args.dense_up_to:
            both = key.expand(-1, 2, -1, -1), value.expand(-1, 2, -1, -1)
            dense[length] = timed(
                lambda q=query, kv=both: F.scaled_dot_product_attention(q, *kv, is_causal=True), args.repeats
            )
            line += f"  dense {dense[length] * 1e3:8.0f} ms  {dense[length] / hip[length]:.2f}x"
        print(line, flush=True)
    found = {"hip": slope(hip)} if len(hip) > 1 else {}
    if len(dense) > 1:
        found["dense"] = slope(dense)
    print("exponents: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    main()
