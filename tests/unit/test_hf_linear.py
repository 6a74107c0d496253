"""DecodeLinear and the method that attaches it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from gossamer import ops
from gossamer.errors import BackendError, ModelError
from gossamer.hf.linear import DecodeLinear
from gossamer.recipe import Recipe
from gossamer.registry import make

pytestmark = pytest.mark.skipif("native" not in ops.available_backends(), reason="native kernels are not built")


@pytest.fixture
def calls(monkeypatch):
    """Counts native products."""
    import gossamer.hf.linear as module

    seen = []
    real = module.few_rows
    monkeypatch.setattr(
        module, "few_rows", lambda x, w, b, rows, shape: seen.append(rows) or real(x, w, b, rows, shape)
    )
    return seen


def step(model, rows=1):
    with torch.no_grad():
        return model(torch.arange(rows)[None] + 5).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_model_says_the_same(tiny_model, calls, family, dtype):
    model = tiny_model(family).to(dtype).eval()
    before = {name: module.__dict__.copy() for name, module in model.named_modules()}
    plain = step(model)
    routed = DecodeLinear(model)
    count = len(routed.layers)
    close = step(model)
    assert calls == [1] * count
    torch.testing.assert_close(close, plain, atol=1e-5 if dtype is torch.float32 else 3e-2, rtol=1e-2)
    routed.detach()
    routed.detach()
    calls.clear()
    assert torch.equal(step(model), plain)
    assert not calls
    assert {name: module.__dict__.keys() for name, module in model.named_modules()} == {
        name: kept.keys() for name, kept in before.items()
    }


def test_tied_weights_are_read_in_place(tiny_model, calls):
    model = tiny_model("llama", tie_word_embeddings=True).eval()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with torch.no_grad():
        routed = DecodeLinear(model)
        first = step(model)
        model.lm_head.weight.mul_(2)
        assert not torch.equal(step(model), first)
    assert set(model.state_dict()) == set(tiny_model("llama", tie_word_embeddings=True).state_dict())
    routed.detach()


def test_many_rows_and_gradients_go_to_torch(calls):
    model = nn.Sequential(nn.Linear(16, 8))
    x = torch.randn(3, 3, 16)
    plain = model(x)
    with torch.no_grad():
        small = model(x[:2])
    DecodeLinear(model)
    with torch.no_grad():
        assert torch.equal(model(x), plain)  # nine rows
        assert not calls
        torch.testing.assert_close(model(x[:2]), small)
        torch.testing.assert_close(model(x[0, 0]), plain[0, 0].detach())
        assert calls == [6, 1]
        assert model(x[:0]).shape == (0, 3, 8)
    model(x[:1]).sum().backward()  # the weight wants a gradient
    assert model[0].weight.grad is not None
    assert calls == [6, 1]


def test_wrong_input_raises_as_torch_does():
    model = nn.Sequential(nn.Linear(16, 8))
    DecodeLinear(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), torch.no_grad():
        model(torch.randn(2, 8))


def test_weights_may_change_while_attached(calls):
    layer = nn.Linear(16, 8)
    routed = DecodeLinear(layer)
    x = torch.randn(1, 16)
    with torch.no_grad():
        layer.weight.data = layer.weight.data[:4].clone()
        layer.bias.data = layer.bias.data[:4].clone()
        assert layer(x).shape == (1, 4)
        layer.to(torch.bfloat16)
        assert layer(x.bfloat16()).dtype is torch.bfloat16
        layer.weight = nn.Parameter(torch.zeros(3, 16))
        layer.bias = None
        assert layer(x).tolist() == [[0, 0, 0]]
        assert calls == [1, 1, 1]
        prune.l1_unstructured(layer, "weight", amount=0.5)  # the weight becomes a product of two tensors
        assert layer(x).shape == (1, 3)
        assert calls == [1, 1, 1]
        prune.remove(layer, "weight")
    routed.detach()
    assert "forward" not in layer.__dict__


def test_a_copy_reads_its_own_weights():
    layer = nn.Linear(16, 8)
    DecodeLinear(layer)
    other, x = copy.deepcopy(layer), torch.randn(1, 16)
    with torch.no_grad():
        before = layer(x)
        other.weight.zero_()
        assert torch.equal(layer(x), before)
        torch.testing.assert_close(other(x), other.bias[None])


def test_hooks_autocast_and_forced_backends(calls):
    layer, seen = nn.Linear(16, 8), []
    DecodeLinear(layer)
    layer.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    x = torch.randn(1, 16)
    with torch.no_grad():
        layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype is torch.bfloat16
        with ops.use_backend("reference"):
            layer(x)
    assert len(seen) == 3
    assert calls == [1]


def test_layers_with_a_forward_of_their_own_are_left_alone():
    class Other(nn.Linear):
        pass

    model = nn.Sequential(Other(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].forward = lambda x: x
    assert DecodeLinear(model).layers == [model[2]]


def test_the_method_stacks_with_attention(tiny_model, calls):
    model = tiny_model("llama").eval()
    plain = step(model)
    recipe = Recipe.of(make("native-linear"), make("streaming-llm"))
    with recipe.attach(model) as handle:
        assert handle.report()["native_linear_layers"] == len(calls) or not calls
        torch.testing.assert_close(step(model), plain, atol=1e-4, rtol=1e-4)
        assert calls
    calls.clear()
    assert torch.equal(step(model), plain)
    assert not calls


def test_the_method_refuses_what_it_cannot_run(tiny_model, monkeypatch):
    with pytest.raises(ModelError, match="no float32 or bfloat16 linear layer"):
        make("native-linear").attach(tiny_model("llama").half())
    monkeypatch.setattr(ops, "available_backends", lambda: ("reference",))
    with pytest.raises(BackendError, match="needs the native kernels"):
        make("native-linear").attach(tiny_model("llama"))
