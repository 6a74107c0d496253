// Attention over lists of rows, shared by decode_attention and label_attention.
//
// A *group* is a set of query heads that read the same rows: the query heads of one KV head, or a single query head with a
// selection of its own. The rows of all groups form one long line that is cut into equal pieces, whatever the number of
// groups and their lengths are, so that threads stay busy with three KV heads as with thirty. A piece that crosses from one
// group to the next leaves one partial result for each; the log-sum-exp merge joins them at the end.
#pragma once
#include "parallel.h"

namespace gossamer::GOSSAMER_ISA {

// Rows between two updates of the running maximum. Blocks of a dense range are long, so that the hardware prefetchers have a
// stream to follow; blocks of listed rows are short: they are fetched by hand, and should not wait long in L2.
constexpr int kBlock = 256;
constexpr int kListedBlock = 32;
constexpr int kMaxTile = 16;    // rows whose products are in flight together
constexpr int kPiecesPerThread = 4;

// Query heads taken together, and rows per tile: as many accumulators as there are registers for.
template <int G>
constexpr int kTile = kLanes == 16 ? (G == 1 ? 16 : G == 2 ? 8 : 4) : (G == 1 ? 8 : G == 2 ? 4 : 2);
// Heads that share a pass over the value rows. Two with whole rows beat four with half rows: memory is read in order.
constexpr int kTogether = kLanes == 16 ? 2 : 4;
template <int G>
constexpr int kColumns = kLanes == 16 ? (G <= 2 ? 8 : 4) : (G == 1 ? 8 : G == 2 ? 4 : 2);

// bfloat16 rows are read in pairs of vectors (even, odd elements), so query and output live in that order while at work;
// what is behind the last whole pair stays in place. For float32 the two orders are one.
template <class T>
GOSSAMER_INLINE void to_working_order(const T* row, int64_t dim, float* out) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= dim; c += 2 * kLanes) {
    vf a, b;
    load_pair(row + c, a, b);
    store(out + c, a);
    store(out + c + kLanes, b);
  }
  for (; c < dim; ++c) out[c] = to_float(row[c]);
}

template <class T>
GOSSAMER_INLINE void from_working_order(const float* row, float factor, int64_t dim, T* out) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= dim; c += 2 * kLanes)
    store_pair(out + c, load(row + c) * factor, load(row + c + kLanes) * factor);
  for (; c < dim; ++c) from_float(row[c] * factor, out + c);
}

template <class T>
struct QueryHeads {
  const float* values;  // [G][stride], in working order
  const T* raw;         // as stored, for instructions that take bfloat16
  int64_t stride, raw_stride;
};

template <class T>
GOSSAMER_INLINE void prefetch_row(const T* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) prefetch(reinterpret_cast<const char*>(row) + i);
}

// The elements behind the last whole vector. Kept out of line: it would cost the common case its registers.
template <class T, int G, int R>
__attribute__((noinline)) void dot_tail(const T* const* rows, const QueryHeads<T>& q, int64_t c, int64_t dim, float* out) {
  for (; c < dim; ++c)
    for (int g = 0; g < G; ++g)
      for (int r = 0; r < R; ++r) out[g * R + r] += q.values[g * q.stride + c] * to_float(rows[r][c]);
}

