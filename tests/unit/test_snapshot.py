"""A saved cache continues as the one that was not."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gossamer.errors import InputError, OutputError
from gossamer.hf import GossamerCache, QuantizedKVLayer, load_cache, save_cache
from gossamer.models import tiny_model
from gossamer.recipe import Recipe
from gossamer.registry import make
from gossamer.testing import _learned, _model

TOKENWISE = {"key_axis": "token", "value_axis": "token", "group": 8, "residual": 4}
STACKS = {
    "dense": [("dense", {})],
    "rtn-kv": [("rtn-kv", {"group": 8, "residual": 4})],
    "rtn-kv 2 bits": [("rtn-kv", {"bits": 2, "group": 8, "residual": 0, "scales": "float32"})],
    "a2sf": [("a2sf", {"budget": 16})],
    "a2sf prefill": [("a2sf", {"budget": 16, "mode": "prefill"})],
    "h2o": [("h2o", {"budget": 16, "prompt": "block"})],
    "tova": [("tova", {"budget": 16})],
    "snapkv": [("snapkv", {"budget": 16, "window": 4})],
    "sliding-window": [("sliding-window", {"window": 12, "sinks": 2})],
    "double-sparsity": [("double-sparsity", {"tokens": 16, "channels": 8, "dense_layers": ()})],
    "quest + h2o + rtn-kv": [
        ("quest", {"tokens": 12, "page_size": 4, "dense_layers": ()}),
        ("h2o", {"budget": 24, "prompt": "block"}),
        ("rtn-kv", {"bits": 8, **TOKENWISE}),
    ],
}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def recipe(name):
    return Recipe.of(*[(make(slug, **settings), _learned(slug, "{}")) for slug, settings in STACKS[name]])


def ids(length=64, batch=2, seed=3):
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def steps(model, cache, tokens, mask, first, last):
    return torch.cat(
        [
            model(tokens[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits
            for t in range(first, last)
        ],
        1,
    )


@pytest.mark.parametrize("name", STACKS)
def test_continuation_is_the_same(name, tmp_path):
    model, tokens = _model(), ids()
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    with recipe(name).attach(model):
        cache = GossamerCache()
        model(tokens[:, :40], attention_mask=mask[:, :40], past_key_values=cache)
        steps(model, cache, tokens, mask, 40, 48)
        path = save_cache(cache, tmp_path / "deep" / "cache.safetensors", model)
        expected = steps(model, cache, tokens, mask, 48, 64)
    assert [p.name for p in path.parent.iterdir()] == ["cache.safetensors"]
    loaded = load_cache(path, model)
    with recipe(name).attach(model):  # a new run: nothing is left of the first
        got = steps(model, loaded, tokens, mask, 48, 64)
    assert torch.equal(got, expected)
    for ours, theirs in zip(loaded.layers, cache.layers, strict=True):
        assert type(ours) is type(theirs)
        assert (ours.length, ours.dropped, ours.nbytes) == (theirs.length, theirs.dropped, theirs.nbytes)
        assert torch.equal(ours.positions, theirs.positions)


def test_it_can_be_saved_again_before_anyone_took_its_states(tmp_path):
    model, tokens = _model(), ids()
    mask = torch.ones_like(tokens)
    with recipe("h2o").attach(model):
        cache = GossamerCache()
        model(tokens[:, :40], past_key_values=cache)
        first = save_cache(cache, tmp_path / "1", model)
        expected = steps(model, cache, tokens, mask, 40, 50)
    second = save_cache(load_cache(first, model), tmp_path / "2", model)
    with recipe("h2o").attach(model):
        assert torch.equal(steps(model, load_cache(second, model), tokens, mask, 40, 50), expected)


def test_scores_follow_the_beams():
    """Reordering sequences is the same as having read them in that order."""
    model, tokens, order = _model(), ids(batch=3), torch.tensor([2, 0, 0])
    mask = torch.ones_like(tokens)
    outs = []
    for reorder_first in (True, False):
        with recipe("h2o").attach(model):
            cache = GossamerCache()
            model((tokens[order] if reorder_first else tokens)[:, :40], past_key_values=cache)
            if not reorder_first:
                cache.reorder_cache(order)
            outs.append(steps(model, cache, tokens[order], mask, 40, 60))
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=1e-5)


def test_quantised_layers_stay_what_they_are(tmp_path):
    model, tokens = _model(), ids()
    with recipe("rtn-kv").attach(model):
        cache = GossamerCache()
        model(tokens, past_key_values=cache)
    path = save_cache(cache, tmp_path / "c", model)
    loaded = load_cache(path, model)
    assert isinstance(loaded.layers[0], QuantizedKVLayer)
    assert loaded.layers[0].format == cache.layers[0].format
    assert path.stat().st_size < 0.5 * 64 * 2 * 3 * 2 * 2 * 16 * 4  # of the rows in full
    assert torch.equal(loaded.layers[2].keys, cache.layers[2].keys)


def test_bad_files_are_one_line(tmp_path):
    model, tokens = _model(), ids()
    with recipe("rtn-kv").attach(model):
        cache = GossamerCache()
        model(tokens, past_key_values=cache)
    path = save_cache(cache, tmp_path / "c", model)
    raw = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        header, tensors = json.loads(file.metadata()["gossamer"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118

    def write(name, change_header=lambda h: None, drop=None, cut=None):
        changed = json.loads(json.dumps(header))
        change_header(changed)
        kept = {k: (v[:, :, :-1] if k == cut else v).clone().contiguous() for k, v in tensors.items() if k != drop}
        save_file(kept, tmp_path / name, {"gossamer": json.dumps(changed)})
        return tmp_path / name

    (tmp_path / "cut").write_bytes(raw[: len(raw) // 2])
    (tmp_path / "text").write_text("no cache")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    bad = [
        (tmp_path / "nothing", "no saved cache"),
        (tmp_path / "cut", "damaged"),
        (tmp_path / "text", "damaged"),
        (tmp_path / "other", "damaged"),
        (write("version", lambda h: h.update(format=9)), "format 9"),
        (write("model", lambda h: h.update(fingerprint="0" * 16)), "another model"),
        (write("missing", drop="1.key.codes"), "damaged"),
        (write("short", cut="1.key"), "damaged"),
        (write("layers", lambda h: h["layers"].pop()), "layers"),
        (write("state", lambda h: h["layers"][0]["states"].update(elsewhere=1)), "damaged"),
    ]
    for file, words in bad:
        with pytest.raises(InputError, match=words) as error:
            load_cache(file, model)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="another model"):
        load_cache(path, tiny_model("qwen2", seed=1))
    with pytest.raises(InputError, match="has filled"):
        save_cache(GossamerCache(), tmp_path / "e", model)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        save_cache(cache, tmp_path / "file" / "c", model)


@pytest.mark.parametrize("name", ["rtn-kv", "h2o", "quest + h2o + rtn-kv"])
def test_beam_search_runs(name):
    model, tokens = _model(), ids(24)
    with recipe(name).attach(model):
        out = model.generate(tokens, max_new_tokens=12, num_beams=3, do_sample=False)
        alone = model.generate(tokens[:1], max_new_tokens=12, num_beams=3, do_sample=False)
    assert out.shape == (2, 36)
    assert torch.equal(out[:1], alone)
