"""ZipVL by its card: probes, the two scores, the sparse reading of a prompt, and what the cache holds afterwards."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.attention import attach
from gossamer.attention.quest import Quest
from gossamer.attention.zipvl import (
    ZipVL,
    important,
    probe_positions,
    probe_scores,
    probes_that_see,
    rows_to_keep,
    select_by_mass,
    sparse_attention,
)
from gossamer.cache.h2o import H2O
from gossamer.cache.rtn_kv import RTNKV
from gossamer.errors import InputError, RecipeError
from gossamer.hf import dense_attention, load_cache, save_cache
from gossamer.models import tiny_model
from gossamer.testing import Stream


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def attention_map(query, key, scale):
    """A' of all rows ``[heads, n, n]``, by the formula."""
    key = key[0].repeat_interleave(query.shape[1] // key.shape[1], 0)
    logits = query[0] @ key.transpose(1, 2) * scale
    later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(later, -math.inf).softmax(-1)


def tensors(n=40, heads=4, kv_heads=2, d=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    make = lambda h: torch.randn(1, h, n, d, generator=g)  # noqa: E731
    return 2 * make(heads), make(kv_heads), make(kv_heads)


scores_lists = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60).filter(lambda s: sum(s) > 1e-3)


# -- how many (checks 2 and 3) ----------------------------------------------------------------------------------------


@given(scores=scores_lists, tau=st.floats(0.01, 0.999))
@settings(max_examples=200, deadline=None)
def test_the_count_is_the_fewest_that_hold_the_share(scores, tau):
    p = int(select_by_mass(torch.tensor(scores), tau))
    ordered = sorted(map(float, torch.tensor(scores)), reverse=True)
    slack = 1e-10 * sum(ordered)
    assert 1 <= p <= len(scores)
    assert sum(ordered[:p]) >= tau * sum(ordered) - slack
    assert p == 1 or sum(ordered[: p - 1]) < tau * sum(ordered) + slack


@given(scores=scores_lists, taus=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)))
@settings(max_examples=100, deadline=None)
def test_the_count_grows_with_the_share(scores, taus):
    low, high = sorted(taus)
    assert select_by_mass(torch.tensor(scores), low) <= select_by_mass(torch.tensor(scores), high)


@pytest.mark.parametrize("n", [1, 7, 10, 40, 100, 1000])
@pytest.mark.parametrize("tau", [0.1, 0.5, 0.9, 0.975, 1.0])
def test_uniform_attention_keeps_the_share_itself(n, tau):
    want = math.ceil(round(tau * n, 6))
    assert int(select_by_mass(torch.full((n,), 1 / n), tau)) == want


def test_a_single_column_is_enough_where_it_gets_everything():
    one_hot = torch.zeros(50)
    one_hot[13] = 128.0
    assert int(select_by_mass(one_hot, 0.975)) == 1
    assert int(select_by_mass(one_hot, 1.0)) == 50  # τ = 1 is all tokens
    assert int(select_by_mass(torch.zeros(5), 0.5)) == 1  # clipped


def test_counts_of_a_batch_are_those_of_its_lines():
    scores = torch.rand(3, 2, 30) ** 4
    got = select_by_mass(scores, 0.9)
    assert got.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            assert got[i, j] == select_by_mass(scores[i, j], 0.9)


