"""MaskSparsity: its term, masks and votes, and the surgeon that cuts channels out of convolutional networks."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gossamer.data.images import Images, digits
from gossamer.errors import InputError, ModelError, OutputError
from gossamer.models.channel_cut import costs, costs_after, cut_channels, load_cut, save_cut, widths
from gossamer.models.channel_graph import channel_graph
from gossamer.models.resnet import ImagePlan, accuracy, small_resnet, train_images
from gossamer.patterns import Masks
from gossamer.registry import make
from gossamer.weights.masksparsity_masks import (
    MaskedBNSparsity,
    bn_mask,
    energy_threshold,
    group_vote,
    least_strength,
    scale_gap,
    sparsity_gradient,
    with_least,
)

X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def plain():
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(32, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 3)),
    )


def depthwise():
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU6()),
        *(nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU6()),
        *(nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(8, 3),
    )


class Bottleneck(nn.Module):
    """ResNet-50's kind: c_bn, the projection's norm and the next block's c_bn are one group."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.project, self.project_bn = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)
        for i, inputs in enumerate((4, 8)):
            self.add_module(f"a{i}", nn.Sequential(nn.Conv2d(inputs, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU()))
            self.add_module(f"b{i}", nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()))
            self.add_module(f"c{i}", nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.stem_bn(self.stem(x)))
        y = self.c0(self.b0(self.a0(x)))
        y += self.project_bn(self.project(x))
        x = torch.relu(y)
        x = F.relu(x + self.c1(self.b1(self.a1(x))))
        x = F.avg_pool2d(x, 8)
        return self.head(x.view(x.size(0), -1))


NETS = {
    "plain": plain,
    "depthwise": depthwise,
    "basic": lambda: small_resnet((4, 6), 2),
    "bottleneck": Bottleneck,
}


def lively(name, seed=0):
    """A network whose norms have all kinds of statistics, scales and shifts."""
    torch.manual_seed(seed)
    net = NETS[name]()
    for module in net.modules():
        if hasattr(module, "running_mean"):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return net.eval()


def some_masks(graph, seed=0, share=0.5):
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for group in graph.groups:
        keep = torch.rand(group.channels, generator=generator) > share
        keep[int(torch.randint(group.channels, (1,), generator=generator))] = True
        masks |= {f"{name}.weight": keep for name in group.norms}
    return Masks(masks)


def silence(net, masks, shifts=True):
    with torch.no_grad():
        for name, keep in masks.items():
            norm = net.get_submodule(name.removesuffix(".weight"))
            norm.weight[~keep] = 0
            if shifts:
                norm.bias[~keep] = 0


def everything(net, keep):
    graph = channel_graph(net, X)
    return Masks({f"{n}.weight": torch.full((g.channels,), keep) for g in graph.groups for n in g.norms})


# --- the term


def weights_after(term_of, steps=3):
    net, data = small_resnet((4, 6)), digits(64)
    term = term_of(net)
    train_images(net, data.train_images, data.train_labels, ImagePlan(steps, 0.1, 32), before_step=term)
    return net.state_dict()


def test_all_kept_is_plain_training_bitwise_and_none_kept_is_network_slimming():
    plain_run = weights_after(lambda net: lambda: 0.0)
    kept = weights_after(lambda net: MaskedBNSparsity(net, everything(net, True), 0.05).add_grad)
    assert all(torch.equal(plain_run[k], kept[k]) for k in plain_run)

    def slimming(net):
        def step():
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.grad.add_(0.05 * torch.sign(module.weight.data))
            return 0.0

        return step

    slimmed = weights_after(slimming)
    masked = weights_after(lambda net: MaskedBNSparsity(net, everything(net, False), 0.05).add_grad)
    assert all(torch.equal(slimmed[k], masked[k]) for k in slimmed)
    assert not torch.equal(slimmed["bn.weight"], plain_run["bn.weight"])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-2, 2, width=32), st.booleans()), min_size=1, max_size=8))
def test_the_added_gradient_is_the_sign_on_pruned_and_nothing_on_kept(pairs):
    scale, keep = torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])
    norm = nn.BatchNorm1d(len(pairs))
    norm.weight.data.copy_(scale)
    norm.weight.grad, norm.bias.grad = torch.ones(len(pairs)), torch.zeros(len(pairs))
    value = MaskedBNSparsity(norm, Masks({"weight": keep}), 0.25).add_grad()
    for got, s, k in zip(norm.weight.grad.tolist(), scale.tolist(), keep.tolist(), strict=True):
        assert got == 1 + (0 if k else 0.25 * ((s > 0) - (s < 0)))
    assert not norm.bias.grad.any()
    assert value == pytest.approx(0.25 * float(scale[~keep].abs().sum()), abs=1e-6)


