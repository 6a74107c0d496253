"""SeerAttention: pooling, gates, masks and losses against naive versions; prefill, decode and training on a tiny model."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from gossamer.attention import seer_distill as distill
from gossamer.attention import seer_gate as gates
from gossamer.attention.seer_decode import SeerDecodePolicy, rows_of_blocks
from gossamer.attention.seer_gate import SeerGate, block_pools, choose_blocks, pair_counts, parse_gate, visible_blocks
from gossamer.attention.seerattention import SeerAttention
from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError, InputError, ModelError, RecipeError
from gossamer.hf import model_shape
from gossamer.hf.attention import dense_attention
from gossamer.hf.rotary import Rotary
from gossamer.models import tiny_model
from gossamer.recipe import Recipe
from gossamer.registry import make
from gossamer.testing import AttentionContract, Case, Stream

MODEL = tiny_model("qwen2")  # three layers, four query heads on two KV heads of 16 channels
SMALL: dict[str, Any] = {"block_size": 8, "steps": 2}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(batch: int = 1, length: int = 64, seed: int = 0) -> Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def learned(method: SeerAttention, model: Any = MODEL, count: int = 2, length: int = 96) -> Calibration:
    return method.calibrate(model, ids(count, length, seed=11))


def random_gates(method: SeerAttention, model: Any = MODEL, seed: int = 0) -> Calibration:
    """Gates with weights that choose something, without training."""
    calibration = method.model_copy(update={"steps": 0}).calibrate(model, ids(1, 2 * method.block_size))
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(t.shape, generator=generator) * 0.3 for n, t in calibration.tensors.items()}
    return Calibration(calibration.method, calibration.fingerprint, tensors, calibration.facts)


def brute_truth(query: Tensor, key: Tensor, block: int) -> Tensor:
    """The whole map, pooled and normalised, by loops."""
    batch, heads, length, dim = query.shape
    group, n = heads // key.shape[1], -(-length // block)
    out = torch.zeros(batch, heads, n, n)
    for b, h in itertools.product(range(batch), range(heads)):
        scores = query[b, h] @ key[b, h // group].T / dim**0.5
        probs = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
        for i, j in itertools.product(range(n), range(n)):
            out[b, h, i, j] = probs[i * block : (i + 1) * block, j * block : (j + 1) * block].max()
    return out / out.sum(-1, keepdim=True)


# -- pooling (6) ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 5, 8, 21, 24])
@pytest.mark.parametrize("start", [0, 3, 9])
def test_pools_are_those_of_the_true_tokens(length: int, start: int) -> None:
    x, block = normal(2, 3, length, 4), 8
    starts = torch.tensor([0, min(start, length)])
    got = block_pools(x, block, ("max", "min", "avg"), starts)
    assert got.shape == (2, 3, -(-length // block), 12)
    for b, i in itertools.product(range(2), range(got.shape[2])):
        tokens = x[b, :, max(i * block, int(starts[b])) : (i + 1) * block]
        want = [tokens.amax(1), tokens.amin(1), tokens.mean(1)] if tokens.shape[1] else [torch.zeros(3, 4)] * 3
        torch.testing.assert_close(got[b, :, i], torch.cat(want, 1))


def test_all_49_names_are_gates() -> None:
    pools = [("max",), ("min",), ("avg",), ("max", "min"), ("max", "avg"), ("min", "avg"), ("max", "min", "avg")]
    names = {f"Q{''.join(q)}_K{''.join(k)}": (q, k) for q, k in itertools.product(pools, pools)}
    assert len(names) == 49
    assert all(parse_gate(name) == want for name, want in names.items())
    for name in ("Qavg_K", "Q_Kavg", "Kavg_Qavg", "Qavg", "Qavg_Kavgmax", "Qsum_Kavg"):
        with pytest.raises(InputError, match="gate"):
            SeerAttention(gate=name)


# -- ground truth (2) -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [40, 61])
def test_streamed_ground_truth_is_the_pooled_map(length: int) -> None:
    query, key = normal(2, 4, length, 16), normal(2, 2, length, 16, seed=1)
    got = distill.ground_truth(query, key, 8)
    torch.testing.assert_close(got, brute_truth(query, key, 8), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.sum(-1), torch.ones(got.shape[:3]))
    assert not got.triu(1).any()
    rows = distill.decode_ground_truth(query, key, 8, None, 0.25)
    single = F.pad(torch.cat([brute_rows(query, key)], 0), (0, -length % 8))
    want = single.unflatten(-1, (-1, 8)).amax(-1).unflatten(1, (2, 2)).amax(2)
    torch.testing.assert_close(rows, want / want.sum(-1, keepdim=True), atol=1e-6, rtol=1e-5)


def brute_rows(query: Tensor, key: Tensor) -> Tensor:
    length = query.shape[2]
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.25
    return scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf).softmax(-1)


# -- masks (3, 4) -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.floats(0.01, 1.0), st.integers(0, 3), st.integers(0, 100))
def test_rows_keep_the_best_k_and_the_last_rows_everything(n: int, area: float, dense: int, seed: int) -> None:
    scores, visible = normal(1, 2, n, n, seed=seed), visible_blocks(n * 4, n * 4, 4, None, torch.device("cpu"))
    mask = choose_blocks(scores, visible, area=area, last_dense=dense)
    k = max(1, math.floor((1 - math.sqrt(1 - area)) * n + 1e-9))
    assert not mask.triu(1).any()
    for i in range(n):
        if i >= n - dense:
            assert mask[:, :, i, : i + 1].all()
            continue
        assert (mask[:, :, i].sum(-1) == min(k, i + 1)).all()
        for h in range(2):
            best = scores[0, h, i, : i + 1].topk(min(k, i + 1)).indices
            assert mask[0, h, i, best].all()


@pytest.mark.parametrize("area", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("n", [32, 128, 500])
def test_density_over_the_triangle(area: float, n: int) -> None:
    visible = visible_blocks(n, n, 1, None, torch.device("cpu"))
    mask = choose_blocks(normal(1, 1, n, n), visible, area=area)
    r = gates.row_budget(area, n) / n
    density = float(mask.sum()) / (n * (n + 1) / 2)
    assert abs(density - (2 * r - r * r)) < 2 / n
    assert abs(density - area) < 3 / n + 1e-9


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.floats(0.0, 0.9), st.integers(0, 50))
def test_a_threshold_keeps_what_is_above_it_and_never_nothing(n: int, tau: float, seed: int) -> None:
    scores, visible = normal(1, 2, n, n, seed=seed), visible_blocks(n, n, 1, None, torch.device("cpu"))
    mask = choose_blocks(scores, visible, threshold=tau)
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    assert not mask.triu(1).any()
    assert mask.any(-1).all()
    above = weights > tau
    lost = ~above.any(-1, keepdim=True)
    best = torch.zeros_like(mask).scatter_(3, weights.argmax(3, keepdim=True), True)
    assert torch.equal(mask, above | (lost & best))


@pytest.mark.parametrize(("new", "length", "block"), [(40, 40, 8), (13, 40, 8), (37, 37, 8), (5, 5, 8), (1, 33, 8)])
def test_pairs_and_visibility_are_those_of_the_tokens(new: int, length: int, block: int) -> None:
    seen = torch.ones(new, length, dtype=torch.bool).tril(length - new)
    padded = F.pad(seen, (0, -length % block, 0, -new % block))
    blocks = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block)).sum((1, 3))
    assert torch.equal(pair_counts(new, length, block, torch.device("cpu")), blocks)
    assert torch.equal(visible_blocks(new, length, block, None, torch.device("cpu"))[0, 0], blocks > 0)


def test_no_query_is_left_with_nothing() -> None:
    """A chunk that does not start at a block: its first queries do not see the last block that their row may choose."""
    visible = visible_blocks(8, 20, 8, None, torch.device("cpu"))  # rows 12..19; blocks begin at 0, 8, 16
    first = torch.tensor([[12]])
    aligned = visible & (torch.arange(3) * 8 <= first)
    scores = torch.tensor([0.0, 1.0, 5.0]).view(1, 1, 1, 3)
    assert choose_blocks(scores, visible, area=0.2, aligned=aligned).tolist() == [[[[False, True, True]]]]


def test_padding_is_neither_read_nor_reads() -> None:
    visible = visible_blocks(32, 32, 8, torch.tensor([0, 12]), torch.device("cpu"))
    assert visible[0, 0].tolist() == torch.ones(4, 4).tril().bool().tolist()
    want = torch.ones(4, 4).tril().bool()
    want[0], want[:, 0] = False, False
    assert torch.equal(visible[1, 0], want)


# -- gates (5, 8, 9) --------------------------------------------------------------------------------------------------


def test_the_shortcut_is_the_general_gate_with_an_identity() -> None:
    rotary, shape = Rotary(MODEL), model_shape(MODEL)
    short = SeerGate(shape.heads, shape.kv_heads, 16)
    long = SeerGate(shape.heads, shape.heads, 16, force_double=True)  # keys repeated to all heads first
    assert short.wq is None
    assert long.wq is not None
    with torch.no_grad():
        long.wq.copy_(torch.eye(16).expand(4, 16, 16))
        long.wk.copy_(short.wk)
    q, k = normal(2, 4, 6, 16), normal(2, 2, 6, 48, seed=1)
    want = short(q, k, rotary, 0, 8)
    torch.testing.assert_close(long(q, k.repeat_interleave(2, 1), rotary, 0, 8), want)


def test_heads_of_a_group_share_their_key() -> None:
    rotary = Rotary(MODEL)
    gate = SeerGate(4, 2, 16, force_double=True)
    assert gate.wk.shape == (2, 48, 16)
    q = normal(1, 1, 6, 16).expand(1, 4, 6, 16)
    assert gate.wq is not None
    with torch.no_grad():
        gate.wq.copy_(gate.wq[:1].expand(4, -1, -1))
    scores = gate(q, normal(1, 2, 6, 48, seed=1), rotary, 0, 8)
    assert torch.equal(scores[:, 0], scores[:, 1])
    assert torch.equal(scores[:, 2], scores[:, 3])
    assert not torch.equal(scores[:, 0], scores[:, 2])


@pytest.mark.parametrize("name", ["Qavg_Kmaxminavg", "Qmaxavg_Kmin"])
@pytest.mark.parametrize("width", [16, 24])
def test_a_gate_is_its_formula(name: str, width: int) -> None:
    """Rotated by hand at block positions, head by head; a chunk is the lower part of the whole."""
    (_, wide), (qp, kp) = SeerAttention(gate_dim=width).rotaries(MODEL), parse_gate(name)
    gate = SeerGate(4, 2, 16, name, width)
    q, k = normal(1, 4, 5, 16 * len(qp)), normal(1, 2, 5, 16 * len(kp), seed=1)
    got = gate(q, k, wide, 0, 8)
    at = torch.arange(5) * 8
    theta = 10000.0 ** (-torch.arange(0, width, 2) / width)
    angle = at[:, None] * theta

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    for h in range(4):
        one = q[0, h] if gate.wq is None else q[0, h] @ gate.wq[h]
        other = k[0, h // 2] @ gate.wk[h if gate.wq is None else h // 2]
        torch.testing.assert_close(got[0, h], rotate(one) @ rotate(other).T / width**0.5, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gate(q[:, :, 3:], k, wide, 0, 8, offset=24), got[:, :, 3:])


def test_an_oracle_gate_has_no_loss_and_chooses_the_true_blocks() -> None:
    query, key = normal(1, 4, 96, 16), normal(1, 2, 96, 16, seed=1)
    truth = distill.ground_truth(query, key, 8)
    visible = visible_blocks(96, 96, 8, None, torch.device("cpu"))
    scores = truth.log().clamp_min(gates.HIDDEN)
    assert abs(float(distill.gate_loss(scores, truth, visible, "kl"))) < 1e-6
    assert float(distill.gate_loss(scores, truth, visible, "mse")) < 1e-12
    mask = choose_blocks(scores, visible, area=0.5)
    k = gates.row_budget(0.5, 12)
    for h, i in itertools.product(range(4), range(12)):
        best = truth[0, h, i, : i + 1].topk(min(k, i + 1)).indices
        assert mask[0, h, i].nonzero().flatten().tolist() == sorted(best.tolist())


def test_losses_are_pytorchs() -> None:
    scores, target = normal(2, 4, 8, 8), distill.normalised(normal(2, 4, 8, 8, seed=1).abs().tril())
    visible = torch.ones(8, 8, dtype=torch.bool).tril()
    logits = scores.masked_fill(~visible, -1e30).log_softmax(-1)
    assert torch.allclose(
        distill.gate_loss(scores, target, visible, "kl"),
        (target * (target.clamp_min(1e-30).log() - logits))[:, :, 2:].mean(),
    )
    weights = logits.exp()
    assert torch.allclose(distill.gate_loss(scores, target, visible, "mse"), ((weights - target) ** 2).mean())
    assert torch.allclose(distill.gate_loss(scores, target, visible, "smooth_l1"), F.smooth_l1_loss(weights, target))


# -- prefill on a model (1) -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"area": 1.0}, {"threshold": -0.5}, {"dense_layers": (0, 1, -1), "area": 0.1}])
def test_everything_kept_is_dense(change: dict[str, Any]) -> None:
    method = SeerAttention(**SMALL, **change)
    mask = torch.ones(2, 61, dtype=torch.bool)
    mask[1, :19] = False
    stream = Stream(length=61)
    with torch.no_grad(), method.attach(MODEL, random_gates(method)) as handle:
        torch.testing.assert_close(stream.feed(handle, 61), stream.dense(0), atol=1e-5, rtol=1e-5)
        assert handle.report()["prefill_area"] == 1.0
        stream = Stream(length=61)
        got = stream.feed(handle, 61, mask=mask)
    want = dense_attention(
        *(x[0] for x in (stream.query, stream.key, stream.value)), 0.25, starts=torch.tensor([0, 19])
    )
    torch.testing.assert_close(got[0, 0], want[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[0, 1, :, 19:], want[1, :, 19:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", [{"area": 0.3}, {"threshold": 0.2}, {"area": 0.2, "last_block_dense": 0}])
def test_prefill_is_exact_on_the_chosen_blocks(change: dict[str, Any]) -> None:
    method = SeerAttention(**SMALL, **change)
    stream = Stream(length=90)
    with torch.no_grad(), method.attach(MODEL, random_gates(method)) as handle:
        policy: Any = handle.runtime.prefill
        masks: list[Tensor] = []
        choose = policy.mask
        policy.mask = lambda *a: masks.append(choose(*a)) or masks[-1]
        got = stream.feed(handle, 90)
        area = handle.report()["prefill_area"]
    kept = 0
    for layer, blocks in enumerate(masks):
        tokens = blocks.repeat_interleave(8, 2)[:, :, :90].repeat_interleave(8, 3)[..., :90]
        seen = tokens & torch.ones(90, 90, dtype=torch.bool).tril()
        kept += int(seen.sum())
        key, value = (x[layer].repeat_interleave(2, 1) for x in (stream.key, stream.value))
        scores = (stream.query[layer] @ key.transpose(2, 3) * 0.25).masked_fill(~seen, -math.inf)
        torch.testing.assert_close(got[layer], scores.softmax(-1) @ value, atol=1e-5, rtol=1e-5)
    assert area == pytest.approx(kept / (3 * 2 * 4 * 90 * 91 // 2), rel=1e-12)
    assert 0.05 < area < 0.9


def test_the_gate_sees_states_before_rotation() -> None:
    """By hooks on the projections; with positions that start after the padding too."""
    method = SeerAttention(**SMALL, area=0.3)
    pooled: dict[str, Tensor] = {}
    with torch.no_grad(), method.attach(MODEL, random_gates(method)) as handle:
        policy: Any = handle.runtime.prefill
        scores = policy.scores

        def spy(layer: Any, query: Tensor, key: Tensor) -> Tensor:
            if layer.index == 1:
                pooled["q"], pooled["k"] = query, key
                pooled["G"] = scores(layer, query, key)
                return pooled["G"]
            return scores(layer, query, key)

        policy.scores = spy
        view = handle.runtime.views[1]
        raw: dict[str, Tensor] = {}
        hooks = [
            source.register_forward_hook(lambda m, a, out, name=name: raw.update({name: out}))
            for name, source in (("q", view.q_source), ("k", view.k_source))
        ]
        mask = torch.ones(2, 50, dtype=torch.long)
        mask[1, :13] = 0
        MODEL.generate(ids(2, 50), attention_mask=mask, max_new_tokens=1)
        for hook in hooks:
            hook.remove()
        q, k = (raw[n].view(2, 50, -1, 16).transpose(1, 2) for n in ("q", "k"))
        starts = torch.tensor([0, 13])
        gate = policy.gates[1]
        want = gate(
            block_pools(q, 8, ("avg",), starts), block_pools(k, 8, ("max", "min", "avg"), starts), policy.wide, 1, 8
        )
    seen = visible_blocks(50, 50, 8, starts, q.device).expand_as(want)
    torch.testing.assert_close(pooled["G"][seen], want[seen], atol=1e-4, rtol=1e-4)


def test_chunks_of_whole_blocks_score_like_the_whole() -> None:
    method = SeerAttention(**SMALL, threshold=0.15, last_block_dense=0)
    calibration = random_gates(method)
    outs = []
    for sizes in ((72,), (24, 48), (8, 40, 24)):
        stream = Stream(length=72)
        with torch.no_grad(), method.attach(MODEL, calibration) as handle:
            outs.append(stream.feed(handle, *sizes))
    torch.testing.assert_close(outs[1], outs[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outs[2], outs[0], atol=1e-5, rtol=1e-5)


def test_chunks_across_blocks_and_crops_stay_finite_and_right() -> None:
    method = SeerAttention(**SMALL, area=0.3)
    calibration = random_gates(method)
    with torch.no_grad(), method.attach(MODEL, calibration) as handle:
        stream = Stream(length=64)
        assert stream.feed(handle, 13, 21, 30).isfinite().all()
        stream = Stream(length=64)
        stream.feed(handle, 24)
        want = stream.feed(handle, 40)
        wrong, stream = Stream(length=64, seed=1), Stream(length=64)
        wrong.cache = stream.cache
        stream.feed(handle, 24)
        wrong.feed(handle, 17)
        stream.cache.crop(-17)
        torch.testing.assert_close(stream.feed(handle, 40), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [2, 7, 8, 9])
def test_inputs_around_one_block(length: int) -> None:
    method = SeerAttention(**SMALL, area=0.1, last_block_dense=0)
    with torch.no_grad(), method.attach(MODEL, random_gates(method)) as handle:
        stream = Stream(length=length)
        got = stream.feed(handle, length)
    assert got.isfinite().all()
    if length <= 8:
        torch.testing.assert_close(got, stream.dense(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma", "gemma3"])
def test_families_generate(family: str) -> None:
    model = tiny_model(family)
    method = SeerAttention(**SMALL, area=0.4, phases="both", tokens=24, gate_dim=8)
    with method.attach(model, learned(method, model, 1, 40)) as handle:
        mask = torch.ones(2, 50, dtype=torch.long)
        mask[1, :13] = 0
        out = model.generate(ids(2, 50), attention_mask=mask, max_new_tokens=6, do_sample=False)
        assert out.shape == (2, 56)
        assert 0.2 < handle.report()["prefill_area"] < 1
        assert handle.report()["rows_kept"] < 1
    assert model(ids(1, 5)).logits.isfinite().all()


def test_bfloat16_models() -> None:
    model = tiny_model("qwen2").bfloat16()
    method = SeerAttention(**SMALL, area=0.4, phases="both", tokens=16)
    with method.attach(model, learned(method, model)):
        assert model.generate(ids(1, 50), max_new_tokens=4).shape == (1, 54)
        assert model(ids(1, 50)).logits.isfinite().all()


def test_it_stacks_with_a_decode_method_and_claims_what_it_serves() -> None:
    method, quest = SeerAttention(**SMALL, area=0.4), make("quest", tokens=16, page_size=4)
    with Recipe.of((method, random_gates(method)), quest).attach(MODEL) as handle:
        MODEL.generate(ids(1, 50), max_new_tokens=4)
        report = handle.report()
        assert report["prefill_area"] < 1
        assert report["rows_kept"] < 1
    both = SeerAttention(**SMALL, phases="both")
    with pytest.raises(RecipeError, match=r"both take the slot attention\.decode"):
        Recipe.of((both, random_gates(both)), quest).attach(MODEL)
    assert MODEL.config._attn_implementation == "sdpa"


# -- decode -----------------------------------------------------------------------------------------------------------


def test_decode_reads_the_blocks_that_its_gate_scores_highest() -> None:
    method = SeerAttention(**SMALL, phases="decode", tokens=24)
    calibration = random_gates(method)
    stream = Stream(batch=1)
    with torch.no_grad(), method.attach(MODEL, calibration) as handle, handle.runtime.recording() as trace:
        policy: Any = handle.runtime.decode
        stream.feed(handle, 60, 1)
        for layer, length, rows, counts in trace:
            rotary, gate = policy.rotary, policy.gates[layer]
            key = rotary.plain(stream.key[layer][:, :, :56], layer, torch.arange(56))
            query = rotary.plain(stream.query[layer][:, :, 60:61], layer, torch.tensor([60]))
            pooled = block_pools(key, 8, ("max", "min", "avg"))
            scores = gate(query, pooled, rotary, layer, 8, torch.tensor([60]))[0, :, 0]
            for h in range(2):
                best = scores[h].topk(2).indices.tolist()
                want = {*range(56, 61), *(r for b in best for r in range(b * 8, b * 8 + 8))}
                assert set(rows[0, h, : int(counts[0, h])].tolist()) == want
            assert length == 61


def test_a_query_of_the_decode_gate_is_the_sum_over_its_group() -> None:
    gate = SeerAttention(phases="decode").decode_gate(model_shape(MODEL))
    q = normal(1, 4, 3, 16)
    joint = gate.query(q, Rotary(MODEL), 0, torch.zeros(3))
    for k in range(2):
        total = sum(q[0, 2 * k + g] @ gate.wq[k, 16 * g : 16 * g + 16] for g in range(2))
        assert isinstance(total, Tensor)
        want = total / (total.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(joint[0, k], want, atol=1e-4, rtol=1e-4)


def test_a_decode_threshold_keeps_the_blocks_above_it() -> None:
    method = SeerAttention(**SMALL, phases="decode", decode_threshold=0.2)
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, :19] = False
    with torch.no_grad(), method.attach(MODEL, random_gates(method)) as handle, handle.runtime.recording() as trace:
        assert isinstance(handle.runtime.decode, SeerDecodePolicy)
        assert Stream().feed(handle, 40, *[1] * 24, mask=mask).isfinite().all()
    assert len(trace) == 3 * 24
    sizes = torch.cat([counts.flatten() for _, _, _, counts in trace])
    assert int(sizes.min()) < int(sizes.max()) <= 64
    for _, length, rows, counts in trace:
        for b, h in itertools.product(range(2), range(2)):
            kept = rows[b, h, : int(counts[b, h])].tolist()
            assert len(set(kept)) == len(kept)
            assert all(19 * b <= r < length for r in kept)
            assert length - 1 in kept
    with pytest.raises(InputError, match="threshold"):
        method.io_bytes(64, model_shape(MODEL), 4)


def test_decode_after_dropped_rows() -> None:
    """A cache method below it drops rows: compressed keys are made anew from those that are left."""
    method = SeerAttention(**SMALL, phases="decode", tokens=16)
    with torch.no_grad(), method.attach(MODEL, random_gates(method)) as handle:
        stream = Stream(batch=1, length=80)
        stream.feed(handle, 70, 1)
        keep = torch.arange(0, 71, 2).expand(1, 2, -1)
        for layer in stream.cache.layers:
            layer.keep(keep)
        assert stream.feed(handle, 1, 1).isfinite().all()


def test_rows_of_blocks_without_padding_rows() -> None:
    blocks = torch.tensor([[[1, 0]], [[1, 0]]], dtype=torch.int32)
    rows, counts = rows_of_blocks(blocks, torch.full((2, 1), 2, dtype=torch.int32), 2, 4, 5, torch.tensor([0, 3]))
    assert rows[0, 0].tolist() == [4, 2, 3, 0, 1]
    assert counts.flatten().tolist() == [5, 2]
    assert rows[1, 0, :2].tolist() == [4, 3]


# -- training (7) -----------------------------------------------------------------------------------------------------


def test_gates_beside_a_frozen_model_change_nothing_and_learn_alone() -> None:
    model = tiny_model("qwen2").requires_grad_(False)
    method, mask = SeerAttention(**SMALL), torch.ones(2, 50, dtype=torch.long)
    mask[1, :13] = 0
    layers = [method.prefill_gate(model_shape(model)) for _ in range(3)]
    for given_mask in (None, mask):
        want = model(ids(2, 50), attention_mask=given_mask).logits
        with distill.GateTraining(model, method, layers) as training:
            got = model(ids(2, 50), attention_mask=given_mask, use_cache=False).logits
            real = slice(None) if given_mask is None else mask.bool()
            torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=1e-5)
            training.loss().backward()
    assert all(gate.wk.grad is not None and bool(gate.wk.grad.abs().max() > 0) for gate in layers)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model(ids(1, 9)).logits, tiny_model("qwen2")(ids(1, 9)).logits)


def test_the_live_loss_is_the_cached_loss() -> None:
    model, method = tiny_model("qwen2").requires_grad_(False), SeerAttention(**SMALL)
    collector = distill.collect(method, model, ids(2, 61), lambda *a: None)
    layers = [method.prefill_gate(model_shape(model)) for _ in range(3)]
    rotary, visible = Rotary(model), visible_blocks(61, 61, 8, None, torch.device("cpu"))
    want = 0.0
    for i, (gate, s) in enumerate(zip(layers, collector.prefill_samples, strict=True)):
        scores = gate(torch.cat(s.query), torch.cat(s.key), rotary, i, 8)
        want += 10 * distill.gate_loss(scores, torch.cat(s.target).float(), visible, "kl").item()
    with distill.GateTraining(model, method, layers) as training:
        model(ids(2, 61), use_cache=False)
        assert training.loss().item() == pytest.approx(want, rel=1e-2)  # targets kept in bfloat16


def test_fine_tuning_computes_the_chosen_blocks_and_trains_everything() -> None:
    model = tiny_model("llama")
    method = SeerAttention(**SMALL, area=0.4, loss="mse", last_block_dense=0)
    calibration = random_gates(method, model)
    layers = [
        gates.load_gate(method.prefill_gate(model_shape(model)), calibration.tensors, f"prefill.{i}").requires_grad_()
        for i in range(2)
    ]
    with torch.no_grad(), method.attach(model, calibration):
        want = model(ids(2, 50)).logits
    with distill.GateTraining(model, method, layers, fine_tune=True) as training:  # type: ignore[arg-type]
        logits = model(ids(2, 50), use_cache=False).logits
        torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)
        plain = training.losses.copy()
        loss = training.loss(logits, ids(2, 50))
        entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids(2, 50)[:, 1:].flatten())
        assert loss.item() == pytest.approx(entropy.item() + 10 * sum(x.item() for x in plain.values()), rel=1e-5)
        loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    assert grads["model.layers.0.self_attn.k_proj.weight"].abs().max() > 0  # type: ignore[union-attr]
    assert all(p.grad is not None for gate in layers for p in gate.parameters())


@pytest.mark.parametrize("fine_tune", [False, True])
def test_training_on_the_live_model_lowers_the_loss(fine_tune: bool) -> None:
    model = tiny_model("llama").requires_grad_(fine_tune)
    method = SeerAttention(**SMALL, loss="mse" if fine_tune else "kl", area=0.5)
    layers = [method.prefill_gate(model_shape(model)) for _ in range(2)]
    batches = itertools.repeat(ids(4, 64))
    with distill.GateTraining(model, method, layers, fine_tune=fine_tune) as training:
        losses = distill.train_live(
            training, batches, 12, lr=3e-3, warmup=2, schedule="linear" if fine_tune else "cosine"
        )
    assert len(losses) == 12
    assert losses[-1] < losses[0]


def test_distillation_learns_and_is_deterministic(tmp_path: Path) -> None:
    method = SeerAttention(block_size=8, steps=60, warmup=5, phases="both", lr=1e-2)
    said: list[str] = []
    calibration = method.calibrate(MODEL, ids(4, 96, seed=3), lambda what, done, total: said.append(what))
    first, last = calibration.facts["loss_first"], calibration.facts["loss_last"]
    assert all(last[name] < first[name] for name in first)
    assert set(said) == {"reading the model's attention", "training prefill gates", "training decode gates"}
    again = method.calibrate(MODEL, ids(4, 96, seed=3))
    assert all(torch.equal(again.tensors[n], t) for n, t in calibration.tensors.items())
    loaded = Calibration.load(calibration.save(tmp_path / "gates.safetensors"))
    with torch.no_grad():
        with method.attach(MODEL, calibration):
            want = MODEL(ids(1, 80)).logits
        with method.attach(MODEL, loaded):
            assert torch.equal(MODEL(ids(1, 80)).logits, want)


def test_the_command_distils(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gossamer import cli

    class Loaded:
        name, model = "tiny", MODEL

        @staticmethod
        def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) % 255 + 1 for c in text[:9000]]}

    monkeypatch.setattr(cli, "load_model", lambda *a: Loaded)
    path = tmp_path / "gates.safetensors"
    command = ["calibrate", "seerattention", "tiny", "-o", str(path), "--blocks", "2", "--length", "64"]
    monkeypatch.setattr("sys.argv", ["gossamer", *command, "--set", "block_size=8", "--set", "steps=2"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    assert "wrote" in capsys.readouterr().out
    calibration = Calibration.load(path)
    assert calibration.facts["length"] == 64
    with torch.no_grad(), SeerAttention(**SMALL).attach(MODEL, calibration):
        assert MODEL(ids(1, 40)).logits.isfinite().all()


def test_schedule() -> None:
    values = [distill.cosine(step, 150, 20, 0.01) for step in range(151)]
    assert values[:3] == [1 / 20, 2 / 20, 3 / 20]
    assert max(values) == values[19] == 1.0
    assert values[-1] == pytest.approx(0.01)
    assert all(a >= b for a, b in itertools.pairwise(values[19:]))


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"area": 0.0}, "area"),
        ({"area": 1.5}, "area"),
        ({"nz_ratio": -1}, "nz_ratio"),
        ({"area": float("nan")}, "area"),
        ({"threshold": 2.0}, "threshold"),
        ({"block_size": 0}, "block_size"),
        ({"gate": "Qavg"}, "gate"),
        ({"gate_dim": 7}, "gate_dim"),
        ({"loss": "l2"}, "loss"),
        ({"phases": "all"}, "phases"),
        ({"lr": 0}, "lr"),
        ({"batch": 0}, "batch"),
        ({"last_block_dense": -1}, "last_block_dense"),
    ],
)
def test_bad_settings_are_one_line(change: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match=name) as caught:
        make("seerattention", **change)
    assert "\n" not in str(caught.value)


def test_gates_that_do_not_fit_are_refused() -> None:
    method = SeerAttention(**SMALL)
    good = random_gates(method)

    def changed(facts: dict[str, Any] | None = None, **tensors: Tensor) -> Calibration:
        names = {name.replace("__", "."): t for name, t in tensors.items()}
        return Calibration(good.method, good.fingerprint, {**good.tensors, **names}, {**good.facts, **(facts or {})})

    refused: list[tuple[SeerAttention, Any, str]] = [
        (method, None, "gossamer calibrate seerattention"),
        (method, random_gates(method, tiny_model("llama")), "another model"),
        (SeerAttention(block_size=16), good, "block_size=8"),
        (SeerAttention(block_size=8, gate="Qavg_Kavg"), good, "gate=Qavg_Kmaxminavg"),
        (SeerAttention(block_size=8, gate_dim=8), good, "prefill.0.wq"),
        (method, changed(prefill__1__wk=torch.zeros(3)), "prefill.1.wk"),
        (SeerAttention(block_size=8, phases="decode"), good, "no decode gates"),
    ]
    for one, calibration, message in refused:
        with pytest.raises(CalibrationError, match=message) as caught:
            one.attach(MODEL, calibration)
        assert "\n" not in str(caught.value)
    with pytest.raises(CalibrationError, match="not finite"):
        changed(prefill__1__wk=torch.full((4, 48, 16), math.nan))
    tensors = {
        f"prefill.0.{n}": torch.full_like(p, math.inf)
        for n, p in method.prefill_gate(model_shape(MODEL)).named_parameters()
    }
    with pytest.raises(CalibrationError, match="not finite"):
        gates.load_gate(method.prefill_gate(model_shape(MODEL)), tensors, "prefill.0")
    assert MODEL.config._attn_implementation == "sdpa"


def test_calibration_refuses_what_it_cannot_learn_from() -> None:
    method = SeerAttention(**SMALL)
    for tokens, message in (
        (torch.zeros(0, 50, dtype=torch.long), "integer matrix"),
        (torch.zeros(50, dtype=torch.long), "integer matrix"),
        (torch.zeros(2, 50), "integer matrix"),
        (ids(2, 8), "longer"),
    ):
        with pytest.raises(InputError, match=message):
            method.calibrate(MODEL, tokens)
    with pytest.raises(InputError, match="eval"):
        method.calibrate(tiny_model("llama").train(), ids(2, 50))
    broken = tiny_model("llama")
    broken.model.layers[1].self_attn.q_proj.weight.data[0, 0] = math.nan
    with pytest.raises(CalibrationError, match="layer 1 are not finite"):
        method.calibrate(broken, ids(2, 50))
    assert broken.config._attn_implementation == "sdpa"
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    for model in (tiny_model("gpt2"), tiny_model("llama", rope_parameters=dynamic)):
        with pytest.raises(ModelError, match="unrotated"):
            method.calibrate(model, ids(2, 50))
    with pytest.raises(CalibrationError, match="lower lr"):
        SeerAttention(block_size=8, steps=5, lr=1e37, warmup=0).calibrate(MODEL, ids(2, 50))


def test_training_refuses_what_it_cannot_do() -> None:
    method, shape = SeerAttention(**SMALL), model_shape(MODEL)
    with pytest.raises(InputError, match="1 gates for 3 layers"):
        distill.GateTraining(MODEL, method, [method.prefill_gate(shape)])
    layers = [method.prefill_gate(shape) for _ in range(3)]
    with distill.GateTraining(MODEL, method, layers) as training:
        with pytest.raises(InputError, match="run the model"):
            training.loss()
        cache = DynamicCache()
        MODEL(ids(1, 20), past_key_values=cache)
        with pytest.raises(InputError, match="whole sequences"):
            MODEL(ids(1, 20), past_key_values=cache)
        with pytest.raises(ModelError, match="left-padded"):
            MODEL(ids(1, 20), attention_mask=torch.tensor([[1] * 19 + [0]]), use_cache=False)


DECODE: dict[str, Any] = {"phases": "decode", "block_size": 4}


class TestSeerAttention(AttentionContract):
    """The decode variant keeps the family's contract; blocks are counted from row 0, so padding moves them."""

    cases: ClassVar[list[Case]] = [
        Case(
            "seerattention", {**DECODE, "tokens": 12}, exact_count=False, row_wise=False, learn={**DECODE, "steps": 3}
        ),
        Case(
            "seerattention",
            {**DECODE, "decode_threshold": 0.12},
            full={"decode_threshold": -0.5},
            exact_count=False,
            row_wise=False,
            fixed_bytes=False,
            learn={**DECODE, "steps": 3},
        ),
    ]
