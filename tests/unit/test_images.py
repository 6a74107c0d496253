"""Images with noise, and the small vision transformer that learns from them."""

import sys

import pytest
import torch

from gossamer.data.images import NOISES, add_noise, corrupt_labels, digits
from gossamer.errors import InputError
from gossamer.models.vit import SmallViT, class_probabilities, small_vit, train_classifier


def test_digits_are_two_disjoint_parts():
    data = digits()
    assert data.train_images.shape == (900, 1, 8, 8)
    assert data.test_images.shape == (897, 1, 8, 8)
    both = torch.cat([data.train_images, data.test_images])
    assert float(both.min()) == 0
    assert float(both.max()) == 1
    assert torch.cat([data.train_labels, data.test_labels]).unique().tolist() == list(range(10))
    assert torch.equal(
        digits(900, 1).train_labels.bincount() + digits(900, 1).test_labels.bincount(),
        data.train_labels.bincount() + data.test_labels.bincount(),
    )
    assert not torch.equal(digits(900, 1).train_labels, data.train_labels)
    for bad in (0, 1797):
        with pytest.raises(InputError, match="between 1 and 1796"):
            digits(bad)


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"pip install 'gossamer-sparse\[data\]'"):
        digits(901)


@pytest.mark.parametrize("kind", NOISES)
def test_noise_grows_with_severity_and_stays_in_range(kind):
    images = torch.full((50, 1, 8, 8), 0.5)
    far = []
    for severity in range(1, 6):
        noisy = add_noise(images, kind, severity, seed=3)
        assert torch.equal(noisy, add_noise(images, kind, severity, seed=3))
        assert not torch.equal(noisy, add_noise(images, kind, severity, seed=4))
        assert 0 <= float(noisy.min()) <= float(noisy.max()) <= 1
        far.append(float((noisy - images).square().mean()))
    assert far == sorted(far)
    assert bool((images == 0.5).all())


def test_noise_has_the_strength_it_says():
    images = torch.full((200, 1, 16, 16), 0.5)
    assert float(add_noise(images, "gaussian", 1).std()) == pytest.approx(0.08, rel=0.02)
    replaced = add_noise(images, "impulse", 5)
    assert float((replaced != 0.5).double().mean()) == pytest.approx(0.27, abs=0.01)
    assert float((replaced == 1).double().mean()) == pytest.approx(0.135, abs=0.01)
    # Poisson of 30 photons, over 60.
    assert float(add_noise(images, "shot", 1).std()) == pytest.approx(30**0.5 / 60, rel=0.02)


@pytest.mark.parametrize(
    ("images", "kind", "severity"),
    [
        (torch.zeros(2), "fog", 1),
        (torch.zeros(2), "shot", 0),
        (torch.zeros(2), "shot", 6),
        (torch.zeros(2, dtype=torch.int64), "shot", 1),
        (torch.full((2,), 2.0), "gaussian", 1),
        (torch.full((2,), float("nan")), "gaussian", 1),
    ],
)
def test_noise_refuses_bad_input(images, kind, severity):
    with pytest.raises(InputError, match=r"^add_noise: "):
        add_noise(images, kind, severity)


def test_corrupt_labels_at_the_ends_and_bad_input():
    labels = torch.randint(10, (500,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(corrupt_labels(labels, 0, 10), labels)
    whole = corrupt_labels(labels, 1, 10)
    assert 0.02 < float((whole == labels).double().mean()) < 0.2  # the true one may be drawn
    for bad in ((labels, -0.1, 10), (labels, 1.1, 10), (labels, 0.5, 9), (labels.float(), 0.5, 10), (labels, 0.5, 0)):
        with pytest.raises(InputError, match=r"^corrupt_labels: "):
            corrupt_labels(*bad)


@pytest.mark.parametrize("norm_first", [True, False])
def test_small_vit_is_the_formula(norm_first):
    model = small_vit(3, norm_first=norm_first)
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.patch_embeddings(x) + model.position_embeddings
        assert hidden.shape == (2, 16, 32)
        for layer in model.layers:
            one, two = layer.layernorm_before, layer.layernorm_after
            if norm_first:
                hidden = hidden + layer.attention(one(hidden))[0]
                hidden = hidden + layer.mlp(two(hidden))
            else:
                hidden = one(hidden + layer.attention(hidden)[0])
                hidden = two(hidden + layer.mlp(hidden))
        hidden = model.layernorm(hidden) if norm_first else hidden
        torch.testing.assert_close(model(x).logits, model.classifier(hidden.mean(1)))
    assert torch.equal(small_vit(3, norm_first=norm_first)(x).logits, model(x).logits)
    assert not torch.equal(small_vit(4, norm_first=norm_first)(x).logits, model(x).logits)


def test_small_vit_saves_and_loads(tmp_path):
    model = small_vit(norm_first=False, num_labels=4)
    model.save_pretrained(tmp_path)
    again = SmallViT.from_pretrained(tmp_path).eval()
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(again(x).logits, model(x).logits)
    with pytest.raises(InputError, match="cannot be made so"):
        small_vit(hidden_size=33, num_attention_heads=2, patch_size=0)


def test_classifier_learns_in_place_and_reports_its_curve():
    images = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.2
    labels = torch.arange(60) % 2
    images[labels == 1, :, :4] += 0.7
    model = small_vit(num_labels=2)
    epochs = []
    curve = train_classifier(model, images, labels, epochs=8, batch=10, after_epoch=epochs.append)
    assert [point["epoch"] for point in curve] == epochs == list(range(8))
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert not model.training
    probs = class_probabilities(model, images, batch=7)
    assert probs.shape == (60, 2)
    assert torch.allclose(probs.sum(-1), torch.ones(60))
    assert float((probs.argmax(-1) == labels).double().mean()) > 0.95


def test_classifier_trains_on_what_draw_gives():
    seen = []

    def draw(step, x, y):
        seen.append((step, len(y)))
        return torch.zeros_like(x), y

    model = small_vit()
    train_classifier(model, torch.rand(7, 1, 8, 8), torch.zeros(7).long(), epochs=2, batch=4, draw=draw)
    assert seen == [(0, 4), (1, 3), (2, 4), (3, 3)]
    with pytest.raises(InputError, match="cannot train"):
        train_classifier(model, torch.rand(7, 1, 8, 8), torch.zeros(6).long(), epochs=1)
    with pytest.raises(InputError, match="not finite in epoch 0"):
        train_classifier(model, torch.full((4, 1, 8, 8), float("inf")), torch.zeros(4).long(), epochs=1)
