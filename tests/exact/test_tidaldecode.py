"""The properties that TidalDecode's card lists."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from gossamer import ops
from gossamer.attention.tidaldecode import (
    TidalDecode,
    TidalPolicy,
    best_anchors,
    correct,
    mean_recall,
    set_overlap,
    tokens_read,
)
from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError, InputError, RecipeError
from gossamer.hf import AttentionRuntime, CachePolicy, GossamerCache, LayerView, ModelShape, model_shape
from gossamer.models import fingerprint, tiny_model
from gossamer.testing import AttentionContract, Case, Stream

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
LAYERS = 6


@cache
def model_of(family: str = "llama") -> PreTrainedModel:
    return tiny_model(family, num_hidden_layers=LAYERS)


def ids(batch: int = 1, length: int = 40, seed: int = 0) -> Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps(model: Any, prompt: Tensor, more: Tensor) -> Tensor:
    """Logits of `more`, decoded one by one after a dense prefill."""
    with torch.no_grad():
        out, logits = model(prompt, use_cache=True), []
        for token in more.split(1, 1):
            out = model(token, past_key_values=out.past_key_values)
            logits.append(out.logits)
    return torch.cat(logits, 1)


def message(error: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def _case(**settings: Any) -> Case:
    return Case("tidaldecode", {"tokens": 12, **settings}, fixed_bytes=False)


class TestTidalDecode(AttentionContract):
    cases = (
        _case(first=0, reselect=()),
        _case(first=0, reselect=(1,)),
        _case(first=1, reselect=()),
        _case(first=0, anchors=1, keep_current=True),  # where to select anew comes from the calibration
        Case("tidaldecode", {"tokens": 12, "first": 2, "reselect": ()}, sparse=False, fixed_bytes=False),
    )


# -- 1, 2: what equals dense ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_1_budget_beyond_the_context_is_dense(family: str) -> None:
    model = model_of(family)
    want = steps(model, ids(2), ids(2, 5, seed=1))
    for tokens in (45, 1000, 1.0):
        with TidalDecode(tokens=tokens, first=1, reselect=(3,)).attach(model):
            torch.testing.assert_close(steps(model, ids(2), ids(2, 5, seed=1)), want, **CLOSE)


@pytest.mark.parametrize(
    "settings",
    [
        {"first": LAYERS},
        {"first": LAYERS - 1},
        {"first": 0, "reselect": tuple(range(1, LAYERS))},
        {"first": 5, "anchors": 3},
    ],
    ids=str,
)
def test_2_nothing_sparse_is_dense_at_any_budget(settings: dict[str, Any]) -> None:
    model = model_of()
    want = steps(model, ids(2), ids(2, 5, seed=1))
    with TidalDecode(tokens=1, **settings).attach(model):
        torch.testing.assert_close(steps(model, ids(2), ids(2, 5, seed=1)), want, **CLOSE)


# -- 3: the counter ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("first", "reselect"), [(2, (4,)), (0, ()), (1, (2, 3)), (2, (5,)), (5, ()), (6, ())])
@pytest.mark.parametrize("k", [7, 43, 100])
def test_3_reads_are_the_cards_formula(family: str, first: int, reselect: tuple[int, ...], k: int) -> None:
    model, batch = model_of(family), 2
    shape = model_shape(model)
    with TidalDecode(tokens=k, first=first, reselect=reselect).attach(model) as handle:
        steps(model, ids(batch), ids(batch, 5, seed=1))
        policy, stats = handle.runtime.decode, handle.runtime.stats
    assert isinstance(policy, TidalPolicy)
    count = len(reselect)
    full = min(first + 1 + count, LAYERS)
    want = sum(full * s + (LAYERS - full) * min(k, s) for s in range(41, 46))
    assert sum(policy.tokens_read) == batch * want
    assert want == sum(tokens_read(LAYERS, first, count, s, k) for s in range(41, 46))
    # What the kernels were given: full layers read a KV head's rows once, sparse ones per query head.
    sparse = sum(min(k, s) * (shape.heads if s > k else shape.kv_heads) for s in range(41, 46))
    assert stats.rows == batch * (full * sum(range(41, 46)) * shape.kv_heads + (LAYERS - full) * sparse)
    if shape.group == 1:
        assert stats.rows == batch * shape.heads * want
    assert stats.steps == 5 * LAYERS


def test_3_choosing_reads_the_keys_once_more() -> None:
    model, shape = model_of(), model_shape(model_of())
    with TidalDecode(tokens=7, first=1, reselect=(3,)).attach(model) as handle:
        steps(model, ids(2), ids(2, 3, seed=1))
        got = handle.runtime.stats.score_bytes
    assert got == 2 * 2 * shape.kv_heads * (41 + 42 + 43) * shape.head_dim * 4


# -- 4, 7, 9: the sets ------------------------------------------------------------------------------------------------


def brute_force(
    family: str, first: int, reselect: tuple[int, ...], forced: bool
) -> tuple[list[Any], dict[Any, Tensor]]:
    """What sparse layers were given, and the top 7 of each layer's own scores, by (layer, length)."""
    model, own = model_of(family), {}
    group, decode = model_shape(model).group, TidalPolicy.decode

    def spying(self: Any, layer: Any, query: Tensor, length: int) -> Tensor:
        key = layer.rows(length)[0].repeat_interleave(group, 1)
        own[layer.index, length] = torch.einsum("bhd,bhsd->bhs", query, key).topk(7).indices.sort(-1).values
        return decode(self, layer, query, length)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(TidalPolicy, "decode", spying)
        handle = TidalDecode(tokens=7, first=first, reselect=reselect).attach(model)
        with handle, handle.runtime.recording() as trace:
            if forced:
                out = model(ids(2))
                with handle.runtime.teacher_forcing():
                    model(ids(2, 6, seed=1), past_key_values=out.past_key_values)
            else:
                steps(model, ids(2), ids(2, 6, seed=1))
            policy = handle.runtime.decode
            assert isinstance(policy, TidalPolicy)
            assert not policy.sets  # bounded: nothing outlives the step
    return trace, own


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(("first", "reselect"), [(1, (3,)), (0, (2, 4)), (2, ())])
def test_4_sets_are_the_latest_selecting_layers(
    family: str, forced: bool, first: int, reselect: tuple[int, ...]
) -> None:
    trace, own = brute_force(family, first, reselect, forced)
    anchors = (first, *reselect)
    assert {layer for layer, *_ in trace} == set(range(first, LAYERS)) - set(anchors)
    assert len(trace) == 6 * (LAYERS - first - len(anchors))
    for layer, length, got, counts in trace:
        anchor = max(a for a in anchors if a < layer)
        assert torch.equal(got.long(), own[anchor, length])
        assert got.shape == (2, model_shape(model_of(family)).heads, 7)
        assert bool((counts == 7).all())


