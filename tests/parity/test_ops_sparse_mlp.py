"""sparse_mlp: the native kernel, every instruction set that runs here, against the reference."""

import math

import pytest
import torch

from gossamer import ops
from gossamer.errors import InputError
from gossamer.ops import NeuronWeights, sparse_mlp, use_backend
from gossamer.ops.sparse_mlp import ACTIVATIONS

pytestmark = pytest.mark.skipif("native" not in ops.available_backends(), reason="native kernels are not built")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
KINDS = pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int8-bfloat16"])


@pytest.fixture(params=[1, 2])
def threads(request):
    torch.set_num_threads(request.param)


def weights_of(neurons, channels, dtype, activation="silu", biases=False, seed=0, apart=0):
    generator = torch.Generator().manual_seed(seed)

    def matrix():
        whole = torch.full((neurons, channels + apart), math.nan, dtype=dtype)
        whole[:, :channels] = torch.randn(neurons, channels, generator=generator) / math.sqrt(channels)
        return whole[:, :channels]

    extra = {}
    if biases:
        sizes = {"gate_bias": neurons, "up_bias": neurons, "down_bias": channels}
        extra = {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}
    return NeuronWeights(matrix(), matrix(), matrix(), **extra, activation=activation)


def made(kind, *args, **kwargs):
    """(dtype of x, weights) of a kind."""
    dtype = torch.bfloat16 if kind.endswith("bfloat16") else torch.float32
    weights = weights_of(*args, dtype, **kwargs)
    return dtype, weights.quantized() if kind.startswith("int8") else weights


def both(x, weights, **rule):
    results = []
    for backend in ("reference", "native"):
        counts = torch.full((len(x) + 1,), -1)
        with use_backend(backend):
            results.append((sparse_mlp(x, weights, **rule, counts=counts), counts))
    return results


def assert_same(x, weights, **rule):
    (wanted, wanted_counts), (got, counts) = both(x, weights, **rule)
    assert got.dtype is x.dtype
    tolerance = 2e-5 if x.dtype is torch.float32 else 1e-2
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)
    assert counts.tolist() == wanted_counts.tolist()


