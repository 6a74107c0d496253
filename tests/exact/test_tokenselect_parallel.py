"""TokenSelect over tensor-parallel ranks: two processes with half of the heads each choose what one process chooses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.attention.tokenselect import TokenSelect, likeness
from gossamer.errors import InputError
from gossamer.models import tiny_model
from gossamer.testing import Stream

#: Two heads of four, one KV head of two; a cosine limit that some steps pass.
SETTINGS: dict[str, Any] = {"n_init": 2, "k": 6, "n_local": 4, "chunk": 8, "theta": 0.2}
SIZES = (40, *[1] * 12)


def drifting() -> Stream:
    """Queries that change slowly, so that the Selection Cache hits here and there."""
    stream = Stream()
    for t in range(41, 64):
        stream.query[:, :, :, t] = 0.8 * stream.query[:, :, :, t - 1] + 0.6 * stream.query[:, :, :, t]
    return stream


def run(rank: int, folder: str) -> None:
    """One of two processes."""
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = tiny_model("qwen2", num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    results = []
    for vote in ("soft", "raw", "hard"):
        stream = drifting()
        stream.query = stream.query[:, :, 2 * rank : 2 * rank + 2].contiguous()
        stream.key, stream.value = (x[:, :, rank : rank + 1].contiguous() for x in (stream.key, stream.value))
        method = TokenSelect(**SETTINGS, vote=vote, tensor_parallel=True)  # type: ignore[arg-type]
        with torch.no_grad(), method.attach(model) as handle:
            out = stream.feed(handle, *SIZES)
            policy: Any = handle.runtime.decode
            results.append((out, policy.hits, policy.lookups))
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_choose_what_one_process_chooses(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import {Path(__file__).stem} as t; "
    ranks = [
        subprocess.Popen([sys.executable, "-c", f"{code}t.run({rank}, {str(tmp_path)!r})"], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    expected = []
    for vote in ("soft", "raw", "hard"):
        with torch.no_grad(), TokenSelect(**SETTINGS, vote=vote).attach(tiny_model("qwen2")) as handle:  # type: ignore[arg-type]
            out = drifting().feed(handle, *SIZES)
            policy: Any = handle.runtime.decode
            expected.append((out, policy.hits, policy.lookups))
    errors = [process.communicate(timeout=100)[1].decode() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for i, (out, hits, lookups) in enumerate(expected):
        torch.testing.assert_close(torch.cat([half[i][0] for half in halves], 2), out, atol=1e-5, rtol=1e-5)
        assert [half[i][1:] for half in halves] == [(hits, lookups)] * 2
        assert 0 < hits < lookups, "the cosine did not decide anything"


def test_without_the_other_rank_the_choice_would_differ() -> None:
    """The test above could not fail if half of the heads chose what all do."""
    stream = drifting()
    with torch.no_grad(), TokenSelect(**SETTINGS).attach(tiny_model("qwen2")) as handle:
        whole = stream.feed(handle, *SIZES)
    half = drifting()
    half.query, half.key, half.value = half.query[:, :, :2], half.key[:, :, :1], half.value[:, :, :1]
    model = tiny_model("qwen2", num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    with torch.no_grad(), TokenSelect(**SETTINGS).attach(model) as handle:
        alone = half.feed(handle, *SIZES)
    assert float((alone - whole[:, :, :2]).abs().max()) > 1e-2


def test_likeness_is_the_cosine() -> None:
    one, two = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(likeness(one, two), torch.nn.functional.cosine_similarity(one, two))


def test_ranks_need_a_process_group() -> None:
    with pytest.raises(InputError, match="init_process_group"):
        TokenSelect(tensor_parallel=True).attach(tiny_model("qwen2"))
