"""A linear layer that reads only the weights of its large inputs, on the GPU.

Algorithm. One kernel lists the inputs that some row keeps, with what each row multiplies them with;
:mod:`gossamer.gpu.row_sum` multiplies what is listed.

Parallelisation. One program per segment of the inputs, for all rows.

Floor. ``x`` once, and the rows of the weight that some row of ``x`` keeps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.gpu import on
from gossamer.gpu.row_sum import SEGMENT, lists, sum_rows


@triton.jit(do_not_specialize=["inputs"])
def _list_channels(
    x,
    threshold,
    scale,
    ids,
    factors,
    counts,
    kept,
    x_m,
    x_k,
    inputs,
    PER_CHANNEL: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    LENGTH: tl.constexpr,
):
    segment = tl.program_id(0)
    m, k = tl.arange(0, PADDED)[:, None], segment * LENGTH + tl.arange(0, LENGTH)
    inside = (m < ROWS) & (k < inputs)[None, :]
    value = tl.load(x + m * x_m + k[None, :] * x_k, mask=inside, other=0.0).to(tl.float32)
    if threshold is None:
        small = tl.abs(value) <= 0.0
    elif PER_CHANNEL:
        small = tl.abs(value) <= tl.load(threshold + k, mask=k < inputs, other=0.0)[None, :]
    else:
        small = tl.abs(value) <= tl.load(threshold)
    keeps = inside & (small == 0)  # a NaN is not small
    own = tl.sum(keeps.to(tl.int32), 1)
    tl.store(kept + segment * (ROWS + 1) + tl.arange(0, PADDED), own, mask=tl.arange(0, PADDED) < ROWS)
    marked = tl.max(keeps.to(tl.int32), 0)
    place = segment * LENGTH + tl.cumsum(marked, 0) - 1
    tl.store(ids + place, k, mask=marked != 0)
    tl.store(counts + segment, tl.sum(marked, 0))
    tl.store(kept + segment * (ROWS + 1) + ROWS, tl.sum(marked, 0))
    if scale is not None:
        value *= tl.load(scale + k, mask=k < inputs, other=0.0)[None, :]
    tl.store(factors + place[None, :] * ROWS + m, tl.where(keeps, value, 0.0), mask=inside & (marked != 0)[None, :])


def channel_sparse_linear(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    kept: Tensor | None,
) -> Tensor:
    """Run :func:`gossamer.ops.channel_sparse_linear` on checked tensors."""
    rows, inputs = x.shape
    ids, factors, counts = lists(inputs, rows, x.device)
    found = torch.empty(len(ids), rows + 1, dtype=torch.int32, device=x.device)
    if inputs:
        with on(x):
            _list_channels[(len(ids),)](
                x,
                None if threshold is None else threshold.contiguous(),
                None if scale is None else scale.contiguous(),
                ids,
                factors,
                counts,
                found,
                *x.stride(),
                inputs,
                PER_CHANNEL=threshold is not None and threshold.dim() > 0,
                ROWS=rows,
                PADDED=triton.next_power_of_2(rows),
                LENGTH=SEGMENT,
                num_warps=4,
            )
    if kept is not None:
        kept.copy_(found.sum(0))
    out = sum_rows(weight, ids, factors, counts)
    return (out if bias is None else out + bias.float()).to(x.dtype)
