"""Every prunable matrix of a model by name, with its role: the plug point of methods that change weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from gossamer.errors import ModelError
from gossamer.patterns import Masks

#: Last parts of dotted names, in every family that is known, by role.
_ROLES: tuple[tuple[str, str], ...] = (
    ("q", r"(q_proj|query|SelfAttention\.q|EncDecAttention\.q|self_attn\.q)"),
    ("k", r"(k_proj|key|SelfAttention\.k|EncDecAttention\.k)"),
    ("v", r"(v_proj|value|SelfAttention\.v|EncDecAttention\.v)"),
    (
        "o",
        r"(o_proj|out_proj|attention\.output\.dense|attn\.c_proj|attention\.dense|self_attn\.dense|SelfAttention\.o|EncDecAttention\.o)",
    ),
    ("qkv", r"(c_attn|qkv_proj|query_key_value|Wqkv)"),
    ("gate", r"(gate_proj|wi_0)"),
    ("gate_up", r"gate_up_proj"),
    ("up", r"(up_proj|wi_1|fc1|wi|c_fc|dense_h_to_4h|intermediate\.dense)"),
    ("down", r"(down_proj|fc2|wo|mlp\.c_proj|dense_4h_to_h|output\.dense)"),
)
_PATTERNS = [(role, re.compile(rf"(?:.*\.)?{pattern}$")) for role, pattern in _ROLES]
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, eq=False)
class Matrix:
    """One weight matrix.

    Attributes:
        name: dotted name of its parameter.
        module: the `nn.Linear`, transformers `Conv1D`, or convolution that holds it.
        role: q, k, v, o, qkv, gate, up, gate_up, down, conv, or linear where the name tells nothing.
        layer: index of the block it belongs to, -1 outside of blocks.
    """

    name: str
    module: nn.Module
    role: str
    layer: int

    @property
    def transposed(self) -> bool:
        """Whether it lies as ``[in, out]``."""
        return type(self.module).__name__ == "Conv1D"

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself."""
        return cast(nn.Parameter, self.module.weight)

    @property
    def weight(self) -> Tensor:
        """``[out, in]``, a view without gradient; a convolution's kernel is part of its inputs: ``[out, in · kh · kw]``."""
        return self.view(self.parameter.detach())

    def view(self, like_parameter: Tensor) -> Tensor:
        """A tensor of the parameter's shape (its gradient, a mask) as ``[out, in]``."""
        return like_parameter.t() if self.transposed else like_parameter.flatten(1)

    def unview(self, matrix: Tensor) -> Tensor:
        """Back from ``[out, in]`` to the parameter's shape."""
        return matrix.t() if self.transposed else matrix.view(self.parameter.shape)

    @torch.no_grad()
    def write(self, matrix: Tensor) -> None:
        """Copy new values ``[out, in]`` into the parameter, rounded to its dtype."""
        self.parameter.copy_(self.unview(matrix))


def matrices(
    model: nn.Module, roles: Iterable[str] | None = None, include: Callable[[str], bool] | None = None
) -> list[Matrix]:
    """The prunable matrices in the order of the model's modules.

    By default those inside blocks (of a module list): never embeddings, norms, biases, poolers or heads. In a model without
    blocks, as a small CNN, every linear and convolution but the last one.

    Args:
        roles: only these roles.
        include: decides by dotted parameter name instead, over all linears and convolutions.

    Raises:
        ModelError: none is left.

    >>> from gossamer.models import tiny_model
    >>> [m.role for m in matrices(tiny_model("llama")) if m.layer == 1]
    ['q', 'k', 'v', 'o', 'gate', 'up', 'down']
    """
    holders = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) or type(module).__name__ == "Conv1D"
        if isinstance(getattr(module, "weight", None), nn.Parameter)
    ]
    found = []
    for name, module in holders:
        if include is not None and not include(f"{name}.weight"):
            continue
        layer = _LAYER.search(f"{name}.")
        if include is None and layer is None and any(_LAYER.search(f"{other}.") for other, _ in holders):
            continue
        role = "conv" if isinstance(module, nn.Conv1d | nn.Conv2d) else _role(name)
        found.append(Matrix(f"{name}.weight", module, role, int(layer.group(1)) if layer else -1))
    if include is None and found and all(m.layer < 0 for m in found) and len(found) > 1:
        found.pop()
    if roles is not None:
        wanted = frozenset(roles)
        found = [m for m in found if m.role in wanted]
    if not found:
        raise ModelError(f"{type(model).__name__} has no matrix that can be pruned")
    return found


def _role(name: str) -> str:
    return next((role for role, pattern in _PATTERNS if pattern.match(name)), "linear")


def masks_for(chosen: Iterable[Matrix], masks: Mapping[str, Tensor]) -> Masks:
    """Masks ``[out, in]`` by matrix name as masks of the parameters, in their shapes."""
    return Masks({matrix.name: matrix.unview(masks[matrix.name]) for matrix in chosen})
