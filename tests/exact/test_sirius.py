"""GRIFFIN and Sirius: statistics, masks, chains, trees and the repaired cache against naive versions, on tiny models."""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from gossamer import generation
from gossamer.activations import sirius_verify as verify
from gossamer.activations.griffin import ContextualNeurons, Griffin, kept_neurons, squared_shares, strongest
from gossamer.activations.sirius import Sirius, SiriusHandle, density_of
from gossamer.activations.sirius_loop import SiriusLoop
from gossamer.errors import InputError, ModelError, RecipeError
from gossamer.hf import GossamerCache, mlp_views
from gossamer.models import LoadedModel, tiny_model
from gossamer.patterns import NeuronRule
from gossamer.recipe import Recipe
from gossamer.registry import make

MODEL = tiny_model("llama", num_hidden_layers=3)
FAMILIES = ["llama", "qwen2", "gemma", "gpt2"]


def prompt(length: int = 12, seed: int = 0, batch: int = 1) -> Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def greedy(model: Any, ids: Tensor, new: int) -> Tensor:
    """Dense greedy decoding without a cache."""
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def run(method: Sirius, ids: Tensor, new: int, model: Any = MODEL, **settings: Any) -> Any:
    with method.attach(model) as handle:
        return handle.generate(ids, max_new_tokens=new, **settings)


def start(handle: SiriusHandle, ids: Tensor, new: int) -> SiriusLoop:
    """A loop that has read its prompt."""
    loop = SiriusLoop(handle.model, handle.policy, handle.method, ids, ids.shape[1] + new, DynamicCache())
    loop.prefill()
    return loop


# -- GRIFFIN ----------------------------------------------------------------------------------------------------------


def test_statistic_is_that_of_the_paper() -> None:
    z = torch.randn(7, 20, generator=torch.Generator().manual_seed(0))
    rows = [[float(v) / sum(float(w) ** 2 for w in row) ** 0.5 for v in row] for row in z]
    naive = [sum(row[j] ** 2 for row in rows) ** 0.5 for j in range(20)]
    torch.testing.assert_close(squared_shares(z).sqrt(), torch.tensor(naive))
    want = sorted(sorted(range(20), key=lambda j: -naive[j])[:9])
    assert strongest(squared_shares(z), 9).tolist() == want


