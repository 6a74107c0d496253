"""Delta Activation Layer: the card's ten checks, insertion into networks, and streams against the frames they stand for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gossamer.activations.delta_activation import DeltaActivation, SpatialL1, over_frames, set_steps
from gossamer.activations.delta_activation_layers import (
    DeltaActivationLayer,
    SpatialL1Layer,
    delta_layers,
    differences,
    network_density,
    penalty,
    quantise,
)
from gossamer.activations.delta_graph import fan_out
from gossamer.activations.delta_stream import DeltaInference
from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError, InputError, ModelError
from gossamer.registry import make, methods
from gossamer.reproductions.delta_activation import clips


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(*shape: int, **how: Any) -> DeltaActivationLayer:
    return DeltaActivationLayer(shape or (3,), **{"step_init": 0.25, "rate": 1.0, **how})


def drifting(batch: int, frames: int, *shape: int, seed: int = 0, moves: float = 0.2) -> Tensor:
    """Frames of which a share of the elements changes from one to the next."""
    generator = torch.Generator().manual_seed(seed)
    clip = [torch.randn(batch, *shape, generator=generator)]
    for _ in range(frames - 1):
        moved = torch.rand(batch, *shape, generator=generator) < moves
        clip.append(torch.where(moved, torch.randn(batch, *shape, generator=generator), clip[-1]))
    return torch.stack(clip, 1)


class Net(nn.Module):
    """A residual network in miniature: strided, grouped and dilated convolutions, batch norms, pools, one ReLU used often."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv1, self.norm1 = nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.deep, self.wide = (
            nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
            nn.Conv2d(6, 6, 3, padding=2, dilation=2),
        )
        self.norm2, self.skip = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)
        self.pool, self.head, self.out = nn.MaxPool2d(2), nn.Linear(24, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm1(self.conv1(x)))
        y = torch.relu(self.norm2(self.deep(x)))
        x = (self.wide(y) + self.skip(x)).relu()
        return self.out(self.relu(self.head(torch.flatten(self.pool(x), 1))))


def trained(seed: int = 0, **how: Any) -> nn.Module:
    torch.manual_seed(seed)
    net = Net()
    net.train()
    for _ in range(3):
        net(torch.randn(8, 2, 9, 9))  # running statistics of the norms
    return DeltaActivation(**{"step_init": 0.1, **how}).apply(net).eval()


# 1 to 3: the quantiser


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20), st.floats(0.03125, 10, width=32))
@settings(max_examples=60, deadline=None)
def test_y_is_a_whole_number_of_steps_within_half_a_step(values: list[float], step: float) -> None:
    x = torch.tensor(values)
    y = quantise(x, torch.tensor(-step))  # the sign of θ does not matter
    codes = y.double() / step
    assert (codes - codes.round()).abs().max() < 1e-4
    assert ((y - x).abs() <= step / 2 + 1e-5 * x.abs()).all()


def test_halves_round_to_even() -> None:
    assert quantise(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), torch.tensor(1.0)).tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize("per", ["layer", "channel", "neuron"])
def test_a_constant_input_changes_nothing(per: Any) -> None:
    dal = layer(3, 4, 4, per=per)
    dal(normal(2, 1, 3, 4, 4).expand(2, 5, 3, 4, 4))
    assert float(dal.penalty.detach()) == dal.density() == 0
    assert dal.elements == 2 * 4 * 3 * 16


@pytest.mark.parametrize(("per", "kept"), [("layer", ()), ("channel", (2,)), ("neuron", (2, 3, 4))])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradients_are_the_formulas(per: Any, kept: tuple[int, ...], sign: float) -> None:
    dal = layer(3, 4, 5, per=per, step_init=0.3)
    dal.theta.data *= sign
    x, weights = normal(2, 4, 3, 4, 5).requires_grad_(), normal(2, 4, 3, 4, 5, seed=1)
    (dal(x) * weights).sum().backward()
    assert x.grad is not None
    assert dal.theta.grad is not None
    assert torch.equal(x.grad, weights)
    each = -sign * weights * torch.round(x.detach() / 0.3)
    shared = [axis for axis in range(5) if axis not in kept]
    torch.testing.assert_close(dal.theta.grad, each.sum(shared))


def test_a_frozen_step_gets_no_gradient() -> None:
    dal, x = layer(trainable=False), normal(1, 4, 3).requires_grad_()
    dal(x).sum().backward()
    assert dal.theta.grad is None
    assert x.grad is not None


