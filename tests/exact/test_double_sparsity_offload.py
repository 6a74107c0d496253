"""Offload: the same index sets give the same outputs, and what crosses between the tiers is what the formula says."""

import pytest
import torch
from torch import Tensor

from gossamer.attention.double_sparsity import DoubleSparsity
from gossamer.errors import OutputError
from gossamer.hf.offload import _union, file_allocator
from gossamer.hf.views import model_shape
from gossamer.models import tiny_model

CONTEXT, NEW = 70, 9


def setting(**changes):
    return {"tokens": 16, "dense_layers": (), "select_per": "kv_head", **changes}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def ids(model):
    return torch.randint(3, model.config.vocab_size, (2, CONTEXT + NEW), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def calibration(model, ids):
    return DoubleSparsity().calibrate(model, ids)


def step_by_step(model, calibration, ids, **settings) -> tuple[Tensor, object, list]:
    with DoubleSparsity(**settings).attach(model, calibration) as handle, torch.no_grad():
        cache = model(ids[:, :CONTEXT], use_cache=True).past_key_values
        handle.runtime.stats.reset()
        with handle.runtime.recording() as trace:
            logits = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(CONTEXT, CONTEXT + NEW)]
        return torch.cat(logits, 1), handle.runtime.stats, trace


def in_one_block(model, calibration, ids, **settings) -> Tensor:
    with DoubleSparsity(**settings).attach(model, calibration) as handle, torch.no_grad():
        cache = model(ids[:, :CONTEXT], use_cache=True).past_key_values
        with handle.runtime.teacher_forcing():
            return model(ids[:, CONTEXT:], past_key_values=cache).logits


@pytest.mark.parametrize("select_per", ["kv_head", "query_head"])
@pytest.mark.parametrize("how", [{"predict": "none"}, {"sync_layers": (0, 1, 2, 3)}])
def test_with_its_own_queries_offload_equals_no_offload(model, calibration, ids, select_per, how):
    near, _, chosen = step_by_step(model, calibration, ids, **setting(select_per=select_per))
    far, _, fetched = step_by_step(model, calibration, ids, **setting(select_per=select_per, offload="file", **how))
    torch.testing.assert_close(far, near, atol=1e-5, rtol=1e-5)
    for a, b in zip(chosen, fetched, strict=True):
        assert a[:2] == b[:2]
        assert torch.equal(a[2].sort(-1).values, b[2].sort(-1).values)


@pytest.mark.parametrize("select_per", ["kv_head", "query_head"])
def test_prediction_from_the_true_input_equals_no_offload(model, calibration, ids, select_per, monkeypatch):
    """Exact check 8: with x the true input of the layer, choosing ahead changes nothing."""
    from gossamer.attention import double_sparsity_offload as offload

    true: dict[int, Tensor] = {}
    plain = offload.OffloadPolicy._fetch
    near, _, _ = step_by_step(model, calibration, ids, **setting(select_per=select_per))

    def decode(self, layer, query, length):
        true[layer.index] = query
        job = self.pending.pop(layer.index, None)
        if job is not None:  # the guess was made and fetched; choose again as if it had been the true query
            job.result()
            self.pending[layer.index] = self.buffer.submit(lambda: plain(self, layer, query, length))
        return original(self, layer, query, length)

    original = offload.OffloadPolicy.decode
    monkeypatch.setattr(offload.OffloadPolicy, "decode", decode)
    far, _, _ = step_by_step(
        model, calibration, ids, **setting(select_per=select_per, offload="file", sync_layers=(0,))
    )
    assert set(true) == {0, 1, 2, 3}
    torch.testing.assert_close(far, near, atol=1e-5, rtol=1e-5)


def test_prediction_is_used_and_differs(model, calibration, ids):
    near, _, _ = step_by_step(model, calibration, ids, **setting())
    far, _, trace = step_by_step(model, calibration, ids, **setting(offload="file", sync_layers=(0,)))
    assert not torch.equal(near, far)
    assert all((indices[:, :, 0] == length - 1).all() for _, length, indices, _ in trace), (
        "the current token is always there"
    )


