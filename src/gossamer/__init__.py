"""Gossamer: sparse neural networks whose sparsity can be felt.

    import gossamer

    loaded = gossamer.load("smollm2")
    method = gossamer.make("double-sparsity", tokens="1/16")
    calibration = method.calibrate(loaded.model, gossamer.calibration_tokens(loaded))
    with method.attach(loaded.model, calibration):
        ...  # loaded.model.generate(…) as ever

Everything public is here; heavy modules are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Calibration": "gossamer.calibration",
    "GossamerError": "gossamer.errors",
    "LoadedModel": "gossamer.models",
    "Method": "gossamer.registry",
    "Plan": "gossamer.measure.compare",
    "Recipe": "gossamer.recipe",
    "calibration_tokens": "gossamer.measure.compare",
    "catalogue": "gossamer.registry",
    "compare": "gossamer.measure.compare",
    "generate": "gossamer.generation",
    "load": "gossamer.models",
    "make": "gossamer.registry",
    "method": "gossamer.registry",
    "methods": "gossamer.registry",
    "register": "gossamer.registry",
}
__all__ = ["__version__", *_WHERE]

if TYPE_CHECKING:
    from gossamer.calibration import Calibration
    from gossamer.errors import GossamerError
    from gossamer.generation import generate
    from gossamer.measure.compare import Plan, calibration_tokens, compare
    from gossamer.models import LoadedModel, load
    from gossamer.recipe import Recipe
    from gossamer.registry import Method, catalogue, make, method, methods, register


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'gossamer' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
