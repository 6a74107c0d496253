"""LANTERN by its card: exact checks 1 to 10."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from gossamer.calibration import Calibration
from gossamer.decoding import Context, Draft, Drafter, Engine, Rule, Target, Verdict
from gossamer.decoding.lantern import (
    Relaxed,
    after_rejection,
    codebook_neighbours,
    neighbours_of,
    pool,
    prefix_sums,
    relaxed_law,
    total_variation,
)
from gossamer.errors import CalibrationError, InputError
from gossamer.models import tiny_model
from gossamer.patterns import Tree
from gossamer.recipe import Recipe
from gossamer.registry import make

SEEDS = st.integers(0, 10_000)
property_of = settings(deadline=None, max_examples=50)
TREE = Tree.of_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 0), (0, 0, 1)])


def case(seed, size=12):
    """A random law and the neighbours of a random codebook."""
    generator = torch.Generator().manual_seed(seed)
    law = (2 * torch.randn(size, generator=generator, dtype=torch.double)).softmax(0)
    return law, codebook_neighbours(torch.randn(size, 3, generator=generator)), generator


def target_of(logits, draft, do_sample=True):
    return Target(Context(torch.tensor([draft.tokens[0]]), 20, [], do_sample), draft, logits)


class PlainTree(Rule):
    """Exact acceptance, written from the card: sure candidates, or drawn ones without replacement."""

    def decide(self, target):
        draft, path = target.draft, [0]
        while True:
            q, p = target.law(path[-1]).double(), draft.laws.get(path[-1])
            q, p, found, tried = q / q.sum(), None if p is None else p.double(), None, set()
            for child in draft.tree.children[path[-1]]:
                x = draft.tokens[child]
                if x in tried:
                    continue
                tried.add(x)
                chance = 1.0 if p is None else float(p[x])
                if chance <= 0:
                    continue
                if float(torch.rand(())) * chance < float(q[x]):
                    found = child
                    break
                minus = torch.eye(len(q), dtype=torch.double)[x] if p is None else p
                q = (q - minus).clamp_min(0)
                q = q / q.sum()
                if p is not None:
                    p = p.clone()
                    p[x] = 0
                    p = p / p.sum()
            if found is None:
                return Verdict(tuple(path), int(q.multinomial(1)))
            path.append(found)


def random_draft(generator, size, drawn):
    """A draft with repeated siblings now and then, and the logits of its nodes."""
    laws = {}
    tokens = [int(torch.randint(size, (1,), generator=generator)) for _ in range(TREE.size)]
    if drawn:
        for node, below in enumerate(TREE.children):
            if below:
                laws[node] = torch.randn(size, generator=generator).softmax(0)
                picks = laws[node].multinomial(len(below), generator=generator, replacement=True).tolist()
                for child, token in zip(below, picks, strict=True):
                    tokens[child] = token
    return Draft(TREE, tokens, laws), torch.randn(TREE.size, size, generator=generator)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("zero", ["A", "k+1"])
@pytest.mark.parametrize("bound", [{"k": 0, "delta": 0.5}, {"k": 4, "delta": 0.0}, {"k": 0, "ratio": 3.0}])
def test_1_no_pool_is_exact_acceptance_with_the_same_random_numbers(drawn, zero, bound):
    lengths = set()
    for seed in range(40):
        _, near, generator = case(seed, 6)
        draft, logits = random_draft(generator, 6, drawn)
        rule = Relaxed(near, zero=zero, **bound)
        assert rule.lossless
        torch.manual_seed(seed)
        mine = rule.decide(target_of(logits, draft))
        torch.manual_seed(seed)
        assert mine == PlainTree().decide(target_of(logits, draft))
        lengths.add(len(mine.path))
    assert len(lengths) > 1


@pytest.mark.parametrize("drawn", [False, True])
def test_1_the_law_is_the_targets(drawn):
    """Chi-square of the first emitted token, with siblings that may repeat."""
    _, near, generator = case(3, 5)
    logits = torch.randn(TREE.size, 5, generator=generator)
    law, p = logits[0].double().softmax(0), torch.randn(5, generator=generator).softmax(0)
    rule, count, seen = Relaxed(near, k=4, delta=0.0), 6000, torch.zeros(5)
    torch.manual_seed(0)
    tree = Tree.of_paths([(0,), (1,), (2,)])
    for _ in range(count):
        tokens = [0, *p.multinomial(3, replacement=True).tolist()] if drawn else [0, 4, 1, 4]
        draft = Draft(tree, tokens, {0: p} if drawn else {})
        verdict = rule.decide(target_of(logits, draft))
        seen[draft.tokens[verdict.path[1]] if len(verdict.path) > 1 else verdict.token] += 1
    statistic = float(((seen - law * count) ** 2 / (law * count)).sum())
    assert statistic < 18.5  # the 99.9 % point of four degrees


def test_1_engine_text_at_delta_0_is_plain_greedy():
    model = tiny_model("llama")
    prompt = torch.arange(5, 15)[None]
    plain = model.generate(prompt, max_new_tokens=16, do_sample=False)

    class Truth(Drafter):
        def propose(self, context, tree):
            n = len(context.ids)
            follow = [int(plain[0, n + i]) if n + i < plain.shape[1] else 7 for i in range(3)]
            return Draft(TREE, [int(context.ids[-1]), follow[0], 3, 4, follow[1], 9, 8, 8, follow[2], 1])

    table = codebook_neighbours(torch.randn(256, 4, generator=torch.Generator().manual_seed(0)))
    engine = Engine(model, Truth(), Relaxed(table, k=20, delta=0.0))
    out = model.generate(prompt, max_new_tokens=16, do_sample=False, custom_generate=engine)
    assert torch.equal(out, plain)
    assert engine.stats.tokens_per_forward > 3


@given(SEEDS, st.integers(0, 11), st.floats(0, 1), st.integers(0, 11))
@property_of
def test_2_3_the_relaxed_law(seed, k, delta, token):
    law, near, _ = case(seed)
    row = near[token].long()[:k]
    found = pool(law, token, row, delta=delta)
    relaxed = relaxed_law(law, token, row[: found.size])
    assert found.mass <= delta
    assert total_variation(law, relaxed) == pytest.approx(found.mass, abs=1e-12)
    assert float(relaxed.sum()) == pytest.approx(1, abs=1e-12)
    assert bool((relaxed >= 0).all())
    assert relaxed[token] >= law[token]
    # It is the longest prefix: one code more would pass the bound.
    if delta > 0 and found.size < k:
        assert float(prefix_sums(law, row)[found.size]) > delta
    # Every step of the way down conserves mass.
    left = after_rejection(law, token, near[token].long(), found.size, k, None, "A")
    assert float(left.sum()) == pytest.approx(1)
    assert left[token] == 0 or torch.allclose(left, torch.full_like(left, 1 / 12))


def test_2_a_nearest_code_above_the_bound_ends_the_prefix():
    law = torch.tensor([0.2, 0.5, 0.1, 0.2])
    assert pool(law, 0, torch.tensor([1, 2, 3]), delta=0.4).size == 0
    assert pool(law, 0, torch.tensor([2, 1, 3]), delta=0.4).size == 1


@given(SEEDS)
@property_of
def test_4_everything_is_accepted_at_delta_1(seed):
    law, near, generator = case(seed)
    draft, logits = random_draft(generator, 12, False)
    rule = Relaxed(near, k=11, delta=1.0)
    for token in range(12):
        found = pool(law, token, near[token].long(), delta=1.0 + 1e-12)
        assert float(law[token]) + found.mass == pytest.approx(1)
    verdict = rule.decide(target_of(logits, draft))
    assert verdict.path == (0, 1, 4, 8)  # the first child each time, to the end


@given(SEEDS, st.integers(0, 11), st.integers(0, 11), st.floats(0, 1), st.floats(0, 1))
@property_of
def test_5_credit_grows_with_k_and_delta(seed, k, more, delta, higher):
    law, near, _ = case(seed)
    k, more, delta, higher = min(k, more), max(k, more), min(delta, higher), max(delta, higher)
    for token in range(12):
        row = near[token].long()
        small = pool(law, token, row[:k], delta=delta).mass
        assert small <= pool(law, token, row[:more], delta=delta).mass
        assert small <= pool(law, token, row[:k], delta=higher).mass


@given(SEEDS, st.floats(1.01, 40))
@property_of
def test_6_the_ratio_rule_bounds_the_credit(seed, ratio):
    law, near, _ = case(seed)
    for token in range(12):
        found = pool(law, token, near[token].long(), ratio=ratio)
        assert float(law[token]) + found.mass <= ratio * float(law[token]) * (1 + 1e-12)


@pytest.mark.parametrize("zero", ["A", "k+1"])
@pytest.mark.parametrize("drawn", [False, True])
def test_7_one_draft_by_enumeration_of_six_codes(zero, drawn):
    """The law of what comes out is the mixture over drafts that the card's formulas give; for sure ones TV <= delta."""
    law, near, generator = case(11, 6)
    p = (0.5 * torch.randn(6, generator=generator, dtype=torch.double)).softmax(0) if drawn else None
    k, delta, count = 3, 0.3, 6000
    rule = Relaxed(near, k=k, delta=delta, zero=zero)
    mixture = torch.zeros(6, dtype=torch.double)
    for token in range(6):
        row = near[token].long()
        sums = law[row[:k]].cumsum(0)
        size = int((sums <= delta).sum())
        credit = float(law[token] + (sums[size - 1] if size else 0))
        relaxed = law.clone()
        relaxed[row[:size]] = 0
        relaxed[token] = credit
        if drawn:
            accept = min(1.0, credit / float(p[token]))
            minus = p.clone()
            if zero == "k+1" and size:
                minus[row[:k]] = 0
            left = ((relaxed if zero == "A" else law) - minus).clamp_min(0)
        else:
            accept, left = credit, (relaxed if zero == "A" else law).clone()
            left[token] = 0
            if zero == "k+1" and size:
                left[row[: k + 1]] = 0
        out = (1 - accept) * (left / left.sum() if left.sum() > 0 else torch.full((6,), 1 / 6, dtype=torch.double))
        out[token] += accept
        if drawn:
            mixture += p[token] * out
            continue
        if zero == "A":
            torch.testing.assert_close(out, relaxed)
            assert total_variation(out, law) <= delta
        check_frequencies(rule, law, lambda token=token: token, None, out, count // 6)
    if drawn:
        check_frequencies(rule, law, lambda: int(p.multinomial(1)), p, mixture, count)


def check_frequencies(rule, law, draw, p, wanted, count):
    torch.manual_seed(1)
    seen = torch.zeros(6, dtype=torch.double)
    for _ in range(count):
        token = draw()
        place, left = rule.level(law, [token], p)
        seen[token if place is not None else int(left.multinomial(1))] += 1
    for got, chance in zip(seen.tolist(), wanted.tolist(), strict=True):
        assert abs(got - count * chance) <= 4 * (count * chance * (1 - chance)) ** 0.5 + 1e-6


@given(SEEDS, st.integers(2, 40), st.integers(1, 4))
@property_of
def test_8_rows_are_permutations_by_distance(seed, size, dim):
    codebook = torch.randn(size, dim, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    near = codebook_neighbours(codebook)
    assert near.dtype == torch.uint16
    for code in range(size):
        row = near[code].long()
        assert sorted(row.tolist()) == [c for c in range(size) if c != code]
        distance = (codebook.double()[row] - codebook.double()[code]).norm(dim=1)
        assert bool((distance.diff() >= -1e-12).all())
    assert torch.equal(codebook_neighbours(codebook, 3).int(), near[:, :3].int())


@given(SEEDS, st.integers(0, 11), st.floats(0, 1))
@property_of
def test_9_greedy_accepts_where_the_credited_token_is_best(seed, k, delta):
    law, near, _ = case(seed)
    rule = Relaxed(near, k=k, delta=delta)
    for token in range(12):
        found = pool(law, token, near[token].long()[:k], delta=delta)
        rest = float(law[[t for t in range(12) if t != token]].max())
        assert rule.agrees(law, token) == (float(law[token]) + found.mass >= rest)


def test_9_greedy_takes_the_longest_path_and_the_plain_best_behind_it():
    # Codes 0 and 1 look alike, 2 and 3 too. Candidate 1 is the runner-up; only its branch goes on.
    near = codebook_neighbours(torch.tensor([[0.0], [0.1], [5.0], [5.2]]))
    tree = Tree.of_paths([(0,), (1,), (1, 0)])
    logits = torch.tensor(
        [[0.4, 0.35, 0.1, 0.15], [0.1, 0.2, 0.3, 0.4], [0.1, 0.1, 0.3, 0.5], [0.3, 0.3, 0.4, 0.0]]
    ).log()
    draft = Draft(tree, [0, 0, 1, 2])
    verdict = Relaxed(near, k=1, delta=0.6).decide(target_of(logits, draft, do_sample=False))
    assert verdict == Verdict((0, 2, 3), 2)
    assert Relaxed(near, k=1, delta=0.0).decide(target_of(logits, draft, do_sample=False)) == Verdict((0, 1), 3)


@given(SEEDS)
@property_of
def test_10_names_of_codes_do_not_matter(seed):
    """Codebook rows and the model's laws renamed alike: the same candidates are accepted with the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    size = 12
    codebook, rename = torch.randn(size, 3, generator=generator), torch.randperm(size, generator=generator)
    draft, logits = random_draft(generator, size, bool(seed % 2))
    other, moved = torch.empty_like(codebook), torch.empty_like(logits)
    other[rename], moved[:, rename] = codebook, logits
    laws = {node: torch.empty(size).index_copy(0, rename, law) for node, law in draft.laws.items()}
    named = Draft(TREE, rename[draft.tokens].tolist(), laws)
    for bound in ({"delta": 0.2}, {"ratio": 3.0}):
        rules = [Relaxed(codebook_neighbours(book), k=5, **bound) for book in (codebook, other)]
        for do_sample in (True, False):
            paths = []
            for rule, text, scores in zip(rules, (draft, named), (logits, moved), strict=True):
                torch.manual_seed(seed)
                paths.append(rule.decide(target_of(scores, text, do_sample)).path)
            assert paths[0] == paths[1]
        assert rules[0].accepted == rules[1].accepted
        assert rules[0].tested == rules[1].tested


def test_the_bound_holds_for_sure_drafts_only():
    """Drawn from half of twelve equal codes, every draft is accepted where it may pool one neighbour: TV 1/2 at delta 0.1."""
    law, p = torch.full((12,), 1 / 12).double(), torch.tensor([1 / 6, 0] * 6).double()
    rule = Relaxed(codebook_neighbours(torch.arange(12.0)[:, None] ** 1.1), k=11, delta=0.1)
    for token in range(0, 12, 2):
        assert (float(law[token]) + rule.credit(law, token)[1].mass) / float(p[token]) == pytest.approx(1)
    assert total_variation(law, p) == pytest.approx(0.5)


def test_text_tokens_are_accepted_exactly():
    near = codebook_neighbours(torch.arange(4.0)[:, None])
    rule = Relaxed(near, k=3, delta=1.0, offset=2)
    assert rule.row(1).tolist() == rule.row(6).tolist() == []
    assert rule.row(2).tolist() == [3, 4, 5]
    law = torch.tensor([0.1, 0.3, 0.1, 0.1, 0.1, 0.1, 0.2])
    assert rule.credit(law, 1)[1].mass == 0
    assert rule.credit(law, 2)[1].mass == pytest.approx(0.3)
    with pytest.raises(InputError, match="4 codes from id 2 on, the model 5 tokens"):
        rule.credit(law[:5], 2)


def test_siblings_use_the_adjusted_law():
    """After a refusal the neighbours' mass is that of the law that is left, and repeated values are tested once."""
    near = codebook_neighbours(torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]]))
    law = torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2])
    rule = Relaxed(near, k=1, delta=0.3)
    torch.manual_seed(3)
    firsts = set()
    for _ in range(60):
        before = rule.tested
        place, left = rule.level(law, [0, 0, 4])
        firsts.add(place)
        assert rule.tested - before == (1 if place == 0 else 2)
        if place is None:  # 0 pools 1, then 4 pools 3 only if 0.2 / 0.7 <= 0.3
            torch.testing.assert_close(left, torch.tensor([0.0, 0, 1, 0, 0]).double())
    assert firsts == {0, 2, None}