def test_a_block_equals_steps_with_prediction(model, calibration, ids):
    settings = setting(
        offload="file", sync_layers=(0, -1), label_bits=16
    )  # coarse labels tie, and ties turn on rounding
    steps, _, _ = step_by_step(model, calibration, ids, **settings)
    torch.testing.assert_close(in_one_block(model, calibration, ids, **settings), steps, atol=1e-5, rtol=1e-5)


def test_bytes_from_the_slow_tier_follow_the_formula(model, calibration, ids):
    shape, method = model_shape(model), DoubleSparsity(**setting(offload="file"))
    _, stats, _ = step_by_step(model, calibration, ids, **setting(offload="file"))
    # Per layer 2 (K and V) · B · H_kv · k · d elements: k − 1 rows fetched and the current one.
    per_layer = 2 * ids.shape[0] * shape.kv_heads * 16 * shape.head_dim * 4
    assert stats.slow_bytes == NEW * shape.layers * per_layer
    assert ids.shape[0] * method.io_bytes(CONTEXT, shape, 4)["rows"] == per_layer


def test_a_group_reads_a_shared_row_once(model, calibration, ids):
    _, stats, _ = step_by_step(model, calibration, ids, **setting(select_per="query_head", offload="file"))
    shape = model_shape(model)
    separate = 2 * ids.shape[0] * shape.heads * 16 * shape.head_dim * 4 * NEW * shape.layers
    assert 0 < stats.slow_bytes < separate


def test_dense_layers_stay_in_memory_and_others_are_mapped(model, calibration, ids):
    with DoubleSparsity(**setting(offload="file", dense_layers=(0,))).attach(model, calibration), torch.no_grad():
        cache = model(ids[:, :CONTEXT], use_cache=True).past_key_values
    places = [layer.allocate.__qualname__ for layer in cache.layers]
    assert places[0] == "allocate_near"
    assert all("file_allocator" in place for place in places[1:])


def test_budget_of_one_reads_the_current_token_only(model, calibration, ids):
    near, _, _ = step_by_step(model, calibration, ids, **setting(tokens=1))
    far, _, _ = step_by_step(model, calibration, ids, **setting(tokens=1, offload="file"))
    torch.testing.assert_close(far, near, atol=1e-5, rtol=1e-5)


def test_left_padded_rows_are_never_fetched(model, calibration, ids):
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    with DoubleSparsity(**setting(offload="file")).attach(model, calibration) as handle, torch.no_grad():
        cache = model(ids[:, :CONTEXT], attention_mask=mask[:, :CONTEXT], use_cache=True).past_key_values
        with handle.runtime.recording() as trace:
            model(ids[:, CONTEXT : CONTEXT + 1], attention_mask=mask[:, : CONTEXT + 1], past_key_values=cache)
    for _, _, indices, counts in trace:
        for head, count in zip(indices[1], counts[1], strict=True):
            assert (head[:count] >= 40).all()


def test_the_cache_grows_in_its_file(model):
    from gossamer.hf import KVLayer

    layer = KVLayer(allocate=file_allocator(None))
    rows = torch.randn(1, 2, 700, 16)
    for row in rows.split(50, dim=2):
        layer.update(row, -row)
    assert torch.equal(layer.keys, rows)
    assert torch.equal(layer.values, -rows)


def test_unwritable_folder_is_one_clear_line(model, calibration, ids):
    method = DoubleSparsity(**setting(offload="file", offload_folder="/nonexistent/folder"))
    with method.attach(model, calibration), torch.no_grad(), pytest.raises(OutputError) as error:
        model(ids[:, :CONTEXT], use_cache=True)
    assert "\n" not in str(error.value)
    assert "/nonexistent/folder" in str(error.value)


def test_union_of_selections():
    ids = torch.tensor([[[4, 1, 9], [9, 4, 0], [2, 2, 2], [7, 8, 0]]])
    counts = torch.tensor([[3, 2, 1, 2]])
    table, slots, sizes = _union(ids, counts, kv_heads=2)
    assert sizes.tolist() == [[3, 3]]
    for head in range(4):
        for i in range(int(counts[0, head])):
            assert table[0, head // 2, slots[0, head, i]] == ids[0, head, i]
