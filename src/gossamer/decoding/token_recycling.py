"""Token Recycling: the rankings that plain decoding throws away are the next drafts (Luo et al., ACL 2025, arXiv 2408.08696).

    M[token] = the k likeliest successors that the model named last time it read that token          [V, k]
    draft:   tree[root] = last token,  tree[i] = M[tree[parent(i)], rank(i)]    breadth first, a fixed tree of ranks
    verify:  one forward over the tree;  keep the path that the model itself would have written
    update:  M[tree[i]] = topk(logits[i], k)   for every node, accepted or not

The table costs V · k ids, needs no training, and lives on from text to text: it is warm after the first prompts.

Decisions where the card leaves room:

* Of several nodes with one token the last in breadth-first order writes the row.
* Rows that were never written hold id 0 in the paper's template (`template="2.2.2"`), as released. With `template="auto"` they
  propose nothing, and the tree is made anew in each step (`sizing`). How likely a successor is, is counted by the probability
  that it had among its row when that was written and by how often in a row the row's first one was right; every token of the text
  teaches that, drafted or not.
* A row knows one token of context, which is little where an answer copies. With `template="auto"` what followed the last tokens
  where they stood before in the text is therefore drafted too (prompt lookup, no part of the paper); `lookup=False` leaves the
  table alone.
* Prompts do not write the table (as released); `update_from_prefill` lets them, at the price of all their logits.
* Sampling draws each visited node's token from the model's own law (the engine's rule `Match`), which is exact; the released
  code always takes the best token.
* Rows are updated when a text ends too; the released loop leaves before its last update.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer import ops
from gossamer.calibration import Calibration
from gossamer.decoding.base import Context, Draft, Drafter, DraftingMethod, Target, Verdict
from gossamer.decoding.lookup import LookupDrafter
from gossamer.decoding.sizing import Sizer
from gossamer.errors import CalibrationError, InputError, ModelError
from gossamer.models import fingerprint
from gossamer.patterns import Tree
from gossamer.patterns.trees import Path
from gossamer.registry import register

# The released tree, as the number of children of each node that has any; children take the ranks from 0 on.
_CHILDREN: dict[str, int] = {
    "": 8,
    **dict(zip("01234567", (8, 4, 3, 2, 1, 1, 1, 1), strict=True)),
    **dict(zip(("00", "01", "02", "03", "04", "05", "06", "07"), (8, 3, 2, 1, 1, 1, 1, 1), strict=True)),
    **dict(zip(("10", "11", "20", "30", "40", "50"), (2, 1, 1, 1, 1, 1), strict=True)),
    **dict(zip(("000", "001", "002", "003", "004"), (5, 2, 1, 1, 1), strict=True)),
    **dict.fromkeys(("010", "020", "100", "200", "300"), 1),
    **dict(zip(("0000", "0001", "0002", "0010", "0100", "1000"), (3, 1, 1, 1, 1, 1), strict=True)),
    "00000": 2,
    "00010": 1,
}


def released_template() -> Tree:
    """The paper's tree "2.2.2": 80 nodes below the root, six deep.

    >>> tree = released_template()
    >>> [tree.depths.count(depth) for depth in range(7)], len(tree.leaves)
    ([1, 8, 21, 25, 15, 8, 3], 40)
    """
    paths = [(*map(int, parent), rank) for parent, count in _CHILDREN.items() for rank in range(count)]
    return Tree.of_paths(paths)


def top_successors(logits: Tensor, k: int) -> Tensor:
    """int64 ``[n, k]``: ids of the k largest logits of each row ``[n, V]``, the largest first.

    >>> top_successors(torch.tensor([[0.1, 3.0, 2.0]]), 2).tolist()
    [[1, 2]]
    """
    found, _ = ops.select_topk(logits.float().contiguous()[None], k)
    ids = found[0].long()
    order = logits.gather(1, ids).sort(dim=1, descending=True, stable=True).indices
    return ids.gather(1, order)


class TokenRecycler(Drafter):
    """The table and how it is read and written.

    Attributes:
        successors: int32 ``[V, k]``.
        chances: float32 ``[V, k]``: their probabilities among one another when they were written.
        seen: bool ``[V]``: rows that were written.
    """

    #: Probabilities fall into so many classes; a row that was right more often in a row than `STREAK` counts as that.
    CLASSES, STREAK = 10, 3
    #: Share of its probability that a successor is believed to have in another context, before that was counted.
    DOUBT = 0.5

    def __init__(
        self,
        vocabulary: int,
        k: int,
        depth: int,
        template: Tree | None,
        watches_prompt: bool = False,
        lookup: bool = False,
    ) -> None:
        self.successors = torch.zeros(vocabulary, k, dtype=torch.int32)
        self.chances = torch.zeros(vocabulary, k)
        self.seen = torch.zeros(vocabulary, dtype=torch.bool)
        self.streaks: dict[int, int] = {}  # of the rows whose first successor was right the last time
        self.template, self.watches_prompt, self.deepest = template, watches_prompt, depth
        self.lookup = LookupDrafter(3, 1, depth, 2) if lookup and template is None else None

    @property
    def sized(self) -> bool:
        """Without a template."""
        return self.template is None

    def begin(self, context: Context) -> None:
        """The table lives on; what was said before is looked up in this text alone."""
        if self.lookup is not None:
            self.lookup.begin(context)

    def fill(self, context: Context, tree: Tree) -> list[int]:
        """One gather a depth."""
        tokens = torch.empty(tree.size, dtype=torch.long)
        tokens[0] = context.ids[-1]
        parents, ranks, depths = torch.tensor(tree.parents), torch.tensor(tree.ranks), tree.positions
        for depth in range(1, int(depths.max()) + 1):
            nodes = (depths == depth).nonzero()[:, 0]
            tokens[nodes] = self.successors[tokens[parents[nodes]], ranks[nodes]].long()
        return [int(token) for token in tokens]

    def propose(self, context: Context, tree: Tree) -> Draft:
        """The template, filled; or any tree that is given."""
        shape = self.template or tree
        return Draft(shape, self.fill(context, shape))

    def plan(self, context: Context, sizer: Sizer) -> Draft:
        """As `Drafter`: a walk over rows from the last token on."""
        root = int(context.ids[-1])
        repeated = self.lookup.candidates(context, sizer) if self.lookup is not None else None

        def candidates(path: Path) -> list[tuple[int, float]]:
            found = {
                token: sizer.confidence.chance(kind, guess)
                for token, guess, kind in self.row(path[-1] if path else root)
            }
            for token, chance in repeated(path) if repeated is not None else ():
                found[token] = max(chance, found.get(token, 0.0))
            return sorted(found.items(), key=lambda pair: -pair[1])

        growth = sizer.grow(candidates, min(self.deepest, context.room - 1))
        return Draft(growth.tree, [root, *growth.labels])

    def row(self, token: int) -> list[tuple[int, float, Hashable]]:
        """Successors of a token, each with the probability that it had, and the class that it counts in; none if never seen."""
        if not self.seen[token]:
            return []
        streak, guesses = self.streaks.get(token, 0), self.chances[token].tolist()
        kinds = [("row", min(rank, 2), int(guess * self.CLASSES), streak) for rank, guess in enumerate(guesses)]
        return list(zip(self.successors[token].tolist(), [self.DOUBT * guess for guess in guesses], kinds, strict=True))

    def learn(self, target: Target, verdict: Verdict, sizer: Sizer) -> None:
        """Whether the rows of the tokens that became text named what came behind them."""
        if self.lookup is not None:
            self.lookup.learn(target, verdict, sizer)
        tokens = [*(target.draft.tokens[node] for node in verdict.path), verdict.token]
        for parent, truth in pairwise(tokens):
            row = self.row(parent)
            for token, _, kind in row:
                sizer.confidence.learn(kind, token == truth)
            right = bool(row) and row[0][0] == truth
            self.streaks[parent] = min(self.STREAK, self.streaks.get(parent, 0) + 1) if right else 0

    def observe(self, target: Target, verdict: Verdict) -> None:
        """Every node's ranking, accepted or not."""
        self.write(target.draft.tokens, target.logits)

    def observe_prompt(self, ids: Tensor, logits: Tensor) -> None:
        """The prompt's rankings."""
        self.write(ids.tolist(), logits)

    def write(self, tokens: Any, logits: Tensor) -> None:
        """Set rows of the table; the last of several nodes with one token wins.

        Raises:
            InputError: logits of another vocabulary.
        """
        if logits.shape[-1] != len(self.successors):
            raise InputError(f"the table has {len(self.successors)} tokens, the logits {logits.shape[-1]}")
        last = {token: node for node, token in enumerate(tokens)}
        nodes, rows = torch.tensor(list(last.values())), torch.tensor(list(last))
        chosen = logits if len(last) == len(logits) else logits[nodes.to(logits.device)]
        best = top_successors(chosen, self.successors.shape[1])
        chances = chosen.gather(1, best).softmax(-1)  # of all V would take longer than finding the best
        self.successors[rows], self.chances[rows] = best.to("cpu", torch.int32), chances.to("cpu", torch.float32)
        self.seen[rows] = True


