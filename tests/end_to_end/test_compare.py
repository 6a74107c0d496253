"""A comparison on the real model, as small as it goes: every row measured, counted and judged beside dense."""

import json

import pytest

from gossamer.attention.base import AttentionMethod
from gossamer.errors import InputError
from gossamer.measure.compare import Plan, compare, entries_of
from gossamer.measure.results import Comparison
from gossamer.measure.rows import Entry
from gossamer.models import LoadedModel
from gossamer.recipe import Recipe
from gossamer.registry import make

PLAN = Plan(context=160, decode_tokens=6, segments=1, tasks=(), examples=0, steps=2, rounds=1)


class Broken(AttentionMethod):
    """A method that cannot run."""

    def decode_policy(self, model, calibration):
        raise InputError("this cannot run")


@pytest.fixture(scope="module")
def comparison(smollm2):
    model, tokenizer = smollm2
    loaded = LoadedModel(model, tokenizer, "smollm2")
    methods = [
        make("streaming-llm", tokens=16),
        make("quest", tokens=32, dense_layers=()),
        make("double-sparsity", tokens=16, dense_layers=()),
        make("double-sparsity", tokens=16, dense_layers=(), select_per="kv_head"),
    ]
    entries = entries_of(loaded, methods)
    entries.append(Entry(Recipe.of(Broken()), "broken"))
    return compare(loaded, [], PLAN, entries=entries)


def test_rows_and_reference(comparison):
    labels = [row.label for row in comparison.methods]
    assert labels[0].startswith("transformers")
    assert labels[1] == comparison.reference == "Dense (our kernel)"
    assert len(labels) == 7
    assert len(set(labels)) == 7, "two settings of one method are told apart"
    assert comparison.bandwidth_gbs > 0.5
    assert comparison.bandwidth_gbs < 5000, "gigabytes, not bytes"
    assert {figure.slug for figure in comparison.literature} == {"double-sparsity"}


def test_bytes_read_follow_the_formula(comparison):
    rows = {row.label: row for row in comparison.methods}
    window = rows["StreamingLLM (sinks + recent)"].cost
    assert window.kv_bytes_read == 30 * 3 * 16 * 2 * 64 * 4  # layers, KV heads, rows, keys and values, head_dim, bytes
    dense = rows["Dense (our kernel)"].cost
    assert dense.kv_bytes_read == dense.dense_bytes_read > window.kv_bytes_read
    sparse = [row.cost for row in comparison.methods if row.slug == "double-sparsity"]
    assert sparse[0].kv_bytes_read == 3 * sparse[1].kv_bytes_read, "one selection per KV head reads a third of three"
    assert all(cost.score_bytes_read > 0 and cost.extra_bytes_held > 0 for cost in sparse)


def test_times_and_quality_are_measured(comparison):
    for row in comparison.methods[1:-1]:
        assert row.cost.token_ms.median > row.cost.attention_ms.median > 0
        assert row.quality.perplexity.mean > 1
        assert row.cost.token_ms.n == PLAN.steps * PLAN.rounds
    assert all(row.quality.kl.mean > 0 for row in comparison.methods[2:-1])
    assert comparison.methods[0].cost.attention_ms is None, "not measured, not made up"


def test_a_failing_method_is_reported_and_the_others_go_on(comparison):
    broken = comparison.methods[-1]
    assert broken.error == "this cannot run"
    assert broken.quality is None
    assert broken.cost is None


def test_selections_are_pictured(comparison):
    rows = {row.label: row for row in comparison.methods}
    picture = rows["StreamingLLM (sinks + recent)"].selection
    assert picture.density[5][0][-1] == 1.0
    assert picture.density[5][0][len(picture.density[5][0]) // 2] == 0.0
    assert rows["Dense (our kernel)"].selection is None


def test_json_round_trip(comparison, tmp_path):
    comparison.save(tmp_path / "c.json")
    assert Comparison.load(tmp_path / "c.json").to_dict() == json.loads((tmp_path / "c.json").read_text())


@pytest.mark.parametrize("change", [{"context": 1}, {"segments": 0}, {"examples": -1}])
def test_bad_plans_are_one_line(change):
    with pytest.raises(InputError) as error:
        Plan(**change)
    assert "\n" not in str(error.value)


def test_too_long_a_context_says_how_much_text_there_is(smollm2):
    model, tokenizer = smollm2
    loaded = LoadedModel(model, tokenizer, "smollm2")
    with pytest.raises(InputError, match="tokens"):
        compare(loaded, [make("quest")], Plan(context=10_000_000))
