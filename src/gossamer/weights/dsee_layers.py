"""DSEE's layer: y = (S1 ⊙ W) x + (α/r)·(B A x + S2 x), never multiplied out while it is tuned.

W is frozen, S1 a mask, B A of low rank, S2 zero but for N entries of a fixed support Ω.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.errors import InputError
from gossamer.patterns import keep_largest


def decompose(
    weight: Tensor,
    outer_iters: int = 1,
    inner_iters: int = 2,
    grow: int = 5,
    threshold: float = 0.01,
    rank_cap: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """W ≈ U V + S in the manner of GreBsmo: a rank that grows 1, 6, 11, … and a sparse rest; float32.

    With more than a few outer iterations the low rank takes the large entries up and S runs empty.

    Args:
        weight: ``[out, in]``.
        outer_iters: times that the rank has grown, the first included; it stops at `rank_cap`.
        grow: rows that V gets each time, from the R factor of what is left.
        threshold: smaller entries of S are zero.

    Returns:
        U ``[out, k]`` orthonormal, V ``[k, in]``, S ``[out, in]``.

    Raises:
        InputError: a weight that is no finite matrix.

    >>> u, v, s = decompose(torch.eye(6), generator=torch.Generator().manual_seed(0))
    >>> u.shape, v.shape, bool((u @ v + s - torch.eye(6)).abs().max() <= 0.01)
    (torch.Size([6, 1]), torch.Size([1, 6]), True)
    """
    if weight.dim() != 2 or not bool(weight.isfinite().all()):
        raise InputError(f"only a finite matrix can be decomposed, got {list(weight.shape)}: check the weights")
    w = weight.detach().float()
    cap = min(*w.shape, rank_cap if rank_cap is not None else max(w.shape))
    v = torch.randn(1, w.shape[1], generator=generator).to(w)
    u, s = w.new_zeros(w.shape[0], 1), torch.zeros_like(w)
    for outer in range(outer_iters):
        s = torch.zeros_like(w)
        for _ in range(inner_iters):
            u = torch.linalg.qr((w - s) @ v.T).Q
            v = u.T @ (w - s)
            s = w - u @ v
            s = s.masked_fill(s.abs() < threshold, 0)
        more = min(grow, cap - len(v))
        if outer + 1 == outer_iters or more < 1:
            break
        v = torch.cat([v, torch.linalg.qr(w - u @ v - s).R[:more]])
    return u, v, s


def support(
    weight: Tensor,
    entries: int,
    kind: str = "decompose",
    outer_iters: int = 1,
    rank_cap: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Ω: exactly `entries` places of a matrix, int64 ``[2, entries]`` (rows, columns), row by row.

    kind: `decompose`, the largest of |W − U V| (also where fewer than `entries` of S are not zero); `magnitude`, the
    largest of |W|; `random`. Of equal ones the earlier.

    Raises:
        InputError: more entries than there are, or another kind.

    >>> support(torch.tensor([[0.0, 3.0], [-4.0, 1.0]]), 2, "magnitude").tolist()
    [[0, 1], [1, 0]]
    """
    if not 0 <= entries <= weight.numel():
        raise InputError(f"{entries} entries do not fit a matrix of {list(weight.shape)}")
    if kind == "decompose":
        u, v, _ = decompose(weight, outer_iters, rank_cap=rank_cap, generator=generator)
        score = (weight.detach().float() - u @ v).abs()
    elif kind == "magnitude":
        score = weight.detach().float().abs()
    elif kind == "random":
        score = torch.rand(weight.shape, generator=generator)
    else:
        raise InputError(f"a support is decompose, magnitude or random, got {kind!r}")
    (mask,) = keep_largest([score], score.numel() - entries)
    return mask.nonzero().t().contiguous().to(weight.device)


