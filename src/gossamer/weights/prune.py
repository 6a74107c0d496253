"""Pruning by naming its parts: criterion × structure × allocation, in one shot; and the usual baselines as such points.

    criterion   magnitude | random | wanda | sparsegpt          which entries are worth least
    structure   element | N:M | RxC | row | column | rows:R     who lives and dies together
    scope       global | matrix | erk                           who competes with whom

Wanda and SparseGPT look at text, block by block, each block with the inputs that the pruned ones before it make.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from gossamer.errors import CalibrationError, InputError
from gossamer.hf import Matrix, Stage, blocks, masks_for, matrices
from gossamer.patterns import Masks, Scope, Structure, choose, second_order_prune
from gossamer.patterns.criteria import activation_aware, magnitude, random
from gossamer.registry import register
from gossamer.weights.base import Applied, Progress, WeightMethod, silent

Criterion = Literal["magnitude", "random", "wanda", "sparsegpt"]


class Pruning(WeightMethod):
    """Base of one-shot pruning: settings that say how much, in which structure, and who competes."""

    sparsity: float = Field(0.5, ge=0, lt=1, description="share of the prunable weights to remove; N:M has its own")
    structure: str = Field("element", description="element, N:M, RxC, row, column or rows:R")
    scope: Scope = Field("global", description="who competes: global, matrix, or erk (each at a density by its shape)")

    @field_validator("structure")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            return str(Structure.parse(value))
        except InputError as error:
            raise ValueError(str(error)) from None

    def score(self, matrix: Matrix, generator: torch.Generator) -> Tensor:
        """What each entry is worth, float32 ``[out, in]``."""
        raise NotImplementedError

    def masks(self, model: nn.Module) -> Masks:
        """What would stay, without changing the model."""
        chosen = matrices(model)
        generator = torch.Generator().manual_seed(getattr(self, "seed", 0))
        scores = {m.name: self.score(m, generator) for m in chosen}
        return masks_for(chosen, choose(scores, self.sparsity, self.structure, self.scope))

    def apply(self, model: nn.Module, tokens: Tensor | None = None, progress: Progress = silent) -> Applied:
        """Set what is removed to zero, in place; see `WeightMethod.apply`."""
        masks = self.masks(model)
        masks.apply(model)
        return Applied(model, _facts(masks), masks)


@register("magnitude", slot="weights", family="weights", name="Magnitude", baseline=True)
class Magnitude(Pruning):
    """Remove the smallest weights of the blocks' matrices, in one shot and without any data.

    >>> from gossamer.models import tiny_model
    >>> Magnitude(structure="2:4").apply(tiny_model("llama")).facts["sparsity"]
    0.5
    """

    def score(self, matrix: Matrix, generator: torch.Generator) -> Tensor:
        """|w|."""
        return magnitude(matrix.weight)


@register("random-weights", slot="weights", family="weights", name="Random weights", baseline=True)
class RandomWeights(Pruning):
    """Remove weights at random: what any criterion must beat.

    >>> from gossamer.models import tiny_model
    >>> round(RandomWeights(sparsity=0.25).apply(tiny_model("llama")).facts["sparsity"], 4)
    0.25
    """

    seed: int = Field(0, description="of the choice")

    def score(self, matrix: Matrix, generator: torch.Generator) -> Tensor:
        """A number drawn for each entry."""
        return random(matrix.weight, generator)


@register("wanda", slot="weights", family="weights", name="Wanda", baseline=True, needs=["calibration"])
class Wanda(WeightMethod):
    """Remove the entries of least ``|w| · ‖input‖``, row by row, block by block, without changing what stays.

    Sun et al., 2023: "A Simple and Effective Pruning Approach for Large Language Models". Every output keeps the same share
    of its inputs.

    >>> from gossamer.models import tiny_model
    >>> Wanda(sparsity=0.5).apply(tiny_model("llama"), torch.arange(64).view(1, 64)).facts["sparsity"]
    0.5
    """

    sparsity: float = Field(0.5, ge=0, lt=1, description="share of each row to remove; N:M has its own")
    structure: str = Field("element", pattern=r"^(element|[1-9]\d*:[1-9]\d*)$", description="element or N:M")

    def apply(self, model: nn.Module, tokens: Tensor | None = None, progress: Progress = silent) -> Applied:
        """See `WeightMethod.apply`."""
        done: dict[str, Tensor] = {}
        for stage in blocks(model, self.text(tokens), progress):
            for matrix, gram in gram_matrices(stage, diagonal=True):
                score = activation_aware(matrix.weight, gram.sqrt())
                if self.structure == "element":
                    mask = _rows(score, self.sparsity)
                else:
                    mask = choose({"w": score}, 0, self.structure)["w"]
                matrix.write(matrix.weight.masked_fill(~mask, 0))
                done[matrix.name] = matrix.unview(mask)
        masks = Masks(done)
        return Applied(model, _facts(masks), masks)


@register("sparsegpt", slot="weights", family="weights", name="SparseGPT", baseline=True, needs=["calibration"])
class SparseGPT(WeightMethod):
    """Remove entries by second-order cost and let the rest of each row make up for them, block by block.

    Frantar and Alistarh, 2023: "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot".

    >>> from gossamer.models import tiny_model
    >>> SparseGPT(structure="2:4").apply(tiny_model("llama"), torch.arange(64).view(1, 64)).facts["sparsity"]
    0.5
    """

    sparsity: float = Field(0.5, ge=0, lt=1, description="share of each block of columns to remove; N:M has its own")
    structure: str = Field("element", pattern=r"^(element|[1-9]\d*:[1-9]\d*)$", description="element or N:M")
    block_size: int = Field(128, ge=1, description="columns that are ranked together")
    damp: float = Field(0.01, gt=0, description="of the mean diagonal of the Gram matrix, added to it")

    def apply(self, model: nn.Module, tokens: Tensor | None = None, progress: Progress = silent) -> Applied:
        """See `WeightMethod.apply`."""
        done: dict[str, Tensor] = {}
        for stage in blocks(model, self.text(tokens), progress):
            for matrix, gram in gram_matrices(stage):
                weight, mask = second_order_prune(
                    matrix.weight, gram, self.sparsity, self.structure, block_size=self.block_size, damp=self.damp
                )
                matrix.write(weight)
                done[matrix.name] = matrix.unview(mask)
        masks = Masks(done)
        return Applied(model, _facts(masks), masks)


def gram_matrices(stage: Stage, diagonal: bool = False) -> list[tuple[Matrix, Tensor]]:
    """Σ x xᵀ of the inputs of each matrix of a block, float64 ``[in, in]``; with `diagonal` only Σ x², ``[in]``.

    Raises:
        CalibrationError: an input is not finite.
    """
    sums: dict[str, Tensor] = {}

    def see(matrix: Matrix, x: Tensor) -> None:
        x = x.double() if diagonal else x.float()
        now = x.square().sum(0) if diagonal else (x.T @ x).double()
        sums[matrix.name] = sums[matrix.name] + now if matrix.name in sums else now

    with stage.watching(see):
        stage.run()
    for name, gram in sums.items():
        if not bool(gram.isfinite().all()):
            raise CalibrationError(f"inputs of {name} are not finite: check the model's weights and the text")
    return [(matrix, sums[matrix.name]) for matrix in stage.matrices if matrix.name in sums]


def _rows(score: Tensor, sparsity: float) -> Tensor:
    """In every row the smallest go, the later of equal ones first."""
    remove = round(sparsity * score.shape[1])
    order = score.sort(dim=1, descending=True, stable=True).indices
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, order[:, score.shape[1] - remove :], False)


def _facts(masks: Masks) -> dict[str, object]:
    return {"sparsity": masks.sparsity, "prunable": masks.total, "kept": masks.kept}
