"""The command: what it prints, its exit codes, and that every error is one line."""

import json
import subprocess
import sys

import pytest

from gossamer import cli


def run(capsys, *args) -> tuple[int, str, str]:
    """Run the command in this process: exit code, standard output, standard error."""
    argv = sys.argv
    sys.argv = ["gossamer", *map(str, args)]
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = argv
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_list_json_has_the_catalogue_and_the_baselines(capsys):
    code, out, _ = run(capsys, "list", "--format", "json")
    rows = json.loads(out)
    assert code == 0
    assert sum(not r["baseline"] for r in rows) == 65
    assert {r["slug"] for r in rows if r["baseline"]} >= {"dense", "quest", "streaming-llm"}
    assert all(set(r) == {"slug", "name", "family", "slot", "status", "baseline"} for r in rows)
    assert next(r for r in rows if r["slug"] == "double-sparsity")["status"] == "available"
    assert next(r for r in rows if r["slug"] == "slicegpt")["status"] in ("available", "planned")


def test_list_by_family_and_in_markdown(capsys):
    code, out, _ = run(capsys, "list", "--family", "retrieval", "-f", "markdown")
    assert code == 0
    assert out.splitlines()[0].startswith("| slug |")
    assert len(out.strip().splitlines()) >= 3


def test_show_has_settings_and_claims(capsys):
    code, out, _ = run(capsys, "show", "double-sparsity", "--format", "json")
    facts = json.loads(out)
    assert code == 0
    assert {"tokens", "label_bits"} <= {s["name"] for s in facts["settings"]}
    assert facts["claims"]
    code, out, _ = run(capsys, "show", "slicegpt")
    assert code == 0
    assert "SliceGPT" in out
    assert run(capsys, "show", "quest", "-f", "markdown")[0] == 0


def test_scoreboard_json(capsys, tmp_path):
    (tmp_path / "double-sparsity.json").write_text(
        json.dumps({"verdict": "reproduced", "claim": "c", "measured": "m", "threshold": "t"})
    )
    (tmp_path / "quest.json").write_text("{broken")
    code, out, _ = run(capsys, "scoreboard", "--results", tmp_path, "--format", "json")
    rows = {r["slug"]: r for r in json.loads(out)}
    assert code == 0
    assert len(rows) == 65
    assert rows["double-sparsity"]["verdict"] == "reproduced"
    assert rows["titok"]["verdict"] == "-"
    assert all(set(r) == {"slug", "status", "verdict", "claim", "measured", "threshold"} for r in rows.values())


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("show", "doubel-sparsity"), "did you mean double-sparsity"),
        (("list", "--family", "atention"), "did you mean attention"),
        (("compare", "smollm2", "--methods", "qest"), "did you mean quest"),
        (("compare", "smollm2", "--methods", "titok"), "not available yet"),
        (("compare", "smollm2", "--budget", "2.0"), "above 0 and at most 1"),
        (("compare", "smollm2", "--budget", "a/b"), "a count like 256 or a fraction"),
        (("compare", "/nowhere/at/all"), "/nowhere/at/all"),
        (("compare", "smollm2", "--html", "/nowhere/at/all/r.html"), "cannot write"),
        (("generate", "smollm2", "  "), "prompt is empty"),
        (("generate", "smollm2", "x", "--recipe", "/nowhere.yaml"), "cannot read the recipe"),
        (("calibrate", "quest", "smollm2"), "needs no calibration"),
        (("calibrate", "double-sparsity", "smollm2", "--set", "tokens"), "name=value"),
        (("calibrate", "double-sparsity", "smollm2", "--set", "label_bits=99"), "label_bits"),
        (("reproduce", "titok"), "no reproduction yet"),
        (("reproduce", "nonsense-slug"), "no system is called"),
        (("bench", "no_such_operator"), "no_such_operator"),
        (("bench", "decode_attention", "--contexts", "many"), "--contexts"),
    ],
)
def test_errors_are_one_line_and_exit_1(capsys, args, says, monkeypatch):
    if any("/nowhere/at/all/" in a for a in args):
        monkeypatch.setattr("pathlib.Path.mkdir", _refuse)
    code, out, err = run(capsys, *args)
    assert code == 1
    assert says in err
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in err + out


def _refuse(*args, **kwargs):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("args", [("reproduce",), ("compare", "smollm2", "--context", "1"), ("no-such-command",)])
def test_usage_errors_exit_2(capsys, args):
    assert run(capsys, *args)[0] == 2


def test_debug_shows_the_trace(capsys):
    code, _, err = run(capsys, "--debug", "show", "nonsense")
    assert code == 1
    assert "Traceback" in err


def test_help_needs_no_torch():
    """`gossamer --help` must not wait for heavy imports."""
    script = (
        "import sys\nfrom gossamer import cli\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_command_has_help(capsys):
    for command in ("list", "show", "compare", "calibrate", "generate", "bench", "reproduce", "scoreboard"):
        code, out, _ = run(capsys, command, "--help")
        assert code == 0
        assert "Usage" in out
