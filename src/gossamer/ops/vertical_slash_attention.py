"""Causal attention of a prompt over chosen columns and diagonals of the attention matrix (MInference, arXiv 2407.02490).

A *vertical* is a key that every query reads, a *slash* a distance i − j at which every query reads. What is computed is a
superset of that, made of pieces that vector units like, as in the paper's kernel. For each block of B queries
[m, m + B), with e = m + B:

    each slash δ < e is the square of B keys that ends at max(e − δ, B), wherever on the grid that is;
    a square that ends at most B keys behind the one before continues it: B more keys, which may reach up to B − 1
    further than needed; verticals outside all squares are single columns.

Squares of a row block are disjoint and ascend; their number is at most that of the slashes, and of the row blocks. The
published kernel stops at the last slash and applies no causal test to columns, which holds only while the smallest slashes
are always chosen; here the columns behind the last square are kept, and all is causal by token, for any lists. Where
slash 0 is chosen the two agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from gossamer.errors import InputError
from gossamer.ops import _checks
from gossamer.ops._dispatch import DTYPE_CODES, native, resolve, triton_call
from gossamer.ops._masked import causal, masked_attention

_OP = "vertical_slash_attention"
_GPU = "prefill_attention"
_INDEX = "vertical_slash_index"
_STATUS = {
    1: "starts must lie in 0 .. number of rows",
    2: "verticals must ascend and slashes descend, both within 0 .. length - 1",
}


@dataclass(frozen=True)
class VerticalSlashIndex:
    """What the blocks of queries read: squares of ``block_size`` keys, and single columns.

    Attributes
    ----------
    length, block_size
        Tokens, and queries of a block; there are ``nb = ceil(length / block_size)`` blocks.
    ranges, range_counts
        int32 [B, H, nb, R] and [B, H, nb]: first keys of the squares, ascending. Squares may reach beyond the last token.
    columns, column_counts
        int32 [B, H, nb, C] and [B, H, nb]: keys outside the squares, ascending.
        Slots beyond the counts are 0.
    """

    length: int
    block_size: int
    ranges: Tensor
    range_counts: Tensor
    columns: Tensor
    column_counts: Tensor

    def area(self) -> Tensor:
        """Query–key pairs in the pieces, masked ones included: the work of the kernel, int64 [B, H]."""
        size = self.block_size
        pairs: Tensor = (size * self.range_counts.long() + self.column_counts.long()).sum(-1) * size
        return pairs

    def pairs(self) -> Tensor:
        """Query–key pairs that take part in a softmax, int64 [B, H]: the true entries of :meth:`to_mask`."""
        begin = (torch.arange(self.ranges.shape[2], device=self.ranges.device) * self.block_size)[:, None]
        end = (begin + self.block_size).clamp_max(self.length)

        def below(first: Tensor) -> Tensor:  # pairs with j ≤ i of the row block and the keys from `first` on
            def triangle(x: Tensor) -> Tensor:
                x = x.clamp_min(0)
                return x * (x + 1) // 2

            return triangle(end - first) - triangle(begin - first)

        ranges, columns = self.ranges.long(), self.columns.long()
        of_ranges = below(ranges) - below(ranges + self.block_size)
        of_columns = below(columns) - below(columns + 1)
        ranged = _used(ranges, self.range_counts)
        columned = _used(columns, self.column_counts)
        total: Tensor = (of_ranges * ranged).sum((2, 3)) + (of_columns * columned).sum((2, 3))
        return total

    def density(self) -> float:
        """Share of the causal area that is computed, over all heads."""
        causal_area = self.length * (self.length + 1) // 2 * self.ranges.shape[0] * self.ranges.shape[1]
        return int(self.pairs().sum()) / max(1, causal_area)

    def to_mask(self) -> Tensor:
        """Bool [B, H, length, length], true where a query reads a key: for tests and pictures, not for long prompts."""
        return self._mask(slice(0, self.length)) & causal(
            slice(0, self.length), self.length, self.length, self.ranges.device
        )

    def _mask(self, rows: slice) -> Tensor:
        """The mask of queries ``rows`` without causality."""
        batch, heads = self.ranges.shape[:2]
        blocks = slice(rows.start // self.block_size, -(-rows.stop // self.block_size))
        ranges, columns = self.ranges[:, :, blocks].long(), self.columns[:, :, blocks].long()
        reach = self.length + self.block_size  # squares may pass the end, and unused slots go to the last place
        cover = torch.zeros(*ranges.shape[:3], reach + 1, dtype=torch.bool, device=ranges.device)
        keys = ranges[..., None] + torch.arange(self.block_size, device=ranges.device)
        used = _used(ranges, self.range_counts[:, :, blocks])
        cover.scatter_(3, keys.masked_fill(~used[..., None], reach).clamp_max(reach).flatten(3), True)
        used = _used(columns, self.column_counts[:, :, blocks])
        cover.scatter_(3, columns.masked_fill(~used, reach), True)
        row = torch.arange(rows.start, rows.stop, device=ranges.device) // self.block_size - blocks.start
        return cover[:, :, row, : self.length].view(batch, heads, -1, self.length)


def _used(ids: Tensor, counts: Tensor) -> Tensor:
    return torch.arange(ids.shape[-1], device=ids.device) < counts[..., None]


@overload
def vertical_slash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    verticals: Tensor,
    slashes: Tensor,
    *,
    block_size: int = 64,
    starts: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def vertical_slash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    verticals: Tensor,
    slashes: Tensor,
    *,
    block_size: int = 64,
    starts: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def vertical_slash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    verticals: Tensor,
    slashes: Tensor,
    *,
    block_size: int = 64,
    starts: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend every query to columns and diagonals, in the pieces that the module's docstring describes; causal by token.

    Parameters
    ----------
    query
        [B, H, S, d], float32, bfloat16 or float16: a whole prompt.
    key, value
        [B, Hkv, S, d], dtype of ``query``; H is a multiple of Hkv. Only the inner stride must be 1.
    verticals
        int32 [B, H, kv]: keys that every query reads, ascending.
    slashes
        int32 [B, H, ks]: distances i − j at which every query reads, descending. In both lists an id that stands there
        again changes nothing, so a shorter list is filled up by repeating its last entry.
    block_size
        Queries of a row block, and keys of a square.
    starts, scale, return_lse
        As in :func:`~gossamer.ops.block_sparse_attention`.

    Returns
    -------
    [B, H, S, d] in the dtype of ``query``. A query that sees nothing gives zeros and log-sum-exp ``-inf``.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit, a block size below 1, ids out of range or in the wrong order.

    Examples
    --------
    >>> x = torch.ones(1, 1, 128, 16)
    >>> verticals, slashes = torch.tensor([[[0, 3]]]), torch.tensor([[[1, 0]]])
    >>> out, lse = vertical_slash_attention(x, x, x, verticals, slashes, block_size=32, return_lse=True)
    >>> lse[0, 0, -1].sub(4).exp().round().int().item()  # slash 1: keys 95 … 126, then 32 more; and two columns
    35
    """
    _checks.prefill(_OP, query, key, value)
    batch, heads, new, dim = query.shape
    if new != key.shape[2]:
        raise InputError(f"{_OP}: takes a whole prompt, got {new} queries and {key.shape[2]} rows")
    verticals, slashes = _check_lists(_OP, verticals, slashes, block_size, (batch, heads), query)
    starts = _checks.int32(_OP, "starts", starts, (batch,), query)
    scale = 1.0 / math.sqrt(dim) if scale is None else float(scale)
    run = torch.ops.gossamer.vertical_slash_attention if torch.compiler.is_compiling() else _run
    out, lse = run(query, key, value, verticals, slashes, block_size, starts, scale, return_lse)
    return (out, lse) if return_lse else out


