// The Python face of the kernels. Tensors cross as addresses and strides that ops/*.py took from torch: a handful of
// integers costs a fraction of a DLPack exchange, and every shape was checked there. Calls run without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;

namespace gossamer {
namespace {

#define GOSSAMER_TABLE(isa)                                     \
  Kernels {                                                     \
    .name = #isa,                                               \
    .decode_attention = isa::decode_attention,                  \
    .append_labels = isa::append_labels,                        \
    .label_scores = isa::label_scores,                          \
    .key_scores = isa::key_scores,                              \
    .tree_search = isa::tree_search,                            \
    .select_topk = isa::select_topk,                            \
    .label_attention = isa::label_attention,                    \
    .linear = isa::linear,                                      \
    .sparse_mlp = isa::sparse_mlp,                              \
    .tree_attention = isa::tree_attention,                      \
    .delta_linear = isa::delta_linear,                          \
    .channel_sparse_linear = isa::channel_sparse_linear,        \
    .sparse_linear = isa::sparse_linear,                        \
    .read_all = isa::read_all,                                  \
    .attention_row = isa::attention_row,                        \
    .attention_columns = isa::attention_columns,                \
    .compact_rows = isa::compact_rows,                          \
    .merge_rows = isa::merge_rows,                              \
    .block_sparse_attention = isa::block_sparse_attention,      \
    .vertical_slash_attention = isa::vertical_slash_attention,  \
    .vertical_slash_index = isa::vertical_slash_index,          \
    .best_match = isa::best_match,                              \
    .quantized_attention = isa::quantized_attention,            \
    .pooled_attention = isa::pooled_attention,                  \
  }

// Slowest first; only what this processor can run.
std::vector<Kernels> runnable() {
  std::vector<Kernels> tables{GOSSAMER_TABLE(baseline)};
#if defined(GOSSAMER_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(GOSSAMER_TABLE(avx2));
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
    tables.push_back(GOSSAMER_TABLE(avx512));
#endif
  return tables;
}

const std::vector<Kernels>& tables() {
  static const std::vector<Kernels> all = runnable();
  return all;
}

const Kernels* active = nullptr;

std::string set_isa(const std::string& name) {
  for (const Kernels& table : tables())
    if (name == table.name) active = &table;
  return active->name;
}

// A tuple of integers read in order.
class Reader {
 public:
  explicit Reader(const nb::tuple& tuple) : tuple_(tuple) {}
  int64_t next() {
    const int64_t value = PyLong_AsLongLong(PyTuple_GetItem(tuple_.ptr(), at_++));
    if (value == -1 && PyErr_Occurred()) throw nb::python_error();
    return value;
  }
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(next());
  }

