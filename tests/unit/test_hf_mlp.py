"""The MLP plug point: every family behind one view, rules that keep what they say, and a detach that leaves no trace."""

import pytest
import torch
import transformers

from gossamer.errors import CalibrationError, InputError, ModelError
from gossamer.hf import ChannelRuntime, FixedRules, MLPRuntime, NeuronPolicy, attention_projections, mlp_views, watch
from gossamer.hf.policy import TEACHER_FORCED
from gossamer.models import tiny_model
from gossamer.patterns import MagnitudeSketch, NeuronRule, exact_quantile

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}


def other(family):
    """Tiny models of families whose MLPs look different."""
    made = {
        "phi": lambda: transformers.PhiConfig(**SMALL),
        "phi3": lambda: transformers.Phi3Config(**SMALL),
        "opt": lambda: transformers.OPTConfig(
            vocab_size=64,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
        ),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL),
    }
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(made[family]()).eval()


FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3", "gpt2"]
OTHERS = ["phi", "phi3", "opt", "gpt_neox"]
IDS = torch.arange(1, 13)[None]


def model_of(family):
    return tiny_model(family) if family in FAMILIES else other(family)


@pytest.mark.parametrize("family", FAMILIES + OTHERS)
def test_view_computes_what_the_module_does(family):
    model = model_of(family)
    views = mlp_views(model)
    assert len(views) == model.config.num_hidden_layers
    view = views[0]
    x = torch.randn(3, view.channels)
    gate, product = view.hidden(x)
    assert gate.shape == product.shape == (3, view.neurons)
    if view.gated:
        assert torch.equal(view.out(product), view.owner(x))
    assert torch.allclose(view.down_norms[1], view.out(torch.eye(view.neurons)[1]).sub(view.out(product * 0)[0]).norm())


@pytest.mark.parametrize("family", FAMILIES + OTHERS)
@pytest.mark.parametrize("mode", ["mask", "auto"])
def test_full_rule_is_dense_and_detach_leaves_no_trace(family, mode):
    model = model_of(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    strides = {name: value.stride() for name, value in model.state_dict().items()}
    with torch.no_grad():
        dense = model(IDS).logits
        views = mlp_views(model)
        run = MLPRuntime(model, FixedRules([NeuronRule(count=v.neurons) for v in views]), mode)
        full = model(IDS).logits
        assert run.report()["neurons_kept"] == 1
        run.detach()
        again = model(IDS).logits
    assert torch.allclose(full, dense, atol=1e-5)
    assert torch.equal(again, dense)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.stride() == strides[name]
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "gemma"])
@pytest.mark.parametrize("rule", ["threshold", "channels", "count", "indices"])
def test_gather_equals_mask(family, rule):
    model = model_of(family)
    views = mlp_views(model)
    size = views[0].neurons
    rules = {
        "threshold": NeuronRule(threshold=torch.tensor(0.05)),
        "channels": NeuronRule(threshold=torch.rand(size, generator=torch.Generator().manual_seed(0)) * 0.1),
        "count": NeuronRule(count=7),
        "indices": NeuronRule(indices=torch.arange(3, size, 5, dtype=torch.int32)),
    }
    policy = FixedRules([rules[rule]] * len(views))
    results, kept, step = {}, {}, IDS[:, -1:]
    for mode in ("mask", "auto"):
        run = MLPRuntime(model, policy, mode)
        with torch.no_grad():
            cache = model(IDS[:, :-1], use_cache=True).past_key_values
            results[mode] = model(step, past_key_values=cache).logits
        kept[mode] = [m.totals for m in run.meters]
        report = run.report()
        run.detach()
    assert torch.allclose(results["mask"], results["auto"], atol=1e-5)
    assert kept["mask"] == kept["auto"]
    assert 0 < report["neurons_kept"] < 1
    assert report["mlp_bytes_read"] < report["mlp_bytes_dense"]


def test_what_is_dropped_has_no_influence():
    model = tiny_model("llama")
    view = mlp_views(model)[0]
    run = MLPRuntime(model, FixedRules([NeuronRule(indices=torch.tensor([0, 1], dtype=torch.int32)), None]), "mask")
    with torch.no_grad():
        before = model(IDS).logits
        view.down.weight[:, 2:] += 1
        assert torch.equal(model(IDS).logits, before)
        view.down.weight[:, :1] += 1
        assert not torch.equal(model(IDS).logits, before)
    run.detach()


