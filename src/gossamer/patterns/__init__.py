"""SELECT: budgets, and the shapes of what is kept."""

from gossamer.patterns.budget import Budget, resolve

__all__ = ["Budget", "resolve"]
