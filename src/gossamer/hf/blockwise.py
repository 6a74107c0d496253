"""Block by block: calibration that needs one block of the model at a time, and sees what pruning the earlier ones did.

    for stage in blocks(model, tokens):
        with stage.watching(lambda matrix, x: gram[matrix.name].add_(x.T @ x)):
            stage.run()
        ...change the block's weights...
        # the next stage's inputs come from the block as it now is

Inputs of block 0 are caught once; memory holds the hidden states of all sequences at one place of the model, never of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from gossamer.errors import CalibrationError, ModelError
from gossamer.hf.matrices import Matrix, matrices

#: Gets (matrix, its inputs ``[tokens, in]`` in the model's dtype).
See = Callable[[Matrix, Tensor], None]


def block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The model's repeated blocks: dotted name and module list.

    Raises:
        ModelError: it has no list of as many blocks as its configuration says.
    """
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise ModelError(f"{type(model).__name__} is not supported: its blocks were not found")


class _Stop(Exception):
    """Raised once the inputs of block 0 are known."""


def _first(out: Any) -> Tensor:
    return cast(Tensor, out[0] if isinstance(out, tuple) else out)


@dataclass(eq=False)
class Stage:
    """One block with its inputs.

    Attributes:
        index, block: which one.
        matrices: its prunable matrices.
        inputs: hidden states ``[1, tokens, hidden]``, one for each sequence.
    """

    index: int
    block: nn.Module
    matrices: list[Matrix]
    inputs: list[Tensor]
    _args: tuple[Any, ...]
    _kwargs: dict[str, Any]

    @torch.no_grad()
    def run(self) -> list[Tensor]:
        """The block's outputs, one for each sequence."""
        return [_first(self.block(x, *self._args, **self._kwargs)) for x in self.inputs]

    @contextmanager
    def watching(self, see: See) -> Iterator[None]:
        """Hand the inputs of the block's matrices out while it runs."""

        def hook(matrix: Matrix, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            see(matrix, args[0].detach().reshape(-1, args[0].shape[-1]))

        handles = [m.module.register_forward_pre_hook(partial(hook, m)) for m in self.matrices]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def blocks(
    model: nn.Module, tokens: Tensor, progress: Callable[[str, int, int], None] = lambda what, done, total: None
) -> Iterator[Stage]:
    """The model's blocks from first to last, each with the inputs that the blocks before it make as they are by then.

    Args:
        tokens: int64 ``[sequences, length]``.

    Raises:
        CalibrationError: `tokens` is of another form, or the model is in training mode.
        ModelError: its blocks were not found.
    """
    if tokens.dim() != 2 or not tokens.numel() or tokens.is_floating_point():
        raise CalibrationError(f"a calibration needs token blocks [blocks, block], got {list(tokens.shape)}")
    if model.training:
        raise CalibrationError("calibrate in eval mode: call model.eval() first")
    prefix, layers = block_list(model)
    everything = matrices(model)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hidden: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        first = args[0] if args else kwargs.pop("hidden_states")
        if module is layers[0]:
            hidden.append(first.detach())
        if len(hidden) == 1:  # how each block is called, which is the same for all sequences
            calls.append((args[1:], kwargs))
        else:
            raise _Stop

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    base: Any = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            for sequence in tokens:
                try:
                    takes_cache = not hasattr(base, "encoder")
                    base(sequence[None].to(device), **({"use_cache": False} if takes_cache else {}))
                except _Stop:
                    pass
    finally:
        for handle in handles:
            handle.remove()
    for index, layer in enumerate(layers):
        progress("block by block", index, len(layers))
        inside = [m for m in everything if m.name.startswith(f"{prefix}.{index}.")]
        stage = Stage(index, layer, inside, hidden, *calls[index])
        yield stage
        hidden = stage.run() if index + 1 < len(layers) else []
