"""A2SF by its card: the procedure, its two implementations, its limits, and a long run."""

import copy
import math

import pytest
import torch

from gossamer.attention import attach
from gossamer.attention.quest import Quest
from gossamer.cache.a2sf import A2SF, eviction_mask, fading_weights, read_by_rows
from gossamer.cache.h2o import H2O
from gossamer.errors import InputError
from gossamer.hf import AttentionRuntime, GossamerCache
from gossamer.models import tiny_model
from gossamer.ops.attention_statistics import attention_columns
from gossamer.testing import Stream, _model


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def attention(heads=4, length=24, seed=0, batch=()):
    logits = 2 * torch.randn(*batch, heads, length, length, generator=torch.Generator().manual_seed(seed))
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    return logits.masked_fill(later, -math.inf).softmax(-1)


def by_the_card(probs, budget, alpha, recent=0, sink=0):
    """The card's procedure for one head, word for word."""
    length = probs.shape[-1]
    keep = torch.ones(length, length, dtype=torch.bool)
    total = torch.zeros(length)
    for t in range(min(budget, length)):
        total = alpha * total + probs[t]
    for t in range(budget, length - 1):
        row = probs[t] * keep[t]
        row /= row.sum()
        finite = total.isfinite()
        total[finite] = alpha * total[finite] + row[finite]
        j = int(total[sink : t + 1 - recent].argmin()) + sink
        total[j] = math.inf
        keep[t + 1] = keep[t]
        keep[t + 1, j] = False
    return keep.tril()


def truth(stream, method, starts=(0, 0)):
    """Outputs ``[layers, batch, heads, tokens, d]`` when the mask of the evaluation procedure is laid over dense attention."""
    outs = torch.zeros_like(stream.query)
    kv_heads = stream.key.shape[2]
    for i in range(stream.query.shape[0]):
        for b, start in enumerate(starts):
            query, key, value = (x[i, b, :, start:] for x in (stream.query, stream.key, stream.value))
            grouped = query.unflatten(0, (kv_heads, -1))
            logits = torch.einsum("kgtd,ksd->kgts", grouped, key) * 0.25
            later = torch.ones(key.shape[1], key.shape[1], dtype=torch.bool).triu(1)
            logits = logits.masked_fill(later, -math.inf)
            mask = method.mask_for(logits.softmax(-1).flatten(0, 1), kv_heads)
            probs = logits.masked_fill(~mask[:, None], -math.inf).softmax(-1)
            outs[i, b, :, start:] = torch.einsum("kgts,ksd->kgtd", probs, value).flatten(0, 1)
    return outs


# -- the formulas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.9, 1.0])
@pytest.mark.parametrize(("recent", "sink"), [(0, 0), (3, 0), (0, 2), (4, 2)])
def test_the_mask_is_the_cards(alpha, recent, sink):
    probs = attention()
    mask = eviction_mask(probs, 7, alpha, recent=recent, sink=sink)
    for h in range(4):
        assert torch.equal(mask[h], by_the_card(probs[h], 7, alpha, recent, sink))


def test_the_recursion_is_the_closed_form():
    rows = torch.rand(9, 5)
    total = torch.zeros(5)
    for row in rows:
        total = 0.3 * total + row
    torch.testing.assert_close(fading_weights(0.3, 9) @ rows, total, rtol=1e-5, atol=0)
    assert fading_weights(0.0, 3).tolist() == [0, 0, 1]
    assert fading_weights(1.0, 3).tolist() == [1, 1, 1]


def test_alpha_one_with_half_recent_is_h2o():
    probs = attention(length=30)
    assert torch.equal(A2SF(budget=8, alpha=1.0, recent=4).mask_for(probs), H2O(budget=8).mask_for(probs))
    assert torch.equal(A2SF(budget=8, alpha=1.0, recent=0.5).mask_for(probs), H2O(budget=8).mask_for(probs))
    plain = A2SF(budget=8, alpha=1.0)
    assert not torch.equal(plain.mask_for(probs), H2O(budget=8).mask_for(probs))
    assert torch.equal(plain.mask_for(probs)[0], by_the_card(probs[0], 8, 1.0))


