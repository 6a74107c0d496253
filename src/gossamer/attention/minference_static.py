"""MInference with a static index: its patterns, placed once and frozen, which the paper (arXiv 2407.02490) compares with.

Each head keeps its pattern and budgets; what is frozen is the ranking of columns, distances and blocks. A prompt as long as
the one they were found in has exactly the same lists, whatever it says. Decisions where the card is open:

    - Lists come from the calibration sample, or, without such a calibration, from the first prompt that is read sparsely (the
      first sequence of its batch). They belong to the handle: attaching anew finds new ones.
    - In a shorter prompt the best that lie within it are kept. In a longer one columns and distances are those known (sinks
      and the local band are complete at any length), and rows of blocks beyond the last known one read as that one does.
    - With left padding columns count from the first real row, and rows of blocks from its block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.attention import minference_patterns as patterns
from gossamer.attention import minference_search as searching
from gossamer.attention.minference import MInference, MInferencePolicy
from gossamer.attention.minference_run import BLOCK_SPARSE, VERTICAL_SLASH, Heads, Online, Scores
from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError
from gossamer.hf import AttentionRuntime, LayerView
from gossamer.hf.views import model_shape
from gossamer.registry import register


def of_first(scores: Scores, starts: Tensor | None, block_size: int) -> Scores:
    """The scores of a batch's first sequence as those of a prompt without padding: ``[1, heads, …]``.

    >>> of_first(Scores(torch.tensor([[[-torch.inf, 2.0, 1.0]]]), None, None), torch.tensor([1]), 64).vertical
    tensor([[[2., 1.]]])
    """
    start = 0 if starts is None else int(starts[0])
    first = start // block_size
    vertical, slash, blocks = (None if x is None else x[:1] for x in scores)
    return Scores(
        None if vertical is None else vertical[..., start:].clone(),
        None if slash is None else slash[..., : slash.shape[-1] - start].clone(),
        None if blocks is None else blocks[..., first:, first:].clone(),
    )


def placed(frozen: Scores, batch: int, length: int, online: Online, starts: Tensor | None = None) -> Scores:
    """Frozen scores ``[1, heads, …]`` laid over prompts of another length: ``[batch, heads, …]``.

    Columns and distances that the frozen prompt did not have are ``-inf``, so never chosen.

    >>> online = Online(sinks=1, local=1, block_size=2)
    >>> frozen = Scores(torch.tensor([[[9.0, 2.0, 1.0]]]), torch.tensor([[[9.0, 4.0, 3.0]]]), None)
    >>> placed(frozen, 1, 4, online).slash.tolist()
    [[[1000000.0, 4.0, 3.0, -inf]]]
    """
    size, first = online.block_size, [0] * batch if starts is None else starts.tolist()
    vertical = slash = blocks = None
    if frozen.vertical is not None and frozen.slash is not None:
        lines = [_line(frozen.vertical[0], start, length) for start in first]
        distances = _line(frozen.slash[0], 0, length).expand(batch, -1, -1)
        vertical, slash = patterns.force(torch.stack(lines), distances, online.sinks, online.local, starts)
    if frozen.blocks is not None:
        blocks = torch.stack([_rows(frozen.blocks[0], start // size, -(-length // size)) for start in first])
    return Scores(vertical, slash, blocks)


def _line(scores: Tensor, start: int, length: int) -> Tensor:
    """``[heads, n]`` from place `start` on in ``[heads, length]``, ``-inf`` around."""
    known = scores[:, : length - start]
    return F.pad(known, (start, length - start - known.shape[1]), value=-torch.inf)


def _rows(scores: Tensor, start: int, blocks: int) -> Tensor:
    """``[heads, n, n]`` from block `start` on in ``[heads, blocks, blocks]``; the last known row serves those beyond."""
    real = blocks - start
    known = scores[:, torch.arange(real, device=scores.device).clamp_max(scores.shape[1] - 1), :real]
    known = F.pad(known, (start, real - known.shape[2], start, 0), value=-torch.inf)
    own = torch.arange(start, device=scores.device)
    known[:, own, own] = 0.0  # a block of padding has itself
    return known


class StaticPolicy(MInferencePolicy):
    """Places each layer's patterns by its frozen scores; the first prompt freezes them where none were given."""

    def __init__(
        self,
        slug: str,
        layers: Sequence[Heads | None],
        online: Online,
        area: float | None = None,
        frozen: dict[int, Scores] | None = None,
    ) -> None:
        super().__init__(slug, layers, online, area)
        #: Scores ``[1, heads, …]`` by layer.
        self.frozen = frozen or {}

    def scores(self, layer: LayerView, heads: Heads, query: Tensor, key: Tensor) -> Scores:
        """The frozen ones, for this prompt's length."""
        frozen = self.frozen.get(layer.index)
        if frozen is None or _lacks(frozen, heads):
            found = super().scores(layer, heads, query, key)
            frozen = self.frozen[layer.index] = of_first(found, layer.starts, self.online.block_size)
        near = Scores(*(None if x is None else x.to(query.device) for x in frozen))
        return placed(near, len(query), key.shape[2], self.online, layer.starts)


