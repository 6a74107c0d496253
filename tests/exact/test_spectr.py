"""SpecTr: the couplings against hand-made numbers and the optimum, and every lossless rule against the target's own law."""

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

from gossamer.calibration import Calibration
from gossamer.decoding import (
    Context,
    Draft,
    Engine,
    KSeq,
    LPOptimum,
    Match,
    RecursiveRejection,
    SpecTr,
    SpecTrDrafter,
    SpeculativeSampling,
    Target,
    Typical,
    spectr_generate,
)
from gossamer.decoding import transport as ot
from gossamer.decoding.sources import ModelSource, NGrams, NGramSource, sharing_weights
from gossamer.errors import CalibrationError, InputError, ModelError
from gossamer.hf import AttentionRuntime, GossamerCache
from gossamer.models import tiny_model
from gossamer.patterns import Tree
from gossamer.recipe import Recipe
from gossamer.registry import make
from gossamer.testing_decoding import (
    EveryOutcome,
    TableSource,
    block,
    chi_square,
    distance,
    exact_law,
    law_of_text,
    logits_of,
    sampled,
    toy_model,
)

RULES = {"k-seq": KSeq, "speculative": SpeculativeSampling, "recursive": RecursiveRejection, "optimum": LPOptimum}
PROMPT = torch.arange(5, 25)[None]


def law(*chances):
    return torch.tensor(chances, dtype=torch.float64)


def random_laws(seed, size, count=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(size, generator=generator, dtype=torch.float64) ** 3 + 1e-6 for _ in range(count)]


def tables(seed, size, spread=1.5):
    generator = torch.Generator().manual_seed(seed)
    return TableSource(spread * torch.randn(size, size, generator=generator))


# -- by hand (checks 1, 2, 3) -------------------------------------------------------------------------------------------


def test_two_tokens_by_hand():
    p, q = law(0.5, 0.5), law(1, 0)
    gamma = ot.gamma_star(p, q, 2)
    assert gamma == pytest.approx(1.5, abs=1e-9)
    assert gamma >= 1.5
    assert ot.beta(p, q, gamma) == pytest.approx(0.5)
    assert ot.any_of(ot.beta(p, q, gamma), 2) == pytest.approx(0.75)
    assert ot.kseq_residual(p, q, gamma, 2).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("p", "q", "k", "gamma", "accepted", "optimum"),
    [
        ((0.6, 0.3, 0.1), (0.2, 0.5, 0.3), 2, 1.463325, 0.785330, 0.84),
        ((0.6, 0.3, 0.1), (0.2, 0.5, 0.3), 4, 2.039262, 0.903926, 1.0),
        ((0.6, 0.3, 0.1), (0.2, 0.5, 0.3), 1, 1.0, 0.6, 0.6),
        ((0.25,) * 4, (0.7, 0.1, 0.1, 0.1), 3, 1.951878, 0.787969, 0.878125),
    ],
)
def test_the_cards_numbers(p, q, k, gamma, accepted, optimum):
    p, q = law(*p), law(*q)
    found = ot.gamma_star(p, q, k)
    assert found == pytest.approx(gamma, abs=1e-6)
    assert ot.any_of(ot.beta(p, q, found), k) == pytest.approx(accepted, abs=1e-6)
    assert ot.optimal_acceptance(p, q, k) == pytest.approx(optimum, abs=1e-9)
    if k == 3:
        torch.testing.assert_close(ot.kseq_residual(p, q, found, k), law(1, 0, 0, 0), atol=1e-9, rtol=0)


def test_edges():
    p = law(0.5, 0.3, 0.2)
    assert ot.gamma_star(p, p, 8) == 1
    assert ot.any_of(ot.beta(p, p, 1.0), 8) == pytest.approx(1)
    apart = law(0.5, 0.5, 0, 0), law(0, 0, 0.4, 0.6)
    gamma = ot.gamma_star(*apart, 4)
    assert ot.beta(*apart, gamma) == 0
    torch.testing.assert_close(ot.kseq_residual(*apart, gamma, 4), apart[1])
    with pytest.raises(InputError, match="too small for 2 drafts"):
        ot.kseq_residual(law(0.5, 0.5), law(1, 0), 1.2, 2)