def test_each_row_sees_exactly_what_it_may_and_nothing_comes_back():
    budget, mask = 6, A2SF(budget=6, alpha=0.3).mask_for(attention(length=40))
    visible = mask.sum(-1)
    want = torch.arange(1, 41).clamp_max(budget + 1)
    assert torch.equal(visible, want.expand_as(visible))
    gone = ~mask & torch.ones(40, 40, dtype=torch.bool).tril()
    for t in range(39):
        assert bool((gone[:, t + 1] >= gone[:, t]).all())


def test_a_whole_budget_sees_everything():
    probs = attention()
    causal = torch.ones(24, 24, dtype=torch.bool).tril()
    assert torch.equal(A2SF(budget=1.0).mask_for(probs), causal.expand(4, -1, -1))


def test_constant_attention_favours_the_oldest_without_forgetting():
    length = 200
    probs = torch.ones(length, length).tril() / torch.arange(1.0, length + 1)[:, None]
    plain = (fading_weights(1.0, length)[:, None] * probs).sum(0)
    assert bool((plain.diff() < 0).all())
    assert plain[0] / plain[-1] > 100
    fading = (fading_weights(0.2, length)[:, None] * probs).sum(0)
    assert float(fading[0] / fading[-10]) == pytest.approx(1, abs=1e-3)
    nearer = [float(x[0] / x[-1]) for n in (50, 200) for x in [fading_weights(0.2, n) @ probs[:n, :n]]]
    assert 1 < nearer[1] <= nearer[0] < 1.3


def test_heads_and_groups_decide_for_themselves():
    probs = attention()
    changed = probs.clone()
    changed[2] = attention(seed=9)[2]
    method = A2SF(budget=6)
    one, two = method.mask_for(probs), method.mask_for(changed)
    assert [torch.equal(a, b) for a, b in zip(one, two, strict=True)] == [True, True, False, True]
    one, two = method.mask_for(probs, kv_heads=2), method.mask_for(changed, kv_heads=2)
    assert one.shape == (2, 24, 24)
    assert [torch.equal(a, b) for a, b in zip(one, two, strict=True)] == [True, False]


def test_a_batch_is_its_sequences():
    probs = attention(batch=(3,))
    mask = A2SF(budget=5).mask_for(probs, kv_heads=2)
    for b in range(3):
        assert torch.equal(mask[b], A2SF(budget=5).mask_for(probs[b], kv_heads=2))


def test_the_ratio_is_rounded_as_in_the_reference():
    assert A2SF(budget=0.2).plan(384) == (77, 0, 0)
    assert A2SF(budget=0.5).plan(5) == (3, 0, 0)
    assert A2SF(budget=0.1, sink=4).plan(10) == (4, 0, 4)
    assert A2SF(budget=0.5, recent=1.0, sink=2).plan(10) == (5, 3, 2)


@pytest.mark.parametrize("block", [1, 5, 16, 1000])
def test_streamed_prefill_scores_do_not_depend_on_the_block(block):
    stream = Stream()
    query, key = stream.query[0], stream.key[0]
    weights = fading_weights(0.9, 64)
    want = torch.zeros(2, 2, 64)
    for q in range(64):
        logits = query[:, :, q].unflatten(1, (2, -1)) @ key[:, :, : q + 1].transpose(2, 3) * 0.25
        want[:, :, : q + 1] += weights[q] * logits.softmax(-1).sum(2)
    got = attention_columns(query, key, row_weights=weights, scale=0.25, block=block)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_equal_scores_drop_the_oldest_also_from_slots():
    """Keys that all look alike: α = 1 and no content leaves ties everywhere within a step."""
    query, key = torch.zeros(1, 1, 12, 4), torch.zeros(1, 1, 12, 4)
    value = torch.randn(1, 1, 12, 4)
    probs = torch.ones(12, 12).tril() / torch.arange(1.0, 13)[:, None]
    mask = eviction_mask(probs[None], 4, 0.0)
    out, ids, _ = read_by_rows(query, key, value, torch.zeros(1, 1, 12), budget=4, alpha=0.0, scale=1.0)
    want = mask[0].float() / mask[0].sum(-1, keepdim=True) @ value[0, 0]
    torch.testing.assert_close(out[0, 0], want)
    assert ids.tolist() == [[[8, 9, 10, 11]]]


