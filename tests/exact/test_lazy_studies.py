"""Lazy Neuron's studies: calibration error by hand, gradients against autograd, and that each study shows what it says."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.activations.lazy_neuron import activation_stats
from gossamer.activations.lazy_studies import (
    CAUSES,
    byte_emergence,
    cause_study,
    data_sweep,
    depth_sweep,
    ece,
    gradient_signs,
    probe_batches,
    robustness,
    two_layer_gradients,
    width_sweep,
)
from gossamer.data.images import Images
from gossamer.errors import InputError
from gossamer.models import Plan
from gossamer.models.vit import small_vit

TEXT = torch.frombuffer(bytearray(b"the quick brown fox jumps over the lazy neuron. " * 200), dtype=torch.uint8)
PLAN = Plan(steps=4, lr=2e-3, warmup=1)


def toy_images(count=60):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    images = torch.rand(count, 1, 8, 8, generator=generator) * 0.3 + labels.view(-1, 1, 1, 1) / 3
    cut = count * 2 // 3
    return Images(images[:cut], labels[:cut], images[cut:], labels[cut:], 3)


# 6. ECE


def test_ece_of_a_calibrated_set_is_zero():
    rows, labels = [], []
    for right, of in ((3, 4), (9, 10), (6, 10)):
        confidence = right / of
        rows += [[confidence, 1 - confidence]] * of
        labels += [0] * right + [1] * (of - right)
    assert ece(torch.tensor(rows, dtype=torch.float64), torch.tensor(labels)) == pytest.approx(0, abs=1e-12)


def test_ece_of_certain_predictions_is_their_error_rate():
    guesses, labels = torch.randint(10, (200,)), torch.randint(10, (200,))
    probs = F.one_hot(guesses, 10).float()
    assert ece(probs, labels) == pytest.approx(float((guesses != labels).double().mean()))


def test_ece_by_hand():
    # Two bins: 0.5 is in the first with a wrong guess, 0.6 and 1.0 in the second, one of them right.
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.4, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    assert ece(probs, torch.tensor([1, 0, 0]), bins=2) == pytest.approx((0.5 + abs(1 - 1.6)) / 3)
    assert ece(probs, torch.tensor([1, 0, 0]), bins=1) == pytest.approx(abs(1 - 2.1) / 3)


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_ece_does_not_depend_on_the_order(count, bins, seed):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(count, 4, generator=generator, dtype=torch.float64).softmax(-1)
    labels = torch.randint(4, (count,), generator=generator)
    order = torch.randperm(count, generator=generator)
    assert ece(probs[order], labels[order], bins) == pytest.approx(ece(probs, labels, bins), abs=1e-12)
    assert 0 <= ece(probs, labels, bins) <= 1


@pytest.mark.parametrize(
    ("probs", "labels", "bins"),
    [
        (torch.ones(3), torch.zeros(3).long(), 15),
        (torch.ones(3, 2), torch.zeros(2).long(), 15),
        (torch.ones(0, 2), torch.zeros(0).long(), 15),
        (torch.ones(3, 2), torch.zeros(3).long(), 0),
        (torch.full((3, 2), 1.5), torch.zeros(3).long(), 15),
        (torch.full((3, 2), float("nan")), torch.zeros(3).long(), 15),
    ],
)
def test_ece_refuses_bad_input(probs, labels, bins):
    with pytest.raises(InputError, match=r"^ece: "):
        ece(probs, labels, bins)


# theory


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_active_neurons_are_pushed_down_at_the_first_step(loss):
    found = two_layer_gradients(loss)
    assert found["mean"] > 0
    assert found["z"] > 5
    assert 0.4 < found["share_positive"] < 0.7  # in expectation, not one by one


def test_with_the_last_layer_at_zero_nothing_is_pushed():
    assert two_layer_gradients(spread=0.0)["mean"] == 0


def test_gradient_signs_are_autograds():
    model = small_vit(initializer_range=0.02, num_hidden_layers=1)
    data = toy_images()
    found = gradient_signs(model, data.train_images, data.train_labels)
    assert len(found) == 1
    assert all(p.grad is None for p in model.parameters())
    # By hand: the block's second matrix and the head behind it.
    layer = model.layers[0]
    with torch.no_grad():
        x = model.patch_embeddings(data.train_images) + model.position_embeddings
        x = x + layer.attention(layer.layernorm_before(x))[0]
        a = layer.mlp.fc1(layer.layernorm_after(x)).relu()
    a.requires_grad_(True)
    logits = model.classifier(model.layernorm(x + layer.mlp.fc2(a)).mean(1))
    F.cross_entropy(logits, data.train_labels, reduction="sum").backward()
    on = a.detach() > 0
    assert found[0]["mean"] == pytest.approx(float(a.grad[on].mean()), rel=1e-4, abs=1e-9)
    assert found[0]["share_positive"] == pytest.approx(float((a.grad[on] > 0).double().mean()))


def test_an_unknown_loss_is_refused():
    with pytest.raises(InputError, match="cross_entropy or squared"):
        two_layer_gradients("hinge")


# emergence and sweeps


def test_emergence_watches_a_training():
    result = byte_emergence((TEXT, TEXT[:3000]), PLAN, batch=2, context=16, every=2, intermediate_size=64)
    assert [point["step"] for point in result.curve] == [0, 2, 4]
    assert all(40 < percent < 60 for percent in result.curve[0]["percents"])
    assert result.held_out.percents == result.curve[-1]["percents"]
    assert result.ratios == [b / a for a, b in zip(result.curve[0]["percents"], result.held_out.percents, strict=True)]
    assert "loss" in result.curve[1]
    assert len(result.train.layers) == 3


def test_emergence_under_a_cap_counts_what_fires_before_it():
    result = byte_emergence((TEXT, TEXT), PLAN, batch=2, context=16, intermediate_size=64, k=2)
    assert min(result.held_out.percents) > 100 * 2 / 64


@pytest.mark.parametrize(
    ("sweep", "values", "key", "layers"),
    [
        (depth_sweep, (1, 2), "depth", [1, 2]),
        (width_sweep, (32, 64), "width", [3, 3]),
        (data_sweep, (100, 900), "bytes", [3, 3]),
    ],
)
def test_sweeps_have_a_row_a_value(sweep, values, key, layers):
    rows = sweep((TEXT, TEXT[:3000]), PLAN, values, batch=2, context=16, hidden_size=32)
    assert [row[key] for row in rows] == list(values)
    assert [len(row["held_out"]) for row in rows] == [len(row["train"]) for row in rows] == layers
    assert rows[0]["held_out"] != rows[1]["held_out"]
    width = 32 if key == "width" else 512
    assert rows[0]["counts"][0] == pytest.approx(rows[0]["held_out"][0] / 100 * width)


def test_probes_are_the_same_each_time():
    one, two = probe_batches(TEXT, 16, 10, 4), probe_batches(TEXT, 16, 10, 4)
    assert [len(part) for part in one] == [4, 4, 2]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    with pytest.raises(InputError, match="cannot take"):
        probe_batches(TEXT[:10], 16)


# causes


@pytest.mark.parametrize("cause", CAUSES)
def test_causes_train_and_count(cause):
    data = toy_images()
    result = cause_study(data, cause, epochs=2, batch=20, intermediate_size=32)
    assert len(result["initial"]) == len(result["train"]) == len(result["other"]) == 2
    assert all(30 < percent < 70 for percent in result["initial"])
    assert result["train"] != result["initial"]
    assert len(result["curve"]) == 2


def test_random_inputs_are_random():
    data = toy_images()
    model = small_vit(num_labels=3, intermediate_size=32)
    seen = activation_stats(model, [data.test_images]).percents
    assert cause_study(data, "labels", epochs=1, intermediate_size=32)["initial"] == seen
    assert cause_study(data, "images", epochs=1, intermediate_size=32)["initial"] != seen
    with pytest.raises(InputError, match="true, labels, images, fresh"):
        cause_study(data, "weather")


# robustness


def test_robustness_measures_both_arms_alike():
    data = toy_images()
    dense, capped = (robustness(data, k, label_noise=0.4, epochs=3, batch=10, intermediate_size=32) for k in (None, 4))
    for arm in (dense, capped):
        assert set(arm["noise"]) == {"gaussian", "impulse", "shot"}
        assert all(0 <= arm[name] <= 1 for name in ("fit", "clean", "ece"))
        assert len(arm["curve"]) == 3
        assert arm["curve"][-1]["clean"] == arm["clean"]
    assert dense["over_k"] is None
    assert all(0.5 < share <= 1 for share in capped["over_k"])
    full = robustness(data, 32, label_noise=0.4, epochs=3, batch=10, intermediate_size=32)
    assert {**full, "k": None, "over_k": None} == dense  # k = d_ff is the dense arm to the last bit
