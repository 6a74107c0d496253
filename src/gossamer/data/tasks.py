"""Synthetic tasks whose answer lies far back in the context: what sparse attention and cache eviction break first.

    from gossamer.data import encode, make_task
    for example in make_task("passkey", tokenizer, context=4096, n=8, seed=0):
        prompt_ids, answer_ids = encode(tokenizer, example)

Every prompt is written so that the answer follows directly, for base models and small ones; chat templates are not
needed. An example depends on the task, the context, the seed and its own number, not on how many are made.

The tasks follow the literature (passkey retrieval; the RULER suite's needles, variable tracking and common words;
LongChat's line retrieval) in our own wording. Dense SmolLM2-135M answers `passkey` and `needle_kv` at 900 tokens (8 of
8 each) and hardly ever gives the other four in full; for those compare the log-probability of the answer.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from gossamer.data.text import split, text
from gossamer.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The share of the context that an example fills at least.
LEAST_FILL = 0.9


@dataclass(frozen=True)
class Example:
    """One question with its context.

    prompt: everything up to the answer, which follows directly.
    answer: the expected continuation, with its leading space.
    meta: what is known about the example. Always `task` (its name), `parts` (the strings that a full answer contains,
        in any order) and `tokens` (of prompt and answer together); more is said at each task.
    """

    prompt: str
    answer: str
    meta: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """A task generator. See `make_task` for the arguments."""

    def __call__(self, tokenizer: PreTrainedTokenizerBase, context: int, n: int, seed: int) -> list[Example]:
        """Make `n` examples."""


def make_task(name: str, tokenizer: PreTrainedTokenizerBase, context: int, n: int, seed: int = 0) -> list[Example]:
    """Make `n` examples of the task `name`.

    context: tokens of prompt and answer together; an example fills between 0.9 and 1.0 of it.
    Raises UnknownNameError for another name, InputError for a context too small for the task or `n` below 1.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(TASKS)}"
        raise UnknownNameError(f"unknown task {name!r}: {hint}")
    return TASKS[name](tokenizer, context, n, seed)


def encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], list[int]]:
    """An example's token ids: the prompt's, with the tokenizer's own start token if it has one, and the answer's."""
    prompt: list[int] = tokenizer(example.prompt, verbose=False)["input_ids"]
    answer: list[int] = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
    return prompt, answer


# ---------------------------------------------------------------------------------------------------------------------
# The tasks
# ---------------------------------------------------------------------------------------------------------------------


def passkey(
    tokenizer: PreTrainedTokenizerBase, context: int, n: int, seed: int = 0, depth: float | None = None
) -> list[Example]:
    """A number of five digits hidden in prose.

    depth: where the needle lies, from 0 (start) to 1 (end of the prose); None spreads the examples over all depths.
    meta: `depth`.
    """
    if depth is not None and not 0 <= depth <= 1:
        raise InputError(f"depth must lie between 0 and 1, not {depth}")

    def build(rng: random.Random, index: int, size: int) -> Example:
        key = _number(rng)
        at = _spread(index, seed) if depth is None else depth
        needle = f"The pass key is {key}. Remember it. The pass key is {key}."
        body = " ".join(_insert(_sentences_from(rng, size), [(at, needle)]))
        head = "There is a pass key hidden in the following text. Remember it.\n\n"
        tail = "\n\nThe pass key is"
        return Example(head + body + tail, f" {key}", {"parts": [key], "depth": at})

    return _make("passkey", build, tokenizer, context, n, seed)


def multi_needle(
    tokenizer: PreTrainedTokenizerBase, context: int, n: int, seed: int = 0, needles: int = 4
) -> list[Example]:
    """Several cities' numbers hidden in prose; all are asked for.

    needles: how many, 1 to 16.
    meta: `cities`, in the order asked, which is not the order of the text; `parts` are their numbers.
    """
    if not 1 <= needles <= len(_CITIES):
        raise InputError(f"needles must lie between 1 and {len(_CITIES)}, not {needles}")

    def build(rng: random.Random, index: int, size: int) -> Example:
        cities = rng.sample(_CITIES, needles)
        numbers = [_number(rng) for _ in cities]
        facts = [f"The number of {city} is {number}." for city, number in zip(cities, numbers, strict=True)]
        # One needle in each equal stretch of the text; which one is drawn.
        places = [(stretch + rng.random()) / needles for stretch in rng.sample(range(needles), needles)]
        body = " ".join(_insert(_sentences_from(rng, size), zip(places, facts, strict=True)))
        head = "Some cities have a number, hidden in the following text. Remember them.\n\n"
        tail = f"\n\nWhat are the numbers of {', '.join(cities)}? The number of {cities[0]} is"
        answer = " ".join(facts).removeprefix(f"The number of {cities[0]} is")
        return Example(head + body + tail, answer, {"parts": numbers, "cities": cities})

    return _make("multi_needle", build, tokenizer, context, n, seed)