# -- the cache against the procedure ----------------------------------------------------------------------------------

SETTINGS = [
    {"budget": 12, "alpha": 0.2},
    {"budget": 12, "alpha": 0.0},
    {"budget": 1, "alpha": 0.5},
    {"budget": 12, "alpha": 1.0, "recent": 0.5},
    {"budget": 12, "alpha": 0.9, "recent": 3, "sink": 2},
    {"budget": 12, "recent": 10, "sink": 2},
    {"budget": 100},
]
SIZES = [[1] * 64, [64], [40, *[1] * 24], [20, 5, 1, 1, 30, *[1] * 7]]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=["steps", "one block", "prompt and steps", "turns"])
def test_the_cache_gives_what_the_mask_gives(settings, sizes):
    method, stream = A2SF(**settings), Stream()
    with method.attach(_model()) as handle:
        got = stream.feed(handle, *sizes)
    torch.testing.assert_close(got, truth(stream, method), atol=1e-5, rtol=1e-5)
    assert all(layer.length == min(64, method.budget) for layer in stream.cache.layers)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("sizes", SIZES[1:], ids=["one block", "prompt and steps", "turns"])
def test_padded_sequences_are_their_own_runs(settings, sizes):
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, :16] = False
    method, stream = A2SF(**settings), Stream()
    with method.attach(_model()) as handle:
        got = stream.feed(handle, *sizes, mask=mask)
    want = truth(stream, method, starts=(0, 16))
    torch.testing.assert_close(got[:, 0], want[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[:, 1, :, 16:], want[:, 1, :, 16:], atol=1e-5, rtol=1e-5)
    assert torch.isfinite(got).all()


def test_a_ratio_is_of_the_tokens_seen():
    method, stream = A2SF(budget=0.25), Stream()
    with method.attach(_model()) as handle:
        got = stream.feed(handle, 64)
        torch.testing.assert_close(got, truth(stream, method), atol=1e-5, rtol=1e-5)
        assert stream.cache.layers[0].length == 16
        report = handle.report()
    assert report["cache_rows_kept"] == 0.25
    assert report["kv_bytes_held"] == stream.cache.layers[0].nbytes * 3


def test_a_block_prompt_is_read_densely_and_cut_at_once():
    method, stream = A2SF(budget=12, alpha=0.5, prompt="block"), Stream()
    with method.attach(_model()) as handle:
        got = stream.feed(handle, 40)
        torch.testing.assert_close(got, stream.dense(0)[:, :, :, :40], atol=1e-5, rtol=1e-5)
        for i, layer in enumerate(stream.cache.layers):
            scores = attention_columns(
                stream.query[i, :, :, :40], stream.key[i, :, :, :40], row_weights=fading_weights(0.5, 40), scale=0.25
            )
            assert torch.equal(layer.positions.long(), scores.topk(12).indices.sort().values)
        for step in range(3):
            stream.feed(handle, 1)
            assert all(layer.length == 12 for layer in stream.cache.layers)
            assert stream.cache.get_seq_length() == 41 + step


def test_prefill_mode_keeps_what_is_generated():
    method, stream = A2SF(budget=12, alpha=0.99, mode="prefill", recent=4), Stream()
    with method.attach(_model()) as handle:
        stream.feed(handle, 40)
        for layer in stream.cache.layers:
            assert layer.length == 12
            assert bool((layer.positions[:, :, -4:] == torch.arange(36, 40)).all())
        stream.feed(handle, *[1] * 10)
        assert all(layer.length == 22 for layer in stream.cache.layers)
        assert handle.report()["score_bytes_read"] == 0
        stream.feed(handle, 14)
        assert all(layer.length == 12 for layer in stream.cache.layers)


def test_rows_and_block_agree_where_nothing_is_dropped():
    results = []
    for prompt in ("rows", "block"):
        stream = Stream()
        with A2SF(budget=30, prompt=prompt).attach(_model()) as handle:
            results.append(stream.feed(handle, 20, *[1] * 44))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


def test_it_may_be_attached_to_a_cache_that_is_full():
    stream = Stream()
    runtime = AttentionRuntime(_model())
    try:
        stream.feed(type("Bare", (), {"runtime": runtime}), 40)
    finally:
        runtime.detach()
    with A2SF(budget=12).attach(_model()) as handle:
        first = stream.feed(handle, 1)
        torch.testing.assert_close(first, stream.dense(40)[:, :, :, :1], atol=1e-5, rtol=1e-5)
        assert all(layer.length == 12 for layer in stream.cache.layers)
        stream.feed(handle, 5, 1)
        assert all(layer.length == 12 for layer in stream.cache.layers)


def test_a_crop_within_the_budget_goes_on():
    with A2SF(budget=48).attach(_model()) as handle:
        stream, wrong = Stream(), Stream(seed=1)
        stream.feed(handle, 30)
        wrong.cache = stream.cache
        wrong.feed(handle, 1, 3)
        stream.cache.crop(-4)
        out = stream.feed(handle, *[1] * 34)
        assert torch.isfinite(out).all()
        assert all(layer.length == 48 for layer in stream.cache.layers)
        with pytest.raises(InputError, match="dropped"):
            stream.cache.crop(-20)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gemma3", "gpt2", "mistral"])
def test_families_generate_in_bounded_memory(family):
    model = tiny_model(family)
    ids = torch.randint(1, 256, (2, 30), generator=torch.Generator().manual_seed(0))
    ways = [{"do_sample": False}, {"do_sample": True}, {"num_beams": 2, "do_sample": False}]
    for prompt in ("rows", "block"):
        with A2SF(budget=16, prompt=prompt).attach(model) as handle:
            for way in ways:
                out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, **way)
                assert out.shape == (2, 42)
            held = handle.report()["cache_rows_kept"]
    assert held < 0.6