@given(st.integers(1, 300), st.floats(0.01, 1))
def test_counts_are_the_truncated_shares(neurons: int, keep: float) -> None:
    coarse, fine = kept_neurons(keep, neurons, "coarse"), kept_neurons(keep, neurons, "fine")
    assert coarse == int(keep * neurons + 1e-9)
    assert neurons - fine == int((1 - keep) * neurons + 1e-9)
    assert 0 <= coarse <= fine <= neurons


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["mask", "auto"])
def test_chosen_slices_are_the_dense_mlp_with_the_others_zeroed(family: str, mode: Any) -> None:  # check 8
    model = tiny_model(family)
    ids = prompt()
    seen: dict[int, Tensor] = {}
    with Griffin(keep=0.3, mode=mode).attach(model) as handle, torch.no_grad():
        assert handle.mlp is not None
        policy, views = handle.mlp.policy, mlp_views(model)

        def note(view: Any, module: Any, args: Any) -> None:
            seen[view.index] = view.hidden(args[0])[1]

        hooks = [v.owner.register_forward_pre_hook(functools.partial(note, v)) for v in views if v.gated]
        model(ids)
        for hook in hooks:
            hook.remove()
        for view in views:
            rule = policy.rule(view.index)
            assert rule is not None
            assert rule.indices is not None
            assert len(rule.indices) == int(0.3 * 128)
            if not view.gated:
                continue
            index = rule.indices.long()
            assert index.tolist() == strongest(squared_shares(seen[view.index]), len(index)).tolist()
            x = torch.randn(1, 1, view.channels)
            up, gate, down = (m.weight for m in (view.up, view.gate, view.down))
            sliced = (view.activation(x @ gate[index].T) * (x @ up[index].T)) @ down[:, index].T
            kept = torch.zeros(view.neurons).index_fill(0, index, 1)
            masked = view.out(view.hidden(x)[1] * kept)
            torch.testing.assert_close(sliced, masked, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(view.owner(x), masked, atol=1e-5, rtol=1e-4)


def rules_of(policy: Any) -> list[list[int]]:
    return [policy.rule(layer).indices.tolist() for layer in range(MODEL.config.num_hidden_layers)]


def test_chunks_accumulate_and_caches_keep_their_own_sets() -> None:
    one, two = prompt(20, seed=1), prompt(9, seed=2)
    with Griffin(keep=0.4).attach(MODEL) as handle, torch.no_grad():
        assert handle.mlp is not None
        policy = handle.mlp.policy
        MODEL(one)
        whole = rules_of(policy)
        caches = DynamicCache(), DynamicCache()
        for part in one.split(7, 1):
            MODEL(part, past_key_values=caches[0])
        assert rules_of(policy) == whole
        MODEL(two, past_key_values=caches[1])
        other = rules_of(policy)
        assert other != whole
        for cache, want in ((caches[0], whole), (caches[1], other), (caches[0], whole)):
            MODEL(one[:, :1], past_key_values=cache)  # what is decoded changes nothing
            assert rules_of(policy) == want
        MODEL(torch.cat([one, one]))
        assert rules_of(policy) == whole  # a batch sums over its sequences
        MODEL(two)
        assert rules_of(policy) == other  # a new prompt starts anew


def test_griffin_reads_densely_and_decodes_sparsely(caplog: pytest.LogCaptureFixture) -> None:
    ids = prompt()
    dense = DynamicCache()
    with torch.no_grad():
        want = MODEL(ids, past_key_values=dense).logits
        step = MODEL(ids[:, :1], past_key_values=dense).logits
        for pattern in ("coarse", "fine"):
            with Griffin(keep=0.3, pattern=pattern).attach(MODEL) as handle:
                cache = DynamicCache()
                torch.testing.assert_close(MODEL(ids, past_key_values=cache).logits, want, atol=1e-4, rtol=1e-4)
                assert not torch.allclose(MODEL(ids[:, :1], past_key_values=cache).logits, step, atol=1e-2)
                share = handle.report()["neurons_kept"]
                assert share == pytest.approx(kept_neurons(0.3, 128, pattern) / 128)  # type: ignore[arg-type]
        with Griffin(keep=0.3).attach(MODEL), caplog.at_level(logging.WARNING, "gossamer"):
            dense.crop(-1)
            torch.testing.assert_close(MODEL(ids[:, :1], past_key_values=dense).logits, step, atol=1e-4, rtol=1e-4)
    assert "filled while no method watched" in caplog.text


def test_strict_masks_are_shared_and_drop_so_many() -> None:  # check 10
    gates = torch.randn(1, 5, 30, generator=torch.Generator().manual_seed(3))
    policy = ContextualNeurons(mlp_views(MODEL), 0.37, "fine", strict=True).enter("sparse")
    assert policy.counts == [128 - int(0.63 * 128)] * 3
    rule = policy.rule(0)
    assert rule is not None
    assert rule.shared
    count = kept_neurons(0.37, 30, "fine")
    mask = NeuronRule(count=count, shared=True).mask(gates)
    assert mask.shape == gates.shape
    assert bool((mask == mask[:, :1]).all())
    assert bool(((~mask).sum(-1) == int(0.63 * 30)).all())
    strength = [sum(abs(float(g)) for g in gates[0, :, j]) for j in range(30)]
    assert mask[0, 0].nonzero().flatten().tolist() == sorted(sorted(range(30), key=lambda j: -strength[j])[:count])
    single = NeuronRule(count=count).mask(gates)
    assert bool(((~single).sum(-1) == int(0.63 * 30)).all())
    assert not torch.equal(single, mask)


# -- chains -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pattern", ["coarse", "fine"])
def test_all_neurons_are_dense_greedy(family: str, pattern: Any) -> None:  # check 1
    model, ids = tiny_model(family), prompt()
    want = greedy(model, ids, 21)
    for thr in (0.0, 0.1, 0.9):
        for period in (1, 2, 5):
            out = run(Sirius(pattern=pattern, keep=1.0, thr=thr, period=period), ids, 21, model)
            assert torch.equal(out.sequences, want)


@pytest.mark.parametrize("width", [1, 3])
def test_nothing_passes_a_threshold_above_one(width: int) -> None:  # check 2
    ids = prompt()
    out = run(Sirius(keep=0.3, thr=1.5, period=4, tree_width=width), ids, 9)
    assert torch.equal(out.sequences, greedy(MODEL, ids, 9))
    assert out.advances.tolist() == [1] * 8
    assert out.aal == 1


@pytest.mark.parametrize("width", [1, 3])
def test_everything_passes_a_threshold_of_zero(width: int) -> None:  # checks 3 and 9
    out = run(Sirius(keep=0.3, thr=0.0, period=4, tree_width=width), prompt(), 1 + 5 * 4)
    assert out.advances.tolist() == [4] * 5
    assert out.aal == 4
    assert (out.n_sparse, out.n_full) == (3 * 5, 5)
    assert out.effective_density == pytest.approx((3 * out.density + 1) / 4)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([0.1, 0.3, 0.6, 0.9]),
    st.integers(1, 9),
    st.sampled_from(["coarse", "fine"]),
    st.sampled_from([(1, False), (1, True), (2, False), (4, False)]),
    st.integers(0, 5),
)
def test_strict_acceptance_is_lossless(
    keep: float, period: int, pattern: Any, draft: tuple[int, bool], seed: int
) -> None:
    """Check 4, for chains with and without a second chance and for trees; check 9 for any acceptance."""
    ids = prompt(seed=seed)
    method = Sirius(
        keep=keep, period=period, pattern=pattern, accept="argmax", tree_width=draft[0], second_chance=draft[1]
    )
    out = run(method, ids, 17)
    assert torch.equal(out.sequences, greedy(MODEL, ids, 17))
    assert 1 + int(out.advances.sum()) == 17
    assert int(out.advances.max()) <= period
    made, windows = 1, []
    for advance in out.advances.tolist():
        windows.append(min(period, 17 - made))
        made += advance
    assert out.n_sparse == sum(w - 1 for w in windows)
    assert len(windows) <= out.n_full <= (1 + draft[1]) * len(windows)
    assert out.effective_density == pytest.approx((out.n_sparse * out.density + out.n_full) / 16)


