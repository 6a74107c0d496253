"""Calibration files: whole, theirs, and finite, or not loaded at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file

from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError, OutputError


def make(**changes: Any) -> Calibration:
    values: dict[str, Any] = {
        "method": "double-sparsity",
        "fingerprint": "0123456789abcdef",
        "tensors": {
            "qk.0": torch.rand(4, 16),
            "ids": torch.arange(5),
            "half": torch.rand(3).bfloat16(),
            "none": torch.empty(0),
        },
        "facts": {"blocks": 3, "text": "pydoc \n „“ 文", "nested": {"a": [1, 2.5, None, True]}},
    }
    return Calibration(**{**values, **changes})


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_round_trip(tmp_path: Path) -> None:
    ours = make()
    path = ours.save(tmp_path / "new" / "folder" / "c.safetensors")
    again = Calibration.load(str(path))
    assert (again.method, again.fingerprint, again.facts) == (ours.method, ours.fingerprint, ours.facts)
    assert again.tensors.keys() == ours.tensors.keys()
    for name, tensor in ours.tensors.items():
        assert again.tensors[name].dtype is tensor.dtype
        assert torch.equal(again.tensors[name], tensor)
    assert [p.name for p in path.parent.iterdir()] == ["c.safetensors"]


def test_views_and_shared_memory_can_be_saved(tmp_path: Path) -> None:
    base = torch.rand(4, 6)
    ours = make(tensors={"a": base.T, "b": base[:, ::2], "c": base})
    again = Calibration.load(ours.save(tmp_path / "c"))
    assert all(torch.equal(again.tensors[n], t) for n, t in ours.tensors.items())


def test_saving_replaces_whole_files_only(tmp_path: Path) -> None:
    path = make().save(tmp_path / "c.safetensors")
    first = path.read_bytes()

    def torn(tensors: Any, target: Path, metadata: Any) -> None:
        Path(target).write_bytes(b"half of it")
        raise KeyboardInterrupt

    with patch("gossamer.files.save_file", torn), pytest.raises(KeyboardInterrupt):
        make().save(path)
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "c", tmp_path / "folder"):
        with pytest.raises(OutputError, match="cannot write the calibration to") as caught:
            make().save(path)
        one_line(caught)
    if os.geteuid() != 0:
        (tmp_path / "folder").chmod(0o500)
        with pytest.raises(OutputError):
            make().save(tmp_path / "folder" / "c")
    assert list((tmp_path / "folder").iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(value: float, tmp_path: Path) -> None:
    bad = torch.tensor([1.0, value])
    with pytest.raises(CalibrationError, match=r"qk\.0 is not finite") as caught:
        make(tensors={"qk.0": bad})
    one_line(caught)
    header = {"format": 1, "method": "m", "fingerprint": "f", "facts": {}}
    save_file({"qk.0": bad}, tmp_path / "c", {"gossamer": json.dumps(header)})
    with pytest.raises(CalibrationError, match=r"qk\.0 is not finite"):
        Calibration.load(tmp_path / "c")


def test_missing(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(CalibrationError, match="no calibration file at") as caught:
            Calibration.load(path)
        one_line(caught)


def test_truncated_at_any_place(tmp_path: Path) -> None:
    whole = make().save(tmp_path / "c").read_bytes()
    for cut in sorted({0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1}):
        (tmp_path / "t").write_bytes(whole[:cut])
        with pytest.raises(CalibrationError, match="damaged or no calibration") as caught:
            Calibration.load(tmp_path / "t")
        one_line(caught)


def test_corrupted_header(tmp_path: Path) -> None:
    whole = bytearray(make().save(tmp_path / "c").read_bytes())
    for at in (0, 5, 8, 20):
        bad = bytearray(whole)
        bad[at] ^= 0xFF
        (tmp_path / "t").write_bytes(bad)
        with pytest.raises(CalibrationError) as caught:
            Calibration.load(tmp_path / "t")
        one_line(caught)
    (tmp_path / "t").write_bytes(b"PK\x03\x04 something else entirely" * 9)
    with pytest.raises(CalibrationError, match="damaged or no calibration"):
        Calibration.load(tmp_path / "t")


HEADERS: dict[str, dict[str, str] | None] = {
    "plain safetensors": None,
    "another key": {"format": "pt"},
    "no JSON": {"gossamer": "{"},
    "a list": {"gossamer": "[1]"},
    "a text": {"gossamer": '"x"'},
    "a number": {"gossamer": "3"},
    "null": {"gossamer": "null"},
    "facts missing": {"gossamer": '{"format": 1, "method": "m", "fingerprint": "f"}'},
    "method missing": {"gossamer": '{"format": 1, "fingerprint": "f", "facts": {}}'},
}


@pytest.mark.parametrize("kind", HEADERS)
def test_other_headers(kind: str, tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "c", HEADERS[kind])
    with pytest.raises(CalibrationError, match="damaged or no calibration") as caught:
        Calibration.load(tmp_path / "c")
    one_line(caught)


def test_another_format(tmp_path: Path) -> None:
    header = {"format": 2, "method": "m", "fingerprint": "f", "facts": {}}
    save_file({"x": torch.ones(2)}, tmp_path / "c", {"gossamer": json.dumps(header)})
    with pytest.raises(CalibrationError, match="format 2, this version reads 1") as caught:
        Calibration.load(tmp_path / "c")
    one_line(caught)


def test_check() -> None:
    ours = make()
    ours.check("0123456789abcdef")
    with pytest.raises(CalibrationError, match="made for another model") as caught:
        ours.check("ffffffffffffffff")
    text = one_line(caught)
    assert "0123456789abcdef" in text
    assert "ffffffffffffffff" in text


def test_it_is_a_value() -> None:
    with pytest.raises(AttributeError):
        make().method = "other"  # type: ignore[misc]