# -- properties (checks 4, 6, 9) ----------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(2, 40), k=st.integers(1, 9), slack=st.floats(0, 1))
def test_what_passes_and_the_residual_make_up_the_target(seed, size, k, slack):
    p, q = (x / x.sum() for x in random_laws(seed, size))
    gamma = ot.gamma_star(p, q, k)
    gamma += slack * (k - gamma)  # every larger gamma is valid too
    one = ot.beta(p, q, gamma)
    accepted = ot.any_of(one, k)
    residual = ot.kseq_residual(p, q, gamma, k)
    raw = q - torch.minimum(p, q / gamma) * accepted / one
    assert float(raw.min()) >= -1e-10
    assert float(residual.min()) >= 0
    assert float(residual.sum()) == pytest.approx(1, abs=1e-12)
    made = torch.minimum(p, q / gamma) * accepted / one + (1 - accepted) * residual
    torch.testing.assert_close(made, q, atol=1e-9, rtol=0)


def test_k_seq_is_within_its_bound_of_the_optimum():
    worst = 1.0
    for seed in range(200):
        size, k = 2 + seed % 3, 1 + seed % 3
        p, q = (x / x.sum() for x in random_laws(seed, size))
        best = ot.optimal_acceptance(p, q, k)
        # The cut that bounds the flow: of a set T of tokens, q(T) and the drafts that are not all in it.
        subsets = [[i for i in range(size) if code >> i & 1] for code in range(2**size)]
        assert best == pytest.approx(min(float(q[t].sum()) + 1 - float(p[t].sum()) ** k for t in subsets), abs=1e-9)
        accepted = ot.any_of(ot.beta(p, q, ot.gamma_star(p, q, k)), k)
        bound = 1 - (1 - 1 / k) ** k
        assert bound * best - 1e-9 <= accepted <= best + 1e-9
        assert best <= ot.upper_bound(p, q, k) + 1e-9
        assert ot.recursive_acceptance(p, q, k) <= best + 1e-9
        worst = min(worst, accepted / best)
    assert worst < 0.95
    # The bound is attained: two tokens, of which the target wants one that the draft has half of.
    half = law(0.5, 0.5), law(1, 0)
    assert ot.optimal_acceptance(*half, 2) == pytest.approx(0.75)  # here the optimum itself is 3/4


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_what_is_missing_falls_with_gamma(k):
    for seed in range(20):
        p, q = (x / x.sum() for x in random_laws(seed, 12))
        grid = torch.linspace(1, k, 50, dtype=torch.float64).tolist()
        ones = [ot.beta(p, q, g) for g in grid]
        h = [ot.any_of(one, k) - g * one for one, g in zip(ones, grid, strict=True)]
        assert all(a >= b - 1e-12 for a, b in itertools.pairwise(h))
        assert h[0] >= -1e-12
        assert h[-1] <= 1e-12
        gamma = ot.gamma_star(p, q, k)
        one = ot.beta(p, q, gamma)
        assert ot.any_of(one, k) - gamma * one <= 1e-12  # rounded up


def test_one_draft_is_speculative_sampling_bit_for_bit():
    for seed in range(300):
        p, q = (x / x.sum() for x in random_laws(seed, 5))
        drawn = ot.Dice(torch.Generator().manual_seed(seed)).draw(p)
        ours, theirs = (ot.Dice(torch.Generator().manual_seed(seed + 1)) for _ in range(2))
        assert ot.kseq_select(p, q, [drawn], ours) == ot.maximal_coupling(p, q, drawn, theirs)


SELECTORS = {
    "k-seq": ot.kseq_select,
    "recursive": ot.recursive_rejection,
    "optimum": ot.optimal_select,
    "coupling": lambda p, q, drafts, dice: ot.maximal_coupling(p, q, drafts[0], dice),
    "naive": lambda p, q, drafts, dice: ot.naive_select(q, drafts, dice),
}


