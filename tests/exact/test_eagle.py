"""EAGLE's head, its trees and guidance, with the engine."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from gossamer.decoding import Context, Eagle, Engine, ForwardCost, Guidance
from gossamer.decoding.eagle import (
    SHAPES,
    EagleDrafter,
    EaglePlan,
    eagle_head,
    eagle_loss,
    features_of,
    rank_tree,
    train_eagle,
)
from gossamer.decoding.lantern import Relaxed, codebook_neighbours
from gossamer.errors import InputError, ModelError
from gossamer.models import tiny_model
from gossamer.patterns import Tree

PROMPT = torch.arange(5, 15)[None]
GREEDY = {"max_new_tokens": 20, "do_sample": False}


def drafter_of(model, **settings):
    return EagleDrafter(model, eagle_head(model, initializer_range=0.2), **settings)


def ready(drafter, model, ids):
    """The drafter as the engine has it before a step behind these ids: (context, watching)."""
    context = Context(ids, 20, [], False)
    with drafter.watching(), torch.no_grad():
        model(ids[None, :-1])
        drafter.observe_prompt(ids[:-1], None)
        drafter.begin(context)
    return context


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("shape", ["dynamic", "25", "auto"])
def test_greedy_text_is_plain(family, shape):
    model = tiny_model(family)
    plain = model.generate(PROMPT, **GREEDY)
    settings = {"nodes": 12} if shape == "dynamic" else {"shape": rank_tree(SHAPES["25"])} if shape == "25" else {}
    drafter = drafter_of(model, depth=3, top_k=4, **settings)
    engine = Engine(model, drafter, cost=ForwardCost((1, 8, 64), (1.0, 1.1, 3.0), 100))
    assert torch.equal(model.generate(PROMPT, **GREEDY, custom_generate=engine), plain)
    assert engine.stats.nodes > engine.stats.forwards
    # A second turn on the same cache, of which the head has seen nothing.
    out = model.generate(PROMPT, **GREEDY, return_dict_in_generate=True, custom_generate=engine)
    more = torch.cat([out.sequences, PROMPT[:, :3]], 1)
    again = model.generate(more, **GREEDY, past_key_values=out.past_key_values, custom_generate=engine)
    assert torch.equal(again, model.generate(more, **GREEDY))


@pytest.mark.parametrize("name", list(SHAPES))
def test_static_trees_have_the_stated_sizes(name):
    tree = rank_tree(SHAPES[name])
    assert tuple(tree.depths.count(d) for d in range(1, 6)) == SHAPES[name]
    for path in tree.rank_paths[1:]:
        assert not path[-1] or (*path[:-1], path[-1] - 1) in tree.rank_paths


def by_path(model, head, ids, path):
    """Log law behind a path of candidates, each computed without a tree and without a cache."""
    with torch.no_grad(), features_of(model) as last:
        model(ids[None, :-1])
        features, tokens = last[0], ids[1:].tolist()
        for token in [*path, None]:
            n = len(tokens)
            embedded = model.get_input_embeddings()(torch.tensor([tokens]))
            said = head(features, embedded, torch.arange(n), torch.ones(n, n, dtype=torch.bool).tril())
            if token is None:
                return F.linear(said[0, -1], model.get_output_embeddings().weight).log_softmax(-1)
            features, tokens = torch.cat([features, said[:, -1:]], 1), [*tokens, token]


def test_a_tree_says_what_its_paths_say():
    """Both trees against drafting each path alone: the tokens of every rank, and the choice of the likeliest."""
    model, ids = tiny_model("llama"), PROMPT[0]
    drafter = drafter_of(model, shape=rank_tree((3, 5, 4)))
    context = ready(drafter, model, ids)
    with torch.no_grad():
        draft = drafter.propose(context, Tree.chain(0))
    for node, below in enumerate(draft.tree.children):
        if below:
            path = [draft.tokens[i] for i in draft.tree.path(node)[1:]]
            best = by_path(model, drafter.head, ids, path).topk(3).indices.tolist()
            assert [draft.tokens[c] for c in below] == [best[draft.tree.ranks[c]] for c in below]
    k, nodes = 3, 8
    drafter = EagleDrafter(model, drafter.head, nodes=nodes, depth=3, top_k=k)
    context = ready(drafter, model, ids)
    with torch.no_grad():
        draft = drafter.propose(context, Tree.chain(0))
    found, front = {}, {(): 0.0}
    for _ in range(3):
        level = {}
        for path, score in front.items():
            values, tokens = by_path(model, drafter.head, ids, list(path)).topk(k)
            level |= {(*path, t): score + v for v, t in zip(values.tolist(), tokens.tolist(), strict=True)}
        found |= level
        front = dict(sorted(level.items(), key=lambda item: -item[1])[:k])
    best = {path for path, _ in sorted(found.items(), key=lambda item: -item[1])[:nodes]}
    mine = {tuple(draft.tokens[i] for i in draft.tree.path(n)[1:]) for n in range(1, draft.tree.size)}
    assert mine == best


def test_draws_come_with_their_laws_and_without_repeats():
    model, ids = tiny_model("llama"), PROMPT[0]
    drafter = drafter_of(model, shape=rank_tree((4, 6)), drawn=True)
    context = ready(drafter, model, ids)
    torch.manual_seed(0)
    with torch.no_grad():
        draft = drafter.propose(context, Tree.chain(0))
    for node, law in draft.laws.items():
        tokens = [draft.tokens[c] for c in draft.tree.children[node]]
        assert len(set(tokens)) == len(tokens)
        path = [draft.tokens[i] for i in draft.tree.path(node)[1:]]
        torch.testing.assert_close(law, by_path(model, drafter.head, ids, path).exp(), atol=1e-4, rtol=1e-3)


def test_training_lowers_the_loss_and_more_is_accepted(tmp_path):
    model = tiny_model("llama", vocab_size=32)
    torch.manual_seed(0)
    texts = model.generate(
        torch.randint(0, 32, (48, 1)), max_new_tokens=24, do_sample=False, attention_mask=torch.ones(48, 1)
    )
    fresh = eagle_head(model)
    head = eagle_head(model)
    prompt, greedy = texts[:1, :4], {**GREEDY, "attention_mask": torch.ones(1, 4)}  # token 0 is no padding here
    weights = [p.clone() for p in model.parameters()]
    curve = train_eagle(model, head, texts, EaglePlan(epochs=15, batch=8, lr=3e-3, noise=0.01))
    assert sum(curve[-10:]) < 0.7 * sum(curve[:10])
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    rates = []
    for one in (fresh, head):
        engine = Engine(model, EagleDrafter(model, one, nodes=12, depth=4, top_k=4))
        model.generate(prompt, **greedy, custom_generate=engine)
        rates.append(engine.stats.tokens_per_forward)
    assert rates[1] > max(1.5, rates[0])
    head.save_pretrained(tmp_path)
    loaded = Eagle(checkpoint=str(tmp_path), nodes=12, top_k=4).drafter(model, None)
    engine = Engine(model, loaded)
    model.generate(prompt, **greedy, custom_generate=engine)
    assert engine.stats.tokens_per_forward == rates[1]
    with pytest.raises(ModelError, match="trained for another model"):
        Eagle(checkpoint=str(tmp_path)).drafter(tiny_model("llama", seed=3, vocab_size=32), None)


def test_the_loss_is_the_cards():
    torch.manual_seed(0)
    output, target, said = torch.nn.Linear(4, 6), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    wanted = []
    for i, j in ((0, 0), (0, 1), (1, 0)):
        gap = (target[i, j] - said[i, j]).abs()
        near = torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
        away = F.cross_entropy(output(said[i, j]), output(target[i, j]).softmax(-1))
        wanted.append(near + 0.1 * away)
    torch.testing.assert_close(eagle_loss(output, target, said, mask), torch.stack(wanted).mean())


@pytest.mark.parametrize("drawn", [False, True])
def test_guided_text_is_that_of_guided_plain_decoding(drawn):
    """Both branches in the engine, against logits of both texts by hand; and the engine's relaxed rule at delta 0."""
    model = tiny_model("llama")
    prompt = torch.tensor([[250, 7, 9]])
    ids = prompt
    with torch.no_grad():
        for _ in range(12):
            free = ids.masked_fill(ids == 250, 255)
            cond, plain = model(ids).logits[0, -1], model(free).logits[0, -1]
            ids = torch.cat([ids, (plain + 3.0 * (cond - plain)).argmax()[None, None]], 1)
    table = codebook_neighbours(torch.randn(200, 3, generator=torch.Generator().manual_seed(0)))
    drafter = drafter_of(model, drawn=drawn, **({"shape": rank_tree((3, 3))} if drawn else {"nodes": 9, "top_k": 3}))
    settings = {"max_new_tokens": 12, "do_sample": False}
    with Guidance(model, 3.0, [250], 255) as guidance:
        assert torch.equal(model.generate(prompt, **settings), ids)
        for rule in (None, Relaxed(table, k=9, delta=0.0)):
            engine = Engine(model, drafter, rule)
            assert torch.equal(model.generate(prompt, **settings, custom_generate=engine), ids)
            assert engine.stats.nodes > engine.stats.forwards
        with pytest.raises(InputError, match="guided already"), guidance:
            pass
        with pytest.raises(InputError, match="one sequence"):
            model(prompt.repeat(2, 1))
    assert not model._forward_hooks
    with torch.no_grad():
        torch.testing.assert_close(model(prompt).logits.shape, torch.Size([1, 3, 256]))