@pytest.mark.parametrize("tau", [0.0, -1.0, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(tau):
    with pytest.raises(InputError, match="tau"):
        select_by_mass(torch.ones(3), tau)


@pytest.mark.parametrize("bad", [[1.0, math.nan], [1.0, math.inf], [1.0, -0.1], []])
def test_scores_that_are_none_are_refused(bad):
    with pytest.raises(InputError, match="scores"):
        select_by_mass(torch.tensor(bad), 0.5)


# -- probes and the two scores (checks 4 and 6) -----------------------------------------------------------------------


@given(n=st.integers(1, 300), recent=st.integers(1, 70), earlier=st.integers(0, 70), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_probes_are_the_last_rows_and_others_before(n, recent, earlier, seed):
    probes = probe_positions(n, recent, earlier, torch.Generator().manual_seed(seed))
    assert bool((probes.diff() > 0).all())
    assert len(probes) == min(n, recent) + min(max(0, n - recent), earlier)
    assert probes[-min(n, recent) :].tolist() == list(range(max(0, n - recent), n))
    again = probe_positions(n, recent, earlier, torch.Generator().manual_seed(seed))
    assert torch.equal(probes, again)
    assert probes_that_see(probes, n).tolist() == [max(1, int((probes >= j).sum())) for j in range(n)]


def test_the_divisor_counts_the_probes_at_or_after_a_column():
    query, key, _ = tensors()
    probes = torch.tensor([3, 10, 30, 39])
    a, normalised = probe_scores(query[:, :, probes], key, probes)
    divisor = torch.tensor([4] * 4 + [3] * 7 + [2] * 20 + [1] * 9)
    torch.testing.assert_close(normalised, a / divisor)
    # Equal attention of all probes: after the division no column has an advantage among those that as many see.
    a, normalised = probe_scores(torch.zeros(1, 4, 4, 8), key, probes)
    assert bool((a[0, 0] > a[0, 35] * 4).all())
    torch.testing.assert_close(normalised[0, 35], torch.tensor(1 / 40))


def test_a_probe_sees_up_to_itself():
    query, key, _ = tensors()
    probes = torch.tensor([5, 39])
    full = attention_map(query, key, 8**-0.5)
    a, _ = probe_scores(query[:, :, probes], key, probes)
    torch.testing.assert_close(a[0], full.mean(0)[probes].sum(0))
    assert float(a.sum()) == pytest.approx(2, abs=1e-5)


@pytest.mark.parametrize("scale", [None, 0.7])
def test_all_rows_as_probes_are_the_exact_column_sums(scale):
    query, key, _ = tensors()
    probes = probe_positions(40, 30, 64)
    assert probes.tolist() == list(range(40))
    a, normalised = probe_scores(query, key, probes, scale)
    exact = attention_map(query, key, scale or 8**-0.5).mean(0).sum(0)
    torch.testing.assert_close(a[0], exact)
    torch.testing.assert_close(normalised[0], exact / torch.arange(40, 0, -1))


def test_count_and_membership_come_from_different_scores():
    """A prompt on which the raw score would choose other members, and the normalised one another number."""
    query, key, _ = tensors(n=200, seed=3)
    method = ZipVL(tau=0.8, probes=(16, 16), cache="none")
    probes = probe_positions(200, 16, 16, torch.Generator().manual_seed(1))
    a, normalised = probe_scores(query[:, :, probes], key, probes)
    count = method.count(a[0])
    assert count == int(select_by_mass(a[0], 0.8)) != int(select_by_mass(normalised[0], 0.8))
    assert not torch.equal(important(normalised[0], count), important(a[0], count))


# -- the sparse reading (checks 1 and 5) ------------------------------------------------------------------------------


def test_important_tokens_attend_among_themselves_and_the_others_give_zero():
    query, key, value = tensors()
    ids = torch.tensor([0, 3, 4, 17, 38, 39])
    out = sparse_attention(query, key, value, ids, 0.3)
    others = torch.ones(40, dtype=torch.bool)
    others[ids] = False
    assert bool((out[:, :, others] == 0).all())
    repeated = value[:, :, ids].repeat_interleave(2, 1)
    want = attention_map(query[:, :, ids], key[:, :, ids], 0.3) @ repeated[0]
    torch.testing.assert_close(out[0, :, ids], want)
    everything = torch.arange(40)
    torch.testing.assert_close(
        sparse_attention(query, key, value, everything, 0.3), dense_attention(query, key, value, 0.3)
    )


@pytest.mark.parametrize("starts", [None, 20])
def test_the_whole_mass_is_dense_attention(starts):
    mask = torch.ones(2, 64, dtype=torch.bool)
    first = 0
    if starts:
        mask[1, :starts], first = False, starts
    stream = Stream()
    with ZipVL(tau=1.0, cache="none", probes=(8, 8)).attach(stream_model()) as handle:
        got = stream.feed(handle, 64, mask=mask)
        report = handle.report()
    assert report["ratios"] == [1.0] * 3
    want = stream.dense(0)
    torch.testing.assert_close(got[:, 0], want[:, 0], atol=1e-5, rtol=0)
    alone = stream.pick(torch.tensor([1]), start=first)
    torch.testing.assert_close(got[:, 1:, :, first:], alone.dense(0), atol=1e-5, rtol=0)


def stream_model():
    from gossamer.testing import _model

    return _model()


def reference(stream, layer, b, method, start=0):
    """T of one sequence and its output, step by step from the whole attention map."""
    query, key, value = (x[layer, b : b + 1, :, start:] for x in (stream.query, stream.key, stream.value))
    n = query.shape[2]
    generator = torch.Generator().manual_seed((method.seed * 1_000_003 + layer) * 1_000_003 + n)
    recent, earlier = method.probes
    drawn = torch.randperm(n - recent, generator=generator)[:earlier]
    probes = sorted([*drawn.tolist(), *range(n - recent, n)])
    rows = attention_map(query, key, 0.25)[:, probes]
    a = rows.sum(1).mean(0)
    seen = torch.tensor([sum(i >= j for i in probes) for j in range(n)])
    ordered, p, held = a.sort(descending=True).values.double(), 0, 0.0
    while held < method.tau * float(a.double().sum()):
        held += float(ordered[p])
        p += 1
    best = (a / seen)[:-1].topk(p - 1).indices
    ids = sorted([*best.tolist(), n - 1])
    mask = torch.zeros(n, n, dtype=torch.bool)
    for i in ids:
        mask[i, [j for j in ids if j <= i]] = True
    keys = key[0].repeat_interleave(query.shape[1] // key.shape[1], 0)
    values = value[0].repeat_interleave(query.shape[1] // key.shape[1], 0)
    logits = (query[0] @ keys.transpose(1, 2) * 0.25).masked_fill(~mask, -math.inf)
    return ids, logits.softmax(-1).nan_to_num(0.0) @ values


@pytest.mark.parametrize("padding", [0, 24])
@pytest.mark.parametrize("tau", [0.6, 0.9])
def test_a_prompt_is_read_as_the_card_says(tau, padding):
    method = ZipVL(tau=tau, cache="none", probes=(8, 8), seed=5)
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, :padding] = False
    stream = Stream()
    with method.attach(stream_model()) as handle:
        got = stream.feed(handle, 64, mask=mask)
        ratios = handle.report()["ratios"]
    for layer in range(3):
        share = []
        for b, start in enumerate((0, padding)):
            ids, out = reference(stream, layer, b, method, start)
            torch.testing.assert_close(got[layer, b, :, start:], out, atol=1e-5, rtol=1e-5)
            assert bool((got[layer, b, :, :start] == 0).all())
            share.append(len(ids) / (64 - start))
            assert 63 - start in ids
        assert ratios[layer] == pytest.approx(sum(share) / 2)


def test_the_last_token_is_always_important():
    """Keys that no one reads but one: the last token would not be chosen by its score."""
    stream = Stream(batch=1)
    stream.key[..., -1, :] = -10 * stream.query[:, :, ::2, -1]
    stream.key[..., 5, :] = 10 * stream.query[:, :, ::2, -1]
    with ZipVL(ratio=1 / 64, cache="none", probes=(1, 0)).attach(stream_model()) as handle:
        out = stream.feed(handle, 64)
    assert bool((out[..., :-1, :] == 0).all())
    torch.testing.assert_close(out[..., -1, :], stream.value[..., -1, :].repeat_interleave(2, 2))


def test_the_report_says_what_was_computed():
    stream = Stream(batch=1)
    with ZipVL(tau=0.8, cache="none", probes=(8, 8)).attach(stream_model()) as handle:
        assert "ratios" not in handle.report()
        stream.feed(handle, 64)
        report = handle.report()
    assert len(report["ratios"]) == 3
    assert report["prefill_ratio"] == pytest.approx(sum(report["ratios"]) / 3)
    kept = [round(64 * r) for r in report["ratios"]]
    assert report["prefill_area"] == pytest.approx(sum(p * (p + 1) for p in kept) / 3 / (64 * 65))
    assert report["prefill_area_of_heads"] == {
        i: pytest.approx([p * (p + 1) / (64 * 65)] * 4) for i, p in enumerate(kept)
    }
    drawn = [
        probe_positions(64, 8, 8, torch.Generator().manual_seed(i * 1_000_003 + 64)) + 1 for i in range(3)
    ]  # a probe at position i scores i + 1 keys
    assert report["probe_area"] == pytest.approx(sum(int(p.sum()) for p in drawn) / 3 / (64 * 65 / 2))
    assert "kv_bytes_held" not in report


def test_padding_and_later_blocks_count_as_for_other_methods():
    """As a share of all pairs of the call: padding is not computed, a block that follows cached rows is."""
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, :24] = False
    stream = Stream()
    with ZipVL(ratio=0.5, cache="none", probes=(8, 8)).attach(stream_model()) as handle:
        stream.feed(handle, 48, mask=mask)
        first = (24 * 25 + 12 * 13) / 2
        assert handle.report()["prefill_area"] == pytest.approx(first / (48 * 49))
        stream.feed(handle, 16, mask=mask)
        later = 2 * (64 * 65 - 48 * 49) / 2
        assert handle.report()["prefill_area"] == pytest.approx((first + later) / (64 * 65))


def test_a_fixed_ratio_is_the_same_in_all_layers():
    with ZipVL(ratio=0.5, cache="none", probes=(8, 8)).attach(stream_model()) as handle:
        Stream().feed(handle, 64)
        assert handle.report()["ratios"] == [0.5] * 3


def test_a_later_block_is_read_densely_and_says_so_once():
    stream = Stream(batch=1)
    with ZipVL(ratio=0.25, cache="none", probes=(8, 8)).attach(stream_model()) as handle:
        stream.feed(handle, 32)
        ratios = handle.report()["ratios"]
        got = stream.feed(handle, 16, 16)
        assert handle.report()["ratios"] == ratios
        said = [m for m in handle.runtime.said.values() if "zipvl" in m]
    torch.testing.assert_close(got, stream.dense(32), atol=1e-5, rtol=1e-5)
    assert len(said) == 1


@pytest.mark.parametrize("length", [2, 3, 5, 16, 17])
@pytest.mark.parametrize("cache", ["none", "evict"])
def test_short_prompts_have_all_their_rows_as_probes(length, cache):
    stream = Stream(length=length + 2)
    with ZipVL(tau=0.7, cache=cache).attach(stream_model()) as handle:
        out = stream.feed(handle, length, 1, 1)
        assert all(1 / length <= r <= 1 for r in handle.report()["ratios"])
    assert bool(out.isfinite().all())


def test_sequences_do_not_matter_to_each_other():
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, :16] = False
    stream = Stream()
    short = stream.pick(torch.tensor([1]), start=16)
    with ZipVL(tau=0.8, cache="none", probes=(8, 8)).attach(stream_model()) as handle:
        together = stream.feed(handle, 60, *[1] * 4, mask=mask)
        alone = short.feed(handle, 44, *[1] * 4)
    torch.testing.assert_close(together[:, 1:, :, 16:], alone, atol=1e-5, rtol=1e-5)


def test_random_numbers_are_left_alone_and_runs_repeat():
    state, outs = torch.get_rng_state(), []
    for _ in range(2):
        with ZipVL(tau=0.8, cache="none", probes=(4, 8)).attach(stream_model()) as handle:
            outs.append(Stream().feed(handle, 64))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*outs)
    with ZipVL(tau=0.8, cache="none", probes=(4, 8), seed=1).attach(stream_model()) as handle:
        assert not torch.equal(Stream().feed(handle, 64), outs[0])


# -- the cache, v2 (check 9) ------------------------------------------------------------------------------------------


def test_evict_holds_the_important_tokens_of_each_layer():
    method = ZipVL(tau=0.7, cache="evict", probes=(8, 8))
    stream = Stream(batch=1)
    with method.attach(stream_model()) as handle:
        stream.feed(handle, 60)
        lengths = [layer.length for layer in stream.cache.layers]
        ratios = handle.report()["ratios"]
        held = handle.report()["kv_bytes_held"]
        prompt = stream.pick(torch.tensor([0]))
        for x in ("query", "key", "value"):
            setattr(prompt, x, getattr(prompt, x)[:, :, :, :60])
        for i, layer in enumerate(stream.cache.layers):
            ids, _ = reference(prompt, i, 0, method)
            assert layer.positions[0].tolist() == [ids, ids]
            assert torch.equal(layer.keys, stream.key[i][:, :, ids])
        got = stream.feed(handle, *[1] * 4)
    assert lengths == [round(60 * r) for r in ratios]
    assert len(set(lengths)) > 1, "ragged over layers"
    assert held == sum(lengths) * 2 * 2 * 16 * 4
    assert [layer.length for layer in stream.cache.layers] == [n + 4 for n in lengths]
    assert bool(got.isfinite().all())


def test_a_ragged_batch_fills_up_with_padding_then_with_the_next_best():
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3, 0.9], [-math.inf, -math.inf, 0.1, 0.2, 0.9]])
    chosen = [torch.tensor([1, 2, 3, 4]), torch.tensor([4])]
    assert rows_to_keep(chosen, scores).tolist() == [[1, 2, 3, 4], [0, 1, 3, 4]]
    method, mask = ZipVL(tau=0.7, cache="evict", probes=(8, 8)), torch.ones(2, 64, dtype=torch.bool)
    mask[1, :40] = False
    stream = Stream()
    short = stream.pick(torch.tensor([1]), start=40)
    with method.attach(stream_model()) as handle:
        together = stream.feed(handle, 60, *[1] * 4, mask=mask)
        for layer in stream.cache.layers:
            assert layer.starts is not None
            assert layer.starts[1] > 0
        alone = short.feed(handle, 20, *[1] * 4)
    torch.testing.assert_close(together[:, 1:, :, 40:], alone, atol=1e-5, rtol=1e-5)


