"""A product that follows its input: only what changed since the last call is multiplied, and added to the running output.

y += (q · (c' − c)) W,  then c ← c'

where the input x = q · c is quantised to integer codes c in steps of q. W is stored input-major, so that each changed input
reads one contiguous row and an unchanged one reads nothing. Codes are whole numbers: what did not change is exactly zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.errors import InputError
from gossamer.ops import _checks
from gossamer.ops._dispatch import DTYPE_CODES, native, resolve, triton_call
from gossamer.ops.memory import advise_huge_pages

_OP = "delta_linear"
MAX_ROWS = 8
"""Rows, or streams, that the kernels take at once."""


def input_major(weight: Tensor) -> Tensor:
    """Return a weight [N, K] of ``torch.nn.Linear`` as a contiguous [K, N], in huge pages where it lies on the CPU.

    It is a copy, also of a weight that lies so already. Make it once; the operators never copy it.

    >>> input_major(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    tensor([[1., 4.],
            [2., 5.],
            [3., 6.]])
    """
    if weight.dim() != 2:
        raise InputError(f"input_major: want a weight [N,K], got {list(weight.shape)}")
    turned = torch.empty(weight.shape[::-1], dtype=weight.dtype, device=weight.device)
    advise_huge_pages(turned)
    return turned.copy_(weight.detach().T)


def delta_linear(output: Tensor, codes: Tensor, previous: Tensor, weight: Tensor, step: Tensor) -> Tensor:
    """Add the change of the input, times the weight, to ``output``; ``previous`` becomes ``codes``. Both in place.

    The first call starts from ``previous`` = 0 and ``output`` = the bias. Streams in a batch share the reading: a row of the
    weight is read once if any of them changed there. The order of the sums does not depend on the number of threads.

    Parameters
    ----------
    output
        float32 [M, N], 1 to 8 rows, inner stride 1.
    codes
        int32 or int16 [M, K]: the new codes.
    previous
        [M, K], dtype of ``codes``, inner stride 1: those of the last call.
    weight
        [K, N], input-major (see :func:`input_major`), inner stride 1. float32 or bfloat16 run on the native kernel, other
        floats on the reference. Never copied.
    step
        float32: what a code of 1 stands for, one value, or [K], one for each input.

    Returns
    -------
    int32 [M]: how many inputs of each row changed. Each costs N multiplications.

    Raises
    ------
    InputError
        Shapes, dtypes, strides or devices that do not fit, or more than 8 rows.

    >>> output, previous = torch.zeros(1, 2), torch.zeros(1, 3, dtype=torch.int32)
    >>> weight, codes = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 1.0]]), torch.tensor([[4, 0, 2]], dtype=torch.int32)
    >>> delta_linear(output, codes, previous, weight, torch.tensor(0.5))
    tensor([2], dtype=torch.int32)
    >>> output
    tensor([[5., 1.]])
    >>> delta_linear(output, codes, previous, weight, torch.tensor(0.5))
    tensor([0], dtype=torch.int32)
    """
    shape = codes.shape
    if codes.dim() != 2 or weight.dim() != 2 or shape[1] != weight.shape[0]:
        raise InputError(f"{_OP}: want codes [M,K] and weight [K,N], got {list(shape)}, {list(weight.shape)}")
    if not 1 <= shape[0] <= MAX_ROWS:
        raise InputError(f"{_OP}: takes 1 to {MAX_ROWS} rows, got {shape[0]}")
    if output.shape != (shape[0], weight.shape[1]):
        raise InputError(f"{_OP}: output must have shape {[shape[0], weight.shape[1]]}, got {list(output.shape)}")
    if previous.shape != shape:
        raise InputError(f"{_OP}: previous must have shape {list(shape)}, got {list(previous.shape)}")
    if codes.dtype not in (torch.int32, torch.int16) or previous.dtype is not codes.dtype:
        raise InputError(
            f"{_OP}: codes and previous must both be int32 or int16, got {codes.dtype} and {previous.dtype}"
        )
    if output.dtype is not torch.float32 or step.dtype is not torch.float32:
        raise InputError(f"{_OP}: output and step must be float32, got {output.dtype} and {step.dtype}")
    if not weight.dtype.is_floating_point:
        raise InputError(f"{_OP}: takes a weight of floats, got {weight.dtype}")
    if step.numel() != 1 and step.shape != (shape[1],):
        raise InputError(f"{_OP}: step must be one value or have shape {[shape[1]]}, got {list(step.shape)}")
    for name, other in (("output", output), ("codes", codes), ("previous", previous), ("step", step)):
        if other.device != weight.device:
            raise InputError(f"{_OP}: {name} is on {other.device}, weight on {weight.device}")
    for name, other in (("output", output), ("previous", previous), ("weight", weight)):
        if other.stride(1) != 1 and other.shape[1] > 1:
            raise InputError(f"{_OP}: {name} needs inner stride 1, got strides {list(other.stride())}")
    run = torch.ops.gossamer.delta_linear if torch.compiler.is_compiling() else _run
    changed: Tensor = run(output, codes, previous, weight, step)
    return changed


def _reference(output: Tensor, codes: Tensor, previous: Tensor, weight: Tensor, step: Tensor) -> Tensor:
    delta = codes.long() - previous.long()
    changed = delta != 0
    rows = changed.any(0).nonzero().flatten()
    factors = (delta.float() * step)[:, rows]
    output.add_(factors @ weight[rows].float())
    previous.copy_(codes)
    return changed.sum(1, dtype=torch.int32)


def _run(output: Tensor, codes: Tensor, previous: Tensor, weight: Tensor, step: Tensor) -> Tensor:
    backend = resolve(_OP, _OP, weight, output, step)
    if backend == "triton":
        found: Tensor = triton_call(_OP, _OP)(output, codes, previous, weight, step)
        return found
    if backend != "native":
        return _reference(output, codes, previous, weight, step)
    codes, step = _checks.row_major(codes), step.contiguous()
    changed = torch.empty(codes.shape[0], dtype=torch.int32)
    native().delta_linear(
        tuple(x.data_ptr() for x in (codes, previous, weight, step, output, changed)),
        (codes.stride(0), previous.stride(0), weight.stride(0), output.stride(0)),
        (*codes.shape, weight.shape[1]),
        codes.element_size(),
        step.numel() > 1,
        DTYPE_CODES[weight.dtype],
        torch.get_num_threads(),
    )
    return changed


_custom = torch.library.custom_op("gossamer::delta_linear", _run, mutates_args=("output", "previous"))


@_custom.register_fake
def _fake(output: Tensor, codes: Tensor, previous: Tensor, weight: Tensor, step: Tensor) -> Tensor:
    return codes.new_empty(codes.shape[0], dtype=torch.int32)
