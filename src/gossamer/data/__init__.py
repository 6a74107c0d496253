"""Data that needs no network: texts, bytes and synthetic tasks, all seeded."""

from gossamer.data.bytes import byte_batches, byte_corpus
from gossamer.data.pairs import (
    Pairs,
    encode_pairs,
    library_stretches,
    make_pairs,
    make_topics,
    sentences,
    word_tokenizer,
)
from gossamer.data.tasks import TASKS, Example, encode, make_task
from gossamer.data.text import split, text, token_blocks

__all__ = [
    "TASKS",
    "Example",
    "Pairs",
    "byte_batches",
    "byte_corpus",
    "encode",
    "encode_pairs",
    "library_stretches",
    "make_pairs",
    "make_task",
    "make_topics",
    "sentences",
    "split",
    "text",
    "token_blocks",
    "word_tokenizer",
]
