"""PAT: schedules, mask, losses and modules, and the cut of the residual stream to a plain narrower model."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from gossamer.errors import InputError, ModelError
from gossamer.hf import cut_hidden, writers
from gossamer.models import LoRA, tiny_model
from gossamer.registry import make
from gossamer.weights.pat import TARGETS
from gossamer.weights.pat_tuning import (
    HSM,
    PATTuning,
    active_loss,
    count_error,
    fixed_mask,
    hard_mask,
    identity_loss,
    offset,
    soft_mask,
    temperature,
)

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3")
TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def wide_norms(model):
    """Norms in float64 throughout: those of transformers compute in float32, whatever the model's dtype."""
    for module in model.modules():
        if not type(module).__name__.endswith("RMSNorm"):
            continue
        eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
        shift = float("Gemma" in type(module).__name__)

        def forward(x, module=module, eps=eps, shift=shift):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (shift + module.weight)

        module.forward = forward
    return model


def lively(family, dtype=torch.float64, seed=0, **more):
    """A model whose gains, biases and ε are not those of a fresh one."""
    model = tiny_model(family, seed, rms_norm_eps=1e-2, **more).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=dtype))
    return model


def shaken(model, keep=0.75, seed=0, lora=True, **settings):
    """Modules on the model as training could leave them."""
    tuning = PATTuning(model, keep, 4, LoRA(3, 6, 0.0, TARGETS) if lora else None, steps=30, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _name, p in tuning.named_parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator).to(p.dtype))
        if tuning.gate == "unified":
            order = torch.randperm(tuning.width, generator=generator)
            tuning.proxy.fill_(0.4)
            tuning.proxy[order[tuning.keep :]] = -0.3
    return tuning


# --- check 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["code", "paper"])
def test_at_step_0_the_model_is_the_base_model(family, variant):
    model = tiny_model(family)
    wanted = logits(model)
    tuning = PATTuning(model, lora=LoRA(4, 4, 0.5, TARGETS), variant=variant)
    assert torch.allclose(logits(model.train()), wanted, atol=1e-5, rtol=1e-5)
    tuning.detach()
    tuning.detach()
    assert torch.equal(logits(model.eval()), wanted)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_bfloat16_models_keep_their_dtype_and_the_modules_theirs():
    model = tiny_model("llama").to(torch.bfloat16)
    wanted = logits(model)
    tuning = PATTuning(model, lora=None)
    assert torch.equal(logits(model.train()), wanted)
    assert {p.dtype for p in tuning.parameters()} == {torch.float32}


# --- check 2


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 400), st.integers(5, 300), st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=6))
def test_the_mask_lies_between_its_offset_and_one_above(step, milestone, proxies):
    m = torch.tensor(proxies)
    mask, low = soft_mask(m, step, milestone), offset(step, milestone)
    assert bool((mask >= low - 1e-6).all())
    assert bool((mask <= 1 + low + 1e-6).all())
    assert set(hard_mask(m).tolist()) <= {0.0, 1.0}
    clear = m.abs() > 1e-5  # 10⁶ times less is no clear vote
    assert torch.equal(hard_mask(m)[clear], (m[clear] > 0).float())
    assert torch.equal(soft_mask(torch.zeros(3), 0, milestone), torch.ones(3))


def test_schedules():
    for milestone in (10, 300, 10_000):
        taus = [temperature(s, milestone) for s in range(milestone + 2)]
        assert taus[0] == taus[1] == pytest.approx(1, abs=2e-6)
        assert all(a <= b for a, b in itertools.pairwise(taus))
        assert taus[milestone] == 1e6
        assert offset(milestone / 2, milestone) == offset(milestone, milestone) == 0
        assert offset(0, milestone) == 0.5
    assert float(hard_mask(torch.zeros(1))) == 0  # a half rounds to zero: m = 0 is pruned


def test_the_task_moves_the_mask_until_it_is_held():
    m = torch.tensor([0.1, -0.1], requires_grad=True)
    soft_mask(m, 79, 100).sum().backward()
    assert bool((m.grad > 0).all())
    assert not soft_mask(m, 80, 100).requires_grad
    assert soft_mask(m, 10, 100, "paper").requires_grad
    assert soft_mask(m, 99, 100, "paper").requires_grad
    assert torch.equal(soft_mask(m, 80, 100), soft_mask(m, 500, 100))  # τ is held