def vertical_slash_index(verticals: Tensor, slashes: Tensor, length: int, block_size: int = 64) -> VerticalSlashIndex:
    """Return the pieces that :func:`vertical_slash_attention` computes for a prompt of ``length`` tokens.

    ``verticals`` int32 [B, H, kv] ascending, ``slashes`` int32 [B, H, ks] descending. The attention does not need this: it
    finds the pieces of a row block, in kv + ks steps, when it comes to it.

    Raises
    ------
    InputError
        As :func:`vertical_slash_attention`.

    >>> index = vertical_slash_index(torch.tensor([[[2, 90]]]), torch.tensor([[[70, 0]]]), length=128, block_size=32)
    >>> index.ranges[0, 0, 3].tolist(), index.columns[0, 0, 3].tolist()
    ([26, 96], [2, 90])
    """
    if length < 1:
        raise InputError(f"{_INDEX}: length must be 1 or more, got {length}")
    verticals, slashes = _check_lists(_INDEX, verticals, slashes, block_size, tuple(verticals.shape[:2]), verticals)
    run = torch.ops.gossamer.vertical_slash_index if torch.compiler.is_compiling() else _run_index
    return VerticalSlashIndex(length, block_size, *run(verticals, slashes, length, block_size))


def _check_lists(
    op: str, verticals: Tensor, slashes: Tensor, block_size: int, lines: tuple[int, ...], like: Tensor
) -> tuple[Tensor, Tensor]:
    if block_size < 1:
        raise InputError(f"{op}: block_size must be 1 or more, got {block_size}")
    checked = []
    for name, ids in (("verticals", verticals), ("slashes", slashes)):
        if ids.dim() != 3:
            raise InputError(f"{op}: {name} must be [B, H, k], got {list(ids.shape)}")
        checked.append(_checks.int32(op, name, ids, (*lines, ids.shape[2]), like))
    assert checked[0] is not None and checked[1] is not None
    return checked[0], checked[1]


