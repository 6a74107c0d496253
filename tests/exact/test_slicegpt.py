"""SliceGPT's card, check by check: folding, rotations that change nothing, directions that are the best, shapes and counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gossamer.errors import CalibrationError, InputError, ModelError
from gossamer.models import tiny_model
from gossamer.models.reshaped import PLACES
from gossamer.registry import make
from gossamer.weights.base import parameter_count
from gossamer.weights.recovery import Recovery, recover
from gossamer.weights.slicegpt import flops_per_token, kept_width, slice_widths
from gossamer.weights.slicegpt_fold import fold_norms
from gossamer.weights.slicegpt_slicing import Slicing, principal, random_orthogonal, second_moment

TOKENS = torch.randint(1, 256, (4, 40), generator=torch.Generator().manual_seed(0))
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "phi", "opt", "gpt2")
LAYER_NORM = ("phi", "opt", "gpt2")


def model_of(family: str, **overrides: object) -> nn.Module:
    """A small model in float64 whose norms and biases are not those of a fresh one."""
    if family in ("phi", "phi3", "opt"):
        import transformers

        sizes = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4} | overrides
        ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "max_position_embeddings": 128}
        own = (
            {"ffn_dim": 128, "word_embed_proj_dim": sizes["hidden_size"], "init_std": 0.2}
            if family == "opt"
            else {"intermediate_size": 128, "initializer_range": 0.2}
        )
        name = {"phi": "PhiConfig", "phi3": "Phi3Config", "opt": "OPTConfig"}[family]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = getattr(transformers, name)(**sizes, **ends, **own)
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
    else:
        model = tiny_model(family, **overrides)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.double()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def settings_for(family: str, **more: object) -> dict[str, object]:
    return {"slice_head": family == "gpt2", **more}


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_norms_change_nothing_and_the_head_is_its_own(family):
    model = model_of(family)
    before = logits(model)
    fold_norms(model)
    assert apart(logits(model), before) < 1e-6  # transformers' RMS norms run in float32
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize("family", LAYER_NORM)
def test_after_folding_a_layer_norms_stream_has_mean_zero(family):
    model = model_of(family)
    plain = model(TOKENS, output_hidden_states=True).hidden_states
    fold_norms(model)
    hidden = model(TOKENS, output_hidden_states=True).hidden_states
    assert len(hidden) == 4 or family == "gpt2"
    for states in hidden[:-1]:  # the last one is behind the final norm
        assert float(states.detach().mean(-1).abs().max()) < 1e-6
    assert float(plain[1].detach().mean(-1).abs().max()) > 1e-3


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_cut_leaves_the_logits_and_orthogonal_shortcuts(family, interleaved):
    model = model_of(family)
    before = logits(model)
    applied = make("slicegpt", **settings_for(family, sparsity=0.0, interleaved=interleaved)).apply(model, TOKENS)
    assert apart(logits(model), before) < 1e-6
    found = [m.weight for n, m in model.named_modules() if n.endswith("_shortcut")]
    assert len(found) == model.config.num_hidden_layers * len(PLACES[model.config.model_type].norms)
    for matrix in found:
        assert torch.allclose(matrix.T @ matrix, torch.eye(64).double(), atol=1e-9)
        assert float((matrix.detach() - torch.eye(64)).norm()) > 0.1
    assert all(place["discarded"] < 1e-12 for place in applied.facts["discarded"])


def test_nothing_cut_leaves_the_logits_in_float32():
    model = model_of("llama").float()
    before = logits(model)
    make("slicegpt", sparsity=0.0).apply(model, TOKENS)
    assert apart(logits(model), before) < 1e-3


@pytest.mark.parametrize("family", ["llama", "phi", "opt"])
def test_the_orientation_does_not_change_the_function(family):
    out = {}
    for orientation in ("random", "pca"):
        model = model_of(family)
        if family == "llama":  # its norms run in float32 until they are folded
            fold_norms(model)
            generator = torch.Generator().manual_seed(5) if orientation == "random" else None
            Slicing([48, 48], turn=generator).run(model, TOKENS)
        else:
            make("slicegpt", sparsity=0.25, orientation=orientation).apply(model, TOKENS)
        out[orientation] = logits(model)
        weight = model.get_submodule(PLACES[model.config.model_type].embeddings[0]).weight
        out[orientation + " table"] = weight.detach()
    assert apart(out["random"], out["pca"]) < 1e-10
    assert apart(out["random table"], out["pca table"]) > 0.1


def test_directions_by_hand():
    half = 0.5**0.5
    rows = torch.tensor([[half, 0], [-half, 0], [0, half], [0, -half]]).double()
    assert torch.allclose(principal(second_moment([rows])).abs().sum(0), torch.ones(2).double())
    rows = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]).double()
    moment = second_moment([rows])
    q = principal(moment)
    assert torch.allclose(q.abs(), torch.full((2, 2), half).double())
    assert float(q[0, 0] * q[1, 0]) > 0
    assert torch.allclose((q.T @ moment @ q).diagonal(), torch.tensor([4.0, 0.0]).double(), atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(1, 8))
def test_no_directions_discard_less(seed, width, kept):
    kept = min(kept, width - 1)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, width, generator=generator, dtype=torch.float64) @ torch.randn(
        width, width, generator=generator, dtype=torch.float64
    )
    moment = second_moment([x[:7], x[7:]])

    def lost(q: torch.Tensor) -> float:
        return float((x - x @ q[:, :kept] @ q[:, :kept].T).square().sum())

    smallest = float(torch.linalg.eigvalsh(moment)[: width - kept].sum())
    assert lost(principal(moment)) == pytest.approx(smallest, rel=1e-7, abs=1e-9)
    assert smallest <= lost(random_orthogonal(width, generator)) * (1 + 1e-9)
    q = random_orthogonal(width, generator)
    assert torch.allclose(q.T @ q, torch.eye(width).double(), atol=1e-12)


def test_padding_does_not_count():
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([[True] * 5, [True, True, False, False, False]])
    wanted = second_moment([x[0], x[1, :2]])
    assert torch.allclose(second_moment([x], [keep]), wanted)
    assert not torch.allclose(second_moment([x]), wanted)


def formula(vocabulary, positions, width, kept, layers, attention, kv, neurons, gated, biased):
    """The card's count for sequential blocks with the head left whole."""
    weights = kept * (attention + 2 * kv) + attention * kept + (3 if gated else 2) * neurons * kept + 2 * kept * kept
    biases = attention + 2 * kv + 2 * kept + neurons if biased else 0
    extra = (width - kept) * (neurons + kept) + (width - kept if biased else 0)
    return (
        (vocabulary + positions) * kept
        + vocabulary * width
        + (vocabulary if biased else 0)
        + layers * (weights + biases)
        + extra
    )


