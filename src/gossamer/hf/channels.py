"""Linear layers that compute only chosen input channels, and the count of what was computed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from gossamer.errors import ModelError
from gossamer.hf.mlp_views import by_input
from gossamer.hf.policy import TEACHER_FORCED
from gossamer.ops import advise_huge_pages, channel_sparse_linear, runs_natively
from gossamer.ops.channel_sparse_linear import run_native
from gossamer.ops.linear import MAX_ROWS
from gossamer.patterns import NeuronRule

Mode = Literal["auto", "mask", "gather"]


class Meter:
    """Counts what one layer kept, of tokens that were decoded and of tokens of prompts.

    Counts from kernels on the CPU are added in Python; those of masks and of other devices stay where they are until asked.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        # [prompt, decode] x [rows, kept over rows, calls, kept by any row over calls]
        self._known = [[0] * 4, [0] * 4]
        self._device = torch.zeros(2, 4, dtype=torch.int64, device=device)
        self._scratch: dict[int, Tensor] = {}
        #: Gets every mask that is counted, bool ``[tokens, size]``; masks are made for blocks of more than eight rows.
        self.watch: Callable[[Tensor], None] | None = None

    @property
    def totals(self) -> list[list[int]]:
        """``[prompt, decode] x [rows, kept over rows, calls, kept by any row over calls]``."""
        there = self._device.tolist()
        return [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(self._known, there, strict=True)]

    def scratch(self, rows: int) -> Tensor:
        """The int64 ``[rows + 1]`` that a kernel writes its counts to."""
        if rows not in self._scratch:
            self._scratch[rows] = torch.zeros(rows + 1, dtype=torch.int64, device=self._device.device)
        return self._scratch[rows]

    def count(self, decoding: bool, counts: Tensor) -> None:
        """Add a call's counts: kept for each row, then kept for any."""
        if counts.is_cpu:
            *each, union = counts.tolist()
            row = self._known[decoding]
            row[0] += len(each)
            row[1] += sum(each)
            row[2] += 1
            row[3] += union
        else:
            self._device[int(decoding)] += torch.stack(
                [counts.new_tensor(len(counts) - 1), counts[:-1].sum(), counts.new_tensor(1), counts[-1]]
            )

    def count_mask(self, decoding: bool, kept: Tensor) -> None:
        """Add a call's mask ``[..., size]``. A block that stands for decode steps counts as so many calls."""
        flat = kept.detach().reshape(-1, self.size)
        if self.watch is not None:
            self.watch(flat)
        single = TEACHER_FORCED.get()
        row = self._known[decoding]
        row[0] += len(flat)
        row[2] += len(flat) if single else 1
        total = flat.sum()
        self._device[int(decoding), 1] += total
        self._device[int(decoding), 3] += total if single else flat.any(0).sum()

    def share(self, decode: bool) -> float | None:
        """Kept neurons of all, over tokens; None where none passed."""
        rows, kept = self.totals[decode][:2]
        return kept / (rows * self.size) if rows else None

    def read_share(self) -> float:
        """Neurons that a decode step reads (kept by any of its rows) of all; 1 before the first."""
        calls, kept = self.totals[1][2:]
        return kept / (calls * self.size) if calls else 1.0


class ChannelForward:
    """Stands in for the `forward` of one `nn.Linear` or `Conv1D`: only the inputs that a rule keeps count.

    At most eight rows run on `ops.channel_sparse_linear`, which reads only the weights of kept inputs; more are masked.
    """

    def __init__(
        self, module: nn.Module, decide: Callable[[Tensor], NeuronRule | None], meter: Meter, mode: Mode
    ) -> None:
        self.module, self.decide, self.meter, self.mode = module, decide, meter, mode
        self.checked: NeuronRule | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """As the layer's own forward, of the kept inputs."""
        rule, module = self.decide(x), cast(Any, self.module)
        if rule is None:
            return cast(Tensor, type(module).forward(module, x))
        if rule is not self.checked:
            rule.check(self.meter.size, x.device)
            self.checked = rule
        decoding = is_decoding(x)
        flat = x.reshape(-1, x.shape[-1])
        weight = by_input(module) if self.mode != "mask" and gathers(flat, module.weight) else None
        sparse = weight if weight is not None and weight.stride(-1) == 1 else None
        if sparse is not None and rule.threshold is not None:
            counts = self.meter.scratch(len(flat))
            out = _multiply(flat, sparse, rule.threshold, module.bias, counts)
            self.meter.count(decoding, counts)
            return out.view(*x.shape[:-1], -1)
        kept = rule.mask(x)
        self.meter.count_mask(decoding, kept)
        x = torch.where(kept, x, 0)
        if sparse is not None:  # the kernel skips exact zeros
            return channel_sparse_linear(x.view_as(flat), sparse, None, module.bias).view(*x.shape[:-1], -1)
        return cast(Tensor, type(module).forward(module, x))