def test_7_each_step_chooses_for_itself() -> None:
    model = model_of()
    handle = TidalDecode(tokens=3, first=1, reselect=()).attach(model)
    with torch.no_grad(), handle, handle.runtime.recording() as trace:
        out = model(ids())
        out = model(ids(1, 1, seed=1), past_key_values=out.past_key_values)
        seen: list[Tensor] = []
        choose = TidalPolicy.choose

        def planting(self: Any, layer: Any, query: Tensor, length: int) -> Any:
            if length == 42:  # a key that must win for every head of its group
                layer.rows(length)[0][:, :, 5] = 100 * query.unflatten(1, (2, 2)).sum(2).sign()
            seen.append(ops.key_scores(query, layer.rows(length)[0]).topk(3).indices.sort(-1).values)
            return choose(self, layer, query, length)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TidalPolicy, "choose", planting)
            model(ids(1, 1, seed=2), past_key_values=out.past_key_values)
    first, second = ({n: i for _, n, i, _ in trace}[n] for n in (41, 42))
    assert not torch.equal(first, second)
    assert torch.equal(second.long(), seen[0])
    assert bool((second == 5).any(-1).any())


def test_9_equal_query_heads_have_equal_sets() -> None:
    model = tiny_model("llama", num_hidden_layers=LAYERS)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.self_attn.q_proj.weight.view(2, 2, 16, -1)
            weight[:, 1] = weight[:, 0]
    handle = TidalDecode(tokens=5, first=1, reselect=(3,)).attach(model)
    with handle, handle.runtime.recording() as trace:
        steps(model, ids(2), ids(2, 3, seed=1))
    assert trace
    for _, _, indices, _ in trace:
        assert torch.equal(indices[:, 0], indices[:, 1])
        assert torch.equal(indices[:, 2], indices[:, 3])


