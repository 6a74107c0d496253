"""Sparse linear layers beside dense ones, with the ratios that they are built for.

    OMP_NUM_THREADS=2 python benchmarks/sparse_linear.py

Ways take turns in one run (`gossamer bench sparse_linear` prints them all); this prints what each aim needs and what was found.
An aim that is missed is printed as it is.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from gossamer.measure import bench, bench_weights


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args(argv)
    rows = bench.run("sparse_linear", dtypes=(args.dtype,), repeats=args.repeats)
    times = {(row["weight"], row["rows"], row["variant"]): row["ms"] for row in rows}
    print(f"{args.dtype}, {torch.get_num_threads()} threads, medians of {args.repeats}")

    def show(weight: str, tokens: int, fast: str, slow: str, aim: float | None = None) -> None:
        key = (weight, tokens, fast)
        if key not in times or (weight, tokens, slow) not in times:
            return
        ratio = times[(weight, tokens, slow)] / times[key]
        found = "" if aim is None else f"  aim {aim:g}: {'reached' if ratio >= aim else 'missed'}"
        print(f"{weight:16} {tokens:4} rows  {fast:18} {times[key]:8.3f} ms  x{ratio:.2f} of {slow}{found}")

    for weight, (inputs, outputs) in bench_weights.PROMPTS.items():
        n = bench_weights.TOKENS
        for share in bench_weights.PROMPT_SHARES:
            show(weight, n, f"4x1 {share:.0%}", "torch-linear", {0.65: 1.0, 0.9: 3.0}.get(share))
        show(weight, n, "4x1 90%", "torch csr 90%", 2.0)
        for share in bench_weights.PROMPT_SHARES[-3:]:
            # Like with like: layers that round float inputs, and products of integers.
            show(weight, n, f"4x1 {share:.0%} int8", "torch dynamic int8", 4.0 if share == 0.9 else None)
            show(weight, n, f"4x1 {share:.0%} product", "torch int_mm", 4.0 if share == 0.9 else None)
            rate = 2 * n * inputs * outputs / times[(weight, n, f"4x1 {share:.0%} product")] / 1e6
            print(f"{'':40} dense-equivalent {rate:.0f} GFLOP/s")
        for format in ("1x4", "csr", "stream"):
            for share in (0.5, 0.65, 0.9):
                show(weight, n, f"{format} {share:.0%}", "torch-linear")
    for weight in bench_weights.DECODES:
        for tokens in bench_weights.ROWS:
            best = min(("torch-linear", "dense"), key=lambda way: times[(weight, tokens, way)])
            for share in bench_weights.DECODE_SHARES:
                show(weight, tokens, f"stream {share:.0%}", best, 2.5 if share == 0.8 else None)
                show(weight, tokens, f"4x1 {share:.0%}", best)
            for format in ("bitmask 80%", "bitmask 80% int8"):
                show(weight, tokens, format, best)
    return rows


if __name__ == "__main__":
    main()
