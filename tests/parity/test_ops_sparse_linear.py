"""sparse_linear: the native kernels, every instruction set that runs here, against the reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer import ops
from gossamer.errors import InputError
from gossamer.ops import SparseWeight, block_sparsity, pack, sparse_linear, use_backend
from gossamer.ops.sparse_linear import quantize_rows_to_uint8

NATIVE = pytest.mark.skipif("native" not in ops.available_backends(), reason="native kernels are not built")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
FORMATS = ("4x1", "1x4", "csr", "bitmask", "stream", "2:4", "1:8", "16:32")
KINDS = pytest.mark.parametrize("kind", [*FORMATS, "4x1 int8", "bitmask int8"])


@pytest.fixture(params=[1, 2])
def threads(request):
    torch.set_num_threads(request.param)


def dense_weight(format, outputs, inputs, sparsity, dtype=torch.float32):
    """Zeros as the format wants them."""
    weight = torch.randn(outputs, inputs) / math.sqrt(max(1, inputs))
    if ":" in format:
        n, m = map(int, format.split(":"))
        kept = torch.rand(outputs, inputs // m, m).argsort(-1).argsort(-1).view(outputs, inputs) < n
        kept &= torch.rand(outputs, inputs) < 0.9  # some groups have zeros of their own
    elif format == "4x1":
        kept = (torch.rand(-(-outputs // 4), inputs) >= sparsity).repeat_interleave(4, 0)[:outputs]
    elif format == "1x4":
        kept = (torch.rand(outputs, -(-inputs // 4)) >= sparsity).repeat_interleave(4, 1)[:, :inputs]
    else:
        kept = torch.rand(outputs, inputs) >= sparsity
    return (weight * kept).to(dtype)


def both(x, packed, *args):
    results = []
    for backend in ("reference", "native"):
        with use_backend(backend):
            results.append(sparse_linear(x, packed, *args))
    return results


def assert_same(x, packed, *args):
    want, got = both(x, packed, *args)
    assert got.dtype is want.dtype
    assert got.is_contiguous()
    tolerance = 2e-5 if x.dtype is torch.float32 else 2e-2
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance, equal_nan=True)


def made(kind, *shape, sparsity=0.6, dtype=torch.float32, **settings):
    format, _, int8 = kind.partition(" ")
    return pack(dense_weight(format, *shape, sparsity, dtype), format, int8=bool(int8), **settings)


@NATIVE
@DTYPES
@KINDS
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 32), (37, 96), (130, 160), (64, 320)])
def test_rows_and_odd_sizes(isa, kind, dtype, outputs, inputs):
    torch.manual_seed(outputs)
    packed = made(kind, outputs, inputs, dtype=dtype)
    for rows in (1, 2, 3, 5, 8, 17, 33, 64, 70):
        assert_same(torch.randn(rows, inputs).to(dtype), packed)


@NATIVE
@DTYPES
@pytest.mark.parametrize("kind", ["4x1", "1x4", "csr", "bitmask", "stream", "4x1 int8", "bitmask int8"])
@pytest.mark.parametrize("inputs", [1, 7, 33, 65, 127])
def test_inputs_that_fill_nothing(isa, kind, dtype, inputs):
    torch.manual_seed(inputs)
    packed = made(kind, 19, inputs, dtype=dtype)
    for rows in (1, 4, 7, 40):
        assert_same(torch.randn(rows, inputs).to(dtype), packed)


@NATIVE
@DTYPES
@KINDS
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu"])
def test_what_follows_the_product(isa, threads, kind, dtype, activation):
    torch.manual_seed(3)
    packed = made(kind, 100, 128, dtype=dtype)
    for rows in (2, 20):
        x, added = torch.randn(2, rows, 128).to(dtype), torch.randn(2, rows, 100).to(dtype)
        bias = torch.randn(100).to(dtype)
        assert_same(x, packed, bias, activation, added)
        assert_same(x, packed, bias, activation)
        assert_same(x, packed, None, activation, added)


@NATIVE
@KINDS
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.97, 1.0])
def test_nothing_and_everything(isa, kind, sparsity):
    torch.manual_seed(4)
    packed = made(kind, 72, 192, sparsity=sparsity)
    for rows in (1, 2, 6, 30):
        assert_same(torch.randn(rows, 192), packed, torch.randn(72))


@NATIVE
@pytest.mark.parametrize("kind", ["4x1 int8", "bitmask int8"])
@pytest.mark.parametrize("rows", [1, 5, 8, 30, 64, 100])
def test_integers_are_exact_at_the_extremes(isa, threads, kind, rows):
    torch.manual_seed(rows)
    packed = made(kind, 68, 4096, sparsity=0.3)
    packed.values.copy_(torch.where(packed.values > 0, 127, torch.where(packed.values < 0, -127, 0)).to(torch.int8))
    for x in (
        torch.full((rows, 4096), 255),
        torch.randint(0, 256, (rows, 4096)),
        torch.randint(0, 2, (rows, 4096)) * 255,
    ):
        x = x.to(torch.uint8)
        with use_backend("native"):
            got = sparse_linear(x, packed)
        assert got.dtype is torch.int32
        assert torch.equal(got.long(), x.long() @ packed.integers().long().T)


@NATIVE
@DTYPES
@pytest.mark.parametrize("kind", ["4x1 int8", "bitmask int8"])
def test_scales_of_the_inputs_that_are_given(isa, kind, dtype):
    torch.manual_seed(5)
    packed = made(kind, 40, 256, dtype=dtype, act_scale=0.02, act_zero=117)
    for rows in (1, 8, 50):
        assert_same(3 * torch.randn(rows, 256).to(dtype), packed, torch.randn(40).to(dtype), "relu")


@NATIVE
@DTYPES
@KINDS
def test_views(isa, kind, dtype):
    torch.manual_seed(6)
    packed = made(kind, 33, 96, dtype=dtype)
    wide = torch.full((20, 300), math.nan, dtype=dtype)
    x = wide[::2, 5:101]
    x.copy_(torch.randn(10, 96))
    added = torch.full((20, 50), math.nan, dtype=dtype)[::2, 3:36]
    added.copy_(torch.randn(10, 33))
    bias = torch.randn(66).to(dtype)[::2]
    assert_same(x, packed, bias, None, added)
    assert_same(torch.randn(96, 12).to(dtype).T, packed)
    assert sparse_linear(x[:0], packed).shape == (0, 33)
    assert sparse_linear(x[0], packed).shape == (33,)


@NATIVE
@pytest.mark.parametrize("kind", ["4x1", "1x4", "csr", "bitmask", "stream", "2:4"])
def test_not_a_number_stays_in_its_output(isa, kind):
    torch.manual_seed(7)
    weight = dense_weight(kind, 24, 64, 0.5)
    weight[5][weight[5] != 0] = math.nan
    packed = pack(weight, kind)
    for rows in (1, 2, 8, 20):
        for backend in ("native", "reference"):
            with use_backend(backend):
                wrong = sparse_linear(torch.ones(rows, 64), packed).isnan()
            assert wrong[:, 5].all()
            if kind != "bitmask" and kind != "2:4":
                assert not wrong[:, [0, 1, 2, 3, 8, 9, 23]].any()


@NATIVE
@pytest.mark.parametrize("kind", ["4x1 int8", "bitmask int8"])
def test_a_row_that_is_not_finite_is_not_rounded_away(isa, kind):
    packed = made(kind, 12, 64)
    for rows in (3, 20):
        x = torch.randn(rows, 64)
        x[1, 7], x[2, 9] = math.nan, math.inf
        for backend in ("native", "reference"):
            with use_backend(backend):
                wrong = sparse_linear(x, packed).isnan()
            assert wrong[1:3].all()
            assert not wrong[0].any()


@NATIVE
def test_large_tiles_and_many_threads(isa):
    """More inputs than a tile of 64 rows keeps in the cache, and more outputs than one piece of work."""
    torch.manual_seed(8)
    torch.set_num_threads(3)
    packed = made("4x1", 290, 8192, sparsity=0.95)
    assert_same(torch.randn(70, 8192), packed)
    assert_same(torch.randn(20, 8192), packed)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([*FORMATS, "4x1 int8", "bitmask int8"]),
    outputs=st.integers(1, 40),
    groups=st.integers(1, 5),
    sparsity=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_formats_give_back_what_was_packed(kind, outputs, groups, sparsity, dtype, seed):
    torch.manual_seed(seed)
    format, _, int8 = kind.partition(" ")
    weight = dense_weight(format, outputs, 32 * groups, sparsity, dtype)
    packed = pack(weight, format, int8=bool(int8))
    again = SparseWeight.from_tensors(format, packed.shape, packed.tensors())
    if int8:
        step = weight.float().abs().amax(1, keepdim=True) / 127
        assert ((again.to_dense() - weight.float()).abs() <= step / 2 + 1e-7).all()
        assert (again.to_dense()[weight == 0] == 0).all()
        assert torch.equal(packed.sums, packed.integers().sum(1, dtype=torch.int32))
    else:
        assert torch.equal(again.to_dense(), weight)
        assert packed.nnz == int((weight != 0).sum())
    assert packed.nbytes == sum(t.numel() * t.element_size() for t in packed.tensors().values())


def test_groups_of_blocks():
    """A block row has ceil(kept / 4) groups; what fills up the last is zero and repeats its last column."""
    torch.manual_seed(9)
    weight = dense_weight("4x1", 32, 50, 0.7)
    packed = pack(weight, "4x1", int8=True)
    kept = (weight.view(8, 4, 50) != 0).any(1).sum(1)
    assert packed.pointers.diff().tolist() == [-(-int(n) // 4) for n in kept]
    for row, n in enumerate(kept.tolist()):
        groups = slice(int(packed.pointers[row]), int(packed.pointers[row + 1]))
        columns = packed.columns[groups].flatten().tolist()
        assert columns[n:] == columns[n - 1 : n] * (len(columns) - n)
        assert columns[:n] == sorted(set(columns[:n]))
        blocks = packed.values[groups].transpose(1, 2).reshape(-1, 4)
        assert not blocks[n:].any()


def test_bytes_of_a_bitmask():
    """(1 − s) b / 8 + 1 / 8 bytes a weight, and what does not grow with the weight."""
    torch.manual_seed(10)
    weight = dense_weight("bitmask", 256, 1024, 0.75)
    for int8, size in ((False, 4), (True, 1)):
        packed = pack(weight, "bitmask", int8=int8)
        formula = weight.numel() * ((1 - packed.sparsity) * size + 1 / 8)
        fixed = 64 * size + 257 * 4 + (256 * 8 if int8 else 0)
        assert packed.nbytes == pytest.approx(formula + fixed, rel=1e-3 if int8 else 0)


def test_block_sparsity_counts_whole_blocks():
    weight = torch.zeros(6, 8)
    weight[0, 0] = weight[5, 7] = 1.0
    assert block_sparsity(weight, "4x1") == 1 - 2 / 16
    assert block_sparsity(weight, "1x4") == 1 - 2 / 12
    assert block_sparsity(weight, "csr") == 1 - 2 / 48


def test_rounding_of_inputs_covers_their_range():
    packed = pack(torch.ones(1, 3), "bitmask", int8=True)
    q, scale, zero = quantize_rows_to_uint8(torch.tensor([[-1.0, 0.5, 2.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]), packed)
    back = (q.float() - zero[:, None]) * scale[:, None]
    assert (back - torch.tensor([[-1.0, 0.5, 2.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])).abs().max() <= float(
        scale.max()
    ) / 2 + 1e-6
    assert zero.tolist() == [85, 0, 0]


def test_gradients_take_the_reference():
    x = torch.randn(3, 8, requires_grad=True)
    weight = torch.randn(4, 8)
    sparse_linear(x, pack(weight, "csr")).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1))


@pytest.mark.parametrize("kind", ["4x1", "stream", "bitmask int8", "2:4"])
def test_compiles_and_passes_the_operator_check(kind):
    w = made(kind, 16, 32)
    x, bias = torch.randn(3, 32), torch.randn(16)
    parts = [getattr(w, name) for name in w.__dataclass_fields__ if name not in ("format", "shape")]
    torch.library.opcheck(
        torch.ops.gossamer.sparse_linear,
        (x, *parts, w.format, *w.shape, bias, "relu", None),
        test_utils=("test_schema", "test_faketensor"),
    )
    call = torch.compile(lambda x: sparse_linear(x, w, bias, "relu") + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(call(x), sparse_linear(x, w, bias, "relu") + 1)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: pack(torch.ones(4), "csr"), "want floats"),
        (lambda: pack(torch.ones(4, 4).int(), "csr"), "want floats"),
        (lambda: pack(torch.ones(4, 4), "coo"), "format is one of"),
        (lambda: pack(torch.ones(4, 4), "2:4"), "it is not 2:4"),
        (lambda: pack(torch.zeros(4, 6), "2:4"), "whole groups of 4"),
        (lambda: pack(torch.zeros(4, 6), "3:2"), "1 <= N <= M"),
        (lambda: pack(torch.ones(4, 4), "csr", int8=True), "8 bits go with"),
        (lambda: pack(torch.ones(4, 4), act_scale=1.0), "int8=True"),
        (lambda: pack(torch.full((4, 4), math.nan), int8=True), "NaN or infinite"),
        (lambda: pack(torch.ones(4, 4), int8=True, act_scale=-1.0), "act_scale must be positive"),
        (lambda: pack(torch.ones(4, 4), int8=True, act_scale=1.0, act_zero=300), "act_zero in 0 .. 255"),
        (lambda: pack(torch.zeros(1, 65537), "csr"), "up to 65536 inputs"),
        (lambda: pack(torch.ones(4, 4), "4x1").integers(), "no 8-bit values"),
        (lambda: sparse_linear(torch.ones(2, 5), pack(torch.ones(4, 4))), "want x"),
        (lambda: sparse_linear(torch.ones(2, 4).bfloat16(), pack(torch.ones(4, 4))), "x is torch.bfloat16"),
        (lambda: sparse_linear(torch.ones(2, 4).int(), pack(torch.ones(4, 4))), "x is torch.int32"),
        (lambda: sparse_linear(torch.ones(2, 4), pack(torch.ones(4, 4)), torch.ones(3)), "bias must have shape"),
        (lambda: sparse_linear(torch.ones(2, 4), pack(torch.ones(4, 4)), torch.ones(4).half()), "bias must be"),
        (lambda: sparse_linear(torch.ones(2, 4), pack(torch.ones(4, 4)), None, "tanh"), "activation is one of"),
        (lambda: sparse_linear(torch.ones(2, 4), pack(torch.ones(4, 4)), None, None, torch.ones(2, 3)), "added must"),
        (lambda: sparse_linear(torch.ones(2, 4).byte(), pack(torch.ones(4, 4))), "uint8 inputs take"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(InputError, match=says) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "name", "change"),
    [
        ("csr", "columns", lambda t: (t.int() + 32).to(torch.uint16)),
        ("1x4", "columns", lambda t: (t.int() + 8).to(torch.uint16)),
        ("4x1", "pointers", lambda t: t.flip(0)),
        ("4x1", "pointers", lambda t: t.long()),
        ("csr", "pointers", lambda t: t + 1),
        ("bitmask", "masks", lambda t: t ^ 1),
        ("bitmask", "masks", lambda t: t | (1 << 40)),
        ("stream", "counts", lambda t: t + 1),
        ("stream", "offsets", lambda t: t + 32),
        ("4x1 int8", "scale", lambda t: t[1:]),
        ("4x1 int8", "sums", lambda t: None),
        ("4x1", "values", lambda t: t.int()),
        ("2:4", "values", lambda t: t[:-3]),
    ],
)
def test_damaged_tensors_are_refused(kind, name, change):
    torch.manual_seed(11)
    packed = made(kind, 8, 32)
    tensors = dict(packed.tensors())
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    with pytest.raises(InputError, match="sparse weight"):
        SparseWeight.from_tensors(packed.format, packed.shape, tensors)
