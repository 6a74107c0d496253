"""Checkpoints of the training loop, so that an interrupted run goes on where it stood.

    with resumable(folder):
        train(model, batches, plan)      # killed and started again, it skips the steps that are done

The runs inside are numbered in the order in which they start. A checkpoint holds weights, buffers, the optimizer's state,
torch's random state and the curve, in safetensors; it belongs to a plan and to parameters of these names and shapes, and any
other run ignores it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gossamer.files import save_tensors

_folder: Path | None = None
_every, _count = 100, 0


@contextmanager
def resumable(folder: Path, every: int = 100) -> Iterator[None]:
    """Let every `train` inside write a checkpoint each `every` steps, and begin from the one that is there."""
    global _folder, _every, _count
    before = _folder, _every, _count
    _folder, _every, _count = folder, every, 0
    try:
        yield
    finally:
        _folder, _every, _count = before


def next_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, plan: str) -> Checkpoint | None:
    """The checkpoint of the run that starts now; None outside of `resumable`."""
    global _count
    if _folder is None:
        return None
    _count += 1
    return Checkpoint(_folder / f"{_count}.safetensors", model, optimizer, plan)


class Checkpoint:
    """One run's file."""

    def __init__(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, plan: str) -> None:
        self.path, self.model, self.optimizer = path, model, optimizer
        shapes = [(n, list(t.shape), str(t.dtype)) for n, t in model.state_dict().items()]
        self.name = hashlib.sha256(json.dumps([plan, shapes]).encode()).hexdigest()

    def load(self, curve: list[dict[str, float]]) -> int:
        """Put the state there, if there is one of this run; returns the steps that are done."""
        try:
            with safe_open(self.path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})["run"])
                if facts["name"] != self.name:
                    return 0
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return 0
        self.model.load_state_dict(
            {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}, strict=False
        )
        state: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in facts["scalars"].items()}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": facts["groups"]})
        torch.set_rng_state(tensors["random"])
        curve[:] = facts["curve"]
        return int(facts["done"])

    def after(self, step: int, steps: int, curve: list[dict[str, float]]) -> None:
        """Write the state if it is time, or the run ends.

        Raises:
            OutputError: it can't be written.
        """
        if (step + 1) % _every and step + 1 < steps:
            return
        saved, tensors = self.optimizer.state_dict(), {}
        seen: set[int] = set()
        for name, value in self.model.state_dict().items():  # tied weights once
            if value.data_ptr() not in seen or not value.numel():
                seen.add(value.data_ptr())
                tensors[f"model.{name}"] = value
        scalars: dict[str, dict[str, Any]] = {}
        for index, values in saved["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    scalars.setdefault(str(index), {})[name] = value
        tensors["random"] = torch.get_rng_state()
        facts = {
            "name": self.name,
            "done": step + 1,
            "curve": curve,
            "groups": saved["param_groups"],
            "scalars": scalars,
        }
        save_tensors(self.path, tensors, {"run": json.dumps(facts)}, "the checkpoint")
