"""The report in a real browser: plots drawn, no script error, nothing asked of the network."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from gossamer.measure import report
from gossamer.measure.results import Comparison, Cost, Estimate, MethodResult, Quality, Selection, Spread

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium found: apt-get install chromium"),
]


def method(slug: str, kl: float | None, ms: float, read: float, picture: bool = True) -> MethodResult:
    density = np.random.default_rng(0).random((4, 3, 16)).tolist()
    return MethodResult(
        slug,
        f"{slug} <b>&amp; 100%{{x}}</b>",
        quality=Quality(
            kl=None if kl is None else Estimate(kl, kl / 10, 32), tasks={"passkey": Estimate(0.9, 0.05, 32)}
        ),
        cost=Cost(
            token_ms=Spread(ms, 0.98 * ms, 1.02 * ms, 9),
            attention_ms=Spread(ms / 3, 0.3 * ms, 0.4 * ms, 9),
            overhead_ms=0.4,
            kv_bytes_held=2**26,
            kv_bytes_read=read,
            dense_bytes_read=2.0**26,
            weight_bytes_read=10**8,
        ),
        selection=Selection([0, 1, 2, 7], 3, 16, density) if picture else None,
    )


def comparison(*methods: MethodResult) -> Comparison:
    return Comparison(
        "smollm2", 4096, 64, 0, "float32", 2, "1/16", {"cpu": "x"}, {}, "2026-11-24", 20.0, list(methods), "dense"
    )  # fmt: skip


CASES = {
    "usual": comparison(
        method("dense", None, 30, 2**26, False), method("a", 0.02, 20, 2**22), method("b", 0.3, 25, 2**23)
    ),
    "one row": comparison(method("a", 0.02, 20, 2**22)),
    "twelve rows": comparison(*(method(f"m{i}", 0.01 * 1.2**i, 20 + i, 2**20 * (i + 3)) for i in range(12))),
    "exact": comparison(method("a", 0.0, 20, 2**22), method("b", 0.0, 21, 2**22)),
    "gaps": comparison(
        MethodResult("a", "A"), MethodResult("b", "B", error="failed"), method("c", math.nan, 20, 0, False)
    ),
    "empty": comparison(),
}  # fmt: skip


def dom(path: Path, profile: Path) -> tuple[str, str]:
    """The page after its scripts ran, and what the browser said about it."""
    assert BROWSER is not None
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
        "--virtual-time-budget=6000", "--window-size=1240,2000", f"--user-data-dir={profile}", "--dump-dom",
    ]  # fmt: skip
    found = subprocess.run([BROWSER, *flags, path.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout, found.stderr


def element(text: str, identity: str) -> str:
    """What stands between this element's tag and the next heading or section end."""
    found = re.search(rf'id="{identity}".*?(?=<h2|<h3|</section>)', text, re.DOTALL)
    assert found, identity
    return found[0]


@pytest.mark.parametrize("name", CASES)
def test_page_in_a_browser(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    text, said = dom(report.html(case, tmp_path / "report.html"), tmp_path / "profile")
    text = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert re.search(r'<p id="trouble" role="alert" hidden(="")?></p>', text)
    assert not re.findall(r".*(?:CONSOLE.*(?:Error|Refused|Uncaught)|net::ERR).*", said)
    plotted = any(m.quality and m.quality.kl and m.cost for m in case.methods)
    timed = any(m.cost for m in case.methods)
    pictured = sum(m.selection is not None for m in case.methods)
    assert ("main-svg" in element(text, "pareto")) == plotted
    assert ("main-svg" in element(text, "steps")) == timed
    assert element(text, "thumbnails").count("<figure") == pictured
    assert ("main-svg" in element(text, "heads")) == bool(pictured)
    assert ("has both a quality and a cost" in element(text, "pareto")) != plotted
    assert ("was timed" in element(text, "steps")) != timed
    assert ('id="no-pictures" class="empty" hidden' in text) == bool(pictured)
    assert "NaN" not in text
    for m in case.methods:
        if m.quality and m.quality.kl and not math.isnan(m.quality.kl.mean):
            assert m.slug in element(text, "pareto")


def test_marks_and_names_are_in_the_plot(tmp_path: Path) -> None:
    text, _ = dom(report.html(CASES["twelve rows"], tmp_path / "report.html"), tmp_path / "profile")
    plot = element(text, "pareto")
    assert len(re.findall(r'<path class="point"', plot)) == 12
    assert len(re.findall(r'class="annotation"', plot)) == 13  # and "better"
    assert "<b>&amp;amp; 100%{x}</b>" not in plot  # a name is text, never markup
