"""Runs the kernel tests in Triton's interpreter where there is no GPU, in a process of its own.

The interpreter is chosen by an environment variable when Triton is imported, and other tests import Triton (or must
not see the variable).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel tests run on the GPU"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process is the interpreter's already"),
]
KERNELS = Path(__file__).with_name("test_triton_kernels.py")


def test_kernels_in_the_interpreter():
    # One thread: the kernels are small, and idle threads of torch would only spin.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(KERNELS)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


def test_cpu_tensors_without_the_interpreter_are_refused():
    from gossamer.errors import BackendError
    from gossamer.ops import select_topk, use_backend

    with use_backend("triton"), pytest.raises(BackendError, match="TRITON_INTERPRET"):
        select_topk(torch.zeros(1, 1, 4), 2)
