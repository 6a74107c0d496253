"""Methods that prune, mask, slice and restructure weights.

Importing this package registers them; a new one is a file here and a line below.
"""

from gossamer.weights import (
    cfsp,
    cpu_block_spmm,
    dsee,
    essential_sparsity,
    masksparsity,
    native_linear,
    neuron_baselines,
    pat,
    prune,
    pst,
    slicegpt,
    sparse_linear,
    sparse_model_soups,
    spdf,
    squarehead,
)

__all__ = [
    "cfsp",
    "cpu_block_spmm",
    "dsee",
    "essential_sparsity",
    "masksparsity",
    "native_linear",
    "neuron_baselines",
    "pat",
    "prune",
    "pst",
    "slicegpt",
    "sparse_linear",
    "sparse_model_soups",
    "spdf",
    "squarehead",
]
