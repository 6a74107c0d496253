"""Memory advice for large CPU tensors."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

from torch import Tensor

_HUGE = 2 << 20
_MADV_HUGEPAGE = 14


@cache
def _madvise() -> Any:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def advise_huge_pages(tensor: Tensor) -> bool:
    """Ask the kernel for 2 MiB pages under a CPU tensor; call it before the memory is first written.

    Gathering scattered rows from a cache of 4 KiB pages misses the TLB at nearly every row; with huge pages the same
    gather runs about twice as fast. Only whole 2 MiB pages inside the tensor are advised, so a small tensor is left
    alone. Nothing is copied.

    Returns
    -------
    True if the advice was given; False elsewhere than Linux CPU memory, for tensors without a whole huge page, or if
    the kernel refuses.
    """
    if tensor.device.type != "cpu" or (madvise := _madvise()) is None:
        return False
    storage = tensor.untyped_storage()
    begin = -(-storage.data_ptr() // _HUGE) * _HUGE
    end = (storage.data_ptr() + storage.nbytes()) // _HUGE * _HUGE
    return end > begin and madvise(begin, end - begin, _MADV_HUGEPAGE) == 0
