"""A study: budgets that mean the same for all, ranks that rest on paired differences."""

import io
import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from gossamer.errors import InputError
from gossamer.hf import ModelShape
from gossamer.measure import report
from gossamer.measure.compare import Plan
from gossamer.measure.quality import Scores
from gossamer.measure.results import Comparison, MethodResult
from gossamer.measure.rows import Entry, Measured
from gossamer.measure.study import at_budget, beats, rank
from gossamer.recipe import Recipe
from gossamer.registry import make, methods

SHAPE = ModelShape(layers=30, heads=9, kv_heads=3, head_dim=64)
SELECTORS = sorted(
    slug for slug, m in methods().items() if "tokens" in m.model_fields and "attention.decode" in m().slots
)


@pytest.mark.parametrize("slug", SELECTORS)
@pytest.mark.parametrize("budget", [1 / 16, 1 / 4])
def test_selectors_read_no_more_than_the_budget(slug, budget):
    dense = 4096 * SHAPE.kv_heads * 2 * SHAPE.head_dim * 4
    method = at_budget(slug, budget, 4096, SHAPE, 4)
    spent = method.io_bytes(4096, SHAPE, 4)["rows"]
    assert 0.7 * budget * dense < spent <= budget * dense
    assert getattr(method, "dense_layers", ()) == ()


@pytest.mark.parametrize(("slug", "setting"), [("minference", "area"), ("h2o", "budget"), ("alisa", "ratio")])
def test_other_methods_take_the_share_itself(slug, setting):
    assert getattr(at_budget(slug, 1 / 16, 4096, SHAPE, 4), setting) == 1 / 16


def test_a_budget_too_small_for_a_method_keeps_its_least_setting():
    quest = at_budget("quest", 1 / 4096, 4096, SHAPE, 4)
    assert quest.io_bytes(4096, SHAPE, 4)["rows"] > 3 * 2 * 64 * 4


def test_a_plan_refuses_a_budget_that_is_no_share():
    with pytest.raises(InputError, match="a share"):
        Plan(budget=1.5)


def measured(label: str, losses: torch.Tensor, *, yardstick: str = "read", share: float = 1 / 16, slug: str = "quest"):
    """A row whose KL from a uniform dense row over two tokens is `losses`."""
    rare = torch.sigmoid(-2 * (losses * 2).sqrt())  # small losses: KL(uniform || p) is about 2 (p - 1/2)^2
    log_probs = torch.stack([rare, 1 - rare], 1).log()
    m = Measured(Entry(Recipe.of(make(slug)), label))
    m.scores = [Scores(log_probs[:, 0], torch.ones(len(losses)), log_probs)]
    m.yardstick, m.area = yardstick, share
    m.read, m.held_bytes = {"kv": share, "dense": 1.0}, int(share * 1024)
    return m


def dense_row(n: int) -> Measured:
    m = measured("dense", torch.zeros(n), slug="dense")
    m.yardstick, m.held_bytes = None, 1024
    return m


def test_ranks_rest_on_paired_differences():
    torch.manual_seed(0)
    hard = torch.rand(160) * 0.02 + 1e-4  # how hard each token is, for every method alike
    noisy = torch.rand(160) * 1e-5
    rows = [measured("second", hard * 1.03 + noisy), measured("first", hard), measured("twin", hard.flip(0).flip(0))]
    (ranking,) = rank(rows, dense_row(160), 1 / 16)
    assert [(p.label, p.rank) for p in ranking.places] == [("first", 1), ("twin", 1), ("second", 3)]
    assert ranking.samples == 10
    assert ranking.places[0].value < ranking.places[2].value < ranking.places[0].value + ranking.places[0].stderr, (
        "a difference smaller than either error: only pairing shows it"
    )


def test_over_budget_and_oracles_are_shown_but_not_ranked():
    losses = torch.full((64,), 0.01)
    rows = [
        measured("greedy", losses / 9, share=1 / 8),
        measured("oracle", losses / 9, slug="exact-top-k"),
        measured("honest", losses),
    ]
    (ranking,) = rank(rows, dense_row(64), 1 / 16)
    assert [(p.label, p.rank, p.over) for p in ranking.places] == [
        ("honest", 1, False),
        ("greedy", None, True),
        ("oracle", None, False),
    ]


def test_kinds_are_ranked_apart_and_by_their_own_share():
    losses = torch.full((32,), 0.01)
    rows = [measured(kind, losses, yardstick=kind, share=1 / 32) for kind in ("read", "held", "area")]
    rankings = rank(rows, dense_row(32), 1 / 16)
    assert [(r.yardstick, r.places[0].share) for r in rankings] == [
        ("read", 1 / 32),
        ("held", 1 / 32),
        ("area", 1 / 32),
    ]


def test_one_sample_shows_no_difference():
    assert not beats(torch.tensor([1.0]), torch.tensor([2.0]))
    assert not beats(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    assert math.isnan(rank([measured("one", torch.full((8,), 0.01))], dense_row(8), 0.5)[0].places[0].stderr)


def test_rankings_are_kept_and_shown():
    losses = torch.full((64,), 0.01)
    rankings = rank([measured("ours", losses), measured("*over|", losses, share=1 / 2)], dense_row(64), 1 / 16)
    facts = SimpleNamespace(model="m", context=64, decode_tokens=64, seed=0, dtype="float32", threads=1, budget="1/16")
    comparison = Comparison(
        **vars(facts),
        machine={},
        versions={},
        created="2026-01-01",
        bandwidth_gbs=None,
        methods=[MethodResult("a", "ours")],
        reference="dense",
        rankings=rankings,
    )
    assert Comparison.from_dict(comparison.to_dict()) == comparison
    console = Console(file=io.StringIO(), width=80)
    report.table(comparison, console)
    shown = console.file.getvalue()
    assert "ours alone keeps to the budget" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "| 1 | ours | 0.00997 " in report.to_markdown(comparison)
    assert "\\*over\\|" in report.to_markdown(comparison)
    assert 'id="ranking"' in report.page(comparison)
    assert 'id="ranking"' not in report.page(Comparison.from_dict({**comparison.to_dict(), "rankings": []}))