# -- 5, 6: sparse layers ----------------------------------------------------------------------------------------------


def test_5_gather_equals_mask() -> None:
    query, key, value = normal(2, 4, 16), normal(2, 2, 50, 16, seed=1), normal(2, 2, 50, 16, seed=2)
    indices, counts = ops.select_topk(normal(2, 4, 50, seed=3), 9)
    got = ops.decode_attention(query, key, value, indices=indices, counts=counts)
    scores = torch.einsum("bhd,bhsd->bhs", query, key.repeat_interleave(2, 1)) / 4
    masked = torch.full_like(scores, float("-inf")).scatter(2, indices.long(), scores.gather(2, indices.long()))
    want = torch.einsum("bhs,bhsd->bhd", masked.softmax(-1), value.repeat_interleave(2, 1))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_6_the_order_of_rows_does_not_matter() -> None:
    """On fixed queries, keys and values: permuted rows permute the sets and leave the outputs."""
    order = torch.randperm(62, generator=torch.Generator().manual_seed(1))
    results = []
    for permuted in (False, True):
        stream = Stream(length=63)
        if permuted:
            stream.key[:, :, :, :62], stream.value[:, :, :, :62] = (
                stream.key[:, :, :, order],
                stream.value[:, :, :, order],
            )
        handle = TidalDecode(tokens=9, first=0, reselect=()).attach(_contract_model())
        with torch.no_grad(), handle:
            stream.feed(handle, 62)
            with handle.runtime.recording() as trace:
                results.append((stream.feed(handle, 1), trace))
    torch.testing.assert_close(results[0][0], results[1][0], **CLOSE)
    where = torch.cat([order, torch.tensor([62])])
    for (_, _, plain, _), (_, _, moved, _) in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(where[moved.long()].sort(-1).values, plain.long())


def _contract_model() -> PreTrainedModel:
    from gossamer.testing import _model

    return _model()


# -- roles ------------------------------------------------------------------------------------------------------------


def test_the_current_token_is_kept_only_when_asked() -> None:
    missing = 0
    for keep in (True, False):
        handle = TidalDecode(tokens=2, first=0, reselect=(3,), keep_current=keep).attach(model_of())
        with handle, handle.runtime.recording() as trace:
            steps(model_of(), ids(2), ids(2, 6, seed=1))
        present = [bool((i == length - 1).any(-1).all()) for _, length, i, _ in trace]
        assert all(present) or not keep
        missing += present.count(False)
    assert missing


def test_a_windowed_layer_hands_its_role_on() -> None:
    """Gemma 3: layers 0–2 and 4–6 see 16 tokens, 3 and 7 everything. Layer 1 cannot choose, layer 3 does instead."""
    kinds = (["sliding_attention"] * 3 + ["full_attention"]) * 2 + ["full_attention"] * 2
    model = tiny_model("gemma3", num_hidden_layers=10, layer_types=kinds)
    handle = TidalDecode(tokens=5, first=1, reselect=(5,)).attach(model)
    with handle, handle.runtime.recording() as trace:
        steps(model, ids(2), ids(2, 3, seed=1))
        policy = handle.runtime.decode
    assert isinstance(policy, TidalPolicy)
    assert {layer for layer, *_ in trace} == {8, 9}  # 3 chooses for 1, 7 for 5
    assert policy.tokens_read == [2 * n for n in [48] * 3 + [126] + [48] * 3 + [126, 15, 15]]


def test_a_cache_that_drops_rows_is_a_named_conflict() -> None:
    class Halve(CachePolicy):
        def update(self, layer: LayerView, query: Tensor) -> None:
            rows = torch.arange(0, layer.kv.length, 2).expand(query.shape[0], 2, -1)
            layer.keep(rows)

    runtime = AttentionRuntime(model_of(), decode=TidalDecode(first=0, reselect=()).decode_policy(model_of(), None))
    runtime.cache = Halve()
    try:
        with pytest.raises(RecipeError, match="cannot run with a cache method that drops rows") as caught:
            steps(model_of(), ids(), ids(1, 1))
        message(caught)
    finally:
        runtime.detach()


