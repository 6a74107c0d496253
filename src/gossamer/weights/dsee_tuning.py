"""DSEE on a model: layers that are tuned and masked, heads that go, the task's own file, and the way back to a plain model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gossamer.errors import CalibrationError, InputError, ModelError
from gossamer.files import save_tensors
from gossamer.hf import model_shape
from gossamer.patterns import Masks, choose
from gossamer.patterns.criteria import random
from gossamer.weights.dsee_layers import Adapted, Update

Mode = Literal["ABS", "AB", "W", "WAB", "WABS", "NABS", "random"]
#: Modules that are drawn new for a task. BERT's pooler is not: it comes with the encoder, and stays.
HEADS = re.compile(r"(^|\.)(classifier|score|qa_outputs)\.")


def update_score(mode: Mode, weight: Tensor, low_rank: Tensor, entries: Tensor, generator: torch.Generator) -> Tensor:
    """What an entry of W under an update is worth, ``[out, in]``; larger is kept.

    weight: W. low_rank, entries: (α/r)·B A and (α/r)·S2. Both carry the factor in every mode (the release scales one of the
    two terms in WAB and WABS). ABS |ΔW|, AB |B A|, W |W|, WAB |W + B A|, WABS |W + ΔW|, NABS 1/|ΔW|, random.

    >>> one = torch.ones(1, 1)
    >>> float(update_score("WABS", one, -2 * one, -3 * one, torch.Generator()))
    4.0
    """
    if mode == "random":
        return random(weight, generator)
    if mode == "NABS":
        return 1 / (low_rank + entries).abs()
    ranked = {
        "W": weight,
        "AB": low_rank,
        "ABS": low_rank + entries,
        "WAB": weight + low_rank,
        "WABS": weight + low_rank + entries,
    }
    return ranked[mode].abs()


def head_scores(rows: Tensor, kv_heads: int) -> Tensor:
    """Σ of ``[out, in]`` over the rows of each key/value head (a group of query heads), ``[kv_heads]``.

    >>> head_scores(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), 2).tolist()
    [3.0, 7.0]
    """
    return rows.reshape(kv_heads, -1).sum(1)


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a layer: of a fused matrix there are three.

    Attributes:
        layer: index of the block.
        role: q, k, v, o or another.
        name: of the adapted layer.
        start, stop: its rows.
    """

    layer: int
    role: str
    name: str
    start: int
    stop: int


