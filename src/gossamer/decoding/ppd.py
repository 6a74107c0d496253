"""PPD: a few trained prompt tokens let a frozen model guess tokens ahead in the forward that verifies (arXiv 2405.18628).

    a step:  [root, its m prompt tokens, candidates, each with 1 to m prompt tokens of its own]      one forward
             the accepted node's j-th prompt token names the candidates j + 1 tokens ahead
             its number of prompt tokens is the depth of the next step's tree

Prompt tokens are nodes of the tree below their candidate, with the negative token ids -2, -3, …; they are never accepted, and
their keys and values leave the cache with those of the other nodes. Nothing but m · d numbers is learned.

Decisions where the card leaves room:

* The prompt is read as in plain decoding; the first step is the root with its m prompt tokens.
* The total S is chosen from measured forwards of this machine, plain decoding among the choices, and steps are plain for a
  while where drafts turn out to take more time than they give; `size` fixes it, and drafts always.
* Sampling is exact by default (the rule `Match`). `acceptance="typical"` is the paper's, with epsilon 0.09 and alpha 0.3 (the
  released defaults of `generate`); `"typical-draw"` draws from the truncated law and follows the draft as far as it says the
  same. Greedy text is that of plain decoding with all three.
* Decoding takes one embedding for a prompt token (E = 1), as released; more of them are for training and its accuracies.

Not built: PPD inside a draft model, learned or hidden-state weights over the E embeddings, random allocation of prompts as an
ablation.

Paper: Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM Inference, Findings of EMNLP 2025.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.calibration import Calibration
from gossamer.decoding.base import Context, Draft, Drafter, DraftingMethod, Match, Rule, Target, Verdict
from gossamer.decoding.cost import ForwardCost, cost_of
from gossamer.decoding.ppd_training import Mask, Study, first_prompts, random_cuts, train_prompts
from gossamer.decoding.ppd_tree import TOTALS, DynamicTree, build_dynamic_tree, check_accuracies, choose_size
from gossamer.decoding.sizing import Sizer
from gossamer.errors import CalibrationError, InputError, ModelError
from gossamer.hf.views import text_config
from gossamer.models import fingerprint
from gossamer.patterns import Tree
from gossamer.registry import register

#: Candidates that are kept of a prompt token's guesses.
RANKS = 10


def truncation(law: Tensor, epsilon: float = 0.09, alpha: float = 0.3) -> Tensor:
    """Bool ``[V]``: the typical tokens of a law, those above min(epsilon, alpha · exp(-entropy)); its best one is among them.

    >>> truncation(torch.tensor([0.5, 0.46, 0.04])).tolist()
    [True, True, False]
    """
    entropy = -torch.xlogy(law, law).sum()
    kept = law > torch.minimum(torch.exp(-entropy) * alpha, torch.tensor(epsilon))
    kept[law.argmax()] = True
    return kept


class Typical(Rule):
    """Accept what the target finds typical: the longest such path, of equal ones the likeliest. Not lossless when sampling.

    Greedy generation follows `Match`. The token behind the path is drawn from its typical tokens.

    Args:
        epsilon, alpha: see `truncation`.
        draw: draw each token from the typical ones first, and follow the draft as long as it says the same.
    """

    lossless = False

    def __init__(self, epsilon: float = 0.09, alpha: float = 0.3, draw: bool = False) -> None:
        self.epsilon, self.alpha, self.draw = epsilon, alpha, draw

    def decide(self, target: Target) -> Verdict:
        """As `Rule`."""
        if not target.context.do_sample:
            return Match().decide(target)
        tree, tokens = target.draft.tree, target.draft.tokens
        if self.draw:
            path = [0]
            while True:
                token = self._token(target, path[-1])
                child = next((c for c in tree.children[path[-1]] if tokens[c] == token), None)
                if child is None:
                    return Verdict(tuple(path), token)
                path.append(child)
        chances, best = {0: 0.0}, 0
        for node in range(tree.size):
            below = [c for c in tree.children[node] if tokens[c] >= 0]
            if node not in chances or not below:
                continue
            law = target.law(node)
            kept = truncation(law, self.epsilon, self.alpha)
            for child in below:
                if kept[tokens[child]]:
                    chances[child] = chances[node] + float(law[tokens[child]].log())
                    if (tree.depths[child], chances[child]) > (tree.depths[best], chances[best]):
                        best = child
        return Verdict(tree.path(best), self._token(target, best))

    def _token(self, target: Target, node: int) -> int:
        law = target.law(node)
        return int((law * truncation(law, self.epsilon, self.alpha)).multinomial(1))


class PromptDrafter(Drafter):
    """Prompt tokens on every node, and the guesses of those on the node that was accepted.

    Args:
        prompts: embeddings float ``[m, d]``, one a prompt token.
        tree: of all states; None decodes plainly.
        rests: whether steps may be plain where drafts do not pay.

    Raises:
        InputError: prompt tokens and tree do not belong together.
    """

    def __init__(self, prompts: Tensor, tree: DynamicTree | None, rests: bool = False) -> None:
        if prompts.dim() != 2 or (tree is not None and len(prompts) != tree.m):
            wanted = "m" if tree is None else tree.m
            raise InputError(f"embeddings of the prompt tokens are [{wanted}, d], got {list(prompts.shape)}")
        self.prompts, self.tree, self.rests = prompts, tree, rests
        #: Candidates 2, 3, … tokens ahead of the accepted node: a row for each of its prompt tokens.
        self.guesses: list[list[int]] = []
        self._shape = cache(tree.shape) if tree is not None else None

    @property
    def sized(self) -> bool:
        """The tree is the calibration's; whether to draft at all may follow what pays."""
        return self.rests and self.tree is not None

    def plan(self, context: Context, sizer: Sizer) -> Draft:
        """The tree of this state."""
        return self.propose(context, Tree.chain(0))

    def learn(self, target: Target, verdict: Verdict, sizer: Sizer) -> None:
        """Chances are the calibration's."""

    def begin(self, context: Context) -> None:
        """Nothing is guessed yet."""
        self.guesses = []

    def propose(self, context: Context, tree: Tree) -> Draft:
        """The tree of this state."""
        last = int(context.ids[-1])
        if self.tree is None or self._shape is None:
            return Draft(Tree.chain(0), [last])
        # Any longer room leaves the trees whole.
        shape = self._shape(len(self.guesses), min(context.room, 2 * self.tree.m + 2))
        tokens = [p[-1] - 1 if p[-1] < 0 else self.guesses[len(p) - 1][p[-1]] for p in shape.rank_paths[1:]]
        return Draft(shape, [last, *tokens])

    def observe(self, target: Target, verdict: Verdict) -> None:
        """The guesses of the accepted node's prompt tokens."""
        draft, node, chain = target.draft, verdict.path[-1], []
        while (below := [c for c in draft.tree.children[node] if draft.tokens[c] < 0]) and len(below) == 1:
            node = below[0]
            chain.append(node)
        logits = target.logits[chain]
        self.guesses = logits.topk(min(RANKS, logits.shape[-1]), dim=-1).indices.tolist()

    def embed(self, tokens: Tensor, embeddings: nn.Module) -> Tensor:
        """As `Drafter`: prompt token j has the id -1 - j."""
        made: Tensor = embeddings(tokens.clamp_min(0))
        prompts = self.prompts.to(made.device, made.dtype)
        return torch.where(tokens[:, None] < 0, prompts[(-2 - tokens).clamp_min(0)], made)


