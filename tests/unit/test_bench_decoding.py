"""The benchmark of drafting: its rows hold together, on a small model that answers like a tokenizer's one."""

import pytest
import torch

from gossamer.errors import InputError
from gossamer.measure import bench_decoding
from gossamer.models import tiny_model


class Words:
    eos_token_id = 0

    def apply_chat_template(self, messages, **_):
        text = messages[0]["content"]
        return {"input_ids": torch.tensor([[1 + ord(c) % 200 for c in text[:20]]])}


class Loaded:
    model, tokenizer = None, Words()


def test_ways_are_compared_with_the_faster_plain_one(monkeypatch):
    loaded = Loaded()
    loaded.model = tiny_model("llama")
    monkeypatch.setattr(bench_decoding, "load", lambda name: loaded)
    rows = bench_decoding.run(("float32",), new_tokens=12, prompts=2)
    assert [row["way"] for row in rows[:4]] == ["generate", "plain", "prompt-lookup", "token-recycling"]
    assert {row["prompts"] for row in rows} == {"repeating", "questions"}
    for row in rows:
        assert row["same_text"] == "2/2"
        assert row["low"] <= row["median"] <= row["high"]
        assert row["tokens_per_forward"] >= 1
    assert max(row["speedup"] for row in rows if row["way"] in ("generate", "plain")) == 1
    with pytest.raises(InputError, match="does not draft"):
        bench_decoding.run(("float32",), ("streaming-llm",))
