"""MoHD by its card: routing, gains, fusion, skipping, counters, and the Llama that is made of them."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

import gossamer
from gossamer.activations.mohd import (
    BlockFusion,
    MoHD,
    MoHDConfig,
    MoHDForCausalLM,
    MoHDLinear,
    MonarchFusion,
    Routing,
    SubDimRouter,
    costs,
    group_counts,
    group_gains,
    monarch,
    read_active,
    write_active,
)
from gossamer.activations.router import top_units
from gossamer.attention.quest import Quest
from gossamer.data import byte_batches
from gossamer.errors import InputError, ModelError
from gossamer.hf import AttentionRuntime, FixedRules, MLPRuntime, attention_views
from gossamer.models import Plan, byte_model, tiny_model, train
from gossamer.patterns import NeuronRule
from gossamer.registry import make

WIDTH, GROUPS = 64, 16


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(batch, length, seed=0):
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(seed))


def even(model):
    """Scores that are the same for all groups."""
    for router in model.routers():
        nn.init.zeros_(router.centroids)
    return model


def mixed(model, seed=0):
    """Fusions away from the identity, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".fusion." in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@st.composite
def routings(draw):
    """(logits [tokens, N], n_a, n_s)."""
    groups = draw(st.sampled_from([1, 2, 5, 8, 16]))
    active = draw(st.integers(1, groups))
    shared = draw(st.integers(0, active))
    tokens, spread = draw(st.integers(1, 9)), draw(st.sampled_from([0.0, 1.0, 30.0]))
    return spread * normal(tokens, groups, seed=draw(st.integers(0, 99))), active, shared


# -- which groups, and how strongly (2, 7) ----------------------------------------------------------------------------


def test_counts_are_rounded_shares():
    assert group_counts(16, 0.5, 0.375) == (8, 6)
    assert group_counts(16, 1 / 3, 0.25) == (5, 4)
    assert group_counts(10, 0.25, 0.0) == (3, 0)  # halves up
    assert group_counts(1, 1.0, 1.0) == (1, 1)


@given(routings(), st.sampled_from(["sum", "preserve", "none"]))
@settings(deadline=None, max_examples=80)
def test_exactly_the_active_groups_and_always_the_shared_ones(routing, scale):
    logits, active, shared = routing
    logits = logits.clamp(-20, 20)  # so that no gain underflows to a zero that would look idle
    gains = group_gains(logits, top_units(logits, active, shared), scale)
    assert ((gains != 0).sum(-1) == active).all()
    assert (gains[:, :shared] > 0).all()
    rest = logits[:, shared:]
    kept, lost = gains[:, shared:] > 0, gains[:, shared:] == 0
    worst = rest.masked_fill(lost, math.inf).amin(-1) if active > shared else torch.full((len(rest),), math.inf)
    best = rest.masked_fill(kept, -math.inf).amax(-1) if rest.shape[1] else torch.full((len(rest),), -math.inf)
    assert (worst >= best).all()


@given(routings())
@settings(deadline=None, max_examples=80)
def test_preserve_has_mean_gain_one_for_any_scores(routing):
    logits, active, shared = routing
    gains = group_gains(logits, top_units(logits, active, shared), "preserve")
    torch.testing.assert_close(gains.sum(-1) / active, torch.ones(len(gains)), atol=1e-5, rtol=0)


def test_gains_by_hand():
    scores = torch.tensor([0.1, 0.2, 0.3, 0.4])
    units = torch.tensor([0, 3])
    for scale, alpha in (("none", 1.0), ("sum", 4 * 0.5), ("preserve", 2 / 0.5)):
        want = alpha * torch.tensor([0.1, 0.0, 0.0, 0.4])
        torch.testing.assert_close(group_gains(scores.log(), units, scale), want)


def test_gains_where_scores_underflow():
    """A shared group may have all the scores' mass against it: its gain is still finite."""
    logits = torch.tensor([0.0, 0.0, 500.0, 0.0])
    assert group_gains(logits, torch.tensor([0, 1]), "preserve").tolist() == [1.0, 1.0, 0.0, 0.0]


def test_ties_go_to_the_lowest_specialised_group():
    router = SubDimRouter(WIDTH, GROUPS)
    nn.init.zeros_(router.centroids)
    assert router(normal(WIDTH)).units.tolist() == list(range(8))


