"""SquareHead: the card's exact checks on the loss, the fixed masks, one-shot pruning, and the packed 8-bit model."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from gossamer.errors import InputError, ModelError, UnknownNameError
from gossamer.hf import matrices
from gossamer.models import Plan, block_batches, byte_model, language_loss, tiny_model, train
from gossamer.ops.sparse_formats import pack
from gossamer.ops.sparse_linear import sparse_linear
from gossamer.patterns import Masks, second_order_prune
from gossamer.registry import make
from gossamer.weights.prune import Magnitude, SparseGPT
from gossamer.weights.squarehead import (
    SquareHead,
    fixed_masks,
    sparse_finetune,
    without_dropout,
)
from gossamer.weights.squarehead_loss import SquareHeadLoss, logit_divergence, square_head
from gossamer.weights.squarehead_runtime import (
    PackedModel,
    bytes_per_weight,
    ideal_decode_speedup,
    is_smaller,
    packed_bytes,
    quantize_weights,
)

TEXT = torch.randint(0, 256, (6, 17), generator=torch.Generator().manual_seed(0))
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


def llama(seed: int = 0, **overrides: Any) -> Any:
    return byte_model("llama", seed, **{**SMALL, **overrides})


def t5(seed: int = 0) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=0.1,
    )
    return T5ForConditionalGeneration(config).eval()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- the loss (1 to 4) ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_student_that_is_the_teacher_has_no_distance_and_no_gradient(family):
    student = tiny_model(family)
    loss = SquareHeadLoss(copy.deepcopy(student), ce=0.0, kl=1.0)
    value = loss(student, TEXT)
    assert loss.layers == [0.0, 0.0]
    assert loss.parts["kl"] == pytest.approx(0, abs=1e-7)
    loss = SquareHeadLoss(loss.teacher, ce=0.0)
    value = loss(student, TEXT)
    value.backward()
    assert float(value.detach()) == 0
    assert all(p.grad is None or not bool(p.grad.any()) for p in student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in loss.teacher.parameters())


@given(st.floats(-3, 3), st.sampled_from(["bf16", 1e-8, 0.5]), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_a_multiple_of_the_teacher_has_the_distance_of_the_formula(c, eps, seed):
    h = normal(2, 3, 8, seed=seed)
    energy, added = float(h.square().mean()), 2**-7 if eps == "bf16" else eps
    wanted = (c - 1) ** 2 * energy / (energy + added)
    assert float(square_head(c * h, h, eps=eps)) == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@given(st.floats(0.01, 100), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_the_scale_of_both_does_not_matter_without_eps_and_matters_with_it(a, seed):
    s, t = normal(2, 3, 8, seed=seed), normal(2, 3, 8, seed=seed + 1000)
    assert float(square_head(a * s, a * t, eps=0.0)) == pytest.approx(float(square_head(s, t, eps=0.0)), rel=1e-4)
    tiny = float(square_head(1e-3 * s, 1e-3 * t, eps="bf16"))
    assert tiny < 1e-2 * float(square_head(s, t, eps="bf16"))


def test_the_mean_is_over_all_chosen_values_not_over_tokens_or_elements():
    s, t = torch.tensor([[[1.0, 2.0], [0.0, 5.0], [9.0, 9.0]]]), torch.tensor([[[1.0, 0.0], [4.0, 3.0], [7.0, 7.0]]])
    chosen = torch.tensor([[True, True, False]])
    assert float(square_head(s, t, chosen, eps=0.0)) == pytest.approx((4 + 16 + 4) / (1 + 16 + 9))


@pytest.mark.parametrize("left", [False, True])
def test_padding_does_not_change_the_loss(left):
    teacher, student = llama(1), llama(2)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, slice(0, 4) if left else slice(8, 12)] = 0
    tokens = TEXT[:2, :12].clone()
    labels = tokens.masked_fill(mask == 0, -100)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    loss = SquareHeadLoss(teacher, kl=1.0)

    def value(ids: torch.Tensor, labels: torch.Tensor) -> float:
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}
        return loss(student, batch).item()

    before, other = value(tokens, labels), torch.where(mask == 0, 255 - tokens, tokens)
    assert value(other, labels) == pytest.approx(before, rel=1e-6)
    assert value(other, other) == pytest.approx(before, rel=1e-6)  # a label on padding doesn't count either
    changed = tokens.clone()
    changed[1, 3] += 1
    assert value(changed, labels) != pytest.approx(before, rel=1e-6)
    hidden = normal(2, 12, 8)
    dirty = hidden.masked_fill(mask[..., None] == 0, math.nan)
    assert float(square_head(2 * dirty, dirty, mask.bool(), eps=0.0)) == pytest.approx(1)


def test_the_whole_is_the_weighted_sum_of_its_parts():
    teacher, student = llama(1), llama(2)
    weights = {"ce": 0.5, "kl": 2.0, "squarehead": 3.0}
    loss = SquareHeadLoss(teacher, **weights, eps=1e-8, temperature=2.0)
    value = loss(student, TEXT).item()
    assert value == pytest.approx(sum(weights[k] * loss.parts[k] for k in weights), rel=1e-6)
    assert loss.parts["squarehead"] == pytest.approx(sum(loss.layers), rel=1e-6)
    with torch.no_grad():
        mine = student(TEXT[:, :-1], output_hidden_states=True)
        its = teacher(TEXT[:, :-1], output_hidden_states=True)
        assert loss.parts["ce"] == pytest.approx(float(language_loss(student, TEXT)), rel=1e-6)
    # hidden_states[0] is the embedding's and doesn't count
    pairs = list(zip(mine.hidden_states[1:], its.hidden_states[1:], strict=True))
    wanted = [float((s - t).square().mean() / (t.square().mean() + 1e-8)) for s, t in pairs]
    assert loss.layers == pytest.approx(wanted, rel=1e-5)
    p, q = ((z.logits / 2).softmax(-1) for z in (its, mine))
    assert loss.parts["kl"] == pytest.approx(float(4 * (p * (p / q).log()).sum(-1).mean()), rel=1e-4)


def test_only_positions_with_a_target_count_for_answers_and_logits():
    teacher, student = llama(1), llama(2)
    inputs, targets = TEXT[:, :-1], TEXT[:, 1:].clone()
    targets[:, :10] = -100
    answer = SquareHeadLoss(teacher, ce=0.0, tokens="answer", eps=1e-8)
    answer(student, (inputs, targets))
    with torch.no_grad():
        s, t = (m(inputs, output_hidden_states=True).hidden_states[1][:, 10:] for m in (student, teacher))
    assert answer.layers[0] == pytest.approx(float((s - t).square().mean() / (t.square().mean() + 1e-8)), rel=1e-5)
    z, y = normal(2, 4, 5), normal(2, 4, 5, seed=1)
    where = torch.tensor([[1, -100, 2, -100], [-100, -100, 0, 1]])
    kept = where != -100
    wanted = F.kl_div(z[kept].log_softmax(-1), y[kept].softmax(-1), reduction="batchmean")
    assert float(logit_divergence(z, y, where)) == pytest.approx(float(wanted), rel=1e-5)
    # As transformers shifts labels: mapping and pair agree.
    labels = TEXT.clone()
    labels[:, :11] = -100
    full = SquareHeadLoss(teacher, ce=1.0, squarehead=0.0, kl=1.0)
    mapped = full(student, {"input_ids": TEXT, "labels": labels})
    assert mapped.item() == pytest.approx(full(student, (inputs, targets)).item(), rel=1e-5)


def test_an_encoder_decoder_compares_all_of_the_encoder_and_labelled_positions_of_the_decoder():
    teacher, student = t5(1), t5(2)
    ids, labels = TEXT[:2, :7] % 50, TEXT[2:4, :5] % 49 + 1
    labels[0, 3:] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    loss = SquareHeadLoss(teacher, eps=1e-8)
    value = loss(student, batch)
    with torch.no_grad():
        mine, its = (m(**batch, output_hidden_states=True) for m in (student, teacher))
    counted = labels != -100
    pairs = list(zip(mine.encoder_hidden_states[1:], its.encoder_hidden_states[1:], strict=True))
    pairs += [
        (s[counted], t[counted])
        for s, t in zip(mine.decoder_hidden_states[1:], its.decoder_hidden_states[1:], strict=True)
    ]
    assert loss.layers == pytest.approx(
        [float((s - t).square().mean() / (t.square().mean() + 1e-8)) for s, t in pairs], rel=1e-4
    )
    assert loss.parts["ce"] == pytest.approx(float(mine.loss), rel=1e-5)
    value.backward()
    given = {k: v for k, v in batch.items() if k != "labels"} | {"labels": labels}
    given["decoder_input_ids"] = student._shift_right(labels)
    assert float(loss(student, given)) == pytest.approx(float(value.detach()), rel=1e-6)


def test_a_classifier_has_a_label_for_each_sequence():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=3
    )
    torch.manual_seed(0)
    teacher, student = BertForSequenceClassification(config), BertForSequenceClassification(config).eval()
    batch = {"input_ids": TEXT, "attention_mask": torch.ones_like(TEXT), "labels": torch.arange(6) % 3}
    loss = SquareHeadLoss(teacher, kl=1.0)
    loss(student, batch)
    with torch.no_grad():
        wanted = F.cross_entropy(student(input_ids=TEXT).logits, batch["labels"])
    assert loss.parts["ce"] == pytest.approx(float(wanted), rel=1e-5)
    with pytest.raises(InputError, match="each position"):
        SquareHeadLoss(teacher, tokens="answer")(student, batch)


def test_dropout_off_leaves_no_floor():
    teacher = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    student = copy.deepcopy(teacher).train()
    loss = SquareHeadLoss(teacher, ce=0.0)
    assert float(loss(student, TEXT)) > 0.1
    with without_dropout(student):
        assert float(loss(student, TEXT)) == 0
    assert float(loss(student, TEXT)) > 0.1
    student = t5().train()
    with without_dropout(student):
        ids = {"input_ids": TEXT[:1] % 50, "labels": TEXT[:1] % 50}
        assert torch.equal(student(**ids).logits, student(**ids).logits)
    assert not torch.equal(student(**ids).logits, student(**ids).logits)


# -- masks and one-shot pruning (5 to 7) ------------------------------------------------------------------------------


def test_zeros_stay_exactly_where_they_were_under_adamw_with_weight_decay():
    teacher, student = llama(1), llama(1)
    SparseGPT(sparsity=0.7).apply(student, TEXT)
    masks = fixed_masks(student)
    before = {m.name: m.parameter.detach().clone() for m in matrices(student)}
    plan = Plan(steps=8, lr=1e-2, warmup=1, weight_decay=0.3, clip=0.0)

    def check(step: int) -> None:
        for matrix in matrices(student):
            assert torch.equal(matrix.parameter == 0, before[matrix.name] == 0)

    train(student, block_batches(TEXT, 2, 8), plan, masks=masks, loss=SquareHeadLoss(teacher), after_step=check)
    assert all(not torch.equal(m.parameter, before[m.name]) for m in matrices(student))


def test_masks_are_of_linears_with_a_tenth_of_zeros():
    model = llama()
    first, second, *_ = matrices(model)
    with torch.no_grad():
        first.parameter.view(-1)[: first.parameter.numel() // 10] = 0
        second.parameter.view(-1)[: second.parameter.numel() // 20] = 0
        model.get_input_embeddings().weight[:200] = 0
    first.parameter.data.view(-1)[:103] = 0  # 10 % and a bit
    assert set(fixed_masks(model)) == {first.name}
    assert set(fixed_masks(model, least=0.04)) == {first.name, second.name}


@given(st.integers(1, 40), st.integers(1, 300), st.floats(0, 1), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_one_shot_removes_an_exact_count_in_each_block_and_is_magnitude_without_correlations(rows, columns, s, seed):
    weight = normal(rows, columns, seed=seed)
    x = normal(columns + 3, columns, seed=seed + 1)
    _, mask = second_order_prune(weight, x.T @ x, s)
    plain, chosen = second_order_prune(weight, torch.eye(columns), s)
    for start in range(0, columns, 128):
        block = slice(start, start + 128)
        zeros = round(weight[:, block].numel() * s)
        assert int((~mask[:, block]).sum()) == zeros == int((~chosen[:, block]).sum())
        size = weight[:, block].abs()
        if 0 < zeros < size.numel():
            assert size[~chosen[:, block]].max() <= size[chosen[:, block]].min()
    assert torch.allclose(plain, weight * chosen, atol=1e-6)


def test_compensation_lowers_the_error_of_the_outputs_at_the_same_mask():
    for seed in range(5):
        weight, x = normal(24, 160, seed=seed), normal(400, 160, seed=seed + 50) @ normal(160, 160, seed=seed + 90)
        better, mask = second_order_prune(weight, x.T @ x, 0.6)
        errors = [float((x @ (weight - w).T).norm()) for w in (better, weight * mask)]
        assert errors[0] < 0.9 * errors[1]


# -- the procedure ----------------------------------------------------------------------------------------------------


def test_levels_are_chained_and_the_learning_rate_starts_again():
    teacher, student, seen = llama(1), llama(1), []
    plan = Plan(steps=4, lr=1e-3, warmup=1, clip=0.0, floor=0.0, decay="linear")

    def prune(model: Any, level: float) -> None:
        assert not model.training
        seen.append({m.name: m.parameter.detach().clone() for m in matrices(model)})
        SparseGPT(sparsity=level).apply(model, TEXT)

    masks, facts = sparse_finetune(
        student, SquareHeadLoss(teacher), [0.5, 0.75], prune, lambda n: block_batches(TEXT, 2, 4, n), plan
    )
    assert [f["sparsity"] for f in facts] == [0.5, 0.75]
    assert Masks({n: w != 0 for n, w in seen[1].items()}).sparsity == 0.5  # what the second level started from
    first = matrices(student)[0].name
    assert not torch.equal(seen[0][first], seen[1][first])
    assert all(f["curve"][0]["step"] == 0 and len(f["curve"]) == 4 for f in facts)
    assert facts[0]["returned"] == 0
    assert set(facts[1]["parts"]) == {"ce", "squarehead"}
    assert Masks.of(student, 0.1).within(masks)


def test_distillation_brings_the_student_closer_to_its_teacher():
    teacher = llama(1)
    train(teacher, block_batches(TEXT, 3, 40), Plan(steps=40, lr=3e-3, warmup=4))
    student = SparseGPT(sparsity=0.75).apply(copy.deepcopy(teacher).requires_grad_(True), TEXT).model
    loss = SquareHeadLoss(teacher, eps=1e-8)
    loss(student, TEXT)
    before = loss.parts["squarehead"]
    plan = Plan(steps=40, lr=3e-3, warmup=4, clip=0.0)
    train(student, block_batches(TEXT, 3, 40), plan, masks=fixed_masks(student), loss=loss)
    loss(student, TEXT)
    assert loss.parts["squarehead"] < 0.5 * before


@pytest.mark.parametrize("structure", ["element", "2:4"])
def test_the_method_does_it_all_and_its_model_loads_without_this_library(structure, tmp_path):
    levels = (0.5,) if structure == "element" else ()
    method = make(
        "squarehead",
        sparsity=0.75,
        levels=levels,
        structure=structure,
        epochs=2,
        dense_epochs=1,
        batch=3,
        lr=1e-3,
        least=0.4,
    )
    model = llama()
    plain = copy.deepcopy(model)
    applied = method.apply(model, TEXT)
    facts = applied.facts
    assert facts["sparsity"] == pytest.approx(0.75 if structure == "element" else 0.5)
    assert len(facts["levels"]) == len(levels) + 1
    assert len(facts["teacher_energy"]) == 2
    assert len(facts["dense"]["curve"]) == 2
    assert facts["weight_bytes"]["packed"] < facts["weight_bytes"]["dense"]
    train(plain, block_batches(TEXT, 3, 2, 0), method.plan(6, 1))
    loss = method.loss(plain)
    loss(applied.model, TEXT)
    assert loss.parts["squarehead"] > 0
    applied.model.save_pretrained(tmp_path)
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert Masks.of(loaded, 0.1).sparsity == pytest.approx(facts["sparsity"])
    with torch.no_grad():
        wanted = applied.model(TEXT).logits
        assert torch.equal(loaded(TEXT).logits, wanted)
        with method.attach(applied.model) as handle:
            assert handle.report()["formats"] == {"bitmask": 14}
            found = applied.model(TEXT).logits
        assert torch.equal(applied.model(TEXT).logits, wanted)
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.parametrize("sparsity", [0.0, 0.0625])
def test_few_zeros_are_held_as_well(sparsity):
    applied = make("squarehead", sparsity=sparsity, epochs=1, dense_epochs=0, batch=3, lr=1e-2).apply(llama(), TEXT)
    assert applied.facts["sparsity"] == pytest.approx(sparsity)
    assert applied.facts["prunable"] == sum(m.weight.numel() for m in matrices(applied.model))
    assert sum(int((m.weight == 0).sum()) for m in matrices(applied.model)) == applied.masks.total - applied.masks.kept


def test_recipes_are_the_cards():
    assert SquareHead.published("mpt-70") == SquareHead()
    assert SquareHead.published("whisper").ce == 0.5
    assert SquareHead.published("mpt-16:32").structure == "16:32"
    plan = SquareHead.published("mpt-60").plan(7000, 2)
    assert (plan.steps, plan.warmup, plan.clip, plan.decay, plan.rate(plan.steps - 1)) == (438, 20, 0.0, "linear", 0.0)
    assert max(plan.rate(s) for s in range(438)) == pytest.approx(1e-4)


# -- the packed model (8, 9) ------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(1, 200), st.floats(0, 1), st.booleans(), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_a_bitmask_gives_back_the_weight_has_the_bytes_of_the_formula_and_multiplies_as_dense(
    rows, columns, s, half, seed
):
    dtype = torch.bfloat16 if half else torch.float32
    weight = normal(rows, columns, seed=seed) * (torch.rand(rows, columns, generator=torch.manual_seed(seed)) >= s)
    weight = weight.to(dtype)
    packed = pack(weight, "bitmask")
    assert torch.equal(packed.to_dense(), weight)
    assert packed.nbytes == packed_bytes((rows, columns), packed.nnz, 16 if half else 32)
    eight = pack(weight, "bitmask", int8=True)
    assert eight.nbytes == packed_bytes((rows, columns), eight.nnz, 8)
    if not half:
        x = normal(1, columns, seed=seed + 1)
        scale = float((x.abs() @ weight.abs().T).max()) + 1e-9
        assert float((sparse_linear(x, packed) - x @ weight.T).abs().max()) <= 1e-6 * scale


@pytest.mark.parametrize("structure", ["2:4", "16:32", "16:64"])
def test_group_wise_weights_take_a_bit_each_and_their_values(structure):
    model = Magnitude(structure=structure).apply(tiny_model("llama")).model
    packed = PackedModel.of(model, int8=False, format=structure)
    n, m = map(int, structure.split(":"))
    slack = 64 * 4 * len(packed.weights)
    assert packed.nbytes - slack == packed.dense_bytes / 4 * bytes_per_weight(1 - n / m, 32)
    for matrix in matrices(model):
        x = normal(1, matrix.weight.shape[1])
        weight = packed.weights[matrix.name]
        assert torch.allclose(sparse_linear(x, weight), x @ matrix.weight.T, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 32])
def test_a_file_has_the_bytes_of_the_formula_within_two_percent(bits, tmp_path):
    model = llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=1)
    Magnitude(sparsity=0.6, scope="matrix").apply(model)
    packed = PackedModel.of(model, int8=bits == 8)
    save_file(packed.tensors(), tmp_path / "packed.safetensors")
    rows = sum(w.shape[0] for w in packed.weights.values())
    wanted = packed.dense_bytes / 4 * bytes_per_weight(0.6, bits) + (4 * rows if bits == 8 else 0)
    assert packed.predicted_bytes == pytest.approx(wanted, rel=2e-3)
    per_row = 4 * rows * (2 if bits == 8 else 1) / wanted  # pointers and sums, which the formula has not
    assert (tmp_path / "packed.safetensors").stat().st_size == pytest.approx(wanted * (1 + per_row), rel=0.02)


def test_quantized_weights_keep_every_zero_and_are_what_the_packed_model_holds():
    model = SparseGPT(sparsity=0.6).apply(llama(), TEXT).model
    before = {m.name: m.weight.clone() for m in matrices(model)}
    packed = PackedModel.of(model)
    errors = quantize_weights(model)
    for matrix in matrices(model):
        was, now = before[matrix.name], matrix.weight
        assert not bool(now[was == 0].any())
        assert torch.equal(packed.weights[matrix.name].to_dense(), now)
        step = was.abs().amax(1, keepdim=True) / 127
        assert bool(((now - was).abs() <= 0.5001 * step).all())
        assert errors[matrix.name] == pytest.approx(float((now - was).norm() / was.norm()), rel=1e-4)
    assert packed.sparsity >= 0.6
    broken = llama()
    matrices(broken)[0].parameter.data[0, 0] = math.nan
    with pytest.raises(InputError, match="NaN"):
        quantize_weights(broken)


def test_the_byte_model_is_the_cards():
    assert [round(ideal_decode_speedup(s, b), 1) for s, b in ((0.6, 8), (0.75, 8), (0.75, 32))] == [7.6, 10.7, 3.6]
    for bits in (8, 16, 32):
        for sparsity in (0.0, 1 / bits, 1 / bits + 1e-6, 0.9):
            assert is_smaller(sparsity, bits) == (bits * (1 - sparsity) + 1 < bits)


def test_a_roofline_turns_from_memory_to_compute_at_its_balance():
    model = Magnitude(sparsity=0.75, scope="matrix").apply(llama()).model
    packed = PackedModel.of(model)
    kept = sum(w.nnz for w in packed.weights.values())
    one = packed.roofline(bandwidth=1e10, flops=1e12)
    assert one["seconds"] == packed.nbytes / 1e10
    assert one["speedup"] == pytest.approx(packed.dense_bytes / packed.nbytes)
    balance = math.ceil(one["rows_at_balance"])
    assert packed.roofline(1e10, 1e12, balance - 1)["bound"] == "memory"
    after = packed.roofline(1e10, 1e12, 100 * balance)
    assert after["bound"] == "compute"
    assert after["seconds"] == pytest.approx(2 * kept * 100 * balance / 1e12)
    assert after["speedup"] == pytest.approx(1 / (1 - packed.sparsity))  # products only


# -- errors -----------------------------------------------------------------------------------------------------------


def test_what_it_cannot_do_is_said_in_one_line():
    h = torch.ones(1, 2, 4)
    for wrong in ((h, h[:, :1]), (h, h, torch.ones(2, 2)), (h, h, torch.zeros(1, 2))):
        with pytest.raises(InputError, match="square_head"):
            square_head(*wrong)
    for eps in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="eps"):
            square_head(h, h, eps=eps)
    with pytest.raises(InputError, match="do not fit"):
        logit_divergence(h, h, torch.ones(1, 2).long(), 0.0)
    with pytest.raises(InputError, match="no position"):
        logit_divergence(h, h, torch.full((1, 2), -100))
    for settings_ in ({"ce": -1.0}, {"ce": 0.0, "squarehead": 0.0}, {"temperature": 0.0}, {"tokens": "all"}):
        with pytest.raises(InputError):
            SquareHeadLoss(llama(), **settings_)
    loss = SquareHeadLoss(llama())
    for batch in (TEXT[0], {"input_ids": TEXT}, "text"):
        with pytest.raises(InputError, match="batch"):
            loss(llama(), batch)
    with pytest.raises(ModelError, match="number of blocks"):
        loss(llama(num_hidden_layers=1), TEXT)
    with pytest.raises(ModelError, match="number of blocks"):
        loss(llama(hidden_size=64), TEXT)
    with pytest.raises(ModelError, match="logits"):
        loss(llama(vocab_size=300), TEXT)
    with pytest.raises(InputError, match="one model"):
        loss(loss.teacher, TEXT)
    with pytest.raises(ModelError, match="transformers"):
        loss(torch.nn.Linear(2, 2), TEXT)
    for wrong_settings in (
        {"sparsity": 1.0},
        {"levels": (0.8,)},
        {"levels": (0.6, 0.5)},
        {"levels": (0.5,), "structure": "2:4"},
        {"ce": 0.0, "squarehead": 0.0},
        {"eps": -1.0},
        {"structure": "4x1"},
    ):
        with pytest.raises(InputError, match="squarehead"):
            make("squarehead", **wrong_settings)
    with pytest.raises(InputError, match="token blocks"):
        make("squarehead").apply(llama())
    with pytest.raises(ModelError, match="frozen"):
        make("squarehead").apply(llama().requires_grad_(False), TEXT)
    with pytest.raises(ModelError, match="zeros"):
        make("squarehead").attach(llama())
    with pytest.raises(UnknownNameError, match="recipes"):
        SquareHead.published("gpt")
    with pytest.raises(InputError, match="clip"):
        sparse_finetune(llama(), loss, [0.5], lambda m, s: None, lambda n: [], Plan(steps=1))
    for call in (
        lambda: bytes_per_weight(1.5),
        lambda: packed_bytes((2, 2), 5),
        lambda: PackedModel.of(llama(), format="csr"),
    ):
        with pytest.raises(InputError):
            call()
    with pytest.raises(InputError, match="roofline"):
        PackedModel.of(llama()).roofline(0.0, 1.0)
