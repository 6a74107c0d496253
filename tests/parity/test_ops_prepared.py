"""Prepared attention means what the operators mean, wherever it takes its shortcut and wherever it doesn't."""

import copy
import math

import pytest
import torch

from gossamer import ops
from gossamer.errors import InputError

pytestmark = pytest.mark.skipif("native" not in ops.available_backends(), reason="native kernels are not built")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def storage(batch=2, kv_heads=3, capacity=80, dim=32, used=60, dtype=torch.float32):
    torch.manual_seed(0)
    key, value = (torch.full((batch, kv_heads, capacity, dim), math.nan, dtype=dtype) for _ in range(2))
    for x in (key, value):
        x[:, :, :used] = torch.randn(batch, kv_heads, used, dim).to(dtype)
    return key, value


@DTYPES
@pytest.mark.parametrize("starts", [None, [3, 0]], ids=["whole", "starts"])
@pytest.mark.parametrize("view", [False, True])
def test_dense(dtype, starts, view):
    key, value = storage(dtype=dtype)
    starts = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    attention = ops.PreparedAttention(key, value)
    for length in (1, 30, 60):
        query = torch.randn(2, 1, 9, 64).to(dtype).transpose(1, 2).squeeze(2)[..., ::2] if view else None
        query = torch.randn(2, 9, 32).to(dtype) if query is None else query
        low = None if starts is None else starts.clamp_max(length - 1)
        wanted = ops.decode_attention(query, key[:, :, :length], value[:, :, :length], starts=low, scale=0.2)
        assert torch.equal(attention.dense(query, length, scale=0.2, starts=low), wanted)


@pytest.mark.parametrize("heads", [3, 9])
def test_listed(heads):
    key, value = storage()
    attention, query = ops.PreparedAttention(key, value), torch.randn(2, 9, 32)
    indices = torch.randint(0, 50, (2, heads, 7), dtype=torch.int32)
    counts = torch.randint(0, 8, (2, heads), dtype=torch.int32)
    out, rows = attention.listed(query, 50, indices, counts, scale=0.2)
    wanted = ops.decode_attention(query, key[:, :, :50], value[:, :, :50], indices=indices, counts=counts, scale=0.2)
    assert torch.equal(out, wanted)
    assert rows == int(counts.sum())
    out, rows = attention.listed(query, 50, indices.long(), counts.long(), scale=0.2)
    assert torch.equal(out, wanted)
    assert rows == int(counts.sum())


def test_bad_calls_raise_as_the_operator_does():
    key, value = storage()
    attention, query = ops.PreparedAttention(key, value), torch.randn(2, 9, 32)
    ids, counts = torch.full((2, 3, 4), 50, dtype=torch.int32), torch.full((2, 3), 4, dtype=torch.int32)
    with pytest.raises(InputError, match="outside the rows"):
        attention.listed(query, 50, ids, counts, scale=1.0)
    with pytest.raises(InputError, match="counts must lie"):
        attention.listed(query, 51, ids, counts + 1, scale=1.0)
    with pytest.raises(InputError, match="does not fit"):
        attention.dense(torch.randn(2, 8, 32), 50, scale=1.0)
    with pytest.raises(InputError, match="share one float dtype"):
        attention.dense(query.bfloat16(), 50, scale=1.0)
    with pytest.raises(InputError, match="0 <= start"):
        attention.dense(query, 5, scale=1.0, starts=torch.tensor([0, 6], dtype=torch.int32))


def labels_for(key, channels, bits):
    cache = ops.LabelCache.allocate(key.shape[0], channels.shape[0], key.shape[2], channels.shape[1], bits, key.dtype)
    for part in (cache.codes, cache.step, cache.zero):
        if part is not None:
            part.zero_()
    return cache


@DTYPES
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize(("select", "label_heads"), [("kv_head", 3), ("query_head", 3), ("query_head", 9)])
def test_label_attention_appends_and_attends(dtype, bits, select, label_heads):
    key, value = storage(dtype=dtype)
    channels = torch.stack([torch.randperm(32)[:8] for _ in range(label_heads)]).int()
    ours, theirs = labels_for(key, channels, bits), labels_for(key, channels, bits)
    attention = ops.PreparedLabelAttention(key, value, channels, ours, select=select)
    done = 0
    for length, k in ((40, 5), (41, 60), (42, 6), (60, 9)):
        query = torch.randn(2, 9, 32).to(dtype)
        ops.append_labels(theirs, key[:, :, done:length], channels, done)
        out, indices, counts = ops.label_attention(
            query, key[:, :, :length], value[:, :, :length], channels, theirs, k, select=select, scale=0.2
        )
        mine, rows = attention.attend(query, length, k, append=(done, length), scale=0.2)
        assert torch.equal(mine, out)
        assert rows == int(counts.sum())
        assert torch.equal(attention.chosen[0], indices)
        assert torch.equal(attention.chosen[1], counts)
        assert torch.equal(ours.codes, theirs.codes)
        done = length


def test_a_forced_backend_is_obeyed():
    key, value = storage()
    query, channels = torch.randn(2, 9, 32), torch.arange(8, dtype=torch.int32).expand(3, -1).contiguous()
    attention = ops.PreparedLabelAttention(key, value, channels, labels_for(key, channels, 4))
    native = attention.attend(query, 60, 9, append=(0, 60), scale=0.2)
    chosen = [x.clone() for x in attention.chosen]
    with ops.use_backend("reference"):
        reference = attention.attend(query, 60, 9, append=(0, 60), scale=0.2)
        dense = attention.dense(query, 60, scale=0.2)
    torch.testing.assert_close(native[0], reference[0])
    assert native[1] == reference[1] == 2 * 3 * 9
    assert torch.equal(chosen[0], attention.chosen[0])
    torch.testing.assert_close(attention.dense(query, 60, scale=0.2), dense)


def test_copies_are_independent():
    key, value = storage()
    channels = torch.arange(8, dtype=torch.int32).expand(3, -1).contiguous()
    attention = ops.PreparedLabelAttention(key, value, channels, labels_for(key, channels, 4))
    query = torch.randn(2, 9, 32)
    out, _ = attention.attend(query, 60, 9, append=(0, 60), scale=0.2)
    other = copy.deepcopy(attention)
    key.zero_()
    assert other.key is not key
    assert torch.equal(other.attend(query, 60, 9, scale=0.2)[0], out)


def test_gradients_reach_the_storage():
    key, value = storage(used=80)
    value.requires_grad_()
    out = ops.PreparedAttention(key, value).dense(torch.randn(2, 9, 32), 50, scale=0.2)
    assert out.requires_grad
