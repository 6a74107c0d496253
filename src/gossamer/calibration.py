"""What a method learned from data, in one safetensors file that says which model it belongs to."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gossamer.errors import CalibrationError
from gossamer.files import save_tensors

_FORMAT = 1


@dataclass(frozen=True)
class Calibration:
    """Tensors and facts from a calibration run.

    Attributes:
        method: slug of the method that made it.
        fingerprint: of the model it was made on (`gossamer.models.fingerprint`).
        tensors: what was learned, by name; finite.
        facts: settings of the run that are worth keeping (samples, block size, text), JSON types only.
    """

    method: str
    fingerprint: str
    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CalibrationError(
                    f"calibration of {self.method}: {name} is not finite: check the model's weights and the texts"
                )

    def check(self, fingerprint: str) -> None:
        """Raise `CalibrationError` unless it was made for the model with this fingerprint."""
        if self.fingerprint != fingerprint:
            raise CalibrationError(
                f"this {self.method} calibration was made for another model (its fingerprint {self.fingerprint}, "
                f"this model's {fingerprint}): calibrate again"
            )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, its facts as JSON in the header; complete or not at all.

        Raises:
            OutputError: the folder cannot be written.
        """
        facts = {"format": _FORMAT, "method": self.method, "fingerprint": self.fingerprint, "facts": self.facts}
        return save_tensors(path, self.tensors, {"gossamer": json.dumps(facts)}, "the calibration")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file that `save` wrote.

        Raises:
            CalibrationError: missing, truncated, not a calibration, or not finite.
        """
        path = Path(path)
        if not path.is_file():
            raise CalibrationError(f"no calibration file at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})["gossamer"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            if facts["format"] != _FORMAT:
                raise CalibrationError(f"{path} has calibration format {facts['format']}, this version reads {_FORMAT}")
            return cls(facts["method"], facts["fingerprint"], tensors, facts["facts"])
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
            raise CalibrationError(
                f"{path} is damaged or no calibration ({type(error).__name__}): calibrate again"
            ) from None
