"""MInference 1.0: dynamic sparse prefill by a pattern per head (Jiang et al., NeurIPS 2024, arXiv 2407.02490).

The shape of a head's attention map is stable over inputs, the positions in it are not. So a search on one sample gives every
query head one of three shapes with budgets of equal cost (`minference_search`), and each prompt is scored cheaply to find
the positions (`minference_patterns`), which kernels for blocks and for columns and diagonals then compute
(`minference_run`). Decode is dense.

    A-shape         sinks and a local band, static
    vertical-slash  whole columns and diagonals, found by the attention of the last 64 queries
    block-sparse    blocks, found by the products of block means

Decisions where the card is open:
    - A-shape is computed in whole blocks, so a query reads up to ``B − 1`` keys beyond the window's far edge and the sinks.
    - Forced sinks and the local band lead the ranking by nearness instead of +∞, so that budgets below the band keep its
      nearest part; distance 0 is always in.
    - Heads that share a KV head choose for themselves, as published; no key is repeated.
    - Sequences with left padding are served: their columns count from their first real row.
    - A prompt in several chunks is dense after its first: the last queries of a chunk are not the prompt's.
    - `area` is ours: it scales each head's budgets online to a share of the causal area, for comparisons at equal cost.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import Tensor, nn

from gossamer.attention import minference_search as searching
from gossamer.attention.base import AttentionMethod
from gossamer.attention.minference_run import (
    A_SHAPE,
    BLOCK_SPARSE,
    VERTICAL_SLASH,
    Area,
    Heads,
    Online,
    PatternPolicy,
)
from gossamer.calibration import Calibration
from gossamer.errors import OutputError
from gossamer.hf import LayerView, PrefillPolicy
from gossamer.hf.views import model_shape
from gossamer.models import fingerprint
from gossamer.registry import register

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class MInferencePolicy(PatternPolicy):
    """The patterns of the calibration, or of the settings; says when there is no calibration."""

    uncalibrated: str | None = None

    def attend(
        self, layer: LayerView, heads: Heads, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The output and the area of each head."""
        if self.uncalibrated:
            layer.runtime.say_once(self.uncalibrated)
        return super().attend(layer, heads, query, key, value)


