"""Whether a drafter and a rule keep the target's law: the harness of the decoding family, for packages with their own.

Two ways. `exact_law` walks every outcome of every random decision and returns the law of the emitted tokens to rounding error;
it needs parts whose chance comes from a `Dice`, and small vocabularies. `chi_square` compares samples of any engine with
`law_of_text`, the target's own law by enumeration.

    dice = EveryOutcome()
    law = exact_law(MyDrafter(dice=dice), MyRule(dice), dice, logits_of, prompt, length=3)
    assert distance(law, law_of_text(logits_of, prompt, 3)) < 1e-6
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.decoding import Context, Drafter, Rule, Target
from gossamer.decoding.sources import DraftSource
from gossamer.decoding.transport import Dice, checked
from gossamer.errors import InputError
from gossamer.models import tiny_model
from gossamer.patterns import Tree

__all__ = [
    "EveryOutcome",
    "TableSource",
    "chi_square",
    "distance",
    "exact_law",
    "law_of_text",
    "logits_of",
    "sampled",
    "toy_model",
]

Text = tuple[int, ...]
#: Logits ``[V]`` behind a text int64 ``[n]``.
Logits = Callable[[Tensor], Tensor]


class EveryOutcome(Dice):
    """A dice that goes through all outcomes of the decisions that are asked of it, one run after another.

    >>> dice = EveryOutcome()
    >>> law = dice.law(lambda: (dice.coin(0.25), dice.draw(torch.tensor([1.0, 0.0, 3.0]))))
    >>> law[True, 2], len(law)
    (0.1875, 4)
    """

    def __init__(self) -> None:
        super().__init__()
        self.script: list[tuple[int, list[tuple[int, float]]]] = []  # of each decision: which outcome, and all of them
        self.place, self.chance = 0, 1.0

    def _decide(self, outcomes: list[tuple[int, float]]) -> int:
        if self.place == len(self.script):
            self.script.append((0, outcomes))
        index, known = self.script[self.place]
        self.place += 1
        outcome, chance = known[index]
        self.chance *= chance
        return outcome

    def coin(self, chance: float) -> bool:
        """Both sides that can come up, in turn."""
        sides = [(1, chance), (0, 1 - chance)]
        return bool(self._decide([side for side in sides if side[1] > 0]))

    def draw(self, weights: Tensor) -> int:
        """Every index that has weight, in turn."""
        law = checked(weights).tolist()
        return self._decide([(index, chance) for index, chance in enumerate(law) if chance > 0])

    def law(self, run: Callable[[], Any], most: int = 2_000_000) -> dict[Any, float]:
        """Chance of everything that `run` can return.

        Raises:
            InputError: there are more than `most` ways through it.
        """
        self.script = []
        found: dict[Any, float] = {}
        for _ in range(most):
            self.place, self.chance = 0, 1.0
            outcome = run()
            found[outcome] = found.get(outcome, 0.0) + self.chance
            while self.script and self.script[-1][0] + 1 == len(self.script[-1][1]):
                self.script.pop()
            if not self.script:
                return found
            index, outcomes = self.script[-1]
            self.script[-1] = (index + 1, outcomes)
        raise InputError(f"there are more than {most} ways through this: use a smaller vocabulary, or fewer drafts")


class TableSource(DraftSource):
    """A toy language model whose logits depend on the last token alone: logits ``[V, V]``, one row a token."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.vocabulary = logits, len(logits)

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits behind a text, so that a table serves as a target too."""
        return self.logits[int(ids[-1])]

    def begin(self, ids: Tensor) -> Tensor:
        """As `DraftSource`."""
        return self(ids)

    def extend(self, tokens: Sequence[int]) -> Tensor:
        """As `DraftSource`."""
        return self.logits[list(tokens)]

    def keep(self, tokens: Sequence[int], nodes: Sequence[int]) -> None:
        """Nothing is kept."""


def toy_model(vocabulary: int = 4, seed: int = 0, **overrides: Any) -> Any:
    """A transformer small enough to enumerate its texts."""
    small = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny_model("llama", seed, vocab_size=vocabulary, intermediate_size=16, **{**small, **overrides})


def logits_of(model: nn.Module) -> Logits:
    """A model's logits behind a text."""

    def logits(ids: Tensor) -> Tensor:
        call: Any = model
        with torch.no_grad():
            behind: Tensor = call(ids[None]).logits[0, -1].float()
        return behind

    return logits


