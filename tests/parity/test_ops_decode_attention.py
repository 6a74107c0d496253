"""decode_attention: native kernels, every instruction set that runs here, against the reference."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer import ops
from gossamer.errors import InputError

pytestmark = pytest.mark.skipif("native" not in ops.available_backends(), reason="native kernels are not built")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2}


def assert_same(actual, expected, dtype):
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.float(), expected.float(), atol=tolerance, rtol=tolerance)


def both(*args, **kwargs):
    actual = ops.decode_attention(*args, **kwargs, return_lse=True)
    with ops.use_backend("reference"):
        expected = ops.decode_attention(*args, **kwargs, return_lse=True)
    return actual, expected


def case(batch, kv_heads, group, rows, dim, dtype, seed=0, padding=7):
    """A cache that is a view of a larger buffer; what lies outside the view is NaN."""
    torch.manual_seed(seed)
    query = torch.randn(batch, kv_heads * group, dim, dtype=dtype)
    key, value = (torch.full((batch, rows + padding, kv_heads, dim), math.nan, dtype=dtype) for _ in range(2))
    key, value = (x.transpose(1, 2)[:, :, :rows] for x in (key, value))
    key.normal_()
    value.normal_()
    return query, key, value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("dim", [16, 33, 64, 80, 96, 128, 256])
def test_dense_shapes(isa, dtype, group, dim):
    actual, expected = both(*case(2, 2, group, 150, dim, dtype))
    assert_same(actual[0], expected[0], dtype)
    assert_same(actual[1], expected[1], torch.float32 if dtype is torch.float32 else dtype)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_selections(isa, data):
    batch, kv_heads, group = (data.draw(st.integers(1, n)) for n in (3, 4, 5))
    rows, dim = data.draw(st.integers(1, 300)), data.draw(st.sampled_from([1, 8, 20, 48, 64, 72, 128]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    query, key, value = case(batch, kv_heads, group, rows, dim, dtype, seed=data.draw(st.integers(0, 99)))
    lengths = torch.randint(0, rows + 1, (batch,), dtype=torch.int32)
    starts = (lengths * torch.rand(batch)).int()
    for b in range(batch):  # what a range excludes must not be read
        for x in (key, value):
            x[b, :, : starts[b]] = math.nan
            x[b, :, lengths[b] :] = math.nan
    kwargs = {"starts": starts, "lengths": lengths}
    if data.draw(st.booleans()):
        heads = data.draw(st.sampled_from([kv_heads, kv_heads * group]))
        slots = data.draw(st.integers(0, 90))
        span = (lengths - starts)[:, None, None]
        indices = (starts[:, None, None] + (torch.rand(batch, heads, slots) * span).int()).int()
        counts = torch.randint(0, slots + 1, (batch, heads)).int() * (span[:, :, 0] > 0)
        indices[torch.arange(slots) >= counts[..., None]] = -7  # unused slots may hold anything
        kwargs |= {"indices": indices, "counts": counts.int()}
    threads = data.draw(st.sampled_from([1, 1, 1, 2]))
    torch.set_num_threads(threads)
    actual, expected = both(query, key, value, **kwargs)
    torch.set_num_threads(1)
    assert actual[0].isfinite().all()
    assert_same(actual[0], expected[0], dtype)
    assert_same(actual[1], expected[1], dtype)


def test_many_threads_and_pieces_agree(isa):
    query, key, value = case(1, 3, 3, 5000, 64, torch.float32)
    outs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        outs.append(ops.decode_attention(query, key, value))
        assert torch.equal(outs[-1], ops.decode_attention(query, key, value)), "same call, same bits"
    for out in outs[1:]:
        assert_same(out, outs[0], torch.float32)


def test_large_logits_do_not_overflow(isa):
    query, key, value = case(1, 1, 2, 100, 64, torch.float32)
    actual, expected = both(query * 300, key, value)
    torch.testing.assert_close(actual[0], expected[0], atol=2e-3, rtol=0)  # logits near 2500 hold three decimals


def test_negative_and_zero_scale(isa):
    query, key, value = case(1, 2, 2, 37, 16, torch.float32)
    for scale in (-0.7, 0.0):
        actual, expected = both(query, key, value, scale=scale)
        assert_same(actual[0], expected[0], torch.float32)


@pytest.mark.parametrize("bad", [-1, 40, 2**31 - 1, -(2**31)])
def test_row_ids_out_of_range_raise(isa, bad):
    query, key, value = case(1, 2, 2, 40, 32, torch.float32)
    indices = torch.zeros(1, 2, 30, dtype=torch.int32)
    indices[0, 1, 29] = bad
    for backend in ("native", "reference"):
        with ops.use_backend(backend), pytest.raises(InputError, match="row id"):
            ops.decode_attention(query, key, value, indices=indices)


def test_ids_are_held_to_the_range(isa):
    query, key, value = case(1, 2, 2, 40, 32, torch.float32)
    indices = torch.full((1, 2, 3), 20, dtype=torch.int32)
    with pytest.raises(InputError, match="row id"):
        ops.decode_attention(query, key, value, indices=indices, lengths=torch.tensor([20], dtype=torch.int32))


@pytest.mark.parametrize(
    ("starts", "lengths", "counts", "what"),
    [(-1, 4, 1, "length"), (0, 41, 1, "length"), (5, 4, 1, "length"), (0, 40, 4, "counts"), (0, 40, -1, "counts")],
)
def test_bad_ranges_and_counts_raise(isa, starts, lengths, counts, what):
    query, key, value = case(1, 1, 2, 40, 32, torch.float32)
    for backend in ("native", "reference"):
        with ops.use_backend(backend), pytest.raises(InputError, match=what):
            ops.decode_attention(
                query,
                key,
                value,
                starts=torch.tensor([starts], dtype=torch.int32),
                lengths=torch.tensor([lengths], dtype=torch.int32),
                indices=torch.full((1, 1, 3), 5, dtype=torch.int32),
                counts=torch.tensor([[counts]], dtype=torch.int32),
            )
