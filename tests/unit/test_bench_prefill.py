"""The benchmark of the prefill operators: what it counts, and that its rows hold together."""

import torch

from gossamer import ops
from gossamer.measure import bench, bench_prefill


def test_blocks_are_causal_and_their_pairs_counted():
    torch.manual_seed(0)
    mask = bench_prefill.random_blocks(2, 5, 0.5)
    assert mask.diagonal(dim1=2, dim2=3).all()
    assert not mask.triu(1).any()
    tokens = mask.repeat_interleave(8, 2).repeat_interleave(8, 3)[..., :37, :37].tril()
    assert bench_prefill.block_pairs(mask, 37, 8) == int(tokens.sum())


def test_lists_are_what_the_operator_takes():
    for length, verticals, slashes in ((500, 40, 200), (20, 1000, 6096), (100, 10, 1)):
        columns, distances = bench_prefill.random_lists(2, length, verticals, slashes)
        index = ops.vertical_slash_index(columns, distances, length, 16)
        assert 0 < index.density() <= 1


def test_rows_compare_with_flash_attention():
    for op in bench_prefill.OPERATORS:
        rows = bench.run(op, contexts=(128,), dtypes=("float32",))
        assert {row["op"] for row in rows} == {op}
        assert rows[0]["variant"] == "torch-sdpa"
        assert rows[0]["ratio_to_torch"] == rows[0]["density"] == 1
        for row in rows:
            assert row["ms"] >= row["best_ms"] > 0
            if row["density"]:
                assert abs(row["bound"] * row["density"] - 1) < 1e-9
