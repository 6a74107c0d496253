"""What the experiments of activation methods share: perplexity of a model under a method, and the time of a sparse MLP."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer import ops
from gossamer.activations import ActivationMethod
from gossamer.calibration import Calibration
from gossamer.data import split, text, token_blocks
from gossamer.ops import NeuronWeights, linear, sparse_mlp

BLOCK, BLOCKS = 512, 8


@dataclass(frozen=True)
class Read:
    """What reading the evaluation text under a method showed: perplexity, and shares kept (1 where nothing is masked)."""

    perplexity: float
    neurons: float = 1.0
    queries: float = 1.0
    outputs: float = 1.0

    @property
    def sparsity(self) -> float:
        """Share of neurons that was dropped."""
        return 1 - self.neurons

    def as_dict(self) -> dict[str, float]:
        """For the result file."""
        return {**asdict(self), "sparsity": self.sparsity}


def texts(tokenizer: Any, seed: int) -> tuple[Tensor, Tensor]:
    """Token blocks ``[8, 512]`` of prose to calibrate on, and as many of its other part, drawn by `seed`, to evaluate."""
    prose = text("prose")
    evaluation = token_blocks(tokenizer, split(prose, "evaluation"), BLOCK, BLOCKS, seed=seed)
    return token_blocks(tokenizer, split(prose, "calibration"), BLOCK, BLOCKS), evaluation


def read(model: Any, blocks: Tensor, method: ActivationMethod | None, calibration: Calibration | None = None) -> Read:
    """Read blocks of tokens, each for itself, under a method (None: densely); masks hold for every token."""
    if method is None:
        return Read(_perplexity(model, blocks))
    with method.model_copy(update={"mode": "mask"}).attach(model, calibration) as handle:
        perplexity, report = _perplexity(model, blocks), handle.report()
    channels = report.get("channels_kept_by_layer", [1.0, 1.0])
    return Read(
        perplexity,
        report.get("neurons_kept", 1.0),
        statistics.fmean(channels[::2]),
        statistics.fmean(channels[1::2]),
    )


@torch.no_grad()
def _perplexity(model: Any, blocks: Tensor) -> float:
    losses = []
    for block in blocks:
        logits = model(block[None], use_cache=False).logits[0, :-1].float()
        losses.append(float(F.cross_entropy(logits, block[1:])))
    return float(torch.tensor(losses).mean().exp())


@torch.no_grad()
def mlp_times(
    fit: Callable[[Tensor, Tensor], Tensor],
    threads: int,
    channels: int = 2048,
    neurons: int = 8192,
    repeats: int = 25,
    seed: int = 0,
) -> dict[str, Any]:
    """Time of one token through a gated MLP of random weights: dense by torch and by our kernel, and gathered.

    `fit` makes thresholds ``[]`` or ``[D]`` of the activated gates and ups ``[32, D]`` of other tokens. Runs take turns; times
    are medians, in ms.

    Returns:
        Times by name; `speedup` over the faster dense one, the bound by bytes, and the share that was really dropped.
    """
    generator = torch.Generator().manual_seed(seed)
    gate, up, down = (torch.randn(neurons, channels, generator=generator) / channels**0.5 for _ in range(3))
    weights, laid_out = NeuronWeights(gate, up, down), down.t().contiguous()
    sample = torch.randn(32, channels, generator=generator)
    threshold = fit(F.silu(sample @ gate.T), sample @ up.T)
    tokens = torch.randn(repeats, 1, channels, generator=generator)
    counts = torch.zeros(2, dtype=torch.int64)

    def ours(x: Tensor) -> Tensor:
        return linear(F.silu(linear(x, gate)) * linear(x, up), laid_out)

    runs: dict[str, Callable[[Tensor], Tensor]] = {
        "dense torch": lambda x: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), laid_out),
        "dense native": ours,
        "gathered": lambda x: sparse_mlp(x, weights, threshold=threshold, counts=counts),
    }
    if "native" not in ops.available_backends():
        del runs["dense native"]
    times: dict[str, list[float]] = {name: [] for name in runs}
    kept, before = 0, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for x in [tokens[0], *tokens]:
            for name, run in runs.items():
                start = time.perf_counter()
                run(x)
                times[name].append((time.perf_counter() - start) * 1e3)
            kept += int(counts[1])
    finally:
        torch.set_num_threads(before)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    dense = min(value for name, value in medians.items() if name != "gathered")
    share = kept / (neurons * (repeats + 1))
    return {
        "ms": medians,
        "speedup": dense / medians["gathered"],
        "bound": 3 / (1 + 2 * share),
        "sparsity": 1 - share,
        "threads": threads,
        "all_ms": times,
    }
