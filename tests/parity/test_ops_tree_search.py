"""tree_search: the native kernel finds what the reference finds, over shapes, strides, ranges and dtypes."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer import ops
from gossamer.errors import InputError

needs_native = pytest.mark.skipif("native" not in ops.available_backends(), reason="native kernels are not built")


@needs_native
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_native_equals_the_reference(isa, data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    batch, kv_heads, group, lines, votes = (data.draw(st.integers(1, n)) for n in (2, 2, 3, 4, 6))
    dim, rows = data.draw(st.sampled_from([8, 20, 64])), data.draw(st.integers(1, 700))
    nodes, block = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 5))
    how = {
        "block": block,
        "step": data.draw(st.integers(1, block)),
        "representative": data.draw(st.sampled_from(["center", "first", "last"])),
    }
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    voters = torch.randn(batch, kv_heads * group, lines, votes, dim).to(dtype)
    key = torch.randn(batch, rows + 3, kv_heads, dim).to(dtype).transpose(1, 2)[:, :, :rows]
    begin = torch.randint(0, rows, (batch,))
    ends = torch.randint(-5, rows + 1, (lines,))
    with ops.use_backend("reference"):
        want = ops.tree_search(voters, key, begin, ends, nodes, **how)
    with ops.use_backend("native"):
        got = ops.tree_search(voters, key, begin, ends, nodes, **how)
    assert torch.equal(got.counts, want.counts)
    assert torch.equal(got.evaluations, want.evaluations)
    same = (got.blocks == want.blocks).all(-1)
    # Sums in another order may turn a choice between two scores that are equal but for rounding, and what follows from it.
    assert same.float().mean() > (0.99 if dtype is torch.float32 else 0.8) or same.numel() < 12
    assert bool((got.blocks >= 0).all())
    used = torch.arange(nodes) < got.counts[..., None]
    assert bool((got.blocks.diff(dim=-1) > 0)[used[..., 1:]].all()), "ascending"
    assert bool((got.blocks == 0)[~used].all())


@needs_native
def test_threads_share_the_lines():
    voters, key = torch.randn(1, 4, 9, 3, 64), torch.randn(1, 2, 3000, 64)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.tree_search(voters, key, torch.tensor([7]), torch.full((9,), 3000), 32, block=2))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ops.available_backends()[:2])
def test_the_best_keys_of_a_smooth_score_are_found(backend):
    at = torch.linspace(0, 2 * math.pi, 512)
    key = torch.stack([at.sin(), at.cos()], 1)[None, None]
    with ops.use_backend(backend):
        found = ops.tree_search(torch.tensor([[[[[1.0, 0.0]]]]]), key, torch.tensor([0]), torch.tensor([512]), 16)
    assert found.blocks[0, 0, 0].tolist() == at.sin().topk(16).indices.sort().values.tolist()
    assert int(found.evaluations) == 2 * 16 * 5


def test_bad_input_is_one_line():
    voters, key, zero = torch.randn(1, 2, 1, 1, 8), torch.randn(1, 1, 4, 8), torch.tensor([0])
    with pytest.raises(InputError, match="want voters"):
        ops.tree_search(voters[0], key, zero, zero, 4)
    with pytest.raises(InputError, match="must be 1 or more"):
        ops.tree_search(voters, key, zero, zero, 0)
    with pytest.raises(InputError, match="starts and lengths"):
        ops.tree_search(voters, key, zero, torch.tensor([5]), 4)


def test_operator_is_registered_for_tracing():
    arguments = (torch.randn(1, 2, 3, 2, 8), torch.randn(1, 1, 40, 8), torch.tensor([0]).int())
    ends = torch.tensor([10, 20, 40]).int()
    torch.library.opcheck(torch.ops.gossamer.tree_search.default, (*arguments, ends, 4, 2, 1, "center"))