def test_the_fixed_mask_fades_as_in_the_released_code():
    assert fixed_mask(4, 3, 0, 100).tolist() == [1, 1, 1, 1]
    assert float(fixed_mask(4, 3, 50, 100)[3]) == pytest.approx(math.exp(-2.77 / 2))
    assert float(fixed_mask(4, 3, 150, 100)[3]) == pytest.approx(math.exp(-2.77) * math.exp(-2.77))
    tuning = PATTuning(tiny_model("llama"), 0.5, lora=None, gate="fixed")
    assert tuning.mask().tolist() == [1.0] * 32 + [0.0] * 32
    tuning.step(3)
    assert 0 < float(tuning.mask(hard=False)[40]) < 1
    assert float(tuning.loss()) == pytest.approx(
        float(sum(identity_loss(h.first, h.second) for h in tuning.hsms)), rel=1e-6
    )


# --- check 3


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_channels_are_zero_all_along_the_stream_and_behind_every_norm(family):
    model = lively(family, torch.float32)
    tuning = shaken(model)
    closed = tuning.mask() == 0
    seen = []

    def look(module, args, out):
        seen.append((args[0], out[0] if isinstance(out, tuple) else out))

    for name, module in model.named_modules():
        along = type(module).__name__.endswith("RMSNorm") and name.rpartition(".")[2] not in ("q_norm", "k_norm")
        if along or type(module).__name__.endswith("DecoderLayer"):
            module.register_forward_hook(look)
    logits(model)
    assert len(seen) >= 3 * model.config.num_hidden_layers
    for pair in seen:
        for states in pair:
            assert not states[..., closed].any()
            assert bool(states[..., ~closed].any())


# --- checks 4, 5, 7


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["code", "paper"])
def test_the_merged_model_is_the_masked_one(family, variant, tmp_path):
    more = {"attention_bias": True} if family in ("llama", "qwen3") else {}
    model = wide_norms(lively(family, **more))
    tuning = shaken(model, variant=variant)
    masked = logits(model)
    small = tuning.merge()
    assert small.config.hidden_size == tuning.keep == len(tuning.kept())
    narrow = logits(wide_norms(copy.deepcopy(small)))
    assert torch.allclose(narrow, masked, atol=1e-6, rtol=1e-6)
    assert float(narrow.std()) > 0.01
    small.float().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert torch.allclose(logits(loaded).double(), masked, atol=2e-3, rtol=2e-3)
    assert loaded.generate(TOKENS[:1], max_new_tokens=3).shape == (1, TOKENS.shape[1] + 3)


def test_without_the_scaled_epsilon_the_merge_is_only_close():
    model = wide_norms(lively("llama"))
    tuning = shaken(model)
    masked, small = logits(model), tuning.merge()
    exact = (logits(wide_norms(copy.deepcopy(small))) - masked).abs().max()
    for module in small.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-2
    assert float((logits(wide_norms(small)) - masked).abs().max()) > 100 * float(exact)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_with_every_channel_open_the_merge_is_base_plus_adapters_plus_modules(family):
    model = wide_norms(lively(family))
    tuning = shaken(model, keep=1.0)
    masked = logits(model)
    base = model.model.layers[0].self_attn.o_proj.parametrizations.weight.original.detach().clone()
    low = model.model.layers[0].self_attn.o_proj.parametrizations.weight[0]
    wanted = tuning.hsms[1].matrix() @ (base + low.scale * low.b @ low.a)
    small = tuning.merge()
    assert small.config.hidden_size == model.config.hidden_size
    assert torch.allclose(small.model.layers[0].self_attn.o_proj.weight, wanted)
    assert torch.allclose(logits(wide_norms(small)), masked, atol=1e-6)


