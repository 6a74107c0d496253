"""A-shape and Tri-shape prefill: two passes against one masked softmax, blocks, dense last queries."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from gossamer.attention import minference_patterns as P
from gossamer.attention.a_shape import one_pass, two_passes
from gossamer.errors import InputError
from gossamer.models import tiny_model
from gossamer.patterns import causal_pairs
from gossamer.registry import make
from gossamer.testing import AttentionContract, Case, PrefillCase, PrefillContract, Stream

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
MODEL = tiny_model("qwen2")  # what Stream feeds: 3 layers, 4 query heads on 2 KV heads


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(length: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Four query heads on two KV heads."""
    key, value = normal(2, batch, 2, length, 8, seed=1)
    return 2 * normal(batch, 4, length, 8), key, value


def masked_dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = (query.double() @ key.double().transpose(2, 3)) * scale
    out: Tensor = scores.masked_fill(~mask, -math.inf).softmax(-1) @ value.double()
    return out.to(query.dtype)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


class TestAShape(AttentionContract):
    """Decode is dense, and the suite's prompts are within the window."""

    cases: ClassVar[list[Case]] = [
        Case("a-shape", full={}, sparse=False),
        Case("a-shape", {"last_q": 100, "n_local": 64}, full={}, sparse=False),
    ]


class TestAShapePrefill(PrefillContract):
    cases: ClassVar[list[PrefillCase]] = [
        PrefillCase("a-shape", {"n_init": 3, "n_local": 10, "block_size": 8}),
        PrefillCase("a-shape", {"n_init": 3, "n_local": 10, "exact": True, "last_q": 20}, {"n_local": 96}),
    ]


@pytest.mark.parametrize(("n_init", "n_local"), [(4, 10), (0, 7), (60, 300), (400, 1), (5, 400)])
def test_two_passes_equal_one_masked_softmax(n_init: int, n_local: int) -> None:
    query, key, value = qkv(400, batch=2)
    want = masked_dense(query, key, value, P.a_shape_mask(400, n_init, n_local), 0.3)
    torch.testing.assert_close(two_passes(query, key, value, n_init, n_local, 0.3), want, **CLOSE)
    torch.testing.assert_close(one_pass(query, key, value, n_init, n_local, 0.3, 64), want, **CLOSE)
    short = two_passes(query[:, :, 50:], key[:, :, 50:], value[:, :, 50:], n_init, n_local, 0.3)
    starts = torch.tensor([0, 50])
    got = two_passes(query, key, value, n_init, n_local, 0.3, starts)
    torch.testing.assert_close(got[0], want[0], **CLOSE)
    torch.testing.assert_close(got[1, :, 50:], short[1], **CLOSE)
    assert bool((got[1, :, :50] == 0).all())


def test_a_shape_and_tri_shape() -> None:
    small: dict[str, Any] = {"n_init": 3, "n_local": 10, "block_size": 8}
    dense = Stream(length=96).dense(0)
    outs, areas = {}, {}
    for name, more in {
        "blocks": {},
        "exact": {"exact": True},
        "tri": {"last_q": 20},
        "both": {"last_q": 20, "exact": True},
    }.items():
        with make("a-shape", **small, **more).attach(MODEL) as handle:  # type: ignore[attr-defined]
            outs[name] = Stream(length=96).feed(handle, 96)
            areas[name] = handle.report()["prefill_area"]
    stream = Stream(length=96)
    for layer in range(3):
        want = masked_dense(
            stream.query[layer], stream.key[layer], stream.value[layer], P.a_shape_mask(96, 3, 10), 0.25
        )
        torch.testing.assert_close(outs["exact"][layer], want, **CLOSE)
    assert areas["exact"] == pytest.approx(int(P.a_shape_mask(96, 3, 10).sum()) / causal_pairs(96))
    assert areas["exact"] < areas["blocks"] < areas["tri"]
    for tri, plain in (("tri", "blocks"), ("both", "exact")):
        torch.testing.assert_close(outs[tri][..., 76:, :], dense[..., 76:, :], **CLOSE)
        torch.testing.assert_close(outs[tri][..., :72, :], outs[plain][..., :72, :], **CLOSE)
    with pytest.raises(InputError, match="choose one"):
        make("a-shape", exact=True, area=0.5).attach(MODEL)  # type: ignore[attr-defined]


def test_area_scales_both_budgets() -> None:
    with make("a-shape", area="1/2", block_size=8).attach(MODEL) as handle:  # type: ignore[attr-defined]
        Stream(length=256).feed(handle, 256)
        assert handle.report()["prefill_area"] == pytest.approx(0.5, rel=0.1)


def test_bad_settings_are_one_line() -> None:
    for bad in ({"n_local": 0}, {"n_init": -1}, {"area": 2.0}, {"last_q": -1}):
        with pytest.raises(InputError, match="a-shape"):
            make("a-shape", **bad)