@pytest.mark.parametrize("second_chance", [False, True])
def test_chain_is_the_loop_of_the_paper(second_chance: bool) -> None:
    """Against a version that keeps no cache: dense logits of whole sequences, sparse ones by masking."""
    ids, keep, period, thr, new = prompt(seed=4), 0.6, 6, 0.02, 40
    method = Sirius(keep=keep, pattern="fine", period=period, thr=thr, second_chance=second_chance)
    out = run(method, ids, new)

    def dense(tokens: list[int]) -> Tensor:
        with torch.no_grad():
            return MODEL(torch.tensor([tokens]), use_cache=False).logits[0]

    def plausible(tokens: list[int], at: int) -> bool:
        return float((dense(tokens)[at] / 0.6).softmax(-1)[tokens[at + 1]]) >= thr

    tokens, advances = ids[0].tolist(), []
    tokens.append(int(dense(tokens)[-1].argmax()))
    total = len(tokens) - 1 + new
    while len(tokens) < total:
        first, window = len(tokens) - 1, min(period, total - len(tokens))
        with Griffin(keep=keep, pattern="fine").attach(MODEL), torch.no_grad():
            cache = DynamicCache()
            MODEL(torch.tensor([tokens[:-1]]), past_key_values=cache)  # rows of checked tokens are dense
            draft = tokens[first:]
            while len(draft) < window:
                step = MODEL(torch.tensor([draft[-1:]]), past_key_values=cache).logits
                draft.append(int(step[0, -1].argmax()))
        text, kept, chances = tokens[:-1] + draft, 0, int(second_chance)
        while kept < window - 1:
            if not plausible(text, first + kept):
                if not chances:
                    break
                chances, text[first + kept + 1] = 0, int(dense(text)[first + kept].argmax())
            kept += 1
        tokens = text[: first + kept + 1]
        tokens.append(int(dense(tokens)[-1].argmax()))
        advances.append(kept + 1)
    assert max(advances) > 1
    assert min(advances) < period
    assert out.sequences[0].tolist() == tokens
    assert out.advances.tolist() == advances


