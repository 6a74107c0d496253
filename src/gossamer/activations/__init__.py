"""Methods that skip neurons and channels.

Importing this package registers them; a new one is a file here and a line below.
"""

from gossamer.activations import (
    cats,
    chess,
    delta_activation,
    griffin,
    lazy_neuron,
    moe_x,
    mohd,
    neuron_baselines,
    prosparse,
    prosparse_predictor,
    sirius,
    sparsing_law,
)
from gossamer.activations.base import ActivationHandle, ActivationMethod

__all__ = [
    "ActivationHandle",
    "ActivationMethod",
    "cats",
    "chess",
    "delta_activation",
    "griffin",
    "lazy_neuron",
    "moe_x",
    "mohd",
    "neuron_baselines",
    "prosparse",
    "prosparse_predictor",
    "sirius",
    "sparsing_law",
]