@pytest.mark.parametrize("name", SELECTORS)
def test_a_choice_has_exactly_the_targets_law(name):
    dice = EveryOutcome()
    for seed in range(3):
        p, q = (x / x.sum() for x in random_laws(seed, 3))

        def run(p=p, q=q):
            return SELECTORS[name](p, q, [dice.draw(p) for _ in range(3)], dice)

        outcomes = dice.law(run)
        for token in range(3):
            assert sum(c for (t, _), c in outcomes.items() if t == token) == pytest.approx(float(q[token]), abs=1e-9)
        accepted = sum(c for (_, place), c in outcomes.items() if place is not None)
        wanted = {
            "k-seq": ot.any_of(ot.beta(p, q, ot.gamma_star(p, q, 3)), 3),
            "recursive": ot.recursive_acceptance(p, q, 3),
            "optimum": ot.optimal_acceptance(p, q, 3),
            "coupling": ot.beta(p, q, 1.0),
            "naive": float((q * (1 - (1 - p) ** 3)).sum()),
        }[name]
        assert accepted == pytest.approx(wanted, abs=1e-9)


def test_choices_among_drafts_without_replacement_are_exact():
    dice = EveryOutcome()
    p, q = law(0.7, 0.2, 0.1, 0.0), law(0.1, 0.3, 0.2, 0.4)

    def run():
        left, drafts = p.clone(), []
        for _ in range(3):
            drafts.append(dice.draw(left))
            left[drafts[-1]] = 0
        return ot.recursive_rejection(p, q, drafts, dice, distinct=True)[0]

    found = dice.law(run)
    for token in range(4):
        assert found[token] == pytest.approx(float(q[token]), abs=1e-9)


# -- whole blocks (checks 7, 8, 10) --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_texts_have_exactly_the_targets_law(name):
    draft, target, prompt, dice = tables(1, 3), tables(2, 3), torch.tensor([0]), EveryOutcome()
    made = exact_law(SpecTrDrafter(draft, 2, 2, dice=dice), RULES[name](dice), dice, target, prompt, 3)
    assert distance(made, law_of_text(target, prompt, 3)) < 1e-6


def test_texts_from_distinct_drafts_have_exactly_the_targets_law():
    draft, target, prompt, dice = tables(1, 3), tables(2, 3), torch.tensor([0]), EveryOutcome()
    drafter = SpecTrDrafter(draft, 3, 2, distinct=True, dice=dice)
    made = exact_law(drafter, RecursiveRejection(dice), dice, target, prompt, 3)
    assert distance(made, law_of_text(target, prompt, 3)) < 1e-6


def test_the_harness_sees_a_rule_that_is_not_exact():
    draft, target, prompt, dice = tables(1, 3), tables(2, 3), torch.tensor([0]), EveryOutcome()

    class Wrong(KSeq):
        def select(self, p, q, drafts, distinct):
            return ot.kseq_select(p, q, sorted(set(drafts)), self.dice)  # repetitions dropped

    made = exact_law(SpecTrDrafter(draft, 2, 2, dice=dice), Wrong(dice), dice, target, prompt, 3)
    assert distance(made, law_of_text(target, prompt, 3)) > 1e-3


@pytest.mark.parametrize("count", [3000, pytest.param(200_000, marks=pytest.mark.long)])
def test_sampled_texts_of_n_grams_follow_the_target(count):
    draft, target, prompt = tables(3, 4), tables(4, 4), torch.tensor([2])
    torch.manual_seed(0)
    drafter, rule = SpecTrDrafter(draft, 3, 3), KSeq()

    def text():
        made = ()
        while len(made) < 3:
            made += block(drafter, rule, target, torch.cat([prompt, prompt.new_tensor(made)]), 4)
        return made[:3]

    assert chi_square(sampled(text, count), law_of_text(target, prompt, 3)) > 0.001


@pytest.mark.parametrize("name", RULES)
def test_sampled_texts_of_a_model_follow_it(name):
    """Through the engine, with an early exit as the draft, its cache rolled back, at a temperature and with top-k."""
    model, prompt = toy_model(), torch.tensor([[1, 2, 3]])
    processors = LogitsProcessorList([TemperatureLogitsWarper(0.8), TopKLogitsWarper(3)])
    engine = Engine(model, SpecTr(drafts=3, length=2, layers=1).drafter(model, None), RULES[name]())
    config = type("Config", (), {"do_sample": True, "return_dict_in_generate": False})()
    limit = [type("Max", (), {"max_length": 6, "__call__": lambda s, ids, x: [False]})()]
    torch.manual_seed(1)
    seen = sampled(lambda: tuple(engine(model, prompt, processors, limit, config)[0, 3:].tolist()), 400)
    assert chi_square(seen, law_of_text(logits_of(model), prompt[0], 3, processors)) > 0.001


