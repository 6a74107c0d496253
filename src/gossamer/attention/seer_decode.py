"""SeerAttention-R: learned block gates for decode (arXiv 2506.08889). The gate and its formulas are in `seer_gate`.

A cache of compressed keys k̂ grows by one row whenever a block of b tokens is complete. A step scores it with one gate query
per KV head and reads the best blocks whole, up to a token budget (budget/b blocks) or above a threshold of the softmax; the
last block, complete or not, is always read. The compressed keys are float32: they are 1/b of the cache and less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from gossamer import ops
from gossamer.attention.seer_gate import BlockStore, SeerDecodeGate, pooled_keys, query_positions, token_positions
from gossamer.hf import LayerView, SelectingPolicy
from gossamer.hf.rotary import Rotary

if TYPE_CHECKING:
    from gossamer.attention.seerattention import SeerAttention


def rows_of_blocks(
    blocks: Tensor, counts: Tensor, block: int, opened: int, length: int, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The open block's rows, then those of the chosen blocks.

    Args:
        blocks, counts: int32 ``[B, Hkv, k]``, ``[B, Hkv]``: chosen blocks, of which `counts` count.
        opened: first row of the open block; it ends at `length`.
        starts: int32 ``[B]``, left padding, which is left out.

    Returns:
        ids int32 ``[B, Hkv, k·b + length − opened]`` and how many count, int32 ``[B, Hkv]``.

    >>> blocks = torch.tensor([[[1, 0]]], dtype=torch.int32)
    >>> rows_of_blocks(blocks, torch.tensor([[1]], dtype=torch.int32), 2, 4, 5, None)
    (tensor([[[4, 2, 3, 0, 1]]], dtype=torch.int32), tensor([[3]], dtype=torch.int32))
    """
    offset = torch.arange(block, dtype=torch.int32, device=blocks.device)
    last = torch.arange(opened, length, dtype=torch.int32, device=blocks.device)
    rows = torch.cat([last.expand(*blocks.shape[:2], -1), (blocks[..., None] * block + offset).flatten(2)], dim=2)
    counts = counts * block + len(last)
    if starts is not None:  # a block may straddle the end of the padding: drop its padded rows
        slot = torch.arange(rows.shape[2], device=rows.device)
        real = (rows >= starts[:, None, None]) & (slot < counts[..., None])
        rows = rows.gather(2, real.int().argsort(dim=2, descending=True, stable=True))
        counts = real.sum(2, dtype=torch.int32)
    return rows.contiguous(), counts


class SeerDecodePolicy(SelectingPolicy):
    """Scores whole blocks with the layer's gate, adds the open one."""

    def __init__(self, method: SeerAttention, layers: list[SeerDecodeGate], rotary: Rotary, wide: Rotary) -> None:
        super().__init__(frozenset(method.dense_layers))
        self.method, self.gates, self.rotary, self.wide = method, layers, rotary, wide

    def open(self, layer: LayerView) -> BlockStore:
        """No compressed keys yet."""
        return BlockStore()

    def budget(self, length: int) -> int:
        """Rows of the selected blocks; under a threshold, at most all."""
        return (
            length if self.method.decode_threshold is not None else self.method.blocks(length) * self.method.block_size
        )

    def is_dense(self, layer: LayerView, length: int) -> bool:
        """As always; a threshold has no budget that could cover the context, only a single block does."""
        if self.method.decode_threshold is None:
            return super().is_dense(layer, length)
        return self.reads_all(layer) or bool(layer.window and layer.window < length) or length <= self.method.block_size

    def score_bytes(self, layer: LayerView, length: int) -> int:
        """Compressed keys before the current token's block."""
        state = cast(BlockStore, layer.state)
        assert state.data is not None
        batch, heads, _, width = state.data.shape
        return batch * heads * ((length - 1) // self.method.block_size) * width * 4

    def compressed(self, layer: LayerView) -> Tensor:
        """k̂ ``[B, Hkv, blocks, Dg]`` of all whole blocks of the layer."""
        block, gate = self.method.block_size, self.gates[layer.index]
        key, _ = layer.rows(layer.kv.length)

        def make(begin: int, end: int) -> Tensor:
            pooled = pooled_keys(layer, key, begin, end, block, gate.k_pools, self.rotary)
            positions = token_positions(layer, begin, end, key.device)[..., ::block]
            return gate.key(pooled[:, :, : (end - begin) // block], self.wide, layer.index, positions)

        return cast(BlockStore, layer.state).extend(layer.kv.length, block, make)

    def select(self, layer: LayerView, query: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Rows of the best blocks and of the open block, per KV head."""
        m, gate = self.method, self.gates[layer.index]
        whole = (length - 1) // m.block_size  # blocks that end before the current token's
        keys = self.compressed(layer)[:, :, :whole]
        positions = query_positions(layer, 1, length - 1, query.device)
        plain = self.rotary.plain(query[:, :, None].float(), layer.index, positions)
        gate_query = gate.query(plain, self.wide, layer.index, positions)
        scores = (gate_query @ keys.transpose(2, 3)).squeeze(2)
        first = None if layer.starts is None else layer.starts.to(query.device, torch.int32) // m.block_size
        if m.decode_threshold is None:
            count = min(m.blocks(length) - 1, whole)
            blocks, counts = ops.select_topk(scores, count, starts=None if first is None else first.clamp_max(whole))
        else:
            scores = scores / keys.shape[3] ** 0.5
            if first is not None:
                before = torch.arange(whole, device=scores.device) < first[:, None, None]
                scores = scores.masked_fill(before, -torch.inf)
            keep = scores.softmax(2).nan_to_num(0.0) > m.decode_threshold
            if first is not None:
                keep = keep & ~before
            counts = keep.sum(2, dtype=torch.int32)
            most = int(counts.max()) if whole else 0
            blocks = keep.int().argsort(dim=2, descending=True, stable=True)[..., :most].to(torch.int32)
        return rows_of_blocks(blocks, counts, m.block_size, whole * m.block_size, length, layer.starts)