@dataclass(eq=False)
class Tuned:
    """A model under DSEE, ended by `merge` or `remove`; made by `DSEE.adapt`."""

    _model: nn.Module
    _layers: dict[str, Adapted]
    _pieces: list[Piece]
    _fingerprint: str
    _wanted: list[tuple[nn.Parameter, bool]] = field(repr=False)
    _heads_removed: dict[int, list[int]] = field(default_factory=dict)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained: A, B, the entries of S2, and the task's head."""
        return (p for p in self._model.parameters() if p.requires_grad)

    def updates(self) -> Iterator[tuple[Piece, Update]]:
        """The updates with the rows they belong to."""
        for piece in self._pieces:
            for part in self._layers[piece.name].updates:
                if isinstance(part, Update) and part.start == piece.start:
                    yield piece, part

    def masks(self) -> Masks:
        """S1 by the name of the plain model's parameter, in its shape; layers that have none are left out."""
        found = {}
        for name, layer in self._layers.items():
            if layer.mask is not None:
                found[f"{name}.weight"] = layer.mask.t() if layer.transposed else layer.mask
        return Masks(found)

    def prune(
        self, ratio_update: float = 0.2, ratio_other: float = 0.2, mode: Mode = "ABS", cap: float = 1.0, seed: int = 0
    ) -> Masks:
        """Mask the frozen weights: two rankings, each over all layers.

        Args:
            ratio_update: share of query and value weights that goes, by `mode`.
            ratio_other: share of all other weights of the blocks that goes, by |W|.
            cap: no matrix loses more than this share; where an update barely moved, all of its matrix would go.
            seed: of random.

        Raises:
            InputError: a share out of range, or a mode that ranks by an update that is still zero.
        """
        generator = torch.Generator().manual_seed(seed)
        updated = {(p.name, p.start): u for p, u in self.updates()}
        groups: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for number, piece in enumerate(self._pieces):
            weight = self._layers[piece.name].weight[piece.start : piece.stop].float()
            part = updated.get((piece.name, piece.start))
            if part is None:
                groups[1][str(number)] = random(weight, generator) if mode == "random" else weight.abs()
                continue
            low, entries = (part.scale * t.detach().float() for t in (part.low_rank(), part.entries()))
            if mode in ("ABS", "AB", "NABS") and not bool(low.any() | entries.any()):
                raise InputError(f"the update of {piece.name} is zero: tune before pruning by {mode}")
            groups[0][str(number)] = update_score(mode, weight, low, entries, generator)
        kept = dict(choose(groups[0], ratio_update, cap=cap)) | dict(choose(groups[1], ratio_other, cap=cap))
        for name, layer in self._layers.items():
            rows = [kept[str(number)] for number, piece in enumerate(self._pieces) if piece.name == name]
            layer.set_mask(torch.cat(rows))
        self._heads_removed = {}
        return self.masks()

    def prune_heads(self, per_layer: int, mode: Literal["ABS", "WABS"] = "ABS") -> dict[int, list[int]]:
        """Remove the heads of every layer whose query and value updates are smallest; which went, by layer.

        Where query heads share a key/value head they go together, and `per_layer` counts the key/value heads.
        Their rows of query, key and value, of B and S2, and their columns of the output matrix are masked; `merge` may cut
        them off.

        Raises:
            InputError: no head would stay, or nothing was tuned yet.
            ModelError: the model's heads are not known, or it has no output matrix under a known name.
        """
        shape = model_shape(self._model)
        if not 0 < per_layer < shape.kv_heads:
            raise InputError(f"of {shape.kv_heads} heads between 1 and {shape.kv_heads - 1} can go, got {per_layer}")
        parts = {(p.layer, p.role): u for p, u in self.updates()}
        if not any(bool(u.b.any()) or bool(u.values.any()) for u in parts.values()):
            raise InputError("the updates are zero: tune before removing heads")
        by_role = {(p.layer, p.role): p for p in self._pieces}
        removed: dict[int, list[int]] = {}
        for layer in sorted({p.layer for p in self._pieces}):
            if any((layer, role) not in by_role for role in "qkvo"):
                raise ModelError(f"block {layer} has not the matrices q, k, v and o: its heads cannot be removed")
            score = torch.zeros(shape.kv_heads)
            for role in "qv":
                update, piece = parts[layer, role], by_role[layer, role]
                rows = (update.low_rank() + update.entries()).detach().abs().float()
                if mode == "WABS":
                    rows = rows + self._layers[piece.name].weight[piece.start : piece.stop].abs().float()
                score += head_scores(rows, shape.kv_heads).cpu()
            order = score.sort(stable=True).indices[:per_layer]
            removed[layer] = sorted(int(head) for head in order)
            self._mask_heads(layer, removed[layer], by_role, parts)
        self._heads_removed = removed
        return removed

    @torch.no_grad()
    def _mask_heads(
        self,
        layer: int,
        heads: list[int],
        by_role: Mapping[tuple[int, str], Piece],
        parts: Mapping[tuple[int, str], Update],
    ) -> None:
        kv_heads = model_shape(self._model).kv_heads
        gone = torch.zeros(kv_heads, dtype=torch.bool)
        gone[heads] = True
        for role in "qkvo":
            piece = by_role[layer, role]
            adapted = self._layers[piece.name]
            mask = torch.ones(adapted.weight.shape, dtype=torch.bool) if adapted.mask is None else adapted.mask.cpu()
            size = mask.shape[1] if role == "o" else piece.stop - piece.start
            lines = gone.repeat_interleave(size // kv_heads)
            if role == "o":
                mask = mask & ~lines
            else:
                mask = mask.clone()
                mask[piece.start : piece.stop][lines] = False
            adapted.set_mask(mask.to(adapted.weight.device))
            if (layer, role) in parts:
                update = parts[layer, role]
                update.b[lines.to(update.b.device)] = 0
                update.values[lines.to(update.b.device)[update.index[0]]] = 0

    def masked_shares(self) -> dict[str, float]:
        """Share of W that S1 masks: of query and value (`update`), and of all other matrices (`other`)."""
        counts = {"update": [0, 0], "other": [0, 0]}
        for piece in self._pieces:
            mask = self._layers[piece.name].mask
            if mask is not None:
                count = counts["update" if piece.role in ("q", "v") else "other"]
                rows = mask[piece.start : piece.stop]
                count[0], count[1] = count[0] + int((~rows).sum()), count[1] + rows.numel()
        return {name: masked / total if total else 0.0 for name, (masked, total) in counts.items()}

    def flops(self) -> dict[str, int]:
        """Operations a token in the blocks' matrices (a multiply-add is two): dense, masked and unmerged, and merged.

        Counted from what is left of W, whatever kernel runs it; the unmerged form adds r(out + in) + N for each update.
        """
        dense = sum(layer.weight.numel() for layer in self._layers.values())
        kept = sum(
            int(layer.mask.sum()) if layer.mask is not None else layer.weight.numel() for layer in self._layers.values()
        )
        added = sum(u.a.numel() + u.b.numel() + u.values.numel() for _, u in self.updates())
        merged = sum(
            int(((m.weight if m.masked is None else m.masked) + m.delta() != 0).sum()) for m in self._layers.values()
        )
        return {"dense": 2 * dense, "unmerged": 2 * (kept + added), "merged": 2 * merged}

    def task_state(self) -> dict[str, Tensor]:
        """What the task needs beside the base model: A, B, the entries with their places, mask bits, and the head."""
        state = {n: p.detach() for n, p in self._model.named_parameters() if p.requires_grad}
        for name, layer in self._layers.items():
            for i, part in enumerate(layer.updates):
                state[f"{name}.updates.{i}.index"] = part.get_buffer("index").to(torch.int32)
            if layer.mask is not None:
                state[f"{name}.mask"] = torch.from_numpy(np.packbits(layer.mask.cpu().numpy().reshape(-1)))
        return state

    def save_task(self, path: str | Path) -> Path:
        """Write `task_state` as one safetensors file, complete or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        header = {"dsee": json.dumps({"model": self._fingerprint, "heads": self._heads_removed})}
        return save_tensors(path, self.task_state(), header, "the task")

    @torch.no_grad()
    def load_task(self, path: str | Path) -> None:
        """Take over what `save_task` wrote; the settings of `adapt` must be the same.

        Raises:
            InputError: the file is missing or damaged.
            CalibrationError: it is of another base model, or of other settings.
        """
        try:
            with safe_open(Path(path), framework="pt") as file:
                header = json.loads((file.metadata() or {})["dsee"])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{path} holds no task of DSEE, or is damaged ({type(error).__name__})") from None
        if header["model"] != self._fingerprint:
            raise CalibrationError(f"the task in {path} was tuned on another base model")
        mine: dict[str, Tensor] = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        mine |= {n: b for n, b in self._model.named_buffers() if n.endswith(".index") and ".updates." in n}
        if {n: t.shape for n, t in state.items() if not n.endswith(".mask")} != {n: t.shape for n, t in mine.items()}:
            raise CalibrationError(f"the task in {path} was tuned with other settings: rank, entries or head differ")
        for name, tensor in mine.items():
            tensor.copy_(state[name])
        for name, layer in self._layers.items():
            if f"{name}.mask" in state:
                bits = np.unpackbits(state[f"{name}.mask"].numpy(), count=layer.weight.numel())
                layer.set_mask(torch.from_numpy(bits).bool().view(layer.weight.shape).to(layer.weight.device))
        self._heads_removed = {int(layer): heads for layer, heads in header["heads"].items()}

    def merge(self, cut_heads: bool = True) -> Masks:
        """Leave plain layers with S1 ⊙ W + ΔW behind; where they are zero for good.

        ΔW fills the zeros of query and value again. Where the family's configuration names the head size (Llama and its
        like), removed heads are cut off: matrices shrink, and the checkpoint loads with plain transformers. Elsewhere
        (BERT, GPT-2) their rows and columns stay as zeros, which any kernel for sparse rows may skip.

        Args:
            cut_heads: False leaves them as zeros everywhere.
        """
        updated = {p.name for p, _ in self.updates()}
        masks = {}
        for name, layer in self._layers.items():
            layer.merge()
            if layer.mask is not None:
                zero = (layer.weight == 0) if name in updated else ~layer.mask
                masks[f"{name}.weight"] = ~(zero.t() if layer.transposed else zero)
        self._end()
        if self._heads_removed and cut_heads and can_cut(self._model):
            by_role = {(p.layer, p.role): p.name for p in self._pieces}
            cut(self._model, self._heads_removed, by_role)
            return Masks.of(self._model)
        return Masks(masks)

    def remove(self) -> None:
        """Take all off; the base model's weights are what they were, bit for bit."""
        self._end()

    def _end(self) -> None:
        for name, layer in self._layers.items():
            self._model.set_submodule(name, layer.base)
        self._layers = {}
        while self._wanted:
            parameter, wanted = self._wanted.pop()
            parameter.requires_grad_(wanted)