class Random(Drafter):
    """Anything."""

    def propose(self, context, tree):
        return Draft(TREE, [int(context.ids[-1]), *torch.randint(0, 256, (TREE.size - 1,)).tolist()])


def test_as_a_method_with_its_calibration(tmp_path):
    model, codebook = tiny_model("llama"), torch.randn(256, 4)
    calibration = neighbours_of(model, codebook, 50)
    path = calibration.save(tmp_path / "table.safetensors")
    method = make("lantern", k=50, delta=0.4)
    rule = method.rule_for(model, Calibration.load(path))
    assert rule.neighbours.shape == (256, 50)
    prompt, torch_seed = torch.arange(5, 15)[None], 0
    counts = []
    for chosen in (rule, Relaxed(codebook_neighbours(codebook), k=255, delta=1.0)):
        torch.manual_seed(torch_seed)
        engine = Engine(model, Random(), chosen)
        model.generate(prompt, max_new_tokens=24, do_sample=True, top_k=0, custom_generate=engine)
        counts.append(engine.stats.tokens_per_forward)
    assert counts[1] > counts[0] >= 1
    assert counts[1] >= 3
    save_file({"codebook": codebook, "other": torch.zeros(2, 2)}, tmp_path / "book.safetensors")
    imported = make("lantern", k=50).import_calibration(tmp_path / "book.safetensors", model)
    assert torch.equal(imported.tensors["neighbours"].int(), calibration.tensors["neighbours"].int())
    with Recipe.of(make("prompt-lookup"), (method, calibration)).attach(model) as handle:
        handle.generator.__self__.tree = Tree.chain(3)
        assert isinstance(handle.generator.__self__.rule, Relaxed)
        assert handle.generator(prompt, max_new_tokens=4, do_sample=False).shape == (1, 14)