 private:
  const nb::tuple& tuple_;
  Py_ssize_t at_ = 0;
};

// A thread is worth waking for this many bytes: it reads them from memory in the time that a team takes to meet.
constexpr int64_t kBytesPerThread = 1 << 17;

int team(int threads, int64_t bytes) {
  const int64_t useful = bytes / kBytesPerThread + 1;
  return useful < threads ? int(useful) : threads;
}

int element_size(DType dtype) { return dtype == kBFloat16 ? 2 : 4; }

int64_t label_bytes(const LabelCache& c, int64_t batch, int64_t tokens) {
  const int64_t token = c.kind <= 8 ? c.words * 4 + 8 : c.r * (c.kind == 16 ? 4 : 2);
  return batch * c.heads * tokens * token;
}

// What an attention call reads: rows of a dense range, or at most the listed ones.
int64_t row_bytes(const AttentionArgs& a, bool listed) {
  const int64_t rows = listed ? a.select_heads * a.k : a.kv_heads * a.ranges.rows;
  return a.batch * rows * a.dim * 2 * element_size(a.dtype);
}

template <class Args>
int call(Status (*kernel)(const Args&), const Args& args) {
  nb::gil_scoped_release release;
  return kernel(args);
}

LabelCache label_cache(const nb::tuple& pointers, const nb::tuple& description) {
  Reader p(pointers), d(description);
  LabelCache c{};
  c.codes = p.pointer<void>(), c.step = p.pointer<float>(), c.zero = p.pointer<float>();
  c.heads = d.next(), c.tiles = d.next(), c.r = d.next(), c.bits = int(d.next()), c.kind = int(d.next()), c.words = d.next();
  return c;
}

void read_strides(Reader r, AttentionArgs& a) {
  a.q_batch = r.next(), a.q_head = r.next();
  a.k_batch = r.next(), a.k_head = r.next(), a.k_row = r.next();
  a.v_batch = r.next(), a.v_head = r.next(), a.v_row = r.next();
}

void read_sizes(Reader r, AttentionArgs& a) {
  a.batch = r.next(), a.heads = r.next(), a.kv_heads = r.next(), a.ranges.rows = int32_t(r.next()), a.dim = r.next();
}

int decode_attention(nb::tuple tensors, nb::tuple optional, nb::tuple strides, nb::tuple sizes, nb::tuple selection,
                     float scale, int dtype, int threads) {
  AttentionArgs a{};
  Reader t(tensors), o(optional), s(selection);
  a.query = t.pointer<void>(), a.key = t.pointer<void>(), a.value = t.pointer<void>();
  a.out = t.pointer<void>(), a.lse = t.pointer<float>();
  a.ranges.starts = o.pointer<int32_t>(), a.ranges.lengths = o.pointer<int32_t>();
  a.indices = o.pointer<int32_t>(), a.counts = o.pointer<int32_t>();
  read_strides(Reader(strides), a);
  read_sizes(Reader(sizes), a);
  a.select_heads = s.next(), a.k = s.next();
  static const int32_t nothing = 0;  // an empty selection has no address, but isn't the absence of one
  if (a.select_heads && !a.indices) a.indices = &nothing;
  a.scale = scale, a.dtype = DType(dtype), a.threads = team(threads, row_bytes(a, a.indices));
  return call(active->decode_attention, a);
}

// As decode_attention with listed rows, and the weight that each of them received.
int decode_attention_weights(nb::tuple tensors, nb::tuple optional, nb::tuple strides, nb::tuple sizes,
                             nb::tuple selection, float scale, int dtype, int threads) {
  AttentionArgs a{};
  Reader t(tensors), o(optional), s(selection);
  a.query = t.pointer<void>(), a.key = t.pointer<void>(), a.value = t.pointer<void>();
  a.out = t.pointer<void>(), a.weights = t.pointer<float>();
  a.indices = o.pointer<int32_t>(), a.counts = o.pointer<int32_t>();
  read_strides(Reader(strides), a);
  read_sizes(Reader(sizes), a);
  a.select_heads = s.next(), a.k = s.next();
  a.scale = scale, a.dtype = DType(dtype), a.threads = team(threads, row_bytes(a, true));
  return call(active->decode_attention, a);
}

int append_labels(nb::tuple cache, nb::tuple description, nb::tuple tensors, nb::tuple strides, nb::tuple sizes,
                  int dtype, int threads) {
  AppendArgs a{};
  Reader t(tensors), r(strides), s(sizes);
  a.labels = label_cache(cache, description);
  a.key = t.pointer<void>(), a.channels = t.pointer<int32_t>();
  a.k_batch = r.next(), a.k_head = r.next(), a.k_row = r.next();
  a.batch = s.next(), a.kv_heads = s.next(), a.tokens = s.next(), a.dim = s.next(), a.start = s.next();
  a.dtype = DType(dtype), a.threads = threads;
  return call(active->append_labels, a);
}

int label_scores(nb::tuple cache, nb::tuple description, nb::tuple tensors, nb::tuple strides, nb::tuple sizes,
                 int reduce, int dtype, int threads) {
  ScoreArgs a{};
  Reader t(tensors), r(strides), s(sizes);
  a.labels = label_cache(cache, description);
  a.query = t.pointer<void>(), a.channels = t.pointer<int32_t>(), a.out = t.pointer<float>();
  a.ranges.starts = t.pointer<int32_t>(), a.ranges.lengths = t.pointer<int32_t>();
  a.q_batch = r.next(), a.q_head = r.next();
  a.batch = s.next(), a.heads = s.next(), a.kv_heads = s.next(), a.dim = s.next(), a.out_row = s.next();
  a.ranges.rows = int32_t(a.out_row);
  a.reduce = Reduce(reduce), a.dtype = DType(dtype);
  a.threads = team(threads, label_bytes(a.labels, a.batch, a.out_row));
  return call(active->label_scores, a);
}

int key_scores(nb::tuple tensors, nb::tuple strides, nb::tuple sizes, int reduce, int dtype, int threads) {
  KeyScoreArgs a{};
  Reader t(tensors), r(strides), s(sizes);
  a.query = t.pointer<void>(), a.key = t.pointer<void>(), a.out = t.pointer<float>();
  a.ranges.starts = t.pointer<int32_t>(), a.ranges.lengths = t.pointer<int32_t>();
  a.q_batch = r.next(), a.q_head = r.next(), a.k_batch = r.next(), a.k_head = r.next(), a.k_row = r.next();
  a.batch = s.next(), a.heads = s.next(), a.kv_heads = s.next(), a.ranges.rows = int32_t(s.next()), a.dim = s.next();
  a.reduce = Reduce(reduce), a.dtype = DType(dtype);
  a.threads = team(threads, a.batch * a.kv_heads * a.ranges.rows * a.dim * element_size(a.dtype));
  return call(active->key_scores, a);
}

int tree_search(nb::tuple tensors, nb::tuple strides, nb::tuple sizes, nb::tuple search, int dtype, int threads) {
  TreeSearchArgs a{};
  Reader t(tensors), r(strides), s(sizes), how(search);
  a.query = t.pointer<void>(), a.key = t.pointer<void>(), a.begin = t.pointer<int32_t>(), a.ends = t.pointer<int32_t>();
  a.blocks = t.pointer<int32_t>(), a.counts = t.pointer<int32_t>(), a.evaluations = t.pointer<int64_t>();
  a.k_batch = r.next(), a.k_head = r.next(), a.k_row = r.next();
  a.batch = s.next(), a.heads = s.next(), a.kv_heads = s.next(), a.rows = s.next(), a.dim = s.next();
  a.lines = how.next(), a.voters = how.next(), a.nodes = how.next(), a.block = how.next(), a.step = how.next();
  a.representative = Representative(how.next());
  a.dtype = DType(dtype), a.threads = threads < 64 ? threads : 64;
  return call(active->tree_search, a);
}

int select_topk(nb::tuple tensors, nb::tuple strides, nb::tuple sizes, int threads) {
  SelectArgs a{};
  Reader t(tensors), r(strides), s(sizes);
  a.scores = t.pointer<float>(), a.indices = t.pointer<int32_t>(), a.counts = t.pointer<int32_t>();
  a.ranges.starts = t.pointer<int32_t>(), a.ranges.lengths = t.pointer<int32_t>();
  a.s_batch = r.next(), a.s_head = r.next();
  a.batch = s.next(), a.heads = s.next(), a.ranges.rows = int32_t(s.next()), a.k = s.next();
  a.threads = team(threads, a.batch * a.heads * a.ranges.rows * 4);
  return call(active->select_topk, a);
}

// Completes the scoring arguments from those of the attention, which are the same tensors.
int attend_labels(LabelAttentionArgs& args, int threads) {
  AttentionArgs& a = args.attention;
  ScoreArgs& s = args.score;
  a.select_heads = s.reduce == kNone ? a.heads : a.kv_heads;
  a.indices = args.indices, a.counts = args.counts;
  s.query = a.query, s.ranges = a.ranges, s.q_batch = a.q_batch, s.q_head = a.q_head;
  s.batch = a.batch, s.heads = a.heads, s.kv_heads = a.kv_heads, s.dim = a.dim, s.dtype = a.dtype;
  a.threads = s.threads = team(threads, row_bytes(a, true) + label_bytes(s.labels, a.batch, a.ranges.rows));
  return call(active->label_attention, args);
}

int label_attention(nb::tuple cache, nb::tuple description, nb::tuple tensors, nb::tuple integers, nb::tuple strides,
                    nb::tuple sizes, int64_t k, float scale, int reduce, bool protect_last, int dtype, int threads) {
  LabelAttentionArgs args{};
  AttentionArgs& a = args.attention;
  Reader t(tensors), i(integers);
  args.score.labels = label_cache(cache, description);
  a.query = t.pointer<void>(), a.key = t.pointer<void>(), a.value = t.pointer<void>(), a.out = t.pointer<void>();
  args.score.channels = t.pointer<int32_t>();
  args.indices = i.pointer<int32_t>(), args.counts = i.pointer<int32_t>();
  a.ranges.starts = i.pointer<int32_t>(), a.ranges.lengths = i.pointer<int32_t>();
  read_strides(Reader(strides), a);
  read_sizes(Reader(sizes), a);
  a.k = k, a.scale = scale, a.dtype = DType(dtype);
  args.score.reduce = Reduce(reduce), args.protect_last = protect_last;
  return attend_labels(args, threads);
}

// Attention over one layer's cache, with all that stays the same from step to step unpacked once (ops/prepared.py).
class Prepared {
 public:
  Prepared(nb::tuple tensors, nb::tuple strides, nb::tuple sizes, int dtype) {
    Reader t(tensors);
    a_.key = t.pointer<void>(), a_.value = t.pointer<void>();
    read_strides(Reader(strides), a_);
    read_sizes(Reader(sizes), a_);
    a_.dtype = DType(dtype);
  }