def test_layers_with_a_window_are_left_as_they_are():
    model = tiny_model("gemma3")
    ids = torch.randint(1, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    with ZipVL(ratio=0.5, cache="evict", probes=(8, 8)).attach(model) as handle:
        cache = model(ids, use_cache=True).past_key_values
        assert [layer.length for layer in cache.layers] == [40, 40, 40, 20]
        assert model(ids[:, :1], past_key_values=cache).logits.isfinite().all()
        assert any("window" in m for m in handle.runtime.said.values())
        assert handle.report()["ratios"] == [1.0, 1.0, 1.0, 0.5]
        assert handle.report()["prefill_area"] == pytest.approx((3 + 20 * 21 / (40 * 41)) / 4)
    with ZipVL(ratio=0.5, probes=(8, 8), interval=4).attach(model):
        cache = model(ids, use_cache=True).past_key_values
        assert [len(layer.parts) for layer in cache.layers] == [0, 0, 0, 2]
        want = model(ids[:, :6], past_key_values=copy.deepcopy(cache)).logits
        for t in range(6):
            got = model(ids[:, t : t + 1], past_key_values=cache).logits
            assert got.isfinite().all()
    assert [len(layer.parts) for layer in cache.layers] == [0, 0, 0, 4]
    assert [layer.length for layer in cache.layers] == [46] * 4
    assert want.isfinite().all()


# -- the cache, v1 (check 8) ------------------------------------------------------------------------------------------


def over_the_cache(stream, t):
    """Attention of token t over what the cache gives back, ``[layers, batch, heads, d]``."""
    outs = []
    for i, layer in enumerate(stream.cache.layers):
        query = stream.query[i, :, :, t].unflatten(1, (2, 2))
        logits = torch.einsum("bkgd,bksd->bkgs", query, layer.keys) * 0.25
        outs.append(torch.einsum("bkgs,bksd->bkgd", logits.softmax(-1), layer.values).flatten(1, 2))
    return torch.stack(outs)


def test_quant_stores_the_important_tokens_in_more_bits():
    method, stream = ZipVL(tau=0.7, probes=(8, 8)), Stream(batch=1, length=62)
    prompt = stream.pick(torch.tensor([0]))
    for x in ("query", "key", "value"):
        setattr(prompt, x, getattr(prompt, x)[:, :, :, :60])
    with method.attach(stream_model()) as handle:
        stream.feed(handle, 60)
        for i, layer in enumerate(stream.cache.layers):
            ids, _ = reference(prompt, i, 0, method)
            high, low = layer.parts
            assert (high.key.bits, high.value.bits, low.key.bits, low.value.bits) == (4, 4, 2, 2)
            assert high.positions[0].tolist() == ids
            assert sorted(ids + low.positions[0].tolist()) == list(range(60))
            assert (layer.length, layer.recent) == (60, 0)
            codes = sum(x.codes.numel() for part in layer.parts for x in (part.key, part.value))
            assert codes * 8 == 2 * 2 * 16 * (len(ids) * 4 + (60 - len(ids)) * 2)
        held = handle.report()["kv_bytes_held"]
        assert held == sum(layer.nbytes for layer in stream.cache.layers) < 0.4 * 3 * 60 * 2 * 2 * 16 * 4
        for t in (60, 61):
            got = stream.feed(handle, 1)
            torch.testing.assert_close(got[:, :, :, 0], over_the_cache(stream, t), atol=1e-3, rtol=1e-3)
            assert torch.equal(stream.cache.layers[0].keys[:, :, t], stream.key[0, :, :, t])


def test_every_hundred_new_tokens_are_compressed():
    """By the attention of the query that completes them, over them alone."""
    method, stream = ZipVL(tau=0.6, probes=(8, 8)), Stream(batch=1, length=275)
    with method.attach(stream_model()) as handle:
        stream.feed(handle, 60, *[1] * 99)
        assert [(layer.length, layer.recent, len(layer.parts)) for layer in stream.cache.layers] == [(159, 99, 2)] * 3
        before = handle.report()["kv_bytes_held"]
        stream.feed(handle, 1)
        assert handle.report()["kv_bytes_held"] < before
        assert [(layer.length, layer.recent, len(layer.parts)) for layer in stream.cache.layers] == [(160, 0, 4)] * 3
        for i, layer in enumerate(stream.cache.layers):
            logits = (
                stream.query[i, 0, :, 159].unflatten(0, (2, 2)) @ stream.key[i, 0, :, 60:160].transpose(1, 2) * 0.25
            )
            row = logits.softmax(-1).flatten(0, 1).mean(0)
            count = int(select_by_mass(row, 0.6))
            ids = sorted((row.topk(count).indices + 60).tolist())
            assert layer.parts[2].positions[0].tolist() == ids
            assert layer.parts[2].key.bits == 4
            assert sorted(ids + layer.parts[3].positions[0].tolist()) == list(range(60, 160))
        got = stream.feed(handle, *[1] * 100)
        assert [(layer.length, layer.recent, len(layer.parts)) for layer in stream.cache.layers] == [(260, 0, 6)] * 3
        assert bool(got.isfinite().all())
        got = stream.feed(handle, 1)
        torch.testing.assert_close(got[:, :, :, 0], over_the_cache(stream, 260), atol=1e-3, rtol=1e-3)


def test_sequences_do_not_matter_to_each_other_in_a_quantised_cache():
    mask = torch.ones(2, 80, dtype=torch.bool)
    mask[1, :24] = False
    stream = Stream(length=80)
    short = stream.pick(torch.tensor([1]), start=24)
    with ZipVL(tau=0.7, probes=(8, 8), interval=12).attach(stream_model()) as handle:
        together = stream.feed(handle, 60, *[1] * 20, mask=mask)
        alone = short.feed(handle, 36, *[1] * 20)
    torch.testing.assert_close(together[:, 1:, :, 24:], alone, atol=1e-4, rtol=1e-4)


def test_eight_bits_are_nearly_the_whole_cache():
    stream, whole = Stream(), Stream()
    with ZipVL(tau=0.7, probes=(8, 8), bits=(8, 8)).attach(stream_model()) as handle:
        got = stream.feed(handle, 44, *[1] * 20)
    with ZipVL(tau=0.7, probes=(8, 8), cache="none").attach(stream_model()) as handle:
        want = whole.feed(handle, 44, *[1] * 20)
    assert torch.equal(got[:, :, :, :44], want[:, :, :, :44])
    torch.testing.assert_close(got, want, atol=0.1, rtol=0)
    assert not torch.equal(got, want)


def test_a_turn_is_read_over_the_dequantised_rows_and_waits_to_be_compressed():
    stream = Stream(batch=1, length=80)
    with ZipVL(tau=0.7, probes=(8, 8), interval=16).attach(stream_model()) as handle:
        stream.feed(handle, 40)
        kept = [(layer.keys, layer.values) for layer in stream.cache.layers]
        got = stream.feed(handle, 10)
        assert [layer.recent for layer in stream.cache.layers] == [10] * 3
        for i, (key, value) in enumerate(kept):
            key, value = (
                torch.cat([old, new[i, :, :, 40:50]], 2) for old, new in ((key, stream.key), (value, stream.value))
            )
            want = dense_attention(stream.query[i, :, :, 40:50], key, value, 0.25)
            torch.testing.assert_close(got[i], want, atol=1e-5, rtol=1e-5)
        stream.feed(handle, 30)
        assert [layer.recent for layer in stream.cache.layers] == [0] * 3
        assert [layer.length for layer in stream.cache.layers] == [80] * 3


def test_beams_and_sampling_run_over_a_quantised_cache():
    model = tiny_model()
    ids = torch.randint(1, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    with ZipVL(probes=(8, 8), interval=4).attach(model):
        for way in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 3}):
            assert model.generate(ids, attention_mask=mask, max_new_tokens=10, **way).shape == (2, 50)


