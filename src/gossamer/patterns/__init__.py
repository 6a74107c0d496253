"""SELECT: budgets, and the shapes of what is kept."""

from gossamer.patterns.area import AreaMeter, causal_pairs
from gossamer.patterns.budget import Budget, resolve
from gossamer.patterns.masks import Masks, Scope, choose
from gossamer.patterns.neurons import NeuronRule
from gossamer.patterns.quantiles import MagnitudeSketch, exact_quantile, threshold_at
from gossamer.patterns.schedules import SineStages
from gossamer.patterns.second_order import second_order_prune
from gossamer.patterns.structures import Structure, keep_largest, nm_mask
from gossamer.patterns.trees import Tree

__all__ = [
    "AreaMeter",
    "Budget",
    "MagnitudeSketch",
    "Masks",
    "NeuronRule",
    "Scope",
    "SineStages",
    "Structure",
    "Tree",
    "causal_pairs",
    "choose",
    "exact_quantile",
    "keep_largest",
    "nm_mask",
    "resolve",
    "second_order_prune",
    "threshold_at",
]