  // Adds a label cache, for attend_labels.
  void set_labels(nb::tuple cache, nb::tuple description, intptr_t channels, int reduce, bool protect_last) {
    labels_ = {a_};
    labels_.score.labels = label_cache(cache, description);
    labels_.score.channels = reinterpret_cast<const int32_t*>(channels);
    labels_.score.reduce = Reduce(reduce), labels_.protect_last = protect_last;
  }

  // All rows of the range, or those listed. Returns how many were listed, or minus a status.
  int64_t attend(intptr_t query, int64_t q_batch, int64_t q_head, int64_t heads, intptr_t out, intptr_t starts, int32_t length,
             intptr_t indices, intptr_t counts, int64_t select_heads, int64_t k, float scale, int threads) const {
    AttentionArgs a = a_;
    set(a, query, q_batch, q_head, heads, out, starts, length, scale);
    a.indices = reinterpret_cast<const int32_t*>(indices), a.counts = reinterpret_cast<const int32_t*>(counts);
    a.select_heads = select_heads, a.k = k;
    a.threads = team(threads, row_bytes(a, a.indices));
    const int status = call(active->decode_attention, a);
    return status ? -status : a.indices ? total(a.counts, a.batch * select_heads) : 0;
  }

  // Listed rows, and the weight [B,H,k] of each. Returns how many were listed, or minus a status.
  int64_t attend_weights(intptr_t query, int64_t q_batch, int64_t q_head, int64_t heads, intptr_t out, intptr_t weights,
                         int32_t length, intptr_t indices, intptr_t counts, int64_t select_heads, int64_t k, float scale,
                         int threads) const {
    AttentionArgs a = a_;
    set(a, query, q_batch, q_head, heads, out, 0, length, scale);
    a.weights = reinterpret_cast<float*>(weights);
    a.indices = reinterpret_cast<const int32_t*>(indices), a.counts = reinterpret_cast<const int32_t*>(counts);
    a.select_heads = select_heads, a.k = k;
    a.threads = team(threads, row_bytes(a, true));
    const int status = call(active->decode_attention, a);
    return status ? -status : total(a.counts, a.batch * select_heads);
  }

