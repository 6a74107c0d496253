"""attention_columns, attention_row and decode_attention_with_row: native kernels, every instruction set that runs here,
against the reference."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer import ops
from gossamer.errors import InputError
from gossamer.ops.attention_row import attention_row, decode_attention_with_row
from gossamer.ops.attention_statistics import attention_columns

pytestmark = pytest.mark.skipif("native" not in ops.available_backends(), reason="native kernels are not built")
DTYPES = [torch.float32, torch.bfloat16]


def both(op, *args, **kwargs):
    got = op(*args, **kwargs)
    with ops.use_backend("reference"):
        want = op(*args, **kwargs)
    return got, want


def close(got, want):
    """Sums are float32 in both; bfloat16 products are exact in float32."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def case(batch, kv_heads, group, new, rows, dim, dtype, seed=0, padding=5):
    """A query with odd strides and a cache that is a view of a larger buffer; what lies outside the views is NaN."""
    torch.manual_seed(seed)
    query = torch.full((batch, new, kv_heads * group, dim + 3), math.nan, dtype=dtype).transpose(1, 2)[..., 1 : dim + 1]
    key, value = (torch.full((batch, rows + padding, kv_heads, dim), math.nan, dtype=dtype) for _ in range(2))
    key, value = (x.transpose(1, 2)[:, :, :rows] for x in (key, value))
    for x in (query, key, value):
        x.normal_()
    return query, key, value


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("group", [1, 2, 3, 5])
@pytest.mark.parametrize("dim", [1, 16, 33, 64, 80, 128])
def test_columns_of_a_prompt(isa, dtype, group, dim):
    query, key, _ = case(2, 2, group, 131, 131, dim, dtype)
    close(*both(attention_columns, query, key))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_columns_of_anything(isa, data):
    batch, kv_heads, group = (data.draw(st.integers(1, n)) for n in (3, 3, 4))
    rows, dim = data.draw(st.integers(1, 300)), data.draw(st.sampled_from([3, 20, 32]))
    new = data.draw(st.integers(1, rows))
    dtype = data.draw(st.sampled_from(DTYPES))
    query, key, _ = case(batch, kv_heads, group, new, rows, dim, dtype, seed=data.draw(st.integers(0, 99)))
    kwargs = {"scale": data.draw(st.sampled_from([None, 0.3, 2.0, -0.7, 0.0]))}
    kwargs["causal"] = data.draw(st.booleans())
    if kwargs["causal"] and data.draw(st.booleans()):
        kwargs["window"] = data.draw(st.integers(1, rows + 3))
    if data.draw(st.booleans()):
        kwargs["positions"] = torch.randint(0, rows, (new,))
    if data.draw(st.booleans()):
        kwargs["row_weights"] = torch.rand(data.draw(st.sampled_from([(new,), (batch, new)])))
        kwargs["row_weights"][torch.rand(kwargs["row_weights"].shape) < 0.4] = 0.0
    if data.draw(st.booleans()):
        kwargs["starts"] = torch.randint(0, rows, (batch,), dtype=torch.int32)
        for b in range(batch):
            key[b, :, : kwargs["starts"][b]] = math.nan
    torch.set_num_threads(data.draw(st.sampled_from([1, 1, 2])))
    got, want = both(attention_columns, query, key, **kwargs)
    torch.set_num_threads(1)
    close(got, want)
    assert torch.equal(got == 0, want == 0) or kwargs["scale"] == 2.0, "nothing received is exactly 0"


def test_columns_do_not_depend_on_the_threads(isa):
    query, key, _ = case(1, 2, 3, 700, 700, 16, torch.float32)
    outs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        outs.append(attention_columns(query, key))
        assert torch.equal(outs[-1], attention_columns(query, key)), "same call, same bits"
    for out in outs[1:]:
        close(out, outs[0])


def test_peaked_rows_stay_finite(isa):
    query, key, _ = case(1, 1, 2, 300, 300, 32, torch.float32)
    got, want = both(attention_columns, query * 300, key)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=3e-3)
    torch.testing.assert_close(got.sum(), torch.tensor(600.0))


def test_rows_of_weight_zero_are_not_computed(isa):
    query, key, _ = case(2, 2, 2, 100, 100, 16, torch.float32)
    weights = torch.rand(2, 100)
    weights[0, ::3] = weights[1, 50:] = 0
    clean = attention_columns(query, key, row_weights=weights)
    query.masked_fill_((weights == 0)[:, None, :, None], math.nan)
    assert torch.equal(attention_columns(query, key, row_weights=weights), clean)
    assert not attention_columns(query, key, row_weights=torch.zeros(100)).any()


def test_no_rows_give_zeros(isa):
    query, key, _ = case(1, 2, 2, 0, 10, 8, torch.float32)
    assert torch.equal(attention_columns(query, key), torch.zeros(1, 2, 10))


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("dim", [1, 33, 64, 80, 128, 256])
def test_rows_of_one_query(isa, dtype, group, dim):
    query, key, value = case(2, 2, group, 1, 600, dim, dtype)
    close(*both(attention_row, query[:, :, 0], key))
    check_both(query[:, :, 0], key, value, {})


