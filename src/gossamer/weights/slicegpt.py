"""SliceGPT: the residual stream turned into its principal directions, the weakest cut off (Ashkboos et al., 2024).

    X  float64 rows of the residual stream, D wide;  H = Σ XᵀX;  Q = eigenvectors of H + damp · mean(diag H) · I, strongest first
    embedding       E ← E Q[:, :k]
    reads           W ← (W Q)[:, :k]                    q, k, v; gate, up
    writes          W ← (Qᵀ W)[:k],  b ← (Qᵀ b)[:k]     o; down
    residual edge   x ← x · (Q_beforeᵀ Q_after)[:k, :k]
    head            W ← W Q

Done block by block: each Q comes from what the blocks sliced so far make. Two matrices of k·k for each block (one in parallel
blocks) are what the rotations cost; heads, RoPE and the KV cache are untouched.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.errors import CalibrationError, InputError, ModelError
from gossamer.hf import block_list, matrices
from gossamer.models.reshaped import PLACES
from gossamer.registry import register
from gossamer.weights.base import Applied, Progress, WeightMethod, parameter_count, silent
from gossamer.weights.recovery import Recovery, recover
from gossamer.weights.slicegpt_fold import fold_norms, places_of, stream_width
from gossamer.weights.slicegpt_slicing import Slicing, principal


def kept_width(width: int, sparsity: float, round_to: int = 8) -> int:
    """k = ⌊(1 − s)·D⌋, down to a multiple.

    Raises:
        InputError: nothing is left.

    >>> kept_width(768, 0.2), kept_width(576, 0.25)
    (608, 432)
    """
    kept = math.floor((1 - sparsity) * width + 1e-9)
    kept -= kept % round_to
    if kept < 1:
        raise InputError(f"slicing {sparsity:g} of a width of {width} in steps of {round_to} leaves nothing")
    return kept


def slice_widths(width: int, layers: int, sparsity: float, last: float | None = None, round_to: int = 8) -> list[int]:
    """Kept width of each block; with `last` the share cut off goes linearly from `sparsity` in the first block to it.

    >>> slice_widths(64, 3, 0.0, last=0.5)
    [64, 48, 32]
    """
    last = sparsity if last is None else last
    shares = [sparsity + (last - sparsity) * i / max(1, layers - 1) for i in range(layers)]
    return [kept_width(width, share, round_to) for share in shares]


def flops_per_token(model: nn.Module) -> int:
    """Two for every parameter that a token multiplies with: all but the embedding tables; the head counts, tied or not."""
    places, head = PLACES[cast(Any, model).config.model_type], cast(Any, model).lm_head
    tables = [cast(Any, model.get_submodule(name)).weight for name in places.embeddings]
    tied = any(table is head.weight for table in tables)
    return int(2 * (parameter_count(model) - sum(t.numel() for t in tables) + (head.weight.numel() if tied else 0)))


@register("slicegpt", slot="weights", family="weights", needs=["calibration"])
class SliceGPT(WeightMethod):
    """Cut the hidden width of a language model: rotate the residual stream into its principal directions, delete the weakest.

    Every matrix becomes a smaller dense one, so any hardware gains; the KV cache stays as it is. For pre-norm models: Llama,
    Mistral, Qwen 2 and 3, Gemma, Phi-3 (RMSNorm), OPT and GPT-2 (LayerNorm), Phi (parallel blocks). No gradients; some hundred
    sequences of text like that which will be read, 128 of 2048 tokens in the release. Ashkboos et al., 2024: "SliceGPT:
    Compress Large Language Models by Deleting Rows and Columns".

    When to use it: on large models, at 10 to 30 %. Two caveats. `sparsity` is the share of the *width*: the residual path gets
    two small matrices for each block, and a head that shared the embedding's weights gets its own, so a small model with tied
    embeddings can come out larger (the facts count both ways). And small matrices cost kernel launches, so little is gained in
    eager single-token decoding. Models trained on very much text lose more; `recovery` trains adapters on the same text
    afterwards, which takes back a good part.

    The model is changed in place, and is of a class of `gossamer.models.reshaped` afterwards. What it is saved to loads with
    `gossamer.models.load`, or with plain transformers and ``trust_remote_code=True`` by the one file that lies beside it.

    Decisions: norms keep the model's own eps. Norms behind a sub-layer (Gemma 2 and 3, OPT-350M, BERT) are refused. GPT-2 needs
    `slice_head=True` and one width for all blocks, because transformers gives its last hidden states the width of its
    embeddings. A width per layer exists as a linear course (`sparsity_last`). Nothing cut (sparsity 0) still leaves rotated
    weights that need the shortcuts. Not built: attention masks for padded calibration text in `apply` (`second_moment` takes
    them), the release's half precision by default (the model's own dtype is kept), and its search over recovery settings.

    >>> from gossamer.models import tiny_model
    >>> applied = SliceGPT(sparsity=0.25).apply(tiny_model("llama"), torch.arange(64).view(1, 64))
    >>> applied.model.model.layers[0].self_attn.q_proj.weight.shape
    torch.Size([64, 48])
    """

    sparsity: float = Field(0.25, ge=0, lt=1, description="share of the hidden width that goes")
    sparsity_last: float | None = Field(
        None, ge=0, lt=1, description="in the last block, with a linear course (None: the same)"
    )
    round_to: int = Field(8, ge=1, description="widths are multiples of this")
    orientation: Literal["random", "pca"] = Field(
        "random", description="order of the kept coordinates: mixed, or by strength"
    )
    slice_head: bool = Field(False, description="the head reads the kept coordinates only")
    interleaved: bool = Field(True, description="directions come from the model sliced so far, not from the whole one")
    damp: float = Field(0.01, ge=0, description="of the second moment's mean diagonal, added to it")
    seed: int = Field(42, description="of the random orientation")
    recovery: Recovery = Field(default_factory=Recovery, description="adapters trained afterwards; no steps by default")

    @classmethod
    def with_kept(cls, share: float, model: nn.Module) -> Self:
        """The width k for which the matrices, cut on one side, and the shortcuts are this share together.

        P·k/D + n·k² + (D − k)(F + k): the last block writes the whole width D, from F inputs.
        """
        places, found = places_of(model), matrices(model)
        width, layers = stream_width(model, places), len(block_list(model)[1])
        writes = ("down",) if len(places.norms) == 2 else ("o", "down")
        wide = sum(m.weight.shape[1] for m in found if m.layer == layers - 1 and m.role in writes)
        inside, paths = sum(m.weight.numel() for m in found), len(places.norms) * layers

        def kept(k: int) -> float:
            return inside * k / width + paths * k**2 + (width - k) * (wide + k)

        best = min(range(1, width + 1), key=lambda k: abs(kept(k) - share * inside))
        return cls(sparsity=1 - best / width)

    def apply(self, model: nn.Module, tokens: Tensor | None = None, progress: Progress = silent) -> Applied:
        """See `WeightMethod.apply`; `discarded` of the facts is the share of energy cut off at each place."""
        text, places = self.text(tokens), places_of(model)
        if "transformer.wpe" in places.embeddings and (not self.slice_head or self.sparsity_last is not None):
            raise ModelError(
                "gpt2 models need slice_head=True and one width: transformers ties the widths of their two ends"
            )
        if model.training:
            raise CalibrationError("calibrate in eval mode: call model.eval() first")
        width, config = stream_width(model, places), cast(Any, model).config
        widths = slice_widths(width, config.num_hidden_layers, self.sparsity, self.sparsity_last, self.round_to)
        before, flops, head = parameter_count(model), flops_per_token(model), cast(Any, model).lm_head.weight
        tied = head is cast(Any, model).get_input_embeddings().weight
        fold_norms(model)
        turn = torch.Generator().manual_seed(self.seed) if self.orientation == "random" else None
        slicing = Slicing(widths, lambda moment: principal(moment, self.damp), turn, self.slice_head, self.interleaved)
        slicing.run(model, text, progress)
        facts: dict[str, Any] = {
            "parameters": {
                "before": before,
                "before_untied": before + (head.numel() if tied else 0),
                "after": parameter_count(model),
            },
            "flops_per_token": {"before": flops, "after": flops_per_token(model)},
            "width": width,
            "widths": widths,
            "discarded": slicing.discarded,
        }
        if self.recovery.steps:
            facts["recovery"] = recover(model, text, self.recovery, progress=progress)
        return Applied(model, facts)
