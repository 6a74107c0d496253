"""SELECT: budgets, and the shapes of what is kept."""

from gossamer.patterns.area import AreaMeter, causal_pairs
from gossamer.patterns.budget import Budget, resolve
from gossamer.patterns.neurons import NeuronRule
from gossamer.patterns.quantiles import MagnitudeSketch, exact_quantile, threshold_at
from gossamer.patterns.schedules import SineStages
from gossamer.patterns.trees import Tree

__all__ = [
    "AreaMeter",
    "Budget",
    "MagnitudeSketch",
    "NeuronRule",
    "SineStages",
    "Tree",
    "causal_pairs",
    "exact_quantile",
    "resolve",
    "threshold_at",
]
