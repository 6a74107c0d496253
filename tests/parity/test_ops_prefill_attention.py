"""block_sparse_attention and vertical_slash_attention: native kernels, every instruction set that runs here, against the
reference; and both against dense attention under the same mask."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer import ops
from gossamer.errors import InputError

pytestmark = pytest.mark.skipif("native" not in ops.available_backends(), reason="native kernels are not built")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
EXAMPLES = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_same(actual, expected, dtype):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.float(), other.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def both(op, *args, **kwargs):
    actual = op(*args, **kwargs, return_lse=True)
    with ops.use_backend("reference"):
        return actual, op(*args, **kwargs, return_lse=True)


def prompt(batch, kv_heads, group, new, rows, dim, dtype=torch.float32, starts=None):
    """Queries, keys and values as views of larger buffers; what lies outside, and in the padding, is NaN."""
    query = torch.randn(batch, new, kv_heads * group, dim, dtype=dtype).transpose(1, 2)
    key, value = (torch.full((batch, rows + 5, kv_heads, dim), math.nan, dtype=dtype) for _ in range(2))
    key, value = (x.transpose(1, 2)[:, :, :rows] for x in (key, value))
    for x in (key, value):
        x.normal_()
        for b, start in enumerate([] if starts is None else starts.tolist()):
            x[b, :, :start] = math.nan
    return query, key, value


def ids_of(mask):
    """The other form of a block mask; slots that are not used hold nonsense."""
    ids = torch.where(mask, torch.arange(mask.shape[3]), 10**9).sort(-1).values
    return ids.int(), mask.sum(-1).int()


def random_lists(batch, heads, rows, verticals, slashes):
    return (
        torch.randint(0, rows, (batch, heads, verticals)).sort(-1).values.int(),
        torch.randint(0, rows, (batch, heads, slashes)).sort(-1, descending=True).values.int(),
    )


@DTYPES
@pytest.mark.parametrize("dim", [16, 33, 64, 80, 96, 128, 130])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_everything_chosen_is_dense(isa, dtype, dim, size):
    torch.manual_seed(dim)
    query, key, value = prompt(1, 2, 2, 200, 200, dim, dtype)
    mask = torch.ones(1, 1, -(-200 // size), -(-200 // size), dtype=torch.bool)
    out = ops.block_sparse_attention(query, key, value, mask, block_size=size)
    dense = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), is_causal=True, enable_gqa=True)
    assert_same([out], [dense], dtype)
    every = torch.arange(200).expand(1, 4, 200).int()
    empty = every[..., :0]
    for lists in ((every, empty), (empty, every.flip(-1)), (every, every.flip(-1))):
        assert_same([ops.vertical_slash_attention(query, key, value, *lists, block_size=size)], [dense], dtype)


@EXAMPLES
@given(st.data())
def test_random_blocks(isa, data):
    draw, one_of = data.draw, lambda *values: data.draw(st.sampled_from(values))
    torch.manual_seed(draw(st.integers(0, 999)))
    batch, kv_heads, group = (draw(st.integers(1, n)) for n in (2, 3, 5))
    rows = draw(st.integers(1, 300))
    new, dim, dtype = draw(st.integers(1, rows)), one_of(1, 8, 20, 48, 64, 72, 128), one_of(*TOLERANCE)
    size, keys = one_of(1, 7, 16, 32, 64, 100, 128), one_of(None, 5, 16, 32, 64, 128)
    starts = torch.randint(0, rows + 1, (batch,)).int() if draw(st.booleans()) else None
    query, key, value = prompt(batch, kv_heads, group, new, rows, dim, dtype, starts)
    shape = (batch, one_of(1, kv_heads, kv_heads * group), -(-new // size), -(-rows // (keys or size)))
    mask = torch.rand(shape) < one_of(0.05, 0.5, 1.1)
    scale = one_of(None, None, -0.3, 0.0, 0.2)
    torch.set_num_threads(one_of(1, 1, 2))
    window = one_of(None, None, 1, 20, 70, 500)
    how = {"block_size": size, "key_block_size": keys, "window": window, "starts": starts, "scale": scale}
    actual, expected = both(ops.block_sparse_attention, query, key, value, mask, **how)
    assert_same(actual, expected, dtype)
    ids, counts = ids_of(mask)
    again = ops.block_sparse_attention(query, key, value, ids, counts=counts, **how, return_lse=True)
    assert all(torch.equal(x, y) for x, y in zip(again, actual, strict=True)), "both forms, same bits"
    torch.set_num_threads(1)


@EXAMPLES
@given(st.data())
def test_random_verticals_and_slashes(isa, data):
    draw, one_of = data.draw, lambda *values: data.draw(st.sampled_from(values))
    torch.manual_seed(draw(st.integers(0, 999)))
    batch, kv_heads, group, rows = (draw(st.integers(1, n)) for n in (2, 2, 3, 300))
    size, dim, dtype = one_of(1, 7, 16, 32, 64, 100, 128), one_of(8, 20, 64), one_of(*TOLERANCE)
    starts = torch.randint(0, rows + 1, (batch,)).int() if draw(st.booleans()) else None
    query, key, value = prompt(batch, kv_heads, group, rows, rows, dim, dtype, starts)
    lists = random_lists(batch, kv_heads * group, rows, draw(st.integers(0, 40)), draw(st.integers(0, 40)))
    actual, expected = both(ops.vertical_slash_attention, query, key, value, *lists, block_size=size, starts=starts)
    assert_same(actual, expected, dtype)
    index = ops.vertical_slash_index(*lists, rows, size)
    with ops.use_backend("reference"):
        other = ops.vertical_slash_index(*lists, rows, size)
    for name in ("ranges", "range_counts", "columns", "column_counts"):
        assert torch.equal(getattr(index, name), getattr(other, name)), name
    mask = index.to_mask()
    assert torch.equal(mask.sum((2, 3)), index.pairs())
    if starts is not None:
        mask = mask & (torch.arange(rows) >= starts[:, None, None, None])
    key, value = (x.float().nan_to_num() for x in (key, value))
    dense = F.scaled_dot_product_attention(query.float(), key, value, attn_mask=mask, enable_gqa=True)
    assert_same([actual[0]], [dense.nan_to_num()], dtype)


def naive_pieces(verticals, slashes, rows, size, block):
    """The squares and columns of one row block, in the words of the paper's kernel."""
    end_of_rows, squares, current = (block + 1) * size, [], None
    for distance in slashes:
        if distance < end_of_rows:
            stop = max(end_of_rows - distance, size)
            if current is None or stop > current[1] + size:
                squares += [] if current is None else range(*current, size)
                current = (stop - size, stop)
            elif stop > current[1]:
                current = (current[0], current[1] + size)
    squares += [] if current is None else range(*current, size)
    covered = {j for s in squares for j in range(s, s + size)}
    return squares, sorted({v for v in verticals if v < end_of_rows and v not in covered})


