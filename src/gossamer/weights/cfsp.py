"""CFSP: blocks that turn the hidden state far keep more MLP neurons (coarse); in a block, activations rank them (fine).

    coarse  Ī_l = mean over tokens of arccos(cos(x_t, y_t)) / π;   u_l = 13.1072 · (Ī_l − mean Ī);   s_l = sigmoid(a · u_l)
            keep_l = (1 − p) · s_l / mean s, deviations shrunk where a block would keep all of it
    fine    w1 = |W_down| · ‖A‖^b,  w2 = |W_upᵀ|,  w3 = |W_gateᵀ|    (hidden × n)
            score_j = mean_i Σ_m w_m[i, j] / Σ w_m · ‖A_j‖^c,  the sum over i (column) or over j (row)
    cut     k_l = n · keep_l to the nearest multiple; the k_l best stay

(Wang et al., 2025). The constant is the release's 10⁻⁴ for sums over its 128 × 1024 tokens, so that other sizes of calibration
give the same widths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gossamer.errors import InputError, ModelError
from gossamer.hf import MLPView
from gossamer.models.reshaped import linear_weight
from gossamer.patterns.allocation import whole_counts
from gossamer.registry import register
from gossamer.weights.base import Applied, Progress, WeightMethod, parameter_count, silent
from gossamer.weights.neurons import (
    cut_neurons,
    neuron_facts,
    ratio_for,
    rounded_width,
    top_neurons,
    views_of,
    width_facts,
)
from gossamer.weights.recovery import Recovery, recover

Metric = Literal["angular", "cosine", "mse", "mae", "constant"]
Fine = Literal["three_w_one_wa", "one_wa", "one_a", "wanda_base", "mag_base"]
#: 128 sequences of 1024 tokens, times 10⁻⁴.
SCALE = 13.1072


def change(x: Tensor, y: Tensor, metric: Metric = "angular") -> Tensor:
    """How far a block moves each token, float32 ``[tokens]``, of its input and output ``[tokens, hidden]``.

    The angle is in half turns; a token of zeros counts as a right angle.

    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    >>> change(x, torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])).tolist()
    [0.0, 0.5, 1.0]
    """
    x, y = x.float(), y.float()
    if metric == "constant":
        return torch.zeros(len(x), device=x.device)
    if metric == "mse":
        return (x - y).square().mean(-1)
    if metric == "mae":
        return (x - y).abs().mean(-1)
    x, y = F.normalize(x.double(), dim=-1), F.normalize(y.double(), dim=-1)
    # The same angle as arccos of the product, but exact near zero, where a cosine has no digits left.
    angle = 2 * torch.atan2((x - y).norm(dim=-1), (x + y).norm(dim=-1)) / math.pi
    zero = (x.abs().sum(-1) == 0) | (y.abs().sum(-1) == 0)
    angle = angle.masked_fill(zero, 0.5)
    return (angle if metric == "angular" else 1 - (angle * math.pi).cos()).float()


def block_shares(importance: Sequence[float], ratio: float, a: float = 1.0) -> tuple[list[float], list[float]]:
    """Coarse step: share of its neurons that each block keeps, and the s_l behind it (after shrinking).

    Args:
        importance: Ī_l, per-token means.
        ratio: p, share of all neurons that goes.

    Raises:
        InputError: an importance is not finite, or p is out of range.

    >>> [round(k, 3) for k in block_shares([0.5, 0.1, 0.1], 0.2)[0]]
    [0.99, 0.705, 0.705]
    """
    if not importance or not all(map(math.isfinite, importance)) or not 0 <= ratio < 1:
        raise InputError(f"importances must be finite and the ratio in 0 .. 1, got {list(importance)} and {ratio:g}")
    center = math.fsum(importance) / len(importance)
    s = [1 / (1 + math.exp(-max(-700.0, min(700.0, a * SCALE * (i - center))))) for i in importance]
    mean = math.fsum(s) / len(s)
    if (1 - ratio) * max(s) / mean >= 1 and max(s) > mean:
        shrink = mean * (1 / (1 - ratio) - 1) / (max(s) - mean) / 1.05
        s = [mean + (v - mean) * shrink for v in s]
        mean = math.fsum(s) / len(s)
    return [(1 - ratio) * v / mean for v in s], s


def fine_score(
    down: Tensor,
    up: Tensor,
    gate: Tensor,
    norm: Tensor,
    kind: Fine = "three_w_one_wa",
    norm_axis: Literal["column", "row"] = "column",
    b: float = 1.0,
    c: float = 1.0,
) -> Tensor:
    """Fine step: what each neuron is worth, float64 ``[n]``.

    With `norm_axis` "column", as released, each term sums to one over the axis that the mean is taken over, so the score is
    ``3 / hidden · ‖A_j‖^c``: activations alone decide. "row" shares out each hidden coordinate among the neurons, which is
    probably what was meant.

    Args:
        down: W_down ``[hidden, n]``.
        up, gate: ``[n, hidden]``.
        norm: ‖A_j‖ ``[n]``.

    >>> weights = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), torch.tensor([[5.0], [6.0]])
    >>> fine_score(*weights, torch.tensor([2.0, 1.0])).tolist()
    [6.0, 3.0]
    """
    down, up, gate = (w.double() for w in (down, up, gate))
    norm = norm.double().to(down.device)
    if kind == "mag_base":
        length: Tensor = torch.linalg.vector_norm(down, dim=0)
        return length
    if kind == "wanda_base":
        return (down.abs() * norm).mean(0)
    if kind == "one_a":
        return norm**c
    terms = [down.abs() * norm**b] + ([up.abs().T, gate.abs().T] if kind == "three_w_one_wa" else [])
    axis, tiny = (0 if norm_axis == "column" else 1), torch.finfo(torch.float64).tiny
    relative = sum((w / w.sum(axis, keepdim=True).clamp(min=tiny) for w in terms), torch.zeros_like(down))
    return relative.mean(0) * norm**c


def adapter_ranks(s: Sequence[float], mean_rank: int = 8) -> list[int]:
    """IG-LoRA: ranks in proportion to s_l that sum to ``blocks · mean_rank``, by the largest remainder.

    >>> adapter_ranks([0.6, 0.4, 0.5], 8)
    [10, 6, 8]
    """
    total, weight = mean_rank * len(s), math.fsum(s)
    return whole_counts([v / weight for v in s], [total] * len(s), total)


def _three(view: MLPView) -> tuple[Tensor, Tensor, Tensor]:
    """W_down ``[hidden, n]``, W_up and W_gate ``[n, hidden]``, also of a fused gate."""
    down = linear_weight(view.down)
    if view.gate is view.up:
        gate, up = linear_weight(view.up).chunk(2)
        return down, up, gate
    return down, linear_weight(view.up), linear_weight(view.gate)


@register("cfsp", slot="weights", family="weights", needs=["calibration"])
class CFSP(WeightMethod):
    """Cut MLP neurons of a language model, more where a block matters less: a smaller dense model from one forward pass.

    A block's importance is the angle by which it turns the hidden state; within a block the neurons with the strongest
    activations stay. Attention is left alone. For gated MLPs (Llama, Mistral, Qwen, Gemma, Phi-3). Wang et al., 2025: "CFSP:
    An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine Activation Information".

    When to use it: for real speed on any hardware at 10 to 50 % of the MLPs. `sparsity` is the share of the MLPs' neurons; of the
    whole model it is less (the facts say how much). Widths are multiples of 128 as GPUs like them; choose 32 or 64 for small
    models, where such steps are coarse. `recovery` trains adapters afterwards, with ranks by importance (IG-LoRA).

    The model is changed in place. Each layer has its own width, so it is of a class of `gossamer.models.reshaped`; what it is
    saved to loads with `gossamer.models.load`, or with plain transformers by the one file that lies beside it.

    Decisions: ties go to the earlier neuron, so that exactly k stay. Importances are means per token, so that widths don't
    depend on the amount of text. `norm_axis="column"` is what was released, and ranks by activations alone; "row" measured
    better in our reproduction. IG-LoRA, of which no code was released, gives each block a rank in proportion to
    the s_l of the allocation, with one scale alpha / mean rank. In the released options "one_wa" is read as the first term alone.
    Not built: the cut of attention heads that the compared methods have, and the release's own training corpus.

    >>> from gossamer.models import tiny_model
    >>> facts = CFSP(sparsity=0.25, round_to=8).apply(tiny_model("llama"), torch.arange(64).view(1, 64)).facts
    >>> sum(facts["widths"])
    192
    """

    sparsity: float = Field(0.2, ge=0, lt=1, description="share of the MLPs' neurons that goes")
    metric: Metric = Field("angular", description="how far a block moves the hidden state; constant: all blocks alike")
    a: float = Field(1.0, ge=0, description="how strongly importances differ after the sigmoid")
    fine: Fine = Field("three_w_one_wa", description="score of a neuron")
    norm_axis: Literal["column", "row"] = Field("column", description="over what the score's terms are made relative")
    b: float = Field(1.0, ge=0, description="exponent of the activation norm within the first term")
    c: float = Field(1.0, ge=0, description="exponent of the activation norm outside")
    round_to: int = Field(128, ge=1, description="widths are multiples of this")
    recovery: Recovery = Field(
        default_factory=lambda: Recovery(rank=8), description="adapters trained afterwards; no steps by default"
    )

    @classmethod
    def with_kept(cls, share: float, model: nn.Module) -> Self:
        """Only neurons go, so more of them than of the blocks' weights."""
        return cls(sparsity=ratio_for(model, share))

    def apply(self, model: nn.Module, tokens: Tensor | None = None, progress: Progress = silent) -> Applied:
        """See `WeightMethod.apply`."""
        text, views, parameters = self.text(tokens), views_of(model), parameter_count(model)
        if not all(view.gated for view in views):
            raise ModelError(f"cfsp needs MLPs with a gate, which {type(model).__name__} lacks: see flap or wanda-sp")
        if "shortcuts" in (getattr(cast(Any, model).config, "reshaped", None) or {}):
            raise ModelError(
                "cfsp measures how blocks turn the hidden state, which a sliced model also does: cut, then slice"
            )
        found = neuron_facts(model, text, lambda x, y: change(x, y, self.metric), progress)
        importance = [facts.change for facts in found]
        shares, s = block_shares(importance, self.sparsity, self.a)
        before, kept = [view.neurons for view in views], []
        for view, facts, share in zip(views, found, shares, strict=True):
            score = fine_score(*_three(view), facts.norm, self.fine, self.norm_axis, self.b, self.c)
            kept.append(top_neurons(score, rounded_width(view.neurons * share, view.neurons, self.round_to)))
        cut_neurons(model, kept)
        facts_out: dict[str, Any] = {
            **width_facts(before, model, parameters),
            "importance": importance,
            "shares": shares,
        }
        if self.recovery.steps:
            ranks = adapter_ranks(s, self.recovery.rank)
            facts_out["recovery"] = recover(model, text, self.recovery, ranks, progress)
        return Applied(model, facts_out)
