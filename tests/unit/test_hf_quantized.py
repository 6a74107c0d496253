"""The quantised cache layer against plain tensors, and in a model."""

import copy

import pytest
import torch

from gossamer.errors import InputError
from gossamer.hf import AttentionRuntime, GossamerCache, KVFormat, KVLayer, QuantizedKVLayer
from gossamer.hf.cache import Derived
from gossamer.hf.offload import pinned_allocator

TOKEN = KVFormat(8, 8, "token", "token", group=8, residual=4)
CHANNEL = KVFormat(8, 4, "channel", "token", group=8, residual=4)


def filled(format, rows, batch=2, heads=3, seed=0, step=None):
    torch.manual_seed(seed)
    key, value = torch.randn(2, batch, heads, rows, 16)
    layer = QuantizedKVLayer(format)
    for first in range(0, rows, step or rows):
        last = min(first + (step or rows), rows)
        layer.update(key[:, :, first:last], value[:, :, first:last])
    return layer, key, value


@pytest.mark.parametrize("format", [TOKEN, CHANNEL])
@pytest.mark.parametrize("step", [None, 1, 5])
def test_old_rows_are_codes_and_new_rows_exact(format, step):
    layer, key, value = filled(format, 50, step=step)
    assert layer.length == layer.get_seq_length() == 50
    assert layer.split % 8 == 0
    assert 4 <= 50 - layer.split < 12
    assert torch.equal(layer.key_rows(layer.split, 50), key[:, :, layer.split :])
    assert torch.equal(layer.value_rows(layer.split, 50), value[:, :, layer.split :])
    torch.testing.assert_close(
        layer.keys, key, atol=0.02, rtol=0.02
    )  # half a step of 8 bits over six sigma, bfloat16 scales
    torch.testing.assert_close(layer.values, value, atol=0.3 if format.value_bits == 4 else 0.02, rtol=0.02)
    assert torch.equal(layer.key_rows(3, 49), layer.keys[:, :, 3:49])


def test_rows_do_not_depend_on_how_they_came():
    for format in (TOKEN, CHANNEL):
        at_once, in_steps = filled(format, 50)[0], filled(format, 50, step=1)[0]
        assert at_once.split == in_steps.split
        assert torch.equal(at_once.keys, in_steps.keys)
        assert torch.equal(at_once.values, in_steps.values)


def test_update_without_a_runtime_returns_rows_exact_within_the_block():
    layer, key, _value = filled(CHANNEL, 20)
    fresh = torch.randn(2, 3, 30, 16)
    got, _ = layer.update(fresh, fresh)
    assert torch.equal(got[:, :, 20:], fresh)
    torch.testing.assert_close(got[:, :, :20], key, atol=0.02, rtol=0.02)


def test_true_bytes():
    layer, *_ = filled(CHANNEL, 50, step=7)
    heads, old, near = 2 * 3, layer.split, 50 - layer.split
    codes = old * (16 + 8)
    scales = 2 * 2 * (old // 8 * 16 + old)
    assert layer.nbytes == heads * (codes + scales + near * 2 * 16 * 4)
    assert CHANNEL.row_bytes(16) == 16 + 8 + 4 * 16 / 8 + 4


@pytest.mark.parametrize("format", [TOKEN, CHANNEL])
@pytest.mark.parametrize("left", [48, 41, 40, 17, 0])
def test_crop(format, left):
    layer, key, _value = filled(format, 50, step=1)
    layer.crop(left - 50)
    assert layer.length == left
    assert layer.split <= left
    torch.testing.assert_close(layer.keys, key[:, :, :left], atol=0.02, rtol=0.02)
    fresh = torch.randn(2, 3, 20, 16)
    layer.update(fresh, fresh)
    torch.testing.assert_close(layer.keys, torch.cat([key[:, :, :left], fresh], 2), atol=0.04, rtol=0.03)
    with pytest.raises(InputError, match="negative"):
        layer.crop(1)


def test_keep_gathers_codes_whatever_each_head_keeps():
    for trial in range(6):
        layer, *_ = filled(TOKEN, 50, seed=trial, step=3)
        before, values = layer.keys, layer.values
        torch.manual_seed(trial)
        rows = [30, 5, 49, 1, 12, 50][trial]
        ids = torch.stack([torch.stack([torch.randperm(50)[:rows].sort().values for _ in range(3)]) for _ in range(2)])
        layer.keep(ids)
        assert (layer.length, layer.dropped) == (rows, 50 - rows)
        assert torch.equal(layer.positions.long(), ids)
        wide = ids[..., None].expand(-1, -1, -1, 16)
        torch.testing.assert_close(layer.keys, before.gather(2, wide), atol=0.02, rtol=0.02)
        torch.testing.assert_close(layer.values, values.gather(2, wide), atol=0.02, rtol=0.02)
        codes = layer.old[0].codes[:, :, : layer.split].clone()
        layer.update(*torch.randn(2, 2, 3, 1, 16))  # codes that stay are never computed again
        assert torch.equal(layer.old[0].codes[:, :, : codes.shape[2]], codes)


def test_what_cannot_be_done_says_so():
    layer, *_ = filled(CHANNEL, 50)
    with pytest.raises(InputError, match="key_axis='token'"):
        layer.keep(torch.arange(4).expand(2, 3, -1))
    with pytest.raises(InputError, match="offload"):
        layer.move(pinned_allocator)
    with pytest.raises(InputError, match="2 sequences"):
        layer.update(*torch.randn(2, 1, 3, 1, 16))
    with pytest.raises(InputError, match="one model"):
        layer.update(*torch.randn(2, 2, 3, 1, 32))
    with pytest.raises(InputError, match="multiple of"):
        QuantizedKVLayer(KVFormat(2, 2)).update(*torch.randn(2, 1, 1, 3, 24))
    with pytest.raises(InputError, match="can't be"):
        KVFormat(2, 2, group=0).check(16)
    dropped = KVLayer()
    dropped.update(*torch.randn(2, 1, 1, 9, 16))
    dropped.keep(torch.arange(4).expand(1, 1, -1))
    with pytest.raises(InputError, match="key_axis='token'"):
        QuantizedKVLayer.of(CHANNEL, dropped)


class Scores(Derived):
    def __init__(self, scores=None):
        self.scores = scores

    def tensors(self):
        return {} if self.scores is None else {"scores": self.scores}

    def restore(self, tensors, rows):
        self.scores, self.rows = tensors["scores"], rows


class View:
    prefill_state = cache_state = None

    def __init__(self, state):
        self.state = state


class Owner:
    """Stands for a runtime."""


@pytest.mark.parametrize("make", [lambda: filled(TOKEN, 50)[0], lambda: filled(CHANNEL, 50)[0]])
def test_batch_changes_and_what_follows_them(make):
    layer, owner = make(), Owner()
    before = layer.keys
    state = Scores(torch.tensor([[1.0], [2.0]]))
    state.rows = 7
    layer.views[owner] = View(state)
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.keys, before.flip(0))
    layer.batch_repeat_interleave(2)  # before any view took it back
    carried, rows = layer.claim(owner, "state")
    assert (carried["scores"].flatten().tolist(), rows) == ([2.0, 2.0, 1.0, 1.0], 7)
    assert layer.claim(owner, "state") is None
    layer.batch_select_indices(torch.tensor([3]))
    assert torch.equal(layer.keys, before[:1])
    layer.reset()
    assert not layer.is_initialized
    assert layer.nbytes == layer.length == 0


