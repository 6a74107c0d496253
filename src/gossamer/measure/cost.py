"""What a decode step costs: wall-clock time, its attention part, bytes held and read.

Times come from interleaved rounds, so that drift of the machine meets every method alike, and are given as median and
quartiles.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from gossamer.hf import AttentionRuntime, GossamerCache
from gossamer.hf.views import text_config


@dataclass
class StepTimes:
    """Milliseconds per decode step of one method."""

    step: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # the first step, which may build labels for the whole context


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters that one step reads: all of them, an untied embedding table apart (it is looked up)."""
    seen: dict[int, int] = {}
    for parameter in model.parameters():
        seen[parameter.data_ptr()] = parameter.numel() * parameter.element_size()
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if embeddings is not None and head is not None and embeddings.weight.data_ptr() != head.weight.data_ptr():
        seen.pop(embeddings.weight.data_ptr(), None)
    return sum(seen.values())


@contextmanager
def timed_attention(runtime: AttentionRuntime) -> Iterator[list[float]]:
    """Seconds spent in each attention call of `runtime`, plug point and kernel together."""
    spent: list[float] = []
    plain = runtime.attention

    def timed(*args: Any, **kwargs: Any) -> Tensor:
        start = time.perf_counter()
        out = plain(*args, **kwargs)
        spent.append(time.perf_counter() - start)
        return out

    runtime.attention = timed  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        del runtime.attention  # the class's own method again


def synchronise(device: torch.device) -> None:
    """Wait for queued work, where there is a queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_steps(
    model: nn.Module, runtime: AttentionRuntime | None, cache: Any, token: int, steps: int, into: StepTimes
) -> None:
    """Run one warm-up step and `steps` timed greedy steps after what `cache` holds; crops it back."""
    call: Any = model
    device = next(model.parameters()).device
    current = torch.tensor([[token]], device=device)
    before = cache.get_seq_length()
    with torch.inference_mode():
        for index in range(steps + 1):
            if runtime is None:
                elapsed, spent = _one(call, current, cache, device), 0.0
            else:
                with timed_attention(runtime) as calls:
                    elapsed = _one(call, current, cache, device)
                spent = sum(calls)
            if index == 0:
                into.first.append(1e3 * elapsed)
            else:
                into.step.append(1e3 * elapsed)
                if runtime is not None:
                    into.attention.append(1e3 * spent)
    own = runtime is not None and runtime.cache is not None  # rows were dropped: the run goes on from here
    if isinstance(cache, GossamerCache) and not own:  # transformers' caches were made for this call
        cache.crop(before - cache.get_seq_length())


def _one(call: Any, current: Tensor, cache: Any, device: torch.device) -> float:
    start = time.perf_counter()
    logits = call(current, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    current.fill_(int(logits[0, -1].argmax()))
    synchronise(device)
    return time.perf_counter() - start


#: How transformers itself can decode on a CPU: attention implementation, and whether the cache is preallocated.
TRANSFORMERS_WAYS = {
    "sdpa": ("sdpa", False),
    "eager": ("eager", False),
    "sdpa, static cache": ("sdpa", True),
}


def transformers_cache(model: nn.Module, cache: GossamerCache, room: int, static: bool) -> Cache:
    """The same contents in a cache of transformers' own, with `room` for more tokens if it is static."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    plain: Any = (
        StaticCache(config=text, max_cache_len=cache.get_seq_length() + room) if static else DynamicCache(config=text)
    )
    for index, layer in enumerate(cache.layers):
        plain.update(layer.keys.clone(), layer.values.clone(), index)
    return plain


def time_transformers(
    model: nn.Module, cache: GossamerCache, token: int, steps: int, into: dict[str, StepTimes]
) -> None:
    """Time the untouched model in each of `TRANSFORMERS_WAYS` that `into` names."""
    config = text_config(model)
    previous = config._attn_implementation
    try:
        for way, times in into.items():
            config._attn_implementation, static = TRANSFORMERS_WAYS[way]
            time_steps(model, None, transformers_cache(model, cache, steps + 1, static), token, steps, times)
    finally:
        config._attn_implementation = previous


def overhead_ms(model: nn.Module, attach: Callable[[], Any], steps: int = 10) -> float:
    """Milliseconds that the plug point itself adds to a step: attention time on a cache so short that kernels cost nothing."""
    handle = attach()
    runtime: AttentionRuntime = handle.runtime
    runtime.say_once = lambda message: None  # type: ignore[method-assign]  # so short a context is dense, of course
    try:
        cache, times = GossamerCache(reserve=64), StepTimes()
        call: Any = model
        with torch.no_grad():
            call(torch.ones(1, 4, dtype=torch.long), past_key_values=cache, use_cache=True, logits_to_keep=1)
        time_steps(model, runtime, cache, 1, steps, times)
    finally:
        handle.detach()
    return statistics.median(times.attention)


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Peak resident bytes of this process inside the block, in a list that is filled at its end; empty where unknown."""
    result: list[int] = []
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the high-water mark
        known = True
    except OSError:
        known = False
    yield result
    if known:
        status = Path("/proc/self/status").read_text().splitlines()
        result.extend(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": name,
        "cores": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        **({"gpu": gpu} if gpu else {}),
    }


def versions() -> dict[str, str]:
    """Versions that decide results."""
    import transformers

    from gossamer import __version__

    return {
        "gossamer": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def summarise_steps(samples: Sequence[float]) -> float:
    """Median, the one number to sort by."""
    return statistics.median(samples)
