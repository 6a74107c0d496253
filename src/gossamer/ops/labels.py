"""The label cache: a few channels of every key, kept small and contiguous, and approximate scores from it.

Layout. Labels lie in tiles of 16 tokens, so that one vector instruction works on one channel of 16 tokens:

- float labels (9 to 16 bits): ``codes[b, h, tile, channel, token]``, float32, bfloat16 or float16;
- packed labels (1 to 8 bits): ``codes[b, h, tile, word, token, byte]``, uint8. A word is 4 bytes a token; with c-bit
  containers (c = 1, 2, 4 or 8, the smallest that holds ``bits``) byte j of word i holds at bits ``n*c`` the code of
  channel ``i*(32//c) + 4*n + j``. Shift and mask thus give four neighbouring channels of 16 tokens as bytes, what the
  dot-product instructions take. Channels from r up to the end of the last word have code 0.

``step`` and ``zero`` [B, Hlab, tiles, 16] undo the quantisation: value = code * step + zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gossamer.errors import InputError
from gossamer.ops import _checks
from gossamer.ops._dispatch import DTYPE_CODES, native, resolve, triton_call

TILE = 16
MAX_PACKED_CHANNELS = 512
"""Up to here 8-bit codes times 7-bit queries sum exactly in the float32 of the reference."""

Reduce = Literal["none", "max", "sum"]
REDUCE_CODES: dict[str, int] = {"none": 0, "max": 1, "sum": 2}


def container_bits(bits: int) -> int:
    """Return the bits that a code of ``bits`` bits takes up: 1, 2, 4 or 8; 0 for more than 8, which stay floats."""
    return 0 if bits > 8 else 1 << (bits - 1).bit_length()


@dataclass
class LabelCache:
    """Labels of all cached tokens: codes and, for packed labels, the affine map of each token.

    The layout is described at the head of the module.
    Use :meth:`allocate`; fill with :func:`append_labels`; read with :func:`label_scores`.
    """

    codes: Tensor
    """[B, Hlab, tiles, r, 16] floats or [B, Hlab, tiles, words, 16, 4] uint8."""
    step: Tensor | None
    """float32 [B, Hlab, tiles, 16]; None for float labels."""
    zero: Tensor | None
    """float32 [B, Hlab, tiles, 16]; None for float labels."""
    bits: int
    """Label bits, 1 to 16; 16 is unquantised."""
    r: int
    """Channels kept per token."""

    @staticmethod
    def allocate(
        batch: int,
        heads: int,
        capacity: int,
        r: int,
        bits: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> LabelCache:
        """Return an empty cache for ``capacity`` tokens (rounded up to whole tiles); its contents are uninitialised.

        ``heads`` is Hlab: the KV heads, or the query heads for labels per query head. ``dtype`` (float32, bfloat16,
        float16) is the container of float labels; packed labels ignore it.

        Raises
        ------
        InputError
            bits outside 1 .. 16, r < 1 (or > 512 for packed labels), a dtype that is not a float.
        """
        if not 1 <= bits <= 16:
            raise InputError(f"LabelCache: bits must lie in 1 .. 16, got {bits}")
        if r < 1 or (bits <= 8 and r > MAX_PACKED_CHANNELS):
            raise InputError(f"LabelCache: r must lie in 1 .. {MAX_PACKED_CHANNELS}, got {r}")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise InputError(f"LabelCache: dtype must be float32, bfloat16 or float16, got {dtype}")
        tiles = -(-capacity // TILE)
        size = container_bits(bits)
        if not size:
            return LabelCache(
                torch.empty(batch, heads, tiles, r, TILE, dtype=dtype, device=device), None, None, bits, r
            )
        words = -(-r * size // 32)
        codes = torch.empty(batch, heads, tiles, words, TILE, 4, dtype=torch.uint8, device=device)
        step, zero = (torch.empty(batch, heads, tiles, TILE, device=device) for _ in range(2))
        return LabelCache(codes, step, zero, bits, r)

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.codes.shape[2] * TILE

    @property
    def heads(self) -> int:
        """Hlab, the number of label heads."""
        return self.codes.shape[1]

    def grow(self, capacity: int) -> LabelCache:
        """Return a cache of at least ``capacity`` tokens with the same contents (a copy; itself if it is large
        enough)."""
        if capacity <= self.capacity:
            return self
        dtype = self.codes.dtype if self.codes.is_floating_point() else torch.float32
        batch, heads, tiles = self.codes.shape[:3]
        grown = LabelCache.allocate(batch, heads, capacity, self.r, self.bits, dtype, self.codes.device)
        grown.codes[:, :, :tiles] = self.codes
        if self.step is not None and self.zero is not None and grown.step is not None and grown.zero is not None:
            grown.step[:, :, :tiles] = self.step
            grown.zero[:, :, :tiles] = self.zero
        return grown

    def nbytes(self, tokens: int) -> int:
        """Bytes that scoring ``tokens`` tokens of all sequences and heads reads (whole tiles, scales included)."""
        tiles = -(-tokens // TILE)
        parts = (p for p in (self.codes, self.step, self.zero) if p is not None)
        return sum(tiles * p.shape[0] * p.shape[1] * p.shape[3:].numel() * p.element_size() for p in parts)

    def dequantize(self, start: int, stop: int) -> Tensor:
        """Return the label values float32 [B, Hlab, stop - start, r] of tokens start .. stop - 1."""
        values = _unpack(self, start, stop)
        if self.step is None or self.zero is None:
            return values
        step, zero = (x.flatten(2)[:, :, start:stop, None] for x in (self.step, self.zero))
        return values * step + zero


def append_labels(labels: LabelCache, key: Tensor, channels: Tensor, start: int) -> None:
    """Write the labels of tokens start .. start + T - 1 into the cache, in place.

    Parameters
    ----------
    labels
        The cache; it must have room for ``start + T`` tokens (:meth:`LabelCache.grow`).
    key
        [B, Hkv, T, d], the new keys after RoPE, any strides with inner stride 1.
    channels
        int32 [Hlab, r], the channels each label head keeps; Hlab is Hkv or a multiple of it (labels per query head),
        label head h then reads KV head ``h // (Hlab // Hkv)``.
    start
        Token id of the first new key.

    Quantised per token and head over its r values x: ``code = round((x - min) * (2**bits - 1) / (max - min))``, a
    constant row exactly.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit, tokens beyond the capacity, channel ids outside the head.
    """
    op = "append_labels"
    batch, label_heads = labels.codes.shape[:2]
    if key.dim() != 4 or key.shape[0] != batch or not key.shape[1] or label_heads % key.shape[1]:
        raise InputError(f"{op}: key {list(key.shape)} does not fit labels of {batch} sequences x {label_heads} heads")
    if not key.dtype.is_floating_point or key.device != labels.codes.device:
        raise InputError(f"{op}: key must be a float tensor on {labels.codes.device}, got {key.dtype} on {key.device}")
    if labels.codes.is_floating_point() and labels.bits == 16 and key.dtype is not labels.codes.dtype:
        raise InputError(f"{op}: 16-bit labels keep keys as they are: cache is {labels.codes.dtype}, key {key.dtype}")
    if not 0 <= start <= start + key.shape[2] <= labels.capacity:
        raise InputError(f"{op}: tokens {start} .. {start + key.shape[2]} do not fit a capacity of {labels.capacity}")
    ids = _channels(op, labels, channels)
    run = torch.ops.gossamer.append_labels if torch.compiler.is_compiling() else _append
    run(labels.codes, labels.step, labels.zero, labels.bits, labels.r, key, ids, start)


def label_scores(
    query: Tensor,
    channels: Tensor,
    labels: LabelCache,
    length: int,
    *,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    reduce: Reduce = "none",
    kv_heads: int | None = None,
) -> Tensor:
    """Approximate attention scores (unscaled query-key products over the label channels) of the first ``length``
    tokens.

    Parameters
    ----------
    query
        [B, H, d] after RoPE.
    channels
        int32 [Hlab, r], as given to :func:`append_labels`.
    labels
        The label cache, Hlab label heads; H is a multiple of Hlab.
    length
        Tokens to score, at most the capacity.
    starts, lengths
        int32 [B]: tokens outside [start, length) score ``-inf``. Default 0 and ``length``.
    reduce
        ``"none"``: a score per query head. ``"max"``, ``"sum"``: one per KV head, over the query heads that share it.
        With labels per KV head the sum is the score of the summed query, which costs a single pass.
    kv_heads
        KV heads to reduce to. Default Hlab; needed only for labels per query head.

    Returns
    -------
    float32 [B, Hsel, length], Hsel = H for ``"none"``, else KV heads.

    For packed labels the query is quantised too, symmetrically to int8 per head (``s = max|q| / 127``), so that the
    products are exact integers: ``score = s * step * (q_int . code) + zero * sum(q)``. This is the definition, not an
    approximation of a kernel.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit, ranges beyond ``length``.
    """
    op = "label_scores"
    kv_heads = check_scoring(op, query, labels, length, reduce, kv_heads)
    starts = _checks.int32(op, "starts", starts, (query.shape[0],), query)
    lengths = _checks.int32(op, "lengths", lengths, (query.shape[0],), query)
    ids = _channels(op, labels, channels)
    run = torch.ops.gossamer.label_scores if torch.compiler.is_compiling() else _scores
    scores: Tensor = run(
        query,
        ids,
        labels.codes,
        labels.step,
        labels.zero,
        labels.bits,
        labels.r,
        length,
        starts,
        lengths,
        reduce,
        kv_heads,
    )
    return scores


def check_scoring(op: str, query: Tensor, labels: LabelCache, length: int, reduce: str, kv_heads: int | None) -> int:
    """Check the arguments of a scoring call; return the KV heads that it reduces to."""
    batch, label_heads = labels.codes.shape[:2]
    if query.dim() != 3 or query.shape[0] != batch or query.shape[1] % label_heads or not query.dtype.is_floating_point:
        raise InputError(
            f"{op}: query {list(query.shape)} does not fit labels of {batch} sequences x {label_heads} heads"
        )
    if query.device != labels.codes.device:
        raise InputError(f"{op}: query is on {query.device}, labels are on {labels.codes.device}")
    if not 0 <= length <= labels.capacity:
        raise InputError(f"{op}: length {length} is outside 0 .. {labels.capacity}, the capacity of the label cache")
    if reduce not in REDUCE_CODES:
        raise InputError(f"{op}: reduce must be none, max or sum, got {reduce!r}")
    kv_heads = label_heads if kv_heads is None else kv_heads
    if kv_heads < 1 or query.shape[1] % kv_heads or label_heads not in (kv_heads, query.shape[1]):
        raise InputError(f"{op}: {label_heads} label heads fit neither {kv_heads} KV nor {query.shape[1]} query heads")
    return kv_heads


def _channels(op: str, labels: LabelCache, channels: Tensor) -> Tensor:
    ids = _checks.int32(op, "channels", channels, (labels.codes.shape[1], labels.r), labels.codes)
    assert ids is not None
    return ids


def _gather_channels(op: str, x: Tensor, channels: Tensor) -> Tensor:
    """Return x[..., h, :, channels[h]] for x [B, h', T, d] with heads repeated to those of ``channels`` [h, r]."""
    if bool(((channels < 0) | (channels >= x.shape[-1])).any()):
        _checks.raise_status(op, 4)
    x = x.repeat_interleave(channels.shape[0] // x.shape[1], dim=1)
    return x.gather(3, channels.long()[None, :, None].expand(x.shape[0], -1, x.shape[2], -1))


def _unpack(labels: LabelCache, start: int, stop: int) -> Tensor:
    """Return codes (or float labels) as float32 [B, Hlab, stop - start, r]."""
    tiles = slice(start // TILE, -(-stop // TILE))
    first = start // TILE * TILE
    codes = labels.codes[:, :, tiles]
    if labels.step is None:
        values = codes.float().transpose(-1, -2)
    else:
        size = container_bits(labels.bits)
        shifts = torch.arange(0, 8, size, dtype=torch.uint8, device=codes.device)
        # [B, h, tile, word, token, byte] -> [B, h, tile, token, word, shift, byte]: the last three in channel order.
        values = ((codes.transpose(3, 4).unsqueeze(-2) >> shifts[:, None]) & ((1 << size) - 1)).flatten(4).float()
    return values[..., : labels.r].flatten(2, 3)[:, :, start - first : stop - first]


def _append_reference(
    codes: Tensor,
    step: Tensor | None,
    zero: Tensor | None,
    bits: int,
    r: int,
    key: Tensor,
    channels: Tensor,
    start: int,
) -> None:
    values = _gather_channels("append_labels", key, channels)  # [B, h, T, r]
    token = torch.arange(start, start + key.shape[2], device=key.device)
    tile, lane = token // TILE, token % TILE
    if bits < 16:
        values = values.float()
        low, levels = values.amin(-1, keepdim=True), float((1 << bits) - 1)
        span = values.amax(-1, keepdim=True) - low
        span = torch.where(span == 0, torch.ones_like(span), span)
        # A true division: torch turns scalar / tensor into a reciprocal, which rounds twice.
        quantised = ((values - low) * (torch.full_like(span, levels) / span)).round().clamp(0, levels)
        if step is None or zero is None:
            values = quantised * (span / levels) + low
        else:
            step[:, :, tile, lane] = (span / levels)[..., 0]
            zero[:, :, tile, lane] = low[..., 0]
            size, words = container_bits(bits), codes.shape[3]
            padded = torch.nn.functional.pad(quantised, (0, words * 32 // size - r)).to(torch.uint8)
            shifts = torch.arange(0, 8, size, dtype=torch.uint8, device=key.device)
            values = (padded.unflatten(-1, (words, -1, 4)) << shifts[:, None]).sum(-2, dtype=torch.uint8)
            codes[:, :, tile, :, lane] = values.permute(2, 0, 1, 3, 4)
            return
    codes[:, :, tile, :, lane] = values.permute(2, 0, 1, 3).to(codes.dtype)


def _scores_reference(
    query: Tensor,
    channels: Tensor,
    labels: LabelCache,
    length: int,
    starts: Tensor | None,
    lengths: Tensor | None,
    reduce: str,
    kv_heads: int,
) -> Tensor:
    batch, heads, _ = query.shape
    group = heads // labels.heads
    lo, hi = _checks.bounds("label_scores", starts, lengths, batch, length, query.device)
    per_head = channels.repeat_interleave(group, dim=0)
    q = _gather_channels("label_scores", query.float().unsqueeze(2), per_head).view(batch, labels.heads, group, -1)
    if reduce == "sum":
        q = q.double().sum(2, keepdim=True).float()
    values = _unpack(labels, 0, length).transpose(-1, -2)  # [B, Hlab, r, length]
    if labels.step is None or labels.zero is None:
        scores = q @ values
    else:
        top = q.abs().amax(-1, keepdim=True)
        rounded = (q * torch.where(top > 0, torch.full_like(top, 127.0) / top, 0.0)).round()
        step, zero = (x.flatten(2)[:, :, None, :length] for x in (labels.step, labels.zero))
        scores = (top / 127.0) * step * (rounded @ values) + zero * q.double().sum(-1, keepdim=True).float()
    if reduce != "none":
        scores = scores.flatten(1, 2).unflatten(1, (kv_heads, -1))
        scores = scores.sum(2) if reduce == "sum" else scores.amax(2)
    else:
        scores = scores.flatten(1, 2)
    return scores.masked_fill(~_checks.inside(lo, hi, length), -torch.inf)


def _native_cache(labels: LabelCache) -> tuple[tuple[int, int, int], tuple[int, int, int, int, int, int]]:
    """Return (pointers, description) of a cache as the kernels take it."""
    codes = labels.codes
    container = container_bits(labels.bits)
    kind = container if container else 16 + DTYPE_CODES[codes.dtype]
    return (
        (codes.data_ptr(), _checks.pointer(labels.step), _checks.pointer(labels.zero)),
        (codes.shape[1], codes.shape[2], labels.r, labels.bits, kind, codes.shape[3]),
    )


def native_takes(labels: LabelCache) -> bool:
    """Whether the native kernels take this cache: contiguous, and not float16."""
    return labels.codes.dtype is not torch.float16 and labels.codes.is_contiguous()


def _append(
    codes: Tensor,
    step: Tensor | None,
    zero: Tensor | None,
    bits: int,
    r: int,
    key: Tensor,
    channels: Tensor,
    start: int,
) -> None:
    op = "append_labels"
    labels = LabelCache(codes, step, zero, bits, r)
    backend = resolve(op, "labels", key)
    if backend == "native" and native_takes(labels):
        key = _checks.row_major(key)
        status = native().append_labels(
            *_native_cache(labels),
            (key.data_ptr(), channels.data_ptr()),
            key.stride()[:3],
            (*key.shape, start),
            DTYPE_CODES[key.dtype],
            torch.get_num_threads(),
        )
        _checks.raise_status(op, status)
    elif backend == "triton":
        triton_call(op, "labels")(labels, key, channels, start)
    else:
        _append_reference(codes, step, zero, bits, r, key, channels, start)


def _scores(
    query: Tensor,
    channels: Tensor,
    codes: Tensor,
    step: Tensor | None,
    zero: Tensor | None,
    bits: int,
    r: int,
    length: int,
    starts: Tensor | None,
    lengths: Tensor | None,
    reduce: str,
    kv_heads: int,
) -> Tensor:
    op = "label_scores"
    labels = LabelCache(codes, step, zero, bits, r)
    backend = resolve(op, "labels", query, codes)
    if backend == "triton":
        result: Tensor = triton_call(op, "labels")(
            query, channels, labels, length, starts=starts, lengths=lengths, reduce=reduce, kv_heads=kv_heads
        )
        return result
    if backend != "native" or not native_takes(labels):
        return _scores_reference(query, channels, labels, length, starts, lengths, reduce, kv_heads)
    query = _checks.row_major(query)
    batch, heads, dim = query.shape
    out = torch.empty((batch, heads if reduce == "none" else kv_heads, length), dtype=torch.float32)
    status = native().label_scores(
        *_native_cache(labels),
        (query.data_ptr(), channels.data_ptr(), out.data_ptr(), _checks.pointer(starts), _checks.pointer(lengths)),
        query.stride()[:2],
        (batch, heads, kv_heads, dim, length),
        REDUCE_CODES[reduce],
        DTYPE_CODES[query.dtype],
        torch.get_num_threads(),
    )
    _checks.raise_status(op, status)
    return out


_custom_append = torch.library.custom_op("gossamer::append_labels", _append, mutates_args=("codes", "step", "zero"))
_custom_scores = torch.library.custom_op("gossamer::label_scores", _scores, mutates_args=())


@_custom_append.register_fake
def _fake_append(
    codes: Tensor,
    step: Tensor | None,
    zero: Tensor | None,
    bits: int,
    r: int,
    key: Tensor,
    channels: Tensor,
    start: int,
) -> None:
    return None


@_custom_scores.register_fake
def _fake_scores(
    query: Tensor,
    channels: Tensor,
    codes: Tensor,
    step: Tensor | None,
    zero: Tensor | None,
    bits: int,
    r: int,
    length: int,
    starts: Tensor | None,
    lengths: Tensor | None,
    reduce: str,
    kv_heads: int,
) -> Tensor:
    heads = query.shape[1] if reduce == "none" else kv_heads
    return query.new_empty((query.shape[0], heads, length), dtype=torch.float32)
