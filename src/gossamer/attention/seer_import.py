"""Released SeerAttention gates as a calibration: their tensors' names and shapes, and the settings that go with them.

A release is a folder with the gates of all layers and a ``config.json``:

    model.layers.{i}.self_attn.attn_gate.mask_linear_q.weight      prefill   [H, D·|Pq|, Dg]     (absent in the shortcut)
    model.layers.{i}.self_attn.attn_gate.mask_linear_k.weight                [Hkv or H, D·|Pk|, Dg]
    model.layers.{i}.self_attn.attn_gate.attngate_linear_q.weight  decode    [Hkv, G, D, Dg]
    model.layers.{i}.self_attn.attn_gate.attngate_linear_k.weight            [Hkv, D·|Pk|, Dg]
    model.layers.{i}.self_attn.attn_gate.attngate_{qnorm,knorm}.weight       [Dg]

The decode gates that can be read are those of the published kind (queries of a group mapped together, with norms). Released
files are PyTorch pickles, which this library does not open: convert one first, with
``save_file(torch.load("attn_gate_weights.pth", weights_only=True), "attn_gate_weights.safetensors")``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gossamer.attention.seer_gate import load_gate
from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError
from gossamer.hf import model_shape
from gossamer.models import fingerprint

if TYPE_CHECKING:
    from gossamer.attention.seerattention import SeerAttention

FILE = "attn_gate_weights.safetensors"
_NAME = re.compile(r"(?:model\.)?layers\.(\d+)\.self_attn\.attn_gate\.(\w+)\.weight")
#: Released name → phase and ours.
_PARTS = {
    "mask_linear_q": ("prefill", "wq"),
    "mask_linear_k": ("prefill", "wk"),
    "attngate_linear_q": ("decode", "wq"),
    "attngate_linear_k": ("decode", "wk"),
    "attngate_qnorm": ("decode", "nq"),
    "attngate_knorm": ("decode", "nk"),
}


def import_gates(method: SeerAttention, path: str | Path, model: nn.Module) -> Calibration:
    """Read released gates from a safetensors file, or from the folder that holds it.

    Where a ``config.json`` lies beside it, the method's block size, poolings and width must be those named there.

    Raises:
        CalibrationError: unreadable or a pickle, of other names, for other settings, or not of this model's shape.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if file.suffix in (".pth", ".pt", ".bin"):
        raise CalibrationError(
            f"{file} is a pickle, which is not opened: save what torch.load(…, weights_only=True) gives as {FILE}"
        )
    try:
        given = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"cannot read the gates {file}: {error}") from None
    _check_config(method, file.with_name("config.json"))
    shape, tensors = model_shape(model), {}
    for name, tensor in given.items():
        match = _NAME.fullmatch(name)
        part = _PARTS.get(match[2]) if match else None
        if match is None or part is None or int(match[1]) >= shape.layers:
            raise CalibrationError(f"{file}: {name!r} is no gate of this model")
        joint = part == ("decode", "wq") and tensor.ndim == 4
        tensors[f"{part[0]}.{match[1]}.{part[1]}"] = (tensor.flatten(1, 2) if joint else tensor).float().contiguous()
    phases = [phase for phase in ("prefill", "decode") if any(name.startswith(f"{phase}.") for name in tensors)]
    wanted = [phase for phase in ("prefill", "decode") if method.phases in (phase, "both")]
    missing = [phase for phase in wanted if phase not in phases]
    if missing:
        raise CalibrationError(f"{file} has no {missing[0]} gates: set phases={phases[0] if phases else 'prefill'}")
    for phase in phases:
        fresh: Any = method.prefill_gate if phase == "prefill" else method.decode_gate
        names = {name for name, _ in fresh(shape).named_parameters()}
        for layer in range(shape.layers):
            load_gate(fresh(shape), tensors, f"{phase}.{layer}")  # of the shapes that these settings have
            more = {n.rpartition(".")[2] for n in tensors if n.startswith(f"{phase}.{layer}.")} - names
            if more:
                raise CalibrationError(f"{file} maps the pooled queries too ({more.pop()}): set force_double=true")
    facts = {**method.model_dump(include={"block_size", "gate", "gate_dim"}), "imported": file.name}
    return Calibration(method.slug, fingerprint(model), tensors, facts)


def export_gates(calibration: Calibration, heads_of_group: int) -> dict[str, Tensor]:
    """The tensors of a calibration by their released names; `heads_of_group`: query heads of a KV head.

    >>> import torch
    >>> made = Calibration("seerattention", "", {"decode.3.wq": torch.zeros(2, 3 * 8, 8)})
    >>> [(name, list(x.shape)) for name, x in export_gates(made, 3).items()]
    [('model.layers.3.self_attn.attn_gate.attngate_linear_q.weight', [2, 3, 8, 8])]
    """
    named = {ours: released for released, ours in _PARTS.items()}
    result = {}
    for name, tensor in calibration.tensors.items():
        phase, layer, part = name.split(".")
        grouped = tensor.unflatten(1, (heads_of_group, -1)) if (phase, part) == ("decode", "wq") else tensor
        result[f"model.layers.{layer}.self_attn.attn_gate.{named[phase, part]}.weight"] = grouped.contiguous()
    return result


def _check_config(method: SeerAttention, path: Path) -> None:
    if not path.is_file():
        return
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CalibrationError(f"cannot read {path}: {error}") from None
    kind = config.get("seerattn_gate_type") if isinstance(config, dict) else None
    if not isinstance(config, dict):
        raise CalibrationError(f"{path} is no model configuration")
    pools = method.gate if kind is None or str(kind).startswith("Q") else method.gate[method.gate.index("K") :]
    for released, name, ours in (
        ("seerattn_gate_block_size", "block_size", method.block_size),
        ("seerattn_gate_type", "gate", pools),
        ("seerattn_gate_hidden_size", "gate_dim", method.gate_dim),
    ):
        theirs = config.get(released)
        if theirs is not None and ours is not None and theirs != ours:
            raise CalibrationError(f"these gates were trained with {name}={theirs}: set that")
