"""Methods that prune, mask, slice and restructure weights.

Importing this package registers them; a new one is a file here and a line below.
"""

from gossamer.weights import masksparsity, native_linear, pat, prune

__all__ = ["masksparsity", "native_linear", "pat", "prune"]
