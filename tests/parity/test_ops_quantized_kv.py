"""quantized_decode_attention: native kernels, every instruction set that runs here, against the reference."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer import ops
from gossamer.errors import InputError
from gossamer.ops.quantized_kv import pack, row_bytes, scales_of, unpack

needs_native = pytest.mark.skipif("native" not in ops.available_backends(), reason="native kernels are not built")
# The query is held to 15 bits of its largest channel (steps folded in), weights to 16 bits of the largest of a block; a
# bfloat16 output rounds to 8 bits.
TOLERANCE = {torch.float32: 1.5e-3, torch.bfloat16: 1.6e-2}
RMS = {torch.float32: 1e-3, torch.bfloat16: 6e-3}
AXES = [("token", None), ("channel", 16), ("channel", 24), ("channel", 64), ("channel", None)]


def stored(rows, bits, axis, group, scales=torch.float32, room=5, kind=1.0):
    """Quantised random rows; what lies behind them is garbage with NaN scales."""
    batch, heads, length, dim = rows
    storage = ops.QuantizedRows.allocate(
        batch, heads, length + room, dim, bits=bits, axis=axis, group=group, scales=scales
    )
    storage.codes.random_(0, 256)
    storage.step.fill_(math.nan)
    storage.zero.fill_(math.nan)
    channels = torch.empty(dim).log_normal_(0, 0.7)  # keys have loud channels
    ops.quantize_rows(torch.randn(batch, heads, length, dim) * channels * kind + 0.3, storage, 0)
    return storage


def both(*args, **kwargs):
    actual = ops.quantized_decode_attention(*args, **kwargs, return_lse=True)
    with ops.use_backend("reference"):
        expected = ops.quantized_decode_attention(*args, **kwargs, return_lse=True)
    return actual, expected


def assert_same(actual, expected, dtype):
    for part, x, y in zip(("output", "lse"), actual, expected, strict=True):
        x, y = x.float(), y.float()
        torch.testing.assert_close(x, y, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        known = y.isfinite()
        error, size = (x - y)[known].square().sum().sqrt(), y[known].square().sum().sqrt()
        if part == "lse":  # a logarithm: its error is a factor on the sum, however near to 0 it lies itself
            size = torch.ones_like(y[known]).sum().sqrt()
        assert error <= RMS[dtype] * size + 1e-6


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dim", [16, 32, 64, 80, 96, 128, 256])
def test_dense_shapes(isa, dtype, bits, dim):
    torch.manual_seed(dim + bits)
    for group in (1, 2, 3, 4, 5, 8):
        query = torch.randn(2, 2 * group, dim).to(dtype)
        key = stored((2, 2, 150, dim), bits, "channel", 64)
        value = stored((2, 2, 150, dim), bits, "token", None)
        lengths = torch.tensor([150, 100], dtype=torch.int32)
        assert_same(*both(query, key, value, split=150, lengths=lengths), dtype)


@needs_native
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_cases(isa, data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    batch, kv_heads, group = (data.draw(st.integers(1, n)) for n in (3, 3, 5))
    rows, near = data.draw(st.integers(1, 300)), data.draw(st.integers(0, 40))
    dim = data.draw(st.sampled_from([16, 32, 48, 64, 80, 128]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    scales = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    query = torch.randn(batch, kv_heads * group, dim).to(dtype)
    key, value = (
        stored(
            (batch, kv_heads, rows, dim),
            data.draw(st.sampled_from([2, 4, 8])),
            *data.draw(st.sampled_from(AXES)),
            scales,
        )
        for _ in range(2)
    )
    total = rows + near
    recent = None
    if near:
        recent = tuple(
            torch.full((batch, near + 3, kv_heads, dim), math.nan).to(dtype).transpose(1, 2) for _ in range(2)
        )
        recent = tuple(x[:, :, :near].normal_() for x in recent)
    lengths = torch.randint(0, total + 1, (batch,), dtype=torch.int32)
    starts = (lengths * torch.rand(batch)).int()
    how = {"starts": starts, "lengths": lengths, "split": rows, "recent": recent}
    if data.draw(st.booleans()):
        heads = data.draw(st.sampled_from([kv_heads, kv_heads * group]))
        slots = data.draw(st.integers(0, 90))
        width = (lengths - starts)[:, None, None].clamp_min(1)
        how["indices"] = (starts[:, None, None] + (torch.rand(batch, heads, slots) * width).int()).int()
        if data.draw(st.booleans()):
            how["indices"] = how["indices"].sort(-1).values
        how["counts"] = torch.randint(0, slots + 1, (batch, heads), dtype=torch.int32)
        how["counts"][lengths == starts] = 0
    assert_same(*both(query, key, value, **how), dtype)


@needs_native
def test_threads_agree(isa):
    torch.manual_seed(0)
    query = torch.randn(2, 6, 64)
    key, value = stored((2, 2, 3000, 64), 4, "channel", 128), stored((2, 2, 3000, 64), 4, "token", None)
    alone = ops.quantized_decode_attention(query, key, value, split=3000)
    torch.set_num_threads(3)
    torch.testing.assert_close(
        ops.quantized_decode_attention(query, key, value, split=3000), alone, atol=1e-4, rtol=1e-4
    )


@needs_native
def test_nothing_to_attend_and_a_spike(isa):
    torch.manual_seed(0)
    query = torch.randn(1, 2, 64)
    key, value = stored((1, 2, 400, 64), 8, "token", None), stored((1, 2, 400, 64), 8, "token", None)
    none = torch.zeros(1, dtype=torch.int32)
    out, lse = ops.quantized_decode_attention(query, key, value, lengths=none, return_lse=True)
    assert bool((out == 0).all())
    assert bool((lse == -math.inf).all())
    empty = torch.zeros(1, 2, 0, dtype=torch.int32)
    assert bool((ops.quantized_decode_attention(query, key, value, indices=empty) == 0).all())
    # One row far above many others: what its block loses to the coarser weights stays small. (A longer query scales the
    # error of its 15 bits too.)
    (out, lse), (expected, total) = both(query * 8, key, value, split=400)
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(lse, total, atol=2e-2, rtol=1e-3)


@needs_native
def test_a_nan_is_not_hidden(isa):
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, 1, 32),
        stored((1, 1, 40, 32), 4, "token", None),
        stored((1, 1, 40, 32), 4, "token", None),
    )
    value.zero[0, 0, 7] = math.nan
    assert bool(ops.quantized_decode_attention(query, key, value, split=40).isnan().all())


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("axis", "group"), AXES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantisation_error_is_half_a_step(bits, axis, group, scales):
    torch.manual_seed(1)
    rows = torch.randn(2, 3, 77, 32) * 3 + 1
    storage = ops.QuantizedRows.allocate(2, 3, 77, 32, bits=bits, axis=axis, group=group, scales=scales)
    ops.quantize_rows(rows, storage, 0)
    step = storage.step.float()
    bound = step[..., None] if axis == "token" else step.repeat_interleave(storage.group, 2)[:, :, :77]
    error = (ops.dequantize_rows(storage, 0, 77) - rows).abs()
    assert bool((error <= bound / 2 * (1 + 1e-3) + 1e-6).all())
    # Steps are the range over the levels; bfloat16 widens them by at most what its eight bits cannot say.
    exact = (scales_of(rows, 3, bits, torch.float32)[0].squeeze(3), step)[:2] if axis == "token" else None
    if exact is not None:
        assert bool((exact[1] >= exact[0] * (1 - 1e-6)).all())
        assert bool((exact[1] <= exact[0] * 1.02 + rows.abs().amax(3) * 2**-7 / (2**bits - 1)).all())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_is_exact(bits):
    codes = torch.randint(0, 1 << bits, (3, 5, 64), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 5, 8 * bits)
    assert torch.equal(unpack(packed, bits), codes)


def test_constant_rows_are_exact():
    rows = torch.full((1, 1, 4, 16), 2.5)
    for axis in ("token", "channel"):
        storage = ops.QuantizedRows.allocate(1, 1, 4, 16, bits=2, axis=axis)
        ops.quantize_rows(rows, storage, 0)
        assert torch.equal(ops.dequantize_rows(storage, 0, 4), rows)


def test_groups_are_written_in_turn():
    torch.manual_seed(0)
    rows = torch.randn(1, 2, 20, 16)
    at_once, in_turn = (ops.QuantizedRows.allocate(1, 2, 24, 16, bits=4, axis="channel", group=8) for _ in range(2))
    ops.quantize_rows(rows, at_once, 0)
    for first in (0, 8, 16):
        ops.quantize_rows(rows[:, :, first : first + 8], in_turn, first)
    assert torch.equal(ops.dequantize_rows(at_once, 0, 20), ops.dequantize_rows(in_turn, 0, 20))
    grown = in_turn.grow(64, 20)
    assert grown.capacity == 64
    assert torch.equal(ops.dequantize_rows(grown, 3, 20), ops.dequantize_rows(in_turn, 3, 20))
    assert row_bytes(in_turn, 20) == 20 * 8 + 3 * 16 * 8
    assert in_turn.nbytes(20) == 2 * row_bytes(in_turn, 20)


def test_bad_arguments_are_one_line():
    make = ops.QuantizedRows.allocate
    storage = make(1, 2, 32, 16, bits=4, axis="channel", group=8)
    value = make(1, 2, 32, 16, bits=4)
    query, rows = torch.randn(1, 4, 16), torch.randn(1, 2, 8, 16)
    near = torch.randn(1, 2, 4, 16)
    attend = ops.quantized_decode_attention
    wrong = [
        lambda: make(1, 2, 32, 16, bits=3),
        lambda: make(1, 2, 32, 20, bits=4),
        lambda: make(1, 2, 32, 16, bits=4, group=8),
        lambda: make(1, 2, 32, 16, bits=4, axis="channel", group=0),
        lambda: make(1, 2, 32, 16, bits=4, axis="row"),
        lambda: make(1, 2, 32, 16, bits=4, scales=torch.float16),
        lambda: ops.quantize_rows(rows, storage, 4),
        lambda: ops.quantize_rows(rows, storage, 32),
        lambda: ops.quantize_rows(rows[:, :1], storage, 0),
        lambda: ops.quantize_rows(rows.int(), storage, 0),
        lambda: ops.dequantize_rows(storage, 3, 40),
        lambda: attend(query[:, :3], storage, value),
        lambda: attend(query, storage, make(1, 2, 24, 16, bits=4)),
        lambda: attend(query, storage, make(1, 2, 32, 16, bits=4, scales=torch.bfloat16)),
        lambda: attend(query, storage, value, split=33),
        lambda: attend(query, storage, value, recent=(near, near[:, :, :3]), split=8),
        lambda: attend(query, storage, value, recent=(near.double(), near.double()), split=8),
        lambda: attend(query, storage, value, counts=torch.ones(1, 2, dtype=torch.int32)),
        lambda: attend(query, storage, value, lengths=torch.tensor([33], dtype=torch.int32)),
        lambda: attend(query, storage, value, indices=torch.full((1, 2, 1), 40, dtype=torch.int32)),
    ]
    for call in wrong:
        with pytest.raises(InputError) as error:
            call()
        assert "\n" not in str(error.value)


def test_compiles_and_has_a_fake():
    torch.manual_seed(0)
    query, near = torch.randn(1, 2, 32), torch.randn(1, 1, 3, 32)
    key, value = stored((1, 1, 32, 32), 4, "channel", 8, room=0), stored((1, 1, 32, 32), 4, "token", None, room=0)
    args = (
        query,
        *key.tensors(),
        *value.tensors(),
        near,
        near,
        [4, 1, 8, 4, 0, 1, 32],
        None,
        None,
        None,
        None,
        0.2,
        True,
    )
    torch.library.opcheck(
        torch.ops.gossamer.quantized_decode_attention, args, test_utils=("test_schema", "test_faketensor")
    )
    empty = ops.QuantizedRows.allocate(1, 1, 8, 32, bits=4)
    torch.library.opcheck(
        torch.ops.gossamer.quantize_rows,
        (near, *empty.tensors(), 4, "token", 1, 0),
        test_utils=("test_schema", "test_faketensor"),
    )
