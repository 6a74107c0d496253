"""Draw what each available attention and cache method reads, over the dense attention map of a real model.

python docs/pictures.py              # every method that has no picture yet
python docs/pictures.py quest h2o    # these, again

Needs Pillow and the model `smollm2`. The pictures are kept in docs/_static/reads, so that building the site needs neither.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import gossamer
from gossamer.data import split, text, token_blocks
from gossamer.errors import GossamerError
from gossamer.hf import model_shape
from gossamer.measure.attention_map import attention_map
from gossamer.measure.compare import entries_of
from gossamer.measure.study import at_budget
from gossamer.registry import make, methods

FOLDER = Path(__file__).resolve().parent / "_static" / "reads"
TOKENS, LAYER, HEADS, BUDGET = 256, 13, (0, 4), 1 / 8
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
    known = [slug for slug, m in methods().items() if m.family in ("attention", "cache") and slug != "dense"]
    slugs = asked or [slug for slug in known if not (FOLDER / f"{slug}.png").is_file()]
    loaded = gossamer.load("smollm2")
    (tokens,) = token_blocks(loaded.tokenizer, split(text("prose"), "evaluation"), TOKENS, 1, seed=1)
    shape = model_shape(loaded.model)
    with make("dense").attach(loaded.model) as handle:
        dense = attention_map(loaded.model, handle, tokens, LAYER, feed="block")
    for slug in slugs:
        try:
            (entry,) = entries_of(loaded, [at_budget(slug, BUDGET, TOKENS, shape, 4)])
            with entry.recipe.attach(loaded.model) as handle:
                sparse = attention_map(loaded.model, handle, tokens, LAYER)
        except GossamerError as error:
            print(f"{slug}: {error}")
            continue
        draw(dense, sparse, FOLDER / f"{slug}.png")
        seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
        print(f"{slug}: {(sparse > 0)[:, seen].float().mean():.1%} of the map read")


if __name__ == "__main__":
    main()
