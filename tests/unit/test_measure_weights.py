"""Weight methods side by side: what is counted, and who is ranked above whom."""

from __future__ import annotations

import json
import math

import pytest
import torch

from gossamer.errors import InputError, OutputError
from gossamer.measure import weights
from gossamer.measure.results import Estimate
from gossamer.models import LoadedModel
from gossamer.models import tiny_model as make
from gossamer.ops import available_backends
from gossamer.registry import make as method

PLAN = weights.Plan(segments=2, length=48, context=16, steps=2, rounds=1, blocks=2, block=32)


@pytest.fixture
def tiny(byte_tokenizer):
    return LoadedModel(make("llama", vocab_size=257), byte_tokenizer, "tiny")


def test_rows_say_what_is_left_and_dense_is_itself(tiny):
    rows = weights.compare_weights(tiny, [method("magnitude", sparsity=0.25), method("wanda", sparsity=0.5)], PLAN)
    dense, quarter, half = rows
    assert dense.kl.mean == pytest.approx(0, abs=1e-6)
    assert dense.agreement == 1
    assert dense.share == 1
    assert quarter.error is None
    assert half.error is None
    prunable = sum(m.weight.numel() for m in weights.matrices(tiny.model))
    assert quarter.nonzero == dense.nonzero - round(0.25 * prunable)
    assert dense.parameters == sum(p.numel() for p in tiny.model.parameters())
    assert half.share < quarter.share < 1
    for row in rows:
        assert row.decode > 0
        assert row.prefill > 0
        assert math.isfinite(row.perplexity)
        assert set(row.shown()) == {"method", *weights._COLUMNS, "remark"}


def test_a_method_that_fails_says_why_and_the_others_go_on(tiny):
    rows = weights.compare_weights(tiny, [method("magnitude", structure="5x1"), method("magnitude")], PLAN)
    assert "no multiple" in rows[1].error
    assert rows[2].error is None
    assert rows[1].shown()["remark"] == rows[1].error
    with pytest.raises(InputError, match="does not change weights"):
        weights.compare_weights(tiny, [method("streaming-llm")], PLAN)


def row(slug: str, share: float, decode: float, losses: list[float]) -> weights.WeightRow:
    tensor = torch.tensor(losses)
    return weights.WeightRow(slug, {}, share=share, decode=decode, losses=tensor, kl=Estimate.of(losses))


def test_ranks_need_differences_that_stand_out_of_the_noise():
    good, same, bad = (
        row(s, 0.5, 1.0, [x + 0.01 * i for i in range(8)]) for s, x in (("a", 0.1), ("b", 0.1), ("c", 1.0))
    )
    noisy = row("d", 0.5, 1.0, [0.0] * 7 + [6.0])
    other = row("e", 0.9, 1.0, [0.0] * 8)
    places = {r.slug: rank for rank, r in weights.ranked([good, same, bad, noisy, other], 0.5)}
    assert places["a"] == places["b"] == 1
    assert places["c"] == 3
    assert "e" not in places
    assert places["d"] == 1  # worse on average, but not by two standard errors


def test_at_a_latency_each_method_shows_its_best_row_that_is_fast_enough():
    rows = [
        row("a", 0.9, 0.95, [0.1] * 4),
        row("a", 0.5, 0.6, [0.4] * 4),
        row("a", 0.3, 0.5, [0.9] * 4),
        row("b", 0.5, 1.1, [0.0] * 4),
    ]
    ((rank, chosen),) = weights.at_latency(rows, 0.7)
    assert rank == 1
    assert chosen.share == 0.5


def test_methods_of_a_study_are_those_without_training_at_every_share():
    model = make("llama")
    chosen = weights.study_methods(model, (0.5, 0.9))
    assert {"magnitude", "random-weights", "wanda", "sparsegpt"} <= {m.slug for m in chosen}
    assert all("training" not in m.needs for m in chosen)
    with pytest.raises(InputError, match="does not change weights"):
        weights.study_methods(model, (0.5,), ["streaming-llm"])


def test_rows_are_saved_whole_or_not_at_all(tiny, tmp_path):
    rows = weights.compare_weights(tiny, [method("magnitude")], PLAN)
    weights.save_rows(rows, tmp_path / "rows.json", {"budget": 0.5})
    saved = json.loads((tmp_path / "rows.json").read_text())
    assert saved["rows"][1]["slug"] == "magnitude"
    assert "losses" not in saved["rows"][1]
    with pytest.raises(OutputError):
        weights.save_rows(rows, tmp_path / "rows.json" / "rows.json", {})


@pytest.mark.parametrize("bad", [{"segments": 0}, {"length": 1}, {"rounds": 0}])
def test_plans_that_measure_nothing_are_refused(bad):
    with pytest.raises(InputError):
        weights.Plan(**bad)


@pytest.mark.skipif("native" not in available_backends(), reason="native kernels are not built")
def test_a_model_with_many_zeros_is_timed_sparse_too_and_comes_back_whole(tiny):
    model = method("magnitude", sparsity=0.9).apply(make("llama", vocab_size=257, hidden_size=128)).model
    before = {name: type(module) for name, module in model.named_modules()}
    runs = weights._ways(model, torch.arange(16), weights.WAYS)
    assert [run.way for run in runs] == ["torch", "native", "sparse"]
    assert before == {name: type(module) for name, module in model.named_modules()}
    assert not any(run.decode or run.prefill for run in runs)
    assert [run.way for run in weights._ways(tiny.model, torch.arange(16), weights.WAYS)] == ["torch", "native"]


@pytest.mark.parametrize("slug", ["magnitude", "wanda", "slicegpt", "cfsp", "wanda-sp", "flap", "magnitude-sp"])
def test_methods_at_one_share_keep_that_share(slug, byte_tokenizer):
    model = make("llama", vocab_size=257, hidden_size=128, intermediate_size=512)
    settings = {"round_to": 1} if slug in ("slicegpt", "cfsp") else {}
    chosen = type(method(slug)).with_kept(0.7, model)
    chosen = chosen.model_copy(update=settings)
    rows = weights.compare_weights(LoadedModel(model, byte_tokenizer, "tiny"), [chosen], PLAN)
    assert rows[1].error is None
    assert rows[1].share == pytest.approx(0.7, abs=0.02)


def test_a_share_that_cutting_neurons_cannot_reach_is_left_out():
    chosen = weights.study_methods(make("llama"), (0.9, 0.01), ["cfsp", "magnitude"])
    assert [m.slug for m in chosen] == ["cfsp", "magnitude", "magnitude"]
