"""Two tiers of memory for the cache: all rows in a slow one, the rows of one step in a fast one.

Slow tiers: a memory-mapped file (contexts beyond memory, model on the CPU) and pinned host memory (model on a GPU). A
step gathers its rows into one of two buffers, so that the next layer's rows can arrive while this layer computes.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gossamer.errors import OutputError

Allocator = Callable[[Tensor, int], Tensor]


def file_allocator(folder: str | Path | None) -> Allocator:
    """Storage in an unnamed file of `folder` (None: the system's temporary folder).

    The file has no name once it is mapped: it goes when the storage goes, however the process ends.
    """

    def allocate(like: Tensor, capacity: int) -> Tensor:
        shape = (like.shape[0], like.shape[1], capacity, like.shape[3])
        size = shape[0] * shape[1] * shape[2] * shape[3] * like.element_size()
        try:
            handle, name = tempfile.mkstemp(prefix="gossamer-kv-", dir=folder)
            try:
                os.unlink(name)
                os.ftruncate(handle, max(size, 1))
                mapped = mmap.mmap(handle, max(size, 1))
            finally:
                os.close(handle)
        except OSError as error:
            raise OutputError(f"cannot keep the cache in {folder or tempfile.gettempdir()}: {error.strerror}") from None
        if hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)  # rows are scattered: reading ahead would fetch what nobody asked for
        return torch.frombuffer(mapped, dtype=like.dtype, count=size // like.element_size()).view(shape)

    return allocate


def pinned_allocator(like: Tensor, capacity: int) -> Tensor:
    """Storage in page-locked host memory, which a GPU can copy from while it computes."""
    shape = (like.shape[0], like.shape[1], capacity, like.shape[3])
    return torch.empty(shape, dtype=like.dtype, pin_memory=torch.cuda.is_available())


@dataclass
class Fetched:
    """Rows of one layer's selection in a fast buffer; slot 0 is kept for the current token.

    Attributes:
        key, value: ``[batch, kv_heads, slots, head_dim]`` on the model's device.
        indices: int32 ``[batch, heads, k + 1]`` slots that each query head attends; None when all heads of a group share
            all slots.
        counts: int32 ``[batch, heads]`` (or ``[batch]`` when shared): how many slots count, slot 0 included.
        rows: rows that were read from the slow tier.
    """

    key: Tensor
    value: Tensor
    indices: Tensor | None
    counts: Tensor
    rows: int
    ready: torch.cuda.Event | None = None


class DoubleBuffer:
    """Gathers rows from the slow tier into two alternating buffers, in the background if asked.

    A layer uses the buffer of its parity: while layer ℓ attends to one, layer ℓ + 1's rows fill the other.
    """

    def __init__(self) -> None:
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gossamer-reader")
        self._buffers: dict[tuple[int, str], Tensor] = {}
        self._stream: torch.cuda.Stream | None = None

    def close(self) -> None:
        """Stop the reader."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    def submit(self, work: Callable[[], Fetched]) -> Future[Fetched]:
        """Run `work` on the reader thread (on a stream of its own on a GPU)."""
        if not torch.cuda.is_available() or not torch.cuda.is_initialized():
            return self._reader.submit(torch.no_grad()(work))
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        stream, started = self._stream, torch.cuda.Event()
        started.record()  # the query that selects is computed on the main stream

        def on_stream() -> Fetched:
            with torch.no_grad(), torch.cuda.stream(stream):
                stream.wait_event(started)
                fetched = work()
                fetched.ready = torch.cuda.Event()
                fetched.ready.record(stream)
                return fetched

        return self._reader.submit(on_stream)

    def fetch(
        self, parity: int, key: Tensor, value: Tensor, ids: Tensor, counts: Tensor, device: torch.device
    ) -> Fetched:
        """Gather rows ``ids`` of the slow storage into the buffer of this parity.

        Args:
            key, value: storage ``[batch, kv_heads, capacity, head_dim]``, contiguous.
            ids: int32 ``[batch, heads or kv_heads, k]``; counts: int32 ``[batch, heads or kv_heads]`` of valid ones.
        """
        batch, kv_heads, capacity, _ = key.shape
        ids, slow_counts = ids.to(key.device).long(), counts.to(key.device)
        shared = ids.shape[1] == kv_heads
        if shared:
            table, indices, rows = ids, None, int(slow_counts.sum())
            attend_counts = slow_counts[:, 0] + 1  # the same for all heads of a sequence
        else:
            table, slots, union = _union(ids, slow_counts, kv_heads)
            zero = torch.zeros_like(slots[..., :1])
            indices, rows = torch.cat([zero, slots + 1], dim=2).to(torch.int32), int(union.sum())
            attend_counts = slow_counts + 1
        # Slot 0 waits for the current token; what is gathered there meanwhile is never read.
        table = torch.cat([table.new_zeros(batch, kv_heads, 1), table], dim=2)
        head = torch.arange(batch * kv_heads, device=table.device).view(batch, kv_heads, 1)
        flat = (head * capacity + table).flatten()
        near = [
            self._gather(parity, name, t, flat, table.shape, device) for name, t in (("key", key), ("value", value))
        ]
        return Fetched(
            near[0],
            near[1],
            indices.contiguous().to(device) if indices is not None else None,
            attend_counts.to(device=device, dtype=torch.int32),
            rows,
        )

    def _gather(
        self, parity: int, name: str, slow: Tensor, flat: Tensor, shape: torch.Size, device: torch.device
    ) -> Tensor:
        elements = flat.numel() * slow.shape[3]
        buffer = self._buffer(parity, name, elements, slow, torch.device("cpu"))
        rows = buffer[:elements].view(flat.numel(), slow.shape[3])
        torch.index_select(slow.view(-1, slow.shape[3]), 0, flat, out=rows)
        if device.type != "cpu":
            fast = self._buffer(parity, f"{name} on device", elements, slow, device)[:elements].view_as(rows)
            rows = fast.copy_(rows, non_blocking=True)
        return rows.view(*shape, slow.shape[3])

    def _buffer(self, parity: int, name: str, elements: int, like: Tensor, device: torch.device) -> Tensor:
        held = self._buffers.get((parity, name))
        if held is None or held.numel() < elements or held.dtype != like.dtype:
            pin = device.type == "cpu" and like.is_pinned()
            with torch.inference_mode(False):  # written in and out of inference mode
                held = torch.empty(2 * elements, dtype=like.dtype, device=device, pin_memory=pin)  # room to grow
            self._buffers[parity, name] = held
        return held

    @property
    def nbytes(self) -> int:
        """Bytes of both buffers."""
        return sum(b.numel() * b.element_size() for b in self._buffers.values())


def _union(ids: Tensor, counts: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the selections of each group, so that a row two query heads share is read once.

    Args:
        ids: int64 ``[batch, heads, k]``; counts: ``[batch, heads]`` of valid ones.

    Returns:
        The rows to read ``[batch, kv_heads, n]`` (n: the largest union; shorter ones repeat a row), the place of each
        selected row among them ``[batch, heads, k]``, and the sizes of the unions ``[batch, kv_heads]``.

    >>> _union(torch.tensor([[[1, 3], [3, 7]]]), torch.tensor([[2, 2]]), 1)
    (tensor([[[1, 3, 7]]]), tensor([[[0, 1],
             [1, 2]]]), tensor([[3]]))
    """
    batch, heads, k = ids.shape
    valid = torch.arange(k, device=ids.device) < counts[..., None]
    ids = torch.where(valid, ids, ids[..., :1])  # an unused slot repeats the head's first row
    merged = ids.view(batch, kv_heads, -1)
    ordered, order = merged.sort(dim=2)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    rank = new.cumsum(2) - 1
    sizes = rank[..., -1] + 1
    table = ordered[..., :1].repeat(1, 1, int(sizes.max()))
    table.scatter_(2, rank, ordered)
    slots = torch.empty_like(rank).scatter_(2, order, rank)
    return table, slots.view(batch, heads, k), sizes