def test_parameters_are_those_of_the_formula():
    assert (
        formula(50272, 2050, 768, 608, 12, 768, 768, 3072, False, True) == 147_250_880
    )  # OPT-125M in the release's tests
    model = model_of("llama")
    facts = make("slicegpt", sparsity=0.25).apply(model, TOKENS).facts
    count = formula(256, 0, 64, 48, 2, 64, 32, 128, True, False)
    assert facts["parameters"]["after"] == parameter_count(model) == count
    assert facts["flops_per_token"]["after"] == 2 * (count - 256 * 48) == flops_per_token(model)
    model = model_of("opt")
    facts = make("slicegpt", sparsity=0.25).apply(model, TOKENS).facts
    assert facts["parameters"]["after"] == formula(256, 130, 64, 48, 3, 64, 64, 128, False, True)
    assert facts["parameters"]["before_untied"] == facts["parameters"]["before"] + 256 * 64


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("slice_head", [False, True])
def test_shapes(slice_head, interleaved):
    model = model_of("llama", num_hidden_layers=3)
    make("slicegpt", sparsity=0.25, sparsity_last=0.5, slice_head=slice_head, interleaved=interleaved).apply(
        model, TOKENS
    )
    widths = [48, 40, 32, 32 if slice_head else 64]
    assert model.model.embed_tokens.weight.shape == (256, 48)
    for layer, here, after in zip(model.model.layers, widths, widths[1:], strict=False):
        assert layer.self_attn.q_proj.weight.shape == (64, here)
        assert layer.self_attn.k_proj.weight.shape == (32, here)
        assert layer.self_attn.o_proj.weight.shape == (here, 64)
        assert layer.attention_shortcut.weight.shape == (here, here)
        assert layer.mlp.up_proj.weight.shape == (128, here)
        assert layer.mlp.down_proj.weight.shape == (after, 128)
        assert layer.mlp_shortcut.weight.shape == (after, here)
    assert model.lm_head.weight.shape == (256, widths[-1])
    assert bool(logits(model).isfinite().all())


def test_a_parallel_block_has_one_shortcut():
    model = model_of("phi")
    facts = make("slicegpt", sparsity=0.25).apply(model, TOKENS).facts
    layer = model.model.layers[0]
    assert layer.attention_shortcut.weight.shape == (48, 48)
    assert not hasattr(layer, "mlp_shortcut")
    assert [place["place"] for place in facts["discarded"]] == ["embeddings", "block 0", "block 1", "block 2"]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "phi3"])
def test_a_stream_within_a_subspace_is_sliced_without_loss(family):
    model = model_of(family)
    q = random_orthogonal(64, torch.Generator().manual_seed(3))[:, :48]
    project = q @ q.T
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ project)
        for layer in model.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.copy_(project @ writer.weight)
    before = logits(model)
    facts = make("slicegpt", sparsity=0.25).apply(model, TOKENS).facts
    assert apart(logits(model), before) < 1e-6
    assert all(place["discarded"] < 1e-10 for place in facts["discarded"])


def test_the_discarded_energy_is_what_the_cut_took():
    model = model_of("llama")
    table = None

    def note(moment: torch.Tensor) -> torch.Tensor:
        nonlocal table
        table = moment if table is None else table
        return principal(moment)

    fold_norms(model)
    slicing = Slicing([48, 48], note)
    slicing.run(model, TOKENS)
    values = torch.linalg.eigvalsh(table).flip(0)
    assert slicing.discarded[0]["discarded"] == pytest.approx(float(values[48:].sum() / values.sum()))


