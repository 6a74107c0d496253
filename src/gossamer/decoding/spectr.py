"""SpecTr: several independent drafts, checked by optimal transport (Sun et al., NeurIPS 2023, arXiv 2310.15141).

    draft:   K continuations of L tokens, independent, from a small model's law p (after temperature, top-p, …)
    verify:  one forward over the K chains: the target's law q at every node
    accept:  S = all chains; at each position K-SEQ chooses Y ~ q exactly, with the |S| tokens there as drafts and gamma for |S|;
             S <- the chains that say Y; none left: Y ends the block; all L positions passed: one more token from q

Between 1 and L + 1 tokens a forward of the target, whose law is kept exactly.

Decisions where the card leaves room:

* Chains stay in S when their token was the choice, also where it came from the residual (the card's way; exact).
* Equal chains are not merged in the target's forward: it costs rows, and every draft keeps its own node.
* The early exit defaults to the first third of the layers.
* Greedy decoding drafts one chain of best tokens and matches it.
* `distinct` draws the first tokens of the chains without replacement, for the rule `recursive-rejection`; K-SEQ refuses it.
* n-grams are mixed with fixed shares (see `NGrams`); the paper's drafter is a language model.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.calibration import Calibration
from gossamer.decoding.base import Context, Draft, Drafter, DraftingMethod, Rule, Target, Verdict
from gossamer.decoding.engine import Engine
from gossamer.decoding.rules import KSeq
from gossamer.decoding.sources import DraftSource, ModelSource, NGrams, NGramSource, vocabulary_of
from gossamer.decoding.transport import Dice
from gossamer.errors import CalibrationError, InputError, ModelError
from gossamer.hf.views import text_config
from gossamer.models import fingerprint, load
from gossamer.patterns import Tree
from gossamer.registry import register


class SpecTrDrafter(Drafter):
    """Draws K chains of L tokens, each from its own law.

    Args:
        source: says the laws.
        drafts, length: K and L.
        distinct: draw the first tokens without replacement; there are fewer chains where p has fewer tokens.
        dice: where chance comes from.
    """

    def __init__(
        self, source: DraftSource, drafts: int, length: int, *, distinct: bool = False, dice: Dice | None = None
    ) -> None:
        if drafts < 1 or length < 1:
            raise InputError(f"there is at least one draft of at least one token, got {drafts} of {length}")
        self.source, self.drafts, self.length, self.distinct = source, drafts, length, distinct
        self.dice = dice or Dice()
        self.last: Draft | None = None

    def propose(self, context: Context, tree: Tree) -> Draft:
        """K chains, or one of best tokens where decoding is greedy; not longer than there is room for."""
        length = max(1, min(self.length, context.room - 1))
        scores = context.process(self.source.begin(context.ids))
        root = int(context.ids[-1])
        if not context.do_sample:
            self.last = Draft(Tree.chain(length), [root, *self._best(context, scores, length)])
            return self.last
        laws = {0: scores.softmax(-1)}
        rows = [self._first(laws[0])]
        count = len(rows[0])
        for depth in range(1, length):
            logits = self.source.extend(rows[-1])
            known: dict[tuple[int, ...], Tensor] = {}
            row = []
            for chain in range(count):
                path = tuple(above[chain] for above in rows)
                if path not in known:
                    known[path] = self._scores(context, logits[chain], path).softmax(-1)
                laws[1 + (depth - 1) * count + chain] = known[path]
                row.append(self.dice.draw(known[path]))
            rows.append(row)
        tokens = [root, *(token for row in rows for token in row)]
        self.last = Draft(Tree.of_chains(count, length), tokens, laws, self.distinct)
        return self.last

    def _first(self, law: Tensor) -> list[int]:
        if not self.distinct:
            return [self.dice.draw(law) for _ in range(self.drafts)]
        left, tokens = law.clone(), []
        for _ in range(min(self.drafts, int((law > 0).sum()))):
            tokens.append(self.dice.draw(left))
            left[tokens[-1]] = 0
        return tokens

    def _best(self, context: Context, scores: Tensor, length: int) -> list[int]:
        tokens = [int(scores.argmax())]
        while len(tokens) < length:
            tokens.append(int(self._scores(context, self.source.extend(tokens[-1:])[0], tokens).argmax()))
        return tokens

    def _scores(self, context: Context, logits: Tensor, path: Any) -> Tensor:
        prefix = torch.cat([context.ids, context.ids.new_tensor(path)]) if context.processors else None
        return context.process(logits, prefix)

    def observe(self, target: Target, verdict: Verdict) -> None:
        """Let the source keep what became text."""
        if target.draft is self.last:
            nodes = verdict.path[1:]
            self.source.keep([target.draft.tokens[node] for node in nodes], nodes)
        self.last = None


@register("spectr", slot="drafting", family="decoding", needs=["draft-model", "calibration"])
class SpecTr(DraftingMethod):
    """K independent drafts from a small model, accepted by K-SEQ: sampled text keeps its law, with fewer target forwards.

    Use it where text is sampled and a cheap draft of the same vocabulary is at hand; a calibration is needed for n-grams alone.
    A recipe may name another rule (`recursive-rejection`, `lp-optimum`, `speculative-sampling`, …).

    >>> from gossamer.models import tiny_model
    >>> model, prompt = tiny_model("llama"), torch.arange(1, 20)[None]
    >>> engine = Engine(model, SpecTr(drafts=2, length=3, layers=2).drafter(model, None), KSeq())
    >>> model.generate(prompt, max_new_tokens=8, do_sample=True, custom_generate=engine).shape, engine.stats.forwards
    (torch.Size([1, 27]), 2)
    """

    drafts: int = Field(8, ge=1, description="K, continuations that are drawn")
    length: int = Field(4, ge=1, description="L, tokens of each")
    draft: str = Field(
        "early-exit",
        min_length=1,
        description="early-exit (first layers of the model itself), ngram (needs a calibration), or a model to load",
    )
    layers: int | None = Field(None, ge=1, description="layers of the early exit (default: a third)")
    order: int = Field(3, ge=1, le=8, description="tokens of the longest n-gram that is counted")
    distinct: bool = Field(False, description="draw first tokens without replacement; for recursive-rejection only")

    def calibrate(self, model: nn.Module, tokens: Tensor) -> Calibration:
        """Count n-grams in token blocks ``[count, block]``, for ``draft="ngram"``."""
        grams = NGrams.count(tokens, self.order, vocabulary_of(model))
        tensors = {f"grams.{length}": table for length, table in enumerate(grams.tables, 1)}
        whole: Any = model
        return Calibration(self.slug, fingerprint(whole), tensors, {"order": self.order, "tokens": tokens.numel()})

    def source(self, model: nn.Module, calibration: Calibration | None) -> DraftSource:
        """What is drafted from.

        Raises:
            CalibrationError: n-grams without counts, or with those of another model.
            InputError: not so many layers.
            ModelError: a model that cannot be loaded or shared.
        """
        if self.draft == "early-exit":
            return ModelSource(model, self.layers or max(1, int(text_config(model).num_hidden_layers) // 3))
        if self.draft != "ngram":
            return ModelSource(load(self.draft).model.to(next(model.parameters()).device))
        calibration, whole = self.require(calibration), model
        named: Any = whole
        calibration.check(fingerprint(named))
        tables = [calibration.tensors.get(f"grams.{length}") for length in range(1, self.order + 1)]
        found = [table for table in tables if table is not None]
        if len(found) < self.order:
            raise CalibrationError(f"{self.slug}: this calibration counts no {len(found) + 1}-grams: calibrate again")
        return NGramSource(NGrams(found, vocabulary_of(model)))

    def drafter(self, model: nn.Module, calibration: Calibration | None) -> Drafter:
        """As `DraftingMethod`.

        Raises:
            ModelError: draft and target have different vocabularies.
        """
        return drafter_for(model, self.source(model, calibration), self.drafts, self.length, self.distinct)

    def rule(self) -> Rule:
        """K-SEQ."""
        return KSeq()


def drafter_for(
    model: nn.Module, source: DraftSource, drafts: int, length: int, distinct: bool = False
) -> SpecTrDrafter:
    """A drafter for a target, from any source.

    Raises:
        ModelError: draft and target have different vocabularies.
    """
    if source.vocabulary != vocabulary_of(model):
        raise ModelError(
            f"the draft knows {source.vocabulary} tokens, the target {vocabulary_of(model)}: they must be the same"
        )
    return SpecTrDrafter(source, drafts, length, distinct=distinct)


def spectr_generate(
    target: nn.Module,
    draft: nn.Module | DraftSource,
    ids: Tensor,
    *,
    drafts: int = 8,
    length: int = 8,
    rule: Rule | None = None,
    **settings: Any,
) -> Tensor:
    """Sample from `target` with drafts of a model object or source; returns all ids ``[1, n]``.

    Args:
        rule: default K-SEQ.
        settings: of `generate` (default: ``do_sample=True``).
    """
    source = draft if isinstance(draft, DraftSource) else ModelSource(draft)
    engine = Engine(target, drafter_for(target, source, drafts, length), rule or KSeq())
    made: Tensor = engine.generate(ids, **{"do_sample": True, **settings})
    return made
