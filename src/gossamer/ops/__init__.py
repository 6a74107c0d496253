"""COMPUTE: the operators that every method shares. Each is defined once: contract, PyTorch reference, dispatch to
faster kernels."""

from gossamer.ops._dispatch import available_backends, available_isas, runs_natively, set_isa, use_backend
from gossamer.ops.attention_weights import attention_weights
from gossamer.ops.block_sparse_attention import block_sparse_attention
from gossamer.ops.channel_sparse_linear import channel_sparse_linear
from gossamer.ops.compact_rows import compact_rows
from gossamer.ops.decode_attention import decode_attention, merge_attention
from gossamer.ops.key_scores import key_scores
from gossamer.ops.label_attention import label_attention
from gossamer.ops.labels import LabelCache, append_labels, label_scores
from gossamer.ops.linear import linear
from gossamer.ops.memory import advise_huge_pages
from gossamer.ops.merge_rows import best_match, merge_rows
from gossamer.ops.pooled_attention import pooled_attention
from gossamer.ops.prepared import Prepared, PreparedAttention, PreparedLabelAttention, PreparedQuantizedAttention
from gossamer.ops.quantized_kv import QuantizedRows, dequantize_rows, quantize_rows, quantized_decode_attention
from gossamer.ops.select_topk import select_topk
from gossamer.ops.sparse_formats import SparseWeight, block_sparsity, pack
from gossamer.ops.sparse_linear import sparse_linear
from gossamer.ops.sparse_mlp import NeuronWeights, sparse_mlp
from gossamer.ops.tree_attention import tree_attention
from gossamer.ops.tree_search import tree_search
from gossamer.ops.vertical_slash_attention import (
    VerticalSlashIndex,
    vertical_slash_attention,
    vertical_slash_index,
)

__all__ = [
    "LabelCache",
    "NeuronWeights",
    "Prepared",
    "PreparedAttention",
    "PreparedLabelAttention",
    "PreparedQuantizedAttention",
    "QuantizedRows",
    "SparseWeight",
    "VerticalSlashIndex",
    "advise_huge_pages",
    "append_labels",
    "attention_weights",
    "available_backends",
    "available_isas",
    "best_match",
    "block_sparse_attention",
    "block_sparsity",
    "channel_sparse_linear",
    "compact_rows",
    "decode_attention",
    "dequantize_rows",
    "key_scores",
    "label_attention",
    "label_scores",
    "linear",
    "merge_attention",
    "merge_rows",
    "pack",
    "pooled_attention",
    "quantize_rows",
    "quantized_decode_attention",
    "runs_natively",
    "select_topk",
    "set_isa",
    "sparse_linear",
    "sparse_mlp",
    "tree_attention",
    "tree_search",
    "use_backend",
    "vertical_slash_attention",
    "vertical_slash_index",
]
