"""The benchmark of drafting: its rows hold together, on a small model that answers like a tokenizer's one."""

import pytest
import torch

from gossamer.errors import InputError
from gossamer.measure import bench_decoding
from gossamer.models import tiny_model
from gossamer.registry import make


class Words:
    eos_token_id = 0

    def apply_chat_template(self, messages, **_):
        text = messages[0]["content"]
        return {"input_ids": torch.tensor([[1 + ord(c) % 200 for c in text[:20]]])}


class Loaded:
    model, tokenizer = None, Words()


def test_ways_are_compared_with_the_faster_plain_one(monkeypatch, tmp_path):
    loaded = Loaded()
    loaded.model = tiny_model("llama")
    monkeypatch.setattr(bench_decoding, "load", lambda name: loaded)
    ppd = make("ppd", m=2, steps=2, length=16)
    path = ppd.calibrate(loaded.model, torch.arange(64)[None]).save(tmp_path / "ppd.safetensors")
    monkeypatch.setattr(bench_decoding, "make", lambda slug: ppd if slug == "ppd" else make(slug))
    rows = bench_decoding.run(("float32",), new_tokens=12, prompts=2, calibrations={"ppd": path})
    ways = ["generate", "plain", "prompt-lookup", "token-recycling", "its table alone", "early-exit", "ppd"]
    assert [row["way"] for row in rows[:7]] == ways
    assert {row["prompts"] for row in rows} == {"repeating", "questions"}
    for row in rows:
        assert row["same_text"] == "2/2"
        assert row["low"] <= row["median"] <= row["high"]
        assert row["tokens_per_forward"] >= 1
    assert max(row["speedup"] for row in rows if row["way"] in ("generate", "plain")) == 1
    with pytest.raises(InputError, match="does not draft"):
        bench_decoding.run(("float32",), ("streaming-llm",))
    with pytest.raises(InputError, match="gossamer calibrate ppd"):
        bench_decoding.run(("float32",), ("ppd",))
