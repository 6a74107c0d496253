import pytest
import torch

from gossamer.attention.double_sparsity import DoubleSparsity
from gossamer.errors import CalibrationError, GossamerError, InputError, RecipeError, UnknownNameError
from gossamer.models import tiny_model
from gossamer.recipe import Recipe, Step
from gossamer.registry import make


def test_yaml_round_trip(tmp_path):
    text = "methods:\n- double-sparsity:\n    tokens: 1/8\n    label_bits: 2\n    calibration: ds.safetensors\n"
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    recipe = Recipe.load(path)
    assert recipe.steps[0].method == make("double-sparsity", tokens=0.125, label_bits=2)
    path.write_text(recipe.to_yaml())
    assert Recipe.load(path) == recipe


def test_a_bare_name_is_a_method_with_its_defaults():
    assert Recipe.parse({"methods": ["quest"]}).steps == (Step(make("quest")),)


def test_a_calibration_beside_the_recipe_is_found(tmp_path):
    model = tiny_model("llama")
    ids = torch.randint(3, model.config.vocab_size, (1, 64))
    DoubleSparsity().calibrate(model, ids).save(tmp_path / "ds.safetensors")
    (tmp_path / "r.yaml").write_text(
        "methods:\n- double-sparsity: {tokens: 8, dense_layers: [], calibration: ds.safetensors}\n"
    )
    with Recipe.load(tmp_path / "r.yaml").attach(model) as handle, torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=cache)
        assert handle.report()["rows_kept"] < 1


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        ({"methods": []}, RecipeError, "at least one"),
        ({"methods": ["quest", "streaming-llm"]}, RecipeError, "both take the slot attention.decode"),
        ({"method": ["quest"]}, RecipeError, "`methods`"),
        (["quest"], RecipeError, "`methods`"),
        ({"methods": [{"quest": {}, "dense": {}}]}, RecipeError, "a name with its settings"),
        ({"methods": [{"quest": [1]}]}, RecipeError, "mapping"),
        ({"methods": ["qest"]}, UnknownNameError, "did you mean quest"),
        ({"methods": ["titok"]}, UnknownNameError, "not available yet"),
        ({"methods": [{"quest": {"tokens": 2.5}}]}, InputError, "above 0 and at most 1"),
        ({"methods": [{"quest": {"token": 2}}]}, InputError, "did you mean tokens"),
    ],
)
def test_bad_recipes_are_one_clear_line(data, error, says):
    with pytest.raises(error) as caught:
        Recipe.parse(data)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_one_clear_line(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("methods: [quest\n  - x: {")
    for path in (tmp_path / "none.yaml", broken, tmp_path):
        with pytest.raises(RecipeError) as caught:
            Recipe.load(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


def test_a_missing_calibration_says_how_to_make_one():
    with pytest.raises(CalibrationError, match="gossamer calibrate double-sparsity"):
        Recipe.of(make("double-sparsity")).attach(tiny_model("llama"))


def test_failing_to_attach_leaves_the_model_alone():
    model = tiny_model("llama")
    before = model.config._attn_implementation
    with pytest.raises(GossamerError):
        Recipe.of(make("double-sparsity")).attach(model)
    assert model.config._attn_implementation == before


def test_a_method_takes_the_slots_of_the_phases_it_serves():
    Recipe.of(make("hip-attention", phases="prefill"), make("quest"))
    Recipe.of(make("hip-attention", phases="decode"), make("tokenselect", phases="prefill"))
    with pytest.raises(RecipeError, match=r"hip-attention and quest both take the slot attention\.decode"):
        Recipe.of(make("hip-attention"), make("quest"))
    with pytest.raises(RecipeError, match=r"both take the slot attention\.prefill"):
        Recipe.of(make("hip-attention", phases="prefill"), make("tokenselect"))
