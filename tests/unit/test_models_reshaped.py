"""Models with widths of their own: saved, loaded with and without Gossamer, generating, and under the plug points."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gossamer.errors import InputError, ModelError
from gossamer.hf import blocks
from gossamer.models import Plan, load, tiny_model, train
from gossamer.models.reshaped import CLASSES, PLACES, PlainNorm, describe
from gossamer.registry import make

TOKENS = torch.randint(1, 256, (2, 40), generator=torch.Generator().manual_seed(0))
#: What is done to a family, in this order.
CASES = {
    "llama": ("slicegpt", {"sparsity_last": 0.5}),
    "qwen3": ("slicegpt", {}),
    "gemma": ("slicegpt", {}),
    "gpt2": ("slicegpt", {"slice_head": True}),
    "gemma3": ("cfsp", {"round_to": 8}),
    "mistral": ("flap", {}),
    "opt": ("slicegpt", {}),
    "phi": ("slicegpt", {}),
    "phi3": ("cfsp", {"round_to": 8}),
}


def changed(family: str):
    """A small model of a family after its case: a copy, so that copying is tried too."""
    return copy.deepcopy(_changed(family))


@functools.cache
def _changed(family: str):
    if family in ("opt", "phi", "phi3"):
        import transformers

        own = {"ffn_dim": 128, "word_embed_proj_dim": 64} if family == "opt" else {"intermediate_size": 128}
        config = getattr(transformers, {"opt": "OPTConfig", "phi": "PhiConfig", "phi3": "Phi3Config"}[family])(
            vocab_size=256,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
            **{"init_std" if family == "opt" else "initializer_range": 0.2},
            **own,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
    else:
        model = tiny_model(family)
    slug, settings = CASES[family]
    return make(slug, sparsity=0.25, **settings).apply(model, TOKENS).model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory, byte_tokenizer) -> dict[str, Path]:
    """Every case in a folder, with what it said beside it."""
    folders = {}
    for family in CASES:
        folder = tmp_path_factory.mktemp("saved") / family
        model = changed(family)
        model.save_pretrained(folder)
        byte_tokenizer.save_pretrained(folder)
        torch.save(logits(model), folder / "logits.out")
        folders[family] = folder
    return folders


@pytest.mark.parametrize("family", sorted(CASES))
def test_a_saved_model_loads_without_running_its_code(family, saved, tmp_path):
    folder = saved[family]
    wanted = torch.load(folder / "logits.out", weights_only=True)
    (folder / "reshaped.py").write_text("raise SystemExit('this must not run')")
    try:
        model = load(folder).model
    finally:
        (folder / "reshaped.py").write_text(Path(sys.modules["gossamer.models.reshaped"].__file__).read_text())
    assert type(model) is CLASSES[model.config.model_type]
    assert torch.equal(logits(model), wanted)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "reshaped.py").is_file()
    assert describe(model) == model.config.reshaped


ALONE = """
import json, sys, torch

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "gossamer":
            raise ImportError("gossamer is not here")

sys.meta_path.insert(0, Block())
import transformers

tokens = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    wanted = torch.load(folder + "/logits.out", weights_only=True)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, wanted), folder
        out = model.generate(tokens[:, :20], max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 24), folder
    model.save_pretrained(folder + "/again")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, wanted), folder
