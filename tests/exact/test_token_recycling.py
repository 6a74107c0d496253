"""Token Recycling by its card: exact checks 1 to 8."""

import itertools

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from gossamer.calibration import Calibration
from gossamer.decoding import Engine, ForwardCost
from gossamer.decoding.sizing import Sizer
from gossamer.decoding.token_recycling import TokenRecycling, released_template, state_of, top_successors
from gossamer.errors import CalibrationError, InputError, ModelError
from gossamer.hf import AttentionRuntime, GossamerCache
from gossamer.models import tiny_model
from gossamer.patterns import Tree
from gossamer.registry import make

PROMPT = torch.arange(5, 25)[None]
GREEDY = {"max_new_tokens": 20, "do_sample": False}
COST = ForwardCost((1, 8, 64), (1.0, 1.2, 4.0), 100)


def engine_of(model, **settings):
    return Engine(model, TokenRecycling(**settings).drafter(model, None), cost=COST)


def bigram_model(after):
    """A tiny model turned into a table: the embedding is looked up, all layers add nothing, the head knows the successor."""
    size = len(after)
    model = tiny_model("llama", vocab_size=size, hidden_size=size, num_attention_heads=4, tie_word_embeddings=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        for token, successor in enumerate(after):
            model.lm_head.weight[successor, token] = 1.0
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("template", ["auto", "2.2.2"])
def test_1_the_text_is_plain_greedy_for_any_table(family, template, monkeypatch):
    monkeypatch.setattr(Sizer, "record", lambda *step: None)  # what steps of so small a model take says nothing
    model = tiny_model(family)
    plain = model.generate(PROMPT, **GREEDY)
    engine = engine_of(model, template=template)
    for seed in range(3):
        table = engine.drafter.successors
        table.copy_(torch.randint(0, 256, table.shape, generator=torch.Generator().manual_seed(seed)))
        engine.drafter.seen[:] = True
        engine.drafter.chances.fill_(0.9)
        assert torch.equal(model.generate(PROMPT, **GREEDY, custom_generate=engine), plain)
    # A second time a table is warm, and the same text goes faster.
    engine = engine_of(model, template=template, lookup=False)
    for _ in range(2):
        assert torch.equal(model.generate(PROMPT, **GREEDY, custom_generate=engine), plain)
    assert engine.stats.tokens_per_forward > 1.3


def test_2_the_template():
    tree = released_template()
    assert [tree.depths.count(depth) for depth in range(7)] == [1, 8, 21, 25, 15, 8, 3]
    assert len(set(tree.rank_paths)) == 81
    assert len(tree.leaves) == 40
    for path in tree.rank_paths[1:]:
        assert path[:-1] in tree.rank_paths
        assert not path[-1] or (*path[:-1], path[-1] - 1) in tree.rank_paths  # ranks without gaps


def test_3_a_nodes_logits_are_those_of_its_path():
    model, drafter = tiny_model("qwen2"), None
    drafter = TokenRecycling(template="2.2.2").drafter(model, None)
    drafter.successors.copy_(torch.randint(0, 256, drafter.successors.shape))
    tree = drafter.template
    tokens = drafter.fill(type("C", (), {"ids": PROMPT[0]})(), tree)
    runtime = AttentionRuntime(model)
    with torch.no_grad():
        cache = GossamerCache()
        model(PROMPT[:, :-1], past_key_values=cache)
        with runtime.tree_forward(tree):
            positions = PROMPT.shape[1] - 1 + tree.positions[None]
            logits = model(torch.tensor([tokens]), past_key_values=cache, position_ids=positions).logits[0]
        for node in (0, 1, 8, 9, 40, 60, 78, 80):
            path = torch.tensor([[tokens[i] for i in tree.path(node)]])
            alone = model(torch.cat([PROMPT[:, :-1], path], dim=1)).logits[0, -1]
            torch.testing.assert_close(logits[node], alone, atol=1e-4, rtol=1e-4)
    runtime.detach()


def test_4_a_fresh_table_accepts_the_root_alone_and_writes_two_rows():
    model = bigram_model([5, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 1])
    engine = engine_of(model, template="2.2.2")
    engine(model, torch.tensor([[3]]), stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(3)]))
    assert engine.stats.accepted == {0: 2}
    drafter = TokenRecycling(template="2.2.2").drafter(model, None)
    one = Engine(model, drafter)
    one(model, torch.tensor([[3]]), stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(2)]))
    # With room for one token nothing is drafted; only the root's row is written.
    assert drafter.seen.nonzero()[:, 0].tolist() == [3]
    one(model, torch.tensor([[3]]), stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(8)]))
    assert drafter.successors[3, 0] == 4


def test_4_a_first_draft_writes_the_rows_of_the_root_and_of_id_0():
    model = bigram_model([5, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 1])
    drafter = TokenRecycling(template="2.2.2").drafter(model, None)
    context = type("C", (), {"ids": torch.tensor([3])})()
    tokens = drafter.fill(context, drafter.template)
    assert tokens == [3] + [0] * 80
    with torch.no_grad():
        logits = model(torch.tensor([tokens]).T).logits[:, 0]
    drafter.write(tokens, logits)
    assert drafter.seen.nonzero()[:, 0].tolist() == [0, 3]
    assert drafter.successors[3, 0] == 4
    assert drafter.successors[0, 0] == 5