def test_the_router_is_a_softmax_over_centroids():
    router, x = SubDimRouter(WIDTH, GROUPS, scale="sum"), normal(3, WIDTH)
    scores = (x @ router.centroids.T).softmax(-1)
    routing = router(x)
    for t in range(3):
        best = sorted(range(6, 16), key=lambda i: -scores[t, i].item())[:2]
        assert routing.units[t].tolist() == [*range(6), *best]
        kept = scores[t, routing.units[t]]
        torch.testing.assert_close(routing.gains[t, routing.units[t]], kept * 16 * kept.sum())


def test_centroids_begin_with_variance_one_over_d():
    torch.manual_seed(0)
    assert SubDimRouter(4096, 16).centroids.var().item() * 4096 == pytest.approx(1, rel=0.05)


# -- maps (1, 3, 4) ---------------------------------------------------------------------------------------------------


def naive(x, routing, weight, bias, side):
    """The card's sums, a token and a group at a time."""
    width = (weight.shape[1] if side == "in" else weight.shape[0]) // routing.gains.shape[-1]
    rows = []
    for token, gains in zip(x, routing.gains, strict=True):
        out = torch.zeros(weight.shape[0])
        for i, gain in enumerate(gains.tolist()):
            block = slice(i * width, (i + 1) * width)
            if not gain:
                continue
            if side == "in":
                out += gain * weight[:, block] @ token[block]
            else:
                out[block] = gain * (weight[block] @ token + (0 if bias is None else bias[block]))
        rows.append(out + bias if side == "in" and bias is not None else out)
    return torch.stack(rows)


@given(
    routings(), st.sampled_from(["in", "out"]), st.booleans(), st.sampled_from(["sum", "preserve"]), st.integers(1, 3)
)
@settings(deadline=None, max_examples=80)
def test_gathered_masked_and_naive_agree(routing, side, bias, scale, size):
    logits, active, shared = routing
    units = top_units(logits, active, shared)
    chosen = Routing(units, group_gains(logits, units, scale), shared)
    width = size * logits.shape[1]
    shape = (11, width) if side == "in" else (width, 11)
    weight, b = normal(*shape), normal(shape[0], seed=1) if bias else None
    x = normal(len(logits), shape[1], seed=2)
    if side == "in":
        gathered, masked = read_active(x, chosen, weight, b), F.linear(chosen.apply(x), weight, b)
    else:
        gathered, masked = write_active(x, chosen, weight, b), chosen.apply(F.linear(x, weight, b))
    torch.testing.assert_close(gathered, masked, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gathered, naive(x, chosen, weight, b, side), atol=1e-5, rtol=1e-4)
    if side == "in":  # laid out for decode
        by_channel = weight.t().contiguous().t()
        torch.testing.assert_close(read_active(x, chosen, by_channel, b), masked, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 1), (2, 5), (40,)])
def test_a_map_gives_the_same_with_and_without_gradients(side, shape, dtype):
    router = SubDimRouter(WIDTH, GROUPS)
    sizes = (WIDTH, 24) if side == "in" else (24, WIDTH)
    layer = MoHDLinear(*sizes, router, side, fusion="none" if side == "in" else "monarch", bias=True).to(dtype)
    x, routing = normal(*shape, sizes[0]).to(dtype), router(normal(*shape, WIDTH, seed=1))
    want = layer(x, routing)
    with torch.no_grad():
        got = layer(x, routing)
    assert got.dtype is dtype
    assert got.shape == (*shape, sizes[1])
    tolerance = 1e-5 if dtype is torch.float32 else 0.05  # bfloat16 has 8 bits, and the two round at other places
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_idle_groups_are_never_touched(side, tokens):
    """Their weights may be anything: NaN times zero would show."""
    router = SubDimRouter(WIDTH, GROUPS, active=0.25, shared=0.125)
    layer = MoHDLinear(*((WIDTH, 24) if side == "in" else (24, WIDTH)), router, side)
    routing = router(normal(1, WIDTH).expand(tokens, -1))
    x = normal(tokens, layer.in_features, seed=1)
    with torch.no_grad():
        want = layer(x, routing)
        idle = (routing.gains[0] == 0).repeat_interleave(4)
        (layer.weight.T if side == "in" else layer.weight)[idle] = math.nan
        assert torch.equal(layer(x, routing), want)
        assert int(idle.sum()) == 48
    if side == "out":
        assert not want[:, idle].any()


