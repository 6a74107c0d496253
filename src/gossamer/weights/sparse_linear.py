"""The runtime of pruned models: linear layers whose zeros pay run on the kernels that skip them."""

from __future__ import annotations

from pydantic import Field, field_validator
from torch import nn

from gossamer.calibration import Calibration
from gossamer.errors import ModelError
from gossamer.hf.sparse import BREAK_EVEN, SparseLayers
from gossamer.ops.sparse_formats import FORMATS, parse_nm
from gossamer.registry import Handle, Method, register


@register("sparse-linear", slot="none", family="weights", name="Sparse linear", baseline=True)
class SparseLinearRuntime(Method):
    """Linear layers of a pruned model on sparse kernels, where the zeros that they have are enough for it to pay.

    It prunes nothing: put it behind a method that does, or on a checkpoint that is pruned already. Each layer is measured and
    packed once, when this is attached: 4x1 blocks of zeros go to the block kernel, which is the fastest for many rows; zeros
    without a pattern to a stream that is fast for the few rows of a decode step. Layers below the break-even stay as they are.
    The dense weights stay in memory, so that detaching gives them back; `gossamer.hf.sparse.sparsify` lets go of them.

    It takes no slot and goes into any recipe; together with `native-linear` list it first, so that this finds plain layers.

    >>> from gossamer.models import tiny_model
    >>> from gossamer.weights.prune import Magnitude
    >>> model = Magnitude(sparsity=0.9, structure="4x1").apply(tiny_model("llama")).model
    >>> with SparseLinearRuntime().attach(model) as handle:
    ...     handle.report()["formats"]
    {'4x1': 14}
    """

    format: str = Field("auto", description="auto, 4x1, 1x4, csr, bitmask, stream, or N:M such as 2:4")
    int8: bool = Field(False, description="weights in 8 bits, and inputs rounded to 8 bits row by row")
    least: float | None = Field(
        None, ge=0, le=1, description="zeros from which a layer runs sparse (default: as measured)"
    )

    @field_validator("format")
    @classmethod
    def _known(cls, value: str) -> str:
        if value != "auto" and value not in FORMATS and parse_nm(value) is None:
            raise ValueError(f"the format is auto, {', '.join(FORMATS)} or N:M")
        return value

    def attach(self, model: nn.Module, calibration: Calibration | None = None) -> Handle:
        """Replace the layers; the handle puts the dense ones back.

        Raises:
            ModelError: no layer has zeros enough.
            InputError: the format has no 8 bits, or a weight does not fit it.
        """
        thresholds = None if self.least is None else dict.fromkeys(BREAK_EVEN[4], self.least)
        layers = SparseLayers(model, self.format, int8=self.int8, thresholds=thresholds)
        if not layers.layers:
            layers.detach()
            raise ModelError(
                f"{self.slug}: no linear layer has zeros enough to be faster sparse: prune the model first"
            )
        return Handle(undo=[layers.detach], reports=[layers.report])