def _index_reference(
    verticals: Tensor, slashes: Tensor, length: int, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    steps = ((verticals, verticals.diff(dim=-1)), (slashes, -slashes.diff(dim=-1)))
    if any(bool(((x < 0) | (x >= length)).any()) or bool((step < 0).any()) for x, step in steps):
        raise InputError(f"{_INDEX}: {_STATUS[2]}")
    device, blocks = verticals.device, -(-length // size)
    lines = (*verticals.shape[:2], blocks)
    last = (torch.arange(blocks, device=device) + 1) * size  # e of each row block
    # Slot `width` takes what is not used; squares that are not there lie behind everything.
    width, far = min(slashes.shape[2], blocks), 2 * length + 2 * size
    ranges = torch.full((*lines, width + 1), far, device=device)
    count = torch.zeros(lines, dtype=torch.int64, device=device)
    end = torch.full(lines, -far, device=device)  # of the square before: none yet
    for distance in slashes.long().unbind(-1):
        distance = distance[..., None]
        stop = (last - distance).clamp_min(size)
        apart = (distance < last) & (stop > end + size)
        joined = (distance < last) & ~apart & (stop > end)
        begin = torch.where(apart, stop - size, end)
        new = apart | joined
        ranges.scatter_(3, count.masked_fill(~new, width)[..., None], begin.masked_fill(~new, far)[..., None])
        count += new
        end = torch.where(new, begin + size, end)
    ranges[..., width] = far
    column = verticals.long()[:, :, None].expand(*lines, -1).contiguous()
    at = torch.searchsorted(ranges, column, right=True) - 1  # the square before or around each column
    around = (at >= 0) & (column < ranges.gather(3, at.clamp_min(0)) + size)
    keep = ~around & (column < last[:, None])
    keep[..., 1:] &= column[..., 1:] != column[..., :-1]
    slots = column.shape[3]
    place = (keep.cumsum(-1) - 1).masked_fill(~keep, slots)
    columns = torch.zeros(*lines, slots + 1, dtype=torch.int64, device=device).scatter_(3, place, column)
    ranges = ranges[..., :width].masked_fill(~_used(ranges[..., :width], count), 0)
    return ranges.int(), count.int(), columns[..., :slots].int(), keep.sum(-1, dtype=torch.int32)


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    verticals: Tensor,
    slashes: Tensor,
    block_size: int,
    starts: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    length = key.shape[2]
    if starts is not None and bool(((starts < 0) | (starts > length)).any()):
        raise InputError(f"{_OP}: {_STATUS[1]}")
    index = VerticalSlashIndex(length, block_size, *_index_reference(verticals, slashes, length, block_size))
    return masked_attention(query, key, value, index._mask, starts, scale, step=block_size)


def _run_native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    verticals: Tensor,
    slashes: Tensor,
    block_size: int,
    starts: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    batch, heads, new, dim = query.shape
    query, key, value = map(_checks.row_major, (query, key, value))
    out = query.new_empty((batch, heads, new, dim))
    lse = query.new_empty((batch, heads, new) if return_lse else (0,), dtype=torch.float32)
    status = native().vertical_slash_attention(
        (*map(_checks.pointer, (query, key, value, out, lse, starts)),),
        (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3]),
        (batch, heads, key.shape[1], new, new, dim, block_size),
        (verticals.data_ptr(), verticals.shape[2], slashes.data_ptr(), slashes.shape[2]),
        scale,
        DTYPE_CODES[query.dtype],
        torch.get_num_threads(),
    )
    if status:
        raise InputError(f"{_OP}: {_STATUS[status]}")
    return out, lse


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    verticals: Tensor,
    slashes: Tensor,
    block_size: int,
    starts: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    backend = resolve(_OP, _GPU, query, key, value)
    if backend == "native":
        return _run_native(query, key, value, verticals, slashes, block_size, starts, scale, return_lse)
    call = triton_call(_OP, _GPU) if backend == "triton" else _reference
    out, lse = call(query, key, value, verticals, slashes, block_size, starts, scale)
    return out, lse.float() if return_lse else query.new_empty((0,), dtype=torch.float32)


def _run_index(
    verticals: Tensor, slashes: Tensor, length: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kind = resolve(_INDEX, _GPU, verticals.new_empty(0, dtype=torch.float32))  # it looks at a float dtype
    if kind == "triton":
        return triton_call(_INDEX, _GPU)(verticals, slashes, length, block_size)  # type: ignore[no-any-return]
    if kind == "reference":
        return _index_reference(verticals, slashes, length, block_size)
    lines, width = (*verticals.shape[:2], -(-length // block_size)), verticals.shape[2]
    ranges = torch.empty((*lines, min(slashes.shape[2], lines[2])), dtype=torch.int32)
    columns = torch.empty((*lines, width), dtype=torch.int32)
    range_counts, column_counts = (torch.empty(lines, dtype=torch.int32) for _ in range(2))
    status = native().vertical_slash_index(
        (verticals.data_ptr(), width, slashes.data_ptr(), slashes.shape[2]),
        (lines[0], lines[1], length, block_size, ranges.shape[3]),
        (ranges.data_ptr(), range_counts.data_ptr(), columns.data_ptr(), column_counts.data_ptr()),
        torch.get_num_threads(),
    )
    if status:
        raise InputError(f"{_INDEX}: {_STATUS[status]}")
    return ranges, range_counts, columns, column_counts


_custom = torch.library.custom_op("gossamer::vertical_slash_attention", _run, mutates_args=())
_custom_index = torch.library.custom_op("gossamer::vertical_slash_index", _run_index, mutates_args=())


@_custom.register_fake
def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    verticals: Tensor,
    slashes: Tensor,
    block_size: int,
    starts: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    lse_shape = query.shape[:3] if return_lse else (0,)
    return query.new_empty(query.shape), query.new_empty(lse_shape, dtype=torch.float32)


@_custom_index.register_fake
def _fake_index(
    verticals: Tensor, slashes: Tensor, length: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    blocks = -(-length // block_size)
    lines = (*verticals.shape[:2], blocks)
    width = min(slashes.shape[2], blocks)
    return (
        slashes.new_empty(*lines, width),
        slashes.new_empty(lines),
        verticals.new_empty(*lines, verticals.shape[2]),
        verticals.new_empty(lines),
    )