def test_a_reordered_batch_takes_its_parts_along():
    order, stream = torch.tensor([2, 0, 0]), Stream(batch=3)
    beams = stream.pick(order)
    with ZipVL(tau=0.7, probes=(8, 8), interval=8).attach(stream_model()) as handle:
        want = stream.pick(order).feed(handle, 40, *[1] * 24)[:, :, :, 50:]
        stream.feed(handle, 40, *[1] * 10)
        stream.cache.reorder_cache(order)
        beams.cache = stream.cache
        torch.testing.assert_close(beams.feed(handle, *[1] * 14), want, atol=1e-4, rtol=1e-4)


def test_a_cache_goes_on_under_another_handle_and_from_elsewhere():
    """Rows that were read without the method are recent rows, and compressed by the next step."""
    stream = Stream(batch=1)
    with attach(stream_model(), []) as handle:
        stream.feed(handle, 40)
    for _ in range(2):
        with ZipVL(tau=0.7, probes=(8, 8), interval=16).attach(stream_model()) as handle:
            stream.feed(handle, 1, 1)
            assert [layer.length for layer in stream.cache.layers] == [layer.length for layer in stream.cache.layers]
    assert [(layer.length, layer.recent) for layer in stream.cache.layers] == [(44, 3)] * 3


def test_selecting_over_a_quantised_cache_reads_what_was_selected():
    stream = Stream(batch=1)
    quest = Quest(tokens=64, page_size=4, dense_layers=())
    with attach(stream_model(), [(ZipVL(tau=0.7, probes=(8, 8)), None), (quest, None)]) as handle:
        stream.feed(handle, 40)
        got = stream.feed(handle, 1)
        torch.testing.assert_close(got[:, :, :, 0], over_the_cache(stream, 40), atol=1e-3, rtol=1e-3)
    with attach(stream_model(), [(ZipVL(cache="quant"), None), (Quest(tokens=8, page_size=4), None)]) as handle:
        assert Stream().feed(handle, 40, *[1] * 24).isfinite().all()


