"""The benchmark of operators that skip inputs: its ways do the work that they are compared for."""

import pytest
import torch

from gossamer.measure import bench, bench_activations


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench_activations, "SHAPES", {"small": (40, 48)})
    monkeypatch.setattr(bench_activations, "MLPS", {"small": (40, 48)})
    for name in ("CASES", "MLP_CASES"):
        monkeypatch.setattr(bench_activations, name, ((1, (0.1, 1.0)), (3, (0.5,))))


@pytest.mark.parametrize("op", bench_activations.OPERATORS)
def test_rows_compare_with_both_dense_layers(op):
    rows = bench.run(op, dtypes=("bfloat16",), repeats=1)
    assert {(row["op"], row["weight"], row["outputs"]) for row in rows} == {(op, "small", 48)}
    assert {row["rows"] for row in rows} == {1, 3}
    assert [row["variant"] for row in rows[:2]] == ["torch-linear", "dense"]
    for row in rows:
        assert row["ratio_to_torch"] > 0
        assert row["ratio_to_native_dense"] > 0
    tenth = next(row for row in rows if row["variant"].startswith("10%"))
    # Of an MLP all gates are read, and of its other two matrices the kept neurons, here 5 of 48.
    share = (48 + 2 * 5) / (3 * 48) if op == "sparse_mlp" else 0.1
    assert tenth["bytes"] == pytest.approx(share * rows[0]["bytes"])


def test_every_call_finds_its_share_changed():
    torch.manual_seed(0)
    _, ways, tiny = next(bench_activations.cases("delta_linear", torch.float32))
    for name, call, _ in (*ways[2:], *tiny[2:]):
        wanted = 40 if name.startswith("100%") else 4
        assert [int(call()) for _ in range(3)] == [wanted] * 3
