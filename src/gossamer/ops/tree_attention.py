"""Attention of a tree of candidates: every node reads the cached rows, its ancestors and itself."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.errors import InputError
from gossamer.ops import _checks
from gossamer.ops._dispatch import DTYPE_CODES, native, resolve
from gossamer.ops.decode_attention import decode_attention, merge_attention

_OP = "tree_attention"
MAX_NODES = 512
"""Nodes that a tree may have."""


def tree_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scale: float | None = None) -> Tensor:
    """Attend with the nodes of a tree, whose rows are the last ones of the cache.

    The rows before are read once for all nodes and all heads of a group, as a decode step reads them; what the nodes see of
    each other is merged into that by its log-sum-exp.

    Parameters
    ----------
    query
        [B, H, n, d], of n nodes, 1 to 512.
    key, value
        [B, Hkv, S, d], S >= n; row ``S - n + i`` is node i's. Keys are never repeated.
    mask
        bool [n, n]: whether a node (row) sees another. Every node sees itself, and none that stands behind it.
    scale
        Factor on the scores; default ``d ** -0.5``.

    Returns
    -------
    [B, H, n, d] in the dtype of ``query``.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit.

    >>> out = tree_attention(torch.ones(1, 2, 3, 4), torch.ones(1, 1, 9, 4), torch.ones(1, 1, 9, 4), torch.eye(3).bool())
    >>> out.shape
    torch.Size([1, 2, 3, 4])
    """
    _checks.prefill(_OP, query, key, value)
    nodes = query.shape[2]
    if mask.shape != (nodes, nodes) or mask.dtype is not torch.bool or nodes > MAX_NODES:
        raise InputError(f"{_OP}: want a bool mask [n,n] of n = {nodes} <= {MAX_NODES} nodes, got {list(mask.shape)}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    run = torch.ops.gossamer.tree_attention if torch.compiler.is_compiling() else _run
    out: Tensor = run(query, key, value, mask, scale)
    return out


def _run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    batch, heads, nodes, dim = query.shape
    past, kv_heads = key.shape[2] - nodes, key.shape[1]
    # The heads of a group and their nodes are so many heads that read the same rows.
    out, lse = decode_attention(
        query.reshape(batch, heads * nodes, dim), key[:, :, :past], value[:, :, :past], scale=scale, return_lse=True
    )
    own_key, own_value = key[:, :, past:], value[:, :, past:]
    if resolve(_OP, "decode_attention", query, key, value) == "native" and mask.is_cpu:
        query, own_key, own_value = (_checks.row_major(x) for x in (query, own_key, own_value))
        mask = mask.contiguous()
        native().tree_attention(
            (
                query.data_ptr(),
                own_key.data_ptr(),
                own_value.data_ptr(),
                out.data_ptr(),
                lse.data_ptr(),
                mask.data_ptr(),
            ),
            (*query.stride()[:3], *own_key.stride()[:3], *own_value.stride()[:3]),
            (batch, heads, kv_heads, nodes, dim),
            scale,
            DTYPE_CODES[query.dtype],
            torch.get_num_threads(),
        )
        return out.view(query.shape)
    grouped = query.reshape(batch, kv_heads, -1, nodes, dim).float()
    scores = torch.einsum("bkgtd,bksd->bkgts", grouped, own_key.float()) * scale
    scores = scores.masked_fill(~mask.to(query.device), -torch.inf)
    of_nodes = scores.logsumexp(-1)
    among = torch.einsum("bkgts,bksd->bkgtd", (scores - of_nodes[..., None]).exp(), own_value.float())
    outs = torch.stack([out.reshape(grouped.shape).float(), among])
    merged, _ = merge_attention(outs, torch.stack([lse.reshape(grouped.shape[:-1]), of_nodes]))
    return merged.to(query.dtype).reshape(query.shape)


_custom = torch.library.custom_op("gossamer::tree_attention", _run, mutates_args=())


@_custom.register_fake
def _fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    return query.new_empty(query.shape)
