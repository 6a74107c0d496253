"""The training loop: spans that stop and go on, other optimizers and losses, batches of blocks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from gossamer.errors import InputError
from gossamer.models import Plan, block_batches, byte_model, class_loss, language_loss, token_loss, train

TOKENS = torch.randint(0, 256, (5, 13), generator=torch.Generator().manual_seed(0))
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


def test_a_run_in_two_spans_is_the_whole_run_bit_for_bit():
    whole = byte_model("llama", **SMALL)
    parts, plan = copy.deepcopy(whole), Plan(steps=6, warmup=2)
    batches = list(block_batches(TOKENS, 2, 6))
    train(whole, batches, plan)
    optimizer = torch.optim.AdamW(parts.parameters(), lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay)
    train(parts, batches[:4], plan, optimizer=optimizer, span=range(4))
    train(parts, batches[4:], plan, optimizer=optimizer, span=range(4, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    with pytest.raises(InputError, match="ended after 4 of 6"):
        train(parts, batches[:0], plan, span=range(4, 6))


def test_classifiers_train_with_any_optimizer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(64, 2)
    y = (x[:, 0] > 0).long()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    training = train(model, [(x, y)] * 60, Plan(steps=60, lr=0.1, warmup=1), loss=class_loss, optimizer=optimizer)
    assert training.final_loss < 0.2


def test_targets_of_minus_100_do_not_count_and_losses_are_perplexities():
    model = byte_model("gpt2", **SMALL)
    targets = TOKENS[:, 1:].clone()
    targets[:, :6] = -100
    with torch.no_grad():
        logits = model(TOKENS[:, :-1]).logits[:, 6:].log_softmax(-1)
        wanted = -logits.gather(-1, TOKENS[:, 7:, None]).mean()
        assert float(language_loss(model, (TOKENS[:, :-1], targets))) == pytest.approx(float(wanted), rel=1e-5)
    assert token_loss(model, TOKENS) == pytest.approx(math.log(256), abs=0.2)


def test_every_block_is_seen_once_before_any_is_seen_twice():
    drawn = torch.cat(list(block_batches(TOKENS, 2, 5, seed=3)))
    for first in (0, 5):
        assert sorted(drawn[first : first + 5, 0].tolist()) == sorted(TOKENS[:, 0].tolist())
    with pytest.raises(InputError, match="cannot draw"):
        block_batches(TOKENS[0], 2, 5)
