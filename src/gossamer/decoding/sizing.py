"""How large a draft pays: a tree for each step, grown where candidates are likely, weighed by what steps cost here.

A candidate comes with the chance that it is right behind its parent, and a path is as likely as the product of its nodes. Nodes
are taken in the order of their paths; of the trees on the way the best is the one with most

    expected tokens  -  rate · cost          rate: tokens that decoding yields at present in the time of a plain step

for time that a step takes is lost for others. Where no tree is better than a plain step, the step is plain.

Chances are counted (`Confidence`), costs are those of forwards (`ForwardCost`) times what whole steps turned out to cost. Where
fewer candidates come than were promised in this text, promises count for less; and where drafts still took more time than they
gave, they are left out for a while, longer each time.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import median

from gossamer.decoding.cost import ForwardCost
from gossamer.patterns import Tree
from gossamer.patterns.trees import Path

#: (label, chance) pairs of what may follow a path of labels, likeliest first; a label is a token, or a rank.
Candidates = Callable[[Path], Sequence[tuple[int, float]]]


class Confidence:
    """How often candidates of a kind were right; at first a guess is believed.

    >>> confidence = Confidence()
    >>> confidence.chance("new", 0.85)
    0.85
    >>> for _ in range(200):
    ...     confidence.learn("new", False)
    >>> confidence.chance("new", 0.85) < 0.1
    True
    """

    #: Observations that the guess counts for, and weight of what is remembered against a new one.
    BELIEF, MEMORY = 4.0, 0.98

    def __init__(self) -> None:
        self.seen: dict[Hashable, tuple[float, float]] = {}

    def chance(self, kind: Hashable, guess: float) -> float:
        """The chance to count with."""
        right, tried = self.seen.get(kind, (0.0, 0.0))
        return (right + self.BELIEF * guess) / (tried + self.BELIEF)

    def learn(self, kind: Hashable, hit: bool) -> None:
        """What became of a candidate whose parent was right."""
        right, tried = self.seen.get(kind, (0.0, 0.0))
        self.seen[kind] = self.MEMORY * right + hit, self.MEMORY * tried + 1


@dataclass(frozen=True, eq=False)
class Growth:
    """A tree with the label of each node below the root, and the tokens that it promises."""

    tree: Tree
    labels: list[int]
    expected: float


def grow(
    candidates: Candidates,
    cost: Callable[[int], float],
    *,
    depth: int,
    rate: float = 1.0,
    margin: float = 0.0,
    trust: float = 1.0,
    most: int = 31,
    least: int = 0,
) -> Growth:
    """The tree that is best for its time.

    Nodes stand as a walk down the likeliest branch first meets them, so that an accepted path is most often the first rows.

    Args:
        candidates: what may follow a path.
        cost: of a step with so many nodes, the root included, over a plain one.
        depth, most: of the deepest candidate, and of all candidates.
        rate: tokens that the time of a plain step is worth.
        margin: tokens by which a draft must be better than none.
        trust: share of the promised candidates that is believed to come.
        least: candidates to take even where they don't pay, to learn from.

    >>> growth = grow(lambda path: [(7, 0.9), (8, 0.05)], lambda nodes: 1 + 0.01 * nodes, depth=3, most=4)
    >>> growth.tree.rank_paths, growth.labels, round(growth.expected, 3)
    (((), (0,), (0, 0), (0, 0, 0), (1,)), [7, 7, 7, 8], 3.489)
    """
    below: dict[Path, Sequence[tuple[int, float]]] = {(): candidates(())}
    # Of each node only the best child that was not taken yet is waiting: (-value, ranks, labels), so that few are looked at.
    waiting: list[tuple[float, Path, Path]] = []

    def wait(value: float, ranks: Path, labels: Path) -> None:
        siblings = below[ranks[:-1]]
        if ranks[-1] < len(siblings):
            label, chance = siblings[ranks[-1]]
            heapq.heappush(waiting, (-value * chance, ranks, (*labels, label)))

    taken: list[tuple[Path, int]] = []
    values: dict[Path, float] = {(): 1.0}
    total, size, expected = 1.0, 0, 1.0
    best = 1.0 - rate + margin
    wait(1.0, (0,), ())
    while waiting and len(taken) < most:
        negative, ranks, labels = heapq.heappop(waiting)
        if -negative < FAINT and len(taken) >= least:
            break
        values[ranks] = -negative
        taken.append((ranks, labels[-1]))
        total -= negative
        won = 1.0 + trust * (total - 1.0) - rate * cost(len(taken) + 1)
        if won > best or len(taken) <= least:
            best, size, expected = max(won, best), len(taken), total
        wait(values[ranks[:-1]], (*ranks[:-1], ranks[-1] + 1), labels[:-1])
        if len(ranks) < depth:
            below[ranks] = candidates(labels)
            wait(-negative, (*ranks, 0), labels)
    kept = sorted(taken[:size])
    place: dict[Path, int] = {(): 0, **{ranks: node for node, (ranks, _) in enumerate(kept, 1)}}
    tree = Tree((-1, *(place[ranks[:-1]] for ranks, _ in kept)), (0, *(ranks[-1] for ranks, _ in kept)))
    return Growth(tree, [label for _, label in kept], expected)


#: Paths that are less likely than this are not looked at.
FAINT = 0.02


class Sizer:
    """Sizes the drafts of one engine, step by step.

    Args:
        cost: of forwards.

    Attributes:
        confidence: chances of candidates; drafters with kinds of their own use it too.

    A step asks `rests` first, then `grow` or `by_rank`; afterwards `record` sees what came of it.
    """

    #: Tokens that a draft must promise beyond its cost; weight of an old step against a new one.
    MARGIN, MEMORY = 0.06, 0.95
    #: Steps whose times are remembered.
    LATELY = 15
    #: Candidates that are believed to have come before any did, and weight of an old draft against a new one.
    BELIEF, FADE = 2.0, 0.9
    #: Drafts after which they are judged; steps of the first and of the longest rest.
    JUDGED, REST, LONGEST = 12, 32, 512
    EVERY = 8  # steps between two choices of a tree by ranks

    def __init__(self, cost: ForwardCost) -> None:
        self.cost = cost
        self.confidence = Confidence()
        self.rate = self.surcharge = 1.0
        self._tokens = self._spent = 1.0  # of all steps
        #: Of the last plain steps and drafted ones, seconds over what their forward should cost.
        self._seconds: dict[bool, deque[float]] = {kind: deque(maxlen=self.LATELY) for kind in (False, True)}
        self._drafts, self._won, self._paid = 0, 0.0, 0.0
        self._promised = 0.0
        self.begin()
        self._idle, self._probe = 0, 4
        self._steps, self._by_rank = 0, Tree.chain(0)

    def begin(self) -> None:
        """A new text may be of another kind: what drafts paid is judged anew."""
        self._resting, self._rest = 0, self.REST
        self._drafts, self._won, self._paid = 0, 0.0, 0.0
        self._came, self._expected = self.BELIEF, self.BELIEF

    @property
    def trust(self) -> float:
        """Candidates that came over those that were promised, of late and in this text; at most 1."""
        return min(1.0, self._came / self._expected)

    def rests(self) -> bool:
        """Whether this step is to be plain because drafts did not pay of late."""
        if self._resting:
            self._resting -= 1
            return True
        return False

    def step_cost(self, nodes: int) -> float:
        """Of a step with so many nodes over a plain one."""
        return self.cost.ratio(nodes) * self.surcharge if nodes > 1 else 1.0

    def grow(self, candidates: Candidates, depth: int, *, least: int = 0) -> Growth:
        """The tree of this step, of one node where none pays."""
        growth = grow(
            candidates,
            self.step_cost,
            depth=depth,
            rate=self.rate,
            margin=self.MARGIN,
            trust=self.trust,
            least=least,
        )
        self._promised = growth.expected - 1
        return growth

    def by_rank(self, ranks: int, depth: int) -> Tree:
        """The tree of this step for a drafter that can fill any, by how often the candidate of each depth and rank was right.

        Nothing is learned of what was never drafted: where no tree pays, two candidates are drafted all the same now and then.
        """
        self._steps += 1
        self._idle += self._by_rank.size == 1
        least = 2 if self._by_rank.size == 1 and self._idle >= self._probe else 0
        if least:
            self._idle, self._probe = 0, min(64, 2 * self._probe)
        elif self._by_rank.size > 1:
            self._probe = 4
        if least or self._steps % self.EVERY == 1:
            growth = self.grow(lambda path: self._ranked(len(path), ranks), depth, least=least)
            tree = Tree(growth.tree.parents, (0, *growth.labels))
            if least:
                return tree
            self._by_rank = tree
        return self._by_rank

    def _ranked(self, depth: int, ranks: int) -> list[tuple[int, float]]:
        # Before anything was seen: the first candidate is right in two of five cases, the others share a tenth.
        guesses = [0.4] + [0.1 / (rank + 1) for rank in range(1, ranks)]
        pairs = [(rank, self.confidence.chance((depth, rank), guess)) for rank, guess in enumerate(guesses)]
        return sorted(pairs, key=lambda pair: -pair[1])

    def learn(self, tree: Tree, tokens: Sequence[int], path: Sequence[int]) -> None:
        """Which candidates were right by their ranks: those on the accepted path, of all that stood beside them."""
        accepted = set(path)
        for node in path:
            for child in tree.children[node]:
                hit = child in accepted and tokens[child] >= 0
                self.confidence.learn((tree.depths[node], tree.ranks[child]), hit)

    def record(self, nodes: int, tokens: int, seconds: float) -> None:
        """What a step carried and yielded, and how long all of it took, drafting included."""
        drafted, old = nodes > 1, self.MEMORY
        self._seconds[drafted].append(seconds / self.cost.ratio(nodes))
        plain = median(self._seconds[False] or self.cost.seconds[:1])
        if drafted and self._seconds[False]:
            self.surcharge = min(2.0, max(0.8, median(self._seconds[True]) / plain))
        self._tokens = old * self._tokens + (1 - old) * tokens
        self._spent = old * self._spent + (1 - old) * self.step_cost(nodes)
        self.rate = max(1.0, self._tokens / self._spent)
        if not drafted:
            return
        self._came = self.FADE * self._came + (1 - self.FADE) * self.BELIEF + tokens - 1
        self._expected = self.FADE * self._expected + (1 - self.FADE) * self.BELIEF + self._promised
        self._promised = 0.0
        self._drafts += 1
        self._won = old * self._won + tokens
        self._paid = old * self._paid + min(seconds / plain, 1.5 * self.step_cost(nodes))  # a step may be disturbed
        if self._drafts < self.JUDGED:
            return
        if self._won < self._paid:
            self._resting, self._rest = self._rest, min(self.LONGEST, 2 * self._rest)
            self._drafts, self._won, self._paid = 0, 0.0, 0.0
        elif self._drafts >= 4 * self.JUDGED:
            self._rest = self.REST
