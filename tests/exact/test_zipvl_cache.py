"""The cache of ZipVL in mixed precision: its quantisers, what it stores, and attention over it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import InputError
from gossamer.hf.mixed_precision import MixedAttention, MixedPrecisionKV, channel_factors, quantize_part
from gossamer.ops.quantized_kv import pack, unpack


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def states(rows=50, batch=2, heads=3, d=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, heads, rows, d, generator=g)


def layer_of(key, value, important, bits=(4, 2), starts=None):
    layer = MixedPrecisionKV(bits=bits)
    layer.update(key, value)
    layer.compress(important, starts)
    return layer


def by_the_card(rows, bits, dim):
    """x̂ of the card, with minimum and maximum over one dimension."""
    low, high = rows.amin(dim, keepdim=True), rows.amax(dim, keepdim=True)
    delta = (high - low) / (2**bits - 1)
    return ((rows - low) / delta).round() * delta + low, delta


# -- the quantisers (check 7) -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4])
def test_packed_codes_come_back_bit_for_bit(bits):
    codes = torch.randint(0, 2**bits, (3, 5, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack(codes, bits)
    assert packed.shape == (3, 5, 64 * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_keys_by_channel_and_values_by_token_are_the_cards(bits):
    key, value = states()
    ids = torch.tensor([1, 2, 3, 5, 8, 13, 21, 34, 49])
    part = quantize_part(key, value, [ids, ids], bits, scales=torch.float32)
    got_key, got_value = part.dequantize(torch.float32)
    want_key, delta_key = by_the_card(key[:, :, ids], bits, 2)
    c = value[:, :, ids].abs().amax(2, keepdim=True).sqrt()
    want_value, delta_value = by_the_card(value[:, :, ids] / c, bits, 3)
    torch.testing.assert_close(got_key, want_key, atol=1e-5, rtol=0)
    torch.testing.assert_close(got_value, want_value * c, atol=1e-5, rtol=0)
    assert bool(((got_key - key[:, :, ids]).abs() <= delta_key / 2 + 1e-5).all())
    assert bool(((got_value / c - value[:, :, ids] / c).abs() <= delta_value / 2 + 1e-5).all())


def test_rounded_scales_cost_no_more_than_a_step_of_them():
    key, value = states()
    ids = torch.arange(50)
    part = quantize_part(key, value, [ids, ids], 8)
    c = channel_factors(value).unsqueeze(2)
    step = part.value.step.float().unsqueeze(3)
    assert part.value.step.dtype is torch.bfloat16
    assert bool(((part.dequantize(torch.float32)[1] / c - value / c).abs() <= step / 2 + 1e-5).all())


@given(seed=st.integers(0, 999), bits=st.sampled_from([2, 4]), scale=st.sampled_from([1e-4, 1.0, 1e4]))
@settings(max_examples=30, deadline=None)
def test_values_of_rank_one_are_exact(seed, bits, scale):
    """V = |a| ⊗ 1: all channels of a token alike. Then c is one number, and V/c constant in each token.

    (With a channel factor of its own, V = a ⊗ b, no square root makes V/c constant; the card's sentence can only mean this.)
    """
    a = torch.rand(1, 2, 7, 1, generator=torch.Generator().manual_seed(seed)) * scale + 1e-6
    value = a.expand(-1, -1, -1, 16)
    part = quantize_part(torch.zeros_like(value), value, [torch.arange(7)], bits, scales=torch.float32)
    torch.testing.assert_close(part.dequantize(torch.float32)[1], value, rtol=1e-6, atol=0)
    torch.testing.assert_close(part.factor, a.amax(2).sqrt().expand(-1, -1, 16))


def test_the_factor_takes_the_cost_of_outlier_channels_from_the_others():
    key, value = states(batch=1)
    value[..., 5] *= 100
    part = quantize_part(key, value, [torch.arange(50)], 4)
    plain = by_the_card(value, 4, 3)[0]
    others = torch.arange(32) != 5
    error, without = ((x - value)[..., others].square().mean() for x in (part.dequantize(torch.float32)[1], plain))
    assert error < without / 10


def test_a_channel_of_zeros_stays_zero():
    key, value = states(batch=1)
    value[..., 3] = 0
    part = quantize_part(key, value, [torch.arange(50)], 8)
    assert bool((part.factor[..., 3] == 1).all())
    assert float(part.dequantize(torch.float32)[1][..., 3].abs().max()) < 0.02


def test_filling_up_changes_nothing():
    """A sequence with fewer rows has the scales that it has alone."""
    key, value = states()
    ids = [torch.arange(0, 50, 2), torch.tensor([4, 5, 40])]
    both = quantize_part(key, value, ids, 2)
    assert both.counts.tolist() == [25, 3]
    for b in range(2):
        alone = quantize_part(key[b : b + 1], value[b : b + 1], [ids[b]], 2)
        for together, single in zip(both.dequantize(torch.float32), alone.dequantize(torch.float32), strict=True):
            assert torch.equal(together[b : b + 1, :, : len(ids[b])], single)


# -- what is stored (check 8) -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 20, 50, 77])
def test_stored_bits_are_those_of_the_parts(p):
    """p·b_h + (n − p)·b_l bits a value, beside the scales: 2 a channel and part for keys, 2 a token for values, c."""
    key, value = states(rows=77, batch=1, heads=3, d=64)
    layer = layer_of(key, value, [torch.randperm(77)[:p].sort().values])
    codes = sum(x.codes.numel() for part in layer.parts for x in (part.key, part.value))
    assert codes * 8 == 2 * 3 * 64 * (p * 4 + (77 - p) * 2)
    parts = len(layer.parts)
    assert parts == (1 if p == 77 else 2)
    assert layer.nbytes == codes + parts * (2 * 3 * 64 * 2 + 3 * 64 * 4) + 77 * 3 * 2 * 2
    held = sum(
        t.numel() * t.element_size() for part in layer.parts for x in (part.key, part.value) for t in x.tensors()
    )
    held += sum(part.factor.numel() * 4 for part in layer.parts)
    assert layer.nbytes == held, "no storage beside what is counted"
    assert layer.capacity <= 256


def test_rows_come_back_by_token_and_the_newest_as_they_were():
    key, value = states()
    important = [torch.tensor([0, 7, 49]), torch.tensor([20, 21])]
    layer = layer_of(key[:, :, :50], value, important, bits=(8, 4), starts=torch.tensor([0, 20], dtype=torch.int32))
    new_key, new_value = states(rows=3, seed=1)
    layer.update(new_key, new_value)
    keys, values = layer.keys, layer.values
    assert layer.length == layer.get_seq_length() == 53
    assert layer.recent == 3
    assert torch.equal(keys[:, :, 50:], new_key)
    assert torch.equal(values[:, :, 50:], new_value)
    assert bool((keys[1, :, :20] == 0).all()), "padding is not stored"
    for got, want in ((keys, key), (values, value)):
        for b, (ids, first) in enumerate(zip(important, (0, 20), strict=True)):
            error = (got[b, :, first:50] - want[b, :, first:]).abs()
            fine = torch.zeros(50 - first, dtype=torch.bool)
            fine[ids - first] = True
            assert float(error[:, fine].max()) < 0.03
            assert 0.02 < float(error[:, ~fine].max()) < 0.3
    assert torch.equal(layer.positions[0, 0].long(), torch.arange(53))


@pytest.mark.parametrize("reserve", [0, 100, 900, 2000])
def test_full_precision_storage_is_freed(reserve):
    """Room for what was reserved beyond the prompt stays, and at least for a few rows."""
    layer = MixedPrecisionKV(reserve)
    layer.update(*states(rows=900, batch=1))
    layer.compress([torch.arange(5)])
    assert layer.capacity == (1280 if reserve == 2000 else 256)
    layer.update(*states(rows=300, batch=1))
    assert (layer.length, layer.recent) == (1200, 300)


def test_a_second_compression_adds_parts_and_keeps_the_length():
    key, value = states(rows=60)
    layer = layer_of(key[:, :, :40], value[:, :, :40], [torch.arange(10)] * 2)
    layer.update(key[:, :, 40:], value[:, :, 40:])
    before = [part.dequantize(torch.float32) for part in layer.parts]
    layer.compress([torch.tensor([41, 59])] * 2)
    assert (layer.length, layer.recent, len(layer.parts)) == (60, 0, 4)
    assert [part.rows for part in layer.parts] == [10, 30, 2, 18]
    for old, part in zip(before, layer.parts, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(old, part.dequantize(torch.float32), strict=True))
    assert float((layer.keys[:, :, [41, 59]] - key[:, :, [41, 59]]).abs().max()) < 0.3


# -- attention over it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recent", [0, 1, 9])
@pytest.mark.parametrize("padding", [0, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_that_of_the_dequantised_rows(recent, padding, dtype):
    key, value = states().to(dtype)
    starts = torch.tensor([0, padding], dtype=torch.int32)
    layer = layer_of(key, value, [torch.arange(0, 50, 3), torch.arange(30, 40)], starts=starts)
    if recent:
        layer.update(*states(rows=recent, seed=2).to(dtype))
    query = 3 * torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(4)).to(dtype)
    keys, values = layer.keys.float(), layer.values.float()
    logits = torch.einsum("bkgd,bksd->bkgs", query.float().unflatten(1, (3, 2)), keys) * 0.2
    hidden = torch.arange(50 + recent) < starts[:, None]
    weights = logits.masked_fill(hidden[:, None, None], -math.inf).softmax(-1)
    want = torch.einsum("bkgs,bksd->bkgd", weights, values).flatten(1, 2)
    attention = MixedAttention(layer)
    got = attention.dense(query, 50 + recent, scale=0.2, starts=starts)
    tolerance = 1e-3 if dtype is torch.float32 else 3e-2  # the kernel holds queries to 15 bits and weights to 16
    torch.testing.assert_close(got.float(), want, atol=tolerance, rtol=tolerance)
    indices = torch.randint(30, 50, (2, 3, 5), dtype=torch.int32)
    some, rows = attention.listed(query, 50 + recent, indices, torch.full((2, 3), 5, dtype=torch.int32), scale=0.2)
    assert rows == 30
    assert some.shape == query.shape


# -- edits ------------------------------------------------------------------------------------------------------------


def test_sequences_can_be_picked():
    key, value = states()
    layer = layer_of(key, value, [torch.arange(5), torch.arange(9, 20)])
    layer.update(*states(rows=2, seed=1))
    keys = layer.keys
    layer.reorder_cache(torch.tensor([1, 1, 0]))
    assert torch.equal(layer.keys, keys[[1, 1, 0]])
    layer.batch_select_indices(torch.tensor([2]))
    assert torch.equal(layer.keys, keys[[0]])
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.keys, keys[[0, 0]])


def test_only_recent_rows_can_be_taken_back():
    layer = layer_of(*states(), [torch.arange(5)] * 2)
    layer.update(*states(rows=4, seed=1))
    layer.crop(-3)
    assert (layer.length, layer.recent) == (51, 1)
    with pytest.raises(InputError, match="compressed"):
        layer.crop(-2)
    with pytest.raises(InputError, match="compressed"):
        layer.keep(torch.arange(4).expand(2, 3, -1))
    layer.reset()
    assert (layer.length, layer.nbytes, layer.parts) == (0, 0, [])


def test_rows_of_another_shape_or_not_finite_are_refused():
    key, value = states()
    layer = MixedPrecisionKV()
    layer.update(key, value)
    with pytest.raises(InputError, match="within"):
        layer.compress([torch.tensor([50]), torch.tensor([0])])
    with pytest.raises(InputError, match="within"):
        layer.compress([torch.arange(3)] * 2, torch.tensor([2, 0]))
    with pytest.raises(InputError, match="finite"):
        quantize_part(key, value * math.nan, [torch.arange(3)] * 2, 4)
    with pytest.raises(InputError, match="sequences"):
        quantize_part(key, value, [torch.arange(3)], 4)
    with pytest.raises(InputError, match="bits"):
        quantize_part(key, value, [torch.arange(3)] * 2, 3)
    with pytest.raises(InputError, match="channels"):
        quantize_part(key[..., :24], value[..., :24], [torch.arange(3)] * 2, 2)
