"""Masks through training: momentum, decay, accumulation, autocast, save and resume, and shards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gossamer.data import byte_batches
from gossamer.errors import InputError, ModelError
from gossamer.models import MaskHolder, Plan, byte_model, tiny_model, train
from gossamer.patterns import Masks


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def some_masks(model: nn.Module) -> Masks:
    generator = torch.Generator().manual_seed(1)
    return Masks(
        {n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in model.named_parameters() if p.dim() > 1}
    )


OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
    lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.5, amsgrad=True),
]


def steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3, parts: int = 1, autocast: bool = False
) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        optimizer.zero_grad()
        for _ in range(parts):
            x = torch.randn(4, 6, generator=generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(x).square().mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize(("parts", "autocast"), [(1, False), (3, False), (1, True)])
def test_removed_weights_stay_exactly_zero_and_others_move(make, parts, autocast):
    model = net()
    before, masks = copy.deepcopy(model), some_masks(model)
    optimizer = make(model.parameters())
    MaskHolder(model, masks, optimizer)
    steps(model, optimizer, parts=parts, autocast=autocast)
    for name, parameter in model.named_parameters():
        if name in masks:
            assert not bool(parameter[~masks[name]].any())
            assert bool((parameter != before.get_parameter(name))[masks[name]].any())
            for value in optimizer.state[parameter].values():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    assert not bool(value[~masks[name]].any())


def test_the_gradient_norm_counts_active_weights_only():
    model = net()
    masks = some_masks(model)
    MaskHolder(model, masks)
    model(torch.randn(4, 6)).square().mean().backward()
    expected = sum((p.grad * masks[n] if n in masks else p.grad).square().sum() for n, p in model.named_parameters())
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).square() == pytest.approx(float(expected))
    assert not any(bool(model.get_parameter(n).grad[~m].any()) for n, m in masks.items())


def test_full_masks_change_nothing_bit_for_bit():
    plain, held = net(), net()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (plain, held)]
    MaskHolder(held, Masks({n: torch.ones_like(m) for n, m in some_masks(held).items()}), optimizers[1])
    for model, optimizer in zip((plain, held), optimizers, strict=False):
        steps(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), held.parameters(), strict=False))


def test_saved_and_resumed_training_is_the_uninterrupted_one(tmp_path):
    def start(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return optimizer

    whole = net()
    masks = some_masks(whole)
    optimizer = start(whole)
    MaskHolder(whole, masks, optimizer)
    steps(whole, optimizer, 2)
    weights, state = copy.deepcopy(whole.state_dict()), copy.deepcopy(optimizer.state_dict())
    path = masks.save(tmp_path / "masks.safetensors")
    steps(whole, optimizer, 2)
    resumed = net()
    resumed.load_state_dict(weights)
    optimizer = start(resumed)
    optimizer.load_state_dict(state)
    MaskHolder(resumed, Masks.load(path), optimizer)
    steps(resumed, optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=False))


def test_released_weights_grow_again():
    model = net()
    masks = some_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    holder = MaskHolder(model, masks, optimizer)
    steps(model, optimizer, 1)
    holder.release()
    steps(model, optimizer, 1)
    assert any(bool(model.get_parameter(n)[~m].any()) for n, m in masks.items())


def test_masks_can_be_replaced_by_masks_of_the_same_parameters_only():
    model = net()
    masks = some_masks(model)
    holder = MaskHolder(model, masks)
    holder.update(Masks({n: torch.zeros_like(m) for n, m in masks.items()}))
    assert not bool(model[0].weight.any())
    with pytest.raises(InputError, match="other parameters"):
        holder.update(Masks({"0.weight": masks["0.weight"]}))
    with pytest.raises(ModelError, match="another model"):
        MaskHolder(nn.Linear(2, 2), masks)


def test_the_training_loop_holds_masks():
    model = byte_model(hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    masks = Masks({"model.layers.0.mlp.up_proj.weight": torch.rand(64, 32) < 0.3})
    data = torch.randint(0, 256, (4000,), dtype=torch.uint8)
    train(model, byte_batches(data, 4, 16, 5), Plan(steps=5, warmup=1), masks=masks)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert not bool(weight[~masks["model.layers.0.mlp.up_proj.weight"]].any())
    assert bool(weight.any())


def _shard(rank: int, folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/rendezvous")
    try:
        model = net()
        masks = some_masks(model)
        for layer in (model[0], model[2]):
            fully_shard(layer)
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
        holder = MaskHolder(model, masks, optimizer)
        for step in range(3):
            optimizer.zero_grad()
            model(
                torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank))
            ).square().mean().backward()
            holder.mask_gradients()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        for name, parameter in model.named_parameters():
            full = parameter.full_tensor()
            if name in masks:
                assert not bool(full[~masks[name]].any()), name
                assert bool(full[masks[name]].all()), name
    finally:
        dist.destroy_process_group()


def test_masks_hold_on_shards_of_two_processes(tmp_path):
    torch.multiprocessing.spawn(_shard, args=(str(tmp_path),), nprocs=2)


def test_tied_and_large_models_keep_their_names():
    model = tiny_model("gpt2")
    MaskHolder(model, Masks({"transformer.h.0.mlp.c_fc.weight": torch.zeros(64, 128, dtype=torch.bool)}))
    assert not bool(model.transformer.h[0].mlp.c_fc.weight.any())
