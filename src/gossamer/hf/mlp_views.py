"""One view of the MLPs of every family, gated and plain, so that methods need not know model classes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from gossamer.errors import ModelError
from gossamer.ops import NeuronWeights

# How each family names its parts: (gate, up, down, activation). "a|b" are the two halves of one matrix's outputs.
_GATED = (
    ("gate_proj", "up_proj", "down_proj", "act_fn"),  # Llama, Qwen, Mistral, Gemma, SmolLM
    ("wi_0", "wi_1", "wo", "act"),  # T5 1.1
    ("gate_up_proj|0", "gate_up_proj|1", "down_proj", "activation_fn"),  # Phi-3
)
_PLAIN = (
    ("c_fc", "c_proj", "act"),  # GPT-2
    ("fc1", "fc2", "activation_fn"),  # OPT, Phi
    ("wi", "wo", "act"),  # T5
    ("dense_h_to_4h", "dense_4h_to_h", "act"),  # GPT-NeoX, Falcon
    ("intermediate.dense", "output.dense", "intermediate.intermediate_act_fn"),  # BERT
)
# transformers' classes of activations, by the name that the kernels know.
_KERNEL_NAMES = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "ReLU": "relu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}


@dataclass(frozen=True, eq=False)
class MLPView:
    """One MLP of a model, whatever its family calls its parts.

    Attributes:
        index: its place among the model's MLPs.
        name: dotted name of the module that holds its parts.
        owner: that module.
        parts: names of gate (None in a plain MLP), up, down and activation in it.

    In a plain MLP ``down(act(up x))`` the activated up stands where a gated one has its product.
    """

    index: int
    name: str
    owner: nn.Module
    parts: tuple[str | None, str, str, str]

    @property
    def gated(self) -> bool:
        """Whether it has a gate."""
        return self.parts[0] is not None

    @property
    def up(self) -> nn.Module:
        """The matrix into the neurons; with a fused gate, the matrix of both."""
        return self.owner.get_submodule(self.parts[1].partition("|")[0])

    @property
    def gate(self) -> nn.Module:
        """The gate's matrix; in a plain MLP `up`."""
        return self.owner.get_submodule((self.parts[0] or self.parts[1]).partition("|")[0])

    @property
    def down(self) -> nn.Module:
        """The matrix out of the neurons."""
        return self.owner.get_submodule(self.parts[2])

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """The activation as it is now."""
        return cast(
            Callable[[Tensor], Tensor], functools.reduce(getattr, self.parts[3].split("."), cast(Any, self.owner))
        )

    @property
    def neurons(self) -> int:
        """D: neurons of this MLP."""
        return int(_shape(self.down)[1])

    @property
    def channels(self) -> int:
        """d: its outputs, as many as its inputs."""
        return int(_shape(self.down)[0])

    def gate_and_up(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pre-activations ``[..., D]`` of gate and up; of up and None in a plain MLP."""
        if not self.gated:
            return cast(Tensor, self.up(x)), None
        if self.up is self.gate:
            both: Tensor = self.up(x)
            gate, up = both.chunk(2, dim=-1)
            return gate, up
        return cast(Tensor, self.gate(x)), cast(Tensor, self.up(x))

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The activated gate and its product with up, ``[..., D]`` each; in a plain MLP both are the activated up."""
        gate, up = self.gate_and_up(x)
        gate = self.activation(gate)
        return gate, gate if up is None else gate * up

    def out(self, product: Tensor) -> Tensor:
        """What the MLP makes of its (masked) product; dropout where the family has it before `down`."""
        if self.parts[2] == "wo":
            product = cast(Any, self.owner).dropout(product)
        weight = cast(Tensor, self.down.weight)
        return cast(Tensor, self.down(product.to(weight.dtype) if weight.is_floating_point() else product))

    def replace_activation(self, activation: nn.Module) -> Callable[[], None]:
        """Put another activation there; returns what puts the old one back."""
        path, _, name = self.parts[3].rpartition(".")
        holder: Any = self.owner.get_submodule(path)
        before = getattr(holder, name)
        setattr(holder, name, activation)
        return lambda: setattr(holder, name, before)

    @property
    def down_norms(self) -> Tensor:
        """float32 ``[D]``: length of every neuron's output vector."""
        norms: Tensor = torch.linalg.vector_norm(by_input(self.down).float(), dim=-1)
        return norms

    def weights(self) -> NeuronWeights | None:
        """The weights as `ops.sparse_mlp` reads them, views of the parameters; None where it can't."""
        name = _KERNEL_NAMES.get(type(self.activation).__name__)
        down = by_input(self.down)
        if not self.gated or name is None or down.stride(-1) != 1 or type(self.down) is not nn.Linear:
            return None
        if type(self.gate) is not nn.Linear or type(self.up) is not nn.Linear:
            return None
        gate, up = self.gate, self.up
        parts: tuple[Tensor, ...] = (gate.weight, up.weight)
        biases: tuple[Tensor | None, ...] = (gate.bias, up.bias)
        if up is gate:
            parts = gate.weight.detach().chunk(2)
            biases = (None, None) if gate.bias is None else gate.bias.detach().chunk(2)
        gate_weight, up_weight = parts
        # A sliced model's last block writes a wider stream than it reads, which the kernel doesn't serve.
        if not gate_weight.dtype.is_floating_point or gate_weight.shape != down.shape:
            return None
        return NeuronWeights(gate_weight, up_weight, down, biases[0], biases[1], self.down.bias, activation=name)


def _shape(matrix: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of an `nn.Linear`, or of transformers' `Conv1D`, whose weight lies the other way."""
    weight = cast(Tensor, matrix.weight)
    return (
        (weight.shape[1], weight.shape[0]) if type(matrix).__name__ == "Conv1D" else (weight.shape[0], weight.shape[1])
    )


def by_input(matrix: nn.Module) -> Tensor:
    """The weight as ``[inputs, outputs]``, a view."""
    weight = cast(Tensor, matrix.weight).detach()
    return weight if type(matrix).__name__ == "Conv1D" else weight.t()


def mlp_views(model: nn.Module) -> list[MLPView]:
    """All MLPs of a transformers model in the order of its modules (encoders and decoders alike).

    Raises:
        ModelError: none were found.

    >>> from gossamer.models import tiny_model
    >>> [(view.name, view.gated, view.neurons) for view in mlp_views(tiny_model("llama"))]
    [('model.layers.0.mlp', True, 128), ('model.layers.1.mlp', True, 128)]
    """
    views: list[MLPView] = []
    for name, module in model.named_modules():
        parts = _parts(module)
        if parts is not None:
            views.append(MLPView(len(views), name, module, parts))
    if not views:
        raise ModelError(f"{type(model).__name__} is not supported: no MLP with known names was found in it")
    return views


def _parts(module: nn.Module) -> tuple[str | None, str, str, str] | None:
    def has(path: str | None) -> bool:
        thing: Any = module
        for part in (path or "").partition("|")[0].split("."):
            if part and (thing := getattr(thing, part, None)) is None:
                return False
        return True

    for gate, up, down, activation in _GATED:
        if all(map(has, (gate, up, down, activation))) and hasattr(getattr(module, down), "weight"):
            return gate, up, down, activation
    for up, down, activation in _PLAIN:
        if all(map(has, (up, down, activation))) and hasattr(module.get_submodule(down), "weight"):
            return None, up, down, activation
    return None
