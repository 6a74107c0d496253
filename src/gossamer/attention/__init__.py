"""Methods that choose which keys a query reads.

Importing this package registers them; a new one is a file here and a line below.
"""

from gossamer.attention import (
    controls,
    double_sparsity,
    hip_attention,
    quest,
    seerattention,
    sparq,
    streaming_llm,
    tidaldecode,
    tokenselect,
)
from gossamer.attention.base import AttentionHandle, AttentionMethod, attach

__all__ = [
    "AttentionHandle",
    "AttentionMethod",
    "attach",
    "controls",
    "double_sparsity",
    "hip_attention",
    "quest",
    "seerattention",
    "sparq",
    "streaming_llm",
    "tidaldecode",
    "tokenselect",
]