@EXAMPLES
@given(st.data())
def test_pieces_against_a_naive_walk(isa, data):
    rows, size = data.draw(st.integers(1, 150)), data.draw(st.sampled_from([1, 4, 7, 16, 32]))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    lists = random_lists(1, 2, rows, data.draw(st.integers(0, 25)), data.draw(st.integers(0, 25)))
    index = ops.vertical_slash_index(*lists, rows, size)
    assert index.range_counts.max() <= index.ranges.shape[3] <= index.ranges.shape[2]
    for head in range(2):
        verticals, slashes = (x[0, head] for x in lists)
        for block in range(index.ranges.shape[2]):
            squares, columns = naive_pieces(verticals.tolist(), slashes.tolist(), rows, size, block)
            at = (0, head, block)
            assert index.ranges[at][: index.range_counts[at]].tolist() == squares
            assert index.columns[at][: index.column_counts[at]].tolist() == columns
        i, j = torch.arange(rows)[:, None], torch.arange(rows)
        tokens = (torch.isin(j, verticals) | torch.isin(i - j, slashes)) & (j <= i)
        mask = index.to_mask()[0, head]
        assert not (tokens & ~mask).any(), "a chosen pair is missing"
        assert not (mask & (j > i)).any()


def test_a_short_list_is_filled_by_repeating(isa):
    query, key, value = prompt(1, 1, 1, 90, 90, 16)
    verticals, slashes = torch.tensor([[[3, 40]]]), torch.tensor([[[60, 0]]])
    want = ops.vertical_slash_attention(query, key, value, verticals, slashes, block_size=16)
    verticals, slashes = torch.tensor([[[3, 40, 40, 40]]]), torch.tensor([[[60, 0, 0]]])
    assert torch.equal(ops.vertical_slash_attention(query, key, value, verticals, slashes, block_size=16), want)


