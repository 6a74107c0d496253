"""What the memory of this machine gives: the bound of every operator that streams its input once."""

from __future__ import annotations

import time

import torch

from gossamer.ops import advise_huge_pages
from gossamer.ops._dispatch import native


class ReadBandwidth:
    """A buffer to read from again and again, so that the bandwidth can be sampled between other measurements.

    Parameters
    ----------
    megabytes
        Size of the buffer in MiB; several times the last-level cache. Default 512.
    """

    def __init__(self, megabytes: int = 512) -> None:
        self.buffer = torch.empty(megabytes << 18, dtype=torch.float32)
        advise_huge_pages(self.buffer)
        self.buffer.fill_(1.0)

    @property
    def nbytes(self) -> int:
        """Bytes that one pass reads."""
        return self.buffer.numel() * 4

    def read(self) -> float:
        """Read the buffer once with torch's number of threads; return the bytes per second."""
        module, threads = native(), torch.get_num_threads()
        begin = time.perf_counter()
        if module is None:
            self.buffer.sum()
        else:
            module.read_all(self.buffer.data_ptr(), self.buffer.numel(), threads)
        return self.nbytes / (time.perf_counter() - begin)


def measure_bandwidth(megabytes: int = 512, repeats: int = 9) -> float:
    """Return the read bandwidth of main memory in bytes per second: the best of several passes over a large buffer.

    The buffer lies in huge pages where the system allows and is read by torch's number of threads, with plain loads.
    The best pass is the bound; what the machine does otherwise only takes from it.
    """
    probe = ReadBandwidth(megabytes)
    return max(probe.read() for _ in range(repeats))
