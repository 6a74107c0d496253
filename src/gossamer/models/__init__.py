"""Models: loading real ones by name, path or hub id, making tiny random ones, and training small ones."""

from gossamer.models.load import LoadedModel, cache_folder, fingerprint, load, quiet, smollm2_file
from gossamer.models.lora import LoRA, adapted
from gossamer.models.masked import MaskHolder
from gossamer.models.sparse_linear import SparseLinear
from gossamer.models.tiny import FAMILIES, tiny_model
from gossamer.models.training import (
    Plan,
    Training,
    bits_per_byte,
    block_batches,
    byte_model,
    class_loss,
    language_loss,
    token_loss,
    train,
)

__all__ = [
    "FAMILIES",
    "LoRA",
    "LoadedModel",
    "MaskHolder",
    "Plan",
    "SparseLinear",
    "Training",
    "adapted",
    "bits_per_byte",
    "block_batches",
    "byte_model",
    "cache_folder",
    "class_loss",
    "fingerprint",
    "language_loss",
    "load",
    "quiet",
    "smollm2_file",
    "tiny_model",
    "token_loss",
    "train",
]