def _multiply(x: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    """`channel_sparse_linear` for a rule that was checked; its checks would cost a decode step more than the scan does."""
    plain = x.is_cpu and weight.dtype is x.dtype and x.is_contiguous() and x.shape[1] == len(weight)
    if plain and not torch.compiler.is_compiling():
        bias = None if bias is None else bias.contiguous()
        if bias is None or bias.dtype is x.dtype:
            return run_native(x, weight, threshold, bias, None, counts)
    return channel_sparse_linear(x, weight, threshold, bias, counts=counts)


def gathers(x: Tensor, weight: Tensor) -> bool:
    """Whether a kernel that skips weights serves these rows: few, and without gradients."""
    if len(x) > MAX_ROWS or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return False
    return x.is_cuda or runs_natively(x)


def is_decoding(x: Tensor) -> bool:
    """Whether ``[batch, tokens, channels]`` (or rows ``[n, channels]``) are decode steps rather than a prompt."""
    tokens = x.shape[-2] if x.dim() > 2 else (1 if len(x) <= MAX_ROWS else len(x))
    return tokens == 1 or TEACHER_FORCED.get()


def lay_by_input(matrix: nn.Module) -> Callable[[], None]:
    """Store a matrix so that the weights of one input lie together, its values and shape unchanged; returns the undoing."""
    weight = cast(nn.Parameter, matrix.weight)
    if by_input(matrix).stride(-1) == 1 or weight.ndim != 2:
        return lambda: None
    weight.data = _laid_anew(weight.data.t()).t()

    def undo() -> None:
        weight.data = _laid_anew(weight.data)

    return undo


def _laid_anew(matrix: Tensor) -> Tensor:
    """A contiguous copy on huge pages, where the system has them: rows of it are read here and there."""
    copy = torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device)
    advise_huge_pages(copy)
    return copy.copy_(matrix)


class ChannelRuntime:
    """Linear layers under rules for their inputs until `detach`, which leaves every bit as it was.

    Args:
        chosen: (`nn.Linear` or `Conv1D`, rule for its input) pairs.
        mode: as in `MLPRuntime`.
        prompt: whether the rules also hold while a prompt is read.

    Raises:
        ModelError: a layer is already under a rule.
    """

    def __init__(
        self, chosen: Sequence[tuple[nn.Module, NeuronRule]], mode: Mode = "auto", prompt: bool = True
    ) -> None:
        self.chosen = list(chosen)
        self.meters = [Meter(by_input(m).shape[0], by_input(m).device) for m, _ in chosen]
        self._undo: list[Callable[[], None]] = []
        if any("forward" in module.__dict__ for module, _ in chosen):
            raise ModelError("these linear layers are already under a rule: detach it first")
        for (module, rule), meter in zip(chosen, self.meters, strict=True):
            if mode != "mask":
                self._undo.append(lay_by_input(module))

            def decide(x: Tensor, rule: NeuronRule = rule) -> NeuronRule | None:
                return rule if prompt or is_decoding(x) else None

            cast(Any, module).forward = ChannelForward(module, decide, meter, mode)
            self._undo.append(functools.partial(module.__dict__.pop, "forward", None))

    def detach(self) -> None:
        """Take the rules off; safe to call twice."""
        while self._undo:
            self._undo.pop()()

    def report(self) -> dict[str, Any]:
        """Share of the inputs kept, and bytes of these weights that a decode step reads."""
        shares = [m.share(True) if m.share(True) is not None else m.share(False) for m in self.meters]
        known = [share for share in shares if share is not None]
        sizes = [by_input(m).numel() * by_input(m).element_size() for m, _ in self.chosen]
        return {
            "channels_kept": sum(known) / len(known) if known else 1.0,
            "channels_kept_by_layer": shares,
            "channel_bytes_read": round(sum(z * m.read_share() for z, m in zip(sizes, self.meters, strict=True))),
            "channel_bytes_dense": sum(sizes),
        }