def _lacks(scores: Scores, heads: Heads) -> bool:
    slashes, blocks = (bool((heads.kind == kind).any()) for kind in (VERTICAL_SLASH, BLOCK_SPARSE))
    return (slashes and scores.slash is None) or (blocks and scores.blocks is None)


@register(
    "minference-static",
    slot="attention.prefill",
    family="attention",
    name="MInference, static index",
    baseline=True,
    needs=["calibration"],
)
class StaticMInference(MInference):
    """MInference whose columns, distances and blocks are found once and stay for all later prompts.

    A baseline: it shows what placing the patterns anew for every prompt is worth (in the paper, InfiniteBench falls from 38.8
    to 31.9). Costs what MInference does, less the estimate. `calibrate` searches the patterns and freezes their places on the
    same sample; with a calibration of ``minference``, or none, the first prompt freezes them.

    Paper: MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention, arXiv 2407.02490.

    >>> StaticMInference(area="1/16").area
    0.0625
    """

    def require(self, calibration: Calibration | None) -> Calibration:
        """As in `Method`, and a calibration of ``minference`` will do."""
        if calibration is not None and calibration.method == searching.SLUG:
            return calibration
        return super().require(calibration)

    def calibrate(self, model: nn.Module, tokens: Tensor) -> Calibration:
        """Search every head's pattern, then freeze the places that the patterns have in the sample.

        Raises:
            InputError: a sample of another form or shorter than the target, or a model in training mode.
            CalibrationError: layers that were never reached.
        """
        found = super().calibrate(model, tokens)
        policy = self.prefill_policy(model, found)
        device, call = next(model.parameters()).device, cast(Any, model)
        runtime = AttentionRuntime(model, prefill=policy)
        try:
            with torch.no_grad():
                call(tokens.reshape(1, -1).to(device), use_cache=True, logits_to_keep=1)
        finally:
            runtime.detach()
        tensors = {
            f"{name}.{layer}": scores[0].float().cpu()
            for layer, frozen in policy.frozen.items()
            for name, scores in frozen._asdict().items()
            if scores is not None
        }
        # What lies in the future has no score; calibrations hold finite numbers.
        tensors = {name: x.clamp_min(torch.finfo(torch.float32).min) for name, x in tensors.items()}
        return replace(found, method=self.slug, tensors={**found.tensors, **tensors})

    def prefill_policy(self, model: nn.Module, calibration: Calibration | None) -> StaticPolicy:
        """A policy with the patterns of this model's heads, and their places where the calibration has them.

        Raises:
            CalibrationError: a calibration of another method or model, or damaged.
        """
        frozen = {} if calibration is None else _frozen(calibration, model)
        policy = StaticPolicy(self.slug, self.layers(model, calibration), self.online(), self.area, frozen)
        if self.pattern == "searched" and calibration is None:
            policy.uncalibrated = self.uncalibrated()
        return policy


def _frozen(calibration: Calibration, model: nn.Module) -> dict[int, Scores]:
    """The places in a calibration, by layer; layers that it lacks are found in the first prompt."""
    shape, found = model_shape(model), {}
    for layer in range(shape.layers):
        vertical, slash, blocks = (calibration.tensors.get(f"{name}.{layer}") for name in Scores._fields)
        pair = vertical is not None and slash is not None and vertical.shape == slash.shape
        fits = pair or (vertical is None and slash is None)
        fits &= blocks is None or (blocks.ndim == 3 and blocks.shape[1] == blocks.shape[2])
        given = [x for x in (vertical, slash, blocks) if x is not None]
        if not fits or any(len(x) != shape.heads or x.ndim < 2 or not x.is_floating_point() for x in given):
            raise CalibrationError(f"this {calibration.method} calibration is damaged: places of layer {layer}")
        if given:
            low = torch.finfo(torch.float32).min
            parts = [
                None if x is None else x.masked_fill(x == low, -torch.inf)[None] for x in (vertical, slash, blocks)
            ]
            found[layer] = Scores(*parts)
    return found
