"""delta_linear: the native kernel, every instruction set that runs here, against a dense product in double precision."""

import math

import pytest
import torch

from gossamer import ops
from gossamer.errors import InputError
from gossamer.ops.delta_linear import delta_linear, input_major

pytestmark = pytest.mark.skipif("native" not in ops.available_backends(), reason="native kernels are not built")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
CODES = pytest.mark.parametrize("kind", [torch.int32, torch.int16], ids=["int32", "int16"])


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def case(rows, inputs, outputs, density, dtype=torch.float32, kind=torch.int32, per_channel=False):
    previous = torch.randint(-50, 50, (rows, inputs)).to(kind)
    codes = torch.where(
        torch.rand(rows, inputs) < density, previous + torch.randint(1, 9, (rows, inputs)), previous
    ).to(kind)
    weight = (torch.randn(inputs, outputs) / math.sqrt(max(1, inputs))).to(dtype)
    step = torch.rand(inputs) + 0.1 if per_channel else torch.tensor(0.25)
    return torch.randn(rows, outputs), codes, previous, weight, step


def expected(output, codes, previous, weight, step):
    return output.double() + ((codes.long() - previous.long()).double() * step.double()) @ weight.double()


def check(output, codes, previous, weight, step):
    wanted, new, differs = expected(output, codes, previous, weight, step), codes.clone(), (codes != previous).sum(1)
    counts = delta_linear(output, codes, previous, weight, step)
    assert counts.dtype is torch.int32
    assert counts.tolist() == differs.tolist()
    assert torch.equal(codes, new)
    assert torch.equal(previous, new)
    torch.testing.assert_close(output.double(), wanted, atol=1e-4, rtol=1e-5)


@DTYPES
@CODES
@pytest.mark.parametrize("rows", range(1, 9))
def test_rows_sizes_and_densities(isa, dtype, kind, rows):
    torch.manual_seed(rows)
    for inputs, outputs in ((1, 1), (7, 5), (40, 16), (33, 100), (130, 577), (64, 3001)):
        for density in (0.0, 0.1, 0.5, 1.0):
            check(*case(rows, inputs, outputs, density, dtype, kind, per_channel=density > 0.3))


@DTYPES
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_large_enough_for_two_threads(isa, threads, dtype, rows):
    torch.manual_seed(0)
    check(*case(rows, 700, 2500, 0.3, dtype))


@DTYPES
def test_views(isa, dtype):
    """Every tensor is part of a larger one; what lies between holds other values, and stays."""
    torch.manual_seed(1)
    output, codes, previous, weight, step = case(3, 20, 63, 0.5, dtype, per_channel=True)
    wide = torch.full((40, 90), math.nan, dtype=dtype)
    wide[::2, 10:73] = weight
    outs, before, now = torch.full((6, 99), math.nan), torch.full((3, 50), 77).int(), torch.full((3, 60), 88).int()
    outs[::2, 5:68], before[:, 3:23], now[:, ::3] = output, previous, codes
    check(outs[::2, 5:68], now[:, ::3], before[:, 3:23], wide[::2, 10:73], torch.stack([step, -step], 1)[:, 0])
    assert (before[:, 23:] == 77).all()
    assert outs[1::2].isnan().all()


def test_extreme_codes_do_not_overflow(isa):
    for kind in (torch.int32, torch.int16):
        low, high = torch.iinfo(kind).min, torch.iinfo(kind).max
        output, previous = torch.zeros(1, 2), torch.tensor([[low, 0]], dtype=kind)
        delta_linear(output, torch.tensor([[high, 0]], dtype=kind), previous, torch.eye(2), torch.tensor(1.0))
        assert torch.equal(output, torch.tensor([[high - low, 0]]).float())  # 2**32 - 1 is no float32


def test_an_unchanged_input_is_not_read(isa):
    output, codes, previous, weight, step = case(2, 40, 30, 0.0)
    codes[0, 3] += 1
    weight[4:] = math.nan
    weight[:3] = math.inf
    check_out = output + torch.outer(torch.tensor([1.0, 0.0]), weight[3] * step)
    delta_linear(output, codes, previous, weight, step)
    torch.testing.assert_close(output, check_out)


