"""Data that needs no network: texts, bytes and synthetic tasks, all seeded."""

from gossamer.data.bytes import byte_batches, byte_corpus
from gossamer.data.tasks import TASKS, Example, encode, make_task
from gossamer.data.text import split, text, token_blocks

__all__ = ["TASKS", "Example", "byte_batches", "byte_corpus", "encode", "make_task", "split", "text", "token_blocks"]
