"""Masks of a model's weights: made from scores, kept beside the model, saved bit-packed.

    scores → structure (who lives and dies together) → scope (who competes with whom) → exact counts

Names are those of the model's parameters; a mask has the shape of its parameter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gossamer.errors import InputError, ModelError
from gossamer.files import save_tensors
from gossamer.patterns.allocation import erdos_renyi
from gossamer.patterns.structures import Reduce, Structure, keep_largest, nm_mask

Scope = Literal["global", "matrix", "erk"]


class Masks(Mapping[str, Tensor]):
    """Bool masks by parameter name; True stays.

    >>> masks = Masks({"weight": torch.tensor([[True, False]])})
    >>> masks.sparsity, masks.kept
    (0.5, 1)
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = {name: mask.bool() for name, mask in masks.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    @property
    def total(self) -> int:
        """Entries under masks."""
        return sum(mask.numel() for mask in self.values())

    @property
    def kept(self) -> int:
        """Entries that stay."""
        return sum(int(mask.sum()) for mask in self.values())

    @property
    def sparsity(self) -> float:
        """Share removed of what is under masks."""
        return 1 - self.kept / self.total if self.total else 0.0

    def shares(self) -> dict[str, float]:
        """Share removed of each parameter."""
        return {name: 1 - float(mask.float().mean()) for name, mask in self.items()}

    @classmethod
    def of(cls, model: nn.Module, least: float = 0.0) -> Masks:
        """Where a model's matrices are not zero: of every parameter with two dimensions or more and more than `least` zeros."""
        found = {n: p.detach() != 0 for n, p in model.named_parameters() if p.dim() > 1}
        return cls({name: mask for name, mask in found.items() if 1 - float(mask.float().mean()) > least})

    def parameters(self, model: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter of the model with its mask, on its device.

        Raises:
            ModelError: a parameter is missing or of another shape.
        """
        known = dict(model.named_parameters())
        for name, mask in self.items():
            if name not in known or known[name].shape != mask.shape:
                raise ModelError(f"these masks are of another model: {name} {list(mask.shape)} is not in this one")
            yield known[name], mask.to(known[name].device)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set what is masked to zero, in place."""
        for parameter, mask in list(self.parameters(model)):
            parameter.masked_fill_(~mask, 0)

    def __and__(self, other: Masks) -> Masks:
        """What both keep; a parameter that one of them doesn't know is as in the other."""
        return Masks(
            {n: self[n] & other[n] if n in self and n in other else {**self, **other}[n] for n in {**self, **other}}
        )

    def within(self, other: Masks) -> bool:
        """Whether all that this keeps the other keeps too (nested masks)."""
        return all(not bool((mask & ~other[name]).any()) for name, mask in self.items() if name in other)

    def cosine(self, other: Masks) -> float:
        """⟨m₁, m₂⟩ / (‖m₁‖ ‖m₂‖) over the parameters that both know. Independent random masks of density d have d."""
        names = [name for name in self if name in other]
        both = sum(int((self[n] & other[n]).sum()) for n in names)
        mine, its = (sum(int(m[n].sum()) for n in names) for m in (self, other))
        return both / math.sqrt(mine * its) if mine and its else 0.0

    def jaccard(self, other: Masks) -> float:
        """Of the removed sets: |both removed| / |either removed|; 1 if nothing is removed."""
        names = [name for name in self if name in other]
        both = sum(int((~self[n] & ~other[n]).sum()) for n in names)
        either = sum(int((~self[n] | ~other[n]).sum()) for n in names)
        return both / either if either else 1.0

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, a bit an entry; complete or not at all.

        Raises:
            OutputError: it can't be written.
        """
        packed = {n: torch.from_numpy(np.packbits(m.cpu().numpy().reshape(-1))) for n, m in self.items()}
        header = {"masks": json.dumps({name: list(mask.shape) for name, mask in self.items()})}
        return save_tensors(path, packed, header, "the masks")

    @classmethod
    def load(cls, path: str | Path) -> Masks:
        """Read what `save` wrote.

        Raises:
            InputError: missing or damaged.
        """
        try:
            with safe_open(Path(path), framework="pt") as file:
                shapes = json.loads((file.metadata() or {})["masks"])
                masks = {}
                for name, shape in shapes.items():
                    bits = np.unpackbits(file.get_tensor(name).numpy(), count=math.prod(shape))
                    masks[name] = torch.from_numpy(bits).bool().view(shape)
            return cls(masks)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{path} holds no masks, or is damaged ({type(error).__name__})") from None


def choose(
    scores: Mapping[str, Tensor],
    sparsity: float | Mapping[str, float],
    structure: str | Structure = "element",
    scope: Scope = "global",
    *,
    cap: float = 1.0,
    reduce: Reduce = "sum",
    among: Masks | None = None,
) -> Masks:
    """Masks ``[out, in]`` that remove the lowest scores.

    Args:
        scores: float ``[out, in]`` by name; finite.
        sparsity: share to remove, of all matrices together, or of each by name (`scope` is then matrix).
        structure: as `Structure.parse` reads it. N:M has its sparsity in itself; `sparsity` is not looked at.
        scope: who competes: all matrices (`global`), each for itself (`matrix`), each for itself at a density by its shape
            (`erk`).
        cap: no matrix loses more than this share; what it is spared the others lose (global scope).
        reduce: how a block's score comes from its entries.
        among: entries already gone stay gone and count as removed.

    Raises:
        InputError: a share out of range, blocks that do not fit, or a score that is NaN.

    >>> choose({"w": torch.tensor([[4.0, 1.0], [3.0, 2.0]])}, 0.5)["w"].tolist()
    [[True, False], [True, False]]
    """
    form = Structure.parse(structure)
    names = list(scores)
    values = [scores[name].detach() for name in names]
    if among is not None:
        values = [
            v.masked_fill(~among[n], 0 if form.kind == "block" else -math.inf)
            for n, v in zip(names, values, strict=True)
        ]
    if form.kind == "n:m":
        if any(bool(v.isnan().any()) for v in values):
            raise InputError("scores to prune by must not be NaN: check the weights and the calibration")
        found = Masks({n: nm_mask(v, form.n, form.m) for n, v in zip(names, values, strict=True)})
        return found if among is None else found & among
    shares = [sparsity[n] for n in names] if isinstance(sparsity, Mapping) else [sparsity] * len(names)
    if not all(0 <= share <= 1 for share in shares) or not 0 < cap <= 1:
        raise InputError(f"a sparsity must lie in 0 .. 1, got {sparsity}, cap {cap:g}")
    pooled = [form.pool(v, reduce) for v in values]
    if among is not None and form.kind == "block":  # a block that is gone whole goes first, whatever the scores' sign
        gone = [form.pool((~among[n]).float(), "mean") == 1 for n in names]
        pooled = [p.masked_fill(g, -math.inf) for p, g in zip(pooled, gone, strict=True)]
    if isinstance(sparsity, Mapping) or scope == "matrix":
        kept = [keep_largest([p], round(s * p.numel()))[0] for p, s in zip(pooled, shares, strict=True)]
    elif scope == "erk":
        densities = erdos_renyi([tuple(p.shape) for p in pooled], 1 - sparsity)
        kept = [keep_largest([p], round((1 - d) * p.numel()))[0] for p, d in zip(pooled, densities, strict=True)]
    else:
        kept = _capped(pooled, values, sparsity, cap)
    found = Masks({n: form.expand(k, v.shape) for n, k, v in zip(names, kept, values, strict=True)})
    return found if among is None else found & among


def _capped(pooled: list[Tensor], values: list[Tensor], sparsity: float, cap: float) -> list[Tensor]:
    """One ranking of all groups; matrices over the cap are put at it and leave the ranking."""
    sizes = [v.numel() // p.numel() for v, p in zip(values, pooled, strict=True)]
    if len(set(sizes)) > 1:
        raise InputError("groups of different sizes cannot compete in one ranking: use scope matrix")
    total = sum(p.numel() for p in pooled)
    remove, fixed = round(sparsity * total), dict[int, Tensor]()
    if remove > sum(int(cap * p.numel()) for p in pooled):
        raise InputError(f"a sparsity of {sparsity:g} cannot be reached with at most {cap:g} in each matrix")
    while True:
        free = [i for i in range(len(pooled)) if i not in fixed]
        left = remove - sum(int((~mask).sum()) for mask in fixed.values())
        kept = dict(zip(free, keep_largest([pooled[i] for i in free], left), strict=True))
        over = [i for i in free if int((~kept[i]).sum()) > int(cap * pooled[i].numel())]
        if not over:
            return [fixed[i] if i in fixed else kept[i] for i in range(len(pooled))]
        for i in over:
            fixed[i] = keep_largest([pooled[i]], int(cap * pooled[i].numel()))[0]
