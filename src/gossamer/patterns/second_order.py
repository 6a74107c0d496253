"""One-shot pruning with second-order compensation: SparseGPT (Frantar and Alistarh 2023), also known as FastOBC.

For one matrix W ``[out, in]`` and the Gram matrix H = Σ x xᵀ of its inputs, columns go from left to right. Within a block of
columns the entries of least w² / U_cc² are removed, U the upper Cholesky factor of H⁻¹; the error of each column is spread
over the columns to its right, which are free to make up for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.errors import InputError
from gossamer.patterns.structures import Structure, keep_largest, nm_mask


def second_order_prune(
    weight: Tensor,
    gram: Tensor,
    sparsity: float = 0.5,
    structure: str | Structure = "element",
    *,
    block_size: int = 128,
    damp: float = 0.01,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The pruned weight, float32 ``[out, in]``, and its mask.

    Args:
        weight: ``[out, in]``.
        gram: Σ x xᵀ over the calibration tokens, ``[in, in]``.
        sparsity: share that each block of columns loses, over all rows: exactly ``round(rows · columns · sparsity)``.
        structure: element, or N:M.
        block_size: columns that are ranked together; a multiple of M.
        damp: of the mean of H's diagonal, added to it.
        kept: a mask to prune under instead of choosing one (only compensate).

    Raises:
        InputError: shapes that do not fit, a share out of range, another structure, or a Gram matrix that is not finite.

    >>> w, mask = second_order_prune(torch.tensor([[1.0, -2.0, 3.0, 0.5]]), torch.eye(4), structure="2:4")
    >>> w
    tensor([[ 0., -2.,  3.,  0.]])
    """
    form = Structure.parse(structure)
    rows, columns = weight.shape
    if gram.shape != (columns, columns) or not bool(gram.isfinite().all()):
        raise InputError(
            f"a weight {list(weight.shape)} needs a finite Gram matrix of its inputs, got {list(gram.shape)}"
        )
    if form.kind == "block" or not 0 <= sparsity <= 1 or (form.kind == "n:m" and block_size % form.m):
        raise InputError(
            f"second-order pruning takes element or N:M and a sparsity in 0 .. 1, got {form}, {sparsity:g}"
        )
    w = weight.detach().double().clone()
    h = gram.double().clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(damp * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    mask = torch.ones(rows, columns, dtype=torch.bool, device=w.device)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        block, factor = w[:, start:end].clone(), upper[start:end, start:end]
        errors = torch.zeros_like(block)
        if kept is not None:
            stays = kept[:, start:end].to(w.device)
        elif form.kind == "element":
            score = block.square() / factor.diagonal().square()
            stays = keep_largest([score], round(score.numel() * sparsity))[0]
        else:
            stays = torch.ones_like(
                block, dtype=torch.bool
            )  # a group is judged when its turn comes, by weights as they are
        for column in range(end - start):
            if kept is None and form.kind == "n:m" and column % form.m == 0:
                group = slice(column, column + form.m)
                stays[:, group] = nm_mask(block[:, group].square() / factor.diagonal()[group].square(), form.n, form.m)
            now = block[:, column]
            after = torch.where(stays[:, column], now, 0)
            error = (now - after) / factor[column, column]
            block[:, column:] -= error[:, None] * factor[column, column:][None]
            block[:, column] = after
            errors[:, column] = error
        w[:, start:end], mask[:, start:end] = block, stays
        w[:, end:] -= errors @ upper[start:end, end:]
    return w.float(), mask
