"""What a drafter proposes, what the target says of it, and the rule that decides between them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.calibration import Calibration
from gossamer.decoding.sizing import Sizer
from gossamer.patterns import Tree
from gossamer.registry import Method


@dataclass(frozen=True, eq=False)
class Draft:
    """Candidates for the tokens that come next.

    Attributes:
        tree: their shape; node 0 is the last certain token, which the target has not read yet.
        tokens: of every node, the root's first. Negative ones stand for inputs of the drafter's own (see `Drafter.embed`) and
            are never accepted.
        laws: for a node, the law float32 ``[V]`` that the tokens of its children were drawn from, independently; rules that
            correct for it ask for it. Empty where candidates were not drawn.
        distinct: whether siblings were drawn without replacement, in their order, instead of independently.
    """

    tree: Tree
    tokens: Sequence[int]
    laws: dict[int, Tensor] = field(default_factory=dict)
    distinct: bool = False


def plain(context: Context) -> Draft:
    """No candidates: the last certain token alone."""
    return Draft(_ROOT, [int(context.ids[-1])])


_ROOT = Tree.chain(0)


@dataclass(frozen=True, eq=False)
class Context:
    """What a drafter may look at before it proposes.

    Attributes:
        ids: int64 ``[n]``, all tokens so far, the last certain one included.
        room: candidates deeper than this would pass the end.
        processors: logits processors of the generation, temperature and top-p among them.
        do_sample: whether tokens are drawn or the best is taken.
        cache: the target's cache, which holds all tokens but the last; what a drafter appends it must take away again.
    """

    ids: Tensor
    room: int
    processors: Any
    do_sample: bool
    cache: Any = None

    def process(self, logits: Tensor, prefix: Tensor | None = None) -> Tensor:
        """Scores ``[V]`` after the generation's processors, for logits ``[V]`` behind `prefix` (default: `ids`)."""
        scores = logits.float()
        if not self.processors:
            return scores
        ids = self.ids if prefix is None else prefix
        processed: Tensor = self.processors(ids[None], scores[None])[0]
        return processed


class Target:
    """The target's word on every node of a draft; laws are made only for nodes that are asked for."""

    def __init__(self, context: Context, draft: Draft, logits: Tensor) -> None:
        self.context, self.draft, self.logits = context, draft, logits
        self._best = logits.argmax(-1).tolist() if not context.processors else None

    def prefix(self, node: int) -> Tensor:
        """All tokens up to a node, int64."""
        below = [self.draft.tokens[i] for i in self.draft.tree.path(node)[1:]]
        return torch.cat([self.context.ids, self.context.ids.new_tensor(below)]) if below else self.context.ids

    def scores(self, node: int) -> Tensor:
        """float32 ``[V]``: processed scores of what follows a node."""
        processors = self.context.processors
        return self.context.process(self.logits[node], self.prefix(node) if processors else None)

    def law(self, node: int) -> Tensor:
        """float32 ``[V]``: the target's law of what follows a node."""
        return self.scores(node).softmax(-1)

    def best(self, node: int) -> int:
        """The greedy choice behind a node; the lowest id where several are equal."""
        return int(self._best[node]) if self._best is not None else int(self.scores(node).argmax())

    def choose(self, node: int) -> int:
        """What plain decoding does behind a node: the best token, or one that is drawn."""
        return int(self.law(node).multinomial(1)) if self.context.do_sample else self.best(node)


@dataclass(frozen=True)
class Verdict:
    """The nodes that are accepted, from the root on and with it, and the token that follows them."""

    path: tuple[int, ...]
    token: int


class Rule:
    """An acceptance rule. Lossless rules leave the law of the text as plain decoding has it."""

    lossless = True
    #: Whether candidates must have been drawn, with their laws.
    needs_laws = False

    def decide(self, target: Target) -> Verdict:
        """Walk down the draft."""
        raise NotImplementedError


class Match(Rule):
    """Decode plainly, and follow the draft as long as it says the same: lossless for every draft, greedy or sampled.

    The token of each visited node is chosen from the target's own law, without looking at the candidates.
    """

    def decide(self, target: Target) -> Verdict:
        """As `Rule`."""
        draft, path = target.draft, [0]
        while True:
            token = target.choose(path[-1])
            child = next((c for c in draft.tree.children[path[-1]] if draft.tokens[c] == token), None)
            if child is None:
                return Verdict(tuple(path), token)
            path.append(child)


class Drafter:
    """Proposes candidates. State that belongs to one text is reset by `begin`.

    Attributes:
        ranks, depth: how many candidates there may be behind a token, and how deep they go, for drafters that fill any tree
            they are given (see `fill`); 0 for those that make a tree of their own.
    """

    ranks = 0
    depth = 0
    #: Whether `observe_prompt` wants the logits of prompts, which must then all be computed.
    watches_prompt = False

    @property
    def sized(self) -> bool:
        """Whether drafts follow what pays here: the engine then asks `plan`, and leaves steps plain where drafts don't pay."""
        return self.ranks > 0

    def watching(self) -> AbstractContextManager[None]:
        """Entered around each generation, its prompt included, for drafters that look into the model (default: nothing)."""
        return nullcontext()

    def begin(self, context: Context) -> None:
        """A new text: its prompt."""

    def fill(self, context: Context, tree: Tree) -> list[int]:
        """Tokens for the nodes of a tree, the root's first; -1 where there is no candidate."""
        raise NotImplementedError

    def propose(self, context: Context, tree: Tree) -> Draft:
        """A draft of this shape (drafters with a shape of their own ignore it)."""
        return Draft(tree, self.fill(context, tree))

    def plan(self, context: Context, sizer: Sizer) -> Draft:
        """The draft that pays best in this step (by default of the tree that does by its ranks)."""
        tree = sizer.by_rank(self.ranks, self.depth)
        return self.propose(context, tree) if tree.size > 1 else plain(context)

    def learn(self, target: Target, verdict: Verdict, sizer: Sizer) -> None:
        """Set chances right by a step's outcome, before `observe` sees it (by default those of its ranks)."""
        sizer.learn(target.draft.tree, target.draft.tokens, verdict.path)

    def observe_prompt(self, ids: Tensor, logits: Tensor) -> None:
        """See a prompt's tokens int64 ``[n]`` (all but its last) and their logits ``[n, V]``, where `watches_prompt` is true."""

    def observe(self, target: Target, verdict: Verdict) -> None:
        """See what the target said, and what was accepted."""

    def embed(self, tokens: Tensor, embeddings: nn.Module) -> Tensor:
        """Input embeddings ``[n, d]`` of a draft's tokens, for drafters that use negative ones."""
        raise NotImplementedError


class DraftingMethod(Method):
    """Base of methods that draft; the slot is `drafting`."""

    comparable = False  # the text is the same; what changes is the time, see `gossamer bench decoding`

    def drafter(self, model: nn.Module, calibration: Calibration | None) -> Drafter:
        """A drafter for this model."""
        raise NotImplementedError

    def rule(self) -> Rule:
        """The acceptance rule that belongs to it, where the recipe names none."""
        return Match()


class AcceptanceMethod(Method):
    """Base of acceptance rules as methods; the slot is `acceptance`."""

    comparable = False

    def rule(self) -> Rule:
        """The rule."""
        raise NotImplementedError

    def rule_for(self, model: nn.Module, calibration: Calibration | None) -> Rule:
        """The rule for this model, of what was learned for it; rules that learn nothing give `rule`."""
        return self.rule()