@register("token-recycling", slot="drafting", family="decoding")
class TokenRecycling(DraftingMethod):
    """Draft with the successors that the model named when it last read a token; lossless, no training, no second model.

    Use it for anything at batch 1: it speeds up most where a text repeats itself or its kind (code, dialogue, summaries), and
    with `template="auto"` it stands back where drafts are not accepted. It costs V · k ids of memory and one top-k of each
    node's logits. A fresh table accepts little; `state_of` and a calibration carry a warm one on.

    Paper: Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling, arXiv 2408.08696.

    >>> TokenRecycling(template="2.2.2").k
    8
    """

    k: int = Field(8, ge=1, le=64, description="successors that are remembered of each token")
    template: Literal["auto", "2.2.2"] = Field(
        "auto", description="auto: the tree that pays best here; 2.2.2: the paper's 80 nodes (needs k = 8 or more)"
    )
    depth: int = Field(8, ge=1, le=16, description="deepest candidate, with template=auto")
    lookup: bool = Field(
        True,
        description="with template=auto: draft too what followed the last tokens where they stood before in the text",
    )
    update_from_prefill: bool = Field(False, description="let prompts write the table too")

    def calibrate(self, model: nn.Module, tokens: Tensor) -> Calibration:
        """Warm a table on token blocks ``[count, block]``: every position writes the row of its token.

        Raises:
            InputError: `tokens` is no integer matrix.
        """
        if tokens.dim() != 2 or tokens.is_floating_point() or not tokens.numel():
            raise InputError(f"a table is warmed on token blocks [count, block], got {list(tokens.shape)}")
        drafter, call = self.drafter(model, None), model
        with torch.no_grad():
            for block in tokens:
                drafter.write(block.tolist(), call(block[None], use_cache=False).logits[0].float())
        return state_of(drafter, model)

    def drafter(self, model: nn.Module, calibration: Calibration | None) -> TokenRecycler:
        """A fresh table, or the one of a calibration.

        Raises:
            ModelError: the model has no language-model head.
            InputError: the paper's template with fewer than 8 successors.
            CalibrationError: a table of another model or size.
        """
        head: Any = getattr(model, "get_output_embeddings", lambda: None)()
        if head is None:
            raise ModelError(f"{type(model).__name__} has no language-model head to recycle the rankings of")
        if self.template == "2.2.2" and self.k < 8:
            raise InputError(f"{self.slug}: the template 2.2.2 needs 8 successors of each token, k is {self.k}")
        template = released_template() if self.template == "2.2.2" else None
        made = TokenRecycler(head.weight.shape[0], self.k, self.depth, template, self.update_from_prefill, self.lookup)
        if calibration is not None:
            calibration = self.require(calibration)
            calibration.check(fingerprint(model))
            table, chances, seen = (calibration.tensors.get(name) for name in ("successors", "chances", "seen"))
            size = len(made.successors)
            fits = table is not None and table.shape == made.successors.shape and int(table.max()) < size
            if not fits or table is None or chances is None or chances.shape != table.shape or seen is None:
                raise CalibrationError(f"{self.slug}: the table is not [{size}, {self.k}]: calibrate again")
            made.successors, made.chances = table.to(torch.int32).clone(), chances.float().clone()
            made.seen = seen.bool().clone()
        return made


def state_of(drafter: TokenRecycler, model: Any) -> Calibration:
    """A warm table as a calibration, to be saved and given to another run."""
    tensors = {name: getattr(drafter, name).clone() for name in ("successors", "chances", "seen")}
    return Calibration("token-recycling", fingerprint(model), tensors, {"rows": int(drafter.seen.sum())})
