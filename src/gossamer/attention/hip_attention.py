"""HiP attention: hierarchically pruned keys for prefill and decode (Lee et al., ICLR 2025, arXiv 2406.09827).

Near keys score alike, so a tree search finds a query block's best key blocks with a few scores. For every block of b_q
queries, over the keys that are neither sinks nor in the window of its last query (T of them, ``B = ⌈T/b_k⌉`` blocks):

    N = k/b_k segments of B/N blocks;  ⌈log₂(B/N)⌉ times: halve each, score a representative block of every half,
        score = max over queries q[::b_sq] and the block's keys (every b_sk-th) of q·k,  keep the best N halves
    attention = softmax over {sinks} ∪ {keys of the chosen blocks} ∪ {window of each query}, each key once, j ≤ i

That is ``2N·log₂(B/N)`` scores a block, O(T log T) a prompt, and O(T·k) for attention. This is the v1.1 block version.
Where the card is open: a query block starts at the first new query of a call, so chunks of a prompt should be multiples of
b_q; all queries of a block vote, as published, so which keys an early query reads may hang on later tokens of its block
(what it reads never does: each query attends only to j ≤ i); with left padding the keys of each sequence begin at its
first real one; a budget that is no multiple of b_k is rounded up. With `topk_head_group_size` G > 1 the segments of G
neighbouring heads compete, N·G for all of them. `hip_gather` has the offloaded cache and SelfExtend positions, `hip_heal` the
healing by LoRA. Not built: the first arXiv version's bookkeeping (v1.0: a growing canvas of relative positions, with its
SparQ-style scoring), which v1.1 replaced; and InfiniteHiP's chunk scans (v1.2), another system.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self, cast

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor, nn

from gossamer import ops
from gossamer.attention.base import AttentionMethod
from gossamer.attention.streaming_llm import sinks_and_recent
from gossamer.calibration import Calibration
from gossamer.errors import InputError
from gossamer.hf import DecodePolicy, LayerView, ModelShape, PrefillPolicy, SelectingPolicy, model_shape
from gossamer.hf.attention import dense_attention
from gossamer.hf.cache import Derived
from gossamer.ops.tree_search import Fetch, reference, take
from gossamer.patterns import AreaMeter, Budget, causal_pairs, resolve
from gossamer.patterns.hierarchy import Found, HipIndex, Layout, Representative, levels, search_together, vote
from gossamer.registry import register

_CHUNK = 1 << 21  # elements gathered at a time: 8 MB, which stay in the processor's cache


def search(
    query: Tensor,
    key: Tensor,
    *,
    budget: int = 512,
    block_q: int = 32,
    block_k: int = 2,
    window: int = 256,
    sink: int = 16,
    stride_q: int = 2,
    stride_k: int = 1,
    representative: Representative = "center",
    starts: Tensor | None = None,
    causal: bool = True,
    jitter: int = 0,
    generator: torch.Generator | None = None,
    head_group: int = 1,
    fetch: Fetch | None = None,
) -> HipIndex:
    """Choose keys for `query` ``[batch, heads, new, d]``, the last `new` positions of `key` ``[batch, kv_heads, length, d]``.

    `jitter` and `generator` are those of `gossamer.patterns.hierarchy.descend`, `head_group` is that of `search_together`
    there (without jitter), and `fetch` brings the keys that are scored (see `gossamer.ops.tree_search.reference`).

    Raises:
        InputError: shapes that do not fit, settings below 1 (`sink` below 0), or heads that `head_group` does not divide.

    >>> q = k = torch.eye(64)[None, None]
    >>> search(q, k, budget=8, block_q=16, window=16, sink=4).blocks.shape
    torch.Size([1, 1, 4, 4])
    """
    _check(query, key)
    if min(budget, block_q, block_k, window, stride_q, stride_k) < 1 or sink < 0:
        raise InputError("hip: budget, block sizes, window and strides must be 1 or more, and sink 0 or more")
    layout = Layout(query.shape[2], key.shape[2], block_q, block_k, window, sink, starts, causal)
    count, nodes, device = layout.query_blocks, -(-budget // block_k), query.device
    begin, end = layout.region(device)
    # The last block is filled up with a query that votes anyway: its first.
    filler = query[:, :, (count - 1) * block_q, None].expand(-1, -1, count * block_q - layout.new, -1)
    voters = torch.cat([query, filler], 2).unflatten(2, (count, block_q))[:, :, :, ::stride_q]
    first = begin[:, 0].to(torch.int32).expand(query.shape[0])
    ends = end[0].to(torch.int32)
    if head_group > 1:
        if query.shape[1] % head_group or jitter or fetch:
            raise InputError(
                f"hip: {query.shape[1]} heads are no whole groups of {head_group} (groups have neither jitter nor fetch)"
            )
        found = search_together(voters, key, first, ends, nodes, head_group, block_k, stride_k, representative)
    elif jitter or fetch:
        found = reference(voters, key, first, ends, nodes, block_k, stride_k, representative, jitter, generator, fetch)
    else:
        found = ops.tree_search(
            voters, key, first, ends, nodes, block=block_k, step=stride_k, representative=representative
        )
    return HipIndex(layout, *found)


def attention(query: Tensor, key: Tensor, value: Tensor, index: HipIndex, scale: float | None = None) -> Tensor:
    """Exact softmax of every query over the keys that `index` gives it; ``[batch, heads, new, d]``.

    Time and memory of the kernels grow with the keys read, never with new × length. A query in the padding reads itself.

    Raises:
        InputError: shapes that do not fit each other or the index.
    """
    _check(query, key)
    layout, (batch, heads, new, dim), (kv_heads, length) = index.layout, query.shape, key.shape[1:3]
    indexed = (*index.blocks.shape[:2], layout.new, layout.length)
    if value.shape != key.shape or indexed != (batch, heads, new, length):
        raise InputError(f"hip: the index or the values do not fit queries {list(query.shape)}, keys {list(key.shape)}")
    scale = dim**-0.5 if scale is None else scale
    if not layout.causal:
        return _whole(query, key, value, index, scale)
    sinks = (layout.first(query.device)[:, None] + torch.arange(layout.sink, device=query.device)).to(torch.int32)
    rows, valid = index.rows()
    counts = valid.sum(3, dtype=torch.int32) + (sinks < length).sum(1, dtype=torch.int32)[:, None, None]
    ids = torch.cat([sinks[:, None, None].expand(batch, *rows.shape[1:3], -1), rows.to(torch.int32)], 3)
    out = ops.block_sparse_attention(
        query,
        key,
        value,
        ids,
        counts=counts,
        block_size=layout.block_q,
        key_block_size=1,
        window=layout.window,
        starts=layout.starts,
        scale=scale,
    )
    if layout.starts is not None:
        padding = torch.arange(length - new, length, device=query.device) < layout.starts[:, None]
        itself = value[:, :, length - new :].repeat_interleave(heads // kv_heads, 1)
        out = torch.where(padding[:, None, :, None], itself, out)
    return out


def _whole(query: Tensor, key: Tensor, value: Tensor, index: HipIndex, scale: float) -> Tensor:
    """Without causality there are neither sinks nor windows: rows are gathered, some query blocks at a time."""
    layout, size = index.layout, index.layout.block_q
    padded = nn.functional.pad(query, (0, 0, 0, layout.query_blocks * size - layout.new))
    queries, outs = padded.unflatten(2, (layout.query_blocks, size)), []
    width = index.blocks.shape[3] * layout.block_k
    step = max(1, _CHUNK // (query.shape[0] * query.shape[1] * 2 * width * (query.shape[3] + size)))
    for at in (slice(i, i + step) for i in range(0, layout.query_blocks, step)):
        ids, valid = index.rows(at)
        scores = queries[:, :, at].float() * scale @ take(key, ids).transpose(3, 4)
        weights = scores.masked_fill_(~valid[:, :, :, None], -math.inf).softmax(4)
        outs.append((weights @ take(value, ids)).to(query.dtype))
    return torch.cat(outs, 2).flatten(2, 3)[:, :, : layout.new]


def computed_area(index: HipIndex) -> Tensor:
    """Share of the causal pairs of a prompt that `attention` computes, float64 ``[heads]``: the mean over the batch.

    A key counts for all queries of a block that may read it, as it is computed for all of them; once, though a few near the
    window's edge are computed with the window and as chosen ones.
    """
    layout, blocks = index.layout, index.blocks
    device = blocks.device
    opening, (begin, end) = layout.positions(device)[:, 0], layout.region(device)
    size = torch.full_like(opening, layout.block_q)
    size[-1] = layout.new - (layout.query_blocks - 1) * layout.block_q
    pairs, near = torch.zeros_like(index.counts, dtype=torch.int64), end.expand(len(begin), -1)
    if layout.causal:
        first = layout.first(device)[:, None]
        near = torch.maximum(opening - layout.window + 1, first).minimum(opening)
        sinks = (near - first).clamp(0, layout.sink)
        pairs = pairs + (size * (opening - near + 1 + sinks) + size * (size - 1) // 2)[:, None]
    keys = ((near - begin)[:, None, :, None] - blocks * layout.block_k).clamp(0, layout.block_k)
    used = torch.arange(blocks.shape[3], device=device) < index.counts[..., None]
    pairs = pairs + size * (keys * used).sum(3)
    total = causal_pairs(layout.length, layout.new) if layout.causal else layout.new * layout.length
    return pairs.sum(2).double().mean(0) / total


def _check(query: Tensor, key: Tensor) -> None:
    q, k = query.shape, key.shape
    fits = len(q) == len(k) == 4 and q[0] == k[0] and q[3] == k[3] and k[1] > 0 and q[1] % k[1] == 0
    if not fits or not 0 < q[2] <= k[2]:
        raise InputError(f"hip: want query [B,H,new,d] and key [B,Hkv,length,d], got {list(q)} and {list(k)}")


class Chosen(Derived):
    """A decode step's choice, kept for the next steps; `rows` is the length at which it was made, until rows change."""

    made_at = -1
    ids: Tensor | None = None
    counts: Tensor | None = None
    bytes_read = 0

    def forget(self) -> None:
        """Nothing is chosen any more: the next step searches."""
        self.ids = None


