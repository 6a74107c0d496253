"""Sparse layers: as modules, in models, in files, and as a method."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import gossamer
from gossamer.errors import InputError, ModelError, OutputError
from gossamer.hf.sparse import SparseLayers, best_format, load_sparse, save_sparse, sparsify
from gossamer.models import SparseLinear, tiny_model
from gossamer.recipe import Recipe
from gossamer.weights.prune import Magnitude

KINDS = pytest.mark.parametrize("kind", ["4x1", "1x4", "csr", "bitmask", "stream", "2:4", "4x1 int8", "bitmask int8"])


def pruned_layer(kind, inputs=32, outputs=24, bias=True):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias)
    structure = {"4x1": "4x1", "1x4": "1x4", "2:4": "2:4"}.get(kind.split()[0], "element")
    model = nn.ModuleDict({"a": layer, "b": nn.Linear(2, 2)})
    Magnitude(sparsity=0.6, structure=structure).apply(model)
    return layer.eval()


def made(kind, **settings):
    layer = pruned_layer(kind, **settings)
    return layer, SparseLinear.from_dense(layer, kind.split()[0], int8=kind.endswith("int8"))


@KINDS
@torch.no_grad()
def test_same_outputs_and_back(kind):
    layer, sparse = made(kind)
    x = torch.randn(3, 5, 32)
    tolerance = 0.05 if kind.endswith("int8") else 1e-5
    torch.testing.assert_close(sparse(x), layer(x), atol=tolerance, rtol=tolerance)
    dense = sparse.to_dense()
    assert (dense.weight[layer.weight == 0] == 0).all()
    if not kind.endswith("int8"):
        assert torch.equal(dense.weight, layer.weight)
        assert torch.equal(dense.bias, layer.bias)


@KINDS
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_files_hold_everything(kind, bias, tmp_path):
    _, sparse = made(kind, bias=bias)
    save_file(sparse.state_dict(), tmp_path / "layer.safetensors")
    again = SparseLinear.empty(32, 24, bias)
    again.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(4, 32)
    assert torch.equal(again(x), sparse(x))
    assert again.packed.format == sparse.packed.format
    assert {k: v.dtype for k, v in again.state_dict().items()} == {k: v.dtype for k, v in sparse.state_dict().items()}


@KINDS
@torch.no_grad()
def test_copies_and_dtypes(kind):
    layer, sparse = made(kind)
    x = torch.randn(4, 32)
    want = sparse(x)
    other = copy.deepcopy(sparse)
    for buffer in sparse.buffers():
        if buffer.is_floating_point():
            buffer.zero_()  # the copy must not look here
    assert torch.equal(other(x), want)
    half = copy.deepcopy(other).to(torch.bfloat16)
    torch.testing.assert_close(half(x.bfloat16()).float(), layer(x), atol=0.08, rtol=0.08)
    if not kind.endswith("int8"):
        assert torch.equal(half.packed.to_dense(), layer.weight.bfloat16())


def test_a_gradient_is_an_error():
    _, sparse = made("csr")
    with pytest.raises(InputError, match="no gradient"):
        sparse(torch.randn(2, 32, requires_grad=True))


def test_other_state_dicts_are_refused():
    _, sparse = made("csr")
    with pytest.raises(RuntimeError, match="sparse_spec"):
        sparse.load_state_dict(nn.Linear(32, 24).state_dict())
    with pytest.raises(InputError, match=r"this layer is \[24, 31\]"):
        SparseLinear.empty(31, 24).load_state_dict(sparse.state_dict())
    with pytest.raises(InputError, match="having a bias"):
        SparseLinear.empty(32, 24, bias=False).load_state_dict(sparse.state_dict())
    damaged = {**sparse.state_dict(), "sparse_spec": torch.tensor([1, 2], dtype=torch.uint8)}
    with pytest.raises(InputError, match="damaged"):
        SparseLinear.empty(32, 24).load_state_dict(damaged)
    with pytest.raises(InputError, match="bias must have shape"):
        SparseLinear(sparse.packed, torch.zeros(3))
    with pytest.raises(ModelError, match="not from ReLU"):
        SparseLinear.from_dense(nn.ReLU())


def test_the_rule_looks_at_how_the_zeros_lie():
    torch.manual_seed(1)
    weight, mask = torch.randn(64, 64), torch.rand(16, 64) < 0.2
    assert best_format(weight * mask.repeat_interleave(4, 0)) == "4x1"
    assert best_format(weight * mask.t().repeat_interleave(4, 1)) == "1x4"
    assert best_format(weight * mask.t().repeat_interleave(4, 1), int8=True) == "bitmask"
    assert best_format(weight * (torch.rand(64, 64) < 0.2)) == "stream"
    assert best_format(weight * (torch.rand(64, 64) < 0.9)) is None
    assert best_format(weight * (torch.rand(64, 64) < 0.9), {"stream": 0.05}) == "stream"


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("structure", ["4x1", "element"])
@torch.no_grad()
def test_a_model_gives_the_same_logits_and_comes_back(family, structure):
    model = tiny_model(family).eval()
    Magnitude(sparsity=0.8, structure=structure, scope="matrix").apply(model)
    tokens = torch.arange(12).view(1, 12)
    before, names = model(tokens)[0], {n: p.data_ptr() for n, p in model.named_parameters()}
    with SparseLayers(model) as layers:
        assert layers.layers
        assert not layers.skipped
        torch.testing.assert_close(model(tokens)[0], before, atol=1e-4, rtol=1e-4)
        assert layers.report()["sparse_bytes"] < layers.report()["dense_bytes"]
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == names
    assert torch.equal(model(tokens)[0], before)


@pytest.mark.parametrize("int8", [False, True])
@torch.no_grad()
def test_a_sparse_model_saves_and_loads(int8, tmp_path):
    model = tiny_model("llama").eval()
    Magnitude(sparsity=0.8, structure="4x1").apply(model)
    layers = sparsify(model, int8=int8)
    tokens = torch.arange(12).view(1, 12)
    want = model(tokens).logits
    again = load_sparse(save_sparse(model, tmp_path / "model"))
    assert torch.equal(again(tokens).logits, want)
    assert sum(isinstance(m, SparseLinear) for m in again.modules()) == len(layers.layers)


def test_folders_that_hold_no_sparse_model(tmp_path):
    with pytest.raises(ModelError, match="no sparse model"):
        load_sparse(tmp_path / "nothing")
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ModelError, match="no sparse model"):
        load_sparse(tmp_path / "dense")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        save_sparse(tiny_model("llama"), tmp_path / "file")
    with pytest.raises(ModelError, match="no config"):
        save_sparse(nn.Linear(2, 2), tmp_path / "linear")


def test_the_method_in_a_recipe():
    model = tiny_model("llama").eval()
    with pytest.raises(ModelError, match="prune the model first"):
        gossamer.make("sparse-linear").attach(model)
    Magnitude(sparsity=0.8, structure="4x1").apply(model)
    tokens = torch.arange(6).view(1, 6)
    with torch.no_grad():
        before = model(tokens).logits
        with Recipe.of(gossamer.make("sparse-linear", int8=True)).attach(model) as handle:
            assert handle.report()["sparse_layers"] > 0
            assert (model(tokens).logits - before).abs().max() < 0.3
        assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"format": "coo"}, "format is auto"),
        ({"format": "csr", "int8": True}, "8 bits go with"),
        ({"thresholds": {"coo": 1.0}}, "no threshold"),
    ],
)
def test_bad_settings(settings, says):
    with pytest.raises(InputError, match=says):
        SparseLayers(tiny_model("llama"), **settings)
    if "thresholds" not in settings and "int8" not in settings:
        with pytest.raises(InputError, match=says):
            gossamer.make("sparse-linear", **settings)
