"""channel_sparse_linear: the native kernel, every instruction set that runs here, against a masked product in double
precision."""

import math

import pytest
import torch

from gossamer import ops
from gossamer.errors import InputError
from gossamer.ops import channel_sparse_linear

pytestmark = pytest.mark.skipif("native" not in ops.available_backends(), reason="native kernels are not built")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def case(rows, inputs, outputs, dtype=torch.float32, int8=False):
    """x, weight and scale."""
    x = torch.randn(rows, inputs).to(dtype)
    if int8:
        return x, torch.randint(-127, 128, (inputs, outputs), dtype=torch.int8), torch.rand(inputs) / 100
    return x, (torch.randn(inputs, outputs) / math.sqrt(max(1, inputs))).to(dtype), None


def check(x, weight, threshold=None, bias=None, scale=None):
    kept = ~(x.float().abs() <= (0.0 if threshold is None else threshold))
    matrix = weight.double() if scale is None else weight.double() * scale.double()[:, None]
    wanted = torch.where(kept, x.double(), 0.0) @ matrix + (0.0 if bias is None else bias.double())
    counts = torch.full((len(x) + 1,), -1)
    out = channel_sparse_linear(x, weight, threshold, bias, scale=scale, counts=counts)
    assert out.dtype is x.dtype
    assert out.is_contiguous()
    assert counts.tolist() == [*kept.sum(1).tolist(), int(kept.any(0).sum())]
    tolerance = 2e-5 if x.dtype is torch.float32 else 1e-2
    torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance)
    assert torch.equal(channel_sparse_linear(x, weight, threshold, bias, scale=scale), out)


@DTYPES
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("rows", range(1, 9))
def test_rows_sizes_and_densities(isa, dtype, int8, rows):
    torch.manual_seed(rows)
    for inputs, outputs in ((1, 1), (7, 5), (33, 100), (130, 577), (64, 3001)):
        x, weight, scale = case(rows, inputs, outputs, dtype, int8)
        bias = torch.randn(outputs, dtype=dtype)
        check(x, weight, None, None, scale)
        check(x, weight, torch.tensor(0.7), bias, scale)
        check(x, weight, torch.rand(inputs) * 3, bias, scale)
        check(x, weight, torch.tensor(9.0), bias, scale)  # nothing is kept


@DTYPES
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_large_enough_for_two_threads(isa, threads, dtype, rows):
    torch.manual_seed(0)
    x, weight, _ = case(rows, 700, 2500, dtype)
    check(x, weight, torch.tensor(1.0), torch.randn(2500, dtype=dtype))


@DTYPES
def test_views(isa, dtype):
    """Every tensor is part of a larger one; what lies between is NaN."""
    torch.manual_seed(1)
    x, weight, _ = case(3, 20, 63, dtype)
    wide, apart = torch.full((40, 90), math.nan, dtype=dtype), torch.full((6, 50), math.nan, dtype=dtype)
    wide[::2, 10:73], apart[::2, 3:23] = weight, x
    pairs, bias = torch.rand(20, 2), torch.randn(63, 2).to(dtype)
    check(apart[::2, 3:23], wide[::2, 10:73], pairs[:, 1], bias[:, 0])
    scattered = torch.full((3, 60), math.nan, dtype=dtype)
    scattered[:, ::3] = x
    check(scattered[:, ::3], wide[::2, 10:73], pairs[:, 1], bias[:, 0], torch.rand(20, 2)[:, 0])


def test_what_is_not_kept_is_not_read(isa):
    x, weight = torch.tensor([[2.0, 0.0, 0.5, -3.0]]), torch.full((4, 40), math.nan)
    weight[0], weight[3] = 1.0, 2.0
    assert channel_sparse_linear(x, weight, torch.tensor(1.0)).tolist() == [[-4.0] * 40]


def test_rows_keep_their_own_channels(isa):
    x = torch.tensor([[2.0, 0.5], [0.5, 2.0]])
    assert channel_sparse_linear(x, torch.eye(2), torch.tensor(1.0)).tolist() == [[2.0, 0.0], [0.0, 2.0]]


def test_not_a_number_is_kept(isa):
    x = torch.tensor([[math.nan, 1.0, 0.0], [0.0, 1.0, 0.0]])
    counts = torch.zeros(3, dtype=torch.int64)
    out = channel_sparse_linear(x, torch.ones(3, 20), torch.full((3,), 0.5), counts=counts)
    assert out[0].isnan().all()
    assert counts.tolist() == [2, 1, 2]
    check(torch.ones(2, 3), torch.ones(3, 20), torch.tensor([math.nan, 0.5, math.inf]))


def test_threads_change_nothing(isa):
    torch.manual_seed(4)
    x, weight, _ = case(2, 600, 3000)
    before, outs = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        outs.append(channel_sparse_linear(x, weight, torch.tensor(0.5)))
    torch.set_num_threads(before)
    assert torch.equal(*outs)


def test_empty_sides(isa):
    assert channel_sparse_linear(torch.ones(2, 0), torch.ones(0, 3), None, torch.ones(3)).tolist() == [[1, 1, 1]] * 2
    assert channel_sparse_linear(torch.ones(2, 4), torch.ones(4, 0)).shape == (2, 0)


def test_gradients_take_the_reference():
    x, weight = torch.randn(2, 8, requires_grad=True), torch.randn(8, 3)
    channel_sparse_linear(x, weight, torch.tensor(0.3)).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(1) * (x.detach().abs() > 0.3))


def test_half_takes_the_reference():
    x, weight = torch.randn(2, 8).half(), torch.randn(8, 3).half()
    torch.testing.assert_close(channel_sparse_linear(x, weight), (x.float() @ weight.float()).half())


def test_custom_op_and_fake():
    x, weight, scale = case(2, 8, 3, int8=True)
    args = (x, weight, torch.tensor(0.5), torch.ones(3), scale, torch.zeros(3, dtype=torch.int64))
    op = torch.ops.gossamer.channel_sparse_linear
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


X, W, LONG = torch.ones(1, 3), torch.ones(3, 2), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("x", "weight", "more", "says"),
    [
        (X[0], W, {}, "want x"),
        (X, torch.ones(4, 2), {}, "want x"),
        (X.expand(9, 3), W, {}, "1 to 8 rows, got 9"),
        (X[:0], W, {}, "1 to 8 rows, got 0"),
        (X.int(), W.int(), {}, "takes floats"),
        (X, W.bfloat16(), {}, "weight is torch.bfloat16"),
        (X, W.to(torch.int8), {}, "int8 weights need a scale"),
        (X, torch.ones(2, 3).T, {}, "inner stride 1"),
        (X, W, {"threshold": torch.ones(2)}, "threshold must have shape"),
        (X, W, {"threshold": torch.ones(3).double()}, "threshold must be torch.float32"),
        (X, W, {"bias": torch.ones(3)}, "bias must have shape"),
        (X, W, {"bias": torch.ones(2).half()}, "bias must be torch.float32"),
        (X, W, {"scale": torch.ones(2)}, "scale must have shape"),
        (X, W, {"scale": torch.tensor(1.0)}, "scale must have shape"),
        (X, W, {"scale": torch.ones(3).half()}, "scale must be torch.float32"),
        (X, W, {"counts": LONG[:1]}, "counts must have shape"),
        (X, W, {"counts": LONG.int()}, "counts must be torch.int64"),
    ],
)
def test_bad_input(x, weight, more, says):
    with pytest.raises(InputError, match=says) as error:
        channel_sparse_linear(x, weight, **more)
    assert "\n" not in str(error.value)
