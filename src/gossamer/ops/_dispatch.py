"""Which implementation of an operator runs: the PyTorch reference, the native CPU kernels, or Triton.

`auto` takes the native kernels for CPU tensors and Triton for CUDA tensors, and falls back to the reference, saying so
once, where either is missing. ``GOSSAMER_BACKEND=reference|native|triton`` or :func:`use_backend` forces one; a forced
backend that is absent, or that does not take the tensors it is given, is a :class:`~gossamer.errors.BackendError`,
never a silent fallback.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gossamer.errors import BackendError

Backend = Literal["reference", "native", "triton"]
BACKENDS: tuple[str, ...] = ("reference", "native", "triton")
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
"""The dtypes that native kernels take, with the code by which they are told."""
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_log = logging.getLogger("gossamer")
# os.environ.get encodes and decodes at every call, a microsecond that a decode step pays for each layer. CPython keeps
# the raw table in _data; elsewhere the public mapping serves.
_environ: Any = getattr(os.environ, "_data", os.environ)
_VARIABLE: Any = os.environ.encodekey("GOSSAMER_BACKEND") if _environ is not os.environ else "GOSSAMER_BACKEND"
_override: str | None = None


@cache
def native() -> Any:
    """Return the native extension, or None where it was not built. Torch's OpenMP runtime is made global first.

    Two OpenMP runtimes in one process keep two thread pools that fight for the cores. Wheels carry their own libgomp,
    some under the plain soname (then the loader shares it by itself), some under a mangled one; loading torch's copy
    with RTLD_GLOBAL makes the extension's symbols resolve to it in both cases.
    """
    if sys.platform == "linux":
        root = Path(torch.__file__).parent
        for folder in (root / "lib", root.parent / "torch.libs"):
            for library in sorted(folder.glob("libgomp*.so*")):
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    try:
        module = importlib.import_module("gossamer._native")
    except ImportError as error:
        _log.debug("no native kernels: %s", error)
        return None
    return module if hasattr(module, "Prepared") else None


@cache
def triton_op(module: str) -> Any:
    """Return ``gossamer.gpu.<module>``, or None where Triton cannot be imported."""
    try:
        return importlib.import_module(f"gossamer.gpu.{module}")
    except ImportError as error:
        _log.debug("no Triton kernels: %s", error)
        return None


@cache
def _say_once(message: str) -> None:
    _log.warning(message)


@contextmanager
def use_backend(name: Backend | None) -> Iterator[None]:
    """Force every operator inside the block onto one backend (``None``: back to auto). Process-wide, meant for tests
    and benchmarks.

    Raises
    ------
    BackendError
        If the name is unknown or the backend is absent.
    """
    global _override
    if name is not None:
        _check_present(name)
    previous, _override = _override, name or "auto"
    try:
        yield
    finally:
        _override = previous


def available_backends() -> tuple[str, ...]:
    """Return the names of the backends that this installation can run."""
    return tuple(name for name in BACKENDS if _present(name))


def _present(name: str) -> bool:
    if name == "native":
        return native() is not None
    return name == "reference" or triton_op("decode_attention") is not None


def _check_present(name: str) -> None:
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; GOSSAMER_BACKEND takes reference, native or triton")
    if not _present(name):
        how = "reinstall with a C++20 compiler" if name == "native" else "pip install 'gossamer-sparse[triton]'"
        raise BackendError(f"backend {name!r} was asked for but is not installed here ({how})")


def resolve(op: str, module: str, tensor: Tensor, *others: Tensor | None) -> Backend:
    """Choose the backend for one call of ``op`` (found in ``gossamer.gpu.<module>``) from its first tensor.

    ``others`` are further tensors that may require gradients: kernels have no backward, so a call that needs one takes
    the reference.
    """
    forced = _override or (os.environ["GOSSAMER_BACKEND"] if _VARIABLE in _environ else None)
    if forced and forced != "auto":
        return _forced(forced, op, module, tensor)
    if torch.is_grad_enabled():
        for x in (tensor, *others):
            if x is not None and x.requires_grad:
                return "reference"
    kind = tensor.device.type
    if kind == "cpu":
        if tensor.dtype in DTYPE_CODES and native() is not None:
            return "native"
        why = f"no native {tensor.dtype} kernel" if native() is not None else "the native kernels were not built"
        _say_once(f"{op}: {why}; using the PyTorch reference")
    elif kind == "cuda":
        if getattr(triton_op(module), op, None) is not None and tensor.dtype in TRITON_DTYPES:
            return "triton"
        _say_once(f"{op}: no Triton kernel for {tensor.dtype} here; using the PyTorch reference")
    return "reference"


def runs_natively(*tensors: Tensor) -> bool:
    """Whether an operator given these tensors would run on the native kernels."""
    forced = _override or (os.environ["GOSSAMER_BACKEND"] if _VARIABLE in _environ else None)
    if forced not in (None, "auto", "native") or native() is None:
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    return all(x.is_cpu and x.dtype in DTYPE_CODES for x in tensors)


def is_forced() -> bool:
    """Whether the user chose a backend, so that shortcuts past :func:`resolve` are closed."""
    return (_override or "auto") != "auto" or _VARIABLE in _environ


def _forced(name: str, op: str, module: str, tensor: Tensor) -> Backend:
    _check_present(name)
    if name == "native":
        if tensor.device.type != "cpu":
            raise BackendError(f"native {op} runs on CPU tensors, got {tensor.device}")
        if tensor.dtype not in DTYPE_CODES:
            raise BackendError(f"native {op} takes float32 and bfloat16, got {tensor.dtype}")
        return "native"
    if name == "triton":
        if getattr(triton_op(module), op, None) is None:
            raise BackendError(f"there is no Triton kernel for {op}")
        if tensor.dtype not in TRITON_DTYPES:
            raise BackendError(f"triton {op} takes float32, bfloat16 and float16, got {tensor.dtype}")
        if tensor.device.type == "cpu" and not importlib.import_module("gossamer.gpu").INTERPRETED:
            raise BackendError(
                f"triton {op} runs on CUDA tensors; on CPU tensors only in Triton's interpreter "
                "(set TRITON_INTERPRET=1)"
            )
        return "triton"
    return "reference"


def triton_call(op: str, module: str) -> Callable[..., Any]:
    """Return the Triton implementation of ``op``."""
    return getattr(triton_op(module), op)  # type: ignore[no-any-return]


def set_isa(name: str | None = None) -> str:
    """Force the instruction set of the native kernels and return it: ``baseline``, ``avx2``, ``avx512``, None for the best.

    The environment variable ``GOSSAMER_ISA`` does the same from import on.

    Raises
    ------
    BackendError
        If the kernels are not built or this machine lacks the instruction set.
    """
    module = native()
    if module is None:
        raise BackendError("the native kernels were not built; reinstall with a C++20 compiler")
    if name is not None and name not in module.available_isas():
        raise BackendError(
            f"instruction set {name!r} is not one of {', '.join(module.available_isas())} on this machine"
        )
    return str(module.set_isa(name or module.available_isas()[-1]))


def available_isas() -> tuple[str, ...]:
    """Return the instruction sets that this machine can run, slowest first; empty without native kernels."""
    module = native()
    return () if module is None else tuple(module.available_isas())
