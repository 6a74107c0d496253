"""Dilated and strided prefill against a double loop and one masked softmax."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from gossamer.attention import strided as S
from gossamer.errors import InputError
from gossamer.patterns import causal_pairs
from gossamer.registry import make, method
from gossamer.testing import AttentionContract, Case, PrefillCase, PrefillContract, Stream, _model

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
SMALL: dict[str, Any] = {"n_init": 3, "n_far": 24}
PATTERNS = [(4, 0, 20, 2), (0, 6, 30, 3), (0, 0, 1, 2), (9, 10, 400, 2), (400, 0, 5, 2), (3, 5, 40, 1), (0, 0, 700, 2)]


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def loops(length: int, n_init: int, n_local: int, n_far: int, stride: int) -> Tensor:
    """The definition, pair by pair."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(i + 1):
            far = i - j < n_local + n_far and (i - j) % stride == 0
            mask[i, j] = j < n_init or i - j < n_local or far
    return mask


def masked_dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = (query.double() @ key.double().transpose(2, 3)) * scale
    out: Tensor = scores.masked_fill(~mask, -math.inf).softmax(-1) @ value.double()
    return out.to(query.dtype)


class TestStrided(AttentionContract):
    """Decode is dense."""

    cases: ClassVar[list[Case]] = [
        Case("dilated-window", {"n_local": 64}, full={}, sparse=False),
        Case("strided-window", full={}, sparse=False),
    ]


class TestStridedPrefill(PrefillContract):
    cases: ClassVar[list[PrefillCase]] = [
        PrefillCase("dilated-window", SMALL, {"n_init": 96}),
        PrefillCase("strided-window", {**SMALL, "n_local": 8}, {"n_local": 96}),
    ]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_is_one_masked_softmax(pattern: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in blocks of queries, and for padded sequences, which are as if alone."""
    monkeypatch.setattr(S, "_ROWS", 48)
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 150, 8, generator=draw) for heads in (4, 2, 2))
    mask = loops(150, *pattern)
    assert int(mask.sum()) == S.strided_pairs(150, *pattern)
    want = masked_dense(query, key, value, mask, 0.5)
    torch.testing.assert_close(S.strided_attention(query, key, value, *pattern, 0.5), want, **CLOSE)
    got = S.strided_attention(query, key, value, *pattern, 0.5, torch.tensor([0, 53]))
    alone = masked_dense(*(x[1:, :, 53:] for x in (query, key, value)), loops(97, *pattern), 0.5)
    torch.testing.assert_close(got[0], want[0], **CLOSE)
    torch.testing.assert_close(got[1:, :, 53:], alone, **CLOSE)
    torch.testing.assert_close(got[1, :, :53], value[1, :, :53].repeat_interleave(2, 0), **CLOSE)


@pytest.mark.parametrize(("slug", "n_local"), [("dilated-window", 0), ("strided-window", 8)])
def test_through_a_model(slug: str, n_local: int) -> None:
    stream = Stream(length=96)
    with make(slug, **SMALL, n_local=n_local, starting_layer=1).attach(_model()) as handle:
        out = stream.feed(handle, 96)
        shares = handle.report()["prefill_area_of_heads"]
    mask = loops(96, 3, n_local, 24, 2)
    torch.testing.assert_close(out[0], stream.dense(0)[0], **CLOSE)
    for layer in (1, 2):
        want = masked_dense(stream.query[layer], stream.key[layer], stream.value[layer], mask, 0.25)
        torch.testing.assert_close(out[layer], want, **CLOSE)
    assert shares[0] == [1.0] * 4
    assert shares[1] == pytest.approx([int(mask.sum()) / causal_pairs(96)] * 4)


def test_they_are_baselines_with_the_papers_numbers() -> None:
    dilated, strided = S.Dilated(), S.Strided()
    assert (dilated.n_init, dilated.n_local, dilated.n_far, dilated.stride) == (1024, 0, 8192, 2)
    assert (strided.n_init, strided.n_local, strided.n_far, strided.stride) == (1024, 2048, 4096, 2)
    assert all(method(slug).baseline for slug in ("dilated-window", "strided-window"))


@pytest.mark.parametrize("bad", [{"n_init": -1}, {"n_far": 0}, {"stride": 0}, {"n_local": -1}, {"window": 4}], ids=str)
def test_bad_settings_are_one_line(bad: dict[str, Any]) -> None:
    for slug in ("dilated-window", "strided-window"):
        with pytest.raises(InputError, match=next(iter(bad))) as caught:
            make(slug, **bad)
        assert "\n" not in str(caught.value)