def test_prompts_can_be_left_dense_and_watched():
    model = tiny_model("llama")

    class Watching(NeuronPolicy):
        prompt, watches = False, True

        def __init__(self):
            self.seen = []

        def rule(self, layer):
            return NeuronRule(count=0)

        def observe(self, layer, gate, product):
            self.seen.append((layer, product.shape[-2:]))

    with torch.no_grad():
        dense = model(IDS).logits
        policy = Watching()
        run = MLPRuntime(model, policy)
        assert torch.allclose(model(IDS).logits, dense, atol=1e-5)
        assert policy.seen == [(0, (12, 128)), (1, (12, 128))]
        token = TEACHER_FORCED.set(True)  # now the same block stands for decode steps
        assert not torch.allclose(model(IDS).logits, dense, atol=1e-2)
        TEACHER_FORCED.reset(token)
        run.detach()
    assert run.meters[0].totals[1] == [12, 0, 12, 0]


def test_channel_rules_mask_inputs():
    model = tiny_model("llama")
    query, _ = attention_projections(model)[0]
    x = torch.randn(2, 3, 64)
    kept = x.abs() > 0.5
    with torch.no_grad():
        expected = query(torch.where(kept, x, 0))
        run = ChannelRuntime([(query, NeuronRule(threshold=torch.tensor(0.5)))])
        assert torch.allclose(query(x), expected, atol=1e-6)
        assert torch.allclose(query(x[:1, :1]), expected[:1, :1], atol=1e-6)
        assert run.meters[0].totals[0][1] == kept.sum()
        with pytest.raises(ModelError, match="already under a rule"):
            ChannelRuntime([(query, NeuronRule(count=1))])
        run.detach()
        assert not torch.allclose(query(x), expected, atol=1e-3)
    assert query.weight.is_contiguous()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_taps_see_what_the_mlp_computes(family):
    model = tiny_model(family)
    seen = {}
    places = ["mlp.gate", "mlp.product", "mlp.input", "mlp.output"]
    if family == "llama":
        places += ["mlp.up", "attention.input", "attention.output"]
    watch(model, IDS, {p: lambda layer, values, p=p: seen.setdefault((p, layer), values.clone()) for p in places})
    view = mlp_views(model)[0]
    gate, product = view.hidden(seen["mlp.input", 0])
    assert torch.allclose(gate, seen["mlp.gate", 0], atol=1e-5)
    assert torch.allclose(product, seen["mlp.product", 0], atol=1e-5)
    assert torch.allclose(view.out(product), seen["mlp.output", 0], atol=1e-5)
    if family == "llama":
        assert torch.allclose(seen["mlp.gate", 0] * seen["mlp.up", 0], product, atol=1e-5)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    with pytest.raises(CalibrationError, match=r"blocks \[blocks, block\]"):
        watch(model, IDS[0], {"mlp.gate": lambda layer, values: None})


def test_bad_input_is_one_clear_line():
    with pytest.raises(ModelError, match="no MLP with known names"):
        mlp_views(torch.nn.Linear(2, 2))
    model = tiny_model("llama")
    policy = FixedRules([NeuronRule(count=1)] * 2)
    run = MLPRuntime(model, policy)
    with pytest.raises(ModelError, match="already under a policy"):
        MLPRuntime(model, policy)
    run.detach()
    with pytest.raises(InputError, match="int8"):
        MLPRuntime(model, policy, "mask", int8=True)
    for bad in (
        {},
        {"count": 1, "threshold": torch.tensor(1.0)},
        {"count": -1},
        {"threshold": torch.tensor(-1.0)},
        {"threshold": torch.tensor(float("nan"))},
        {"indices": torch.tensor([2, 1], dtype=torch.int32)},
        {"indices": torch.tensor([1, 2])},
    ):
        with pytest.raises(InputError):
            NeuronRule(**bad)


def test_sketch_is_the_exact_quantile_up_to_a_bin():
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 3
    sketch = MagnitudeSketch()
    for part in values.split(700):
        sketch.add(part)
    for share in (0.001, 0.25, 0.5, 0.9, 1.0):
        exact, found = exact_quantile(values, share), sketch.quantile(share)
        assert exact <= found <= exact * (1 + 2**-11)
        assert float((values.abs() <= exact).float().mean()) == pytest.approx(share, abs=1 / 5000)
    assert sketch.quantile(0) == 0
    with pytest.raises(CalibrationError, match="not finite"):
        sketch.add(torch.tensor([float("inf")]))