  // The nodes of a tree, whose rows are the last ones of the range; queries stand as [B, heads, nodes, d] without gaps. The rows
  // before are read by all nodes of a group together, then what the nodes see of each other is merged in.
  int64_t attend_tree(intptr_t query, int64_t heads, int64_t nodes, intptr_t out, intptr_t lse, intptr_t mask, int32_t length,
                      float scale, int threads) const {
    AttentionArgs a = a_;
    const int64_t past = length - nodes, lines = heads * nodes;
    set(a, query, lines * a.dim, a.dim, lines, out, 0, int32_t(past), scale);
    a.lse = reinterpret_cast<float*>(lse);
    a.threads = team(threads, row_bytes(a, false));
    if (const int status = call(active->decode_attention, a)) return -status;
    TreeArgs t{};
    const auto behind = [&](const void* rows, int64_t row) {
      return static_cast<const char*>(rows) + past * row * element_size(a.dtype);
    };
    t.query = a.query, t.key = behind(a.key, a.k_row), t.value = behind(a.value, a.v_row), t.out = a.out, t.lse = a.lse;
    t.mask = reinterpret_cast<const uint8_t*>(mask);
    t.q_batch = lines * a.dim, t.q_head = nodes * a.dim, t.q_row = a.dim;
    t.k_batch = a.k_batch, t.k_head = a.k_head, t.k_row = a.k_row;
    t.v_batch = a.v_batch, t.v_head = a.v_head, t.v_row = a.v_row;
    t.batch = a.batch, t.heads = heads, t.kv_heads = a.kv_heads, t.nodes = nodes, t.dim = a.dim;
    t.scale = scale, t.dtype = a.dtype;
    t.threads = team(threads, t.batch * heads * nodes * nodes * t.dim);
    return -call(active->tree_attention, t);
  }

  // Writes the labels of rows [from, to), then scores, selects and attends. Returns how many rows were attended,
  // over all selections, or minus a status.
  int64_t attend_labels(intptr_t query, int64_t q_batch, int64_t q_head, int64_t heads, intptr_t out, intptr_t starts,
                    int32_t length, intptr_t indices, intptr_t counts, int64_t k, float scale, int64_t from, int64_t to,
                    int threads) const {
    LabelAttentionArgs args = labels_;
    if (from < to) {
      const char* key = static_cast<const char*>(a_.key) + from * a_.k_row * element_size(a_.dtype);
      const AppendArgs append{args.score.labels, key, args.score.channels, a_.k_batch, a_.k_head, a_.k_row, a_.batch,
                              a_.kv_heads, to - from, a_.dim, from, a_.dtype, threads};
      if (const int status = call(active->append_labels, append)) return -status;
    }
    set(args.attention, query, q_batch, q_head, heads, out, starts, length, scale);
    args.indices = reinterpret_cast<int32_t*>(indices), args.counts = reinterpret_cast<int32_t*>(counts);
    args.attention.k = k;
    const int status = gossamer::attend_labels(args, threads);
    return status ? -status : total(args.counts, a_.batch * args.attention.select_heads);
  }

 private:
  static int64_t total(const int32_t* counts, int64_t lines) {
    int64_t sum = 0;
    for (int64_t i = 0; i < lines; ++i) sum += counts[i];
    return sum;
  }

  static void set(AttentionArgs& a, intptr_t query, int64_t q_batch, int64_t q_head, int64_t heads, intptr_t out,
                  intptr_t starts, int32_t length, float scale) {
    a.query = reinterpret_cast<const void*>(query), a.out = reinterpret_cast<void*>(out);
    a.q_batch = q_batch, a.q_head = q_head, a.heads = heads;
    a.ranges = {reinterpret_cast<const int32_t*>(starts), nullptr, length};
    a.scale = scale;
  }

