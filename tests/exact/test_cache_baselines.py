"""H2O, TOVA and SnapKV against their definitions, written out by hand."""

import math

import pytest
import torch

from gossamer.cache.h2o import H2O
from gossamer.cache.snapkv import SnapKV, window_scores
from gossamer.cache.tova import Tova, last_query_scores
from gossamer.errors import InputError
from gossamer.hf import GossamerCache
from gossamer.models import tiny_model
from gossamer.registry import make
from gossamer.testing import Stream, _model

ALL = [("h2o", {}), ("h2o", {"prompt": "block"}), ("tova", {}), ("tova", {"per_head": True}), ("snapkv", {"window": 4})]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def probabilities(stream, layer, position, rows):
    """Attention of one query over some rows per KV head ``[batch, kv_heads, group, n]``; rows ``[batch, kv_heads, n]``."""
    key = stream.key[layer].gather(2, rows[..., None].expand(-1, -1, -1, stream.key.shape[-1]))
    query = stream.query[layer, :, :, position].unflatten(1, (key.shape[1], -1))
    return (query @ key.transpose(2, 3) * 0.25).softmax(-1)


# -- H2O --------------------------------------------------------------------------------------------------------------


def test_h2o_keeps_the_recent_half_and_the_heaviest_rest():
    """Token by token, with sums over everything that was there, never forgotten."""
    stream, budget = Stream(batch=1), 8
    with H2O(budget=budget).attach(_model()) as handle:
        stream.feed(handle, *[1] * 40)
    for i, layer in enumerate(stream.cache.layers):
        for h in range(2):
            kept, total = [], torch.zeros(40)
            for t in range(40):
                kept.append(t)
                rows = torch.tensor(kept)[None, None].expand(1, 2, -1)
                total[kept] += probabilities(stream, i, t, rows)[0, h].sum(0)
                if len(kept) > budget:
                    kept.remove(min((k for k in kept if k <= t - budget // 2), key=lambda k: float(total[k])))
            assert layer.positions[0, h].tolist() == kept
            assert kept[-4:] == [36, 37, 38, 39]


def test_h2o_does_not_forget():
    with pytest.raises(InputError, match="alpha"):
        H2O(alpha=0.5)
    assert H2O.baseline
    assert H2O().settings() == {}


# -- TOVA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_head", [False, True])
def test_tova_drops_what_the_last_query_sees_least(per_head):
    stream, budget = Stream(), 10
    with Tova(budget=budget, per_head=per_head).attach(_model()) as handle:
        stream.feed(handle, 20)
        for t in range(20, 40):
            before = [layer.positions.long() for layer in stream.cache.layers]
            stream.feed(handle, 1)
            for i, layer in enumerate(stream.cache.layers):
                rows = torch.cat([before[i], torch.full((2, 2, 1), t)], 2)
                probs = probabilities(stream, i, t, rows)
                seen = probs.mean(2) if per_head else probs.mean((1, 2))[:, None].expand(-1, 2, -1)
                want = rows[torch.arange(rows.shape[2]) != seen.argmin(-1, keepdim=True)].view(2, 2, budget)
                assert torch.equal(layer.positions.long(), want)
    same = all(torch.equal(x.positions[:, 0], x.positions[:, 1]) for x in stream.cache.layers)
    assert same is not per_head


def test_tova_cuts_a_prompt_by_its_last_query():
    stream = Stream()
    with Tova(budget=10).attach(_model()) as handle:
        got = stream.feed(handle, 40)
    torch.testing.assert_close(got, stream.dense(0)[:, :, :, :40], atol=1e-5, rtol=1e-5)
    for i, layer in enumerate(stream.cache.layers):
        rows = torch.arange(40).expand(2, 2, -1)
        seen = probabilities(stream, i, 39, rows).mean((1, 2))
        want = seen.topk(10).indices.sort(-1).values
        assert torch.equal(layer.positions.long(), want[:, None].expand(-1, 2, -1))


def test_tova_scores_are_means():
    stream = Stream()
    scores = last_query_scores(stream.query[0, :, :, 63], stream.key[0], None, 0.25, per_head=False)
    torch.testing.assert_close(scores.sum(-1), torch.ones(2, 2))


# -- SnapKV -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_snapkv_keeps_the_window_and_its_pooled_hits(pooling):
    stream = Stream()
    with SnapKV(budget=16, window=6, kernel_size=3, pooling=pooling).attach(_model()) as handle:
        got = stream.feed(handle, 40)
        kept = [layer.positions.long() for layer in stream.cache.layers]
        stream.feed(handle, *[1] * 5)
        assert all(layer.length == 21 for layer in stream.cache.layers)
        assert handle.report()["score_bytes_read"] == 0
    torch.testing.assert_close(got, stream.dense(0)[:, :, :, :40], atol=1e-5, rtol=1e-5)
    for i, positions in enumerate(kept):
        total = torch.zeros(2, 2, 40)
        for t in range(34, 40):
            total[:, :, : t + 1] += probabilities(stream, i, t, torch.arange(t + 1).expand(2, 2, -1)).sum(2)
        near = torch.stack([torch.nn.functional.pad(total[..., :34], (1, 1)).narrow(-1, j, 34) for j in range(3)])
        pooled = near.mean(0) if pooling == "avg" else near.amax(0)
        want = torch.cat(
            [pooled.argsort(stable=True)[..., -10:].sort(-1).values, torch.arange(34, 40).expand(2, 2, -1)], 2
        )
        assert torch.equal(positions, want)


def test_snapkv_scores_leave_the_window_in():
    stream = Stream()
    scores = window_scores(stream.query[0, :, :, 56:], stream.key[0], None, 0.25, 5, "avg")
    assert scores.shape == (2, 2, 64)
    assert bool((scores[:, :, 56:] == math.inf).all())
    assert bool((scores[:, :, :56] < math.inf).all())


# -- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slug", "settings"), ALL, ids=str)
def test_a_budget_above_the_context_is_dense(slug, settings):
    stream = Stream()
    with make(slug, **{**settings, "budget": 64}).attach(_model()) as handle:
        got = stream.feed(handle, 40, *[1] * 24)
        assert handle.report()["cache_rows_kept"] == 1.0
    torch.testing.assert_close(got, stream.dense(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("slug", "settings"), ALL, ids=str)
def test_padded_sequences_are_their_own_runs(slug, settings):
    method = make(slug, **{**settings, "budget": 12})
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, :16] = False
    stream = Stream()
    long, short = stream.pick(torch.tensor([0])), stream.pick(torch.tensor([1]), start=16)
    with method.attach(_model()) as handle:
        together = stream.feed(handle, 40, *[1] * 24, mask=mask)
        first, second = long.feed(handle, 40, *[1] * 24), short.feed(handle, 24, *[1] * 24)
    torch.testing.assert_close(together[:, :1], first, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[:, 1:, :, 16:], second, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("slug", "settings"), ALL, ids=str)
def test_counted_bytes_are_the_promised_bytes(slug, settings):
    method, stream = make(slug, **{**settings, "budget": 12}), Stream(batch=3)
    with method.attach(_model()) as handle:
        stream.feed(handle, 62)
        handle.runtime.stats.reset()
        stream.feed(handle, 1)
        stats, want = handle.runtime.stats, method.io_bytes(63, handle.runtime.shape, 4)
    assert (stats.kv_bytes, stats.score_bytes) == (9 * want["rows"], 9 * want["scores"])


@pytest.mark.parametrize(("slug", "settings"), ALL, ids=str)
def test_generate_and_a_long_run_stay_bounded(slug, settings):
    model, budget = tiny_model("llama", num_hidden_layers=2), 24
    cache = GossamerCache()
    ids = torch.randint(1, 256, (1, 50), generator=torch.Generator().manual_seed(1))
    with make(slug, **{**settings, "budget": budget}).attach(model):
        logits = model(ids, past_key_values=cache, use_cache=True).logits
        for step in range(200):
            token = logits[:, -1:].topk(3).indices[..., step % 3]
            logits = model(token, past_key_values=cache, use_cache=True).logits
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, num_beams=2)
    assert out.shape == (1, 55)
    assert torch.isfinite(logits).all()
    assert cache.get_seq_length() == 250
    generated = 200 if slug == "snapkv" else 0
    for layer in cache.layers:
        assert layer.length == budget + generated
        assert bool((layer.positions.diff(dim=2) > 0).all())
        assert int(layer.positions.max()) < 250


@pytest.mark.parametrize(("slug", "settings"), ALL, ids=str)
def test_two_runs_are_the_same(slug, settings):
    outs = []
    for _ in range(2):
        with make(slug, **{**settings, "budget": 8}).attach(_model()) as handle:
            outs.append(Stream().feed(handle, 40, *[1] * 10))
    assert torch.equal(*outs)


@pytest.mark.parametrize(("slug", "settings"), ALL, ids=str)
def test_settings_round_trip(slug, settings):
    method = make(slug, **{**settings, "budget": 0.5})
    assert make(slug, **method.settings()) == method
    assert type(method).baseline


BAD = [
    ("h2o", {"budget": 0}),
    ("h2o", {"recent": 2.0}),
    ("tova", {"budget": 1.5}),
    ("tova", {"sink": 4}),
    ("snapkv", {"kernel_size": 4}),
    ("snapkv", {"window": 0}),
    ("snapkv", {"budget": 16}),
    ("snapkv", {"pooling": "median"}),
]


@pytest.mark.parametrize(("slug", "settings"), BAD, ids=str)
def test_bad_settings_are_one_line(slug, settings):
    with pytest.raises(InputError) as error:
        make(slug, **settings)
    assert "\n" not in str(error.value)
    assert slug in str(error.value)
