"""Methods that skip neurons and channels.

Importing this package registers them; a new one is a file here and a line below.
"""

from gossamer.activations.base import ActivationHandle, ActivationMethod
from gossamer.activations.griffin import Griffin
from gossamer.activations.sirius import Sirius

__all__ = ["ActivationHandle", "ActivationMethod", "Griffin", "Sirius"]
