"""MInference with a static index: later prompts get the lists of the first, or of the calibration sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from gossamer import ops
from gossamer.attention import minference_run as R
from gossamer.attention.minference import MInference
from gossamer.attention.minference_static import StaticMInference, of_first, placed
from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError
from gossamer.models import tiny_model
from gossamer.registry import make
from gossamer.testing import AttentionContract, Case, PrefillCase, PrefillContract, Stream

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
TINY: dict[str, Any] = {"last_q": 16, "sinks": 2, "local": 4, "block_size": 8}
SLASH = {**TINY, "pattern": "vertical-slash", "k_v": 6, "k_s": 8}
BLOCKS = {**TINY, "pattern": "block-sparse", "k_b": 3}
MODEL = tiny_model("qwen2")  # what Stream feeds: 3 layers, 4 query heads on 2 KV heads


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def ids(length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 256, (1, length), generator=torch.Generator().manual_seed(seed))


def learned(settings: dict[str, Any], length: int = 128) -> Calibration:
    return StaticMInference(**settings).calibrate(MODEL, ids(length))


class TestStatic(AttentionContract):
    """Decode is dense. The suite's prompts are one block long, so that prefill is exact, as it wants."""

    cases: ClassVar[list[Case]] = [Case("minference-static", {}, full={}, sparse=False)]


class TestStaticPrefill(PrefillContract):
    cases: ClassVar[list[PrefillCase]] = [
        PrefillCase("minference-static", settings, calibration=learned({"scale": 0.01, **settings}))
        for settings in (SLASH, BLOCKS, {**TINY, "area": 0.4})
    ]


def lists(handle: Any, layer: int, length: int) -> list[Tensor]:
    """The columns, distances and blocks that a layer would read a prompt with."""
    policy = handle.runtime.prefill
    heads, scores = policy.layers[layer], placed(policy.frozen[layer], 1, length, policy.online)
    if heads.kind[0] == R.VERTICAL_SLASH:
        return list(R.slash_lists(scores, heads, policy.online))
    return [R.block_mask(scores, heads, policy.online, length)]


@pytest.mark.parametrize("settings", [SLASH, BLOCKS])
def test_later_prompts_are_read_with_the_lists_of_the_first(settings: dict[str, Any]) -> None:
    first, second = Stream(batch=1, length=96, seed=1), Stream(batch=1, length=96, seed=2)
    with StaticMInference(**settings).attach(MODEL) as handle:
        one = first.feed(handle, 96)
        kept = [lists(handle, layer, 96) for layer in range(3)]
        two = second.feed(handle, 96)
        again = [lists(handle, layer, 96) for layer in range(3)]
    policy = handle.runtime.prefill
    for layer in range(3):
        assert all(torch.equal(x, y) for x, y in zip(kept[layer], again[layer], strict=True))
        heads = policy.layers[layer]
        q, k, v = (x[layer] for x in (first.query, first.key, first.value))
        found = R.estimate(q, k, heads.kind, policy.online, 0.25)
        torch.testing.assert_close(one[layer], R.attend(q, k, v, heads, found, policy.online, 0.25)[0], **CLOSE)
        # The second prompt's own states, the first one's places.
        q, k, v = (x[layer] for x in (second.query, second.key, second.value))
        if settings is SLASH:
            want = ops.vertical_slash_attention(
                q, k, v, *R.slash_lists(found, heads, policy.online), block_size=8, scale=0.25
            )
        else:
            mask = R.block_mask(found, heads, policy.online, 96)
            want = ops.block_sparse_attention(q, k, v, mask, block_size=8, scale=0.25)
        torch.testing.assert_close(two[layer], want, **CLOSE)
    with MInference(**settings).attach(MODEL) as handle:  # which would have been placed elsewhere
        assert float((second.pick(torch.tensor([0])).feed(handle, 96) - two).abs().max()) > 1e-2


def test_the_first_prompt_is_read_as_minference_reads_it() -> None:
    outs = []
    for slug in ("minference", "minference-static"):
        with make(slug, **SLASH).attach(MODEL) as handle:  # type: ignore[attr-defined]
            outs.append(Stream(batch=1, length=96).feed(handle, 96))
    assert torch.equal(*outs)


@pytest.mark.parametrize("settings", [SLASH, BLOCKS])
def test_a_calibration_has_the_lists_of_its_sample(settings: dict[str, Any]) -> None:
    calibration = learned(settings)
    outs = []
    for before in (None, 5):  # whatever was read before
        with StaticMInference(**settings).attach(MODEL, calibration) as handle:
            if before is not None:
                Stream(length=96, seed=before).feed(handle, 96)
            outs.append(Stream(length=96).feed(handle, 96))
    assert torch.equal(*outs)
    with StaticMInference(**settings).attach(MODEL) as handle:
        MODEL(ids(128), use_cache=True)
        for layer in range(3):
            for x, y in zip(handle.runtime.prefill.frozen[layer], stored(calibration, layer), strict=True):
                assert (x is None) is (y is None)
                assert x is None or torch.equal(x[0].clamp_min(torch.finfo(torch.float32).min), y)


def stored(calibration: Calibration, layer: int) -> list[Tensor | None]:
    return [calibration.tensors.get(f"{name}.{layer}") for name in R.Scores._fields]


# -- other lengths and padding ----------------------------------------------------------------------------------------


