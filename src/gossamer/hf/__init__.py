"""Plug points in transformers models: attention, cache, module views."""

from gossamer.hf.attention import AttentionRuntime, LayerView, dense_attention, dense_decode
from gossamer.hf.cache import GossamerCache, KVLayer
from gossamer.hf.policy import CachePolicy, DecodePolicy, PrefillPolicy, SelectingPolicy
from gossamer.hf.views import AttentionView, ModelShape, attention_views, model_shape

__all__ = [
    "AttentionRuntime",
    "AttentionView",
    "CachePolicy",
    "DecodePolicy",
    "GossamerCache",
    "KVLayer",
    "LayerView",
    "ModelShape",
    "PrefillPolicy",
    "SelectingPolicy",
    "attention_views",
    "dense_attention",
    "dense_decode",
    "model_shape",
]
