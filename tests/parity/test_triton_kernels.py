"""The Triton kernels against the references: on the GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so `test_triton_interpreter.py` runs this file in a process
of its own. By hand: `TRITON_INTERPRET=1 pytest tests/parity/test_triton_kernels.py`.
"""

from __future__ import annotations

import importlib.util
import math
import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU: test_triton_interpreter.py runs this file in Triton's interpreter", allow_module_level=True)

from gossamer.ops import (  # noqa: E402
    LabelCache,
    NeuronWeights,
    QuantizedRows,
    append_labels,
    block_sparse_attention,
    channel_sparse_linear,
    compact_rows,
    decode_attention,
    key_scores,
    label_attention,
    label_scores,
    merge_rows,
    pack,
    pooled_attention,
    quantize_rows,
    quantized_decode_attention,
    select_topk,
    sparse_linear,
    sparse_mlp,
    use_backend,
    vertical_slash_attention,
    vertical_slash_index,
)
from gossamer.ops.attention_row import attention_row, decode_attention_with_row  # noqa: E402
from gossamer.ops.attention_statistics import attention_columns  # noqa: E402
from gossamer.ops.delta_linear import delta_linear  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {F32: 2e-5, BF16: 2e-2, F16: 3e-3}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(7)
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


def both(call):
    with use_backend("reference"):
        want = call()
    with use_backend("triton"):
        got = call()
    return want, got


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def cache(batch, kv_heads, rows, dim, dtype, spare=3):
    """Keys or values as a view with odd strides of a larger buffer."""
    buffer = torch.full((batch + 1, rows + spare, kv_heads, dim + 4), math.nan, dtype=dtype)
    view = buffer[1:, :rows, :, :dim].transpose(1, 2)
    view.copy_(torch.randn(view.shape))
    return view


