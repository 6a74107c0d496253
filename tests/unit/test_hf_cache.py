"""The cache layers against the plainest model there is: tensors joined by `torch.cat`."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, StaticCache

from gossamer.errors import InputError
from gossamer.hf import GossamerCache, KVLayer
from gossamer.hf.cache import Derived, adopt, allocate_near

HEADS, DIM = 2, 4


def states(new: int, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, batch, HEADS, new, DIM, generator=generator)
    return key, value


def filled(rows: int, batch: int = 1, reserve: int = 0) -> KVLayer:
    layer = KVLayer(reserve)
    layer.update(*states(rows, batch))
    return layer


def test_update_returns_views_of_the_storage() -> None:
    layer = KVLayer()
    key, value = states(5)
    got_key, got_value = layer.update(key, value)
    assert torch.equal(got_key, key)
    assert torch.equal(got_value, value)
    assert layer.key_storage is not None
    assert got_key.untyped_storage().data_ptr() == layer.key_storage.untyped_storage().data_ptr()
    key.zero_()  # what the caller does with its tensor afterwards is its own business
    assert not torch.equal(got_key, key)


def test_appending_moves_nothing_until_capacity_is_used() -> None:
    layer = filled(3, reserve=600)
    assert layer.key_storage is not None
    assert layer.value_storage is not None
    places = layer.key_storage.data_ptr(), layer.value_storage.data_ptr()
    for _ in range(500):
        layer.update(*states(1))
    assert (layer.key_storage.data_ptr(), layer.value_storage.data_ptr()) == places
    assert layer.keys is not None
    assert layer.keys.data_ptr() == places[0]


def test_capacity_doubles() -> None:
    row, allocations = states(1), []

    def counting(like: Tensor, capacity: int) -> Tensor:
        allocations.append(capacity)
        return allocate_near(like, capacity)

    layer = KVLayer(allocate=counting)
    for _ in range(5000):
        layer.update(*row)
    keys_only = allocations[::2]
    assert len(keys_only) <= 7  # 256, 512, … 8192
    assert all(b >= 2 * a for a, b in pairwise(keys_only))
    assert layer.length == 5000 <= layer.capacity
    assert layer.keys is not None
    assert torch.equal(layer.keys, row[0].expand(-1, -1, 5000, -1))


def test_storage_made_in_inference_mode_can_be_written_outside_it() -> None:
    layer = KVLayer()
    with torch.inference_mode():
        layer.update(*states(250, batch=2))
        layer.reorder_cache(torch.tensor([1, 0]))
    with torch.no_grad():
        layer.update(*states(2, batch=2))
    with torch.inference_mode():
        layer.update(*states(300, batch=2))
        layer.batch_repeat_interleave(2)
    layer.update(*states(1, batch=4))
    assert layer.length == 553


def test_reserve_is_allocated_at_once() -> None:
    assert filled(3, reserve=1000).capacity >= 1000
    cache = GossamerCache(reserve=1000)
    cache.update(*states(3), 1)
    assert [layer.capacity for layer in cache.layers] == [0, 1024]


def test_another_batch_or_model_is_refused() -> None:
    layer = filled(3, batch=2)
    with pytest.raises(InputError, match="holds 2 sequences, this step has 1"):
        layer.update(*states(1, batch=1))
    with pytest.raises(InputError, match="belongs to one model"):
        layer.update(*(x[:, :1] for x in states(1, batch=2)))  # would be repeated over the heads in silence
    with pytest.raises(InputError, match="belongs to one model"):
        layer.update(*(x[..., :1] for x in states(1, batch=2)))
    assert layer.length == 3


def test_bytes_count_used_rows_only() -> None:
    layer = filled(5, batch=2, reserve=1000)
    assert layer.nbytes == 5 * 2 * HEADS * 2 * DIM * 4
    cache = GossamerCache()
    assert cache.nbytes == 0
    cache.update(*states(5), 0)
    assert cache.nbytes == 5 * HEADS * 2 * DIM * 4


def test_crop_takes_negative_numbers_only() -> None:
    layer = filled(5)
    with pytest.raises(InputError, match="negative"):
        layer.crop(3)
    layer.crop(0)
    assert layer.length == 5
    layer.crop(-2)
    assert layer.length == 3
    layer.crop(-20)
    assert layer.length == 0


def test_reset_drops_everything() -> None:
    layer = filled(5)
    layer.reset()
    assert not layer.is_initialized
    assert layer.keys is None
    assert layer.get_seq_length() == 0
    layer.update(*states(2, batch=3))  # another batch is fine now
    assert layer.length == 2


def test_gradients_flow_through_appended_rows() -> None:
    layer, parts = KVLayer(), [states(n, seed=n) for n in (2, 3)]
    for key, value in parts:
        key.requires_grad_()
        out_key, out_value = layer.update(key, value)
        (out_key.square().sum() + out_value.sum()).backward(retain_graph=True)
    assert parts[0][0].grad is not None
    torch.testing.assert_close(parts[0][0].grad, 4 * parts[0][0].detach())  # read twice
    with torch.no_grad():
        layer.update(*states(1))
    assert layer.length == 6


class Owner:
    """Stands for a runtime: something that can be weakly referenced."""


def derived(layer: KVLayer, rows: int) -> tuple[Owner, Derived]:
    owner, state, view = Owner(), Derived(), Owner()
    state.rows = rows
    view.state, view.prefill_state, view.cache_state = state, None, None  # type: ignore[attr-defined]
    layer.views[owner] = view
    return owner, state


def test_crop_lowers_derived_rows_and_batch_changes_drop_them() -> None:
    layer = filled(10, batch=2)
    owner, state = derived(layer, 8)
    layer.crop(-1)
    assert state.rows == 8
    layer.crop(-4)
    assert state.rows == 5
    layer.update(*states(3, batch=2))
    assert state.rows == 5  # rows 5… are new
    layer.reorder_cache(torch.tensor([1, 0]))
    assert owner not in layer.views


# Each step of a sequence: (name, argument). Model: keys and values joined by cat.
Step = tuple[str, int]
steps = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 300)),
        st.tuples(st.just("crop"), st.integers(0, 400)),
        st.tuples(st.just("reorder"), st.integers(0, 2**16)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("select"), st.integers(0, 2**16)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(steps, st.integers(1, 3), st.sampled_from([0, 700]))
def test_any_sequence_of_edits_equals_cat(sequence: list[Step], batch: int, reserve: int) -> None:
    layer, key, value = KVLayer(reserve), torch.empty(batch, HEADS, 0, DIM), torch.empty(batch, HEADS, 0, DIM)
    for number, (name, n) in enumerate(sequence):
        started, batch = layer.is_initialized, key.shape[0]
        if name == "update":
            new = states(n, batch, seed=number)
            key, value = torch.cat([key, new[0]], 2), torch.cat([value, new[1]], 2)
            got = layer.update(*new)
            assert torch.equal(got[0], key)
            assert torch.equal(got[1], value)
        elif name == "crop":
            layer.crop(-n)
            key, value = (x[:, :, : max(0, key.shape[2] - n)] for x in (key, value))
        elif name == "reset":
            layer.reset()
            key, value = key[:, :, :0], value[:, :, :0]
        elif (started and key.shape[0] * n <= 12) or name != "repeat":
            if name == "repeat":
                layer.batch_repeat_interleave(n)
                index = torch.arange(batch).repeat_interleave(n)
            else:
                generator = torch.Generator().manual_seed(n)
                count = batch if name == "reorder" else int(torch.randint(1, batch + 1, (), generator=generator))
                index = torch.randint(0, batch, (count,), generator=generator)
                (layer.reorder_cache if name == "reorder" else layer.batch_select_indices)(index)
            if started:  # an empty layer has no batch yet
                key, value = key[index], value[index]
        assert layer.get_seq_length() == key.shape[2]
        assert layer.get_mask_sizes(3) == (key.shape[2] + 3, 0)
    if layer.is_initialized:
        assert layer.keys is not None
        assert layer.values is not None
        assert torch.equal(layer.keys, key)
        assert torch.equal(layer.values, value)


def test_adopt_keeps_the_object_and_its_rows() -> None:
    cache = DynamicCache()
    key, value = states(7)
    cache.update(key, value, 0)
    assert adopt(cache) is cache
    assert isinstance(cache.layers[0], KVLayer)
    assert torch.equal(cache.layers[0].keys, key)
    assert torch.equal(cache.layers[0].values, value)
    first = cache.layers[0]
    assert adopt(cache).layers[0] is first  # once is enough
    cache.update(key, value, 1)  # layers made later are ours too
    assert isinstance(cache.layers[1], KVLayer)
    assert cache.get_seq_length() == 7


def test_adopt_takes_a_cache_back_and_forth() -> None:
    cache = adopt(DynamicCache())
    cache.update(*states(3), 0)
    assert adopt(cache) is cache
    assert cache.get_seq_length() == 3
    ours = GossamerCache()
    assert adopt(ours) is ours


def test_adopt_refuses_foreign_storage_in_one_line() -> None:
    from gossamer.models import tiny_model

    config = tiny_model("mistral", sliding_window=4).config
    for cache in (StaticCache(config=config, max_cache_len=8), DynamicCache(config=config, offloading=True), object()):
        with pytest.raises(InputError) as caught:
            adopt(cache)
        assert "\n" not in str(caught.value)
        assert "DynamicCache" in str(caught.value)


def test_adopt_refuses_a_window_that_has_dropped_rows() -> None:
    from gossamer.models import tiny_model

    config = tiny_model("mistral", sliding_window=4).config
    inside, past = DynamicCache(config=config), DynamicCache(config=config)
    inside.update(*states(2), 0)
    assert torch.equal(adopt(inside).layers[0].keys, states(2)[0])
    past.update(*states(9), 0)
    with pytest.raises(InputError, match="already dropped rows"):
        adopt(past)
