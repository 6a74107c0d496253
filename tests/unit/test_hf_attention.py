"""The attention plug point: attached dense attention is transformers' own, in every way a model is run."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from gossamer.attention import AttentionHandle
from gossamer.errors import InputError, ModelError
from gossamer.hf import AttentionRuntime, DecodePolicy, GossamerCache, KVLayer, dense_attention
from gossamer.models import FAMILIES, tiny_model
from gossamer.registry import make

WINDOWED = {"mistral-window": ("mistral", {"sliding_window": 8}), "gemma3": ("gemma3", {})}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in FAMILIES} | WINDOWED
TOL = {"atol": 1e-4, "rtol": 1e-4}


@cache
def model_of(name: str) -> PreTrainedModel:
    """One model a name for the whole file; every test leaves it as it was."""
    if name == "gemma2":  # caps its attention scores, so only transformers' eager attention is exact
        config = transformers.Gemma2Config(
            vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, sliding_window=8, attn_logit_softcapping=2.0, pad_token_id=0,
            bos_token_id=None, eos_token_id=None, initializer_range=0.2,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.Gemma2ForCausalLM(config).eval()
        model.set_attn_implementation("eager")
        return model
    family, settings = MODELS[name]
    return tiny_model(family, **settings)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    model = model_of(request.param)
    with torch.no_grad():
        yield model
    assert model.config._attn_implementation != "gossamer", "a test left something attached"


@pytest.fixture
def llama() -> Iterator[PreTrainedModel]:
    with torch.no_grad():
        yield model_of("llama")
    assert model_of("llama").config._attn_implementation == "sdpa"


def ids(batch: int = 1, length: int = 40, seed: int = 0) -> Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


@contextmanager
def implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    previous = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


def attach(model: nn.Module, **policies: Any) -> AttentionHandle:
    return make("dense").attach(model) if not policies else AttentionHandle(runtime=AttentionRuntime(model, **policies))


# -- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("against", ["sdpa", "eager"])
def test_logits_of_prefill_and_steps(model: PreTrainedModel, against: str) -> None:
    tokens = ids(2)
    with implementation(model, against):
        want = model(tokens).logits
    with attach(model):
        got = model(tokens).logits
        torch.testing.assert_close(got, want, **TOL)
        out = model(tokens[:, :30])
        for t in range(30, 40):  # single queries: our kernel
            out = model(tokens[:, t : t + 1], past_key_values=out.past_key_values)
            torch.testing.assert_close(out.logits[:, 0], want[:, t], **TOL)


def test_without_a_cache(model: PreTrainedModel) -> None:
    want = model(ids(2), use_cache=False).logits
    with attach(model):
        out = model(ids(2), use_cache=False)
    assert out.past_key_values is None
    torch.testing.assert_close(out.logits, want, **TOL)


@pytest.mark.parametrize("sizes", [[13, 1, 7, 1, 1, 17], [1] * 5 + [35], [39, 1]])
def test_chunked_prefill_equals_one_shot(model: PreTrainedModel, sizes: list[int]) -> None:
    tokens, parts, caches = ids(2), [], None
    want = model(tokens).logits
    with attach(model):
        for part in tokens.split(sizes, dim=1):
            out = model(part, past_key_values=caches)
            parts.append(out.logits)
            caches = out.past_key_values
    torch.testing.assert_close(torch.cat(parts, 1), want, **TOL)


def test_teacher_forcing_changes_nothing_for_dense(model: PreTrainedModel) -> None:
    want = model(ids(2)).logits
    with attach(model) as handle, handle.runtime.teacher_forcing():
        torch.testing.assert_close(model(ids(2)).logits, want, **TOL)
    assert not handle.runtime.teacher_forced


GENERATE: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "chunked": {"do_sample": False, "prefill_chunk_size": 9},
    "no-cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("how", GENERATE)
def test_generate_token_for_token(model: PreTrainedModel, how: str) -> None:
    def run() -> Tensor:
        torch.manual_seed(7)
        settings = {**GENERATE[how], "max_new_tokens": 16}
        return model.generate(ids(2, 20), attention_mask=torch.ones(2, 20, dtype=torch.long), **settings)

    want = run()
    with attach(model):
        assert torch.equal(run(), want)
    assert torch.equal(run(), want)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_assisted_generation_crops_the_cache(name: str) -> None:
    model, tokens = model_of(name), ids(1, 12)
    settings = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    want = model.generate(tokens, **settings)
    crops: list[int] = []
    crop = KVLayer.crop

    def counting(self: KVLayer, tokens_to_remove: int) -> None:
        crops.append(tokens_to_remove)
        crop(self, tokens_to_remove)

    assistant = tiny_model(name, seed=5)
    with attach(model), pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVLayer, "crop", counting)
        assert torch.equal(model.generate(tokens, assistant_model=assistant, **settings), want)
        assert any(c < 0 for c in crops)
        assert torch.equal(model.generate(tokens, prompt_lookup_num_tokens=3, **settings), want)


def left_padded(*lengths: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and position ids of a batch with padding on the left."""
    longest = max(lengths)
    tokens, mask = (
        torch.zeros(len(lengths), longest, dtype=torch.long),
        torch.zeros(len(lengths), longest, dtype=torch.long),
    )
    for row, length in enumerate(lengths):
        tokens[row, longest - length :] = ids(1, length, seed=row)[0]
        mask[row, longest - length :] = 1
    return tokens, mask, (mask.cumsum(1) - 1).clamp_min(0)