// out[g * R + i] = query head g times row i; out has room for 16. `Stream` goes row after row, because the hardware
// prefetchers follow one stream better than R; listed rows, fetched by hand, go column after column, which loads the query
// once for R rows.
template <class T, int G, int R, bool Stream>
GOSSAMER_INLINE void dot_tile(const T* const* rows, const QueryHeads<T>& q, int64_t dim, float* out) {
  constexpr int N = kLanes == 16 && G * R > 8 ? 16 : G * R;
  vf sum[N] = {};
  int64_t c = 0;
  const auto for_tile = [&](int64_t end, int64_t step, const auto& body) GOSSAMER_LAMBDA {
    if constexpr (Stream) {
      GOSSAMER_UNROLL
      for (int r = 0; r < R; ++r)
        for (int64_t i = c; i + step <= end; i += step) body(r, i);
    } else {
      for (int64_t i = c; i + step <= end; i += step)
        GOSSAMER_UNROLL
        for (int r = 0; r < R; ++r) body(r, i);
    }
    c += (end - c) / step * step;
  };
  if constexpr (sizeof(T) == 2) {
    for_tile(dim, 2 * kLanes, [&](int r, int64_t i) GOSSAMER_LAMBDA {
#if defined(GOSSAMER_AVX512)
      const __m512bh row = (__m512bh)_mm512_loadu_si512(rows[r] + i);
      GOSSAMER_UNROLL
      for (int g = 0; g < G; ++g)
        sum[g * R + r] = _mm512_dpbf16_ps(sum[g * R + r], row, (__m512bh)_mm512_loadu_si512(q.raw + g * q.raw_stride + i));
#else
      vf even, odd;
      load_pair(rows[r] + i, even, odd);
      GOSSAMER_UNROLL
      for (int g = 0; g < G; ++g) {
        const float* head = q.values + g * q.stride + i;
        sum[g * R + r] = fma(odd, load(head + kLanes), fma(even, load(head), sum[g * R + r]));
      }
#endif
    });
  }
  for_tile(dim, kLanes, [&](int r, int64_t i) GOSSAMER_LAMBDA {
    const vf row = load(rows[r] + i);
    GOSSAMER_UNROLL
    for (int g = 0; g < G; ++g) sum[g * R + r] = fma(row, load(q.values + g * q.stride + i), sum[g * R + r]);
  });
  hsum_all<N>(sum, out);
  if (c < dim) dot_tail<T, G, R>(rows, q, c, dim, out);
}

// logits[g][i] for `count` rows; rows beyond the count repeat a valid one. Pulls the value rows in meanwhile.
template <class T, int G, bool Stream>
void dot_block(const T* const* rows, const T* const* soon, int64_t count, const QueryHeads<T>& q, int64_t dim,
               float* logits) {
  constexpr int R = kTile<G>;
  const int64_t bytes = dim * int64_t(sizeof(T));
  float tile[kMaxTile];
  for (int64_t r = 0; r < count; r += R) {
    if (soon)
      for (int i = 0; i < R; ++i) prefetch_row(soon[r + i], bytes);
    dot_tile<T, G, R, Stream>(rows + r, q, dim, tile);
    GOSSAMER_UNROLL
    for (int g = 0; g < G; ++g) __builtin_memcpy(logits + g * kBlock + r, tile + g * R, R * sizeof(float));
  }
}

// Turns the logits of one head into weights and updates its running maximum and sum; returns the factor for what was before.
GOSSAMER_INLINE float softmax_update(float* logits, int64_t count, float scale, float& peak, float& sum) {
  for (int64_t i = 0; i < count; i += kLanes) store(logits + i, load(logits + i) * scale);
  for (int64_t i = count; i % kLanes; ++i) logits[i] = -kInf;
  vf top = splat(peak);
  for (int64_t i = 0; i < count; i += kLanes) top = vmax(load(logits + i), top);
  const float next = hmax(top);
  const float base = next == -kInf ? 0.0f : next;
  vf total = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const vf w = vexp(load(logits + i) - base);
    store(logits + i, w);
    total += w;
  }
  const float factor = vexp(splat(peak - base))[0];
  sum = sum * factor + hsum(total);
  peak = next;
  return factor;
}

// acc[g][c .. c + C*kLanes) = factor[g] * acc + sum over rows of weight * row.
template <class T, int G, int C>
GOSSAMER_INLINE void add_columns(const T* const* rows, const T* const* soon, int64_t count, const float* weights,
                                 const float* factor, float* acc, int64_t stride, int64_t c, int64_t bytes) {
  vf sum[G][C];
  GOSSAMER_UNROLL
  for (int g = 0; g < G; ++g)
    GOSSAMER_UNROLL
    for (int j = 0; j < C; ++j) sum[g][j] = load(acc + g * stride + c + j * kLanes) * factor[g];
  for (int64_t r = 0; r < count; ++r) {
    if (soon) prefetch_row(soon[r], bytes);
    vf row[C];
    if constexpr (C == 1) {
      row[0] = load(rows[r] + c);
    } else {
      GOSSAMER_UNROLL
      for (int j = 0; j < C; j += 2) load_pair(rows[r] + c + j * kLanes, row[j], row[j + 1]);
    }
    GOSSAMER_UNROLL
    for (int g = 0; g < G; ++g) {
      const vf w = splat(weights[g * kBlock + r]);
      GOSSAMER_UNROLL
      for (int j = 0; j < C; ++j) sum[g][j] = fma(w, row[j], sum[g][j]);
    }
  }
  GOSSAMER_UNROLL
  for (int g = 0; g < G; ++g)
    GOSSAMER_UNROLL
    for (int j = 0; j < C; ++j) store(acc + g * stride + c + j * kLanes, sum[g][j]);
}

