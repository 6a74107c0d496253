"""Benchmarks of the operators that skip part of a prompt's attention: bound by arithmetic, so beside torch's flash attention
and beside the rate of a matrix product, both timed in the same run, by turns.

*Useful* operations are counted: ``4 * d`` for each pair of a query and a key that takes part in a softmax. What a block
computes beyond the diagonal, the softmax itself and the search for blocks lower the rate and are not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer import ops

OPERATORS = ("block_sparse_attention", "vertical_slash_attention")
SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.9)
"""Shares of the causal blocks that are left out."""
BUDGETS = ((1000, 6096), (30, 2048), (500, 700))
"""Verticals and slashes of MInference's configurations."""
BLOCK = 64
_MATRIX = 2048


@dataclass
class Variant:
    """One way to do the work: what to call, and the pairs of queries and keys that it needs (0 where it attends to none)."""

    name: str
    call: Callable[[], Any]
    pairs: int


def run(
    op: str,
    *,
    contexts: Sequence[int],
    dtypes: dict[str, torch.dtype],
    heads: int = 4,
    kv_heads: int = 1,
    head_dims: Sequence[int] = (64, 128),
    repeats: int = 3,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Benchmark a prefill operator on one prompt.

    Returns
    -------
    Rows with ``op, dtype, context, heads, kv_heads, head_dim, variant, ms`` (median), ``best_ms, spread`` (range over
    median), ``density`` (share of the causal area that is computed), ``ratio_to_torch`` (how many times faster than flash
    attention over everything), ``bound`` (what the density alone would give), ``gflops`` (10⁹ useful operations a second),
    ``gemm_gflops`` (a float32 matrix product in the same run) and ``gemm_share``. bfloat16 may pass 1 there: some
    processors multiply it faster.
    """
    rows: list[dict[str, Any]] = []
    for dtype in dtypes:
        for context in contexts:
            for dim in head_dims:
                if progress:
                    progress(f"{op} {dtype} at {context} tokens, head dimension {dim}")
                torch.manual_seed(seed)
                query = torch.randn(1, heads, context, dim).to(dtypes[dtype])
                key, value = (torch.randn(1, kv_heads, context, dim).to(dtypes[dtype]) for _ in range(2))
                make = _blocks if op == "block_sparse_attention" else _vertical_slash
                variants = [_flash(query, key, value), *make(query, key, value)]
                shape = {"context": context, "heads": heads, "kv_heads": kv_heads, "head_dim": dim}
                rows += _time({"op": op, "dtype": dtype, **shape}, variants, 4 * dim, repeats)
    return rows


def random_blocks(lines: int, blocks: int, sparsity: float) -> Tensor:
    """Bool [1, lines, blocks, blocks]: each causal block stays with probability 1 − sparsity, the diagonal always."""
    below = torch.ones(blocks, blocks, dtype=torch.bool).tril(-1)
    return (torch.rand(1, lines, blocks, blocks) >= sparsity) & below | torch.eye(blocks, dtype=torch.bool)


def block_pairs(mask: Tensor, length: int, size: int = BLOCK) -> int:
    """Causal pairs in the chosen blocks of a mask [1, lines, n, n] over ``length`` tokens."""
    at = torch.arange(mask.shape[2])
    sizes = (length - at * size).clamp_max(size)
    pairs = torch.where(at[:, None] == at, sizes * (sizes + 1) // 2, sizes[:, None] * sizes)
    return int((mask & (at <= at[:, None])).mul(pairs).sum())


def random_lists(heads: int, length: int, verticals: int, slashes: int) -> tuple[Tensor, Tensor]:
    """Verticals and slashes [1, heads, k] as heads of a language model have them: the first tokens and random ones; the
    nearest half of the distances, and the others in runs of 64 anywhere."""
    columns, distances = [], []
    for _ in range(heads):
        rest = torch.randperm(max(length - 30, 0))[: max(min(verticals, length) - 30, 0)] + 30
        columns.append(torch.cat([torch.arange(min(30, verticals, length)), rest]).sort().values)
        near = min(slashes // 2, length)
        runs = torch.randperm(max(length - near, 0) // 64 + 1)[: -(-(slashes - near) // 64)] * 64 + near
        far = (runs[:, None] + torch.arange(64)).flatten()[: slashes - near].clamp_max(length - 1)
        distances.append(torch.cat([torch.arange(near), far]).sort(descending=True).values)
    return torch.stack(columns)[None].int(), torch.stack(distances)[None].int()


def _flash(query: Tensor, key: Tensor, value: Tensor) -> Variant:
    heads, length = query.shape[1:3]
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))  # not part of its time
    causal = heads * length * (length + 1) // 2
    return Variant("torch-sdpa", lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True), causal)


def _blocks(query: Tensor, key: Tensor, value: Tensor) -> list[Variant]:
    heads, length = query.shape[1:3]
    variants = []
    for sparsity in SPARSITIES:
        mask = random_blocks(heads, -(-length // BLOCK), sparsity)
        name = f"{sparsity:.0%} sparse" if sparsity else "dense mask"
        call = lambda mask=mask: ops.block_sparse_attention(query, key, value, mask)  # noqa: E731
        variants.append(Variant(name, call, block_pairs(mask, length)))
    return variants


def _vertical_slash(query: Tensor, key: Tensor, value: Tensor) -> list[Variant]:
    heads, length = query.shape[1:3]
    variants = []
    for budget in BUDGETS:
        v, s = random_lists(heads, length, *budget)
        pairs = int(ops.vertical_slash_index(v, s, length, BLOCK).pairs().sum())
        attend = lambda v=v, s=s: ops.vertical_slash_attention(query, key, value, v, s)  # noqa: E731
        index = lambda v=v, s=s: ops.vertical_slash_index(v, s, length, BLOCK)  # noqa: E731
        variants.append(Variant(f"{budget} with its index", attend, pairs))
        variants.append(Variant(f"{budget} index alone", index, 0))
    return variants


def _time(common: dict[str, Any], variants: list[Variant], operations: int, repeats: int) -> list[dict[str, Any]]:
    a, b = (torch.randn(_MATRIX, _MATRIX) for _ in range(2))
    calls = {"": lambda: torch.mm(a, b)} | {v.name: v.call for v in variants}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - begin)
    middle = {name: statistics.median(seconds) for name, seconds in times.items()}
    gemm, dense = 2e-9 * _MATRIX**3 / middle[""], variants[0]
    rows = []
    for v in variants:
        seconds, gflops = middle[v.name], 1e-9 * operations * v.pairs / middle[v.name]
        rows.append(
            {
                **common,
                "variant": v.name,
                "ms": seconds * 1e3,
                "best_ms": min(times[v.name]) * 1e3,
                "spread": (max(times[v.name]) - min(times[v.name])) / seconds,
                "density": v.pairs / dense.pairs if v.pairs else None,
                "ratio_to_torch": middle[dense.name] / seconds if v.pairs else None,
                "bound": dense.pairs / v.pairs if v.pairs else None,
                "gflops": gflops if v.pairs else None,
                "gemm_gflops": gemm,
                "gemm_share": gflops / gemm if v.pairs else None,
            }
        )
    return rows
