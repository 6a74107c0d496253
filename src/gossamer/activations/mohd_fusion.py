"""MoHD's group fusion: cheap structured matrices that mix sub-dimensions again.

Monarch: Pᵀ·BD₁·P·BD₂ with d = b1·b2; BD₂ has b1 blocks of b2², BD₁ b2 of b1²; P transposes the b1 × b2 table
block-diagonal: one matrix for each of the N groups
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

Fusion = Literal["monarch", "block", "none"]


def monarch_sizes(width: int) -> tuple[int, int]:
    """(b1, b2) with b1·b2 = d, as near to √d as d's divisors allow; b1 ≤ b2.

    >>> monarch_sizes(64), monarch_sizes(192)
    ((8, 8), (12, 16))
    """
    first = next(b for b in range(math.isqrt(width), 0, -1) if width % b == 0)
    return first, width // first


def monarch(x: Tensor, second: Tensor, first: Tensor) -> Tensor:
    """Pᵀ·BD₁·P·BD₂·x for x ``[..., d]``; P reads the b1 × b2 table of x by columns.

    Args:
        second: BD₂, ``[b1, b2, b2]``, applied first.
        first: BD₁, ``[b2, b1, b1]``.
    """
    b1, b2 = second.shape[:2]
    # Batched products of the blocks with all rows at once: at one row einsum would take five times as long.
    table = torch.bmm(x.reshape(-1, b1, b2).transpose(0, 1), second.mT)
    table = torch.bmm(table.permute(2, 1, 0).contiguous(), first.mT)
    return table.permute(1, 2, 0).reshape(x.shape)


class MonarchFusion(nn.Module):
    """Re-mixes all groups at a cost of d·(b1 + b2), that is 2·d^1.5 where d is a square; the identity when made.

    >>> MonarchFusion(64).cost == 2 * 64**1.5
    True
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        b1, b2 = monarch_sizes(width)
        self.second = nn.Parameter(torch.empty(b1, b2, b2))
        self.first = nn.Parameter(torch.empty(b2, b1, b1))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Make it the identity."""
        for factor in (self.second, self.first):
            factor.copy_(torch.eye(factor.shape[-1], device=factor.device).expand_as(factor))

    @property
    def cost(self) -> int:
        """Multiply-adds for a token, which is also the number of parameters."""
        return self.second.numel() + self.first.numel()

    def dense(self) -> Tensor:
        """The matrix ``[d, d]`` it stands for: forward(x) = dense() @ x."""
        width = self.first.shape[0] * self.second.shape[0]
        columns = monarch(torch.eye(width, dtype=self.first.dtype, device=self.first.device), self.second, self.first)
        return columns.T

    def forward(self, x: Tensor) -> Tensor:
        """``[..., d]`` to ``[..., d]``."""
        return monarch(x, self.second, self.first)


class BlockFusion(nn.Module):
    """Mixes within each group alone, cost d·d_e: idle groups stay idle, unless there is a bias; the identity when made.

    >>> BlockFusion(64, groups=16).cost
    256
    """

    def __init__(self, width: int, groups: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, width // groups, width // groups))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Make it the identity."""
        self.weight.copy_(torch.eye(self.weight.shape[-1], device=self.weight.device).expand_as(self.weight))
        if self.bias is not None:
            self.bias.zero_()

    @property
    def cost(self) -> int:
        """Multiply-adds for a token."""
        return self.weight.numel()

    def dense(self) -> Tensor:
        """The matrix ``[d, d]`` it stands for, without the bias."""
        blocks: Tensor = torch.block_diag(*self.weight)
        return blocks

    def forward(self, x: Tensor) -> Tensor:
        """``[..., d]`` to ``[..., d]``."""
        blocks, size = self.weight.shape[:2]
        out = torch.bmm(x.reshape(-1, blocks, size).transpose(0, 1), self.weight.mT).transpose(0, 1).reshape(x.shape)
        return out if self.bias is None else out + self.bias


def make_fusion(kind: Fusion, width: int, groups: int) -> nn.Module:
    """The group fusion of a width."""
    if kind == "monarch":
        return MonarchFusion(width)
    return BlockFusion(width, groups) if kind == "block" else nn.Identity()
