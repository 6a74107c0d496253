"""The draft–verify engine: draft a tree of candidates, verify it in one forward, keep one path, go on behind it.

It is a decoding method for `model.generate(custom_generate=engine)`, so prompts, processors, stopping criteria and streamers
are transformers' own. One sequence at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from gossamer.decoding.base import Context, Draft, Drafter, Match, Rule, Target, plain
from gossamer.decoding.cost import ForwardCost, cost_of
from gossamer.decoding.sizing import Sizer
from gossamer.errors import InputError
from gossamer.hf import AttentionRuntime
from gossamer.hf.attention import attached_runtime
from gossamer.patterns import Tree


@dataclass
class DecodingStats:
    """What a generation did.

    Attributes:
        forwards: of the target, the prompt's not counted.
        tokens: emitted.
        nodes: tokens that those forwards carried.
        accepted: how many steps accepted 0, 1, 2, … candidates.
    """

    forwards: int = 0
    tokens: int = 0
    nodes: int = 0
    accepted: dict[int, int] = field(default_factory=dict)

    def count(self, tokens: int, nodes: int) -> None:
        """Add a step that emitted so many tokens with a forward of so many nodes."""
        self.forwards += 1
        self.tokens += tokens
        self.nodes += nodes
        self.accepted[tokens - 1] = self.accepted.get(tokens - 1, 0) + 1

    @property
    def tokens_per_forward(self) -> float:
        """Mean accepted tokens, the one that every forward yields included."""
        return self.tokens / self.forwards if self.forwards else 0.0


class Engine:
    """Decodes a model with a drafter and an acceptance rule.

    Args:
        model: a decoder-only transformers model; sparse attention and cache methods must not be attached.
        drafter: proposes candidates.
        rule: accepts them (default: `Match`, which is lossless).
        tree: the shape of every draft; None lets the drafter choose: by what is accepted and what steps cost here, where it
            can.
        cost: of forwards; measured on this machine (once, then kept) where it is needed and not given.

    Attributes:
        stats: of the last generation.

    >>> from gossamer.decoding.lookup import PromptLookup
    >>> from gossamer.models import tiny_model
    >>> model, prompt = tiny_model("llama"), torch.arange(1, 20)[None]
    >>> engine = Engine(model, PromptLookup().drafter(model, None), tree=Tree.chain(4))
    >>> plain = model.generate(prompt, max_new_tokens=8, do_sample=False)
    >>> torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False, custom_generate=engine), plain)
    True
    """

    def __init__(
        self,
        model: nn.Module,
        drafter: Drafter,
        rule: Rule | None = None,
        *,
        tree: Tree | None = None,
        cost: ForwardCost | None = None,
    ) -> None:
        self.model, self.drafter, self.rule, self.tree = model, drafter, rule or Match(), tree
        self.cost = cost
        self.stats = DecodingStats()
        self.sizer: Sizer | None = None

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """As `generate` calls a decoding method; returns all ids ``[1, n]``, or its output class where that was asked for.

        transformers passes no streamer here; `Engine.generate` does.

        Raises:
            InputError: several sequences, padding, a model other than the engine's, or sparse attention attached.
        """
        if model is not self.model:
            raise InputError("this engine was made for another model")
        if input_ids.shape[0] != 1:
            raise InputError(f"drafting decodes one sequence at a time, got {input_ids.shape[0]}")
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not bool(mask.all()):
            raise InputError("drafting takes no padding: give one prompt by itself")
        cache = model_kwargs.get("past_key_values")
        cache = cache if cache is not None else DynamicCache(config=model.config)
        do_sample = bool(getattr(generation_config, "do_sample", False))
        with _attached(model) as runtime, self.drafter.watching(), torch.no_grad():
            ids = self._decode(
                runtime, input_ids[0], cache, logits_processor or [], stopping_criteria or [], do_sample, streamer
            )
        if streamer is not None:
            streamer.end()
        if getattr(generation_config, "return_dict_in_generate", False):
            from transformers.generation.utils import GenerateDecoderOnlyOutput

            return GenerateDecoderOnlyOutput(sequences=ids[None], past_key_values=cache)
        return ids[None]

    def generate(self, *args: Any, **settings: Any) -> Any:
        """As the model's own `generate`, streamers included."""
        model: Any = self.model
        streamer = settings.get("streamer")

        def method(*inputs: Any, **kwargs: Any) -> Any:
            return self(*inputs, **{**kwargs, "streamer": streamer})

        return model.generate(*args, **settings, custom_generate=method)

    def report(self) -> dict[str, Any]:
        """Of the last generation: tokens per forward of the target, and nodes that a forward carried."""
        stats = self.stats
        return {
            "tokens_per_forward": stats.tokens_per_forward,
            "nodes_per_forward": stats.nodes / stats.forwards if stats.forwards else 0.0,
            "accepted": dict(sorted(stats.accepted.items())),
        }

    def _sized(self) -> Sizer | None:
        """What sizes the drafts, where they follow what pays."""
        if self.tree is not None or not self.drafter.sized:
            return None
        if self.sizer is None:
            if self.cost is None:
                self.cost = cost_of(self.model)
            self.sizer = Sizer(self.cost)
        self.sizer.begin()
        return self.sizer

    def _decode(
        self,
        runtime: AttentionRuntime,
        prompt: Tensor,
        cache: Any,
        processors: Any,
        stopping: Any,
        do_sample: bool,
        streamer: Any,
    ) -> Tensor:
        sizer, model = self._sized(), cast(Any, self.model)  # costs are measured before anything is cached
        limit = min((c.max_length for c in stopping if hasattr(c, "max_length")), default=len(prompt) + 20)
        room = torch.empty(max(limit, len(prompt)) + 1, dtype=torch.long, device=prompt.device)
        room[: len(prompt)] = prompt
        count, seen = len(prompt), cache.get_seq_length()
        if seen < count - 1:
            unread, watched = prompt[None, seen:-1], self.drafter.watches_prompt
            keep = {"logits_to_keep": 0 if watched else 1}
            logits = model(input_ids=unread, past_key_values=cache, use_cache=True, **keep).logits[0]
            if watched:
                self.drafter.observe_prompt(unread[0], logits.float())
        self.stats = stats = DecodingStats()
        self.drafter.begin(Context(prompt, limit - count, processors, do_sample, cache))
        done, began = count >= limit, time.perf_counter()
        while not done:
            context = Context(room[:count], limit - count, processors, do_sample, cache)
            draft = self._draft(context, sizer)
            start = cache.get_seq_length()
            target = Target(context, draft, self._verify(runtime, draft, cache, start))
            verdict = self.rule.decide(target)
            emitted = [draft.tokens[node] for node in verdict.path[1:]] + [verdict.token]
            fresh = 0
            for token in emitted:
                room[count] = token
                count, fresh = count + 1, fresh + 1
                done = count >= limit or any(bool(c(room[None, :count], None)[0]) for c in stopping)
                if done:
                    break
            kept = verdict.path[:fresh]
            accept(cache, start, kept)
            stats.count(fresh, draft.tree.size)
            if sizer is not None:
                self.drafter.learn(target, verdict, sizer)
            self.drafter.observe(target, verdict)
            if sizer is not None:
                now = time.perf_counter()
                sizer.record(draft.tree.size, fresh, now - began)
                began = now
            if streamer is not None:
                streamer.put(room[count - fresh : count].cpu())
        return room[:count].clone()

    def _draft(self, context: Context, sizer: Sizer | None) -> Draft:
        if context.room <= 1 or (sizer is not None and sizer.rests()):
            return plain(context)
        if sizer is not None:
            draft = self.drafter.plan(context, sizer)
        elif self.tree is not None and self.tree.size == 1:
            return plain(context)
        else:
            draft = self.drafter.propose(context, self.tree if self.tree is not None else Tree.chain(0))
        if len(draft.tokens) != draft.tree.size:
            raise InputError(f"a draft of {draft.tree.size} nodes has {len(draft.tokens)} tokens")
        if self.rule.needs_laws and context.do_sample and draft.tree.size > 1 and not draft.laws:
            raise InputError(f"{type(self.rule).__name__} needs candidates that were drawn, with their laws")
        return _pruned(draft)

    def _verify(self, runtime: AttentionRuntime, draft: Draft, cache: Any, start: int) -> Tensor:
        """Logits float32 ``[nodes, V]`` of a draft."""
        device = next(self.model.parameters()).device
        tokens = torch.tensor([draft.tokens], device=device)
        positions = (start + draft.tree.positions.to(device))[None]
        inputs: dict[str, Tensor] = {"input_ids": tokens}
        model: Any = self.model
        if min(draft.tokens) < 0:
            inputs = {"inputs_embeds": self.drafter.embed(tokens[0], model.get_input_embeddings())[None]}
        with runtime.tree_forward(draft.tree):
            logits: Tensor = model(past_key_values=cache, use_cache=True, position_ids=positions, **inputs).logits[0]
        return logits.float()


