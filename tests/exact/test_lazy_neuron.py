"""Lazy Neuron: the card's exact checks, by hand or by a second implementation."""

import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import gossamer
from gossamer.activations.lazy_neuron import (
    CONFIG_NAME,
    LazyNeuron,
    TopKRule,
    activation_stats,
    approximate_topk_mask,
    bucket_count,
    keep_topk,
    percent_nonzero,
    topk_mask,
    topk_mlp,
)
from gossamer.data.images import corrupt_labels
from gossamer.errors import InputError, ModelError
from gossamer.hf import mlp_views
from gossamer.models import tiny_model
from gossamer.models.vit import SmallViT, small_vit

IDS = torch.arange(1, 25).view(2, 12)


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="relu"
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def opt():
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    return transformers.OPTForCausalLM(config).eval()


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act="relu",
    )
    return transformers.BertModel(config).eval()


MODELS = {
    "gpt2": lambda: tiny_model("gpt2", activation_function="relu"),
    "llama": lambda: tiny_model("llama", hidden_act="relu"),
    "opt": opt,
    "t5": t5,
    "bert": bert,
    "vit": small_vit,
}


def run(model):
    if isinstance(model, SmallViT):
        return model(torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))).logits
    if model.config.is_encoder_decoder:
        return model(input_ids=IDS, decoder_input_ids=IDS).logits
    out = model(IDS)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def outputs_and_gradients(model):
    model.zero_grad()
    out = run(model)
    out.square().mean().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# 1. k = d_ff


