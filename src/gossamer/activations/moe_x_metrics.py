"""How well single units say what a text, or a board, holds: coverage and reconstruction, as MoE-X is judged.

A classifier is a unit and a threshold: it fires where the activation is above τ times the unit's largest.

    coverage        mean over labels of the best F1 of any classifier
    reconstruction  a label is predicted where any classifier fires that was precise enough in training (95 %);
                    the mean over boards of the F1 of the predicted labels

The definitions are the card's, which has them from memory of the metrics' family. Decisions: τ is 0, 0.1, …, 0.9; a unit whose
largest activation is not above 0 never fires; a rule must fire at least `min_count` times, or units that fire once would
all be precise; a board on which nothing is and nothing was predicted counts as 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.errors import InputError

THRESHOLDS = tuple(i / 10 for i in range(10))
_CHUNK = 512  # units at a time, to bound memory


class Coverage(NamedTuple):
    """Coverage, and the classifier behind each label.

    Attributes:
        score: mean of `f1`.
        f1: float32 ``[L]``, the best of each label.
        unit: int64 ``[L]``, its unit; the lowest index of equals.
        threshold: float32 ``[L]``, its τ; the lowest of equals.
    """

    score: float
    f1: Tensor
    unit: Tensor
    threshold: Tensor


class Rules(NamedTuple):
    """Classifiers that were precise in training.

    Attributes:
        peak: ``[U]``, largest activations there.
        precise: boolean ``[T, U, L]``, whether unit u above τ_t is a rule for label l.
        thresholds: τ, T of them.
    """

    peak: Tensor
    precise: Tensor
    thresholds: tuple[float, ...]


def best_f1_coverage(hidden: Tensor, labels: Tensor, thresholds: tuple[float, ...] = THRESHOLDS) -> Coverage:
    """Coverage of labels by single units.

    Args:
        hidden: activations ``[N, U]`` of N tokens or boards, any float dtype.
        labels: boolean ``[N, L]``.
        thresholds: τ, each at least 0 and below 1.

    Raises:
        InputError: not matrices of the same N, nothing in them, activations that are not finite, or other thresholds.

    >>> hidden = torch.tensor([[0.0, 4.0], [0.3, 1.0], [0.9, 0.0]])
    >>> labels = torch.tensor([[False], [True], [True]])
    >>> best_f1_coverage(hidden, labels).score
    1.0
    """
    _check(hidden, labels, thresholds)
    peak, truth = hidden.amax(0), labels.float()
    positives = truth.sum(0)
    best = torch.full((labels.shape[1],), -1.0)
    unit = torch.zeros(labels.shape[1], dtype=torch.int64)
    level = torch.zeros(labels.shape[1])
    for tau, first, fired in _fired(hidden, peak, thresholds):
        f1 = 2 * (fired.T @ truth) / (fired.sum(0)[:, None] + positives).clamp(min=1)
        value, index = f1.max(0)
        better = value > best
        best[better], unit[better], level[better] = value[better], index[better] + first, tau
    return Coverage(float(best.mean()), best, unit, level)


def classifier_f1(hidden: Tensor, labels: Tensor, found: Coverage, peak: Tensor) -> Tensor:
    """F1 float32 ``[L]`` of classifiers found elsewhere: how far the best ones carry over to other data.

    Args:
        hidden, labels: ``[N, U]`` and boolean ``[N, L]``.
        found: of `best_f1_coverage` on other data.
        peak: ``[U]``, the largest activations there.

    Raises:
        InputError: as `best_f1_coverage`.
    """
    _check(hidden, labels, (0.0,))
    fired = hidden[:, found.unit] > found.threshold * peak[found.unit]
    return _f1(fired & (peak[found.unit] > 0), labels, 0)


def precise_rules(
    hidden: Tensor,
    labels: Tensor,
    precision: float = 0.95,
    min_count: int = 10,
    thresholds: tuple[float, ...] = THRESHOLDS,
) -> Rules:
    """The classifiers whose predictions of a label are right in at least `precision` of the cases.

    Args:
        hidden, labels: of training boards, ``[N, U]`` and boolean ``[N, L]``.
        precision: in (0, 1].
        min_count: times a classifier must fire.
        thresholds: τ.

    Raises:
        InputError: as `best_f1_coverage`, or a precision or count out of range.
    """
    _check(hidden, labels, thresholds)
    if not 0 < precision <= 1 or min_count < 1:
        raise InputError(f"precision is in (0, 1] and min_count at least 1; got {precision} and {min_count}")
    peak, truth = hidden.amax(0), labels.float()
    precise = torch.zeros(len(thresholds), hidden.shape[1], labels.shape[1], dtype=torch.bool)
    for tau, first, fired in _fired(hidden, peak, thresholds):
        count = fired.sum(0)[:, None]
        good = (fired.T @ truth >= precision * count) & (count >= min_count)
        precise[thresholds.index(tau), first : first + _CHUNK] = good
    return Rules(peak, precise, thresholds)


def reconstruct(hidden: Tensor, rules: Rules) -> Tensor:
    """Boolean ``[N, L]``: labels for which any rule fires on activations ``[N, U]``.

    Raises:
        InputError: other units than the rules'.
    """
    if hidden.ndim != 2 or hidden.shape[1] != len(rules.peak):
        raise InputError(f"these rules are of {len(rules.peak)} units; got activations {tuple(hidden.shape)}")
    votes = torch.zeros(len(hidden), rules.precise.shape[2])
    for tau, first, fired in _fired(hidden, rules.peak, rules.thresholds):
        votes += fired @ rules.precise[rules.thresholds.index(tau), first : first + _CHUNK].float()
    return votes > 0


def board_f1(predicted: Tensor, labels: Tensor) -> float:
    """Mean over boards (rows) of the F1 of predicted labels; both boolean ``[N, L]``.

    Raises:
        InputError: different shapes.

    >>> board_f1(torch.tensor([[True, True], [False, False]]), torch.tensor([[True, False], [False, False]]))
    0.8333333730697632
    """
    if predicted.shape != labels.shape or labels.ndim != 2 or not labels.numel():
        raise InputError(f"predictions {tuple(predicted.shape)} and labels {tuple(labels.shape)} must be alike [N, L]")
    return float(_f1(predicted, labels, 1).mean())


def byte_labels(tokens: Tensor) -> dict[str, Tensor]:
    """Classes of bytes and of their places in words and lines, each boolean ``[..., T]`` like `tokens`.

    Label t looks at bytes up to and at t only, as a causal model's hidden state does; the first byte has no byte before it.

    Raises:
        InputError: not integers in 0 … 255.

    >>> byte_labels(torch.tensor(list(b"x = 42")))["inside a number"].tolist()
    [False, False, False, False, False, True]
    """
    if tokens.is_floating_point() or not tokens.numel() or int(tokens.min()) < 0 or int(tokens.max()) > 255:
        raise InputError("byte labels are for integer tokens from 0 to 255")

    def among(characters: str) -> Tensor:
        return torch.isin(tokens, torch.tensor(list(characters.encode()), device=tokens.device))

    def before(flags: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(flags[..., :1]), flags[..., :-1]], -1)

    lower, capital = (tokens >= 97) & (tokens <= 122), (tokens >= 65) & (tokens <= 90)
    digit, underscore, space, newline = (tokens >= 48) & (tokens <= 57), among("_"), among(" "), among("\n")
    word = lower | capital | digit | underscore
    place = torch.arange(tokens.shape[-1], device=tokens.device)

    def last(flags: Tensor) -> Tensor:
        """Place of the last true flag up to here, −1 before the first."""
        return torch.where(flags, place, -1).cummax(-1).values

    line = last(newline)
    return {
        "lower-case letter": lower,
        "capital letter": capital,
        "digit": digit,
        "vowel": among("aeiouAEIOU"),
        "underscore": underscore,
        "space": space,
        "newline": newline,
        "opening bracket": among("([{"),
        "closing bracket": among(")]}"),
        "quote": among("\"'"),
        "comma or full stop": among(",."),
        "colon or equals": among(":="),
        "after newline": before(newline),
        "after space": before(space) & ~space,
        "inside a number": digit & before(digit),
        "start of a word": word & ~before(word),
        "inside a word": word & before(word),
        "end of a word": ~word & before(word),
        "indentation": space & (last(~space & ~newline) < line),
        "comment": last(among("#")) > line,
    }


def _fired(hidden: Tensor, peak: Tensor, thresholds: tuple[float, ...]) -> Iterator[tuple[float, int, Tensor]]:
    """(τ, first unit, float32 ``[N, ≤ chunk]`` of ones where it fires), thresholds outermost."""
    for tau in thresholds:
        for first in range(0, hidden.shape[1], _CHUNK):
            part, top = hidden[:, first : first + _CHUNK], peak[first : first + _CHUNK]
            yield tau, first, ((part > tau * top) & (top > 0)).float()


def _f1(predicted: Tensor, labels: Tensor, axis: int) -> Tensor:
    hits = 2 * (predicted & labels).sum(axis).float()
    of = (predicted.sum(axis) + labels.sum(axis)).float()
    return torch.where(of > 0, hits / of.clamp(min=1), 1.0)


def _check(hidden: Tensor, labels: Tensor, thresholds: tuple[float, ...]) -> None:
    fits = hidden.ndim == 2 and labels.ndim == 2 and len(hidden) == len(labels)
    if not fits or not hidden.numel() or not labels.numel() or labels.dtype != torch.bool:
        raise InputError(
            f"activations [N, U] and boolean labels [N, L] of the same N are needed; got {tuple(hidden.shape)} and "
            f"{tuple(labels.shape)} of {labels.dtype}"
        )
    if not thresholds or not all(0 <= tau < 1 for tau in thresholds):
        raise InputError(f"thresholds are shares of a unit's largest activation, in [0, 1); got {thresholds}")
    if not bool(hidden.isfinite().all()):
        raise InputError("these activations are not finite: check the model's weights")