def test_other_kinds_of_the_term():
    scale, keep = torch.tensor([0.04, -0.5, 3.0]), torch.tensor([False, False, True])
    assert torch.equal(sparsity_gradient(scale, keep, 0.5, "l2"), torch.tensor([0.02, -0.25, 0.0]))
    assert torch.equal(sparsity_gradient(scale, keep, 0.5, "smoothl1", lr=0.1), torch.tensor([0.02, -0.5, 0.0]))


def test_shifts_are_pushed_when_asked_and_frozen_norms_are_passed_over():
    norm = nn.BatchNorm1d(2)
    norm.bias.data.fill_(-1.0)
    term = MaskedBNSparsity(norm, Masks({"weight": torch.tensor([True, False])}), 0.5, shifts=True)
    assert term.add_grad() == 0.0  # no gradients yet
    norm.weight.grad, norm.bias.grad = torch.zeros(2), torch.zeros(2)
    term.add_grad()
    assert norm.weight.grad.tolist() == [0, 0.5]
    assert norm.bias.grad.tolist() == [0, -0.5]


def test_the_rule_for_the_strength_takes_a_free_scale_to_zero():
    plan = ImagePlan(epochs=10, lr=0.1, batch=64)
    strength = least_strength(plan.travel(1024))
    assert strength == pytest.approx(0.1 / sum(plan.rate(s, 16) for s in range(160)))
    scale = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([scale], lr=0.1, momentum=0.9)
    for step in range(160):
        optimizer.param_groups[0]["lr"] = plan.rate(step, 16)
        scale.grad = sparsity_gradient(scale, torch.tensor([False]), strength)
        optimizer.step()
    # the momentum needs some ten steps to build up, which the rule does not count
    assert float(scale.detach()) == pytest.approx(0, abs=0.15)


# --- the mask


def test_hand_examples_of_the_vote():
    def wants(*sets, channels=3):
        return [torch.tensor([c in s for c in range(channels)]) for s in sets]

    assert group_vote(wants({0, 1}, {1, 2}, {1})).tolist() == [False, True, False]
    assert group_vote(wants({0, 1}, {0, 1})).tolist() == [True, True, False]
    # two of two agree on one channel, the least wish is two: one vote is enough then
    assert group_vote(wants({0, 1}, {1, 2})).tolist() == [True, True, True]
    assert group_vote(wants(set(), {1, 2})).tolist() == [False, False, False]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_the_vote_prunes_no_less_than_the_least_wish_and_the_most_voted(wishes):
    prune = [torch.tensor(w) for w in wishes]
    got = group_vote(prune)
    votes = torch.stack(prune).sum(0)
    assert int(got.sum()) >= min(int(p.sum()) for p in prune)
    if got.any() and not got.all():
        assert votes[got].min() > votes[~got].max()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.0, 4, width=32), min_size=2, max_size=12), st.sampled_from([1e-4, 0.01, 0.2]))
def test_the_energy_of_what_ot_prunes_is_within_its_share(values, percent):
    scale = torch.tensor(values)
    bar = energy_threshold(scale, percent)
    if float(scale.max()) < 1e-3:
        assert bar == math.inf
        return
    pruned = scale.double()[scale.abs() <= bar]
    assert float(pruned.square().sum()) <= percent * float(scale.double().square().sum()) * (1 + 1e-9)
    rest = scale.double()[scale.abs() > bar]
    more = float(pruned.square().sum() + rest[rest == rest.min()].square().sum())  # the next ones would be too much
    assert more > percent * float(scale.double().square().sum()) * (1 - 1e-6)


def test_a_channel_survives_wherever_all_scales_are_small():
    for method in ("th", "ot"):
        for least in (1, 3):
            net = lively("basic")
            with torch.no_grad():
                for module in net.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.weight.copy_(torch.linspace(1e-5, 2e-5, module.num_features))
            graph = channel_graph(net, X)
            masks = bn_mask(net, graph, method, min_channels=least)
            for mask in masks.values():
                assert int(mask.sum()) == least
                assert bool(mask[-least:].all())
    assert with_least(torch.tensor([True, False]), torch.ones(2), 5).tolist() == [True, True]


