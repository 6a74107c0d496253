"""Steps 2 and 3 of SliceGPT: directions from the residual stream, and block after block rotated into them and cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from gossamer.errors import CalibrationError
from gossamer.hf import Matrix, blocks, matrices
from gossamer.models.reshaped import Places, add_shortcuts, set_embedding, set_linear, settle
from gossamer.weights.base import Progress, silent
from gossamer.weights.slicegpt_fold import places_of, readers, stream_width

#: Makes Q, float64 ``[D, D]`` with the directions in columns, from the second moment of what flows there.
Basis = Callable[[Tensor], Tensor]


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
    vectors: Tensor = torch.linalg.eigh(moment + damp * moment.diagonal().mean() * eye).eigenvectors
    return vectors.flip(1)


def random_orthogonal(width: int, generator: torch.Generator) -> Tensor:
    """QR of a uniform random matrix, float64 ``[width, width]``."""
    q: Tensor = torch.linalg.qr(torch.rand(width, width, generator=generator, dtype=torch.float64)).Q
    return q


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
        whole = stream_width(model, places)
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
            back, writes = (
                q[:, :kept].T,
                {role: [m for m in stage.matrices if m.role == role] for role in ("o", "down")},
            )
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
