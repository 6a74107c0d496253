"""Early exit: what the first layers draft, in the same cache, and that the text is plain decoding's."""

import pytest
import torch

from gossamer.decoding import EarlyExit, Engine, ForwardCost
from gossamer.decoding.base import Context
from gossamer.decoding.early_exit import first_layers
from gossamer.decoding.sources import sharing_weights
from gossamer.errors import InputError, ModelError
from gossamer.hf import GossamerCache
from gossamer.models import tiny_model
from gossamer.patterns import Tree

PROMPT = torch.arange(5, 30)[None]
GREEDY = {"max_new_tokens": 20, "do_sample": False}
COST = ForwardCost((1, 8, 64), (1.0, 1.1, 3.0), 100)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2", "mistral"])
@pytest.mark.parametrize("adapt", [True, False])
def test_the_text_is_plain_greedy(family, adapt):
    model = tiny_model(family)
    plain = model.generate(PROMPT, **GREEDY)
    engine = Engine(model, EarlyExit(layers=1, length=3, adapt=adapt).drafter(model, None), cost=COST)
    assert torch.equal(model.generate(PROMPT, **GREEDY, custom_generate=engine), plain)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_draft_of_all_layers_is_always_right(family):
    model = tiny_model(family)
    layers = model.config.get_text_config().num_hidden_layers
    engine = Engine(model, EarlyExit(layers=layers, length=4, adapt=False).drafter(model, None))
    out = model.generate(PROMPT, **GREEDY, custom_generate=engine)
    assert torch.equal(out, model.generate(PROMPT, **GREEDY))
    assert engine.stats.accepted == {4: 4}


def test_the_draft_is_what_a_model_of_the_first_layers_says_and_leaves_the_cache_as_it_was():
    model = tiny_model("llama", num_hidden_layers=3)
    early = sharing_weights(model, 2)
    wanted = early.generate(PROMPT, max_new_tokens=3, do_sample=False)[0, PROMPT.shape[1] :].tolist()
    with torch.no_grad():
        cache = GossamerCache()
        model(PROMPT[:, :-1], past_key_values=cache)
        before = [layer.keys.clone() for layer in cache.layers]
        drafter = EarlyExit(layers=2, length=3, adapt=False).drafter(model, None)
        draft = drafter.propose(Context(PROMPT[0], 9, [], False, cache), Tree.chain(0))
        assert draft.tokens == [int(PROMPT[0, -1]), *wanted]
        assert drafter.propose(Context(PROMPT[0], 3, [], False, cache), Tree.chain(0)).tree.size == 3
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
    assert len(model.model.layers) == 3


def test_the_layers_come_back_after_an_error():
    model = tiny_model("gpt2")
    before = model.transformer.h
    with pytest.raises(KeyError), first_layers(model, 1):
        {}[len(model.transformer.h)]
    assert model.transformer.h is before


def test_bad_input_is_one_clear_line():
    model = tiny_model("llama")
    with pytest.raises(InputError, match="got 99"):
        EarlyExit(layers=99).drafter(model, None)
    with pytest.raises(ModelError, match="no language-model head"):
        EarlyExit().drafter(model.model, None)