@pytest.mark.parametrize("mode", ["mask", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_full_k_is_the_dense_mlp_with_the_same_gradients(name, mode):
    model = MODELS[name]()
    width = mlp_views(model)[0].neurons
    dense, gradients = outputs_and_gradients(model)
    with LazyNeuron(k=width, mode=mode).attach(model):
        full, same = outputs_and_gradients(model)
    assert gradients.keys() == same.keys()
    # Laid out by input, a matrix is multiplied in another order.
    if mode == "mask":
        assert torch.equal(full, dense)
        assert all(torch.equal(same[key], value) for key, value in gradients.items())
    else:
        torch.testing.assert_close(full, dense)
        torch.testing.assert_close(same, gradients)


def test_full_k_returns_what_it_was_given():
    a = torch.randn(5, 7)
    assert torch.equal(keep_topk(a, 7), a)
    assert torch.equal(keep_topk(a, 7, recall=0.5), a)


# 2. nnz ≤ k;  3. kept values unchanged, the least of them at least the largest dropped


@given(
    st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=40).map(lambda row: torch.tensor(row).relu()),
    st.integers(1, 45),
    st.sampled_from([None, 0.5, 0.95]),
)
@settings(deadline=None, max_examples=200)
def test_at_most_k_and_the_largest(a, k, recall):
    k = min(k, len(a))
    kept = keep_topk(a, k, recall)
    assert int((kept != 0).sum()) <= k
    assert torch.equal(kept[kept != 0], a[kept != 0])
    dropped = a[(kept == 0) & (a > 0)]
    if len(dropped) and recall is None:
        assert kept[kept != 0].min() >= dropped.max()


@pytest.mark.parametrize("recall", [None, 0.9])
@pytest.mark.parametrize("name", MODELS)
def test_every_second_matrix_reads_at_most_k(name, recall, monkeypatch):
    model, seen = MODELS[name](), []
    views = mlp_views(model)
    matrix = type(views[0].down)
    forward = matrix.forward

    def spied(self, x):
        seen.append(x)
        return forward(self, x)

    monkeypatch.setattr(matrix, "forward", spied)
    with LazyNeuron(k=5, recall=recall, mode="mask").attach(model) as handle, torch.no_grad():
        run(model)
        report = handle.report()
    counts = [int((x != 0).sum(-1).max()) for x in seen if x.shape[-1] == views[0].neurons]
    assert len(counts) == len(views)
    assert max(counts) == 5
    assert 0 < report["neurons_kept"] <= 5 / views[0].neurons


# 4. the gradient of what is dropped


@pytest.mark.parametrize("recall", [None, 0.9])
def test_no_gradient_reaches_dropped_pre_activations(recall):
    z = torch.randn(6, 32, requires_grad=True)
    a = z.relu()
    kept = keep_topk(a, 4, recall)
    weights = torch.randn(6, 32)
    (kept * weights).sum().backward()
    on = kept.detach() != 0
    assert torch.equal(z.grad[~on], torch.zeros(int((~on).sum())))
    assert torch.equal(z.grad[on], weights[on])


def test_no_gradient_reaches_dropped_neurons_of_a_model():
    model = small_vit(num_hidden_layers=1)
    fc1 = model.layers[0].mlp.fc1
    fired = []
    with topk_mlp(model, 3), torch.no_grad():
        hook = fc1.register_forward_hook(lambda m, args, out: fired.append(topk_mask(out.relu(), 3) & (out > 0)))
        images = torch.rand(1, 1, 8, 8)
        model(images)
        hook.remove()
        with torch.enable_grad():
            model(images).logits.square().sum().backward()
    used = fired[0].flatten(0, -2).any(0)
    assert 3 <= int(used.sum()) < 256
    assert torch.equal(fc1.bias.grad[~used], torch.zeros(int((~used).sum())))
    assert bool((fc1.bias.grad[used] != 0).all())


# 5. Σ over kept neurons


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_sum_over_kept_neurons_is_the_product(name):
    model = MODELS[name]()
    view = mlp_views(model)[0]
    x = torch.randn(3, view.channels, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        gate, product = view.hidden(x)
        vectors = view.out(torch.eye(view.neurons)) - view.out(torch.zeros(1, view.neurons))
        bias = view.out(torch.zeros(1, view.neurons))[0]
        for row in range(3):
            best = sorted(range(view.neurons), key=lambda i: -gate[row, i].item())[:6]
            by_hand = bias + sum(product[row, i] * vectors[i] for i in best)
            for mode in ("mask", "auto"):  # auto: the kernel that reads rows of kept neurons only
                with LazyNeuron(k=6, mode=mode).attach(model):
                    # The MLP itself, or in a family without a module for it its two ends.
                    out = view.owner(x[row : row + 1]) if name != "opt" else view.out(view.hidden(x[row : row + 1])[1])
                torch.testing.assert_close(out[0], by_hand, atol=1e-5, rtol=1e-5)


# 8. the measure


def test_percent_nonzero_at_the_ends_and_at_random():
    positive = torch.rand(50, 20) + 0.1
    assert percent_nonzero(positive.relu()) == 100
    assert percent_nonzero((-positive).relu()) == 0
    for model in (tiny_model("gpt2", activation_function="relu", initializer_range=0.02), small_vit()):
        loader = [torch.rand(8, 1, 8, 8)] if isinstance(model, SmallViT) else [torch.randint(256, (4, 64))]
        assert all(40 < percent < 60 for percent in activation_stats(model, loader).percents)


@pytest.mark.parametrize("sign", [1, -1])
def test_stats_of_a_model_whose_neurons_all_or_never_fire(sign):
    model = tiny_model("gpt2", activation_function="relu")
    for view in mlp_views(model):
        view.up.bias.data.fill_(sign * 1000.0)
    stats = activation_stats(model, [IDS])
    assert stats.percents == [100.0 if sign > 0 else 0.0] * 2
    assert [layer.dead for layer in stats.layers] == [0 if sign > 0 else 128] * 2


@pytest.mark.parametrize("name", MODELS)
def test_stats_count_what_the_formula_counts(name):
    model = MODELS[name]()
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    stats = activation_stats(model, [images if name == "vit" else IDS])
    assert [layer.name for layer in stats.layers] == [view.name for view in mlp_views(model)]
    seen = {}
    hooks = [
        view.gate.register_forward_hook(lambda m, a, out, name=view.name: seen.update({name: out.detach().relu()}))
        for view in mlp_views(model)
    ]
    with torch.no_grad():
        run(model)
    for hook in hooks:
        hook.remove()
    for layer in stats.layers:
        a = seen[layer.name].flatten(0, -2)
        assert layer.tokens == len(a)
        assert layer.percent == pytest.approx(percent_nonzero(a))
        assert layer.count == pytest.approx(float((a > 0).sum(1).double().mean()))
        assert torch.equal(layer.fired, (a > 0).sum(0))
        assert layer.frequencies[0] >= layer.frequencies[-1]
        assert layer.share_over(20) == pytest.approx(float(((a > 0).sum(1) > 20).double().mean()))


def test_stats_pool_a_loader_and_leave_padding_out():
    model = tiny_model("gpt2", activation_function="relu").train()
    whole = activation_stats(model, [IDS])
    parts = activation_stats(model, [IDS[:1], {"input_ids": IDS[1:]}])
    assert model.training
    padded = torch.cat([IDS, torch.zeros(2, 5, dtype=torch.int64)], 1)
    mask = (torch.arange(17) < 12).long().expand(2, -1)
    masked = activation_stats(model, [{"input_ids": padded, "attention_mask": mask}])
    unmasked = activation_stats(model, [padded])
    for one, two, three, four in zip(whole.layers, parts.layers, masked.layers, unmasked.layers, strict=True):
        assert one.tokens == two.tokens == three.tokens == 24
        assert four.tokens == 34
        assert torch.equal(one.fired, two.fired)
        assert torch.equal(one.fired, three.fired)
        assert torch.equal(one.histogram, three.histogram)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert whole.summary()[0]["frequency_max"] == float(whole.layers[0].frequencies[0])


def test_stats_of_an_encoder_and_a_decoder_go_by_their_own_masks():
    model = t5()
    batch = {
        "input_ids": IDS,
        "attention_mask": (torch.arange(12) < 9).long().expand(2, -1),
        "decoder_input_ids": IDS[:, :6],
        "decoder_attention_mask": (torch.arange(6) < 4).long().expand(2, -1),
    }
    stats = activation_stats(model, [batch])
    assert {layer.name.split(".")[0]: layer.tokens for layer in stats.layers} == {"encoder": 18, "decoder": 8}


def test_stats_see_what_fires_before_the_cap():
    model = tiny_model("gpt2", activation_function="relu")
    with LazyNeuron(k=2).attach(model):
        capped = activation_stats(model, [IDS])
    assert min(capped.percents) > 100 * 2 / 128


# 9. approximate top-k


@pytest.mark.parametrize(("neurons", "k"), [(4096, 16), (4096, 64), (1000, 8), (300, 1)])
@pytest.mark.parametrize("recall", [0.8, 0.95])
def test_approximate_topk_finds_its_share(neurons, k, recall):
    a = torch.randn(400, neurons, generator=torch.Generator().manual_seed(k)).relu()
    found = approximate_topk_mask(a, k, recall)
    assert bool((found.sum(-1) == k).all())
    share = (found & topk_mask(a, k)).sum(-1).double() / k
    assert float(share.mean()) >= recall
    if k >= 16 and recall == 0.8:
        assert float(share.mean()) < 1  # it is approximate
    # A top entry survives if none of the larger ones is among the others of its bucket.
    size = -(-neurons // bucket_count(neurons, k, recall))
    survives = [math.prod(1 - rank / (neurons - 1 - i) for i in range(size - 1)) for rank in range(k)]
    if neurons % size == 0:
        error = float(share.std()) / math.sqrt(len(share))
        assert float(share.mean()) == pytest.approx(sum(survives) / k, abs=4 * error + 1e-9)
    assert sum(survives) / k >= recall


def test_approximate_topk_by_hand():
    a = torch.tensor([1.0, 2.0, 3.0, 8.0, 0.0, 4.0, 0.5, 7.0, 9.0, 3.5])
    assert bucket_count(10, 2, 0.75) == 5
    mask = approximate_topk_mask(a, 2, 0.75)  # buckets 0 5 | 1 6 | 2 7 | 3 8 | 4 9: 4, 2, 7, 9, 3.5
    assert mask.nonzero().flatten().tolist() == [7, 8]  # 8.0, in the bucket of 9.0, is lost
    assert topk_mask(a, 2).nonzero().flatten().tolist() == [3, 8]


# 7. label noise


@pytest.mark.parametrize("p", [0.4, 0.8])
@pytest.mark.parametrize("classes", [2, 10])
def test_label_noise_changes_the_share_it_should(p, classes):
    count = 20_000
    labels = torch.randint(classes, (count,), generator=torch.Generator().manual_seed(5))
    rate = float((corrupt_labels(labels, p, classes, seed=3) != labels).double().mean())
    expected = p * (1 - 1 / classes)
    assert abs(rate - expected) < 3 * math.sqrt(expected * (1 - expected) / count)


# the method


@pytest.mark.parametrize("mode", ["mask", "auto"])
def test_decoding_is_the_same_as_reading_at_once(mode):
    model = tiny_model("gpt2", activation_function="relu")
    with torch.no_grad(), LazyNeuron(k=6, mode=mode).attach(model) as handle:
        whole = model(IDS).logits
        cache = model(IDS[:, :-1], use_cache=True).past_key_values
        last = model(IDS[:, -1:], past_key_values=cache).logits
        report = handle.report()
    torch.testing.assert_close(last[:, 0], whole[:, -1], atol=1e-4, rtol=1e-4)
    assert report["neurons_kept"] == pytest.approx(6 / 128)  # of the two rows decoded
    assert report["mlp_bytes_read"] < report["mlp_bytes_dense"]


@pytest.mark.parametrize("name", MODELS)
def test_detaching_restores_every_bit(name):
    model = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = model.config.to_dict()
    with torch.no_grad():
        dense = run(model)
        handle = LazyNeuron(k=2).attach(model)
        assert not torch.equal(run(model), dense)
        handle.detach()
        assert torch.equal(run(model), dense)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.config.to_dict() == config


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_checkpoints_carry_their_k(name, tmp_path):
    model = MODELS[name]()
    with topk_mlp(model, 7):
        out = run(model).detach()
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert getattr(again.config, CONFIG_NAME) == 7
    assert not torch.equal(run(again), out)
    with LazyNeuron(mode="mask").attach(again):
        assert torch.equal(run(again), out)


def test_it_is_made_by_name_and_goes_into_a_recipe():
    method = gossamer.make("lazy-neuron", k=4)
    recipe = gossamer.Recipe.of(method, gossamer.make("streaming-llm"))
    model = tiny_model("gpt2", activation_function="relu")
    with recipe.attach(model) as handle:
        run(model)
        assert handle.report()["neurons_kept"] <= 4 / 128
    assert gossamer.Recipe.parse({"methods": [{"lazy-neuron": {"k": 4}}]}).steps[0].method == method


def test_k_may_be_a_share_of_the_width():
    model = tiny_model("gpt2", activation_function="relu")
    for method in (LazyNeuron(k="1/16"), LazyNeuron.with_share(1 / 16), LazyNeuron(k=8)):
        with method.attach(model) as handle:
            rules = [handle.mlp.policy.rule(layer) for layer in range(2)]
        assert [rule.count for rule in rules] == [8, 8]


def test_a_rule_keeps_no_zeros_and_shows_what_is_not_a_number():
    a = torch.tensor([[0.0, 2.0, 0.0, 1.0], [0.0, float("nan"), 3.0, 1.0]])
    assert TopKRule(count=3).mask(a).tolist() == [[False, True, False, True], [False, True, True, True]]


@pytest.mark.parametrize(
    "bad", [{"k": 0}, {"recall": 0}, {"recall": 1.5}, {"k": 2.5}, {"k": "many"}, {"k": True}, {"kay": 1}]
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(InputError, match=r"^lazy-neuron: "):
        LazyNeuron(**bad)


def test_bad_models_and_data_get_one_clear_line():
    model = tiny_model("gpt2", activation_function="relu")
    with pytest.raises(InputError, match="has no k of its own"):
        LazyNeuron().attach(model)
    with pytest.raises(InputError, match="k must be 1 to 128, the width of the MLPs; got 129"):
        LazyNeuron(k=129).attach(model)
    with pytest.raises(InputError, match="k must be 1 to 128"):
        topk_mlp(model, 500)
    assert not hasattr(model.config, CONFIG_NAME)
    model.config.lazy_neuron_k = -3
    with pytest.raises(InputError, match=r"^lazy-neuron: k.*a count must be 1 or more"):
        LazyNeuron().attach(model)
    for call in (lambda m: LazyNeuron(k=1).attach(m), lambda m: activation_stats(m, [IDS])):
        with pytest.raises(ModelError, match="no MLP with known names"):
            call(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="gave no batch"):
        activation_stats(model, [])
    with pytest.raises(InputError, match="sees 24 tokens, the attention mask has 34"):
        activation_stats(model, [{"input_ids": IDS, "attention_mask": torch.ones(2, 17), "position_ids": None}])
    for bad in (0, 1.5, float("nan")):
        with pytest.raises(InputError, match="recall in"):
            bucket_count(10, 2, bad)
    with pytest.raises(InputError, match="k of at least 1"):
        bucket_count(10, 0, 0.9)
    mlp_views(model)[1].up.weight.data[0] = float("nan")
    with pytest.raises(InputError, match=r"h\.1\.mlp are not finite"):
        activation_stats(model, [IDS])