def test_bad_input_is_one_clear_line(tmp_path):
    model = tiny_model("llama")
    table = codebook_neighbours(torch.randn(6, 2))
    for bad, words in (
        (lambda: codebook_neighbours(torch.full((3, 2), torch.nan)), "not finite"),
        (lambda: codebook_neighbours(torch.zeros(1, 2)), "at least two codes"),
        (lambda: Relaxed(table[:, :2], k=3, delta=0.1), "wants 3"),
        (lambda: Relaxed(table.float(), k=3, delta=0.1), "integer"),
        (lambda: Relaxed(table, k=3, delta=1.5), r"delta in \[0, 1\]"),
        (lambda: Relaxed(table, k=3, ratio=1.0), "ratio above 1"),
        (lambda: Relaxed(table, k=3), "delta None, ratio None"),
        (lambda: Relaxed(torch.full((6, 5), 9), k=3, delta=0.1), "outside"),
        (lambda: Relaxed(torch.zeros(6, 5, dtype=torch.int32), k=3, delta=0.1), "no neighbour of itself"),
        (lambda: pool(torch.ones(6) / 6, 0, torch.tensor([1]), delta=0.1, ratio=2.0), "one bound"),
        (lambda: make("lantern", delta=0.1, ratio=2.0), "two rules"),
        (lambda: make("lantern", delta=1.5), "less than or equal to 1"),
        (lambda: make("lantern").calibrate(model, torch.zeros(1, 4)), "needs a codebook"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            bad()
        assert "\n" not in str(caught.value)
    calibration = neighbours_of(model, torch.randn(6, 2), 2)
    save_file({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, tmp_path / "two.safetensors")
    for broken, words in (
        (lambda: make("lantern").rule(), "needs a calibration"),
        (lambda: make("lantern", k=3).rule_for(model, calibration), "wants 3"),
        (lambda: make("lantern").rule_for(tiny_model("llama", seed=1), calibration), "another model"),
        (lambda: make("lantern").import_calibration(tmp_path / "none.safetensors", model), "cannot read"),
        (lambda: make("lantern").import_calibration(tmp_path / "two.safetensors", model), "2 matrices"),
    ):
        with pytest.raises(CalibrationError, match=words):
            broken()


def test_the_order_of_equal_paths_is_that_of_the_draft():
    near = codebook_neighbours(torch.arange(4.0)[:, None])
    tree = Tree.of_paths([(0,), (1,), (0, 0), (1, 0)])
    logits = torch.zeros(5, 4)
    for first, second in itertools.permutations((1, 2)):
        verdict = Relaxed(near, k=3, delta=0.8).decide(target_of(logits, Draft(tree, [0, first, second, 1, 1]), False))
        assert verdict.path == (0, 1, 3)
