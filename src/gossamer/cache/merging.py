"""Evict-then-merge, as building blocks for any cache method that scores tokens.

`global_local_score` says how important a token is, `pair_similarity` how redundant beside another, and `merge_into` moves
tokens into the kept ones that they resemble; `evict_then_merge` is all of it for one layer. A token that resembles none
goes to a virtual class 0 whose key and value are zero, and which nobody reads: being evicted and being merged is one
scatter of one static shape, for all heads at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.errors import InputError

Combine = Literal["max", "sum", "global", "local"]
Norms = Literal["separate", "averaged"]

_BLOCK = 2048  # tokens compared with the centers at once: bounds the memory of a long prompt's similarities


class Rows(NamedTuple):
    """Cached tokens with their scores: key and value ``[..., n, d]``, score float32 ``[..., n]``."""

    key: Tensor
    value: Tensor
    score: Tensor


def global_local_score(total: Tensor, local: Tensor, *, combine: Combine = "max", pool: int = 1) -> Tensor:
    """Importance from the attention ever received and from that of the last queries, brought to one scale.

    The sums of a few rows are small beside those of all, so the local ones are multiplied to the same mean ("mean
    alignment") before the two are combined. Sums over all tokens given align as means do.

    Args:
        total: float32 ``[batch, kv_heads, n]``, attention from all queries; 0 for padding.
        local: the same from the last queries only. A constant factor on it has no effect on ``max`` and ``sum``.
        combine: the larger of both, their sum, or one alone ("local" is then unaligned).
        pool: neighbours (an odd number) whose scores are averaged.

    Returns:
        float32 ``[batch, kv_heads, n]``.

    Raises:
        InputError: shapes differ, numbers are not finite, or `pool` is even or below 1.

    >>> global_local_score(torch.tensor([[[6.0, 2.0, 1.0]]]), torch.tensor([[[0.0, 1.0, 2.0]]])).tolist()
    [[[6.0, 3.0, 6.0]]]
    """
    if total.shape != local.shape or total.dim() != 3:
        raise InputError(
            f"want global and local sums [batch, kv_heads, n], got {list(total.shape)} and {list(local.shape)}"
        )
    if pool < 1 or pool % 2 == 0:
        raise InputError(f"pool must be odd and at least 1, got {pool}")
    if not bool(torch.isfinite(total.sum() + local.sum())):
        raise InputError("attention sums are not finite: look for NaN or Inf in the model's keys")
    if combine == "global":
        score = total
    elif combine == "local":
        score = local
    else:
        received = local.sum(-1, keepdim=True)
        share = local / received.masked_fill(received == 0, 1.0)  # at most 1: no overflow, whatever the scale
        aligned = share * total.sum(-1, keepdim=True)
        score = torch.maximum(total, aligned) if combine == "max" else total + aligned
    return F.avg_pool1d(score, pool, stride=1, padding=pool // 2) if pool > 1 and score.shape[-1] else score


def pair_similarity(
    key: Tensor, value: Tensor, center_key: Tensor, center_value: Tensor, *, clamp: bool = True
) -> Tensor:
    """Redundancy of each token beside each center: the cosine of the keys times the cosine of the values.

    Args:
        key, value: tokens ``[..., t, d]``; center_key, center_value: ``[..., c, d]``.
        clamp: cosines below 0 count as 0; otherwise two opposite pairs look alike.

    Returns:
        float32 ``[..., t, c]``, at most 1.

    >>> one = torch.tensor([[1.0, 0.0]])
    >>> pair_similarity(-one, -one, one, one).item(), pair_similarity(-one, -one, one, one, clamp=False).item()
    (0.0, 1.0)
    """
    result: Tensor | None = None
    for token, center in ((key, center_key), (value, center_value)):
        cosine = F.normalize(token.float(), dim=-1) @ F.normalize(center.float(), dim=-1).transpose(-1, -2)
        cosine = cosine.clamp(0.0 if clamp else -1.0, 1.0)
        result = cosine if result is None else result.mul_(cosine)
    assert result is not None
    return result


def zero_class(similarity: Tensor, tau: float) -> Tensor:
    """The class of each token: the most similar center ``1 … c``, or 0 where even that one is less similar than `tau`.

    Args:
        similarity: ``[..., t, c]``. The first of equal centers wins, and a center wins against class 0.

    Returns:
        int64 ``[..., t]``.

    >>> zero_class(torch.tensor([[0.2, 0.9], [0.3, 0.1]]), tau=0.6).tolist()
    [2, 0]
    """
    if similarity.shape[-1] == 0:
        return torch.zeros(similarity.shape[:-1], dtype=torch.int64, device=similarity.device)
    best = similarity.max(-1)
    return (best.indices + 1).masked_fill(best.values < tau, 0)


def add_members(sums: Tensor, members: Tensor, classes: Tensor) -> Tensor:
    """`sums` of the centers ``[..., c, m]`` plus those of the tokens ``[..., t, m]`` that went to each; class 0 is lost.

    >>> add_members(torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0], [20.0], [40.0]]), torch.tensor([2, 0, 2])).tolist()
    [[1.0], [52.0]]
    """
    table = F.pad(sums, (0, 0, 1, 0))
    return table.scatter_add(-2, classes[..., None].expand_as(members), members)[..., 1:, :]


def merge_classes(centers: Rows, tokens: Rows, classes: Tensor, *, norms: Norms = "separate") -> Rows:
    """Centers with their tokens merged in: means weighted by score, which add up.

    With W the sum of the scores of a center and its tokens, its value is ``Σ s·v / W``; its key has the direction of
    ``Σ s·k/‖k‖`` and the norm ``Σ s·‖k‖ / W``, because a mean of keys that differ in direction is shorter than they are,
    which would flatten the softmax. Where nothing is merged, or all scores are 0, the center stays bit for bit.

    Args:
        centers: c rows; tokens: t rows with the same leading dimensions.
        classes: int64 ``[..., t]``, from `zero_class`.
        norms: "averaged" takes the plain mean of the keys instead.

    Returns:
        c rows in float32, with W as their scores.

    Raises:
        InputError: shapes don't fit.
    """
    _check(centers, tokens, classes)
    dim = centers.key.shape[-1]
    alone = _weighted(centers, norms)
    together = add_members(alone, _weighted(tokens, norms), classes)
    weight = together[..., -1:]
    joined = add_members(torch.zeros_like(weight), torch.ones_like(tokens.score)[..., None], classes)
    changed = (joined > 0) & (weight > 0)
    mean = together / weight.masked_fill(~changed, 1.0)
    key, value = mean[..., :dim], mean[..., dim + 1 : -1]
    if norms == "separate":
        length = key.norm(dim=-1, keepdim=True)
        first = F.normalize(centers.key.float(), dim=-1)  # opposite directions may cancel (only without the clamp)
        key = torch.where(length > 1e-6, key / length.clamp_min(1e-6), first) * mean[..., dim : dim + 1]
    return Rows(
        torch.where(changed, key, centers.key.float()),
        torch.where(changed, value, centers.value.float()),
        weight[..., 0],
    )


def merge_into(
    centers: Rows, tokens: Rows, similarity: Tensor, tau: float, *, norms: Norms = "separate"
) -> tuple[Rows, Tensor]:
    """Zero-class merge: each token goes to its most similar center, or is evicted below `tau` (see `merge_classes`).

    Args:
        similarity: float ``[..., t, c]``, of `pair_similarity` or of your own making.
        tau: similarity of the zero class; above 1 nothing is merged.

    Returns:
        The centers, and the class of each token (int64 ``[..., t]``, 0: evicted).

    Raises:
        InputError: shapes don't fit, or the similarity is not finite.

    >>> center = Rows(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0]]), torch.tensor([1.0]))
    >>> token = Rows(torch.tensor([[4.0, 0.0]]), torch.tensor([[3.0]]), torch.tensor([1.0]))
    >>> merged, classes = merge_into(center, token, torch.tensor([[0.9]]), tau=0.6)
    >>> merged.key.tolist(), merged.value.tolist(), merged.score.tolist(), classes.tolist()
    ([[3.0, 0.0]], [[2.0]], [2.0], [1])
    """
    if similarity.shape != (*tokens.score.shape, centers.score.shape[-1]):
        raise InputError(
            f"want similarity {[*tokens.score.shape, centers.score.shape[-1]]}, got {list(similarity.shape)}"
        )
    if not bool(torch.isfinite(similarity).all()):
        raise InputError("the similarity is not finite")
    classes = zero_class(similarity, tau)
    return merge_classes(centers, tokens, classes, norms=norms), classes


def tokens_for_mass(ranked: Tensor, mass: float) -> Tensor:
    """How many of the scores ``[..., n]``, highest first, add up to this share of their sum. int64 ``[...]``

    >>> tokens_for_mass(torch.tensor([[5.0, 3.0, 1.0, 1.0], [4.0, 4.0, 1.0, 1.0]]), 0.8).tolist()
    [2, 2]
    """
    reached = ranked.cumsum(-1)
    return ((reached < mass * reached[..., -1:]).sum(-1) + 1).clamp_max(ranked.shape[-1])


class Choice(NamedTuple):
    """Which of a layer's n rows stay, and which of the others go into them: c centers, then the last `window` rows.

    Attributes:
        ids: int64 ``[batch, kv_heads, c + window]``, rows that stay, ascending.
        members: int64 ``[batch, kv_heads, t]``, rows that were candidates for merging.
        classes: int64 ``[batch, kv_heads, t]``, which center took each (from 1), 0 for none.
        candidates: int64 ``[batch, kv_heads]``, how many of `members` count.
        weights: float32 ``[batch, kv_heads, n]``, the scores; 0 for padding and for the window.
    """

    ids: Tensor
    members: Tensor
    classes: Tensor
    candidates: Tensor
    weights: Tensor

    def targets(self) -> Tensor:
        """The row that each member goes into, or -1; int64 ``[batch, kv_heads, t]``."""
        return self.ids.gather(2, (self.classes - 1).clamp_min(0)).masked_fill(self.classes == 0, -1)

    def carry(self, sums: Tensor) -> Tensor:
        """Running sums ``[batch, kv_heads, m, n]`` of what stays: a center takes over what its members had."""
        ids, members = (x.unsqueeze(2).expand(-1, -1, sums.shape[2], -1) for x in (self.ids, self.members))
        kept = sums.gather(3, ids).transpose(2, 3)
        return add_members(kept, sums.gather(3, members).transpose(2, 3), self.classes).transpose(2, 3)


def choose_merges(
    key: Tensor,
    value: Tensor,
    score: Tensor,
    *,
    budget: int,
    window: int,
    gamma: float = 1.0,
    tau: float = 0.6,
    mass: float | None = None,
    clamp: bool = True,
    starts: Tensor | None = None,
    unrotate: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Choice:
    """Sort a layer's rows into kept, to be merged and evicted, and find each candidate's center.

    Args:
        key, value: ``[batch, kv_heads, n, d]`` with ``n > budget``; score: float32 ``[batch, kv_heads, n − window]``.
        gamma: candidates for merging, as a multiple of the centers' number.
        mass: takes the place of `gamma`: a head's candidates reach to this share of its scores, at least to the centers.
        starts: int ``[batch]``, rows of padding in front.
        unrotate: gives keys ``[batch, kv_heads, m, d]`` of the rows ``[batch, kv_heads, m]`` as they are to be compared.

    Raises:
        InputError: shapes don't fit, or the budget leaves no center.
    """
    older = key.shape[2] - window
    count = budget - window
    if value.shape[:3] != key.shape[:3] or score.shape != (*key.shape[:2], older) or not 0 < count < older:
        raise InputError(
            f"want key and value [B,H,n,d], score [B,H,n - window] and window < budget < n, got {list(key.shape)}, "
            f"{list(value.shape)}, {list(score.shape)}, budget {budget} and window {window}"
        )
    real = None
    if starts is not None:  # padding is least important, of no weight, and like nothing
        real = (torch.arange(older, device=key.device) >= starts.to(key.device)[:, None, None]).expand_as(score)
        score = score.masked_fill(~real, -math.inf)
    ranked = score.sort(dim=-1, descending=True, stable=True)
    if mass is None:
        candidates = torch.full_like(ranked.indices[..., 0], min(math.ceil(gamma * count), older - count))
    else:
        candidates = (tokens_for_mass(ranked.values.clamp_min(0.0), mass) - count).clamp_min(0)
    if real is not None:
        candidates = candidates.minimum((real.sum(-1) - count).clamp_min(0))
    most = int(candidates.max())
    centers, members = ranked.indices[..., :count].sort(-1).values, ranked.indices[..., count : count + most]
    classes = torch.zeros_like(members)
    if tau <= 1 and most:
        compared = [_pick(key, at) if unrotate is None else unrotate(_pick(key, at), at) for at in (members, centers)]
        values = [_pick(value, at) for at in (members, centers)]
        for first in range(0, most, _BLOCK):
            part = slice(first, first + _BLOCK)
            alike = pair_similarity(compared[0][:, :, part], values[0][:, :, part], compared[1], values[1], clamp=clamp)
            if real is not None:
                alike.masked_fill_(~real.gather(-1, centers)[:, :, None], -2.0)
            classes[..., part] = zero_class(alike, tau)
        classes.masked_fill_(torch.arange(most, device=key.device) >= candidates[..., None], 0)
    recent = torch.arange(older, key.shape[2], device=key.device).expand(*key.shape[:2], -1)
    weights = F.pad(score.clamp_min(0.0), (0, window))
    return Choice(torch.cat([centers, recent], -1), members, classes, candidates, weights)


def evict_then_merge(
    key: Tensor, value: Tensor, score: Tensor, *, norms: Norms = "separate", **settings: Any
) -> tuple[Choice, Rows]:
    """One compression of a layer: `choose_merges`, whose arguments these are, and the rows that stay, float32.

    (A cache does the second part in place, by `gossamer.ops.merge_rows`.)
    """
    choice = choose_merges(key, value, score, **settings)
    kept, members = (
        Rows(_pick(key, at), _pick(value, at), choice.weights.gather(2, at)) for at in (choice.ids, choice.members)
    )
    return choice, merge_classes(kept, members, choice.classes, norms=norms)


def _pick(rows: Tensor, ids: Tensor) -> Tensor:
    return rows.gather(2, ids[..., None].expand(-1, -1, -1, rows.shape[3]))


def _weighted(rows: Rows, norms: Norms) -> Tensor:
    """What a merge adds up, side by side for one scatter: ``s·k/‖k‖, s·‖k‖, s·v, s``."""
    key = rows.key.float()
    length = key.norm(dim=-1, keepdim=True)
    if norms == "separate":
        key = F.normalize(key, dim=-1)
    return torch.cat([key, length, rows.value.float(), torch.ones_like(length)], -1) * rows.score[..., None]


def _check(centers: Rows, tokens: Rows, classes: Tensor) -> None:
    lead = centers.score.shape[:-1]
    for name, rows in (("centers", centers), ("tokens", tokens)):
        fits = rows.key.shape[:-1] == rows.value.shape[:-1] == rows.score.shape
        if not fits or rows.score.shape[:-1] != lead:
            raise InputError(
                f"{name}: key, value and score must be [..., n, d], [..., n, d] and [..., n], got "
                f"{list(rows.key.shape)}, {list(rows.value.shape)} and {list(rows.score.shape)}"
            )
    same = centers.key.shape[-1] == tokens.key.shape[-1] and centers.value.shape[-1] == tokens.value.shape[-1]
    if not same or classes.shape != tokens.score.shape:
        raise InputError("centers, tokens and classes do not fit each other")
