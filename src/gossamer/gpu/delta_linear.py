"""A product that follows its input, on the GPU.

Algorithm. One kernel compares new codes with previous ones, lists the inputs that changed with the change times the step,
and writes the new codes over the previous ones; :mod:`gossamer.gpu.row_sum` multiplies what is listed.

Parallelisation. One program per segment of the inputs, for all rows.

Floor. ``8 * M * K`` bytes of codes read and half as many written, and the rows of the weight where something changed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.gpu import on
from gossamer.gpu.row_sum import SEGMENT, lists, sum_rows


@triton.jit(do_not_specialize=["inputs"])
def _list_changes(
    codes,
    previous,
    step,
    ids,
    factors,
    counts,
    changes,
    codes_m,
    codes_k,
    previous_m,
    inputs,
    PER_CHANNEL: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    LENGTH: tl.constexpr,
):
    segment = tl.program_id(0)
    m, k = tl.arange(0, PADDED)[:, None], segment * LENGTH + tl.arange(0, LENGTH)
    inside = (m < ROWS) & (k < inputs)[None, :]
    now = tl.load(codes + m * codes_m + k[None, :] * codes_k, mask=inside, other=0)
    before = tl.load(previous + m * previous_m + k[None, :], mask=inside, other=0)
    tl.store(previous + m * previous_m + k[None, :], now, mask=inside)
    differs = (now != before).to(tl.int32)
    tl.store(changes + segment * ROWS + tl.arange(0, PADDED), tl.sum(differs, 1), mask=tl.arange(0, PADDED) < ROWS)
    marked = tl.max(differs, 0)
    place = segment * LENGTH + tl.cumsum(marked, 0) - 1
    tl.store(ids + place, k, mask=marked != 0)
    tl.store(counts + segment, tl.sum(marked, 0))
    if PER_CHANNEL:
        size = tl.load(step + k, mask=k < inputs, other=0.0)[None, :]
    else:
        size = tl.load(step)
    factor = (now.to(tl.int64) - before.to(tl.int64)).to(tl.float32) * size
    tl.store(factors + place[None, :] * ROWS + m, factor, mask=inside & (marked != 0)[None, :])


def delta_linear(output: Tensor, codes: Tensor, previous: Tensor, weight: Tensor, step: Tensor) -> Tensor:
    """Run :func:`gossamer.ops.delta_linear.delta_linear` on checked tensors."""
    rows, inputs = codes.shape
    ids, factors, counts = lists(inputs, rows, weight.device)
    changes = torch.empty(len(ids), rows, dtype=torch.int32, device=weight.device)
    if inputs:
        with on(weight):
            _list_changes[(len(ids),)](
                codes,
                previous,
                step.contiguous(),
                ids,
                factors,
                counts,
                changes,
                *codes.stride(),
                previous.stride(0),
                inputs,
                PER_CHANNEL=step.numel() > 1,
                ROWS=rows,
                PADDED=triton.next_power_of_2(rows),
                LENGTH=SEGMENT,
                num_warps=4,
            )
    output.add_(sum_rows(weight, ids, factors, counts))
    return changes.sum(0, dtype=torch.int32)
