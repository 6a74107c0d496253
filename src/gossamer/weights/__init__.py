"""Methods that prune, mask, slice and restructure weights.

Importing this package registers them; a new one is a file here and a line below.
"""

from gossamer.weights import cfsp, native_linear, neuron_baselines, prune, slicegpt, sparse_linear

__all__ = ["cfsp", "native_linear", "neuron_baselines", "prune", "slicegpt", "sparse_linear"]