def test_left_padding_gives_each_row_its_own_run(model: PreTrainedModel) -> None:
    lengths = (30, 11, 1, 23)
    tokens, mask, positions = left_padded(*lengths)
    alone = [model(ids(1, n, seed=row)).logits[0] for row, n in enumerate(lengths)]
    said = model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False)
    with attach(model) as handle:
        together = model(tokens, attention_mask=mask, position_ids=positions).logits
        for row, n in enumerate(lengths):
            torch.testing.assert_close(together[row, -n:], alone[row], **TOL)
        assert torch.equal(model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False), said)
        for row, n in enumerate(lengths):
            single = model.generate(ids(1, n, seed=row), attention_mask=mask[:1, :n], max_new_tokens=8, do_sample=False)
            assert torch.equal(single[0, n:], said[row, 30:])
        with handle.runtime.teacher_forcing():  # queries in the padding included
            forced = model(tokens, attention_mask=mask, position_ids=positions).logits
    assert not forced.isnan().any()
    for row, n in enumerate(lengths):
        torch.testing.assert_close(forced[row, -n:], alone[row], **TOL)


@pytest.mark.parametrize("kind", ["right", "holes"])
def test_other_padding_is_exact_and_said_once(
    model: PreTrainedModel, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokens, mask = ids(2, 24), torch.ones(2, 24, dtype=torch.long)
    mask[1, 18:] = 0 if kind == "right" else 1
    mask[1, 5:9] = 0 if kind == "holes" else 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    real = mask.bool()
    want = model(tokens, attention_mask=mask, position_ids=positions)
    with make("streaming-llm", tokens=6).attach(model), caplog.at_level(logging.WARNING, "gossamer"):
        got = model(tokens, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(got.logits[real], want.logits[real], **TOL)
        mask, step = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1), ids(2, 1, seed=9)
        kwargs = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
        after = model(step, past_key_values=got.past_key_values, **kwargs).logits
    torch.testing.assert_close(after, model(step, past_key_values=want.past_key_values, **kwargs).logits, **TOL)
    assert [r.message for r in caplog.records].count(
        "the attention mask is not plain left padding: attention is dense"
    ) == 1


def test_a_mask_of_four_dimensions_is_obeyed(llama: PreTrainedModel) -> None:
    allowed = torch.ones(20, 20, dtype=torch.bool).tril()
    allowed[10:, 3:6] = False
    for mask in (allowed[None, None], torch.zeros(1, 1, 20, 20).masked_fill(~allowed, torch.finfo(torch.float32).min)):
        want = llama(ids(1, 20), attention_mask=mask).logits
        with attach(llama):
            torch.testing.assert_close(llama(ids(1, 20), attention_mask=mask).logits, want, **TOL)


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_packed_sequences_stay_apart(name: str) -> None:
    model, tokens = model_of(name), ids(1, 24)
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    with torch.no_grad():
        want = torch.cat([model(part).logits for part in tokens.split([10, 14], dim=1)], 1)
        with attach(model):
            got = model(tokens, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(got, want, **TOL)


def test_chunked_attention_is_obeyed() -> None:
    config = transformers.Llama4TextConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, intermediate_size_mlp=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=2, attention_chunk_size=8,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Llama4ForCausalLM(config).eval()
    with torch.no_grad():
        want = model(ids(1, 24)).logits
        with attach(model):
            out = model(ids(1, 23))
            step = model(ids(1, 24)[:, 23:], past_key_values=out.past_key_values).logits
    torch.testing.assert_close(torch.cat([out.logits, step], 1), want, **TOL)


def test_capped_scores_are_exact_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, tokens = model_of("gemma2"), ids(2)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "gossamer"):
        want, uncapped = model(tokens).logits, copy.deepcopy(model)
        for layer in uncapped.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        assert (want - uncapped(tokens).logits).abs().max() > 1e-2  # the cap matters here
        with make("streaming-llm", tokens=6).attach(model):
            out = model(tokens[:, :25])
            parts = [out.logits]
            for part in tokens[:, 25:].split([1, 1, 13], dim=1):
                out = model(part, past_key_values=out.past_key_values)
                parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), want, **TOL)
    assert [r.message for r in caplog.records] == ["this model caps its attention scores: attention is dense"]