def check_both(query, key, value, kwargs):
    (out, row), (want_out, want_row) = both(decode_attention_with_row, query, key, value, **kwargs)
    close(row, want_row)
    tolerance = 2e-5 if out.dtype is torch.float32 else 1.6e-2
    torch.testing.assert_close(out, want_out, rtol=tolerance, atol=tolerance)
    assert out.dtype is query.dtype


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_rows_of_anything(isa, data):
    batch, kv_heads, group = (data.draw(st.integers(1, n)) for n in (3, 3, 6))
    rows, dim = data.draw(st.integers(1, 900)), data.draw(st.sampled_from([3, 20, 32]))
    dtype = data.draw(st.sampled_from(DTYPES))
    query, key, value = case(batch, kv_heads, group, 1, rows, dim, dtype, seed=data.draw(st.integers(0, 99)))
    query = query[:, :, 0]
    kwargs = {"scale": data.draw(st.sampled_from([None, 0.3, -0.7, 0.0]))}
    if data.draw(st.booleans()):
        kwargs["window"] = data.draw(st.integers(1, rows + 3))
    if data.draw(st.booleans()):
        kwargs["starts"] = torch.randint(0, rows + 1, (batch,), dtype=torch.int32)
    for b in range(batch):  # what is not seen may hold anything
        first = max(int(kwargs["starts"][b]) if "starts" in kwargs else 0, rows - kwargs.get("window", rows))
        key[b, :, :first] = value[b, :, :first] = math.nan
    torch.set_num_threads(data.draw(st.sampled_from([1, 1, 2])))
    got, want = both(attention_row, query, key, **kwargs)
    close(got, want)
    check_both(query, key, value, kwargs)
    torch.set_num_threads(1)


def test_rows_and_outputs_do_not_depend_on_the_threads(isa):
    query, key, value = case(1, 3, 3, 1, 5000, 64, torch.float32)
    outs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        outs.append(decode_attention_with_row(query[:, :, 0], key, value))
        again = decode_attention_with_row(query[:, :, 0], key, value)
        assert all(torch.equal(x, y) for x, y in zip(outs[-1], again, strict=True)), "same call, same bits"
    for out, row in outs[1:]:
        close(out, outs[0][0])
        close(row, outs[0][1])
    close(outs[0][0], ops.decode_attention(query[:, :, 0], key, value))


@pytest.mark.parametrize("starts", [-1, 11])
def test_starts_out_of_range_raise(isa, starts):
    query, key, value = case(1, 1, 2, 1, 10, 8, torch.float32)
    starts = torch.tensor([starts], dtype=torch.int32)
    for backend in ("native", "reference"):
        with ops.use_backend(backend):
            with pytest.raises(InputError, match="starts"):
                attention_row(query[:, :, 0], key, starts=starts)
            with pytest.raises(InputError, match="starts"):
                decode_attention_with_row(query[:, :, 0], key, value, starts=starts)


def test_windows_below_one_raise():
    query, key, value = case(1, 1, 2, 1, 10, 8, torch.float32)
    with pytest.raises(InputError, match="window"):
        attention_row(query[:, :, 0], key, window=0)
    with pytest.raises(InputError, match="window"):
        decode_attention_with_row(query[:, :, 0], key, value, window=-1)


def test_gradients_take_the_reference():
    query, key, value = case(1, 2, 2, 6, 6, 8, torch.float32)
    query = query.clone().requires_grad_()
    attention_columns(query, key).square().sum().backward()
    assert query.grad.isfinite().all()
    out, _ = decode_attention_with_row(query[:, :, 0], key, value)
    out.sum().backward()


def test_compiled_calls_keep_their_shapes():
    query, key, value = case(1, 2, 2, 6, 9, 8, torch.float32)

    @torch.compile(backend="eager", fullgraph=True)
    def run(query, key, value):
        return attention_columns(query, key, window=3), decode_attention_with_row(query[:, :, -1], key, value)

    columns, (out, row) = run(query, key, value)
    close(columns, attention_columns(query, key, window=3))
    close(row, attention_row(query[:, :, -1], key))
    close(out, ops.decode_attention(query[:, :, -1], key, value))


def test_operators_pass_the_checks_of_torch_library():
    query, key, value = (x.contiguous() for x in case(1, 2, 2, 6, 9, 8, torch.float32))
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.gossamer.attention_columns, (query, key, None, None, None, 0.3, 0, 128, True), test_utils=utils
    )
    torch.library.opcheck(torch.ops.gossamer.attention_row, (query[:, :, 0], key, None, 0.3, 0), test_utils=utils)
    torch.library.opcheck(
        torch.ops.gossamer.decode_attention_with_row, (query[:, :, 0], key, value, None, 0.3, 4), test_utils=utils
    )


def test_a_context_too_long_to_keep_its_memory(isa):
    query, key, _ = case(1, 1, 1, 3, 70_000, 4, torch.float32)
    for _ in range(2):
        close(*both(attention_columns, query, key))