def test_a_long_run_stays_exact(isa):
    """Steps and weights that are sums of few powers of two: every sum is exact, so nothing drifts in 200 frames."""
    torch.manual_seed(3)
    weight = torch.randint(-8, 9, (50, 35)).float() / 8
    output, previous = torch.zeros(4, 35), torch.zeros(4, 50, dtype=torch.int16)
    for _ in range(200):
        codes = torch.where(torch.rand(4, 50) < 0.1, torch.randint(-9, 10, (4, 50)), previous).to(torch.int16)
        delta_linear(output, codes, previous, weight, torch.tensor(0.5))
    assert torch.equal(output, codes.float() * 0.5 @ weight)


def test_threads_change_nothing(isa):
    torch.manual_seed(4)
    one, *rest = case(2, 600, 3000, 0.4)
    two = one.clone()
    before = torch.get_num_threads()
    for count, output in ((1, one), (2, two)):
        torch.set_num_threads(count)
        delta_linear(output, rest[0], rest[1].clone(), *rest[2:])
    torch.set_num_threads(before)
    assert torch.equal(one, two)


def test_empty_sides(isa):
    output = torch.ones(2, 3)
    assert delta_linear(output, *(torch.zeros(2, 0).int(),) * 2, torch.ones(0, 3), torch.ones(1)).tolist() == [0, 0]
    assert output.tolist() == [[1, 1, 1]] * 2
    codes = torch.ones(2, 4).int()
    assert delta_linear(torch.ones(2, 0), codes, codes * 0, torch.ones(4, 0), torch.ones(1)).tolist() == [4, 4]


def test_half_takes_the_reference():
    args = case(2, 30, 20, 0.5, torch.float16)
    check(*args)


def test_input_major():
    weight = torch.randn(5, 3)
    assert torch.equal(input_major(weight), weight.T)
    assert input_major(weight.T).is_contiguous()
    assert input_major(weight.T).data_ptr() != weight.data_ptr()
    with pytest.raises(InputError, match="want a weight"):
        input_major(weight[0])


def test_custom_op_and_fake():
    args = case(2, 8, 3, 0.5)
    torch.library.opcheck(torch.ops.gossamer.delta_linear, args, test_utils=("test_schema", "test_faketensor"))


INT, F32 = torch.zeros(1, 3).int(), torch.ones(3, 2)


@pytest.mark.parametrize(
    ("output", "codes", "previous", "weight", "step", "says"),
    [
        (torch.ones(1, 2), INT[0], INT, F32, torch.ones(1), "want codes"),
        (torch.ones(1, 2), INT, INT, torch.ones(4, 2), torch.ones(1), "want codes"),
        (torch.ones(9, 2), INT.expand(9, 3), INT.expand(9, 3), F32, torch.ones(1), "1 to 8 rows, got 9"),
        (torch.ones(1, 3), INT, INT, F32, torch.ones(1), "output must have shape"),
        (torch.ones(1, 2), INT, INT[:, :2], F32, torch.ones(1), "previous must have shape"),
        (torch.ones(1, 2), INT.long(), INT.long(), F32, torch.ones(1), "int32 or int16"),
        (torch.ones(1, 2), INT, INT.short(), F32, torch.ones(1), "int32 or int16"),
        (torch.ones(1, 2).double(), INT, INT, F32, torch.ones(1), "must be float32"),
        (torch.ones(1, 2), INT, INT, F32, torch.ones(1).double(), "must be float32"),
        (torch.ones(1, 2), INT, INT, F32.int(), torch.ones(1), "weight of floats"),
        (torch.ones(1, 2), INT, INT, F32, torch.ones(2), "step must be"),
        (torch.ones(1, 2), INT, INT, torch.ones(2, 3).T, torch.ones(1), "inner stride 1"),
        (torch.ones(2, 2).T, INT.expand(2, 3), INT.expand(2, 3), F32, torch.ones(1), "inner stride 1"),
    ],
)
def test_bad_input(output, codes, previous, weight, step, says):
    with pytest.raises(InputError, match=says) as error:
        delta_linear(output, codes, previous, weight, step)
    assert "\n" not in str(error.value)