def test_bfloat16(model: PreTrainedModel) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    want = half(ids(2)).logits
    spread = (want.float() - model(ids(2)).logits).abs().max()  # what the rounding itself costs
    with attach(half):
        out = half(ids(2)[:, :36])
        assert out.past_key_values.layers[0].keys.dtype is torch.bfloat16
        parts = [out.logits]
        for t in range(36, 40):
            out = half(ids(2)[:, t : t + 1], past_key_values=out.past_key_values)
            parts.append(out.logits)
    assert (torch.cat(parts, 1).float() - want.float()).abs().max() <= 1.5 * spread


# -- caches -----------------------------------------------------------------------------------------------------------


def make_cache(kind: str, model: PreTrainedModel) -> Any:
    made = {"dynamic": DynamicCache, "gossamer": GossamerCache, "reserve": lambda: GossamerCache(reserve=300)}
    return DynamicCache(config=model.config) if kind == "config" else made[kind]()


@pytest.mark.parametrize("kind", ["dynamic", "config", "gossamer", "reserve"])
def test_a_cache_of_the_users_own_is_filled(model: PreTrainedModel, kind: str) -> None:
    want = model.generate(ids(2, 20), attention_mask=torch.ones(2, 20).long(), max_new_tokens=8, do_sample=False)
    mine = make_cache(kind, model)
    with attach(model):
        mask = torch.ones(2, 20, dtype=torch.long)
        got = model.generate(ids(2, 20), attention_mask=mask, max_new_tokens=8, do_sample=False, past_key_values=mine)
    assert torch.equal(got, want)
    assert mine.get_seq_length() == 27
    assert all(isinstance(layer, KVLayer) for layer in mine.layers)
    if kind == "reserve":
        assert mine.layers[0].capacity == 512