def test_ways_to_choose():
    net = plain().eval()
    graph = channel_graph(net, X)
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([0.1, 5.0, 0.2, 6.0, 0.3, 7.0]))
        net[5].weight.copy_(torch.linspace(0.0, 0.09, 8))
    assert bn_mask(net, graph, "ratio", ratio=0.5)["1.weight"].tolist() == [False, True] * 3
    assert bn_mask(net, graph, "first", ratio=0.5)["1.weight"].tolist() == [True] * 3 + [False] * 3
    assert bn_mask(net, graph, "th", th=0.25)["1.weight"].tolist() == [False, True, False, True, True, True]
    slimming = bn_mask(net, graph, "global", ratio=16 / 24)
    assert bool(slimming["1.weight"].all())
    assert slimming["5.weight"].tolist() == [False] * 7 + [True]


def test_the_gap_is_told():
    net = plain()
    keep = torch.tensor([True, False] * 3)
    net[1].weight.data.copy_(torch.arange(6.0))
    assert scale_gap(net, {"1.weight": keep})["1.weight"] == {"pruned": [1.0, 3.0, 5.0], "kept": [0.0, 2.0, 4.0]}


# --- graph and cut


def test_the_groups_of_residual_and_depthwise_networks():
    graph = channel_graph(NETS["bottleneck"](), X)
    joined = next(g for g in graph.groups if "project_bn" in g.norms)
    assert set(joined.norms) == {"project_bn", "c0.1", "c1.1"}
    assert set(joined.producers) == {"project", "c0.0", "c1.0"}
    assert {c.name for c in joined.consumers} == {"a1.0", "head"}
    assert {g.norms for g in graph.groups if len(g.norms) == 1} == {
        ("stem_bn",),
        *((f"{b}{i}.1",) for b in "ab" for i in (0, 1)),
    }
    first = channel_graph(NETS["depthwise"](), X).groups[0]
    assert first.norms == ("1", "4")
    assert first.producers == ("0",)
    assert first.depthwise == ("3",)
    stage = channel_graph(small_resnet((4, 6), 2), X).groups
    assert {"bn", "blocks.0.bn2", "blocks.1.bn2"} in [set(g.norms) for g in stage]
    flat = channel_graph(plain(), X).groups
    assert next(c for g in flat for c in g.consumers if c.name == "8").repeat == 4
    assert flat[-1].norms == ("9",)  # a BatchNorm1d behind a linear layer


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("seed", [0, 1])
def test_cutting_silent_channels_changes_nothing(name, seed):
    net = lively(name, seed)
    graph = channel_graph(net, X)
    masks = some_masks(graph, seed)
    silence(net, masks)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        wanted = net(X)
        small = cut_channels(net, graph, masks)
        assert torch.allclose(small(X), wanted, atol=1e-5, rtol=1e-6)
        assert torch.allclose(cut_channels(net, graph, masks, absorb=X)(X), wanted, atol=1e-5, rtol=1e-6)
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not small.training


@pytest.mark.parametrize("name", NETS)
def test_costs_after_the_cut_are_the_formula_and_the_counter(name):
    net = lively(name)
    graph = channel_graph(net, X)
    masks = some_masks(graph, 3)
    small = cut_channels(net, graph, masks)
    dense, told, counted = costs(net, X[:1]), costs_after(costs(net, X[:1]), graph, masks), costs(small, X[:1])
    assert counted.params == sum(p.numel() for p in small.parameters()) < dense.params
    assert {k: v.params for k, v in told.layers.items()} == {k: v.params for k, v in counted.layers.items()}
    assert told.flops == pytest.approx(counted.flops, rel=1e-9)


def test_flops_of_a_convolution_by_hand():
    conv = nn.Conv2d(6, 12, 3, padding=1, groups=3)
    assert costs(conv, torch.zeros(1, 6, 5, 7)).flops == 2 * 5 * 7 * 9 * 6 * 12 / 3


@pytest.mark.parametrize("name", NETS)
def test_cutting_twice_by_the_same_mask_is_cutting_once(name):
    net = lively(name)
    graph = channel_graph(net, X)
    masks = some_masks(graph, 4)
    once = cut_channels(net, graph, masks)
    twice = cut_channels(once, graph, masks)
    assert widths(once) == widths(twice)
    assert all(torch.equal(v, twice.state_dict()[k]) for k, v in once.state_dict().items())
    again = channel_graph(once, X)
    assert widths(cut_channels(once, again, bn_mask(once, again))) == widths(once)  # γ in 0.5 … 2: all stay


