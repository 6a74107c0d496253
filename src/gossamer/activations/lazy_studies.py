"""Studies of the lazy neuron phenomenon: where sparsity comes from, what it depends on, and what a Top-k changes.

* `emergence`: a byte language model trained from scratch, percent nonzero per layer along the way; `depth_sweep`,
  `width_sweep` and `data_sweep` repeat it over sizes, with training data and held-out data side by side.
* `cause_study`: labels drawn at random, images drawn at random, or fresh random images at every step.
* `gradient_signs`, `two_layer_gradients`: the theory. For zero-mean V and cross-entropy or squared loss the expected gradient
  of an active neuron is positive, so the first steps push it down:  E ∂L/∂a_i = E⟨v_i, p(Va) − y⟩ > 0.
* `robustness`: a classifier trained with wrong labels, dense or Top-k, tested on clean and on noisy images, and its
  calibration error.

Everything here trains small models in seconds to minutes on one CPU thread. The protocols of causes and theory are not in
the public text; they follow the card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.activations.lazy_neuron import ActivationStats, activation_stats, topk_mlp, watching
from gossamer.data.bytes import byte_batches
from gossamer.data.images import NOISES, Images, add_noise, corrupt_labels
from gossamer.errors import InputError
from gossamer.hf import MLPView
from gossamer.models.training import Plan, byte_model, train
from gossamer.models.vit import class_probabilities, small_vit, train_classifier

Cause = Literal["true", "labels", "images", "fresh"]
CAUSES: tuple[Cause, ...] = get_args(Cause)


def ece(probs: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error Σ_b (n_b/n)·|acc_b − conf_b| over bins of confidence of equal width, (0, 1/B], (1/B, 2/B] …

    Args:
        probs: float ``[n, classes]``; confidence and prediction are its maximum. labels: int64 ``[n]``.

    Raises:
        InputError: shapes that don't fit, no example, no bin, or probabilities outside [0, 1].

    >>> ece(torch.tensor([[0.75, 0.25]] * 4), torch.tensor([0, 0, 0, 1]))
    0.0
    """
    if probs.ndim != 2 or labels.shape != probs.shape[:1] or not len(labels) or bins < 1:
        raise InputError(f"ece: want probs [n, classes], labels [n], got {list(probs.shape)}, {list(labels.shape)}")
    if not bool(((probs >= 0) & (probs <= 1)).all()):  # false for NaN too
        raise InputError("ece: probabilities must be in [0, 1]")
    confidence, guess = probs.double().max(-1)
    right = (guess == labels).double()
    index = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=probs.device).index_add_(0, index, right - confidence)
    return float(gap.abs().sum() / len(labels))


# --- emergence -------------------------------------------------------------------------------------------------------


@dataclass
class Emergence:
    """Percent nonzero of each layer while a model was trained.

    Attributes:
        curve: points with `step` (0 is the fresh model), `percents` by layer, and `loss` where one was taken.
        train, held_out: what fired in the end on data it was trained on, and on other data.
    """

    curve: list[dict[str, Any]] = field(default_factory=list)
    train: ActivationStats | None = None
    held_out: ActivationStats | None = None

    @property
    def ratios(self) -> list[float]:
        """Share of the initial percentage that is left in the end, by layer."""
        first, last = (self.curve[place]["percents"] for place in (0, -1))
        return [end / start for start, end in zip(first, last, strict=True)]


def probe_batches(data: Tensor, context: int = 96, count: int = 64, batch: int = 32) -> list[Tensor]:
    """`count` stretches spread evenly over bytes, as batches int64 ``[batch, context]``: the same ones each time."""
    if count < 1 or batch < 1 or len(data) < context:
        raise InputError(f"cannot take {count} stretches of {context} bytes from {len(data)}")
    starts = torch.linspace(0, len(data) - context, count).long()
    return [data[part[:, None] + torch.arange(context)].long() for part in starts.split(batch)]


def emergence(
    model: nn.Module,
    batches: Iterable[Tensor],
    plan: Plan,
    seen: Sequence[Tensor],
    held_out: Sequence[Tensor],
    every: int = 100,
    k: int | None = None,
) -> Emergence:
    """Train a language model in place and watch its neurons fall silent on `held_out`.

    Args:
        batches: as `models.train` takes them. seen, held_out: probe batches of token ids.
        every: steps between points of the curve.
        k: train it as a Top-k transformer; what is counted is what fires before the cap.
    """
    result = Emergence([{"step": 0, "percents": activation_stats(model, held_out).percents}])

    def point(step: int) -> None:
        if (step + 1) % every == 0 or step + 1 == plan.steps:
            result.curve.append({"step": step + 1, "percents": activation_stats(model, held_out).percents})

    with nullcontext() if k is None else topk_mlp(model, k):
        training = train(model, batches, plan, after_step=point)
        losses = {int(p["step"]) + 1: p["loss"] for p in training.curve}
        for entry in result.curve:
            if entry["step"] in losses:
                entry["loss"] = losses[entry["step"]]
        result.train, result.held_out = activation_stats(model, seen), activation_stats(model, held_out)
    return result


