"""Gossamer: sparse neural networks whose sparsity can be felt."""

__version__ = "0.1.0"
