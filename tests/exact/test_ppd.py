"""PPD by its card: exact checks 1 to 9."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from gossamer.calibration import Calibration
from gossamer.decoding import Engine, ForwardCost
from gossamer.decoding.ppd import PPD, PromptDrafter, Typical, truncation
from gossamer.decoding.ppd_training import (
    Study,
    Targets,
    accuracies,
    chain_mask,
    distillation_loss,
    first_prompts,
    prompt_logits,
    random_cuts,
    read,
    roll_out,
    train_prompts,
)
from gossamer.decoding.ppd_tree import (
    allocate,
    build_dynamic_tree,
    choose_size,
    end_chances,
    equal_tree,
    ranked_paths,
    stationary,
    transitions,
)
from gossamer.errors import CalibrationError, InputError, ModelError
from gossamer.models import tiny_model
from gossamer.registry import make

PROMPT = torch.arange(5, 25)[None]
GREEDY = {"max_new_tokens": 20, "do_sample": False}
ACC = [[0.3, 0.2, 0.1, 0.05], [0.2, 0.1, 0.1, 0.02], [0.1, 0.1, 0.05, 0.01]]


@st.composite
def tables(draw, most=0.9):
    """Accuracies of 1 to 3 prompt tokens, 1 to 6 ranks."""
    m, ranks = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    rows = []
    for _ in range(m):
        weights = [draw(st.floats(0.01, 1)) for _ in range(ranks)]
        total = draw(st.floats(0.05, most))
        rows.append(sorted((total * w / sum(weights) for w in weights), reverse=True))
    return rows


def random_drafter(model, tree, seed=0):
    hidden = model.config.get_text_config().hidden_size
    return PromptDrafter(torch.randn(tree.m, hidden, generator=torch.Generator().manual_seed(seed)), tree)


class Knowing(PromptDrafter):
    """Guesses replaced by the right continuation, so that deep paths are accepted too."""

    def propose(self, context, tree):
        place = len(context.ids)
        for ahead, guesses in enumerate(self.guesses):
            if place + ahead < len(self.truth) and (place + ahead) % 7:
                guesses[(place + ahead) % 3] = self.truth[place + ahead]
        return super().propose(context, tree)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_1_the_text_is_plain_greedy_for_any_prompt_embeddings_and_tree(family):
    model = tiny_model(family)
    plain = model.generate(PROMPT, **GREEDY)
    for seed, size in enumerate((2, 7, 30)):
        for tree in (build_dynamic_tree(ACC, size), equal_tree(ACC, size)):
            engine = Engine(model, random_drafter(model, tree, seed))
            assert torch.equal(model.generate(PROMPT, **GREEDY, custom_generate=engine), plain)
            assert engine.stats.tokens == 20
    drafter = Knowing(torch.randn(3, 64), build_dynamic_tree(ACC, 30))
    drafter.truth = plain[0].tolist()
    engine = Engine(model, drafter)
    out = model.generate(PROMPT, **GREEDY, return_dict_in_generate=True, custom_generate=engine)
    assert torch.equal(out.sequences, plain)
    assert engine.stats.tokens_per_forward > 1.3
    assert len(engine.stats.accepted) > 2
    # No row of a prompt token stays: the cache is that of the text.
    with torch.no_grad():
        fresh = model(plain[:, :-1], use_cache=True).past_key_values
    for mine, other in zip(out.past_key_values.layers, fresh.layers, strict=True):
        assert mine.keys.shape == other.keys.shape or family == "gemma3"
        if family != "gemma3":
            torch.testing.assert_close(mine.keys, other.keys, atol=1e-4, rtol=1e-4)


def test_1_guesses_are_those_of_the_training_forward():
    model = tiny_model("llama")
    drafter = random_drafter(model, build_dynamic_tree(ACC, 24))
    seen = []

    class Watch(type(drafter)):
        def observe(self, target, verdict):
            super().observe(target, verdict)
            seen.append((len(target.context.ids) + len(verdict.path) - 1, [list(g) for g in self.guesses]))

    drafter.__class__ = Watch
    out = model.generate(PROMPT, **GREEDY, custom_generate=Engine(model, drafter))
    _, rows = read(model, out)
    checked = 0
    for place, guesses in seen[:-1]:
        logits = prompt_logits(model, rows, torch.tensor([[place]]), drafter.prompts, 3)[0, 0]
        wanted = logits.topk(10, dim=-1).indices.tolist()
        for mine, other in zip(guesses, wanted, strict=False):
            assert mine == other
            checked += 1
    assert checked > 20


@settings(max_examples=25, deadline=None)
@given(tables(), st.integers(2, 26))
def test_2_trees_keep_their_total(acc, size):
    tree, m = build_dynamic_tree(acc, size), len(acc)
    assert tree.size <= size
    for state, nodes in enumerate(tree.prompts, 1):
        assert all(1 <= g <= m for g in nodes.values())
        assert all(path[:-1] in nodes for path in nodes if len(path) > 1)
        assert all(len(path) <= state for path in nodes)
        shape = tree.shape(state)
        assert shape.size == 1 + m + sum(1 + g for g in nodes.values()) <= 1 + m + size
        assert sum(path == tuple(range(-1, -len(path) - 1, -1)) for path in shape.rank_paths[1:]) == m
    assert tree.shape(0).parents == (-1, *range(m))


def test_2_what_could_not_be_used_before_the_end_is_left_out():
    tree = build_dynamic_tree(ACC, 40)
    assert tree.shape(3, 20).size == tree.shape(3).size
    for room, state in itertools.product(range(2, 9), range(4)):
        for path in tree.shape(state, room).rank_paths[1:]:
            candidates = sum(rank >= 0 for rank in path)
            prompts = len(path) - candidates
            assert candidates <= room - 1
            assert not prompts or candidates + 2 + prompts <= room


@given(st.floats(0.001, 0.1), st.integers(1, 10))
def test_3_constant_accuracies_at_depth_1(chance, s):
    values = ranked_paths([[chance] * 10], 1, s)
    assert sum(values.values()) == pytest.approx(s * chance)
    assert list(values) == [(rank,) for rank in range(s)]


@settings(max_examples=40, deadline=None)
@given(tables(), st.integers(1, 40))
def test_4_where_paths_end(acc, size):
    values = ranked_paths(acc, len(acc), size)
    assert list(values.values()) == sorted(values.values(), reverse=True)
    for path in values:
        assert len(path) == 1 or path[:-1] in values
    ends = end_chances(values)
    miss = 1 - sum(value for path, value in values.items() if len(path) == 1)
    assert min(ends.values()) >= 0
    assert sum(ends.values()) + miss == pytest.approx(1)
    chain = transitions([ends] * len(acc), [dict.fromkeys(ends, 1)] * len(acc), False)
    assert chain.sum(1) == pytest.approx(np.ones(len(acc)))


def test_4_the_expected_length_is_that_of_a_simulation():
    generator = torch.Generator().manual_seed(0)
    tree = build_dynamic_tree(ACC, 20)
    state, total, steps = 3, 0, 20_000
    rows = torch.tensor(ACC)
    rows = torch.cat([rows, 1 - rows.sum(1, keepdim=True)], dim=1)
    draws = torch.stack([row.multinomial(steps, replacement=True, generator=generator) for row in rows], 1).tolist()
    for ranks in draws:
        nodes, path = tree.prompts[state - 1], ()
        while (*path, ranks[len(path)] if len(path) < 3 else -1) in nodes:
            path = (*path, ranks[len(path)])
        total += len(path)
        state = nodes[path] if path else 3
    assert total / steps == pytest.approx(tree.accepted, rel=0.03)


@settings(max_examples=12, deadline=None)
@given(tables())
def test_5_more_room_never_yields_less(acc):
    yields = [build_dynamic_tree(acc, size).accepted for size in range(2, 33, 3)]
    assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(yields))
    for size in (12, 24):
        assert build_dynamic_tree(acc, size).accepted >= equal_tree(acc, size).accepted - 1e-9
        assert build_dynamic_tree(acc, size, official=True).accepted <= build_dynamic_tree(acc, size).accepted + 1e-9


def test_5_prompts_go_where_they_cost_least():
    values, gains = {(0,): 0.5, (1,): 0.2, (2,): 0.1}, [0, 0.5, 0.8, 0.9]
    assert list(allocate(values, gains, 12).values()) == [3, 3, 3]
    assert list(allocate(values, gains, 11).values()) == [3, 3, 2]
    # 0.1 · 0.3 costs more than 0.2 · 0.1, and less than 0.5 · 0.1.
    assert list(allocate(values, gains, 10).values()) == [3, 2, 2]
    assert list(allocate(values, gains, 9).values()) == [3, 2, 1]
    assert list(allocate(values, gains, 6).values()) == [1, 1, 1]
    assert list(allocate(dict.fromkeys([(0,), (1,)], 0.2), [0, 0.5, 0.6], 5).values()) == [1, 2]  # the first of equals
    with pytest.raises(InputError, match="do not fit into 5"):
        allocate(values, gains, 5)


@pytest.mark.parametrize(("kind", "ept"), [("ensemble", 2), ("decoder", 2), ("encoder", 2), ("ensemble", 1)])
def test_6_what_prompt_tokens_depend_on(kind, ept):
    model, m = tiny_model("llama"), 3
    _, rows = read(model, PROMPT)
    prompts = torch.randn(m * ept, 64)
    seen = chain_mask(m, ept, kind)

    def logits(p):
        """Before the mean over E: every embedding is a prompt token by itself, at the places and mask of the whole."""
        return embedding_logits(model, rows, p, m, ept, kind)

    jacobian = torch.autograd.functional.jacobian(lambda p: logits(p).sum(1), prompts)  # [mE, mE, d]
    assert torch.equal(jacobian.abs().sum(2) > 0, seen)
    whole = prompt_logits(model, rows, torch.tensor([[20]]), prompts, m, kind)[0, 0]
    torch.testing.assert_close(whole, logits(prompts).unflatten(0, (m, ept)).mean(1), atol=1e-5, rtol=1e-5)
    if kind != "encoder":
        later = torch.autograd.functional.jacobian(
            lambda p: prompt_logits(model, rows, torch.tensor([[20]]), p, m, kind)[0, 0].sum(1), prompts
        )
        for j, i in itertools.product(range(m), range(m)):
            assert bool((later[j, i * ept : (i + 1) * ept] != 0).any()) == (i <= j)


def embedding_logits(model, rows, prompts, m, ept, kind):
    total, length = m * ept, rows[0][0].shape[2]
    mask = torch.zeros(1, 1, total, length + total)
    mask[0, 0, :, length:] = torch.where(chain_mask(m, ept, kind), 0.0, torch.finfo(torch.float32).min)
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (key, value) in enumerate(rows):
        cache.update(key, value, layer)
    places = length + torch.arange(total)[None] // ept
    return model(inputs_embeds=prompts[None], attention_mask=mask, position_ids=places, past_key_values=cache).logits[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_6_a_truncated_prefix_is_a_mask(family):
    model = tiny_model(family)
    prompts = torch.randn(3, 64)
    text = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    cuts = torch.tensor([[3, 16, 9], [1, 5, 12]])
    logits, rows = read(model, text)
    ours = prompt_logits(model, rows, cuts, prompts, 3)
    targets = roll_out(model, logits, rows, cuts, 3, 256)
    for row, column in itertools.product(range(2), range(3)):
        prefix = text[row : row + 1, : cuts[row, column]]
        embedded = model.get_input_embeddings()(prefix)
        with torch.no_grad():
            alone = model(inputs_embeds=torch.cat([embedded, prompts[None]], 1)).logits[0, -3:]
            greedy = model.generate(prefix, max_new_tokens=4, do_sample=False)
            laws = model(greedy).logits[0, -4:-1].log_softmax(-1)
        torch.testing.assert_close(ours[row, column], alone, atol=1e-4, rtol=1e-4)
        # P_1 is held against the second token behind the prefix.
        assert targets.ids[row, column, :, 0].tolist() == greedy[0, -3:].tolist()
        torch.testing.assert_close(targets.logs[row, column], laws.topk(256).values, atol=1e-4, rtol=1e-4)


def test_7_only_the_prompt_embeddings_are_trained():
    model = tiny_model("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    text = torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(1))
    study = Study.of(model, text, random_cuts(torch.ones(4, dtype=torch.long), 12, 3, 3), 3, top=16)
    start = first_prompts(model, text, 6)
    assert start.shape == (6, 64)
    prompts, losses = train_prompts(model, study, start, steps=40)
    assert prompts.numel() == 3 * 2 * 64
    assert not torch.equal(prompts, start)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    again, _ = train_prompts(model, study, start, steps=40)
    assert torch.equal(again, prompts)
    study.rows = None  # texts are read again where their rows are not held
    other, _ = train_prompts(model, study, start, steps=3)
    torch.testing.assert_close(other, train_prompts(model, study, start, steps=3)[0])


def test_8_stationary_laws():
    chain = np.array([[0.25, 0.75], [0.5, 0.5]])
    law = stationary(chain)
    assert law.sum() == pytest.approx(1)
    assert law == pytest.approx([0.4, 0.6])
    assert law @ chain == pytest.approx(law)
    assert stationary(np.array([[0.0, 1.0], [1.0, 0.0]])) == pytest.approx([0.5, 0.5])
    assert stationary(np.eye(2)) == pytest.approx([0, 1])  # closed parts: from the last state
    # By hand: state 1 keeps (0,) with one prompt token, state 2 keeps it with two; a miss leads to 2.
    ends = [{(0,): 0.5}, {(0,): 0.5}]
    assert transitions(ends, [{(0,): 1}, {(0,): 2}], False).tolist() == [[0.5, 0.5], [0, 1]]
    assert transitions(ends, [{(0,): 1}, {(0,): 2}], True).tolist() == [[0, 0, 1], [0.5, 0.5, 0], [0.5, 0, 0.5]]


def test_9_the_loss():
    teacher = torch.randn(2, 3, 50)
    for top in (8, 50):
        targets = Targets.of_logits(teacher, top)
        assert float(distillation_loss(teacher, targets)) == pytest.approx(0, abs=1e-6)
    student = torch.randn(2, 3, 50)
    exact = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    whole = Targets.of_logits(teacher, 50).divergence(student)
    torch.testing.assert_close(whole, exact, atol=1e-5, rtol=1e-5)
    assert bool((Targets.of_logits(teacher, 8).divergence(student) <= exact + 1e-5).all())
    weighted = (exact[:, 0] + 0.8 * exact[:, 1] + 0.64 * exact[:, 2]) / 3
    assert float(distillation_loss(student, Targets.of_logits(teacher, 50))) == pytest.approx(
        float(weighted.mean()), 1e-5
    )
    labels = torch.randint(0, 50, (2, 3))
    hard = Targets.of_tokens(labels).divergence(student)
    torch.testing.assert_close(
        hard, F.cross_entropy(student.flatten(0, 1), labels.flatten(), reduction="none").view(2, 3)
    )


def test_accuracies_are_counted_by_rank():
    logits = torch.tensor([[[3.0, 2, 1, 0], [0, 1, 2, 3]], [[0, 2, 3, 1], [3, 2, 1, 0]]])
    found = accuracies(logits, Targets.of_tokens(torch.tensor([[0, 2], [1, 0]])), 2)
    assert found.tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_cuts_lie_in_the_reply():
    cuts = random_cuts(torch.tensor([1, 40, 95]), 96, 3, 500, seed=1)
    assert (int(cuts[0].min()), int(cuts[0].max())) == (1, 92)
    assert (int(cuts[1].min()), int(cuts[1].max())) == (40, 92)
    assert set(cuts[2].tolist()) == {95}


def test_the_size_follows_the_cost():
    trees = {size: build_dynamic_tree(ACC, size) for size in (4, 12, 24)}
    assert choose_size(trees, ForwardCost((1, 40), (1.0, 1.0), 1)) == 24
    assert choose_size(trees, ForwardCost((1, 8, 40), (1.0, 1.0, 4.0), 1)) == 4
    assert choose_size(trees, ForwardCost((1, 40), (1.0, 40.0), 1)) == 0


def test_typical_acceptance():
    law = torch.tensor([0.6, 0.3, 0.095, 0.005])
    assert truncation(law, 0.09, 0.3).tolist() == [True, True, True, False]
    assert truncation(law, 0.2, 0.99).tolist() == [True, True, False, False]
    flat = torch.full((100,), 0.01)
    assert truncation(flat).all()  # 0.3 · exp(-entropy) = 0.003

    model = tiny_model(
        "llama", vocab_size=5, num_hidden_layers=1, hidden_size=16, num_attention_heads=2, num_key_value_heads=1
    )
    prompt, stop = torch.tensor([[1, 4]]), StoppingCriteriaList([MaxLengthCriteria(10)])
    acc = [[0.3, 0.2], [0.2, 0.1]]
    for draw in (False, True):
        rule = Typical(epsilon=0.15, alpha=0.9, draw=draw)
        assert not rule.lossless
        engine = Engine(model, random_drafter(model, build_dynamic_tree(acc, 8)), rule)
        torch.manual_seed(0)
        for _ in range(20):
            out = engine(model, prompt, LogitsProcessorList(), stop, GenerationConfig(do_sample=True))
            with torch.no_grad():
                laws = model(out).logits[0].softmax(-1)
            for place in range(2, 10):
                assert (
                    truncation(laws[place - 1], 0.15 + 1e-4, 0.9)[out[0, place]]
                    or laws[place - 1, out[0, place]] > 0.14
                )
        assert engine.drafter.tree is not None
        plain = model.generate(prompt, **GREEDY)
        assert torch.equal(model.generate(prompt, **GREEDY, custom_generate=engine), plain)


def test_calibrated_saved_and_decoded(tmp_path):
    model = tiny_model("llama")
    method = make("ppd", steps=5, length=16, cuts=4, size=20)
    text = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(2))
    path = method.calibrate(model, text).save(tmp_path / "ppd.safetensors")
    calibration = Calibration.load(path)
    assert calibration.tensors["prompts"].shape == (3, 64)
    assert calibration.tensors["accuracies"].shape == (3, 10)
    engine = Engine(model, method.drafter(model, calibration), method.rule())
    assert torch.equal(model.generate(PROMPT, **GREEDY, custom_generate=engine), model.generate(PROMPT, **GREEDY))
    dear = ForwardCost((1, 16), (1.0, 16.0), 100)
    plain = make("ppd").drafter(model, calibration, dear)
    assert plain.tree is None
    engine = Engine(model, plain)
    assert torch.equal(model.generate(PROMPT, **GREEDY, custom_generate=engine), model.generate(PROMPT, **GREEDY))
    assert engine.report()["nodes_per_forward"] == 1


def test_bad_input_is_one_clear_line():
    model = tiny_model("llama")
    tensors = {"prompts": torch.zeros(3, 64), "accuracies": torch.full((3, 10), 0.05)}

    def of(**changed):
        from gossamer.models import fingerprint

        return Calibration("ppd", fingerprint(model), {**tensors, **changed})

    method = PPD(size=8)
    with pytest.raises(CalibrationError, match="needs a calibration"):
        method.drafter(model, None)
    with pytest.raises(CalibrationError, match="another model"):
        method.drafter(tiny_model("llama", seed=1), of())
    with pytest.raises(CalibrationError, match=r"not \[3, 64\]"):
        method.drafter(model, of(prompts=torch.zeros(2, 64)))
    with pytest.raises(CalibrationError, match="at most one together"):
        method.drafter(model, of(accuracies=torch.ones(3, 10)))
    with pytest.raises(CalibrationError, match="accuracies of 2 prompt tokens"):
        method.drafter(model, of(accuracies=torch.zeros(2, 10)))
    with pytest.raises(CalibrationError, match="prompts is not finite"):
        of(prompts=torch.full((3, 64), torch.nan))
    with pytest.raises(InputError, match="one embedding for a prompt token"):
        PPD(ept=2).drafter(model, of())
    with pytest.raises(ModelError, match="no language-model head"):
        method.drafter(model.model, of())
    with pytest.raises(InputError, match=r"\[count, block\]"):
        method.calibrate(model, PROMPT[0])
    with pytest.raises(InputError, match="two pieces"):
        method.calibrate(model, PROMPT)
    with pytest.raises(InputError, match="window of 16"):
        PPD(length=16).calibrate(tiny_model("gemma3"), PROMPT.repeat(2, 1))
    with pytest.raises(InputError, match="prefixes of texts"):
        Study.of(model, PROMPT, torch.tensor([[0]]), 3)
    with pytest.raises(InputError, match="size is at least 2"):
        build_dynamic_tree(ACC, 1)
    with pytest.raises(InputError, match="same number of ranks"):
        build_dynamic_tree([[0.1], [0.1, 0.2]], 8)
    with pytest.raises(InputError, match="are chances"):
        build_dynamic_tree([[float("nan")]], 8)
    with pytest.raises(InputError, match=r"\[3, d\]"):
        PromptDrafter(torch.zeros(2, 64), build_dynamic_tree(ACC, 8))
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite at step 0"):
        PPD(steps=2, length=10).calibrate(broken, PROMPT.repeat(2, 1))