template <class T, int G, bool Stream>
void add_block(const T* const* rows, const T* const* soon, int64_t count, const float* weights, const float* factor,
               float* acc, int64_t stride, int64_t dim) {
  if constexpr (Stream && G > kTogether) {
    constexpr int64_t kStep = 16;  // rows that stay in L1 between the passes
    constexpr float ones[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    for (int64_t r = 0; r < count; r += kStep) {
      const int64_t some = imin(kStep, count - r);
      const float* by = r ? ones : factor;
      add_block<T, kTogether, Stream>(rows + r, soon ? soon + r : nullptr, some, weights + r, by, acc, stride, dim);
      add_block<T, G - kTogether, Stream>(rows + r, nullptr, some, weights + kTogether * kBlock + r, by + kTogether,
                                  acc + kTogether * stride, stride, dim);
    }
    return;
  }
  constexpr int C = kColumns<G>;
  const int64_t bytes = dim * int64_t(sizeof(T));
  int64_t c = 0;
  for (; c + C * kLanes <= dim; c += C * kLanes, soon = nullptr)
    add_columns<T, G, C>(rows, soon, count, weights, factor, acc, stride, c, bytes);
  if constexpr (C > 4)
    for (; c + 4 * kLanes <= dim; c += 4 * kLanes, soon = nullptr)
      add_columns<T, G, 4>(rows, soon, count, weights, factor, acc, stride, c, bytes);
  if constexpr (C > 2)
    for (; c + 2 * kLanes <= dim; c += 2 * kLanes, soon = nullptr)
      add_columns<T, G, 2>(rows, soon, count, weights, factor, acc, stride, c, bytes);
  for (; c + kLanes <= dim; c += kLanes) add_columns<T, G, 1>(rows, nullptr, count, weights, factor, acc, stride, c, bytes);
  for (; c < dim; ++c)
    for (int g = 0; g < G; ++g) {
      float sum = acc[g * stride + c] * factor[g];
      for (int64_t r = 0; r < count; ++r) sum += weights[g * kBlock + r] * to_float(rows[r][c]);
      acc[g * stride + c] = sum;
    }
}

template <class T>
class Attention {
 public:
  explicit Attention(const AttentionArgs& args)
      : a(args),
        per_sequence(args.indices ? args.select_heads : args.kv_heads),
        groups(args.batch * per_sequence),
        group_heads(args.heads / per_sequence),
        stride(ceil_div(args.dim, 2 * kLanes) * 2 * kLanes),
        max_pieces(args.threads * kPiecesPerThread + 1),
        block_rows(args.indices ? kListedBlock : kBlock) {}

  void layout(Scratch& scratch) {
    scratch.take(first_row, groups + 1);
    scratch.take(partials, (groups + max_pieces) * group_heads);
    scratch.take(partial_out, (groups + max_pieces) * group_heads * stride);
    scratch.take(query, a.threads * group_heads * stride);
    scratch.take(logits, a.threads * kMaxHeads * kBlock);
    scratch.take(lines, a.threads * 4 * (kBlock + kMaxTile));
  }

  // Lays the rows of all groups end to end. Called by one thread, before the pieces.
  void plan() {
    int64_t total = 0;
    for (int64_t i = 0; i < groups; ++i) {
      first_row[i] = total;
      const int64_t b = i / per_sequence;
      int64_t count = a.ranges.end(b) - a.ranges.begin(b);
      if (a.indices) {
        count = a.counts ? a.counts[i] : a.k;
        if (count < 0 || count > a.k) status = kBadCount, count = 0;
      }
      total += count;
    }
    first_row[groups] = total;
    const int64_t cuts = a.threads > 1 ? a.threads * kPiecesPerThread : 1;
    piece_rows = imax(ceil_div(ceil_div(total, cuts), block_rows), 1) * block_rows;
    pieces = ceil_div(total, piece_rows);
  }

  // Works off pieces until none is left.
  void run(int thread) {
    for (int64_t piece; (piece = queue.next()) < pieces && status == kOk;) {
      int64_t row = piece * piece_rows;
      const int64_t stop = imin(row + piece_rows, first_row[groups]);
      int64_t group = group_of(row);
      for (; row < stop; ++group) {
        const int64_t end = imin(stop, first_row[group + 1]);
        if (end > row) segment(thread, group, row - first_row[group], end - first_row[group], piece + group);
        row = imax(row, end);
      }
    }
  }

  // Joins the partial results; every thread takes its share of the heads.
  void merge(int thread, int threads) {
    const int64_t work = groups * group_heads;
    for (int64_t i = work * thread / threads; i < work * (thread + 1) / threads; ++i) merge_head(i / group_heads, i % group_heads);
  }

  std::atomic<int> status{kOk};

 private:
  static constexpr int kMaxHeads = 4;
  struct Partial {
    float peak, sum;
  };

  int64_t group_of(int64_t row) const {
    int64_t low = 0, high = groups;  // the last group that starts at or before the row
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_row[middle] <= row ? low : high) = middle;
    }
    return low;
  }

  // Addresses of rows [from, from + count) of a group, the last repeated to fill a tile; false if a row id is out of range.
  bool fill(int64_t group, int64_t from, int64_t count, const T* key, const T* value, const T** keys, const T** values) {
    const int64_t b = group / per_sequence, low = a.ranges.begin(b), high = a.ranges.end(b);
    if (a.indices) {
      const int32_t* ids = a.indices + group * a.k + from;
      int64_t bad = 0;
      for (int64_t i = 0; i < count; ++i) bad |= (ids[i] < low) | (ids[i] >= high);
      if (bad) return false;
      for (int64_t i = 0; i < count; ++i) keys[i] = key + ids[i] * a.k_row, values[i] = value + ids[i] * a.v_row;
    } else {
      for (int64_t i = 0; i < count; ++i)
        keys[i] = key + (low + from + i) * a.k_row, values[i] = value + (low + from + i) * a.v_row;
    }
    for (int64_t i = count; i < count + kMaxTile; ++i) keys[i] = keys[count - 1], values[i] = values[count - 1];
    return true;
  }

  void segment(int thread, int64_t group, int64_t from, int64_t to, int64_t slot) {
    const int64_t b = group / per_sequence, head = group % per_sequence;
    const int64_t kv = head / (per_sequence / a.kv_heads);
    const T* key = static_cast<const T*>(a.key) + b * a.k_batch + kv * a.k_head;
    const T* value = static_cast<const T*>(a.value) + b * a.v_batch + kv * a.v_head;
    const T* raw = static_cast<const T*>(a.query) + b * a.q_batch + head * group_heads * a.q_head;
    float* q = query + thread * group_heads * stride;
    for (int64_t g = 0; g < group_heads; ++g) to_working_order(raw + g * a.q_head, a.dim, q + g * stride);

    Partial* part = partials + slot * group_heads;
    float* out = partial_out + slot * group_heads * stride;
    for (int64_t g = 0; g < group_heads; ++g) part[g] = {-kInf, 0.0f};
    std::memset(out, 0, size_t(group_heads * stride) * sizeof(float));

    const T** line = lines + thread * 4 * (kBlock + kMaxTile);
    const T **keys = line, **values = keys + kBlock + kMaxTile;
    const T **next_keys = values + kBlock + kMaxTile, **next_values = next_keys + kBlock + kMaxTile;
    const int64_t bytes = a.dim * int64_t(sizeof(T));
    int64_t count = imin(block_rows, to - from);
    if (!fill(group, from, count, key, value, keys, values)) return void(status = kBadIndex);
    for (int64_t i = 0; i < count; ++i) prefetch_row(keys[i], bytes);
    while (count) {
      from += count;
      const int64_t next = imin(block_rows, to - from);
      if (next && !fill(group, from, next, key, value, next_keys, next_values)) return void(status = kBadIndex);
      for (int64_t i = imax(next, 0); i < count; ++i) next_keys[i] = keys[i];
      for (int64_t g = 0; g < group_heads; g += kMaxHeads) {
        const QueryHeads<T> heads{q + g * stride, raw + g * a.q_head, stride, a.q_head};
        Block block{keys, values, next_keys, count, part + g, out + g * stride, logits + thread * kMaxHeads * kBlock, g == 0};
        switch (imin(kMaxHeads, group_heads - g)) {
          case 1: a.indices ? attend<1, false>(heads, block) : attend<1, true>(heads, block); break;
          case 2: a.indices ? attend<2, false>(heads, block) : attend<2, true>(heads, block); break;
          case 3: a.indices ? attend<3, false>(heads, block) : attend<3, true>(heads, block); break;
          default: a.indices ? attend<4, false>(heads, block) : attend<4, true>(heads, block);
        }
      }
      swap(keys, next_keys), swap(values, next_values);
      count = next;
    }
  }

  struct Block {
    const T *const *keys, *const *values, *const *next_keys;
    int64_t count;
    Partial* part;
    float *out, *logits;
    bool first;  // of the head groups that read this block: the one that fetches ahead
  };

  template <int G, bool Stream>
  void attend(const QueryHeads<T>& heads, const Block& block) {
    float factor[G];
    dot_block<T, G, Stream>(block.keys, block.first ? block.values : nullptr, block.count, heads, a.dim, block.logits);
    for (int g = 0; g < G; ++g)
      factor[g] = softmax_update(block.logits + g * kBlock, block.count, a.scale, block.part[g].peak, block.part[g].sum);
    add_block<T, G, Stream>(block.values, block.first ? block.next_keys : nullptr, block.count, block.logits, factor, block.out,
                    stride, a.dim);
  }

  void merge_head(int64_t group, int64_t g) {
    const int64_t begin = first_row[group], end = first_row[group + 1];
    const int64_t first = begin / piece_rows + group, last = (end - 1) / piece_rows + group;
    const int64_t b = group / per_sequence, head = group % per_sequence * group_heads + g;
    T* out = static_cast<T*>(a.out) + (b * a.heads + head) * a.dim;
    float peak = -kInf, sum = 0.0f;
    if (end > begin) {
      for (int64_t s = first; s <= last; ++s) peak = partials[s * group_heads + g].peak > peak ? partials[s * group_heads + g].peak : peak;
      const float base = peak == -kInf ? 0.0f : peak;
      float* total = partial_out + (first * group_heads + g) * stride;
      for (int64_t s = first; s <= last; ++s) {
        const Partial& part = partials[s * group_heads + g];
        const float factor = vexp(splat(part.peak - base))[0];
        const float* from = partial_out + (s * group_heads + g) * stride;
        sum += part.sum * factor;
        for (int64_t c = 0; c < stride; c += kLanes)
          store(total + c, s == first ? load(from + c) * factor : fma(load(from + c), splat(factor), load(total + c)));
      }
      from_working_order(total, sum > 0.0f || sum != sum ? 1.0f / sum : 0.0f, a.dim, out);
    } else {
      for (int64_t c = 0; c < a.dim; ++c) from_float(0.0f, out + c);
    }
    if (a.lse) a.lse[b * a.heads + head] = sum > 0.0f || sum != sum ? peak + __builtin_logf(sum) : -kInf;
  }

  const AttentionArgs& a;
  const int64_t per_sequence, groups, group_heads, stride, max_pieces, block_rows;
  int64_t* first_row;  // [groups + 1], where each group begins on the line
  Partial* partials;   // [slots][group_heads]; slot = piece + group is unique
  float* partial_out;  // [slots][group_heads][stride], not yet divided by the sum
  float *query, *logits;
  const T** lines;
  int64_t piece_rows = 1, pieces = 0;
  Queue queue;
};

}  // namespace gossamer::GOSSAMER_ISA