@pytest.mark.parametrize("grad", [False, True])
def test_idle_inputs_have_no_influence(grad):
    router = SubDimRouter(WIDTH, GROUPS)
    layer, x = MoHDLinear(WIDTH, 24, router), normal(5, WIDTH)
    routing = router(x)
    idle = (routing.gains == 0).repeat_interleave(4, -1)
    with torch.set_grad_enabled(grad):
        want = layer(x, routing)
        assert torch.equal(layer(x + 7 * idle * normal(5, WIDTH, seed=1), routing), want)
        assert not torch.equal(layer(x + ~idle, routing), want)


@pytest.mark.parametrize("side", ["in", "out"])
def test_all_groups_at_even_scores_are_the_dense_layer(side):
    router = SubDimRouter(WIDTH, GROUPS, active=1.0)
    nn.init.zeros_(router.centroids)
    for fusion in ("none",) if side == "in" else ("none", "block", "monarch"):
        layer = MoHDLinear(*((WIDTH, 24) if side == "in" else (24, WIDTH)), router, side, fusion, bias=True)
        x = normal(3, 7, layer.in_features)
        want = F.linear(x, layer.weight, layer.bias)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                got = layer(x, router(normal(3, 7, WIDTH)))
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


# -- fusion (5) -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "blocks"), [(64, (8, 8)), (256, (16, 16)), (192, (12, 16)), (96, (8, 12))])
def test_monarch(width, blocks):
    fusion, x = MonarchFusion(width), normal(2, 3, width)
    assert torch.equal(fusion(x), x)
    assert torch.equal(fusion.dense(), torch.eye(width))
    with torch.no_grad():
        for i, parameter in enumerate(fusion.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=i))
    torch.testing.assert_close(fusion(x), x @ fusion.dense().T, atol=1e-3, rtol=1e-4)
    assert fusion.cost == width * sum(blocks) == sum(p.numel() for p in fusion.parameters())
    if blocks[0] == blocks[1]:
        assert fusion.cost == 2 * width**1.5


def test_monarch_is_two_block_diagonals_around_a_permutation():
    second, first = normal(3, 4, 4), normal(4, 3, 3, seed=1)
    permutation = torch.zeros(12, 12)
    for i in range(3):
        for j in range(4):
            permutation[3 * j + i, 4 * i + j] = 1
    want = permutation.T @ torch.block_diag(*first) @ permutation @ torch.block_diag(*second)
    x = normal(5, 12)
    torch.testing.assert_close(monarch(x, second, first), x @ want.T, atol=1e-5, rtol=1e-5)
    assert (want != 0).all()  # every dimension reaches every other


def test_block_fusion_stays_in_its_groups():
    fusion, x = BlockFusion(WIDTH, GROUPS, bias=True), normal(5, WIDTH)
    assert torch.equal(fusion(x), x)
    with torch.no_grad():
        fusion.weight.copy_(normal(*fusion.weight.shape))
        fusion.bias.copy_(normal(WIDTH, seed=3))
    torch.testing.assert_close(fusion(x), x @ fusion.dense().T + fusion.bias, atol=1e-5, rtol=1e-5)
    assert fusion.cost == WIDTH * WIDTH // GROUPS
    silent = BlockFusion(WIDTH, GROUPS)
    assert not silent(torch.cat([torch.zeros(5, 8), x[:, 8:]], 1))[:, :8].any()


# -- balance (6) ------------------------------------------------------------------------------------------------------


def balance_of(units, scores, shared):
    """The card's sum, a group at a time."""
    n, tokens = scores.shape[-1], len(units)
    total = 0.0
    for i in range(shared, n):
        f = sum(i in row for row in units.tolist()) / tokens
        total += f * scores[:, i].mean().item()
    return (n - shared) * total


def test_balance_at_even_use_and_at_collapse():
    router = SubDimRouter(8, 8, active=0.5, shared=0.25).train()  # 4 active, 2 shared, 2 routed of 6
    with torch.no_grad():
        router.centroids.copy_(3 * torch.eye(8))
    pairs = torch.tensor([(2, 3), (4, 5), (6, 7)])
    evenly = F.one_hot(pairs, 8).sum(1).float()
    routing = router(evenly)
    scores = F.softmax(evenly @ router.centroids.T, -1)
    even_use = router.take_balance()
    assert routing.units[:, 2:].sort(-1).values.tolist() == pairs.tolist()
    # n_r·Σ_spec p at even use
    assert even_use.item() == pytest.approx(2 * scores[:, 2:].mean(0).sum().item(), rel=1e-5)
    assert even_use.item() == pytest.approx(balance_of(routing.units, scores, 2), rel=1e-5)
    collapsed = evenly[:1].expand(3, -1)
    routing = router(collapsed)
    crowded = router.take_balance()
    scores = F.softmax(collapsed @ router.centroids.T, -1)
    assert crowded.item() == pytest.approx(balance_of(routing.units, scores, 2), rel=1e-5)
    assert crowded > 2 * even_use
    assert router.take_balance() is None