@pytest.mark.parametrize("name", ["k-seq", "speculative", "recursive"])
@pytest.mark.parametrize("drafts", [1, 4])
def test_a_draft_that_is_the_target_is_always_accepted(name, drafts):
    model = tiny_model("llama")
    engine = Engine(model, SpecTr(drafts=drafts, length=3, layers=2).drafter(model, None), RULES[name]())
    torch.manual_seed(0)
    out = model.generate(PROMPT, max_new_tokens=24, do_sample=True, top_k=0, custom_generate=engine)
    assert out.shape[1] == PROMPT.shape[1] + 24
    assert engine.stats.accepted == {3: 6}


def test_blocks_have_one_to_l_plus_one_tokens_and_grow_with_k():
    draft, target, prompt = tables(5, 6), tables(6, 6), torch.tensor([0])
    torch.manual_seed(0)
    means, errors = [], []
    for drafts in (1, 2, 4, 8):
        drafter, rule = SpecTrDrafter(draft, drafts, 3), KSeq()
        sizes = [len(block(drafter, rule, target, prompt, 10)) for _ in range(300)]
        assert min(sizes) >= 1
        assert max(sizes) <= 4
        means.append(statistics.fmean(sizes))
        errors.append(statistics.stdev(sizes) / math.sqrt(300))
    for i in range(3):
        assert means[i + 1] >= means[i] - 3 * math.hypot(errors[i], errors[i + 1])
    assert means[3] > means[0] + 3 * math.hypot(errors[0], errors[3])


