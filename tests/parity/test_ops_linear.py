"""linear: the native kernel, every instruction set that runs here, against torch's."""

import math

import pytest
import torch
import torch.nn.functional as F

from gossamer import ops
from gossamer.errors import InputError

pytestmark = pytest.mark.skipif("native" not in ops.available_backends(), reason="native kernels are not built")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def expected(x, weight, bias=None):
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


def assert_close(actual, wanted, dtype):
    assert actual.dtype is dtype
    assert actual.is_contiguous()
    tolerance = 2e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(actual.double(), wanted, atol=tolerance, rtol=tolerance)


@DTYPES
@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 16, 33, 64, 100, 576, 2049, 4100])
def test_rows_and_odd_sizes(isa, dtype, rows, columns):
    torch.manual_seed(rows * columns)
    for outputs in (1, 5, 16, 37):
        x = torch.randn(rows, columns, dtype=dtype)
        weight = (torch.randn(outputs, columns) / math.sqrt(columns)).to(dtype)
        bias = torch.randn(outputs, dtype=dtype)
        assert_close(ops.linear(x, weight), expected(x, weight), dtype)
        assert_close(ops.linear(x, weight, bias), expected(x, weight, bias), dtype)


@DTYPES
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_many_outputs_are_all_written(isa, dtype, rows):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 576, dtype=dtype), (torch.randn(3001, 576) / 24).to(dtype)
    assert_close(ops.linear(x, weight), expected(x, weight), dtype)


@DTYPES
def test_views(isa, dtype):
    """Slices of rows and columns of a larger weight, and rows of x apart; what lies between is NaN."""
    torch.manual_seed(1)
    big = torch.full((40, 90), math.nan, dtype=dtype)
    weight = big[::2, 10:73]
    weight.copy_(torch.randn(20, 63) / 8)
    wide = torch.full((3, 200), math.nan, dtype=dtype)
    x = wide[:, 50:113]
    x.copy_(torch.randn(3, 63))
    assert_close(ops.linear(x, weight), expected(x, weight), dtype)
    assert_close(ops.linear(x[:, ::3], weight[:, ::3]), expected(x[:, ::3], weight[:, ::3]), dtype)
    bias = torch.randn(40, dtype=dtype)[::2]
    assert_close(ops.linear(x, weight, bias), expected(x, weight, bias), dtype)


@DTYPES
def test_not_a_number_stays_in_its_output(isa, dtype):
    x, weight = torch.ones(2, 50, dtype=dtype), torch.ones(9, 50, dtype=dtype)
    weight[4, 49] = math.nan
    weight[5, 3] = math.inf
    out = ops.linear(x, weight)
    assert out[:, 4].isnan().all()
    assert (out[:, 5] == math.inf).all()
    assert (out[:, [0, 1, 2, 3, 6, 7, 8]] == 50).all()


def test_empty_inner_dimension(isa):
    assert ops.linear(torch.ones(2, 0), torch.ones(3, 0), torch.tensor([1.0, 2.0, 3.0])).tolist() == [[1, 2, 3]] * 2
    assert ops.linear(torch.ones(2, 4), torch.ones(0, 4)).shape == (2, 0)


def test_gradients_take_the_reference():
    x, weight = torch.randn(2, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    ops.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(2, -1))


def test_half_takes_the_reference():
    x, weight = torch.randn(2, 8).half(), torch.randn(3, 8).half()
    assert torch.equal(ops.linear(x, weight), F.linear(x, weight))


def test_custom_op_and_fake():
    x, weight, bias = torch.randn(2, 8), torch.randn(3, 8), torch.randn(3)
    torch.library.opcheck(torch.ops.gossamer.linear, (x, weight, bias), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("x", "weight", "bias", "says"),
    [
        (torch.ones(3), torch.ones(2, 3), None, "want x"),
        (torch.ones(1, 4), torch.ones(2, 3), None, "want x"),
        (torch.ones(9, 3), torch.ones(2, 3), None, "1 to 8 rows, got 9"),
        (torch.ones(0, 3), torch.ones(2, 3), None, "1 to 8 rows, got 0"),
        (torch.ones(1, 3), torch.ones(2, 3), torch.ones(3), "bias must have shape"),
        (torch.ones(1, 3), torch.ones(2, 3).bfloat16(), None, "weight is torch.bfloat16"),
        (torch.ones(1, 3), torch.ones(2, 3), torch.ones(2).half(), "bias is torch.float16"),
        (torch.ones(1, 3).int(), torch.ones(2, 3).int(), None, "takes floats"),
    ],
)
def test_bad_input(x, weight, bias, says):
    with pytest.raises(InputError, match=says) as error:
        ops.linear(x, weight, bias)
    assert "\n" not in str(error.value)
