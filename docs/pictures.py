"""Draw what each available attention and cache method reads, over the dense attention map of a real model, and drafted trees.

python docs/pictures.py              # every method that has no picture yet
python docs/pictures.py quest h2o    # these, again
python docs/pictures.py trees        # the trees that decoding systems draft

Needs Pillow and the model `smollm2` (trees need neither). The pictures are kept in docs/_static/reads and docs/_static/trees, so
that building the site needs nothing of this.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import gossamer
from gossamer.data import split, text, token_blocks
from gossamer.decoding.eagle import SHAPES, rank_tree
from gossamer.decoding.ppd_tree import build_dynamic_tree
from gossamer.decoding.token_recycling import released_template
from gossamer.errors import GossamerError
from gossamer.hf import model_shape
from gossamer.measure.attention_map import attention_map
from gossamer.measure.compare import entries_of
from gossamer.measure.rows import Entry
from gossamer.measure.study import at_budget
from gossamer.patterns import Tree
from gossamer.recipe import Recipe
from gossamer.registry import make, methods
from gossamer.reproductions.ppd import SIZE as PPD_SIZE

FOLDER = Path(__file__).resolve().parent / "_static" / "reads"
TREES = FOLDER.parent / "trees"
RESULTS = FOLDER.parents[2] / "results"
TOKENS, LAYER, HEADS, BUDGET = 256, 13, (0, 4), 1 / 8
#: Settings that suit so short a text, where an eighth by the study's rule does not.
SETTINGS: dict[str, dict[str, Any]] = {
    "a-shape": {"n_init": 8, "n_local": 24, "exact": True},
    "minference": {"pattern": "vertical-slash", "k_v": 10, "k_s": 10, "block_size": 8, "sinks": 4, "local": 8},
    "minference-static": {"pattern": "vertical-slash", "k_v": 10, "k_s": 10, "block_size": 8, "sinks": 4, "local": 8},
    "seerattention": {"area": 1 / 4, "block_size": 16, "steps": 60},
    "sliding-window": {"window": 32},
    "zipvl": {"tau": 0.8, "cache": "none"},
}
LAYERS = {"tidaldecode": 15}  # 13 may choose, and a layer that chooses reads everything
PROMPTS = {"snapkv": 128}  # compresses a prompt, not what is generated
UNSEEN = {"dense", "rtn-kv"}  # read everything
SCALE, GAP = 2, 16
UNREAD, READ = (68, 68, 76), (196, 78, 20)  # darkest shade of what was not read, and of what was
FLOOR = -9.0  # natural logarithm of the weight that is drawn as the lightest shade


def shade(dense: Tensor, sparse: Tensor) -> Tensor:
    """uint8 ``[n, n, 3]``: dense weights on a logarithmic scale, in one colour where the method read, grey elsewhere."""
    n = dense.shape[0]
    strength = (dense.clamp_min(1e-12).log() / -FLOOR + 1).clamp(0, 1)[..., None]
    ink = torch.where((sparse > 0)[..., None], torch.tensor(READ), torch.tensor(UNREAD)).float()
    lightest = torch.where((sparse > 0)[..., None], 0.22, 0.04)
    colour = 255 - (255 - ink) * (lightest + (1 - lightest) * strength)
    future = torch.ones(n, n, dtype=torch.bool).triu(1)[..., None]
    return colour.masked_fill(future, 255).round().to(torch.uint8)


def draw(dense: Tensor, sparse: Tensor, path: Path) -> None:
    """Both heads side by side."""
    n = dense.shape[1]
    canvas = Image.new("RGB", (len(HEADS) * n * SCALE + (len(HEADS) - 1) * GAP, n * SCALE), "white")
    for place, head in enumerate(HEADS):
        pixels = shade(dense[head], sparse[head]).repeat_interleave(SCALE, 0).repeat_interleave(SCALE, 1)
        canvas.paste(Image.fromarray(pixels.numpy()), (place * (n * SCALE + GAP), 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.quantize(64).save(path, optimize=True)


def tree_svg(tree: Tree, chances: Sequence[float | None]) -> str:
    """A tree as an image, the root on top: nodes are the fuller, the likelier they are; None draws a small hollow one."""
    step, level, edge = 15, 44, 12
    across: dict[int, float] = {}
    for place, leaf in enumerate(sorted(tree.leaves, key=lambda node: [tree.ranks[n] % 100 for n in tree.path(node)])):
        across[leaf] = edge + place * step
    for node in reversed(range(tree.size)):
        if node not in across:
            across[node] = sum(across[child] for child in tree.children[node]) / len(tree.children[node])
    down = [edge + depth * level for depth in tree.depths]
    width, height = 2 * edge + (len(tree.leaves) - 1) * step, 2 * edge + max(tree.depths) * level
    red, green, blue = READ
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    ]
    for node, parent in enumerate(tree.parents[1:], 1):
        ends = f'x1="{across[parent]:.1f}" y1="{down[parent]}" x2="{across[node]:.1f}" y2="{down[node]}"'
        parts.append(f'<line {ends} stroke="#8a8a92" stroke-width="1"/>')
    for node, chance in enumerate(chances):
        radius, opacity = (3.0, 0.0) if chance is None else (5.5, 0.12 + 0.88 * math.sqrt(chance))
        fill = f'fill="rgb({red},{green},{blue})" fill-opacity="{opacity:.2f}" stroke="rgb({red},{green},{blue})"'
        place_ = f'cx="{across[node]:.1f}" cy="{down[node]}" r="{radius:g}"'
        parts.append(f'<circle {place_} fill="white"/><circle {place_} {fill}/>')
    return "\n".join([*parts, "</svg>", ""])


def _ppd() -> tuple[Tree, list[float | None]]:
    raw = json.loads((RESULTS / "ppd.json").read_text("utf-8"))["raw"]
    acc = raw["accuracies_of_trees"]
    tree = build_dynamic_tree(acc, PPD_SIZE).shape(len(acc))
    return tree, [
        None if min(path, default=0) < 0 else math.prod(acc[i][rank] for i, rank in enumerate(path))
        for path in tree.rank_paths
    ]


def _even(tree: Tree) -> tuple[Tree, list[float | None]]:
    return tree, [1.0, *[0.3] * (tree.size - 1)]


DRAFTED: dict[str, Callable[[], tuple[Tree, list[float | None]]]] = {
    "token-recycling": lambda: _even(released_template()),
    "ppd": _ppd,
    "spectr": lambda: _even(Tree.of_chains(8, 4)),
    "lantern": lambda: _even(rank_tree(SHAPES["25"])),
}


def draw_trees() -> None:
    """The tree of each system that drafts one."""
    TREES.mkdir(parents=True, exist_ok=True)
    for slug, made in DRAFTED.items():
        (TREES / f"{slug}.svg").write_text(tree_svg(*made()), "utf-8")
        print(f"{slug}: {made()[0].size} nodes")


def main() -> None:
    """Run from the shell."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("slugs", nargs="*", help="methods to draw (default: those without a picture)")
    asked = parser.parse_args().slugs
    if asked == ["trees"]:
        draw_trees()
        return
    known = [slug for slug, m in methods().items() if m.family in ("attention", "cache") and slug not in UNSEEN]
    slugs = asked or [slug for slug in known if not (FOLDER / f"{slug}.png").is_file()]
    loaded = gossamer.load("smollm2")
    (tokens,) = token_blocks(loaded.tokenizer, split(text("prose"), "evaluation"), TOKENS, 1, seed=1)
    shape = model_shape(loaded.model)
    maps: dict[int, Tensor] = {}
    for slug in slugs:
        layer = LAYERS.get(slug, LAYER)
        if layer not in maps:
            with make("dense").attach(loaded.model) as handle:
                maps[layer] = attention_map(loaded.model, handle, tokens, layer, feed="block")
        dense, prompt = maps[layer], PROMPTS.get(slug, 0)
        made = make(slug, **SETTINGS[slug]) if slug in SETTINGS else at_budget(slug, BUDGET, TOKENS, shape, 4)
        try:
            fixed = Entry(Recipe.of(made), slug)  # a pattern that is given needs no search for one
            (entry,) = [fixed] if slug.startswith("minference") else entries_of(loaded, [made])
            with entry.recipe.attach(loaded.model) as handle:
                sparse = attention_map(loaded.model, handle, tokens, layer, prompt)
            sparse = torch.cat([dense[:, :prompt], sparse], 1)  # the prompt itself is read densely
        except GossamerError as error:
            print(f"{slug}: {error}")
            continue
        draw(dense, sparse, FOLDER / f"{slug}.png")
        seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
        print(f"{slug}: {(sparse > 0)[:, seen].float().mean():.1%} of the map read")


if __name__ == "__main__":
    main()