def test_the_bytes_read_are_the_bytes_held():
    stream = Stream(batch=2)
    with ZipVL(tau=0.7, probes=(8, 8)).attach(stream_model()) as handle:
        stream.feed(handle, 50, 1)
        handle.runtime.stats.reset()
        stream.feed(handle, 1)
        held, stats = sum(layer.nbytes for layer in stream.cache.layers), handle.runtime.stats
    assert stats.kv_bytes == pytest.approx(held, rel=0.02)
    assert stats.dense_bytes == 3 * 2 * 52 * 2 * 2 * 16 * 4


@pytest.mark.parametrize("cache", ["none", "evict", "quant"])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 1.0])
def test_the_promised_bytes_are_the_bytes_held(cache, ratio):
    method, stream = ZipVL(ratio=ratio, cache=cache, probes=(8, 8)), Stream(batch=1)
    with method.attach(stream_model()) as handle:
        stream.feed(handle, 63, 1)
        promised = method.io_bytes(64, handle.runtime.shape, 4)
        assert [layer.nbytes for layer in stream.cache.layers] == [promised["rows"]] * 3
        assert ZipVL(cache=cache).io_bytes(64, handle.runtime.shape, 4)["rows"] >= promised["rows"]


def test_inference_mode_may_come_and_go():
    method = ZipVL(tau=0.7, probes=(8, 8), interval=8)
    with method.attach(stream_model()) as handle:
        want = Stream().feed(handle, 40, *[1] * 24)
        for first in (True, False):
            stream, got = Stream(), []
            for sizes, inside in (((40, 1), first), ([1] * 9, not first), ([1] * 14, first)):
                with torch.inference_mode(inside), torch.no_grad():
                    got.append(stream.feed(handle, *sizes).clone())
            torch.testing.assert_close(torch.cat(got, 3), want, atol=1e-5, rtol=1e-5)


