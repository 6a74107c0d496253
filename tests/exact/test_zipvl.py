"""ZipVL by its card: probes, the two scores, the sparse reading of a prompt, and what the cache holds afterwards."""

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
from gossamer.errors import InputError, RecipeError
from gossamer.hf import dense_attention
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
    query, key, value = tensors(n=200, seed=3)
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
    assert report["prefill_area"] == pytest.approx(sum(r * r for r in report["ratios"]) / 3 + 16 / 64)
    assert "kv_bytes_held" not in report


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


# -- manners ----------------------------------------------------------------------------------------------------------


def test_one_method_takes_both_phases():
    model = tiny_model()
    with pytest.raises(RecipeError, match="cache"):
        attach(model, [(ZipVL(), None), (H2O(budget=8, prompt="block"), None)])
    ids = torch.randint(1, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    with attach(model, [(ZipVL(cache="none"), None), (H2O(budget=8, prompt="block"), None)]):
        assert model(ids, use_cache=True).past_key_values.layers[0].length == 8
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
    with ZipVL(probes=(8, 8), cache="evict").attach(stream_model()) as handle, pytest.raises(InputError, match="finite"):
        stream.feed(handle, 64)
