"""Long generations through every cache method with a bounded budget.

Memory stays flat, rows stay beside their positions, outputs stay finite. 2,000 tokens always; 20,000 with `-m long`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from gossamer.hf import GossamerCache
from gossamer.models import tiny_model
from gossamer.policies import attach
from gossamer.registry import make, methods

PROMPT, BUDGET, CHECKS = 64, 48, 20
#: Bytes of Python's own making (a cached table, a compiled call) that may appear between two checks.
SLACK = 1 << 16


@dataclass(frozen=True)
class Run:
    """Methods stacked in one run.

    stack: slug and settings of each.
    exact: newest rows whose keys must be those of their tokens (None: all; a method that merges changes older ones).
    bounded: whether the rows held have a bound; if not, each token adds one and the rows read have one.
    newest: whether the newest token always stays.
    tolerance: of a kept key beside the one computed afresh.
    """

    stack: tuple[tuple[str, dict[str, Any]], ...]
    exact: int | None = None
    bounded: bool = True
    newest: bool = True
    tolerance: float = 1e-4

    def __str__(self) -> str:
        return " + ".join(slug + "".join(f" {k}={v}" for k, v in settings.items()) for slug, settings in self.stack)


def one(slug: str, exact: int | None = None, bounded: bool = True, newest: bool = True, **settings: Any) -> Run:
    return Run(((slug, settings),), exact, bounded, newest)


#: How each method runs in bounded memory; one that is not named runs with ``budget=BUDGET``.
RUNS: dict[str, list[Run]] = {
    "a2sf": [one("a2sf", newest=False, budget=BUDGET), one("a2sf", budget=BUDGET, sink=4, recent=8, prompt="block")],
    "ems": [
        one("ems", exact=16, budget=BUDGET, window=16, combine="sum", tau=0.3),
        one("ems", budget=BUDGET, window=8, every=4, tau=2.0),
        one("ems", exact=16, budget=BUDGET, window=16, tau=0.3, mass=0.9, similarity="prerope"),
    ],
    "sliding-window": [one("sliding-window", window=BUDGET - 4, sinks=4)],
    "tova": [one("tova", newest=False, budget=BUDGET)],
}
#: Methods that have no bounded setting, and why.
UNBOUNDED = {"snapkv": "it compresses prompts only: generated tokens all stay"}
#: Beyond the cache methods: a bounded number of rows is read from a cache that grows; and a stack.
OTHERS = [
    one("streaming-llm", bounded=False, tokens=BUDGET),
    Run((("quest", {"tokens": 16, "page_size": 4}), ("ems", {"budget": BUDGET, "window": 16, "tau": 0.3})), exact=16),
]


def runs() -> list[Any]:
    """Every registered cache method, and the others."""
    found: list[Any] = []
    for slug, method in methods().items():
        if method.slot == "cache":
            mark = pytest.mark.skip(reason=UNBOUNDED.get(slug, ""))
            known = RUNS.get(slug) or [one(slug, **({"budget": BUDGET} if "budget" in method.model_fields else {}))]
            found += [pytest.param(run, id=str(run), marks=[mark] if slug in UNBOUNDED else []) for run in known]
    return found + [pytest.param(run, id=str(run)) for run in OTHERS]


def live_bytes() -> int:
    """Bytes of the storages of all tensors that Python can reach and has made since `gc.freeze`."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor or type(thing) is torch.nn.Parameter:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def fresh_keys(model: Any, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """First-layer keys of these tokens at these positions, both ``[1, kv_heads, n]``, as ``[1, kv_heads, n, d]``."""
    heads, count = tokens.shape[1:]
    layer = model.model.layers[0]
    hidden = layer.input_layernorm(model.model.embed_tokens(tokens.flatten(1)))
    key = layer.self_attn.k_proj(hidden).view(1, heads, count, heads, -1)
    own = torch.stack([key[:, h, :, h] for h in range(heads)], 1)
    cos, sin = model.model.rotary_emb(own, positions.flatten(1))
    return apply_rotary_pos_emb(*(x.flatten(1, 2)[:, None] for x in (own, own)), cos, sin)[1].view(own.shape)


@dataclass
class Watch:
    """What is written down while a run goes on."""

    most: list[int] = field(default_factory=list)  # largest bytes of rows in each period
    capacity: list[int] = field(default_factory=list)
    live: list[int] = field(default_factory=list)  # a quarter of the way, half, …
    rows: list[int] = field(default_factory=list)  # rows read in each period


def generate(run: Run, count: int) -> None:
    """Sample `count` tokens and check as it goes on."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32}
    model: Any = tiny_model("llama", num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, **sizes)
    generator = torch.Generator().manual_seed(0)
    total = PROMPT + count
    tokens = torch.zeros(total + 1, dtype=torch.int64)
    tokens[:PROMPT] = torch.randint(1, 96, (PROMPT,), generator=generator)
    cache, watch, period = GossamerCache(), Watch(), count // CHECKS
    with torch.no_grad(), attach(model, [(make(slug, **settings), None) for slug, settings in run.stack]) as handle:
        logits = model(tokens[None, :PROMPT], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        most = read = 0
        for seen in range(PROMPT, total):
            tokens[seen] = torch.multinomial(logits[0, -1].softmax(-1), 1, generator=generator)[0]
            logits = model(tokens[None, seen : seen + 1], past_key_values=cache, use_cache=True).logits
            assert torch.isfinite(logits).all(), f"token {seen}"
            most = max(most, cache.nbytes)
            if (seen + 1 - PROMPT) % period == 0:
                check_rows(run, model, cache, tokens, seen)
                watch.most.append(most)
                watch.capacity.append(sum(layer.capacity for layer in cache.layers))
                if len(watch.most) % (CHECKS // 4) == 0:
                    watch.live.append(live_bytes())
                watch.rows.append(handle.runtime.stats.rows - read)
                most, read = 0, handle.runtime.stats.rows
        assert cache.get_seq_length() == total
    assert max(watch.rows) <= period * 2 * 2 * BUDGET  # two KV heads
    if run.bounded:
        assert len(set(watch.capacity[1:])) == 1
        assert len(set(watch.most[1:])) == 1
        assert max(watch.live) <= watch.live[0] + SLACK
        assert watch.most[-1] <= 2 * BUDGET * cache.nbytes / cache.layers[0].length
    else:
        assert cache.layers[0].length == total


def check_rows(run: Run, model: Any, cache: GossamerCache, tokens: torch.Tensor, seen: int) -> None:
    """Positions ascend and end at the newest token; the first layer's keys are those of the tokens at the positions."""
    for kv in cache.layers:
        positions = kv.positions
        assert bool((positions.diff(dim=2) > 0).all())
        assert bool((positions[..., -1] == seen).all() if run.newest else (positions[..., -1] <= seen).all())
        assert bool((positions[..., 0] >= 0).all())
        assert torch.isfinite(kv.keys).all()
        assert torch.isfinite(kv.values).all()
    kv = cache.layers[0]
    positions = kv.positions[..., -(run.exact or kv.length) :].long()
    kept = kv.keys[:, :, -positions.shape[2] :]
    torch.testing.assert_close(kept, fresh_keys(model, tokens[positions], positions), atol=run.tolerance, rtol=0)
    drifted = fresh_keys(model, tokens[positions], positions + 1)  # the check would see it
    assert float((kept - drifted).abs().amax()) > 10 * run.tolerance


@pytest.fixture(autouse=True)
def _only_new_objects() -> Iterator[None]:
    """Leaves what is there out of the garbage collector's sight, which makes counting quick."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("run", runs())
def test_two_thousand_tokens(run: Run) -> None:
    generate(run, 2000)


@pytest.mark.long
@pytest.mark.parametrize("run", runs())
def test_twenty_thousand_tokens(run: Run) -> None:
    generate(run, 20_000)
