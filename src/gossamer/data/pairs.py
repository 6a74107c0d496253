"""Small real classification tasks made from text: do two sentences follow each other, are a sentence's words in order,
which package of the standard library does a stretch of source come from.

    prose = sentences("prose")
    train, test = make_pairs(prose, "successor", seed=0)
    tokenizer = word_tokenizer([*prose, *sentences("docstrings")])
    inputs, labels = encode_pairs(tokenizer, train, length=48)

No sentence is in both parts: the last fifth of the text is for testing. The first two tasks are hard for an encoder that was
pre-trained for a minute; the packages it can tell.
"""

from __future__ import annotations

import ast
import functools
import os
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from gossamer.data.text import text
from gossamer.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["successor", "order"]

_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z`\"*])")
_WORDS = range(5, 31)  # words in a sentence that says something and is one
_TEST = 0.2
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Pairs:
    """Examples of a task.

    Attributes:
        first: sentences.
        second: the other sentence of each; empty where the task has one.
        labels: 1 if the sentence follows, or if the words are in order; or the number of the package.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.first)


def sentences(source: str | os.PathLike[str] = "prose") -> list[str]:
    """Sentences of 5 to 30 words, in the order of the text.

    source: `docstrings`, those of the standard library (some 20,000); or what `gossamer.data.text` takes.

    Raises InputError as `text` does.

    >>> all(5 <= len(s.split()) <= 30 for s in sentences("prose"))
    True
    """
    paragraphs = _docstrings() if source == "docstrings" else re.split(r"\n\s*\n", text(source))
    found = (s for p in paragraphs for s in _END.split(" ".join(p.split())))
    return [s for s in found if len(s.split()) in _WORDS]


@functools.cache
def _docstrings() -> tuple[str, ...]:
    folder, found = Path(sysconfig.get_paths()["stdlib"]), list[str]()
    for file in sorted(folder.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests"} & set(file.relative_to(folder).parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError):  # files made to be wrong, for the parser's own tests
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found += re.split(r"\n\s*\n", ast.get_docstring(node) or "")
    return tuple(found)


def make_pairs(sentences: Sequence[str], kind: Kind = "successor", seed: int = 0) -> tuple[Pairs, Pairs]:
    """(training part, test part), each with as many examples of either class; two examples a sentence.

    kind: `successor`: a sentence and the one that follows, or any other; `order`: a sentence as it is, or with two
        neighbouring words exchanged.

    The same seed gives the same examples. Raises InputError for another kind, or fewer than 20 sentences.

    >>> train, test = make_pairs([f"sentence {i} is a short one" for i in range(50)])
    >>> len(train), len(test), sum(test.labels)
    (78, 18, 9)
    """
    if kind not in ("successor", "order"):
        raise InputError(f"a task of pairs is successor or order, got {kind!r}")
    if len(sentences) < 20:
        raise InputError(f"{len(sentences)} sentences are too few for a task: give 20 or more")
    cut = round((1 - _TEST) * len(sentences))
    make = _successors if kind == "successor" else _orders
    rng = random.Random(seed)
    return make(sentences[:cut], rng), make(sentences[cut:], rng)


def _successors(sentences: Sequence[str], rng: random.Random) -> Pairs:
    rows = []
    for i, sentence in enumerate(sentences[:-1]):
        other = rng.choice([j for j in (rng.randrange(len(sentences)) for _ in range(20)) if j not in (i, i + 1)])
        rows += [(sentence, sentences[i + 1], 1), (sentence, sentences[other], 0)]
    return _pairs(rows, rng)


def _orders(sentences: Sequence[str], rng: random.Random) -> Pairs:
    rows = []
    for sentence in sentences:
        words = sentence.split()
        places = [i for i in range(len(words) - 1) if words[i].lower() != words[i + 1].lower()]
        if not places:
            continue
        at = rng.choice(places)
        words[at], words[at + 1] = words[at + 1], words[at]
        rows += [(sentence, "", 1), (" ".join(words), "", 0)]
    return _pairs(rows, rng)


def _pairs(rows: list[tuple[str, str, int]], rng: random.Random) -> Pairs:
    rng.shuffle(rows)
    first, second, labels = zip(*rows, strict=True)
    return Pairs(first, second, labels)


@functools.cache
def library_stretches(words: int = 24) -> dict[str, tuple[str, ...]]:
    """The standard library's source in stretches of `words` words, by package (or module), in the order of its files.

    Raises InputError for a length below one.

    >>> len(library_stretches()["json"][0].split())
    24
    """
    if words < 1:
        raise InputError(f"a stretch has at least one word, got {words}")
    folder, found = Path(sysconfig.get_paths()["stdlib"]), dict[str, list[str]]()
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).parts
        if {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(parts):
            continue
        content = file.read_text(encoding="utf-8", errors="ignore").split()
        found.setdefault(parts[0].removesuffix(".py"), []).extend(
            " ".join(content[at : at + words]) for at in range(0, len(content) - words + 1, words)
        )
    return {name: tuple(stretches) for name, stretches in found.items()}


def make_topics(
    stretches: Mapping[str, Sequence[str]], names: Sequence[str], each: int = 1000, seed: int = 0
) -> tuple[Pairs, Pairs]:
    """(training part, test part) of the task "which of these is a stretch from", as many of each, at most `each` in all.

    The last fifth of a package is for testing. Raises InputError for fewer than two names, unknown ones, or packages of
    fewer than 20 stretches.

    >>> train, test = make_topics({"a": ["x"] * 20, "b": ["y"] * 30}, ["a", "b"])
    >>> len(train), len(test), sum(train.labels)
    (32, 8, 16)
    """
    sizes = [len(stretches.get(name, ())) for name in names]
    if len(names) < 2 or min(sizes) < 20:
        raise InputError(f"a task of topics needs two packages or more of 20 stretches at least, got {list(names)}")
    rng, size = random.Random(seed), min(each, *sizes)
    parts: tuple[list[tuple[str, str, int]], list[tuple[str, str, int]]] = ([], [])
    for label, name in enumerate(names):
        cut = round((1 - _TEST) * len(stretches[name]))
        for part, share, pool in (
            (parts[0], 1 - _TEST, stretches[name][:cut]),
            (parts[1], _TEST, stretches[name][cut:]),
        ):
            part += [(stretch, "", label) for stretch in rng.sample(list(pool), min(len(pool), round(share * size)))]
    return _pairs(parts[0], rng), _pairs(parts[1], rng)


def word_tokenizer(sentences: Iterable[str], size: int = 3000) -> PreTrainedTokenizerBase:
    """A tokenizer of lower-case words, numbers and signs for encoders that are trained here: the `size` commonest.

    It writes [CLS] A [SEP] B [SEP], as BERT's does, and saves and loads as any other. Raises InputError for a size that
    leaves no word.

    >>> word_tokenizer(["the cat", "the dog"], size=7).tokenize("The cat!")
    ['the', 'cat', '[UNK]']
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    if size <= len(_SPECIAL):
        raise InputError(f"a vocabulary needs more than its {len(_SPECIAL)} special tokens, got {size}")
    split = pre_tokenizers.BertPreTokenizer()
    counts = Counter(word for s in sentences for word, _ in split.pre_tokenize_str(s.lower()))
    common = sorted(counts, key=lambda word: (-counts[word], word))[: size - len(_SPECIAL)]
    ids = {word: i for i, word in enumerate((*_SPECIAL, *common))}
    made = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), split
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), _SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Pairs, length: int = 48
) -> tuple[dict[str, Tensor], Tensor]:
    """What a classifier takes, int64 ``[n, length]`` each: `input_ids`, `attention_mask`, `token_type_ids`; and labels ``[n]``.

    Longer examples are cut, the longer sentence first. Raises InputError for a length without room.
    """
    if length < 8:
        raise InputError(f"pairs need a length of 8 tokens at least, got {length}")
    second = list(pairs.second) if any(pairs.second) else None
    encoded = tokenizer(
        list(pairs.first),
        second,
        truncation="longest_first" if second else True,
        padding="max_length",
        max_length=length,
        return_token_type_ids=True,
        return_tensors="pt",
    )
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    return inputs, torch.tensor(pairs.labels)