def rules(weights, x):
    """Rules of every form whose choice does not hang on rounding."""
    with use_backend("reference"):
        scale = 1.0 if weights.gate_scale is None else weights.gate_scale[:, None]
        gate = x.float() @ (weights.gate.float() * scale).T
        gate = gate if weights.gate_bias is None else gate + weights.gate_bias.float()
        gate = ACTIVATIONS[weights.activation](gate).abs()
    values = torch.cat([torch.zeros(1), gate.flatten().sort().values])
    middle = (len(values) - 1) // 2
    cut = middle + int(values[middle : middle + len(values) // 4 + 2].diff().argmax())
    threshold = values[cut : cut + 2].mean()
    return [{"threshold": threshold}, {"indices": torch.arange(0, weights.neurons, 3, dtype=torch.int32)}]


@KINDS
@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize(("neurons", "channels"), [(1, 1), (5, 7), (64, 32), (37, 100), (200, 96), (129, 320)])
def test_rows_and_odd_sizes(isa, kind, rows, neurons, channels):
    dtype, weights = made(kind, neurons, channels, seed=rows * neurons)
    x = torch.randn(rows, channels, generator=torch.Generator().manual_seed(rows)).to(dtype)
    for rule in rules(weights, x):
        assert_same(x, weights, **rule)


@DTYPES
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("rows", [1, 3])
def test_activations_and_biases(isa, threads, dtype, activation, rows):
    weights = weights_of(150, 64, dtype, activation, biases=True, apart=8)
    x = 4 * torch.randn(rows, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    for rule in rules(weights, x):
        assert_same(x, weights, **rule)
    assert_same(x, weights.quantized(), indices=torch.arange(150, dtype=torch.int32))


@DTYPES
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_counts_of_the_largest(isa, threads, dtype, rows):
    weights = weights_of(300, 48, dtype, seed=4)
    x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(5)).to(dtype)
    for count in (0, 1, 10, 299, 300, 1000):
        assert_same(x, weights, count=count)


def test_a_threshold_for_each_neuron(isa, threads):
    weights = weights_of(260, 64, torch.float32)
    x = torch.randn(4, 64)
    keep = torch.arange(260) % 3 == 0
    threshold = torch.where(keep, 0.0, torch.inf)
    assert_same(x, weights, threshold=threshold)
    with use_backend("native"):
        by_index = sparse_mlp(x, weights, indices=keep.nonzero()[:, 0].int())
        torch.testing.assert_close(sparse_mlp(x, weights, threshold=threshold), by_index)


def test_nothing_and_everything(isa, threads):
    weights = weights_of(70, 40, torch.float32, biases=True)
    x = torch.randn(2, 40)
    with use_backend("native"):
        counts = torch.zeros(3, dtype=torch.int64)
        empty = sparse_mlp(x, weights, threshold=torch.tensor(torch.inf), counts=counts)
        assert torch.equal(empty, weights.down_bias.expand(2, -1))
        assert counts.tolist() == [0, 0, 0]
        assert torch.equal(sparse_mlp(x, weights, indices=torch.zeros(0, dtype=torch.int32)), empty)
        full = sparse_mlp(x, weights, threshold=torch.tensor(-0.0), counts=counts)
        dense = torch.nn.functional.silu(x @ weights.gate.T + weights.gate_bias) * (x @ weights.up.T + weights.up_bias)
        torch.testing.assert_close(full, dense @ weights.down + weights.down_bias, atol=1e-5, rtol=1e-5)


def test_ties_keep_the_lower_index(isa):
    eye = torch.eye(6)
    weights = NeuronWeights(torch.ones(6, 6), torch.ones(6, 6), eye)
    with use_backend("native"):
        out = sparse_mlp(torch.ones(1, 6), weights, count=2)
    assert (out != 0).tolist() == [[True, True, False, False, False, False]]


def test_what_is_dropped_is_not_read(isa):
    weights = weights_of(64, 32, torch.float32)
    x = torch.randn(1, 32)
    kept = torch.arange(0, 64, 2, dtype=torch.int32)
    with use_backend("native"):
        wanted = sparse_mlp(x, weights, indices=kept)
        for matrix in (weights.gate, weights.up, weights.down):
            matrix[1::2] = math.nan
        assert torch.equal(sparse_mlp(x, weights, indices=kept), wanted)


@pytest.mark.parametrize("rule", [{"threshold": torch.tensor(0.5)}, {"count": 3}])
def test_nan_is_seen(isa, rule):
    weights = weights_of(64, 32, torch.float32)
    x = torch.randn(2, 32)
    x[1, 3] = math.nan
    with use_backend("native"):
        out = sparse_mlp(x, weights, **rule)
    assert out[1].isnan().all()
    assert out[0].isfinite().all()


def test_bad_input_is_refused():
    weights = weights_of(8, 4, torch.float32)
    x = torch.zeros(1, 4)
    one = {"threshold": torch.tensor(0.0)}
    for bad in (
        lambda: sparse_mlp(torch.zeros(1, 5), weights, **one),
        lambda: sparse_mlp(torch.zeros(9, 4), weights, **one),
        lambda: sparse_mlp(torch.zeros(0, 4), weights, **one),
        lambda: sparse_mlp(x.double(), weights, **one),
        lambda: sparse_mlp(x, weights),
        lambda: sparse_mlp(x, weights, count=1, **one),
        lambda: sparse_mlp(x, weights, threshold=torch.zeros(7)),
        lambda: sparse_mlp(x, weights, threshold=torch.zeros(8).double()),
        lambda: sparse_mlp(x, weights, indices=torch.arange(3)),
        lambda: sparse_mlp(x, weights, **one, counts=torch.zeros(2)),
        lambda: sparse_mlp(x, NeuronWeights(*[weights.gate] * 3, torch.zeros(8).bfloat16()), **one),
        lambda: sparse_mlp(x, weights, **one, counts=torch.zeros(1, dtype=torch.int64)),
        lambda: NeuronWeights(weights.gate, weights.up, weights.down[:, :3]),
        lambda: NeuronWeights(weights.gate, weights.up, weights.down, activation="tanh"),
        lambda: NeuronWeights(weights.gate, weights.up, weights.down, gate_scale=torch.ones(8)),
        lambda: NeuronWeights(weights.gate, weights.up, weights.down, down_bias=torch.ones(8)),
    ):
        with pytest.raises(InputError, match="sparse_mlp"):
            bad()
    with use_backend("native"), pytest.raises(InputError, match="ascend"):
        sparse_mlp(x, weights, indices=torch.tensor([1, 8], dtype=torch.int32))


def test_strided_rules_are_read_as_they_are():
    weights, x = weights_of(8, 4, torch.float32), torch.randn(1, 4)
    wide, pairs = torch.tensor([0.0, 9.0] * 8), torch.tensor([0, 7, 2, 7, 5, 7], dtype=torch.int32)
    assert_same(x, weights, threshold=wide[::2])
    assert_same(x, weights, indices=pairs[::2])


def test_gradients_take_the_reference():
    weights = weights_of(8, 4, torch.float32)
    x = torch.randn(1, 4, requires_grad=True)
    sparse_mlp(x, weights, threshold=torch.tensor(0.0)).sum().backward()
    assert x.grad is not None


def test_compiles_and_passes_the_operator_check():
    weights = weights_of(16, 8, torch.float32)
    parts = [getattr(weights, name + part) for name in ("gate", "up", "down") for part in ("", "_bias", "_scale")]
    counts, threshold = torch.zeros(2, dtype=torch.int64), torch.tensor(0.1)
    x = torch.randn(1, 8)
    torch.library.opcheck(torch.ops.gossamer.sparse_mlp, (x, *parts, "silu", threshold, None, None, counts))
    call = torch.compile(lambda x: sparse_mlp(x, weights, threshold) + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(call(x), sparse_mlp(x, weights, threshold) + 1)
