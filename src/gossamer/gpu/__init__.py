"""The GPU kernels (Triton), one file per operator; :mod:`gossamer.ops` holds contracts and references, and dispatches.

Two things hold for all of them. No call waits for the GPU: nothing is read back, so values that the other backends
refuse (row or channel ids out of range, ranges beyond the rows) are skipped here instead of raising; no memory
outside the tensors is touched. And sizes that grow with every decoded token enter as compile-time constants only
rounded up to powers of two, so decoding does not keep recompiling.

On a machine without a GPU the kernels run on CPU tensors in Triton's interpreter if ``TRITON_INTERPRET=1`` is set
before Python starts.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels run in the interpreter, and so take CPU tensors: fixed when they are imported."""

_H100_MULTIPROCESSORS = 132
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which kernels start on the device of ``tensor`` (Triton launches on the current one)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many programs make one wave on ``device``; the interpreter plays an H100."""
    if device.type != "cuda":
        return _H100_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def operand(*tensors: Tensor) -> Any:
    """Return the Triton type in which ``tl.dot`` multiplies these tensors: their own if they share one, else float32.

    Products of 16-bit floats are exact in float32, so nothing is lost. The interpreter would multiply the bit patterns
    of bfloat16 (its authors leave that type out), hence float32 there.
    """
    types = {x.dtype for x in tensors}
    return _TYPES[types.pop()] if len(types) == 1 and not INTERPRETED else tl.float32
