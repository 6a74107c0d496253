"""One small, honest experiment for each system: the paper's claim, a measurement, a verdict by a threshold set beforehand."""

from gossamer.reproductions.base import Outcome, Reproduction, reproductions, run, scoreboard

__all__ = ["Outcome", "Reproduction", "reproductions", "run", "scoreboard"]