def test_places_of_shorter_and_longer_prompts() -> None:
    online = R.Online(last_q=4, sinks=1, local=1, block_size=2)
    frozen = R.Scores(torch.tensor([[[9.0, 1, 5, 2, 4]]]), torch.tensor([[[9.0, 3, 1, 2, 7]]]), None)
    heads = R.Heads.uniform(R.VERTICAL_SLASH, 3, 3, 1)

    def chosen(length: int, starts: Tensor | None = None) -> list[list[int]]:
        scores = placed(frozen, 1, length, online, starts)
        return [x[0, 0].tolist() for x in R.slash_lists(scores, heads, online)]

    assert chosen(5) == [[0, 2, 4], [4, 1, 0]]
    assert chosen(4) == [[0, 2, 3], [3, 1, 0]]
    assert chosen(9) == [[0, 2, 4], [4, 1, 0]]
    assert chosen(7, torch.tensor([2])) == [[2, 4, 6], [4, 1, 0]]
    more = R.Heads.uniform(R.VERTICAL_SLASH, 8, 8, 1)  # no more than are known: places that are left cost nothing
    columns, distances = R.slash_lists(placed(frozen, 1, 9, online), more, online)
    assert set(columns[0, 0].tolist()) == {0, 1, 2, 3, 4, 8}
    assert set(distances[0, 0].tolist()) == {0, 1, 2, 3, 4}


def test_blocks_of_shorter_and_longer_prompts() -> None:
    online = R.Online(block_size=2)
    scores = torch.tensor([[1.0, -torch.inf, -torch.inf], [5.0, 1.0, -torch.inf], [1.0, 6.0, 2.0]])
    frozen = R.Scores(None, None, scores[None, None])
    heads = R.Heads.uniform(R.BLOCK_SPARSE, 1, 0, 1)

    def chosen(length: int, starts: Tensor | None = None) -> list[list[int]]:
        mask = R.block_mask(placed(frozen, 1, length, online, starts), heads, online, length)[0, 0]
        return [row.nonzero()[:, 0].tolist() for row in mask]

    assert chosen(6) == [[0], [0], [1]]
    assert chosen(3) == [[0], [0]]
    assert chosen(10) == [[0], [0], [1], [1], [1]]
    assert chosen(10, torch.tensor([3])) == [[0], [1], [1], [2], [2]]


def test_the_lists_of_a_padded_first_sequence_count_from_its_first_row() -> None:
    scores = R.Scores(
        torch.tensor([[[-torch.inf, 2.0, 1.0]], [[5.0, 6.0, 7.0]]]),
        torch.tensor([[[3.0, 2.0, 0.0]], [[5.0, 6.0, 7.0]]]),
        None,
    )
    first = of_first(scores, torch.tensor([1, 0]), 64)
    assert first.vertical is not None
    assert first.slash is not None
    assert (first.vertical.tolist(), first.slash.tolist(), first.blocks) == ([[[2.0, 1.0]]], [[[3.0, 2.0]]], None)


# -- calibrations -----------------------------------------------------------------------------------------------------


def test_it_takes_the_patterns_of_minference_and_of_its_official_files(tmp_path: Any) -> None:
    patterns = MInference(**TINY, scale=0.01).calibrate(MODEL, ids(256))
    path = MInference().export_calibration(patterns, tmp_path / "config.json")
    for calibration in (patterns, StaticMInference().import_calibration(path, MODEL)):
        with StaticMInference(**TINY).attach(MODEL, calibration) as handle:
            assert handle.runtime.prefill.frozen == {}
            MODEL(ids(96), use_cache=True)
            assert handle.runtime.prefill.frozen


def test_places_that_the_heads_do_not_need_are_found_anew() -> None:
    calibration = learned(SLASH)
    with StaticMInference(**BLOCKS).attach(MODEL, calibration) as handle:
        assert bool(Stream(length=96).feed(handle, 96).isfinite().all())
        assert handle.runtime.prefill.frozen[0].blocks is not None


def test_uncalibrated_heads_are_said() -> None:
    with StaticMInference(**TINY, k_v=6, k_s=8).attach(MODEL) as handle:
        MODEL(ids(96), use_cache=True)
        assert any(line.startswith("minference-static is not calibrated") for line in handle.runtime.said.values())


@pytest.mark.parametrize(
    "change",
    [
        {"vertical.1": torch.zeros(4, 100)},  # not as long as the distances
        {"vertical.1": torch.zeros(3, 128), "slash.1": torch.zeros(3, 128)},  # heads
        {"vertical.1": torch.zeros(4, 128, dtype=torch.int64), "slash.1": torch.zeros(4, 128, dtype=torch.int64)},
        {"blocks.1": torch.zeros(4, 3, 5)},
    ],
)
def test_damaged_places_are_refused(change: dict[str, Tensor]) -> None:
    calibration = learned(SLASH)
    damaged = replace(calibration, tensors={**calibration.tensors, **change})
    with pytest.raises(CalibrationError, match="damaged: places of layer 1"):
        StaticMInference(**SLASH).attach(MODEL, damaged)


def test_other_calibrations_are_refused() -> None:
    other = replace(learned(SLASH), method="quest")
    with pytest.raises(CalibrationError, match="made for quest"):
        StaticMInference().attach(MODEL, other)
    with pytest.raises(CalibrationError, match="another model"):
        StaticMInference().attach(tiny_model("llama"), learned(SLASH))
