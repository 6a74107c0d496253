"""tree_attention: the native kernel, every instruction set that runs here, against masked attention in float64."""

import math

import pytest
import torch

from gossamer import ops
from gossamer.errors import InputError
from gossamer.patterns import Tree

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
TREES = {
    "chain": Tree.chain(5),
    "chains": Tree.of_chains(3, 2),
    "tree": Tree(tuple((node - 1) // 3 if node else -1 for node in range(38)), (0,) * 38),
    "two": Tree.chain(1),
}


def expected(query, key, value, mask, scale):
    nodes, length = query.shape[2], key.shape[2]
    whole = torch.cat([torch.ones(nodes, length - nodes, dtype=torch.bool), mask], dim=1)
    group = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
    scores = (query.double() @ key.transpose(2, 3) * scale).masked_fill(~whole, -torch.inf)
    return scores.softmax(-1) @ value


def view(*shape, dtype):
    """A tensor with odd strides inside a larger one that holds NaN."""
    batch, heads, rows, dim = shape
    whole = torch.full((batch, rows + 2, heads, dim + 3), math.nan, dtype=dtype)
    part = whole[:, 1 : rows + 1, :, :dim].transpose(1, 2)
    part.copy_(torch.randn(shape))
    return part


@DTYPES
@pytest.mark.parametrize("name", list(TREES))
@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(1, 9, 3), (2, 4, 4), (1, 6, 1)])
@pytest.mark.parametrize(("past", "dim"), [(0, 64), (1, 40), (70, 64), (300, 20)])
def test_nodes_see_the_cache_their_ancestors_and_themselves(isa, dtype, name, batch, heads, kv_heads, past, dim):
    torch.manual_seed(past + dim)
    tree = TREES[name]
    query = view(batch, heads, tree.size, dim, dtype=dtype)
    key, value = (view(batch, kv_heads, past + tree.size, dim, dtype=dtype) for _ in range(2))
    wanted = expected(query, key, value, tree.mask, 0.3)
    tolerance = 2e-5 if dtype is torch.float32 else 2e-2
    for backend in ("reference", "native") if isa != "none" else ("reference",):
        with ops.use_backend(backend):
            got = ops.tree_attention(query, key, value, tree.mask, scale=0.3)
        assert got.dtype is dtype
        torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=tolerance)
    prepared = ops.PreparedAttention(key, value).tree(query, past + tree.size, tree.mask, scale=0.3)
    torch.testing.assert_close(prepared.double(), wanted, atol=tolerance, rtol=tolerance)


def test_bad_input_and_the_operator_check():
    query, key, mask = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 7, 8), torch.ones(3, 3).tril().bool()
    torch.library.opcheck(torch.ops.gossamer.tree_attention, (query, key, key, mask, 0.5))
    for bad in (
        lambda: ops.tree_attention(query, key, key, mask[:2]),
        lambda: ops.tree_attention(query, key, key, mask.float()),
        lambda: ops.tree_attention(query, key[:, :, :2], key[:, :, :2], mask),
        lambda: ops.tree_attention(query.double(), key, key, mask),
    ):
        with pytest.raises(InputError, match="tree_attention"):
            bad()
    prepared = ops.PreparedAttention(key, key)
    for mask_, length in ((mask[:2], 7), (mask.float(), 7), (mask, 2)):
        with pytest.raises(InputError, match="tree_attention"):
            prepared.tree(query, length, mask_, scale=1.0)
