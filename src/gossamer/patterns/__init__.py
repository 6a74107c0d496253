"""SELECT: budgets, and the shapes of what is kept."""

from gossamer.patterns.area import AreaMeter, causal_pairs
from gossamer.patterns.budget import Budget, resolve
from gossamer.patterns.neurons import NeuronRule
from gossamer.patterns.quantiles import MagnitudeSketch, exact_quantile

__all__ = ["AreaMeter", "Budget", "MagnitudeSketch", "NeuronRule", "causal_pairs", "exact_quantile", "resolve"]
