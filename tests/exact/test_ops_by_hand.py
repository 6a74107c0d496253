"""The operators on numbers small enough to check by hand, on every backend and through torch.compile."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gossamer import ops
from gossamer.errors import BackendError, InputError
from gossamer.ops.labels import container_bits


@pytest.fixture(params=[b for b in ops.available_backends() if b != "triton"], autouse=True)
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_two_rows_weigh_one_to_three():
    query = torch.tensor([[[1.0, 0.0]]])
    key = torch.tensor([[[[0.0, 9.0], [math.log(3.0), -9.0]]]])
    value = torch.tensor([[[[4.0, 0.0], [0.0, 8.0]]]])
    out, lse = ops.decode_attention(query, key, value, scale=1.0, return_lse=True)
    torch.testing.assert_close(out, torch.tensor([[[1.0, 6.0]]]))
    torch.testing.assert_close(lse, torch.tensor([[math.log(4.0)]]))


def test_default_scale_is_one_over_root_d():
    query, key = torch.ones(1, 1, 4), torch.ones(1, 1, 1, 4)
    lse = ops.decode_attention(query, key, key, return_lse=True)[1]
    torch.testing.assert_close(lse, torch.tensor([[2.0]]))


def test_query_heads_read_their_kv_head():
    value = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1).expand(1, 2, 3, 4).contiguous()
    out = ops.decode_attention(torch.zeros(1, 6, 4), torch.zeros(1, 2, 3, 4), value)
    assert out[0, :, 0].tolist() == pytest.approx([1, 1, 1, 2, 2, 2])


def test_only_selected_rows_count_and_repeats_count_twice():
    value = torch.arange(5.0).view(1, 1, 5, 1)
    args = (torch.zeros(1, 1, 1), torch.zeros(1, 1, 5, 1), value)
    assert ops.decode_attention(*args, indices=ints(4, 1).view(1, 1, 2)).item() == pytest.approx(2.5)
    assert ops.decode_attention(*args, indices=ints(4, 4, 1).view(1, 1, 3)).item() == pytest.approx(3.0)
    assert ops.decode_attention(
        *args, indices=ints(4, 99).view(1, 1, 2), counts=ints(1).view(1, 1)
    ).item() == pytest.approx(4.0)


def test_empty_selection_gives_zeros_and_minus_infinity():
    query, key = torch.randn(2, 4, 8), torch.randn(2, 2, 5, 8)
    out, lse = ops.decode_attention(query, key, key, lengths=ints(0, 5), return_lse=True)
    assert (out[0] == 0).all()
    assert (lse[0] == -math.inf).all()
    assert (out[1] != 0).any()
    out, lse = ops.decode_attention(query, key, key, indices=torch.zeros(2, 4, 0, dtype=torch.int32), return_lse=True)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_parts_merge_to_the_whole():
    query, key, value = torch.randn(1, 4, 8), torch.randn(1, 2, 50, 8), torch.randn(1, 2, 50, 8)
    whole, total = ops.decode_attention(query, key, value, return_lse=True)
    spans = [(0, 20), (20, 20), (20, 50)]
    parts = [
        ops.decode_attention(query, key, value, starts=ints(a), lengths=ints(b), return_lse=True) for a, b in spans
    ]
    out, lse = ops.merge_attention(*(torch.stack(x) for x in zip(*parts, strict=True)))
    torch.testing.assert_close(out, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, total, atol=1e-5, rtol=1e-5)
    nothing = ops.merge_attention(torch.zeros(2, 1, 8), torch.full((2, 1), -math.inf))
    assert (nothing[0] == 0).all()


def test_topk_prefers_the_lower_id_and_returns_ascending_ids():
    scores = torch.tensor([[[1.0, 3.0, 2.0, 3.0, 2.0, math.nan, -math.inf]]])
    assert ops.select_topk(scores, 3)[0].tolist() == [[[1, 2, 3]]]
    indices, counts = ops.select_topk(scores, 7)
    assert indices.tolist() == [[[0, 1, 2, 3, 4, 0, 0]]]
    assert counts.tolist() == [[5]]
    indices, counts = ops.select_topk(scores, 2, starts=ints(2), lengths=ints(5))
    assert indices.tolist() == [[[2, 3]]]


def test_packed_layout_is_as_documented():
    key = torch.arange(16.0).view(1, 1, 1, 16)
    cache = ops.LabelCache.allocate(1, 1, 1, 16, bits=4)
    cache.codes.zero_()
    ops.append_labels(cache, key, torch.arange(16, dtype=torch.int32)[None], 0)
    assert cache.codes.shape == (1, 1, 1, 2, 16, 4)
    words = cache.codes[0, 0, 0, :, 0].tolist()  # byte j of word i: channel 8i + j below, 8i + 4 + j above
    assert words == [[i * 8 + j | (i * 8 + 4 + j) << 4 for j in range(4)] for i in range(2)]
    assert cache.step is not None
    assert cache.step[0, 0, 0, 0] == 1.0


@pytest.mark.parametrize("bits", range(1, 17))
def test_quantiser_error_bound(bits):
    torch.manual_seed(bits)
    key = torch.randn(2, 2, 20, 24)
    ids = torch.stack([torch.randperm(24)[:13] for _ in range(2)]).int()
    cache = ops.LabelCache.allocate(2, 2, 20, 13, bits)
    ops.append_labels(cache, key, ids, 0)
    exact = key.gather(3, ids.long()[None, :, None].expand(2, -1, 20, -1))
    if bits == 16:
        assert torch.equal(cache.dequantize(0, 20), exact)
    span = exact.amax(-1) - exact.amin(-1)
    error = (cache.dequantize(0, 20) - exact).abs().amax(-1)
    assert (error <= span / (2 * (2**bits - 1)) * 1.001 + 1e-6).all()
    assert container_bits(bits) == next((c for c in (1, 2, 4, 8) if c >= bits), 0)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 12, 16])
def test_constant_rows_are_exact_and_growth_keeps_them(bits):
    key = torch.tensor([0.1, -3.7, 0.0]).view(1, 1, 3, 1).expand(1, 1, 3, 8)
    ids = torch.arange(8, dtype=torch.int32)[None]
    cache = ops.LabelCache.allocate(1, 1, 3, 8, bits)
    ops.append_labels(cache, key, ids, 0)
    grown = cache.grow(40)
    assert grown.capacity == 48
    assert torch.equal(grown.dequantize(0, 3), key)


def test_scores_of_unquantised_full_labels_are_query_times_key():
    query, key = torch.randn(2, 6, 8), torch.randn(2, 3, 21, 8)
    ids = torch.stack([torch.randperm(8) for _ in range(3)]).int()
    cache = ops.LabelCache.allocate(2, 3, 21, 8)
    ops.append_labels(cache, key, ids, 0)
    exact = (query.view(2, 3, 2, 8) @ key.transpose(-1, -2)).flatten(1, 2)
    scores = ops.label_scores(query, ids, cache, 21, starts=ints(0, 4), lengths=ints(21, 9))
    torch.testing.assert_close(scores[0], exact[0], atol=1e-5, rtol=1e-5)
    assert (scores[1, :, :4] == -math.inf).all()
    assert (scores[1, :, 9:] == -math.inf).all()
    grouped = exact.view(2, 3, 2, 21)
    for reduce, expected in (("max", grouped.amax(2)), ("sum", grouped.sum(2))):
        torch.testing.assert_close(
            ops.label_scores(query, ids, cache, 21, reduce=reduce), expected, atol=1e-5, rtol=1e-5
        )


def test_label_bytes():
    cache = ops.LabelCache.allocate(1, 8, 1024, 32, bits=4)
    assert cache.nbytes(1024) == 8 * 1024 * (16 + 8)
    assert ops.LabelCache.allocate(2, 3, 32, 32, 16, torch.bfloat16).nbytes(32) == 2 * 3 * 32 * 64


@pytest.mark.parametrize("select", ["query_head", "kv_head"])
def test_label_attention_over_everything_is_dense(select):
    query, key, value = torch.randn(1, 6, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
    ids = ints(*range(3)).expand(2, 3).contiguous()
    cache = ops.LabelCache.allocate(1, 2, 40, 3, 2)
    ops.append_labels(cache, key, ids, 0)
    out, _, counts = ops.label_attention(query, key, value, ids, cache, 64, select=select)
    torch.testing.assert_close(out, ops.decode_attention(query, key, value), atol=1e-5, rtol=1e-5)
    assert (counts == 40).all()


def test_the_last_token_is_protected():
    key = torch.ones(1, 1, 10, 4)
    key[:, :, 9] = -5.0
    ids = ints(0, 1)[None]
    cache = ops.LabelCache.allocate(1, 1, 10, 2)
    ops.append_labels(cache, key, ids, 0)
    args = (torch.ones(1, 1, 4), key, key, ids, cache, 2)
    assert ops.label_attention(*args)[1].tolist() == [[[0, 9]]]
    assert ops.label_attention(*args, protect_last=False)[1].tolist() == [[[0, 1]]]
    reused = torch.empty(1, 1, 2, dtype=torch.int32)
    assert ops.label_attention(*args, indices_out=reused)[1] is reused


def test_compiles_as_one_graph():
    query, key, value = torch.randn(1, 4, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
    ids = ints(*range(8)).expand(2, 8).contiguous()
    cache = ops.LabelCache.allocate(1, 2, 40, 8, 4)

    def step(query, key, value):
        ops.append_labels(cache, key, ids, 0)
        scores = ops.label_scores(query, ids, cache, 40, reduce="sum")
        indices, counts = ops.select_topk(scores, 7)
        out, lse = ops.decode_attention(query, key, value, indices=indices, counts=counts, return_lse=True)
        return out + ops.label_attention(query, key, value, ids, cache, 7)[0], lse

    expected = step(query, key, value)
    torch._dynamo.reset()
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(query, key, value)
    torch.testing.assert_close(actual, expected)


def test_gradients_reach_the_reference(backend):
    if backend == "native":
        pytest.skip("kernels have no backward")
    with ops.use_backend(None):
        query = torch.randn(1, 2, 8, requires_grad=True)
        key = torch.randn(1, 1, 5, 8)
        ops.decode_attention(query, key, key).sum().backward()
    assert query.grad is not None
    assert query.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(1, 2, 5, 9)}, "same B|want query"),
        ({"query": torch.zeros(1, 3, 8)}, "multiple"),
        ({"query": torch.zeros(1, 4, 8, dtype=torch.float64)}, "share one float dtype"),
        ({"lengths": torch.zeros(2, dtype=torch.int32)}, "lengths must have shape"),
        ({"lengths": torch.zeros(1)}, "must be int32"),
        ({"indices": torch.zeros(1, 3, 2, dtype=torch.int32)}, "indices must be"),
        ({"counts": torch.zeros(1, 2, dtype=torch.int32)}, "need indices"),
    ],
)
def test_bad_shapes_raise_one_line(change, message):
    args = {"query": torch.zeros(1, 4, 8), "key": torch.zeros(1, 2, 5, 8), "value": torch.zeros(1, 2, 5, 8)} | change
    with pytest.raises(InputError, match=message) as error:
        ops.decode_attention(**args)
    assert "\n" not in str(error.value)


def test_bad_label_arguments():
    for bad in ({"bits": 0}, {"bits": 17}, {"r": 0}, {"r": 513, "bits": 4}, {"dtype": torch.int8}):
        with pytest.raises(InputError):
            ops.LabelCache.allocate(**({"batch": 1, "heads": 1, "capacity": 8, "r": 4} | bad))
    cache = ops.LabelCache.allocate(1, 2, 16, 4)
    ids = torch.zeros(2, 4, dtype=torch.int32)
    with pytest.raises(InputError, match="capacity"):
        ops.append_labels(cache, torch.zeros(1, 2, 4, 8), ids, 13)
    with pytest.raises(InputError, match="as they are"):
        ops.append_labels(cache, torch.zeros(1, 2, 4, 8, dtype=torch.bfloat16), ids, 0)
    with pytest.raises(InputError, match="capacity"):
        ops.label_scores(torch.zeros(1, 2, 8), ids, cache, 17)
    with pytest.raises(InputError, match="reduce"):
        ops.label_scores(torch.zeros(1, 2, 8), ids, cache, 4, reduce="mean")
    with pytest.raises(InputError, match="at least 1"):
        ops.select_topk(torch.zeros(1, 1, 4), 0)
    with pytest.raises(InputError, match="float32"):
        ops.select_topk(torch.zeros(1, 1, 4, dtype=torch.bfloat16), 1)


def test_absent_and_unknown_backends():
    with pytest.raises(BackendError, match="unknown backend"), ops.use_backend("cuda"):
        pass
    if "native" in ops.available_backends():
        half = torch.zeros(1, 1, 1, 8, dtype=torch.float16)
        with ops.use_backend("native"), pytest.raises(BackendError, match="float32 and bfloat16"):
            ops.decode_attention(half[:, 0], half, half)
        with pytest.raises(BackendError, match="instruction set"):
            ops.set_isa("sse9")
    with ops.use_backend(None):
        assert ops.decode_attention(
            *(torch.zeros(1, 1, *s, 8, dtype=torch.float16) for s in ((), (2,), (2,)))
        ).shape == (1, 1, 8)


def test_environment_forces_a_backend(monkeypatch):
    monkeypatch.setattr("gossamer.ops._dispatch._override", None)
    monkeypatch.setenv("GOSSAMER_BACKEND", "nonsense")
    with pytest.raises(BackendError, match="nonsense"):
        ops.select_topk(torch.zeros(1, 1, 4), 1)


def test_one_openmp_runtime():
    """The kernels use torch's threads. In a process of its own: other libraries, loaded by other tests, bring theirs."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc here")
    script = (
        "import torch; from gossamer import ops; x = torch.zeros(1, 2, 64, 16); ops.decode_attention(x[:, :, 0], x, x)\n"
        "names = ('libgomp', 'libiomp', 'libomp')\n"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if any(n in line for n in names)}, sep='\\n')"
    )
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert len(found) <= 1, found


def test_huge_page_advice():
    assert not ops.advise_huge_pages(torch.empty(10))
    assert isinstance(ops.advise_huge_pages(torch.empty(4 << 20)), bool)