def test_norms_divide_by_the_width_before():
    model = model_of("llama")
    make("slicegpt", sparsity=0.25).apply(model, TOKENS)
    norm = model.model.layers[1].input_layernorm
    x = torch.ones(1, 48).double()
    assert norm.width == 64
    assert torch.allclose(norm(x), x * (48 / 64 + norm.eps) ** -0.5)


def test_principal_directions_lose_less_than_random_ones():
    generator = torch.Generator().manual_seed(0)
    lost = {}
    for name, basis in {"pca": principal, "random": lambda m: random_orthogonal(len(m), generator)}.items():
        model = model_of("opt")
        before = logits(model)
        fold_norms(model)
        Slicing([56] * 3, basis).run(model, TOKENS)
        lost[name] = apart(logits(model), before)
    assert lost["pca"] < 0.8 * lost["random"]


@given(st.integers(8, 5000), st.floats(0, 0.9), st.integers(1, 8))
def test_widths_are_multiples_within_the_share(width, sparsity, step):
    if (1 - sparsity) * width < step:
        return
    kept = kept_width(width, sparsity, step)
    assert kept % step == 0
    assert (1 - sparsity) * width - step - 1e-6 < kept <= (1 - sparsity) * width + 1e-6


def test_a_course_of_widths():
    assert slice_widths(768, 3, 0.25) == [576] * 3
    assert slice_widths(768, 3, 0.5, last=0.0, round_to=100) == [300, 500, 700]
    with pytest.raises(InputError, match="leaves nothing"):
        slice_widths(16, 1, 0.8)


def test_recovery_takes_back_what_the_text_shows_and_leaves_plain_weights():
    tokens = torch.randint(1, 20, (24, 24), generator=torch.Generator().manual_seed(0))
    model = tiny_model("llama")
    recovery = Recovery(steps=30, rank=4, lr=3e-3, batch=4, every=10, shortcuts=True, head=True)
    facts = make("slicegpt", sparsity=0.25, recovery=recovery).apply(model, tokens).facts["recovery"]
    assert facts["loss"]["after"] < 0.8 * facts["loss"]["before"]
    assert facts["steps"] == 30
    assert not any("parametrizations" in name for name, _ in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert {e["step"] for e in facts["evaluations"]} == {10, 20, 30}


def test_recovery_keeps_the_best_and_stops_when_it_gets_no_better():
    tokens = torch.randint(1, 256, (8, 16), generator=torch.Generator().manual_seed(0))
    model = tiny_model("llama")
    before = logits(model)
    facts = recover(model, tokens, Recovery(steps=50, rank=2, lr=1.0, batch=4, every=1, patience=2))
    if facts["loss"]["after"] == facts["loss"]["before"]:
        assert torch.equal(logits(model), before)
    assert facts["steps"] < 50
    assert facts["loss"]["after"] <= facts["loss"]["before"]


def test_what_cannot_be_sliced_is_named_in_one_line():
    method = make("slicegpt")
    with pytest.raises(InputError, match="token blocks"):
        method.apply(tiny_model("llama"))
    with pytest.raises(ModelError, match="gemma3_text models cannot be sliced"):
        method.apply(tiny_model("gemma3"), TOKENS)
    with pytest.raises(ModelError, match="slice_head=True"):
        method.apply(tiny_model("gpt2"), TOKENS)
    with pytest.raises(ModelError, match="cannot be sliced"):
        method.apply(nn.Linear(2, 2), TOKENS)
    with pytest.raises(CalibrationError, match="eval mode"):
        method.apply(tiny_model("llama").train(), TOKENS)
    opt = model_of("opt")
    opt.config.do_layer_norm_before = False
    with pytest.raises(ModelError, match="this OPT model"):
        method.apply(opt, TOKENS)
    broken = tiny_model("llama")
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        method.apply(broken, TOKENS)
    with pytest.raises(CalibrationError, match="not finite"):
        second_moment([torch.tensor([[torch.nan]])])
    twice = tiny_model("llama")
    method.apply(twice, TOKENS)
    with pytest.raises(ModelError, match="sliced already"):
        method.apply(twice, TOKENS)


@pytest.mark.parametrize(
    "bad", [{"sparsity": 1.0}, {"round_to": 0}, {"orientation": "up"}, {"recovery": {"rank": 0}}, {"damp": -1.0}]
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(InputError, match="slicegpt"):
        make("slicegpt", **bad)


def test_recovery_refuses_other_ranks_and_too_little_text():
    with pytest.raises(InputError, match="one for each of 2 blocks"):
        recover(tiny_model("llama"), TOKENS, Recovery(steps=1), ranks=[1])
    with pytest.raises(InputError, match="two sequences"):
        recover(tiny_model("llama"), TOKENS[:1], Recovery(steps=1))
    with pytest.raises(InputError, match="would change both"):
        recover(tiny_model("gemma", tie_word_embeddings=True), TOKENS, Recovery(steps=1, head=True))
