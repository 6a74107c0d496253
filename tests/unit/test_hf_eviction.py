"""Dropping rows: what stays, its positions, and that generation goes on as if the dropped rows were masked."""

import pytest
import torch

from gossamer.errors import InputError
from gossamer.hf import AttentionRuntime, CachePolicy, GossamerCache, KVLayer
from gossamer.models import tiny_model


class Window(CachePolicy):
    """Keeps the first two and the last rows, `size` in all."""

    def __init__(self, size):
        self.size = size

    def update(self, layer, query):
        length = layer.kv.length
        if length <= self.size:
            return
        batch, heads = layer.kv.key_storage.shape[:2]
        start = torch.zeros(batch, dtype=torch.long) if layer.starts is None else layer.starts.long()
        rows = []
        for first in start:
            real = torch.arange(int(first), length)
            kept = torch.cat([real[:2], real[2:][-(self.size - 2) :]])
            padding = torch.arange(int(first) - (self.size - len(kept)), int(first))
            rows.append(torch.cat([padding, kept]))
        layer.keep(torch.stack(rows)[:, None].expand(batch, heads, -1))


def filled(rows=10, batch=2, heads=3):
    layer = KVLayer()
    data = torch.randn(batch, heads, rows, 4)
    layer.update(data, data + 1)
    return layer, data


def test_keep_moves_rows_together_and_remembers_positions():
    layer, data = filled()
    ids = torch.stack([torch.stack([torch.randperm(10)[:4].sort().values for _ in range(3)]) for _ in range(2)])
    pointer = layer.key_storage.data_ptr()
    layer.keep(ids)
    expected = data.gather(2, ids[..., None].expand(-1, -1, -1, 4))
    assert torch.equal(layer.keys, expected)
    assert torch.equal(layer.values, expected + 1)
    assert torch.equal(layer.positions.long(), ids)
    assert layer.key_storage.data_ptr() == pointer
    assert (layer.length, layer.dropped, layer.get_seq_length()) == (4, 6, 10)
    assert layer.get_mask_sizes(1) == (11, 0)


def test_positions_go_on_after_dropping():
    layer, data = filled(rows=5, batch=1, heads=1)
    layer.keep(torch.tensor([[[0, 3, 4]]]))
    layer.update(data[:, :, :2], data[:, :, :2])
    assert layer.positions.tolist() == [[[0, 3, 4, 5, 6]]]
    layer.keep(torch.tensor([[[0, 2, 4]]]))
    assert layer.positions.tolist() == [[[0, 4, 6]]]


def test_crop_after_dropping_stops_at_what_was_kept():
    layer, data = filled(rows=6, batch=1, heads=1)
    layer.keep(torch.tensor([[[0, 1, 5]]]))
    layer.update(data[:, :, :2], data[:, :, :2])
    layer.crop(-2)
    assert layer.get_seq_length() == 6
    with pytest.raises(InputError, match="dropped"):
        layer.crop(-1)


@pytest.mark.parametrize("ids", [[[[1, 0]]], [[[0, 0]]], [[[0, 6]]], [[[-1, 2]]], [[[0, 1]], [[0, 1]]]])
def test_bad_ids_are_refused(ids):
    layer, _ = filled(rows=6, batch=1, heads=1)
    with pytest.raises(InputError) as error:
        layer.keep(torch.tensor(ids))
    assert "\n" not in str(error.value)


def masked_logits(model, ids, size, prompt):
    """Dense logits where each position after the prompt sees what `Window` would have left."""
    length = ids.shape[1]
    seen = [0, 1]
    mask = torch.zeros(1, 1, length, length, dtype=torch.bool)
    for i in range(length):
        if i < prompt:
            mask[0, 0, i, : i + 1] = True
            continue
        kept = list(range(2)) + list(range(2, i))[-(size - 2) :]
        mask[0, 0, i, [*kept, i]] = True
    del seen
    with torch.no_grad():
        return model(ids, attention_mask=torch.where(mask, 0.0, torch.finfo(torch.float32).min)).logits


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_decoding_equals_a_mask(family):
    model = tiny_model(family)
    ids = torch.randint(3, model.config.vocab_size, (1, 24))
    runtime = AttentionRuntime(model, cache=Window(8))
    try:
        with torch.no_grad():
            out = model(ids[:, :14], use_cache=True)
            cache = out.past_key_values
            logits = [out.logits] + [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(14, 24)]
        assert all(layer.length == 8 for layer in cache.layers)
    finally:
        runtime.detach()
    torch.testing.assert_close(torch.cat(logits, 1), masked_logits(model, ids, 8, 14), atol=2e-4, rtol=1e-3)


def test_padded_batches_equal_single_runs():
    model = tiny_model("llama")
    ids = torch.randint(3, model.config.vocab_size, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    runtime = AttentionRuntime(model, cache=Window(8))
    try:
        with torch.no_grad():
            together = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
            alone = [
                model.generate(
                    ids[i : i + 1, start:],
                    attention_mask=mask[i : i + 1, start:],
                    max_new_tokens=8,
                    do_sample=False,
                    pad_token_id=0,
                )
                for i, start in ((0, 0), (1, 9))
            ]
    finally:
        runtime.detach()
    for i in range(2):
        assert together[i, 20:].tolist() == alone[i][0, -8:].tolist()


def test_memory_stays_flat_over_many_tokens():
    model = tiny_model("llama", num_hidden_layers=2)
    runtime = AttentionRuntime(model, cache=Window(16))
    cache = GossamerCache()
    try:
        with torch.no_grad():
            token = torch.tensor([[5]])
            for _ in range(300):
                logits = model(token, past_key_values=cache, use_cache=True).logits
                token = logits[:, -1:].argmax(-1)
        assert torch.isfinite(logits).all()
        assert cache.get_seq_length() == 300
        assert all(layer.length == 16 and layer.capacity == 256 for layer in cache.layers)
        assert all((layer.positions.diff(dim=2) > 0).all() for layer in cache.layers)
    finally:
        runtime.detach()


def test_a_block_cannot_be_teacher_forced():
    model = tiny_model("llama")
    ids = torch.randint(3, model.config.vocab_size, (1, 12))
    runtime = AttentionRuntime(model, cache=Window(6))
    try:
        with torch.no_grad(), runtime.teacher_forcing(), pytest.raises(InputError, match="one by one"):
            model(ids, use_cache=True)
    finally:
        runtime.detach()


def test_dense_figures_count_the_tokens_seen():
    """What was dropped would have been read: the share of rows kept is of all tokens, not of those that are left."""
    model, ids = tiny_model(), torch.randint(0, 256, (2, 30))
    runtime = AttentionRuntime(model, cache=Window(8))
    with torch.no_grad():
        cache = GossamerCache()
        model(ids[:, :20], past_key_values=cache)
        for t in range(20, 30):
            model(ids[:, t : t + 1], past_key_values=cache)
    runtime.detach()
    stats, heads = runtime.stats, 2 * 2 * 2  # layers, sequences, KV heads
    assert stats.rows == 10 * 9 * heads
    assert stats.dense_rows == sum(range(21, 31)) * heads
    assert stats.dense_bytes == stats.dense_rows * 2 * 16 * 4
