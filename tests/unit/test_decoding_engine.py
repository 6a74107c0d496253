"""The draft–verify engine: with any drafter, what plain decoding would have said."""

import itertools
import math

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from gossamer.decoding import Drafter, Engine, ForwardCost, PromptLookup, Sizer
from gossamer.decoding.cost import cost_of, measure
from gossamer.decoding.ppd import PromptDrafter
from gossamer.decoding.ppd_tree import build_dynamic_tree
from gossamer.decoding.sizing import grow
from gossamer.errors import InputError, RecipeError
from gossamer.models import tiny_model
from gossamer.patterns import Tree
from gossamer.recipe import Recipe
from gossamer.registry import make

TREE = Tree.of_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])
PROMPT = torch.arange(5, 30)[None]
GREEDY = {"max_new_tokens": 24, "do_sample": False}
COST = ForwardCost((1, 8, 64), (1.0, 1.1, 3.0), 100)


class Guessing(Drafter):
    """Candidates at random, right with some chance because the vocabulary is small; sometimes none."""

    ranks, depth = 3, 3

    def __init__(self, vocabulary, seed=0, truth=None):
        self.generator = torch.Generator().manual_seed(seed)
        self.vocabulary, self.truth = vocabulary, truth

    def fill(self, context, tree):
        tokens = torch.randint(-1, self.vocabulary, (tree.size,), generator=self.generator).tolist()
        tokens[0] = int(context.ids[-1])
        if self.truth is not None:  # the first ranks follow the right continuation for a while
            for node, path in enumerate(tree.rank_paths):
                place = len(context.ids) + len(path) - 1
                if path and not any(path) and place < len(self.truth) and place % 5:
                    tokens[node] = self.truth[place]
        return tokens


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2"])
@pytest.mark.parametrize("tree", [TREE, Tree.chain(4), Tree.chain(0), None], ids=["tree", "chain", "plain", "sized"])
def test_greedy_text_is_that_of_plain_decoding(family, tree, monkeypatch):
    monkeypatch.setattr(Sizer, "record", lambda *step: None)  # what steps of so small a model take says nothing
    model = tiny_model(family)
    plain = model.generate(PROMPT, **GREEDY)
    engine = Engine(model, Guessing(256, truth=plain[0].tolist()), tree=tree, cost=COST)
    out = model.generate(PROMPT, **GREEDY, custom_generate=engine)
    assert torch.equal(out, plain)
    assert engine.stats.tokens == 24
    if tree is None or tree.size > 1:
        assert engine.stats.tokens_per_forward > 1.5
        assert engine.report()["nodes_per_forward"] > 2
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_the_cache_afterwards_is_that_of_the_text():
    model = tiny_model("llama")
    plain = model.generate(PROMPT, **GREEDY, return_dict_in_generate=True)
    engine = Engine(model, Guessing(256, truth=plain.sequences[0].tolist()), tree=TREE)
    out = model.generate(PROMPT, **GREEDY, return_dict_in_generate=True, custom_generate=engine)
    assert out.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length() == PROMPT.shape[1] + 23
    for mine, other in zip(out.past_key_values.layers, plain.past_key_values.layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys, atol=1e-4, rtol=1e-4)
    # A second turn goes on behind it.
    more = torch.cat([plain.sequences, PROMPT[:, :7]], dim=1)
    again = model.generate(more, **GREEDY, past_key_values=out.past_key_values, custom_generate=engine)
    assert torch.equal(again, model.generate(more, **GREEDY))


