"""Methods that choose which keys a query reads.

Importing this package registers them; a new one is a file here and a line below.
"""

from gossamer.attention import (
    alisa,
    controls,
    double_sparsity,
    hip_attention,
    quest,
    sparq,
    streaming_llm,
    tidaldecode,
    tokenselect,
    zipvl,
)
from gossamer.attention.base import AttentionHandle, AttentionMethod, attach

__all__ = [
    "AttentionHandle",
    "AttentionMethod",
    "alisa",
    "attach",
    "controls",
    "double_sparsity",
    "hip_attention",
    "quest",
    "sparq",
    "streaming_llm",
    "tidaldecode",
    "tokenselect",
    "zipvl",
]
