"""Merging rows of a cache into others instead of dropping them: the assignment, and the weighted means.

    R_ij = max(cos(k_i, k_j), 0) · max(cos(v_i, v_j), 0),    a_i = argmax_j R_ij,  or none where max_j R_ij < τ
    W_j  = s_j + Σ_(a_i = j) s_i
    v_j ← (s_j v_j + Σ s_i v_i) / W_j
    k_j ← ρ_j u_j / ‖u_j‖,   u_j = s_j k_j/‖k_j‖ + Σ s_i k_i/‖k_i‖,   ρ_j = (s_j ‖k_j‖ + Σ s_i ‖k_i‖) / W_j

Averaging keys of different directions would shrink them and flatten the softmax; hence their second form. "None" is the
zero class: a row assigned to it touches nothing, so that all heads run one call of the same shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.errors import InputError
from gossamer.ops import _checks
from gossamer.ops._dispatch import DTYPE_CODES, native, resolve, triton_call

_MERGE, _MATCH = "merge_rows", "best_match"


def merge_rows(rows: Tensor, scores: Tensor, sources: Tensor, targets: Tensor, *, keep_norm: bool = False) -> Tensor:
    """Replace each target row, in place, by the score-weighted mean of itself and its sources.

    ``scores`` stay as they are, so that keys and values are merged with the same weights: call this for both, then go
    on with the scores returned (either call's; they are equal).

    Parameters
    ----------
    rows
        [B, Hkv, S, d], float32, bfloat16 or float16; sums are float32. Views of a larger cache are fine.
    scores
        float32 [B, Hkv, S], the weight of each row, 0 or more.
    sources
        int32 [B, Hkv, m], ids of the rows to merge; a repeated id counts as often as it stands there.
    targets
        int32 [B, Hkv, m], the id of the row that each source goes into, or -1: it is left out (its source id may then be
        anything). No row may be both a source and a target in one call.
    keep_norm
        For keys: the direction is the weighted mean of the unit vectors, the length the weighted mean of the lengths.

    Returns
    -------
    float32 [B, Hkv, S], the scores with W_j at the targets. A target with W_j = 0 keeps its row, and so does one whose
    directions cancel exactly.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit, ids outside ``0 .. S-1``, a row that is both source and target.

    >>> rows = torch.tensor([[[[1.0], [4.0], [7.0]]]])
    >>> scores = torch.tensor([[[2.0, 1.0, 5.0]]])
    >>> merge_rows(rows, scores, torch.tensor([[[1]]]), torch.tensor([[[0]]])).tolist()
    [[[3.0, 1.0, 5.0]]]
    >>> rows.flatten().tolist()
    [2.0, 4.0, 7.0]
    """
    if rows.dim() != 4 or not rows.dtype.is_floating_point:
        raise InputError(f"{_MERGE}: rows must be floats [B,Hkv,S,d], got {rows.dtype} {list(rows.shape)}")
    if scores.shape != rows.shape[:3] or scores.dtype is not torch.float32 or scores.device != rows.device:
        raise InputError(f"{_MERGE}: scores must be float32 {list(rows.shape[:3])} on {rows.device}")
    if sources.dim() != 3 or sources.shape[:2] != rows.shape[:2]:
        raise InputError(f"{_MERGE}: sources must be [{rows.shape[0]}, {rows.shape[1]}, m], got {list(sources.shape)}")
    sources = _ids(_MERGE, "sources", sources, rows)
    targets = _ids(_MERGE, "targets", targets, rows, sources.shape[2])
    run = torch.ops.gossamer.merge_rows if torch.compiler.is_compiling() else _run_merge
    out: Tensor = run(rows, scores, sources, targets, keep_norm)
    return out


def best_match(key: Tensor, value: Tensor, sources: Tensor, centres: Tensor, tau: float) -> Tensor:
    """Assign each source row to the centre that it is most like, in key and in value, or to none.

    Parameters
    ----------
    key, value
        [B, Hkv, S, d] and [B, Hkv, S, dv], floats; compared in float32. (``key`` may be any rows to compare by, such as
        keys before rotary embedding.)
    sources
        int32 [B, Hkv, m], row ids; -1 stands for no row.
    centres
        int32 [B, Hkv, n], row ids; -1 stands for no row.
    tau
        Likeness that a match must reach, the constant likeness of the zero class.

    Returns
    -------
    int32 [B, Hkv, m]: the id of the centre, or -1 where no likeness reaches ``tau``. Of equal centres the first listed.
    A row of zeros is like nothing (likeness 0).

    Raises
    ------
    InputError
        Shapes or devices that do not fit, ids outside ``-1 .. S-1``.

    >>> rows = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [2.0, 0.1], [-1.0, 0.0]]]])
    >>> best_match(rows, rows, torch.tensor([[[2, 3]]]), torch.tensor([[[0, 1]]]), 0.6).tolist()
    [[[0, -1]]]
    """
    if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3] or key.device != value.device:
        raise InputError(
            f"{_MATCH}: want key [B,Hkv,S,d] and value [B,Hkv,S,dv], got {list(key.shape)}, {list(value.shape)}"
        )
    for name, ids in (("sources", sources), ("centres", centres)):
        if ids.dim() != 3 or ids.shape[:2] != key.shape[:2]:
            raise InputError(f"{_MATCH}: {name} must be [{key.shape[0]}, {key.shape[1]}, n], got {list(ids.shape)}")
    sources, centres = _ids(_MATCH, "sources", sources, key), _ids(_MATCH, "centres", centres, key)
    run = torch.ops.gossamer.best_match if torch.compiler.is_compiling() else _run_match
    found: Tensor = run(key, value, sources, centres, float(tau))
    return found


def _ids(op: str, name: str, ids: Tensor, rows: Tensor, count: int | None = None) -> Tensor:
    shape = (*rows.shape[:2], ids.shape[2] if count is None and ids.dim() == 3 else count or 0)
    checked = _checks.int32(op, name, ids, shape, rows)
    assert checked is not None
    return checked


def _merge_reference(rows: Tensor, scores: Tensor, sources: Tensor, targets: Tensor, keep_norm: bool) -> Tensor:
    length = rows.shape[2]
    used = targets != -1
    for ids in (sources, targets):
        if bool((used & ((ids < 0) | (ids >= length))).any()):
            _checks.raise_status(_MERGE, 2)
    total = scores.clone()
    if not bool(used.any()):
        return total
    spare = sources.new_tensor(length)  # a row more, for what goes nowhere
    to, origin = (torch.where(used, ids, spare).long() for ids in (targets, sources))
    marks = torch.zeros(*rows.shape[:2], 2, length + 1, dtype=torch.bool, device=rows.device)
    marks[:, :, 0].scatter_(2, to, True)
    marks[:, :, 1].scatter_(2, origin, True)
    touched = marks[:, :, 0, :length]
    if bool((touched & marks[:, :, 1, :length]).any()):
        _checks.raise_status(_MERGE, 6)
    old = rows.float()
    size = old.norm(dim=-1, keepdim=True)
    unit = old / size.masked_fill(size == 0, 1.0) if keep_norm else old
    weight = scores.gather(2, origin.clamp_max(length - 1)) * used
    pick = origin.clamp_max(length - 1)[..., None]
    into = to.clamp_max(length - 1)  # weight 0 for what goes nowhere

    def mean(x: Tensor) -> Tensor:  # the weighted sum of x over each row and what goes into it
        wide = pick.expand(-1, -1, -1, x.shape[3])
        part = (x.gather(2, wide) * weight[..., None]).masked_fill(~used[..., None], 0.0)
        return (x * scores[..., None]).scatter_add(2, into[..., None].expand_as(part), part)

    total.scatter_add_(2, into, weight.masked_fill(~used, 0.0))
    summed = mean(unit)
    if keep_norm:
        length_of = summed.norm(dim=-1, keepdim=True)
        new = summed * (mean(size) / total[..., None] / length_of)
        touched = touched & (length_of[..., 0] != 0)
    else:
        new = summed / total[..., None]
    rows.copy_(torch.where((touched & (total != 0))[..., None], new.to(rows.dtype), rows))
    return total


def _run_merge(rows: Tensor, scores: Tensor, sources: Tensor, targets: Tensor, keep_norm: bool) -> Tensor:
    backend = resolve(_MERGE, _MERGE, rows, scores)
    if rows.requires_grad:  # autograd must hear of the change, also where gradients are off for the moment
        backend = "reference"
    if backend == "triton":
        merged: Tensor = triton_call(_MERGE, _MERGE)(rows, scores, sources, targets, keep_norm)
        return merged
    if backend == "reference" or rows.stride(3) != 1:
        return _merge_reference(rows, scores, sources, targets, keep_norm)
    scores = scores.contiguous()
    total = scores.clone()
    status = native().merge_rows(
        tuple(x.data_ptr() for x in (rows, scores, sources, targets, total)),
        rows.stride()[:3],
        (*rows.shape, sources.shape[2]),
        keep_norm,
        DTYPE_CODES[rows.dtype],
        torch.get_num_threads(),
    )
    _checks.raise_status(_MERGE, status)
    return total


_merge = torch.library.custom_op("gossamer::merge_rows", _run_merge, mutates_args=("rows",))


@_merge.register_fake
def _merge_fake(rows: Tensor, scores: Tensor, sources: Tensor, targets: Tensor, keep_norm: bool) -> Tensor:
    return torch.empty_like(scores)


def _match_reference(key: Tensor, value: Tensor, sources: Tensor, centres: Tensor, tau: float) -> Tensor:
    batch, heads, length = key.shape[:3]
    if not centres.shape[2]:
        return torch.full_like(sources, -1)
    if any(bool(((ids < -1) | (ids >= length)).any()) for ids in (sources, centres)):
        _checks.raise_status(_MATCH, 2)
    like = None
    for rows in (key, value):
        unit = []
        for ids in (sources, centres):
            index = ids.long().clamp_min(0)[..., None].expand(-1, -1, -1, rows.shape[3])
            some = rows.gather(2, index).float()
            unit.append(some / some.norm(dim=-1, keepdim=True).clamp_min(1e-30))
        cosine = (unit[0] @ unit[1].transpose(2, 3)).clamp_min_(0.0)
        like = cosine if like is None else like.mul_(cosine)
    assert like is not None
    best, at = like.masked_fill_((centres < 0).unsqueeze(2) | like.isnan(), -torch.inf).max(-1)
    found = centres.gather(2, at.view(batch, heads, -1))
    return found.masked_fill(~(best >= tau) | (sources < 0), -1)


def _run_match(key: Tensor, value: Tensor, sources: Tensor, centres: Tensor, tau: float) -> Tensor:
    # On a GPU the reference is two matrix products and a maximum: there is no kernel to gain from.
    if not key.is_cpu or key.dtype is not value.dtype or resolve(_MATCH, _MERGE, key, value) != "native":
        return _match_reference(key, value, sources, centres, tau)
    key, value = _checks.row_major(key), _checks.row_major(value)
    out = torch.empty_like(sources)
    status = native().best_match(
        tuple(x.data_ptr() for x in (key, value, sources, centres, out)),
        (*key.stride()[:3], *value.stride()[:3]),
        (*key.shape, value.shape[3], sources.shape[2], centres.shape[2]),
        tau,
        DTYPE_CODES[key.dtype],
        torch.get_num_threads(),
    )
    _checks.raise_status(_MATCH, status)
    return out


_match = torch.library.custom_op("gossamer::best_match", _run_match, mutates_args=())


@_match.register_fake
def _match_fake(key: Tensor, value: Tensor, sources: Tensor, centres: Tensor, tau: float) -> Tensor:
    return torch.empty_like(sources)
