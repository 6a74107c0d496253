"""Learned and compressed tokenizations, and their generators."""