def test_sampled_text_has_the_targets_law_with_draws():
    """Chi-square of two tokens over a vocabulary of four, drawn candidates, exact acceptance (delta 0)."""
    small = {
        "vocab_size": 4,
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    model = tiny_model("llama", **small)
    prompt, count = torch.tensor([[1, 2, 3]]), 700
    with torch.no_grad():
        first = model(prompt).logits[0, -1].softmax(-1)
        second = torch.stack(
            [model(torch.cat([prompt, torch.tensor([[t]])], 1)).logits[0, -1].softmax(-1) for t in range(4)]
        )
    law = (first[:, None] * second).flatten() * count
    engine = Engine(
        model,
        drafter_of(model, shape=rank_tree((2, 3)), drawn=True),
        Relaxed(codebook_neighbours(torch.randn(4, 2)), k=3, delta=0.0),
    )
    torch.manual_seed(0)
    seen = torch.zeros(16)
    for _ in range(count):
        text = model.generate(prompt, max_new_tokens=3, do_sample=True, top_k=0, custom_generate=engine)[0, 3:]
        seen[4 * text[0] + text[1]] += 1
    keep = law >= 5
    statistic, degrees = float(((seen - law)[keep] ** 2 / law[keep]).sum()), int(keep.sum()) - 1
    assert degrees > 3
    assert statistic < degrees + 3.3 * (2 * degrees) ** 0.5 + 4
    assert max(engine.stats.accepted) >= 0


def test_bad_input_is_one_clear_line(tmp_path):
    model = tiny_model("llama")
    for bad, kind, words in (
        (lambda: Eagle().drafter(model, None), ModelError, "no head in an empty path"),
        (lambda: Eagle(checkpoint=str(tmp_path)).drafter(model, None), ModelError, "train one"),
        (lambda: Eagle(checkpoint="x").drafter(model.model, None), ModelError, "no language-model head"),
        (lambda: train_eagle(model, eagle_head(model), PROMPT[0]), InputError, r"\[count, length\]"),
        (lambda: Guidance(model, -1.0, [1], 2), InputError, "scale of 0 or more"),
        (lambda: Guidance(model, 2.0, [], 2), InputError, "condition tokens"),
    ):
        with pytest.raises(kind, match=words):
            bad()
    eagle_head(model).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="static one to draw"):
        Eagle(checkpoint=str(tmp_path), drawn=True).drafter(model, None)
    assert list(itertools.accumulate(SHAPES["25"]))[-1] == 25