def needle_kv(tokenizer: PreTrainedTokenizerBase, context: int, n: int, seed: int = 0) -> list[Example]:
    """Many lines `key -> value`; the value of one key is asked for.

    meta: `key`, `depth`.
    """

    def build(rng: random.Random, index: int, size: int) -> Example:
        keys = _distinct(rng, lambda: "-".join(rng.sample(_words(), 2)), size + 1)
        values = [_number(rng) for _ in keys]
        at = _spread(index, seed)
        asked = round(at * size)
        lines = [f"{key} -> {value}" for key, value in zip(keys, values, strict=True)]
        head = "A list of keys and their values:\n\n"
        tail = f"\n\nIn the list above, the value of the key {keys[asked]} is:\n\n{keys[asked]} ->"
        meta = {"parts": [values[asked]], "key": keys[asked], "depth": at}
        return Example(head + "\n".join(lines) + tail, f" {values[asked]}", meta)

    return _make("needle_kv", build, tokenizer, context, n, seed)


def line_retrieval(tokenizer: PreTrainedTokenizerBase, context: int, n: int, seed: int = 0) -> list[Example]:
    """Numbered lines, each with a value; the value of one line is asked for.

    meta: `line` (its number, from 1), `depth`.
    """

    def build(rng: random.Random, index: int, size: int) -> Example:
        values = [_number(rng) for _ in range(size + 1)]
        at = _spread(index, seed)
        asked = round(at * size)
        lines = [f"line {number} -> {value}" for number, value in enumerate(values, 1)]
        head = "A record of numbered lines:\n\n"
        tail = f"\n\nIn the record above, line {asked + 1} is:\n\nline {asked + 1} ->"
        meta = {"parts": [values[asked]], "line": asked + 1, "depth": at}
        return Example(head + "\n".join(lines) + tail, f" {values[asked]}", meta)

    return _make("line_retrieval", build, tokenizer, context, n, seed)


def variable_tracking(
    tokenizer: PreTrainedTokenizerBase, context: int, n: int, seed: int = 0, hops: int = 3
) -> list[Example]:
    """A value is assigned to one variable and handed on to others, with prose between; which variables hold it?

    hops: how often the value is handed on, 0 to 15; `hops + 1` variables are asked for.
    meta: `value`; `parts` are the variables in the order of assignment.
    """
    if not 0 <= hops <= 15:
        raise InputError(f"hops must lie between 0 and 15, not {hops}")

    def build(rng: random.Random, index: int, size: int) -> Example:
        names = _distinct(rng, lambda: "".join(rng.choices(_LETTERS, k=3)), hops + 1)
        value = _number(rng)
        steps = [f"VAR {names[0]} = {value}."]
        steps += [f"VAR {new} = VAR {old}." for old, new in itertools.pairwise(names)]
        places = sorted(rng.random() for _ in steps)
        body = " ".join(_insert(_sentences_from(rng, size), zip(places, steps, strict=True)))
        head = "Follow the chain of variable assignments hidden in the following text.\n\n"
        tail = f"\n\nThe variables that hold the value {value}, in the order of the text, are: VAR"
        answer = " " + ", VAR ".join(names)
        return Example(head + body + tail, answer, {"parts": names, "value": value})

    return _make("variable_tracking", build, tokenizer, context, n, seed)


def common_words(
    tokenizer: PreTrainedTokenizerBase, context: int, n: int, seed: int = 0, common: int = 3
) -> list[Example]:
    """A shuffled list of words in which a few occur far more often than the others; they are asked for.

    common: how many, 1 to 10. Half of the list is theirs; the first occurs most often, the last half as often.
    meta: `parts` are the words, the most frequent first.
    """
    if not 1 <= common <= 10:
        raise InputError(f"common must lie between 1 and 10, not {common}")

    def build(rng: random.Random, index: int, size: int) -> Example:
        pool = rng.sample(_words(), len(_words()))
        frequent, rare = pool[:common], pool[common:]
        # Weights fall evenly from 2 to 1, so that the order asked for is a fact of the list.
        weights = [2 - rank / max(1, common - 1) for rank in range(common)]
        repeats = [round(size / 2 * weight / sum(weights)) for weight in weights]
        entries = [word for word, times in zip(frequent, repeats, strict=True) for _ in range(times)]
        entries += itertools.islice(itertools.cycle(rare), size - len(entries))
        rng.shuffle(entries)
        head = "A list of words, some of which occur many times:\n\n"
        tail = f"\n\nThe {common} most frequent words of the list above, the most frequent first, are:"
        return Example(head + ", ".join(entries) + tail, f" {', '.join(frequent)}", {"parts": frequent})

    return _make("common_words", build, tokenizer, context, n, seed)


