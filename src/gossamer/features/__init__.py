"""Sparse autoencoders: models, training, analysis."""
