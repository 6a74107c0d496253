"""A-shape prefill: attention sinks and a local band, as StreamingLLM reads a prompt (arXiv 2309.17453); and Tri-shape.

    keep(i, j) = j ≤ i and (i − j < n_local or j < n_init);  with Tri-shape, everything for the last `last_q` queries

By default whole blocks are computed: the band's far edge, the sinks' end and the first dense query are rounded outwards.
`exact=True` keeps to the definition: the kernel takes the band as a window and the sinks as one block of `n_init` keys. With
left padding, where sinks lie elsewhere in each sequence, it is two passes as published, the band and then the sinks beyond
it, merged by their log-sum-exps, on torch's matrix products.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer import ops
from gossamer.attention.base import AttentionMethod
from gossamer.attention.minference_run import A_SHAPE, Area, Heads, Online, PatternPolicy
from gossamer.calibration import Calibration
from gossamer.errors import InputError
from gossamer.hf import LayerView, PrefillPolicy, dense_attention
from gossamer.hf.views import model_shape
from gossamer.patterns import causal_pairs
from gossamer.registry import register

_ROWS = 256  # queries of a pass at a time


def two_passes(
    query: Tensor, key: Tensor, value: Tensor, n_init: int, n_local: int, scale: float, starts: Tensor | None = None
) -> Tensor:
    """A-shape attention to the token: keys at ``0 ≤ i − j < n_local``, then sinks at ``i − j ≥ n_local``, merged.

    Args:
        query: ``[batch, heads, length, d]``; key, value: ``[batch, kv_heads, length, d]``.
        starts: int ``[batch]``, first real row: sinks count from it. Queries before it give zeros.
    """
    batch, kv_heads, length, _ = key.shape
    queries = query.unflatten(1, (kv_heads, -1)).float() * scale
    first = torch.zeros(batch, dtype=torch.int64, device=key.device) if starts is None else starts.long()
    sinks = (first[:, None] + torch.arange(min(n_init, length), device=key.device)).clamp_max(length - 1)
    unique = torch.arange(sinks.shape[1], device=key.device) < length - first[:, None]
    at = sinks[:, None, :, None].expand(-1, kv_heads, -1, key.shape[3])
    early = key.gather(2, at).float(), value.gather(2, at).float()
    outs = []
    for begin in range(0, length, _ROWS):
        end, far = min(begin + _ROWS, length), max(0, begin - n_local + 1)
        i, j = torch.arange(begin, end, device=key.device)[:, None], torch.arange(far, end, device=key.device)
        near = ((j <= i) & (i - j < n_local) & (j >= first[:, None, None])).unsqueeze(1)
        before = (sinks[:, None] <= i - n_local) & unique[:, None]
        parts = [
            _pass(queries[:, :, :, begin:end], key[:, :, far:end].float(), value[:, :, far:end].float(), near),
            _pass(queries[:, :, :, begin:end], *early, before[:, None]),
        ]
        out, _ = ops.merge_attention(*(torch.stack(x) for x in zip(*parts, strict=True)))
        outs.append(out.flatten(1, 2))
    return torch.cat(outs, 2).to(query.dtype)


def _pass(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys that `keep` ``[batch, 1, rows, keys]`` leaves, and its log-sum-exp."""
    logits = (query @ key.unsqueeze(2).transpose(3, 4)).masked_fill(~keep.unsqueeze(2), -math.inf)
    lse = logits.logsumexp(-1)
    return torch.exp(logits - lse.masked_fill(lse == -math.inf, 0.0)[..., None]) @ value.unsqueeze(2), lse


def one_pass(query: Tensor, key: Tensor, value: Tensor, n_init: int, n_local: int, scale: float, size: int) -> Tensor:
    """A-shape attention to the token, of sequences without padding, by the kernel; blocks of `size` queries."""
    lines = (len(query), 1, -(-query.shape[2] // size))
    return ops.block_sparse_attention(
        query,
        key,
        value,
        torch.zeros(*lines, 1, dtype=torch.int32, device=query.device),
        counts=torch.full(lines, int(n_init > 0), dtype=torch.int32, device=query.device),
        block_size=size,
        key_block_size=max(1, min(n_init, key.shape[2])),
        window=n_local,
        scale=scale,
    )


class ExactPolicy(PatternPolicy):
    """The exact pattern, the last queries dense."""

    def attend(
        self, layer: LayerView, heads: Heads, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The output and the area: here the pairs that the definition keeps."""
        n_init, n_local, length = int(heads.first[0]), int(heads.second[0]), key.shape[2]
        dense = self.online.dense_rows
        if layer.starts is None:
            out = one_pass(query, key, value, n_init, n_local, layer.scale, self.online.block_size)
        else:
            out = two_passes(query, key, value, n_init, n_local, layer.scale, layer.starts)
        i = torch.arange(length)
        read = (i + 1).clamp_max(n_local) + (i + 1 - n_local).clamp(0, n_init)
        if dense:
            rows = slice(max(0, length - dense), length)
            out[:, :, rows] = dense_attention(query[:, :, rows], key, value, layer.scale, starts=layer.starts)
            read[rows] = i[rows] + 1
        area = torch.full((query.shape[1],), int(read.sum()) / causal_pairs(length), dtype=torch.float64)
        return out, area


@register(
    "a-shape", slot="attention.prefill", family="attention", name="A-shape (sinks + window) prefill", baseline=True
)
class AShape(AttentionMethod):
    """Read a prompt through sinks and a local window, StreamingLLM's prefill; with `last_q`, Tri-shape.

    Cheapest of all and blind to the middle of the prompt: the baseline that a placed pattern must beat. Cost: n_init + n_local
    keys a query, ``report()["prefill_area"]`` of the causal area. Decode is dense.

    >>> AShape(last_q=100).n_local
    4096
    """

    n_init: int = Field(1024, ge=0, description="first keys that every query reads")
    n_local: int = Field(4096, ge=1, description="last keys that every query reads, its own included")
    last_q: int = Field(0, ge=0, description="last queries of the prompt that read everything; 100 is Tri-shape")
    area: Area | None = Field(
        None, description="scale both budgets to this share of the causal area; none: as they are"
    )
    block_size: int = Field(64, ge=1, description="side of a kernel's block")
    exact: bool = Field(False, description="keep to the pattern by the token")
    starting_layer: int = Field(0, ge=0, description="layers before this one are dense")

    def prefill_policy(self, model: nn.Module, calibration: Calibration | None) -> PrefillPolicy:
        """A policy with the same pattern for all heads.

        Raises:
            InputError: `exact` together with `area`, which counts whole blocks.
        """
        if self.exact and self.area is not None:
            raise InputError("a-shape: area counts whole blocks and exact computes none: choose one")
        shape = model_shape(model)
        heads = Heads.uniform(A_SHAPE, self.n_init, self.n_local, shape.heads)
        layers = [None if index < self.starting_layer else heads for index in range(shape.layers)]
        online = Online(block_size=self.block_size, dense_rows=self.last_q)
        policy = ExactPolicy if self.exact else PatternPolicy
        return policy(self.slug, layers, online, self.area)
