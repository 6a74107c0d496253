"""Text as bytes, for small language models that are trained here: a vocabulary of 256 and no tokenizer.

from gossamer.data import byte_batches, byte_corpus
train, held_out = byte_corpus(2_000_000)
for batch in byte_batches(train, batch=16, context=96, steps=1000, seed=0): ...
"""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gossamer.data.text import text
from gossamer.errors import InputError

#: Every so many bytes a stretch goes to the held-out part, so that both parts hold all kinds of text.
_STRETCH, _EVERY = 20_000, 10


def byte_corpus(size: int = 2_000_000, source: str = "code") -> tuple[Tensor, Tensor]:
    """(training bytes, held-out bytes), uint8, together at most `size` bytes; a tenth is held out, in stretches of 20,000.

    source: `code`, the Python installation's own library, packages included (some 10 MB); or what `gossamer.data.text`
        takes.

    Raises InputError where the text is shorter than two stretches.
    """
    raw = _library(size) if source == "code" else text(source).encode()[:size]
    if len(raw) < 2 * _STRETCH:
        raise InputError(f"the text has {len(raw)} bytes; a corpus needs {2 * _STRETCH}")
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    stretches = data.split(_STRETCH)
    held = [s for i, s in enumerate(stretches) if i % _EVERY == 1]
    return torch.cat([s for i, s in enumerate(stretches) if i % _EVERY != 1]), torch.cat(held)


def byte_batches(data: Tensor, batch: int, context: int, steps: int, seed: int = 0) -> Iterator[Tensor]:
    """`steps` batches int64 ``[batch, context + 1]`` of stretches drawn at random: inputs, and targets one byte later.

    Raises InputError for data shorter than a stretch, or sizes below one.
    """
    if min(batch, context, steps) < 1 or len(data) <= context + 1:
        raise InputError(f"cannot draw {steps} batches of {batch} x {context + 1} bytes from {len(data)} bytes")
    return _draw(data, batch, context, steps, seed)


def _draw(data: Tensor, batch: int, context: int, steps: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(context + 1)
    for _ in range(steps):
        starts = torch.randint(len(data) - context, (batch, 1), generator=generator)
        yield data[starts + offsets].long()


@functools.cache
def _library(size: int) -> bytes:
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts, length = [], 0
    for file in sorted(folder.rglob("*.py")):
        inside = file.relative_to(folder).parts
        if {"site-packages", "dist-packages", "test", "tests", "idlelib"} & set(inside):
            continue
        if length >= size:
            break
        part = file.read_bytes()
        parts.append(part)
        length += len(part)
    return b"\n".join(parts)[:size]
