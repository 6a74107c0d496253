"""ReLU in place of another activation, and a shifted threshold, as changes of a model that its checkpoint remembers.

    ReLU(z) = max(z, 0)      FATReLU_t(z) = z if z >= t else 0      shifted ReLU_b(z) = max(z − b, 0)

`relufy` changes the configuration too, so that what `save_pretrained` writes is an ordinary ReLU checkpoint. A shift has no
name in transformers: the configuration keeps it as `relu_shift` ("fatrelu" or "shiftrelu") and `hidden_act_param` (t or b,
the name that released ProSparse and MiniCPM checkpoints use), which transformers carries along and ignores; `restore_shift`
puts it on a model that was loaded from there.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.errors import InputError, ModelError
from gossamer.hf import mlp_views

Shift = Literal["fatrelu", "shiftrelu"]

# What configurations call the activation of their MLPs.
_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation")
_SHIFT, _PARAMETER = "relu_shift", "hidden_act_param"


def fatrelu(z: Tensor, t: float) -> Tensor:
    """z where ``z >= t``, else 0. A NaN stays one.

    >>> fatrelu(torch.tensor([-1.0, 0.25, 0.5, 2.0]), 0.5).tolist()
    [0.0, 0.0, 0.5, 2.0]
    """
    return torch.where(z < t, 0, z)


def shifted_relu(z: Tensor, b: float) -> Tensor:
    """``max(z − b, 0)``: unlike FATReLU it also lowers what it keeps.

    >>> shifted_relu(torch.tensor([-1.0, 0.25, 2.0]), 0.5).tolist()
    [0.0, 0.0, 1.5]
    """
    return torch.relu(z - b)


class FATReLU(nn.Module):
    """`fatrelu` as a module.

    >>> FATReLU(0.5)(torch.tensor([0.4, 0.5]))
    tensor([0.0000, 0.5000])
    """

    def __init__(self, t: float) -> None:
        super().__init__()
        self.t = t

    def forward(self, z: Tensor) -> Tensor:
        """Of pre-activations of any shape."""
        return fatrelu(z, self.t)

    def extra_repr(self) -> str:
        """The threshold."""
        return f"t={self.t:g}"


class ShiftedReLU(nn.Module):
    """`shifted_relu` as a module.

    >>> ShiftedReLU(0.5)(torch.tensor([0.4, 0.75]))
    tensor([0.0000, 0.2500])
    """

    def __init__(self, b: float) -> None:
        super().__init__()
        self.b = b

    def forward(self, z: Tensor) -> Tensor:
        """Of pre-activations of any shape."""
        return shifted_relu(z, self.b)

    def extra_repr(self) -> str:
        """The bias."""
        return f"b={self.b:g}"


def strict_threshold(t: float, dtype: torch.dtype) -> Tensor:
    """The s for which ``|relu(z)| > s`` keeps the non-zero outputs of ``z >= t``: the largest number of `dtype` below t.

    >>> s = strict_threshold(0.5, torch.float32)
    >>> bool(s < 0.5), bool(torch.nextafter(s, torch.tensor(1.0)) == 0.5)
    (True, True)
    """
    number = torch.tensor(t, dtype=dtype)
    return torch.nextafter(number, torch.zeros_like(number)).float()


def relufy(model: nn.Module) -> None:
    """Make ReLU the activation of every MLP, in place, and say so in the configuration.

    The configuration is the truth: a skeleton is built from the changed one, without weights, and what it has for ReLUs (the
    transform of a masked-language head that shares the setting included) the model gets. A shift is taken off.

    Raises:
        ModelError: no MLP was found, the model is no transformers model (wrap it later), or its configuration does not
            decide the activation.

    >>> from gossamer.models import tiny_model
    >>> model = tiny_model("llama")
    >>> relufy(model)
    >>> model.config.hidden_act, model.model.layers[0].mlp.act_fn
    ('relu', ReLU())
    """
    mlp_views(model)
    config, kind = getattr(model, "config", None), type(model).__name__
    if config is None:
        raise ModelError(f"{kind} has no configuration: relufy a transformers model, before anything wraps it")
    changed = copy.deepcopy(config)
    _say_relu(changed)
    build: Any = type(model)
    try:
        with torch.device("meta"):
            skeleton = build(changed)
        ours = dict(model.named_modules())
        relus = [name for name, m in skeleton.named_modules() if isinstance(m, nn.ReLU) and name in ours]
    except Exception as error:  # any class of model, with errors of any kind
        raise ModelError(f"{kind} cannot be built from its configuration: {' '.join(str(error).split())}") from None
    if not all(isinstance(view.activation, nn.ReLU) for view in mlp_views(skeleton)):
        raise ModelError(f"the activation of {kind} cannot be set to ReLU in its configuration")
    for name in relus:
        if not isinstance(ours[name], nn.ReLU):
            model.set_submodule(name, nn.ReLU())
    _say_relu(config)
    for field in (_SHIFT, _PARAMETER):
        config.__dict__.pop(field, None)


def _say_relu(config: Any) -> None:
    for name in ("", *getattr(config, "sub_configs", {})):
        part: Any = getattr(config, name, None) if name else config
        for field in _FIELDS:
            if isinstance(getattr(part, field, None), str):
                setattr(part, field, "relu")
        if isinstance(getattr(part, "feed_forward_proj", None), str):  # T5 writes gate and activation in one word
            gated = str(part.feed_forward_proj).startswith("gated-")
            part.feed_forward_proj, part.dense_act_fn = "gated-relu" if gated else "relu", "relu"


def shift_threshold(model: nn.Module, t: float) -> None:
    """Lift the threshold of every MLP's ReLU to t (FATReLU), in place and in the configuration; 0 makes it a ReLU again.

    Raises:
        InputError: t is negative or not finite.
        ModelError: some MLP is not a ReLU one: `relufy` and train it first.
    """
    _shift(model, "fatrelu", t)


def shift_relu(model: nn.Module, b: float) -> None:
    """Put ``max(z − b, 0)`` in place of every MLP's ReLU, in place and in the configuration: the shifted-ReLU baseline.

    Raises:
        InputError, ModelError: as `shift_threshold`.
    """
    _shift(model, "shiftrelu", b)


def _shift(model: nn.Module, kind: Shift, value: float) -> None:
    if not 0 <= value < math.inf:
        raise InputError(f"a ReLU is shifted by a number that is not negative, got {value:g}")
    check_relu(model)
    config: Any = model.config
    for view in mlp_views(model):
        view.replace_activation(activation_of(kind, value))
    for field, content in ((_SHIFT, kind), (_PARAMETER, float(value))):
        if value:
            setattr(config, field, content)
        else:
            config.__dict__.pop(field, None)


def activation_of(kind: Shift, value: float) -> nn.Module:
    """The module of a shift."""
    if not value:
        return nn.ReLU()
    return FATReLU(value) if kind == "fatrelu" else ShiftedReLU(value)


def check_relu(model: nn.Module) -> None:
    """Raise `ModelError` unless every MLP's activation is a ReLU, shifted or not."""
    for view in mlp_views(model):
        if not isinstance(view.activation, nn.ReLU | FATReLU | ShiftedReLU):
            raise ModelError(
                f"{view.name} has the activation {type(view.activation).__name__}, which makes no zeros: relufy the model and "
                "train it on"
            )


def shift_of(model: nn.Module) -> tuple[Shift, float]:
    """What the configuration says of a shift; t = 0 where it says nothing.

    Raises:
        ModelError: it says something that is no shift.
    """
    config = getattr(model, "config", None)
    kind, value = getattr(config, _SHIFT, None), getattr(config, _PARAMETER, None)
    if kind is None:
        return "fatrelu", 0.0
    if kind not in ("fatrelu", "shiftrelu") or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ModelError(
            f"the configuration has {_SHIFT}={kind!r} and {_PARAMETER}={value!r}: this is no shift of a ReLU"
        )
    return kind, float(value)


def restore_shift(model: nn.Module) -> None:
    """Put the shift that the configuration remembers on a model that transformers loaded.

    Raises:
        ModelError: the configuration or an activation is of another kind.
    """
    _shift(model, *shift_of(model))