def close(want, got, dtype):
    torch.testing.assert_close(got.float(), want.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def check_attention(call, dtype):
    (out, lse), (got, got_lse) = both(call)
    assert got.dtype is dtype
    assert got_lse.dtype is F32
    close(out, got, dtype)
    torch.testing.assert_close(got_lse, lse, atol=1e-4, rtol=1e-4)


SHAPES = [
    (60, 3, 3, 63, F32),
    (80, 6, 2, 63, BF16),
    (128, 8, 2, 65, F16),
    (64, 8, 1, 33, F32),
    (16, 4, 4, 1, BF16),
    (128, 34, 2, 33, F32),
]


@pytest.mark.parametrize(("dim", "heads", "kv_heads", "rows", "dtype"), SHAPES)
def test_dense_attention(dim, heads, kv_heads, rows, dtype):
    query = torch.randn(2, heads, dim + 2).to(dtype)[..., 1:-1]
    key, value = (cache(2, kv_heads, rows, dim, dtype) for _ in range(2))
    check_attention(lambda: decode_attention(query, key, value, return_lse=True), dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_attention_in_slices_over_ragged_ranges(dtype, monkeypatch):
    from gossamer.gpu import decode_attention as kernels

    monkeypatch.setattr(kernels, "ROWS_PER_SLICE", 16)
    query = torch.randn(4, 6, 80, dtype=dtype)
    key, value = (cache(4, 2, 130, 80, dtype) for _ in range(2))
    starts, lengths = ints(0, 29, 50, 129), ints(130, 97, 50, 130)  # the third is empty
    for b in range(4):  # what is not attended may hold anything
        for x in (key, value):
            x[b, :, : starts[b]] = math.nan
            x[b, :, lengths[b] :] = math.nan
    call = lambda: decode_attention(query, key, value, starts=starts, lengths=lengths, scale=0.3, return_lse=True)  # noqa: E731
    check_attention(call, dtype)
    with use_backend("triton"):
        out, lse = call()
    assert not out[2].any()
    assert (lse[2] == -math.inf).all()


@pytest.mark.parametrize(("selected", "rows_per_slice"), [("kv_head", 256), ("query_head", 256), ("kv_head", 16)])
@pytest.mark.parametrize(("dim", "heads", "kv_heads", "rows", "dtype"), SHAPES[:4])
def test_indexed_attention(dim, heads, kv_heads, rows, dtype, rows_per_slice, selected, monkeypatch):
    from gossamer.gpu import decode_attention as kernels

    monkeypatch.setattr(kernels, "ROWS_PER_SLICE", rows_per_slice)
    query = torch.randn(2, heads, dim).to(dtype)
    key, value = (cache(2, kv_heads, rows, dim, dtype) for _ in range(2))
    lines = heads if selected == "query_head" else kv_heads
    indices = torch.randint(2, rows - 2, (2, lines, 70), dtype=torch.int32)  # with repeats
    counts = torch.randint(1, 71, (2, lines), dtype=torch.int32)
    counts[0, 0], counts[1, 0] = 0, 70
    for x in (key, value):
        x[:, :, :2] = math.nan
        x[:, :, rows - 2 :] = math.nan
    used = torch.arange(70) < counts[..., None]
    indices = indices.masked_fill(~used, 2**31 - 1)  # beyond the counts anything may stand
    check_attention(lambda: decode_attention(query, key, value, indices=indices, counts=counts, return_lse=True), dtype)
    lengths = ints(rows, rows)
    call = lambda: decode_attention(query, key, value, lengths=lengths, indices=indices.clamp(max=9), return_lse=True)  # noqa: E731
    check_attention(call, dtype)


def test_nothing_to_attend():
    query = torch.randn(2, 4, 32)
    for rows, indices in ((0, None), (0, ints().view(1, 1, 0).expand(2, 2, 0)), (5, torch.zeros(2, 2, 0).int())):
        key = torch.randn(2, 2, rows, 32)
        with use_backend("triton"):
            out, lse = decode_attention(query, key, key, indices=indices, return_lse=True)
        assert not out.any()
        assert (lse == -math.inf).all()


def test_ids_out_of_range_are_not_read():
    query, key = torch.randn(1, 2, 16), torch.randn(1, 2, 20, 16)
    indices = ints(*[-1] * 64, 3, -1, 20, 10**9, 7).expand(1, 2, 69)  # the first block holds none to read
    with use_backend("triton"):
        got = decode_attention(query, key, key, indices=indices)
    with use_backend("reference"):
        want = decode_attention(query, key, key, indices=ints(3, 7).expand(1, 2, 2))
    close(want, got, F32)


def awkward_scores(*shape):
    """Scores with ties, both zeros, both infinities, NaN, denormals; strided."""
    scores = (torch.randn(*shape[:-1], shape[-1] + 3) * 4).round(decimals=1)[..., 1:-2]
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-41, -1e-41, 3.4e38, -3.4e38])
    where = torch.rand(shape) < 0.3
    return torch.where(where, special[torch.randint(0, 9, shape)], scores)


def check_topk(scores, k, **ranges):
    (ids, counts), (got, got_counts) = both(lambda: select_topk(scores, k, **ranges))
    assert torch.equal(counts, got_counts)
    assert torch.equal(ids, got)


@pytest.mark.parametrize("k", [1, 2, 30, 62, 63, 64, 200])
def test_topk(k):
    scores = awkward_scores(3, 1, 63)
    scores[2] = scores[2].where(torch.rand(1, 63) < 0.2, 1.0)
    check_topk(scores, k)


def test_topk_of_ragged_lines():
    for k in (1, 9):
        check_topk(awkward_scores(3, 2, 63), k, starts=ints(5, 7, 40), lengths=ints(63, 7, 41))


def test_topk_of_all_distinct_and_of_blocks():
    scores = torch.randn(1, 1, 300)
    for k in (1, 150, 299):
        check_topk(scores, k)
    check_topk(torch.where(torch.rand(1, 1, 40) < 0.5, 0.0, -0.0), 5)  # equal, so the lowest ids
    check_topk(torch.full((1, 1, 0), 1.0), 3)


@pytest.mark.parametrize("k", [1, 12])
def test_topk_in_chunks(k, monkeypatch):
    from gossamer.gpu import select_topk as kernels

    monkeypatch.setattr(kernels, "CHUNK", 32)
    scores = awkward_scores(2, 1, 125)
    scores[0] = scores[0].where(torch.rand(1, 125) < 0.1, 1.0)  # mostly ties, over all chunks
    check_topk(scores, k, starts=ints(1, 33), lengths=ints(125, 121))


BITS = [1, 2, 3, 4, 6, 8, 9, 12, 16]


