"""What a forward costs by its number of tokens, measured here.

A decode step reads every weight once whether it carries one token or eight, so a few candidates are nearly free where the
weights set the pace, and dear where arithmetic does. That is measured, never assumed.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.errors import InputError, OutputError
from gossamer.files import write_whole
from gossamer.hf import AttentionRuntime, GossamerCache
from gossamer.hf.attention import attached_runtime
from gossamer.models import cache_folder, fingerprint
from gossamer.patterns import Tree

#: Numbers of tokens that are measured; between them costs are interpolated.
SIZES = (1, 2, 4, 6, 8, 9, 12, 16, 24, 32, 48, 64, 96)


@dataclass(frozen=True)
class ForwardCost:
    """Median seconds of a forward of so many tokens behind a context, by number of tokens, ascending."""

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    context: int

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.seconds) or list(self.sizes) != sorted(set(self.sizes)):
            raise InputError("costs want ascending numbers of tokens, each with its seconds")
        if self.sizes[0] != 1 or min(self.seconds) <= 0:
            raise InputError("costs start at one token and are positive")

    def ratio(self, tokens: int) -> float:
        """Cost of a forward of so many tokens over that of one; beyond the last measured one in proportion.

        >>> ForwardCost((1, 8, 16), (1.0, 1.5, 4.0), 100).ratio(12)
        2.75
        """
        last = self.sizes[-1]
        if tokens >= last:
            return self.seconds[-1] / self.seconds[0] * tokens / last
        after = next(i for i, size in enumerate(self.sizes) if size >= tokens)
        if self.sizes[after] == tokens or after == 0:
            return self.seconds[after] / self.seconds[0]
        low, high = self.sizes[after - 1], self.sizes[after]
        part = (tokens - low) / (high - low)
        return (self.seconds[after - 1] * (1 - part) + self.seconds[after] * part) / self.seconds[0]

    def best_size(self, gain: Sequence[tuple[int, float]]) -> int:
        """Of (tokens of a forward, tokens that it yields) pairs the number that yields most for its time.

        >>> ForwardCost((1, 8, 16), (1.0, 1.5, 4.0), 100).best_size([(1, 1.0), (8, 1.8), (16, 2.4)])
        8
        """
        return max(gain, key=lambda pair: pair[1] / self.ratio(pair[0]))[0]


def measure(model: nn.Module, context: int = 256, sizes: Sequence[int] = SIZES, rounds: int = 5) -> ForwardCost:
    """Time forwards of each number of tokens behind `context` cached ones, interleaved, with whatever is attached.

    Raises:
        InputError: no sizes, or none of one token.
    """
    call: Any = model
    device = next(model.parameters()).device
    runtime = attached_runtime(model)
    own = AttentionRuntime(model) if runtime is None else None
    runtime = runtime or own
    assert runtime is not None
    times: dict[int, list[float]] = {size: [] for size in sorted(set(sizes))}
    try:
        with torch.no_grad():
            cache: Any = GossamerCache(reserve=context + max(times))
            call(torch.zeros(1, context, dtype=torch.long, device=device), past_key_values=cache, use_cache=True)
            for turn in range(rounds + 1):
                for size, seconds in times.items():
                    tokens = torch.zeros(1, size, dtype=torch.long, device=device)
                    start = time.perf_counter()
                    with runtime.tree_forward(Tree.of_chains(size - 1, 1)):
                        call(tokens, past_key_values=cache, use_cache=True, position_ids=_flat(context, size, device))
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                    if turn:
                        seconds.append(time.perf_counter() - start)
                    cache.crop(context - cache.get_seq_length())
    finally:
        if own is not None:
            own.detach()
    return ForwardCost(tuple(times), tuple(statistics.median(t) for t in times.values()), context)


def _flat(context: int, size: int, device: torch.device) -> torch.Tensor:
    positions = torch.full((1, size), context + 1, device=device)
    positions[0, 0] = context
    return positions


def cost_of(model: Any, folder: Path | None = None) -> ForwardCost:
    """The cost of this model's forwards on this machine, with this dtype and number of threads; measured once and kept."""
    facts = [fingerprint(model), str(next(model.parameters()).dtype), torch.get_num_threads(), platform.machine()]
    facts += [platform.processor(), os.cpu_count(), str(next(model.parameters()).device), torch.__version__]
    facts.append(sum("forward" in module.__dict__ for module in model.modules()))  # what is attached to it
    name = "-".join(str(f) for f in facts).replace("/", "_").replace(" ", "_").replace(":", "_")
    path = (folder or cache_folder() / "forward-cost") / f"{name}.json"
    try:
        data = json.loads(path.read_text("utf-8"))
        return ForwardCost(tuple(data["sizes"]), tuple(data["seconds"]), data["context"])
    except (OSError, ValueError, KeyError, TypeError):
        cost = measure(model)
    with suppress(OutputError):  # it will be measured again
        write_whole(path, json.dumps({"sizes": cost.sizes, "seconds": cost.seconds, "context": cost.context}))
    return cost
