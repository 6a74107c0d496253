"""Training PPD's prompt embeddings on a frozen model: they learn what the model itself would say some tokens ahead.

    input      x_1 … x_n, P_1, …, P_m        P_j stands at position n + j - 1, counted from 0: P_1 where t_1 will be
    targets    t_1 = argmax p(·|x),  q_1 = p(·|x, t_1),  t_2 = argmax q_1,  q_2 = p(·|x, t_1, t_2), …
    loss       1/m · Σ_j decay^(j-1) · KL(q_j ‖ P_j's law)

A truncated prefix is a mask: texts are read once, and prompt tokens cut in anywhere see only what stands before the cut. This is
what a prefix of that length would give, and keys and values of the frozen model serve all steps.

Paper: Hardware-Aware Parallel Prompt Decoding, Findings of EMNLP 2025. Decisions where the card leaves room:

* Targets are kept as their `top` likeliest tokens and the mass of the rest; the divergence takes the rest as one token.
* Without a tokenizer the first embeddings are those of tokens drawn from the training text.
* The truth that accuracies are counted against is the model's own greedy text behind the cut, as in decoding.
* Logits of the E embeddings of a prompt token are averaged evenly; learned and softmax weights are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from gossamer.errors import InputError
from gossamer.hf.views import text_config

Mask = Literal["ensemble", "decoder", "encoder"]
#: Keys and values ``[batch, kv_heads, length, head_dim]`` of each layer.
Rows = list[tuple[Tensor, Tensor]]
#: Bytes of keys and values of texts that are held; beyond, texts are read again in every step.
HOLD = 2 << 30


@dataclass(frozen=True, eq=False)
class Targets:
    """Laws over the vocabulary, stored compactly.

    Attributes:
        ids: int64 ``[..., k]``, the likeliest tokens, the best first.
        logs: float32 ``[..., k]``, their log-probabilities.
        rest: float32 ``[...]``, log of what all others have together; -inf where nothing is left.
    """

    ids: Tensor
    logs: Tensor
    rest: Tensor

    @classmethod
    def of_logits(cls, logits: Tensor, top: int) -> Targets:
        """From logits ``[..., V]``."""
        logs, ids = logits.float().log_softmax(-1).topk(min(top, logits.shape[-1]), dim=-1)
        left = _log_rest(logs) if top < logits.shape[-1] else torch.full_like(logs[..., 0], -torch.inf)
        return cls(ids, logs, left)

    @classmethod
    def of_tokens(cls, tokens: Tensor) -> Targets:
        """Hard labels int64 ``[...]``: the divergence is then the cross-entropy."""
        zeros = torch.zeros(*tokens.shape, 1, device=tokens.device)
        return cls(tokens[..., None], zeros, torch.full_like(zeros[..., 0], -torch.inf))

    def __getitem__(self, which: Any) -> Targets:
        """Some of them."""
        return Targets(self.ids[which], self.logs[which], self.rest[which])

    def divergence(self, logits: Tensor) -> Tensor:
        """float32 ``[...]``: KL of these laws to those of logits ``[..., V]``, all other tokens taken as one."""
        mine = logits.float().log_softmax(-1).gather(-1, self.ids)
        found = (self.logs.exp() * (self.logs - mine)).sum(-1)
        some = self.rest > -torch.inf
        rest = torch.where(some, self.rest, 0.0)
        other = torch.where(some, _log_rest(torch.where(some[..., None], mine, -torch.inf)), 0.0)
        return found + torch.where(some, rest.exp() * (rest - other), 0.0)


def _log_rest(logs: Tensor) -> Tensor:
    """Log of one less the probabilities ``[..., k]``, given as logs."""
    return torch.log1p(-logs.exp().sum(-1).clamp_max(1 - 1e-6))


def distillation_loss(logits: Tensor, targets: Targets, decay: float = 0.8) -> Tensor:
    """Mean over the examples of 1/m · Σ decay^(j-1) · KL, for logits ``[n, m, V]`` and targets ``[n, m]``.

    >>> teacher = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]])
    >>> float(distillation_loss(teacher, Targets.of_logits(teacher, 2))) == 0
    True
    """
    m = logits.shape[1]
    weights = decay ** torch.arange(m, device=logits.device, dtype=torch.float32)
    return (targets.divergence(logits) * weights).sum(1).mean() / m


def chain_mask(m: int, ept: int, kind: Mask = "ensemble") -> Tensor:
    """Bool ``[m·E, m·E]``: which prompt embedding (row) sees which; embedding e of prompt token j is ``j·E + e``.

    `ensemble`: e of the prompt tokens up to its own; `decoder`: all before and itself; `encoder`: all E of its prompt token.

    >>> chain_mask(2, 2).int().tolist()
    [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]
    """
    index = torch.arange(m * ept)
    prompt, copy = index // ept, index % ept
    if kind == "decoder":
        return index[:, None] >= index
    if kind == "encoder":
        return prompt[:, None] == prompt
    return (prompt[:, None] >= prompt) & (copy[:, None] == copy)


def _forward(model: nn.Module, rows: Rows, visible: Tensor, positions: Tensor, **inputs: Tensor) -> tuple[Tensor, Any]:
    """Logits ``[batch, new, V]`` of new tokens behind rows, with the cache that holds both.

    Args:
        visible: bool ``[batch, new, length + new]``; positions: int64 ``[batch, new]``.
    """
    cache, call = DynamicCache(), model
    for layer, (key, value) in enumerate(rows):
        cache.update(key, value, layer)
    kind = next(model.parameters()).dtype
    mask = torch.zeros(visible.shape, dtype=kind, device=visible.device)
    mask = mask.masked_fill(~visible, torch.finfo(kind).min)[:, None]
    out: Any = call(attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **inputs)
    return out.logits, cache


def _before(cuts: Tensor, length: int, repeats: int) -> Tensor:
    """Bool ``[batch, C·repeats, length]``: rows before each cut ``[batch, C]``, for `repeats` tokens there."""
    seen = torch.arange(length, device=cuts.device) < cuts[..., None]
    return seen.repeat_interleave(repeats, dim=1)


def _rows(cache: Any) -> Rows:
    return [(layer.keys, layer.values) for layer in cache.layers]


@torch.no_grad()
def read(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Rows]:
    """Logits ``[batch, length, V]`` and rows of texts int64 ``[batch, length]``."""
    call: Any = model
    out = call(tokens, past_key_values=DynamicCache(), use_cache=True)
    return out.logits, _rows(out.past_key_values)


@torch.no_grad()
def roll_out(model: nn.Module, logits: Tensor, rows: Rows, cuts: Tensor, m: int, top: int) -> Targets:
    """Targets ``[batch, C, m]``: the laws q_1 … q_m of the greedy text behind each cut.

    Args:
        logits, rows: of the texts, from `read`. cuts: int64 ``[batch, C]``, lengths of prefixes.
    """
    count, length = cuts.shape[1], logits.shape[1]
    token = logits.gather(1, (cuts - 1)[..., None].expand(-1, -1, logits.shape[-1])).argmax(-1)
    laws, past = [], _before(cuts, length, 1)
    own = torch.eye(count, dtype=torch.bool, device=cuts.device).expand(len(cuts), -1, -1)
    for j in range(m):
        past = torch.cat([past, own], dim=2)
        law, cache = _forward(model, rows, past, cuts + j, input_ids=token)
        rows, token = _rows(cache), law.argmax(-1)
        laws.append(Targets.of_logits(law, top))
    parts = [torch.stack([getattr(law, name) for law in laws], 2) for name in ("ids", "logs", "rest")]
    return Targets(*parts)


def prompt_logits(
    model: nn.Module, rows: Rows, cuts: Tensor, prompts: Tensor, m: int, kind: Mask = "ensemble"
) -> Tensor:
    """Logits ``[batch, C, m, V]`` of the prompt tokens behind each cut int64 ``[batch, C]`` of the texts of these rows.

    Args:
        prompts: embeddings float ``[m·E, d]``; gradients reach them, and nothing else that is frozen.
    """
    (batch, count), total, length = cuts.shape, len(prompts), rows[0][0].shape[2]
    ept = total // m
    inputs = prompts.to(next(model.parameters()).dtype).repeat(count, 1).expand(batch, -1, -1)
    places = torch.arange(total, device=cuts.device) // ept
    positions = (cuts[..., None] + places).flatten(1)
    own = torch.block_diag(*[chain_mask(m, ept, kind)] * count).to(cuts.device).bool()
    visible = torch.cat([_before(cuts, length, total), own.expand(batch, -1, -1)], dim=2)
    logits, _ = _forward(model, rows, visible, positions, inputs_embeds=inputs)
    averaged: Tensor = logits.unflatten(1, (count, m, ept)).mean(3)
    return averaged


def random_cuts(starts: Tensor, length: int, m: int, count: int, seed: int = 0) -> Tensor:
    """Lengths of prefixes int64 ``[texts, count]``, drawn evenly from where each text may be cut.

    That is from its start (int64 ``[texts]``, at least 1: the beginning of the last reply) to where m + 1 tokens are left.

    >>> random_cuts(torch.tensor([5, 96]), 96, 3, 4).tolist()[1]
    [96, 96, 96, 96]
    """
    generator = torch.Generator().manual_seed(seed)
    after = torch.maximum(starts + 1, torch.full_like(starts, length - m))
    drawn = torch.rand(len(starts), count, generator=generator, dtype=torch.float64)
    return starts[:, None] + (drawn * (after - starts)[:, None]).long()


@torch.no_grad()
def accuracies(logits: Tensor, targets: Targets, ranks: int) -> Tensor:
    """float64 ``[m, ranks]``: how often the rank-r guess of prompt token j is the token there, over logits ``[n, m, V]``."""
    guesses = logits.topk(ranks, dim=-1).indices
    return (guesses == targets.ids[..., :1]).double().mean(0)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter of the model wants gradients, and it is in eval mode; afterwards all is as it was."""
    wanted, training = [p for p in model.parameters() if p.requires_grad], model.training
    for parameter in wanted:
        parameter.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        model.train(training)


