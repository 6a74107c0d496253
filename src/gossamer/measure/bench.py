"""Operator benchmarks: ratios within one run, beside the bytes that must move and the bandwidth that the machine gives.

Variants take turns, so that a change of the machine's mood meets all of them; every other turn is a pass over a large
buffer, which measures the bandwidth and empties the caches, as the other layers of a model would. It also evicts the
interpreter and the kernels' code, which a decode loop runs layer after layer; the same call on a cache of a few tokens
brings those back before the clock starts (0.15 to 0.25 ms otherwise, more than some kernels take). So data are cold and
code is warm.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer import ops
from gossamer.errors import InputError, UnknownNameError
from gossamer.measure import bench_activations, bench_prefill, bench_weights
from gossamer.measure.bandwidth import ReadBandwidth
from gossamer.ops.attention_row import attention_row, decode_attention_with_row
from gossamer.ops.attention_statistics import attention_columns

OPERATORS = (
    "attention_columns",
    "attention_row",
    "block_sparse_attention",
    "channel_sparse_linear",
    "compact_rows",
    "decode_attention",
    "delta_linear",
    "label_attention",
    "label_scores",
    "linear",
    "quantized_decode_attention",
    "select_topk",
    "sparse_linear",
    "sparse_mlp",
    "vertical_slash_attention",
)
#: Weights [inputs, outputs] that ``linear`` is timed on, and the rows of x.
WEIGHTS = {
    "SmolLM2 up": (576, 1536),
    "SmolLM2 down": (1536, 576),
    "SmolLM2 head": (576, 49152),
    "Llama-2-7B up": (4096, 11008),
    "Llama-2-7B down": (11008, 4096),
}
ROWS = (1, 4, 8)
#: Queries that ``attention_columns`` sums: the last rows of a prompt, as one chunk of it would.
CHUNK = 256
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Variant:
    """One way to do the work: what to call, and the bytes and operations that it cannot avoid."""

    name: str
    call: Callable[[], Any]
    nbytes: int
    flops: int = 0


def run(
    op: str,
    *,
    contexts: Sequence[int] = (8192, 32768, 131072),
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    token_ratio: float = 1 / 16,
    channels: int | None = None,
    label_bits: int = 4,
    repeats: int = 15,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Benchmark an operator for one decode step of one sequence, or for one prompt.

    Parameters
    ----------
    op
        ``decode_attention`` (torch SDPA, our dense kernel, Double Sparsity), ``label_attention`` (the same cases and
        each reduction), ``label_scores``, ``select_topk``, ``quantized_decode_attention`` (8, 4 and 2 bits, keys per channel
        in groups of 64 or per token, all rows and the sparse share of them), ``attention_columns`` (the last 256 rows of a
        prompt over the context), ``attention_row`` (alone, and with the output, beside our dense kernel), ``compact_rows``
        (one row of the middle dropped, and every second row), or ``linear`` (the weights in ``WEIGHTS`` times 1, 4 and 8
        rows; contexts and the shape of the attention don't matter to it). ``delta_linear``,
        ``channel_sparse_linear`` and ``sparse_mlp`` are timed on the weights and shares of inputs or neurons in
        ``measure.bench_activations``, beside the dense layer; ``sparse_linear`` on those of
        ``measure.bench_weights``. ``block_sparse_attention`` and ``vertical_slash_attention``
        work on prompts of a shape of their own: see ``measure.bench_prefill``, also for what their rows hold. Of the
        parameters below they take ``contexts``, ``dtypes`` and ``seed``.
    contexts
        Cached tokens.
    dtypes
        ``float32``, ``bfloat16``. ``select_topk`` works on float32 scores whatever the model's dtype and is run once.
    heads, kv_heads, head_dim
        Shape of the attention.
    token_ratio
        Share of the tokens that the sparse variants attend.
    channels, label_bits
        Label channels a head (default ``head_dim // 4``) and bits each.
    repeats
        Turns; each variant is timed once a turn, after one untimed call.
    progress
        Called with a line of text before each case.

    Returns
    -------
    Rows with ``op, dtype, context, heads, kv_heads, head_dim, variant, ms`` (median), ``best_ms, spread``
    (interquartile range over median), ``ratio_to_native_dense, ratio_to_torch`` (how many times faster than that
    variant, medians over the run; None where the case has none), ``bytes`` (what must be read), ``bandwidth`` (bytes
    per second of a plain read in this run) and ``bandwidth_share`` (bytes over median time over bandwidth; can exceed 1
    where data stays in a cache). Linear layers have ``weight, inputs, outputs, rows`` in place of the context and heads.
    ``attention_columns``, which is bound by arithmetic, has also ``flops``, ``gemm`` (operations per second of a torch
    matrix product of 1024 in this dtype, the best of this run) and ``gemm_share``.

    Raises
    ------
    UnknownNameError
        An operator that has no benchmark.
    InputError
        A dtype or shape that is not supported.
    """
    if op not in OPERATORS:
        raise UnknownNameError(f"no benchmark for operator {op!r}; there are {', '.join(OPERATORS)}")
    for name in dtypes:
        if name not in DTYPES:
            raise InputError(f"dtype must be float32 or bfloat16, got {name!r}")
    if min(contexts, default=0) < 1 or kv_heads < 1 or heads % kv_heads or repeats < 1:
        raise InputError("bench: contexts and repeats must be positive and heads a multiple of kv_heads")
    if op in bench_prefill.OPERATORS:
        chosen = {name: DTYPES[name] for name in dtypes}
        return bench_prefill.run(op, contexts=contexts, dtypes=chosen, seed=seed, progress=progress)
    probe = ReadBandwidth()
    rows: list[dict[str, Any]] = []
    if op == "linear":
        for dtype in dtypes:
            for name, (inputs, outputs) in WEIGHTS.items():
                if progress:
                    progress(f"{op} {dtype}: {name}")
                torch.manual_seed(seed)
                for count in ROWS:
                    variants, tiny = (_products(DTYPES[dtype], count, inputs, n) for n in (outputs, 16))
                    times, bandwidth = _interleave(variants, tiny, repeats, probe)
                    shape = {"weight": name, "inputs": inputs, "outputs": outputs, "rows": count}
                    rows += _rows({"op": op, "dtype": dtype, **shape}, variants, times, bandwidth)
        return rows
    if op in bench_activations.OPERATORS or op in bench_weights.OPERATORS:
        cases = bench_activations.cases if op in bench_activations.OPERATORS else bench_weights.cases
        for dtype in dtypes:
            torch.manual_seed(seed)
            for shape, *ways in cases(op, DTYPES[dtype]):
                if progress:
                    progress(f"{op} {dtype}: {shape['weight']}, {shape['rows']} rows")
                variants, tiny = ([Variant(*way) for way in part] for part in ways)
                times, bandwidth = _interleave(variants, tiny, repeats, probe)
                rows += _rows({"op": op, "dtype": dtype, **shape}, variants, times, bandwidth)
        return rows
    for dtype in dtypes[:1] if op == "select_topk" else dtypes:
        for context in contexts:
            if progress:
                progress(f"{op} {dtype} at {context} tokens")
            torch.manual_seed(seed)
            variants, tiny = (
                getattr(_Case(n, DTYPES[dtype], heads, kv_heads, head_dim, token_ratio, channels, label_bits), op)()
                for n in (context, 64)
            )
            rate = gemm_rate(DTYPES[dtype]) if variants[0].flops else 0.0
            times, bandwidth = _interleave(variants, tiny, repeats, probe)
            shape = {"context": context, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
            found = _rows({"op": op, "dtype": dtype, **shape}, variants, times, bandwidth)
            if variants[0].flops:
                _add_flops(found, variants, times, max(rate, gemm_rate(DTYPES[dtype])))
            rows += found
    return rows


def gemm_rate(dtype: torch.dtype, size: int = 1024, repeats: int = 9) -> float:
    """Return the operations per second of torch's best matrix product of ``size`` cubed: what arithmetic gives here."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def _add_flops(rows: list[dict[str, Any]], variants: list[Variant], times: dict[str, list[float]], rate: float) -> None:
    for row, variant in zip(rows, variants, strict=True):
        share = variant.flops / statistics.median(times[variant.name]) / rate
        row.update({"flops": variant.flops, "gemm": rate, "gemm_share": share})


def synthetic_cache(context: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return key and value [1, Hkv, S, d] in huge pages, with the traits that matter here: keys drift smoothly along
    the text and have a few strong channels, so that a query's best tokens come in scattered clusters."""
    key, value = (torch.empty(1, kv_heads, context, head_dim, dtype=dtype) for _ in range(2))
    for x in (key, value):
        ops.advise_huge_pages(x)
    value.normal_()
    strength = torch.empty(kv_heads, 1, head_dim).log_normal_(0.0, 0.8)
    frequency = torch.rand(kv_heads, 1, head_dim) ** 4 * 0.3
    phase = torch.rand(kv_heads, 1, head_dim) * 2 * math.pi
    for begin in range(0, context, 4096):
        position = torch.arange(begin, min(begin + 4096, context))[None, :, None]
        drift = torch.sin(position * frequency + phase)
        key[0, :, begin : begin + 4096] = (strength * (drift + torch.randn_like(drift))).to(dtype)
    return key, value


def _products(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> list[Variant]:
    x, weight = torch.randn(rows, inputs).to(dtype), (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    nbytes = weight.numel() * weight.element_size()
    return [
        Variant("torch-linear", lambda: torch.nn.functional.linear(x, weight), nbytes),
        Variant("native", lambda: ops.linear(x, weight), nbytes),
    ]


class _Case:
    def __init__(
        self,
        context: int,
        dtype: torch.dtype,
        heads: int,
        kv_heads: int,
        head_dim: int,
        token_ratio: float,
        channels: int | None,
        label_bits: int,
    ) -> None:
        self.context, self.heads, self.kv_heads = context, heads, kv_heads
        self.query = torch.randn(1, heads, head_dim).to(dtype)
        self.key, self.value = synthetic_cache(context, kv_heads, head_dim, dtype)
        self.k = max(1, int(context * token_ratio))
        self.row_bytes = 2 * head_dim * self.key.element_size()
        r = channels or max(1, head_dim // 4)
        self.channels = self.key[0, :, :1024].float().abs().mean(1).topk(r).indices.int()
        self.labels = ops.LabelCache.allocate(1, kv_heads, context, r, label_bits, dtype)
        for part in (self.labels.codes, self.labels.step, self.labels.zero):
            if part is not None:
                ops.advise_huge_pages(part)
        ops.append_labels(self.labels, self.key, self.channels, 0)

    def decode_attention(self) -> list[Variant]:
        dense = self.context * self.kv_heads * self.row_bytes
        return [
            Variant("torch-sdpa", self._sdpa, dense),
            Variant("dense", lambda: ops.decode_attention(self.query, self.key, self.value), dense),
            self._sparse("double-sparsity", select="kv_head"),
            self._sparse("double-sparsity-per-query-head", select="query_head"),
        ]

    def label_attention(self) -> list[Variant]:
        return [
            *self.decode_attention()[1:],
            self._sparse("double-sparsity-max", select="kv_head", reduce="max"),
        ]

    def label_scores(self) -> list[Variant]:
        q, ids, labels, n = self.query, self.channels, self.labels, self.context
        full = self.key.numel() * self.key.element_size()
        group = self.heads // self.kv_heads
        grouped = q.view(self.kv_heads, group, -1)
        return [
            Variant("torch-full-keys", lambda: grouped @ self.key[0].transpose(-1, -2), full),
            *(
                Variant(
                    f"labels-{reduce}",
                    lambda reduce=reduce: ops.label_scores(q, ids, labels, n, reduce=reduce),  # type: ignore[misc]
                    labels.nbytes(n),
                )
                for reduce in ("none", "max", "sum")
            ),
        ]

    def attention_columns(self) -> list[Variant]:
        new = min(CHUNK, self.context)
        query = torch.randn(1, self.heads, new, self.key.shape[3]).to(self.key.dtype)
        nbytes = self.key.numel() * self.key.element_size()
        flops = 2 * self.heads * self.key.shape[3] * sum(range(self.context - new + 1, self.context + 1))
        return [
            Variant("torch-blocks", _by_reference(lambda: attention_columns(query, self.key)), nbytes, flops),
            Variant("native", lambda: attention_columns(query, self.key), nbytes, flops),
        ]

    def attention_row(self) -> list[Variant]:
        q, k, v = self.query, self.key, self.value
        nbytes = k.numel() * k.element_size()
        return [
            Variant("torch-row", _by_reference(lambda: attention_row(q, k)), nbytes),
            Variant("dense", lambda: ops.decode_attention(q, k, v), 2 * nbytes),
            Variant("row", lambda: attention_row(q, k), nbytes),
            Variant("row-and-output", lambda: decode_attention_with_row(q, k, v), 2 * nbytes),
        ]

    def compact_rows(self) -> list[Variant]:
        keys, n = self.key, self.context
        row = self.kv_heads * self.row_bytes  # read and written
        ids = torch.arange(n - 1) + (torch.arange(n - 1) >= n // 2)
        one, half = (x.expand(1, self.kv_heads, -1).contiguous() for x in (ids, torch.arange(0, n, 2)))
        return [
            Variant("torch-gather", _by_reference(lambda: ops.compact_rows(keys, one)), n // 2 * row),
            Variant("one-dropped", lambda: ops.compact_rows(keys, one), n // 2 * row),
            Variant("half-dropped", lambda: ops.compact_rows(keys, half), half.shape[2] * row),
        ]

    def select_topk(self) -> list[Variant]:
        scores = ops.label_scores(self.query, self.channels, self.labels, self.context, reduce="sum")
        nbytes = scores.numel() * 4
        return [
            Variant("torch-topk", lambda: torch.topk(scores, self.k, sorted=False), nbytes),
            Variant("native", lambda: ops.select_topk(scores, self.k), nbytes),
        ]

    def quantized_decode_attention(self) -> list[Variant]:
        dense = self.context * self.kv_heads * self.row_bytes
        query, ids = self.query, torch.rand(1, self.kv_heads, self.context).argsort(-1)[..., : self.k].int()
        variants = [
            Variant("torch-sdpa", self._sdpa, dense),
            Variant("dense", lambda: ops.decode_attention(query, self.key, self.value), dense),
            Variant(
                "listed",
                lambda: ops.decode_attention(query, self.key, self.value, indices=ids),
                self.k * self.kv_heads * self.row_bytes,
            ),
        ]
        for bits in (8, 4, 2):
            for axis in ("channel", "token"):
                key, value = self._quantized(self.key, bits, axis), self._quantized(self.value, bits, "token")
                nbytes = key.nbytes(self.context) + value.nbytes(self.context)
                variants.append(
                    Variant(
                        f"{bits}-bit keys-per-{axis}",
                        lambda key=key, value=value: ops.quantized_decode_attention(query, key, value),  # type: ignore[misc]
                        nbytes,
                    )
                )
                if axis == "token":
                    variants.append(
                        Variant(
                            f"{bits}-bit listed",
                            lambda key=key, value=value: ops.quantized_decode_attention(query, key, value, indices=ids),  # type: ignore[misc]
                            nbytes * self.k // self.context,
                        )
                    )
        return variants

    @staticmethod
    def _quantized(rows: Tensor, bits: int, axis: Any) -> ops.QuantizedRows:
        storage = ops.QuantizedRows.allocate(
            *rows.shape, bits=bits, axis=axis, group=64 if axis == "channel" else None, scales=torch.bfloat16
        )
        for part in storage.tensors():
            ops.advise_huge_pages(part)
        ops.quantize_rows(rows, storage, 0)
        return storage

    def _sdpa(self) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            self.query.unsqueeze(2), self.key, self.value, enable_gqa=self.heads != self.kv_heads
        )

    def _sparse(self, name: str, **how: Any) -> Variant:
        args = (self.query, self.key, self.value, self.channels, self.labels, self.k)
        if how["select"] == "kv_head":
            rows = self.kv_heads * self.k
        else:  # the heads of a group may choose the same rows, which then are read from memory once
            chosen = ops.label_attention(*args, **how)[1].view(self.kv_heads, -1)
            rows = sum(int(group.unique().numel()) for group in chosen)
        nbytes = rows * self.row_bytes + self.labels.nbytes(self.context)
        return Variant(name, lambda: ops.label_attention(*args, **how), nbytes)


def _by_reference(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with ops.use_backend("reference"):
            return call()

    return run


def _interleave(
    variants: list[Variant], tiny: list[Variant], repeats: int, probe: ReadBandwidth
) -> tuple[dict[str, list[float]], float]:
    for variant in variants:
        variant.call()
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    reads = []
    for _ in range(repeats):
        for variant, small in zip(variants, tiny, strict=True):
            reads.append(probe.read())
            small.call()
            begin = time.perf_counter()
            variant.call()
            times[variant.name].append(time.perf_counter() - begin)
    return times, max(reads)


def _rows(
    common: dict[str, Any], variants: list[Variant], times: dict[str, list[float]], bandwidth: float
) -> list[dict[str, Any]]:
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    torch_name = next((name for name in median if name.startswith("torch-")), None)
    rows = []
    for variant in variants:
        seconds = sorted(times[variant.name])
        middle = median[variant.name]
        quartile = len(seconds) // 4
        rows.append(
            {
                **common,
                "variant": variant.name,
                "ms": middle * 1e3,
                "best_ms": seconds[0] * 1e3,
                "spread": (seconds[-1 - quartile] - seconds[quartile]) / middle,
                "ratio_to_native_dense": median["dense"] / middle if "dense" in median else None,
                "ratio_to_torch": median[torch_name] / middle if torch_name else None,
                "bandwidth_share": variant.nbytes / middle / bandwidth,
                "bytes": variant.nbytes,
                "bandwidth": bandwidth,
            }
        )
    return rows
