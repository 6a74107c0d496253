// What the Python module and the kernels agree on. This header is the only one that every translation unit sees.
//
// Each kernel source is compiled once per instruction set, into a namespace of its own (GOSSAMER_ISA), and module.cpp
// picks a table at import. Two rules keep that sound:
//   * kernels use no standard containers or algorithms: their instantiations are weak symbols, and the linker would be
//     free to keep the AVX-512 copy for everybody;
//   * arguments cross as plain structs of pointers, element strides and sizes. Shapes are checked in Python, values
//     (ranges, row ids, channel ids) here, while they stream past; the result is a Status, never an exception.
#pragma once
#include <cstdint>

namespace gossamer {

// Keep in step with ops/_checks.py.
enum Status : int { kOk = 0, kBadRange = 1, kBadIndex = 2, kBadCount = 3, kBadChannel = 4, kBadOrder = 5, kBadMerge = 6 };

enum DType : int { kFloat32 = 0, kBFloat16 = 1 };

enum Reduce : int { kNone = 0, kMax = 1, kSum = 2 };

// Row ranges [starts[b], lengths[b]) of B sequences; null means 0 and `rows`.
struct Ranges {
  const int32_t* starts;
  const int32_t* lengths;
  int32_t rows;

  int32_t begin(int64_t b) const { return starts ? starts[b] : 0; }
  int32_t end(int64_t b) const { return lengths ? lengths[b] : rows; }
  bool valid(int64_t batch) const {
    for (int64_t b = 0; b < batch; ++b)
      if (begin(b) < 0 || end(b) < begin(b) || end(b) > rows) return false;
    return true;
  }
};

struct AttentionArgs {
  const void *query, *key, *value;  // [B,H,d], [B,Hkv,S,d] twice
  void* out;                        // [B,H,d], contiguous
  float* lse;                       // [B,H], or null
  float* weights;                   // [B,H,k], what each listed row received, or null
  Ranges ranges;                    // rows = S
  const int32_t* indices;           // [B,Hsel,k], or null for all rows of the range
  const int32_t* counts;            // [B,Hsel], or null for k
  int64_t q_batch, q_head, k_batch, k_head, k_row, v_batch, v_head, v_row;
  int64_t batch, heads, kv_heads, dim;
  int64_t select_heads, k;
  float scale;
  DType dtype;
  int threads;
};

struct LabelCache {
  void* codes;        // [B,Hlab,tiles,r,16] floats or [B,Hlab,tiles,words,16,4] packed
  float *step, *zero;  // [B,Hlab,tiles,16], packed only
  int64_t heads, tiles, r;
  int bits;
  int kind;  // 1, 2, 4, 8: container bits; 16: float32; 17: bfloat16
  int64_t words;
};

struct AppendArgs {
  LabelCache labels;
  const void* key;  // [B,Hkv,T,d]
  const int32_t* channels;  // [Hlab,r]
  int64_t k_batch, k_head, k_row;
  int64_t batch, kv_heads, tokens, dim, start;
  DType dtype;
  int threads;
};

struct ScoreArgs {
  LabelCache labels;
  const void* query;  // [B,H,d]
  const int32_t* channels;
  float* out;  // [B,Hsel,out_row]
  Ranges ranges;  // rows = tokens scored
  int64_t q_batch, q_head;
  int64_t batch, heads, kv_heads, dim;
  int64_t out_row;
  Reduce reduce;
  DType dtype;
  int threads;
};

struct KeyScoreArgs {
  const void *query, *key;  // [B,H,d], [B,Hkv,S,d]
  float* out;               // [B,Hsel,S]
  Ranges ranges;            // rows = S
  int64_t q_batch, q_head, k_batch, k_head, k_row;
  int64_t batch, heads, kv_heads, dim;
  Reduce reduce;
  DType dtype;
  int threads;
};

enum Representative : int { kCenter = 0, kFirst = 1, kLast = 2 };

struct TreeSearchArgs {
  const void *query, *key;  // [B,H,lines,voters,d] contiguous, [B,Hkv,S,d]
  const int32_t* begin;     // [B], first row that is searched
  const int32_t* ends;      // [lines], behind the last one
  int32_t *blocks, *counts;  // [B,H,lines,nodes], [B,H,lines]
  int64_t* evaluations;     // [B,H,lines]
  int64_t k_batch, k_head, k_row;
  int64_t batch, heads, kv_heads, rows, dim;
  int64_t lines, voters, nodes, block, step;
  Representative representative;
  DType dtype;
  int threads;
};

struct SelectArgs {
  const float* scores;  // [B,H,S]
  int32_t *indices, *counts;  // [B,H,k], [B,H]
  Ranges ranges;
  int64_t s_batch, s_head;
  int64_t batch, heads, k;
  int threads;
};

struct LabelAttentionArgs {
  AttentionArgs attention;  // indices and counts are outputs here
  ScoreArgs score;
  int32_t *indices, *counts;
  bool protect_last;
};

struct LinearArgs {
  const void *x, *weight, *bias;  // [M,K], [N,K], [N] or null
  void* out;                      // [M,N], contiguous
  int64_t x_row, w_row;
  int64_t rows, columns, outputs;  // M, K, N
  DType dtype;
  int threads;
};

// Nodes of a tree of candidates: the last rows of the cache.
struct TreeArgs {
  const void *query, *key, *value;  // [B,H,n,d], [B,Hkv,n,d] twice: rows of the nodes alone
  void* out;                        // [B,H,n,d], contiguous: what the nodes saw of the rows before; then of all
  const float* lse;                 // [B,H,n], of what they saw
  const uint8_t* mask;              // [n,n], contiguous: whether a node sees another, itself included
  int64_t q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row;
  int64_t batch, heads, kv_heads, nodes, dim;
  float scale;
  DType dtype;
  int threads;
};

enum Activation : int { kSilu = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3 };

// A gated MLP over `neurons` neurons, each with one row of `channels` weights in gate, up and down.
struct SparseMlpArgs {
  struct Matrix {
    const void *weight, *bias;  // [D,d]; [D], for down [d], or null
    const float* scale;         // [D] of int8 weights, else null
    int64_t row;
  };
  const void* x;  // [M,d]
  void* out;      // [M,d], contiguous
  Matrix gate, up, down;
  const float* threshold;      // [1] or [D], or null
  const int32_t* indices;      // [count], or null
  int64_t* counts;             // [M + 1]
  int64_t x_row, rows, channels, neurons;
  int64_t threshold_step;      // 0: one threshold for all
  int64_t count;               // of the indices, or of the largest gates that are kept; unused with thresholds
  Activation activation;
  DType dtype;                 // of x, out and biases; of the weights where `int8` is false
  bool int8;
  int threads;
};

enum SparseFormat : int { kBlock4x1 = 0, kBlock1x4 = 1, kCsr = 2, kBitmask = 3, kStream = 4 };

// A weight without its zeros (layout: ops/sparse_formats.py).
struct SparseLinearArgs {
  const void *x, *bias, *added;  // [N,K], or uint8 where raw; [M] or null; [N,M] or null
  void* out;                     // [N,M], contiguous; int32 where raw
  const void* values;
  const uint16_t* columns;  // of blocks; null where masks or offsets say it
  const int32_t* pointers;  // null: each row keeps kept_per_row
  const uint64_t* masks;    // [M,ceil(K/64)]
  const uint8_t *offsets, *counts;  // [n], [M,groups]
  const float* scale;       // [M] with int8
  const int32_t* sums;      // [M] with int8
  const float *act_scale, *act_zero;  // [1], or null for scales of each token
  int64_t x_row, added_row;
  int64_t tokens, inputs, outputs;  // N, K, M
  int64_t kept_per_row;
  int64_t multiplied;  // weights that are stored
  SparseFormat format;
  int activation;  // an Activation, or -1
  bool int8, raw;
  DType dtype;  // of x, bias, added, out; and of the values where they are not int8
  int threads;
};

struct ChannelSparseArgs {
  const void *x, *weight, *bias;  // [M,K], [K,N], [N] or null
  const float *threshold, *scale;  // [K] or one, or null for 0; [K] or null
  void* out;                       // [M,N], contiguous
  int64_t* counts;                 // [M+1], or null
  int64_t x_row, w_row;
  int64_t rows, columns, outputs;  // M, K, N
  bool per_channel, int8;
  DType dtype;  // of x, and of the weight unless that is int8
  int threads;
};

struct DeltaArgs {
  const void* codes;   // [M,K] int32 or int16
  void* previous;      // [M,K] of the same
  const void* weight;  // [K,N]
  const float* step;   // [K], or one
  float* out;          // [M,N]
  int32_t* counts;     // [M]
  int64_t codes_row, previous_row, w_row, out_row;
  int64_t rows, columns, outputs;  // M, K, N
  int code_bytes;
  bool per_channel;
  DType dtype;
  int threads;
};

struct AttentionRowArgs {
  AttentionArgs attention;  // indices unused; value and out null where only the row is wanted
  float* row;               // [B,Hkv,row_line] of which S are written
  int64_t row_line;
};

struct AttentionColumnsArgs {
  const void *query, *key;  // [B,H,T,d], [B,Hkv,S,d]
  const float* weights;     // [B,T], in the order of positions
  const int32_t* starts;    // [B], or null
  const int32_t* positions;  // [T], ascending
  const int32_t* order;      // [T], the query row at each of them, or null for 0 .. T-1
  float* out;                // [B,Hkv,S]
  int64_t q_batch, q_head, q_row, k_batch, k_head, k_row;
  int64_t batch, heads, kv_heads, rows, length, dim;
  int64_t window;  // 0: none
  bool causal;
  float scale;
  DType dtype;
  int threads;
};

struct CompactArgs {
  void* storage;    // [B,H,capacity] rows of row_bytes
  const void* ids;  // [B,H,kept], ascending
  int64_t s_batch, s_head, s_row, row_bytes;  // in bytes
  int64_t batch, heads, kept, length;
  int id_size;  // 4 or 8
  int threads;
};

struct MergeArgs {
  void* data;                         // [B,H,S,d]
  const float* scores;                // [B,H,S]
  const int32_t *sources, *targets;   // [B,H,count]
  float* out;                         // [B,H,S], a copy of scores
  int64_t s_batch, s_head, s_row;
  int64_t batch, heads, rows, dim, count;
  bool keep_norm;
  DType dtype;
  int threads;
};

// Attention of a prompt over blocks of keys, or over columns and diagonals; queries are the last T of the S positions.
struct PrefillArgs {
  const void *query, *key, *value;  // [B,H,T,d], [B,Hkv,S,d] twice
  void* out;                        // [B,H,T,d], contiguous
  float* lse;                       // [B,H,T], or null
  const int32_t* starts;            // [B], or null for 0
  int64_t q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row;
  int64_t batch, heads, kv_heads, queries, rows, dim;
  int64_t block_size;
  int64_t window;  // last positions that each query reads whatever is chosen; 0 for none
  float scale;
  DType dtype;
  int threads;
};

struct BlockSparseArgs {
  PrefillArgs prefill;
  const bool* mask;       // [B,Hsel,nq,nk], or null: then
  const int32_t* blocks;  // [B,Hsel,nq,k], the ids of the first
  const int32_t* counts;  // [B,Hsel,nq]
  int64_t b_batch, b_head, b_row;  // strides of mask or blocks
  int64_t select_heads, columns;   // columns: nk or k
  int64_t key_block_size;
};

struct VerticalSlashArgs {
  PrefillArgs prefill;  // of an index, only sizes
  const int32_t *verticals, *slashes;  // [B,H,kv], [B,H,ks]
  int64_t vertical_count, slash_count;
  int32_t *ranges, *range_counts, *columns, *column_counts;  // outputs of an index: [B,H,nb,R], [B,H,nb], [B,H,nb,kv], [B,H,nb]
  int64_t max_ranges;
};

struct MatchArgs {
  const void *key, *value;                        // [B,H,S,dk], [B,H,S,dv]
  const int32_t *source_ids, *centre_ids;         // [B,H,sources], [B,H,centres]; -1: no row
  int32_t* out;                                   // [B,H,sources]
  int64_t k_batch, k_head, k_row, v_batch, v_head, v_row;
  int64_t batch, heads, rows, key_dim, value_dim, sources, centres;
  float tau;
  DType dtype;
  int threads;
};

// Keys or values as codes (layout: ops/quantized_kv.py).
struct QuantizedRows {
  const uint8_t* codes;      // [B,Hkv,S,bytes]
  const void *step, *zero;   // [B,Hkv,S], or [B,Hkv,groups,d] with a group
  int64_t c_batch, c_head, c_row, s_batch, s_head, s_row;
  int64_t group;  // rows that share the scales of a channel; 0: scales per row
  int bits;
};

struct QuantizedArgs {
  AttentionArgs attention;  // its key and value are the rows from `split` on
  QuantizedRows key, value;
  int64_t split;
  DType scales;
};

struct PooledArgs {
  const void *query, *key;  // [B,H,T,d], [B,Hkv,S,d]
  float* out;               // [B,H,ceil(T/block),ceil(S/key_block)], contiguous, zeros
  const int32_t* starts;    // [B], or null
  int64_t q_batch, q_head, q_row, k_batch, k_head, k_row;
  int64_t batch, heads, kv_heads, rows, length, dim, block, key_block;
  float scale;
  DType dtype;
  int threads;
};

struct Kernels {
  const char* name;
  Status (*decode_attention)(const AttentionArgs&);
  Status (*append_labels)(const AppendArgs&);
  Status (*label_scores)(const ScoreArgs&);
  Status (*key_scores)(const KeyScoreArgs&);
  Status (*tree_search)(const TreeSearchArgs&);
  Status (*select_topk)(const SelectArgs&);
  Status (*label_attention)(const LabelAttentionArgs&);
  Status (*linear)(const LinearArgs&);
  Status (*sparse_mlp)(const SparseMlpArgs&);
  Status (*tree_attention)(const TreeArgs&);
  Status (*delta_linear)(const DeltaArgs&);
  Status (*channel_sparse_linear)(const ChannelSparseArgs&);
  Status (*sparse_linear)(const SparseLinearArgs&);
  float (*read_all)(const float*, int64_t, int);
  Status (*attention_row)(const AttentionRowArgs&);
  Status (*attention_columns)(const AttentionColumnsArgs&);
  Status (*compact_rows)(const CompactArgs&);
  Status (*merge_rows)(const MergeArgs&);
  Status (*block_sparse_attention)(const BlockSparseArgs&);
  Status (*vertical_slash_attention)(const VerticalSlashArgs&);
  Status (*vertical_slash_index)(const VerticalSlashArgs&);
  Status (*best_match)(const MatchArgs&);
  Status (*quantized_attention)(const QuantizedArgs&);
  Status (*pooled_attention)(const PooledArgs&);
};

#define GOSSAMER_DECLARE_KERNELS(isa)                      \
  namespace isa {                                          \
  Status decode_attention(const AttentionArgs&);           \
  Status append_labels(const AppendArgs&);                 \
  Status label_scores(const ScoreArgs&);                   \
  Status key_scores(const KeyScoreArgs&);                  \
  Status tree_search(const TreeSearchArgs&);               \
  Status select_topk(const SelectArgs&);                   \
  Status label_attention(const LabelAttentionArgs&);       \
  Status linear(const LinearArgs&);                        \
  Status sparse_mlp(const SparseMlpArgs&);                 \
  Status tree_attention(const TreeArgs&);                  \
  Status delta_linear(const DeltaArgs&);                   \
  Status channel_sparse_linear(const ChannelSparseArgs&);  \
  Status sparse_linear(const SparseLinearArgs&);           \
  float read_all(const float* data, int64_t size, int threads); \
  Status attention_row(const AttentionRowArgs&);           \
  Status attention_columns(const AttentionColumnsArgs&);   \
  Status compact_rows(const CompactArgs&);                 \
  Status merge_rows(const MergeArgs&);                     \
  Status block_sparse_attention(const BlockSparseArgs&);   \
  Status vertical_slash_attention(const VerticalSlashArgs&); \
  Status vertical_slash_index(const VerticalSlashArgs&);   \
  Status best_match(const MatchArgs&);                     \
  Status quantized_attention(const QuantizedArgs&);        \
  Status pooled_attention(const PooledArgs&);              \
  }
GOSSAMER_DECLARE_KERNELS(baseline)
GOSSAMER_DECLARE_KERNELS(avx2)
GOSSAMER_DECLARE_KERNELS(avx512)

}  // namespace gossamer
