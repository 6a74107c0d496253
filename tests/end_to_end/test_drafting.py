"""Greedy text with every kind of draft is plain greedy's, token for token, on a real model."""

import pytest
import torch

from gossamer.data.prompts import QUESTIONS, REPEATING
from gossamer.decoding import Engine, KSeq, SpecTr, TokenRecycling
from gossamer.decoding.early_exit import EarlyExitDrafter
from gossamer.decoding.ppd import PromptDrafter
from gossamer.decoding.ppd_training import first_prompts
from gossamer.decoding.ppd_tree import build_dynamic_tree
from gossamer.patterns import Tree

pytestmark = pytest.mark.slow
NEW = 24


@pytest.fixture(scope="module")
def texts(smollm2):
    """Prompts ``[1, n]`` with plain greedy's text behind them."""
    model, tokenizer = smollm2
    found = []
    for question in (REPEATING[4], QUESTIONS[5]):
        messages = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        found.append((inputs["input_ids"], decode(model, inputs["input_ids"])))
    return found


def decode(model, ids, **settings):
    settings |= {"attention_mask": torch.ones_like(ids), "pad_token_id": model.generation_config.eos_token_id}
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, **settings)


def engines(model):
    """Small drafts, whether they pay or not."""
    prompts = first_prompts(model, torch.arange(2000, 2200)[None], 3)
    tree = build_dynamic_tree([[0.3, 0.1], [0.2, 0.1], [0.1, 0.05]], 12)
    return {
        "token-recycling": Engine(model, TokenRecycling().drafter(model, None), tree=Tree.chain(4)),
        "ppd": Engine(model, PromptDrafter(prompts, tree)),
        "spectr": Engine(model, SpecTr(layers=20, length=3).drafter(model, None), KSeq()),
        "early-exit": Engine(model, EarlyExitDrafter(model, 20, 3, adapt=False)),
    }


@pytest.mark.parametrize("way", ["token-recycling", "ppd", "spectr", "early-exit"])
def test_greedy_text_is_plain_greedys(smollm2, texts, way):
    model, _ = smollm2
    engine = engines(model)[way]
    forwards = tokens = 0
    for ids, plain in texts:
        assert torch.equal(decode(model, ids, custom_generate=engine), plain)
        forwards, tokens = forwards + engine.stats.forwards, tokens + engine.stats.tokens
    assert engine.stats.nodes > engine.stats.forwards
    if way != "ppd":  # its prompt tokens are not trained
        assert tokens > forwards, "some of each draft is right"
