"""`gossamer apply`: a recipe and a model go in, a model folder comes out, with what was done and measured in its card.

    folder/  model.safetensors, config.json, tokenizer…     loads in transformers
             masks.safetensors                              where the method left zeros: to train on under them
             recipe.yaml                                    the recipe's other methods, for `gossamer generate --recipe`
             gossamer.json, README.md                       what was done, on what, and what was measured

The folder appears whole or not at all. A run that was interrupted goes on where it stood: training inside a method from its
last checkpoint, measuring without pruning again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.errors import InputError, ModelError, OutputError, RecipeError
from gossamer.files import write_whole
from gossamer.measure import cost as costs
from gossamer.measure import weights as study
from gossamer.measure.compare import calibration_tokens
from gossamer.models import LoadedModel, fingerprint, load, quiet
from gossamer.models.training import resumable
from gossamer.recipe import Recipe
from gossamer.registry import catalogue
from gossamer.weights.base import WeightMethod, copied

Progress = Callable[[str, int, int], None]


PLAN = study.Plan()


@dataclass(frozen=True)
class Text:
    """The text that a method calibrates or trains on: source, and how many blocks of which length."""

    source: str = "prose"
    blocks: int = 16
    length: int = 512


def apply_recipe(
    loaded: LoadedModel,
    recipe: Recipe,
    folder: Path,
    text: Text = Text(),
    *,
    measure: study.Plan | None = PLAN,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Change the model by the recipe's weight method, write it, measure it beside the dense one; returns `gossamer.json`.

    Args:
        folder: must not exist, be empty, or hold an interrupted run of the same recipe, model and text.
        measure: None writes the folder unmeasured.

    Raises:
        RecipeError: the recipe has no method that changes weights.
        OutputError: the folder is taken, or can't be written.
    """
    method = _weight_method(recipe)
    what = {
        "recipe": recipe.to_yaml(),
        "model": loaded.name,
        "fingerprint": fingerprint(loaded.model),
        "text": [text.source, text.blocks, text.length],
    }
    work = _work_folder(folder, what)
    made = work / "model"
    if not (work / "applied.json").is_file():
        progress(f"applying {method.slug}", 0, 3)
        tokens = calibration_tokens(loaded, text.source, text.blocks, length=text.length) if method.needs else None
        with resumable(work / "training"):
            applied = method.apply(copied(loaded.model), tokens, progress)
        progress("writing the model", 1, 3)
        _write_model(made, applied.model, loaded.tokenizer)
        if applied.masks is not None:
            applied.masks.save(made / "masks.safetensors")
        others = (
            Recipe(tuple(s for s in recipe.steps if s.method is not method), recipe.folder)
            if len(recipe.steps) > 1
            else None
        )
        if others is not None:
            write_whole(made / "recipe.yaml", others.to_yaml())
        write_whole(work / "applied.json", json.dumps(applied.facts))
    facts = json.loads((work / "applied.json").read_text("utf-8"))
    card: dict[str, Any] = {
        **what,
        "facts": facts,
        "measured": None,
        "machine": costs.machine(),
        "versions": costs.versions(),
    }
    if measure is not None:
        progress("measuring", 2, 3)
        card["measured"] = _measure(loaded, load(made).model, made, measure)
    write_whole(made / "gossamer.json", json.dumps(card, indent=1) + "\n")
    write_whole(made / "README.md", _card(method, card))
    shutil.rmtree(work / "training", ignore_errors=True)
    try:
        if folder.is_dir():
            folder.rmdir()
        os.replace(made, folder)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}; the finished model is in {made}") from None
    shutil.rmtree(work, ignore_errors=True)
    return card


def _weight_method(recipe: Recipe) -> WeightMethod:
    chosen = [step.method for step in recipe.steps if isinstance(step.method, WeightMethod)]
    if len(chosen) != 1:
        named = ", ".join(step.method.slug for step in recipe.steps)
        raise RecipeError(f"`apply` needs one method that changes weights; the recipe has {named}")
    return chosen[0]


