"""MoHD: mixture of hidden dimensions (2024 preprint arXiv 2412.05644; ICML 2025).

A wide residual stream of which each token uses a part: shared groups of dimensions, and the best-scoring others by a
router in each sub-layer, rescaled, and mixed again by a cheap structured matrix. Routing is in `mohd_routing`, the maps in
`mohd_layers`, fusion in `mohd_fusion`, the transformers model in `mohd_model`; here is the method that makes such a model.

The paper's full text was not at hand. What follows its abstract and a public re-implementation is in the card; decided here:

* α defaults to "preserve" (mean gain 1 on active groups). "sum", the re-implementation's, gives gain δ at even scores and
  shrinks the signal twice in a sub-layer, at the read and at the write.
* "Token dimensions" is the residual width (reading "residual"), and a wider residual leaves the heads' and the MLP's own
  widths as they are, so that r times the width at δ = 1/r costs the same active parameters. The re-implementation's MLP
  neurons are reading "neurons"; in a gated MLP its W_up is the gate's matrix.
* Shared groups are scaled by their scores too. RMS norms run over all dimensions, before routing.
* Group fusion follows a write. Where d is no square, Monarch blocks are as near to √d as d's divisors allow; fusions begin
  as the identity.
* The balance loss is summed over the routers.
* Idle groups are skipped on the CPU without gradients. Training, and a GPU, multiply them by zero: there quality and
  active parameters are what the paper says, time is not.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gossamer.activations.mohd_fusion import BlockFusion, Fusion, MonarchFusion, monarch
from gossamer.activations.mohd_layers import MoHDLinear, read_active, write_active
from gossamer.activations.mohd_model import MoHDConfig, MoHDCost, MoHDForCausalLM, costs
from gossamer.activations.mohd_routing import Routing, Scale, SubDimRouter, group_counts, group_gains
from gossamer.calibration import Calibration
from gossamer.errors import InputError, ModelError
from gossamer.hf.channels import lay_by_input
from gossamer.registry import Handle, Method, register

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "BlockFusion",
    "MoHD",
    "MoHDConfig",
    "MoHDCost",
    "MoHDForCausalLM",
    "MoHDLinear",
    "MonarchFusion",
    "Routing",
    "SubDimRouter",
    "costs",
    "group_counts",
    "group_gains",
    "monarch",
    "read_active",
    "write_active",
]

#: Models of Llama's form.
_SERVED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
#: Which side of a projection lies on the residual stream, by the end of its parameters' names.
_READS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
_WRITES = ("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias")


@register("mohd", slot="activations", family="activations", needs=["training"])
class MoHD(Method):
    """Makes a model of routed hidden dimensions from a Llama, Mistral or Qwen2, to be trained: wider at near constant cost.

    Use it to train a language model whose residual width you would like larger than you can pay for. `apply` keeps a
    model's width and routes it, `expand` widens the stream first; both return a new model in transformers' own form,
    which trains with any loop (`penalty=model.balance_loss` in `gossamer.models.train`), saves and loads, and generates.
    Active parameters of a routed map: δ times its own, plus N·d for the router and 2·d^1.5 for the fusion of a sub-layer.

    Paper: Mixture of Hidden-Dimensions Transformer, arXiv 2412.05644.

    >>> from gossamer.models import tiny_model
    >>> model = MoHD(groups=8, active=0.5, shared=0.25).apply(tiny_model("llama"))
    >>> costs(model).routed_active / costs(model).routed
    0.5
    """

    comparable: ClassVar[bool] = False  # it makes a model that must be trained first

    groups: int = Field(16, ge=1, description="N, groups that the width is cut into (paper's best: 16)")
    active: float = Field(0.5, gt=0, le=1, description="δ, share of the groups that a token uses")
    shared: float = Field(0.375, ge=0, le=1, description="φ, share of the groups that every token uses; at most active")
    scale: Scale = Field("preserve", description="α: preserve (mean gain 1), sum (N·Σg) or none")
    fusion: Fusion = Field("monarch", description="group fusion behind each write: monarch, block or none")
    reading: Literal["residual", "neurons"] = Field(
        "residual", description="what is routed: the residual width, or the MLP's neurons"
    )
    balance: float = Field(0.01, ge=0, description="λ_b, weight of the balance loss of each router")

    @model_validator(mode="after")
    def _some_groups(self) -> MoHD:
        group_counts(self.groups, self.active, self.shared)
        return self

    def config(self, base: PreTrainedConfig, **changes: Any) -> MoHDConfig:
        """A Llama's (or Mistral's, Qwen2's) configuration with these settings; `changes` are further fields.

        Raises:
            InputError: the routed width is no multiple of the groups.
        """
        known = {field.name for field in dataclasses.fields(MoHDConfig)} - {"architectures"}
        fields = {name: value for name, value in base.to_dict().items() if name in known}
        if base.model_type == "qwen2":
            fields["attention_bias"] = True  # of q, k and v; o's stays 0
        fields |= self.model_dump(exclude={"balance"}) | {"balance_weight": self.balance} | changes
        width = fields["hidden_size" if self.reading == "residual" else "intermediate_size"]
        if width % self.groups:
            raise InputError(f"mohd: a width of {width} cannot be cut into groups={self.groups} equal groups")
        return MoHDConfig(**fields)

    def apply(self, model: nn.Module, seed: int = 0) -> MoHDForCausalLM:
        """A new model of the same width with a Llama's weights, fresh routers and identity fusions; `model` is left alone.

        With active=1 and even scores it computes what `model` does; else it must be trained.

        Args:
            seed: of the routers.

        Raises:
            ModelError: it is not of Llama's form, or its weights are not finite.
            InputError: its width is no multiple of the groups.
        """
        llama = _llama(model)
        return self._build(llama, self.config(llama.config), dict(llama.state_dict()), seed)

    def expand(self, model: nn.Module, times: int, seed: int = 0) -> MoHDForCausalLM:
        """Like `apply` with a residual width of `times` the model's: the stream begins as so many copies of the old one.

        Heads and neurons keep their widths. Maps that read are divided by times·δ, so that a sub-layer's input has the
        old size over the groups that a token uses; with active=1 and even scores the model computes what it did.

        Raises:
            ModelError: as for `apply`.
            InputError: `times` below 1, or reading "neurons", which leaves the residual width alone.
        """
        if times < 1 or self.reading != "residual":
            raise InputError(f"mohd: expand takes times >= 1 and reading='residual', got {times} and {self.reading!r}")
        llama = _llama(model)
        width, used = llama.config.hidden_size * times, group_counts(self.groups, self.active, self.shared)[0]
        config = self.config(llama.config, hidden_size=width)
        share = times * used / self.groups
        state: dict[str, Tensor] = {}
        for name, tensor in llama.state_dict().items():
            if name.endswith(_READS):
                tensor = tensor.repeat(1, times) / share
            elif name.endswith(_WRITES) or name.endswith("norm.weight"):
                tensor = tensor.repeat(times, *[1] * (tensor.ndim - 1))
            elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
                tensor = tensor.repeat(1, times)
            state[name] = tensor / times if name == "model.norm.weight" else tensor  # the head sums over the copies
        return self._build(llama, config, state, seed)

    def attach(self, model: nn.Module, calibration: Calibration | None = None) -> Handle:
        """Lay a MoHD model's weights out for decode: those of reads by input channels, so that a group lies in one piece.

        Values stay as they are, and no second copy is kept; detaching restores the layout. The model runs without it too,
        but a step then reads each active group in short pieces.

        Raises:
            ModelError: it is no MoHD model.
        """
        if not isinstance(model, MoHDForCausalLM):
            raise ModelError(f"mohd runs on a model that apply or expand made, not on {type(model).__name__}")
        handle, cost = Handle(), costs(model)
        for module in model.modules():
            if isinstance(module, MoHDLinear) and module.side == "in":
                handle.undo.append(lay_by_input(module))
        handle.reports.append(lambda: {"active_parameters": cost.active / cost.parameters})
        return handle

    def _build(self, llama: Any, config: MoHDConfig, state: dict[str, Tensor], seed: int) -> MoHDForCausalLM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = MoHDForCausalLM(config)
        made.load_state_dict(state, strict=False)  # all but routers and fusions, which are fresh
        made.to(device=llama.device, dtype=llama.dtype).train(llama.training)
        made.generation_config = llama.generation_config
        return made


def _llama(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    window = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    if type(model).__name__ not in _SERVED or window:
        what = "one with a sliding window" if window else type(model).__name__
        raise ModelError(f"mohd is made from a {', '.join(_SERVED)} without a sliding window, not from {what}")
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"mohd: {name} of the model is not finite")
    return cast(Any, model)
