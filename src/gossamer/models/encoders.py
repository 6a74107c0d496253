"""Encoder classifiers: a small BERT that is pre-trained here in a minute, or one from a folder, with a new head.

encoder = small_encoder(vocabulary=3000)
train(encoder, pretraining_batches(inputs, follows, mask=4, batch=32, steps=1000), plan, loss=pretraining_loss)
model = classifier(encoder)
train(model, class_batches(inputs, labels, batch=32, steps=600), plan, loss=sequence_loss)
evaluate(model, inputs, labels)
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.errors import InputError, ModelError
from gossamer.models.training import block_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Inputs of an encoder by name, int64 ``[n, length]`` each.
Inputs = dict[str, Tensor]


def small_encoder(vocabulary: int, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """An untrained BERT with both heads of its pre-training: hidden 128, three layers, four heads, MLP 512, no dropout.

    Raises InputError for settings that transformers refuses.

    >>> small_encoder(50, hidden_size=32).config.num_hidden_layers
    3
    """
    from transformers import BertConfig, BertForPreTraining

    sizes = {
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: PreTrainedModel = BertForPreTraining(BertConfig(vocab_size=vocabulary, **{**sizes, **overrides}))
    except Exception as error:  # transformers checks settings in many places, with error classes of many kinds
        raise InputError(f"a small encoder cannot be made so: {' '.join(str(error).split())}") from error
    return model.eval()


def classifier(source: PreTrainedModel | str | os.PathLike[str], classes: int = 2, seed: int = 0) -> PreTrainedModel:
    """A pre-trained encoder with a new head, in eval mode.

    source: an encoder, whose weights are copied; or a folder with one in Hugging Face layout (safetensors), such as
        MiniLM's. seed: of what is drawn new: the head, and the pooler where the encoder comes without.

    Raises ModelError for a folder that holds none, or weights that do not fit, and InputError for fewer than two classes.

    >>> model = classifier(small_encoder(50, hidden_size=32, num_hidden_layers=1), classes=3)
    >>> model.config.num_labels
    3
    """
    from transformers import AutoModel, AutoModelForSequenceClassification

    if classes < 2:
        raise InputError(f"a classifier needs two classes at least, got {classes}")
    if isinstance(source, str | os.PathLike):
        if not Path(source).is_dir():
            raise ModelError(f"there is no folder {str(source)!r} with an encoder")
        try:
            base = AutoModel.from_pretrained(
                str(source), use_safetensors=True, trust_remote_code=False, local_files_only=True, dtype=torch.float32
            )
        except Exception as error:  # a bad file can make the loaders raise nearly anything
            raise ModelError(f"cannot load an encoder from {source}: {' '.join(str(error).split())[:300]}") from error
    else:
        base = source.base_model
    config = copy.deepcopy(base.config)
    config.num_labels = classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        except ValueError as error:
            raise ModelError(f"{type(base).__name__} has no classifier in transformers") from error
    mine = model.base_model
    missing, extra = mine.load_state_dict(base.state_dict(), strict=False)
    if extra or any("pooler" not in name for name in missing):
        raise ModelError(f"the weights of {type(base).__name__} do not fit a {type(mine).__name__}")
    return model.eval()


def sequence_loss(model: nn.Module, batch: tuple[Inputs, Tensor]) -> Tensor:
    """Mean cross-entropy of a classifier on (inputs, labels), nats."""
    inputs, labels = batch
    return F.cross_entropy(model(**inputs).logits, labels)


def pretraining_loss(model: nn.Module, batch: tuple[Inputs, Tensor, Tensor]) -> Tensor:
    """BERT's: the masked words, and whether the second sentence follows, on (inputs, words or -100, follows)."""
    inputs, words, follows = batch
    out = model(**inputs)
    asked = words >= 0
    return F.cross_entropy(out.prediction_logits[asked], words[asked]) + F.cross_entropy(
        out.seq_relationship_logits, follows
    )


def class_batches(
    inputs: Inputs, labels: Tensor, batch: int, steps: int, seed: int = 0
) -> Iterator[tuple[Inputs, Tensor]]:
    """`steps` batches (inputs, labels), shuffled anew each time all were seen."""
    for rows in block_batches(torch.arange(len(labels))[:, None], batch, steps, seed):
        yield {name: value[rows[:, 0]] for name, value in inputs.items()}, labels[rows[:, 0]]


def pretraining_batches(
    inputs: Inputs, follows: Tensor, mask: int, batch: int, steps: int, seed: int = 0, share: float = 0.15
) -> Iterator[tuple[Inputs, Tensor, Tensor]]:
    """Batches for `pretraining_loss`: `share` of the words is asked for, of these 8 in 10 are replaced by the token `mask`.

    Tokens up to `mask` are special and never asked for.
    """
    generator = torch.Generator().manual_seed(seed)
    for part, labels in class_batches(inputs, follows, batch, steps, seed):
        ids = part["input_ids"]
        dice = torch.rand(ids.shape, generator=generator)
        asked = (dice < share) & (ids > mask)
        hidden = ids.masked_fill(asked & (dice < 0.8 * share), mask)
        yield {**part, "input_ids": hidden}, ids.masked_fill(~asked, -100), labels


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Inputs, labels: Tensor, batch: int = 128) -> tuple[float, float]:
    """(accuracy, mean cross-entropy in nats) of a classifier."""
    logits = torch.cat(
        [model(**{n: v[at : at + batch] for n, v in inputs.items()}).logits for at in range(0, len(labels), batch)]
    )
    return float((logits.argmax(1) == labels).float().mean()), float(F.cross_entropy(logits, labels))
