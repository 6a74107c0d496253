"""Quality of a model under attached methods, beside the same model dense.

The harness: the context is read once (dense, unless a method changes prefill), then a run of known tokens is decoded
query by query, each query with a selection of its own. For selectors without memory this equals token-by-token decoding,
at the cost of one forward. The cache is cropped afterwards and serves the next method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import InputError
from gossamer.hf import AttentionRuntime, GossamerCache


@dataclass(frozen=True)
class Segment:
    """A context and the known tokens after it: int64 ``[context]`` and ``[continuation]``.

    `scored` is how many tokens at the end count for quality; the ones before them are decoded too (a task's question).
    """

    context: Tensor
    continuation: Tensor
    scored: int

    @classmethod
    def from_tokens(cls, tokens: Tensor, context: int, scored: int) -> Segment:
        """Split ``[context + …]`` tokens; the first scored token is predicted from the last context token onwards.

        Raises:
            InputError: fewer tokens than asked for, or no context.
        """
        if context < 1 or len(tokens) <= context or not 0 < scored <= len(tokens) - context:
            raise InputError(f"cannot score {scored} tokens after a context of {context} in {len(tokens)} tokens")
        return cls(tokens[:context], tokens[context:], scored)


@dataclass(frozen=True)
class Scores:
    """What one segment showed, per scored token, float32 ``[scored]``."""

    log_prob: Tensor  # of the true token
    correct: Tensor  # whether the true token was the first choice
    log_probs: Tensor  # ``[scored, vocabulary]``

    @property
    def exact(self) -> bool:
        """Whether greedy decoding would have produced all scored tokens."""
        return bool(self.correct.all())

    def kl(self, other: Scores) -> Tensor:
        """KL(self ‖ other) in nats per scored token."""
        return (self.log_probs.exp() * (self.log_probs - other.log_probs)).sum(-1)

    def agreement(self, other: Scores) -> Tensor:
        """Whether both would pick the same next token, 0 or 1."""
        return (self.log_probs.argmax(-1) == other.log_probs.argmax(-1)).float()


def prefill(model: nn.Module, context: Tensor, reserve: int, chunk: int = 4096) -> Any:
    """A cache that holds all of `context` but its last token, read in chunks with whatever is attached."""
    cache = GossamerCache(reserve=reserve)
    call: Any = model
    with torch.no_grad():
        for start in range(0, len(context) - 1, chunk):
            block = context[start : min(start + chunk, len(context) - 1)]
            call(block[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def decode_known(model: nn.Module, runtime: AttentionRuntime, cache: Any, segment: Segment) -> Scores:
    """Decode the last context token and the continuation, teacher-forced.

    The cache is left as it was, unless a policy drops rows of it: then tokens are fed one by one, and it goes on.
    """
    tokens = torch.cat([segment.context[-1:], segment.continuation])[None, :-1]
    before = cache.get_seq_length()
    call: Any = model
    with torch.no_grad():
        if runtime.cache is None:
            with runtime.teacher_forcing():
                logits = call(tokens, past_key_values=cache, use_cache=True, logits_to_keep=segment.scored).logits
            cache.crop(before - cache.get_seq_length())
        else:
            steps = [call(token, past_key_values=cache, use_cache=True).logits for token in tokens.split(1, dim=1)]
            logits = torch.cat(steps[-segment.scored :], dim=1)
    log_probs = logits[0].float().log_softmax(-1)
    truth = segment.continuation[-segment.scored :]
    picked = log_probs.gather(1, truth[:, None])[:, 0]
    return Scores(picked, (log_probs.argmax(-1) == truth).float(), log_probs)


def segments_of(blocks: Tensor, context: int, scored: int) -> list[Segment]:
    """Segments from token blocks ``[count, context + scored]``."""
    return [Segment.from_tokens(block, context, scored) for block in blocks]


def task_segments(encoded: Sequence[tuple[list[int], list[int]]], question: int = 48) -> list[Segment]:
    """Segments from (prompt ids, answer ids): the last `question` prompt tokens are decoded too, so the method already
    runs while the question is read."""
    result = []
    for prompt, answer in encoded:
        cut = max(1, len(prompt) - question)
        tokens = torch.tensor(prompt + answer)
        result.append(Segment.from_tokens(tokens, cut, len(answer)))
    return result
