"""The contract of a method family, as a pytest suite that other packages run on their own methods.

    from gossamer.testing import AttentionContract, Case

    class TestMine(AttentionContract):
        cases = [Case("my-method", {"tokens": 8})]

`PrefillContract` is the suite of methods that read prompts sparsely.

A case that fails tells which promise of the family the method breaks. The model is small, random and in fp32; the
whole suite takes about a second a case.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from gossamer.attention import AttentionHandle, AttentionMethod
from gossamer.calibration import Calibration
from gossamer.errors import InputError
from gossamer.hf import GossamerCache, SelectingPolicy, model_shape
from gossamer.models import tiny_model
from gossamer.registry import make

__all__ = ["METHODS", "AttentionContract", "Case", "PrefillCase", "PrefillContract"]


@dataclass(frozen=True)
class Case:
    """A method with settings, and what it promises beyond the family's contract.

    Attributes:
        slug: its name in the registry.
        settings: its hyperparameters; budgets of about 12 of 64 rows test best.
        full: the settings with which it reads everything.
        sparse: whether these settings leave rows out in a context of 64 (false for dense methods).
        exact_count: whether a selection keeps exactly ``min(budget, real rows)``.
        row_wise: whether what a sequence reads depends on that sequence alone, not on its neighbours and padding.
        forgetful: whether a step is the same whether the tokens before it were read in a dense block or decoded one by one
            (false for methods that remember attention).
        fixed_bytes: whether a step at a length that is a multiple of 16 reads what `io_bytes` says.
        learn: settings with which its calibration is made (default: the method's own).
    """

    slug: str
    settings: dict[str, Any] = field(default_factory=dict)
    full: dict[str, Any] = field(default_factory=lambda: {"tokens": 1.0})
    sparse: bool = True
    exact_count: bool = True
    row_wise: bool = True
    forgetful: bool = True
    fixed_bytes: bool = True
    learn: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.slug + "".join(f" {k}={v}" for k, v in self.settings.items())

    def method(self, **changes: Any) -> AttentionMethod:
        """The method, with every layer sparse unless the settings say otherwise."""
        from gossamer.registry import method

        every = {"dense_layers": ()} if "dense_layers" in method(self.slug).model_fields else {}
        return cast(AttentionMethod, make(self.slug, **{**every, **self.settings, **changes}))


def _double_sparsity(**settings: Any) -> Case:
    return Case("double-sparsity", {"tokens": 12, **settings})


#: Every attention method of this package, from the easiest settings to the hardest.
METHODS: list[Case] = [
    Case("dense", full={}, sparse=False),
    Case("exact-top-k", {"tokens": 12}),
    Case("exact-top-k", {"tokens": 1}),
    Case("random", {"tokens": 12, "seed": 3}, row_wise=False),
    Case("streaming-llm", {"tokens": 12}),
    Case("streaming-llm", {"tokens": 5, "sinks": 0, "dense_layers": (-1,)}),
    Case("quest", {"tokens": 32}, exact_count=False),
    Case("quest", {"tokens": 12, "page_size": 4}, exact_count=False),
    Case("quest", {"tokens": 12, "page_size": 1}, exact_count=False),
    _double_sparsity(channels=1.0, label_bits=16),
    _double_sparsity(channels=4, label_bits=16),
    _double_sparsity(channels=8, label_bits=4),
    _double_sparsity(channels=8, label_bits=8, select_per="kv_head"),
    _double_sparsity(channels=8, label_bits=4, select_per="kv_head", group_reduce="max"),
    _double_sparsity(channels=8, label_bits=8, labels_per="query_head", stat="q"),
    _double_sparsity(channels=8, label_bits=8, labels_per="query_head", select_per="kv_head", stat="k"),
    _double_sparsity(channels=16, label_bits=2, keep_current=False),
    _double_sparsity(channels=8, label_bits=12, compat="released"),
    _double_sparsity(channels=8, label_bits=4, dense_layers=(0, -1), min_length=20),
]


@cache
def _model() -> PreTrainedModel:
    return tiny_model("qwen2")  # three layers, four query heads on two KV heads


def _calibration(case: Case) -> Calibration | None:
    return _learned(case.slug, json.dumps(case.learn, sort_keys=True))


@cache
def _learned(slug: str, settings: str) -> Calibration | None:
    method = cast(AttentionMethod, make(slug, **json.loads(settings)))
    if "calibration" not in method.needs:
        return None
    return method.calibrate(_model(), _ids(2, 96, seed=11))


def _ids(batch: int = 1, length: int = 64, seed: int = 0) -> Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


class Stream:
    """Queries, keys and values of every layer, fed to an attached method as a model would, but the same bits each time.

    A model's own states differ in the last bit between one forward and many, which can tip a selection; these cannot.
    """

    def __init__(self, batch: int = 2, length: int = 64, seed: int = 0) -> None:
        shape, generator = model_shape(_model()), torch.Generator().manual_seed(seed)
        size = (shape.layers, batch, shape.heads, length, shape.head_dim)
        self.query = 2 * torch.randn(size, generator=generator)
        pair = (2, shape.layers, batch, shape.kv_heads, length, shape.head_dim)
        self.key, self.value = torch.randn(pair, generator=generator)
        self.cache: Any = DynamicCache()

    def pick(self, index: Tensor, start: int = 0) -> Stream:
        """Another stream with these sequences, without their first `start` tokens."""
        other = copy.copy(self)
        other.query, other.key, other.value = (
            x[:, index, :, start:].clone() for x in (self.query, self.key, self.value)
        )
        other.cache = DynamicCache()
        return other

    def feed(self, handle: AttentionHandle, *sizes: int, mask: Tensor | None = None) -> Tensor:
        """The next tokens in blocks of these sizes; outputs ``[layers, batch, heads, tokens, head_dim]``."""
        runtime, outs = handle.runtime, []
        for size in sizes:
            begin = self.cache.get_seq_length()
            end = begin + size
            runtime._before_forward(_model(), (), {runtime._cache_name: self.cache})
            part = None if mask is None or bool(mask[:, :end].all()) else mask[:, :end]
            block = []
            for i, view in enumerate(runtime.views):
                key, value = self.cache.update(self.key[i, :, :, begin:end], self.value[i, :, :, begin:end], i)
                query = self.query[i, :, :, begin:end]
                block.append(runtime.attention(view.module, query, key, value, part, 0.25, None, None, 0.0))
            outs.append(torch.stack(block))
        return torch.cat(outs, dim=3)

    def dense(self, first: int) -> Tensor:
        """Exact attention of the tokens from `first` on, by its formula."""
        group = self.query.shape[2] // self.key.shape[2]
        key, value = (x.repeat_interleave(group, 2) for x in (self.key, self.value))
        scores = self.query[:, :, :, first:] @ key.transpose(3, 4) * 0.25
        later = torch.ones(self.query.shape[3], self.query.shape[3], dtype=torch.bool).triu(1)[first:]
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        return torch.matmul(weights, value)


def _one_line(run: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        run()
    assert "\n" not in str(caught.value)
    return str(caught.value)


class AttentionContract:
    """What every attention method keeps. Subclass it in a test file and name your `cases`."""

    cases: ClassVar[Sequence[Case]] = METHODS

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One run of each test for each case."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases, ids=str)

    @pytest.fixture(autouse=True)
    def _no_gradients(self) -> Any:
        with torch.no_grad():
            yield
        assert _model().config._attn_implementation == "sdpa", "the method is still attached"

    def attach(self, case: Case, **changes: Any) -> AttentionHandle:
        """The case's method on the suite's model."""
        return case.method(**changes).attach(_model(), _calibration(case))

    # -- quality ------------------------------------------------------------------------------------------------------

    def test_a_full_budget_is_dense(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        """Reading everything gives dense attention, through the method's own path and not by a detour."""
        for detour in (True, False):
            if not detour:
                monkeypatch.setattr(SelectingPolicy, "is_dense", lambda self, layer, length: False)
            stream = Stream()
            with self.attach(case, **case.full) as handle:
                got = stream.feed(handle, 40, *[1] * 24)[:, :, :, 40:]
            torch.testing.assert_close(got, stream.dense(40), atol=1e-5, rtol=1e-5)

    def test_a_small_budget_is_not_dense(self, case: Case) -> None:
        """The method does something: the other tests would hold for one that does nothing. Prefill stays exact."""
        stream = Stream()
        with self.attach(case) as handle:
            prefill = stream.feed(handle, 40)
            assert handle.runtime.stats.steps == 0
            got = stream.feed(handle, *[1] * 24)
        torch.testing.assert_close(prefill, stream.dense(0)[:, :, :, :40], atol=1e-5, rtol=1e-5)
        assert bool((got - stream.dense(40)).abs().max() > 1e-2) is case.sparse

    def test_attention_is_exact_on_what_was_selected(self, case: Case) -> None:
        """The output is the softmax over the selected rows with the true keys and values."""
        stream = Stream()
        with self.attach(case) as handle:
            stream.feed(handle, 63)
            with handle.runtime.recording() as trace:
                got = stream.feed(handle, 1)[:, :, :, 0]
        for layer, _, indices, counts in trace:
            heads, kv_heads = got.shape[2], stream.key.shape[2]
            for b, h in [(b, h) for b in range(2) for h in range(heads)]:
                line = h * indices.shape[1] // heads
                rows = indices[b, line, : int(counts[b, line])].long()
                key, value = (x[layer, b, h * kv_heads // heads, rows] for x in (stream.key, stream.value))
                want = (key @ stream.query[layer, b, h, 63] * 0.25).softmax(0) @ value
                torch.testing.assert_close(got[layer, b, h], want, atol=1e-5, rtol=1e-5)

    # -- the pattern --------------------------------------------------------------------------------------------------

    def test_selections_are_as_promised(self, case: Case) -> None:
        """Rows are real (no padding, no later token), none twice, and as many as the budget says."""
        mask = torch.ones(2, 64, dtype=torch.bool)
        mask[1, :32] = False
        with self.attach(case) as handle:
            policy = handle.runtime.decode
            with handle.runtime.teacher_forcing(), handle.runtime.recording() as trace:
                out = Stream().feed(handle, 50, 1, 13, mask=mask)
        assert out.isfinite().all()
        assert bool(trace) is case.sparse
        for layer, length, indices, counts in trace:
            assert 0 <= layer < 3
            assert indices.shape[:2] == counts.shape
            for row, start in enumerate((0, min(32, length - 1))):
                for ids, count in zip(indices[row], counts[row], strict=True):
                    kept = ids[: int(count)].tolist()
                    assert len(set(kept)) == len(kept), "a row twice"
                    assert all(start <= i < length for i in kept), "a row outside the sequence"
                    assert isinstance(policy, SelectingPolicy)
                    budget = policy.budget(length)
                    assert len(kept) == min(budget, length - start) if case.exact_count else 0 < len(kept) <= budget

    # -- causality ----------------------------------------------------------------------------------------------------

    def test_a_teacher_forced_chunk_equals_steps(self, case: Case) -> None:
        """One forward over many tokens, each selecting for itself, is decoding them one by one."""
        mask = torch.ones(2, 64, dtype=torch.bool)
        mask[1, :16] = False
        with self.attach(case) as handle:
            for padding in (None, mask):
                steps = Stream().feed(handle, 40, *[1] * 24, mask=padding)[:, :, :, 40:]
                stream = Stream()
                stream.feed(handle, 40, mask=padding)
                with handle.runtime.teacher_forcing():
                    chunk = stream.feed(handle, 5, 1, 18, mask=padding)
                torch.testing.assert_close(chunk, steps, atol=1e-5, rtol=1e-5)

    def test_later_tokens_change_nothing_before_them(self, case: Case) -> None:
        """Rows stored for later tokens of a chunk are not looked at."""
        results = []
        with self.attach(case) as handle:
            for later in (1.0, 100.0, float("nan")):
                stream = Stream()
                stream.key[:, :, :, 52:] *= later
                stream.value[:, :, :, 52:] *= later
                stream.feed(handle, 40)
                with handle.runtime.teacher_forcing():
                    results.append(stream.feed(handle, 24)[:, :, :, :12])
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])

    def test_each_row_of_a_batch_is_its_own_run(self, case: Case) -> None:
        """Padding and neighbours do not matter."""
        if not case.row_wise:
            pytest.skip("what a sequence reads depends on its place in the batch")
        mask = torch.ones(2, 64, dtype=torch.bool)
        mask[1, :16] = False
        stream = Stream()
        long, short = stream.pick(torch.tensor([0])), stream.pick(torch.tensor([1]), start=16)
        with self.attach(case) as handle:
            together = stream.feed(handle, 44, *[1] * 20, mask=mask)[:, :, :, 44:]
            alone = long.feed(handle, 44, *[1] * 20)[:, :, :, 44:], short.feed(handle, 28, *[1] * 20)[:, :, :, 28:]
        torch.testing.assert_close(together[:, :1], alone[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together[:, 1:], alone[1], atol=1e-5, rtol=1e-5)

    # -- the cache's edits --------------------------------------------------------------------------------------------

    def test_cropped_rows_are_forgotten(self, case: Case) -> None:
        """After a rollback (assisted generation) the method reads what is there now, not what it remembers."""
        with self.attach(case) as handle:
            want = Stream().feed(handle, 33, *[1] * 31)[:, :, :, 33:]
            stream, wrong = Stream(), Stream(seed=1)
            wrong.cache = stream.cache
            stream.feed(handle, 40)
            wrong.feed(handle, *[1] * 9)
            stream.cache.crop(-16)
            torch.testing.assert_close(stream.feed(handle, *[1] * 31), want, atol=1e-5, rtol=1e-5)

    def test_reordered_sequences_take_their_rows_along(self, case: Case) -> None:
        """Beam search reorders the batch between steps."""
        if not case.row_wise:
            pytest.skip("what a sequence reads depends on its place in the batch")
        order, stream = torch.tensor([2, 0, 0]), Stream(batch=3)
        beams = stream.pick(order)
        with self.attach(case) as handle:
            want = stream.pick(order).feed(handle, 40, *[1] * 24)[:, :, :, 45:]
            stream.feed(handle, 40, *[1] * 5)
            stream.cache.reorder_cache(order)
            beams.cache = stream.cache
            torch.testing.assert_close(beams.feed(handle, *[1] * 19), want, atol=1e-5, rtol=1e-5)

    def test_the_cache_grows_under_the_method(self, case: Case) -> None:
        """What a method derives from the cache follows it past its first capacity, and nothing is lost."""
        results = []
        with self.attach(case) as handle:
            for cache in (DynamicCache(), GossamerCache(reserve=1000)):  # the second never grows
                stream = Stream(batch=1, length=530)
                stream.cache = cache
                stream.feed(handle, 250)
                results.append(stream.feed(handle, 1, 1, 4, 1, 250, 1, 1, *[1] * 6))
        assert torch.equal(results[0], results[1])

    # -- manners ------------------------------------------------------------------------------------------------------

    def test_two_runs_are_the_same(self, case: Case) -> None:
        """Attached again, on another thread of random numbers, it reads the same rows."""
        results = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            with self.attach(case) as handle, handle.runtime.recording() as trace:
                results.append((Stream().feed(handle, 40, *[1] * 24), trace))
        assert torch.equal(results[0][0], results[1][0])
        for (*where, ids, counts), (*other, other_ids, other_counts) in zip(results[0][1], results[1][1], strict=True):
            assert where == other
            assert torch.equal(ids, other_ids)
            assert torch.equal(counts, other_counts)

    def test_inference_mode_may_come_and_go(self, case: Case) -> None:
        """What is made in `torch.inference_mode` is written outside it, and the other way round."""
        block = (1, 5) if case.forgetful else [1] * 6
        for first in (True, False):
            stream = Stream()
            with self.attach(case) as handle:
                want = Stream().feed(handle, 40, *[1] * 24)
                got = []
                for sizes, inside in (((40, 1), first), (block, not first), ([1] * 17, first)):
                    with torch.inference_mode(inside), torch.no_grad():
                        got.append(stream.feed(handle, *sizes).clone())
            joined = torch.cat(got, 3)
            torch.testing.assert_close(joined[:, :, :, :42], want[:, :, :, :42], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(joined[:, :, :, 47:], want[:, :, :, 47:], atol=1e-5, rtol=1e-5)

    def test_the_random_state_is_left_alone(self, case: Case) -> None:
        """Sampling with a seed gives the same draws with and without the method."""
        torch.manual_seed(0)
        state = torch.get_rng_state()
        with self.attach(case) as handle:
            Stream().feed(handle, 60, 1, 1)
        assert torch.equal(torch.get_rng_state(), state)

    def test_inputs_and_weights_are_untouched(self, case: Case) -> None:
        """Token ids, masks, weights and stored rows are read, never written."""
        stream, mask = Stream(), torch.ones(2, 64, dtype=torch.bool)
        mask[1, :16] = False
        before, weights = copy.deepcopy((stream, mask)), copy.deepcopy(_model().state_dict())
        calibration = copy.deepcopy(_calibration(case))
        with self.attach(case) as handle:
            stream.feed(handle, 40, *[1] * 24, mask=mask)
        for name in ("query", "key", "value"):
            assert torch.equal(getattr(stream, name), getattr(before[0], name))
        for i, layer in enumerate(stream.cache.layers):
            assert torch.equal(layer.keys, stream.key[i])
            assert torch.equal(layer.values, stream.value[i])
        assert torch.equal(mask, before[1])
        assert all(torch.equal(v, weights[k]) for k, v in _model().state_dict().items())
        now = _calibration(case)
        if calibration is not None and now is not None:
            assert all(torch.equal(v, calibration.tensors[k]) for k, v in now.tensors.items())

    def test_detach_restores(self, case: Case) -> None:
        """After detaching, the model is what it was, bit for bit."""
        model = _model()
        before, want = {n: dict(vars(m)) for n, m in model.named_modules()}, model(_ids()).logits
        config = model.config.to_json_string()
        handle = self.attach(case)
        model.generate(_ids(), attention_mask=torch.ones(1, 64).long(), max_new_tokens=3)
        handle.detach()
        handle.detach()
        assert model.config.to_json_string() == config
        for name, module in model.named_modules():
            assert dict(vars(module)) == before[name]
        assert torch.equal(model(_ids()).logits, want)

    def test_generate_runs(self, case: Case) -> None:
        """Greedy, sampled and with beams."""
        ways: list[dict[str, Any]] = [{"do_sample": False}, {"do_sample": True}, {"num_beams": 2}]
        with self.attach(case):
            for way in ways:
                mask = torch.ones(2, 30, dtype=torch.long)
                out = _model().generate(_ids(2, 30), attention_mask=mask, max_new_tokens=5, **way)
                assert out.shape == (2, 35)

    # -- cost ---------------------------------------------------------------------------------------------------------

    def test_counted_bytes_are_the_promised_bytes(self, case: Case) -> None:
        """`io_bytes` is a formula; the runtime counts what was selected."""
        if not case.fixed_bytes:
            pytest.skip("what it reads depends on the data")
        method, shape = case.method(), model_shape(_model())
        with self.attach(case) as handle:
            stream = Stream(batch=3)
            stream.feed(handle, 62, 1)
            handle.runtime.stats.reset()
            stream.feed(handle, 1)
            stats, report = handle.runtime.stats, handle.report()
            dense = {
                i
                for i in range(3)
                if i in getattr(method, "dense_layers", ()) or i - 3 in getattr(method, "dense_layers", ())
            }
        want, whole = method.io_bytes(64, shape, 4), 64 * shape.kv_heads * 2 * shape.head_dim * 4
        sparse_layers = 3 - len(dense)
        assert stats.steps == 3
        assert stats.dense_bytes == 3 * 3 * whole == report["dense_bytes"]
        assert stats.kv_bytes == 3 * (sparse_layers * want["rows"] + len(dense) * whole) == report["kv_bytes_read"]
        scored = 3 * sparse_layers * (want["scores"] + want.get("scales", 0))
        assert stats.score_bytes == scored == report["score_bytes_read"]

    # -- settings and calibration -------------------------------------------------------------------------------------

    def test_settings_round_trip(self, case: Case) -> None:
        """A recipe file can hold the method."""
        method = case.method()
        text = json.dumps(method.settings())
        again = make(case.slug, **json.loads(text))
        assert again == method
        assert again.settings() == method.settings()
        assert make(case.slug).settings() == {}

    def test_settings_are_frozen(self, case: Case) -> None:
        """A method is a value."""
        method = case.method()
        for name in type(method).model_fields:
            with pytest.raises(ValueError, match="frozen"):
                setattr(method, name, getattr(method, name))
        assert hash(method) == hash(case.method())

    def test_bad_settings_are_one_line(self, case: Case) -> None:
        """Refused when the method is made, with its name and the setting's."""
        message = _one_line(lambda: make(case.slug, no_such_setting=1))
        assert case.slug in message
        assert "no_such_setting" in message
        fields = type(case.method()).model_fields
        bad: dict[str, list[Any]] = {
            "tokens": [0, -4, 1.5, 0.0, float("nan"), float("inf"), True, None, "some", "1/0", "a\nb", [1]],
            "dense_layers": ["first", 1.5, (0.5,)],
        }
        for name in fields.keys() & bad.keys():
            for value in bad[name]:
                message = _one_line(lambda name=name, value=value: make(case.slug, **{name: value}))  # type: ignore[misc]
                assert name in message

    def test_calibration_round_trip(self, case: Case, tmp_path: Path) -> None:
        """A saved and loaded calibration makes the same run."""
        calibration = _calibration(case)
        if calibration is None:
            pytest.skip("needs no calibration")
        loaded = Calibration.load(calibration.save(tmp_path / "calibration.safetensors"))
        assert loaded.facts == calibration.facts
        with case.method().attach(_model(), calibration) as handle:
            want = Stream().feed(handle, 50, *[1] * 14)
        with case.method().attach(_model(), loaded) as handle:
            assert torch.equal(Stream().feed(handle, 50, *[1] * 14), want)


@dataclass(frozen=True)
class PrefillCase:
    """A method that reads prompts sparsely, for `PrefillContract`.

    Attributes:
        slug, settings: as in `Case`; settings that leave out a good part of a prompt of 96 tokens.
        full: settings with which it reads everything.
        calibration: what it learned on `tiny_model("qwen2")`, or None.
    """

    slug: str
    settings: dict[str, Any] = field(default_factory=dict)
    full: dict[str, Any] = field(default_factory=lambda: {"area": 1.0})
    calibration: Calibration | None = None

    def __str__(self) -> str:
        return self.slug + "".join(f" {k}={v}" for k, v in self.settings.items())

    def attach(self, **changes: Any) -> AttentionHandle:
        """The method on the suite's model, which has three layers and four query heads."""
        method = cast(AttentionMethod, make(self.slug, **{**self.settings, **changes}))
        return method.attach(_model(), self.calibration)


class PrefillContract:
    """What every method of the slot `attention.prefill` keeps, beside `AttentionContract`. Name your `cases`."""

    cases: ClassVar[Sequence[PrefillCase]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One run of each test for each case."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases, ids=str)

    @pytest.fixture(autouse=True)
    def _no_gradients(self) -> Any:
        with torch.no_grad():
            yield
        assert _model().config._attn_implementation == "sdpa", "the method is still attached"

    def run(self, case: PrefillCase, stream: Stream, *sizes: int, mask: Tensor | None = None, **changes: Any) -> Any:
        """Outputs of a stream, and the report."""
        with case.attach(**changes) as handle:
            return stream.feed(handle, *sizes, mask=mask), handle.report()

    def test_a_full_prompt_is_dense(self, case: PrefillCase) -> None:
        """With the `full` settings, and the report says that everything was computed."""
        stream = Stream(length=96)
        out, report = self.run(case, stream, 96, **case.full)
        torch.testing.assert_close(out, stream.dense(0), atol=1e-5, rtol=1e-5)
        assert report["prefill_area"] == pytest.approx(1.0)

    def test_a_prompt_is_read_sparsely(self, case: PrefillCase) -> None:
        """The outputs differ, and the report says how much of the causal area was computed, per layer and head."""
        stream = Stream(length=96)
        out, report = self.run(case, stream, 96)
        assert float((out - stream.dense(0)).abs().max()) > 1e-2
        assert 0 < report["prefill_area"] < 0.95
        shares = torch.tensor(list(report["prefill_area_of_heads"].values()))
        assert shares.shape == (3, 4)
        assert bool(((shares > 0) & (shares <= 1)).all())
        assert float(shares.mean()) == pytest.approx(report["prefill_area"])

    def test_the_first_query_reads_itself(self, case: PrefillCase) -> None:
        """Causality at its edge: the first output is the first value row."""
        stream = Stream(length=96)
        out, _ = self.run(case, stream, 96)
        want = stream.value[:, :, :, 0].repeat_interleave(2, 2)
        torch.testing.assert_close(out[:, :, :, 0], want, atol=1e-5, rtol=1e-5)

    def test_a_later_chunk_and_decode_are_finite(self, case: PrefillCase) -> None:
        """Prompts may come in parts, and generation goes on after them."""
        out, report = self.run(case, Stream(length=96), 64, 30, 1, 1)
        assert bool(torch.isfinite(out).all())
        assert 0 < report["prefill_area"] <= 1

    def test_sequences_are_their_own(self, case: PrefillCase) -> None:
        """A batch gives what each of its sequences gives alone."""
        out, _ = self.run(case, Stream(length=96), 96)
        for row in range(2):
            alone, _ = self.run(case, Stream(length=96).pick(torch.tensor([row])), 96)
            torch.testing.assert_close(alone[:, 0], out[:, row], atol=1e-5, rtol=1e-5)

    def test_padding_is_never_read(self, case: PrefillCase) -> None:
        """What stands in the rows of left padding changes nothing of the real ones, and breaks nothing."""
        mask = torch.ones(2, 96, dtype=torch.int64)
        mask[1, :20] = 0
        outs = []
        for filling in (1.0, -30.0):
            stream = Stream(length=96)
            stream.key[:, 1, :, :20] = stream.value[:, 1, :, :20] = stream.query[:, 1, :, :20] = filling
            out, _ = self.run(case, stream, 96, mask=mask)
            assert bool(torch.isfinite(out).all())
            outs.append(out)
        torch.testing.assert_close(outs[0][:, 1, :, 20:], outs[1][:, 1, :, 20:], atol=1e-5, rtol=1e-5)

    def test_runs_are_the_same_and_inputs_untouched(self, case: PrefillCase) -> None:
        """Bit for bit."""
        stream = Stream(length=96)
        before = [x.clone() for x in (stream.query, stream.key, stream.value)]
        state = torch.get_rng_state()
        one, first = self.run(case, stream, 96)
        two, second = self.run(case, Stream(length=96), 96)
        assert torch.equal(one, two)
        assert first == second
        assert torch.equal(state, torch.get_rng_state())
        for x, y in zip(before, (stream.query, stream.key, stream.value), strict=True):
            assert torch.equal(x, y)