def test_multi_turn_continues_the_returned_cache(model: PreTrainedModel) -> None:
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    with attach(model):
        first = model.generate(ids(1, 15), attention_mask=torch.ones(1, 15).long(), **settings)
        turn = torch.cat([first.sequences, ids(1, 7, seed=3)], 1)
        mask = torch.ones_like(turn)
        second = model.generate(turn, attention_mask=mask, past_key_values=first.past_key_values, **settings)
        afresh = model.generate(turn, attention_mask=mask, **settings)
        assert second.past_key_values is first.past_key_values
        assert torch.equal(second.sequences, afresh.sequences)
    assert torch.equal(second.sequences, model.generate(turn, attention_mask=mask, **settings).sequences)


def test_a_cache_crosses_attaching_and_detaching(model: PreTrainedModel) -> None:
    tokens = ids(2, 30)
    want = model(tokens).logits
    caches = DynamicCache()  # plain; layers that have dropped rows cannot be taken over
    parts = [model(tokens[:, :7], past_key_values=caches).logits]
    with attach(model):
        parts += [
            model(tokens[:, 7:15], past_key_values=caches).logits,
            model(tokens[:, 15:16], past_key_values=caches).logits,
        ]
    parts += [
        model(tokens[:, 16:17], past_key_values=caches).logits,
        model(tokens[:, 17:25], past_key_values=caches).logits,
    ]
    with attach(model):
        parts += [model(tokens[:, 25:], past_key_values=caches).logits]
    torch.testing.assert_close(torch.cat(parts, 1), want, **TOL)


def test_a_cache_given_by_its_place_is_used() -> None:
    model, mine = model_of("gpt2"), DynamicCache()
    with torch.no_grad():
        want = model.transformer(ids()).last_hidden_state
        with attach(model):
            first = model.transformer(ids()[:, :30], mine).last_hidden_state
            rest = model.transformer(ids()[:, 30:], mine).last_hidden_state
    assert mine.get_seq_length() == 40
    torch.testing.assert_close(torch.cat([first, rest], 1), want, **TOL)


def test_other_caches_are_refused_in_one_line(llama: PreTrainedModel) -> None:
    with attach(llama), pytest.raises(InputError) as caught:
        llama.generate(ids(), max_new_tokens=2, cache_implementation="static")
    assert str(caught.value) == "cannot attach to a StaticCache: pass a DynamicCache, a GossamerCache, or no cache"


def test_another_batch_on_an_old_cache_is_refused(llama: PreTrainedModel) -> None:
    with attach(llama):
        out = llama(ids(2))
        with pytest.raises(InputError, match="start a new cache for a new batch"):
            llama(ids(3), past_key_values=out.past_key_values)


def test_the_cache_is_freed_with_its_owner(llama: PreTrainedModel) -> None:
    with attach(llama):
        seen = weakref.ref(llama(ids()).past_key_values)
        gc.collect()
        assert seen() is None


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*MODELS, "gemma2"])
def test_gradients_equal_those_without(name: str, training: bool) -> None:
    model = copy.deepcopy(model_of(name)).train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    tokens, mask, positions = left_padded(20, 13)
    labels = tokens.masked_fill(positions == 0, -100)  # a first token's own prediction comes from the padding

    def gradients() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        loss = model(tokens, attention_mask=mask, position_ids=positions, labels=labels).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    want_loss, want = gradients()
    with make("streaming-llm", tokens=6).attach(model):  # decode policies have no say in training
        loss, got = gradients()
    torch.testing.assert_close(loss, want_loss, **TOL)
    assert got.keys() == want.keys()
    for key, value in got.items():
        torch.testing.assert_close(value, want[key], **TOL)


def test_attention_dropout_is_kept() -> None:
    model = tiny_model("llama", attention_dropout=0.5).train()
    model.requires_grad_(False)  # as the lower layers of an adapter
    with torch.no_grad():
        calm = model.eval()(ids()).logits
        model.train()
        with attach(model):
            assert (model(ids()).logits - calm).abs().max() > 1e-2


