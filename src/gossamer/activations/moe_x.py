"""MoE-X: a mixture of ReLU experts whose router prefers the experts that will fire fewest units (ICML 2025).

An MoE layer is one very wide MLP with zeros in the units of experts that were not chosen. With ReLU experts and a router
that looks for sparsity, its hidden vector h is sparse twice, and that is what interpretability tools read:

    h = concat_j( ω_j · ReLU(W_encⱼ x) · [j chosen] ) ∈ R^{M·D},    y = W_dec h
    μ_j, σ²_j  = mean and population variance over the D units of expert j, for each input dimension
    z_j        = (μ_j·x) / √(2·(σ²_j·x² + 1e-6))     a unit's pre-activation is about N(μ_j·x, σ²_j·x²)
    P_j        = ½(1 + erf z_j)                      the share of its units that fires
    r_j        = −erf z_j                            the score: the sparsest expert wins; no weights of its own
    ω          = softmax over the k best r_j         gradients reach W_enc through r: experts learn to fire less
    loss      += balance · M · Σ_j f_j · p_j         f: share of tokens that chose j, p: mean softmax over all M scores

Decisions where the card leaves room:

* The balance loss is Switch Transformers' with the coefficient 0.01; f sums to k, so even use costs 0.01·k.
* Biases (GPT-2 has them): the encoder's adds its mean to μ·x and its variance to σ²·x²; the output's is shared by the
  experts, which is the same as one each because the gates sum to 1.
* Up-cycling: unit u of expert j is unit (j·D + u) mod H of the dense MLP, so experts are disjoint slices while M·D ≤ H,
  and copies where D = H. Units that are used twice get noise, or identical experts would tie for ever. Decoders are
  scaled by H/D, so that the mean over all experts is the dense MLP. A gated MLP hands over its gate and down matrices: a
  start for training, not an approximation.
* The learned router of the baseline (`router="linear"`, as in Switch Transformers) scores by a matrix; all else is equal.
"""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gossamer.activations.moe_x_layer import Activation, MoEXLayer, Router
from gossamer.activations.moe_x_models import CLASSES, decoder_blocks
from gossamer.errors import InputError, ModelError
from gossamer.hf.mlp_views import by_input, mlp_views
from gossamer.registry import Method, register


class DenseMLP(NamedTuple):
    """An MLP as up-cycling reads it: encoder and decoder ``[H, d]``, a row a unit, and their biases if any."""

    encoder: Tensor
    encoder_bias: Tensor | None
    decoder: Tensor
    output_bias: Tensor | None


def dense_mlp(mlp: nn.Module) -> DenseMLP:
    """The matrices of any MLP that `gossamer.hf` knows; of a gated one the gate stands for the encoder.

    Raises:
        ModelError: the module is no such MLP, or its weights are not finite.
    """
    view = mlp_views(mlp)[0]
    if view.owner is not mlp:
        raise ModelError(f"moe-x up-cycles one MLP at a time; {type(mlp).__name__} holds one as {view.name}")
    into, out = view.gate, view.down
    read = DenseMLP(
        by_input(into).T[: view.neurons], _bias(into, view.neurons), by_input(out), _bias(out, view.channels)
    )
    for tensor in read:
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise ModelError(f"moe-x cannot up-cycle this {type(mlp).__name__}: its weights are not finite")
    return read


def _bias(matrix: nn.Module, count: int) -> Tensor | None:
    """Its first `count` entries (a fused matrix has the gate's first), or None."""
    bias = getattr(matrix, "bias", None)
    return None if bias is None else cast(Tensor, bias).detach()[:count]


