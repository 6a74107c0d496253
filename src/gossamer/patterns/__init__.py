"""SELECT: budgets, and the shapes of what is kept."""

from gossamer.patterns.area import AreaMeter, causal_pairs
from gossamer.patterns.budget import Budget, resolve

__all__ = ["AreaMeter", "Budget", "causal_pairs", "resolve"]