def test_a_window_layer_keeps_its_window_and_changes_nothing():
    model = tiny_model("gemma3")  # windows of 16
    ids = torch.randint(1, 256, (2, 90), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    want = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    cache = GossamerCache()
    with A2SF(budget=1000).attach(model):
        got = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, past_key_values=cache)
    assert torch.equal(got, want)
    assert [layer.length < 32 for layer in cache.layers] == [True, True, True, False]


def test_bfloat16_runs():
    model = tiny_model("llama").to(torch.bfloat16)
    ids = torch.randint(1, 256, (1, 30))
    with A2SF(budget=8).attach(model):
        assert model.generate(ids, max_new_tokens=5, attention_mask=torch.ones_like(ids)).shape == (1, 35)


def test_a_decode_method_selects_among_the_kept_rows():
    """Stacked: what is dropped depends on the kept rows, not on the selection, and a whole selection changes nothing."""
    outs, positions = [], []
    for tokens in (None, 1.0, 8):
        stream, method = Stream(), A2SF(budget=24, prompt="block")
        stack = [(method, None)] if tokens is None else [(Quest(tokens=tokens, page_size=4), None), (method, None)]
        with attach(_model(), stack) as handle:
            outs.append(stream.feed(handle, 40, *[1] * 24))
        positions.append([layer.positions for layer in stream.cache.layers])
        assert all(layer.length == 24 for layer in stream.cache.layers)
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=1e-5)
    assert (outs[0] - outs[2]).abs().max() > 1e-2
    assert all(torch.equal(a, b) for a, b in zip(positions[0], positions[2], strict=True))


def test_non_finite_keys_do_not_crash():
    for sizes in ([40, 1, 1], [1] * 42):
        stream = Stream()
        stream.key[:, 0, :, 7] = math.nan
        with A2SF(budget=12).attach(_model()) as handle:
            out = stream.feed(handle, *sizes)
        assert torch.isfinite(out[:, 1]).all()
        assert all(bool((layer.positions.diff(dim=2) > 0).all()) for layer in stream.cache.layers)


def test_inference_mode_may_come_and_go():
    with A2SF(budget=12).attach(_model()) as handle:
        want = Stream().feed(handle, 40, *[1] * 24)
        for first in (True, False):
            stream, got = Stream(), []
            for sizes, inside in (((40, 1), first), ((1, 5), not first), ([1] * 17, first)):
                with torch.inference_mode(inside), torch.no_grad():
                    got.append(stream.feed(handle, *sizes).clone())
            torch.testing.assert_close(torch.cat(got, 3), want, atol=1e-5, rtol=1e-5)