def _pruned(draft: Draft) -> Draft:
    """Without nodes that have no candidate (token -1) and what stands below them."""
    if -1 not in draft.tokens:
        return draft
    kept: dict[int, int] = {}
    for node, (parent, token) in enumerate(zip(draft.tree.parents, draft.tokens, strict=True)):
        if token != -1 and (parent < 0 or parent in kept):
            kept[node] = len(kept)
    parents = tuple(-1 if draft.tree.parents[n] < 0 else kept[draft.tree.parents[n]] for n in kept)
    tree = Tree(parents, tuple(draft.tree.ranks[n] for n in kept))
    laws = {kept[n]: law for n, law in draft.laws.items() if n in kept}
    return Draft(tree, [draft.tokens[n] for n in kept], laws, draft.distinct)


def accept(cache: Any, start: int, nodes: tuple[int, ...]) -> None:
    """Keep of a draft's rows, which begin at `start`, those of these nodes; in place."""
    if nodes == tuple(range(len(nodes))):
        surplus = cache.get_seq_length() - start - len(nodes)
        if surplus:
            cache.crop(-surplus)
        return
    ids = torch.tensor(nodes)
    for layer in cache.layers:
        layer.accept(start, ids)


@contextmanager
def _attached(model: nn.Module) -> Iterator[AttentionRuntime]:
    """The runtime on the model, or a dense one for a while."""
    there = attached_runtime(model)
    runtime = there or AttentionRuntime(model)
    try:
        yield runtime
    finally:
        if there is None:
            runtime.detach()
