"""The map of kept neurons: the method's own masks, whatever the method, and nothing left behind."""

import pytest
import torch

from gossamer.activations import ActivationHandle
from gossamer.errors import InputError
from gossamer.hf import ChannelRuntime, FixedRules, MLPRuntime, NeuronPolicy, attention_projections, mlp_views
from gossamer.measure.neuron_map import neuron_map
from gossamer.models import tiny_model
from gossamer.patterns import NeuronRule

TOKENS = torch.arange(1, 41)


def attached(model, rules, mode="auto", prompt=True):
    return ActivationHandle(mlp=MLPRuntime(model, FixedRules(rules, prompt), mode))


def hidden(model, layer):
    """(gate, product) of a layer on the dense model."""
    view, caught = mlp_views(model)[layer], []
    target = view.owner if view.gated else view.up
    hook = target.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        model(TOKENS[None])
        hook.remove()
        return [part[0] for part in view.hidden(caught[0])]


@pytest.mark.parametrize("mode", ["mask", "auto"])
@pytest.mark.parametrize("on", ["gate", "product"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_map_is_the_mask(family, on, mode):
    model = tiny_model(family)
    a = hidden(model, 0)[0 if on == "gate" else 1].abs()
    threshold = a.median()
    want = (a > threshold).float()
    handle = attached(model, [NeuronRule(threshold=threshold, on=on), None], mode)
    seen = neuron_map(model, handle, TOKENS)
    torch.testing.assert_close(seen.share[0], want.mean(1))
    torch.testing.assert_close(seen.frequency[0], want.mean(0))
    assert torch.equal(seen.share[1], torch.ones(40))
    assert torch.equal(seen.frequency[1], torch.ones(128))
    assert seen.kept.tolist() == pytest.approx([float(want.mean()), 1.0])
    assert seen.names == tuple(view.name for view in mlp_views(model))
    assert all(meter.watch is None for meter in handle.mlp.meters)


def test_a_rule_for_decode_steps_is_seen_too():
    model = tiny_model("llama")
    handle = attached(model, [NeuronRule(count=8), NeuronRule(count=32)], prompt=False)
    with torch.no_grad():
        before = model(TOKENS[None]).logits
    seen = neuron_map(model, handle, TOKENS, prompt=16)
    assert seen.share.shape == (2, 24)
    assert seen.kept.tolist() == pytest.approx([8 / 128, 32 / 128])
    with torch.no_grad():
        assert torch.equal(model(TOKENS[None]).logits, before)


def test_a_policy_that_learns_from_the_prompt():
    class Busiest(NeuronPolicy):
        """Keeps the neurons that the prompt used most."""

        prompt, watches = False, True

        def __init__(self):
            self.rules = {}

        def rule(self, layer):
            return self.rules.get(layer)

        def observe(self, layer, gate, product):
            best = product.abs().flatten(0, -2).sum(0).topk(20).indices.sort().values
            self.rules[layer] = NeuronRule(indices=best.int())

    model, policy = tiny_model("llama"), Busiest()
    seen = neuron_map(model, ActivationHandle(mlp=MLPRuntime(model, policy)), TOKENS, prompt=20)
    for layer in range(2):
        want = torch.zeros(128)
        want[policy.rules[layer].indices.long()] = 1
        assert torch.equal(seen.frequency[layer], want)


def test_channels_of_other_layers():
    model = tiny_model("llama")
    (query, output), *_ = attention_projections(model)
    rules = [(query, NeuronRule(count=10)), (output, NeuronRule(threshold=torch.tensor(0.0)))]
    handle = ActivationHandle(channels=ChannelRuntime(rules))
    seen = neuron_map(model, handle, TOKENS, part="channels")
    assert seen.names == ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj")
    assert seen.kept.tolist() == pytest.approx([10 / 64, 1.0])
    assert [len(f) for f in seen.frequency] == [64, 64]


def test_sorted_curves_have_one_length():
    model = tiny_model("llama")
    model.model.layers[1].mlp = type(model.model.layers[1].mlp)(tiny_model("llama", intermediate_size=96).config)
    seen = neuron_map(model, attached(model, [NeuronRule(count=8)] * 2), TOKENS)
    curves = seen.sorted_frequency(10)
    assert curves.shape == (2, 10)
    assert bool((curves.diff(dim=1) <= 0).all())
    for curve, frequency in zip(curves, seen.frequency, strict=True):
        assert curve[0] == frequency.max()
        assert curve[-1] == frequency.min()
    with pytest.raises(InputError, match="two points"):
        seen.sorted_frequency(1)


def test_bad_input_is_one_line():
    model = tiny_model("llama")
    handle = attached(model, [NeuronRule(count=8)] * 2)
    for tokens, prompt, part, message in (
        (TOKENS, 0, "channels", "no channels"),
        (TOKENS[:8], 0, "mlp", "at least 9"),
        (TOKENS, 35, "mlp", "at least 9"),
        (TOKENS, -1, "mlp", "at least 9"),
        (TOKENS[None], 0, "mlp", "at least 9"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            neuron_map(model, handle, tokens, prompt, part)
        assert "\n" not in str(caught.value)
