"""Acceptance rules for drafts that were drawn, as rules of the engine and as methods of a recipe.

All walk down the draft in the same way: S is the set of nodes whose tokens, from the root on, are the ones chosen so far (equal
siblings all stay in it). At each position a rule chooses a token by the target's law, with the tokens of S's children as its
drafts; S becomes the children with that token, however it came about, and the walk ends when there are none. Behind the last
position one more token is drawn from the target.

That is exact for every rule that chooses exactly: deeper tokens are untouched by the choice, so given it they are still
independent draws of their own laws. Greedy decoding has nothing to correct: the best token is matched.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from gossamer.decoding.base import AcceptanceMethod, Match, Rule, Target, Verdict
from gossamer.decoding.transport import (
    Choice,
    Dice,
    kseq_select,
    maximal_coupling,
    optimal_select,
    recursive_rejection,
    typical_threshold,
)
from gossamer.errors import InputError
from gossamer.registry import register


class DrawnRule(Rule):
    """The walk down a draft that was drawn; subclasses choose a token at a position.

    Args:
        dice: where chance comes from.
    """

    needs_laws = True
    #: Whether the rule knows what to do with siblings that were drawn without replacement.
    takes_distinct = False

    def __init__(self, dice: Dice | None = None) -> None:
        self.dice = dice or Dice()

    def select(self, p: Tensor, q: Tensor, drafts: Sequence[int], distinct: bool) -> Choice:
        """A token by the law q ``[V]``, with drafts drawn from p ``[V]``."""
        raise NotImplementedError

    def decide(self, target: Target) -> Verdict:
        """As `Rule`.

        Raises:
            InputError: a law is missing, or siblings were drawn without replacement and the rule needs independent ones.
        """
        if not target.context.do_sample:
            return Match().decide(target)
        draft = target.draft
        if draft.distinct and not self.takes_distinct:
            raise InputError(
                f"{type(self).__name__} needs drafts that were drawn independently, repetitions among them"
            )
        kept = [0]
        while True:
            below = [child for node in kept for child in draft.tree.children[node]]
            law = target.law(kept[0])
            if not below:
                return Verdict(draft.tree.path(kept[0]), self.dice.draw(law))
            drawn = draft.laws.get(draft.tree.parents[below[0]])
            if drawn is None:
                raise InputError(f"{type(self).__name__} needs the law that each candidate was drawn from")
            token, _ = self.select(drawn, law, [draft.tokens[child] for child in below], draft.distinct)
            following = [child for child in below if draft.tokens[child] == token]
            if not following:
                return Verdict(draft.tree.path(kept[0]), token)
            kept = following


class KSeq(DrawnRule):
    """K-SEQ with the best gamma for as many drafts as are left at a position (see `transport.kseq_select`)."""

    def select(self, p: Tensor, q: Tensor, drafts: Sequence[int], distinct: bool) -> Choice:
        """As `DrawnRule`."""
        return kseq_select(p, q, drafts, self.dice)


class SpeculativeSampling(DrawnRule):
    """Maximal coupling with the first draft; others are followed only where they say the same as what was chosen."""

    def select(self, p: Tensor, q: Tensor, drafts: Sequence[int], distinct: bool) -> Choice:
        """As `DrawnRule`."""
        return maximal_coupling(p, q, drafts[0], self.dice)


class RecursiveRejection(DrawnRule):
    """One draft after another, each for what those before it left of the target's law, with or without replacement."""

    takes_distinct = True

    def select(self, p: Tensor, q: Tensor, drafts: Sequence[int], distinct: bool) -> Choice:
        """As `DrawnRule`."""
        return recursive_rejection(p, q, drafts, self.dice, distinct=distinct)


class LPOptimum(DrawnRule):
    """The coupling that accepts most, where the draft's law has at most 8 tokens."""

    def select(self, p: Tensor, q: Tensor, drafts: Sequence[int], distinct: bool) -> Choice:
        """As `DrawnRule`."""
        return optimal_select(p, q, drafts, self.dice)


class Typical(Rule):
    """Follows tokens that are typical for the target: changes the law of the text.

    Of the accepted paths the longest is taken; of several the likeliest. The token behind it is the target's own.
    """

    lossless = False

    def __init__(self, epsilon: float, delta: float) -> None:
        self.epsilon, self.delta = epsilon, delta

    def decide(self, target: Target) -> Verdict:
        """As `Rule`."""
        if not target.context.do_sample:
            return Match().decide(target)
        draft = target.draft
        best, accepted = (0, 0.0, 0), {0: 0.0}
        for node, below in enumerate(draft.tree.children):
            if node not in accepted or not below:
                continue
            law = target.law(node)
            least = typical_threshold(law, self.epsilon, self.delta)
            for child in below:
                chance = float(law[draft.tokens[child]]) if draft.tokens[child] >= 0 else 0.0
                if chance > least:
                    accepted[child] = accepted[node] + float(law[draft.tokens[child]].log())
                    best = max(best, (draft.tree.depths[child], accepted[child], child))
        return Verdict(draft.tree.path(best[2]), target.choose(best[2]))


@register("k-seq", slot="acceptance", family="decoding", name="K-SEQ", baseline=True)
class KSeqMethod(AcceptanceMethod):
    """Accept one of k independent drafts by SpecTr's sequential rule; lossless, within 1 - 1/e of the optimum.

    >>> KSeqMethod().rule().lossless
    True
    """

    def rule(self) -> Rule:
        """As `AcceptanceMethod`."""
        return KSeq()


@register("speculative-sampling", slot="acceptance", family="decoding", name="Speculative sampling", baseline=True)
class SpeculativeSamplingMethod(AcceptanceMethod):
    """Accept a draft with min(1, q / p), else draw from what q has more (Leviathan et al. 2023); lossless.

    >>> SpeculativeSamplingMethod().rule().lossless
    True
    """

    def rule(self) -> Rule:
        """As `AcceptanceMethod`."""
        return SpeculativeSampling()


@register("recursive-rejection", slot="acceptance", family="decoding", name="Recursive rejection", baseline=True)
class RecursiveRejectionMethod(AcceptanceMethod):
    """Test one draft after another against what is left of the target's law (SpecInfer); lossless.

    Takes drafts that were drawn with or without replacement.

    >>> RecursiveRejectionMethod().rule().lossless
    True
    """

    def rule(self) -> Rule:
        """As `AcceptanceMethod`."""
        return RecursiveRejection()


@register("lp-optimum", slot="acceptance", family="decoding", name="Optimal transport", baseline=True)
class LPOptimumMethod(AcceptanceMethod):
    """Accept as often as any lossless rule can; for drafts whose law has at most 8 tokens (a small vocabulary, or top-k).

    >>> LPOptimumMethod().rule().lossless
    True
    """

    def rule(self) -> Rule:
        """As `AcceptanceMethod`."""
        return LPOptimum()


@register("typical-acceptance", slot="acceptance", family="decoding", name="Typical acceptance", baseline=True)
class TypicalAcceptance(AcceptanceMethod):
    """Accept candidates that the target finds likely enough for its entropy (Medusa); faster, and *not* lossless.

    Greedy decoding matches the best token and stays exact.

    >>> TypicalAcceptance().rule().lossless
    False
    """

    epsilon: float = Field(0.09, gt=0, le=1, description="chance from which a candidate is always typical")
    delta: float = Field(0.3, gt=0, le=1, description="factor on exp(-entropy), the threshold where that is lower")

    def rule(self) -> Rule:
        """As `AcceptanceMethod`."""
        return Typical(self.epsilon, self.delta)
