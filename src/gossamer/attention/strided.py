"""Dilated and strided prefill: fixed patterns that skip distances, which MInference (arXiv 2407.02490) is compared with.

    keep(i, j) = j ≤ i and (j < n_init or i − j < n_local or (i − j < n_local + n_far and (i − j) mod stride = 0))

    dilated   1k sinks, and every second of the last 8k distances                     (n_local 0)
    strided   1k sinks, the last 2k tokens, and every second distance of 4k beyond

Distance 0 is always kept. Where the card is open: with a dense local part, distances are counted from the query all the
same, and with left padding the sinks count from a sequence's first real row.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.attention.base import AttentionMethod
from gossamer.attention.minference_run import A_SHAPE, Heads, Online, PatternPolicy
from gossamer.calibration import Calibration
from gossamer.hf import LayerView, PrefillPolicy, dense_attention
from gossamer.hf.views import model_shape
from gossamer.patterns import causal_pairs
from gossamer.registry import register

_ROWS = 256  # queries at a time


def near_mask(distance: Tensor, n_local: int, n_far: int, stride: int) -> Tensor:
    """Which distances ``i − j`` a query reads, boolean of the same shape.

    >>> near_mask(torch.arange(-1, 8), n_local=2, n_far=4, stride=2).int().tolist()
    [0, 1, 1, 1, 0, 1, 0, 0, 0]
    """
    far = (distance < n_local + n_far) & (distance % stride == 0)
    keep: Tensor = (distance >= 0) & ((distance < n_local) | far)
    return keep


def strided_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    n_init: int,
    n_local: int,
    n_far: int,
    stride: int,
    scale: float,
    starts: Tensor | None = None,
) -> Tensor:
    """Attention of a whole prompt to the token, some queries at a time: only sinks and the reach of the band are touched.

    Args:
        query: ``[batch, heads, length, d]``; key, value: ``[batch, kv_heads, length, d]``.
        starts: int ``[batch]``, first real row: sinks count from it. Queries before it read themselves.
    """
    batch, kv_heads, length, _ = key.shape
    device = key.device
    first = torch.zeros(batch, dtype=torch.int64, device=device) if starts is None else starts.long()
    sinks = first[:, None] + torch.arange(min(n_init, length), device=device)
    outs = []
    for begin in range(0, length, _ROWS):
        end, reach = min(begin + _ROWS, length), max(0, begin - n_local - n_far + 1)
        i, j = torch.arange(begin, end, device=device)[:, None], torch.arange(reach, end, device=device)
        sink = (j >= first[:, None]) & (j < first[:, None] + n_init)
        near = (near_mask(i - j, n_local, n_far, stride) & (j >= first[:, None, None])) | (sink[:, None] & (j <= i))
        before = (sinks < reach)[:, None].expand(-1, end - begin, -1)  # the other sinks lie within the band's reach
        ids = sinks.clamp_max(length - 1)[:, None, :, None].expand(-1, kv_heads, -1, -1)
        keys, values = (
            torch.cat([x.gather(2, ids.expand(-1, -1, -1, x.shape[3])), x[:, :, reach:end]], 2) for x in (key, value)
        )
        itself = (i == j) & (i < first[:, None, None])
        mask = torch.cat([before, near | itself], 2)[:, None]
        outs.append(dense_attention(query[:, :, begin:end], keys, values, scale, mask=mask))
    return torch.cat(outs, 2)


def strided_pairs(length: int, n_init: int, n_local: int, n_far: int, stride: int) -> int:
    """Pairs of a prompt that the pattern keeps.

    >>> strided_pairs(4, n_init=0, n_local=0, n_far=4, stride=2), strided_pairs(4, n_init=9, n_local=0, n_far=1, stride=2)
    (6, 10)
    """
    distance = torch.arange(length)
    near = near_mask(distance, n_local, n_far, stride)
    pairs = int((near * (length - distance)).sum())
    # A distance outside the band is read where the key is a sink: keys 0 … n_init − 1, queries up to the last.
    return pairs + int((~near * (length - distance).clamp_max(n_init)).sum())


class StridedPolicy(PatternPolicy):
    """The same pattern for all heads of every layer."""

    def __init__(self, method: Dilated, layers: list[Heads | None]) -> None:
        super().__init__(method.slug, layers, Online(block_size=1))
        self.method = method

    def attend(
        self, layer: LayerView, heads: Heads, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The output and the area: the pairs that the definition keeps."""
        m, length = self.method, key.shape[2]
        pattern = (m.n_init, m.n_local, m.n_far, m.stride)
        out = strided_attention(query, key, value, *pattern, layer.scale, layer.starts)
        share = strided_pairs(length, *pattern) / causal_pairs(length)
        return out, torch.full((query.shape[1],), share, dtype=torch.float64)


@register("dilated-window", slot="attention.prefill", family="attention", name="Dilated window prefill", baseline=True)
class Dilated(AttentionMethod):
    """Read a prompt through sinks and every second token of a window: twice as far as a window of the same cost.

    A baseline: half of the near past is never seen by a query, and nothing in the middle of the prompt. Its area is that of
    the definition; it runs on torch's masked attention, which computes every token within reach. Decode is dense.

    >>> Dilated().n_far, Dilated().stride
    (8192, 2)
    """

    n_init: int = Field(1024, ge=0, description="first keys that every query reads")
    n_local: int = Field(0, ge=0, description="last keys that every query reads, its own included")
    n_far: int = Field(8192, ge=1, description="distances beyond n_local of which every stride-th is read")
    stride: int = Field(2, ge=1, description="of the distances read, counted from the query")
    starting_layer: int = Field(0, ge=0, description="layers before this one are dense")

    def prefill_policy(self, model: nn.Module, calibration: Calibration | None) -> PrefillPolicy:
        """A policy with the same pattern for all heads."""
        shape = model_shape(model)
        whole = self.n_local + (self.n_far if self.stride == 1 else 0)
        heads = Heads.uniform(A_SHAPE, self.n_init, whole, shape.heads)  # tells when the pattern covers a prompt
        return StridedPolicy(self, [None if i < self.starting_layer else heads for i in range(shape.layers)])


@register("strided-window", slot="attention.prefill", family="attention", name="Strided window prefill", baseline=True)
class Strided(Dilated):
    """Read a prompt through sinks, a window, and every second token before it.

    A baseline, as `Dilated`: it reads the near past whole, and the rest of its reach thinly. Decode is dense.

    >>> Strided().n_local, Strided().n_far
    (2048, 4096)
    """

    n_local: int = Field(2048, ge=1, description="last keys that every query reads, its own included")
    n_far: int = Field(4096, ge=1, description="distances beyond n_local of which every stride-th is read")