def byte_emergence(
    data: tuple[Tensor, Tensor],
    plan: Plan,
    *,
    batch: int = 16,
    context: int = 96,
    every: int = 100,
    seed: int = 0,
    k: int | None = None,
    **overrides: Any,
) -> Emergence:
    """`emergence` of a plain ReLU byte model (width 96, MLP 512, 3 layers unless `overrides` say more).

    data: (training bytes, held-out bytes), as `data.byte_corpus` gives them. overrides: of `models.byte_model`.
    """
    sizes = {"hidden_size": 96, "intermediate_size": 512, "activation_function": "relu", **overrides}
    model = byte_model("gpt2", seed, **sizes)
    learned, other = data
    batches = byte_batches(learned, batch, context, plan.steps, seed)
    return emergence(model, batches, plan, probe_batches(learned, context), probe_batches(other, context), every, k)


def _rows(
    setting: str, values: Sequence[int], run: Callable[[int], Emergence], progress: Callable[[str, int, int], None]
) -> list[dict[str, Any]]:
    rows = []
    for index, value in enumerate(values):
        progress(f"{setting} {value}", index, len(values))
        result = run(value)
        assert result.train is not None and result.held_out is not None
        rows.append(
            {
                setting: value,
                "initial": result.curve[0]["percents"],
                "held_out": result.held_out.percents,
                "train": result.train.percents,
                "counts": [layer.count for layer in result.held_out.layers],
                "mean": result.held_out.mean_percent,
                "curve": result.curve,
            }
        )
    return rows


def _quiet(what: str, done: int, total: int) -> None:
    pass


