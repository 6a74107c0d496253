"""Methods that prune, mask, slice and restructure weights.

Importing this package registers them; a new one is a file here and a line below.
"""

from gossamer.weights import essential_sparsity, native_linear, prune, sparse_model_soups, spdf

__all__ = ["essential_sparsity", "native_linear", "prune", "sparse_model_soups", "spdf"]