def test_shifts_that_are_left_are_absorbed_exactly_where_there_is_no_border():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5, bias=False)),
    ).eval()
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=2)
            nn.init.normal_(module.running_mean)
    graph = channel_graph(net, X)
    masks = some_masks(graph, 1)
    silence(net, masks, shifts=False)
    with torch.no_grad():
        wanted = net(X)
        left = cut_channels(net, graph, masks)(X)
        absorbed = cut_channels(net, graph, masks, absorb=X)
        assert float((left - wanted).abs().max()) > 0.1  # what the official cut loses
        assert torch.allclose(absorbed(X), wanted, atol=1e-5)
    assert absorbed[10].bias is not None  # a layer without bias and norm gets one


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(sorted(NETS)), st.floats(0.0, 0.9))
def test_any_mask_cuts_to_its_widths_and_stays_exact(seed, name, share):
    net = lively(name, seed)
    graph = channel_graph(net, X)
    masks = some_masks(graph, seed, share)
    silence(net, masks)
    small = cut_channels(net, graph, masks)
    for key, keep in masks.items():
        assert small.get_submodule(key.removesuffix(".weight")).num_features == int(keep.sum())
    with torch.no_grad():
        assert torch.allclose(small(X), net(X), atol=2e-5, rtol=1e-5)


class Odd(nn.Module):
    """What cannot be cut: concatenation, grouped convolution, a norm on a sum, a producer without a norm, the output."""

    def __init__(self):
        super().__init__()
        self.a, self.an = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)
        self.b, self.bn = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)
        self.c, self.cn = nn.Conv2d(8, 4, 1, groups=2), nn.BatchNorm2d(4)
        self.d, self.dn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.pre = nn.BatchNorm2d(4)
        self.e, self.en = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.f, self.fn = nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.cn(self.c(torch.cat([self.an(self.a(x)), self.bn(self.b(x))], 1)))
        x = x + self.dn(self.d(x))
        x = self.en(self.e(self.pre(x)))
        return self.fn(self.f(x))


def test_what_cannot_be_cut_is_left_whole():
    graph = channel_graph(Odd(), X)
    assert graph.norms == ("en",)
    assert set(graph.left_whole) == {"an", "bn", "cn", "dn", "pre", "fn"}


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)
        self.twice, self.m = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.z, self.zn, self.out = nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1)

    def forward(self, x):
        x = self.m(self.twice(self.n(self.a(x))))
        return self.out(self.zn(self.z(self.twice(x))))


def test_a_layer_that_is_used_twice_is_left_whole():
    assert channel_graph(Shared(), X).norms == ("zn",)


# --- files


