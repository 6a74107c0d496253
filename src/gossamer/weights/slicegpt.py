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
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.errors import CalibrationError, InputError, ModelError
from gossamer.hf import Matrix, blocks, matrices
from gossamer.models.reshaped import PLACES, Places, add_shortcuts, linear_weight, set_embedding, set_linear, settle
from gossamer.registry import register
from gossamer.weights.base import Applied, Progress, WeightMethod, parameter_count, silent
from gossamer.weights.recovery import Recovery, recover
from gossamer.weights.slicegpt_fold import fold_norms, places_of, readers

#: Makes Q, float64 ``[D, D]`` with the directions in columns, from the second moment of what flows there.
Basis = Callable[[Tensor], Tensor]


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


def second_moment(inputs: list[Tensor], keep: list[Tensor] | None = None) -> Tensor:
    """H = Σ xᵀx, float64 ``[D, D]``, not centred.

    Args:
        inputs: ``[..., tokens, D]`` each.
        keep: bool ``[..., tokens]`` each: false where a token is padding.

    Raises:
        CalibrationError: an input is not finite.
    """
    total: Tensor | None = None
    for i, x in enumerate(inputs):
        rows = x.reshape(-1, x.shape[-1]) if keep is None else x[keep[i]]
        rows = rows.double()
        total = rows.T @ rows if total is None else total.addmm_(rows.T, rows)
    if total is None or not bool(total.isfinite().all()):
        raise CalibrationError("the residual stream of the calibration is not finite: check the model's weights")
    return total


def principal(moment: Tensor, damp: float = 0.01) -> Tensor:
    """Eigenvectors of a second moment as columns, float64 ``[D, D]``, the strongest first.

    >>> principal(torch.tensor([[1.0, 0.0], [0.0, 9.0]]).double()).abs()
    tensor([[0., 1.],
            [1., 0.]], dtype=torch.float64)
    """
    moment = moment.double()
    eye = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    return torch.linalg.eigh(moment + damp * moment.diagonal().mean() * eye).eigenvectors.flip(1)


def random_orthogonal(width: int, generator: torch.Generator) -> Tensor:
    """QR of a uniform random matrix, float64 ``[width, width]``."""
    return torch.linalg.qr(torch.rand(width, width, generator=generator, dtype=torch.float64)).Q


def slice_widths(width: int, layers: int, sparsity: float, last: float | None = None, round_to: int = 8) -> list[int]:
    """Kept width of each block; with `last` the share cut off goes linearly from `sparsity` in the first block to it.

    >>> slice_widths(64, 3, 0.0, last=0.5)
    [64, 48, 32]
    """
    last = sparsity if last is None else last
    shares = [sparsity + (last - sparsity) * i / max(1, layers - 1) for i in range(layers)]
    return [kept_width(width, share, round_to) for share in shares]