def labelled(bits, r, batch=2, heads=2, kv_heads=2, tokens=50, dim=60, dtype=F32):
    """A filled cache (by the reference), its channels, its keys."""
    labels = LabelCache.allocate(batch, heads, tokens + 5, r, bits, dtype, device=DEVICE)
    channels = torch.stack([torch.randperm(dim)[:r] for _ in range(heads)])
    with use_backend("reference"):
        key = torch.randn(batch, kv_heads, tokens, dim).to(dtype)
        append_labels(labels, key, channels, 0)
    return labels, channels, key


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("r", "heads", "start", "tokens", "dtype"), [(7, 2, 5, 30, F32), (32, 6, 16, 1, BF16)])
def test_append(bits, r, heads, start, tokens, dtype):
    key = cache(2, 2, tokens, 60, dtype)
    key[0, 0, 0] = 1.5  # a constant row
    channels = torch.stack([torch.randperm(60)[:r] for _ in range(heads)])

    def call():
        labels = LabelCache.allocate(2, heads, 50, r, bits, dtype, device=DEVICE)
        for x in (labels.codes, labels.step, labels.zero):
            if x is not None:
                x.fill_(77)  # other tokens must keep what they hold
        append_labels(labels, key, channels, start)
        return labels

    want, got = both(call)
    if 9 <= bits < 16 and dtype is BF16 and DEVICE == "cpu":  # the interpreter truncates to bfloat16, a GPU rounds
        torch.testing.assert_close(got.codes, want.codes, rtol=2**-7, atol=0)
    else:
        assert torch.equal(want.codes, got.codes)
    if want.step is not None:
        assert torch.equal(want.step, got.step)
        assert torch.equal(want.zero, got.zero)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("reduce", ["none", "max", "sum"])
@pytest.mark.parametrize(("r", "per_query_head", "dtype"), [(7, False, F32), (32, True, BF16), (40, False, F16)])
def test_scores(bits, reduce, r, per_query_head, dtype):
    labels, channels, _ = labelled(bits, r, heads=6 if per_query_head else 2, dtype=dtype)
    query = torch.randn(2, 6, 62).to(dtype)[..., 1:-1]
    query[0, 1] = 0
    ranges = {"starts": ints(3, 0), "lengths": ints(49, 20)}
    want, got = both(lambda: label_scores(query, channels, labels, 49, reduce=reduce, kv_heads=2, **ranges))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    want, got = both(lambda: label_scores(query, channels, labels, 33, reduce=reduce, kv_heads=2))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("reduce", ["none", "sum"])
def test_integer_products_are_exact(bits, reduce):
    labels, channels, _ = labelled(bits, 200, dim=256)
    labels.step.fill_(1.0)
    labels.zero.zero_()
    query = torch.randn(2, 8, 256)
    want, got = both(lambda: label_scores(query, channels, labels, 50, reduce=reduce))
    assert torch.equal(want, got)


def test_scores_read_no_stale_tokens():
    for bits in (4, 16):
        labels, channels, _ = labelled(bits, 8)
        for x in (labels.codes, labels.step, labels.zero):
            if x is not None and x.is_floating_point():
                lane = -1 if bits == 4 else 4
                x.select(lane, 15)[:, :, 1] = math.nan  # token 31
                x[:, :, 2:] = math.nan
        want, got = both(lambda: label_scores(torch.randn(2, 4, 60), channels, labels, 50, lengths=ints(31, 0)))  # noqa: B023
        assert (got.isfinite() == (want > -math.inf)).all()


ATTENTION = [  # select, reduce, labels per query head, bits, k, protect the current token
    ("kv_head", "sum", False, 4, 9, True),
    ("kv_head", "max", False, 8, 1, True),
    ("kv_head", "max", True, 2, 20, False),
    ("kv_head", "sum", True, 16, 70, True),
    ("query_head", None, False, 16, 9, True),
    ("query_head", None, True, 4, 12, False),
]