def _work_folder(folder: Path, what: dict[str, Any]) -> Path:
    """The folder beside `folder` where the run lives until it is whole; an earlier one of the same run is gone on with."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputError(f"{folder} exists and is not empty: give another folder")
    work = folder.with_name(f".{folder.name}.applying")
    run = work / "run.json"
    try:
        if work.exists() and not (run.is_file() and json.loads(run.read_text("utf-8")) == what):
            shutil.rmtree(work)  # of another recipe, model or text
        work.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write beside {folder}: {error}") from None
    write_whole(run, json.dumps(what))
    return work


def _write_model(folder: Path, model: nn.Module, tokenizer: Any) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    saved: Any = model
    if not hasattr(saved, "save_pretrained"):
        raise ModelError(f"{type(model).__name__} cannot be saved as a model folder")
    try:
        with quiet():
            saved.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}") from None


def _measure(loaded: LoadedModel, model: nn.Module, folder: Path, plan: study.Plan) -> dict[str, Any]:
    tokens = study.evaluation_blocks(loaded, plan)
    truth = [study.log_probs_of(loaded.model, block) for block in tokens]
    rows = [study.WeightRow("dense", {}), study.WeightRow("applied", {})]
    for row, one in zip(rows, (loaded.model, model), strict=True):
        study.score(row, one, tokens, truth)
        study.count(row, one, loaded.model)
    study.timed(rows[1], model, loaded.model, tokens.flatten()[: plan.context], plan)
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors") if f.name != "masks.safetensors")
    return {"dense": rows[0].to_dict(), "applied": rows[1].to_dict(), "file_bytes": size}


def _card(method: WeightMethod, card: dict[str, Any]) -> str:
    """The model card: what was done, and what was measured when."""
    system = catalogue().get(method.slug)
    lines = [
        "---",
        "library_name: transformers",
        f"base_model: {card['model']}",
        "tags: [sparse, gossamer]",
        "---",
        "",
        f"# {card['model']}, {method.name}",
        "",
        f"Made from {card['model']} (fingerprint `{card['fingerprint']}`) with this recipe:",
        "",
        "```yaml",
        card["recipe"].rstrip(),
        "```",
        "",
    ]
    if system is not None:
        lines += [f"{method.name}: {system.title} ({system.venue}).", ""]
    if method.needs:
        source, blocks, length = card["text"]
        lines += [f"Text it looked at: {source}, {blocks} blocks of {length} tokens.", ""]
    if card["measured"]:
        dense, mine = card["measured"]["dense"], card["measured"]["applied"]
        lines += [
            "| | before | after |",
            "|---|---|---|",
            f"| parameters | {dense['parameters']:,} | {mine['parameters']:,} |",
            f"| of them not zero | {dense['nonzero']:,} | {mine['nonzero']:,} |",
            f"| perplexity (held-out text) | {dense['perplexity']:.4g} | {mine['perplexity']:.4g} |",
            f"| next token as before | | {mine['agreement']:.1%} |",
            f"| time of a decode step | 1 | {mine['decode']:.2f} ({mine['way']}) |",
            f"| time of a prompt | 1 | {mine['prefill']:.2f} |",
            f"| weights on disk | | {card['measured']['file_bytes'] / 1e6:.1f} MB |",
            "",
            f"Measured on {card['machine']['processor']}, {card['machine']['cores']} threads; times are ratios in one run.",
            "",
        ]
    else:
        lines += ["Nothing was measured.", ""]
    return "\n".join(lines)


def recipe_of(name: str, settings: dict[str, Any]) -> Recipe:
    """A recipe from a YAML file, or from a method's slug with settings.

    Raises:
        InputError: settings beside a file.
    """
    from gossamer.registry import make

    if Path(name).suffix in (".yaml", ".yml") or Path(name).is_file():
        if settings:
            raise InputError("--set goes with the name of a method; a recipe file has its settings inside")
        return Recipe.load(name)
    return Recipe.of(make(name, **settings))
