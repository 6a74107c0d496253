"""LANTERN: relaxed acceptance for image tokens, which credits a draft with the probability of the codes that look like it.

Image models spread their law over many codes that are close in the codebook, so exact acceptance refuses nearly every draft.
Here the nearest codes of a draft lend it their probability, as long as what is moved stays within a bound.

Paper: LANTERN, arXiv 2410.03355 (ICLR 2025), and the ratio rule of LANTERN++, arXiv 2502.06352.

Decisions, where the papers and the released code differ or say nothing:

- A bound of zero pools nothing, not even codes of probability zero, so that k = 0 and delta = 0 are exact acceptance.
- A draft is accepted where u < q_A(x) / p(x), strictly: a token of probability zero never is.
- Draws are treated as made without replacement: p without the tried siblings, renormalised. With repeated tokens skipped this
  is also right for independent draws, because the first draw of a new value has just that law.
- `zero="A"` continues a rejection with norm(max(0, q_A - p)). `zero="k+1"` does as the released code: of a deterministic tree
  the nearest k + 1 codes are ruled out, of drawn candidates p is set to 0 on the nearest k, whatever was pooled.
- TV(q, output) <= delta holds for deterministic drafts. Drawn ones each pool a neighbourhood of their own, and these add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gossamer.calibration import Calibration
from gossamer.decoding.base import AcceptanceMethod, Rule, Target, Verdict
from gossamer.errors import CalibrationError, InputError
from gossamer.models import fingerprint
from gossamer.registry import register

Zero = Literal["A", "k+1"]
_CHUNK = 512  # rows of distances that are sorted at once


def codebook_neighbours(codebook: Tensor, k: int | None = None) -> Tensor:
    """The nearest other codes of every code, nearest first; of equally distant ones the lower id.

    Args:
        codebook: float ``[V, e]``.
        k: columns (default and at most: all V - 1).

    Returns:
        ``[V, k]``, uint16 where ids fit and int32 else. Convert rows to int64 before you index with them.

    Raises:
        InputError: fewer than two codes, values that are not finite, or k < 0.

    >>> codebook_neighbours(torch.tensor([[0.0], [1.0], [3.0]])).tolist()
    [[1, 2], [0, 2], [1, 0]]
    """
    if codebook.dim() != 2 or len(codebook) < 2 or not codebook.is_floating_point():
        raise InputError(f"a codebook is float [codes, dim] with at least two codes, got {list(codebook.shape)}")
    if not bool(codebook.isfinite().all()):
        raise InputError("the codebook is not finite: check the weights of the image tokenizer")
    size = len(codebook)
    k = size - 1 if k is None else min(k, size - 1)
    if k < 0:
        raise InputError(f"k must be 0 or more, got {k}")
    table = torch.empty(size, k, dtype=torch.uint16 if size <= 2**16 else torch.int32)
    points = codebook.detach().cpu().double()
    for start in range(0, size, _CHUNK):
        rows = torch.arange(start, min(start + _CHUNK, size))
        # Not by products: rounding there would make the order of near codes depend on their place in the table.
        distance = torch.cdist(points[rows], points, compute_mode="donot_use_mm_for_euclid_dist")
        distance[torch.arange(len(rows)), rows] = torch.inf
        table[rows[0] : rows[-1] + 1] = distance.sort(dim=1, stable=True).indices[:, :k].to(table.dtype)
    return table


def prefix_sums(law: Tensor, neighbours: Tensor) -> Tensor:
    """c_l, float64 ``[k]``: the mass that `law` ``[V]`` gives to the first 1, 2, …, k of these codes, int64 ``[k]``."""
    return law[neighbours].double().cumsum(0)


@dataclass(frozen=True)
class Pool:
    """What a draft is credited with: its first `size` neighbours (l*), whose probability is `mass` (c_l*)."""

    size: int
    mass: float


def pool(
    law: Tensor, token: int, neighbours: Tensor, *, delta: float | None = None, ratio: float | None = None
) -> Pool:
    """The longest prefix of the neighbours whose mass stays within the bound: delta, or (ratio - 1) q(token).

    Args:
        law: q, ``[V]``.
        neighbours: int64 ``[k]``, nearest first, without the token itself.
        delta: bound of LANTERN: on the mass that is moved, so on the total variation.
        ratio: lambda of LANTERN++: the token is credited with at most so many times its own probability.

    Raises:
        InputError: both bounds or none.

    >>> pool(torch.tensor([0.1, 0.05, 0.2, 0.65]), 0, torch.tensor([1, 2, 3]), delta=0.26).size
    2
    """
    if (delta is None) == (ratio is None):
        raise InputError("give one bound: delta, or ratio")
    bound = delta if delta is not None else (float(ratio or 1) - 1) * float(law[token])
    if bound <= 0 or not len(neighbours):
        return Pool(0, 0.0)
    sums = prefix_sums(law, neighbours)
    size = int((sums <= bound).sum())
    return Pool(size, float(sums[size - 1]) if size else 0.0)


def relaxed_law(law: Tensor, token: int, near: Tensor) -> Tensor:
    """q_A, ``[V]``: the mass of the pooled codes `near` (int64) moved onto the token.

    >>> relaxed_law(torch.tensor([0.25, 0.25, 0.5]), 0, torch.tensor([1])).tolist()
    [0.5, 0.0, 0.5]
    """
    relaxed = law.clone()
    relaxed[near] = 0
    relaxed[token] = law[token] + law[near].sum()
    return relaxed


def total_variation(first: Tensor, second: Tensor) -> float:
    """Half the L1 distance of two laws.

    >>> total_variation(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]))
    0.5
    """
    return float((first.double() - second.double()).abs().sum() / 2)


def after_rejection(
    law: Tensor, token: int, neighbours: Tensor, size: int, k: int, drawn: Tensor | None, zero: Zero
) -> Tensor:
    """The law that a level goes on with once a candidate was refused, ``[V]``; uniform where nothing would be left.

    Args:
        law: q before it.
        neighbours: int64, all that the table has, nearest first.
        size, k: pooled neighbours, and how many could be.
        drawn: p, the law that the candidate was drawn from; None for one that was certain.
        zero: what is taken away with it, see this module.
    """
    if zero == "A":
        left = relaxed_law(law, token, neighbours[:size])
        minus = drawn
    else:
        left, minus = law.clone(), drawn
        if size and drawn is None:
            left[neighbours[: k + 1]] = 0
        elif size and drawn is not None:
            minus = drawn.index_fill(0, neighbours[:k], 0)
    if minus is None:
        left[token] = 0
    else:
        left = (left - minus).clamp_min_(0)
    total = left.sum()
    return left / total if total > 0 else torch.full_like(left, 1 / len(left))


class Relaxed(Rule):
    """Walks down a draft and accepts by relaxed laws: sampled or greedy, as the generation is.

    Nodes whose children were drawn (`Draft.laws`) are tested against that law, others as certain. Tokens that are no image
    codes are accepted exactly. Classifier-free guidance, temperature, top-k and top-p are in the target's law already.

    Args:
        neighbours: of `codebook_neighbours`, with at least k columns (k + 1 with ``zero="k+1"``), or all V - 1.
        k, delta, ratio, zero, offset: as of `RelaxedAcceptance`.

    Attributes:
        lossless: true where nothing can be pooled.
        tested, accepted, pooled: candidates so far: how many, how many accepted, and the mass that they were credited with.

    Raises:
        InputError: a table of another kind or too narrow, or a bound out of range.

    >>> rule = Relaxed(codebook_neighbours(torch.randn(8, 2)), k=4, delta=0.2)
    >>> rule.level(torch.full((8,), 0.125), [3])[1].shape
    torch.Size([8])
    """

    def __init__(
        self,
        neighbours: Tensor,
        k: int = 1000,
        delta: float | None = None,
        ratio: float | None = None,
        zero: Zero = "A",
        offset: int = 0,
    ) -> None:
        if neighbours.dim() != 2 or neighbours.is_floating_point() or len(neighbours) < 2:
            raise InputError(f"neighbours are integer [codes, k], got {neighbours.dtype} {list(neighbours.shape)}")
        size, columns = neighbours.shape
        wanted = min(k + (zero == "k+1"), size - 1)
        if columns < wanted or k < 0 or offset < 0:
            raise InputError(
                f"the table has {columns} neighbours of each code, the rule wants {wanted}: make a wider one"
            )
        if (delta is None) == (ratio is None) or not 0 <= (delta or 0) <= 1 or not (ratio is None or ratio > 1):
            raise InputError(f"give delta in [0, 1], or ratio above 1; got delta {delta}, ratio {ratio}")
        wide = neighbours.to("cpu", torch.int32)
        if wide.numel() and (int(wide.min()) < 0 or int(wide.max()) >= size):
            raise InputError(f"the table names codes outside 0 .. {size - 1}")
        if bool((wide == torch.arange(size)[:, None]).any()):
            raise InputError("a code is no neighbour of itself: it would be counted twice")
        self.neighbours, self.k, self.delta, self.ratio = neighbours[:, :wanted].cpu(), k, delta, ratio
        self.zero, self.offset = zero, offset
        self.lossless = k == 0 or delta == 0
        self.tested = self.accepted = 0
        self.pooled = 0.0

    def row(self, token: int) -> Tensor:
        """Neighbours of a token as ids of the vocabulary, int64; none for tokens that are no image codes."""
        code = token - self.offset
        if not 0 <= code < len(self.neighbours):
            return torch.empty(0, dtype=torch.long)
        return self.neighbours[code].to(torch.long) + self.offset

    def credit(self, law: Tensor, token: int) -> tuple[Tensor, Pool]:
        """All neighbours of a token, and those that are pooled under this law.

        Raises:
            InputError: the law ends before the image codes do.
        """
        if self.offset + len(self.neighbours) > len(law):
            raise InputError(
                f"the codebook has {len(self.neighbours)} codes from id {self.offset} on, the model {len(law)} tokens"
            )
        near = self.row(token)
        return near, pool(law, token, near[: self.k], delta=self.delta, ratio=self.ratio)

    def level(self, law: Tensor, tokens: Sequence[int], drawn: Tensor | None = None) -> tuple[int | None, Tensor]:
        """Test candidates for one place, in order.

        Args:
            law: the target's, ``[V]``.
            tokens: the candidates; each value is tested once.
            drawn: the law that they were drawn from, ``[V]``; None where they are certain.

        Returns:
            The place of the accepted one or None, and the law float64 ``[V]`` that is left for drawing a token.
        """
        q = law.double().cpu()
        q = q / q.sum()
        p = None if drawn is None else drawn.double().cpu()
        tried = {-1}
        for place, token in enumerate(tokens):
            if token in tried:
                continue
            tried.add(token)
            chance = 1.0 if p is None else float(p[token])
            if chance <= 0:
                continue
            near, pooled = self.credit(q, token)
            self._count(pooled)
            if float(torch.rand(())) * chance < float(q[token]) + pooled.mass:
                self.accepted += 1
                return place, q
            q = after_rejection(q, token, near, pooled.size, self.k, p, self.zero)
            if p is not None:
                p = p.index_fill(0, torch.tensor([token]), 0)
                p = p / p.sum().clamp_min(1e-300)
        return None, q

    def agrees(self, law: Tensor, token: int) -> bool:
        """Greedy: whether the relaxed token is the best. The neighbours keep their probability; a credited token wins ties."""
        _, pooled = self.credit(law, token)
        self._count(pooled)
        found = token == int(law.argmax())
        if not found and pooled.mass > 0:
            rest = law.index_fill(0, torch.tensor([token], device=law.device), 0)
            found = float(law[token]) + pooled.mass >= float(rest.max())
        self.accepted += found
        return found

    def _count(self, pooled: Pool) -> None:
        self.tested += 1
        self.pooled += pooled.mass

    def decide(self, target: Target) -> Verdict:
        """As `Rule`."""
        if not target.context.do_sample:
            path = self._longest(target, 0)
            return Verdict(tuple(path), target.best(path[-1]))
        draft, path = target.draft, [0]
        while True:
            below, law = draft.tree.children[path[-1]], target.law(path[-1])
            place, left = self.level(law, [draft.tokens[c] for c in below], draft.laws.get(path[-1]))
            if place is None:
                return Verdict(tuple(path), int(left.multinomial(1)))
            path.append(below[place])

    def _longest(self, target: Target, node: int) -> list[int]:
        """The longest path of agreeing nodes from this one on; of equally long ones the first."""
        draft, best = target.draft, [node]
        below = [c for c in draft.tree.children[node] if draft.tokens[c] >= 0]
        if below:
            law = target.law(node)
            for child in below:
                if self.agrees(law, draft.tokens[child]):
                    path = [node, *self._longest(target, child)]
                    best = path if len(path) > len(best) else best
        return best


@register("lantern", slot="acceptance", family="decoding", needs=["calibration"])
class RelaxedAcceptance(AcceptanceMethod):
    """Accept an image token where its nearest codes are probable together; lossy, within a bound that you choose.

    Use it with a drafter on autoregressive image models whose next-token laws are flat. It needs the codebook of the image
    tokenizer, once: `neighbours_of`. Larger k and delta accept more and shift the law more; delta bounds the total variation
    of each place for deterministic drafts. A tested candidate costs k gathers. Text is accepted exactly.

    Paper: LANTERN: Accelerating Visual Autoregressive Models with Relaxed Speculative Decoding, arXiv 2410.03355.

    >>> RelaxedAcceptance(k=100, delta=0.2).settings()
    {'k': 100, 'delta': 0.2}
    >>> RelaxedAcceptance().bound, RelaxedAcceptance(k=10, ratio=5).bound
    ({'delta': 0.1}, {'ratio': 5.0})
    """

    k: int = Field(1000, ge=0, description="neighbours that may be pooled; at most all other codes")
    delta: float | None = Field(None, ge=0, le=1, description="largest mass that is moved (default 0.1; LANTERN)")
    ratio: float | None = Field(None, gt=1, description="largest credit, in units of the draft's own (LANTERN++)")
    zero: Zero = Field("A", description="what a refusal rules out: the pooled codes, or k + 1 as the released code")
    image_token_offset: int = Field(0, ge=0, description="vocabulary id of code 0")

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if self.delta is not None and self.ratio is not None:
            raise ValueError("delta and ratio are two rules: give one")
        return self

    @property
    def bound(self) -> dict[str, Any]:
        """The rule's bound by name."""
        if self.ratio is not None:
            return {"ratio": self.ratio}
        return {"delta": 0.1 if self.delta is None else self.delta}

    def rule_for(self, model: nn.Module, calibration: Calibration | None) -> Relaxed:
        """The rule, with the table of a calibration.

        Raises:
            CalibrationError: none, of another model, or too narrow for k.
        """
        calibration = self.require(calibration)
        calibration.check(fingerprint(model))
        table = calibration.tensors.get("neighbours")
        if table is None:
            raise CalibrationError(f"{self.slug}: the calibration holds no neighbours: make it with neighbours_of")
        try:
            return Relaxed(table, self.k, zero=self.zero, offset=self.image_token_offset, **self.bound)
        except InputError as error:
            raise CalibrationError(f"{self.slug}: {error}") from None

    def calibrate(self, model: nn.Module, tokens: Tensor) -> Calibration:
        """Not from tokens.

        Raises:
            InputError: always; it says what to do instead.
        """
        raise InputError(
            "lantern needs a codebook, not a text: use neighbours_of, or `gossamer calibrate lantern MODEL --import FILE`"
        )

    def import_calibration(self, path: Path, model: nn.Module) -> Calibration:
        """From a safetensors file with the codebook: the tensor `codebook`, or the file's only matrix.

        Raises:
            CalibrationError: unreadable, or no codebook to be found.
        """
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"cannot read the codebook {path}: {str(error).splitlines()[0]}") from None
        found = [tensors["codebook"]] if "codebook" in tensors else [t for t in tensors.values() if t.dim() == 2]
        if len(found) != 1:
            raise CalibrationError(f"{path} has {len(found)} matrices: name the codebook `codebook`")
        return neighbours_of(model, found[0].float(), self.k + (self.zero == "k+1"))

    def rule(self) -> Rule:
        """Needs the table: see `rule_for`."""
        return self.rule_for(nn.Module(), None)


def neighbours_of(model: nn.Module, codebook: Tensor, k: int | None = None) -> Calibration:
    """The calibration of an image model with its tokenizer's codebook float ``[V, e]``; k columns, by default all.

    Make one more column than k for ``zero="k+1"``.
    """
    table = codebook_neighbours(codebook, k)
    facts = {"codes": len(codebook), "dim": codebook.shape[1], "k": table.shape[1]}
    return Calibration("lantern", fingerprint(model), {"neighbours": table}, facts)
