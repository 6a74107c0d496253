"""Healing for HiP: what trains is what runs, the choice has no gradient, and a model learns."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.attention.hip_attention import HipAttention
from gossamer.attention.hip_heal import ADAPTERS, HEALING, SparseTraining, heal
from gossamer.errors import InputError, ModelError
from gossamer.models import LoRA, Plan, tiny_model

METHOD = HipAttention(tokens=8, window=4, sink=2, block_q=8, dense_layers=(-1,), phases="prefill")
SMALL = LoRA(rank=4, alpha=4, dropout=0.0)


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_the_papers_recipe_is_the_default() -> None:
    assert (ADAPTERS.rank, HEALING.lr, HEALING.steps) == (256, 1e-5, 500)
    assert {HEALING.rate(s) for s in (0, 10, 499)} == {1e-5}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("group", [1, 2])
def test_training_computes_what_inference_computes(family: str, group: int) -> None:
    model, tokens = tiny_model(family), ids(2, 50)
    method = METHOD.model_copy(update={"head_group": group})
    with torch.no_grad(), method.attach(model):
        want = model(tokens, use_cache=True).logits
    dense = model(tokens).logits
    with SparseTraining(model, method):
        got = model(tokens, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert float((got - dense).detach().abs().max()) > 1e-3
    assert torch.equal(model(tokens).logits, dense)


def test_padding_is_not_attended() -> None:
    model, tokens = tiny_model("llama"), ids(2, 50)
    mask = torch.ones_like(tokens)
    mask[1, :12] = 0
    outs = []
    for filling in (3, 77):
        tokens[1, :12] = filling
        with SparseTraining(model, METHOD):
            outs.append(model(tokens, attention_mask=mask, use_cache=False).logits[:, 12:])
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)


def test_gradients_pass_through_the_chosen_keys_only() -> None:
    method = HipAttention(tokens=2, window=2, sink=1, block_q=1, block_k=1, dense_layers=())
    model = tiny_model("llama", num_hidden_layers=1)
    runtime = SparseTraining(model, method)
    query, key, value = (
        torch.randn(1, h, 30, 16, generator=torch.Generator().manual_seed(h)).requires_grad_() for h in (4, 2, 2)
    )
    module = runtime.views[0].module
    try:
        runtime.attention(module, query, key, value, None, 0.25, None, None, 0.0)[:, 0, -1].sum().backward()
    finally:
        runtime.detach()
    assert value.grad is not None
    read = (value.grad[0, 0].abs().sum(-1) > 0).nonzero()[:, 0].tolist()
    assert len(read) == 5  # sink, two found, window
    assert {0, 28, 29} <= set(read)


@pytest.mark.parametrize("lora", [SMALL, None])
def test_healing_lowers_the_loss_under_hip(lora: LoRA | None) -> None:
    model = tiny_model("llama")
    data = ids(2, 50, seed=3)

    def loss() -> float:
        with torch.no_grad(), METHOD.attach(model):
            logits = model(data[:, :-1], use_cache=True).logits
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten()))

    before, names = loss(), [name for name, _ in model.named_parameters()]
    training = heal(model, METHOD, [data] * 15, Plan(steps=15, lr=1e-2, warmup=0), lora)
    assert loss() < before - 0.1
    assert training.curve[0]["loss"] == pytest.approx(before, abs=1e-3)
    assert [name for name, _ in model.named_parameters()] == names
    assert not model.training
    assert model.config._attn_implementation == "sdpa"


def test_what_cannot_be_healed_is_one_line_and_leaves_the_model() -> None:
    model: Any = tiny_model("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    data = ids(1, 40)
    for change in ({"ensemble": 2}, {"self_extend": 4}):
        with pytest.raises(InputError, match="one search"):
            heal(model, METHOD.model_copy(update=change), [data], Plan(steps=1), SMALL)
    with pytest.raises(InputError, match="batches"):
        heal(model, METHOD, [data], Plan(steps=3, warmup=0), SMALL)
    with pytest.raises(ModelError, match="targets"):
        heal(model, METHOD, [data], Plan(steps=1), LoRA(rank=2, targets=("nothing",)))
    with pytest.raises(InputError, match="not finite"):
        heal(model, METHOD, [data] * 2, Plan(steps=2, lr=math.inf, warmup=0), SMALL)
    with SparseTraining(model, METHOD):
        cache = model(data, use_cache=True).past_key_values
        with pytest.raises(InputError, match="whole sequences"):
            model(data[:, :2], past_key_values=cache)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    holes = torch.ones_like(data)
    holes[0, 7] = 0
    with SparseTraining(model, METHOD), pytest.raises(ModelError, match="plain causal"):
        model(data, attention_mask=holes, use_cache=False)
