"""Exact top-k of many scores, as ascending token ids, without sorting them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gossamer.errors import InputError
from gossamer.ops import _checks
from gossamer.ops._dispatch import native, resolve, triton_call

_OP = "select_topk"


def select_topk(
    scores: Tensor, k: int, *, starts: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Select the k highest scores of each line.

    Parameters
    ----------
    scores
        float32 [B, Hsel, S]. ``-inf`` and NaN are never selected; equal scores go to the lower token id.
    k
        Tokens to keep, at least 1; may exceed S.
    starts, lengths
        int32 [B]: only tokens in [start, length) take part, the others are not read. Default 0 and S.

    Returns
    -------
    indices
        int32 [B, Hsel, k], token ids ascending; slots beyond the count are 0.
    counts
        int32 [B, Hsel], min(k, number of selectable scores).

    Raises
    ------
    InputError
        Wrong shape or dtype, k < 1, ranges beyond S.
    """
    if scores.dim() != 3 or scores.dtype is not torch.float32:
        raise InputError(f"{_OP}: scores must be float32 [B, Hsel, S], got {scores.dtype} {list(scores.shape)}")
    if k < 1:
        raise InputError(f"{_OP}: k must be at least 1, got {k}")
    starts = _checks.int32(_OP, "starts", starts, (scores.shape[0],), scores)
    lengths = _checks.int32(_OP, "lengths", lengths, (scores.shape[0],), scores)
    run = torch.ops.gossamer.select_topk if torch.compiler.is_compiling() else _run
    indices, counts = run(scores, k, starts, lengths)
    return indices, counts


def _reference(scores: Tensor, k: int, starts: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, _, tokens = scores.shape
    keep = _checks.inside(*_checks.bounds(_OP, starts, lengths, batch, tokens, scores.device), tokens)
    scores = scores.masked_fill(~keep | scores.isnan(), -math.inf)
    counts = (scores > -math.inf).sum(-1).clamp(max=k)
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]  # stable: ties keep the lower id
    best = torch.nn.functional.pad(best, (0, k - best.shape[-1]))
    unused = torch.arange(k, device=scores.device) >= counts[..., None]
    indices = best.masked_fill(unused, tokens).sort(dim=-1).values.masked_fill(unused, 0)
    return indices.int(), counts.int()


def _run_native(scores: Tensor, k: int, starts: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, heads, tokens = scores.shape
    scores = _checks.row_major(scores)
    indices = torch.empty((batch, heads, k), dtype=torch.int32)
    counts = torch.empty((batch, heads), dtype=torch.int32)
    status = native().select_topk(
        (scores.data_ptr(), indices.data_ptr(), counts.data_ptr(), _checks.pointer(starts), _checks.pointer(lengths)),
        scores.stride()[:2],
        (batch, heads, tokens, k),
        torch.get_num_threads(),
    )
    _checks.raise_status(_OP, status)
    return indices, counts


def _run(scores: Tensor, k: int, starts: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    backend = resolve(_OP, _OP, scores)
    if backend == "native":
        return _run_native(scores, k, starts, lengths)
    if backend == "triton":
        result: tuple[Tensor, Tensor] = triton_call(_OP, _OP)(scores, k, starts=starts, lengths=lengths)
        return result
    return _reference(scores, k, starts, lengths)


_custom = torch.library.custom_op("gossamer::select_topk", _run, mutates_args=())


@_custom.register_fake
def _fake(scores: Tensor, k: int, starts: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = scores.shape[:2]
    return scores.new_empty((*shape, k), dtype=torch.int32), scores.new_empty(shape, dtype=torch.int32)