@dataclass(eq=False)
class Study:
    """Texts with cuts, what the model says behind them, and their rows where they can be held.

    Attributes:
        tokens: int64 ``[texts, length]``; cuts: int64 ``[texts, C]``; targets: ``[texts, C, m]``.
    """

    tokens: Tensor
    cuts: Tensor
    targets: Targets
    rows: Rows | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tokens: Tensor,
        cuts: Tensor,
        m: int,
        top: int = 64,
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> Study:
        """Read the texts and roll out the targets, 8 texts at a time.

        Raises:
            InputError: cuts outside the texts, or texts longer than a window of the model's attention.
        """
        length = tokens.shape[1]
        if cuts.shape[0] != tokens.shape[0] or not bool(((cuts >= 1) & (cuts <= length)).all()):
            raise InputError(f"prefixes of texts of {length} tokens have 1 to {length} tokens")
        window = getattr(text_config(model), "sliding_window", None)
        if window and length + m > window:
            raise InputError(f"texts of {length} tokens do not fit the model's window of {window}: take shorter ones")
        parts: list[Targets] = []
        held: list[Rows] | None = []
        size = 0
        for start in range(0, len(tokens), 8):
            progress("targets", start, len(tokens))
            logits, rows = read(model, tokens[start : start + 8])
            parts.append(roll_out(model, logits, rows, cuts[start : start + 8], m, top))
            size += sum(t.nbytes for pair in rows for t in pair)
            if held is not None and size <= HOLD:
                held.append(rows)
            else:
                held = None
        targets = Targets(*(torch.cat([getattr(p, name) for p in parts]) for name in ("ids", "logs", "rest")))
        every = None
        if held is not None:
            every = [
                (torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer]))
                for layer in zip(*held, strict=True)
            ]
        return cls(tokens, cuts, targets, every)

    def rows_of(self, model: nn.Module, texts: Tensor) -> Rows:
        """Rows of some texts, int64 ``[batch]``."""
        if self.rows is None:
            return read(model, self.tokens[texts])[1]
        return [(key[texts], value[texts]) for key, value in self.rows]

    @torch.no_grad()
    def logits(self, model: nn.Module, prompts: Tensor, kind: Mask = "ensemble") -> Iterator[tuple[Tensor, Targets]]:
        """Logits ``[C, m, V]`` of the prompt tokens and the targets ``[C, m]``, text by text."""
        m = self.targets.ids.shape[2]
        for text in range(len(self.tokens)):
            rows = self.rows_of(model, torch.tensor([text]))
            yield prompt_logits(model, rows, self.cuts[text : text + 1], prompts, m, kind)[0], self.targets[text]

    def accuracies(self, model: nn.Module, prompts: Tensor, ranks: int, kind: Mask = "ensemble") -> Tensor:
        """As the function, over all texts: float64 ``[m, ranks]``."""
        found = [accuracies(logits, targets, ranks) for logits, targets in self.logits(model, prompts, kind)]
        return torch.stack(found).mean(0)


