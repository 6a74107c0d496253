"""SeerAttention's gates: from pooled queries and keys to a score for every pair of blocks (Gao et al., arXiv 2410.13276).

Blocks of b tokens, n = ⌈S/b⌉ of them; Q, K are those *before* rotary embedding; Dg is the gate's width:

    Q̃ = concat of the chosen poolings of Q over a block (avg, max, min), K̃ likewise      [B, H, n, D·|P|]
    q̂ = Q̃ · W_q[h],  k̂ = K̃ · W_k[kv(h)], then RoPE at the position of the block's first token
    G = q̂ k̂ᵀ / √Dg, hidden above the block diagonal and where a block is all padding      [B, H, n, n]

With one pooling of Q and Dg = D there is no W_q (q̂ = Q̃), and every *query* head has a W_k of its own (the shortcut).

From G to blocks: the best k in a row, or those whose softmax is above a threshold. A row budget of k = r·n blocks covers
2r − r² of the causal triangle, so a share ρ of it takes r = 1 − √(1 − ρ).

The decode gate (SeerAttention-R, arXiv 2506.08889) has one query per KV head, mapped jointly from its group and not pooled:

    q̂_k = RoPE(RMSNorm(Σ_g q_{k,g} · W[k,g])),  k̂ = RoPE(RMSNorm(K̃ · W_k[k]))

Decisions where the card leaves room. Pools of a block that padding reaches into are those of its real tokens, of a block
that is all padding 0. The gate rotates with the model's own embedding, made Dg wide where Dg ≠ D; where a family rotates
only a part of a head, the gate rotates as large a part.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.errors import CalibrationError
from gossamer.hf import LayerView
from gossamer.hf.cache import Derived
from gossamer.hf.rotary import Rotary

POOLS = ("max", "min", "avg")  # the order of concatenation
HIDDEN = -1e30  # finite: PyTorch's KL divergence multiplies it by a target of 0


def parse_gate(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Poolings of queries and of keys, from the release's class names; all 49 combinations.

    >>> parse_gate("Qavg_Kmaxminavg")
    (('avg',), ('max', 'min', 'avg'))
    """
    part = "((?:max)?(?:min)?(?:avg)?)"
    match = re.fullmatch(f"Q{part}_K{part}", name)
    if match is None or not match[1] or not match[2]:
        raise ValueError("must look like Qavg_Kmaxminavg: poolings max, min, avg in this order, at least one each")
    query, key = (tuple(pool for pool in POOLS if pool in text) for text in match.groups())
    return query, key


