"""Attention over the tokens that the label cache scores highest: score, select and attend in one call."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from gossamer.errors import InputError
from gossamer.ops import _checks
from gossamer.ops._dispatch import DTYPE_CODES, native, resolve, triton_call
from gossamer.ops.decode_attention import _reference as _attend
from gossamer.ops.labels import REDUCE_CODES, LabelCache, Reduce, _native_cache, check_scoring, native_takes
from gossamer.ops.labels import _scores_reference as _score
from gossamer.ops.select_topk import _reference as _select

_OP = "label_attention"
Selection = Literal["query_head", "kv_head"]


def label_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    channels: Tensor,
    labels: LabelCache,
    k: int,
    *,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
    select: Selection = "kv_head",
    reduce: Reduce | None = None,
    protect_last: bool = True,
    indices_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend the k tokens with the highest label scores: ``label_scores``, ``select_topk`` and ``decode_attention`` as
    one operator.

    Parameters
    ----------
    query, key, value, starts, lengths, scale
        As in :func:`~gossamer.ops.decode_attention.decode_attention`.
    channels, labels
        As in :func:`~gossamer.ops.labels.label_scores`; the cache must hold the labels of all S rows (up to the
        lengths).
    k
        Tokens to attend, at least 1. Sequences with fewer attend all they have.
    select
        ``"kv_head"``: one selection for all query heads of a KV head, each chosen row is read once. ``"query_head"``:
        one selection per query head, as published.
    reduce
        How ``"kv_head"`` joins the scores of the group, ``"sum"`` (default) or ``"max"``. ``"query_head"`` takes none.
    protect_last
        Always keep the current token (row ``length - 1``). False gives the published behaviour.
    indices_out
        int32 [B, Hsel, k] contiguous: reused for the returned indices.

    Returns
    -------
    out
        [B, H, d] in the dtype of ``query``.
    indices, counts
        What was attended, as returned by :func:`~gossamer.ops.select_topk.select_topk`; Hsel = Hkv or H by ``select``.

    Raises
    ------
    InputError
        As for the three operators; ``reduce`` that does not go with ``select``.
    """
    _checks.attention(_OP, query, key, value)
    batch, heads, dim = query.shape
    kv_heads, rows = key.shape[1:3]
    if select not in ("query_head", "kv_head"):
        raise InputError(f"{_OP}: select must be query_head or kv_head, got {select!r}")
    reduce = reduce or ("sum" if select == "kv_head" else "none")
    if (reduce == "none") is not (select == "query_head"):
        raise InputError(f"{_OP}: select={select!r} does not go with reduce={reduce!r}")
    if k < 1:
        raise InputError(f"{_OP}: k must be at least 1, got {k}")
    check_scoring(_OP, query, labels, rows, reduce, kv_heads)
    starts = _checks.int32(_OP, "starts", starts, (batch,), query)
    lengths = _checks.int32(_OP, "lengths", lengths, (batch,), query)
    ids = _checks.int32(_OP, "channels", channels, (labels.codes.shape[1], labels.r), query)
    assert ids is not None
    shape = (batch, heads if select == "query_head" else kv_heads, k)
    if indices_out is not None and (
        indices_out.shape != shape or indices_out.dtype is not torch.int32 or not indices_out.is_contiguous()
    ):
        raise InputError(f"{_OP}: indices_out must be contiguous int32 {list(shape)}")
    scale = 1.0 / math.sqrt(dim) if scale is None else float(scale)
    run = torch.ops.gossamer.label_attention if torch.compiler.is_compiling() else _run
    cache = (labels.codes, labels.step, labels.zero, labels.bits, labels.r)
    indices = torch.empty(shape, dtype=torch.int32, device=query.device) if indices_out is None else indices_out
    out, counts = run(query, key, value, ids, *cache, starts, lengths, scale, reduce, protect_last, indices)
    return out, indices, counts


def _composed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    channels: Tensor,
    labels: LabelCache,
    starts: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    reduce: str,
    protect_last: bool,
    indices: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run the three operators one after the other: the definition of the fused one, on whatever backend each of them
    takes."""
    kv_heads, rows = key.shape[1:3]
    scores = _score(query, channels, labels, rows, starts, lengths, reduce, kv_heads)
    if protect_last and rows:
        last = torch.full((query.shape[0],), rows, device=query.device) if lengths is None else lengths.long()
        first = torch.zeros_like(last) if starts is None else starts.long()
        current = torch.arange(rows, device=query.device) == (last - 1)[:, None]
        scores = scores.masked_fill((current & (last > first)[:, None])[:, None], math.inf)
    chosen, counts = _select(scores, indices.shape[2], starts, lengths)
    indices.copy_(chosen)
    out, _ = _attend(query, key, value, starts, lengths, chosen, counts, scale)
    return out, counts


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    channels: Tensor,
    codes: Tensor,
    step: Tensor | None,
    zero: Tensor | None,
    bits: int,
    r: int,
    starts: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    reduce: str,
    protect_last: bool,
    indices: Tensor,
) -> tuple[Tensor, Tensor]:
    labels = LabelCache(codes, step, zero, bits, r)
    backend = resolve(_OP, _OP, query, key, value)
    if backend == "triton":
        out, chosen, counts = triton_call(_OP, _OP)(
            query,
            key,
            value,
            channels,
            labels,
            indices.shape[2],
            starts=starts,
            lengths=lengths,
            scale=scale,
            select="query_head" if reduce == "none" else "kv_head",
            reduce=reduce,
            protect_last=protect_last,
            indices_out=indices,
        )
        if chosen is not indices:
            indices.copy_(chosen)
        return out, counts
    if backend != "native" or not native_takes(labels):
        return _composed(query, key, value, channels, labels, starts, lengths, scale, reduce, protect_last, indices)
    query, key, value = _checks.row_major(query), _checks.row_major(key), _checks.row_major(value)
    batch, heads, dim = query.shape
    out = query.new_empty(query.shape)
    counts = indices.new_empty(indices.shape[:2])
    status = native().label_attention(
        *_native_cache(labels),
        (query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(), channels.data_ptr()),
        (indices.data_ptr(), counts.data_ptr(), _checks.pointer(starts), _checks.pointer(lengths)),
        (*query.stride()[:2], *key.stride()[:3], *value.stride()[:3]),
        (batch, heads, key.shape[1], key.shape[2], dim),
        indices.shape[2],
        scale,
        REDUCE_CODES[reduce],
        protect_last,
        DTYPE_CODES[query.dtype],
        torch.get_num_threads(),
    )
    _checks.raise_status(_OP, status)
    return out, counts


_custom = torch.library.custom_op("gossamer::label_attention", _run, mutates_args=("indices",))


@_custom.register_fake
def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    channels: Tensor,
    codes: Tensor,
    step: Tensor | None,
    zero: Tensor | None,
    bits: int,
    r: int,
    starts: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    reduce: str,
    protect_last: bool,
    indices: Tensor,
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(indices.shape[:2], dtype=torch.int32)