class Update(nn.Module):
    """ΔW = (α/r)·(B A + S2) of some consecutive rows of a layer.

    A ``[r, in]`` from N(0, 0.02²), B ``[out, r]`` and the values ``[N]`` zero; float32 also where the weight is narrower.
    S2 is a list of values with their places: N numbers, not a dense matrix under a mask.
    """

    index: Tensor

    def __init__(
        self, weight: Tensor, start: int, rank: int, alpha: float, index: Tensor, generator: torch.Generator
    ) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.start, self.scale = start, alpha / rank
        self.a = nn.Parameter((0.02 * torch.randn(rank, inputs, generator=generator)).to(weight.device, dtype))
        self.b = nn.Parameter(torch.zeros(outputs, rank, device=weight.device, dtype=dtype))
        self.values = nn.Parameter(torch.zeros(index.shape[1], device=weight.device, dtype=dtype))
        self.register_buffer("index", index)

    def entries(self) -> Tensor:
        """S2, dense ``[out, in]``."""
        dense = self.values.new_zeros(self.b.shape[0], self.a.shape[1])
        return dense.index_put((self.index[0], self.index[1]), self.values)

    def low_rank(self) -> Tensor:
        """B A, dense ``[out, in]``."""
        return self.b @ self.a

    def delta(self) -> Tensor:
        """ΔW, dense ``[out, in]``."""
        return self.scale * (self.low_rank() + self.entries())

    def forward(self, x: Tensor) -> Tensor:
        """ΔW x, through two thin products and a scatter of N terms."""
        x = x.to(self.a.dtype)
        low = F.linear(F.linear(x, self.a), self.b)
        terms = x[..., self.index[1]] * self.values
        return self.scale * low.index_add(-1, self.index[0], terms.to(low.dtype))


class Adapted(nn.Module):
    """Stands for a linear layer (`nn.Linear` or `Conv1D`) while it is tuned; its weight never changes.

    Args:
        base: the layer.
        updates: of rows of its ``[out, in]`` weight; none for layers that only get a mask.

    Attributes:
        mask: S1, bool ``[out, in]``, None before pruning. The masked weight is kept beside the weight.
    """

    mask: Tensor | None
    masked: Tensor | None

    def __init__(self, base: nn.Module, updates: list[Update]) -> None:
        super().__init__()
        self.base = base
        self.updates = nn.ModuleList(updates)
        self.register_buffer("mask", None)
        self.register_buffer("masked", None, persistent=False)

    @property
    def transposed(self) -> bool:
        """Whether the weight lies as ``[in, out]``."""
        return type(self.base).__name__ == "Conv1D"

    @property
    def weight(self) -> Tensor:
        """W, ``[out, in]``."""
        weight = self.base.get_parameter("weight").detach()
        return weight.t() if self.transposed else weight

    def set_mask(self, mask: Tensor) -> None:
        """Other S1 from now on, bool ``[out, in]``."""
        self.mask = mask
        self.masked = self.weight.masked_fill(~mask, 0).contiguous()

    def delta(self) -> Tensor:
        """ΔW of the whole layer, ``[out, in]``: zero where it has no update."""
        weight = self.weight
        full = torch.zeros(weight.shape, device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
        for part in self.updates:
            assert isinstance(part, Update)
            full[part.start : part.start + len(part.b)] = part.delta().detach()
        return full

    def forward(self, x: Tensor) -> Tensor:
        """(S1 ⊙ W) x + ΔW x + bias."""
        y: Tensor = self.base(x) if self.masked is None else F.linear(x, self.masked, self._bias())
        for part in self.updates:
            assert isinstance(part, Update)
            added = part(x).to(y.dtype)
            behind = y.shape[-1] - part.start - added.shape[-1]
            y = y + (F.pad(added, (part.start, behind)) if part.start or behind else added)
        return y

    def _bias(self) -> Tensor | None:
        bias = getattr(self.base, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @torch.no_grad()
    def merge(self) -> None:
        """Write S1 ⊙ W + ΔW into the layer's own weight."""
        merged = (self.weight if self.masked is None else self.masked) + self.delta()
        parameter = self.base.get_parameter("weight")
        parameter.copy_(merged.t() if self.transposed else merged)