def block_pools(x: Tensor, block: int, pools: Sequence[str], starts: Tensor | None = None) -> Tensor:
    """Pool `x` ``[B, H, S, D]`` over blocks of tokens: ``[B, H, ⌈S/b⌉, D·|pools|]`` in float32.

    Args:
        pools: of "max", "min", "avg", concatenated as given. Averages divide by the tokens that are there.
        starts: int ``[B]``, left padding, which is left out.

    >>> block_pools(torch.tensor([1.0, 3.0, 5.0]).view(1, 1, 3, 1), 2, ("max", "avg"))[0, 0].tolist()
    [[3.0, 2.0], [5.0, 5.0]]
    """
    length, parts = x.shape[2], {}
    if starts is None and length % block == 0:
        whole = x.float().unflatten(2, (length // block, block))
        found = {"avg": whole.mean, "max": whole.amax, "min": whole.amin}
        return torch.cat([found[pool](3) for pool in pools], 3)
    blocks = F.pad(x.float(), (0, 0, 0, -length % block)).unflatten(2, (-(-length // block), block))
    token = torch.arange(blocks.shape[2] * block, device=x.device)
    real = (token < length)[None]
    if starts is not None:
        real = real & (token >= starts[:, None])
    real = real.view(len(real), 1, blocks.shape[2], block, 1)
    count = real.sum(3)
    if "avg" in pools:
        parts["avg"] = blocks.masked_fill(~real, 0.0).sum(3) / count.clamp_min(1)
    if "max" in pools:
        parts["max"] = blocks.masked_fill(~real, -math.inf).amax(3).masked_fill(count == 0, 0.0)
    if "min" in pools:
        parts["min"] = blocks.masked_fill(~real, math.inf).amin(3).masked_fill(count == 0, 0.0)
    return torch.cat([parts[pool] for pool in pools], 3)


def visible_blocks(new: int, length: int, block: int, starts: Tensor | None, device: torch.device) -> Tensor:
    """Which key blocks a block of queries may read, boolean ``[B or 1, 1, ⌈new/b⌉, ⌈length/b⌉]``.

    The queries are the last `new` of `length`; their blocks are counted from the first, key blocks from row 0. A block that
    is all padding is neither read nor reads.
    """
    rows, columns = -(-new // block), -(-length // block)
    last = length - new + (torch.arange(1, rows + 1, device=device) * block).clamp_max(new) - 1
    begin = torch.arange(columns, device=device) * block
    seen = (begin <= last[:, None])[None, None]
    if starts is not None:
        first = starts.to(device).view(-1, 1, 1, 1)
        seen = seen & (begin + block > first) & (last[:, None] >= first)
    return seen


def row_budget(area: float, blocks: int) -> int:
    """k, key blocks of a row that cover `area` of the causal triangle of `blocks` × `blocks`: ``max(1, ⌊(1 − √(1 − ρ))·n⌋)``.

    >>> row_budget(0.75, 64), row_budget(1.0, 64)
    (32, 64)
    """
    return max(1, math.floor((1 - math.sqrt(1 - area)) * blocks + 1e-9))


def choose_blocks(
    scores: Tensor,
    visible: Tensor,
    *,
    area: float | None = None,
    threshold: float | None = None,
    last_dense: int = 0,
    aligned: Tensor | None = None,
) -> Tensor:
    """The block mask, boolean ``[B, H, nq, nk]``, from scores G of that shape.

    Args:
        visible: `visible_blocks`.
        area: ρ, the best ``row_budget(ρ, nk)`` visible blocks of each row; ties go to the lower block.
        threshold: τ, instead: blocks whose softmax over the visible ones is above it.
        last_dense: rows at the end that keep all visible blocks.
        aligned: boolean like `visible`: blocks that every query of the row sees something of (default: `visible`). A row
            that kept none of these gets the best of them, so that no query is left with nothing.
    """
    hidden = scores.masked_fill(~visible, -math.inf)
    if threshold is not None:
        keep = (hidden.softmax(-1) > threshold) & visible
    else:
        assert area is not None
        count = min(row_budget(area, scores.shape[3]), scores.shape[3])
        order = hidden.sort(dim=3, descending=True, stable=True).indices[..., :count]
        keep = torch.zeros_like(hidden, dtype=torch.bool).scatter_(3, order, True) & visible
    whole = visible if aligned is None else aligned
    lost = ~(keep & whole).any(3, keepdim=True) & whole.any(3, keepdim=True)
    best = scores.masked_fill(~whole, -math.inf).argmax(3, keepdim=True)
    keep = keep.scatter(3, best, keep.gather(3, best) | lost)
    if last_dense:
        keep[:, :, -last_dense:] = visible[:, :, -last_dense:]
    return keep


def pair_counts(new: int, length: int, block: int, device: torch.device) -> Tensor:
    """Query–key pairs of every block pair that causality allows, int64 ``[⌈new/b⌉, ⌈length/b⌉]`` (no padding)."""
    rows, columns = -(-new // block), -(-length // block)
    first = length - new + torch.arange(rows, device=device)[:, None] * block
    begin = torch.arange(columns, device=device) * block
    width = (length - begin).clamp_max(block)

    def until(x: Tensor) -> Tensor:  # Σ_{u=1..x} min(u, width)
        x = x.clamp_min(0)
        low = torch.minimum(x, width)
        return low * (low + 1) // 2 + (x - low) * width

    return until((first + block).clamp_max(length) - begin) - until(first - begin)


def _head_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Per-head linear map: ``[B, Hx, n, c]`` with ``[H, c, Dg]`` → ``[B, H, n, Dg]``; a head of x serves H/Hx weights."""
    if x.shape[1] == weight.shape[0]:
        return torch.einsum("bhnc,hcd->bhnd", x, weight)
    grouped = weight.unflatten(0, (x.shape[1], -1))
    mapped: Tensor = torch.einsum("bknc,kgcd->bkgnd", x, grouped)
    flat: Tensor = mapped.flatten(1, 2)
    return flat


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q̂ k̂ᵀ / √Dg for ``[B, H, n, Dg]`` and ``[B, H or Hkv, m, Dg]``, keys not repeated: ``[B, H, n, m]``."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores: Tensor = torch.einsum("bkgnd,bkmd->bkgnm", grouped, k).flatten(1, 2)
    return scores / math.sqrt(q.shape[-1])


def _block_positions(blocks: int, block: int, offset: int, device: torch.device) -> Tensor:
    return offset + torch.arange(blocks, device=device) * block


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def _initialise(weights: Sequence[Tensor], init: str, generator: torch.Generator) -> None:
    """N(0, 0.02) for v2 ("normal"), Xavier for v1 ("xavier"), head by head."""
    for weight in weights:
        width = math.sqrt(6 / (weight.shape[-2] + weight.shape[-1]))
        with torch.no_grad():
            if init == "xavier":
                weight.copy_((torch.rand(weight.shape, generator=generator) * 2 - 1) * width)
            else:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)


class SeerGate(nn.Module):
    """One layer's gate for prefill.

    Args:
        heads, kv_heads, head_dim: of the layer.
        name: poolings, as `parse_gate` reads them.
        gate_dim: Dg.
        force_double: have a W_q also where the shortcut would do.
        init: "normal" (v2) or "xavier" (v1).

    Weights: `wq` ``[H, D·|Pq|, Dg]`` (None in the shortcut), `wk` ``[Hkv, D·|Pk|, Dg]``, or ``[H, …]`` in the shortcut.

    >>> gate = SeerGate(32, 8, 128)
    >>> gate.wq is None, sum(p.numel() for p in gate.parameters()) * 32
    (True, 50331648)
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        name: str = "Qavg_Kmaxminavg",
        gate_dim: int | None = None,
        force_double: bool = False,
        init: str = "normal",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.q_pools, self.k_pools = parse_gate(name)
        width = head_dim if gate_dim is None else gate_dim
        shortcut = len(self.q_pools) == 1 and width == head_dim and not force_double
        self.wq = None if shortcut else nn.Parameter(torch.empty(heads, head_dim * len(self.q_pools), width))
        rows = heads if shortcut else kv_heads
        self.wk = nn.Parameter(torch.empty(rows, head_dim * len(self.k_pools), width))
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        _initialise(list(self.parameters()), init, generator)

    def forward(
        self, q_pooled: Tensor, k_pooled: Tensor, rotary: Rotary, layer: int, block: int, offset: int = 0
    ) -> Tensor:
        """G float32 ``[B, H, nq, nk]``, nothing hidden.

        Args:
            q_pooled, k_pooled: `block_pools` of unrotated queries ``[B, H, nq, …]`` and keys ``[B, Hkv, nk, …]``.
            rotary: the model's, Dg wide.
            offset: row of the first query.
        """
        q = q_pooled if self.wq is None else _head_linear(q_pooled, self.wq)
        k = _head_linear(k_pooled, self.wk)
        q = rotary.rotated(q, layer, _block_positions(q.shape[2], block, offset, q.device))
        k = rotary.rotated(k, layer, _block_positions(k.shape[2], block, 0, k.device))
        return _scores(q, k)


class SeerDecodeGate(nn.Module):
    """One layer's gate for decode: a query per KV head, the keys pooled block by block.

    Weights: `wq` ``[Hkv, G·D, Dg]``, `wk` ``[Hkv, D·|Pk|, Dg]``, norm weights `nq`, `nk` ``[Dg]``.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        name: str = "Qavg_Kmaxminavg",
        gate_dim: int | None = None,
        init: str = "normal",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.k_pools = parse_gate(name)[1]
        width = head_dim if gate_dim is None else gate_dim
        self.wq = nn.Parameter(torch.empty(kv_heads, heads // kv_heads * head_dim, width))
        self.wk = nn.Parameter(torch.empty(kv_heads, head_dim * len(self.k_pools), width))
        self.nq, self.nk = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        _initialise([self.wq, self.wk], init, generator)

    def query(self, query: Tensor, rotary: Rotary, layer: int, positions: Tensor) -> Tensor:
        """q̂ ``[B, Hkv, T, Dg]`` of unrotated queries ``[B, H, T, D]`` at `positions`, broadcastable to ``[B, Hkv, T]``."""
        joint = query.float().unflatten(1, (self.wq.shape[0], -1)).transpose(2, 3).flatten(3)
        return rotary.rotated(_rms(_head_linear(joint, self.wq), self.nq), layer, positions)

    def key(self, k_pooled: Tensor, rotary: Rotary, layer: int, positions: Tensor) -> Tensor:
        """k̂ ``[B, Hkv, n, Dg]`` of pooled unrotated keys whose blocks begin at `positions`, broadcastable to ``[B, Hkv, n]``."""
        return rotary.rotated(_rms(_head_linear(k_pooled, self.wk), self.nk), layer, positions)

    def forward(
        self, query: Tensor, k_pooled: Tensor, rotary: Rotary, layer: int, block: int, positions: Tensor
    ) -> Tensor:
        """G float32 ``[B, Hkv, T, n]`` for queries ``[B, H, T, D]`` at `positions` ``[T]``; nothing hidden."""
        q = self.query(query, rotary, layer, positions)
        begin = _block_positions(k_pooled.shape[2], block, 0, query.device)
        return _scores(q, self.key(k_pooled, rotary, layer, begin))


def load_gate(gate: nn.Module, tensors: dict[str, Tensor], prefix: str) -> nn.Module:
    """Fill a gate with the tensors ``prefix.name``.

    Raises:
        CalibrationError: one is missing, of another shape, or not finite.
    """
    for name, parameter in gate.named_parameters():
        found = tensors.get(f"{prefix}.{name}")
        if found is None or found.shape != parameter.shape:
            got = "nothing" if found is None else str(list(found.shape))
            raise CalibrationError(
                f"seerattention: these gates do not fit: {prefix}.{name} should be {list(parameter.shape)}, there is {got}"
            )
        if not bool(torch.isfinite(found).all()):
            raise CalibrationError(f"seerattention: the gate {prefix}.{name} is not finite: train it again")
        with torch.no_grad():
            parameter.copy_(found)
    return gate.requires_grad_(False)


# -- what a policy sees is rotated: undo it --------------------------------------------------------------------------------

_CHUNK = 512  # rows unrotated at a time: their copies stay in the cache


def position_shift(layer: LayerView) -> Tensor | None:
    """How much row numbers (dropped rows counted) exceed token positions, int64 ``[B or 1, 1, 1]``; None: not at all.

    `generate` counts the positions of a left-padded sequence from its first real token, a plain forward from the padding.
    """
    given = layer.runtime.position_ids
    if given is None:
        return None
    return (layer.kv.get_seq_length() - 1 - given[..., -1]).view(-1, 1, 1)


def token_positions(layer: LayerView, begin: int, end: int, device: torch.device) -> Tensor:
    """Positions of rows ``[begin, end)`` of a layer, broadcastable to ``[B, Hkv, end − begin]``."""
    kv, shift = layer.kv, position_shift(layer)
    rows = kv.positions[:, :, begin:end].long().to(device) if kv.dropped else torch.arange(begin, end, device=device)
    return rows if shift is None else rows - shift.to(device)


def pooled_states(
    layer: LayerView, x: Tensor, positions: Tensor, first: int, block: int, pools: Sequence[str], rotary: Rotary
) -> Tensor:
    """`block_pools` of rotated states ``[B, H, T, D]`` before their rotation; the first starts a block.

    Args:
        positions: of the states, broadcastable to ``[B, H, T]``.
        first: row of the first state, where left padding is left out.
    """
    step, parts = max(1, _CHUNK // block) * block, []
    for low in range(0, max(x.shape[2], 1), step):
        plain = rotary.plain(x[:, :, low : low + step].float(), layer.index, positions[..., low : low + step])
        starts = None if layer.starts is None else (layer.starts.to(x.device) - first - low).clamp_min(0)
        parts.append(block_pools(plain, block, pools, starts))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def pooled_keys(
    layer: LayerView, key: Tensor, begin: int, end: int, block: int, pools: Sequence[str], rotary: Rotary
) -> Tensor:
    """`pooled_states` of the rows ``[begin, end)`` of the layer's keys ``[B, Hkv, S, D]``; `begin` starts a block."""
    positions = token_positions(layer, begin, end, key.device)
    return pooled_states(layer, key[:, :, begin:end], positions, begin, block, pools, rotary)


def query_positions(layer: LayerView, new: int, row: int, device: torch.device) -> Tensor:
    """Positions of `new` queries from `row` on, broadcastable to ``[B, H, new]``."""
    first, shift = row + layer.kv.dropped, position_shift(layer)
    positions = torch.arange(first, first + new, device=device)
    return positions if shift is None else positions - shift.to(device)


class BlockStore(Derived):
    """One row for each whole block of a layer, ``[B, Hkv, blocks, W]``; storage grows by doubling."""

    data: Tensor | None = None

    def extend(self, length: int, block: int, make: Callable[[int, int], Tensor]) -> Tensor:
        """Rows of all whole blocks among the first `length` rows; those missing are made by ``make(begin, end)``."""
        done, blocks = self.rows // block, length // block
        if self.data is None or blocks > done:
            fresh, old = make(done * block, blocks * block), self.data
            if old is None or old.shape[2] < blocks:
                with torch.inference_mode(False):  # to be written in any mode
                    self.data = fresh.new_empty(*fresh.shape[:2], max(64, 2 * blocks), fresh.shape[3])
                if old is not None:
                    self.data[:, :, :done] = old[:, :, :done]
            assert self.data is not None
            self.data[:, :, done:blocks] = fresh[:, :, : blocks - done]
        self.rows = blocks * block
        return self.data[:, :, :blocks]
