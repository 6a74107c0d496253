"""Released SeerAttention gates: files of that layout, made here, become calibrations that run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gossamer.attention.seer_gate import SeerDecodeGate, SeerGate
from gossamer.attention.seer_import import FILE, export_gates
from gossamer.attention.seerattention import SeerAttention
from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError
from gossamer.models import tiny_model

MODEL = tiny_model("qwen2")  # 3 layers, 4 query heads on 2 KV heads, head_dim 16
BASE = "model.layers.{}.self_attn.attn_gate.{}.weight"


def weights(*shape: int, seed: int = 0) -> Tensor:
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def released(phase: str, double: bool = False) -> dict[str, Tensor]:
    """The state dict of a release for this model, Kmaxminavg."""
    tensors = {}
    for layer in range(3):
        if phase == "prefill":
            tensors[BASE.format(layer, "mask_linear_k")] = weights(2 if double else 4, 48, 16, seed=layer)
            if double:
                tensors[BASE.format(layer, "mask_linear_q")] = weights(4, 16, 16, seed=layer + 9)
        else:
            tensors[BASE.format(layer, "attngate_linear_q")] = weights(2, 2, 16, 16, seed=layer)
            tensors[BASE.format(layer, "attngate_linear_k")] = weights(2, 48, 16, seed=layer + 9)
            tensors[BASE.format(layer, "attngate_qnorm")] = 1 + weights(16, seed=layer)
            tensors[BASE.format(layer, "attngate_knorm")] = 1 + weights(16, seed=layer + 5)
    return tensors


def folder(path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / FILE)
    if config:
        (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("double", [False, True])
def test_prefill_gates_run_with_the_released_weights(tmp_path: Path, double: bool) -> None:
    tensors = released("prefill", double)
    config = {"seerattn_gate_block_size": 8, "seerattn_gate_type": "Qavg_Kmaxminavg", "seerattn_gate_hidden_size": 16}
    path = folder(tmp_path / "gates", {n: t.bfloat16() for n, t in tensors.items()}, **config)
    method = SeerAttention(block_size=8, force_double=double, gate_dim=16)
    for source in (path, path / FILE):
        calibration = method.import_calibration(source, MODEL)
        loaded = Calibration.load(calibration.save(tmp_path / "mine.safetensors"))
        with torch.no_grad(), method.attach(MODEL, loaded) as handle:
            MODEL(torch.arange(1, 60)[None])
            gate: Any = handle.runtime.prefill.gates[1]  # type: ignore[union-attr]
            assert handle.report()["prefill_area"] < 1
        assert isinstance(gate, SeerGate)
        torch.testing.assert_close(gate.wk, tensors[BASE.format(1, "mask_linear_k")].bfloat16().float(), rtol=0, atol=0)
        assert (gate.wq is not None) is double


def test_decode_gates_map_a_group_as_the_release_does(tmp_path: Path) -> None:
    tensors = released("decode")
    method = SeerAttention(block_size=8, phases="decode", tokens=16)
    calibration = method.import_calibration(folder(tmp_path / "gates", tensors, seerattn_gate_type="Kmaxminavg"), MODEL)
    with torch.no_grad(), method.attach(MODEL, calibration) as handle:
        gate: Any = handle.runtime.decode.gates[2]  # type: ignore[union-attr]
        cache = MODEL(torch.arange(1, 60)[None], use_cache=True).past_key_values
        assert bool(MODEL(torch.ones(1, 1, dtype=torch.long), past_key_values=cache).logits.isfinite().all())
    assert isinstance(gate, SeerDecodeGate)
    query = weights(1, 4, 5, 16, seed=3)

    class Still:
        """No rotation."""

        @staticmethod
        def rotated(x: Tensor, layer: int, new: Tensor) -> Tensor:
            return x

    got = gate.query(query, Still(), 2, torch.arange(5))  # type: ignore[arg-type]
    grouped = query.transpose(1, 2).view(1, 5, 2, 2, 16)  # as the release sees it: [batch, tokens, KV head, group, D]
    joint = torch.einsum("bskgi,kgio->bsko", grouped, tensors[BASE.format(2, "attngate_linear_q")])
    norm = joint * torch.rsqrt(joint.pow(2).mean(-1, keepdim=True) + 1e-6) * tensors[BASE.format(2, "attngate_qnorm")]
    torch.testing.assert_close(got.transpose(1, 2), norm)


def test_both_kinds_in_one_file_and_back(tmp_path: Path) -> None:
    tensors = {**released("prefill"), **released("decode")}
    method = SeerAttention(block_size=8, phases="both")
    calibration = method.import_calibration(folder(tmp_path / "gates", tensors), MODEL)
    back = export_gates(calibration, 2)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[n], t) for n, t in tensors.items())


def test_files_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    good, decode = released("prefill"), released("decode")
    method = SeerAttention(block_size=8)
    one = BASE.format(1, "mask_linear_k")
    refused: list[tuple[SeerAttention, dict[str, Tensor], dict[str, Any], str]] = [
        (method, {n: t for n, t in good.items() if n != one}, {}, r"prefill\.1\.wk"),
        (method, {**good, one: weights(4, 16, 16)}, {}, r"prefill\.1\.wk"),
        (method, {**good, one: torch.full((4, 48, 16), float("nan"))}, {}, "not finite"),
        (method, {**good, BASE.format(7, "mask_linear_k"): weights(4, 48, 16)}, {}, "no gate of this model"),
        (method, {**good, "lm_head.weight": weights(3)}, {}, "no gate of this model"),
        (method, {**good, BASE.format(0, "mask_linear_q"): weights(4, 16, 16)}, {}, "force_double"),
        (method, decode, {}, "no prefill gates: set phases=decode"),
        (SeerAttention(block_size=8, phases="both"), good, {}, "no decode gates: set phases=prefill"),
        (method, good, {"seerattn_gate_block_size": 64}, "block_size=64"),
        (method, good, {"seerattn_gate_type": "Qavg_Kmaxmin"}, "gate=Qavg_Kmaxmin"),
        (SeerAttention(block_size=8, gate_dim=16), good, {"seerattn_gate_hidden_size": 128}, "gate_dim=128"),
    ]
    for i, (made, tensors, config, message) in enumerate(refused):
        path = folder(tmp_path / str(i), tensors, **config)
        with pytest.raises(CalibrationError, match=message) as caught:
            made.import_calibration(path, MODEL)
        assert "\n" not in str(caught.value)
    for name, content, message in (
        ("attn_gate_weights.pth", b"", "is a pickle"),
        ("gates.safetensors", b"nothing", "cannot read the gates"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CalibrationError, match=message):
            method.import_calibration(tmp_path / name, MODEL)
    with pytest.raises(CalibrationError, match="cannot read the gates"):
        method.import_calibration(tmp_path / "missing", MODEL)
    path = folder(tmp_path / "bad", good)
    for content in ("{", "[]"):
        (path / "config.json").write_text(content)
        with pytest.raises(CalibrationError, match=r"config\.json"):
            method.import_calibration(path, MODEL)


def test_the_command_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gossamer import cli

    class Loaded:
        name, model = "tiny", MODEL

    monkeypatch.setattr(cli, "load_model", lambda *a: Loaded)
    source, path = folder(tmp_path / "gates", released("prefill")), tmp_path / "mine.safetensors"
    command = ["calibrate", "seerattention", "tiny", "--import", str(source), "-o", str(path), "--set", "block_size=8"]
    monkeypatch.setattr("sys.argv", ["gossamer", *command])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    assert "wrote" in capsys.readouterr().out
    assert Calibration.load(path).facts["block_size"] == 8
