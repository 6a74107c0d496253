"""attention_weights: native kernels, every instruction set that runs here, against the reference and by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer import ops
from gossamer.errors import InputError

native = pytest.mark.skipif("native" not in ops.available_backends(), reason="native kernels are not built")


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    ops.set_isa()


def case(
    batch: int,
    kv_heads: int,
    group: int,
    rows: int,
    dim: int,
    k: int,
    per_head: bool,
    dtype: torch.dtype,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """A cache that is a view of a larger buffer of NaN, and lists whose unused slots hold nonsense."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, kv_heads * group, dim, generator=generator).to(dtype)
    storage = torch.full((2, batch, kv_heads, rows + 5, dim), math.nan, dtype=dtype)
    storage[:, :, :, :rows] = torch.randn(2, batch, kv_heads, rows, dim, generator=generator).to(dtype)
    key, value = storage[:, :, :, :rows]
    lines = kv_heads * group if per_head else kv_heads
    ids = (
        torch.stack([torch.randperm(rows, generator=generator)[:k] for _ in range(batch * lines)])
        .int()
        .view(batch, lines, k)
    )
    counts = torch.randint(0, k + 1, (batch, lines), generator=generator).int()
    ids[torch.arange(k) >= counts[..., None]] = 1 << 30
    return query, key, value, ids, counts


@native
@pytest.mark.parametrize("isa", ops.available_isas() or ("none",))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("group", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("threads", "k", "dim"), [(1, 1, 64), (1, 37, 33), (2, 300, 128), (2, 75, 16)])
def test_native_is_the_reference(
    isa: str, dtype: torch.dtype, group: int, per_head: bool, threads: int, k: int, dim: int
) -> None:
    ops.set_isa(isa)
    torch.set_num_threads(threads)
    arguments = case(2, 2, group, 400, dim, k, per_head, dtype)
    with ops.use_backend("reference"):
        want = ops.attention_weights(*arguments, scale=0.3)
    got = ops.attention_weights(*arguments, scale=0.3)
    prepared = ops.PreparedAttention(*arguments[1:3])
    again = prepared.weighted(arguments[0], 400, *arguments[3:], scale=0.3)
    close = {"atol": 2e-5, "rtol": 2e-5} if dtype is torch.float32 else {"atol": 1.6e-2, "rtol": 1.6e-2}
    for out in (got, again[:2]):
        torch.testing.assert_close(out[0].float(), want[0].float(), **close)
        torch.testing.assert_close(out[1], want[1], atol=close["atol"] / 10, rtol=close["rtol"])
    assert again[2] == int(arguments[4].sum())


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.booleans(), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_weights_are_shares(batch: int, group: int, k: int, per_head: bool, seed: int) -> None:
    query, key, value, ids, counts = case(batch, 2, group, 50, 16, k, per_head, torch.float32, seed)
    out, weights = ops.attention_weights(query, key, value, ids, counts)
    counts = counts.repeat_interleave(2 * group // ids.shape[1], 1)
    ids = ids.repeat_interleave(2 * group // ids.shape[1], 1)
    torch.testing.assert_close(weights.sum(-1), (counts > 0).float())
    assert (weights[torch.arange(k) >= counts[..., None]] == 0).all()
    for b in range(batch):
        for h in range(2 * group):
            used = ids[b, h, : int(counts[b, h])].long()
            want = weights[b, h, : len(used)] @ value[b, h // group, used]
            torch.testing.assert_close(out[b, h], want, atol=1e-5, rtol=1e-5)


def test_by_hand() -> None:
    key = torch.tensor([[[[0.0], [math.log(3.0)], [9.0]]]])
    out, weights = ops.attention_weights(
        torch.ones(1, 1, 1), key, torch.tensor([[[[1.0], [5.0], [9.0]]]]), torch.tensor([[[1, 0]]]), scale=1.0
    )
    torch.testing.assert_close(weights, torch.tensor([[[0.75, 0.25]]]))
    torch.testing.assert_close(out, torch.tensor([[[4.0]]]))


def test_compiles() -> None:
    arguments = case(1, 2, 2, 40, 16, 8, False, torch.float32)
    want = ops.attention_weights(*arguments)
    got = torch.compile(ops.attention_weights, backend="eager", fullgraph=True)(*arguments)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"indices": torch.zeros(1, 3, 2, dtype=torch.int32)}, "indices"),
        ({"indices": torch.zeros(1, 2, 2)}, "indices"),
        ({"indices": torch.full((1, 2, 2), 9, dtype=torch.int32)}, "indices"),
        ({"indices": torch.full((1, 2, 2), -1, dtype=torch.int32)}, "indices"),
        ({"counts": torch.full((1, 2), 3, dtype=torch.int32)}, "counts"),
        ({"counts": torch.ones(1, 1, dtype=torch.int32)}, "counts"),
        ({"query": torch.zeros(1, 4, 7)}, "query"),
    ],
)
def test_bad_arguments_are_one_line(change: dict[str, Tensor], named: str) -> None:
    arguments: dict[str, Any] = {
        "query": torch.zeros(1, 4, 8),
        "key": torch.zeros(1, 2, 9, 8),
        "value": torch.zeros(1, 2, 9, 8),
        "indices": torch.zeros(1, 2, 2, dtype=torch.int32),
        **change,
    }
    with pytest.raises(InputError) as error:
        ops.attention_weights(**arguments)
    assert "\n" not in str(error.value)
    assert named in str(error.value)
