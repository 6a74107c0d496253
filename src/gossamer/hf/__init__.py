"""Plug points in transformers models: attention, cache, module views."""

from gossamer.hf.attention import AttentionRuntime, LayerView, dense_attention, dense_decode
from gossamer.hf.cache import GossamerCache, KVLayer
from gossamer.hf.policy import CachePolicy, DecodePolicy, PrefillPolicy, SelectingPolicy, StoragePolicy
from gossamer.hf.quantized import KVFormat, QuantizedKVLayer
from gossamer.hf.snapshot import load_cache, save_cache
from gossamer.hf.views import AttentionView, ModelShape, attention_views, model_shape

__all__ = [
    "AttentionRuntime",
    "AttentionView",
    "CachePolicy",
    "DecodePolicy",
    "GossamerCache",
    "KVFormat",
    "KVLayer",
    "LayerView",
    "ModelShape",
    "PrefillPolicy",
    "QuantizedKVLayer",
    "SelectingPolicy",
    "StoragePolicy",
    "attention_views",
    "dense_attention",
    "dense_decode",
    "load_cache",
    "model_shape",
    "save_cache",
]