# -- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma3"])
@pytest.mark.parametrize(
    "settings",
    [
        {"pattern": "coarse"},
        {"pattern": "fine", "second_chance": True},
        {"pattern": "coarse", "tree_width": 3},
        {"pattern": "fine", "tree_width": 4, "prune": 0.5},
    ],
)
def test_cache_after_a_check_is_that_of_the_full_model(family: str, settings: dict[str, Any]) -> None:  # check 5
    model, ids = tiny_model(family), prompt(20)
    if family == "gemma3" and "tree_width" in settings:
        pytest.skip("windows")
    with Sirius(keep=0.6, thr=0.01, period=5, **settings).attach(model) as handle, torch.no_grad():
        loop, lengths = start(handle, ids, 30), []
        for _ in range(6):
            loop.period()
            lengths.append(loop.n)
            fresh = DynamicCache()
            handle.policy.enter("full")
            model(loop.ids[:, : loop.n - 1], past_key_values=fresh)
            for ours, want in zip(loop.cache.layers, fresh.layers, strict=True):
                assert ours.length == ours.get_seq_length() == loop.n - 1
                have = want.keys.shape[2]  # a window holds its last rows only
                torch.testing.assert_close(ours.keys[:, :, -have:], want.keys, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(ours.values[:, :, -have:], want.values, atol=1e-4, rtol=1e-4)
    assert lengths[-1] > ids.shape[1] + 7  # some drafted tokens were taken


def test_nothing_is_reallocated_while_decoding() -> None:
    with Sirius(keep=0.5, thr=0.0, period=6, tree_width=2).attach(MODEL) as handle, torch.no_grad():
        loop = start(handle, prompt(), 280)  # more rows than a layer allocates unasked
        places = [t.data_ptr() for t in (loop.ids, loop.mask, loop.nodes)]
        places += [layer.key_storage.data_ptr() for layer in loop.cache.layers]
        while loop.n < loop.total:
            loop.period()
        after = [t.data_ptr() for t in (loop.ids, loop.mask, loop.nodes)]
        after += [layer.key_storage.data_ptr() for layer in loop.cache.layers]
    assert places == after


# -- trees ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["coarse", "fine"])
@pytest.mark.parametrize("thr", [0.0, 0.02, 0.3])
def test_tree_of_width_one_is_the_chain(pattern: Any, thr: float) -> None:  # check 6
    ids = prompt(seed=6)
    with Sirius(keep=0.5, pattern=pattern, thr=thr, period=5).attach(MODEL) as handle, torch.no_grad():
        chain = start(handle, ids, 30)
        while chain.n < chain.total:
            chain.period()
        tree = start(handle, ids, 30)
        tree._prepare_tree(ids.device)
        while tree.n < tree.total:
            before = tree.n
            tree._tree_period(min(5, tree.total - tree.n))
            tree.counters.advances.append(tree.n - before)
    assert torch.equal(chain.ids[:, : chain.n], tree.ids[:, : tree.n])
    assert chain.counters == tree.counters


@pytest.mark.parametrize("attention", ["sdpa", "eager", "gossamer"])
@pytest.mark.parametrize("prune", [None, 0.3])
def test_every_node_of_a_tree_is_a_sequential_run(attention: str, prune: float | None) -> None:  # check 7
    model, ids = tiny_model("qwen2"), prompt()
    if attention != "gossamer":
        model.set_attn_implementation(attention)
    passes: list[tuple[str, Tensor, Tensor]] = []
    recipe = Recipe.of(Sirius(keep=0.5, thr=0.0, period=4, tree_width=3, prune=prune))
    with (
        recipe.attach(model)
        if attention == "gossamer"
        else Sirius(keep=0.5, thr=0.0, period=4, tree_width=3, prune=prune).attach(model) as found,
        torch.no_grad(),
    ):
        handle = found if isinstance(found, SiriusHandle) else found.generator.__self__  # type: ignore[union-attr]
        loop = start(handle, ids, 30)
        for kind in ("_sparse", "_full"):
            original = getattr(loop, kind)

            def spy(nodes: Tensor, depths: Tensor, mask: Tensor, kind: str = kind, original: Any = original) -> Tensor:
                logits: Tensor = original(nodes, depths, mask)
                passes.append((kind, nodes.clone(), logits.clone()))
                return logits

            setattr(loop, kind, spy)
        loop.period()
        passes.clear()  # a second period, on rows that were moved together
        known = loop.ids[:, : loop.n - 1].clone()
        loop.period()
        kind, nodes, logits = passes[-1]
        parents = loop.parents.tolist()
        assert kind == "_full"
        assert nodes.shape == (1, 1 + 3 * 3)
        sparse = torch.cat([p[2] for p in passes[:-1]])
        for slot in range(10):
            path = [slot]
            while parents[path[-1]] >= 0:
                path.append(parents[path[-1]])
            path.reverse()
            text = torch.cat([known, nodes[:, path]], 1)
            handle.policy.enter("full")
            torch.testing.assert_close(model(text).logits[0, -1], logits[slot], atol=1e-3, rtol=1e-3)
            if slot >= len(sparse):
                continue
            cache = GossamerCache()
            model(known, past_key_values=cache)
            handle.policy.now = loop.policy.seen[loop.cache]
            rules = [handle.policy.rule(i) for i in range(3)]
            assert all(r is None for r in rules)
            keep_now = handle.policy.now
            handle.policy.enter("sparse")
            for node in path:
                handle.policy.seen[cache] = keep_now
                step = model(nodes[:, node : node + 1], past_key_values=cache).logits
            torch.testing.assert_close(step[0, -1], sparse[slot], atol=1e-3, rtol=1e-3)


def test_beams_are_the_best_of_all_continuations() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, scores = torch.randn(3, 11, generator=generator) * 3, torch.tensor([-1.0, -0.2, -2.5])
    beams, tokens, total = verify.grow(logits, scores, 3, 0.6, skip=torch.tensor([4]))
    log_probs = (logits / 0.6).log_softmax(-1)
    every = {(b, t): float(scores[b] + log_probs[b, t]) for b in range(3) for t in range(11) if t != 4}
    want = sorted(every, key=lambda pair: -every[pair])[:3]
    assert list(zip(beams.tolist(), tokens.tolist(), strict=True)) == want
    torch.testing.assert_close(total, torch.tensor([every[pair] for pair in want]))
    sure = torch.tensor([[9.0, 0.0, 0.0, -1.0], [0.0, 0.1, 0.2, 0.3]])
    beams, tokens, total = verify.grow(sure, torch.tensor([0.0, -3.0]), 2, 1.0, prune=0.95)
    assert beams.tolist() == [0, 1]
    assert tokens.tolist() == [0, 3]
    assert verify.grow(sure, torch.tensor([0.0, -30.0]), 2, 1.0)[0].tolist() == [0, 0]  # without pruning


def test_ends_are_not_proposed_in_a_tree() -> None:
    ids = prompt(seed=6)
    plain = run(Sirius(keep=0.5, thr=0.0, period=5, tree_width=2), ids, 26)
    drafted = [t for i, t in enumerate(plain.sequences[0, 13:].tolist()) if i % 5 != 4]
    end = drafted[0]
    out = run(Sirius(keep=0.5, thr=0.0, period=5, tree_width=2), ids, 26, eos_token_id=end, pad_token_id=0)
    new = out.sequences[0, 12:].tolist()
    assert end not in new or (new.index(end) == len(new) - 1 and (new.index(end)) % 5 == 0)
    assert new != plain.sequences[0, 12:].tolist()


# -- stopping, streaming, transformers --------------------------------------------------------------------------------


def test_a_drafted_end_counts_only_when_it_is_accepted() -> None:
    ids = prompt(seed=6)
    sparse = run(Sirius(keep=0.3, thr=0.0, period=6), ids, 25).sequences[0, 12:].tolist()
    dense = greedy(MODEL, ids, 25)[0, 12:].tolist()
    end = next(t for i, t in enumerate(sparse) if i % 6 and t not in dense)  # only the sparse model says it
    taken = run(Sirius(keep=0.3, thr=0.0, period=6), ids, 25, eos_token_id=end, pad_token_id=0)
    assert taken.sequences[0, 12:].tolist() == sparse[: sparse.index(end) + 1]
    assert taken.past_key_values.get_seq_length() == taken.sequences.shape[1] - 1
    refused = run(Sirius(keep=0.3, accept="argmax", period=6), ids, 25, eos_token_id=end, pad_token_id=0)
    assert refused.sequences[0, 12:].tolist() == dense


class Holds(StoppingCriteria):
    """Stops when the sequence ends with these tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.lengths = tokens, list[int]()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.lengths.append(input_ids.shape[1])
        return torch.tensor([input_ids[0, -len(self.tokens) :].tolist() == self.tokens])


def test_criteria_see_every_length_once() -> None:
    ids = prompt()
    want = greedy(MODEL, ids, 20)
    stop = Holds(want[0, 17:20].tolist())
    out = run(Sirius(keep=1.0, period=8), ids, 30, stopping_criteria=StoppingCriteriaList([stop]))
    assert torch.equal(out.sequences, want[:, :20])
    assert stop.lengths == list(range(13, 21))


class Stream:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("width", [1, 2])
def test_the_stream_is_the_output(width: int) -> None:
    stream = Stream()
    out = run(Sirius(keep=0.5, period=4, tree_width=width), prompt(), 15, streamer=stream)
    assert stream.ended
    assert stream.tokens == out.sequences[0].tolist()


def test_transformers_takes_the_loop() -> None:
    ids = prompt()
    with Sirius(keep=0.4, period=4).attach(MODEL) as handle:
        want = handle.generate(ids, 19)
        got = MODEL.generate(ids, max_new_tokens=19, do_sample=False, custom_generate=handle.custom_generate)
        assert isinstance(got, Tensor)
        assert torch.equal(got, want.sequences)
        chunked = handle.generate(ids, 19, prefill_chunk_size=5)
        assert torch.equal(chunked.sequences, want.sequences)
        report = handle.report()
        assert report["n_full"] == want.n_full * 3
        assert report["aal"] == pytest.approx(want.aal)
        assert report["neurons_kept"] == pytest.approx(51 / 128)
        # processors choose tokens, drafted or not: none is made twice
        unique = handle.generate(ids, 19, no_repeat_ngram_size=1).sequences[0].tolist()
        assert len(set(unique[12:])) == 19
        # outside its loop the model is the full one
        assert torch.equal(MODEL.generate(ids, max_new_tokens=9, do_sample=False), greedy(MODEL, ids, 9))


def test_a_conversation_goes_on_in_the_cache() -> None:
    ids = prompt(10)
    method = Sirius(keep=0.4, period=4, accept="argmax")
    with method.attach(MODEL) as handle:
        first = handle.generate(ids, 8, past_key_values=DynamicCache())
        longer = torch.cat([first.sequences, prompt(6, seed=9)], 1)
        second = handle.generate(longer, 8, past_key_values=first.past_key_values)
        assert torch.equal(second.sequences, greedy(MODEL, longer, 8))
        with pytest.raises(InputError, match="at least one new token"):
            handle.generate(longer[:, :7], 8, past_key_values=second.past_key_values)


def test_stop_strings_and_the_command_of_a_recipe(byte_tokenizer: Any) -> None:
    model = tiny_model("llama", vocab_size=257)
    method = Sirius(keep=0.5, period=6, thr=0.01)
    loaded = LoadedModel(model, byte_tokenizer, "tiny")
    pieces: list[str] = []
    text = generation.generate(loaded, "abcd", Recipe.of(method), max_new_tokens=30, write=pieces.append)
    ids = byte_tokenizer("abcd", return_tensors="pt").input_ids
    with method.attach(model) as handle:
        out = handle.generate(ids, 30, pad_token_id=256)
        assert text == byte_tokenizer.decode(out.sequences[0, 4:]) == "".join(pieces)
        plain = byte_tokenizer.decode(out.sequences[0, 4:])
        found = re.search("[!-~]{2}", plain)
        assert found is not None
        string = found.group()
        stopped = handle.generate(ids, 30, pad_token_id=256, stop_strings=[string], tokenizer=byte_tokenizer)
        short = byte_tokenizer.decode(stopped.sequences[0, 4:])
        assert string in short
        assert plain.startswith(short)
        assert len(short) == plain.index(string) + len(string) < len(plain)
        with pytest.raises(InputError, match="tokenizer"):
            handle.generate(ids, 30, stop_strings=[string])


# -- other methods, restoring, bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", ["quest", "double-sparsity", "streaming-llm", "a-shape", "native-linear"])
def test_other_methods_serve_drafts_and_checks_stay_exact(slug: str) -> None:
    settings: dict[str, dict[str, Any]] = {
        "quest": {"tokens": 16},
        "double-sparsity": {"tokens": 16},
        "streaming-llm": {"tokens": 16},
        "a-shape": {"n_init": 2, "n_local": 16, "block_size": 16},
    }
    ids, other = prompt(80), make(slug, **settings.get(slug, {}))
    learned = other.calibrate(MODEL, prompt(64, batch=2)) if "calibration" in other.needs else None  # type: ignore[attr-defined]
    for width in (1, 2):
        sirius = Sirius(keep=0.6, period=5, accept="argmax", tree_width=width)
        with Recipe.of(sirius, (other, learned)).attach(MODEL) as handle:
            assert handle.generator is not None
            out = handle.generator(ids, 20)
            if slug != "a-shape":  # which reads the prompt sparsely, as it should
                assert torch.equal(out.sequences, greedy(MODEL, ids, 20))
            if slug in ("quest", "double-sparsity") and width == 1:
                assert 0 < handle.report()["kv_bytes_read"] < handle.report()["dense_bytes"]


@pytest.mark.parametrize("pattern", ["coarse", "fine"])
def test_drafts_may_read_weights_in_8_bits(pattern: Any) -> None:
    ids = prompt()
    method = Sirius(pattern=pattern, keep=0.9, period=5, accept="argmax", int8=True)
    with method.attach(MODEL) as handle:
        out = handle.generate(ids, 20)
        report = handle.report()
    assert torch.equal(out.sequences, greedy(MODEL, ids, 20))  # whatever the draft is
    assert out.aal > 1
    assert (
        report["mlp_bytes_read"]
        < report["mlp_bytes_dense"]
        <= sum(3 * v.neurons * v.channels for v in mlp_views(MODEL))
    )
    with pytest.raises(InputError, match="int8"):
        Sirius(int8=True, mode="mask").attach(MODEL)
    assert "forward" not in MODEL.model.layers[0].mlp.__dict__


def test_recipes_say_what_does_not_go_together() -> None:
    with pytest.raises(RecipeError, match="both take the slot activations"):
        Recipe.of(Sirius(), Griffin())
    for slug, setting in (("h2o", {"budget": 16}), ("rtn-kv", {})):
        both = Recipe.of(Sirius(), make(slug, **setting))
        with both.attach(MODEL) as handle, pytest.raises(InputError, match="rewrites it exactly"):
            handle.generator(prompt(), 4)  # type: ignore[misc]
    with Griffin().attach(MODEL), pytest.raises(ModelError, match="already under a policy"):
        Sirius().attach(MODEL)


@pytest.mark.parametrize("family", FAMILIES)
def test_detach_leaves_no_trace(family: str) -> None:
    model, ids = tiny_model(family), prompt()
    before = {name: (value.clone(), value.stride()) for name, value in model.state_dict().items()}
    with torch.no_grad():
        dense = model(ids).logits
        for width in (1, 2):
            with Sirius(tree_width=width, period=3).attach(model) as handle:
                handle.generate(ids, 8)
            handle.detach()
        assert torch.equal(model(ids).logits, dense)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name][0])
        assert value.stride() == before[name][1]
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    with pytest.raises(InputError, match="not attached"):
        handle.generate(ids, 4)


def test_density_counts_all_weights() -> None:
    model = tiny_model("llama")
    total, mlp = sum(p.numel() for p in model.parameters()), 2 * 3 * 64 * 128
    assert density_of(model, 0.5, "coarse") == pytest.approx((total - mlp / 2) / total)
    assert density_of(model, 0.5, "fine") == pytest.approx((total - mlp / 3) / total)
    plain = tiny_model("gpt2")
    total, mlp = sum(p.numel() for p in plain.parameters()), 2 * 2 * 64 * 128
    assert density_of(plain, 0.25, "fine") == pytest.approx((total - 0.75 * mlp / 2) / total)
    fused = sum(v.neurons * v.channels * 3 for v in mlp_views(model))
    assert fused == 2 * 3 * 64 * 128


def test_bad_input_is_one_clear_line() -> None:
    for bad, word in (
        ({"keep": 0}, "keep"),
        ({"keep": 1.5}, "keep"),
        ({"period": 0}, "period"),
        ({"thr": -0.1}, "thr"),
        ({"temperature": 0}, "temperature"),
        ({"pattern": "rough"}, "pattern"),
        ({"accept": "maybe"}, "accept"),
        ({"tree_width": 0}, "tree_width"),
        ({"prune": 0.9}, "prune is for trees"),
        ({"second_chance": True, "tree_width": 2}, "second chance is for chains"),
    ):
        with pytest.raises(InputError, match=word):
            Sirius(**bad)
    with pytest.raises(InputError, match="pattern"):
        Griffin(pattern="rough")
    with pytest.raises(ModelError, match="no MLP"):
        Griffin().attach(torch.nn.Linear(2, 2))
    with Sirius(period=3, tree_width=2).attach(MODEL) as handle:
        for settings_, word in (
            ({"do_sample": True}, "greedily"),
            ({"num_beams": 2}, "greedily"),
            ({"output_scores": True}, "output_scores"),
            ({"use_cache": False}, "needs a cache"),
            ({"no_repeat_ngram_size": 2}, "no logits processors"),
            ({"cache_implementation": "static"}, "cannot attach to a StaticCache"),
        ):
            with pytest.raises(InputError, match=word):
                handle.generate(prompt(), 4, **settings_)
        with pytest.raises(InputError, match="one sequence at a time, got 2"):
            handle.generate(prompt(batch=2), 4)
        mask = torch.ones(1, 12, dtype=torch.long)
        mask[0, :3] = 0
        with pytest.raises(InputError, match="without padding"):
            handle.generate(prompt(), 4, attention_mask=mask)
        with pytest.raises(InputError, match="not attached to that model"):
            tiny_model("llama").generate(prompt(), max_new_tokens=4, custom_generate=handle.custom_generate)
    for model in (tiny_model("gemma3"), tiny_model("mistral", sliding_window=8)):
        with Sirius(tree_width=2).attach(model) as handle, pytest.raises(ModelError, match="has windows"):
            handle.generate(prompt(), 4)


def test_weights_that_are_not_finite_are_said() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        mlp_views(model)[0].down.weight[0, 0] = float("nan")
    with Sirius().attach(model) as handle, pytest.raises(ModelError, match="not finite"):
        handle.generate(prompt(), 4)
    model = tiny_model("llama")
    with torch.no_grad():
        mlp_views(model)[1].gate.weight[0, 0] = float("inf")
    with Griffin().attach(model), pytest.raises(ModelError, match="not finite"):
        model.generate(prompt(), max_new_tokens=4, do_sample=False)