# -- sources ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2"])
def test_a_source_says_what_the_whole_text_would(family):
    model = tiny_model(family)
    layers = 2
    source, plain = ModelSource(model, layers), sharing_weights(model, layers)

    def alone(ids):
        return plain(torch.tensor([ids])).logits[0, -1]

    text = PROMPT[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(source.begin(PROMPT[0]), alone(text), atol=1e-4, rtol=1e-4)
        rows = [[7, 7, 9], [8, 5, 6], [4, 4, 4]]
        for depth, row in enumerate(rows):
            got = source.extend(row)
            for chain in range(3):
                wanted = alone([*text, *(r[chain] for r in rows[: depth + 1])])
                torch.testing.assert_close(got[chain], wanted, atol=1e-4, rtol=1e-4)
        # The second chain's first two tokens are accepted: nodes 2 and 5 of the tree of chains.
        source.keep([7, 5], [2, 5])
        assert source.cache.get_seq_length() == len(text) + 2
        longer = [*text, 7, 5, 33]
        torch.testing.assert_close(source.begin(torch.tensor(longer)), alone(longer), atol=1e-4, rtol=1e-4)
        other = [*text[:10], 3]  # another text altogether
        torch.testing.assert_close(source.begin(torch.tensor(other)), alone(other), atol=1e-4, rtol=1e-4)
        assert source.cache.get_seq_length() == 11


def test_an_early_exit_shares_weights_and_leaves_the_model_alone():
    model = tiny_model("llama")
    with torch.no_grad():
        before = model(PROMPT, output_hidden_states=True)
        early = sharing_weights(model, 1)
        wanted = model.lm_head(model.model.norm(before.hidden_states[1]))
        torch.testing.assert_close(early(PROMPT).logits, wanted)
        assert torch.equal(model(PROMPT).logits, before.logits)
    assert {p.data_ptr() for p in early.parameters()} <= {p.data_ptr() for p in model.parameters()}
    for layers in (0, 3):
        with pytest.raises(InputError, match="behind layer 1 to 2"):
            sharing_weights(model, layers)


def test_nodes_may_come_in_several_forwards():
    model, tree = tiny_model("gemma3"), Tree.of_chains(3, 2)
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    runtime = AttentionRuntime(model)
    with torch.no_grad():
        logits = []
        for cuts in ([7], [1, 3, 3]):
            cache, got, read = GossamerCache(), [], 0
            model(PROMPT, past_key_values=cache, use_cache=True)
            for size in cuts:
                part = slice(read, read + size)
                with runtime.tree_forward(
                    tree if len(cuts) == 1 else Tree.of_chains(3, max(read + size - 1, 0) // 3), read
                ):
                    positions = PROMPT.shape[1] + tree.positions[None, part]
                    got.append(model(tokens[:, part], past_key_values=cache, position_ids=positions).logits[0])
                read += size
            logits.append(torch.cat(got))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    runtime.detach()


def test_n_grams_by_hand():
    grams = NGrams.count(torch.tensor([[0, 1, 0, 1, 0, 2], [3, 3, 3, 3, 3, 3]]), 2, 4)
    single = 0.1 * 0.25 + 0.9 * torch.tensor([3, 2, 1, 6]) / 12
    after_0 = 0.3 * single + 0.7 * torch.tensor([0, 2, 1, 0]) / 3
    torch.testing.assert_close(grams.law([3, 0]), after_0.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(grams.law([2]), single.double(), atol=1e-6, rtol=0)  # never seen before another
    source = NGramSource(grams)
    source.begin(torch.tensor([3, 0]))
    torch.testing.assert_close(source.extend([0, 3])[0].exp(), after_0, atol=1e-6, rtol=0)


def test_n_grams_are_learned_saved_and_drafted_from(tmp_path):
    model, method = tiny_model("llama"), SpecTr(draft="ngram", drafts=3, length=2)
    tokens = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))
    learned = Calibration.load(method.calibrate(model, tokens).save(tmp_path / "grams.safetensors"))
    engine = Engine(model, method.drafter(model, learned), KSeq())
    out = model.generate(PROMPT, max_new_tokens=9, do_sample=True, custom_generate=engine)
    assert out.shape[1] == PROMPT.shape[1] + 9
    with pytest.raises(CalibrationError, match="needs a calibration"):
        method.drafter(model, None)
    with pytest.raises(CalibrationError, match="another model"):
        method.drafter(tiny_model("llama", seed=1), learned)
    with pytest.raises(CalibrationError, match="counts no 4-grams"):
        SpecTr(draft="ngram", order=4).drafter(model, learned)
    bad = Calibration("spectr", learned.fingerprint, {**learned.tensors, "grams.1": torch.tensor([[900, 1]])})
    with pytest.raises(CalibrationError, match="no counts of 1-grams"):
        method.drafter(model, bad)


# -- the engine and recipes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule", ["k-seq", "speculative-sampling", "recursive-rejection", "lp-optimum", "typical-acceptance"]
)
def test_greedy_text_is_that_of_plain_decoding(rule):
    model = tiny_model("llama")
    plain = model.generate(PROMPT, max_new_tokens=16, do_sample=False, repetition_penalty=1.2)
    with Recipe.of(make("spectr", drafts=3, length=3, layers=2), make(rule)).attach(model) as handle:
        out = handle.generator(PROMPT, max_new_tokens=16, do_sample=False, repetition_penalty=1.2)
        assert handle.report()["tokens_per_forward"] == 4  # the draft has all layers
    assert torch.equal(out, plain)


def test_recipes_name_rules_and_keep_what_is_exact():
    model = tiny_model("llama")
    plain = Recipe.of(make("spectr", distinct=True, drafts=3), make("native-linear"))
    with plain.attach(model) as handle, pytest.raises(InputError, match="drawn independently"):
        handle.generator(PROMPT, max_new_tokens=8, do_sample=True)
    with Recipe.of(make("spectr", distinct=True, drafts=3), make("recursive-rejection")).attach(model) as handle:
        assert handle.generator(PROMPT, max_new_tokens=8, do_sample=True).shape[1] == PROMPT.shape[1] + 8
    with pytest.raises(InputError, match="with their laws"):
        Recipe.of(make("prompt-lookup"), make("k-seq")).attach(model).generator(
            PROMPT.repeat(1, 2), max_new_tokens=8, do_sample=True
        )


def test_drafts_of_another_model():
    model, small = tiny_model("llama"), tiny_model("qwen2", num_hidden_layers=1)
    torch.manual_seed(0)
    out = spectr_generate(model, small, PROMPT, drafts=2, length=2, max_new_tokens=8)
    assert out.shape[1] == PROMPT.shape[1] + 8
    assert not any("forward" in module.__dict__ for module in small.modules())
    with pytest.raises(ModelError, match="the draft knows 128 tokens, the target 256"):
        spectr_generate(model, tiny_model("llama", vocab_size=128), PROMPT, max_new_tokens=8)
    with pytest.raises(ModelError, match="no model"):
        SpecTr(draft="nothing-of-that-name").drafter(model, None)


