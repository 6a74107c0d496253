"""The linear plug point for sparse weights: layers whose zeros pay are put on the kernels that skip them, and back.

with SparseLayers(model):                 # a pruned model, its weights still dense with zeros
    model.generate(...)
save_sparse(sparsified, folder); load_sparse(folder)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from gossamer.errors import InputError, ModelError
from gossamer.files import whole
from gossamer.hf.matrices import Matrix, matrices
from gossamer.models.sparse_linear import SPEC, SparseLinear, read_spec
from gossamer.ops.sparse_formats import FORMATS, INT8_FORMATS, block_sparsity, parse_nm

BREAK_EVEN: dict[int, dict[str, float]] = {
    4: {"4x1": 0.4, "1x4": 0.6, "csr": 0.8, "bitmask": 0.75, "stream": 0.55, "n:m": 0.7},
    2: {"4x1": 0.65, "1x4": 0.85, "csr": 0.9, "bitmask": 0.85, "stream": 0.8, "n:m": 0.85},
}
"""By bytes of a weight: the zeros (of blocks, where the format has blocks) from which a layer is at least as fast as dense, for
one row and for 128 of them. Measured with ``benchmarks/sparse_linear.py`` on a Zen 4 processor, two threads, and rounded up;
dense bfloat16 has instructions that sparse has not, so it takes more zeros to beat. In 8 bits the same are used."""


def break_even(dtype: torch.dtype, thresholds: Mapping[str, float] | None = None) -> dict[str, float]:
    """The row of `BREAK_EVEN` for a dtype, with what is set otherwise."""
    return {**BREAK_EVEN[4 if dtype.itemsize >= 4 else 2], **(thresholds or {})}


def best_format(weight: Tensor, thresholds: Mapping[str, float] | None = None, int8: bool = False) -> str | None:
    """The format in which a weight ``[out, in]`` pays most, or None: blocks first, since their kernel is the fastest.

    Args:
        thresholds: by format, instead of `BREAK_EVEN`'s; 1.1 rules a format out.

    >>> weight = torch.zeros(8, 8)
    >>> weight[0:4, 3] = 1
    >>> best_format(weight), best_format(torch.ones(8, 8))
    ('4x1', None)
    """
    least = break_even(weight.dtype, thresholds)
    # Unstructured zeros in passing make a few whole blocks: those count where they are as many as all zeros, nearly.
    sparsity = block_sparsity(weight, "csr")
    for format in ("4x1", "1x4", "bitmask" if int8 else "stream"):
        if int8 and format not in INT8_FORMATS:
            continue
        blocks = block_sparsity(weight, format)
        if blocks >= least[format] and (format in ("stream", "bitmask") or 1 - blocks <= 1.5 * (1 - sparsity)):
            return format
    return None


def pays(weight: Tensor, format: str, thresholds: Mapping[str, float] | None = None) -> bool:
    """Whether a weight has zeros enough for a format."""
    key = "n:m" if parse_nm(format) else format
    return block_sparsity(weight, format) >= break_even(weight.dtype, thresholds)[key]


class SparseLayers:
    """Replaces layers of a model by `SparseLinear`s until `detach`, which puts the very same layers back.

    The dense layers stay in memory meanwhile; see `sparsify` for good.

    Args:
        model: eval mode; float32 or bfloat16 on the CPU run on the native kernels.
        format: one of the formats, or ``"auto"``: `best_format` of each layer.
        int8: 8-bit weights, and inputs rounded row by row.
        thresholds: by format, instead of `BREAK_EVEN`'s.
        include: decides by dotted parameter name which layers are looked at (default: those in blocks, as `matrices` has it).
        inputs: (scale, zero point) of a layer's inputs by its dotted name, where they are known; with 8 bits.

    Attributes:
        layers: `SparseLinear` by the dotted name of the module.
        skipped: names of the layers that stay dense, their zeros being too few.

    Raises:
        InputError: an unknown format, or one without 8 bits.
    """

    def __init__(
        self,
        model: nn.Module,
        format: str = "auto",
        *,
        int8: bool = False,
        thresholds: Mapping[str, float] | None = None,
        include: Callable[[str], bool] | None = None,
        inputs: Mapping[str, tuple[float, int]] | None = None,
    ) -> None:
        if format != "auto" and format not in FORMATS and parse_nm(format) is None:
            raise InputError(f"the format is auto, {', '.join(FORMATS)} or N:M, not {format!r}")
        if int8 and format not in ("auto", *INT8_FORMATS):
            raise InputError(f"8 bits go with {' and '.join(INT8_FORMATS)}, not with {format}")
        unknown = set(thresholds or ()) - set(BREAK_EVEN[4])
        if unknown:
            raise InputError(f"no threshold for {', '.join(sorted(unknown))}; there are {', '.join(BREAK_EVEN[4])}")
        self.layers: dict[str, SparseLinear] = {}
        self.skipped: list[str] = []
        self._undo: list[tuple[nn.Module, str, nn.Module]] = []
        made: dict[nn.Module, SparseLinear] = {}
        for matrix in matrices(model, include=include):
            if type(matrix.module) is not nn.Linear and not matrix.transposed:
                continue
            name = matrix.name.removesuffix(".weight")
            chosen = self._format_of(matrix, format, int8, thresholds)
            if chosen is None:
                self.skipped.append(name)
                continue
            scale, zero = (inputs or {}).get(name, (None, 0)) if int8 else (None, 0)
            layer = SparseLinear.from_dense(matrix.module, chosen, int8=int8, act_scale=scale, act_zero=zero).eval()
            made[matrix.module] = self.layers[name] = layer
        for parent in list(model.modules()):  # a layer may hang in several places
            for child_name, child in list(parent.named_children()):
                if child in made:
                    setattr(parent, child_name, made[child])
                    self._undo.append((parent, child_name, child))

    @staticmethod
    def _format_of(matrix: Matrix, format: str, int8: bool, thresholds: Mapping[str, float] | None) -> str | None:
        if format == "auto":
            return best_format(matrix.weight, thresholds, int8)
        return format if pays(matrix.weight, format, thresholds) else None

    def detach(self) -> None:
        """Put the dense layers back; safe to call twice."""
        while self._undo:
            parent, name, child = self._undo.pop()
            setattr(parent, name, child)

    def report(self) -> dict[str, Any]:
        """How many layers run sparse, in which formats, and the bytes of their weights, dense and stored."""
        formats: dict[str, int] = {}
        dense = 0
        for layer in self.layers.values():
            formats[layer.packed.format] = formats.get(layer.packed.format, 0) + 1
            size = 4 if layer.packed.int8 else layer.packed.values.element_size()
            dense += layer.in_features * layer.out_features * size
        return {
            "sparse_layers": len(self.layers),
            "dense_layers": len(self.skipped),
            "formats": formats,
            "sparse_bytes": sum(layer.packed.nbytes for layer in self.layers.values()),
            "dense_bytes": dense,
        }

    def __enter__(self) -> SparseLayers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def sparsify(model: nn.Module, format: str = "auto", **settings: Any) -> SparseLayers:
    """Replace layers for good: as `SparseLayers`, but the dense weights are let go."""
    layers = SparseLayers(model, format, **settings)
    layers._undo.clear()
    return layers


def save_sparse(model: nn.Module, folder: str | Path) -> Path:
    """Write a transformers model with sparse layers: config and one safetensors file, complete or not at all.

    Raises:
        OutputError: the folder can't be written.
        ModelError: the model has no config.
    """
    folder = Path(folder)
    config: Any = getattr(model, "config", None)
    if config is None:
        raise ModelError(f"{type(model).__name__} has no config: save its state_dict instead")
    with whole(folder / "model.safetensors", "the model") as temporary:
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        save_model(model, str(temporary), {"gossamer": json.dumps({"sparse": 1})})
    return folder


def load_sparse(folder: str | Path) -> nn.Module:
    """Read a model that `save_sparse` wrote, in eval mode; its sparse layers are sparse again.

    Raises:
        ModelError: missing, damaged, or not such a folder.
    """
    import transformers

    folder = Path(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            if "gossamer" not in (file.metadata() or {}):
                raise ModelError(f"{folder} holds no sparse model: load it as any other")
        state = load_file(folder / "model.safetensors")
        model: nn.Module = getattr(transformers, config.architectures[0])(config)
        marks = [key for key in state if key.endswith(f".{SPEC}")]
        for key in marks:
            name = key.removesuffix(f".{SPEC}")
            _, (outputs, inputs) = read_spec(state[key])
            parent, _, child = name.rpartition(".")
            bias = state.get(f"{name}.bias")
            setattr(model.get_submodule(parent), child, SparseLinear.empty(inputs, outputs, bias is not None))
        # Values of sparse layers bring their own dtype; the rest takes that of the file.
        dtypes = {t.dtype for k, t in state.items() if t.is_floating_point() and not _of_sparse(k, marks)}
        if len(dtypes) == 1:
            model.to(dtypes.pop())
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (OSError, SafetensorError, KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise ModelError(f"{folder} holds no sparse model, or is damaged ({type(error).__name__})") from None
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    missing = [key for key in missing if key not in tied]
    if missing or unexpected:
        raise ModelError(f"{folder} does not fit {type(model).__name__}: see {', '.join([*missing, *unexpected][:3])}")
    if isinstance(model, transformers.PreTrainedModel):
        model.tie_weights()
    return model.eval()


def _of_sparse(key: str, marks: list[str]) -> bool:
    return f"{key.rpartition('.')[0]}.{SPEC}" in marks
