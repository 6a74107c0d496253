"""Methods that prune, mask, slice and restructure weights.

Importing this package registers them; a new one is a file here and a line below.
"""

from gossamer.weights import cpu_block_spmm, native_linear, prune, sparse_linear

__all__ = ["cpu_block_spmm", "native_linear", "prune", "sparse_linear"]