def test_sizes_follow_the_formula():
    model = tiny_model("llama", tie_word_embeddings=True)
    d, k, n, v, layers = 64, 40, 128, 256, 2
    heads, kv = 4 * 16, 2 * 16
    small = cut_hidden(model, torch.arange(k))
    per_layer = k * (heads + 2 * kv) + heads * k + 3 * k * n + 2 * k
    assert sum(p.numel() for p in small.parameters()) == 2 * v * k + layers * per_layer + k
    assert small.lm_head.weight.shape == (v, k)
    assert small.lm_head.weight.data_ptr() != small.model.embed_tokens.weight.data_ptr()
    assert model.lm_head.weight is model.model.embed_tokens.weight  # the old one stays as it is
    assert torch.equal(small.lm_head.weight, model.lm_head.weight[:, :k])
    assert small.config.head_dim == 16
    assert not small.config.tie_word_embeddings
    assert model.config.hidden_size == d
    shapes = {
        n.rpartition(".")[0].rpartition(".")[2]: tuple(p.shape) for n, p in small.model.layers[0].named_parameters()
    }
    assert shapes == {
        **{"q_proj": (heads, k), "k_proj": (kv, k), "v_proj": (kv, k), "o_proj": (k, heads)},
        **{"gate_proj": (n, k), "up_proj": (n, k), "down_proj": (k, n)},
        **{"input_layernorm": (k,), "post_attention_layernorm": (k,)},
    }


def test_the_scale_is_folded():
    """The released merge forgets g; with g ≠ 1 that shows."""
    model = lively("llama")
    tuning = PATTuning(model, 0.75, 4, None)
    with torch.no_grad():
        tuning.proxy.copy_(torch.arange(64.0) - 15.5)
        for hsm in tuning.hsms:
            hsm.scale.uniform_(2, 3)
    masked = logits(model)
    assert torch.allclose(logits(tuning.merge()), masked, atol=1e-4, rtol=1e-4)


# --- checks 6 and 8


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(4, 8), st.integers(0, 1000))
def test_the_identity_loss_is_zero_only_for_orthonormal_rows(rank, width, seed):
    torch.manual_seed(seed)
    rows = torch.linalg.qr(torch.randn(width, rank, dtype=torch.float64)).Q.T
    second = rows.T
    for variant in ("code", "paper"):
        assert float(identity_loss(rows, second, variant)) < 1e-12
        assert float(identity_loss(rows * 1.1, second, variant)) > 1e-4
    assert float(identity_loss(rows, torch.zeros_like(second), "paper")) == pytest.approx(math.sqrt(rank))
    gap = (rows * 2) @ (rows * 2).T - torch.eye(rank)
    assert float(identity_loss(rows * 2, second)) == pytest.approx(float(gap.square().sum()) / rank**2)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=12), st.data())
def test_the_count_is_zero_at_the_target_and_pushes_every_proxy_alike(values, data):
    keep = data.draw(st.integers(1, len(values)))
    for variant, push in (("code", 10 / keep), ("paper", 1.0)):
        m = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        found = int((m >= 0).sum() if variant == "code" else (m > 0).sum())
        error = count_error(m, keep, variant)
        assert float(error.detach()) == pytest.approx(push * abs(found - keep))
        error.backward()
        sign = (found > keep) - (found < keep)
        assert torch.allclose(m.grad, torch.full_like(m, sign * push))


def test_nothing_open_or_nothing_closed_makes_no_nan():
    for m in (torch.zeros(4), torch.ones(4), -torch.ones(4)):
        m = m.requires_grad_()
        loss = active_loss(m, 2)
        loss.backward()
        assert bool(loss.isfinite())
        assert bool(m.grad.isfinite().all())
    assert float(active_loss(torch.tensor([0.5, 0.7, -0.4, -0.5]), 2)) == pytest.approx(0.02 + 0.005)


def test_the_losses_of_all_modules_count():
    tuning = PATTuning(tiny_model("llama"), lora=None)
    tuning.loss().backward()
    assert len(tuning.hsms) == 5
    assert all(bool(hsm.first.grad.any()) for hsm in tuning.hsms)
    assert bool((tuning.proxy.grad > 0).all())  # too many open: all are pushed down


