"""attention_columns and attention_row against the whole attention map."""

import math

import pytest
import torch

from gossamer.errors import InputError
from gossamer.ops.attention_statistics import attention_columns, attention_row


def tensors(batch=2, heads=6, kv_heads=2, new=20, rows=20, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(batch, heads, new, dim, generator=generator)
    key = torch.randn(batch, kv_heads, rows, dim, generator=generator)
    return query, key


def whole_map(query, key, scale, starts=None, window=None, causal=True, positions=None):
    """[B, Hkv, g, T, S], rows of padding all zero."""
    batch, _, new, dim = query.shape
    kv_heads, rows = key.shape[1:3]
    grouped = query.double().reshape(batch, kv_heads, -1, new, dim)
    logits = torch.einsum("bkgtd,bksd->bkgts", grouped, key.double()) * scale
    at = torch.arange(rows - new, rows) if positions is None else positions
    seen = torch.ones(batch, 1, 1, new, rows, dtype=torch.bool)
    column = torch.arange(rows)
    if causal:
        seen &= column <= at[:, None]
    if window:
        seen &= column > at[:, None] - window
    if starts is not None:
        seen &= column >= starts[:, None, None, None, None]
        seen &= (at >= starts[:, None])[:, None, None, :, None]
    return logits.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)


@pytest.mark.parametrize("block", [1, 3, 7, 128])
@pytest.mark.parametrize("new", [1, 13, 20])
@pytest.mark.parametrize("settings", [{}, {"window": 5}, {"causal": False}, {"starts": torch.tensor([0, 11])}])
def test_columns_are_sums_of_the_map(block, new, settings):
    query, key = tensors(new=new)
    weights = torch.rand(new)
    want = torch.einsum("t,bkgts->bks", weights.double(), whole_map(query, key, 0.3, **settings))
    got = attention_columns(query, key, row_weights=weights, scale=0.3, block=block, **settings)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-6)


def test_two_rows_by_hand():
    query = torch.tensor([[[[0.0], [1.0]]]])
    key = torch.tensor([[[[0.0], [math.log(3)]]]])
    got = attention_columns(query, key, row_weights=torch.tensor([0.5, 1.0]), scale=1.0)
    torch.testing.assert_close(got, torch.tensor([[[0.5 + 0.25, 0.75]]]))


def test_weights_may_differ_by_sequence_and_default_to_one():
    query, key = tensors()
    weights = torch.rand(2, 20)
    want = torch.einsum("bt,bkgts->bks", weights.double(), whole_map(query, key, 8**-0.5))
    torch.testing.assert_close(attention_columns(query, key, row_weights=weights), want.float(), rtol=1e-5, atol=1e-6)
    ones = attention_columns(query, key)
    torch.testing.assert_close(ones.sum(-1), torch.full((2, 2), 60.0))


def test_chosen_rows_stand_where_they_say():
    query, key = tensors()
    at = torch.tensor([17, 3, 9])
    whole = attention_columns(query, key, row_weights=torch.zeros(20).index_fill(0, at, 1.0), window=6)
    torch.testing.assert_close(attention_columns(query[:, :, at], key, positions=at, window=6, block=2), whole)


def test_blocks_of_weight_zero_are_not_computed():
    query, key = tensors()
    query[:, :, :16] = math.nan
    weights = torch.tensor([0.0] * 16 + [1.0] * 4)
    got = attention_columns(query, key, row_weights=weights, block=4)
    torch.testing.assert_close(got, attention_columns(query[:, :, 16:], key))


def test_padding_is_neither_counted_nor_seen_whatever_it_holds():
    query, key = tensors()
    starts = torch.tensor([0, 11], dtype=torch.int32)
    want = attention_columns(query, key, starts=starts)
    assert bool((want[1, :, :11] == 0).all())
    key[1, :, :11] = math.nan
    assert torch.equal(attention_columns(query, key, starts=starts), want)
    torch.testing.assert_close(want[1:, :, 11:], attention_columns(query[1:, :, 11:], key[1:, :, 11:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_accumulated_in_float32(dtype):
    query, key = (x.to(dtype) for x in tensors())
    got = attention_columns(query, key)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, attention_columns(query.float(), key.float()))
    torch.testing.assert_close(attention_row(query[:, :, -1], key), attention_row(query[:, :, -1].float(), key.float()))


def test_views_of_a_larger_cache_are_fine_and_inputs_untouched():
    query, storage = tensors(rows=40)
    key = storage.narrow(2, 0, 20)
    before = query.clone(), storage.clone()
    torch.testing.assert_close(attention_columns(query, key), attention_columns(query, key.contiguous()))
    attention_row(query[:, :, 0], key)
    assert torch.equal(query, before[0])
    assert torch.equal(storage, before[1])


@pytest.mark.parametrize("settings", [{}, {"window": 5}, {"starts": torch.tensor([0, 11], dtype=torch.int32)}])
def test_a_row_is_a_block_of_one(settings):
    query, key = tensors(new=1)
    got = attention_row(query[:, :, 0], key, scale=0.3, **settings)
    torch.testing.assert_close(got, attention_columns(query, key, scale=0.3, **settings))
    torch.testing.assert_close(got.sum(-1), torch.full((2, 2), 3.0))


BAD = [
    {"block": 0},
    {"window": 0},
    {"window": 4, "causal": False},
    {"row_weights": torch.ones(19)},
    {"row_weights": torch.ones(3, 20)},
    {"starts": torch.zeros(3, dtype=torch.int32)},
    {"starts": torch.zeros(2)},
    {"positions": torch.arange(5)},
    {"positions": torch.arange(20) + 1},
]


@pytest.mark.parametrize("settings", BAD)
def test_bad_arguments_are_one_line(settings):
    query, key = tensors()
    with pytest.raises(InputError) as error:
        attention_columns(query, key, **settings)
    assert "\n" not in str(error.value)


def test_shapes_that_do_not_fit_are_one_line():
    query, key = tensors()
    wrong = [(query[0], key), (query, key[0]), (query[:, :5], key), (query[..., :4], key), (query, key[:, :, :10])]
    wrong += [(query.double(), key), (query[:1], key)]
    for q, k in wrong:
        with pytest.raises(InputError) as error:
            attention_columns(q, k)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="attention_row"):
        attention_row(query, key)
