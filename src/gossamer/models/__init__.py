"""Models: loading real ones by name, path or hub id, and making tiny random ones."""

from gossamer.models.load import LoadedModel, cache_folder, fingerprint, load, smollm2_file
from gossamer.models.tiny import FAMILIES, tiny_model

__all__ = ["FAMILIES", "LoadedModel", "cache_folder", "fingerprint", "load", "smollm2_file", "tiny_model"]