def test_the_model_takes_its_balance_once_and_weighs_it():
    model = MoHD(groups=8, balance=0.25).apply(tiny_model("llama")).train()
    model(ids(2, 9))
    parts = [router.balance for router in model.routers()]
    assert len(parts) == 4
    assert model.balance_loss().item() == pytest.approx(0.25 * sum(float(p) for p in parts), rel=1e-6)
    assert model.balance_loss().item() == 0
    plain = model(ids(2, 9)).logits
    penalty = model.balance_loss()
    entropy = F.cross_entropy(plain[:, :-1].flatten(0, 1), ids(2, 9)[:, 1:].flatten())
    assert model(ids(2, 9), labels=ids(2, 9)).loss.item() == pytest.approx((entropy + penalty).item(), rel=1e-5)
    model.eval()
    assert model(ids(2, 9), labels=ids(2, 9)).loss.item() == pytest.approx(entropy.item(), rel=1e-5)
    assert model(ids(2, 9), labels=ids(2, 9), return_dict=False)[0].item() == pytest.approx(entropy.item(), rel=1e-5)


# -- the model (1, 8, 9) ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reading", ["residual", "neurons"])
@pytest.mark.parametrize("fusion", ["monarch", "block", "none"])
@pytest.mark.parametrize("tied", [False, True])
def test_all_groups_at_even_scores_are_the_llama(reading, fusion, tied):
    llama = tiny_model("llama", tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    before = copy.deepcopy(llama.state_dict())
    method = MoHD(active=1.0, reading=reading, fusion=fusion)
    with torch.no_grad():
        want = llama(ids(2, 20)).logits
        torch.testing.assert_close(even(method.apply(llama))(ids(2, 20)).logits, want, atol=1e-4, rtol=1e-4)
        if reading == "residual":
            wide = even(method.expand(llama, 3))
            assert wide.config.hidden_size == 192
            assert wide.config.head_dim == 16
            torch.testing.assert_close(wide(ids(2, 20)).logits, want, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.state_dict().items())


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
@pytest.mark.parametrize("reading", ["residual", "neurons"])
def test_other_families_of_the_same_form(family, reading):
    model = tiny_model(family)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    with torch.no_grad():
        made = even(MoHD(active=1.0, reading=reading).apply(model))
        torch.testing.assert_close(made(ids(2, 20)).logits, model(ids(2, 20)).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reading", ["residual", "neurons"])
@pytest.mark.parametrize("fusion", ["monarch", "block"])
def test_skipping_gives_the_masked_model(reading, fusion):
    model = mixed(MoHD(reading=reading, fusion=fusion).apply(tiny_model("llama")))
    want = model(ids(2, 20)).logits
    with torch.no_grad():
        torch.testing.assert_close(model(ids(2, 20)).logits, want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(ids(1, 1)).logits, model.train()(ids(1, 1)).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reading", ["residual", "neurons"])
def test_causal_and_token_by_token(reading):
    model = mixed(MoHD(reading=reading).apply(tiny_model("llama")))
    tokens = ids(2, 16)
    other = tokens.clone()
    other[:, 10:] = (other[:, 10:] + 1) % 256
    with torch.no_grad():
        want = model(tokens).logits
        changed = model(other).logits
        torch.testing.assert_close(changed[:, :10], want[:, :10], atol=1e-4, rtol=1e-4)
        assert (changed[:, 10] - want[:, 10]).abs().max() > 0.1
        cache = DynamicCache()
        steps = [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(16)]
        torch.testing.assert_close(torch.cat(steps, 1), want, atol=1e-4, rtol=1e-4)


def test_read_and_write_share_a_decision_and_sublayers_do_not():
    model = MoHD(fusion="none").apply(tiny_model("llama"))
    seen, layer = {}, model.model.layers[0]
    for name, block in (("attention", layer.self_attn), ("mlp", layer.mlp)):
        block.router.register_forward_hook(lambda m, args, out, name=name: seen.setdefault(name, []).append(out))
        block.register_forward_hook(
            lambda m, args, out, name=name: seen.__setitem__(f"{name} out", out[0] if isinstance(out, tuple) else out)
        )
    model(ids(1, 12))
    for name in ("attention", "mlp"):
        (routing,) = seen[name]  # routed once for all maps
        written = seen[f"{name} out"].unflatten(-1, (16, 4)).abs().amax(-1) > 0
        assert torch.equal(written, routing.gains > 0)
    assert not torch.equal(seen["attention"][0].units, seen["mlp"][0].units)
    assert layer.self_attn.router.decision is None


@pytest.mark.parametrize("tied", [False, True])
def test_counters_of_the_residual_reading(tied):
    llama = tiny_model("llama", tie_word_embeddings=tied)
    model = MoHD(active=0.25, shared=0.125).apply(llama)
    cost, dense = costs(model), costs(llama)
    kv, heads, neurons = 32, 64, 128
    maps = 2 * WIDTH * (heads + 2 * kv + heads + 3 * neurons)
    router, fusion = 4 * GROUPS * WIDTH, 4 * 2 * int(WIDTH**1.5)
    assert (cost.routed, cost.routed_active, cost.router, cost.fusion) == (maps, maps // 4, router, fusion)
    assert cost.parameters == dense.parameters + router + fusion == model.num_parameters()
    assert cost.active == dense.active - maps * 3 // 4 + router + fusion
    assert dense.active == dense.parameters - (0 if tied else 255 * WIDTH)
    assert cost.flops == 2 * (maps // 4 + router + fusion + 256 * WIDTH)
    assert dense.flops == 2 * (maps + 256 * WIDTH)
    assert dense.routed == dense.router == dense.fusion == 0


def test_counters_of_the_neuron_reading_and_of_biases():
    llama = tiny_model("llama", mlp_bias=True)
    cost = costs(MoHD(reading="neurons", fusion="block").apply(llama))
    assert cost.routed == 2 * (2 * 64 * 128 + 128 + 64)
    assert cost.routed_active == 2 * (64 * 128 + 64 + 64)  # a write's bias by half, a read's whole
    assert cost.router == 2 * 16 * 128
    assert cost.fusion == 2 * 128 * 8
    whole = costs(MoHD(reading="neurons", fusion="monarch").apply(llama))
    assert whole.routed == 0  # a Monarch fusion wakes all neurons: nothing can be skipped behind it
    assert whole.flops > cost.flops


def test_expansion_keeps_the_active_cost():
    """Width times r at δ = 1/r: r times the parameters of the blocks, the same active ones."""
    llama = tiny_model("llama")
    one, two = costs(MoHD(active=1.0).apply(llama)), costs(MoHD(active=0.5).expand(llama, 2))
    assert two.routed == 2 * one.routed
    assert two.routed_active == one.routed_active


# -- training ---------------------------------------------------------------------------------------------------------


def test_it_trains_and_every_part_learns():
    model = MoHD().apply(byte_model(hidden_size=64, intermediate_size=64, num_hidden_layers=2))
    before = copy.deepcopy(model.state_dict())
    data = (torch.arange(4000) * 7 % 31 + 60).to(torch.uint8)
    batches = byte_batches(data, batch=4, context=24, steps=30, seed=0)
    training = train(model, batches, Plan(30, lr=3e-3, warmup=3), penalty=model.balance_loss)
    assert training.curve[-1]["loss"] < 0.5 * training.curve[0]["loss"]
    assert all(point["penalty"] > 0 for point in training.curve)
    assert all(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    copy.deepcopy(model)


def test_the_balance_loss_reaches_the_centroids_alone():
    model = MoHD().apply(tiny_model("llama")).train()
    model(ids(2, 9))
    last = model.model.layers[-1].mlp
    model.routers()[-1].take_balance().backward()
    assert last.router.centroids.grad.abs().max() > 0
    assert last.gate_proj.weight.grad is None
    assert last.down_proj.fusion.first.grad is None


def test_gradients_flow_through_the_gains():
    router = SubDimRouter(WIDTH, GROUPS)
    layer = MoHDLinear(WIDTH, 3, router)
    layer(normal(4, WIDTH)).square().sum().backward()
    assert router.centroids.grad.abs().max() > 0
    units = router(normal(1, WIDTH)).units[0].tolist()
    router.zero_grad()
    layer(normal(1, WIDTH)).square().sum().backward()
    idle = [i for i in range(GROUPS) if i not in units]
    assert not router.centroids.grad[idle].any()  # the softmax of the active ones alone


# -- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reading", ["residual", "neurons"])
def test_saves_and_loads(tmp_path, reading):
    model = mixed(MoHD(groups=8, shared=0.25, reading=reading, balance=0.5).apply(tiny_model("llama"), seed=3))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MoHDForCausalLM
    assert type(loaded.config) is MoHDConfig
    assert type(AutoConfig.from_pretrained(tmp_path)) is MoHDConfig
    assert (loaded.config.shared, loaded.config.balance_weight) == (0.25, 0.5)
    state = model.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded(ids(2, 9)).logits, model(ids(2, 9)).logits)
        base = AutoModel.from_pretrained(tmp_path)
        assert torch.equal(base(ids(2, 9)).last_hidden_state, model.model(ids(2, 9)).last_hidden_state)


def test_a_fresh_model_is_drawn_by_its_configuration():
    config = MoHDConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=9)
    model = MoHDForCausalLM(config)
    for router in model.routers():
        assert router.centroids.std().item() == pytest.approx(0.125, rel=0.2)
    assert torch.equal(model.model.layers[0].mlp.down_proj.fusion.dense(), torch.eye(64))
    assert model.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_generates_the_same_with_a_cache_and_in_batches():
    model = mixed(MoHD().apply(tiny_model("llama")))
    prompt = ids(1, 7)
    kept = model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=True)
    assert torch.equal(kept, model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=False))
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0
    padded = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt], 1), ids(1, 10, seed=1)])
    both = model.generate(padded, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(both[0, 3:], kept[0])


def test_attention_methods_run_on_it():
    model = mixed(MoHD().apply(tiny_model("llama")))
    with torch.no_grad():
        want = model(ids(2, 40)).logits
        runtime = AttentionRuntime(model)
        torch.testing.assert_close(model(ids(2, 40), use_cache=True).logits, want, atol=1e-4, rtol=1e-4)
        runtime.detach()
        dense = model.generate(ids(1, 40), max_new_tokens=8, do_sample=False)
        for tokens, same in ((1000, True), (8, False)):
            with Quest(tokens=tokens, page_size=4, dense_layers=()).attach(model) as handle:
                out = model.generate(ids(1, 40), max_new_tokens=8, do_sample=False)
                assert torch.equal(out, dense) or not same
                assert handle.runtime.stats.steps
        assert torch.equal(model(ids(2, 40)).logits, want)


@pytest.mark.parametrize("mode", ["mask", "auto"])
def test_methods_for_neurons_run_inside_its_mlps(mode):
    """What a neuron rule drops is dropped behind the routed gate; the routed maps stay routed."""
    model = mixed(MoHD().apply(tiny_model("llama")))
    mlp, x = model.model.layers[0].mlp, normal(1, 1, WIDTH)
    with torch.no_grad():
        want = model(ids(2, 9)).logits
        routing = mlp.router(x)
        gate = F.silu(mlp.gate_proj(x, routing))
        product = torch.where(gate.abs() > 0.1, gate * mlp.up_proj(x, routing), 0.0)
        for threshold in (0.0, 0.1):
            runtime = MLPRuntime(model, FixedRules([NeuronRule(threshold=torch.tensor(threshold))] * 2), mode)
            if threshold:
                torch.testing.assert_close(mlp(x), mlp.down_proj(product, routing), atol=1e-5, rtol=1e-5)
            else:
                torch.testing.assert_close(model(ids(2, 9)).logits, want, atol=1e-4, rtol=1e-4)
            runtime.detach()
        assert torch.equal(model(ids(2, 9)).logits, want)
    with pytest.raises(ModelError, match="MLP"):
        MLPRuntime(MoHD(reading="neurons").apply(tiny_model("llama")), FixedRules([None, None]))


def test_projections_outside_a_forward_route_what_they_are_given():
    """Methods guess a layer's query from another layer's state."""
    model = MoHD().apply(tiny_model("llama"))
    view, hidden = attention_views(model)[1], normal(2, 5, WIDTH)
    query = view.project_query(hidden, None)
    want = F.linear(view.module.router(hidden).apply(hidden), view.module.q_proj.weight)
    torch.testing.assert_close(query.transpose(1, 2).flatten(2), want, atol=1e-5, rtol=1e-5)


def test_attach_lays_out_and_detach_restores():
    model = mixed(MoHD().apply(tiny_model("llama")))
    before = {name: (tensor.clone(), tensor.stride()) for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        want = model(ids(1, 1)).logits
        with MoHD().attach(model) as handle:
            projection = model.model.layers[0].self_attn.q_proj
            assert projection.weight.stride() == (1, 64)
            torch.testing.assert_close(model(ids(1, 1)).logits, want, atol=1e-5, rtol=1e-5)
            cost = costs(model)
            assert handle.report() == {"active_parameters": cost.active / cost.parameters}
        assert torch.equal(model(ids(1, 1)).logits, want)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name][0])
        assert tensor.stride() == before[name][1]