def test_a_step_of_zero_divides_nothing() -> None:
    dal = layer()
    dal.theta.data.zero_()
    out = dal(normal(1, 2, 3))
    out.sum().backward()
    assert out.isfinite().all()
    assert dal.theta.grad is not None
    assert dal.theta.grad.isfinite().all()


# 4: streams


@pytest.mark.parametrize("per", ["layer", "channel"])
@pytest.mark.parametrize("break_even", [0.0, 0.3, 1.0])
def test_a_stream_computes_what_the_frames_do(per: Any, break_even: float) -> None:
    model, clip = trained(per=per), drifting(3, 6, 2, 9, 9)
    wanted = over_frames(model, clip)
    stream = DeltaInference(model, break_even)
    for t in range(6):
        torch.testing.assert_close(stream.step(clip[:, t]), wanted[:, t], atol=1e-4, rtol=1e-4)


def test_with_steps_of_neurons_and_without_the_input() -> None:
    torch.manual_seed(2)
    net, clip = Net().eval(), drifting(2, 4, 2, 9, 9)
    for method in (DeltaActivation(per="neuron", step_init=0.07), DeltaActivation(on_input=False, step_init=0.07)):
        model = method.apply(net, clip[:, 0]).eval()
        stream, wanted = DeltaInference(model), over_frames(model, clip)
        for t in range(4):
            torch.testing.assert_close(stream.step(clip[:, t]), wanted[:, t], atol=1e-4, rtol=1e-4)


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2), st.integers(1, 9))
@settings(max_examples=8, deadline=None)
def test_dyadic_networks_are_exact_however_long(seed: int, kernel: int, padding: int, stride: int, batch: int) -> None:
    """Weights, steps and inputs are multiples of powers of two, so float32 sums are exact: not a bit may drift."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, kernel, stride, padding), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Conv2d(4, 4, 2), nn.ReLU(),
        nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 3),
    )  # fmt: skip
    for p in net.parameters():
        p.data = torch.randint(-4, 5, p.shape, generator=generator) / 4.0
    model = DeltaActivation(step_init=0.5).apply(net).eval()
    clip = torch.randint(-4, 5, (batch, 8, 2, 8, 8), generator=generator) / 2.0
    clip[:, 1:] = torch.where(torch.rand(clip[:, 1:].shape, generator=generator) < 0.9, clip[:, :1], clip[:, 1:])
    stream, wanted = DeltaInference(model), over_frames(model, clip)
    for t in range(8):
        assert torch.equal(stream.step(clip[:, t]), wanted[:, t])


def test_one_dimensional_maps_tokens_and_float_inputs() -> None:
    """A map over time series, one behind an average (no whole steps), and one that reads several rows a stream."""

    class Series(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.mean = nn.Conv1d(3, 5, 3, padding=1), nn.AvgPool1d(2)
            self.last, self.rows = nn.Linear(20, 6), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.mean(self.conv(x).relu())
            return self.last(x.flatten(1)).sum(1, keepdim=True) + self.rows(x).flatten(1)

    torch.manual_seed(0)
    model, clip = DeltaActivation(step_init=0.05).apply(Series()).eval(), drifting(3, 5, 3, 8)
    stream, wanted = DeltaInference(model), over_frames(model, clip)
    for t in range(5):
        torch.testing.assert_close(stream.step(clip[:, t]), wanted[:, t], atol=1e-4, rtol=1e-4)


def test_streams_begin_anew_one_by_one() -> None:
    model, clip = trained(), drifting(2, 4, 2, 9, 9)
    stream = DeltaInference(model)
    first = stream.step(clip[:, 0])
    stream.step(clip[:, 1])
    stream.reset(1)
    mixed = torch.stack([clip[0, 2], clip[1, 0]])
    out = stream.step(mixed)
    torch.testing.assert_close(out[1], first[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, over_frames(model, mixed[:, None])[:, 0], atol=1e-4, rtol=1e-4)
    stream.reset()
    assert torch.equal(stream.step(clip[:1, 0])[0], first[0])  # another number of streams


# 5 to 7: output modes, the penalty, the counter


def test_differences_sum_to_the_values() -> None:
    x = normal(2, 6, 3, 4, 4)
    values, deltas, bare = (layer(3, step_init=0.3, output=mode)(x).detach() for mode in (0, 1, 2))
    codes, changes = ((y / 0.3).round().long() for y in (values, deltas))
    assert torch.equal(changes.cumsum(1), codes)
    assert torch.equal(deltas[:, :1], values[:, :1])
    assert torch.equal(bare[:, 1:], deltas[:, 1:])
    assert not bare[:, 0].any()
    assert torch.equal(deltas[:, 1:], values[:, 1:] - values[:, :-1])  # with their plus sign


def test_sigma_undoes_differences_exactly() -> None:
    x, q = normal(2, 6, 3, 4, 4), 0.25  # a power of two: sums of multiples are exact
    deltas = layer(3, step_init=q, output=1)(x)
    assert torch.equal(layer(3, step_init=q, sigma=True)(deltas), layer(3, step_init=q)(x))


def test_the_penalty_is_a_mean_and_one_frame_has_none() -> None:
    x = normal(2, 5, 3, 2, 2)
    dal = layer(3, rate=0.5, fan_out=36)
    delta = differences(dal(x))
    torch.testing.assert_close(dal.penalty, delta.abs().sum() / delta.numel() * 0.5 * 36)
    dal.reset_counts()
    dal(x[:, :1])
    assert float(dal.penalty) == dal.density() == 0
    assert dal.elements == 0


def test_multiplications_are_counted() -> None:
    model, clip = trained(step_init=0.3), drifting(2, 5, 2, 9, 9)
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(
                lambda m, args, out, name=name: seen.setdefault(name, []).append(args[0].clone())
            )
    over_frames(model, clip)
    expected, later = 0, 0
    for name, module in model.named_modules():
        if name in seen:
            x = seen[name][0].unflatten(0, (2, 5))
            n = fan_out(module)
            expected += n * x[:, 0].numel()
            later += n * int(x[:, 1:].ne(x[:, :-1]).sum())
    stream = DeltaInference(model)
    for t in range(5):
        stream.step(clip[:, t])
        if t == 0:
            assert stream.macs == stream.last_macs == expected
    assert stream.macs == expected + later
    dense = 4 * expected
    assert stream.report()["weighted_density"] == pytest.approx(later / dense)
    assert stream.report()["state_bytes"] > 0
    stream.step(clip[:, 4])
    assert stream.last_macs == 0


# 8 to 10: what the penalty does


def test_coarser_steps_are_sparser() -> None:
    clip, found = drifting(4, 8, 3, 8, 8, moves=0.7), []
    for step in (0.05, 0.2, 0.8, 3.2, 1e6):
        dal = layer(3, step_init=step)
        dal(clip)
        found.append(dal.density())
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.6
    assert found[-1] == 0


@pytest.mark.parametrize("per", ["layer", "channel", "neuron"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_penalty_alone_never_makes_a_step_finer(per: Any, sign: float) -> None:
    for seed in range(5):
        dal = layer(3, 2, 2, per=per, step_init=0.2)
        dal.theta.data *= sign
        before = dal.step.clone()
        optimizer = torch.optim.SGD([dal.theta], lr=0.1)
        dal(drifting(2, 4, 3, 2, 2, seed=seed))
        dal.penalty.backward()
        optimizer.step()
        assert (dal.step >= before).all()
        assert (dal.step > before).any()


def test_order_of_frames_matters_and_order_of_clips_does_not() -> None:
    clip = drifting(6, 6, 3, 4, 4, moves=0.1)
    penalties = []
    for x in (clip, clip[torch.tensor([3, 1, 5, 0, 2, 4])], clip[:, torch.tensor([3, 0, 5, 1, 4, 2])]):
        dal = layer(3)
        dal(x)
        penalties.append(float(dal.penalty.detach()))
    assert penalties[1] == pytest.approx(penalties[0], rel=1e-5)
    assert penalties[2] > penalties[0] * 1.1


# The layer's options


def test_time_in_the_batch_is_the_same() -> None:
    x = normal(2, 5, 3, 4, 4)
    apart, folded = layer(3), layer(3, frames=5)
    assert torch.equal(folded(x.flatten(0, 1)).unflatten(0, (2, 5)), apart(x))
    assert folded.penalty == apart.penalty
    with pytest.raises(InputError, match="9 frames are not clips of 5"):
        folded(normal(9, 3, 4, 4))


def test_bias_activation_and_pool() -> None:
    x = normal(1, 2, 3, 4, 4)
    dal = layer(3, bias=True, activation="relu", pool=3)
    assert dal.bias is not None
    dal.bias.data = torch.tensor([0.5, 0.0, -0.5])
    values = quantise((x + torch.tensor([0.5, 0.0, -0.5]).view(3, 1, 1)).relu(), torch.tensor(0.25))
    padded = nn.functional.pad(values[0], (1, 1, 1, 1), value=-1.0)
    pooled = torch.stack([padded[..., i : i + 4, j : j + 4] for i in range(3) for j in range(3)]).amax(0)
    assert torch.equal(dal(x)[0], pooled)
    soft = layer(3, activation="softmax", step_init=1e-4)(x)
    torch.testing.assert_close(soft, x.softmax(2), atol=1e-4, rtol=0)


def test_the_spatial_baseline_counts_values() -> None:
    x = normal(2, 3, 4).relu()
    l1 = SpatialL1Layer(rate=0.1, fan_out=5)
    assert l1(x) is x
    torch.testing.assert_close(l1.penalty, 0.1 * 5 * x.abs().mean())
    assert l1.density() == float((x > 0).float().mean())


def test_copies_leave_the_graph_behind() -> None:
    dal = layer()
    dal(normal(1, 3, 3).requires_grad_())
    assert float(dal.penalty.detach()) > 0
    assert float(copy.deepcopy(dal).penalty) == 0


# Insertion


def test_every_relu_gets_a_layer_of_its_own() -> None:
    net = Net()
    model = DeltaActivation(rate=0.25).apply(net)
    fans = [(dal.fan_out, dal.shape) for dal in delta_layers(model)]  # type: ignore[attr-defined]
    # input → conv1; conv1 → deep and, around it, skip; deep → wide; the sum → head; head → out
    assert fans == [(54, (2,)), (9 + 6, (6,)), (54, (6,)), (10, (6,)), (4, (10,))]
    assert all(dal.rate == 0.25 for dal in delta_layers(model))
    assert not delta_layers(net)
    assert {id(p) for p in net.parameters()} <= {id(p) for p in model.parameters()}
    assert len(delta_layers(DeltaActivation(on_input=False).apply(net))) == 4
    assert len(delta_layers(SpatialL1().apply(net))) == 4


def test_fine_steps_change_little_and_coarse_ones_much() -> None:
    torch.manual_seed(0)
    net, x = Net().eval(), normal(2, 2, 9, 9)
    fine, coarse = (DeltaActivation(step_init=q).apply(net).eval()(x) for q in (1e-4, 5.0))
    torch.testing.assert_close(fine, net(x), atol=1e-2, rtol=1e-2)
    assert not torch.allclose(coarse, net(x), atol=1e-2)


def test_trained_steps_are_saved_with_the_network() -> None:
    one, two = trained(0), trained(1)
    one.get_parameter("delta_1.theta").data.fill_(0.7)
    two.load_state_dict(one.state_dict())
    x = normal(2, 2, 9, 9)
    assert torch.equal(one(x), two(x))


def test_training_lowers_the_density() -> None:
    model, clip = trained(step_init=0.1, rate=0.02), drifting(8, 6, 2, 9, 9)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    found = []
    for _ in range(8):
        for dal in delta_layers(model):
            dal.reset_counts()
        over_frames(model, clip)
        found.append(network_density(model, weighted=True))
        optimizer.zero_grad()
        penalty(model).backward()
        optimizer.step()
    assert found[-1] < 0.85 * found[0]


def test_steps_start_at_a_share_of_the_mean() -> None:
    model, clip = trained(), drifting(2, 3, 2, 9, 9)
    set_steps(model, clip, share=0.5)
    first = delta_layers(model)[0]
    assert isinstance(first, DeltaActivationLayer)
    torch.testing.assert_close(first.step, torch.full((2,), float(clip[clip > 0].mean()) / 2))
    with pytest.raises(InputError, match="share must be positive"):
        set_steps(model, clip, 0)
    with pytest.raises(InputError, match="no positive activation"):
        set_steps(model, -clip.abs(), 0.5)


# The method


def test_attach_runs_streams_and_detach_restores() -> None:
    model, clip = trained(), drifting(2, 4, 2, 9, 9)
    wanted, state = over_frames(model, clip), copy.deepcopy(model.state_dict())
    method: Any = make("delta-activation")
    with method.attach(model) as handle:
        for t in range(4):
            torch.testing.assert_close(model(clip[:, t]), wanted[:, t], atol=1e-4, rtol=1e-4)
        assert 0 < handle.report()["density"] < 1
        handle.reset()
        torch.testing.assert_close(model(clip[:, 0]), wanted[:, 0], atol=1e-4, rtol=1e-4)
        with pytest.raises(ModelError, match="taken already"):
            method.attach(model)
    assert torch.equal(over_frames(model, clip), wanted)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert "forward" not in model.__dict__


def test_registered() -> None:
    assert methods()["delta-activation"].needs == {"training"}
    assert methods()["spatial-l1"].baseline


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() if x.sum() > 0 else x


def stream_of(model: nn.Module) -> DeltaInference:
    return DeltaInference(model.eval())


def with_nan() -> nn.Module:
    model = trained()
    next(model.parameters()).data[0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("error", "says", "call"),
    [
        (InputError, "step_init", lambda: DeltaActivation(step_init=0.0)),
        (InputError, "per", lambda: DeltaActivation(per="row")),  # type: ignore[arg-type]
        (InputError, "rate", lambda: SpatialL1(rate=-1.0)),
        (InputError, "rate >= 0", lambda: layer(rate=-1.0)),
        (InputError, "positive sizes", lambda: layer(0)),
        (InputError, "a step >=", lambda: layer(step_init=0.0)),
        (InputError, "a step >=", lambda: layer(step_init=float("nan"))),
        (InputError, "output is 0, 1 or 2", lambda: layer(output=3)),
        (InputError, "pool an odd side", lambda: layer(pool=2)),
        (InputError, "per is one of", lambda: layer(per="row")),
        (InputError, "has 3 channels", lambda: layer()(normal(1, 2, 4))),
        (InputError, r"want \[batch, time", lambda: layer()(normal(3, 3))),
        (InputError, "do not fit", lambda: layer(3, 2, 2, per="neuron")(normal(1, 2, 3))),
        (InputError, "channels, height, width", lambda: layer(pool=3)(normal(1, 2, 3))),
        (InputError, "need an example", lambda: DeltaActivation(per="neuron").apply(Net())),
        (ModelError, "cannot follow", lambda: DeltaActivation().apply(Branching())),
        (ModelError, "no ReLU", lambda: SpatialL1().apply(nn.Sequential(nn.Linear(2, 2)))),
        (ModelError, "already", lambda: DeltaActivation().apply(trained())),
        (ModelError, "cannot tell the channels", lambda: DeltaActivation().apply(nn.Sequential(nn.ReLU()))),
        (ModelError, "no Delta Activation Layers", lambda: stream_of(Net())),
        (ModelError, "no Delta Activation Layers", lambda: DeltaActivation().attach(Net().eval())),
        (ModelError, "eval mode", lambda: DeltaInference(trained().train())),
        (ModelError, "not finite", lambda: stream_of(with_nan())),
        (ModelError, "emit values", lambda: stream_of(nn.Sequential(layer(output=1), nn.Linear(3, 2)))),
        (ModelError, "padded by", lambda: stream_of(nn.Sequential(layer(frames=1), nn.Conv2d(3, 2, 3, padding="same")))),
        (CalibrationError, "no calibration", lambda: DeltaActivation().attach(trained(), Calibration("x", "", {}))),
        (InputError, "not finite", lambda: stream_of(trained()).step(torch.full((1, 2, 9, 9), torch.nan))),
        (InputError, "no stream 0", lambda: stream_of(trained()).reset(0)),
        (InputError, r"2\*\*30 steps", lambda: stream_of(trained()).step(torch.full((1, 2, 9, 9), 1e12))),
    ],
)  # fmt: skip
def test_bad_input(error: type[Exception], says: str, call: Any) -> None:
    with pytest.raises(error, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_frames_of_another_shape_are_refused() -> None:
    stream = stream_of(trained())
    stream.step(normal(2, 2, 9, 9))
    with pytest.raises(InputError, match="reset first"):
        stream.step(normal(3, 2, 9, 9))


# The experiment's material


def test_digits_drift_by_a_pixel_over_still_noise() -> None:
    images = torch.full((5, 8, 8), 2.0)
    moving = clips(images, torch.Generator().manual_seed(0))
    assert moving.shape == (5, 8, 1, 16, 16)
    digit = moving[:, :, 0] == 2
    assert (digit.sum((2, 3)) == 64).all()
    still = ~digit[:, 1:] & ~digit[:, :-1]
    assert torch.equal(moving[:, 1:, 0][still], moving[:, :-1, 0][still])
    assert moving[:, :, 0][~digit].max() <= 0.3
    at = torch.where(digit.flatten(2), torch.arange(256), 256).amin(2)  # of the upper left corner
    assert (at // 16).diff(dim=1).abs().max() == (at % 16).diff(dim=1).abs().max() == 1
