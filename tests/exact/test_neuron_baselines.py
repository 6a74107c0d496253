"""The yardsticks of activation methods: ReLU in place, top-k and chance, each against its definition."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer.activations.neuron_baselines import RandomNeurons, ReLUfication, TopKNeurons, kept_count
from gossamer.errors import InputError, RecipeError
from gossamer.hf import mlp_views
from gossamer.models import tiny_model
from gossamer.registry import make

MODEL = tiny_model("llama")


def ids(batch: int = 2, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(tokens).logits
    return out


def with_activation(family: str, activation: nn.Module) -> Any:
    model = copy.deepcopy(tiny_model(family))
    for view in mlp_views(model):
        view.replace_activation(activation)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("mode", ["mask", "auto"])
def test_relufication_is_the_model_with_relu(family: str, mode: str) -> None:
    model, relu = tiny_model(family), with_activation(family, nn.ReLU())
    dense = logits(model, ids())
    want, one = logits(relu, ids()), logits(relu, ids(1, 1))
    method: Any = make("relufication", mode=mode)
    with method.attach(model) as handle:
        torch.testing.assert_close(logits(model, ids()), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits(model, ids(1, 1)), one, atol=1e-5, rtol=1e-5)
        view = mlp_views(model)[0]
        x = torch.randn(1, 5, view.channels)
        zeros = float((view.hidden(x)[0] == 0).float().mean())
        assert 0.3 < zeros < 0.7
        assert handle.report()["neurons_kept"] == pytest.approx(1 - zeros, abs=0.25)
    assert torch.equal(logits(model, ids()), dense), "the old activation is back"
    assert not torch.allclose(want, dense, atol=1e-2)


def test_relufication_takes_no_budget() -> None:
    with pytest.raises(InputError, match="relufication: sparsity: no such setting"):
        make("relufication", sparsity=0.5)
    assert ReLUfication.with_share(0.3) == ReLUfication(), "a study measures what it keeps"
    with pytest.raises(RecipeError, match="needs no calibration"):
        ReLUfication().calibrate(MODEL, ids())


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.7, 1.0])
def test_top_k_keeps_each_tokens_largest_gates(sparsity: float) -> None:
    view = mlp_views(MODEL)[0]
    x = torch.randn(1, 6, view.channels, generator=torch.Generator().manual_seed(0))
    count = kept_count(sparsity, 128)
    with torch.no_grad():
        gate, product = view.hidden(x)
        want = torch.zeros_like(product)
        for t in range(6):
            best = sorted(range(128), key=lambda j, t=t: -abs(float(gate[0, t, j])))[:count]  # type: ignore[misc]
            want[0, t, best] = product[0, t, best]
        want = view.down(want)
        for mode in ("mask", "auto"):
            method: Any = make("top-k-neurons", sparsity=sparsity, mode=mode)
            with method.attach(MODEL) as handle:
                torch.testing.assert_close(view.owner(x), want, atol=1e-5, rtol=1e-5)
                assert handle.mlp.meters[0].share(False) == pytest.approx(count / 128)
    assert TopKNeurons.with_share(0.25) == TopKNeurons(sparsity=0.75)


def test_random_neurons_are_a_fixed_draw() -> None:
    def chosen(**settings: Any) -> list[list[int]]:
        rules = RandomNeurons(**settings).neuron_policy(MODEL, None)
        return [rules.rule(layer).indices.tolist() for layer in range(2)]  # type: ignore[union-attr]

    half = chosen(sparsity=0.5)
    assert [len(layer) for layer in half] == [64, 64]
    assert half == chosen(sparsity=0.5)
    assert half[0] != half[1] != chosen(sparsity=0.5, seed=1)[1]
    assert set(chosen(sparsity=0.8)[0]) < set(half[0])
    assert chosen(sparsity=0) == [list(range(128))] * 2
    assert chosen(sparsity=1) == [[], []]
    with pytest.raises(InputError, match="random-neurons: seed"):
        make("random-neurons", seed=-1)
    with RandomNeurons(sparsity=0.5).attach(MODEL) as handle:
        logits(MODEL, ids(1, 1))
        report = handle.report()
    assert report["mlp_bytes_read"] == report["mlp_bytes_dense"] / 2, "gates of the others aren't read either"


def test_chance_is_worse_than_choosing() -> None:
    """The control controls: at equal counts, the largest gates keep more of every MLP's output than drawn neurons."""
    view = mlp_views(MODEL)[0]
    x = torch.randn(1, 200, view.channels, generator=torch.Generator().manual_seed(1))
    errors = {}
    with torch.no_grad():
        dense = view.owner(x)
        for slug in ("top-k-neurons", "random-neurons"):
            method: Any = make(slug, sparsity=0.5)
            with method.attach(MODEL):
                errors[slug] = float((view.owner(x) - dense).norm() / dense.norm())
    assert errors["top-k-neurons"] < 0.6 * errors["random-neurons"]
