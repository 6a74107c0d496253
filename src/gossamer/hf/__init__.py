"""Plug points in transformers models: attention, cache, module views."""

from gossamer.hf.attention import AttentionRuntime, LayerView, dense_attention, dense_decode
from gossamer.hf.blockwise import Stage, block_list, blocks
from gossamer.hf.cache import GossamerCache, KVLayer
from gossamer.hf.channels import ChannelRuntime
from gossamer.hf.matrices import Matrix, masks_for, matrices
from gossamer.hf.mlp import FixedRules, MLPRuntime, NeuronPolicy
from gossamer.hf.mlp_views import MLPView, mlp_views
from gossamer.hf.policy import CachePolicy, DecodePolicy, PrefillPolicy, SelectingPolicy, StoragePolicy
from gossamer.hf.quantized import KVFormat, QuantizedKVLayer
from gossamer.hf.snapshot import load_cache, save_cache
from gossamer.hf.taps import attention_projections, watch
from gossamer.hf.views import AttentionView, ModelShape, attention_views, model_shape

__all__ = [
    "AttentionRuntime",
    "AttentionView",
    "CachePolicy",
    "ChannelRuntime",
    "DecodePolicy",
    "FixedRules",
    "GossamerCache",
    "KVFormat",
    "KVLayer",
    "LayerView",
    "MLPRuntime",
    "MLPView",
    "Matrix",
    "ModelShape",
    "NeuronPolicy",
    "PrefillPolicy",
    "QuantizedKVLayer",
    "SelectingPolicy",
    "Stage",
    "StoragePolicy",
    "attention_projections",
    "attention_views",
    "block_list",
    "blocks",
    "dense_attention",
    "dense_decode",
    "load_cache",
    "masks_for",
    "matrices",
    "mlp_views",
    "model_shape",
    "save_cache",
    "watch",
]
