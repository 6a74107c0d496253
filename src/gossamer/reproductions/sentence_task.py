"""What the experiments on encoders share: a small BERT pre-trained here, and the task "does the second sentence follow".

MiniLM would stand in its place where one has its folder (`gossamer.models.encoders.classifier`); here a BERT of two layers
is pre-trained on the manual's prose and a third of the standard library's docstrings (masked words, next sentence), and the
task's pairs come from the other two thirds.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from gossamer.data.pairs import encode_pairs, make_pairs, sentences, word_tokenizer
from gossamer.models import Plan, train
from gossamer.models.encoders import Inputs, pretraining_batches, pretraining_loss, small_encoder
from gossamer.reproductions.base import Progress

LENGTH, VOCABULARY, BATCH, PRETRAINING, TEST = 48, 3000, 32, 700, 2000
SIZES = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 384}
SETTING = (
    f"a BERT of {SIZES['num_hidden_layers']} layers, width {SIZES['hidden_size']}, pre-trained here for {PRETRAINING} steps "
    "on prose and a third of the docstrings; task: does the second sentence follow the first, pairs of the other docstrings"
)


@dataclass(frozen=True)
class SentenceTask:
    """The encoder and the task's two parts: (inputs, labels) each."""

    encoder: PreTrainedModel
    train: tuple[Inputs, Tensor]
    test: tuple[Inputs, Tensor]
    pretraining_curve: list[dict[str, float]]


def sentence_task(seed: int, progress: Progress, steps: int = PRETRAINING) -> SentenceTask:
    """Pre-train the encoder and encode the task; some 70 seconds on a core."""
    prose, docs = sentences("prose"), sentences("docstrings")
    tokenizer = word_tokenizer([*prose, *docs], VOCABULARY)
    cut = len(docs) // 3
    before = encode_pairs(tokenizer, make_pairs([*prose, *docs[:cut]], "successor", seed)[0], LENGTH)
    ours, test = make_pairs(docs[cut:], "successor", seed)
    encoder = small_encoder(VOCABULARY, seed, **SIZES)
    mask = tokenizer.convert_tokens_to_ids("[MASK]")
    batches = pretraining_batches(*before, mask=mask, batch=BATCH, steps=steps, seed=seed)
    curve = train(encoder, batches, Plan(steps, lr=1e-3), loss=pretraining_loss, progress=progress).curve
    inputs, labels = encode_pairs(tokenizer, test, LENGTH)
    held_out = ({name: value[:TEST] for name, value in inputs.items()}, labels[:TEST])
    return SentenceTask(encoder, encode_pairs(tokenizer, ours, LENGTH), held_out, curve)