@pytest.mark.parametrize(("select", "reduce", "per_query_head", "bits", "k", "protect"), ATTENTION)
@pytest.mark.parametrize("ragged", [True, False])
def test_label_attention(select, reduce, per_query_head, bits, k, protect, ragged):
    batch = 3 if ragged else 1
    labels, channels, key = labelled(bits, 24, batch=batch, heads=4 if per_query_head else 2)
    value, query = torch.randn_like(key), torch.randn(batch, 4, 60)
    options = {"select": select, "reduce": reduce, "protect_last": protect}
    ranges = {"starts": ints(0, 30, 20), "lengths": ints(50, 41, 20)} if ragged else {}
    given = torch.full((batch, 4 if select == "query_head" else 2, k), -5, dtype=torch.int32)

    def call():
        out = given.clone()
        return out, *label_attention(query, key, value, channels, labels, k, indices_out=out, **options, **ranges)

    (_, want, ids, counts), (out, got, got_ids, got_counts) = both(call)
    assert got_ids is out
    assert torch.equal(ids, got_ids)
    assert torch.equal(counts, got_counts)
    close(want, got, F32)


@pytest.mark.parametrize("reduce", ["none", "max", "sum"])
@pytest.mark.parametrize(("dim", "heads", "kv_heads", "rows", "dtype"), [(64, 6, 2, 300, F32), (80, 3, 3, 129, BF16)])
def test_key_scores(dim, heads, kv_heads, rows, dtype, reduce):
    query, key = torch.randn(2, heads, dim).to(dtype), cache(2, kv_heads, rows, dim, dtype)
    starts, lengths = ints(0, 17), ints(rows - 2, rows)
    want, got = both(lambda: key_scores(query, key, starts=starts, lengths=lengths, reduce=reduce))
    torch.testing.assert_close(got, want, atol=TOLERANCE[dtype] * 4, rtol=1e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_no_call_waits_for_the_gpu():
    labels, channels, key = labelled(4, 24)
    query, channels = torch.randn(2, 8, 60), channels.int()
    with use_backend("triton"):
        label_attention(query, key, key, channels, labels, 9)
        torch.cuda.set_sync_debug_mode("error")
        try:
            append_labels(labels, key[:, :, :1], channels, 50)
            label_attention(query, key, key, channels, labels, 9)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def check_rows(query, key, value, **how):
    want, got = both(lambda: attention_row(query, key, **how))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    (out, row), (got, got_row) = both(lambda: decode_attention_with_row(query, key, value, **how))
    assert got.dtype is query.dtype
    close(out, got, query.dtype)
    torch.testing.assert_close(got_row, row, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("rows_per_slice", [256, 16])
@pytest.mark.parametrize(("dim", "heads", "kv_heads", "rows", "dtype"), SHAPES[:5])
def test_attention_rows(dim, heads, kv_heads, rows, dtype, rows_per_slice, monkeypatch):
    from gossamer.gpu import decode_attention as kernels

    monkeypatch.setattr(kernels, "ROWS_PER_SLICE", rows_per_slice)
    query = torch.randn(2, heads, dim + 2).to(dtype)[..., 1:-1]
    key, value = (cache(2, kv_heads, rows, dim, dtype) for _ in range(2))
    check_rows(query, key, value)


def test_attention_rows_with_padding_and_window(monkeypatch):
    from gossamer.gpu import decode_attention as kernels

    monkeypatch.setattr(kernels, "ROWS_PER_SLICE", 16)
    query = torch.randn(4, 6, 40)
    key, value = (cache(4, 2, 300, 40, F32) for _ in range(2))
    starts = ints(0, 29, 299, 300)  # the last sees nothing
    for b in range(4):
        for x in (key, value):
            x[b, :, : starts[b]] = math.nan
    check_rows(query, key, value, starts=starts, scale=0.3)
    check_rows(query, key, value, starts=starts, window=100)


COLUMNS = [
    {},
    {"window": 9},
    {"causal": False},
    {"starts": (0, 31), "scale": 0.3},
    {"starts": (0, 31), "positions": True, "weights": True},
    {"window": 20, "positions": True, "weights": True, "starts": (5, 0)},
]


@pytest.mark.parametrize("settings", COLUMNS)
@pytest.mark.parametrize(("dim", "heads", "kv_heads", "dtype"), [(24, 6, 2, F32), (40, 4, 4, BF16), (16, 3, 1, F16)])
def test_attention_columns(dim, heads, kv_heads, dtype, settings):
    how = dict(settings)
    query = cache(2, heads, 75, dim, dtype)
    key = cache(2, kv_heads, 90, dim, dtype)
    if how.pop("positions", False):
        how["positions"] = torch.randint(0, 90, (75,))
    if how.pop("weights", False):
        how["row_weights"] = torch.rand(2, 75) * (torch.rand(2, 75) < 0.6)
    if "starts" in how:
        how["starts"] = ints(*how["starts"])
        for b in range(2):
            key[b, :, : how["starts"][b]] = math.nan
    want, got = both(lambda: attention_columns(query, key, **how))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("width", [None, 1, 20, 70])
def test_rows_move_to_the_front(dtype, width):
    data = torch.randint(0, 100, (2, 3, 90, width or 1)).to(dtype)
    if width is None:
        data = data[..., 0]
    ids = torch.stack([torch.randperm(80)[:50].sort().values for _ in range(6)]).view(2, 3, 50)

    def call():
        rows = data.clone()
        compact_rows(rows, ids, length=80)
        return rows[:, :, :50], rows[:, :, 80:]

    want, got = both(call)
    assert all(torch.equal(x, y) for x, y in zip(want, got, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("keep_norm", [False, True])
def test_merging_rows(dtype, keep_norm):
    data, scores = cache(2, 3, 40, 20, dtype), torch.rand(2, 3, 40)
    scores[0, 0, :6] = 0
    sources = torch.stack([torch.randperm(20)[:15] + 20 for _ in range(6)]).view(2, 3, 15).int()
    targets = torch.randint(-1, 6, (2, 3, 15)).int()

    def call():
        rows = data.clone()
        return merge_rows(rows, scores, sources, targets, keep_norm=keep_norm), rows

    (want_scores, want), (got_scores, got) = both(call)
    torch.testing.assert_close(got_scores, want_scores)
    close(want, got, dtype)


def prompt(batch, heads, kv_heads, new, rows, dim, dtype, starts):
    """Queries, and keys and values with NaN in the padding."""
    query = torch.randn(batch, new, heads, dim).to(dtype).transpose(1, 2)
    key, value = (cache(batch, kv_heads, rows, dim, dtype) for _ in range(2))
    for b, start in enumerate(starts.tolist()):
        for x in (key, value):
            x[b, :, :start] = math.nan
    return query, key, value


PROMPTS = [  # heads, kv_heads, select heads, new, rows, dim, block, key block
    (4, 2, 4, 70, 70, 32, 16, 16, F32),
    (4, 2, 2, 50, 91, 20, 32, 16, BF16),
    (3, 3, 1, 61, 61, 64, 24, 40, F16),
    (2, 1, 1, 100, 130, 16, 100, 7, F32),
]


@pytest.mark.parametrize(("heads", "kv_heads", "select", "new", "rows", "dim", "size", "keys", "dtype"), PROMPTS)
def test_block_sparse_attention(heads, kv_heads, select, new, rows, dim, size, keys, dtype):
    starts = ints(0, 33)
    q, k, v = prompt(2, heads, kv_heads, new, rows, dim, dtype, starts)
    mask = torch.rand(2, select, -(-new // size), -(-rows // keys)) < 0.5
    how = {"block_size": size, "key_block_size": keys, "starts": starts, "return_lse": True}
    check_attention(lambda: block_sparse_attention(q, k, v, mask, **how), dtype)
    far = 10**8  # beyond the counts anything may stand
    ids = torch.where(mask, torch.arange(mask.shape[3]), far).sort(-1).values.int()
    how["window"] = 29
    check_attention(lambda: block_sparse_attention(q, k, v, ids, counts=mask.sum(-1).int(), **how), dtype)


POOLS = [  # new, rows, dim, block, key block
    (70, 70, 32, 16, 16, F32),
    (50, 91, 20, 32, 16, BF16),
    (100, 130, 64, 100, 7, F16),
    (70, 80, 16, 1, 32, F32),
    (40, 40, 16, 5, 90, F32),
]


@pytest.mark.parametrize(("new", "rows", "dim", "size", "keys", "dtype"), POOLS)
def test_pooled_attention(new, rows, dim, size, keys, dtype):
    starts = ints(0, 33)
    q, k, _ = prompt(2, 4, 2, new, rows, dim, dtype, starts)
    want, got = both(lambda: pooled_attention(q, k, size, key_block=keys, starts=starts))
    torch.testing.assert_close(want, got, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_key_blocks_out_of_range_are_not_read():
    x = torch.randn(1, 1, 40, 16)
    ids, counts = ints(-3, 0, 1, 9).view(1, 1, 1, 4), ints(4).view(1, 1, 1)
    with use_backend("triton"):
        got = block_sparse_attention(x, x, x, ids, counts=counts, block_size=64, key_block_size=16)
    with use_backend("reference"):
        want = block_sparse_attention(
            x, x, x, ints(0, 1).view(1, 1, 1, 2), counts=counts // 2, block_size=64, key_block_size=16
        )
    close(want, got, F32)


@pytest.mark.parametrize(
    ("verticals", "slashes", "size", "dtype"), [(9, 12, 16, F32), (0, 7, 24, BF16), (20, 0, 16, F32), (30, 40, 32, F16)]
)
def test_vertical_slash(verticals, slashes, size, dtype):
    starts, rows = ints(0, 21), 93
    q, k, v = prompt(2, 4, 2, rows, rows, 24, dtype, starts)
    columns = torch.randint(0, rows, (2, 4, verticals)).sort(-1).values.int()
    diagonals = torch.randint(0, rows, (2, 4, slashes)).sort(-1, descending=True).values.int()
    how = {"block_size": size, "starts": starts, "return_lse": True}
    check_attention(lambda: vertical_slash_attention(q, k, v, columns, diagonals, **how), dtype)
    want, got = both(lambda: vertical_slash_index(columns, diagonals, rows, size))
    for name in ("ranges", "range_counts", "columns", "column_counts"):
        assert torch.equal(getattr(want, name), getattr(got, name)), name


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("bits", "axes", "scales"),
    [((8, 8), ("token", "token"), F32), ((4, 4), ("channel", "token"), BF16), ((2, 4), ("channel", "channel"), F32)],
)
def test_quantized_attention(dtype, bits, axes, scales):
    rows, near, dim = 600, 9, 48
    stored = []
    for size, axis in zip(bits, axes, strict=True):
        storage = QuantizedRows.allocate(
            2,
            2,
            rows + 8,
            dim,
            bits=size,
            axis=axis,
            group=40 if axis == "channel" else None,
            scales=scales,
            device=DEVICE,
        )
        storage.step.fill_(math.nan)
        storage.zero.fill_(math.nan)
        quantize_rows(torch.randn(2, 2, rows, dim), storage, 0)
        stored.append(storage)
    query = torch.randn(2, 6, dim).to(dtype)
    recent = cache(2, 2, near, dim, dtype), cache(2, 2, near, dim, dtype)
    how = {"recent": recent, "split": rows, "return_lse": True}
    check_attention(lambda: quantized_decode_attention(query, *stored, **how), dtype)
    ranges = {"starts": ints(3, 0), "lengths": ints(rows + 5, 590)}
    check_attention(lambda: quantized_decode_attention(query, *stored, **how, **ranges), dtype)
    for heads in (2, 6):
        ids = (torch.rand(2, heads, 40) * 580 + 4).int()
        ids[0, :, 0] = rows + 2  # one that is not quantised
        counts = ints(*[7, 40, 0][:1] * (2 * heads)).view(2, heads)
        counts[1] = 40
        listed = {**how, **ranges, "indices": ids, "counts": counts}
        check_attention(lambda listed=listed: quantized_decode_attention(query, *stored, **listed), dtype)
    check_attention(
        lambda: quantized_decode_attention(query, *stored, split=rows, return_lse=True, lengths=ints(0, 600)), dtype
    )


@pytest.mark.parametrize("dtype", [F32, BF16, "int8"], ids=["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("activation", ["silu", "relu", "gelu", "gelu_tanh"])
def test_sparse_mlp(dtype, rows, activation):
    kind = F32 if dtype == "int8" else dtype
    gate, up, down = ((torch.randn(50, 44) / 6).to(kind)[:, :40] for _ in range(3))
    weights = NeuronWeights(
        gate,
        up,
        down,
        torch.randn(50).to(kind),
        torch.randn(50).to(kind),
        torch.randn(40).to(kind),
        activation=activation,
    )
    weights = weights.quantized() if dtype == "int8" else weights
    x = torch.randn(rows, 40).to(kind)
    pick = torch.arange(0, 50, 3, dtype=torch.int32)
    for rule in (
        {"threshold": torch.where(torch.arange(50) % 2 == 0, 0.0, 5.0)},
        {"threshold": torch.tensor(torch.inf)},
        {"count": 50},
        {"count": 0},
        {"indices": pick},
        {"indices": pick[:0]},
    ):
        seen = []

        def call(rule=rule, seen=seen):
            counts = torch.zeros(rows + 1, dtype=torch.int64)
            seen.append(counts)
            return sparse_mlp(x, weights, **rule, counts=counts)

        want, got = both(call)
        close(want, got, kind)
        assert torch.equal(*seen)


@pytest.mark.parametrize(
    ("dtype", "kind", "rows"), [(F32, torch.int32, 1), (BF16, torch.int16, 3), (F16, torch.int32, 8)]
)
@pytest.mark.parametrize(
    ("inputs", "outputs", "density"), [(600, 130, 0.1), (40, 5, 1.0), (512, 128, 0.0), (0, 9, 0.0)]
)
def test_delta_linear(dtype, kind, rows, inputs, outputs, density):
    wide = torch.full((inputs, outputs + 7), math.nan, dtype=dtype)
    weight = wide[:, 2 : outputs + 2]
    weight.copy_(torch.randn(inputs, outputs) / 8)
    before = torch.randint(-30, 30, (rows, inputs + 5)).to(kind)
    now = torch.where(torch.rand(rows, inputs + 5) < density, before + 3, before)
    step = torch.rand(inputs) if rows > 1 else torch.tensor(0.25)
    start = torch.randn(rows, outputs)

    def call():
        output, previous = start.clone(), before.clone()
        counts = delta_linear(output, now[:, 2:-3], previous[:, 2:-3], weight, step)
        return output, previous, counts

    (output, previous, counts), got = both(call)
    close(output, got[0], F32)
    assert torch.equal(previous, got[1])
    assert torch.equal(counts, got[2])
    assert got[2].dtype is torch.int32


@pytest.mark.parametrize(("dtype", "rows"), [(F32, 1), (BF16, 3), (F16, 8)])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(600, 130), (40, 5), (0, 9)])
def test_channel_sparse_linear(dtype, rows, int8, inputs, outputs):
    x = torch.randn(rows, 2 * inputs).to(dtype)[:, ::2]
    if inputs:
        x[0, 0] = math.nan
    weight, scale = (torch.randn(inputs, outputs) / 8).to(dtype), None
    if int8:
        weight, scale = torch.randint(-127, 128, (inputs, outputs), dtype=torch.int8), torch.rand(inputs) / 1000
    for threshold in (None, torch.tensor(1.0), torch.rand(inputs) * 2, torch.tensor(1e9)):
        bias = None if threshold is None else torch.randn(outputs).to(dtype)

        def call(threshold=threshold, bias=bias):
            counts = torch.zeros(rows + 1, dtype=torch.int64)
            return channel_sparse_linear(x, weight, threshold, bias, scale=scale, counts=counts), counts

        (out, counts), (got, got_counts) = both(call)
        assert got.dtype is dtype
        torch.testing.assert_close(got, out, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=True)
        assert torch.equal(counts, got_counts)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "sparsity"), [(1, 8, 40, 0.5), (19, 13, 200, 0.6), (70, 20, 96, 0.0)]
)
def test_sparse_linear(dtype, tokens, outputs, inputs, sparsity):
    kept = (torch.rand(-(-outputs // 4), inputs) >= sparsity).repeat_interleave(4, 0)[:outputs]
    weight = pack((torch.randn(outputs, inputs) * kept / 8).to(dtype), "4x1")
    x = torch.randn(tokens, 2 * inputs).to(dtype)[:, ::2]
    added, bias = torch.randn(tokens, outputs + 3).to(dtype)[:, 3:], torch.randn(outputs).to(dtype)
    for arguments in ((), (bias, "gelu"), (bias, "silu", added), (None, "relu", added), (None, "gelu_tanh")):
        want, got = both(lambda arguments=arguments: sparse_linear(x, weight, *arguments))
        assert got.dtype is dtype
        close(want, got, dtype)


def test_sparse_linear_of_an_empty_weight():
    _, got = both(lambda: sparse_linear(torch.ones(3, 8), pack(torch.zeros(6, 8))))
    assert not got.any()
