"""Quantised storage (rtn-kv) against its formula, stacked with every kind of method; and the sliding window."""

import pytest
import torch
from transformers import DynamicCache

from gossamer.cache.rtn_kv import RTNKV
from gossamer.cache.sliding_window import SlidingWindow, window_rows
from gossamer.errors import InputError, RecipeError
from gossamer.hf import CachePolicy, GossamerCache, ModelShape, QuantizedKVLayer
from gossamer.policies import PolicyMethod, attach
from gossamer.recipe import Recipe
from gossamer.registry import make
from gossamer.testing import Stream, _learned, _model

SMALL = {"group": 8, "residual": 4}
TOKENWISE = {**SMALL, "key_axis": "token", "value_axis": "token"}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def by_formula(x, bits, dim, levels_of=torch.float32):
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return ((x - low) / step).round() * step + low


def attend(query, key, value):
    """Exact attention of one query ``[batch, heads, d]`` over all rows given."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    weights = (torch.einsum("bhd,bhsd->bhs", query, key) * 0.25).softmax(-1)
    return torch.einsum("bhs,bhsd->bhd", weights, value)


@pytest.mark.parametrize(("bits", "value_bits"), [(8, None), (4, None), (4, 2), (2, None)])
@pytest.mark.parametrize("key_axis", ["channel", "token"])
def test_a_step_attends_to_rows_rounded_by_the_formula(bits, value_bits, key_axis):
    method = RTNKV(bits=bits, value_bits=value_bits, key_axis=key_axis, scales="float32", **SMALL)
    stream = Stream()
    with method.attach(_model()) as handle:
        out = stream.feed(handle, 45, *[1] * 10)
    last, split = 55, (55 - 4) // 8 * 8
    for i, layer in enumerate(stream.cache.layers):
        assert layer.split == split
        key, value = stream.key[i, :, :, :last], stream.value[i, :, :, :last]
        old = key[:, :, :split]
        old = (
            by_formula(old, bits, 3)
            if key_axis == "token"
            else by_formula(old.unflatten(2, (-1, 8)), bits, 3).flatten(2, 3)
        )
        key = torch.cat([old, key[:, :, split:]], 2)
        value = torch.cat([by_formula(value[:, :, :split], value_bits or bits, 3), value[:, :, split:]], 2)
        torch.testing.assert_close(layer.keys, key, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer.values, value, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            out[i, :, :, -1], attend(stream.query[i, :, :, last - 1], key, value), atol=2e-3, rtol=2e-3
        )


def test_a_block_is_exact_within_itself():
    stream = Stream()
    with RTNKV(bits=2, **SMALL).attach(_model()) as handle:
        got = stream.feed(handle, 64)
    torch.testing.assert_close(got, stream.dense(0), atol=1e-5, rtol=1e-5)


def test_io_and_report():
    shape, method = ModelShape(3, 4, 2, 16), RTNKV(bits=4, scales="float32", **SMALL)
    # 48 old rows: 8 bytes of key codes and 8 of value codes, 8 bytes of scales per value, 2 · 16 · 4 per 8 keys.
    assert method.io_bytes(55, shape, 4)["rows"] == 2 * (48 * (8 + 8 + 8 + 16) + 7 * 2 * 16 * 4)
    stream = Stream()
    with method.attach(_model()) as handle:
        stream.feed(handle, 54, 1)
        report = handle.report()
        assert report["kv_bytes_held"] == 3 * 2 * method.io_bytes(55, shape, 4)["rows"]  # layers, sequences
        assert report["kv_bytes_full"] == 3 * 2 * 2 * 55 * 2 * 16 * 4
        assert report["kv_compression"] == report["kv_bytes_full"] / report["kv_bytes_held"]
        assert report["dense_bytes"] == report["kv_bytes_full"]  # one dense step
        assert report["rows_kept"] == 1.0


def test_layers_left_in_full_precision():
    stream = Stream()
    with RTNKV(bits=2, full_layers=(0, -1), **SMALL).attach(_model()) as handle:
        out = stream.feed(handle, 40, 1)
    kinds = [isinstance(layer, QuantizedKVLayer) for layer in stream.cache.layers]
    assert kinds == [False, True, False]
    whole = stream.dense(40)[:, :, :, :1]
    torch.testing.assert_close(out[[0, 2], :, :, -1:], whole[[0, 2]], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out[1, :, :, -1:], whole[1], atol=1e-2)


def test_settings_and_models_that_cannot_be():
    for settings in (
        {"bits": 3},
        {"key_axis": "row"},
        {"group": 0},
        {"residual": -1},
        {"residual": 60000, "group": 60000},
    ):
        with pytest.raises(InputError) as error:
            RTNKV(**settings)
        assert "\n" not in str(error.value)
        assert "rtn-kv" in str(error.value)
    from gossamer.models import tiny_model

    odd = tiny_model("llama", head_dim=24)
    with pytest.raises(InputError, match=r"rtn-kv: .*2-bit rows need a multiple of 16"):
        RTNKV(bits=2).attach(odd)
    with pytest.raises(InputError, match="full_layers"):
        RTNKV(full_layers=(3,)).attach(_model())
    with pytest.raises(InputError, match="window"):
        SlidingWindow(window=0)


class Merging(CachePolicy):
    rewrites, drops = True, False

    def update(self, layer, query):
        """Would write rows."""


class MergingMethod(PolicyMethod):
    """For the test."""

    slug, slot = "merging", "cache"

    def cache_policy(self, model, calibration):
        return Merging()


def test_conflicts_are_named(tmp_path):
    model = _model()
    with pytest.raises(RecipeError, match=r"a2sf drops single rows, but rtn-kv .*key_axis='token'"):
        Recipe.of(make("a2sf", budget=16, prompt="block"), RTNKV()).attach(model)
    with pytest.raises(RecipeError, match=r"merging merges rows, which rtn-kv has quantised"):
        attach(model, [(MergingMethod(), None), (RTNKV(**TOKENWISE), None)])
    offloaded = make("double-sparsity", offload="file", offload_folder=str(tmp_path))
    with pytest.raises(RecipeError, match=r"rtn-kv keeps rows in memory and double-sparsity offloads them"):
        Recipe.of((offloaded, _learned("double-sparsity", "{}")), RTNKV()).attach(model)
    with pytest.raises(RecipeError, match=r"both take the slot cache.storage"):
        Recipe.of(RTNKV(), RTNKV(bits=8))
    assert model.config._attn_implementation == "sdpa"


DECODE = [
    ("dense", {}),
    ("exact-top-k", {"tokens": 24}),
    ("streaming-llm", {"tokens": 24}),
    ("quest", {"tokens": 32, "page_size": 4}),
    ("sparq", {"tokens": 24, "channels": 8}),
    ("double-sparsity", {"tokens": 24, "channels": 8}),
    ("double-sparsity", {"tokens": 24, "channels": 8, "select_per": "kv_head"}),
    ("double-sparsity", {"tokens": 24, "channels": 4, "stat": "neighbours"}),
    ("tidaldecode", {"tokens": 24, "first": 0, "reselect": ()}),
    ("tokenselect", {"k": 12, "n_init": 2, "n_local": 10, "chunk": 8}),
    ("tokenselect", {"k": 12, "n_init": 2, "n_local": 10, "chunk": 8, "positions": "packed"}),
    ("hip-attention", {"tokens": 16, "block_q": 8, "window": 8, "sink": 2, "refresh": 4}),
]


@pytest.mark.parametrize(("slug", "settings"), DECODE, ids=lambda x: x if isinstance(x, str) else "")
def test_every_decode_method_runs_on_eight_bits(slug, settings):
    fields = type(make(slug)).model_fields
    if "dense_layers" in fields and fields["dense_layers"].annotation is not int:
        settings = {"dense_layers": (), **settings}
    settings = {k: v for k, v in settings.items() if k in fields}
    method, outs, reads = make(slug, **settings), [], []
    calibration = _learned(slug, "{}") if settings.get("stat") != "neighbours" else None
    for storage in ([], [RTNKV(bits=8, **SMALL)]):
        stream = Stream()
        with Recipe.of((method, calibration), *storage).attach(_model()) as handle:
            outs.append(stream.feed(handle, 40, *[1] * 24)[:, :, :, 40:])
            stats = handle.runtime.stats
            reads.append((stats.rows, stats.kv_bytes / stats.rows))
        if storage:
            assert all(isinstance(layer, QuantizedKVLayer) for layer in stream.cache.layers)
    assert reads[1][0] == pytest.approx(reads[0][0], rel=0.05)
    if slug != "tidaldecode":  # its first layer reads all rows, the newest of them in full
        assert reads[1][1] < 0.5 * reads[0][1]  # bytes a row
    error = (outs[1] - outs[0]).square().mean().sqrt() / outs[0].square().mean().sqrt()
    assert error < 0.15  # a row at the edge of a selection may change; most must not
    close = (outs[1] - outs[0]).abs().amax(-1) < 0.1
    assert close.float().mean() > 0.9


@pytest.mark.parametrize(
    ("slug", "settings"),
    [
        ("a2sf", {"budget": 16, "prompt": "block"}),
        ("a2sf", {"budget": 16}),
        ("h2o", {"budget": 16, "prompt": "block"}),
        ("tova", {"budget": 16}),
        ("snapkv", {"budget": 16, "window": 4}),
        ("sliding-window", {"window": 12, "sinks": 4}),
    ],
)
def test_every_eviction_method_runs_on_codes_per_token(slug, settings):
    outs, positions = [], []
    for storage in ([], [RTNKV(bits=8, **TOKENWISE)]):
        stream = Stream()
        with Recipe.of(make(slug, **settings), *storage).attach(_model()) as handle:
            outs.append(stream.feed(handle, 40, *[1] * 24)[:, :, :, 40:])
        positions.append([layer.positions for layer in stream.cache.layers])
        layer = stream.cache.layers[0]
        assert layer.length <= 16 + (24 if slug == "snapkv" else 0)
        assert layer.get_seq_length() == 64
    same = torch.stack(
        [(a[..., None] == b[..., None, :]).any(-1).float().mean() for a, b in zip(*positions, strict=True)]
    )
    assert float(same.mean()) > 0.9  # the same rows survive, but for near ties
    assert (outs[1] - outs[0]).abs().median() < 0.02


def test_left_padding_and_beams():
    stream = Stream(batch=3)
    mask = torch.ones(3, 64, dtype=torch.long)
    mask[0, :7] = 0
    with RTNKV(bits=8, **SMALL).attach(_model()) as handle:
        padded = stream.feed(handle, 40, 1, mask=mask)
        stream.cache.reorder_cache(torch.tensor([2, 2, 0]))
        assert torch.equal(stream.cache.layers[1].keys[0], stream.cache.layers[1].keys[1])
    alone = stream.pick(torch.tensor([0]), start=7)
    with RTNKV(bits=8, **SMALL).attach(_model()) as handle:
        single = alone.feed(handle, 33, 1)
    torch.testing.assert_close(padded[:, :1, :, -1], single[:, :, :, -1], atol=0.05, rtol=0.05)  # other groups, 8 bits


def test_double_sparsity_on_eight_bits_keeps_the_logits():
    """In a whole model: prompt, then token by token."""
    model, ids = _model(), torch.randint(1, 256, (2, 72), generator=torch.Generator().manual_seed(5))
    method = make("double-sparsity", tokens=24, channels=8, dense_layers=())
    logits = []
    for storage in ([], [RTNKV(bits=8, **SMALL)]):
        cache = GossamerCache()
        with Recipe.of((method, _learned("double-sparsity", "{}")), *storage).attach(model):
            model(ids[:, :48], past_key_values=cache)
            steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(48, 72)]
        logits.append(torch.cat(steps, 1))
    error = (logits[1] - logits[0]).std() / logits[0].std()
    assert error < 0.1
    assert (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean() > 0.9


# -- sliding window ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sinks", [0, 2])
def test_the_window_is_a_cache_cut_by_hand(sinks):
    model, ids = _model(), torch.randint(1, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    kept = window_rows
    with SlidingWindow(window=8, sinks=sinks).attach(model):
        cache, got = GossamerCache(), []
        got.append(model(ids[:, :20], past_key_values=cache).logits)
        got += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(20, 40)]
        positions = cache.layers[0].positions[0, 0].tolist()
    assert positions == [*range(sinks), *range(32, 40)]
    plain, want = DynamicCache(), []
    for first, last in [(0, 20), *((t, t + 1) for t in range(20, 40))]:
        at = torch.arange(first, last)[None]
        rows = plain.get_seq_length()
        mask = torch.ones(1, 1, last - first, rows + last - first, dtype=torch.bool).tril(rows)
        want.append(model(ids[:, first:last], past_key_values=plain, position_ids=at, attention_mask=mask).logits)
        for layer in plain.layers:
            n = layer.keys.shape[2]
            if n > 8 + sinks:
                rows_kept = kept(n, 8, sinks, None, 1)[0]
                layer.keys, layer.values = layer.keys[:, :, rows_kept], layer.values[:, :, rows_kept]
    torch.testing.assert_close(torch.cat(got, 1), torch.cat(want, 1), atol=1e-4, rtol=1e-4)


def test_window_rows_with_padding():
    rows = window_rows(10, 4, 2, torch.tensor([0, 3, 5, 8]), 4)
    assert rows.tolist() == [[0, 1, 6, 7, 8, 9], [3, 4, 6, 7, 8, 9], [4, 5, 6, 7, 8, 9], [4, 5, 6, 7, 8, 9]]
    assert SlidingWindow(window=8, sinks=2).held_rows(100) == 10
    stream = Stream()
    mask = torch.ones(2, 64, dtype=torch.long)
    mask[0, :9] = 0
    with SlidingWindow(window=8, sinks=2).attach(_model()) as handle:
        padded = stream.feed(handle, 20, *[1] * 20, mask=mask)
    alone = stream.pick(torch.tensor([0]), start=9)
    with SlidingWindow(window=8, sinks=2).attach(_model()) as handle:
        single = alone.feed(handle, 11, *[1] * 20)
    torch.testing.assert_close(padded[:, :1, :, 20:], single[:, :, :, 11:], atol=1e-5, rtol=1e-5)