  AttentionArgs a_{};
  LabelAttentionArgs labels_{};
};

// Attention over quantised rows of one layer, with all that stays the same from step to step unpacked once.
class QuantizedPrepared {
 public:
  // tensors: key codes, step, zero, value codes, step, zero, recent key, recent value; strides: three of the codes and of
  // the scales for each, then three of each of the recent; sizes: B, Hkv, d; kinds: bits and group for each.
  QuantizedPrepared(nb::tuple tensors, nb::tuple strides, nb::tuple sizes, nb::tuple kinds, int dtype, int scales) {
    Reader t(tensors), r(strides), s(sizes), k(kinds);
    for (QuantizedRows* rows : {&q_.key, &q_.value}) {
      rows->codes = t.pointer<uint8_t>(), rows->step = t.pointer<void>(), rows->zero = t.pointer<void>();
      rows->c_batch = r.next(), rows->c_head = r.next(), rows->c_row = r.next();
      rows->s_batch = r.next(), rows->s_head = r.next(), rows->s_row = r.next();
      rows->bits = int(k.next()), rows->group = k.next();
    }
    AttentionArgs& a = q_.attention;
    a.key = t.pointer<void>(), a.value = t.pointer<void>();
    a.k_batch = r.next(), a.k_head = r.next(), a.k_row = r.next();
    a.v_batch = r.next(), a.v_head = r.next(), a.v_row = r.next();
    a.batch = s.next(), a.kv_heads = s.next(), a.dim = s.next();
    a.dtype = DType(dtype), q_.scales = DType(scales);
  }

  // All rows of the range, or those listed. Returns how many were listed, or minus a status.
  int64_t attend(intptr_t query, int64_t q_batch, int64_t q_head, int64_t heads, intptr_t out, intptr_t lse, intptr_t starts,
                 intptr_t lengths, int32_t rows, int64_t split, nb::tuple chosen, float scale, int threads) const {
    QuantizedArgs q = q_;
    AttentionArgs& a = q.attention;
    Reader c(chosen);
    a.query = reinterpret_cast<const void*>(query), a.out = reinterpret_cast<void*>(out), a.lse = reinterpret_cast<float*>(lse);
    a.q_batch = q_batch, a.q_head = q_head, a.heads = heads;
    a.ranges = {reinterpret_cast<const int32_t*>(starts), reinterpret_cast<const int32_t*>(lengths), rows};
    a.indices = c.pointer<int32_t>(), a.counts = c.pointer<int32_t>(), a.select_heads = c.next(), a.k = c.next();
    static const int32_t nothing = 0;
    if (a.select_heads && !a.indices) a.indices = &nothing;
    a.scale = scale, q.split = split;
    a.threads = team(threads, row_bytes(a, a.indices) / (8 * element_size(a.dtype)) * (q.key.bits + q.value.bits) / 2);
    const int status = call(active->quantized_attention, q);
    if (status) return -status;
    int64_t sum = 0;
    if (a.indices && a.counts)
      for (int64_t i = 0; i < a.batch * a.select_heads; ++i) sum += a.counts[i];
    return sum;
  }

