"""Four methods on one model and real text: how a prompt is read, what a step reads, what the cache keeps, how it is stored."""

import pytest
import torch

from gossamer.data import split, text, token_blocks
from gossamer.errors import RecipeError
from gossamer.hf import GossamerCache
from gossamer.measure.compare import calibration_tokens
from gossamer.models import LoadedModel
from gossamer.recipe import Recipe
from gossamer.registry import make

PROMPT, STEPS = 384, 12
PATTERN = {"pattern": "vertical-slash", "block_size": 16, "sinks": 4, "local": 16}


@pytest.fixture(scope="module")
def loaded(smollm2):
    return LoadedModel(*smollm2, "smollm2")


@pytest.fixture(scope="module")
def calibration(loaded):
    return make("double-sparsity").calibrate(loaded.model, calibration_tokens(loaded, blocks=1))


@pytest.fixture(scope="module")
def tokens(loaded):
    return token_blocks(loaded.tokenizer, split(text("prose"), "evaluation"), PROMPT + STEPS, 1)


def read(model, tokens):
    """Log-probabilities ``[STEPS, vocabulary]`` after a prompt, token by token."""
    cache = GossamerCache()
    with torch.no_grad():
        model(tokens[:, :PROMPT], past_key_values=cache, use_cache=True, logits_to_keep=1)
        steps = [
            model(tokens[:, at : at + 1], past_key_values=cache, use_cache=True).logits
            for at in range(PROMPT, PROMPT + STEPS)
        ]
    return torch.cat(steps, 1)[0].log_softmax(-1), cache


def kl(dense, other):
    return float((dense.exp() * (dense - other)).sum(-1).mean())


def stack(calibration, *, area, tokens, budget, bits):
    return Recipe.of(
        make("minference", **PATTERN, area=area),
        (make("double-sparsity", tokens=tokens, dense_layers=(), select_per="kv_head"), calibration),
        make("snapkv", budget=budget, window=16),
        make("rtn-kv", bits=bits, key_axis="token", value_axis="token", group=32),
    )


def test_with_everything_kept_the_stack_is_the_dense_model(loaded, calibration, tokens):
    dense, _ = read(loaded.model, tokens)
    with stack(calibration, area=1.0, tokens=1.0, budget=1.0, bits=8).attach(loaded.model):
        full, _ = read(loaded.model, tokens)
    assert kl(dense, full) < 2e-3, "eight bits are all that differs"
    again, _ = read(loaded.model, tokens)
    assert torch.equal(dense, again), "detaching gives the model back bit for bit"


def test_each_layer_of_the_stack_saves_its_part_and_costs_a_little(loaded, calibration, tokens):
    dense, whole = read(loaded.model, tokens)
    recipe = stack(calibration, area=0.5, tokens=64, budget=192, bits=8)
    with recipe.attach(loaded.model) as handle:
        sparse, cache = read(loaded.model, tokens)
        report = handle.report()
    assert bool(torch.isfinite(sparse).all())
    assert kl(dense, sparse) < 0.6
    assert 0.3 < report["prefill_area"] < 0.7
    assert all(layer.length == 192 + STEPS and layer.get_seq_length() == PROMPT + STEPS for layer in cache.layers)
    assert cache.nbytes < 0.3 * whole.nbytes, "half of the rows at a good quarter of the bytes, some rows still whole"
    assert report["rows_kept"] < 0.2
    steps = [list(step.method.slots) for step in recipe.steps]
    assert steps == [["attention.prefill"], ["attention.decode"], ["cache"], ["cache.storage"]]


def test_generation_runs_under_the_stack(loaded, calibration, tokens):
    prompt = tokens[:, :PROMPT]
    with stack(calibration, area=0.5, tokens=64, budget=192, bits=8).attach(loaded.model):
        out = loaded.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0
        )
    assert out.shape[1] > PROMPT


def test_conflicts_are_named(loaded, calibration):
    quest, channel = make("quest"), make("rtn-kv", bits=8)
    with pytest.raises(RecipeError, match="both take the slot attention"):
        Recipe.of((make("double-sparsity"), calibration), quest)
    with pytest.raises(RecipeError, match="snapkv drops single rows, but rtn-kv lets rows share scales"):
        Recipe.of(make("snapkv"), channel).attach(loaded.model)
    with pytest.raises(RecipeError, match="ems merges rows, which rtn-kv has quantised"):
        Recipe.of(make("ems"), make("rtn-kv", key_axis="token", value_axis="token")).attach(loaded.model)