def test_models_are_loaded_from_folders(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))).save_pretrained(
        tmp_path
    )
    engine = Engine(model, SpecTr(draft=str(tmp_path), drafts=2, length=2).drafter(model, None), KSeq())
    torch.manual_seed(0)
    model.generate(PROMPT, max_new_tokens=9, do_sample=True, top_k=0, custom_generate=engine)
    assert engine.stats.accepted == {2: 3}


def typical_target(logits, tokens, tree, do_sample=True):
    context = Context(torch.tensor([1, 2]), 9, None, do_sample)
    return Target(context, Draft(tree, tokens), logits)


def test_typical_acceptance_by_hand():
    rule, tree = Typical(0.3, 0.6), Tree.of_paths([(0,), (1,), (0, 0)])
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.96, 0.02, 0.02], [0.2, 0.2, 0.6], [0.4, 0.4, 0.2]]).log()
    assert ot.typical_threshold(logits[0].exp(), 0.3, 0.6) == pytest.approx(0.6 * math.exp(-1.029653), abs=1e-5)
    assert rule.lossless is False
    # The entropy of the root's law lets 0.3 pass, and not 0.2; behind node 1 only token 0 is typical.
    assert rule.decide(typical_target(logits, [2, 1, 0, 2], tree)).path == (0, 2)  # of two as long the likelier
    assert rule.decide(typical_target(logits, [2, 1, 0, 0], tree)).path == (0, 1, 3)
    assert rule.decide(typical_target(logits, [2, 0, 1, 0], tree)).path == (0, 1, 3)
    assert rule.decide(typical_target(logits, [2, 0, 1, 1], tree)).path == (0, 1)
    assert rule.decide(typical_target(logits, [2, 2, 2, 0], tree)).path == (0,)


def test_bad_input_is_one_clear_line():
    p = law(0.5, 0.5)
    for run, words in [
        (lambda: ot.kseq_select(p, law(1, 0, 0), [0]), "one vocabulary"),
        (lambda: ot.kseq_select(p, law(math.nan, 1), [0]), "finite chances"),
        (lambda: ot.kseq_select(p, law(-1, 2), [0]), "finite chances"),
        (lambda: ot.kseq_select(p, p, []), "at least one"),
        (lambda: ot.kseq_select(p, p, [2]), "that their law can draw"),
        (lambda: ot.maximal_coupling(law(1, 0), p, 1), "that their law can draw"),
        (lambda: ot.gamma_star(p, p, 0), "at least one draft"),
        (lambda: ot.checked(torch.ones(2, 2)), "a law is a vector"),
        (lambda: ot.optimal_acceptance(torch.ones(9), torch.ones(9), 2), "at most 8 tokens"),
        (lambda: ot.recursive_rejection(p, p, [0, 0], distinct=True), "differ from each other"),
        (lambda: SpecTr(drafts=0), "drafts"),
        (lambda: SpecTr(length=0), "length"),
        (lambda: SpecTrDrafter(tables(0, 3), 0, 1), "at least one draft"),
        (lambda: SpecTr(layers=9).drafter(tiny_model("llama"), None), "behind layer 1 to 2"),
        (lambda: NGrams.count(torch.ones(2, 2), 2, 4), "integer blocks"),
        (lambda: NGrams.count(torch.tensor([[1, 9]]), 2, 4), "not of a vocabulary"),
        (lambda: make("typical-acceptance", epsilon=0), "epsilon"),
        (lambda: chi_square({(0,): 3}, {(0,): 1.0}), "too few"),
        (lambda: EveryOutcome().law(lambda: None, most=0), "more than 0 ways"),
    ]:
        with pytest.raises(InputError, match=words) as caught:
            run()
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="law that each candidate"):
        KSeq().decide(typical_target(torch.zeros(2, 3), [0, 1], Tree.chain(1)))
    target = typical_target(torch.zeros(2, 3), [0, 1], Tree.chain(1), do_sample=False)
    assert KSeq().decide(target).path == Match().decide(target).path
