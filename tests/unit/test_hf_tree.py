"""Trees of candidates through the attention plug point: every node as if its path had been read alone."""

import pytest
import torch

from gossamer.errors import InputError
from gossamer.hf import AttentionRuntime, GossamerCache
from gossamer.models import tiny_model
from gossamer.patterns import Tree
from gossamer.registry import make

TREE = Tree.of_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (1, 0, 3)])
PROMPT = torch.arange(3, 24)[None]
TOKENS = torch.tensor([[7, 9, 11, 40, 8, 9, 30, 5, 6]])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3", "gpt2"])
@pytest.mark.parametrize("length", [1, 12, 21])
def test_a_node_is_its_path_read_alone_and_accepted_rows_are_those_of_the_text(family, length):
    model, prompt = tiny_model(family), PROMPT[:, :length]
    runtime = AttentionRuntime(model)
    with torch.no_grad():
        cache = GossamerCache()
        model(prompt, past_key_values=cache, use_cache=True)
        with runtime.tree_forward(TREE):
            logits = model(TOKENS, past_key_values=cache, position_ids=length + TREE.positions[None]).logits[0]
        for node in range(TREE.size):
            path = list(TREE.path(node))
            alone = model(torch.cat([prompt, TOKENS[:, path]], dim=1)).logits[0, -1]
            torch.testing.assert_close(logits[node], alone, atol=1e-4, rtol=1e-4)
        kept = torch.tensor(TREE.path(7))
        for layer in cache.layers:
            layer.accept(length, kept)
        fresh = GossamerCache()
        model(torch.cat([prompt, TOKENS[:, kept]], dim=1), past_key_values=fresh)
        assert cache.get_seq_length() == length + len(kept)
        for mine, other in zip(cache.layers, fresh.layers, strict=True):
            torch.testing.assert_close(mine.keys, other.keys, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(mine.values, other.values, atol=1e-5, rtol=1e-4)
    runtime.detach()


def test_sparse_methods_and_padding_are_refused():
    model = tiny_model("llama")
    with make("streaming-llm", tokens=8).attach(model) as handle, pytest.raises(InputError, match="need exact"):
        handle.runtime.tree_forward(TREE).__enter__()
    runtime = AttentionRuntime(model)
    with torch.no_grad():
        cache = GossamerCache()
        mask = torch.tensor([[0, 1, 1, 1]])
        model(PROMPT[:, :4], past_key_values=cache, attention_mask=mask)
        with runtime.tree_forward(TREE), pytest.raises(InputError, match="without padding"):
            model(TOKENS, past_key_values=cache, attention_mask=torch.cat([mask, torch.ones(1, 9).long()], 1))
        with runtime.tree_forward(Tree.chain(3)), pytest.raises(InputError, match="for a tree of 4"):
            model(TOKENS, past_key_values=cache)
    runtime.detach()


def test_accepted_rows_ascend_within_those_there():
    model = tiny_model("llama")
    with torch.no_grad():
        cache = GossamerCache()
        model(PROMPT[:, :6], past_key_values=cache)
    layer = cache.layers[0]
    before = layer.keys.clone()
    for start, ids in ((2, [1, 1]), (2, [2, 0]), (2, [0, 4]), (2, [-1]), (9, [0])):
        with pytest.raises(InputError):
            layer.accept(start, torch.tensor(ids))
        assert torch.equal(layer.keys, before)
    layer.accept(2, torch.tensor([0, 2, 3]))
    assert torch.equal(layer.keys, before[:, :, [0, 1, 2, 4, 5]])
    layer.accept(2, torch.tensor([], dtype=torch.long))
    assert layer.length == 2


def test_trees():
    assert Tree.chain(2).rank_paths == ((), (0,), (0, 0))
    chains = Tree.of_chains(2, 3)
    assert chains.rank_paths == ((), (0,), (1,), (0, 0), (1, 0), (0, 0, 0), (1, 0, 0))
    assert TREE.mask[7].nonzero()[:, 0].tolist() == list(TREE.path(7)) == [0, 1, 4, 7]
    assert TREE.leaves == (3, 5, 7, 8)
    assert TREE.subtree(3).parents == (-1, 0, 0, 0)
    for bad in ([(0,), (0,)], [(0, 1)], [()]):
        with pytest.raises(InputError):
            Tree.of_paths(bad)
    with pytest.raises(InputError):
        Tree((0,), (0,))