def test_a_deep_copy_is_another_cache():
    layer, *_ = filled(CHANNEL, 50)
    layer.prepare(None)
    twin = copy.deepcopy(layer)
    twin.update(*torch.randn(2, 2, 3, 20, 16))
    assert (layer.length, twin.length) == (50, 70)
    assert torch.equal(twin.key_rows(0, 40), layer.key_rows(0, 40))


class Storage:
    """A storage policy in a few lines."""

    grouped = True

    def __init__(self, format):
        self.format = format

    def layers(self, shape):
        return [lambda layer: QuantizedKVLayer.of(self.format, layer)] * shape.layers

    def report(self):
        return {}


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_model_on_a_quantised_cache(tiny_model, family):
    model, ids = tiny_model(family), torch.randint(0, 256, (2, 60), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        runtime = AttentionRuntime(model, storage=Storage(KVFormat(8, 8, group=8, residual=4)))
        cache = GossamerCache()
        parts = [model(ids[:, :30], attention_mask=mask[:, :30], past_key_values=cache).logits]
        parts.append(model(ids[:, 30:40], attention_mask=mask[:, :40], past_key_values=cache).logits)
        parts += [
            model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits
            for t in range(40, 60)
        ]
        assert all(isinstance(layer, QuantizedKVLayer) for layer in cache.layers)
        got = torch.cat(parts, 1)
        assert torch.equal(got[0, :30], expected[0, :30]) or torch.allclose(got[0, :30], expected[0, :30], atol=1e-4)
        real = mask.bool()
        error = (got - expected)[real].std() / expected[real].std()
        assert error < 0.05  # 8 bits, on random weights of a large spread
        stats = runtime.stats
        assert 0 < stats.kv_bytes < stats.dense_bytes
        runtime.detach()
        # Detached, the cache still serves the plain model: dequantised rows.
        plain = model(ids[:, :1], attention_mask=torch.cat([mask, mask[:, -1:]], 1), past_key_values=cache).logits
        assert bool(plain.isfinite().all())
        assert cache.get_seq_length() == 61
        assert model(ids, attention_mask=mask).logits.equal(expected)


def test_an_existing_cache_is_taken_over(tiny_model):
    model, ids = tiny_model(), torch.randint(0, 256, (1, 40))
    with torch.no_grad():
        cache = GossamerCache()
        model(ids, past_key_values=cache)
        dense = copy.deepcopy(cache)
        expected = model(ids[:, :1], past_key_values=dense).logits
        runtime = AttentionRuntime(model, storage=Storage(KVFormat(8, 8, group=8, residual=4)))
        got = model(ids[:, :1], past_key_values=cache).logits
        runtime.detach()
    assert isinstance(cache.layers[0], QuantizedKVLayer)
    assert cache.layers[0].split == 32
    torch.testing.assert_close(got, expected, atol=0.2, rtol=0.1)
