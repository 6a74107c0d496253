"""The errors a user can cause. Each message is one line that says what to do."""

from __future__ import annotations


class GossamerError(Exception):
    """Base of every error that is the caller's to mend; the command prints its message as one line."""


class UnknownNameError(GossamerError):
    """A method, model, operator or task name that is not known."""


class ModelError(GossamerError):
    """A model that cannot be loaded, or whose family a method does not support."""


class CalibrationError(GossamerError):
    """A calibration that is missing, damaged, not finite, or made for another model."""


class RecipeError(GossamerError):
    """A recipe that is malformed, or whose methods claim the same place."""


class BackendError(GossamerError):
    """A kernel backend that was asked for by name but is not present."""


class InputError(GossamerError, ValueError):
    """An argument out of range or of the wrong shape; raised before any kernel runs."""


class OutputError(GossamerError):
    """An output file or folder that cannot be written."""
