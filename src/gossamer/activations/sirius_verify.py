"""Drafting and verifying several tokens at once: the formulas of Sirius, on tensors alone.

A draft is a chain, or a tree of nodes in levels: slot 0 is its root, a token that needs no check, and level l holds W nodes in
slots 1 + (l − 1)W … lW. A node's parent is a slot of the level before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Accept = Literal["likely", "argmax"]


def likelihoods(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """float32 ``[n]``: ``softmax(logits_i / temperature)[tokens_i]`` of logits ``[n, vocabulary]``.

    >>> likelihoods(torch.tensor([[0.0, 0.0]]), torch.tensor([1]), 0.6)
    tensor([0.5000])
    """
    scaled = logits.float() / temperature
    chosen = scaled.gather(-1, tokens[:, None]).squeeze(-1)
    return (chosen - scaled.logsumexp(-1)).exp()


def acceptable(logits: Tensor, tokens: Tensor, accept: Accept, thr: float, temperature: float) -> Tensor:
    """Bool ``[n]``: whether each token may follow, by the full model's logits before it.

    `likely`: its likelihood is at least `thr`; `argmax`: it is the full model's own choice (then greedy decoding is lossless).

    >>> logits = torch.tensor([[1.0, 0.9], [9.0, 0.0]])
    >>> acceptable(logits, torch.tensor([1, 1]), "likely", 0.1, 0.6).tolist()
    [True, False]
    >>> acceptable(logits, torch.tensor([1, 0]), "argmax", 0.1, 0.6).tolist()
    [False, True]
    """
    if accept == "argmax":
        return logits.argmax(-1) == tokens
    return likelihoods(logits, tokens, temperature) >= thr


def leading(accepted: Sequence[bool]) -> int:
    """How many come before the first that is false.

    >>> leading([True, True, False, True])
    2
    """
    return next((i for i, good in enumerate(accepted) if not good), len(accepted))


def grow(
    logits: Tensor,
    scores: Tensor,
    width: int,
    temperature: float,
    skip: Tensor | None = None,
    prune: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The next level of a tree by beam search.

    Args:
        logits: ``[beams, vocabulary]`` of the present level.
        scores: float32 ``[beams]``, log-likelihoods of its paths.
        width: W, nodes of the next level.
        skip: int64 ids that are never proposed (the end tokens).
        prune: a beam whose first proposal is likelier than this proposes nothing else (None: all propose W tokens).

    Returns:
        Of each new node: the beam that it follows, its token (int64 ``[W]`` each) and its score (float32 ``[W]``).

    >>> logits = torch.tensor([[0.0, 3.0, 2.0], [0.0, 0.0, 1.0]])
    >>> beams, tokens, _ = grow(logits, torch.tensor([0.0, -5.0]), 2, 1.0)
    >>> beams.tolist(), tokens.tolist()
    ([0, 0], [1, 2])
    """
    log_probs = (logits.float() / temperature).log_softmax(-1)
    if skip is not None:
        log_probs = log_probs.index_fill(-1, skip, -torch.inf)
    best, tokens = log_probs.topk(width, dim=-1)
    if prune is not None:
        sure = best[:, :1].exp() > prune
        best = torch.cat([best[:, :1], best[:, 1:].masked_fill(sure, -torch.inf)], dim=-1)
    total, place = (scores[:, None] + best).flatten().topk(width)
    return place // width, tokens.flatten()[place], total


def leaf_paths(parents: Sequence[int], width: int) -> list[list[int]]:
    """The slots on the way to each node of the last level, the root first.

    >>> leaf_paths([-1, 0, 0, 2, 1], width=2)
    [[0, 2, 3], [0, 1, 4]]
    """
    paths = []
    for leaf in range(len(parents) - min(width, len(parents)), len(parents)):
        path = [leaf]
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        paths.append(path[::-1])
    return paths


def longest_accepted(paths: Sequence[Sequence[int]], accepted: Sequence[bool]) -> list[int]:
    """The accepted beginning, root included, of the path that has the longest one; the first on ties.

    >>> longest_accepted([[0, 2, 3], [0, 1, 4]], [True, True, False, True, True])
    [0, 1, 4]
    """
    lengths = [1 + leading([accepted[slot] for slot in path[1:]]) for path in paths]
    best = lengths.index(max(lengths))
    return list(paths[best][: lengths[best]])


def effective_density(n_sparse: int, n_full: int, advanced: int, density: float) -> float:
    """Weights read per token kept, of the full model's: ``(n_sparse · density + n_full) / advanced``.

    With complete periods this is ((P − 1) · density + 1) / AAL.

    >>> round(effective_density(15 * 100, 100, 1522, 0.65), 3)
    0.706
    """
    return (n_sparse * density + n_full) / advanced


def model_density(total: int, mlp: int, keep: float, pattern: str, matrices: int = 3) -> float:
    """Share of all weights, embeddings and head included, that a sparse pass reads.

    Args:
        total: weights of the model; mlp: those of them in MLPs.
        keep: ρ. pattern: coarse (all matrices shrink) or fine (the first is computed whole, to choose).
        matrices: of one MLP: 3 with a gate, 2 without.

    >>> total, mlp = 8_030_261_248, 32 * 3 * 4096 * 14336  # Llama 3 8B
    >>> round(model_density(total, mlp, 0.5, "coarse"), 2), round(model_density(total, mlp, 0.5, "fine"), 2)
    (0.65, 0.77)
    """
    shrinking = matrices if pattern == "coarse" else matrices - 1
    return 1 - (1 - keep) * shrinking / matrices * mlp / total


def time_per_token(period: int, aal: float, sparse: float, full: float) -> float:
    """Seconds a token: ``((P − 1) · sparse + full) / AAL`` of one sparse pass and one check of the whole draft.

    >>> time_per_token(16, 12.8, sparse=0.75, full=1.55)
    1.0
    """
    return ((period - 1) * sparse + full) / aal