class HipPolicy(SelectingPolicy, PrefillPolicy):
    """Searches blocks of a prompt, and every few decode steps; between them the choice stands and the window widens.

    Steps search at lengths that `refresh` divides, and whenever there is no choice to go by, so that when a step searches
    does not hang on how its context was fed.
    """

    def __init__(self, method: HipAttention) -> None:
        super().__init__(frozenset(method.dense_layers))
        self.method = method
        #: Representatives scored since attaching, over heads and layers.
        self.evaluations = 0
        self.meter = AreaMeter()

    def report(self) -> dict[str, Any]:
        """`prefill_area` and `prefill_area_of_heads`; see `gossamer.patterns.AreaMeter`. The search's scores are not in it."""
        return self.meter.report()

    def open(self, layer: LayerView) -> Chosen:
        """Nothing chosen yet."""
        return Chosen()

    def budget(self, length: int) -> int:
        """Rows of a decode step at most: sinks, window, those that left it since the last search, chosen blocks."""
        m = self.method
        return m.sink + m.window + m.refresh - 1 + m.nodes(length) * m.block_k * m.ensemble * m.head_group

    def score_bytes(self, layer: LayerView, length: int) -> int:
        """Keys of the representatives, in the steps that search."""
        return cast(Chosen, layer.state).bytes_read

    def find(self, layer: LayerView, query: Tensor, key: Tensor, block_q: int, fetch: Fetch | None = None) -> HipIndex:
        """The keys of every query block, by `search` or by the vote of an ensemble of them."""
        m, length = self.method, key.shape[2]
        settings: dict[str, Any] = {
            **m.model_dump(include={"block_k", "window", "sink", "stride_q", "stride_k", "representative"}),
            "budget": m.nodes(length) * m.block_k,
            "block_q": block_q,
            "starts": layer.starts,
            "fetch": fetch,
        }
        if m.ensemble == 1:
            return search(query, key, head_group=m.head_group, **settings)
        generator = torch.Generator().manual_seed((m.seed * 1_000_003 + layer.index) * 1_000_003 + length)
        members = [search(query, key, jitter=m.jitter, generator=generator, **settings) for _ in range(m.ensemble)]
        found = vote([Found(e.blocks, e.counts, e.evaluations) for e in members], m.votes)
        return HipIndex(members[0].layout, *found)

    def seek(self, layer: LayerView, query: Tensor, key: Tensor) -> HipIndex:
        """The keys of one decode query ``[batch, heads, 1, head_dim]``."""
        return self.find(layer, query, key, 1)

    def prefill(self, layer: LayerView, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Dense where `is_dense` says so, otherwise search and attend; a decode choice made before is forgotten."""
        if isinstance(layer.state, Chosen):
            layer.state.forget()
        size = {"batch": len(query), "new": query.shape[2], "length": key.shape[2]}
        if self.is_dense(layer, key.shape[2]):
            self.meter.add(layer.index, 1.0, heads=query.shape[1], **size)
            return dense_attention(query, key, value, layer.scale, starts=layer.starts, window=layer.window)
        index = self.find(layer, query, key, self.method.block_q)
        self.meter.add(layer.index, computed_area(index), **size)
        self.evaluations += int(index.evaluations.sum())
        return attention(query, key, value, index, layer.scale)

    def select(self, layer: LayerView, query: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Sinks and window, then the rows chosen now or a few steps ago; rows that left the window since stay in."""
        m, state, batch = self.method, cast(Chosen, layer.state), query.shape[0]
        state.bytes_read = 0
        stands = state.rows == state.made_at <= length and length // m.refresh == state.made_at // m.refresh
        if state.ids is None or not stands:
            key = layer.key_rows(0, length)
            index = self.seek(layer, query[:, :, None], key)
            rows, valid = index.rows()
            state.ids, state.counts = rows[:, :, 0].to(torch.int32), valid[:, :, 0].sum(2, dtype=torch.int32)
            state.made_at = state.rows = length
            scored = int(index.evaluations.sum())
            self.evaluations += scored
            state.bytes_read = scored * -(-m.block_k // m.stride_k) * key.shape[3] * key.element_size()
        assert state.counts is not None
        always = min(m.sink + m.window + length - state.made_at, length)
        near, count = sinks_and_recent(layer.starts, batch, length, m.sink, always)
        near, count = near.to(query.device), count.to(query.device)
        # A sequence that does not fill the first part has nothing in the second: what counts stands in front.
        return torch.cat([near.expand(-1, query.shape[1], -1), state.ids], 2), count + state.counts


@register("hip-attention", slot="attention.prefill", family="attention")
class HipAttention(AttentionMethod):
    """Hierarchically pruned attention: each query block finds its keys by a tree search, O(T log T) for a whole prompt.

    Serves prefill and decode with neither calibration nor training; use it for long prompts. A search scores
    ``2N·⌈log₂(T/k)⌉`` blocks a query block (a decode step: one search in `refresh` steps), attention then reads
    ``k + window + sink`` rows a head. It pays once a context is several times that. The first layers do not score near keys
    alike: keep them dense, or search with an ensemble.

    For contexts beyond memory: `offload`; beyond the trained length: `self_extend` with a `window` of its neighbourhood (1024
    in the paper). `gossamer.attention.hip_heal.heal` trains adapters that make up for what is not read.

    Paper: A Training-free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned Attention,
    arXiv 2406.09827.

    >>> HipAttention(tokens=128).nodes(1024)
    64
    """

    tokens: Budget = Field(
        512, description="k, searched keys of a query block, beside sinks and window: count or fraction"
    )
    block_q: int = Field(32, ge=1, description="b_q, queries of a prompt that share their keys")
    block_k: int = Field(2, ge=1, description="b_k, neighbouring keys that are chosen together")
    stride_q: int = Field(2, ge=1, description="b_sq: every so many queries of a block vote")
    stride_k: int = Field(1, ge=1, description="b_sk: every so many keys of a representative block are scored")
    window: int = Field(256, ge=1, description="last keys that every query reads, its own included")
    sink: int = Field(16, ge=0, description="first keys that every query reads")
    refresh: int = Field(8, ge=1, description="r_m, decode steps that one search serves")
    representative: Representative = Field("center", description="the block that speaks for a segment")
    dense_layers: tuple[int, ...] = Field(
        (0, 1, 2), description="layers that read everything; negative counts from the end"
    )
    phases: Literal["both", "prefill", "decode"] = Field("both", description="which attention it takes over")
    head_group: int = Field(
        1, ge=1, description="G (topk_head_group_size), neighbouring query heads that share a budget of G·k"
    )
    self_extend: int = Field(
        1, ge=1, description="group of SelfExtend: positions beyond the window count in so many; 1 is the model's own"
    )
    offload: Literal["none", "file", "host"] = Field(
        "none", description="where all rows lie: near the model, in a memory-mapped file, or in pinned host memory"
    )
    offload_folder: str | None = Field(None, description="folder of the file (default: the system's temporary folder)")
    bank: int = Field(4096, ge=1, description="offload: rows of a KV head that stay near, for scores and for attention")
    ensemble: int = Field(1, ge=1, le=64, description="n_e, searches with random splits that vote")
    votes: int = Field(1, ge=1, description="θ, votes that keep a block; 1 is the union")
    jitter: int = Field(5, ge=1, description="r_e, how far an ensemble's splits move, in blocks")
    seed: int = Field(0, ge=0, lt=1 << 20, description="of the ensemble's splits")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.head_group > 1 and (self.ensemble > 1 or self.self_extend > 1 or self.offload != "none"):
            raise ValueError("head_group works alone: leave ensemble and self_extend at 1, and offload at none")
        if self.self_extend > 1 and (self.phases != "both" or self.ensemble > 1):
            raise ValueError("self_extend changes positions in both phases (phases=both), and has no ensemble")
        if self.offload != "none" and (self.phases == "prefill" or self.ensemble > 1):
            raise ValueError("offload is for decode (phases=decode or both), and has no ensemble")
        return self

    @field_validator("votes")
    @classmethod
    def _enough_voters(cls, votes: int, info: ValidationInfo) -> int:
        if votes > info.data.get("ensemble", votes):
            raise ValueError("there are fewer searches (ensemble) than votes")
        return votes

    def nodes(self, length: int) -> int:
        """N, key blocks in the budget at this context length."""
        return -(-resolve(self.tokens, length) // self.block_k)

    def decode_policy(self, model: nn.Module, calibration: Calibration | None) -> DecodePolicy | None:
        """A policy for single queries, unless only prefill was asked for.

        Raises:
            InputError: heads that are no whole groups.
            ModelError: `self_extend` on a model without rotary positions that can be moved.
        """
        return None if self.phases == "prefill" else self._policy(model, self.offload != "none")

    def prefill_policy(self, model: nn.Module, calibration: Calibration | None) -> PrefillPolicy | None:
        """A policy for blocks of queries, unless only decode was asked for; raises as `decode_policy`."""
        return None if self.phases == "decode" else self._policy(model, False)

    def _policy(self, model: nn.Module, far: bool) -> HipPolicy:
        heads = model_shape(model).heads
        if heads % self.head_group:
            raise InputError(f"hip-attention: {heads} heads are no whole groups of {self.head_group}: set head_group")
        if self.self_extend == 1 and not far:
            return HipPolicy(self)
        from gossamer.attention.hip_gather import GatheringPolicy  # it builds on this file

        return GatheringPolicy(self, model, far)

    def with_rows(self, rows: int) -> HipAttention:
        """Half of the rows searched for; the window and the sinks share the other half, where their own sizes are larger."""
        sink = min(self.sink, rows // 8)
        window = max(1, min(self.window, rows // 2 - sink))
        return self.model_copy(update={"tokens": max(1, rows - window - sink), "window": window, "sink": sink})

    def io_bytes(self, length: int, shape: ModelShape, element_size: int) -> dict[str, int]:
        """Rows per query head (a step halfway between two searches) and the keys that a search scores, spread over `refresh`.

        Exact for ``refresh=1`` where the keys searched are a multiple of `block_k`; an ensemble's union is an upper bound.
        """
        searched, row = max(0, length - self.window - self.sink), shape.head_dim * element_size
        nodes = self.nodes(length)
        widened = min(length, self.sink + self.window + (self.refresh - 1) // 2)
        chosen = min(searched, nodes * self.block_k * self.ensemble)
        depth = int(levels(torch.tensor(-(-searched // self.block_k)), nodes))
        scored = 2 * nodes * depth * -(-self.block_k // self.stride_k) * self.ensemble
        return {
            "rows": min(length, widened + chosen) * shape.heads * 2 * row,
            "scores": scored * shape.heads * row // self.refresh,
        }
