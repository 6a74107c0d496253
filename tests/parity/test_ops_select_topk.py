"""select_topk and label_attention: native kernels against the reference."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer import ops
from gossamer.errors import InputError

pytestmark = pytest.mark.skipif("native" not in ops.available_backends(), reason="native kernels are not built")


def assert_same_selection(scores, k, **kwargs):
    actual = ops.select_topk(scores, k, **kwargs)
    with ops.use_backend("reference"):
        expected = ops.select_topk(scores, k, **kwargs)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_small_lines(isa, data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    batch, heads, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(0, 200))
    scores = torch.randn(batch, heads, tokens + 2)[..., :tokens]
    if data.draw(st.booleans()):
        scores = scores.round()  # many ties, both zeros
    special = torch.rand_like(scores)
    scores = scores.masked_fill(special < 0.05, math.nan).masked_fill(special > 0.9, -math.inf)
    scores = scores.masked_fill((special > 0.5) & (special < 0.52), math.inf)
    lengths = torch.randint(0, tokens + 1, (batch,), dtype=torch.int32)
    starts = (lengths * torch.rand(batch)).int()
    k = data.draw(st.integers(1, tokens + 5))
    assert_same_selection(scores, k, starts=starts, lengths=lengths)
    assert_same_selection(scores, k)


@pytest.mark.parametrize("tokens", [9000, 40001])
@pytest.mark.parametrize("share", [1e-9, 1 / 64, 1 / 16, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "sorted", "heavy", "mostly_masked", "wave", "negative"])
def test_long_lines(isa, tokens, share, kind):
    torch.manual_seed(1)
    scores = torch.randn(1, 2, tokens)
    position = torch.arange(tokens).float()
    if kind == "ties":
        scores = (scores * 2).round()
    elif kind == "constant":
        scores.fill_(0.25)
    elif kind == "sorted":
        scores = position.expand(1, 2, -1).contiguous()
    elif kind == "heavy":
        scores = scores**9
    elif kind == "mostly_masked":
        scores[..., 300:] = -math.inf
    elif kind == "wave":  # a rhythm that a strided sample would fall for
        scores = torch.sin(position * 2 * math.pi / 40).expand(1, 2, -1) + scores * 1e-3
    elif kind == "negative":
        scores = -scores.abs() - 1e30
    assert_same_selection(scores, max(1, int(tokens * share)))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_label_attention(isa, data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    batch, kv_heads, group = (data.draw(st.integers(1, n)) for n in (3, 3, 5))
    tokens, dim = data.draw(st.integers(1, 200)), data.draw(st.sampled_from([16, 40, 64]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    bits, r = data.draw(st.sampled_from([1, 3, 4, 8, 12, 16])), data.draw(st.integers(1, 16))
    heads = kv_heads * group
    label_heads = data.draw(st.sampled_from([kv_heads, heads]))
    ids = torch.stack([torch.randperm(dim)[:r] for _ in range(label_heads)]).int()
    query = torch.randn(batch, heads, dim, dtype=dtype)
    key, value = (torch.randn(batch, kv_heads, tokens, dim, dtype=dtype) for _ in range(2))
    cache = ops.LabelCache.allocate(batch, label_heads, tokens, r, bits, dtype)
    ops.append_labels(cache, key, ids, 0)
    lengths = torch.randint(0, tokens + 1, (batch,), dtype=torch.int32)
    starts = (lengths * torch.rand(batch)).int()
    select, reduce = data.draw(st.sampled_from([("query_head", None), ("kv_head", "max"), ("kv_head", "sum")]))
    k = data.draw(st.integers(1, tokens + 3))
    protect = data.draw(st.booleans())
    for b in range(batch):
        for x in (key, value):
            x[b, :, : starts[b]] = math.nan
            x[b, :, lengths[b] :] = math.nan
    torch.set_num_threads(data.draw(st.sampled_from([1, 1, 2])))
    args = {"starts": starts, "lengths": lengths, "select": select, "reduce": reduce, "protect_last": protect}
    out, indices, counts = ops.label_attention(query, key, value, ids, cache, k, **args)
    torch.set_num_threads(1)
    kept = (lengths - starts).clamp(max=k)
    assert torch.equal(counts, kept[:, None].expand_as(counts))
    with ops.use_backend("reference"):
        expected = ops.decode_attention(query, key, value, indices=indices, counts=counts)
        scores = ops.label_scores(
            query, ids, cache, tokens, starts=starts, lengths=lengths, reduce=reduce or "none", kv_heads=kv_heads
        )
        if bits <= 8 and not (reduce == "sum" and label_heads != kv_heads):  # else rounding may swap near ties
            theirs = ops.label_attention(query, key, value, ids, cache, k, **args)
            assert torch.equal(indices, theirs[1])
    tolerance = 2e-5 if dtype is torch.float32 else 1.6e-2
    torch.testing.assert_close(out.float(), expected.float(), atol=tolerance, rtol=tolerance)
    for b in range(batch):
        if kept[b] and protect:
            assert (indices[b, :, kept[b] - 1] == lengths[b] - 1).all()
        for h in range(indices.shape[1]):  # no token left out beats one that was taken
            chosen = indices[b, h, : counts[b, h]].long()
            rest = scores[b, h].clone()
            rest[chosen] = -math.inf
            if protect and len(chosen):
                chosen = chosen[:-1]
            if len(chosen):
                assert rest.max() <= scores[b, h, chosen].min() + 1e-3


def test_label_attention_bad_input(isa):
    query, key = torch.randn(1, 4, 16), torch.randn(1, 2, 30, 16)
    ids = torch.tensor([[0, 1], [2, 99]], dtype=torch.int32)
    cache = ops.LabelCache.allocate(1, 2, 30, 2, 4)
    with pytest.raises(InputError, match="channels"):
        ops.label_attention(query, key, key, ids, cache, 4)
    ids[1, 1] = 3
    ops.append_labels(cache, key, ids, 0)
    with pytest.raises(InputError, match="length"):
        ops.label_attention(query, key, key, ids, cache, 4, lengths=torch.tensor([31], dtype=torch.int32))
