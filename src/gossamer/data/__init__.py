"""Data that needs no network: texts and synthetic tasks, all seeded."""

from gossamer.data.tasks import TASKS, Example, encode, make_task
from gossamer.data.text import split, text, token_blocks

__all__ = ["TASKS", "Example", "encode", "make_task", "split", "text", "token_blocks"]
