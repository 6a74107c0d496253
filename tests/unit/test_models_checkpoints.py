"""An interrupted training goes on where it stood."""

from __future__ import annotations

import copy

import pytest
import torch

from gossamer.data import byte_batches
from gossamer.models import Plan, byte_model, train
from gossamer.models.training import resumable
from gossamer.patterns import Masks

DATA = torch.randint(0, 256, (4000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
PLAN = Plan(steps=12, warmup=2)


def model():
    torch.manual_seed(1)  # dropout draws from it
    return byte_model(hidden_size=32, intermediate_size=64, num_hidden_layers=1, attention_dropout=0.1)


def batches(stop: int | None = None):
    for index, batch in enumerate(byte_batches(DATA, 4, 16, 12)):
        if index == stop:
            raise KeyboardInterrupt
        yield batch


def masks(of) -> Masks:
    generator = torch.Generator().manual_seed(3)
    return Masks({n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in of.named_parameters() if "proj" in n})


@pytest.mark.parametrize("masked", [False, True])
def test_an_interrupted_run_ends_as_the_uninterrupted_one(tmp_path, masked):
    whole = model()
    kwargs = {"masks": masks(whole)} if masked else {}
    torch.manual_seed(5)
    wanted = train(whole, batches(), PLAN, **kwargs)
    cut = model()
    torch.manual_seed(5)
    with resumable(tmp_path, every=4), pytest.raises(KeyboardInterrupt):
        train(cut, batches(stop=6), PLAN, **kwargs)
    again = model()
    torch.manual_seed(99)  # the random state comes from the checkpoint
    with resumable(tmp_path, every=4):
        found = train(again, batches(), PLAN, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert found.curve == wanted.curve


def test_a_run_that_ended_is_not_run_again_and_another_run_ignores_it(tmp_path):
    first = model()
    with resumable(tmp_path):
        train(first, batches(), PLAN)
    again = model()
    with resumable(tmp_path):
        train(again, batches(), PLAN)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    plan = Plan(steps=3, warmup=1)
    other = model()
    with resumable(tmp_path):
        train(other, batches(), plan)
    alone = model()
    train(alone, batches(), plan)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), alone.parameters(), strict=True))


def test_a_damaged_checkpoint_is_ignored(tmp_path):
    (tmp_path / "1.safetensors").write_bytes(b"nonsense")
    one = model()
    with resumable(tmp_path):
        train(one, batches(), PLAN)
    two = model()
    train(two, batches(), PLAN)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_runs_whose_hooks_remember_something_start_again(tmp_path):
    one = model()
    before = copy.deepcopy(one.state_dict())
    with resumable(tmp_path, every=4), pytest.raises(KeyboardInterrupt):
        train(one, batches(stop=6), PLAN, after_step=lambda step: None)
    assert not list(tmp_path.iterdir())
    assert before
