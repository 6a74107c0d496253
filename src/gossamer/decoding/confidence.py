"""A tree for each step, grown where candidates are likely, and as large as it pays.

A candidate comes with a guess p of how likely it is behind its parent. Guesses are set right by what became of earlier ones of
their size, a path is as likely as the product of its nodes, and nodes are taken in the order of their paths until the next one
costs more time than the tokens it promises.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from gossamer.decoding.cost import ForwardCost
from gossamer.patterns import Tree

Path = tuple[int, ...]


class Confidence:
    """How often candidates of a guessed chance were right, in bins of the guess; at first the guess is believed.

    >>> confidence = Confidence()
    >>> confidence.chance(0.85)
    0.85
    >>> for _ in range(200):
    ...     confidence.learn(0.85, False)
    >>> confidence.chance(0.85) < 0.1
    True
    """

    BINS, BELIEF, MEMORY = 16, 4.0, 0.99

    def __init__(self) -> None:
        self.right = [0.0] * self.BINS
        self.tried = [0.0] * self.BINS

    def _bin(self, guess: float) -> int:
        return min(self.BINS - 1, int(guess * self.BINS))

    def chance(self, guess: float) -> float:
        """The chance to count with."""
        b = self._bin(guess)
        return (self.right[b] + self.BELIEF * guess) / (self.tried[b] + self.BELIEF)

    def learn(self, guess: float, hit: bool) -> None:
        """What became of a candidate whose parent was right."""
        b = self._bin(guess)
        self.right[b] = self.MEMORY * self.right[b] + hit
        self.tried[b] = self.MEMORY * self.tried[b] + 1


def grow(
    candidates: Callable[[int], Sequence[tuple[int, float]]],
    root: int,
    cost: ForwardCost,
    *,
    depth: int,
    most: int = 31,
    least: int = 0,
) -> tuple[Tree, list[int], list[float]]:
    """The tree that yields most tokens for its time.

    Args:
        candidates: (token, chance) pairs of what may follow a token, likeliest first.
        root: the last certain token.
        cost: of forwards.
        depth, most: of the deepest candidate, and of all candidates.
        least: candidates to take even where they don't pay, to learn from.

    Returns:
        The tree, the tokens of its nodes, and the chance of each behind its parent (1 for the root).

    >>> flat = ForwardCost((1, 64), (1.0, 1.01), 100)
    >>> tree, tokens, _ = grow(lambda t: [(t + 1, 0.9), (t + 2, 0.05)], 5, flat, depth=3, most=4)
    >>> tree.rank_paths, tokens
    (((), (0,), (1,), (0, 0), (0, 0, 0)), [5, 6, 7, 7, 8])
    """
    below: dict[Path, Sequence[tuple[int, float]]] = {(): candidates(root)}
    # Of each node only the best child that was not taken yet is waiting, so that few paths are looked at.
    waiting: list[tuple[float, Path]] = [(-below[()][0][1], (0,))] if below[()] else []
    taken: list[tuple[Path, int, float, float]] = []
    while waiting and len(taken) < most:
        negative, path = heapq.heappop(waiting)
        token, chance = below[path[:-1]][path[-1]]
        taken.append((path, token, chance, -negative))
        siblings = below[path[:-1]]
        if path[-1] + 1 < len(siblings):
            value = -negative / max(chance, 1e-9) * siblings[path[-1] + 1][1]
            heapq.heappush(waiting, (-value, (*path[:-1], path[-1] + 1)))
        if len(path) < depth:
            below[path] = candidates(token)
            if below[path]:
                heapq.heappush(waiting, (negative * below[path][0][1], (*path, 0)))
    total, best, size = 1.0, 1.0 / cost.ratio(1), 0
    for count, (_, _, _, value) in enumerate(taken, 1):
        total += value
        if total / cost.ratio(count + 1) > best:
            best, size = total / cost.ratio(count + 1), count
    kept = sorted(taken[: max(size, min(least, len(taken)))], key=lambda node: (len(node[0]), node[0]))
    tree = Tree.of_paths([path for path, *_ in kept])
    return tree, [root, *(token for _, token, _, _ in kept)], [1.0, *(chance for _, _, chance, _ in kept)]
