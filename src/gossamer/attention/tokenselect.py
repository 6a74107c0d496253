"""TokenSelect (Wu et al., EMNLP 2025, arXiv 2411.02886): one set of tokens per layer, voted by all heads, per chunk and step.

N cached rows, H query heads, queries q (the mean over a prefill chunk, or the decode step's own):

    c[h, j] = s · q[h] · K[kv(h), j]            j in the candidates n_init … N − n_local − 1; s = vote_scale
    v[j]    = Σ_h softmax_j c[h, :]             soft vote;  raw: Σ_h c[h, j];  hard: Σ_h 1[j in top-k of c[h, :]]
    v       = maxpool(v, pool)                  only when pool > 1
    I       = {0 … n_init−1} ∪ top-k of v ∪ {N − n_local … N−1}
    out     = causal attention of the chunk's queries to K[I], V[I], the same I for every head

Selection Cache (decode; per layer and sequence): while cos(q, C_Q) ≥ theta, all heads concatenated, the last selection C_I
serves again; C_Q changes only on a miss. Sinks and local rows are always those of the present length, so on a hit, rows
that have left the local window since the miss are read by neither part.

Decisions where the paper or its release leaves room:

* `gqa_map="contiguous"`: kv(h) = h // (H / H_kv), how transformers lays heads out. The release scores with h mod H_kv.
* In prefill the local part is at least the chunk itself, so that a chunk smaller or larger than n_local stays causal.
* A left-padded sequence has its own sinks, candidates and mean query (padding is no query); one that fits the budget is
  read whole. Chunks are cut from the first row of a call.
* The Selection Cache compares queries as they are scored. It is forgotten by a new block of prefill, by a crop behind the
  miss, by dropped rows and by beam reordering, and when a fractional budget changes the three parts.
* Max-pool with an even kernel reaches one row further ahead than behind; the release leaves its last candidate out.
* Tensor-parallel ranks (`tensor_parallel`) hold some of the heads each: votes are summed over them before top-k, as published.
  So are the parts of the Selection Cache's cosine, or one rank would hit where another misses.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from gossamer import ops
from gossamer.attention.base import AttentionMethod
from gossamer.attention.tokenselect_positions import PlainKeys, take_rows
from gossamer.calibration import Calibration
from gossamer.errors import InputError
from gossamer.hf import LayerView, ModelShape, PrefillPolicy, SelectingPolicy
from gossamer.hf.attention import dense_attention
from gossamer.hf.rotary import Rotary, turn
from gossamer.ops.attention_row import attention_row
from gossamer.patterns import resolve
from gossamer.patterns.budget import check, parse
from gossamer.registry import register

Vote = Literal["soft", "raw", "hard"]
GqaMap = Literal["contiguous", "mod"]
Parts = tuple[int, int, int]  # n_init, k, n_local


# -- formulas -----------------------------------------------------------------------------------------------------------


def head_logits(query: Tensor, key: Tensor, gqa_map: GqaMap = "contiguous") -> Tensor:
    """q·k of every head: query ``[B, H, d]``, key ``[B, Hkv, n, d]`` → float32 ``[B, H, n]``; keys are not repeated."""
    if gqa_map == "contiguous":
        return ops.key_scores(query, key)
    kv_heads = key.shape[1]
    grouped = query.unflatten(1, (-1, kv_heads)).transpose(1, 2)
    logits: Tensor = ops.key_scores(grouped.flatten(1, 2), key).unflatten(1, (kv_heads, -1))
    return logits.transpose(1, 2).flatten(1, 2)


def head_vote(logits: Tensor, vote: Vote, k: int, starts: Tensor | None = None) -> Tensor:
    """One score per row from all heads: logits float32 ``[B, H, n]`` → ``[B, n]``.

    Args:
        vote: soft (softmax per head, then the sum), raw (sum) or hard (in how many heads' top-k a row is).
        k: rows that a head names in the hard vote; ties go to the lower row.
        starts: int32 ``[B]``, rows before it are no candidates and get 0 (raw: ``-inf``); None: 0.

    >>> head_vote(torch.tensor([[[0.0, 9.0, 0.0], [50.0, 0.0, 0.0]]]), "hard", 1).tolist()
    [[1.0, 1.0, 0.0]]
    """
    if starts is not None:
        row = torch.arange(logits.shape[2], device=logits.device)
        logits = logits.masked_fill(row < starts[:, None, None], -torch.inf)
    if vote == "soft":
        return logits.softmax(2).sum(1).nan_to_num(0.0)  # a sequence without candidates gives NaN
    if vote == "raw":
        return logits.sum(1)
    ids, counts = ops.select_topk(logits, k)
    named = (torch.arange(k, device=ids.device) < counts[..., None]).float()
    return logits.new_zeros(logits.shape[0], logits.shape[2]).scatter_add_(1, ids.flatten(1).long(), named.flatten(1))


def max_pool(votes: Tensor, kernel: int) -> Tensor:
    """Each row's vote becomes the largest within ``[j − (kernel−1)//2, j + kernel//2]``; ``[B, n]``, kernel ≤ 1: unchanged.

    >>> max_pool(torch.tensor([[0.0, 0.0, 5.0, 0.0, 0.0]]), 3).tolist()
    [[0.0, 5.0, 5.0, 5.0, 0.0]]
    """
    if kernel <= 1 or votes.shape[1] == 0:
        return votes
    padded = F.pad(votes, ((kernel - 1) // 2, kernel // 2), value=-torch.inf)
    return F.max_pool1d(padded[:, None], kernel, stride=1)[:, 0]


def assemble(selected: Tensor, starts: Tensor | None, length: int, parts: Parts) -> tuple[Tensor, Tensor]:
    """Sinks, selected and local rows of each sequence, ascending; a sequence within the budget keeps all its rows.

    Args:
        selected: int32 ``[B, k]``, ascending ids of candidates; not read for sequences within the budget.
        starts: int32 ``[B]``, first real row of each sequence, below `length`; None: 0.

    Returns:
        ids int32 ``[B, n_init + k + n_local]`` and counts int32 ``[B]``; ids beyond a count are to be ignored.

    >>> assemble(torch.tensor([[3, 5]], dtype=torch.int32), None, 10, (1, 2, 2))[0].tolist()
    [[0, 3, 5, 8, 9]]
    """
    n_init, _, n_local = parts
    budget, batch, device = sum(parts), selected.shape[0], selected.device
    slot = torch.arange(budget, dtype=torch.int32, device=device)
    first = slot.new_zeros(batch, 1) if starts is None else starts.view(batch, 1).to(device, torch.int32)
    local = (slot[:n_local] + (length - n_local)).expand(batch, -1)
    long = torch.cat([first + slot[:n_init], selected, local], dim=1)
    if starts is None and length > budget:
        return long, torch.full_like(first[:, 0], budget)
    real = length - first
    ids = torch.where(real > budget, long, (first + slot).clamp_max(length - 1))
    return ids, real[:, 0].clamp_max(budget)


# -- the policy ---------------------------------------------------------------------------------------------------------


class TokenSelectState(PlainKeys):
    """What one cache layer keeps: the Selection Cache, and un-rotated keys when positions are packed."""

    query: Tensor | None = None  # C_Q, float32 [B, H·d], as it was scored
    selected: Tensor | None = None  # C_I, int32 [B, k]
    made: Tensor | None = None  # context length at which each sequence's C was made; 0: none
    parts: Parts = (0, 0, 0)
    latest: int = 0  # the largest of `made`
    scored: int = 0  # bytes that the last selection read

    def forget(self) -> None:
        """Empty the Selection Cache."""
        self.query = self.selected = self.made = None
        self.latest = 0

    def sync(self, layer: LayerView, rotary: Rotary | None) -> None:
        """Follow the layer's rows: drop what was derived from rows that are gone, un-rotate the new ones."""
        if self.made is not None and self.rows < self.latest:
            self.made = self.made.masked_fill(self.made > self.rows, 0)
            self.latest = int(self.made.max())
        if rotary is not None:
            self.extend(layer, rotary)
        self.rows = layer.kv.length


def over_ranks(x: Tensor, parallel: bool) -> Tensor:
    """The sum of `x` over the ranks of the default process group, in place; with `parallel` false, `x` itself.

    >>> over_ranks(torch.ones(2), False).tolist()
    [1.0, 1.0]
    """
    if parallel:
        torch.distributed.all_reduce(x)
    return x


def likeness(query: Tensor, other: Tensor, parallel: bool = False) -> Tensor:
    """Cosine ``[B]`` of queries ``[B, n]``, all heads concatenated: of all ranks' where `parallel`.

    >>> likeness(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])).tolist()
    [0.9600000381469727]
    """
    if not parallel:
        return F.cosine_similarity(query, other, dim=1).clamp(-1.0, 1.0)
    parts = over_ranks(torch.stack([(x * y).sum(1) for x, y in ((query, other), (query, query), (other, other))]), True)
    return (parts[0] / (parts[1] * parts[2]).sqrt().clamp_min(1e-8)).clamp(-1.0, 1.0)


class TokenSelectPolicy(SelectingPolicy, PrefillPolicy):
    """Votes, remembers, and attends; one object serves both phases so that they share each layer's state.

    Attributes:
        lookups, hits: how often a sequence of a layer asked its Selection Cache, and found it good.
    """

    def __init__(self, method: TokenSelect, model: nn.Module) -> None:
        super().__init__(frozenset(method.dense_layers))
        self.method = method
        self.rotary = Rotary(model, "tokenselect", "use positions='original'") if method.positions == "packed" else None
        self.lookups = self.hits = 0
        self.last: dict[int, tuple[Tensor, Tensor]] = {}

    def last_selection(self, layer: int) -> tuple[Tensor, Tensor]:
        """Row ids int32 ``[B, n]`` that the layer last read, the same for all heads, and how many count, int32 ``[B]``."""
        return self.last[layer]

    def cache_hit_rate(self) -> float:
        """Share of decode selections that the Selection Cache served."""
        return self.hits / self.lookups if self.lookups else 0.0

    def open(self, layer: LayerView) -> TokenSelectState:
        """Nothing selected yet."""
        return TokenSelectState()

    def budget(self, length: int) -> int:
        """Sinks, selected and local rows together."""
        return sum(self.method.parts(length))

    def score_bytes(self, layer: LayerView, length: int) -> int:
        """The candidates' keys, or nothing when the Selection Cache served every sequence."""
        return cast(TokenSelectState, layer.state).scored

    # -- decode

    def select(self, layer: LayerView, query: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The same rows for every KV head."""
        ids, counts = self._rows(layer, query, length)
        kv_heads = layer.kv.heads  # of this rank
        return ids[:, None].expand(-1, kv_heads, -1).contiguous(), counts[:, None].expand(-1, kv_heads).contiguous()

    def decode(self, layer: LayerView, query: Tensor, length: int) -> Tensor:
        """Dense within the budget; otherwise the selected rows, where they lie or packed together."""
        if self.rotary is None or self.is_dense(layer, length):
            return super().decode(layer, query, length)
        indices, counts = self.select(layer, query, length)
        key, value = self._packed(layer, layer.state, indices[:, 0], layer.rows(length)[1])
        old = torch.tensor([[length - 1 + layer.kv.dropped]], device=query.device)
        query = self.rotary.move(query, layer.index, old, counts[:, :1] - 1)
        layer.count_selected(indices, counts, length, self.score_bytes(layer, length))
        return ops.decode_attention(query, key, value, lengths=counts[:, 0].contiguous(), scale=layer.scale)

    def _rows(self, layer: LayerView, query: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Ids ``[B, n]`` and counts ``[B]`` for one decode query, by the Selection Cache where it holds."""
        state, parts = cast(TokenSelectState, layer.state), self.method.parts(length)
        state.sync(layer, self.rotary)
        state.scored = 0
        selected = zeros(query, parts[1])
        if length > sum(parts) and parts[1]:
            if self.rotary is not None:
                old = torch.tensor([[length - 1 + layer.kv.dropped]], device=query.device)
                query = self.rotary.move(query, layer.index, old, torch.full_like(old, parts[2]))
            selected = self._cached(layer, state, query, length, parts)
        self.last[layer.index] = assemble(selected, layer.starts, length, parts)
        return self.last[layer.index]

    def _cached(self, layer: LayerView, state: TokenSelectState, query: Tensor, length: int, parts: Parts) -> Tensor:
        """Selected ids ``[B, k]``: those of the last miss where the query is still alike, else new ones."""
        flat, starts = query.flatten(1).float(), layer.starts
        asks = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
        if starts is not None:
            asks = length - starts.to(flat.device) > sum(parts)
        hit = torch.zeros_like(asks)
        if state.parts != parts:
            state.forget()
        if state.query is not None and state.made is not None and self.method.theta <= 1:
            alike = likeness(flat, state.query, self.method.tensor_parallel) >= self.method.theta
            hit = asks & (state.made > 0) & alike
        miss = asks & ~hit
        self.lookups += int(asks.sum())
        self.hits += int(hit.sum())
        if bool(miss.any()):
            fresh = self._choose(layer, state, query, length, parts)
            if state.query is None or state.selected is None or state.made is None:
                state.query, state.selected, state.made = flat.clone(), fresh, miss * length
            else:
                state.query = torch.where(miss[:, None], flat, state.query)
                state.selected = torch.where(miss[:, None], fresh, state.selected)
                state.made = state.made.masked_fill(miss, length)
            state.parts, state.latest = parts, max(state.latest, length)
        return zeros(asks, parts[1]) if state.selected is None else state.selected

    def _choose(self, layer: LayerView, state: TokenSelectState, query: Tensor, length: int, parts: Parts) -> Tensor:
        """Ids int32 ``[B, k]`` of the candidates with most votes, for queries ``[B, H, d]``."""
        n_init, k, n_local = parts
        candidates = length - n_local - n_init
        if self.rotary is None:
            key = layer.key_rows(n_init, n_init + candidates).to(query.device)
        else:
            assert state.plain is not None
            key = state.plain.narrow(2, n_init, candidates).to(query.device)
        # A sequence that starts at row s has its sinks there: its candidates begin at s + n_init, s of this slice.
        first = None if layer.starts is None else layer.starts.to(query.device, torch.int32).clamp_max(candidates)
        scale = layer.scale if isinstance(self.method.vote_scale, str) else self.method.vote_scale
        if self.method.vote == "soft" and self.method.gqa_map == "contiguous":
            votes = attention_row(query, key, starts=first, scale=scale).sum(1)
        else:
            logits = head_logits(query, key, self.method.gqa_map)
            votes = head_vote(logits if scale == 1.0 else logits * scale, self.method.vote, k, first)
        votes = max_pool(over_ranks(votes.contiguous(), self.method.tensor_parallel), self.method.pool)
        ids, _ = ops.select_topk(votes[:, None], k, starts=first)
        state.scored = key.numel() * key.element_size()
        return ids[:, 0] + n_init

    def _packed(self, layer: LayerView, state: TokenSelectState, ids: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys of rows `ids` ``[B, n]`` rotated for the positions 0 … n−1, and their values ``[B, Hkv, n, d]``."""
        assert state.plain is not None and self.rotary is not None
        cos, sin = self.rotary.first(layer.index, ids.shape[1], ids.device)
        return turn(take_rows(state.plain, ids), cos, sin), take_rows(value, ids)

    # -- prefill

    def prefill(self, layer: LayerView, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Chunk by chunk: each chunk's mean query selects for all its queries."""
        state = cast(TokenSelectState, layer.prefill_state)
        state.sync(layer, self.rotary)
        state.forget()
        new, length, chunk = query.shape[2], key.shape[2], self.method.chunk
        narrow = layer.window and layer.window < length
        if self.reads_all(layer) or narrow or length <= self.budget(length):
            return dense_attention(query, key, value, layer.scale, starts=layer.starts, window=layer.window)
        outs = []
        for begin in range(0, new, chunk):
            end = min(begin + chunk, new)
            rows = length - new + end
            block = query[:, :, begin:end]
            outs.append(self._block(layer, state, block, key.narrow(2, 0, rows), value.narrow(2, 0, rows)))
        return torch.cat(outs, dim=2) if len(outs) > 1 else outs[0]

    def _block(self, layer: LayerView, state: TokenSelectState, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One chunk of queries ``[B, H, T, d]`` at the last T of the rows given."""
        new, length = query.shape[2], key.shape[2]
        n_init, k, n_local = self.method.parts(length)
        parts = (n_init, k, max(n_local, new))
        if length <= sum(parts):
            return dense_attention(query, key, value, layer.scale, starts=layer.starts, window=layer.window)
        at = torch.arange(length - new, length, device=query.device)
        starts = None if layer.starts is None else layer.starts.to(query.device).clamp_max(length - 1)
        scored = query
        if self.rotary is not None:  # as if the chunk stood right behind n_local tokens; keys at 0
            scored = self.rotary.move(query, layer.index, at + layer.kv.dropped, at - at[0] + parts[2])
        if starts is None:
            mean = scored.mean(2)
        else:
            real = (at >= starts[:, None]).to(query.dtype)
            mean = (scored * real[:, None, :, None]).sum(2) / real.sum(1).clamp_min(1)[:, None, None]
        selected = zeros(mean, k) if not k else self._choose(layer, state, mean, length, parts)
        ids, counts = self.last[layer.index] = assemble(selected, starts, length, parts)
        slot = torch.arange(ids.shape[1], device=ids.device)
        mask = (ids[:, None, None] <= at[:, None]) & (slot < counts[:, None, None, None])
        if starts is not None:  # a query in the padding sees nothing: give it something, nobody reads it
            mask = mask | ((at[:, None] < starts[:, None, None, None]) & (slot == 0))
        if self.rotary is None:
            key, value = take_rows(key, ids), take_rows(value, ids)
        else:
            key, value = self._packed(layer, state, ids, value)
            packed = counts[:, None, None] - new + torch.arange(new, device=ids.device)
            query = self.rotary.move(query, layer.index, at + layer.kv.dropped, packed)
        return dense_attention(query, key, value, layer.scale, mask=mask)


def zeros(like: Tensor, k: int) -> Tensor:
    """int32 zeros ``[B, k]``."""
    return torch.zeros(like.shape[0], k, dtype=torch.int32, device=like.device)


def _tokens(value: Any) -> Any:
    return check(parse(value))


@register("tokenselect", slot="attention.decode", family="attention")
class TokenSelect(AttentionMethod):
    """Token-level selection by a vote of all heads, for prefill in chunks and for decode; nothing is evicted, no training.

    When to use it: long prompts, where the scores are paid once per chunk (the paper's gains are there), and
    key–value-like retrieval, which single tokens decide. Cost: a decode step reads ``N·H_kv·d`` key elements to choose
    and ``2·(n_init + k + n_local)·H_kv·d`` to attend, against ``2·N·H_kv·d`` dense, so at best half the bytes, less only
    on hits of the Selection Cache. A prefill chunk of c queries costs ``2·H·d·N + 4·c·H·d·(n_init + k + c)`` FLOPs against
    ``4·c·H·d·N``.

    `positions`: "packed", the paper's, renumbers the rows read as 0, 1, 2, … so that no distance exceeds
    n_init + k + n_local, and a model reads beyond its trained length; it keeps an un-rotated copy of the keys (half the
    cache's size on top), because the cache that methods share holds rotated ones. "original" leaves the rows as they are
    stored. It is the default: it needs no copy and no rotation, every decoder has it, with or without rotary embedding, and
    within the trained length it is closer to dense (SmolLM2, 104 of 1024 tokens after a dense prefill: KL 0.04 against
    0.24). Choose "packed" beyond that length (one run at 12,288 tokens, trained on 8192: perplexity 12, dense 116).

    On the attached policy, ``handle.runtime.decode``: `last_selection(layer)` and `cache_hit_rate()`.

    Paper: TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level KV Cache
    Selection, EMNLP 2025, arXiv 2411.02886.

    >>> TokenSelect(tokens=256).parts(4096)
    (12, 196, 48)
    """

    k: int = Field(2048, ge=1, description="rows selected between sinks and local rows")
    n_init: int = Field(128, ge=0, description="first rows always read")
    n_local: int = Field(512, ge=1, description="last rows always read; in prefill at least the chunk")
    tokens: Annotated[int | float | None, BeforeValidator(_tokens)] = Field(
        None,
        description="all rows read, a count or a fraction: shared out as n_init : k : n_local (default: their sum)",
    )
    chunk: int = Field(512, ge=1, description="c, queries that select together in prefill")
    theta: float = Field(0.9, ge=-1.0, description="cosine from which a decode selection is reused; above 1 never")
    vote: Vote = Field("soft", description="how heads vote: soft (softmax per head), raw (sum), hard (top-k per head)")
    vote_scale: Annotated[float, Field(gt=0)] | Literal["1/sqrt(d)"] = Field(
        1.0, description="factor on the logits before the vote (the paper: none); '1/sqrt(d)': the model's own scale"
    )
    pool: int = Field(0, ge=0, description="kernel of the max-pool over votes; 0 and 1: off")
    gqa_map: GqaMap = Field("contiguous", description="KV head a query head scores with; 'mod': as released")
    positions: Literal["original", "packed"] = Field("original", description="positions at which rows are read")
    phases: Literal["both", "prefill", "decode"] = Field("both", description="which phases the method serves")
    dense_layers: tuple[int, ...] = Field((), description="layers that read everything; negative count from the end")
    tensor_parallel: bool = Field(
        False,
        description="heads are shared out over torch.distributed's default process group: votes are summed over it",
    )

    def parts(self, length: int) -> Parts:
        """n_init, k and n_local at this context length."""
        if self.tokens is None:
            return self.n_init, self.k, self.n_local
        total, whole = resolve(self.tokens, length), self.n_init + self.k + self.n_local
        n_init, n_local = self.n_init * total // whole, max(1, self.n_local * total // whole)
        return n_init, total - n_init - n_local, n_local

    def policies(self, model: nn.Module, calibration: Calibration | None) -> dict[str, Any]:
        """One object for the phases served, so that they share each layer's state.

        Raises:
            InputError: `tensor_parallel` without a process group.
            ModelError: positions are to be packed, and the model has no rotary embedding that allows it.
        """
        if self.tensor_parallel and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise InputError("tokenselect: tensor_parallel needs torch.distributed.init_process_group first")
        policy = TokenSelectPolicy(self, model)
        return {phase: policy for phase in ("decode", "prefill") if self.phases in ("both", phase)}

    def io_bytes(self, length: int, shape: ModelShape, element_size: int) -> dict[str, int]:
        """A step whose selection is new; on a hit of the Selection Cache the scores cost nothing."""
        n_init, k, n_local = self.parts(length)
        row, budget = shape.kv_heads * shape.head_dim * element_size, n_init + k + n_local
        scored = length - n_init - n_local if k and budget < length else 0
        return {"rows": min(budget, length) * 2 * row, "scores": scored * row}
