"""Choosing one token by the target's law so that it is often one of several drafts: couplings, as pure functions.

p is the law that the drafts X_1 … X_k were drawn from, independently; q is the law that the token Y must have; both are ``[V]``.

    optimum   alpha_k(p, q) = largest Pr(Y in {X_1 … X_k}) over all joint laws of (X_1 … X_k, Y) with these marginals
    K-SEQ     X_i is taken if u_i <= q(X_i) / (gamma p(X_i)), the first that passes; else Y ~ r
              beta(gamma)  = sum min(p, q / gamma)                    one test passes
              p_acc(gamma) = 1 - (1 - beta)^k                         one of k tests passes
              r            ~ q - min(p, q / gamma) p_acc / beta       what is missing to q; valid iff p_acc <= gamma beta
              gamma*       = the smallest valid gamma, the root of h(gamma) = p_acc - gamma beta in [1, k]

SpecTr (Sun et al., NeurIPS 2023) proves p_acc(gamma*) >= (1 - (1 - 1/k)^k) alpha_k. Beside it the rules that it is compared
with: maximal coupling (k = 1, speculative sampling), recursive rejection, the optimum itself for few tokens, and typical
acceptance, which keeps no law.

Everything is computed in float64. Randomness comes from a `Dice`, so that tests can walk all its outcomes instead of drawing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import chain, pairwise

import torch
from torch import Tensor

from gossamer.errors import InputError

#: A token, and which of the drafts it is; None where it is none of them by choice.
Choice = tuple[int, int | None]
#: Tokens with p > 0 up to which the optimum is computed: it has a source for every set of them.
MOST_TOKENS = 8
_STEPS = 40  # of the bisection: 1e-11 on [1, 8]
_TINY = 1e-12


class Dice:
    """Where decisions get their chance from: every call uses a uniform number of its own.

    Args:
        generator: of the CPU; None takes torch's default.

    >>> dice = Dice(torch.Generator().manual_seed(0))
    >>> dice.draw(torch.tensor([0.0, 1.0, 0.0])), dice.coin(1.0), dice.coin(0.0)
    (1, True, False)
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def _uniform(self) -> float:
        return float(torch.rand((), dtype=torch.float64, generator=self.generator))

    def coin(self, chance: float) -> bool:
        """True with this probability."""
        return self._uniform() < chance

    def draw(self, weights: Tensor) -> int:
        """An index with probability in proportion to its weight ``[V]``; never one without weight."""
        sums = weights.double().cumsum(0)
        point = self._uniform() * float(sums[-1])
        index = int(torch.searchsorted(sums, point, right=True))
        return index if index < len(sums) else int(weights.nonzero()[-1])


def checked(law: Tensor) -> Tensor:
    """A law ``[V]`` in float64 that sums to one.

    Raises:
        InputError: it is no vector, or has negative or non-finite entries, or none above zero.
    """
    wide = law.double()
    total = float(wide.sum()) if law.ndim == 1 else math.nan
    if not math.isfinite(total) or total <= 0 or float(wide.min()) < 0:
        raise InputError(
            f"a law is a vector of finite chances with a positive sum, got {list(law.shape)} summing to {total:g}"
        )
    return wide / total