def test_a_long_run_stays_finite_and_grows_by_what_it_stores():
    stream = Stream(batch=1, length=500)
    with ZipVL(tau=0.9, probes=(8, 8), interval=20).attach(stream_model()) as handle:
        out = stream.feed(handle, 100, *[1] * 400)
        sizes = {layer.nbytes for layer in stream.cache.layers}
    assert bool(out.isfinite().all())
    assert max(sizes) < 0.6 * 500 * 2 * 2 * 16 * 4
    assert all(torch.equal(layer.positions[0, 0].long(), torch.arange(500)) for layer in stream.cache.layers)
    error = (stream.cache.layers[0].keys - stream.key[0]).abs()
    assert float(error.max()) < 1.5


def test_a_head_size_without_whole_words_is_refused():
    model = tiny_model(hidden_size=96, num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(InputError, match="channels") as caught:
        ZipVL().attach(model)
    assert "\n" not in str(caught.value)
    model(torch.tensor([[1, 2, 3]]))  # nothing is left on the model
    assert model.config._attn_implementation == "sdpa"


# -- manners ----------------------------------------------------------------------------------------------------------


def test_one_method_takes_both_phases():
    model = tiny_model()
    with pytest.raises(RecipeError, match="cache"):
        attach(model, [(ZipVL(), None), (H2O(budget=8, prompt="block"), None)])
    ids = torch.randint(1, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    with attach(model, [(ZipVL(cache="none"), None), (H2O(budget=8, prompt="block"), None)]):
        assert model(ids, use_cache=True).past_key_values.layers[0].length == 8
    with pytest.raises(RecipeError, match="storage"):
        attach(model, [(ZipVL(), None), (RTNKV(), None)])
    tokens = RTNKV(key_axis="token", value_axis="token", group=4, residual=4)
    with attach(model, [(ZipVL(cache="evict", ratio=0.5), None), (tokens, None)]):
        cache = model(ids, use_cache=True).past_key_values
        assert [layer.length for layer in cache.layers] == [20, 20]
        assert model(ids[:, :1], past_key_values=cache).logits.isfinite().all()
    with attach(model, [(ZipVL(cache="evict"), None), (Quest(tokens=8, page_size=4), None)]):
        assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3).shape == (1, 43)


@pytest.mark.parametrize(
    "settings",
    [
        {"tau": 0},
        {"tau": 1.5},
        {"tau": math.nan},
        {"probes": (0, 4)},
        {"probes": (4, -1)},
        {"probes": (4,)},
        {"cache": "zip"},
        {"bits": (3, 2)},
        {"bits": (2, 4)},
        {"interval": 0},
        {"ratio": 0},
        {"ratio": 1.5},
        {"seed": -1},
    ],
)
def test_bad_settings_are_one_line(settings):
    with pytest.raises(InputError, match=next(iter(settings))) as caught:
        ZipVL(**settings)
    assert "\n" not in str(caught.value)


def test_states_that_are_not_finite_are_refused():
    stream = Stream(batch=1)
    stream.key[1, 0, 0, 3] = math.nan
    with (
        ZipVL(probes=(8, 8), cache="evict").attach(stream_model()) as handle,
        pytest.raises(InputError, match="finite"),
    ):
        stream.feed(handle, 64)


def test_a_saved_cache_goes_on_as_it_would_have(tmp_path):
    model = tiny_model()
    ids = torch.randint(1, 256, (2, 60), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :15] = 0
    with ZipVL(tau=0.7, probes=(8, 8), interval=6).attach(model):
        cache = model(ids[:, :40], attention_mask=mask[:, :40], use_cache=True).past_key_values
        for t in range(40, 50):
            model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
        save_cache(cache, tmp_path / "cache.safetensors", model)
    again = load_cache(tmp_path / "cache.safetensors", model)
    assert [layer.nbytes for layer in again.layers] == [layer.nbytes for layer in cache.layers]
    assert [(len(layer.parts), layer.recent) for layer in again.layers] == [(4, 4)] * 2
    with ZipVL(tau=0.7, probes=(8, 8), interval=6).attach(model):
        for t in range(50, 60):
            want, got = (
                model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=c).logits
                for c in (cache, again)
            )
            assert torch.equal(got, want)
