"""Which candidates PPD verifies, how many prompt tokens each of them carries, and how large the whole is on this machine.

Pure functions of the accuracies ``acc[i][r]``, the chance that the token i + 2 ahead is the rank-r guess of prompt token i + 1
(which the token 1 ahead, the model's own, stands before). A state is the number of prompt tokens on the node that was accepted,
and with it the depth of the next step's tree.

    value(path) = Π acc[i][path[i]]          f(T) = Σ values = accepted candidates on average
    v(c) = value(c) - Σ value(kept children of c) = Pr(the accepted path ends at c)

Paper: Hardware-Aware Parallel Prompt Decoding, Findings of EMNLP 2025. Decisions where the card leaves room:

* Candidates that were never right are not kept, so a tree may have fewer nodes than it is allowed.
* State 1 has 10 candidates where all of them can carry m prompt tokens; in a smaller total their number is searched as well.
* Of more than `GRID` sizes of a tree that could be tried, `GRID` are, evenly spread.
* A chain that falls apart into several closed parts is followed from state m, where decoding starts.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gossamer.decoding.cost import ForwardCost
from gossamer.errors import InputError
from gossamer.patterns import Tree
from gossamer.patterns.trees import Path

Accuracies = Sequence[Sequence[float]]
Matrix = NDArray[np.float64]
#: Most candidates of state 1, and most sizes of one tree that are tried.
FIRST, GRID = 10, 16
#: Totals of candidates and prompt tokens that are tried for a machine.
TOTALS = (2, 4, 8, 12, 16, 24, 32, 48, 64, 92)


def check_accuracies(acc: Accuracies) -> None:
    """Refuse what is no table of chances.

    Raises:
        InputError: no rows, rows of different lengths, numbers below zero or not finite, or a row that sums to more than one.
    """
    if not acc or not acc[0] or len({len(row) for row in acc}) != 1:
        raise InputError("accuracies want one row a prompt token, all with the same number of ranks")
    if not all(math.isfinite(a) and a >= 0 for row in acc for a in row) or any(sum(row) > 1 + 1e-6 for row in acc):
        raise InputError("accuracies are chances: finite, not negative, at most one together for a prompt token")


def ranked_paths(acc: Accuracies, depth: int, size: int) -> dict[Path, float]:
    """The `size` likeliest rank paths up to this depth with their values, the likeliest first; fewer if the others have no value.

    Parents stand before their children. Of equal values the shorter path, then the lower ranks come first.

    >>> ranked_paths([[0.6, 0.3], [0.5, 0.1]], 2, 3)
    {(0,): 0.6, (1,): 0.3, (0, 0): 0.3}
    """
    chosen: dict[Path, float] = {}
    heap: list[tuple[float, int, Path]] = [(-a, 1, (r,)) for r, a in enumerate(acc[0]) if a > 0] if depth else []
    heapq.heapify(heap)
    while heap and len(chosen) < size:
        negative, length, path = heapq.heappop(heap)
        chosen[path] = -negative
        if length < depth:
            for rank, a in enumerate(acc[length]):
                if a > 0:
                    heapq.heappush(heap, (negative * a, length + 1, (*path, rank)))
    return chosen


def end_chances(values: Mapping[Path, float]) -> dict[Path, float]:
    """v of every node: the chance that the accepted path ends there.

    >>> {path: round(v, 2) for path, v in end_chances({(0,): 0.6, (1,): 0.3, (0, 0): 0.3}).items()}
    {(0,): 0.3, (1,): 0.3, (0, 0): 0.3}
    """
    ends = dict(values)
    for path, value in values.items():
        if len(path) > 1:
            ends[path[:-1]] -= value
    return {path: max(0.0, end) for path, end in ends.items()}


def allocate(values: Mapping[Path, float], gains: Sequence[float], size: int) -> dict[Path, int]:
    """Prompt tokens of each node: all m, less those whose loss costs least until nodes and prompt tokens are `size`.

    Args:
        values: of the tree's nodes.
        gains: f of the trees of the states 0 (no tree), 1, …, m.
        size: most nodes and prompt tokens together; the root and its m come on top.

    Raises:
        InputError: so small that not every node could keep one prompt token.

    >>> allocate({(0,): 0.6, (1,): 0.1}, [0, 0.5, 0.8], 5)
    {(0,): 2, (1,): 1}
    """
    m, ends = len(gains) - 1, end_chances(values)
    if 2 * len(values) > size:
        raise InputError(f"{len(values)} candidates with a prompt token each do not fit into {size}")
    prompts = dict.fromkeys(values, m)
    order = {path: i for i, path in enumerate(sorted(values, key=lambda p: (len(p), p)))}

    def loss(path: Path) -> tuple[float, int, Path]:
        g = prompts[path]
        return ends[path] * (gains[g] - gains[g - 1]), order[path], path

    heap = [loss(path) for path in values] if m > 1 else []
    heapq.heapify(heap)
    for _ in range(len(values) * (m + 1) - size):
        *_, path = heapq.heappop(heap)
        prompts[path] -= 1
        if prompts[path] > 1:
            heapq.heappush(heap, loss(path))
    return prompts


def transitions(ends: Sequence[Mapping[Path, float]], prompts: Sequence[Mapping[Path, int]], official: bool) -> Matrix:
    """Chances float64 ``[states, states]`` to go from a state to another.

    Args:
        ends, prompts: for the states 1 to m, the end chance and the prompt tokens of each node.
        official: whether a miss leads to an extra first state, which yields nothing and goes on to m, as in the released
            solver. By default it leads to m at once, since the root always carries m.
    """
    m, extra = len(ends), int(official)
    chain = np.zeros((m + extra, m + extra))
    for state, (end, prompt) in enumerate(zip(ends, prompts, strict=True), extra):
        for path, chance in end.items():
            chain[state, prompt[path] - 1 + extra] += chance
        chain[state, 0 if official else m - 1] += max(0.0, 1 - chain[state].sum())
    if official:
        chain[0, m] = 1
    chances: Matrix = chain / chain.sum(1, keepdims=True)
    return chances


def stationary(chain: Matrix) -> Matrix:
    """The law pi = pi · chain, float64 ``[states]``, that the chain ``[states, states]`` comes to from its last state.

    >>> stationary(np.array([[0.5, 0.5], [0.25, 0.75]])).round(6).tolist()
    [0.333333, 0.666667]
    """
    lazy = (chain + np.eye(len(chain))) / 2  # the same law, and it never swings
    for _ in range(50):
        lazy = lazy @ lazy
        lazy /= lazy.sum(1, keepdims=True)
    law: Matrix = lazy[-1]
    return law


@dataclass(frozen=True)
class DynamicTree:
    """The trees of all states.

    Attributes:
        prompts: for the states 1 to m, the prompt tokens of each candidate by its rank path.
        accepted: candidates that a step accepts on average in the long run (R).
        law: share of the steps in each state 1 to m.
    """

    prompts: tuple[dict[Path, int], ...]
    accepted: float
    law: tuple[float, ...]

    @property
    def m(self) -> int:
        """Prompt tokens of the root."""
        return len(self.prompts)

    @property
    def tokens(self) -> float:
        """Tokens that a step yields on average (tau)."""
        return 1 + self.accepted

    @property
    def size(self) -> int:
        """Candidates and prompt tokens of the largest of the trees."""
        return max(sum(1 + g for g in nodes.values()) for nodes in self.prompts)

    def shape(self, state: int, room: int | None = None) -> Tree:
        """The tree of a step in this state (0: the root and its prompt tokens only).

        Prompt token j of a node is the path of the node and ``-1, …, -j``.

        Args:
            room: tokens that may still come; what could not be used any more is left out.

        >>> DynamicTree(({(0,): 1},), 0.5, (1.0,)).shape(1).rank_paths
        ((), (-1,), (0,), (0, -1))
        """
        nodes = self.prompts[state - 1] if state else {}
        limit = room if room is not None else 2 * self.m + 2
        paths: list[Path] = [path for path in nodes if len(path) < limit]
        for path, count in ((), self.m), *((p, nodes[p]) for p in list(paths)):
            chain = min(count, limit - len(path) - 2)  # a step follows that yields one token by itself
            paths += [(*path, *range(-1, -j - 1, -1)) for j in range(1, chain + 1)]
        return Tree.of_paths(paths)


def evaluate(
    values: Sequence[Mapping[Path, float]], prompts: Sequence[Mapping[Path, int]], official: bool = False
) -> DynamicTree:
    """What trees with these values and prompt tokens yield in the long run."""
    pi = stationary(transitions([end_chances(v) for v in values], prompts, official))[int(official) :]
    accepted = sum(float(p) * sum(v.values()) for p, v in zip(pi, values, strict=True))
    return DynamicTree(tuple(map(dict, prompts)), accepted, tuple(map(float, pi)))


def build_dynamic_tree(acc: Accuracies, size: int, official: bool = False) -> DynamicTree:
    """The trees with most accepted candidates of those with at most `size` candidates and prompt tokens.

    Args:
        acc: float ``[m][K]``.
        size: total S; the root and its m prompt tokens come on top.
        official: see `transitions`.

    Raises:
        InputError: no table of chances, or a size below 2.

    >>> tree = build_dynamic_tree([[0.4, 0.2], [0.3, 0.1]], 6)
    >>> tree.size, round(tree.tokens, 3)
    (6, 1.675)
    """
    check_accuracies(acc)
    if size < 2:
        raise InputError(f"a tree has room for a candidate and its prompt token: size is at least 2, got {size}")
    m, half = len(acc), size // 2
    longest = [list(ranked_paths(acc, k, half).items()) for k in range(1, m + 1)]
    least = -(-size // (m + 1))
    counts = [_spread(min(least, FIRST), min(half, FIRST))] + [_spread(least, half)] * (m - 1)
    best: DynamicTree | None = None
    tried = set()
    for sizes in itertools.product(*counts):
        actual = tuple(min(s, len(paths)) for s, paths in zip(sizes, longest, strict=True))
        if actual in tried:
            continue
        tried.add(actual)
        values = [dict(paths[:s]) for s, paths in zip(actual, longest, strict=True)]
        gains = [0.0, *(sum(v.values()) for v in values)]
        found = evaluate(values, [allocate(v, gains, size) for v in values], official)
        if best is None or found.accepted > best.accepted:
            best = found
    assert best is not None
    return best


def equal_tree(acc: Accuracies, size: int) -> DynamicTree:
    """The paper's ablation: every candidate carries all m prompt tokens, so every step has the tree of state m.

    >>> equal_tree([[0.4, 0.2], [0.3, 0.1]], 6).prompts[1]
    {(0,): 2, (1,): 2}
    """
    check_accuracies(acc)
    m = len(acc)
    values = [ranked_paths(acc, k, size // (m + 1)) for k in range(1, m + 1)]
    return evaluate(values, [dict.fromkeys(v, m) for v in values])


def choose_size(trees: Mapping[int, DynamicTree], cost: ForwardCost) -> int:
    """The total S whose tree yields most tokens for its time, tau(S) / L_fp(S); 0 where plain decoding does.

    >>> cheap = ForwardCost((1, 16), (1.0, 1.1), 100)
    >>> trees = {s: build_dynamic_tree([[0.4, 0.2], [0.3, 0.1]], s) for s in (4, 8)}
    >>> choose_size(trees, cheap), choose_size(trees, ForwardCost((1, 16), (1.0, 16.0), 100))
    (8, 0)
    """
    of_tokens = {1 + tree.m + size: size for size, tree in trees.items()}
    best = cost.best_size([(1, 1.0), *((n, trees[size].tokens) for n, size in of_tokens.items())])
    return of_tokens.get(best, 0)


def _spread(low: int, high: int) -> list[int]:
    """Up to `GRID` whole numbers from low to high, both included."""
    high = max(low, high)
    return sorted({round(float(x)) for x in np.linspace(low, high, min(GRID, high - low + 1))})