def test_long_blocks_and_rollbacks_leave_nothing_behind() -> None:
    handle = TidalDecode(tokens=4, first=1, reselect=(3,)).attach(model_of())
    policy, cached = handle.runtime.decode, GossamerCache()
    assert isinstance(policy, TidalPolicy)
    with torch.no_grad(), handle, handle.runtime.teacher_forcing():
        for _ in range(3):
            model_of()(ids(1, 30), past_key_values=cached)
            cached.crop(-10)
            assert not policy.sets


# -- calibration ------------------------------------------------------------------------------------------------------


def test_overlap_by_hand() -> None:
    masks = torch.zeros(3, 1, 1, 4, dtype=torch.bool)
    for layer, rows in enumerate(((0, 1), (1, 2), (2, 3))):
        masks[layer, 0, 0, list(rows)] = True
    assert set_overlap(masks, 2).tolist() == [[1, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 1]]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("first", [0, 2])
def test_anchors_are_the_best_of_all(seed: int, first: int) -> None:
    overlap = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed))
    overlap = (overlap + overlap.T) / 2
    overlap.fill_diagonal_(1)
    for count in range(8 - first):
        got = best_anchors(overlap, first, count)
        every = list(itertools.combinations(range(first + 1, 8), count))
        assert got in every
        assert mean_recall(overlap, first, got) == max(mean_recall(overlap, first, c) for c in every)
    assert best_anchors(overlap, first, 99) == tuple(range(first + 1, 8))
    assert best_anchors(overlap, 8, 3) == best_anchors(overlap, 7, 3) == ()


def test_calibration_is_the_overlap_of_decoding_sets() -> None:
    """The sets of the block's last queries are those that dense decoding would choose there."""
    model, shape, block = model_of(), model_shape(model_of()), ids(1, 64)
    got = TidalDecode(tokens=4).calibrate(model, block)
    assert got.facts == {"blocks": 1, "block": 64, "layers": LAYERS, "k": 4, "probes": 16}
    sets: dict[tuple[int, int], Tensor] = {}

    def spying(self: Any, layer: Any, query: Tensor, length: int) -> Tensor:
        sets[layer.index, length] = ops.key_scores(query, layer.rows(length)[0]).topk(min(4, length)).indices[0]
        return layer.dense_decode(query, length)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(TidalPolicy, "decode", spying)
        with TidalDecode(first=0, reselect=()).attach(model) as handle, handle.runtime.teacher_forcing():
            model(block, use_cache=True)
    want = torch.zeros(LAYERS, LAYERS)
    for a, b in itertools.product(range(LAYERS), repeat=2):
        common = [
            len(set(sets[a, n][h].tolist()) & set(sets[b, n][h].tolist()))
            for n in range(49, 65)
            for h in range(shape.heads)
        ]
        want[a, b] = sum(common) / len(common) / 4
    torch.testing.assert_close(got.tensors["overlap"], want)


def test_calibration_averages_blocks_and_serves_any_setting() -> None:
    model, blocks = model_of(), ids(3, 64)
    whole = TidalDecode().calibrate(model, blocks)
    parts = [TidalDecode().calibrate(model, b[None]).tensors["overlap"] for b in blocks]
    torch.testing.assert_close(whole.tensors["overlap"], torch.stack(parts).mean(0))
    assert whole.fingerprint == fingerprint(model)
    method = TidalDecode(first=1)
    recalls = method.recalls(whole)
    assert list(recalls) == [2, 3, 4, 5]
    best = max(recalls, key=lambda c: recalls[c])
    with method.attach(model, whole) as handle:
        policy = handle.runtime.decode
        assert isinstance(policy, TidalPolicy)
        assert policy.reselect == (best,)
    for anchors in (0, 2, 3, 50):
        got = TidalDecode(first=0, anchors=anchors).layers_of(model_shape(model), whole)
        assert len(got) == min(anchors, 5)


def test_windowed_layers_do_not_stand_for_others() -> None:
    model = tiny_model("gemma3")
    overlap = TidalDecode().calibrate(model, ids(1, 64)).tensors["overlap"]
    assert bool((overlap[:3] == 0).all())
    assert overlap[3].tolist() == [0, 0, 0, 1]