def test_apply_is_deterministic_and_keeps_the_random_state():
    llama = tiny_model("llama")
    state = torch.get_rng_state()
    one, two, three = (MoHD().apply(llama, seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())
    assert not all(torch.equal(one[name], tensor) for name, tensor in three.items())


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"groups": 0}, "groups"),
        ({"active": 0.0}, "active"),
        ({"active": 1.5}, "active"),
        ({"active": float("nan")}, "active"),
        ({"shared": 0.6}, "shared"),
        ({"shared": -0.1}, "shared"),
        ({"active": 0.01, "shared": 0.0}, "active"),
        ({"scale": "mean"}, "scale"),
        ({"fusion": "butterfly"}, "fusion"),
        ({"reading": "tokens"}, "reading"),
        ({"balance": -1}, "balance"),
        ({"experts": 4}, "experts"),
    ],
)
def test_bad_settings_are_one_line(change, name):
    with pytest.raises(InputError, match=name) as caught:
        make("mohd", **change)
    assert "\n" not in str(caught.value)


def test_models_that_cannot_be_made_are_refused():
    broken = tiny_model("llama")
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    refused = [
        (ModelError, "LlamaForCausalLM", lambda: MoHD().apply(tiny_model("gpt2"))),
        (ModelError, "LlamaForCausalLM", lambda: MoHD().apply(nn.Linear(2, 2))),
        (ModelError, "LlamaForCausalLM", lambda: MoHD().apply(MoHD().apply(tiny_model("llama")))),
        (ModelError, "window", lambda: MoHD().apply(tiny_model("mistral", sliding_window=8))),
        (ModelError, "up_proj", lambda: MoHD().apply(broken)),
        (ModelError, "apply or expand", lambda: MoHD().attach(tiny_model("llama"))),
        (InputError, "groups=24", lambda: MoHD(groups=24).apply(tiny_model("llama"))),
        (InputError, "groups=24", lambda: MoHD(groups=24, reading="neurons").apply(tiny_model("llama"))),
        (InputError, "times", lambda: MoHD().expand(tiny_model("llama"), 0)),
        (InputError, "neurons", lambda: MoHD(reading="neurons").expand(tiny_model("llama"), 2)),
    ]
    for kind, message, act in refused:
        with pytest.raises(kind, match=message) as caught:
            act()
        assert "\n" not in str(caught.value)


def test_layers_refuse_what_does_not_fit():
    router = SubDimRouter(WIDTH, GROUPS)
    for message, act in (
        ("cut into", lambda: SubDimRouter(60, GROUPS)),
        ("width 64", lambda: router(normal(3, 60))),
        ("in side", lambda: MoHDLinear(60, 8, router)),
        ("out side", lambda: MoHDLinear(64, 8, router, "out")),
        ("side='out'", lambda: MoHDLinear(64, 8, router, "in", "monarch")),
        ("routing", lambda: MoHDLinear(8, 64, router, "out")(normal(3, 8))),
    ):
        with pytest.raises(InputError, match=message) as caught:
            act()
        assert "\n" not in str(caught.value)
    for change in ({"active": 0.0}, {"groups": 7}, {"scale": "mean"}, {"fusion": "x"}, {"reading": "x"}):
        with pytest.raises(Exception, match=next(iter(change))):
            MoHDConfig(hidden_size=64, num_attention_heads=4, **change)


def test_it_is_in_the_list():
    row = next(row for row in gossamer.registry.rows() if row["slug"] == "mohd")
    assert (row["status"], row["slot"], row["family"]) == ("available", "activations", "activations")
