"""Methods that skip neurons and channels."""

from gossamer.activations import mohd

__all__ = ["mohd"]