def test_a_module_by_hand():
    hsm = HSM(3, 1, "code", torch.Generator())
    with torch.no_grad():
        hsm.first.copy_(torch.tensor([[1.0, 2.0, 0.0]]))
        hsm.second.copy_(torch.tensor([[0.0], [1.0], [-1.0]]))
        hsm.scale.copy_(torch.tensor([1.0, 2.0, 3.0]))
        out = hsm(torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([1.0, 1.0, 0.0]))
    assert out.tolist() == [[1.0, 8.0, 0.0]]
    assert torch.equal(hsm.matrix() @ torch.ones(3, dtype=torch.float64), torch.tensor([1.0, 8.0, -6.0]).double())
    bound = 1 / math.sqrt(300)
    fresh = HSM(300, 20, "code", torch.Generator().manual_seed(0)).first
    assert 0.98 * bound < float(fresh.detach().abs().max()) <= bound


# --- the method, and errors


@pytest.mark.parametrize("gate", ["unified", "fixed"])
def test_the_method_tunes_and_merges(gate):
    text = torch.arange(96).repeat(4, 1) + torch.arange(4)[:, None]
    method = make("pat", keep=0.5, steps=60, lr=0.02, gate=gate, lora_rank=2)
    seen = []
    applied = method.apply(tiny_model("llama"), text, lambda what, done, total: seen.append(what))
    size = applied.facts["hidden_size"]
    assert size["before"] == 64
    assert size["target"] == 32
    assert size["after"] == applied.model.config.hidden_size
    assert abs(size["after"] - 32) <= (0 if gate == "fixed" else 3)
    assert applied.facts["parameters"]["after"] == sum(p.numel() for p in applied.model.parameters())
    assert applied.facts["curve"][-1]["loss"] < applied.facts["curve"][0]["loss"]
    assert len(applied.facts["open"]) == 60
    assert applied.facts["open"][-1] == size["after"]
    assert {"training", "merging"} == set(seen)
    if gate == "fixed":
        again = method.apply(tiny_model("llama"), text)
        assert torch.equal(logits(applied.model), logits(again.model))


def test_a_share_of_the_parameters_is_a_share_of_the_hidden_size():
    method = type(make("pat")).with_kept(0.5, tiny_model("llama"))
    assert method.attach_tuning(tiny_model("llama")).keep == 32


@pytest.mark.slow
def test_the_real_model_is_cut_exactly(smollm2):
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    tokens = tokenizer("The residual stream is cut to three quarters of its channels.", return_tensors="pt").input_ids
    tuning = PATTuning(model, 0.75, lora=None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        tuning.proxy.copy_(torch.randperm(576, generator=generator) - 143.5)
        for hsm in tuning.hsms:
            hsm.second.normal_(std=0.02, generator=generator)
    masked = logits(model, tokens)
    small = tuning.merge()
    assert small.config.hidden_size == 432
    assert float((logits(small, tokens) - masked).abs().max()) < 1e-3 * float(masked.abs().max())


@pytest.mark.parametrize(
    "wrong", [{"keep": 0.0}, {"keep": 1.5}, {"steps": 1}, {"variant": "x"}, {"gate": "x"}, {"lr": -1}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match="pat"):
        make("pat", **wrong)


def test_bad_input_is_named_in_one_line():
    with pytest.raises(ModelError, match="LayerNorm"):
        PATTuning(tiny_model("gpt2"))
    with pytest.raises(ModelError, match="not supported"):
        writers(nn.Linear(2, 2))
    with pytest.raises(InputError, match="token blocks"):
        make("pat").apply(tiny_model("llama"))
    model = tiny_model("llama")
    for wrong in ({"keep": 0}, {"keep": 65}, {"hsm_rank": 0}, {"milestone": 1}):
        with pytest.raises(InputError, match="PAT"):
            PATTuning(model, **wrong)
    tuning = PATTuning(model, lora=LoRA(2, 2, 0.0, TARGETS))
    with pytest.raises(InputError, match="kept no channel"):
        tuning.merge()
    tuning.detach()
    with torch.no_grad():
        model.model.norm.weight[0] = math.inf
    with pytest.raises(ModelError, match="not finite"):
        PATTuning(model)
    broken = tiny_model("llama")
    with pytest.raises(InputError, match="not finite"):
        make("pat", steps=4, lr=1e30, clip=0, warmup=0).apply(broken, TOKENS)
    assert not any(m._forward_hooks for m in broken.modules())