TASKS: dict[str, Task] = {
    "passkey": passkey,
    "needle_kv": needle_kv,
    "line_retrieval": line_retrieval,
    "multi_needle": multi_needle,
    "variable_tracking": variable_tracking,
    "common_words": common_words,
}


# ---------------------------------------------------------------------------------------------------------------------
# Fitting an example to the context
# ---------------------------------------------------------------------------------------------------------------------

# (random numbers, the example's number, filler units) → the example. Called with the same numbers for every size that
# is tried; what is asked for must be drawn before the filler, so that it does not change with the size.
_Build = Callable[[random.Random, int, int], Example]


def _make(
    task: str, build: _Build, tokenizer: PreTrainedTokenizerBase, context: int, n: int, seed: int
) -> list[Example]:
    """Examples 0 … n-1 of a task, each with as much filler as the context takes."""
    if n < 1:
        raise InputError(f"n must be at least 1, not {n}")
    examples = []
    for index in range(n):
        render = functools.partial(_render, build, f"{task} {seed} {index}", index)
        example, tokens = _fit(render, tokenizer, context, task)
        examples.append(replace(example, meta={**example.meta, "task": task, "tokens": tokens}))
    return examples


def _render(build: _Build, stream: str, index: int, size: int) -> Example:
    """One example with `size` units of filler; its random numbers start anew each time."""
    # A string seeds the same on every platform and in every process.
    return build(random.Random(stream), index, size)


def _fit(
    render: Callable[[int], Example], tokenizer: PreTrainedTokenizerBase, context: int, task: str
) -> tuple[Example, int]:
    """The example with the most filler that fits, or nearly the most, and its tokens; a few trials suffice.

    Tokens grow almost linearly with the number of filler units, so each trial says where to try next.
    """

    def measure(size: int) -> tuple[Example, int]:
        example = render(size)
        return example, sum(map(len, encode(tokenizer, example)))

    fits, too_big = 0, None
    best, most = measure(0)
    fixed, size = most, 8
    while most < 0.98 * context and fixed <= context:
        example, tokens = measure(size)
        if tokens <= context:
            fits, best, most = size, example, tokens
        else:
            too_big = size
        if too_big is not None and too_big - fits <= 1:
            break
        guess = round((0.99 * context - fixed) * size / max(1, tokens - fixed))
        size = max(guess, fits + 1)
        if too_big is not None:
            size = min(size, too_big - 1)
    if not LEAST_FILL * context <= most <= context:
        raise InputError(
            f"a context of {context} tokens is too small for the task {task}: its frame alone takes {fixed}"
        )
    return best, most


# ---------------------------------------------------------------------------------------------------------------------
# What examples are made of
# ---------------------------------------------------------------------------------------------------------------------

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CITIES = (
    "Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Prague", "Dublin",
    "Tokyo", "Cairo", "Lima", "Oslo", "Delhi", "Boston", "Chicago", "Sydney",
)  # fmt: skip
_GOLDEN = 0.6180339887498949


def _number(rng: random.Random) -> str:
    """Five digits, the first not zero."""
    return str(rng.randrange(10_000, 100_000))


def _spread(index: int, seed: int) -> float:
    """The depth of example `index`, in [0, 1): successive ones fill the range evenly, however many there are."""
    return (random.Random(f"depth {seed}").random() + index * _GOLDEN) % 1.0


def _distinct(rng: random.Random, draw: Callable[[], str], count: int) -> list[str]:
    """`count` different strings from `draw`."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[draw()] = None
    return list(drawn)


def _insert(units: Sequence[str], needles: Iterable[tuple[float, str]]) -> list[str]:
    """The units with each needle put at its depth, from 0 (before all units) to 1 (after all)."""
    mixed = list(units)
    # From the back, so that earlier places stay what they were.
    for depth, needle in sorted(needles, reverse=True):
        mixed.insert(round(depth * len(units)), needle)
    return mixed


def _sentences_from(rng: random.Random, count: int) -> list[str]:
    """`count` successive sentences of prose from a drawn place on; the text starts again where it ends."""
    sentences = _sentences()
    start = rng.randrange(len(sentences))
    return [sentences[(start + i) % len(sentences)] for i in range(count)]


@functools.cache
def _sentences() -> tuple[str, ...]:
    """The plain sentences of the part of the prose that calibration never sees: no code, no tables."""
    flat = " ".join(split(text("prose"), "evaluation").split())
    plain = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()-]{20,250}[.!?]")
    return tuple(found for found in re.split(r"(?<=[.!?]) +(?=[A-Z])", flat) if plain.fullmatch(found))


@functools.cache
def _words() -> tuple[str, ...]:
    """English words of four to eight letters, from the prose."""
    return tuple(sorted(set(re.findall(r"(?<=[a-z] )[a-z]{4,8}(?=[ ,.])", " ".join(_sentences())))))
