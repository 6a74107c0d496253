"""ALISA's quantisation and tiers: checks 5 and 8 of its card."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.attention.alisa import Alisa
from gossamer.attention.alisa_formulas import dequantise_channels, quantise_channels
from gossamer.attention.alisa_schedule import AlisaPlan, Profile, Sizes, simulate
from gossamer.attention.alisa_tiers import Store
from gossamer.errors import InputError, ModelError
from gossamer.hf.cache import allocate_near
from gossamer.models import tiny_model
from gossamer.testing import AttentionContract, Case, Stream

PROMPT, NEW = 60, 60


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


# -- 5: channel-wise quantisation -------------------------------------------------------------------------------------


@given(st.sampled_from([4, 8]), st.integers(1, 70), st.integers(0, 50), st.floats(-20, 20), st.floats(1e-3, 100))
@settings(max_examples=60, deadline=None)
def test_a_round_trip_errs_by_half_a_step(bits: int, tokens: int, seed: int, shift: float, spread: float) -> None:
    x = torch.randn(2, 3, tokens, 8, generator=torch.Generator().manual_seed(seed)) * spread + shift
    x[..., 3] = shift  # a constant channel
    codes, step, zero = quantise_channels(x, bits)
    assert codes.dtype is torch.uint8
    assert codes.shape == (2, 3, tokens, 8 * bits // 8)
    back = dequantise_channels(codes, step, zero)
    assert torch.equal(back[..., 3], x[..., 3])
    # z is rounded too, so the highest value may be clamped by half a step more.
    inside = (back - x).abs() <= step / 2 + 1e-5 * (x.abs() + spread)
    edge = (x == x.amax(-2, keepdim=True)) | (x == x.amin(-2, keepdim=True))
    assert bool((inside | edge).all())
    assert bool(((back - x).abs() <= step + 1e-5 * (x.abs() + spread)).all())


def test_quantisation_by_hand() -> None:
    codes, step, zero = quantise_channels(torch.tensor([[-1.0], [0.0], [254.0]]))
    assert (step.item(), zero.item()) == (1.0, 1.0)
    assert codes[:, 0].tolist() == [0, 1, 255]


def table(compute: float = 1e-4, again: float = 1e-6) -> Profile:
    return Profile(compute=((1, compute), (1000, 2 * compute)), recompute=((0, 0.0), (1000, 1000 * again)))


# -- 8: tiers change nothing ------------------------------------------------------------------------------------------


def model_of(family: str = "llama", **changes: Any) -> Any:
    return tiny_model(family, num_hidden_layers=4, **changes)


def tokens_of(batch: int = 2, length: int = PROMPT + NEW) -> Tensor:
    return torch.randint(3, 256, (batch, length), generator=torch.Generator().manual_seed(0))


def schedule(model: Any, **changes: Any) -> AlisaPlan:
    """A schedule that goes through all three phases."""
    sizes = Sizes.of(model)
    values: dict[str, Any] = {
        "layers": sizes.layers,
        "hidden": sizes.hidden,
        "kv_width": sizes.kv_width,
        "batch": 2,
        "prompt": PROMPT,
        "output": NEW,
        "fast_bytes": 0,
        "bandwidth": 1.0,
        "profile": table(),
        "element_size": 4,
        "block": 4,
        "alpha": 0.7,
        "beta": 0.5,
        "p1": 10,
        "p2": 30,
    }
    return AlisaPlan(**{**values, **changes})


def run(model: Any, ids: Tensor, sizes: list[int], mask: Tensor | None = None, **settings: Any) -> tuple[Tensor, Any]:
    """Logits of a prompt and of blocks of further tokens."""
    with Alisa(**settings).attach(model) as handle:
        logits, cache, at = [], None, 0
        for size in sizes:
            given = None if mask is None else mask[:, : at + size]
            out = model(ids[:, at : at + size], attention_mask=given, past_key_values=cache, use_cache=True)
            logits.append(out.logits)
            cache, at = out.past_key_values, at + size
        states = [cache.layers[i].views[handle.runtime].state for i in range(len(cache.layers))]
        return torch.cat(logits, 1), (handle.report(), states, cache, handle.runtime)


STEPS = [PROMPT, *[1] * NEW]


@pytest.mark.parametrize(
    ("family", "offload"),
    [("llama", "host"), ("llama", "file"), *((f, "host") for f in ("qwen2", "qwen3", "gemma", "gemma3", "mistral"))],
)
def test_slow_and_deleted_rows_give_the_logits_of_the_fast_ones(family: str, offload: str) -> None:
    model, ids = model_of(family), tokens_of()
    near, _ = run(model, ids, STEPS, ratio=0.4)
    far, (report, states, _, _) = run(model, ids, STEPS, ratio=0.4, offload=offload, plan=schedule(model, ratio=0.4))
    torch.testing.assert_close(far, near, atol=3e-5, rtol=1e-5)  # the two sum in different orders, layer after layer
    tiered = [s for s in states if s.moved]
    assert len(tiered) == (1 if family == "gemma3" else 4)  # windowed layers stay fast
    for state in tiered:
        assert (state.deleted, state.moved) == schedule(model).tiers(PROMPT + NEW)
    assert min(report["rows_moved_out"], report["rows_loaded"], report["rows_recomputed"]) > 0


@pytest.mark.parametrize("dense", [(), (0, 2)])
def test_the_tiers_follow_the_plan_step_by_step(dense: tuple[int, ...]) -> None:
    model, ids, plan = model_of(), tokens_of(), schedule(model_of())
    simulation = {s.step: s for s in simulate(plan).steps}
    with Alisa(offload="host", plan=plan, dense_layers=dense).attach(model) as handle:
        cache = model(ids[:, :PROMPT], use_cache=True).past_key_values
        policy: Any = handle.runtime.decode
        for j in range(NEW - 1):
            moved = policy.moved_rows
            with handle.runtime.recording() as trace:
                model(ids[:, PROMPT + j : PROMPT + j + 1], past_key_values=cache)
            state = simulation[j + 1]  # what the step leaves is what the next one finds
            layers = [layer for layer in range(4) if layer not in dense]
            for index in layers:
                view = cache.layers[index].views[handle.runtime]
                assert view.state.deleted == state.deleted
                assert view.state.moved == state.deleted + state.slow
                assert cache.layers[index].length == state.fast
            assert policy.moved_rows - moved == state.moved_out * 2 * len(layers)
            if state.phase == "I":
                assert policy.loaded_bytes == policy.moved_bytes == 0
            assert len(trace) == len(layers)
        values = 2 * model.config.num_key_value_heads * 16 * 4  # of one row in all its heads
        assert policy.moved_bytes == policy.moved_rows * values
        assert policy.loaded_bytes == policy.loaded_rows * values


def test_deleted_rows_are_gone_from_every_tier() -> None:
    model, ids, plan = model_of(), tokens_of(), schedule(model_of(), beta=1.0, p2=10)
    _, (_, states, cache, _) = run(model, ids, STEPS, offload="host", plan=plan)
    for state, layer in zip(states, cache.layers, strict=True):
        assert state.key.first == state.key.end == state.deleted == state.moved
        assert layer.length == PROMPT + NEW - state.moved
        assert state.inputs.end == plan.last_deleted()


def test_layers_share_one_table_of_rotations() -> None:
    model = model_of()
    _, (_, states, _, _) = run(model, tokens_of(), STEPS, offload="host", plan=schedule(model))
    assert len({id(s.rotations) for s in states}) == 1


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_rows_are_near(bits: Any) -> None:
    model, ids = model_of(), tokens_of()
    near, _ = run(model, ids, STEPS)
    far, (report, states, _, _) = run(model, ids, STEPS, offload="host", fast_tokens=40, kv_bits=bits, block=8)
    full, (exact, _, _, _) = run(model, ids, STEPS, offload="host", fast_tokens=40, block=8)
    torch.testing.assert_close(full, near, atol=1e-5, rtol=1e-5)
    before = near[:, : PROMPT + 1]
    torch.testing.assert_close(far[:, : PROMPT + 1], before, atol=1e-5, rtol=1e-5)
    assert states[0].key.storage.dtype is torch.uint8
    assert report["bytes_between_tiers"] < exact["bytes_between_tiers"] * bits / 32 * 1.2
    difference = (far.log_softmax(-1) - near.log_softmax(-1))[:, PROMPT + 1 :].abs().median()
    assert 0 < difference < (0.05 if bits == 8 else 0.6)


def test_left_padding_chunks_and_turns_over_all_tiers() -> None:
    model, ids, mask = model_of(), tokens_of(), torch.ones(2, PROMPT + NEW, dtype=torch.long)
    mask[1, :23] = 0
    sizes = [30, 30, *[1] * 25, 12, *[1] * 15, 1, 3, *[1] * 4]  # a prompt in two parts, two later turns
    for padding in (None, mask):
        near, _ = run(model, ids, sizes, padding, ratio=0.4)
        far, _ = run(model, ids, sizes, padding, ratio=0.4, offload="host", plan=schedule(model, ratio=0.4))
        start = 23 if padding is not None else 0
        torch.testing.assert_close(far[:, start:], near[:, start:], atol=5e-5, rtol=1e-4)  # five GEMM shapes


def test_known_tokens_in_a_block_wait_with_their_moves_and_can_be_rolled_back() -> None:
    model, ids, plan = model_of(), tokens_of(), schedule(model_of())
    want, _ = run(model, ids, STEPS, offload="host", plan=plan)
    with Alisa(offload="host", plan=plan).attach(model) as handle:
        cache = model(ids[:, :PROMPT], use_cache=True).past_key_values
        for j in range(25):
            model(ids[:, PROMPT + j : PROMPT + j + 1], past_key_values=cache)
        moved = [cache.layers[i].views[handle.runtime].state.moved for i in range(4)]
        assert min(moved) > 0
        for _ in range(2):
            with handle.runtime.teacher_forcing():
                got = model(ids[:, PROMPT + 25 :], past_key_values=cache).logits
            torch.testing.assert_close(got, want[:, PROMPT + 25 :], atol=5e-5, rtol=1e-4)  # other GEMM shapes
            assert moved == [cache.layers[i].views[handle.runtime].state.moved for i in range(4)]
            cache.crop(-(NEW - 25))


def test_beams_take_their_tiers_along() -> None:
    model, plan = model_of(), schedule(model_of(), p1=0, p2=4, batch=1)
    prompt = tokens_of(1, PROMPT)
    how = {"max_new_tokens": 30, "num_beams": 3, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    with Alisa().attach(model):
        near = model.generate(prompt, **how)
    with Alisa(offload="host", plan=plan).attach(model) as handle:
        far = model.generate(prompt, **how)
        assert handle.report()["rows_recomputed"] > 0
    assert torch.equal(near, far)


def test_ratio_one_reads_every_tier() -> None:
    model, ids = model_of(), tokens_of()
    want = model(ids).logits
    far, _ = run(model, ids, STEPS, ratio=1.0, offload="host", plan=schedule(model, ratio=1.0))
    torch.testing.assert_close(far, want, atol=5e-5, rtol=1e-4)  # one forward against many


def test_a_model_with_a_fused_projection_offloads_but_does_not_recompute() -> None:
    model, ids = model_of("gpt2"), tokens_of()
    near, _ = run(model, ids, STEPS)
    far, _ = run(model, ids, STEPS, offload="host", plan=schedule(model, beta=0.0))
    torch.testing.assert_close(far, near, atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelError, match="beta=0"):
        Alisa(offload="host", plan=schedule(model)).attach(model)


def test_keys_that_cannot_be_computed_again_are_noticed() -> None:
    model, plan = model_of(), schedule(model_of())
    hook = model.model.layers[2].self_attn.k_proj.register_forward_hook(
        lambda module, args, out: out + 1 if args[0].shape[1] > 1 else out
    )
    try:
        with Alisa(offload="host", plan=plan).attach(model), pytest.raises(ModelError, match="again") as error:
            model(tokens_of()[:, :PROMPT], use_cache=True)
        assert "\n" not in str(error.value)
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"plan": schedule(model_of())}, "offload"),
        ({"kv_bits": 8}, "offload"),
        ({"offload": "host"}, "fast_tokens"),
        ({"offload": "host", "fast_tokens": 9, "plan": schedule(model_of())}, "either"),
        ({"offload": "host", "plan": schedule(model_of()), "ratio": 0.3}, "ratio=0.2"),
        ({"offload": "host", "plan": schedule(model_of()), "kv_bits": 8}, "kv_bits"),
        ({"offload": "host", "fast_tokens": 9, "head_reduce": False}, "head_reduce"),
        ({"offload": "host", "fast_tokens": 0}, "fast_tokens"),
    ],
)
def test_bad_settings_are_one_line(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as error:
        Alisa(**wrong)
    assert "\n" not in str(error.value)
    assert named in str(error.value)


def test_a_plan_belongs_to_its_model() -> None:
    with pytest.raises(InputError, match="another model"):
        Alisa(offload="host", plan=schedule(model_of())).attach(tiny_model("llama"))


def test_a_plan_is_a_setting() -> None:
    method = Alisa(offload="host", plan=schedule(model_of()))
    assert Alisa(**method.settings()) == method


def test_a_store_gives_back_what_it_dropped() -> None:
    store, rows = Store(allocate_near), torch.randn(2, 3, 1000, 4)
    for i in range(0, 1000, 50):
        store.append(rows[:, :, i : i + 50])
        store.drop(max(0, i - 100))
    assert store.storage is not None
    assert store.storage.shape[2] < 500
    ids = torch.tensor([[870, 999], [860, 900]])
    got = store.take(ids)
    for b in range(2):
        assert torch.equal(got[b], rows[b][:, ids[b]])


class TestTieredAlisa(AttentionContract):
    """Without layer inputs (the stream has none) tokens are not deleted; the rest of the contract holds over two tiers."""

    cases = (
        Case(
            "alisa",
            {"ratio": 0.2, "offload": "host", "fast_tokens": 50, "block": 4},
            full={"ratio": 1.0},
            exact_count=False,
            forgetful=False,
        ),
    )

    def test_inputs_and_weights_are_untouched(self, case: Case) -> None:
        """Rows leave the layer's storage; those that stay are bit-equal."""
        stream = Stream()
        with self.attach(case) as handle:
            stream.feed(handle, 40, *[1] * 24)
        for i, layer in enumerate(stream.cache.layers):
            assert layer.dropped == 16
            assert torch.equal(layer.keys, stream.key[i][:, :, 16:])
            assert torch.equal(layer.values, stream.value[i][:, :, 16:])
