"""The base of this family's methods: rules for neurons and channels, learned from dense activations, put on a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError, InputError, RecipeError
from gossamer.hf import ChannelRuntime, MLPRuntime, NeuronPolicy
from gossamer.hf.channels import Mode
from gossamer.models import fingerprint
from gossamer.patterns import NeuronRule
from gossamer.registry import Handle, Method

#: Takes (what is going on, steps done, steps in all).
Progress = Callable[[str, int, int], None]


def device_of(module: nn.Module) -> torch.device:
    """Where a module's weights lie; rules for it go there too."""
    return next(module.parameters()).device


@dataclass(eq=False)
class ActivationHandle(Handle):
    """An attached activation method.

    Attributes:
        mlp: the run of the MLPs, None where the method leaves them alone.
        channels: the run of other linear layers, None likewise.
    """

    mlp: MLPRuntime | None = field(default=None, kw_only=True)
    channels: ChannelRuntime | None = field(default=None, kw_only=True)


class ActivationMethod(Method):
    """Base of post-training methods: one gives `neuron_policy`, `channel_rules`, or both."""

    mode: Mode = Field(
        "auto", description="mask: compute all, then zero; gather: read only what is kept; auto: where it can"
    )
    int8: bool = Field(False, description="decode steps read a copy of the MLP weights in 8 bits")

    def calibrate(self, model: nn.Module, tokens: Tensor) -> Calibration:
        """Learn what `attach` needs from token blocks ``[count, block]``.

        Raises:
            RecipeError: this method needs no calibration.
        """
        raise RecipeError(f"{self.slug} needs no calibration")

    def learned(self, model: nn.Module, calibration: Calibration | None, *names: str) -> Calibration:
        """The calibration, checked: of this method and this model, with the tensors called `names`.

        Raises:
            CalibrationError: it is missing, or any of this does not hold.
        """
        calibration = self.require(calibration)
        calibration.check(fingerprint(cast(Any, model)))
        missing = [name for name in names if name not in calibration.tensors]
        if missing:
            raise CalibrationError(f"this {self.slug} calibration has no {', '.join(missing)}: calibrate again")
        return calibration

    def io_bytes(self, channels: int, neurons: int, kept: float, element_size: int, gated: bool = True) -> float:
        """Bytes of one MLP's weights that a decode step must read where `kept` neurons are kept by any of its rows.

        The gate (in a plain MLP: up) is read whole to judge, the rest for what is kept.
        """
        return channels * element_size * (neurons + (2 if gated else 1) * kept)

    @classmethod
    def with_share(cls, kept: float) -> Self:
        """Settings with which tokens compute this share of the neurons; for methods with a `sparsity`.

        Raises:
            InputError: the method has no such setting.
        """
        if "sparsity" not in cls.model_fields:
            raise InputError(f"{cls.slug} cannot be set to a share of neurons")
        return cls(**{"sparsity": 1 - kept})

    def neuron_policy(self, model: nn.Module, calibration: Calibration | None) -> NeuronPolicy | None:
        """Which neurons the MLPs compute; None leaves them alone."""
        return None

    def channel_rules(self, model: nn.Module, calibration: Calibration | None) -> list[tuple[nn.Module, NeuronRule]]:
        """Other linear layers with rules for their inputs."""
        return []

    def attach(self, model: nn.Module, calibration: Calibration | None = None) -> ActivationHandle:
        """Put the method on a model; the handle takes it off again, bit for bit.

        Raises:
            CalibrationError: it needs a calibration of its own for this model.
            ModelError: the model has no MLP that it can serve.
        """
        policy = self.neuron_policy(model, calibration)
        rules = self.channel_rules(model, calibration)
        handle = ActivationHandle()
        reports: list[Any] = handle.reports
        if "sparsity" in type(self).model_fields:  # what was measured is always shown beside what was asked for
            target = {f"{self.slug}_target_sparsity": getattr(self, "sparsity")}  # noqa: B009
            reports.append(lambda: target)
        if policy is not None:
            handle.mlp = MLPRuntime(model, policy, self.mode, self.int8)
            handle.undo.append(handle.mlp.detach)
            reports.append(handle.mlp.report)
        if rules:
            try:
                handle.channels = ChannelRuntime(rules, self.mode)
            except BaseException:
                handle.detach()
                raise
            handle.undo.append(handle.channels.detach)
            reports.append(handle.channels.report)
        return handle
