"""StreamingLLM: the first rows and the last, and nothing that depends on what they hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.attention.streaming_llm import StreamingLLM, sinks_and_recent
from gossamer.errors import InputError
from gossamer.hf import ModelShape
from gossamer.models import tiny_model


def test_pattern_by_hand() -> None:
    ids, counts = sinks_and_recent(torch.tensor([0, 3, 7]), 3, 10, sinks=2, budget=5)
    assert counts.tolist() == [[5], [5], [3]]
    assert ids[0].tolist() == [[0, 1, 7, 8, 9]]
    assert ids[1].tolist() == [[3, 4, 7, 8, 9]]  # sinks are its own first tokens
    assert ids[2, 0, :3].tolist() == [7, 8, 9]  # all it has


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_pattern_is_the_definition(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 60))
    sinks = data.draw(st.integers(0, 8))
    budget = data.draw(st.integers(sinks + 1, 70))
    starts = data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=3))
    ids, counts = sinks_and_recent(torch.tensor(starts), len(starts), length, sinks, budget)
    assert ids.dtype == counts.dtype == torch.int32
    assert int(ids.max()) < length
    for row, start in enumerate(starts):
        rows = range(start, length)
        want = (
            sorted({*rows[:sinks], *rows[max(0, len(rows) - (budget - sinks)) :]}) if len(rows) > budget else list(rows)
        )
        assert ids[row, 0, : int(counts[row])].tolist() == want


def test_middle_tokens_have_no_say() -> None:
    """In one layer: change a token outside the pattern, and the step after it gives the same bits."""
    model = tiny_model("llama", num_hidden_layers=1)
    tokens = torch.randint(1, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    results = []
    for place in (None, 20, 2, 38):
        changed = tokens.clone()
        if place is not None:
            changed[0, place] = changed[0, place] % 255 + 1
        with torch.no_grad(), StreamingLLM(tokens=8).attach(model):
            out = model(changed[:, :39])
            results.append(model(changed[:, 39:], past_key_values=out.past_key_values).logits)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])  # a sink
    assert not torch.equal(results[0], results[3])  # recent


def test_sinks_are_inside_the_budget() -> None:
    shape = ModelShape(2, 8, 2, 64)
    assert StreamingLLM(tokens=64).io_bytes(1000, shape, 2) == {"rows": 64 * 2 * 2 * 64 * 2, "scores": 0}
    assert StreamingLLM(tokens=2, sinks=4).io_bytes(1000, shape, 2)["rows"] == 5 * 2 * 2 * 64 * 2
    assert StreamingLLM(tokens=64).io_bytes(10, shape, 2)["rows"] == 10 * 2 * 2 * 64 * 2
    with pytest.raises(InputError) as caught:
        StreamingLLM(sinks=-1)
    assert "\n" not in str(caught.value)
