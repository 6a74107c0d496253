"""Draw what each available attention and cache method reads, over the dense attention map of a real model.

python docs/pictures.py              # every method that has no picture yet
python docs/pictures.py quest h2o    # these, again

Needs Pillow and the model `smollm2`. The pictures are kept in docs/_static/reads, so that building the site needs neither.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import gossamer
from gossamer.data import split, text, token_blocks
from gossamer.errors import GossamerError
from gossamer.hf import model_shape
from gossamer.measure.attention_map import attention_map
from gossamer.measure.compare import entries_of
from gossamer.measure.rows import Entry
from gossamer.measure.study import at_budget
from gossamer.recipe import Recipe
from gossamer.registry import make, methods

FOLDER = Path(__file__).resolve().parent / "_static" / "reads"
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


def main() -> None:
    """Run from the shell."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("slugs", nargs="*", help="methods to draw (default: those without a picture)")
    asked = parser.parse_args().slugs
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