def first_prompts(model: nn.Module, tokens: Tensor, number: int, seed: int = 0) -> Tensor:
    """Embeddings float32 ``[number, d]`` of tokens drawn from a text, where training starts."""
    call: Any = model
    flat = tokens.flatten()
    drawn = torch.randint(len(flat), (number,), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        made: Tensor = call.get_input_embeddings()(flat[drawn]).float()
    return made.clone()


def train_prompts(
    model: nn.Module,
    study: Study,
    prompts: Tensor,
    *,
    steps: int,
    batch: int = 8,
    lr: float = 1e-2,
    decay: float = 0.8,
    kind: Mask = "ensemble",
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[Tensor, list[float]]:
    """Trained prompt embeddings float32 ``[m·E, d]`` and the loss of every step; the model stays bit for bit what it was.

    AdamW without weight decay, a cosine to zero without warm-up; each step takes the next `batch` cuts in a shuffled order.

    Raises:
        InputError: a loss that is not finite.
    """
    m, per_text = study.targets.ids.shape[2], study.cuts.shape[1]
    learned = prompts.detach().clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([learned], lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    losses = []
    with frozen(model), torch.enable_grad():
        for step in range(steps):
            if len(order) < batch:
                order += torch.randperm(study.cuts.numel(), generator=generator).tolist()
            chosen, order = torch.tensor(order[:batch]), order[batch:]
            texts, places = chosen // per_text, chosen % per_text
            rows = study.rows_of(model, texts)
            logits = prompt_logits(model, rows, study.cuts[texts, places][:, None], learned, m, kind)[:, 0]
            loss = distillation_loss(logits, study.targets[texts, places], decay)
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise InputError(f"the loss is not finite at step {step}: check the model's weights, or lower the rate")
            progress("training", step + 1, steps)
    return learned.detach(), losses