def test_gradients_through_the_cache(llama: PreTrainedModel) -> None:
    model = copy.deepcopy(llama)

    def gradient() -> Tensor:
        model.zero_grad()
        out = model(ids()[:, :20])
        out = model(ids()[:, 20:21], past_key_values=out.past_key_values)
        out = model(ids()[:, 21:30], past_key_values=out.past_key_values)
        out.logits.square().mean().backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    with torch.enable_grad():
        want = gradient()
        with attach(model):
            torch.testing.assert_close(gradient(), want, **TOL)


def test_recorded_gradients_make_decode_dense_and_say_so(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    want = llama(ids()).logits[:, -1]
    with make("streaming-llm", tokens=6).attach(llama) as handle, caplog.at_level(logging.WARNING, "gossamer"):
        with torch.enable_grad():
            out = llama(ids()[:, :39])
            got = llama(ids()[:, 39:], past_key_values=out.past_key_values).logits[:, 0]
        torch.testing.assert_close(got, want, **TOL)
        assert handle.runtime.stats.steps == 0
    assert [r.message for r in caplog.records if "gradients are on" in r.message] == [
        "gradients are on: attention is dense; use torch.no_grad() to run the method"
    ]


# -- attaching and detaching ------------------------------------------------------------------------------------------


def traces(model: PreTrainedModel) -> dict[str, Any]:
    """Everything that attaching could leave behind."""
    hooks = [name for name in vars(nn.Module()) if name.endswith("hooks")]
    return {
        "config": model.config.to_json_string(),
        "implementation": model.config._attn_implementation,
        "hooks": {n: {h: len(getattr(m, h)) for h in hooks} for n, m in model.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "classes": {n: (type(m), vars(type(m)).get("forward")) for n, m in model.named_modules()},
    }


def test_detach_restores_bit_for_bit(model: PreTrainedModel) -> None:
    before, weights = traces(model), {k: v.clone() for k, v in model.state_dict().items()}
    out = model(ids(2)).logits
    for method in ("dense", "streaming-llm"):
        handle = make(method).attach(model)
        assert handle.runtime.attached
        assert model.config._attn_implementation == "gossamer"
        model.generate(ids(), attention_mask=torch.ones(1, 40).long(), max_new_tokens=3)
        handle.detach()
        handle.detach()
        assert not handle.runtime.attached
        assert traces(model) == before
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
        assert torch.equal(model(ids(2)).logits, out)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_detach_restores_the_implementation_that_was_set(llama: PreTrainedModel, name: str) -> None:
    with implementation(llama, name):
        with attach(llama):
            pass
        assert llama.config._attn_implementation == name


def test_an_exception_detaches(llama: PreTrainedModel) -> None:
    before = traces(llama)
    with pytest.raises(KeyError), attach(llama):
        raise KeyError
    assert traces(llama) == before


def test_an_exception_inside_a_policy_leaves_the_model_usable(llama: PreTrainedModel) -> None:
    class Broken(DecodePolicy):
        def decode(self, layer: Any, query: Tensor, length: int) -> Tensor:
            raise KeyError

    before, want = traces(llama), llama(ids()).logits
    handle = AttentionRuntime(llama, decode=Broken())
    out = llama(ids())
    with pytest.raises(KeyError):
        llama(ids(1, 1), past_key_values=out.past_key_values)
    handle.detach()
    assert traces(llama) == before
    assert torch.equal(llama(ids()).logits, want)


def test_attaching_twice_is_refused_in_one_line(llama: PreTrainedModel) -> None:
    with attach(llama):
        for again in (llama, llama.model):  # the decoder inside is the same place
            with pytest.raises(ModelError, match="attached already") as caught:
                attach(again)
            assert "\n" not in str(caught.value)
        assert llama(ids()).logits.isfinite().all()
    with attach(llama):
        pass


def test_two_models_at_once() -> None:
    one, other = model_of("llama"), tiny_model("llama", seed=1)
    with torch.no_grad():
        want = one(ids()).logits, other(ids()).logits
        with make("dense").attach(one), make("streaming-llm", tokens=6).attach(other) as second:
            first_out, second_out = one(ids()[:, :39]), other(ids()[:, :39])
            torch.testing.assert_close(first_out.logits, want[0][:, :39], **TOL)
            torch.testing.assert_close(second_out.logits, want[1][:, :39], **TOL)
            step = one(ids()[:, 39:], past_key_values=first_out.past_key_values).logits[:, 0]
            torch.testing.assert_close(step, want[0][:, 39], **TOL)
            step = other(ids()[:, 39:], past_key_values=second_out.past_key_values).logits[:, 0]
            assert (step - want[1][:, 39]).abs().max() > 1e-3  # it really reads 6 rows
            assert second.runtime.stats.rows == 2 * 2 * 6
            second.detach()
            torch.testing.assert_close(one(ids()).logits, want[0], **TOL)


def test_a_new_method_on_an_old_cache_starts_afresh(llama: PreTrainedModel) -> None:
    tokens = ids(1, 60)
    with make("quest", tokens=16, page_size=4, dense_layers=()).attach(llama):
        out = llama(tokens[:, :40])
        out = llama(tokens[:, 40:41], past_key_values=out.past_key_values)
    with make("quest", tokens=16, page_size=8, dense_layers=()).attach(llama):
        got = llama(tokens[:, 41:42], past_key_values=out.past_key_values).logits
        afresh = llama(tokens[:, :40])
    with make("quest", tokens=16, page_size=4, dense_layers=()).attach(llama):
        afresh = llama(tokens[:, 40:41], past_key_values=afresh.past_key_values)
    with make("quest", tokens=16, page_size=8, dense_layers=()).attach(llama):
        assert torch.equal(llama(tokens[:, 41:42], past_key_values=afresh.past_key_values).logits, got)


def test_a_model_dropped_while_attached_is_freed() -> None:
    model = tiny_model("llama")
    handle, gone = attach(model), weakref.ref(model)
    with torch.no_grad():
        model.generate(ids(), attention_mask=torch.ones(1, 40).long(), max_new_tokens=2)
    del model, handle
    gc.collect()
    assert gone() is None


def test_models_that_cannot_be_served_are_refused_untouched() -> None:
    small: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    models = [
        transformers.BertModel(transformers.BertConfig(**small, num_hidden_layers=2)),
        transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        ),
        transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)),
        nn.Linear(2, 2),
    ]
    for model in models:
        before = traces(model) if isinstance(model, PreTrainedModel) else None
        with pytest.raises(ModelError) as caught:
            make("dense").attach(model)
        assert "\n" not in str(caught.value)
        assert before is None or traces(model) == before


def test_a_copy_of_an_attached_model_says_what_is_wrong(llama: PreTrainedModel) -> None:
    with attach(llama):
        twin = type(llama)(copy.deepcopy(llama.config))
        twin.config._attn_implementation = "gossamer"
    with pytest.raises(ModelError, match="nothing is attached"):
        twin(ids())


# -- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [1, 5, 12])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("padded", [False, True])
def test_dense_attention_equals_the_formula(new: int, window: int | None, softcap: float | None, padded: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, new, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, 12, 8, generator=generator)
    starts = torch.tensor([0, 5], dtype=torch.int32) if padded else None
    got = dense_attention(query, key, value, 0.3, starts=starts, window=window, softcap=softcap)
    for b, h, t in [(b, h, t) for b in range(2) for h in range(4) for t in range(new)]:
        now = 12 - new + t
        first = max(int(starts[b]) if starts is not None else 0, now - window + 1 if window else 0)
        if first > now:
            continue  # padding: anything finite
        scores = key[b, h // 2, first : now + 1] @ query[b, h, t] * 0.3
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        want = scores.softmax(0) @ value[b, h // 2, first : now + 1]
        torch.testing.assert_close(got[b, h, t], want, atol=1e-5, rtol=1e-5)
    assert got.isfinite().all()
