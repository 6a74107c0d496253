"""Methods that skip neurons and channels.

Importing this package registers them; a new one is a file here and a line below.
"""

from gossamer.activations import moe_x, mohd
from gossamer.activations.base import ActivationHandle, ActivationMethod

__all__ = ["ActivationHandle", "ActivationMethod", "moe_x", "mohd"]