 private:
  QuantizedArgs q_{};
};

int linear(intptr_t x, int64_t x_row, intptr_t weight, int64_t w_row, intptr_t bias, intptr_t out, int64_t rows,
           int64_t columns, int64_t outputs, int dtype, int threads) {
  LinearArgs a{reinterpret_cast<const void*>(x),    reinterpret_cast<const void*>(weight),
               reinterpret_cast<const void*>(bias), reinterpret_cast<void*>(out),
               x_row, w_row, rows, columns, outputs, DType(dtype), threads};
  a.threads = team(threads, columns * outputs * element_size(a.dtype));
  return call(active->linear, a);
}

int sparse_mlp(nb::tuple tensors, nb::tuple sizes, intptr_t x, intptr_t out, intptr_t counts, intptr_t threshold,
               int64_t threshold_step, intptr_t indices, int64_t count, int64_t rows, int threads) {
  SparseMlpArgs a{};
  Reader t(tensors), s(sizes);
  for (SparseMlpArgs::Matrix* m : {&a.gate, &a.up, &a.down})
    m->weight = t.pointer<void>(), m->bias = t.pointer<void>(), m->scale = t.pointer<float>(), m->row = s.next();
  a.neurons = s.next(), a.channels = s.next(), a.activation = Activation(s.next()), a.dtype = DType(s.next());
  a.int8 = s.next() != 0;
  a.x = reinterpret_cast<const void*>(x), a.out = reinterpret_cast<void*>(out);
  a.counts = reinterpret_cast<int64_t*>(counts), a.threshold = reinterpret_cast<const float*>(threshold);
  a.indices = reinterpret_cast<const int32_t*>(indices);
  a.x_row = a.channels, a.threshold_step = threshold_step, a.count = count, a.rows = rows;
  a.threads = team(threads, 2 * a.channels * (indices ? count : a.neurons) * (a.int8 ? 1 : element_size(a.dtype)));
  return call(active->sparse_mlp, a);
}

int delta_linear(nb::tuple tensors, nb::tuple strides, nb::tuple sizes, int code_bytes, bool per_channel, int dtype,
                 int threads) {
  DeltaArgs a{};
  Reader t(tensors), r(strides), s(sizes);
  a.codes = t.pointer<void>(), a.previous = t.pointer<void>(), a.weight = t.pointer<void>();
  a.step = t.pointer<float>(), a.out = t.pointer<float>(), a.counts = t.pointer<int32_t>();
  a.codes_row = r.next(), a.previous_row = r.next(), a.w_row = r.next(), a.out_row = r.next();
  a.rows = s.next(), a.columns = s.next(), a.outputs = s.next();
  a.code_bytes = code_bytes, a.per_channel = per_channel, a.dtype = DType(dtype), a.threads = threads;
  return call(active->delta_linear, a);
}

int channel_sparse_linear(nb::tuple tensors, nb::tuple sizes, bool per_channel, bool int8, int dtype, int threads) {
  ChannelSparseArgs a{};
  Reader t(tensors), s(sizes);
  a.x = t.pointer<void>(), a.weight = t.pointer<void>(), a.threshold = t.pointer<float>(), a.bias = t.pointer<void>();
  a.scale = t.pointer<float>(), a.counts = t.pointer<int64_t>(), a.out = t.pointer<void>();
  a.x_row = s.next(), a.w_row = s.next(), a.rows = s.next(), a.columns = s.next(), a.outputs = s.next();
  a.per_channel = per_channel, a.int8 = int8, a.dtype = DType(dtype), a.threads = threads;
  return call(active->channel_sparse_linear, a);
}

int sparse_linear(nb::tuple weight, nb::tuple description, nb::tuple tensors, nb::tuple sizes, int threads) {
  SparseLinearArgs a{};
  Reader w(weight), d(description), t(tensors), s(sizes);
  a.values = w.pointer<void>(), a.columns = w.pointer<uint16_t>(), a.pointers = w.pointer<int32_t>();
  a.masks = w.pointer<uint64_t>(), a.offsets = w.pointer<uint8_t>(), a.counts = w.pointer<uint8_t>();
  a.scale = w.pointer<float>(), a.sums = w.pointer<int32_t>(), a.act_scale = w.pointer<float>();
  a.act_zero = w.pointer<float>();
  a.outputs = d.next(), a.inputs = d.next(), a.format = SparseFormat(d.next()), a.kept_per_row = d.next();
  a.int8 = d.next() != 0;
  a.multiplied = d.next();
  a.x = t.pointer<void>(), a.bias = t.pointer<void>(), a.added = t.pointer<void>(), a.out = t.pointer<void>();
  a.x_row = s.next(), a.added_row = s.next(), a.tokens = s.next(), a.activation = int(s.next());
  a.raw = s.next() != 0, a.dtype = DType(s.next());
  // A vector of products costs about what four bytes from memory do.
  a.threads = team(threads, a.multiplied * (4 + a.tokens / 4));
  return call(active->sparse_linear, a);
}

int tree_attention(nb::tuple tensors, nb::tuple strides, nb::tuple sizes, float scale, int dtype, int threads) {
  TreeArgs a{};
  Reader t(tensors), r(strides), s(sizes);
  a.query = t.pointer<void>(), a.key = t.pointer<void>(), a.value = t.pointer<void>(), a.out = t.pointer<void>();
  a.lse = t.pointer<float>(), a.mask = t.pointer<uint8_t>();
  a.q_batch = r.next(), a.q_head = r.next(), a.q_row = r.next();
  a.k_batch = r.next(), a.k_head = r.next(), a.k_row = r.next();
  a.v_batch = r.next(), a.v_head = r.next(), a.v_row = r.next();
  a.batch = s.next(), a.heads = s.next(), a.kv_heads = s.next(), a.nodes = s.next(), a.dim = s.next();
  a.scale = scale, a.dtype = DType(dtype);
  a.threads = team(threads, a.batch * a.heads * a.nodes * a.nodes * a.dim);
  return call(active->tree_attention, a);
}

int attention_row(nb::tuple tensors, nb::tuple strides, nb::tuple sizes, float scale, int dtype, int threads) {
  AttentionRowArgs args{};
  AttentionArgs& a = args.attention;
  Reader t(tensors), s(sizes);
  a.query = t.pointer<void>(), a.key = t.pointer<void>(), a.value = t.pointer<void>(), a.out = t.pointer<void>();
  args.row = t.pointer<float>(), a.ranges.starts = t.pointer<int32_t>();
  read_strides(Reader(strides), a);
  read_sizes(Reader(sizes), a);
  for (int i = 0; i < 5; ++i) s.next();
  args.row_line = s.next();
  a.scale = scale, a.dtype = DType(dtype);
  a.threads = team(threads, row_bytes(a, false) / (a.value ? 1 : 2));
  return call(active->attention_row, args);
}

int attention_columns(nb::tuple tensors, nb::tuple strides, nb::tuple sizes, float scale, bool causal, int dtype,
                      int threads) {
  AttentionColumnsArgs a{};
  Reader t(tensors), r(strides), s(sizes);
  a.query = t.pointer<void>(), a.key = t.pointer<void>(), a.out = t.pointer<float>(), a.weights = t.pointer<float>();
  a.starts = t.pointer<int32_t>(), a.positions = t.pointer<int32_t>(), a.order = t.pointer<int32_t>();
  a.q_batch = r.next(), a.q_head = r.next(), a.q_row = r.next();
  a.k_batch = r.next(), a.k_head = r.next(), a.k_row = r.next();
  a.batch = s.next(), a.heads = s.next(), a.kv_heads = s.next(), a.rows = s.next(), a.length = s.next();
  a.dim = s.next(), a.window = s.next();
  a.scale = scale, a.causal = causal, a.dtype = DType(dtype);
  a.threads = team(threads, a.batch * a.heads * a.rows * a.length * a.dim / 16);  // about the bytes read in that time
  return call(active->attention_columns, a);
}

int compact_rows(intptr_t storage, intptr_t ids, nb::tuple strides, nb::tuple sizes, int id_size, int threads) {
  CompactArgs a{};
  Reader r(strides), s(sizes);
  a.storage = reinterpret_cast<void*>(storage), a.ids = reinterpret_cast<const void*>(ids);
  a.s_batch = r.next(), a.s_head = r.next(), a.s_row = r.next(), a.row_bytes = r.next();
  a.batch = s.next(), a.heads = s.next(), a.kept = s.next(), a.length = s.next();
  a.id_size = id_size, a.threads = team(threads, a.batch * a.heads * a.kept * a.row_bytes);
  return call(active->compact_rows, a);
}

int merge_rows(nb::tuple tensors, nb::tuple strides, nb::tuple sizes, bool keep_norm, int dtype, int threads) {
  MergeArgs a{};
  Reader t(tensors), r(strides), s(sizes);
  a.data = t.pointer<void>(), a.scores = t.pointer<float>(), a.sources = t.pointer<int32_t>();
  a.targets = t.pointer<int32_t>(), a.out = t.pointer<float>();
  a.s_batch = r.next(), a.s_head = r.next(), a.s_row = r.next();
  a.batch = s.next(), a.heads = s.next(), a.rows = s.next(), a.dim = s.next(), a.count = s.next();
  a.keep_norm = keep_norm, a.dtype = DType(dtype);
  a.threads = team(threads, a.batch * a.heads * (a.rows * 4 + a.count * a.dim * element_size(a.dtype)));
  return call(active->merge_rows, a);
}

PrefillArgs prefill_args(const nb::tuple& tensors, const nb::tuple& strides, const nb::tuple& sizes, float scale, int dtype,
                         int threads) {
  PrefillArgs a{};
  Reader t(tensors), r(strides), s(sizes);
  a.query = t.pointer<void>(), a.key = t.pointer<void>(), a.value = t.pointer<void>();
  a.out = t.pointer<void>(), a.lse = t.pointer<float>(), a.starts = t.pointer<int32_t>();
  a.q_batch = r.next(), a.q_head = r.next(), a.q_row = r.next();
  a.k_batch = r.next(), a.k_head = r.next(), a.k_row = r.next();
  a.v_batch = r.next(), a.v_head = r.next(), a.v_row = r.next();
  a.batch = s.next(), a.heads = s.next(), a.kv_heads = s.next(), a.queries = s.next(), a.rows = s.next();
  a.dim = s.next(), a.block_size = s.next();
  a.scale = scale, a.dtype = DType(dtype), a.threads = threads;
  return a;
}

int block_sparse_attention(nb::tuple tensors, nb::tuple strides, nb::tuple sizes, nb::tuple selection, nb::tuple layout,
                           float scale, int dtype, int threads) {
  BlockSparseArgs a{prefill_args(tensors, strides, sizes, scale, dtype, threads)};
  Reader s(selection), l(layout);
  a.mask = s.pointer<bool>(), a.blocks = s.pointer<int32_t>(), a.counts = s.pointer<int32_t>();
  a.b_batch = l.next(), a.b_head = l.next(), a.b_row = l.next();
  a.select_heads = l.next(), a.columns = l.next(), a.key_block_size = l.next(), a.prefill.window = l.next();
  return call(active->block_sparse_attention, a);
}

int vertical_slash_attention(nb::tuple tensors, nb::tuple strides, nb::tuple sizes, nb::tuple lists, float scale, int dtype,
                             int threads) {
  VerticalSlashArgs a{prefill_args(tensors, strides, sizes, scale, dtype, threads)};
  Reader l(lists);
  a.verticals = l.pointer<int32_t>(), a.vertical_count = l.next();
  a.slashes = l.pointer<int32_t>(), a.slash_count = l.next();
  return call(active->vertical_slash_attention, a);
}

int vertical_slash_index(nb::tuple lists, nb::tuple sizes, nb::tuple outputs, int threads) {
  VerticalSlashArgs a{};
  Reader l(lists), s(sizes), o(outputs);
  a.verticals = l.pointer<int32_t>(), a.vertical_count = l.next();
  a.slashes = l.pointer<int32_t>(), a.slash_count = l.next();
  a.prefill.batch = s.next(), a.prefill.heads = s.next(), a.prefill.rows = a.prefill.queries = s.next();
  a.prefill.block_size = s.next(), a.max_ranges = s.next();
  a.ranges = o.pointer<int32_t>(), a.range_counts = o.pointer<int32_t>();
  a.columns = o.pointer<int32_t>(), a.column_counts = o.pointer<int32_t>();
  a.prefill.threads = threads;
  return call(active->vertical_slash_index, a);
}

float read_all(intptr_t data, int64_t size, int threads) {
  nb::gil_scoped_release release;
  return active->read_all(reinterpret_cast<const float*>(data), size, threads);
}

int best_match(nb::tuple tensors, nb::tuple strides, nb::tuple sizes, float tau, int dtype, int threads) {
  MatchArgs a{};
  Reader t(tensors), r(strides), s(sizes);
  a.key = t.pointer<void>(), a.value = t.pointer<void>();
  a.source_ids = t.pointer<int32_t>(), a.centre_ids = t.pointer<int32_t>(), a.out = t.pointer<int32_t>();
  a.k_batch = r.next(), a.k_head = r.next(), a.k_row = r.next();
  a.v_batch = r.next(), a.v_head = r.next(), a.v_row = r.next();
  a.batch = s.next(), a.heads = s.next(), a.rows = s.next(), a.key_dim = s.next(), a.value_dim = s.next();
  a.sources = s.next(), a.centres = s.next();
  a.tau = tau, a.dtype = DType(dtype);
  a.threads = team(threads, a.batch * a.heads * a.sources * a.centres * (a.key_dim + a.value_dim) / 8);
  return call(active->best_match, a);
}

int pooled_attention(nb::tuple tensors, nb::tuple strides, nb::tuple sizes, float scale, int dtype, int threads) {
  PooledArgs a{};
  Reader t(tensors), r(strides), s(sizes);
  a.query = t.pointer<void>(), a.key = t.pointer<void>(), a.out = t.pointer<float>(), a.starts = t.pointer<int32_t>();
  a.q_batch = r.next(), a.q_head = r.next(), a.q_row = r.next();
  a.k_batch = r.next(), a.k_head = r.next(), a.k_row = r.next();
  a.batch = s.next(), a.heads = s.next(), a.kv_heads = s.next(), a.rows = s.next(), a.length = s.next(), a.dim = s.next();
  a.block = s.next(), a.key_block = s.next();
  a.scale = scale, a.dtype = DType(dtype), a.threads = team(threads, a.batch * a.heads * a.rows * a.length);
  return call(active->pooled_attention, a);
}

}  // namespace
}  // namespace gossamer

