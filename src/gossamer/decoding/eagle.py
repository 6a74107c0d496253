"""EAGLE: one decoder layer that drafts from the target's own features, with static trees or EAGLE-2's dynamic tree.

The head reads, at each place, the target's last feature (what goes into its language-model head) and the embedding of the token
that was chosen behind it; it says the next feature, and the target's own head turns that into a law.

Papers: EAGLE, arXiv 2401.15077; EAGLE-2, arXiv 2406.16858; the trees' sizes are those of LANTERN++, arXiv 2502.06352.

Decisions: the layer has no norm before its attention, as released. `depth` is the depth of the deepest candidate. The static
trees are known by their sizes per depth only; `rank_tree` fills them with the paths whose ranks add up to least. The dynamic
tree goes by the raw law of the draft; drawn candidates go by the law after the generation's processors, as the target's does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from gossamer.calibration import Calibration
from gossamer.decoding.base import Context, Draft, Drafter, DraftingMethod, Target, Verdict
from gossamer.decoding.guidance import guidance_of
from gossamer.errors import InputError, ModelError
from gossamer.models import fingerprint
from gossamer.patterns import Tree
from gossamer.registry import register

#: Nodes at each depth of LANTERN++'s static trees.
SHAPES: dict[str, tuple[int, ...]] = {
    "25": (4, 8, 8, 3, 2),
    "57": (5, 13, 16, 14, 9),
    "balanced": (3, 8, 9, 3, 2),
    "chain": (1, 1, 1, 1, 1),
}


def rank_tree(counts: Sequence[int]) -> Tree:
    """A tree with so many nodes at each depth: the paths with the least sum of ranks, of equal ones the lexically first.

    >>> rank_tree((2, 3)).rank_paths
    ((), (0,), (1,), (0, 0), (0, 1), (1, 0))
    """
    paths: list[tuple[int, ...]] = []
    level: list[tuple[int, ...]] = [()]
    for count in counts:
        below = [(*path, rank) for path in level for rank in range(count)]
        level = sorted(below, key=lambda path: (sum(path), path))[:count]
        paths += level
    return Tree.of_paths(paths)


class EagleConfig(LlamaConfig):  # type: ignore[misc]
    """A Llama layer's configuration; `target` is the fingerprint of the model that the head was trained for."""

    model_type = "gossamer_eagle"
    target: str = ""


class EagleHead(PreTrainedModel):  # type: ignore[misc]
    """fc[feature, token embedding] and one decoder layer; embedding and language-model head are the target's, and stay there."""

    config_class = EagleConfig
    _supports_sdpa = True

    def __init__(self, config: EagleConfig) -> None:
        super().__init__(config)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.layer = LlamaDecoderLayer(config, 0)
        self.layer.input_layernorm = nn.Identity()
        self.rotary = LlamaRotaryEmbedding(config)
        self.post_init()

    def forward(
        self, features: Tensor, embeddings: Tensor, positions: Tensor, mask: Tensor, cache: Any = None
    ) -> Tensor:
        """The next features ``[batch, n, d]``.

        Args:
            features, embeddings: ``[batch, n, d]``.
            positions: int64 ``[n]``.
            mask: bool ``[n, cached + n]``: what each place may read.
            cache: rows before these; None for none.
        """
        hidden = self.fc(torch.cat([features, embeddings], -1))
        out = self.layer(
            hidden,
            attention_mask=mask[None, None],
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=cache is not None,
            position_embeddings=self.rotary(hidden, positions[None]),
        )
        next_features: Tensor = out[0] if isinstance(out, tuple) else out
        return next_features


