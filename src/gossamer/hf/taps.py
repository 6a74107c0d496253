"""Watching what a dense model computes inside its MLPs and attention projections, block by block, for calibrations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.errors import CalibrationError, ModelError
from gossamer.hf.mlp_views import MLPView, mlp_views
from gossamer.hf.views import attention_views

Tap = Literal["mlp.input", "mlp.gate", "mlp.up", "mlp.product", "mlp.output", "attention.input", "attention.output"]
Watch = Callable[[int, Tensor], None]


def attention_projections(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(query projection, output projection) of every attention block.

    Raises:
        ModelError: the family fuses query, key and value in one matrix.
    """
    pairs = []
    for view in attention_views(model):
        names = [name for name in ("o_proj", "out_proj", "dense") if hasattr(view.module, name)]
        if not hasattr(view.module, "q_proj") or not names:
            raise ModelError(f"{type(view.module).__name__} has no separate query and output projections")
        pairs.append((view.module.get_submodule("q_proj"), view.module.get_submodule(names[0])))
    return pairs


def watch(
    model: nn.Module,
    tokens: Tensor,
    taps: Mapping[Tap, Watch],
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> None:
    """Run the model densely over token blocks and hand out what passes.

    Args:
        tokens: int64 ``[blocks, block]``; one block is run at a time.
        taps: for each place the function that gets (layer, values ``[tokens, size]``, in the model's dtype):
            `mlp.gate` activated gates, `mlp.up`, `mlp.product` of the two, `mlp.input` and `mlp.output` of the MLP,
            `attention.input` of the query projection, `attention.output` the input of the output projection. In a plain MLP
            gate and product are the activated up.

    Raises:
        CalibrationError: `tokens` is of another form or empty, or the model is in training mode.
    """
    if tokens.dim() != 2 or not tokens.numel() or tokens.is_floating_point():
        raise CalibrationError(f"a calibration needs token blocks [blocks, block], got {list(tokens.shape)}")
    if model.training:
        raise CalibrationError("calibrate in eval mode: call model.eval() first")
    handles: list[Any] = []
    try:
        if any(tap.startswith("mlp.") for tap in taps):
            for view in mlp_views(model):
                target = view.owner if view.gated else view.down
                if view.gated:
                    handles.append(view.owner.register_forward_pre_hook(partial(_gated, view, taps)))
                else:
                    handles.append(target.register_forward_pre_hook(partial(_plain, view, taps)))
                if "mlp.output" in taps:
                    handles.append(target.register_forward_hook(partial(_output, view.index, taps["mlp.output"])))
                if "mlp.input" in taps and not view.gated:
                    handles.append(view.up.register_forward_pre_hook(partial(_input, view.index, taps["mlp.input"])))
        if "attention.input" in taps or "attention.output" in taps:
            for layer, (query, output) in enumerate(attention_projections(model)):
                if "attention.input" in taps:
                    handles.append(query.register_forward_pre_hook(partial(_input, layer, taps["attention.input"])))
                if "attention.output" in taps:
                    handles.append(output.register_forward_pre_hook(partial(_input, layer, taps["attention.output"])))
        base: Any = getattr(model, "base_model", model)
        device = next(model.parameters()).device
        with torch.no_grad():
            for index, block in enumerate(tokens):
                progress("calibrating", index, len(tokens))
                if getattr(base.config, "is_encoder_decoder", False):
                    base(input_ids=block[None].to(device), decoder_input_ids=block[None].to(device))
                else:
                    base(block[None].to(device))
    finally:
        for handle in handles:
            handle.remove()


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _gated(view: MLPView, taps: Mapping[Tap, Watch], module: nn.Module, args: tuple[Tensor, ...]) -> None:
    x = _flat(args[0])
    if "mlp.input" in taps:
        taps["mlp.input"](view.index, x)
    if {"mlp.gate", "mlp.up", "mlp.product"} & set(taps):
        gate, up = view.gate_and_up(x)
        gate = view.activation(gate)
        assert up is not None
        if "mlp.gate" in taps:
            taps["mlp.gate"](view.index, gate)
        if "mlp.up" in taps:
            taps["mlp.up"](view.index, up)
        if "mlp.product" in taps:
            taps["mlp.product"](view.index, gate * up)


def _plain(view: MLPView, taps: Mapping[Tap, Watch], module: nn.Module, args: tuple[Tensor, ...]) -> None:
    if "mlp.gate" in taps:
        taps["mlp.gate"](view.index, _flat(args[0]))
    if "mlp.product" in taps:
        taps["mlp.product"](view.index, _flat(args[0]))


def _input(layer: int, function: Watch, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    function(layer, _flat(args[0]))


def _output(layer: int, function: Watch, module: nn.Module, args: Any, output: Tensor) -> None:
    function(layer, _flat(output))