def test_5_a_perfect_table_yields_seven_tokens_a_step():
    after = [(token * 5 + 3) % 16 for token in range(16)]
    model = bigram_model(after)
    engine = engine_of(model, template="2.2.2")
    engine.drafter.successors[:, 0] = torch.tensor(after)
    out = engine(model, torch.tensor([[1, 2]]), stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(2 + 7 * 5)]))
    assert engine.stats.accepted == {6: 5}
    assert all(int(b) == after[int(a)] for a, b in itertools.pairwise(out[0, 1:]))


@pytest.mark.parametrize("k", [1, 8])
def test_6_rows_are_the_rankings_of_the_last_node_with_a_token(k):
    model = tiny_model("llama")
    drafter = TokenRecycling(k=k).drafter(model, None)
    tokens, logits = [7, 9, 7, 11, 9, 7], torch.randn(6, 256)
    before = drafter.successors.clone()
    drafter.write(tokens, logits)
    for token, node in ((7, 5), (9, 4), (11, 3)):
        assert drafter.successors[token].tolist() == logits[node].topk(k).indices.tolist()
    others = [t for t in range(256) if t not in tokens]
    assert torch.equal(drafter.successors[others], before[others])
    with pytest.raises(InputError, match="256 tokens, the logits 10"):
        drafter.write([1], torch.zeros(1, 10))


def test_7_the_cache_is_that_of_the_text():
    model = tiny_model("llama")
    engine = engine_of(model, template="2.2.2")
    settings = {**GREEDY, "return_dict_in_generate": True}
    model.generate(PROMPT, **GREEDY, custom_generate=engine)  # warms the table
    out = model.generate(PROMPT, **settings, custom_generate=engine)
    assert max(engine.stats.accepted) > 0
    with torch.no_grad():
        fresh = model(out.sequences[:, :-1], use_cache=True).past_key_values
    for mine, other in zip(out.past_key_values.layers, fresh.layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mine.values, other.values, atol=1e-4, rtol=1e-4)


def test_8_sampled_text_has_the_models_law():
    model = tiny_model(
        "llama", vocab_size=5, num_hidden_layers=1, hidden_size=16, num_attention_heads=2, num_key_value_heads=1
    )
    prompt, count = torch.tensor([[1, 4]]), 2000
    with torch.no_grad():
        first = model(prompt).logits[0, -1].softmax(-1)
        second = torch.stack(
            [model(torch.cat([prompt, torch.tensor([[t]])], 1)).logits[0, -1].softmax(-1) for t in range(5)]
        )
    law = first[:, None] * second
    tree = Tree.of_paths([(0,), (1,), (2,), (0, 0), (1, 0)])
    engine = Engine(model, TokenRecycling(k=3, depth=2).drafter(model, None), tree=tree)
    torch.manual_seed(0)
    seen = torch.zeros(5, 5)
    stop = StoppingCriteriaList([MaxLengthCriteria(4)])
    for _ in range(count):
        text = engine(model, prompt, LogitsProcessorList(), stop, GenerationConfig(do_sample=True))[0, 2:]
        seen[text[0], text[1]] += 1
    assert engine.drafter.seen.all()
    for got, wanted in ((seen.sum(1), first * count), (seen.flatten(), law.flatten() * count)):
        keep = wanted >= 5
        statistic = float(((got - wanted)[keep] ** 2 / wanted[keep]).sum())
        degrees = int(keep.sum()) - 1
        assert statistic < degrees + 3.3 * (2 * degrees) ** 0.5 + 4  # beyond the 99.9 % point


def test_a_warm_table_is_saved_and_read(tmp_path):
    model = tiny_model("llama")
    method = make("token-recycling")
    calibration = method.calibrate(model, PROMPT.repeat(2, 1))
    path = calibration.save(tmp_path / "table.safetensors")
    drafter = method.drafter(model, Calibration.load(path))
    with torch.no_grad():
        logits = model(PROMPT).logits[0]
    assert drafter.successors[PROMPT[0]].tolist() == top_successors(logits, 8).tolist()
    for name, tensor in state_of(drafter, model).tensors.items():
        assert torch.equal(tensor, calibration.tensors[name])
    law = logits.gather(1, drafter.successors[PROMPT[0]].long()).softmax(-1)
    torch.testing.assert_close(drafter.chances[PROMPT[0]], law)
    with pytest.raises(CalibrationError, match="another model"):
        method.drafter(tiny_model("llama", seed=1), calibration)
    with pytest.raises(CalibrationError, match=r"not \[256, 4\]"):
        make("token-recycling", k=4).drafter(model, calibration)


def test_prompts_write_the_table_where_asked():
    model = tiny_model("llama")
    engine = engine_of(model, update_from_prefill=True)
    model.generate(PROMPT, max_new_tokens=1, do_sample=False, custom_generate=engine)
    assert engine.drafter.seen[PROMPT[0]].all()
    engine = engine_of(model)
    model.generate(PROMPT, max_new_tokens=1, do_sample=False, custom_generate=engine)
    assert engine.drafter.seen.sum() == 1


def test_bad_input_is_one_clear_line():
    with pytest.raises(InputError, match="needs 8 successors"):
        TokenRecycling(template="2.2.2", k=4).drafter(tiny_model("llama"), None)
    with pytest.raises(ModelError, match="no language-model head"):
        TokenRecycling().drafter(tiny_model("llama").model, None)
    with pytest.raises(InputError, match=r"\[count, block\]"):
        TokenRecycling().calibrate(tiny_model("llama"), PROMPT[0])