@register("ppd", slot="drafting", family="decoding", needs=["calibration"])
class PPD(DraftingMethod):
    """Draft with trained prompt tokens of the frozen model itself; lossless by default, no second model and no heads.

    Use it at batch 1 where weights, not arithmetic, set the pace, and a calibration of some minutes is fine. It learns m · d
    numbers and holds nothing else; a forward carries some dozens of nodes. Where a forward of so many costs more than they
    yield, it decodes plainly.

    Paper: Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM Inference, arXiv 2405.18628.

    >>> PPD(size=30).settings()
    {'size': 30}
    """

    m: int = Field(3, ge=1, le=6, description="prompt tokens: how many tokens are guessed beyond the model's own")
    ept: int = Field(1, ge=1, le=128, description="embeddings of each prompt token (E); decoding takes 1")
    mask: Mask = Field("ensemble", description="which prompt embeddings see which in training")
    size: int | None = Field(
        None, ge=2, le=512, description="candidates and their prompt tokens together (S); unset: what pays best here"
    )
    acceptance: Literal["match", "typical", "typical-draw"] = Field("match", description="rule for sampled text")
    epsilon: float = Field(0.09, gt=0, lt=1, description="of typical acceptance: what is likelier is always accepted")
    alpha: float = Field(0.3, gt=0, le=1, description="of typical acceptance: share of exp(-entropy)")
    steps: int = Field(1000, ge=1, description="training steps")
    batch: int = Field(8, ge=1, description="prefixes in a training step")
    lr: float = Field(1e-2, gt=0, description="learning rate at the start; a cosine takes it to zero")
    decay: float = Field(0.8, gt=0, le=1, description="weight of a prompt token's loss over that of the one before")
    length: int = Field(96, ge=8, description="longest prefix that is trained on")
    cuts: int = Field(16, ge=1, description="prefixes of a text")
    seed: int = Field(0, ge=0, description="of cuts, first embeddings and order")

    def calibrate(
        self,
        model: nn.Module,
        tokens: Tensor,
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> Calibration:
        """Train on token blocks int64 ``[count, block]``, cut into pieces of `length`, and count accuracies on the last fifth.

        Raises:
            InputError: no integer matrix, or too few tokens for two pieces of m + 2 tokens.
            ModelError: a model without a language-model head or input embeddings.
        """
        _check_model(model)
        if tokens.dim() != 2 or tokens.is_floating_point() or not tokens.numel():
            raise InputError(f"prompt tokens are trained on token blocks [count, block], got {list(tokens.shape)}")
        length = min(self.length, tokens.shape[1])
        pieces = tokens[:, : tokens.shape[1] // length * length].reshape(-1, length)
        held = max(1, len(pieces) // 5)
        if length < self.m + 2 or len(pieces) < 2:
            raise InputError(f"{self.slug} wants two pieces of at least {self.m + 2} tokens, got {list(tokens.shape)}")
        starts = torch.ones(len(pieces), dtype=torch.long)
        cuts = random_cuts(starts, length, self.m, self.cuts, self.seed).to(tokens.device)
        train = Study.of(model, pieces[:-held], cuts[:-held], self.m, progress=progress)
        prompts = first_prompts(model, pieces[:-held], self.m * self.ept, self.seed)
        prompts, losses = self.train(model, train, prompts, progress)
        test = Study.of(model, pieces[-held:], cuts[-held:], self.m, top=1, progress=progress)
        return self.state(model, prompts, test, {"first_loss": losses[0], "last_loss": losses[-1]})

    def train(
        self,
        model: nn.Module,
        study: Study,
        prompts: Tensor,
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> tuple[Tensor, list[float]]:
        """`train_prompts` with these settings."""
        settings: dict[str, Any] = {"steps": self.steps, "batch": self.batch, "lr": self.lr, "decay": self.decay}
        return train_prompts(model, study, prompts, kind=self.mask, seed=self.seed, progress=progress, **settings)

    def state(self, model: Any, prompts: Tensor, study: Study, facts: dict[str, Any]) -> Calibration:
        """Trained prompt tokens with their accuracies on texts, as a calibration."""
        vocabulary = model.get_output_embeddings().weight.shape[0]
        acc = study.accuracies(model, prompts, min(RANKS, vocabulary), self.mask)
        tensors = {"prompts": prompts.detach().float().cpu(), "accuracies": acc.float().cpu()}
        return Calibration(
            self.slug, fingerprint(model), tensors, {"m": self.m, "ept": self.ept, "mask": self.mask, **facts}
        )

    def drafter(
        self, model: nn.Module, calibration: Calibration | None, cost: ForwardCost | None = None
    ) -> PromptDrafter:
        """The trained prompt tokens with the tree that pays best here.

        Args:
            cost: of forwards (default: measured on this machine, once, where no `size` is set).

        Raises:
            ModelError: a model without a language-model head or input embeddings.
            InputError: several embeddings for a prompt token.
            CalibrationError: none, one of another model or m, or one that is damaged.
        """
        _check_model(model)
        if self.ept != 1:
            raise InputError(f"{self.slug} decodes with one embedding for a prompt token, ept is {self.ept}")
        calibration = self.require(calibration)
        calibration.check(fingerprint(model))
        prompts, acc = (calibration.tensors.get(name) for name in ("prompts", "accuracies"))
        wanted = (self.m, text_config(model).hidden_size)
        if prompts is None or acc is None or prompts.shape != wanted or acc.dim() != 2 or not 0 < acc.shape[1] <= RANKS:
            raise CalibrationError(
                f"{self.slug}: the prompt tokens are not {list(wanted)} with accuracies: calibrate again"
            )
        table = acc.double().tolist()
        try:
            check_accuracies(table)
        except InputError as error:
            raise CalibrationError(f"{self.slug}: {error}: calibrate again") from None
        if len(table) != self.m:
            raise CalibrationError(
                f"{self.slug}: accuracies of {len(table)} prompt tokens, m is {self.m}: calibrate again"
            )
        size = self.size
        if size is None:
            trees = {total: build_dynamic_tree(table, total) for total in TOTALS}
            size = choose_size(trees, cost if cost is not None else cost_of(model))
            return PromptDrafter(prompts, trees.get(size), rests=True)
        return PromptDrafter(prompts, build_dynamic_tree(table, size))

    def rule(self) -> Rule:
        """As `DraftingMethod`."""
        if self.acceptance == "match":
            return Match()
        return Typical(self.epsilon, self.alpha, self.acceptance == "typical-draw")


def _check_model(model: Any) -> None:
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise ModelError(f"{type(model).__name__} has no language-model head to guess tokens with")