def eagle_head(model: Any, seed: int = 0, **overrides: Any) -> EagleHead:
    """A fresh head for a target, in eval mode, of its width; `overrides` are fields of `EagleConfig`.

    Raises:
        ModelError: the model has no language-model head.
    """
    width, source = _output(model).weight.shape[1], model.config
    sizes = {
        "hidden_size": width,
        "intermediate_size": getattr(source, "intermediate_size", None) or 4 * width,
        "num_attention_heads": source.num_attention_heads,
        "num_key_value_heads": getattr(source, "num_key_value_heads", source.num_attention_heads),
        "max_position_embeddings": source.max_position_embeddings,
        "vocab_size": source.vocab_size,
        "num_hidden_layers": 1,
        **overrides,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head: EagleHead = EagleHead(EagleConfig(target=fingerprint(model), attn_implementation="sdpa", **sizes)).eval()
        return head


def _output(model: Any) -> Any:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no language-model head for EAGLE to draft with")
    return head


def frozen_output(model: Any) -> Callable[[Tensor], Tensor]:
    """The target's language-model head as a function that trains nothing of the target."""
    output = _output(model)
    bias = output.bias if output.bias is None else output.bias.detach()
    return lambda features: F.linear(features, output.weight.detach(), bias)


@contextmanager
def features_of(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the list holds what last went into the model's language-model head, ``[batch, n, d]``."""
    last: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        last[:] = [args[0].detach()]

    handle = _output(model).register_forward_pre_hook(keep)
    try:
        yield last
    finally:
        handle.remove()


@dataclass(frozen=True)
class EaglePlan:
    """How a head is trained; the defaults are the released ones."""

    epochs: int = 20
    batch: int = 4
    lr: float = 1e-4
    warmup: float = 0.03
    clip: float = 0.5
    noise: float = 0.2
    unconditional: float = 0.1


def eagle_loss(head: Callable[[Tensor], Tensor], target: Tensor, said: Tensor, mask: Tensor) -> Tensor:
    """SmoothL1 of features ``[batch, n, d]``, mean over d, plus 0.1 cross-entropy of their laws; mean where mask ``[batch, n]``."""
    near = F.smooth_l1_loss(said, target, reduction="none").mean(-1)
    with torch.no_grad():
        law = head(target).softmax(-1)
    away = -(law * head(said).log_softmax(-1)).sum(-1)
    return ((near + 0.1 * away) * mask).sum() / mask.sum().clamp_min(1)


def train_eagle(
    model: Any,
    head: EagleHead,
    tokens: Tensor,
    plan: EaglePlan = EaglePlan(),
    *,
    unconditional: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> list[float]:
    """Train a head in place on texts int64 ``[count, n]``; the target is left alone. Returns the loss of every step.

    Args:
        unconditional: turns ids ``[n]`` into those without condition, for models that run under guidance.

    Raises:
        InputError: tokens that are no matrix of two columns or more, or a loss that is not finite.
    """
    if tokens.dim() != 2 or tokens.shape[1] < 2 or tokens.is_floating_point():
        raise InputError(f"EAGLE is trained on token blocks [count, length], got {list(tokens.shape)}")
    generator, curve, length = torch.Generator().manual_seed(seed), [], tokens.shape[1] - 1
    output, embed = frozen_output(model), model.get_input_embeddings()
    steps = plan.epochs * math.ceil(len(tokens) / plan.batch)
    warm = max(1, round(plan.warmup * steps))
    optimizer = torch.optim.AdamW(head.parameters(), lr=plan.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm))
    causal, positions = torch.ones(length, length, dtype=torch.bool).tril(), torch.arange(length)
    head.train()
    with features_of(model) as last:
        for _ in range(plan.epochs):
            for rows in torch.randperm(len(tokens), generator=generator).split(plan.batch):
                ids = tokens[rows]
                if unconditional is not None:
                    free = torch.rand(len(ids), generator=generator) < plan.unconditional
                    ids = torch.stack([unconditional(row) if f else row for row, f in zip(ids, free, strict=True)])
                with torch.no_grad():
                    model(ids, use_cache=False)
                    seen, embedded = last[0].float(), embed(ids[:, 1:]).float()
                shake = (torch.rand(seen[:, :-1].shape, generator=generator) - 0.5) * plan.noise * 512 / length
                said = head(seen[:, :-1] + shake, embedded, positions, causal)
                loss = eagle_loss(output, seen[:, 1:], said, torch.ones(len(ids), length))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if plan.clip:
                    nn.utils.clip_grad_value_(head.parameters(), plan.clip)
                optimizer.step()
                schedule.step()
                curve.append(float(loss.detach()))
    head.eval()
    if not all(map(math.isfinite, curve)):
        raise InputError("the loss is not finite: lower the learning rate")
    return curve


class EagleDrafter(Drafter):
    """Grows a tree with the head, level by level; the rows of certain tokens stay in a cache of its own.

    Args:
        model, head: the target, and what was trained for it.
        shape: a fixed tree; None for the one that the engine gives, or the dynamic one where `nodes` is not 0.
        nodes, depth, top_k: of the dynamic tree: candidates, levels, and how many are followed up at each.
        drawn: candidates are drawn without replacement, with their laws, instead of the best.

    Under `Guidance` the head runs both branches too, and their logits are combined as the target's are.
    """

    watches_prompt = True

    def __init__(
        self,
        model: Any,
        head: EagleHead,
        shape: Tree | None = None,
        *,
        nodes: int = 0,
        depth: int = 4,
        top_k: int = 10,
        drawn: bool = False,
    ) -> None:
        self.model, self.head, self.shape = model, head, shape
        self.nodes, self.levels, self.top_k, self.drawn = nodes, depth, min(top_k, model.config.vocab_size), drawn
        self.ranks, self.depth = (0, 0) if nodes or shape is not None else (self.top_k, depth)
        self._output = frozen_output(model)
        self._last: list[Tensor] = []
        self._prompt: Tensor | None = None
        self._fresh: list[tuple[Tensor, list[int]]] = []
        self._cache: Any = None
        self._known = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Looks at what goes into the target's head."""
        self._prompt, self._fresh, self._cache = None, [], None
        with features_of(self.model) as self._last:
            yield

    def observe_prompt(self, ids: Tensor, logits: Tensor) -> None:
        """Keeps the prompt's features."""
        self._prompt = self._last[0]

    def begin(self, context: Context) -> None:
        """A cache for the prompt, whose features are read with the first draft."""
        self._cache, self._known, self._fresh = DynamicCache(), 0, []
        if self._prompt is not None:
            self._fresh = [(self._prompt, context.ids[-self._prompt.shape[1] :].tolist())]

    def observe(self, target: Target, verdict: Verdict) -> None:
        """Takes the features of the accepted nodes."""
        tokens = [target.draft.tokens[node] for node in verdict.path[1:]] + [verdict.token]
        self._fresh.append((self._last[0][:, list(verdict.path)], tokens))

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        """``[branches, n, d]``."""
        ids, guidance = torch.tensor(tokens, device=self.model.device), guidance_of(self.model)
        embedded: Tensor = self.model.get_input_embeddings()(ids[None] if guidance is None else guidance.rows(ids))
        return embedded

    def _scores(self, features: Tensor) -> Tensor:
        """Logits float32 ``[n, V]`` of features ``[branches, n, d]``."""
        logits, guidance = self._output(features), guidance_of(self.model)
        return (logits if guidance is None else guidance.combine(logits))[0].float()

    def _read(self) -> Tensor:
        """Read the certain tokens that are new; the last one's feature ``[branches, 1, d]``."""
        features = torch.cat([rows for rows, _ in self._fresh], 1)
        tokens = [token for _, some in self._fresh for token in some]
        self._fresh, new = [], len(tokens)
        mask = torch.ones(new, self._known + new, dtype=torch.bool, device=features.device).tril(self._known)
        positions = torch.arange(self._known, self._known + new, device=features.device)
        said: Tensor = self.head(features, self._embed(tokens), positions, mask, self._cache)
        self._known += new
        return said[:, -1:]

    def _level(
        self, features: Tensor, tokens: list[int], parents: list[int], depth: int, seen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Features of a level's nodes, and who sees whom, with them.

        Args:
            features: of their parents, ``[branches, n, d]``.
            parents: rows of `seen`, -1 for the root.
            seen: bool ``[nodes, nodes]`` of the levels before.
        """
        above = torch.stack([seen[p] if p >= 0 else seen.new_zeros(len(seen)) for p in parents])
        own = torch.cat([above, torch.eye(len(tokens), dtype=torch.bool, device=above.device)], 1)
        mask = torch.cat([own.new_ones(len(tokens), self._known), own], 1)
        positions = torch.full((len(tokens),), self._known + depth - 1, device=features.device)
        said: Tensor = self.head(features, self._embed(tokens), positions, mask, self._cache)
        return said, torch.cat([F.pad(seen, (0, len(tokens))), own])

    def propose(self, context: Context, tree: Tree) -> Draft:
        """A draft, of the dynamic tree or a fixed one; nothing before the target was seen."""
        if not self._fresh:
            return Draft(Tree.chain(0), [int(context.ids[-1])])
        root = self._read()
        try:
            if self.nodes:
                return self._dynamic(context, root)
            return self._static(context, root, tree if self.shape is None else self.shape)
        finally:
            self._cache.crop(self._known - self._cache.get_seq_length())

    def _dynamic(self, context: Context, root: Tensor) -> Draft:
        """EAGLE-2: the best few of each level are followed up; of all that were seen, the likeliest make the tree."""
        values, ids = self._scores(root).log_softmax(-1)[0].topk(self.top_k)
        scores, tokens, parents = values.tolist(), ids.tolist(), [-1] * self.top_k
        ranks, front = list(range(self.top_k)), list(range(self.top_k))
        features, rows = root.expand(-1, self.top_k, -1), [-1] * self.top_k
        seen = torch.zeros(0, 0, dtype=torch.bool, device=root.device)
        for depth in range(1, min(self.levels, context.room - 1)):
            first = len(seen)
            said, seen = self._level(features, [tokens[n] for n in front], rows, depth, seen)
            values, ids = self._scores(said).log_softmax(-1).topk(self.top_k)
            values = values + torch.tensor([scores[n] for n in front], device=values.device)[:, None]
            best = values.flatten().topk(self.top_k).indices
            begin = len(tokens)
            scores += values.flatten().tolist()
            tokens += ids.flatten().tolist()
            parents += [n for n in front for _ in range(self.top_k)]
            ranks += list(range(self.top_k)) * len(front)
            front = (begin + best).tolist()
            above = best // self.top_k
            features, rows = said[:, above], (first + above).tolist()
        chosen = sorted(sorted(range(len(tokens)), key=lambda n: (-scores[n], n))[: self.nodes])
        place = {-1: 0, **{n: i for i, n in enumerate(chosen, 1)}}
        shape = Tree((-1, *(place[parents[n]] for n in chosen)), (0, *(ranks[n] for n in chosen)))
        return Draft(shape, [int(context.ids[-1]), *(tokens[n] for n in chosen)])

    def _static(self, context: Context, root: Tensor, tree: Tree) -> Draft:
        """Fill a tree: the candidate of each rank, or draws."""
        tokens, laws = [int(context.ids[-1])] + [-1] * (tree.size - 1), {}
        features: dict[int, Tensor] = {0: root}
        rows, seen = {0: -1}, torch.zeros(0, 0, dtype=torch.bool, device=root.device)
        for depth in range(max(tree.depths) + 1):
            inner = [n for n, d in enumerate(tree.depths) if d == depth and tree.children[n] and (tokens[n] >= 0)]
            if not inner:
                break
            if depth:
                above = [tree.parents[n] for n in inner]
                first, given = len(seen), torch.cat([features[p] for p in above], 1)
                said, seen = self._level(given, [tokens[n] for n in inner], [rows[p] for p in above], depth, seen)
                features |= {n: said[:, i : i + 1] for i, n in enumerate(inner)}
                rows |= {n: first + i for i, n in enumerate(inner)}
            scores = self._scores(torch.cat([features[n] for n in inner], 1))
            for node, row in zip(inner, scores, strict=True):
                below = tree.children[node]
                if self.drawn:
                    path = context.ids.new_tensor([tokens[i] for i in tree.path(node)[1:]])
                    law = context.process(row, torch.cat([context.ids, path])).softmax(-1)
                    picks = law.multinomial(min(len(below), int((law > 0).sum()))).tolist()
                    laws[node] = law
                else:
                    best = row.topk(max(tree.ranks[c] for c in below) + 1).indices.tolist()
                    picks = [best[tree.ranks[c]] for c in below]
                for child, token in zip(below, picks, strict=False):
                    tokens[child] = token
        return Draft(tree, tokens, laws)


@register("eagle", slot="drafting", family="decoding", name="EAGLE-2", baseline=True, needs=["draft-model"])
class Eagle(DraftingMethod):
    """Draft with one trained layer on the target's features; lossless by itself, and what relaxed rules build on.

    A baseline. It needs a head that was trained for the target (`train_eagle`), saved as a checkpoint. The dynamic tree suits
    most texts; `tree="auto"` takes what pays here.

    Papers: EAGLE, arXiv 2401.15077; EAGLE-2: Faster Inference of Language Models with Dynamic Draft Trees, arXiv 2406.16858.

    >>> Eagle(checkpoint="head", tree="25").settings()
    {'checkpoint': 'head', 'tree': '25'}
    """

    checkpoint: str = Field("", description="folder of the trained head")
    tree: Literal["dynamic", "auto", "25", "57", "balanced", "chain"] = Field("dynamic", description="shape of drafts")
    nodes: int = Field(59, ge=1, description="candidates of the dynamic tree")
    depth: int = Field(4, ge=1, le=16, description="deepest candidate, with tree=dynamic or auto")
    top_k: int = Field(10, ge=1, description="candidates that are followed up at each level")
    drawn: bool = Field(False, description="draw candidates, with their laws, instead of taking the best")

    def drafter(self, model: nn.Module, calibration: Calibration | None) -> EagleDrafter:
        """The drafter with the checkpoint's head.

        Raises:
            ModelError: no checkpoint, one for another model, or a model without language-model head.
            InputError: a dynamic tree of draws.
        """
        _output(model)
        if not (Path(self.checkpoint) / "config.json").is_file() or not self.checkpoint:
            raise ModelError(
                f"eagle: there is no head in {self.checkpoint or 'an empty path'}: train one with train_eagle"
            )
        if self.drawn and self.tree == "dynamic":
            raise InputError("eagle: the dynamic tree takes the best candidates: choose a static one to draw")
        head: EagleHead = EagleHead.from_pretrained(self.checkpoint).eval()
        if head.config.target != fingerprint(model):
            raise ModelError(f"eagle: the head in {self.checkpoint} was trained for another model")
        shape = rank_tree(SHAPES[self.tree]) if self.tree in SHAPES else None
        nodes = self.nodes if self.tree == "dynamic" else 0
        return EagleDrafter(model, head, shape, nodes=nodes, depth=self.depth, top_k=self.top_k, drawn=self.drawn)