def test_calibration_leaves_the_model_as_it_was() -> None:
    model = model_of()
    one, two = (TidalDecode().calibrate(model, ids(2, 64)) for _ in range(2))
    assert torch.equal(one.tensors["overlap"], two.tensors["overlap"])
    assert model.config._attn_implementation == "sdpa"


# -- 8: correction ----------------------------------------------------------------------------------------------------


def rows_of(cache: Any) -> list[Tensor]:
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("padded", [False, True])
def test_8_a_corrected_cache_is_a_dense_prefills(family: str, padded: bool) -> None:
    model, prompt = model_of(family), ids(2, 30)
    mask = torch.ones(2, 30, dtype=torch.long)
    if padded:
        mask[1, :7] = 0
    cached, handle = DynamicCache(config=model.config), TidalDecode(tokens=3, first=1, reselect=(3,)).attach(model)
    with handle:
        tokens, since = prompt, 30
        for _ in range(2):
            tokens = model.generate(
                tokens, attention_mask=mask, past_key_values=cached, max_new_tokens=12, do_sample=False
            )
            mask = torch.nn.functional.pad(mask, (0, 12), value=1)
            steps_before, teacher = handle.runtime.stats.steps, handle.runtime.teacher_forced
            polluted = [x.clone() for x in rows_of(cached)]
            done = correct(model, handle, cached, tokens, since, mask if padded else None)
            assert done == cached.get_seq_length() == tokens.shape[1] - 1
            assert handle.runtime.stats.steps == steps_before
            assert handle.runtime.teacher_forced is teacher
            moved = max(float((a - b).abs().max()) for a, b in zip(rows_of(cached), polluted, strict=True))
            assert moved > 1e-3  # there was something to correct
            for now, then in zip(rows_of(cached), polluted, strict=True):
                assert torch.equal(now[:, :, :since], then[:, :, :since])
            since = done
    fresh: Any = DynamicCache(config=model.config)
    with torch.no_grad():
        position = (mask.cumsum(1) - 1).clamp_min(0)[:, :-1]
        model(tokens[:, :-1], attention_mask=mask[:, :-1], position_ids=position, past_key_values=fresh)
    for got, want in zip(rows_of(cached), rows_of(fresh), strict=True):
        for b, first in enumerate((0, 7 if padded else 0)):
            torch.testing.assert_close(got[b, :, first:], want[b, :, first:], atol=1e-4, rtol=1e-4)


def test_8_generation_goes_on_as_if_it_had_been_dense() -> None:
    """Corrected rows, then a dense step: the logits of the dense model."""
    model, cached = model_of(), GossamerCache()
    handle = TidalDecode(tokens=3, first=1, reselect=(3,)).attach(model)
    with torch.no_grad():
        tokens = model.generate(ids(1, 30), past_key_values=cached, max_new_tokens=12, do_sample=False)
        assert correct(model, handle, cached, tokens, 30) == 41
        assert correct(model, handle, cached, tokens, 41) == 41  # nothing to do
        assert correct(model, handle, cached, tokens, 40) == 41  # one token is a prefill too
        handle.detach()
        got = model(tokens[:, -1:], past_key_values=cached).logits
        torch.testing.assert_close(got, model(tokens).logits[:, -1:], atol=1e-4, rtol=1e-4)


def test_8_correction_with_a_cache_the_method_has_not_seen() -> None:
    """A cache filled before attaching: its views are opened anew afterwards, with the state that policies expect."""
    from gossamer.attention.quest import Quest

    model, cached = model_of(), GossamerCache()
    with torch.no_grad():
        with TidalDecode(tokens=3, first=1, reselect=()).attach(model):
            tokens = model.generate(ids(1, 30), past_key_values=cached, max_new_tokens=12, do_sample=False)
        with Quest(tokens=8, page_size=4).attach(model) as handle:
            correct(model, handle, cached, tokens, 30)
            model.generate(tokens, past_key_values=cached, max_new_tokens=3, do_sample=False)


