"""Drafting from the text itself: baselines that need no model and no training."""

from __future__ import annotations

from pydantic import Field
from torch import nn

from gossamer.calibration import Calibration
from gossamer.decoding.base import Context, Draft, Drafter, DraftingMethod, Target, Verdict
from gossamer.decoding.sizing import Candidates, Sizer
from gossamer.patterns import Tree
from gossamer.patterns.trees import Path
from gossamer.registry import register


class LookupDrafter(Drafter):
    """Continues as the text did behind the last places where its last tokens stood before.

    The candidate of rank r at depth 1 begins the r-th latest such place; deeper ones follow it. Longer matches come first. How
    likely a continuation is, is counted by the length of its match and its rank; every token of the text teaches that.
    """

    def __init__(self, longest: int, shortest: int, depth: int, ranks: int) -> None:
        self.longest, self.shortest, self.depth, self.ranks = longest, shortest, depth, ranks
        self.text: list[int] = []
        self.places: dict[tuple[int, ...], list[int]] = {}

    def begin(self, context: Context) -> None:
        """Index the prompt."""
        self.text, self.places = [], {}
        self._extend(context.ids.tolist())

    def _extend(self, tokens: list[int]) -> None:
        for token in tokens:
            self.text.append(token)
            end = len(self.text)
            for size in range(self.shortest, self.longest + 1):
                if end >= size:
                    self.places.setdefault(tuple(self.text[end - size :]), []).append(end)

    def matches(self) -> list[tuple[int, list[int]]]:
        """What followed the last tokens before, with the length of the match: distinct first tokens, the best match first."""
        found: dict[int, tuple[int, list[int]]] = {}
        end = len(self.text)
        for size in range(min(self.longest, end), self.shortest - 1, -1):
            for place in reversed(self.places.get(tuple(self.text[end - size :]), ())):
                if place < end and self.text[place] not in found:
                    found[self.text[place]] = size, self.text[place : place + self.depth]
                    if len(found) == self.ranks:
                        return list(found.values())
        return list(found.values())

    def fill(self, context: Context, tree: Tree) -> list[int]:
        """As `Drafter.fill`."""
        self._extend(context.ids[len(self.text) :].tolist())
        runs = [run for _, run in self.matches()]
        tokens = [self.text[-1]]
        for path in tree.rank_paths[1:]:
            run = runs[path[0]] if path[0] < len(runs) else []
            tokens.append(run[len(path) - 1] if len(path) <= len(run) and not any(path[1:]) else -1)
        return tokens

    def candidates(self, context: Context, sizer: Sizer) -> Candidates:
        """The continuations, each token with its chance."""
        self._extend(context.ids[len(self.text) :].tolist())
        matches = self.matches()
        chances = [
            [sizer.confidence.chance(_kind(size, rank, i), 0.5 if i else 0.2) for i in range(len(run))]
            for rank, (size, run) in enumerate(matches)
        ]
        first = sorted(((run[0], chances[rank][0]) for rank, (_, run) in enumerate(matches)), key=lambda pair: -pair[1])

        def behind(path: Path) -> list[tuple[int, float]]:
            if not path:
                return first
            at = len(path)
            for (_, run), known in zip(matches, chances, strict=True):
                if tuple(run[:at]) == path and at < len(run):
                    return [(run[at], known[at])]
            return []

        return behind

    def plan(self, context: Context, sizer: Sizer) -> Draft:
        """As `Drafter`: as much of the continuations as pays."""
        growth = sizer.grow(self.candidates(context, sizer), min(self.depth, context.room - 1))
        return Draft(growth.tree, [self.text[-1], *growth.labels])

    def learn(self, target: Target, verdict: Verdict, sizer: Sizer) -> None:
        """Whether the text went on as the continuations, drafted or not."""
        self._extend(target.context.ids[len(self.text) :].tolist())
        truth = [*(target.draft.tokens[node] for node in verdict.path[1:]), verdict.token]
        for rank, (size, run) in enumerate(self.matches()):
            for i, (token, right) in enumerate(zip(run, truth, strict=False)):
                sizer.confidence.learn(_kind(size, rank, i), token == right)
                if token != right:
                    break


def _kind(size: int, rank: int, depth: int) -> tuple[int, int, int]:
    """The class that a token of a continuation counts in."""
    return size, rank, min(depth, 4)


@register("prompt-lookup", slot="drafting", family="decoding", name="Prompt lookup", baseline=True)
class PromptLookup(DraftingMethod):
    """Draft what followed the last tokens where they stood before in the text; lossless, no model, no training.

    A baseline. Good where answers copy from the prompt (summaries, edits, code); nothing is drafted where nothing repeats. A
    lookup takes microseconds.

    >>> PromptLookup(longest=3).settings()
    {}
    """

    longest: int = Field(3, ge=1, description="tokens of the longest match that is looked for")
    shortest: int = Field(1, ge=1, description="tokens of the shortest")
    depth: int = Field(10, ge=1, description="tokens of a candidate continuation")
    ranks: int = Field(2, ge=1, description="continuations, each beginning with another token")

    def drafter(self, model: nn.Module, calibration: Calibration | None) -> Drafter:
        """As `DraftingMethod`."""
        return LookupDrafter(self.longest, self.shortest, self.depth, self.ranks)
