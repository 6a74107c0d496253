"""pooled_attention: native against the reference, and both against max-pooling the whole map."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer import ops
from gossamer.errors import InputError

NATIVE = pytest.mark.skipif("native" not in ops.available_backends(), reason="native kernels are not built")


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def whole_map(query: Tensor, key: Tensor, block: int, key_block: int, starts=None, scale=None) -> Tensor:
    """By the definition, in float64."""
    batch, heads, new, dim = query.shape
    length, group = key.shape[2], heads // key.shape[1]
    scores = query.double() @ key.double().repeat_interleave(group, 1).transpose(2, 3)
    scores = scores * (dim**-0.5 if scale is None else scale)
    position, row = torch.arange(length - new, length)[:, None], torch.arange(length)
    first = torch.zeros(batch, dtype=torch.long) if starts is None else starts.long()
    seen = (row <= position) & (row >= first[:, None, None, None])
    probs = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
    probs = F.pad(probs, (0, -length % key_block, 0, -new % block))
    return probs.unflatten(3, (-1, key_block)).unflatten(2, (-1, block)).amax((3, 5))


def states(new, length, dim=16, heads=4, kv_heads=2, batch=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(batch, heads, new, dim, generator=generator)
    store = torch.randn(batch, length + 5, kv_heads, dim + 3, generator=generator)
    return query.to(dtype), store.to(dtype)[:, 2 : length + 2, :, :dim].transpose(1, 2)  # a view of a larger cache


CASES = [
    # new, length, block, key_block
    (70, 70, 8, 8),
    (128, 128, 32, 32),
    (33, 100, 16, 16),
    (100, 100, 64, 64),
    (70, 70, 1, 8),
    (1, 40, 4, 7),
    (150, 150, 100, 130),
    (200, 200, 200, 200),
    (90, 90, 7, 3),
    (5, 5, 64, 64),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_reference_is_the_pooled_map(case, padded):
    new, length, block, key_block = case
    query, key = states(new, length)
    starts = torch.tensor([3, min(length, 37)]) if padded else None
    with ops.use_backend("reference"):
        got = ops.pooled_attention(query, key, block, key_block=key_block, starts=starts)
    torch.testing.assert_close(got.double(), whole_map(query, key, block, key_block, starts), atol=1e-6, rtol=1e-5)


@NATIVE
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("padded", [False, True])
def test_native_is_the_pooled_map(isa, case, dtype, padded):
    new, length, block, key_block = case
    query, key = states(new, length, dim=20, dtype=dtype)
    starts = torch.tensor([3, min(length, 37)], dtype=torch.int32) if padded else None
    for b, start in enumerate(starts.tolist() if starts is not None else ()):
        key[b, :, :start] = math.nan  # padding is never looked at
    with ops.use_backend("native"):
        got = ops.pooled_attention(query, key, block, key_block=key_block, starts=starts, scale=0.3)
    want = whole_map(query, key, block, key_block, starts, 0.3)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-4)


@NATIVE
def test_many_blocks_and_heads(isa):
    query, key = states(700, 700, dim=64, heads=6, kv_heads=3)
    torch.testing.assert_close(
        ops.pooled_attention(query, key, 32).double(), whole_map(query, key, 32, 32), atol=2e-6, rtol=1e-4
    )


def test_it_compiles_and_has_a_fake():
    query, key = states(70, 70)
    torch.library.opcheck(
        torch.ops.gossamer.pooled_attention,
        (query, key, 8, 8, None, 0.25),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_nothing_in_nothing_out():
    query, key = states(0, 9)
    assert ops.pooled_attention(query, key, 4).shape == (2, 4, 0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 0}, "block"),
        ({"key_block": 0}, "block"),
        ({"query": torch.zeros(2, 3, 8, 16)}, "multiple"),
        ({"query": torch.zeros(2, 4, 80, 16)}, "last of"),
        ({"query": torch.zeros(4, 80, 16)}, "want query"),
        ({"query": torch.zeros(2, 4, 8, 16, dtype=torch.float64)}, "dtype"),
        ({"starts": torch.zeros(3, dtype=torch.int32)}, "starts"),
        ({"starts": torch.tensor([0, 71])}, "starts"),
        ({"starts": torch.tensor([-1, 0])}, "starts"),
    ],
)
def test_bad_input_is_one_line(change, message):
    query, key = states(70, 70)
    arguments = {"query": query, "key": key, "block": 8, **change}
    with pytest.raises(InputError, match=message) as caught:
        ops.pooled_attention(**arguments)
    assert "\n" not in str(caught.value)