def law_of_text(logits: Logits, prompt: Tensor, length: int, processors: Any = None) -> dict[Text, float]:
    """Chance of every text of `length` tokens behind a prompt int64 ``[n]``."""
    law: dict[Text, float] = {(): 1.0}
    for _ in range(length):
        longer: dict[Text, float] = {}
        for text, chance in law.items():
            ids = torch.cat([prompt, prompt.new_tensor(text)])
            row = Context(ids, 1, processors, True).process(logits(ids)).softmax(-1).double()
            longer |= {(*text, token): chance * float(row[token]) for token in range(len(row)) if row[token] > 0}
        law = longer
    return law


def block(drafter: Drafter, rule: Rule, logits: Logits, ids: Tensor, room: int, processors: Any = None) -> Text:
    """The tokens that one step of the engine emits behind a text, at most `room`, by the target's logits alone."""
    context = Context(ids, room, processors, True)
    draft = drafter.propose(context, Tree.chain(0))
    prefixes = Target(context, draft, torch.zeros(draft.tree.size, 1))
    known: dict[Text, Tensor] = {}
    rows = []
    for node in range(draft.tree.size):
        prefix = prefixes.prefix(node)
        key = tuple(prefix.tolist())
        if key not in known:
            known[key] = logits(prefix)
        rows.append(known[key])
    target = Target(context, draft, torch.stack(rows))
    verdict = rule.decide(target)
    drafter.observe(target, verdict)
    return (*(draft.tokens[node] for node in verdict.path[1:]), verdict.token)[:room]


def exact_law(
    drafter: Drafter,
    rule: Rule,
    dice: EveryOutcome,
    logits: Logits,
    prompt: Tensor,
    length: int,
    processors: Any = None,
) -> dict[Text, float]:
    """Chance of every text of `length` tokens that a drafter and a rule emit, block after block.

    Args:
        dice: the one that both take their chance from.
    """
    law: dict[Text, float] = {}
    waiting: dict[Text, float] = {(): 1.0}
    while waiting:
        text, chance = min(waiting.items(), key=lambda item: len(item[0]))
        del waiting[text]
        if len(text) == length:
            law[text] = law.get(text, 0.0) + chance
            continue
        ids, room = torch.cat([prompt, prompt.new_tensor(text)]), length - len(text)
        emitted = dice.law(lambda: block(drafter, rule, logits, ids, room, processors))  # noqa: B023
        for tokens, share in emitted.items():
            key = text + tokens
            waiting[key] = waiting.get(key, 0.0) + chance * share
    return law


def distance(one: dict[Text, float], other: dict[Text, float]) -> float:
    """Total variation of two laws."""
    return 0.5 * sum(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in one.keys() | other.keys())


def sampled(draw: Callable[[], Text], count: int) -> dict[Text, int]:
    """How often each text came up."""
    seen: dict[Text, int] = {}
    for _ in range(count):
        text = draw()
        seen[text] = seen.get(text, 0) + 1
    return seen


def chi_square(seen: dict[Text, int], law: dict[Text, float]) -> float:
    """p-value of Pearson's test that samples follow a law; cells that expect fewer than 5 are put together.

    Raises:
        InputError: too few samples for two cells.

    >>> chi_square({(0,): 52, (1,): 48}, {(0,): 0.5, (1,): 0.5}) > 0.5
    True
    >>> chi_square({(0,): 80, (1,): 20}, {(0,): 0.5, (1,): 0.5}) < 1e-6
    True
    """
    if set(seen) - {text for text, chance in law.items() if chance > 0}:
        return 0.0  # something that cannot be
    count = sum(seen.values())
    cells = [(seen.get(text, 0), chance * count) for text, chance in law.items() if chance * count >= 5]
    rest = count - sum(found for found, _ in cells), count - sum(wanted for _, wanted in cells)
    if rest[1] >= 1:
        cells.append(rest)
    if len(cells) < 2:
        raise InputError(f"{count} samples are too few to test a law of {len(law)} texts")
    statistic = sum((found - wanted) ** 2 / wanted for found, wanted in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
