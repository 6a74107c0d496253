"""Trees of candidate tokens: what is drafted in one go, verified in one forward, and of which one path is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gossamer.errors import InputError

Path = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Tree:
    """A tree whose node 0 is the last token that is certain; the others stand parents first.

    Attributes:
        parents: of each node; -1 for the root.
        ranks: which of its parent's children a node is: the candidate of that rank after the parent's token.

    Raises:
        InputError: the first node is no root, or a parent stands behind its child.

    >>> tree = Tree.of_paths([(0,), (1,), (0, 0)])
    >>> tree.parents, tree.depths, tree.leaves
    ((-1, 0, 0, 1), (0, 1, 1, 2), (2, 3))
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.parents or self.parents[0] != -1 or len(self.ranks) != len(self.parents):
            raise InputError("a tree starts with its root, and every node has a parent and a rank")
        if any(not 0 <= parent < node for node, parent in enumerate(self.parents) if node):
            raise InputError("the nodes of a tree stand behind their parents")

    @classmethod
    def of_paths(cls, paths: Sequence[Path]) -> Tree:
        """From the rank paths of all nodes but the root; ``(r1, r2)`` is candidate r2 after the node ``(r1,)``.

        They are put in order, by depth and then by ranks.

        Raises:
            InputError: a path twice, an empty one, or one whose beginning is missing.
        """
        ordered = sorted(paths, key=lambda path: (len(path), path))
        index: dict[Path, int] = {(): 0}
        for path in ordered:
            if path in index or path[:-1] not in index:
                raise InputError(f"the path {path} is there twice, or its parent is missing")
            index[path] = len(index)
        return cls((-1, *(index[path[:-1]] for path in ordered)), (0, *(path[-1] for path in ordered)))

    @classmethod
    def chain(cls, length: int) -> Tree:
        """The root and `length` nodes, one after another."""
        return cls(tuple(range(-1, length)), (0,) * (length + 1))

    @classmethod
    def of_chains(cls, count: int, length: int) -> Tree:
        """The root and `count` chains of `length` nodes below it, node ``1 + i * count + j`` the i-th of chain j."""
        parents = [-1] + [0 if i == 0 else 1 + (i - 1) * count + j for i in range(length) for j in range(count)]
        ranks = [0] + [j if i == 0 else 0 for i in range(length) for j in range(count)]
        return cls(tuple(parents), tuple(ranks))

    @property
    def size(self) -> int:
        """Nodes, the root included: tokens of the forward that verifies it."""
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Distance of each node from the root."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Of each node, in order."""
        below: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents[1:], 1):
            below[parent].append(node)
        return tuple(map(tuple, below))

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """Nodes without children."""
        return tuple(node for node, below in enumerate(self.children) if not below)

    def path(self, node: int) -> tuple[int, ...]:
        """The nodes from the root to this one, both included."""
        path = [node]
        while self.parents[path[-1]] >= 0:
            path.append(self.parents[path[-1]])
        return tuple(reversed(path))

    @cached_property
    def rank_paths(self) -> tuple[Path, ...]:
        """The rank path of every node; empty for the root."""
        paths: list[Path] = [()]
        for parent, rank in zip(self.parents[1:], self.ranks[1:], strict=True):
            paths.append((*paths[parent], rank))
        return tuple(paths)

    @cached_property
    def mask(self) -> Tensor:
        """Bool ``[size, size]``: whether a node (row) sees another: itself and its ancestors."""
        mask = torch.eye(self.size, dtype=torch.bool)
        for node, parent in enumerate(self.parents[1:], 1):
            mask[node] |= mask[parent]
        return mask

    @cached_property
    def positions(self) -> Tensor:
        """int64 ``[size]``: depths as a tensor."""
        return torch.tensor(self.depths)

    def subtree(self, nodes: int) -> Tree:
        """The first `nodes` nodes below the root, in this order."""
        return Tree(self.parents[: nodes + 1], self.ranks[: nodes + 1])
