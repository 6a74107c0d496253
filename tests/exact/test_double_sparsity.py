"""The properties that Double Sparsity's card lists, on tensors small enough to check by formula."""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from gossamer import ops
from gossamer.attention.double_sparsity import DoubleSparsity, DoubleSparsityPolicy
from gossamer.attention.double_sparsity_channels import (
    channel_order,
    import_channels,
    interleaved_channels,
    label_scores_per,
    magnitude,
    product_magnitude,
    released_product_magnitude,
)
from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError, InputError, ModelError
from gossamer.hf import ModelShape, attention_views, model_shape
from gossamer.models import FAMILIES, fingerprint, tiny_model

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
STATS = ("q", "k", "qk")


@cache
def model_of(family: str) -> PreTrainedModel:
    return tiny_model(family)


def ids(batch: int = 1, length: int = 32, seed: int = 0) -> Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


@cache
def calibration_of(family: str) -> Calibration:
    return DoubleSparsity().calibrate(model_of(family), ids(2, 32))


def attach(family: str, **settings: Any) -> Any:
    return DoubleSparsity(**{"dense_layers": (), **settings}).attach(model_of(family), calibration_of(family))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def message(error: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# -- 1: k ≥ S equals dense, whatever r --------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 3, 16])
@pytest.mark.parametrize("bits", [1, 4, 16])
@pytest.mark.parametrize("select", ["query_head", "kv_head"])
@pytest.mark.parametrize("per", ["kv_head", "query_head"])
def test_1_budget_beyond_the_context_is_dense(r: int, bits: int, select: Any, per: str) -> None:
    query, key, value = normal(2, 4, 16), normal(2, 2, 40, 16, seed=1), normal(2, 2, 40, 16, seed=2)
    heads = 2 if per == "kv_head" else 4
    channels = channel_order(normal(heads, 16, seed=3))[:, :r].int()
    labels = ops.LabelCache.allocate(2, heads, 40, r, bits)
    ops.append_labels(labels, key, channels, 0)
    want = ops.decode_attention(query, key, value)
    for k in (40, 41, 100):
        got, _, counts = ops.label_attention(query, key, value, channels, labels, k, select=select)
        torch.testing.assert_close(got, want, **CLOSE)
        assert bool((counts == 40).all())


# -- 2: all channels, unquantised: the true top-k ---------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_2_all_channels_find_the_true_top_k(family: str) -> None:
    model, shape, seen = model_of(family), model_shape(model_of(family)), []
    decode = DoubleSparsityPolicy.decode

    def spying(self: Any, layer: Any, query: Tensor, length: int) -> Tensor:
        key, _ = layer.rows(length)
        scores = torch.einsum("bkgd,bksd->bkgs", query.unflatten(1, (key.shape[1], -1)), key).flatten(1, 2)
        seen.append((layer.index, length, scores.topk(7).indices))
        return decode(self, layer, query, length)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(DoubleSparsityPolicy, "decode", spying)
        handle = attach(family, tokens=7, channels=1.0, label_bits=16, keep_current=False)
        with handle, handle.runtime.recording() as trace:
            out = model(ids(2, 30))
            with handle.runtime.teacher_forcing():
                model(ids(2, 6, seed=4), past_key_values=out.past_key_values)
    assert len(trace) == len(seen) == 6 * shape.layers
    for (layer, length, got, counts), (want_layer, want_length, want) in zip(trace, seen, strict=True):
        assert (layer, length) == (want_layer, want_length)
        assert got.shape == (2, shape.heads, 7)
        assert bool((counts == 7).all())
        assert torch.equal(got.long(), want.sort(-1).values)


# -- 3: labels are the gathered channels ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("per", ["kv_head", "query_head"])
@pytest.mark.parametrize("bits", [16, 4])
def test_3_label_rows_are_key_channels_and_incremental_is_one_shot(family: str, per: Any, bits: int) -> None:
    model, shape, tables = model_of(family), model_shape(model_of(family)), []
    with torch.no_grad(), attach(family, tokens=5, channels=6, label_bits=bits, labels_per=per) as handle:
        for sizes in ([20, 1], [3, 1, 1, 9, 1, 5, 1], [1] * 21):
            past = DynamicCache()
            for part in ids(2, 21).split(sizes, dim=1):
                model(part, past_key_values=past)
            tables.append([(layer, layer.views[handle.runtime].state.cache) for layer in past.layers])
        channels = handle.runtime.decode.channels
    for table in tables:
        for i, (layer, labels) in enumerate(table):
            assert channels[i].shape == (shape.kv_heads if per == "kv_head" else shape.heads, 6)
            key = layer.keys if per == "kv_head" else layer.keys.repeat_interleave(shape.group, 1)
            want = torch.stack([key[:, h, :, channels[i][h].long()] for h in range(key.shape[1])], 1)
            got = labels.dequantize(0, 21)
            if bits == 16:
                assert torch.equal(got, want)  # prefill rows too (pitfall 7)
            else:
                span = want.amax(-1, keepdim=True) - want.amin(-1, keepdim=True)
                assert bool(((got - want).abs() <= span / (2 * 15) + 1e-6).all())
            one_shot = ops.LabelCache.allocate(2, channels[i].shape[0], 21, 6, bits)
            ops.append_labels(one_shot, layer.keys, channels[i], 0)
            assert torch.equal(got, one_shot.dequantize(0, 21))


# -- 4 and 5: the statistics ------------------------------------------------------------------------------------------


def outlier_states(heads: int = 4, tokens: int = 16) -> tuple[Tensor, Tensor]:
    """Query and key with channel 5 scaled by 10 in head 2 only."""
    query, key = normal(1, heads, tokens, 32), normal(1, heads, tokens, 32, seed=1)
    query[:, 2, :, 5] *= 10
    key[:, 2, :, 5] *= 10
    return query, key


def test_4_order_is_a_permutation_with_ties_by_number() -> None:
    order = channel_order(normal(6, 16))
    assert torch.equal(order.sort(-1).values, torch.arange(16).expand(6, -1))
    assert channel_order(torch.tensor([[1.0, 3.0, 3.0, 2.0]])).tolist() == [[1, 2, 3, 0]]
    ties = torch.arange(256.0).view(1, -1) % 3
    assert channel_order(ties).tolist() == [sorted(range(256), key=lambda c: (-(c % 3), c))]


def test_4_a_planted_outlier_is_first_in_its_head_only() -> None:
    query, key = outlier_states()
    first = channel_order(product_magnitude(query, key))[:, 0]
    assert first[2] == 5
    assert 5 not in first[[0, 1, 3]]
    # Pitfall 1: in the released statistic every "head" holds all heads, so all of them put it first.
    assert channel_order(released_product_magnitude(query, key))[:, 0].tolist() == [5] * 4


def test_4_grouped_queries_find_the_outlier_of_their_kv_head() -> None:
    query, key = normal(1, 4, 16, 32), normal(1, 2, 16, 32, seed=1)
    query[:, 3, :, 6] *= 10  # one query head of KV head 1
    score = product_magnitude(query, key)
    assert score.shape == (4, 32)
    assert channel_order(score)[3, 0] == 6
    assert channel_order(label_scores_per(score, 2, "kv_head", 4))[1, 0] == 6
    assert channel_order(label_scores_per(score, 2, "kv_head", 4))[0, 0] != 6


def test_4_a_planted_outlier_in_a_model() -> None:
    model, (head, channel) = tiny_model("gpt2"), (2, 11)  # no rotary embedding, so channels stay where they are
    with torch.no_grad():
        for part in (0, 64):  # the fused matrix: query, key, value
            model.transformer.h[1].attn.c_attn.weight[:, part + head * 16 + channel] *= 10
    first = channel_order(DoubleSparsity().calibrate(model, ids(2)).tensors["qk.1"])[:, 0].tolist()
    assert first[head] == channel
    assert channel not in first[:head] + first[head + 1 :]
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[1 * 16 + 3] *= 10
        model.model.layers[0].self_attn.k_proj.weight[1 * 16 + 3] *= 10  # KV head 1: query heads 2 and 3
    tensors = DoubleSparsity().calibrate(model, ids(2)).tensors
    assert channel_order(tensors["q.0"])[1, 0] == 3
    assert channel_order(tensors["k.0"])[1, 0] == 3
    assert channel_order(tensors["k.0"])[0, 0] != 3


def test_5_statistics_equal_their_closed_form() -> None:
    states = torch.tensor(
        [[[[1.0, -2.0], [3.0, 4.0]], [[0.0, 1.0], [-1.0, 1.0]]]]
    )  # [1, 2 heads, 2 tokens, 2 channels]
    assert magnitude(states).tolist() == [[2.0, 3.0], [0.5, 1.0]]
    key = torch.tensor([[[[2.0, 1.0], [-1.0, 0.5]]]])  # one KV head
    assert product_magnitude(states, key).tolist() == [[2.5, 2.0], [0.5, 0.75]]


def test_5_the_released_statistic_mixes_heads_over_residue_classes() -> None:
    query, key = normal(1, 4, 16, 8), normal(1, 2, 16, 8, seed=1)
    product = (query * key.repeat_interleave(2, 1)).abs()[0]  # [heads, tokens, channels]
    want = torch.stack([product[:, r::4].mean((0, 1)) for r in range(4)])
    torch.testing.assert_close(released_product_magnitude(query, key), want, **CLOSE)


def test_5_released_heads_look_alike_where_the_true_ones_do_not() -> None:
    query, key = normal(1, 4, 256, 64), normal(1, 4, 256, 64, seed=1)
    for head in range(4):
        query[:, head, :, 16 * head : 16 * head + 8] *= 10  # eight channels of its own
    true, released = (
        [set(row) for row in channel_order(statistic(query, key))[:, :8].tolist()]
        for statistic in (product_magnitude, released_product_magnitude)
    )
    assert [sorted(row) for row in true] == [list(range(16 * h, 16 * h + 8)) for h in range(4)]
    planted = set().union(*true)
    assert all(row < planted for row in released)
    assert not any(row == mine for row, mine in zip(released, true, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_5_calibration_sums_over_blocks(family: str) -> None:
    """Against statistics taken from the model by hand, for a toy of two blocks."""
    model, shape, tokens = model_of(family), model_shape(model_of(family)), ids(2, 24, seed=3)
    want: dict[str, Tensor] = {}
    blocks: dict[str, list[Tensor]] = {}

    def record(index: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            hidden = kwargs.get("hidden_states", args[0] if args else None)
            if family == "gpt2":
                query, key, _ = (
                    x.unflatten(-1, (-1, 16)).transpose(1, 2) for x in module.c_attn(hidden).split(64, dim=2)
                )
            else:
                query, key = (p(hidden).unflatten(-1, (-1, shape.head_dim)) for p in (module.q_proj, module.k_proj))
                if hasattr(module, "q_norm"):
                    query, key = module.q_norm(query), module.k_norm(key)
                query, key = query.transpose(1, 2), key.transpose(1, 2)
                for name, states in (("q", query), ("k", key)):
                    blocks.setdefault(f"{name}.{index}", []).append(states.abs().mean((0, 2)))
                query, key = apply_rotary_pos_emb(query, key, *kwargs["position_embeddings"])
            product = query * key.repeat_interleave(shape.group, 1)
            blocks.setdefault(f"qk.{index}", []).append(product.abs().mean((0, 2)))

        return hook

    hooks = [v.module.register_forward_pre_hook(record(v.index), with_kwargs=True) for v in attention_views(model)]
    with torch.no_grad():
        for block in tokens:
            model(block[None])
    for hook in hooks:
        hook.remove()
    want = {name: sum(parts) for name, parts in blocks.items()}  # type: ignore[misc]
    got = DoubleSparsity().calibrate(model, tokens)
    assert {n for n in got.tensors if not n.startswith("qk_released")} == want.keys()
    for name, value in want.items():
        assert got.tensors[name].shape == (shape.kv_heads if name[:2] == "k." else shape.heads, shape.head_dim)
        torch.testing.assert_close(got.tensors[name], value, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(blocks[name][0], blocks[name][1], rtol=1e-3)
        assert not torch.allclose(got.tensors[name], blocks[name][-1], rtol=1e-3)  # the sum is not the last block
    assert got.facts == {"blocks": 2, "block": 24, "layers": shape.layers}


def test_5_released_compatibility_keeps_the_last_block() -> None:
    model, tokens = model_of("llama"), ids(3, 24, seed=3)
    last = DoubleSparsity().calibrate(model, tokens[-1:]).tensors
    both = DoubleSparsity().calibrate(model, tokens)
    torch.testing.assert_close(both.tensors["qk_released.1"], last["qk_released.1"], **CLOSE)
    assert not torch.allclose(both.tensors["qk.1"], last["qk.1"], rtol=1e-2)
    paper, released = (DoubleSparsity(compat=c).label_channels(both, model_shape(model)) for c in ("paper", "released"))
    assert not all(torch.equal(a, b) for a, b in zip(paper, released, strict=True))
    want = channel_order(label_scores_per(last["qk_released.1"], 2, "kv_head", 4))[:, :4]
    assert torch.equal(released[1].long(), want)


def test_statistics_reach_the_heads_that_have_labels() -> None:
    score = torch.arange(8.0).view(4, 2)
    assert label_scores_per(score, 2, "kv_head", 4).tolist() == [[2.0, 4.0], [10.0, 12.0]]  # summed over the group
    assert torch.equal(label_scores_per(score, 2, "query_head", 4), score)
    keys = score[:2]
    assert torch.equal(label_scores_per(keys, 2, "kv_head", 4), keys)
    assert label_scores_per(keys, 2, "query_head", 4).tolist() == [[0, 1], [0, 1], [2, 3], [2, 3]]  # pitfall 4


# -- 6: gather path equals mask path ----------------------------------------------------------------------------------


def test_6_gathering_equals_masking_and_sees_no_later_token() -> None:
    model = model_of("llama")
    with torch.no_grad(), attach("llama", tokens=6, channels=8, label_bits=4) as handle:
        past = DynamicCache()
        model(ids(2, 20), past_key_values=past)
        outs: list[Tensor] = []
        queries: list[Tensor] = []
        decode = handle.runtime.decode.decode

        def spying(layer: Any, query: Tensor, length: int) -> Tensor:
            queries.append(query)
            outs.append(decode(layer, query, length))
            return outs[-1]

        handle.runtime.decode.decode = spying
        with handle.runtime.teacher_forcing(), handle.runtime.recording() as trace:
            model(ids(2, 10, seed=5), past_key_values=past)
    assert len(trace) == len(outs) == 20
    for (layer, length, indices, counts), query, out in zip(trace, queries, outs, strict=True):
        assert int(indices.max()) < length
        assert bool((counts == 6).all())
        assert bool((indices == length - 1).any(-1).all())  # keep_current
        mask = torch.zeros(2, 4, past.layers[layer].length, dtype=torch.bool).scatter(2, indices.long(), True)
        key, value = (x.repeat_interleave(2, 1) for x in (past.layers[layer].keys, past.layers[layer].values))
        scores = (query[:, :, None] @ key.transpose(2, 3))[:, :, 0] / 4
        want = scores.masked_fill(~mask, float("-inf")).softmax(-1)[:, :, None] @ value
        torch.testing.assert_close(out, want[:, :, 0], atol=1e-6, rtol=1e-5)


def test_6_perplexity_mode_is_one_forward_in_which_every_query_selects() -> None:
    model = model_of("llama")
    runtime = (handle := attach("llama", tokens=6)).runtime
    with torch.no_grad(), handle, runtime.teacher_forcing(), runtime.recording() as trace:
        model(ids(1, 20))
    assert [length for layer, length, *_ in trace if layer == 0] == list(range(7, 21))  # up to 6 rows: all of them


# -- 7: the quantiser -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 16))
def test_7_quantiser_error_is_within_half_a_step(bits: int) -> None:
    key, channels = normal(2, 2, 33, 16) * 5, channel_order(normal(2, 16, seed=1))[:, :7].int()
    labels = ops.LabelCache.allocate(2, 2, 33, 7, bits)
    ops.append_labels(labels, key, channels, 0)
    values = torch.stack([key[:, h, :, channels[h].long()] for h in range(2)], 1)
    span = values.amax(-1, keepdim=True) - values.amin(-1, keepdim=True)
    error = (labels.dequantize(0, 33) - values).abs()
    assert bool((error <= span / (2 * (2**bits - 1)) * (1 + 1e-4) + 1e-6).all())
    if bits == 1:
        assert bool((error.max() > 0.3).all())  # it does quantise


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 12, 16])
def test_7_constant_rows_are_exact(bits: int) -> None:
    key = torch.tensor([0.1, -7.3, 0.0, 1e-20, 3e30]).view(1, 1, 5, 1).expand(1, 1, 5, 8).contiguous()
    labels = ops.LabelCache.allocate(1, 1, 5, 8, bits)
    ops.append_labels(labels, key, torch.arange(8, dtype=torch.int32)[None], 0)
    assert torch.equal(labels.dequantize(0, 5), key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_7_sixteen_bits_bypass_the_quantiser(dtype: torch.dtype) -> None:
    key = normal(1, 2, 9, 8).to(dtype)
    labels = ops.LabelCache.allocate(1, 2, 9, 8, 16, dtype)
    ops.append_labels(labels, key, torch.arange(8, dtype=torch.int32).expand(2, -1), 0)
    assert torch.equal(labels.dequantize(0, 9), key.float())


# -- 9: bytes ---------------------------------------------------------------------------------------------------------


def test_9_bytes_are_the_papers() -> None:
    """The card: per step and head ``S·r·b/8 + 2·k·d·bytes``, for heads that have labels and selections of their own."""
    shape, length = ModelShape(32, 32, 32, 128), 4096
    for n in (8, 16, 32):
        got = DoubleSparsity(tokens=1 / n, channels=32, label_bits=4).io_bytes(length, shape, 2)
        assert got["scores"] == 32 * length * 32 * 4 // 8
        assert got["rows"] == 32 * 2 * (length // n) * 128 * 2
    sixteenth = DoubleSparsity(tokens=1 / 16, channels=1 / 4, label_bits=4).io_bytes(length, shape, 2)
    dense = 32 * 2 * length * 128 * 2
    assert (sixteenth["scores"] + sixteenth["rows"]) / dense == 1 / 32 + 1 / 16  # 0.094: at most 10.7 times
    half = DoubleSparsity(tokens=1 / 16, channels=8, label_bits=16).io_bytes(length, shape, 2)
    assert half == {**sixteenth, "scales": 0}  # γ = n·b/16: the same label bits
    grouped = ModelShape(32, 32, 8, 128)
    both = DoubleSparsity(tokens=256, channels=32, label_bits=4, select_per="kv_head").io_bytes(length, grouped, 2)
    assert both == {"rows": 8 * 2 * 256 * 128 * 2, "scores": 8 * length * 16, "scales": 8 * length * 8}
    short = DoubleSparsity(tokens=256).io_bytes(100, grouped, 2)
    assert short["rows"] == 32 * 2 * 100 * 128 * 2


# -- 10: rotary layouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [4, 16, 64])
def test_10_half_split_and_interleaved_labels_are_equal(dim: int) -> None:
    where = interleaved_channels(torch.arange(dim), dim)
    assert torch.equal(where.sort().values, torch.arange(dim))
    raw, angle = normal(3, 10, dim), torch.arange(10.0)[:, None] / 10 ** (torch.arange(dim // 2) / dim)
    cos, sin = angle.cos(), angle.sin()
    low, high = raw[..., : dim // 2], raw[..., dim // 2 :]
    half_split = torch.cat([low * cos - high * sin, high * cos + low * sin], -1)
    moved = torch.empty_like(raw)
    moved[..., where] = raw
    even, odd = moved[..., ::2], moved[..., 1::2]
    interleaved = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
    channels = channel_order(normal(1, dim, seed=4))[0, : dim // 4]
    torch.testing.assert_close(
        half_split[..., channels], interleaved[..., interleaved_channels(channels, dim)], **CLOSE
    )


# -- the policy's switches --------------------------------------------------------------------------------------------


def sparse_layers(**settings: Any) -> set[int]:
    with torch.no_grad(), attach("qwen2", tokens=4, **settings) as handle, handle.runtime.recording() as trace:
        out = model_of("qwen2")(ids(1, 20))
        model_of("qwen2")(ids(1, 1), past_key_values=out.past_key_values)
    return {layer for layer, *_ in trace}


def test_dense_layers_may_count_from_the_end() -> None:
    assert sparse_layers() == {0, 1, 2}
    assert sparse_layers(dense_layers=(0, 1)) == {2}
    assert sparse_layers(dense_layers=(-1,)) == {0, 1}
    assert sparse_layers(dense_layers=(0, -1)) == {1}
    assert sparse_layers(dense_layers=(3, 17)) == {0, 1, 2}  # this model has no such layers: none is meant instead


def test_min_length_keeps_short_contexts_dense() -> None:
    model = model_of("llama")
    with torch.no_grad(), attach("llama", tokens=4, min_length=25) as handle, handle.runtime.recording() as trace:
        out = model(ids(1, 20))
        for t in range(10):
            out = model(ids(1, 10, seed=1)[:, t : t + 1], past_key_values=out.past_key_values)
    assert sorted({length for _, length, *_ in trace}) == list(range(25, 31))


def test_keep_current_is_a_choice() -> None:
    missing = 0
    for keep in (True, False):
        runtime = (handle := attach("llama", tokens=3, channels=2, label_bits=16, keep_current=keep)).runtime
        with torch.no_grad(), handle, runtime.teacher_forcing(), runtime.recording() as trace:
            model_of("llama")(ids(2, 40))
        present = [bool((i == length - 1).any(-1).all()) for _, length, i, _ in trace]
        missing += present.count(False)
        if keep:
            assert all(present)
    assert missing  # the paper's rule leaves it out now and then


def test_selecting_per_kv_head_shares_rows_in_the_group() -> None:
    for per, heads in (("kv_head", 2), ("query_head", 4)):
        with torch.no_grad(), attach("llama", tokens=4, select_per=per) as handle, handle.runtime.recording() as trace:
            out = model_of("llama")(ids(1, 20))
            model_of("llama")(ids(1, 1), past_key_values=out.past_key_values)
        assert {i.shape[1] for _, _, i, _ in trace} == {heads}


def test_a_context_within_the_budget_is_dense_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("llama")
    with torch.no_grad():
        want = model.generate(ids(), attention_mask=torch.ones(1, 32).long(), max_new_tokens=6, do_sample=False)
        with attach("llama", tokens=64) as handle, caplog.at_level(logging.WARNING, "gossamer"):
            got = model.generate(ids(), attention_mask=torch.ones(1, 32).long(), max_new_tokens=6, do_sample=False)
        assert torch.equal(got, want)
        assert handle.report()["rows_kept"] == 1.0
        assert [r.message for r in caplog.records] == [
            "context of 33 tokens is within the budget of 64: attention is dense"
        ]


def test_what_the_layers_say_does_not_silence_each_other(caplog: pytest.LogCaptureFixture) -> None:
    with attach("llama", tokens=64) as handle, caplog.at_level(logging.WARNING, "gossamer"):
        for _ in range(2):
            handle.runtime.say_once("context of 5 tokens is within the budget of 9: attention is dense")
            handle.runtime.say_once("context of 6 tokens is within the budget of 9: attention is dense")
            handle.runtime.say_once("the attention mask is not plain left padding: attention is dense")
    assert len(caplog.records) == 2


def test_bfloat16_model_takes_an_fp32_calibration() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    with torch.no_grad():
        for bits in (4, 16):
            with DoubleSparsity(tokens=8, label_bits=bits, dense_layers=()).attach(
                model, calibration_of("llama")
            ) as handle:
                out = model.generate(ids(), attention_mask=torch.ones(1, 32).long(), max_new_tokens=4, do_sample=False)
                assert handle.runtime.stats.rows < handle.runtime.stats.dense_rows
        assert out.shape == (1, 36)


# -- calibration: what can go wrong -----------------------------------------------------------------------------------


def test_calibration_leaves_the_model_as_it_was() -> None:
    model = model_of("llama")
    before = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    one, two = (DoubleSparsity().calibrate(model, ids(2)) for _ in range(2))
    assert all(torch.equal(v, two.tensors[k]) for k, v in one.tensors.items())
    with DoubleSparsity(dense_layers=()).attach(model, one), pytest.raises(ModelError, match="attached already"):
        DoubleSparsity().calibrate(model, ids(2))
    assert {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()} == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert model.config._attn_implementation == "sdpa"


def test_calibration_is_missing() -> None:
    with pytest.raises(CalibrationError) as caught:
        DoubleSparsity().attach(model_of("llama"))
    assert message(caught) == (
        "double-sparsity needs a calibration: make one with `gossamer calibrate double-sparsity MODEL`"
    )


def test_calibration_of_another_model_or_method() -> None:
    with pytest.raises(CalibrationError, match="made for another model") as caught:
        DoubleSparsity().attach(tiny_model("llama", seed=1), calibration_of("llama"))
    message(caught)
    with pytest.raises(CalibrationError, match="another model"):
        DoubleSparsity().attach(model_of("qwen2"), calibration_of("llama"))
    ours = calibration_of("llama")
    with pytest.raises(CalibrationError, match="made for quest, not for double-sparsity"):
        DoubleSparsity().attach(model_of("llama"), Calibration("quest", ours.fingerprint, ours.tensors))
    assert model_of("llama").config._attn_implementation == "sdpa"


def test_not_finite_weights_are_refused() -> None:
    for value in (float("nan"), float("inf")):
        model = tiny_model("llama")
        with torch.no_grad():
            model.model.layers[1].self_attn.k_proj.weight[3, 5] = value
        with pytest.raises(CalibrationError, match="not finite: check the model's weights") as caught:
            DoubleSparsity().calibrate(model, ids(2))
        message(caught)
        assert model.config._attn_implementation == "sdpa"


def test_bad_calibration_tokens() -> None:
    for tokens in (ids()[0], ids()[:, :0], torch.empty(0, 8, dtype=torch.long), torch.rand(2, 8)):
        with pytest.raises(InputError, match="non-empty integer matrix") as caught:
            DoubleSparsity().calibrate(model_of("llama"), tokens)
        message(caught)
    with pytest.raises(InputError, match=r"call model.eval\(\) first"):
        DoubleSparsity().calibrate(tiny_model("llama").train(), ids(2))


def test_a_statistic_that_the_family_lacks() -> None:
    with pytest.raises(CalibrationError, match="has no q statistic for layer 0, only qk, qk_released") as caught:
        attach("gpt2", stat="q")
    message(caught)


def test_a_statistic_of_another_shape() -> None:
    ours = calibration_of("llama")
    tensors = {**ours.tensors, "qk.1": torch.ones(3, 16)}
    with pytest.raises(CalibrationError, match=r"qk.1 has shape \[3, 16\]"):
        DoubleSparsity().attach(model_of("llama"), Calibration(ours.method, ours.fingerprint, tensors))


@pytest.mark.parametrize(
    "bad",
    [
        {"channels": 0}, {"channels": 1.5}, {"label_bits": 0}, {"label_bits": 17}, {"label_bits": 4.5}, {"stat": "v"},
        {"labels_per": "head"}, {"select_per": "layer"}, {"group_reduce": "mean"}, {"min_length": -1},
        {"compat": "old"}, {"keep_current": "perhaps"}, {"token_ratio": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        DoubleSparsity(**bad)
    assert message(caught).startswith(f"double-sparsity: {next(iter(bad))}")


# -- the official release's channel files -----------------------------------------------------------------------------


def released_file(stats: tuple[str, ...] = STATS, layers: int = 2) -> dict[str, list[list[int]]]:
    return {
        f"model.layers.{i}.self_attn.{s}_proj": channel_order(normal(2 if s == "k" else 4, 16, seed=i)).tolist()
        for i in range(layers)
        for s in stats
    }


def test_import_keeps_the_order_of_every_head(tmp_path: Path) -> None:
    data, path, model = released_file(), tmp_path / "channels.json", model_of("llama")
    path.write_text(json.dumps(data))
    calibration = import_channels(path, model)
    assert calibration.fingerprint == fingerprint(model)
    for stat in STATS:
        for layer in range(2):
            want = torch.tensor(data[f"model.layers.{layer}.self_attn.{stat}_proj"])
            assert torch.equal(channel_order(calibration.tensors[f"{stat}.{layer}"]), want)
    method = DoubleSparsity(labels_per="query_head", channels=5, dense_layers=(), tokens=4)
    for layer, got in enumerate(method.label_channels(calibration, model_shape(model))):
        assert got.tolist() == [row[:5] for row in data[f"model.layers.{layer}.self_attn.qk_proj"]]
    again = Calibration.load(calibration.save(tmp_path / "c.safetensors"))
    with torch.no_grad(), method.attach(model, again):
        model.generate(ids(), attention_mask=torch.ones(1, 32).long(), max_new_tokens=2)


def test_import_of_one_statistic_serves_that_one(tmp_path: Path) -> None:
    path = tmp_path / "channels.json"
    path.write_text(json.dumps(released_file(("q",))))
    calibration = import_channels(path, model_of("llama"))
    DoubleSparsity(stat="q").attach(model_of("llama"), calibration).detach()
    with pytest.raises(CalibrationError, match="has no qk statistic for layer 0, only q"):
        DoubleSparsity(stat="qk").attach(model_of("llama"), calibration)


BAD_FILES: dict[str, Any] = {
    "empty": {},
    "a list": [1],
    "a number": 3,
    "null": None,
    "another key": {**released_file(), "model.layers.0.mlp": [[0]]},
    "a layer too many": released_file(layers=3),
    "a layer missing": released_file(layers=1),
    "a head missing": {
        **released_file(),
        "model.layers.1.self_attn.q_proj": released_file()["model.layers.1.self_attn.q_proj"][1:],
    },
    "a repeated channel": {**released_file(), "model.layers.1.self_attn.qk_proj": [[0] * 16] * 4},
    "channels short": {**released_file(), "model.layers.1.self_attn.qk_proj": [list(range(8))] * 4},
    "words": {**released_file(), "model.layers.1.self_attn.qk_proj": [["a"] * 16] * 4},
    "mixed": {**released_file(), "model.layers.1.self_attn.qk_proj": [["a", *range(15)]] * 4},
    "flat": {**released_file(), "model.layers.1.self_attn.qk_proj": [0, 1, 2, 3]},
    "no rows": {**released_file(), "model.layers.1.self_attn.qk_proj": None},
    "k of query heads": {**released_file(), "model.layers.1.self_attn.k_proj": [list(range(16))] * 4},
    "channels of text": {**released_file(), "model.layers.1.self_attn.qk_proj": [[str(i) for i in range(16)]] * 4},
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_malformed_channel_files(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "channels.json"
    path.write_text(json.dumps(BAD_FILES[kind]))
    with pytest.raises(CalibrationError) as caught:
        import_channels(path, model_of("llama"))
    assert str(path) in message(caught)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe\x00", b'{"a": [1, 2'])
def test_unreadable_channel_files(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "channels.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match="cannot read the channel file") as caught:
        import_channels(path, model_of("llama"))
    message(caught)


# --- Without a calibration -----------------------------------------------------------------------------------------------


def test_neighbours_need_no_calibration_and_select_by_averaged_channels():
    model = tiny_model("llama")
    ids = torch.randint(3, model.config.vocab_size, (1, 50))
    method = DoubleSparsity(stat="neighbours", tokens=8, channels=4, label_bits=16, dense_layers=(), keep_current=False)
    with method.attach(model) as handle, torch.no_grad():
        cache = model(ids[:, :49], use_cache=True).past_key_values
        with handle.runtime.recording() as trace:
            queries = {}
            plain = handle.runtime.attention

            def spy(module, query, *args, **kwargs):
                queries[module.layer_idx] = query[:, :, 0]
                return plain(module, query, *args, **kwargs)

            handle.runtime.attention = spy
            model(ids[:, 49:], past_key_values=cache)
    assert len(trace) == model.config.num_hidden_layers
    for index, length, indices, counts in trace:
        keys = cache.layers[index].keys
        group = queries[index].shape[1] // keys.shape[1]
        pooled_key = keys.unflatten(-1, (4, -1)).mean(-1).repeat_interleave(group, 1)
        scores = (queries[index].unflatten(-1, (4, -1)).mean(-1)[:, :, None] * pooled_key).sum(-1)
        assert length == 50
        assert (counts == 8).all()
        assert torch.equal(indices.long(), scores.topk(8).indices.sort(-1).values)


@pytest.mark.parametrize("settings", [{"channels": 7}, {"labels_per": "query_head"}, {"offload": "file"}])
def test_neighbours_refuse_what_they_cannot_do(settings):
    with pytest.raises(InputError, match="neighbours") as error:
        DoubleSparsity(stat="neighbours", **settings).attach(tiny_model("llama"))
    assert "\n" not in str(error.value)
