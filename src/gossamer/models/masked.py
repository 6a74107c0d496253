"""Training under fixed masks: what is removed stays exactly zero, whatever the optimizer does.

holder = MaskHolder(model, masks, optimizer)      # or train(..., masks=masks)
loss.backward()                                   # gradients of removed entries are zero, before any clipping
optimizer.step()                                  # removed weights, and the optimizer's moments of them, are zero again

Gradient accumulation and mixed precision need nothing more. Momentum, Adam's moments and decoupled weight decay cannot
revive an entry. Under FSDP gradients appear without autograd's hooks: call `mask_gradients` before clipping there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import InputError
from gossamer.patterns import Masks


def _placed(mask: Tensor, parameter: Tensor) -> Tensor:
    """The mask where the parameter lies; sharded as the parameter is, if it is sharded."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return mask.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(mask, mesh, parameter.placements)  # type: ignore[attr-defined]


class MaskHolder:
    """Keeps masked weights, their gradients and their optimizer state at zero until `release`.

    Args:
        model: its masked weights are set to zero now.
        masks: by parameter name; `update` puts others in their place.
        optimizer: its steps are followed; None where `after_step` is called by hand.

    Raises:
        ModelError: the masks are of another model.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    >>> holder = MaskHolder(layer, Masks({"weight": torch.tensor([[True, False]])}), optimizer)
    >>> layer(torch.ones(1, 2)).sum().backward(); optimizer.step()
    >>> bool(layer.weight[0, 1] == 0)
    True
    """

    def __init__(self, model: nn.Module, masks: Masks, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model, self.optimizer = model, optimizer
        self.masks = Masks({})
        self._handles: list[Any] = []
        self._masks: dict[nn.Parameter, Tensor] = {}
        self.update(masks)
        for parameter in self._masks:
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._mask_gradient))
        if optimizer is not None:
            self._handles.append(optimizer.register_step_pre_hook(lambda *_: self.mask_gradients()))
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self.after_step()))

    def update(self, masks: Masks) -> None:
        """Other masks of the same parameters, from now on.

        Raises:
            InputError: they name other parameters.
        """
        if self.masks and set(masks) != set(self.masks):
            raise InputError("masks cannot be replaced by masks of other parameters")
        known = dict(self.model.named_parameters())
        pairs = [
            (known[name], mask) if hasattr(known.get(name), "device_mesh") else None for name, mask in masks.items()
        ]
        if any(pairs):
            self._masks = {p: _placed(m, p) for p, m in filter(None, pairs)}
        else:
            self._masks = dict(masks.parameters(self.model))
        self.masks = masks
        self.after_step()

    @torch.no_grad()
    def _mask_gradient(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            parameter.grad.mul_(self._masks[parameter])

    def mask_gradients(self) -> None:
        """Set the gradients of removed entries to zero."""
        for parameter in self._masks:
            self._mask_gradient(parameter)

    @torch.no_grad()
    def after_step(self) -> None:
        """Set removed weights, and what the optimizer remembers of them, to zero."""
        for parameter, mask in self._masks.items():
            parameter.mul_(mask)
            state: Mapping[str, Any] = self.optimizer.state.get(parameter, {}) if self.optimizer is not None else {}
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == mask.shape:
                    value.mul_(mask)

    def release(self) -> None:
        """Let go; the zeros stay in the weights, but training may fill them now."""
        while self._handles:
            self._handles.pop().remove()
