"""What the experiments on encoders share: a small BERT pre-trained here, and the task "which package is this stretch from".

MiniLM would stand in its place where one has its folder (`gossamer.models.encoders.classifier`); here a BERT of two layers
is pre-trained (masked words, next stretch) on the standard library's source outside of the eight packages that the task
tells apart. The card's task, "does the second sentence follow", is too hard for so small a pre-training.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from gossamer.data.pairs import encode_pairs, library_stretches, make_pairs, make_topics, word_tokenizer
from gossamer.models import Plan, train
from gossamer.models.encoders import Inputs, pretraining_batches, pretraining_loss, small_encoder
from gossamer.reproductions.base import Progress

LENGTH, VOCABULARY, BATCH, PRETRAINING = 48, 3000, 32, 500
PACKAGES = ("asyncio", "email", "http", "logging", "multiprocessing", "tkinter", "unittest", "xml")
EACH = 1500
SIZES = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 384}
SETTING = (
    f"a BERT of {SIZES['num_hidden_layers']} layers, width {SIZES['hidden_size']}, pre-trained here for {PRETRAINING} steps "
    f"on other source; task: which of {len(PACKAGES)} packages of the standard library 24 words of source come from"
)


@dataclass(frozen=True)
class PackageTask:
    """The encoder and the task's two parts: (inputs, labels) each."""

    encoder: PreTrainedModel
    train: tuple[Inputs, Tensor]
    test: tuple[Inputs, Tensor]
    pretraining_curve: list[dict[str, float]]


def package_task(seed: int, progress: Progress, steps: int = PRETRAINING) -> PackageTask:
    """Pre-train the encoder and encode the task; about a minute on a core."""
    everything, halves = library_stretches(24), library_stretches(12)
    others = [s for name, stretches in halves.items() if name not in PACKAGES for s in stretches]
    ours, test = make_topics(everything, PACKAGES, EACH, seed)
    tokenizer = word_tokenizer([*others, *ours.first], VOCABULARY)
    before = encode_pairs(tokenizer, make_pairs(others[:25_000], "successor", seed)[0], LENGTH)
    encoder = small_encoder(VOCABULARY, seed, **SIZES)
    mask = tokenizer.convert_tokens_to_ids("[MASK]")
    batches = pretraining_batches(*before, mask=mask, batch=BATCH, steps=steps, seed=seed)
    curve = train(encoder, batches, Plan(steps, lr=1e-3), loss=pretraining_loss, progress=progress).curve
    return PackageTask(encoder, encode_pairs(tokenizer, ours, LENGTH), encode_pairs(tokenizer, test, LENGTH), curve)
