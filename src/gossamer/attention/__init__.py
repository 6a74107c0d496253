"""Methods that choose which keys a query reads.

Importing this package registers them; a new one is a file here and a line below.
"""

from gossamer.attention import (
    a_shape,
    alisa,
    controls,
    double_sparsity,
    hip_attention,
    minference,
    minference_static,
    quest,
    seerattention,
    sparq,
    streaming_llm,
    strided,
    tidaldecode,
    tokenselect,
    zipvl,
)
from gossamer.attention.base import AttentionHandle, AttentionMethod, attach

__all__ = [
    "AttentionHandle",
    "AttentionMethod",
    "a_shape",
    "alisa",
    "attach",
    "controls",
    "double_sparsity",
    "hip_attention",
    "minference",
    "minference_static",
    "quest",
    "seerattention",
    "sparq",
    "streaming_llm",
    "strided",
    "tidaldecode",
    "tokenselect",
    "zipvl",
]