def _pair(p: Tensor, q: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    if p.shape != q.shape:
        raise InputError(f"draft and target have one vocabulary, got laws of {list(p.shape)} and {list(q.shape)}")
    if k < 1:
        raise InputError(f"there is at least one draft, got k = {k}")
    return checked(p), checked(q)


def _drafts(p: Tensor, drafts: Sequence[int]) -> None:
    if not drafts or min(drafts) < 0 or max(drafts) >= len(p) or bool((p[list(drafts)] <= 0).any()):
        raise InputError("drafts are tokens that their law can draw, at least one")


# -- K-SEQ --------------------------------------------------------------------------------------------------------------


def beta(p: Tensor, q: Tensor, gamma: float) -> float:
    """Chance that one test of K-SEQ passes: ``sum min(p, q / gamma)``.

    >>> beta(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]), 1.5)
    0.5
    """
    p, q = _pair(p, q)
    return min(1.0, float(torch.minimum(p, q / gamma).sum()))


def any_of(chance: float, k: int) -> float:
    """p_acc: chance that one of k independent tests passes, each with `chance`.

    >>> any_of(0.5, 2)
    0.75
    """
    if k == 1 or chance in (0.0, 1.0):
        return chance
    return -math.expm1(k * math.log1p(-chance))


def gamma_star(p: Tensor, q: Tensor, k: int) -> float:
    """The smallest valid gamma in ``[1, k]``, which accepts most; by bisection, rounded up.

    >>> round(gamma_star(torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.5, 0.3]), 2), 6)
    1.463325
    """
    return _gamma(*_pair(p, q, k), k)


def _gamma(p: Tensor, q: Tensor, k: int) -> float:
    if k == 1:
        return 1.0
    # Tokens with q >= k p always count p, those with q <= p always q / gamma; only the others change sides in between.
    large, small = q >= k * p, q <= p
    always, shared = float(p[large].sum()), float(q[small & ~large].sum())
    between = ~(large | small)
    some_p, some_q = p[between], q[between]

    def missing(gamma: float) -> float:
        passes = always + shared / gamma + float(torch.minimum(some_p, some_q / gamma).sum())
        return any_of(min(1.0, passes), k) - gamma * passes

    low, high = 1.0, float(k)
    if missing(low) <= _TINY:
        return low
    for _ in range(_STEPS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if missing(middle) > 0 else (low, middle)
    return high


def kseq_residual(p: Tensor, q: Tensor, gamma: float, k: int) -> Tensor:
    """The law float64 ``[V]`` of the token where no draft passed: q less what tests account for; q itself if none can pass.

    Raises:
        InputError: gamma is too small to be valid: the residual would be negative somewhere.
    """
    p, q = _pair(p, q, k)
    return _kseq_residual(p, q, gamma, k)


def _kseq_residual(p: Tensor, q: Tensor, gamma: float, k: int) -> Tensor:
    passing = torch.minimum(p, q / gamma)
    one = min(1.0, float(passing.sum()))
    if one == 0:
        return q
    factor = any_of(one, k) / one
    if factor > gamma * (1 + 1e-9):
        raise InputError(
            f"gamma {gamma:g} is too small for {k} drafts: it takes tokens more often than the target does"
        )
    return _rest(q - passing * factor, q)


def _rest(mass: Tensor, q: Tensor) -> Tensor:
    """What is left, as a law; q where nothing is (and no use will be made of it)."""
    mass = mass.clamp_min(0)
    total = float(mass.sum())
    return mass / total if total > 0 else q


def kseq_select(
    p: Tensor, q: Tensor, drafts: Sequence[int], dice: Dice | None = None, gamma: float | None = None
) -> Choice:
    """K-SEQ: the first draft that passes its test, else a token of the residual; its law is exactly q.

    Args:
        p: law ``[V]`` that every draft was drawn from, independently, repetitions among them.
        q: law ``[V]`` of the token.
        drafts: tested in this order; their number is k.
        dice: where chance comes from.
        gamma: default: `gamma_star`.

    Returns:
        The token, and the place of the draft that passed (None: of the residual, which may be a draft's token all the same).

    Raises:
        InputError: laws that are none, drafts that p cannot draw, or a gamma that is not valid.
    """
    dice, k = dice or Dice(), len(drafts)
    p, q = _pair(p, q, max(k, 1))
    _drafts(p, drafts)
    gamma = _gamma(p, q, k) if gamma is None else gamma
    residual = _kseq_residual(p, q, gamma, k)  # before any test, so that an invalid gamma never goes unnoticed
    for place, token in enumerate(drafts):
        if dice.coin(min(1.0, float(q[token] / (gamma * p[token])))):
            return token, place
    return dice.draw(residual), None


# -- what it is compared with -------------------------------------------------------------------------------------------


def maximal_coupling(p: Tensor, q: Tensor, draft: int, dice: Dice | None = None) -> Choice:
    """Speculative sampling: one draft, accepted with ``min(1, q / p)``, else a token of ``max(0, q - p)``; its law is q."""
    dice = dice or Dice()
    p, q = _pair(p, q)
    _drafts(p, [draft])
    if dice.coin(min(1.0, float(q[draft] / p[draft]))):
        return draft, 0
    return dice.draw(_rest(q - p, q)), None


def recursive_rejection(
    p: Tensor, q: Tensor, drafts: Sequence[int], dice: Dice | None = None, *, distinct: bool = False
) -> Choice:
    """Speculative sampling of one draft after another, each for what the ones before left of q (SpecInfer); its law is q.

    Args:
        distinct: the drafts were drawn without replacement: a rejected one leaves p too. They are then all different.
    """
    dice = dice or Dice()
    p, q = _pair(p, q)
    _drafts(p, drafts)
    if distinct and len(set(drafts)) < len(drafts):
        raise InputError("drafts that were drawn without replacement differ from each other")
    for place, token in enumerate(drafts):
        if dice.coin(min(1.0, float(q[token] / p[token]))):
            return token, place
        q = _rest(q - p, q)
        if distinct and place + 1 < len(drafts):
            p = p.clone()
            p[token] = 0
            p = p / p.sum()
    return dice.draw(q), None


def recursive_acceptance(p: Tensor, q: Tensor, k: int) -> float:
    """Chance that recursive rejection with replacement accepts one of k drafts."""
    p, q = _pair(p, q, k)
    rejected = 1.0
    for _ in range(k):
        rejected *= max(0.0, 1 - float(torch.minimum(p, q).sum()))
        q = _rest(q - p, q)
    return 1 - rejected


def naive_select(q: Tensor, drafts: Sequence[int], dice: Dice | None = None) -> Choice:
    """A token of q drawn without looking at the drafts; accepted if it is one of them by chance."""
    token = (dice or Dice()).draw(checked(q))
    return token, drafts.index(token) if token in drafts else None


def upper_bound(p: Tensor, q: Tensor, k: int) -> float:
    """No rule accepts more often: ``sum min(q, 1 - (1 - p)^k)``; also what the naive rule would need."""
    p, q = _pair(p, q, k)
    return float(torch.minimum(q, 1 - (1 - p) ** k).sum())


# -- the optimum, for few tokens -----------------------------------------------------------------------------------------

Plan = dict[frozenset[int], tuple[float, dict[int, float]]]


def optimal_plan(p: Tensor, q: Tensor, k: int) -> Plan:
    """The coupling that accepts most: for every set of drafted tokens its chance, and how much of that goes to each of them.

    Acceptance depends on the set alone, so the transport problem is a flow from sets to their own tokens, filled along shortest
    free paths (Edmonds and Karp). What a set keeps back is drawn from what is left of q.

    Raises:
        InputError: p can draw more than 8 tokens.
    """
    p, q = _pair(p, q, k)
    support = p.nonzero()[:, 0].tolist()
    if len(support) > MOST_TOKENS:
        raise InputError(
            f"the optimum is for drafts of at most {MOST_TOKENS} tokens, this law has {len(support)}: use top-k"
        )
    chances: dict[frozenset[int], float] = {frozenset(): 1.0}
    for _ in range(k):
        grown: dict[frozenset[int], float] = {}
        for tokens, chance in chances.items():
            for token in support:
                key = tokens | {token}
                grown[key] = grown.get(key, 0.0) + chance * float(p[token])
        chances = grown
    supply, demand = dict(chances), {token: float(q[token]) for token in support}
    flow: dict[frozenset[int], dict[int, float]] = {tokens: dict.fromkeys(sorted(tokens), 0.0) for tokens in chances}
    while (path := _free_path(supply, demand, flow)) is not None:
        _augment(path, supply, demand, flow)
    return {tokens: (chance, flow[tokens]) for tokens, chance in chances.items()}


_Steps = list[tuple[frozenset[int], int]]


def _free_path(
    supply: dict[frozenset[int], float], demand: dict[int, float], flow: dict[frozenset[int], dict[int, float]]
) -> _Steps | None:
    """Pairs (set, token) to fill, one after another, taking back between them; None where nothing more can flow."""
    queue = deque(tokens for tokens, left in supply.items() if left > _TINY)
    before: dict[frozenset[int], tuple[frozenset[int], int] | None] = dict.fromkeys(queue)
    reached: set[int] = set()
    while queue:
        tokens = queue.popleft()
        for token in flow[tokens]:
            if token in reached:
                continue
            reached.add(token)
            if demand[token] > _TINY:
                path: _Steps = [(tokens, token)]
                while (step := before[path[0][0]]) is not None:
                    path.insert(0, step)
                return path
            for other, given in flow.items():
                if other not in before and given.get(token, 0.0) > _TINY:
                    before[other] = (tokens, token)
                    queue.append(other)
    return None


def _augment(
    path: _Steps,
    supply: dict[frozenset[int], float],
    demand: dict[int, float],
    flow: dict[frozenset[int], dict[int, float]],
) -> None:
    back = [(following, token) for (_, token), (following, _) in pairwise(path)]
    first, last = path[0][0], path[-1][1]
    amount = min(chain((supply[first], demand[last]), (flow[tokens][token] for tokens, token in back)))
    supply[first] -= amount
    demand[last] -= amount
    for tokens, token in path:
        flow[tokens][token] += amount
    for tokens, token in back:
        flow[tokens][token] -= amount


def optimal_acceptance(p: Tensor, q: Tensor, k: int) -> float:
    """alpha_k(p, q), the largest chance that a token of q is one of k drafts; for drafts of at most 8 tokens.

    >>> round(optimal_acceptance(torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.5, 0.3]), 2), 6)
    0.84
    """
    return sum(sum(given.values()) for _, given in optimal_plan(p, q, k).values())


def optimal_select(p: Tensor, q: Tensor, drafts: Sequence[int], dice: Dice | None = None) -> Choice:
    """The optimal coupling's token, for drafts of at most 8 tokens; its law is q."""
    dice = dice or Dice()
    p, q = _pair(p, q)
    _drafts(p, drafts)
    plan = optimal_plan(p, q, len(drafts))
    chance, given = plan[frozenset(drafts)]
    taken = torch.zeros_like(q)
    for token, mass in given.items():
        taken[token] = mass
    if dice.coin(float(taken.sum()) / chance):
        token = dice.draw(taken)
        return token, drafts.index(token)
    left = q.clone()
    for _, masses in plan.values():
        for token, mass in masses.items():
            left[token] -= mass
    return dice.draw(_rest(left, q)), None


# -- what keeps no law ---------------------------------------------------------------------------------------------------


def typical_threshold(q: Tensor, epsilon: float, delta: float) -> float:
    """Typical acceptance (Medusa) takes tokens with ``q > min(epsilon, delta exp(-H(q)))``, H the entropy in nats."""
    q = checked(q)
    entropy = -float(torch.xlogy(q, q).sum())
    return min(epsilon, delta * math.exp(-entropy))