def test_processors_end_tokens_and_criteria_hold_inside_an_accepted_run():
    model = tiny_model("llama")
    settings = {**GREEDY, "repetition_penalty": 1.3}
    plain = model.generate(PROMPT, **settings)
    engine = Engine(model, Guessing(256, truth=plain[0].tolist()), tree=TREE)
    assert torch.equal(model.generate(PROMPT, **settings, custom_generate=engine), plain)
    for end in plain[0, PROMPT.shape[1] :].unique()[:6].tolist():
        wanted = model.generate(PROMPT, **settings, eos_token_id=end)
        assert torch.equal(model.generate(PROMPT, **settings, eos_token_id=end, custom_generate=engine), wanted)

    class Stop(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            return torch.tensor([ids.shape[1] == 38])

    out = model.generate(PROMPT, **settings, stopping_criteria=StoppingCriteriaList([Stop()]), custom_generate=engine)
    assert out.shape[1] == 38


def test_streamed_pieces_are_the_text():
    class Pieces(BaseStreamer):
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen.append(value.flatten())

        def end(self):
            self.ended = True

    model, pieces = tiny_model("llama"), Pieces()
    engine = Engine(model, Guessing(256), tree=TREE)
    out = engine.generate(PROMPT, **GREEDY, streamer=pieces)
    assert torch.equal(torch.cat(pieces.seen), out[0])
    assert pieces.ended


@pytest.mark.parametrize("tree", [Tree.of_paths([(0,), (1,), (0, 0), (1, 0)]), Tree.chain(2)], ids=["tree", "chain"])
def test_the_law_of_sampled_text_is_the_targets(tree):
    """Chi-square of the first three tokens over a vocabulary of four, against exact enumeration."""
    model = tiny_model(
        "llama",
        vocab_size=4,
        num_hidden_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
    )
    prompt, count = torch.tensor([[1, 2, 3]]), 2000
    processors = LogitsProcessorList([TemperatureLogitsWarper(0.7)])
    stopping = StoppingCriteriaList([MaxLengthCriteria(6)])
    sampling = GenerationConfig(do_sample=True)
    law = {}
    with torch.no_grad():
        for text in itertools.product(range(4), repeat=3):
            chance, ids = 1.0, prompt
            for token in text:
                chance *= float((model(ids).logits[0, -1] / 0.7).softmax(-1)[token])
                ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
            law[text] = chance
    engine = Engine(model, Guessing(4, seed=2), tree=tree)
    torch.manual_seed(0)
    seen = dict.fromkeys(law, 0)
    for _ in range(count):
        out = engine(model, prompt, processors, stopping, sampling)
        seen[tuple(out[0, 3:].tolist())] += 1
    cells = [(seen[t], law[t] * count) for t in law if law[t] * count >= 5]
    rest = count - sum(s for s, _ in cells), count - sum(e for _, e in cells)
    cells += [rest] if rest[1] >= 1 else []
    statistic = sum((s - e) ** 2 / e for s, e in cells)
    degrees = len(cells) - 1
    assert degrees > 3
    assert statistic < degrees + 3.3 * (2 * degrees) ** 0.5 + 4  # beyond the 99.9 % point


def test_recipes_draft_with_what_keeps_exactness():
    model = tiny_model("llama")
    plain = model.generate(PROMPT, **GREEDY)
    recipe = Recipe.of(make("prompt-lookup"), make("native-linear"))
    with recipe.attach(model) as handle:
        handle.generator.__self__.cost = COST
        out = handle.generator(PROMPT, **GREEDY)
        assert handle.report()["tokens_per_forward"] >= 1
    assert torch.equal(out, plain)
    with pytest.raises(RecipeError, match=r"prompt-lookup verifies several tokens at once.*streaming-llm"):
        Recipe.of(make("prompt-lookup"), make("streaming-llm", tokens=8)).attach(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_lookup_continues_what_stood_there_before():
    model = tiny_model("llama")
    repeated = torch.tensor([[9, 8, 7, 6, 5, 9, 8, 7, 6, 5, 9, 8]])
    drafter = PromptLookup().drafter(model, None)
    engine = Engine(model, drafter, tree=Tree.chain(4))
    engine(
        model, repeated, stopping_criteria=[type("Max", (), {"max_length": 14, "__call__": lambda s, i, x: [False]})()]
    )
    drafter.begin(type("C", (), {"ids": repeated[0]})())
    assert drafter.matches()[0] == (3, [7, 6, 5, 9, 8])
    assert drafter.fill(type("C", (), {"ids": repeated[0]})(), Tree.chain(3)) == [8, 7, 6, 5]


def test_bad_input_is_one_clear_line():
    model = tiny_model("llama")
    engine = Engine(model, Guessing(256), tree=TREE)
    with pytest.raises(InputError, match="one sequence at a time"):
        model.generate(PROMPT.repeat(2, 1), **GREEDY, custom_generate=engine)
    with pytest.raises(InputError, match="no padding"):
        model.generate(PROMPT, **GREEDY, attention_mask=(PROMPT > 8).long(), custom_generate=engine)
    with pytest.raises(InputError, match="another model"):
        engine(tiny_model("llama", seed=1), PROMPT)
    with make("streaming-llm", tokens=8).attach(model), pytest.raises(InputError, match="need exact"):
        model.generate(PROMPT, **GREEDY, custom_generate=engine)
    for bad in (
        lambda: ForwardCost((2,), (1.0,), 1),
        lambda: ForwardCost((1,), (0.0,), 1),
        lambda: ForwardCost((), (), 1),
    ):
        with pytest.raises(InputError):
            bad()


def test_costs_are_measured_once_and_kept(tmp_path):
    model = tiny_model("llama")
    cost = measure(model, context=16, sizes=(1, 4), rounds=2)
    assert cost.sizes == (1, 4)
    assert cost.ratio(1) == 1
    kept = cost_of(model, tmp_path)
    assert cost_of(model, tmp_path) == kept
    next(tmp_path.iterdir()).write_text("{")
    assert cost_of(model, tmp_path).sizes == kept.sizes


def follow(sizer, tree, right):
    """Tells a sizer that the first rank was always right, or nothing ever."""
    first = max(node for node, path in enumerate(tree.rank_paths) if not any(path)) if right else 0
    path = tree.path(first)
    sizer.learn(tree, [7] * tree.size, path)
    return len(path)


def test_the_sizer_drafts_where_it_pays_and_rests_where_it_does_not():
    sizer = Sizer(COST)
    for _ in range(200):
        tree = sizer.by_rank(3, 4)
        follow(sizer, tree, True)
    assert tree.size > 4
    assert sizer.confidence.chance((0, 0), 0.4) > 0.9
    dear = Sizer(ForwardCost((1, 2, 8), (1.0, 1.9, 8.0), 100))
    sizes = []
    for _ in range(400):
        tree = dear.by_rank(3, 4)
        sizes.append(tree.size)
        follow(dear, tree, False)
    assert sum(size > 1 for size in sizes[-200:]) <= 5


def test_drafts_that_take_more_time_than_they_give_are_left_out_for_longer_and_longer():
    """Chances promise much; what is measured decides."""
    sizer = Sizer(COST)
    rests = []
    for step in range(600):
        if sizer.rests():
            rests.append(step)
            sizer.record(1, 1, 1.0)
        else:
            sizer.record(5, 1, 1.2)
    assert len(rests) > 500
    gaps = [b - a for a, b in itertools.pairwise(rests)]
    assert max(gaps) == Sizer.JUDGED + 1
    assert gaps.count(Sizer.JUDGED + 1) == 4  # rests of 32, 64, 128, 256, then the last
    assert sizer.surcharge == pytest.approx(1.2 / COST.ratio(5), rel=0.01)
    worth = Sizer(COST)
    for _ in range(600):
        assert not worth.rests()
        worth.record(5, 2, 1.2)
    assert worth.rate > 1.5


def test_a_tree_grows_by_what_time_is_worth():
    def candidates(path):
        return [(7, 0.8), (8, 0.1)]

    free = grow(candidates, lambda nodes: 1.0, depth=4, most=6)
    assert free.tree.size == 7
    assert free.labels[:4] == [7] * 4, "the likeliest branch comes first"
    assert free.expected == pytest.approx(1 + 0.8 + 0.8**2 + 0.8**3 + 0.8**4 + 0.1 + 0.08)
    dear = grow(candidates, lambda nodes: 1 + 0.3 * (nodes - 1), depth=4)
    assert dear.labels == [7] * 4, "0.4096 tokens are worth 0.3"
    assert grow(candidates, lambda nodes: 1 + 0.3 * (nodes - 1), depth=4, rate=2.0).labels == [7, 7]
    assert grow(candidates, lambda nodes: 0.9 + nodes, depth=4).tree.size == 1
    assert grow(candidates, lambda nodes: 0.9 + nodes, depth=4, least=2).labels == [7, 7]
    assert grow(lambda path: [], lambda nodes: 1.0, depth=4).tree.size == 1


def test_the_grown_tree_holds_the_likeliest_paths():
    chances = [[0.6, 0.3, 0.05], [0.5, 0.2], [0.4]]
    every = [path for depth in (1, 2, 3) for path in itertools.product(*(range(len(row)) for row in chances[:depth]))]

    def value(path):
        return math.prod(row[rank] for row, rank in zip(chances, path, strict=False))

    def candidates(path):
        return list(enumerate(chances[len(path)])) if len(path) < len(chances) else []

    for nodes in range(1, 10):
        best = sorted(map(value, every), reverse=True)[:nodes]
        growth = grow(candidates, lambda size: 1.0, depth=3, most=nodes)
        assert growth.tree.size == nodes + 1
        assert growth.expected == pytest.approx(1 + sum(best))
        assert growth.expected == pytest.approx(1 + sum(map(value, growth.tree.rank_paths[1:])))


def test_promises_that_do_not_come_count_for_less():
    sizer = Sizer(COST)
    for _ in range(8):
        assert sizer.grow(lambda path: [(7, 0.9)], 4).tree.size == 5
        sizer.record(5, 1, COST.ratio(5))
        if sizer.trust < 0.3:
            break
    assert sizer.trust < 0.3
    assert sizer.grow(lambda path: [(7, 0.1)], 4).tree.size == 1
    sizer.begin()
    assert sizer.trust == 1
    assert sizer.grow(lambda path: [(7, 0.1)], 4).tree.size > 1


def test_lookup_learns_from_text_that_it_did_not_draft():
    model = tiny_model("llama")
    dear = ForwardCost((1, 2, 8), (1.0, 9.0, 80.0), 100)
    engine = Engine(model, PromptLookup().drafter(model, None), cost=dear)
    prompt = torch.arange(5, 15).repeat(3)[None]
    out = model.generate(prompt, **GREEDY, custom_generate=engine)
    assert torch.equal(out, model.generate(prompt, **GREEDY))
    assert engine.stats.nodes == engine.stats.forwards
    assert sum(tried for _, tried in engine.sizer.confidence.seen.values()) > 3


def test_prompt_tokens_rest_where_they_do_not_pay():
    model = tiny_model("llama")
    tree = build_dynamic_tree([[0.4, 0.2], [0.3, 0.1]], 6)
    prompts = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    assert not PromptDrafter(prompts, tree).sized
    engine = Engine(model, PromptDrafter(prompts, tree, rests=True), cost=COST)
    settings = {**GREEDY, "max_new_tokens": 60}
    out = model.generate(PROMPT, **settings, custom_generate=engine)
    assert torch.equal(out, model.generate(PROMPT, **settings))
    assert engine.stats.nodes / engine.stats.forwards > 1
    assert engine.drafter.sized
