"""`gossamer apply`: a folder that loads, a card that says what was measured, and runs that go on."""

from __future__ import annotations

import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from gossamer.applying import Text, apply_recipe, recipe_of
from gossamer.errors import InputError, OutputError, RecipeError
from gossamer.hf import matrices
from gossamer.measure import weights as study
from gossamer.models import LoadedModel, load
from gossamer.models import tiny_model as make
from gossamer.patterns import Masks
from gossamer.recipe import Recipe
from gossamer.registry import make as method

TEXT = Text(blocks=2, length=32)
PLAN = study.Plan(segments=2, length=32, context=16, steps=2, rounds=1, blocks=2, block=32)


@pytest.fixture
def tiny(byte_tokenizer):
    return LoadedModel(make("llama", vocab_size=257), byte_tokenizer, "tiny")


def test_what_comes_out_loads_in_transformers_and_is_what_was_made(tiny, tmp_path):
    out = tmp_path / "out"
    card = apply_recipe(tiny, recipe_of("sparsegpt", {"structure": "2:4"}), out, TEXT, measure=PLAN)
    plain = AutoModelForCausalLM.from_pretrained(out)
    masks = Masks.load(out / "masks.safetensors")
    for matrix in matrices(plain):
        assert torch.equal(matrix.parameter != 0, masks[matrix.name])
    assert card["facts"]["sparsity"] == pytest.approx(0.5)
    applied = card["measured"]["applied"]
    assert applied["nonzero"] == sum(int((p != 0).sum()) for p in plain.parameters())
    assert json.loads((out / "gossamer.json").read_text())["measured"]["applied"]["perplexity"] == applied["perplexity"]
    text = (out / "README.md").read_text()
    assert "sparsegpt" in text
    assert f"{applied['perplexity']:.4g}" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert load(out).name == "out"


def test_the_model_that_went_in_is_untouched(tiny, tmp_path):
    before = [p.clone() for p in tiny.model.parameters()]
    apply_recipe(tiny, recipe_of("magnitude", {}), tmp_path / "out", TEXT, measure=None)
    assert all(torch.equal(a, b) for a, b in zip(before, tiny.model.parameters(), strict=True))
    assert "Nothing was measured" in (tmp_path / "out" / "README.md").read_text()


def test_a_folder_in_use_is_refused_and_kept(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        apply_recipe(tiny, recipe_of("magnitude", {}), tmp_path / "out", TEXT, measure=None)
    assert (tmp_path / "out" / "mine.txt").read_text() == "x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(tiny, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot write"):
        apply_recipe(tiny, recipe_of("magnitude", {}), tmp_path / "out", TEXT, measure=None)


def test_an_interrupted_run_does_not_prune_again(tiny, tmp_path, monkeypatch):
    out, recipe = tmp_path / "out", recipe_of("magnitude", {"sparsity": 0.3})
    with monkeypatch.context() as patch:
        patch.setattr(study, "score", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            apply_recipe(tiny, recipe, out, TEXT, measure=PLAN)
    assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr(type(recipe.steps[0].method), "apply", lambda *args: pytest.fail("pruned again"))
        card = apply_recipe(tiny, recipe, out, TEXT, measure=PLAN)
    assert card["facts"]["sparsity"] == pytest.approx(0.3, abs=1e-4)
    assert out.is_dir()


def test_an_interrupted_run_of_another_recipe_starts_afresh(tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(study, "score", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            apply_recipe(tiny, recipe_of("magnitude", {"sparsity": 0.3}), out, TEXT, measure=PLAN)
    card = apply_recipe(tiny, recipe_of("magnitude", {"sparsity": 0.6}), out, TEXT, measure=None)
    assert card["facts"]["sparsity"] == pytest.approx(0.6, abs=1e-4)


def test_runtime_methods_of_the_recipe_go_along(tiny, tmp_path):
    recipe = Recipe.of(method("magnitude"), method("streaming-llm", tokens=64))
    apply_recipe(tiny, recipe, tmp_path / "out", TEXT, measure=None)
    kept = Recipe.load(tmp_path / "out" / "recipe.yaml")
    assert [step.method.slug for step in kept.steps] == ["streaming-llm"]


def test_recipes_that_change_no_weights_are_refused(tiny, tmp_path):
    with pytest.raises(RecipeError, match="one method that changes weights"):
        apply_recipe(tiny, recipe_of("streaming-llm", {}), tmp_path / "out", TEXT)
    path = tmp_path / "r.yaml"
    path.write_text("methods:\n- magnitude\n")
    assert recipe_of(str(path), {}).steps[0].method.slug == "magnitude"
    with pytest.raises(InputError, match="--set"):
        recipe_of(str(path), {"sparsity": 0.5})
