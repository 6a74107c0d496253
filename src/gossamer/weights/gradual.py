"""When weights go: gradual pruning while a model trains, and iterative prune–retrain. What goes is said by name.

    criterion   magnitude | random | taylor | movement | momentum | wanda
    structure   element | N:M | RxC | row | column | rows:R
    scope       global | matrix | erk

    gradual     sparsity at step t:  initial + (final − initial) · shape((t − begin) / (end − begin)),  shape: cubic
                (Zhu and Gupta 2017); N:M goes group by group from M:M down to N:M
    iterative   prune → (rewind) → retrain, once for each share

Masks are nested: what is gone stays gone. `taylor`, `movement` and `momentum` (SNIP with momentum) learn from the gradients of
every backward pass, `wanda` from the inputs of every forward pass. `taylor` and `wanda` start anew after each pruning; the other
two go on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.errors import InputError, ModelError
from gossamer.hf import Matrix, masks_for, matrices
from gossamer.models import MaskHolder
from gossamer.patterns import Masks, Scope, Structure, choose
from gossamer.patterns import criteria as score_of
from gossamer.patterns.schedules import SHAPES, ramp

Criterion = Literal["magnitude", "random", "taylor", "movement", "momentum", "wanda"]
CRITERIA: tuple[str, ...] = Criterion.__args__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class PruneRule:
    """What goes: a criterion, a structure and a scope by name.

    Attributes:
        criterion: which entries are worth least.
        structure: as `Structure.parse` reads it.
        scope: who competes.
        include: which matrices, by dotted parameter name (default: those of `matrices`).
        seed: of random.

    Raises:
        InputError: an unknown name.

    >>> layer = nn.Linear(4, 2, bias=False)
    >>> PruneRule(scope="matrix").masks(layer, 0.5).sparsity
    0.5
    """

    criterion: Criterion = "magnitude"
    structure: str = "element"
    scope: Scope = "global"
    include: Callable[[str], bool] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        Structure.parse(self.structure)
        if self.criterion not in CRITERIA or self.scope not in ("global", "matrix", "erk"):
            raise InputError(
                f"a criterion is one of {', '.join(CRITERIA)}, a scope global, matrix or erk; "
                f"got {self.criterion!r}, {self.scope!r}"
            )

    @property
    def needs_data(self) -> bool:
        """Whether the criterion looks at passes through the model."""
        return self.criterion not in ("magnitude", "random")

    def matrices(self, model: nn.Module) -> list[Matrix]:
        """The matrices that the rule prunes."""
        return matrices(model, include=self.include)

    def masks(
        self, model: nn.Module, sparsity: float, among: Masks | None = None, keeper: ScoreKeeper | None = None
    ) -> Masks:
        """What stays of a model's matrices, in the parameters' shapes; the model is not changed.

        Args:
            sparsity: share removed; of N:M the final one is in the structure, and a smaller share gives a group more.
            among: what was left before.
            keeper: saw passes through the model, for criteria that need them.

        Raises:
            InputError: the criterion needs passes and saw none, or a score is NaN.
        """
        chosen = self.matrices(model)
        if self.needs_data and keeper is None:
            raise InputError(f"the criterion {self.criterion} learns from passes through the model: none were seen")
        scores = keeper.scores() if keeper is not None else _still(chosen, self)
        seen = None if among is None else Masks({m.name: m.view(among[m.name]) for m in chosen})
        return masks_for(chosen, choose(scores, sparsity, self.structure_at(sparsity), self.scope, among=seen))

    def structure_at(self, sparsity: float) -> Structure:
        """The structure; of N:M the group that keeps so many of M as go with the share, and at least N.

        >>> str(PruneRule(structure="2:4").structure_at(0.25))
        '3:4'
        """
        form = Structure.parse(self.structure)
        if form.kind != "n:m":
            return form
        return Structure("n:m", n=max(form.n, form.m - round(sparsity * form.m)), m=form.m)


def _still(chosen: Sequence[Matrix], rule: PruneRule) -> dict[str, Tensor]:
    """Scores that need the weights only."""
    generator = torch.Generator().manual_seed(rule.seed)
    if rule.criterion == "random":
        return {m.name: score_of.random(m.weight, generator) for m in chosen}
    return {m.name: score_of.magnitude(m.weight) for m in chosen}


class ScoreKeeper:
    """Watches passes through a model and keeps what a rule's criterion needs of them, until `release`.

    Raises:
        ModelError: wanda on a convolution, whose inputs are not its columns.
    """

    def __init__(self, rule: PruneRule, model: nn.Module) -> None:
        self.rule, self.chosen = rule, rule.matrices(model)
        self._sums: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        if rule.criterion == "wanda" and any(m.role == "conv" for m in self.chosen):
            raise ModelError("the criterion wanda is for linear layers: this model has convolutions")
        if rule.needs_data:
            for matrix in self.chosen:
                self._watch(matrix)

    def _watch(self, matrix: Matrix) -> None:
        @torch.no_grad()
        def inputs(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            norms = args[0].detach().reshape(-1, args[0].shape[-1]).float().square().sum(0)
            self._sums[matrix.name] = self._sums.get(matrix.name, 0) + norms

        @torch.no_grad()
        def gradient(grad: Tensor) -> None:
            weight, grad, before = matrix.weight, matrix.view(grad), self._sums.get(matrix.name)
            if self.rule.criterion == "momentum":
                self._sums[matrix.name] = score_of.momentum(before, weight, grad)
            else:
                now = (score_of.taylor if self.rule.criterion == "taylor" else score_of.movement)(weight, grad)
                self._sums[matrix.name] = now if before is None else before + now

        if self.rule.criterion == "wanda":
            self._handles.append(matrix.module.register_forward_pre_hook(inputs))
        else:
            self._handles.append(matrix.parameter.register_hook(gradient))

    def scores(self) -> dict[str, Tensor]:
        """float32 ``[out, in]`` by matrix name.

        Raises:
            InputError: no pass was seen since the last pruning.
        """
        if not self.rule.needs_data:
            return _still(self.chosen, self.rule)
        missing = [m.name for m in self.chosen if m.name not in self._sums]
        if missing:
            raise InputError(f"the criterion {self.rule.criterion} saw no pass through {missing[0]} yet")
        if self.rule.criterion == "wanda":
            return {m.name: score_of.activation_aware(m.weight, self._sums[m.name].sqrt()) for m in self.chosen}
        return dict(self._sums)

    def forget(self) -> None:
        """Start anew after a pruning; movement and momentum go on, as their scores are sums over all of training."""
        if self.rule.criterion not in ("movement", "momentum"):
            self._sums.clear()

    def release(self) -> None:
        """Stop watching."""
        while self._handles:
            self._handles.pop().remove()


@dataclass(frozen=True)
class GradualPruning:
    """Sparsity that grows while a model trains.

    Attributes:
        sparsity: at the end; N:M has its own.
        begin, end: steps (from 0) of the first and the last pruning.
        every: steps between two.
        initial: sparsity of the first.
        shape: of the way, a name in `patterns.schedules.SHAPES`.
        rule: what goes.

    Raises:
        InputError: sparsities or steps out of range, or an unknown shape.

    >>> [round(GradualPruning(0.8, begin=0, end=100).at(t), 3) for t in (0, 25, 50, 100, 200)]
    [0.0, 0.463, 0.7, 0.8, 0.8]
    """

    sparsity: float
    begin: int = 0
    end: int = 1000
    every: int = 100
    initial: float = 0.0
    shape: str = "cubic"
    rule: PruneRule = field(default_factory=PruneRule)

    def __post_init__(self) -> None:
        if not 0 <= self.initial <= self.sparsity < 1 or not 0 <= self.begin < self.end or self.every < 1:
            raise InputError(
                f"gradual pruning goes from initial <= sparsity < 1 within begin < end; got {self.initial:g}, "
                f"{self.sparsity:g}, steps {self.begin} to {self.end} every {self.every}"
            )
        if self.shape not in SHAPES:
            raise InputError(f"a schedule's shape is one of {', '.join(SHAPES)}, not {self.shape!r}")

    def at(self, step: int) -> float:
        """Sparsity that step `step` asks for."""
        x = (min(max(step, self.begin), self.end) - self.begin) / (self.end - self.begin)
        return ramp(x, self.initial, self._final, SHAPES[self.shape])

    @property
    def _final(self) -> float:
        form = Structure.parse(self.rule.structure)
        return 1 - form.n / form.m if form.kind == "n:m" else self.sparsity

    def prunes(self, step: int) -> bool:
        """Whether weights go after this step."""
        return self.begin <= step <= self.end and ((step - self.begin) % self.every == 0 or step == self.end)

    def follow(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Gradual:
        """Begin: call `step` of what comes back after each step of the optimizer.

        >>> from gossamer.models import Plan, block_batches, tiny_model, train
        >>> model, plan = tiny_model("llama"), Plan(steps=6, warmup=1)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> gradual = GradualPruning(0.5, end=5, every=1).follow(model, optimizer)
        >>> batches = block_batches(torch.arange(64).view(4, 16), 2, plan.steps)
        >>> run = train(model, batches, plan, optimizer=optimizer, after_step=gradual.step)
        >>> round(gradual.masks.sparsity, 3)
        0.5
        """
        return Gradual(self, model, optimizer)


class Gradual:
    """A schedule at work on a model; see `GradualPruning.follow`.

    Attributes:
        masks: what stays now.
        history: (step, sparsity) of each pruning.
    """

    def __init__(self, schedule: GradualPruning, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.schedule, self.model = schedule, model
        self.keeper = ScoreKeeper(schedule.rule, model)
        self.masks = Masks({m.name: torch.ones_like(m.parameter, dtype=torch.bool) for m in self.keeper.chosen})
        self.history: list[tuple[int, float]] = []
        self.holder = MaskHolder(model, self.masks, optimizer)

    def step(self, step: int) -> None:
        """After step `step` (0, 1, …) of the optimizer: prune if it is time."""
        if not self.schedule.prunes(step):
            return
        self.masks = self.schedule.rule.masks(self.model, self.schedule.at(step), self.masks, self.keeper)
        self.holder.update(self.masks)
        self.keeper.forget()
        self.history.append((step, self.masks.sparsity))

    def release(self) -> None:
        """Stop; the zeros stay in the weights."""
        self.holder.release()
        self.keeper.release()


def even_shares(sparsity: float, phases: int) -> list[float]:
    """Sparsity after each phase, where each removes the same count: ``sparsity · p / phases``.

    >>> even_shares(0.6, 3)
    [0.2, 0.4, 0.6]
    """
    _check(sparsity, phases)
    return [round(sparsity * p / phases, 12) for p in range(1, phases + 1)]


def remaining_shares(sparsity: float, phases: int) -> list[float]:
    """Sparsity after each phase, where each removes the same share q of what remains: ``1 − (1 − q)^p``.

    >>> remaining_shares(0.875, 3)
    [0.5, 0.75, 0.875]
    """
    _check(sparsity, phases)
    return [round(1 - (1 - sparsity) ** (p / phases), 12) for p in range(1, phases + 1)]


def _check(sparsity: float, phases: int) -> None:
    if not 0 <= sparsity < 1 or phases < 1:
        raise InputError(f"prune-retrain needs a sparsity in 0 .. 1 and one phase or more, got {sparsity:g}, {phases}")


def prune_retrain(
    model: nn.Module,
    shares: Sequence[float],
    retrain: Callable[[nn.Module, Masks, int], None],
    rule: PruneRule | None = None,
    *,
    look: Callable[[nn.Module], Any] | None = None,
    rewind: Mapping[str, Tensor] | None = None,
) -> list[Masks]:
    """Prune, (rewind,) retrain; once for each share. The model ends pruned and retrained; returns the masks of the phases.

    Args:
        shares: sparsity after each phase, rising.
        retrain: trains the model in place under the masks (phase 0, 1, …); they are applied again after it.
        rule: what goes (default: the smallest magnitude of all).
        look: runs passes (with backward, for gradients) that the criterion learns from, before each pruning.
        rewind: a state of the model that what stays goes back to before it is retrained, as in lottery tickets.

    Raises:
        InputError: shares that fall or leave 0 .. 1, or a criterion without `look`.

    >>> model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    >>> [m.sparsity for m in prune_retrain(model, even_shares(0.5, 2), lambda model, masks, phase: None)]
    [0.25, 0.5]
    """
    rule = PruneRule() if rule is None else rule
    if any(not 0 <= s < 1 for s in shares) or list(shares) != sorted(shares):
        raise InputError(f"shares of prune-retrain must rise within 0 .. 1, got {list(shares)}")
    masks: Masks | None = None
    found = []
    for phase, share in enumerate(shares):
        keeper = None
        if rule.needs_data and look is not None:
            keeper = ScoreKeeper(rule, model)
            look(model)
            keeper.release()
        masks = rule.masks(model, share, masks, keeper)
        if rewind is not None:
            model.load_state_dict(rewind)
        masks.apply(model)
        retrain(model, masks, phase)
        masks.apply(model)
        found.append(masks)
    return found


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's state, to rewind to."""
    return copy.deepcopy(model.state_dict())


def passes(loss: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any]) -> Callable[[nn.Module], None]:
    """A `look` for `prune_retrain`: forward and backward over these batches, and no step.

    >>> passes(lambda model, x: model(x).sum(), [torch.ones(1, 2)])(nn.Linear(2, 1))
    """
    kept = list(batches)

    def look(model: nn.Module) -> None:
        for batch in kept:
            loss(model, batch).backward()
        model.zero_grad(set_to_none=True)

    return look
