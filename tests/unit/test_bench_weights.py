"""The benchmark of sparse weights: its ways do the work that they are compared for."""

import pytest

from gossamer.measure import bench, bench_weights


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench_weights, "PROMPTS", {"small": (64, 48)})
    monkeypatch.setattr(bench_weights, "DECODES", {"few": (64, 48)})
    monkeypatch.setattr(bench_weights, "ROWS", (1, 8))


def test_rows_compare_with_dense_layers():
    rows = bench.run("sparse_linear", dtypes=("float32",), repeats=1)
    assert {(row["weight"], row["rows"]) for row in rows} == {("small", bench_weights.TOKENS), ("few", 1), ("few", 8)}
    names = [row["variant"] for row in rows if row["weight"] == "small"]
    assert names[:3] == ["torch-linear", "torch dynamic int8", "torch int_mm"]
    assert {"4x1 90%", "4x1 90% int8", "stream 90%", "torch csr 90%"} <= set(names)
    for row in rows:
        assert row["ratio_to_torch"] > 0
    assert all(row["ratio_to_native_dense"] > 0 for row in rows if row["weight"] == "few")
    dense, sparse = (next(r for r in rows if r["variant"] == name) for name in ("torch-linear", "4x1 90%"))
    assert sparse["bytes"] < 0.5 * dense["bytes"]