def can_cut(model: nn.Module) -> bool:
    """Whether the family's configuration names the size of a head, so that fewer heads need not mean wider ones."""
    config: Any = getattr(model, "config", None)
    named = (
        hasattr(config, "head_dim") or getattr(config, "model_type", "") == "qwen2"
    )  # which reads it where it is set
    return named and hasattr(config, "num_key_value_heads")


@torch.no_grad()
def cut(model: nn.Module, removed: Mapping[int, list[int]], names: Mapping[tuple[int, str], str]) -> None:
    """Cut key/value heads, with the query heads that read them, off a Llama-like model, in place.

    Args:
        removed: heads by block, in each block as many.
        names: of the layers q, k, v and o by block.

    Raises:
        InputError: not as many in each block.
    """
    shape = model_shape(model)
    counts = {len(heads) for heads in removed.values()}
    if len(counts) != 1 or set(removed) != set(range(shape.layers)):
        raise InputError("every block must lose as many heads: a configuration has one number for all")
    config: Any = model.config
    for layer, heads in removed.items():
        stays = torch.ones(shape.kv_heads, dtype=torch.bool)
        stays[heads] = False
        for role in "qkvo":
            module: Any = model.get_submodule(names[layer, role])
            size = module.in_features if role == "o" else module.out_features
            lines = stays.repeat_interleave(size // shape.kv_heads).to(module.weight.device)
            kept = module.weight[:, lines] if role == "o" else module.weight[lines]
            module.weight = nn.Parameter(kept.clone(), requires_grad=module.weight.requires_grad)
            if role == "o":
                module.in_features = kept.shape[1]
            else:
                module.out_features = kept.shape[0]
                if module.bias is not None:
                    module.bias = nn.Parameter(module.bias[lines].clone(), requires_grad=module.bias.requires_grad)
    left = shape.kv_heads - counts.pop()
    config.head_dim = shape.head_dim
    config.num_attention_heads, config.num_key_value_heads = left * shape.group, left
