"""Score, select and attend on the GPU: three to five launches in a row, nothing read back in between.

Algorithm. The kernels of :mod:`~gossamer.gpu.labels` (which gives the current token ``+inf`` where it is to be
protected, so that no launch is spent on it), :mod:`~gossamer.gpu.select_topk` and
:mod:`~gossamer.gpu.decode_attention`. Scores, ids and counts stay on the device, and no size depends on them, so that
a CUDA graph can hold the whole.

Floor. ``S * Hlab * (r * bits / 8 + 8)`` bytes of labels, ``8 * S * Hsel`` of scores (written and read), ``2 * k *
Hsel * d * itemsize`` of K and V.
"""

from __future__ import annotations

from torch import Tensor

from gossamer.gpu.decode_attention import decode_attention
from gossamer.gpu.labels import Labels, label_scores
from gossamer.gpu.select_topk import select_topk


def label_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    channels: Tensor,
    labels: Labels,
    k: int,
    *,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float,
    select: str,
    reduce: str,
    protect_last: bool = True,
    indices_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run :func:`gossamer.ops.label_attention` on checked tensors; ``reduce`` already says what ``select`` asks for."""
    kv_heads, rows = key.shape[1:3]
    scores = label_scores(
        query,
        channels,
        labels,
        rows,
        starts=starts,
        lengths=lengths,
        reduce=reduce,
        kv_heads=kv_heads,
        protect_last=protect_last,
    )
    indices, counts = select_topk(scores, k, starts=starts, lengths=lengths, indices_out=indices_out)
    out = decode_attention(
        query, key, value, starts=starts, lengths=lengths, indices=indices, counts=counts, scale=scale
    )
    return out, indices, counts