@dataclass(eq=False)
class Slicing:
    """Slices a model whose norms are folded, in place.

    Attributes:
        widths: kept by each block's inputs; a block's output is as wide as the next one's input.
        basis: makes Q of a second moment.
        turn: seeds the random turn of the kept coordinates; None leaves them as Q orders them.
        interleaved: each Q sees what slicing did before it; otherwise all come from the whole model, which is cut at the end.
        discarded: by place, the share of the residual stream's energy that was cut off.
    """

    widths: list[int]
    basis: Basis = principal
    turn: torch.Generator | None = None
    slice_head: bool = False
    interleaved: bool = True
    discarded: list[dict[str, Any]] = field(default_factory=list)

    @torch.no_grad()
    def run(self, model: nn.Module, tokens: Tensor, progress: Progress = silent) -> None:
        """Slice, with token blocks int64 ``[sequences, length]`` to find the directions by."""
        places = places_of(model)
        whole = model.get_submodule(places.embeddings[0]).weight.shape[1]
        q = torch.empty(0)
        for stage in blocks(model, tokens, progress):
            here, after = self.widths[stage.index], self._after(stage.index, whole)
            kept, out = (here, after) if self.interleaved else (whole, whole)
            block: Any = stage.block
            if stage.index == 0:
                q = self._place("embeddings", stage.inputs, here)
                for name in places.embeddings:
                    table = cast(Any, model.get_submodule(name))
                    set_embedding(table, _times(table.weight, q[:, :kept]))
                stage.inputs = [_times(x, q[:, :kept]) for x in stage.inputs]
            groups = readers(stage.matrices, places)
            _read(groups[0], q[:, :kept])
            back, writes = q[:, :kept].T, {role: [m for m in stage.matrices if m.role == role] for role in ("o", "down")}
            add_shortcuts(block, [[kept, whole]] * len(groups), places)
            set_linear(block.attention_shortcut, back.T, None)
            if len(groups) == 1:
                z = stage.run()
                q = self._place(f"block {stage.index}", z, after)
                set_linear(block.attention_shortcut, (back @ q[:, :out]).T, None)
                _write(writes["o"], q[:, :out])
            else:
                y = stage.run(block.attend)
                middle = self._place(f"block {stage.index} attention", y, here)
                set_linear(block.attention_shortcut, (back @ middle[:, :kept]).T, None)
                _write(writes["o"], middle[:, :kept])
                _read(groups[1], middle[:, :kept])
                set_linear(block.mlp_shortcut, middle[:, :kept], None)
                z = [block.feed(_times(rows, middle[:, :kept])) for rows in y]
                q = self._place(f"block {stage.index} mlp", z, after)
                set_linear(block.mlp_shortcut, (middle[:, :kept].T @ q[:, :out]).T, None)
            _write(writes["down"], q[:, :out])
            stage.outputs = [_times(rows, q[:, :out]) for rows in z]
        head = cast(Any, model).lm_head
        set_linear(head, _times(head.weight, q[:, :out]), head.bias)
        if not self.interleaved:
            self._cut(model, places, whole)
        settle(model)

    def _after(self, index: int, whole: int) -> int:
        if index + 1 < len(self.widths):
            return self.widths[index + 1]
        return self.widths[-1] if self.slice_head else whole

    def _place(self, name: str, inputs: list[Tensor], kept: int) -> Tensor:
        moment = second_moment(inputs)
        q = self.basis(moment)
        energies = ((moment @ q) * q).sum(0)
        share = float(energies[kept:].sum() / energies.sum().clamp(min=torch.finfo(torch.float64).tiny))
        self.discarded.append({"place": name, "kept": kept, "discarded": max(0.0, share)})
        if self.turn is not None:
            q = torch.cat([q[:, :kept] @ random_orthogonal(kept, self.turn).to(q.device), q[:, kept:]], dim=1)
        return q

    def _cut(self, model: nn.Module, places: Places, whole: int) -> None:
        """Slice a model that was only rotated."""
        for name in places.embeddings:
            table = cast(Any, model.get_submodule(name))
            set_embedding(table, table.weight.detach()[:, : self.widths[0]])
        by_block: dict[int, list[Matrix]] = {}
        for matrix in matrices(model, ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")):
            by_block.setdefault(matrix.layer, []).append(matrix)
        for index, block in enumerate(cast(Any, model.get_submodule(places.blocks))):
            here, after = self.widths[index], self._after(index, whole)
            groups = readers(by_block[index], places)
            for matrix in [m for group in groups for m in group]:
                set_linear(matrix.module, matrix.weight[:, :here], cast(Any, matrix.module).bias)
            for matrix in by_block[index]:
                if matrix.role in ("o", "down"):
                    width = here if matrix.role == "o" and len(groups) == 2 else after
                    bias = cast(Any, matrix.module).bias
                    set_linear(matrix.module, matrix.weight[:width], None if bias is None else bias.detach()[:width])
            paths = ("attention_shortcut", "mlp_shortcut")[: len(groups)]
            for path, width in zip(paths, [here, after][-len(paths) :], strict=True):
                shortcut = getattr(block, path)
                set_linear(shortcut, shortcut.weight.detach()[:width, :here], None)
        head = cast(Any, model).lm_head
        set_linear(head, head.weight.detach()[:, : self._after(len(self.widths) - 1, whole)], head.bias)


def _times(x: Tensor, q: Tensor) -> Tensor:
    """``x @ q`` in float64, back in the dtype of x."""
    return (x.detach().double() @ q).to(x.dtype)


def _read(group: list[Matrix], q: Tensor) -> None:
    for matrix in group:
        set_linear(matrix.module, matrix.weight.double() @ q, cast(Any, matrix.module).bias)


def _write(group: list[Matrix], q: Tensor) -> None:
    for matrix in group:
        bias = cast(Any, matrix.module).bias
        set_linear(matrix.module, q.T @ matrix.weight.double(), None if bias is None else bias.double() @ q)


def flops_per_token(model: nn.Module) -> int:
    """Two for every parameter that a token multiplies with: all but the embedding tables; the head counts, tied or not."""
    places, head = PLACES[cast(Any, model).config.model_type], cast(Any, model).lm_head
    tables = [model.get_submodule(name).weight for name in places.embeddings]
    tied = any(table is head.weight for table in tables)
    return 2 * (parameter_count(model) - sum(t.numel() for t in tables) + (head.weight.numel() if tied else 0))


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
    `slice_head=True` and one width for all blocks, because transformers gives its last hidden states the width of its embeddings. A shape per layer exists
    as a linear course (`sparsity_last`). Not built: attention masks for padded calibration text in `apply` (`second_moment`
    takes them), the release's half precision by default (the model's own dtype is kept), and Bayesian search over schedules.

    >>> from gossamer.models import tiny_model
    >>> applied = SliceGPT(sparsity=0.25).apply(tiny_model("llama"), torch.arange(64).view(1, 64))
    >>> applied.model.model.layers[0].self_attn.q_proj.weight.shape
    torch.Size([64, 48])
    """

    sparsity: float = Field(0.25, ge=0, lt=1, description="share of the hidden width that goes")
    sparsity_last: float | None = Field(None, ge=0, lt=1, description="in the last block, with a linear course (None: the same)")
    round_to: int = Field(8, ge=1, description="widths are multiples of this")
    orientation: Literal["random", "pca"] = Field("random", description="order of the kept coordinates: mixed, or by strength")
    slice_head: bool = Field(False, description="the head reads the kept coordinates only")
    interleaved: bool = Field(True, description="directions come from the model sliced so far, not from the whole one")
    damp: float = Field(0.01, ge=0, description="of the second moment's mean diagonal, added to it")
    seed: int = Field(42, description="of the random orientation")
    recovery: Recovery = Field(default_factory=Recovery, description="adapters trained afterwards; no steps by default")

    def apply(self, model: nn.Module, tokens: Tensor | None = None, progress: Progress = silent) -> Applied:
        """See `WeightMethod.apply`; `discarded` of the facts is the share of energy cut off at each place."""
        text, places = self.text(tokens), places_of(model)
        if "transformer.wpe" in places.embeddings and (not self.slice_head or self.sparsity_last is not None):
            raise ModelError("gpt2 models need slice_head=True and one width: transformers ties the widths of their two ends")
        if model.training:
            raise CalibrationError("calibrate in eval mode: call model.eval() first")
        width, config = model.get_submodule(places.embeddings[0]).weight.shape[1], cast(Any, model).config
        widths = slice_widths(width, config.num_hidden_layers, self.sparsity, self.sparsity_last, self.round_to)
        before, flops, head = parameter_count(model), flops_per_token(model), cast(Any, model).lm_head.weight
        tied = head is cast(Any, model).get_input_embeddings().weight
        fold_norms(model)
        turn = torch.Generator().manual_seed(self.seed) if self.orientation == "random" else None
        slicing = Slicing(
            widths, lambda moment: principal(moment, self.damp), turn, self.slice_head, self.interleaved
        )
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
