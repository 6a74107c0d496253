"""Methods that prune, mask, slice and restructure weights.

Importing this package registers them; a new one is a file here and a line below.
"""

from gossamer.weights import dsee, native_linear, prune, pst

__all__ = ["dsee", "native_linear", "prune", "pst"]