def test_each_head_as_if_alone(isa):
    query, key, value = prompt(1, 2, 3, 150, 150, 32)
    lists = random_lists(1, 6, 150, 12, 9)
    out = ops.vertical_slash_attention(query, key, value, *lists, block_size=32)
    for head in range(6):
        one = slice(head, head + 1)
        alone = ops.vertical_slash_attention(
            query[:, one], *(x[:, head // 3, None] for x in (key, value)), *(x[:, one] for x in lists), block_size=32
        )
        assert torch.equal(out[:, one], alone)


@DTYPES
def test_parts_over_disjoint_keys_merge(isa, dtype):
    query, key, value = prompt(1, 2, 2, 192, 192, 64, dtype)
    mask = torch.rand(1, 4, 3, 3) < 0.5
    parts = [ops.block_sparse_attention(query, key, value, m, return_lse=True) for m in (mask, ~mask)]
    out, lse = ops.merge_attention(*(torch.stack(x) for x in zip(*parts, strict=True)))
    whole = ops.block_sparse_attention(query, key, value, mask | True, return_lse=True)
    assert_same((out, lse), whole, dtype)


def test_nothing_visible_gives_zeros(isa):
    query, key, value = prompt(2, 1, 2, 70, 100, 16, starts=torch.tensor([0, 60]))
    mask = torch.zeros(1, 1, 5, 7, dtype=torch.bool).expand(2, 1, 5, 7).clone()
    mask[1, 0, :, 0] = True  # only padding
    mask[0, 0, 0, 6] = True  # only the future
    starts = torch.tensor([0, 60], dtype=torch.int32)
    (out, lse), expected = both(ops.block_sparse_attention, query, key, value, mask, block_size=16, starts=starts)
    assert not out.any()
    assert (lse == -math.inf).all()
    assert_same((out, lse), expected, torch.float32)
    empty = torch.zeros(1, 1, 0, dtype=torch.int32)
    x = torch.randn(1, 1, 20, 8)
    assert not ops.vertical_slash_attention(x, x, x, empty, empty).any()
    none = x[:, :, :0]
    assert ops.block_sparse_attention(none, x, x, mask[:1, :, :0, :1]).shape == (1, 1, 0, 8)


@DTYPES
def test_rising_and_huge_logits(isa, dtype):
    """The running maximum moves at nearly every tile, far and by little."""
    torch.manual_seed(0)
    for steps in (0.05, 3.0, 60.0):
        query, value = torch.ones(1, 1, 400, 16, dtype=dtype), torch.randn(1, 1, 400, 16, dtype=dtype)
        key = (torch.arange(400).view(1, 1, 400, 1) * steps / 16).expand(1, 1, 400, 16).to(dtype)
        mask = torch.ones(1, 1, 7, 7, dtype=torch.bool)
        for sign in (1.0, -1.0):
            (out, lse), expected = both(ops.block_sparse_attention, query, key, value, mask, scale=sign)
            torch.testing.assert_close(out.float(), expected[0].float(), atol=2e-2, rtol=2e-2)
            torch.testing.assert_close(lse, expected[1], atol=1e-2, rtol=1e-5)


@DTYPES
@pytest.mark.parametrize("size", [16, 64, 100])
def test_a_window_and_no_block_is_a_band(isa, dtype, size):
    query, key, value = prompt(1, 2, 2, 200, 230, 32, dtype)
    i, j = torch.arange(30, 230)[:, None], torch.arange(230)
    for window in (1, 63, 64, 300):
        mask = torch.zeros(1, 1, -(-200 // size), -(-230 // size), dtype=torch.bool)
        out = ops.block_sparse_attention(query, key, value, mask, block_size=size, window=window)
        band = (j <= i) & (j > i - window)
        dense = F.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), attn_mask=band, enable_gqa=True
        )
        assert_same([out], [dense], dtype)


def test_nan_in_a_query_stays_in_its_row(isa):
    query, key, value = prompt(1, 1, 1, 130, 130, 16)
    clean = ops.block_sparse_attention(query, key, value, torch.ones(1, 1, 3, 3, dtype=torch.bool))
    query[0, 0, 77, 3] = math.nan
    out = ops.block_sparse_attention(query, key, value, torch.ones(1, 1, 3, 3, dtype=torch.bool))
    assert out[0, 0, 77].isnan().all()
    clean[0, 0, 77] = out[0, 0, 77] = 0.0
    assert torch.equal(out, clean)


def test_threads_agree_to_the_bit(isa):
    query, key, value = prompt(1, 2, 3, 500, 500, 64)
    mask = torch.rand(1, 6, 8, 8) < 0.6
    outs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        outs.append(ops.block_sparse_attention(query, key, value, mask))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("ids", "count", "what"),
    [
        ([0, 3], 2, "ids of key blocks"),
        ([-1, 1], 2, "ids of key blocks"),
        ([1, 1], 2, "ascending"),
        ([2, 1], 2, "ascending"),
        ([0, 1], 3, "counts"),
        ([0, 1], -1, "counts"),
    ],
)
def test_bad_ids_and_counts_raise(isa, backend, ids, count, what):
    x = torch.randn(1, 1, 40, 8)
    blocks = torch.tensor(ids, dtype=torch.int32).expand(1, 1, 3, 2)
    counts = torch.full((1, 1, 3), count, dtype=torch.int32)
    with ops.use_backend(backend), pytest.raises(InputError, match=what):
        ops.block_sparse_attention(x, x, x, blocks, counts=counts, block_size=16)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("verticals", "slashes"), [([5, 3], [1, 0]), ([3, 5], [0, 1]), ([3, 40], [0]), ([-1], [0]), ([0], [40])]
)
def test_bad_lists_raise(isa, backend, verticals, slashes):
    x = torch.randn(1, 1, 40, 8)
    lists = [torch.tensor([[ids]], dtype=torch.int32) for ids in (verticals, slashes)]
    with ops.use_backend(backend):
        with pytest.raises(InputError, match="verticals must ascend"):
            ops.vertical_slash_attention(x, x, x, *lists)
        with pytest.raises(InputError, match="verticals must ascend"):
            ops.vertical_slash_index(*lists, 40)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("start", [-1, 41])
