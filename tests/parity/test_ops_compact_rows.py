"""compact_rows and merge_rows: native kernels, every instruction set that runs here, against the reference."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer import ops
from gossamer.errors import InputError

pytestmark = pytest.mark.skipif("native" not in ops.available_backends(), reason="native kernels are not built")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def storage(batch, heads, rows, width, dtype, layout):
    """Rows of random bytes, in a plain layout or as views whose heads or rows lie apart."""
    raw = torch.randint(0, 256, (batch, heads, rows + 3, width + 2, dtype.itemsize), dtype=torch.uint8)
    raw = raw.view(dtype)[..., 0] if dtype.itemsize > 1 else raw[..., 0]
    if dtype.is_floating_point:  # torch does not keep the bits of a NaN
        raw = raw.nan_to_num()
    if layout == "whole":
        return raw.contiguous()
    if layout == "gaps":
        return raw[:, :, :rows, 1 : width + 1]
    if layout == "line":
        return raw[..., 0]
    return raw.transpose(1, 2).contiguous().transpose(1, 2)[:, :, :rows]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_rows_that_stay_move_to_the_front(isa, data):
    batch, heads, rows, width = (data.draw(st.integers(1, n)) for n in (2, 4, 60, 9))
    dtype = data.draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.int32, torch.float64]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    torch.set_num_threads(data.draw(st.sampled_from([1, 2])))
    rows_in = storage(batch, heads, rows, width, dtype, data.draw(st.sampled_from(["whole", "gaps", "line", "turned"])))
    kept = data.draw(st.integers(0, rows))
    ids = torch.stack([torch.randperm(rows)[:kept].sort().values for _ in range(batch * heads)]).view(
        batch, heads, kept
    )
    if data.draw(st.booleans()):  # most rows stay, as when one row goes
        kept = rows - 1
        ids = torch.arange(kept).expand(batch, heads, kept) + (
            torch.arange(kept) >= torch.randint(rows, (batch, heads, 1))
        )
    ids = ids.to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    want = rows_in.clone()
    with ops.use_backend("reference"):
        ops.compact_rows(want, ids, length=rows)
    got = rows_in.clone(memory_format=torch.preserve_format)
    untouched = got.clone()
    ops.compact_rows(got, ids, length=rows)
    assert torch.equal(got[:, :, :kept], want[:, :, :kept])
    assert torch.equal(got[:, :, rows:], untouched[:, :, rows:])


@pytest.mark.parametrize("ids", [[1, 0], [0, 0], [0, 6], [-1, 2]])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_ids_that_do_not_ascend_within_the_rows_raise_and_move_nothing(isa, ids, backend):
    rows = torch.randn(1, 2, 8, 3)
    before = rows.clone()
    with ops.use_backend(backend), pytest.raises(InputError, match="ascend"):
        ops.compact_rows(rows, torch.tensor([[[2, 3], ids]]), length=6)
    assert torch.equal(rows, before)


@pytest.mark.parametrize(
    ("shape", "ids", "length"),
    [
        ((1, 2, 8), torch.zeros(1, 1, 1).long(), None),
        ((1, 2), torch.zeros(1, 2, 1).long(), None),
        ((1, 2, 8, 3), torch.zeros(1, 2, 1), None),
        ((1, 2, 8, 3), torch.zeros(1, 2).long(), None),
        ((1, 2, 8, 3), torch.zeros(1, 2, 1).long(), 9),
        ((1, 2, 8, 3), torch.arange(4).expand(1, 2, 4), 3),
    ],
)
def test_shapes_that_do_not_fit_are_one_line(shape, ids, length):
    with pytest.raises(InputError) as error:
        ops.compact_rows(torch.zeros(shape), ids, length=length)
    assert "\n" not in str(error.value)


def merge_case(batch, heads, rows, dim, count, dtype):
    buffer = torch.full((batch, rows + 2, heads, dim + 1), math.nan, dtype=dtype).transpose(1, 2)
    data = buffer[:, :, :rows, :dim]
    data.normal_()
    order = torch.stack([torch.randperm(rows) for _ in range(batch * heads)]).view(batch, heads, rows)
    half = max(1, rows // 2)
    sources = order.gather(2, torch.randint(half, rows, (batch, heads, count)))
    targets = order.gather(2, torch.randint(0, half, (batch, heads, count)))
    targets[torch.rand(targets.shape) < 0.3] = -1
    return data, torch.rand(batch, heads, rows), sources.int(), targets.int()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_merging(isa, data):
    batch, heads, rows, count = (data.draw(st.integers(n, m)) for n, m in ((1, 2), (1, 4), (2, 90), (0, 100)))
    dim, dtype = (
        data.draw(st.sampled_from([1, 20, 64, 72])),
        data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
    )
    torch.manual_seed(data.draw(st.integers(0, 99)))
    torch.set_num_threads(data.draw(st.sampled_from([1, 2])))
    rows_in, scores, sources, targets = merge_case(batch, heads, rows, dim, count, dtype)
    scores[torch.rand(scores.shape) < 0.1] = 0
    keep_norm = data.draw(st.booleans())
    want, got = rows_in.clone(), rows_in.clone()
    with ops.use_backend("reference"):
        want_scores = ops.merge_rows(want, scores, sources, targets, keep_norm=keep_norm)
    got_scores = ops.merge_rows(got, scores, sources, targets, keep_norm=keep_norm)
    torch.testing.assert_close(got_scores, want_scores)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    still = torch.ones(batch, heads, rows + 1, dtype=torch.bool)
    still.scatter_(2, targets.long().masked_fill(targets < 0, rows), False)
    assert torch.equal(got[still[..., :rows]], rows_in[still[..., :rows]])


@pytest.mark.parametrize(
    ("sources", "targets", "match"),
    [
        ([3], [9], "row id"),
        ([10], [0], "row id"),
        ([-1], [0], "row id"),
        ([3], [-2], "row id"),
        ([3, 4], [4, 0], "both"),
    ],
)
def test_bad_merges_raise_and_change_nothing(isa, sources, targets, match):
    rows, scores = torch.randn(1, 2, 9, 4), torch.ones(1, 2, 9)
    before = rows.clone()
    fine = torch.full((len(sources),), 2), torch.full((len(sources),), 1)
    ids = [torch.stack([x, torch.tensor(y)])[None] for x, y in zip(fine, (sources, targets), strict=True)]
    for backend in ("native", "reference"):
        with ops.use_backend(backend), pytest.raises(InputError, match=match):
            ops.merge_rows(rows, scores, *ids)
        assert torch.equal(rows, before)


def test_operators_pass_the_checks_of_torch_library():
    utils = ("test_schema", "test_faketensor")
    rows, scores, sources, targets = merge_case(1, 2, 12, 4, 5, torch.float32)
    rows = rows.contiguous()
    torch.library.opcheck(
        torch.ops.gossamer.compact_rows, (rows, torch.tensor([[[1, 3], [0, 2]]]), 12), test_utils=utils
    )
    torch.library.opcheck(torch.ops.gossamer.merge_rows, (rows, scores, sources, targets, True), test_utils=utils)


@pytest.mark.parametrize("dropped", [1, 2, 9, 300])
def test_threads_share_a_head(isa, dropped):
    rows = torch.randn(1, 3, 2000, 5)
    torch.manual_seed(dropped)
    ids = torch.stack([torch.randperm(2000)[dropped:].sort().values for _ in range(3)])[None]
    want = rows.gather(2, ids[..., None].expand(-1, -1, -1, 5))
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        got = rows.clone()
        ops.compact_rows(got, ids)
        assert torch.equal(got[:, :, : 2000 - dropped], want)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_matching(isa, data):
    batch, heads, rows, m, n = (
        data.draw(st.integers(low, high)) for low, high in ((1, 2), (1, 3), (1, 200), (0, 150), (0, 150))
    )
    dim, value_dim = (data.draw(st.sampled_from([1, 20, 64])) for _ in range(2))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    torch.set_num_threads(data.draw(st.sampled_from([1, 2])))
    key, value = (
        torch.full((batch, heads, rows + 1, d + 1), math.nan, dtype=dtype)[:, :, :rows, :d] for d in (dim, value_dim)
    )
    for x in (key, value):
        x.normal_()
        x[torch.rand(x.shape[:3]) < 0.05] = 0
        x[torch.rand(x.shape[:3]) < 0.02] = math.nan
    sources, centres = (torch.randint(-1, rows, (batch, heads, k), dtype=torch.int32) for k in (m, n))
    tau = data.draw(st.sampled_from([0.0, 0.1, 0.4]))
    with ops.use_backend("reference"):
        want = ops.best_match(key, value, sources, centres, tau)
    got = ops.best_match(key, value, sources, centres, tau)
    if dim > 1 or value_dim > 1:  # with one element each, cosines are 1 or rounded just below it: ties either way
        wrong = (got != want).nonzero()
        assert len(wrong) <= 1 + m // 50, "only rounding decides otherwise"
        for b, h, i in wrong.tolist():
            likes = [likeness(key, value, b, h, sources[b, h, i], j, tau) for j in (got[b, h, i], want[b, h, i])]
            assert math.isclose(*likes, rel_tol=1e-4, abs_tol=1e-5)


def likeness(key, value, b, h, i, j, tau):
    if j < 0:
        return tau
    pairs = [(x[b, h, i].double(), x[b, h, j].double()) for x in (key, value)]
    return math.prod(max(0.0, float(x @ y / max(float(x.norm() * y.norm()), 1e-30))) for x, y in pairs)


def test_bad_ids_of_a_match_raise(isa):
    rows, fine = torch.randn(1, 2, 9, 4), torch.zeros(1, 2, 3).int()
    for bad in (-2, 9):
        wrong = fine.clone()
        wrong[0, 1, 2] = bad
        for backend in ("native", "reference"):
            for ids in ((wrong, fine), (fine, wrong)):
                with ops.use_backend(backend), pytest.raises(InputError, match="row id"):
                    ops.best_match(rows, rows, *ids, 0.5)
