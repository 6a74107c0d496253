"""Models: loading real ones by name, path or hub id, making tiny random ones, and training small ones."""

from gossamer.models.load import LoadedModel, cache_folder, fingerprint, load, quiet, smollm2_file
from gossamer.models.lora import LoRA
from gossamer.models.masked import MaskHolder
from gossamer.models.tiny import FAMILIES, tiny_model
from gossamer.models.training import Plan, Training, bits_per_byte, byte_model, train

__all__ = [
    "FAMILIES",
    "LoRA",
    "LoadedModel",
    "MaskHolder",
    "Plan",
    "Training",
    "bits_per_byte",
    "byte_model",
    "cache_folder",
    "fingerprint",
    "load",
    "quiet",
    "smollm2_file",
    "tiny_model",
    "train",
]