def depth_sweep(
    data: tuple[Tensor, Tensor],
    plan: Plan,
    depths: Sequence[int] = (1, 2, 4, 6),
    progress: Callable[[str, int, int], None] = _quiet,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Percent nonzero by layer at several depths and one width; a row a depth, on training and held-out data."""
    return _rows("depth", depths, lambda n: byte_emergence(data, plan, num_hidden_layers=n, **settings), progress)


def width_sweep(
    data: tuple[Tensor, Tensor],
    plan: Plan,
    widths: Sequence[int] = (128, 256, 512, 1024),
    progress: Callable[[str, int, int], None] = _quiet,
    **settings: Any,
) -> list[dict[str, Any]]:
    """The same at several d_ff and one depth."""
    return _rows("width", widths, lambda n: byte_emergence(data, plan, intermediate_size=n, **settings), progress)


def data_sweep(
    data: tuple[Tensor, Tensor],
    plan: Plan,
    sizes: Sequence[int] = (20_000, 200_000, 1_800_000),
    progress: Callable[[str, int, int], None] = _quiet,
    **settings: Any,
) -> list[dict[str, Any]]:
    """The same with so many training bytes: few are seen again and again, many are hardly ever seen twice."""
    return _rows("bytes", sizes, lambda n: byte_emergence((data[0][:n], data[1]), plan, **settings), progress)


# --- causes ----------------------------------------------------------------------------------------------------------


def cause_study(
    data: Images, cause: Cause, *, epochs: int = 40, batch: int = 60, lr: float = 1e-3, seed: int = 0, **overrides: Any
) -> dict[str, Any]:
    """Train a small ViT on images with one source of structure taken away, and count before and after.

    cause: `true`, nothing is changed; `labels`, uniform random labels, drawn once; `images`, uniform random pixels, drawn
        once, and random labels; `fresh`, both drawn anew at each step, so that there is nothing to fit.
    overrides: of `models.vit.small_vit`.

    Returns:
        `initial`, `train` and `other` percent nonzero by layer (fresh model; trained model on its training images and on
        images of the same kind that it never saw), and the `curve` of the training.
    """
    if cause not in CAUSES:
        raise InputError(f"cause_study: the cause is one of {', '.join(CAUSES)}, not {cause!r}")
    generator = torch.Generator().manual_seed(seed)
    images, other, labels = data.train_images, data.test_images, data.train_labels
    if cause != "true":
        labels = torch.randint(data.classes, labels.shape, generator=generator)
    if cause in ("images", "fresh"):
        images, other = (torch.rand(part.shape, generator=generator) for part in (images, other))

    def fresh(step: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.rand(x.shape, generator=generator), torch.randint(data.classes, y.shape, generator=generator)

    model = small_vit(seed, num_labels=data.classes, **overrides)
    initial = activation_stats(model, other.split(256)).percents
    draw = fresh if cause == "fresh" else None
    curve = train_classifier(model, images, labels, epochs=epochs, batch=batch, lr=lr, seed=seed, draw=draw)
    return {
        "cause": cause,
        "initial": initial,
        "train": activation_stats(model, images.split(256)).percents,
        "other": activation_stats(model, other.split(256)).percents,
        "curve": curve,
    }


# --- theory ----------------------------------------------------------------------------------------------------------


def _signs(activations: Tensor, gradients: Tensor) -> dict[str, float]:
    """Mean gradient of active neurons, that over its standard error (examples as samples), and the share above zero."""
    on = activations > 0
    each = (gradients * on).flatten(1).sum(1) / on.flatten(1).sum(1).clamp(min=1)
    error = each.std() / len(each) ** 0.5
    return {
        "mean": float(gradients[on].mean()),
        "z": float(each.mean() / error),
        "share_positive": float((gradients[on] > 0).double().mean()),
    }


def two_layer_gradients(
    loss: Literal["cross_entropy", "squared"] = "cross_entropy",
    *,
    trials: int = 2000,
    width: int = 16,
    neurons: int = 64,
    classes: int = 10,
    spread: float = 0.1,
    seed: int = 0,
) -> dict[str, float]:
    """∂L/∂a_i of active neurons of V·σ(Kᵀx) over random K, V (zero mean, standard deviation `spread`), x and labels.

    Returns:
        `mean`, `z` (mean over its standard error, a trial a sample) and `share_positive`.
    """
    if loss not in ("cross_entropy", "squared"):
        raise InputError(f"the loss is cross_entropy or squared, not {loss!r}")
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(trials, width, 1, generator=g)
    a = (torch.randn(trials, neurons, width, generator=g) @ x).relu()
    v = torch.randn(trials, classes, neurons, generator=g) * spread
    y = F.one_hot(torch.randint(classes, (trials,), generator=g), classes)[..., None]
    out = v @ a
    error = (out.softmax(1) if loss == "cross_entropy" else out) - y
    return _signs(a[..., 0], (v.mT @ error)[..., 0])


def gradient_signs(model: nn.Module, images: Tensor, labels: Tensor) -> list[dict[str, float]]:
    """The same at the first step of a classifier, a row a layer: gradients of the cross-entropy, examples as samples."""
    maps: dict[int, Tensor] = {}

    def see(view: MLPView, a: Tensor) -> None:
        a.retain_grad()
        maps[view.index] = a

    call: Any = model
    with watching(model, see):
        loss = F.cross_entropy(call(images).logits, labels, reduction="sum")
    loss.backward()
    model.zero_grad(set_to_none=True)
    rows = []
    for index in sorted(maps):
        gradient = maps[index].grad
        assert gradient is not None
        rows.append(_signs(maps[index].detach(), gradient))
    return rows


# --- robustness and calibration --------------------------------------------------------------------------------------


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((class_probabilities(model, images).argmax(-1) == labels).double().mean())


def robustness(
    data: Images,
    k: int | None,
    *,
    label_noise: float = 0.0,
    epochs: int = 40,
    batch: int = 60,
    lr: float = 1e-3,
    seed: int = 0,
    **overrides: Any,
) -> dict[str, Any]:
    """Train a small ViT, dense (`k` None) or Top-k, on labels of which a share is replaced, and test it on clean images.

    Returns:
        `fit`: accuracy on the labels trained with; `clean`: test accuracy; `noise`: by kind, test accuracy averaged over
        severities 1 to 5; `ece` on the clean test; `percents` nonzero by layer before the cap, and `over_k`, the share of
        tokens that the cap changes; `curve`: by epoch, `loss` and `accuracy` while training, and every fifth time `clean`.
    """
    labels = corrupt_labels(data.train_labels, label_noise, data.classes, seed)
    model = small_vit(seed, num_labels=data.classes, **overrides)
    clean: dict[int, float] = {}

    def test(epoch: int) -> None:
        if (epoch + 1) % 5 == 0 or epoch == epochs - 1:
            model.eval()
            clean[epoch] = _accuracy(model, data.test_images, data.test_labels)

    with nullcontext() if k is None else topk_mlp(model, k):
        curve = train_classifier(
            model, data.train_images, labels, epochs=epochs, batch=batch, lr=lr, seed=seed, after_epoch=test
        )
        stats = activation_stats(model, data.test_images.split(256))
        noise = {}
        for kind in NOISES:
            noisy = [add_noise(data.test_images, kind, severity, seed) for severity in range(1, 6)]
            noise[kind] = sum(_accuracy(model, images, data.test_labels) for images in noisy) / len(noisy)
        return {
            "k": k,
            "fit": _accuracy(model, data.train_images, labels),
            "clean": clean[epochs - 1],
            "noise": noise,
            "ece": ece(class_probabilities(model, data.test_images), data.test_labels),
            "percents": stats.percents,
            "over_k": None if k is None else [layer.share_over(k) for layer in stats.layers],
            "curve": [{**p, "clean": clean[i]} if i in clean else p for i, p in enumerate(curve)],
        }