assert not any(name.startswith("gossamer") for name in sys.modules)
print("all loaded")
"""


def test_a_saved_model_loads_where_gossamer_is_not(saved, tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps(TOKENS.tolist()), *map(str, saved.values())],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "all loaded" in done.stdout


@pytest.mark.parametrize("family", sorted(CASES))
def test_the_cache_makes_the_tokens_that_whole_reads_make(family):
    model = changed(family)
    prompt = TOKENS[:, :20]
    out = model.generate(prompt, max_new_tokens=6, do_sample=False)
    tokens = prompt
    with torch.no_grad():
        for _ in range(6):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, tokens)


def test_left_padding_changes_nothing():
    model = changed("llama")
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.int64), TOKENS[:1, :20]], 1)
    mask = (torch.arange(27) >= 7).long()[None]
    out = model.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(out[:, 7:], model.generate(TOKENS[:1, :20], max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("family", ["llama", "gemma", "phi"])
@pytest.mark.parametrize("slug", ["streaming-llm", "double-sparsity"])
def test_attention_methods_run_on_it_and_leave_it_as_it_was(family, slug):
    model = changed(family)
    before = logits(model)
    wanted = model.generate(TOKENS[:, :20], max_new_tokens=5, do_sample=False)
    for tokens in (10_000, 6):
        method = make(slug, tokens=tokens)
        calibration = method.calibrate(model, TOKENS) if "calibration" in method.needs else None
        with method.attach(model, calibration) as handle:
            out = model.generate(TOKENS[:, :20], max_new_tokens=5, do_sample=False)
            assert handle.report()
        if tokens == 10_000:
            assert torch.equal(out, wanted)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "phi"])
def test_mlp_methods_run_on_it_and_leave_it_as_it_was(family):
    model = changed(family)
    before = logits(model)
    method = make("top-k-neurons" if family in ("opt", "phi") else "cats", sparsity=0.5)
    calibration = method.calibrate(model, TOKENS) if "calibration" in method.needs else None
    with method.attach(model, calibration):
        assert not torch.equal(logits(model), before)
        assert model.generate(TOKENS[:, :20], max_new_tokens=3, do_sample=False).shape == (2, 23)
    assert torch.equal(logits(model), before)


def test_neurons_are_cut_before_or_after_slicing():
    model = tiny_model("llama")
    make("cfsp", sparsity=0.25, round_to=8).apply(model, TOKENS)
    widths = [layer.mlp.up_proj.weight.shape[0] for layer in model.model.layers]
    make("slicegpt", sparsity=0.25).apply(model, TOKENS)
    assert [tuple(layer.mlp.up_proj.weight.shape) for layer in model.model.layers] == [(w, 48) for w in widths]
    assert set(model.config.reshaped) == {"linears", "embeddings", "norms", "shortcuts"}
    make("wanda-sp", sparsity=0.25, spread="uniform").apply(model, TOKENS)
    assert [layer.mlp.up_proj.weight.shape[0] for layer in model.model.layers] == [int(w * 0.75) for w in widths]
    with pytest.raises(ModelError, match="cut, then slice"):
        make("cfsp").apply(model, TOKENS)


def test_training_reaches_every_part():
    model = changed("llama").train()
    model.activation_checkpointing_enable()
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("linears", {"model.nowhere": [1, 2, False]}),
        ("linears", {"model.layers.0.mlp.up_proj": [3, 4, False]}),
        ("norms", {"model.layers.0.mlp": 64}),
        ("shortcuts", {"model.layers.0": [["wide", 2]]}),
    ],
)
def test_a_damaged_entry_is_one_line(part, value, saved, tmp_path):
    folder = tmp_path / "damaged"
    model = changed("llama")
    model.save_pretrained(folder)
    for file in saved["llama"].glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["reshaped"][part].update(value)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot load") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_norms_by_hand():
    norm = PlainNorm(4, 0.0)
    assert norm(torch.tensor([2.0, 0.0])).tolist() == [2.0, 0.0]
    half = norm(torch.tensor([[300.0, 400.0]]).half())  # the squares overflow in half precision
    assert half.dtype is torch.float16
    assert half.tolist() == [[pytest.approx(1.2, rel=1e-3), pytest.approx(1.6, rel=1e-3)]]
    assert sorted(PLACES) == sorted(set(PLACES) & set(CLASSES))


def test_a_stage_hands_on_the_outputs_it_was_given():
    model, given = tiny_model("llama"), None
    for stage in blocks(model, TOKENS):
        if stage.index == 0:
            given = [2 * x for x in stage.inputs]
            stage.outputs = given
            part = stage.run(lambda x, **kwargs: x + 1)
            assert torch.equal(part[0], stage.inputs[0] + 1)
    assert all(a is b for a, b in zip(given, stage.inputs, strict=True))


def test_a_linear_decay_and_an_early_end():
    plan = Plan(steps=101, lr=1.0, warmup=0, floor=0.0, decay="linear")
    assert [round(plan.rate(s), 3) for s in (0, 25, 50, 100)] == [1.0, 0.75, 0.5, 0.0]
    model = tiny_model("llama")
    training = train(model, iter([TOKENS] * 10), Plan(steps=10), stop=lambda step: step == 3)
    assert training.curve[-1]["step"] == 3
    with pytest.raises(InputError, match="ended after 2"):
        train(model, iter([TOKENS] * 2), Plan(steps=10))