def test_8_wrong_use_is_one_line_and_leaves_the_cache() -> None:
    model, cached = model_of(), GossamerCache()
    handle = TidalDecode(tokens=3, first=1, reselect=()).attach(model)
    with torch.no_grad(), handle:
        tokens = ids(2, 20)
        model(tokens, past_key_values=cached)
        wrong: list[tuple[Any, ...]] = [
            (model, handle, cached, tokens[:, :19], 10),
            (model, handle, cached, tokens[0], 10),
            (model, handle, cached, tokens, -1),
            (model, handle, cached, tokens, 21),
            (model, handle, cached, tokens[:1], 10),
            (model, handle, cached, tokens, 10, torch.ones(2, 3)),
            (tiny_model("llama"), handle, cached, tokens, 10),
        ]
        for arguments in wrong:
            with pytest.raises(InputError, match=r"^correct: ") as caught:
                correct(*arguments)
            message(caught)
            assert cached.get_seq_length() == 20
        handle.detach()
        with pytest.raises(InputError, match="not attached"):
            correct(model, handle, cached, tokens, 10)


# -- what can go wrong ------------------------------------------------------------------------------------------------


def test_bfloat16_generates() -> None:
    model = tiny_model("llama", num_hidden_layers=4).to(torch.bfloat16)
    with torch.no_grad(), TidalDecode(tokens=8, first=0, reselect=(2,)).attach(model) as handle:
        model.generate(ids(2), attention_mask=torch.ones(2, 40).long(), max_new_tokens=4, do_sample=False)
        assert handle.runtime.stats.rows < handle.runtime.stats.dense_rows


@pytest.mark.parametrize(
    "bad",
    [
        {"first": -1}, {"first": 1.5}, {"reselect": (2,)}, {"reselect": (5, 4)}, {"reselect": (4, 4)},
        {"reselect": (-1,)}, {"reselect": ("a",)}, {"anchors": -1}, {"keep_current": "perhaps"}, {"budget": 3},
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        TidalDecode(**bad)
    assert message(caught).startswith(f"tidaldecode: {next(iter(bad))}")


def test_layers_that_the_model_lacks() -> None:
    for settings, word in (({"first": 7}, "first=7"), ({"first": 1, "reselect": (3, 6)}, "reselect names layer 6")):
        with pytest.raises(InputError, match=word) as caught:
            TidalDecode(**settings).attach(model_of())
        message(caught)
    assert model_of().config._attn_implementation == "sdpa"


def test_calibrations_that_do_not_fit() -> None:
    with pytest.raises(CalibrationError, match="needs a calibration") as caught:
        TidalDecode().attach(model_of())
    message(caught)
    ours = TidalDecode().calibrate(model_of(), ids(1, 64))
    with pytest.raises(CalibrationError, match="another model"):
        TidalDecode().attach(tiny_model("llama"), ours)
    with pytest.raises(CalibrationError, match="made for quest"):
        TidalDecode().attach(model_of(), Calibration("quest", ours.fingerprint, ours.tensors))
    for tensors in ({}, {"overlap": torch.eye(3)}):
        with pytest.raises(CalibrationError, match="calibrate again"):
            TidalDecode().attach(model_of(), Calibration("tidaldecode", ours.fingerprint, tensors))
    TidalDecode(reselect=(4,)).attach(model_of()).detach()
    TidalDecode(anchors=0).attach(model_of()).detach()


def test_bad_calibration_input() -> None:
    for tokens in (ids()[0], ids(2, 15), torch.empty(0, 64, dtype=torch.long), torch.rand(2, 64)):
        with pytest.raises(InputError, match="integer matrix") as caught:
            TidalDecode().calibrate(model_of(), tokens)
        message(caught)
    with pytest.raises(InputError, match=r"call model.eval\(\) first"):
        TidalDecode().calibrate(tiny_model("llama").train(), ids(2, 64))
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3, 5] = float("nan")
    with pytest.raises(CalibrationError, match="layer 1 are not finite") as caught_:
        TidalDecode().calibrate(model, ids(1, 64))
    message(caught_)
    assert model.config._attn_implementation == "sdpa"


def test_bytes_by_hand() -> None:
    shape = ModelShape(32, 32, 8, 128)
    assert TidalDecode(tokens=256).io_bytes(4096, shape, 2) == {"rows": 256 * 32 * 2 * 128 * 2, "scores": 0}
    assert TidalDecode(tokens=256).io_bytes(100, shape, 2)["rows"] == 100 * 32 * 2 * 128 * 2
    dense = 32 * 100_000
    assert 7.9 < dense / tokens_read(32, 2, 1, 100_000, 100) < 8  # the card: at most 8x for k much below S