@register("minference", slot="attention.prefill", family="attention", needs=["calibration"])
class MInference(AttentionMethod):
    """Read a long prompt by a sparse pattern per head, found by an offline search and placed anew for every prompt.

    For prompts well beyond 10,000 tokens: below, the estimate and small blocks cost what they save. Cost of a head: the share
    of the causal area in its blocks (`report()["prefill_area"]`), and 64 rows of attention for the estimate. Decode and the
    cache are left alone. The calibration is one pass over a KV-retrieval prompt; without one every head is
    vertical-slash(1000, 6096), as in the official code.

    Paper: MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention, arXiv 2407.02490.

    >>> MInference(area="1/16").area
    0.0625
    """

    pattern: Literal["searched", "a-shape", "vertical-slash", "block-sparse"] = Field(
        "searched", description="each head's own from the calibration, or one for all heads"
    )
    k_v: int = Field(1000, ge=1, description="columns of vertical-slash, where there is no calibration")
    k_s: int = Field(6096, ge=1, description="distances of vertical-slash, where there is no calibration")
    k_b: int = Field(100, ge=1, description="key blocks per query block, for pattern='block-sparse'")
    n_init: int = Field(1024, ge=1, description="sinks of A-shape, for pattern='a-shape'; the search's target")
    n_local: int = Field(4096, ge=1, description="window of A-shape, for pattern='a-shape'; the search's target")
    minference_ratio: float = Field(1.0, gt=0, le=64, description="factor on k_v and k_s")
    area: Area | None = Field(
        None, description="scale each head's budgets to this share of the causal area; none: as they are"
    )
    starting_layer: int = Field(0, ge=0, description="layers before this one are dense")
    last_q: int = Field(64, ge=1, description="last queries whose attention places columns and diagonals")
    sinks: int = Field(30, ge=0, description="first columns, always kept")
    local: int = Field(100, ge=1, description="first distances, always kept")
    block_size: int = Field(64, ge=1, description="B, side of a kernel's block")
    search: searching.Search = Field(
        "paper", description="how `calibrate` chooses: Alg. 1, or the official code's searches"
    )
    epsilon: float = Field(
        0.02, ge=0, le=1, description="ε, relative distance from the target area that is near enough"
    )
    step: int = Field(50, ge=1, description="tokens by which the search changes a budget")
    sample_tokens: int = Field(
        searching.PAPER_SAMPLE, ge=256, description="length of the calibration sample, at most what the model can read"
    )
    scale: float | None = Field(
        None, gt=0, description="factor on all token numbers of the search (default: sample length / 30,000, at most 1)"
    )

    def online(self) -> Online:
        """How positions are found."""
        return Online(self.last_q, self.sinks, self.local, self.block_size)

    def calibration_sample(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Tensor:
        """The sample for `calibrate`: one KV-retrieval prompt, int64 ``[1, length]``."""
        return searching.sample(tokenizer, searching.sample_length(model, self.sample_tokens), seed)

    def calibrate(self, model: nn.Module, tokens: Tensor) -> Calibration:
        """Search every head's pattern on a sample int64 ``[blocks, block]``, which is joined into one prompt.

        Best is what `calibration_sample` makes: on text whose attention moves little, every head looks like an A-shape.

        Raises:
            InputError: a sample of another form or shorter than the target, or a model in training mode.
            CalibrationError: layers that were never reached.
        """
        scale = min(1.0, tokens.numel() / searching.PAPER_SAMPLE) if self.scale is None else self.scale
        plan = searching.Plan(self.search, (self.n_init, self.n_local), self.epsilon, self.step, scale=scale)
        return searching.search(model, tokens, self.online(), plan)

    def import_calibration(self, path: str | Path, model: nn.Module) -> Calibration:
        """Read a config file of the official release (JSON); see `minference_search.import_config`."""
        return searching.import_config(path, model, (self.k_v, self.k_s))

    def export_calibration(self, calibration: Calibration, path: str | Path) -> Path:
        """Write a calibration as a config file that the official code reads.

        Raises:
            CalibrationError: made for another method.
            OutputError: the file cannot be written.
        """
        path, config = Path(path), searching.export_config(self.require(calibration))
        try:
            path.write_text(json.dumps(config) + "\n", "utf-8")
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from None
        return path

    def layers(self, model: nn.Module, calibration: Calibration | None) -> list[Heads | None]:
        """The patterns of every layer of a model; None: dense.

        Raises:
            CalibrationError: a calibration of another method or model, or damaged.
        """
        shape = model_shape(model)
        uniform = {
            "searched": (VERTICAL_SLASH, self.k_v, self.k_s),
            "vertical-slash": (VERTICAL_SLASH, self.k_v, self.k_s),
            "a-shape": (A_SHAPE, self.n_init, self.n_local),
            "block-sparse": (BLOCK_SPARSE, self.k_b, 1),
        }[self.pattern]
        layers = [Heads.uniform(*uniform, shape.heads)] * shape.layers
        if self.pattern == "searched" and calibration is not None:
            self.require(calibration).check(fingerprint(model))
            layers = searching.heads_of(calibration, shape.layers, shape.heads)
        return [
            None if index < self.starting_layer else heads.slashes_scaled(self.minference_ratio)
            for index, heads in enumerate(layers)
        ]

    def prefill_policy(self, model: nn.Module, calibration: Calibration | None) -> PrefillPolicy:
        """A policy with the patterns of this model's heads."""
        policy = MInferencePolicy(self.slug, self.layers(model, calibration), self.online(), self.area)
        if self.pattern == "searched" and calibration is None:
            policy.uncalibrated = self.uncalibrated()
        return policy

    def uncalibrated(self) -> str:
        """What to say where heads have no pattern of their own."""
        default = f"vertical-slash({self.k_v}, {self.k_s})"
        return f"{self.slug} is not calibrated: every head is {default}, within the context"