def test_the_random_state_is_left_alone():
    state = torch.get_rng_state()
    with A2SF(budget=12).attach(_model()) as handle:
        Stream().feed(handle, 60, 1, 1)
    assert torch.equal(torch.get_rng_state(), state)


# -- cost, settings, the long run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"prompt": "block"}, {"mode": "prefill"}])
def test_counted_bytes_are_the_promised_bytes(settings):
    method, stream = A2SF(budget=12, **settings), Stream(batch=3)
    with method.attach(_model()) as handle:
        stream.feed(handle, 62)
        handle.runtime.stats.reset()
        stream.feed(handle, 1)
        stats = handle.runtime.stats
        want = method.io_bytes(63, handle.runtime.shape, 4)
    assert (stats.kv_bytes, stats.score_bytes) == (9 * want["rows"], 9 * want["scores"])


def test_detach_restores_and_inputs_are_untouched():
    model = _model()
    ids = torch.arange(1, 40)[None]
    before, weights = model(ids).logits, copy.deepcopy(model.state_dict())
    stream = Stream()
    held = copy.deepcopy((stream.query, stream.key, stream.value))
    handle = A2SF(budget=8).attach(model)
    stream.feed(handle, 40, *[1] * 10)
    handle.detach()
    handle.detach()
    assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(held, (stream.query, stream.key, stream.value), strict=True))


BAD = [
    {"budget": 0},
    {"budget": 1.5},
    {"budget": "some"},
    {"alpha": -0.1},
    {"alpha": 1.1},
    {"alpha": math.nan},
    {"recent": -1},
    {"recent": 1.5},
    {"sink": -1},
    {"budget": 8, "sink": 9},
    {"budget": 8, "sink": 4, "recent": 5},
    {"mode": "sometimes"},
    {"prompt": "never"},
    {"tokens": 3},
]


@pytest.mark.parametrize("settings", BAD, ids=str)
def test_bad_settings_are_one_line(settings):
    with pytest.raises(InputError) as error:
        A2SF(**settings)
    assert "\n" not in str(error.value)
    assert "a2sf" in str(error.value)


def test_bad_attention_maps_are_one_line():
    for probs, kv_heads in ((torch.rand(4, 5, 6), None), (torch.rand(5, 5), None), (torch.rand(4, 5, 5), 3)):
        with pytest.raises(InputError) as error:
            A2SF().mask_for(probs, kv_heads)
        assert "\n" not in str(error.value)


def test_settings_round_trip():
    method = A2SF(budget="1/8", alpha=0.5, recent=2)
    assert method.settings() == {"budget": 0.125, "alpha": 0.5, "recent": 2}
    assert A2SF(**method.settings()) == method
    assert A2SF().settings() == {}


def test_two_thousand_tokens_in_flat_memory():
    model, budget = tiny_model("llama", num_hidden_layers=2), 48
    cache = GossamerCache()
    token, storage = torch.tensor([[5]]), None
    with torch.inference_mode(), A2SF(budget=budget, alpha=0.5).attach(model) as handle:
        for step in range(2000):
            logits = model(token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].topk(3).indices[..., step % 3]
            if step == 300:
                storage = [layer.key_storage.data_ptr() for layer in cache.layers]
            if step % 500 == 0:
                assert torch.isfinite(logits).all()
        states = [handle.runtime.view_of(i).cache_state for i in range(2)]
    assert torch.isfinite(logits).all()
    assert cache.get_seq_length() == 2000
    for layer, state, pointer in zip(cache.layers, states, storage, strict=True):
        assert (layer.length, layer.dropped, layer.capacity) == (budget, 2000 - budget, 256)
        assert layer.key_storage.data_ptr() == pointer
        assert bool((layer.positions.diff(dim=2) > 0).all())
        assert 0 <= int(layer.positions.min()) <= int(layer.positions.max()) < 2000
        assert state.scores.shape == (1, 2, budget)
        assert torch.isfinite(state.scores).all()
        assert bool((state.scores > 0).all())