NB_MODULE(_native, m) {
  using namespace gossamer;
  m.doc() = "Native kernels of Gossamer. Private: gossamer.ops checks the arguments that these functions trust.";
  active = &tables().back();
  if (const char* name = std::getenv("GOSSAMER_ISA"); name && *name && set_isa(name) != name)
    throw std::runtime_error("GOSSAMER_ISA=" + std::string(name) + " is not available on this machine");
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const Kernels& table : tables()) names.emplace_back(table.name);
    return names;
  });
  m.def("set_isa", &set_isa);
  m.def("decode_attention", &decode_attention);
  m.def("decode_attention_weights", &decode_attention_weights);
  m.def("append_labels", &append_labels);
  m.def("label_scores", &label_scores);
  m.def("key_scores", &key_scores);
  m.def("tree_search", &tree_search);
  m.def("select_topk", &select_topk);
  m.def("label_attention", &label_attention);
  m.def("linear", &linear);
  m.def("sparse_mlp", &sparse_mlp);
  m.def("tree_attention", &tree_attention);
  m.def("delta_linear", &delta_linear);
  m.def("channel_sparse_linear", &channel_sparse_linear);
  m.def("sparse_linear", &sparse_linear);
  m.def("best_match", &best_match);
  m.def("pooled_attention", &pooled_attention);
  m.def("read_all", &read_all);
  m.def("attention_row", &attention_row);
  m.def("attention_columns", &attention_columns);
  m.def("compact_rows", &compact_rows);
  m.def("merge_rows", &merge_rows);
  m.def("block_sparse_attention", &block_sparse_attention);
  m.def("vertical_slash_attention", &vertical_slash_attention);
  m.def("vertical_slash_index", &vertical_slash_index);
  nb::class_<QuantizedPrepared>(m, "QuantizedPrepared")
      .def(nb::init<nb::tuple, nb::tuple, nb::tuple, nb::tuple, int, int>())
      .def("attend", &QuantizedPrepared::attend);
  nb::class_<Prepared>(m, "Prepared")
      .def(nb::init<nb::tuple, nb::tuple, nb::tuple, int>())
      .def("set_labels", &Prepared::set_labels)
      .def("attend", &Prepared::attend)
      .def("attend_weights", &Prepared::attend_weights)
      .def("attend_tree", &Prepared::attend_tree)
      .def("attend_labels", &Prepared::attend_labels);
}
