"""Maps of what was read: dense ones equal the softmax, sparse ones have holes where nothing was read."""

import pytest
import torch

from gossamer.errors import InputError
from gossamer.measure.attention_map import attention_map
from gossamer.models.tiny import tiny_model
from gossamer.registry import make

N = 40


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokens(model):
    return torch.randint(0, model.config.vocab_size, (N,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("feed", ["block", "teacher", "tokens"])
def test_dense_maps_are_the_softmax_of_the_model(model, tokens, feed):
    model.config._attn_implementation = "eager"
    want = model(tokens[None], output_attentions=True).attentions[1][0]
    with make("dense").attach(model) as handle:
        got = attention_map(model, handle, tokens, 1, feed=feed)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_a_window_is_seen_as_one(model, tokens):
    with make("streaming-llm", tokens=6, sinks=2).attach(model) as handle:
        got = attention_map(model, handle, tokens, 0, prompt=8)
    assert got.shape == (model.config.num_attention_heads, N - 8, N)
    row = torch.arange(8, N)[:, None]
    column = torch.arange(N)[None]
    seen = ((column < 2) | (column > row - 4)) & (column <= row)
    assert torch.equal((got > 0).all(0), seen)
    torch.testing.assert_close(got.sum(2), torch.ones(got.shape[:2]), atol=1e-5, rtol=0)


def test_evicted_rows_get_no_weight(model, tokens):
    with make("tova", budget=10).attach(model) as handle:
        got = attention_map(model, handle, tokens, 1)
    assert int((got[:, -1] > 0).sum(1).max()) <= 11
    torch.testing.assert_close(got.sum(2), torch.ones(got.shape[:2]), atol=1e-5, rtol=0)


def test_bad_input_is_one_line(model, tokens):
    with make("dense").attach(model) as handle:
        with pytest.raises(InputError, match="has layers 0 to"):
            attention_map(model, handle, tokens, 99)
        with pytest.raises(InputError, match="leaves nothing"):
            attention_map(model, handle, tokens, 0, prompt=N)