def test_bad_starts_raise(isa, backend, start):
    x, ids = torch.randn(1, 1, 40, 8), torch.zeros(1, 1, 1, dtype=torch.int32)
    starts = torch.tensor([start], dtype=torch.int32)
    with ops.use_backend(backend):
        with pytest.raises(InputError, match="starts must lie"):
            ops.block_sparse_attention(x, x, x, torch.ones(1, 1, 1, 1, dtype=torch.bool), starts=starts)
        with pytest.raises(InputError, match="starts must lie"):
            ops.vertical_slash_attention(x, x, x, ids, ids, starts=starts)


def test_shapes_that_do_not_fit_raise():
    x, mask = torch.randn(1, 2, 40, 8), torch.ones(1, 1, 3, 3, dtype=torch.bool)
    ids, counts = torch.zeros(1, 1, 3, 2, dtype=torch.int32), torch.zeros(1, 1, 3, dtype=torch.int32)
    bad = [
        (lambda: ops.block_sparse_attention(x[0], x, x, mask), "want query"),
        (lambda: ops.block_sparse_attention(x, x[:, :, :9], x[:, :, :9], mask), "more queries than rows"),
        (lambda: ops.block_sparse_attention(x, x, x.double(), mask, block_size=16), "one float dtype"),
        (lambda: ops.block_sparse_attention(x, x, x, mask, block_size=64), "blocks must be"),
        (lambda: ops.block_sparse_attention(x, x, x, mask.expand(1, 3, 3, 3), block_size=16), "blocks must be"),
        (lambda: ops.block_sparse_attention(x, x, x, mask, block_size=16, key_block_size=8), "5 columns"),
        (lambda: ops.block_sparse_attention(x, x, x, mask, block_size=0), "1 or more"),
        (lambda: ops.block_sparse_attention(x, x, x, mask, block_size=16, window=0), "1 or more"),
        (lambda: ops.block_sparse_attention(x, x, x, ids, block_size=16), "without counts"),
        (lambda: ops.block_sparse_attention(x, x, x, ids.float(), counts=counts, block_size=16), "must be int32"),
        (lambda: ops.block_sparse_attention(x, x, x, ids, counts=counts[..., :2], block_size=16), "counts must have"),
        (lambda: ops.vertical_slash_attention(x[:, :, :9], x, x, counts, counts), "whole prompt"),
        (lambda: ops.vertical_slash_attention(x, x, x, counts, counts), "verticals must have shape"),
        (lambda: ops.vertical_slash_attention(x, x, x, counts[0], counts), "verticals must be"),
        (lambda: ops.vertical_slash_attention(x, x, x, counts, counts, block_size=0), "1 or more"),
        (lambda: ops.vertical_slash_index(counts, counts, 0), "length must be"),
    ]
    for call, what in bad:
        with pytest.raises(InputError, match=what):
            call()