def test_a_cut_model_is_saved_and_loads_into_the_dense_builder(tmp_path):
    net = lively("basic")
    graph = channel_graph(net, X)
    small = cut_channels(net, graph, some_masks(graph), absorb=X)
    save_cut(small, tmp_path / "cut")
    back = load_cut(small_resnet((4, 6), 2, seed=5), tmp_path / "cut").eval()
    with torch.no_grad():
        assert torch.equal(back(X), small(X))
    with pytest.raises(ModelError, match="another network"):
        load_cut(plain(), tmp_path / "cut")
    with pytest.raises(InputError, match="no cut model"):
        load_cut(small_resnet((4, 6), 2), tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        save_cut(small, tmp_path / "file")


PLAIN_LOADER = """
import json, sys, torch
from safetensors.torch import load_file
from torch import nn
folder = sys.argv[1]
w = json.load(open(folder + "/channels.json"))
conv = lambda i, **k: nn.Conv2d(w[i][0], w[i][1], groups=w[i][2], **k)
net = nn.Sequential(
    conv("0", kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(w["1"][0]), nn.ReLU6(),
    conv("3", kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(w["4"][0]), nn.ReLU6(),
    conv("6", kernel_size=1, bias=False), nn.BatchNorm2d(w["7"][0]), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    nn.Linear(*w["11"][:2]),
)
net.load_state_dict(load_file(folder + "/model.safetensors"))
x = load_file(folder + "/x.safetensors")["x"]
print(float(net.eval()(x).double().abs().sum()), "gossamer" in sys.modules)
"""


def test_a_cut_model_loads_without_this_library(tmp_path):
    from safetensors.torch import save_file

    net = lively("depthwise")
    graph = channel_graph(net, X)
    small = cut_channels(net, graph, some_masks(graph))
    save_cut(small, tmp_path)
    save_file({"x": X}, tmp_path / "x.safetensors")
    told = subprocess.run(
        [sys.executable, "-c", PLAIN_LOADER, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout.split()
    with torch.no_grad():
        assert float(told[0]) == pytest.approx(float(small(X).double().abs().sum()), rel=1e-6)
    assert told[1] == "False"


# --- the method and its errors


def test_the_method_does_the_whole_and_its_facts_are_true():
    data = digits(400)
    net = small_resnet((6, 8))
    train_images(net, data.train_images, data.train_labels, ImagePlan(4, 0.1))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    seen = []
    applied = make("masksparsity", choose="ratio", epochs=3, finetune_epochs=2).apply(
        net, data, lambda what, done, total: seen.append(what)
    )
    facts = applied.facts
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert facts["parameters"]["after"] == sum(p.numel() for p in applied.model.parameters())
    assert facts["flops"]["after"] < 0.5 * facts["flops"]["before"]
    assert facts["channels"]["blocks.0.bn1.weight"] == [3, 6]  # alone; where norms vote it can be fewer
    assert facts["accuracy"]["finetuned"] == accuracy(applied.model, data.test_images, data.test_labels)
    assert {"global sparsity", "masked sparsity", "training"} == set(seen)
    for scales in facts["scales"].values():
        assert scales["pruned"][2] < scales["kept"][1]


def test_masks_of_another_source_are_taken():
    data, net = digits(64), small_resnet((4, 6))
    graph = channel_graph(net, X)
    masks = bn_mask(net, graph, "first", ratio=0.25)
    applied = make("masksparsity", epochs=1, finetune_epochs=0).apply(net, data, masks=masks)
    assert widths(applied.model)["conv"] == [1, 1, 1]
    assert "finetuned" not in applied.facts["accuracy"]


@pytest.mark.parametrize(
    "wrong",
    [{"th": -1}, {"ratio": 0}, {"percent": 1}, {"epochs": 0}, {"kind": "l3"}, {"milestones": (3, 2)}, {"lam": 0}],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match="masksparsity"):
        make("masksparsity", **wrong)


def test_bad_input_is_named_in_one_line():
    net, data = small_resnet((4, 6)), digits(64)
    graph = channel_graph(net, X)
    masks = some_masks(graph)
    method = make("masksparsity", epochs=1)
    with pytest.raises(InputError, match="labelled images"):
        method.apply(net, torch.ones(2, 3, dtype=torch.long))
    broken = Images(data.train_images * math.nan, data.train_labels, data.test_images, data.test_labels, 10)
    with pytest.raises(InputError, match="not finite"):
        method.apply(net, broken)
    with pytest.raises(ModelError, match="another model"):
        bn_mask(small_resnet((5, 6)), graph)
    with pytest.raises(ModelError, match="another model"):
        MaskedBNSparsity(small_resnet((5, 6)), masks)
    with pytest.raises(InputError, match="strength"):
        MaskedBNSparsity(net, masks, math.nan)
    with pytest.raises(InputError, match="ratio"):
        bn_mask(net, graph, "ratio", ratio=1.5)
    with pytest.raises(ModelError, match="cannot be cut"):
        cut_channels(net, graph, Masks({"head.weight": torch.ones(3)}))
    with pytest.raises(InputError, match="one mask"):
        cut_channels(net, graph, Masks({"bn.weight": torch.ones(4)}))
    with pytest.raises(InputError, match="keep a channel"):
        cut_channels(net, graph, everything(net, False))
    with pytest.raises(InputError, match="channels, the norm"):
        cut_channels(net, graph, Masks({n: torch.ones(m.numel() + 2) for n, m in masks.items()}))
    with pytest.raises(ModelError, match="cannot be traced"):
        channel_graph(net, torch.zeros(1, 3, 8, 8))
    with pytest.raises(ModelError, match="no channels"):
        channel_graph(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), X)
    with pytest.raises(InputError, match="example"):
        channel_graph(net, torch.zeros(3))
    with torch.no_grad():
        net.bn.weight[0] = math.nan
    with pytest.raises(InputError, match="not finite"):
        bn_mask(net, graph)
    with pytest.raises(InputError, match="labels"):
        train_images(net, data.train_images, data.train_labels[:3], ImagePlan(1))
    with pytest.raises(InputError, match="loss is not finite"):
        train_images(net, data.train_images, data.train_labels, ImagePlan(1))
    with pytest.raises(InputError, match="at least 1"):
        small_resnet((0,))
