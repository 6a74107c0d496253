"""key_scores: native kernels against the reference, over shapes, strides, ranges and dtypes."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer import ops
from gossamer.errors import InputError

needs_native = pytest.mark.skipif("native" not in ops.available_backends(), reason="native kernels are not built")


@needs_native
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_native_equals_the_reference(isa, data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    batch, kv_heads, group = (data.draw(st.integers(1, n)) for n in (2, 3, 6))
    dim, rows = data.draw(st.sampled_from([8, 20, 64, 80, 128])), data.draw(st.integers(0, 1400))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    reduce = data.draw(st.sampled_from(["none", "max", "sum"]))
    query = torch.randn(batch, kv_heads * group + 1, dim, dtype=dtype)[:, 1:]
    key = torch.full((batch, rows + 5, kv_heads, dim + 3), math.nan, dtype=dtype).transpose(1, 2)[:, :, :rows, :dim]
    starts = lengths = None
    if data.draw(st.booleans()):
        edges = torch.randint(0, rows + 1, (batch, 2)).sort(1).values.int()
        starts, lengths = edges[:, 0].contiguous(), edges[:, 1].contiguous()
    for b in range(batch):  # rows outside stay NaN: they must not be read
        low, high = (0, rows) if starts is None else (int(starts[b]), int(lengths[b]))
        key[b, :, low:high] = torch.randn(kv_heads, high - low, dim).to(dtype)
    with ops.use_backend("reference"):
        want = ops.key_scores(query, key, starts=starts, lengths=lengths, reduce=reduce)
    with ops.use_backend("native"):
        got = ops.key_scores(query, key, starts=starts, lengths=lengths, reduce=reduce)
    torch.testing.assert_close(got, want, atol=2e-3 if dtype is torch.bfloat16 else 1e-4, rtol=1e-4)


@needs_native
@pytest.mark.parametrize("reduce", ["none", "max", "sum"])
def test_threads_share_the_rows(reduce):
    query, key = torch.randn(1, 9, 64), torch.randn(1, 3, 9000, 64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.key_scores(query, key, reduce=reduce))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_by_hand():
    query = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    key = torch.tensor([[[[3.0, 5.0], [7.0, 1.0]]]])
    assert ops.key_scores(query, key).tolist() == [[[3.0, 7.0], [10.0, 2.0]]]
    assert ops.key_scores(query, key, reduce="max").tolist() == [[[10.0, 7.0]]]
    assert ops.key_scores(query, key, starts=torch.tensor([1]), reduce="sum").tolist() == [[[-math.inf, 9.0]]]


def test_bad_input_is_one_line():
    query, key = torch.randn(1, 2, 8), torch.randn(1, 1, 4, 8)
    with pytest.raises(InputError, match="reduce must be"):
        ops.key_scores(query, key, reduce="mean")
    with pytest.raises(InputError, match="starts and lengths"):
        ops.key_scores(query, key, lengths=torch.tensor([5]))
    with pytest.raises(InputError, match="share one float dtype"):
        ops.key_scores(query, key.bfloat16())


def test_operator_is_registered_for_tracing():
    query, key = torch.randn(1, 4, 8), torch.randn(1, 2, 5, 8)
    torch.library.opcheck(torch.ops.gossamer.key_scores.default, (query, key, None, None, "max"))