@torch.no_grad()
def upcycle(
    mlp: nn.Module,
    n_experts: int = 8,
    d_expert: int | None = None,
    k: int = 2,
    *,
    noise: float = 0.01,
    seed: int = 0,
    **settings: Any,
) -> MoEXLayer:
    """A layer whose experts are slices or copies of a dense MLP, ready to be trained on.

    Args:
        mlp: plain or gated, of any family that `gossamer.hf` knows; untouched.
        d_expert: D (default H // k: as many active units as before).
        noise: standard deviation of what is added to encoders whose units are used twice, over the encoder's own.
        seed: of the noise and of fresh router weights.
        settings: further settings of `MoEXLayer`.

    Raises:
        ModelError: no such MLP, or weights that are not finite.
        InputError: impossible sizes, or noise below 0.
    """
    dense = dense_mlp(mlp)
    units, width = dense.encoder.shape
    d_expert = max(1, units // k) if d_expert is None else d_expert
    if not (math.isfinite(noise) and noise >= 0):
        raise InputError(f"noise is a share of the weights' spread, at least 0; got {noise}")
    bias = dense.encoder_bias is not None or dense.output_bias is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = MoEXLayer(width, n_experts, d_expert, k, bias=bias, **settings)
        layer.to(device=dense.encoder.device, dtype=dense.encoder.dtype)
        source = (torch.arange(n_experts * d_expert) % units).view(n_experts, d_expert).to(dense.encoder.device)
        layer.encoder.copy_(dense.encoder[source])
        if n_experts * d_expert > units and noise:
            jitter = torch.randn(layer.encoder.shape) * (noise * float(dense.encoder.float().std(correction=0)))
            layer.encoder.add_(jitter.to(layer.encoder))
        layer.decoder.copy_(dense.decoder[source] * (units / d_expert))
    if layer.encoder_bias is not None and dense.encoder_bias is not None:
        layer.encoder_bias.copy_(dense.encoder_bias[source])
    if layer.output_bias is not None and dense.output_bias is not None:
        layer.output_bias.copy_(dense.output_bias)
    return layer


@register("moe-x", slot="activations", family="activations", needs=["training"])
class MoEX(Method):
    """Replace a language model's MLPs by mixtures of ReLU experts, routed to whichever will fire fewest units, and train it.

    Use it to train (or to train on) a GPT-2 or Llama whose hidden units are to be read: units come out with fewer meanings
    each than a dense MLP's, at as many active parameters. The router has no weights; it costs 2·M·d multiplications a token
    and a mean and variance over the experts' weights a training step. `apply` returns a new model, of a type that saves and
    loads with transformers; train it with `gossamer.models.train(..., penalty=router_penalty(model))`, or with any
    trainer that takes the model's own loss. It predicts as the dense model did only after training.

    With `router="linear"` and either activation it is the Switch-style mixture that the paper compares with.

    Paper: Mixture of Experts Made Intrinsically Interpretable, ICML 2025.

    >>> from gossamer.models import tiny_model
    >>> model = MoEX(n_experts=4).apply(tiny_model("gpt2"))
    >>> model.config.model_type, model.config.d_expert
    ('moe_x', 64)
    """

    comparable: ClassVar[bool] = False  # it is a model to be trained, no way to run one

    n_experts: int = Field(8, ge=1, description="M, experts of a layer")
    d_expert: int | None = Field(None, ge=1, description="D, units of an expert (default: the dense MLP's over k)")
    k: int = Field(2, ge=1, description="experts a token runs through")
    balance: float = Field(0.01, ge=0, description="coefficient of the balance loss")
    router: Router = Field("sparsity", description="sparsity (minus erf, no weights) or linear (a learned matrix)")
    activation: Activation = Field("relu", description="of the experts: relu or gelu")
    start: Literal["upcycle", "fresh"] = Field(
        "upcycle", description="experts from the dense MLP, or with random weights; the rest is kept either way"
    )
    noise: float = Field(
        0.01, ge=0, description="up-cycling: spread of what tells copies apart, over the encoder's own"
    )
    seed: int = Field(0, ge=0, description="of fresh weights and of the noise")

    @model_validator(mode="after")
    def _within(self) -> Self:
        if self.k > self.n_experts:
            raise ValueError(f"k={self.k} experts cannot be chosen of n_experts={self.n_experts}")
        return self

    def apply(self, model: Any) -> Any:
        """A new model with experts, on the same device and in the same dtype; `model` is untouched.

        Raises:
            ModelError: a model of another family, or weights of its MLPs that are not finite.
        """
        config = getattr(model, "config", None)
        kind = CLASSES.get(getattr(config, "model_type", ""))
        if kind is None or config is None:
            got = getattr(config, "model_type", type(model).__name__)
            raise ModelError(f"moe-x makes experts of the MLPs of {', '.join(CLASSES)} models; this is {got}")
        blocks = decoder_blocks(model)
        dense = dense_mlp(blocks[0].mlp)
        d_expert = max(1, len(dense.encoder) // self.k) if self.d_expert is None else self.d_expert
        own = {name: getattr(self, name) for name in ("n_experts", "k", "balance", "router", "activation")}
        biased = dense.encoder_bias is not None or dense.output_bias is not None
        skip = ("model_type", "architectures", "transformers_version")
        settings = {key: value for key, value in config.to_dict().items() if key not in skip}
        made = kind.config(**{**settings, **own, "d_expert": d_expert, "expert_bias": biased})
        made._attn_implementation = config._attn_implementation
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            sparse = kind.model(made)
        sparse.to(device=dense.encoder.device, dtype=dense.encoder.dtype)
        kept = {key: value for key, value in model.state_dict().items() if ".mlp." not in key}
        sparse.load_state_dict(kept, strict=False)
        if self.start == "upcycle":
            extra: Any = {"noise": self.noise, **own}
            for index, (old, new) in enumerate(zip(blocks, decoder_blocks(sparse), strict=True)):
                new.mlp = upcycle(old.mlp, d_expert=d_expert, seed=self.seed + index, std=new.mlp.std, **extra)
        sparse.generation_config = copy.deepcopy(model.generation_config)
        return sparse.train(model.training)
