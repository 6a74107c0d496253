"""SPDF's first phase: training under a static mask, with checkpoints that store active weights and moments only."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gossamer.errors import InputError
from gossamer.files import save_tensors
from gossamer.models import Plan, Training, train
from gossamer.patterns import Masks
from gossamer.weights.base import Progress, silent

_MOMENTS = ("exp_avg", "exp_avg_sq")


class SparsePretrain:
    """Phase 1: training under a static mask that can be stopped, saved and gone on with.

    Attributes:
        model, masks, plan: as given; masked weights are set to zero now.
        optimizer: AdamW by the plan.
        done: steps that were done.

    Raises:
        ModelError: the masks are of another model.

    >>> from gossamer.models import tiny_model
    >>> model = tiny_model("gpt2")
    >>> from gossamer.models import block_batches
    >>> from gossamer.weights.spdf import static_random_masks
    >>> run = SparsePretrain(model, static_random_masks(model, 0.5), Plan(steps=4, warmup=1))
    >>> batches = list(block_batches(torch.arange(64).view(4, 16), 2, 4))
    >>> training = run.run(batches[:2], until=2); training = run.run(batches[2:])
    >>> run.done, Masks.of(model, 0.4).sparsity
    (4, 0.5)
    """

    def __init__(self, model: nn.Module, masks: Masks, plan: Plan) -> None:
        masks.apply(model)
        self.model, self.masks, self.plan, self.done = model, masks, plan, 0
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay
        )

    def run(
        self, batches: Iterable[Any], until: int | None = None, progress: Progress = silent, **settings: Any
    ) -> Training:
        """Go on to step `until` (default: the plan's last) on these batches; other settings are those of `train`."""
        span = range(self.done, self.plan.steps if until is None else min(until, self.plan.steps))
        training = train(
            self.model,
            batches,
            self.plan,
            masks=self.masks,
            optimizer=self.optimizer,
            span=span,
            progress=progress,
            **settings,
        )
        self.done = span.stop
        return training

    def save(self, folder: str | Path) -> Path:
        """Write the masks (a bit an entry) and the state: of masked matrices only active weights and moments are stored.

        Raises:
            OutputError: it can't be written.
        """
        folder = Path(folder)
        self.masks.save(folder / "masks.safetensors")
        tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state.get(parameter, {})
            parts = {"weight": parameter.detach(), **{key: state[key] for key in _MOMENTS if key in state}}
            for key, value in parts.items():
                kept = value[self.masks[name].to(value.device)] if name in self.masks else value
                tensors[f"{key}/{name}"] = kept
        header = {"done": str(self.done), "plan": json.dumps(asdict(self.plan))}
        save_tensors(folder / "state.safetensors", tensors, header, "the checkpoint")
        return folder

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module) -> Self:
        """Go on from what `save` wrote, into a model of the same shape; torch's random state is set as it was.

        Raises:
            InputError: masks or state are missing or damaged.
            ModelError: it is of another model.
        """
        folder = Path(folder)
        masks = Masks.load(folder / "masks.safetensors")
        for _ in masks.parameters(model):
            pass  # another model is found out before anything changes
        try:
            with safe_open(folder / "state.safetensors", framework="pt") as file:
                header = file.metadata() or {}
                plan = json.loads(header["plan"])
                run = cls(model, masks, Plan(**{**plan, "betas": tuple(plan["betas"])}))
                run.done = int(header["done"])
                stored = set(file.keys())
                for name, parameter in model.named_parameters():
                    mask = masks.get(name)
                    with torch.no_grad():
                        parameter.copy_(_spread(file.get_tensor(f"weight/{name}"), mask, parameter))
                    if f"{_MOMENTS[0]}/{name}" in stored:
                        moments = {k: _spread(file.get_tensor(f"{k}/{name}"), mask, parameter) for k in _MOMENTS}
                        run.optimizer.state[parameter] = {"step": torch.tensor(float(run.done)), **moments}
                torch.set_rng_state(file.get_tensor("rng"))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{folder} holds no checkpoint of this model, or a damaged one: {error}") from None
        return run


def _spread(values: Tensor, mask: Tensor | None, parameter: Tensor) -> Tensor:
    """Stored values in the parameter's shape, zero where the mask is."""
    if mask is None:
        return values.to(parameter.device).view(parameter.shape)
    full = torch.zeros(mask.shape, dtype=values.dtype)
    full[mask.cpu()] = values
    return full.to(parameter.device)
