"""append_labels and label_scores: native kernels against the reference. Codes and packed scores must agree bit for
bit."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer import ops
from gossamer.errors import InputError

pytestmark = pytest.mark.skipif("native" not in ops.available_backends(), reason="native kernels are not built")


def channels_of(heads, dim, r):
    return torch.stack([torch.randperm(dim)[:r] for _ in range(heads)]).int()


def filled(cache):
    for part in (cache.codes, cache.step, cache.zero):
        if part is not None:
            part.copy_(torch.full_like(part, math.nan if part.is_floating_point() else 255))
    return cache


def same(a, b):
    return torch.equal(
        a.view(torch.uint8) if a.is_floating_point() else a, b.view(torch.uint8) if b.is_floating_point() else b
    )


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_append_and_score(isa, data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    batch, kv_heads, group = (data.draw(st.integers(1, n)) for n in (2, 3, 5))
    dim = data.draw(st.sampled_from([8, 20, 64, 128]))
    r, bits = data.draw(st.integers(1, dim)), data.draw(st.integers(1, 16))
    tokens = data.draw(st.integers(1, 90))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    heads = kv_heads * group
    label_heads = data.draw(st.sampled_from([kv_heads, heads]))
    ids = channels_of(label_heads, dim, r)
    key = torch.randn(batch, tokens + 3, kv_heads, dim, dtype=dtype).transpose(1, 2)[:, :, :tokens]
    cut = data.draw(st.integers(0, tokens))
    caches = []
    for backend in ("native", "reference"):
        cache = filled(ops.LabelCache.allocate(batch, label_heads, tokens + 5, r, bits, dtype))
        with ops.use_backend(backend):
            ops.append_labels(cache, key[:, :, :cut], ids, 0)
            ops.append_labels(cache, key[:, :, cut:], ids, cut)
        caches.append(cache)
    for part in ("codes", "step", "zero"):
        mine, theirs = (getattr(cache, part) for cache in caches)
        assert (mine is None) == (theirs is None)
        assert mine is None or same(mine, theirs), part

    query = torch.randn(batch, heads, dim, dtype=dtype)
    lengths = torch.randint(0, tokens + 1, (batch,), dtype=torch.int32)
    starts = (lengths * torch.rand(batch)).int()
    for reduce in ("none", "max", "sum"):
        scores = []
        for backend in ("native", "reference"):
            with ops.use_backend(backend):
                scores.append(
                    ops.label_scores(
                        query,
                        ids,
                        caches[0],
                        tokens,
                        starts=starts,
                        lengths=lengths,
                        reduce=reduce,
                        kv_heads=kv_heads,
                    )
                )
        exact = bits <= 8 and not (reduce == "sum" and label_heads != kv_heads)
        tolerance = {"atol": 0.0, "rtol": 0.0} if exact else {"atol": 3e-5, "rtol": 3e-5}
        torch.testing.assert_close(*scores, **tolerance)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_long_context_with_threads(isa, bits):
    torch.manual_seed(0)
    key, query = torch.randn(1, 2, 5000, 64), torch.randn(1, 8, 64)
    ids = channels_of(2, 64, 32)
    cache = ops.LabelCache.allocate(1, 2, 5000, 32, bits)
    torch.set_num_threads(3)
    ops.append_labels(cache, key, ids, 0)
    scores = ops.label_scores(query, ids, cache, 5000)
    with ops.use_backend("reference"):
        expected = ops.label_scores(query, ids, cache, 5000)
    torch.testing.assert_close(scores, expected, atol=0.0 if bits <= 8 else 3e-5, rtol=0.0 if bits <= 8 else 3e-5)


def test_extreme_queries_and_keys(isa):
    key = torch.cat([torch.zeros(1, 1, 5, 16), torch.full((1, 1, 5, 16), 3.5), torch.randn(1, 1, 9, 16) * 1e4], dim=2)
    ids = channels_of(1, 16, 7)
    cache = ops.LabelCache.allocate(1, 1, 19, 7, 3)
    ops.append_labels(cache, key, ids, 0)
    for query in (torch.zeros(1, 3, 16), torch.randn(1, 3, 16) * 1e-20, torch.randn(1, 3, 16) * 1e10):
        scores = ops.label_scores(query, ids, cache, 19)
        with ops.use_backend("reference"):
            assert torch.equal(scores, ops.label_scores(query, ids, cache, 19))


def test_bad_keys_do_not_crash(isa):
    key = torch.randn(1, 1, 20, 16)
    key[0, 0, 3] = math.nan
    key[0, 0, 4, 5] = math.inf
    ids = channels_of(1, 16, 16)
    for bits in (1, 4, 8, 12, 16):
        cache = ops.LabelCache.allocate(1, 1, 20, 16, bits)
        ops.append_labels(cache, key, ids, 0)
        scores = ops.label_scores(torch.full((1, 1, 16), math.nan), ids, cache, 20)
        assert scores.shape == (1, 1, 20)


@pytest.mark.parametrize("bad", [-1, 16])
def test_bad_channels_raise(isa, bad):
    ids = torch.tensor([[0, bad]], dtype=torch.int32)
    cache = ops.LabelCache.allocate(1, 1, 20, 2, 4)
    for backend in ("native", "reference"):
        with ops.use_backend(backend):
            with pytest.raises(InputError, match="channels"):
                ops.append_labels(cache, torch.zeros(1, 1, 4, 16), ids, 0)
            with pytest.raises(InputError, match="channels"):
                ops.label_scores(torch.zeros(1, 2, 16), ids, cache, 4)


@pytest.mark.parametrize("select", ["kv_head", "query_head"])
@pytest.mark.parametrize("kv_heads", [1, 3, 4])
def test_threads_do_not_change_what_is_selected(isa, kv_heads, select):
    """Heads that go to threads whole, and heads that are cut among them."""
    torch.manual_seed(kv_heads)
    rows = 20000
    query = torch.randn(1, 2 * kv_heads, 32)
    key, value = torch.randn(1, kv_heads, rows, 32), torch.randn(1, kv_heads, rows, 32)
    key[:, :, 1000:1200] = key[:, :, 900:901]  # ties
    channels = torch.arange(8, dtype=torch.int32).expand(kv_heads, -1).contiguous()
    labels = ops.LabelCache.allocate(1, kv_heads, rows, 8, 4)
    ops.append_labels(labels, key, channels, 0)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.label_attention(query, key, value, channels, labels, 1500, select=select))
    with ops.use_backend("reference"):
        out, indices, counts = ops.label_attention(query, key, value, channels, labels, 1500, select=select)
    for ours in results:
        assert torch.equal(ours[1], results[0][1])
        assert torch.equal(ours[2], counts)
        torch.testing.assert_close(ours[0], out, atol=2e-5, rtol=2e-5)
    assert (results[0][1] == indices).float().mean() > 0.999  # rounding may swap two that are nearly equal
