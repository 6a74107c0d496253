"""Comparisons as data, and their table, Markdown and page."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from gossamer.errors import InputError, OutputError
from gossamer.files import write_whole
from gossamer.measure import report
from gossamer.measure.results import (
    Comparison,
    Cost,
    Estimate,
    MethodResult,
    PaperFigure,
    Quality,
    Selection,
    Spread,
)

MIB = 2**20
EVIL = '</script><script>alert("x")</script> & `|*'


def spread(median: float, width: float = 0.4) -> Spread:
    return Spread(median, median - width / 2, median + width / 2, 25)


def row(
    slug: str, label: str, ms: float, attention: float, read: int, kl: Estimate | None, **more: Any
) -> MethodResult:
    accuracy = more.pop("accuracy", 1.0)
    error = math.sqrt(accuracy * (1 - accuracy) / 20)
    fields = {
        "quality": Quality(
            kl,
            None if kl is None else Estimate(0.97, 0.004, 90),
            Estimate(13.4, 0.3, 90),
            {"passkey": Estimate(accuracy, error, 20)},
        ),
        "cost": Cost(
            prefill_ms=spread(900.0),
            token_ms=spread(ms),
            attention_ms=spread(attention, 0.1),
            overhead_ms=0.5,
            kv_bytes_held=64 * MIB,
            kv_bytes_read=float(read),
            dense_bytes_read=64.0 * MIB,
            weight_bytes_read=100 * MIB,
        ),
        **more,
    }
    return MethodResult(slug, label, **fields)


def example() -> Comparison:
    density = np.linspace(0, 1, 2 * 3 * 4).reshape(2, 3, 4).tolist()
    sparse = row("double-sparsity", "Double Sparsity", 20.0, 3.0, 8 * MIB, Estimate(0.02, 0.002, 90), accuracy=0.95)
    sparse = dataclasses.replace(
        sparse, settings={"token_ratio": 1 / 16, "dense_layers": [0, 1]}, selection=Selection([0, 5], 3, 4, density)
    )
    return Comparison(
        model="smollm2",
        context=4096,
        decode_tokens=64,
        seed=7,
        dtype="float32",
        threads=2,
        budget="1/16",
        machine={"cpu": "A processor", "cores": 2},
        versions={"torch": "2.9.0"},
        created="2026-11-24T09:00:00+00:00",
        bandwidth_gbs=20.0,
        methods=[
            row("dense", "Dense (our kernel)", 30.0, 12.0, 64 * MIB, None, baseline=True),
            sparse,
            row("quest", "Quest", 24.0, 6.0, 16 * MIB, Estimate(0.05, 0.004, 90), baseline=True, accuracy=0.9),
        ],
        reference="dense",
        command="gossamer compare smollm2 --seed 7",
        literature=[PaperFigure("double-sparsity", 1.9, "times", "end to end", "Llama-2-7B", "arXiv 2408.07092")],
    )


def with_methods(*methods: MethodResult, **more: Any) -> Comparison:
    return dataclasses.replace(example(), methods=list(methods), **more)


def printed(comparison: Comparison, width: int = 100) -> str:
    out = io.StringIO()
    report.table(comparison, Console(file=out, width=width, color_system=None))
    return out.getvalue()


AWKWARD = {
    "no rows": with_methods(),
    "one row": with_methods(example().methods[1]),
    "no quality": with_methods(*(dataclasses.replace(m, quality=None) for m in example().methods)),
    "no cost": with_methods(*(dataclasses.replace(m, cost=None) for m in example().methods)),
    "nothing": with_methods(MethodResult("a", "A"), MethodResult("b", "B", error="out\nof memory")),
    "unknown errors": with_methods(
        row("a", "A", 3.0, 1.0, MIB, Estimate(0.1, math.nan, 1)),
        row("b", "B", 3.0, 1.0, MIB, Estimate(0.2, math.nan, 1)),
    ),
    "not finite": with_methods(
        row("a", "A", math.nan, math.nan, MIB, Estimate(math.nan, math.nan, 2)),
        row("b", "B", math.inf, 1.0, 0, Estimate(math.inf, math.inf, 2)),
    ),
    "all exact": with_methods(*(row(f"m{i}", f"M{i}", 3.0, 1.0, MIB, Estimate(0.0, 0.0, 9)) for i in range(3))),
    "no reference": dataclasses.replace(example(), reference="absent", bandwidth_gbs=None, command="", literature=[]),
    "many": with_methods(
        *(row(f"m{i}", f"A long name for method {i}", 3.0 + i, 1, MIB * i, Estimate(i / 9, 0.1, 9)) for i in range(24))
    ),
}  # fmt: skip


# Data


def test_spread_is_median_and_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0, 5)


def test_estimate_is_mean_and_its_standard_error() -> None:
    assert Estimate.of([1.0, 2.0, 3.0]) == Estimate(2.0, pytest.approx(1 / math.sqrt(3)), 3)
    assert math.isnan(Estimate.of([1.0]).stderr)


def test_no_samples_is_an_error() -> None:
    with pytest.raises(InputError, match="at least one sample"):
        Estimate.of([])


def test_standard_error_of_a_median_matches_resampling() -> None:
    samples = np.random.default_rng(0).normal(size=(4000, 101))
    true = np.median(samples, axis=1).std()
    claimed = np.mean([Spread.of(s).stderr for s in samples[:300]])
    assert claimed == pytest.approx(true, rel=0.1)


def test_comparison_survives_json(tmp_path: Path) -> None:
    comparison = example()
    assert Comparison.from_dict(json.loads(json.dumps(comparison.to_dict()))) == comparison
    assert Comparison.load(comparison.save(tmp_path / "new folder" / "run.json")) == comparison


def test_json_is_standard_even_when_numbers_are_not(tmp_path: Path) -> None:
    path = AWKWARD["not finite"].save(tmp_path / "run.json")
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    quality = Comparison.load(path).methods[1].quality
    assert quality is not None
    assert quality.kl == Estimate(math.inf, math.inf, 2)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"methods": 3}', '{"methods": [], "format": 99}', "\x00\xff"])
def test_damaged_file_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as caught:
        Comparison.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        Comparison.load(tmp_path / "absent.json")


def test_selection_checks_its_shape() -> None:
    with pytest.raises(InputError, match=r"2 layers.*3 heads.*4 bins"):
        Selection([0, 1], 3, 4, [[[0.0]]])


def test_interrupted_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [lambda c, p: c.save(p), report.html], ids=["json", "html"])
def test_unwritable_path_is_one_line(tmp_path: Path, write: Any) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "run.out", tmp_path):
        with pytest.raises(OutputError) as caught:
            write(example(), path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


def test_model_time_is_what_is_not_attention() -> None:
    cost = example().methods[1].cost
    assert cost is not None
    assert cost.model_ms == pytest.approx(17.0)
    assert cost.share_read == pytest.approx(1 / 8)


# Noise


def test_two_standard_errors_make_a_difference() -> None:
    a = Estimate(1.0, 0.3, 9)
    assert report.differ(a, Estimate(2.0, 0.4, 9))  # exactly 2 · 0.5
    assert not report.differ(a, Estimate(1.99, 0.4, 9))
    assert not report.differ(a, Estimate(9.0, math.nan, 1))
    assert not report.differ(a, a)


def test_winner_leads_by_more_than_noise() -> None:
    won = report.winners(example())
    assert won["kl"].slug == "double-sparsity"
    assert won["token_ms"].slug == "double-sparsity"
    assert "tasks" not in won  # 95 % and 90 % of 20 examples


def test_ties_are_named() -> None:
    texts = [r.text for r in report.remarks(example()) if r.kind == "noise"]
    assert "Within noise of the best task accuracy: Double Sparsity and Quest." in texts
    assert any("perplexity" in text for text in texts)
    assert not any("KL" in text for text in texts)


def test_neither_dense_nor_oracle_can_win() -> None:
    oracle = row("exact-top-k", "Oracle", 1.0, 1.0, 1, Estimate(1e-9, 0.0, 90))
    won = report.winners(with_methods(*example().methods, oracle))
    assert won["kl"].slug == "double-sparsity"
    assert "exact-top-k" not in {m.slug for m in won.values()}


def test_single_measured_row_wins_nothing() -> None:
    assert report.winners(AWKWARD["one row"]) == {}


# Remarks


def test_ceiling_is_stated() -> None:
    text = report.remarks(example())[0].text
    assert "40.0 % of a decode step of Dense (our kernel)" in text
    assert "1.67 times" in text


def test_slower_method_says_why() -> None:
    slow = row("quest", "Quest", 40.0, 22.0, 16 * MIB, Estimate(0.05, 0.004, 90))
    texts = [r.text for r in report.remarks(with_methods(example().methods[0], slow)) if r.kind == "pay"]
    assert any("Quest is slower than Dense (our kernel) (40.0 against 30.0 ms a token)" in t for t in texts)
    assert any("reads 25.0 % of the bytes; choosing and gathering cost more" in t for t in texts)


def test_method_that_reads_everything_saves_no_traffic() -> None:
    greedy = row("quest", "Quest", 20.0, 2.0, 96 * MIB, None)
    assert any("1.50 times what dense attention reads" in r.text for r in report.remarks(with_methods(greedy)))


def test_failures_come_first_in_one_line() -> None:
    first = report.remarks(AWKWARD["nothing"])[0]
    assert first == report.Remark("error", "B did not run: out of memory")


def test_same_note_is_said_once() -> None:
    noted = [dataclasses.replace(m, notes=["dense here"]) for m in example().methods[:2]]
    texts = [r.text for r in report.remarks(with_methods(*noted)) if r.kind == "method"]
    assert texts == ["Dense (our kernel) and Double Sparsity: dense here"]


# Numbers


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1024, "1.00 KiB"), (1023.9 * 1024, "1.00 MiB"), (None, "–"), (math.nan, "–")],
)
def test_bytes(count: float | None, text: str) -> None:
    assert report.human_bytes(count) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0 %"), (1, "100 %"), (0.9996, "100 %"), (0.25, "25.0 %"), (1e-5, "0.001 %"), (None, "–")]
)
def test_percent(share: float | None, text: str) -> None:
    assert report.percent(share) == text


# Table and Markdown


@pytest.mark.parametrize("width", [40, 80, 100, 160])
@pytest.mark.parametrize("name", ["example", *AWKWARD])
def test_table_fits(name: str, width: int) -> None:
    text = printed(AWKWARD.get(name, example()), width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert "nan" not in text.lower()


def test_table_shows_everything_at_100_columns() -> None:
    lines = printed(example()).splitlines()
    line = next(line for line in lines if line.startswith("Double Sparsity"))
    for value in ("0.0200 ±0.0020", "97.0 %", "13.40", "95.0 %", "20.0 1.50×", "8.00 MiB 12.5 %", "64.0 MiB"):
        assert value in line
    assert "…" not in "".join(lines)


def test_narrow_table_says_what_it_leaves_out() -> None:
    text = " ".join(printed(example(), 80).split())
    assert "perpl." not in text
    assert "a wider terminal also shows perplexity" in text


def test_difference_within_noise_is_marked() -> None:
    close = row("quest", "Quest", 29.99, 12.0, 16 * MIB, None)
    assert "≈1.00×" in printed(with_methods(example().methods[0], close))


def test_markdown_has_a_cell_for_every_column() -> None:
    for comparison in (example(), *AWKWARD.values()):
        lines = [line for line in report.to_markdown(comparison).splitlines() if line.startswith("|")]
        if comparison.methods and comparison is not AWKWARD["nothing"]:
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_markdown_escapes() -> None:
    text = report.to_markdown(with_methods(dataclasses.replace(example().methods[1], label=EVIL)))
    assert "<script" not in text
    assert "\\|\\*" in text


def test_markup_of_rich_is_not_read() -> None:
    assert "[bold]x[/bold]" in printed(with_methods(dataclasses.replace(example().methods[1], label="[bold]x[/bold]")))


# The page


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.words.append(data)

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[1])


def test_page_loads_nothing_and_is_small() -> None:
    text = report.page(example())
    page = Page(text)
    assert len(text.encode()) < 6e6
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert "src" not in attributes
        assert str(attributes.get("href", "#")).startswith("#")
    assert len(page.scripts) == 3
    css = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in css
    assert "@import" not in css
    assert "default-src 'none'" in text


def test_page_is_accessible() -> None:
    page = Page(report.page(example()))
    tags = [tag for tag, _ in page.tags]
    assert dict(page.tags)["html"]["lang"] == "en"
    assert tags.count("title") == tags.count("main") == tags.count("h1") == 1
    assert tags.count("caption") == tags.count("table") == 3
    assert all(a.get("scope") for tag, a in page.tags if tag == "th")
    assert all(a.get("aria-label") for tag, a in page.tags if a.get("role") in ("img", "region"))


def test_page_says_what_was_measured_and_how_to_repeat_it() -> None:
    words = " ".join(Page(report.page(example())).words)
    for text in ("3 ways to attend to 4,096 tokens with smollm2", "A processor", "2.9.0", "gossamer compare smollm2"):
        assert text in words
    assert "None was measured in this run" in words


def test_every_string_is_escaped() -> None:
    evil = dataclasses.replace(
        example().methods[1],
        label=EVIL,
        settings={EVIL: EVIL},
        notes=[EVIL],
        quality=Quality(tasks={EVIL: Estimate(1.0, 0.0, 3)}, task_logprob={EVIL: Estimate(1.0, 0.0, 3)}),
    )
    comparison = with_methods(
        example().methods[0], evil, MethodResult("x", EVIL, error=EVIL),
        model=EVIL, budget=EVIL, dtype=EVIL, created=EVIL,
        machine={EVIL: EVIL, "cpu": EVIL}, versions={EVIL: EVIL}, command=EVIL, reference=EVIL,
        literature=[PaperFigure(EVIL, 1.0, EVIL, EVIL, EVIL, EVIL)],
    )  # fmt: skip
    page = Page(report.page(comparison))
    assert len(page.scripts) == 3
    assert not any("alert(" in script for script in (page.scripts[0], page.scripts[2]))
    assert page.data["rows"][1]["label"] == EVIL
    assert 'alert("x")' in " ".join(page.words)


def test_placeholders_in_user_text_stay_text() -> None:
    text = report.page(with_methods(dataclasses.replace(example().methods[1], label="{{script}} \\1")))
    assert "{{script}} \\1" in text


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_pages_are_written(name: str, tmp_path: Path) -> None:
    page = Page(report.html(AWKWARD[name], tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(page.data["rows"]) == len(AWKWARD[name].methods)
    assert not re.search(r"\bnan\b", " ".join(page.words), re.IGNORECASE)


def test_marks_differ_without_colour() -> None:
    methods = [dataclasses.replace(example().methods[1], label=str(i), baseline=i % 2 == 1) for i in range(8)]
    symbols = [row["symbol"] for row in Page(report.page(with_methods(*methods))).data["rows"]]
    assert len(set(symbols)) == 8


def test_dense_stands_where_it_is_by_definition() -> None:
    points = Page(report.page(example())).data["rows"][0]["points"]
    assert points["kl"] == [0.0, 0.0, 0.0]
    assert points["agreement"] == [1.0, 1.0, 1.0]


def test_picture_keeps_its_values() -> None:
    picture = Page(report.page(example())).data["selections"][0]
    values = np.frombuffer(base64.b64decode(picture["density"]), "<u2") / 65535
    assert picture["edges"] == [0, 0.25, 0.5, 0.75, 1]
    np.testing.assert_allclose(values.reshape(2, 3, 4), np.linspace(0, 1, 24).reshape(2, 3, 4), atol=1e-4)


def test_large_pictures_are_coarsened_to_keep_the_page_small() -> None:
    layers, heads, bins = 40, 40, 61
    density = np.broadcast_to(np.linspace(0, 1, bins), (layers, heads, bins)).tolist()
    large = dataclasses.replace(example().methods[1], selection=Selection(list(range(layers)), heads, bins, density))
    text = report.page(with_methods(*[large] * 12))
    assert len(text.encode()) < 6e6
    picture = Page(text).data["selections"][0]
    merged, edges = picture["merged"], np.array(picture["edges"]) * bins
    assert merged > 1
    values = np.frombuffer(base64.b64decode(picture["density"]), "<u2").reshape(layers, heads, -1) / 65535
    np.testing.assert_allclose(edges[1:-1] % merged, 0, atol=1e-9)
    np.testing.assert_allclose(np.average(values[0, 0], weights=np.diff(edges)), 0.5, atol=1e-4)
