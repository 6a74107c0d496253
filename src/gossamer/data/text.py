"""Text that needs no network: reference prose and source code from the Python installation, or the user's own files.

    from gossamer.data import split, text, token_blocks
    calibration = token_blocks(tokenizer, split(text("prose"), "calibration"), block=512, count=16)

What a method is calibrated on and what it is measured on must not overlap: `split` cuts a text into two disjoint parts.
"""

from __future__ import annotations

import functools
import os
import random
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from gossamer.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Part = Literal["calibration", "evaluation"]

# The part of a text that calibration may see; the rest is for evaluation.
CALIBRATION_SHARE = 1 / 3
CODE_CHARACTERS = 1_000_000
_SUFFIXES = (".txt", ".md")
# Shorter paragraphs (headings, "See also" lines, brackets) repeat for good reasons.
_REPEAT_FROM_CHARACTERS = 60


def text(source: str | os.PathLike[str] = "prose") -> str:
    """A long text.

    source: `prose`, the reference manual that comes with Python (English; in Python 3.11 373,000 characters, about
        91,000 SmolLM2 tokens); `code`, the standard library's modules up to a million characters (260,000 tokens); or
        the path of a text file, or of a folder whose `.txt` and `.md` files, at any depth, are joined in the order of
        their paths.

    The same Python release gives the same text. Paragraphs of the manual that occur twice are kept once: a model finds
    repeated text easy, and a repeat could sit in both parts of `split`.

    Raises InputError if there is no such file or folder, if it cannot be read, is not UTF-8 text, or is empty.
    """
    if source == "prose":
        return _prose()
    if source == "code":
        return _code()
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
        if not files:
            raise InputError(f"the folder {path} holds no .txt or .md files")
    elif path.exists():
        files = [path]
    else:
        raise InputError(
            f"there is no text {str(source)!r}: give prose, code, a file, or a folder of .txt and .md files"
        )
    joined = "\n\n".join(_read(file) for file in files)
    if not joined.strip():
        raise InputError(f"the text in {path} is empty")
    return joined


def split(text: str, part: Part) -> str:
    """One of two disjoint parts of a text: the first third for `calibration`, the rest for `evaluation`.

    The cut is at the first empty line after a third of the characters, else at the next line, else exactly there. The
    two parts joined are the text. Raises InputError for another part.
    """
    start = int(len(text) * CALIBRATION_SHARE)
    cut = start
    for gap in ("\n\n", "\n"):
        found = text.find(gap, start)
        if found >= 0 and found + len(gap) < len(text):
            cut = found + len(gap)
            break
    if part == "calibration":
        return text[:cut]
    if part == "evaluation":
        return text[cut:]
    raise InputError(f"unknown part {part!r}: use calibration or evaluation")


def token_blocks(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    block: int,
    count: int,
    *,
    offset: int = 0,
    seed: int | None = None,
) -> torch.Tensor:
    """Blocks of a text's tokens that do not overlap: int64 [count, block]. No special tokens are added.

    block: tokens in a block. count: blocks wanted. offset: tokens to leave out at the start of the text.
    seed: None takes the first `count` blocks in order; a number draws `count` different ones at random.

    Raises InputError for sizes below one, and, saying how many tokens there are, for a text that is too short.
    """
    if block < 1 or count < 1 or offset < 0:
        raise InputError(f"block and count must be at least 1 and offset at least 0, not {block}, {count}, {offset}")
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    available = max(0, len(tokens) - offset) // block
    if available < count:
        raise InputError(
            f"the text is too short: it has {len(tokens)} tokens, "
            f"and {count} blocks of {block} from token {offset} on need {offset + count * block}"
        )
    chosen = range(count) if seed is None else random.Random(seed).sample(range(available), count)
    rows = [tokens[offset + index * block : offset + (index + 1) * block] for index in chosen]
    return torch.tensor(rows, dtype=torch.int64)


@functools.cache
def _prose() -> str:
    from pydoc_data.topics import topics

    # Many topics are sections of longer ones. Going from long to short, a topic that says mostly what was said before
    # is left out whole; the rest lose the paragraphs that were.
    seen: set[str] = set()
    kept = {}
    for title in sorted(topics, key=lambda title: (-len(topics[title]), title)):
        paragraphs = topics[title].strip().split("\n\n")
        new = []
        for paragraph in paragraphs:
            words = " ".join(paragraph.split())
            if len(words) < _REPEAT_FROM_CHARACTERS or words not in seen:
                new.append(paragraph.rstrip())
                seen.add(words)
        if sum(map(len, new)) > sum(map(len, paragraphs)) / 2:
            kept[title] = "\n\n".join(new)
    return "\n\n\n".join(kept[title] for title in sorted(kept))


@functools.cache
def _code() -> str:
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts, length = [], 0
    for file in sorted(folder.glob("*.py")):
        if length >= CODE_CHARACTERS:
            break
        part = f"# {file.name}\n{_read(file)}"
        parts.append(part)
        length += len(part) + 1
    if not parts:
        raise InputError(f"there are no standard library sources in {folder}: use prose or a file")
    return "\n".join(parts)[:CODE_CHARACTERS]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text") from error
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