def test_gradients_take_the_reference():
    query, key, value = (torch.randn(1, 1, 20, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask, ids = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril(), torch.tensor([[[4, 0]]])
    blocks = lambda q, k, v: ops.block_sparse_attention(q, k, v, mask, block_size=8)  # noqa: E731
    lists = lambda q, k, v: ops.vertical_slash_attention(q, k, v, ids.flip(-1), ids, block_size=8)  # noqa: E731
    for call in (blocks, lists):
        assert torch.autograd.gradcheck(call, (query, key, value))


def test_compiles_and_keeps_its_schema():
    query, key, value = prompt(1, 1, 2, 40, 40, 8)
    mask, ids = (
        torch.ones(1, 1, 3, 3, dtype=torch.bool),
        torch.tensor([[[4, 0]]] * 2).transpose(0, 1).contiguous().int(),
    )
    own, checks = torch.ops.gossamer, ("test_schema", "test_faketensor")
    torch.library.opcheck(
        own.block_sparse_attention, (query, key, value, mask, None, 16, 16, 5, None, 0.3, True), test_utils=checks
    )
    down = ids.flip(-1).contiguous()
    torch.library.opcheck(
        own.vertical_slash_attention, (query, key, value, down, ids, 16, None, 0.3, True), test_utils=checks
    )
    torch.library.opcheck(own.vertical_slash_index, (down, ids, 40, 16), test_utils=checks)
    compiled = torch.compile(lambda q: ops.block_sparse_attention(q, key, value, mask, block_size=16), backend="eager")
    assert torch.equal(compiled(query), ops.block_sparse_attention(query, key, value, mask, block_size=16))


def test_density_of_a_band():
    index = ops.vertical_slash_index(torch.zeros(1, 1, 0).int(), torch.tensor([[[0]]]), 128, 32)
    assert index.density() == pytest.approx(4 * 32 * 33 / 2 / (128 * 129 / 2))
    assert index.area().item() == 4 * 32 * 32
