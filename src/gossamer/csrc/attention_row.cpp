// The softmax row of one query per sequence, summed over the query heads of each KV head; on demand the attention output
// from the same pass. Keys (and values) are read once; the weights of a row are kept as exponentials over the running
// maximum of their block, a few floats beside a row of hundreds of bytes, and brought to the common scale at the end.
#include "attend.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

thread_local Scratch scratch;

template <class T, bool WithValues>
class RowAttention {
 public:
  explicit RowAttention(const AttentionRowArgs& args)
      : a(args.attention),
        row(args.row),
        row_line(args.row_line),
        lines(a.batch * a.kv_heads),
        group(a.heads / a.kv_heads),
        stride(ceil_div(a.dim, 2 * kLanes) * 2 * kLanes),
        blocks(ceil_div(a.ranges.rows, kBlock)) {
    const int64_t cuts = a.threads > 1 ? a.threads * kPiecesPerThread : 1;
    piece_blocks = imax(ceil_div(lines * blocks, cuts), 1);
    pieces = ceil_div(blocks, piece_blocks);
  }

  void layout(Scratch& s) {
    s.take(weights, lines * blocks * group * kBlock);
    s.take(peaks, lines * blocks * group);
    s.take(partials, lines * pieces * group);
    s.take(query, a.threads * group * stride);
    s.take(pointers, a.threads * 3 * (kBlock + kMaxTile));
    if constexpr (WithValues) s.take(partial_out, lines * pieces * group * stride);
  }

  void read(int thread) {
    for (int64_t task; (task = first_queue.next()) < lines * pieces;) piece(thread, task / pieces, task % pieces);
  }

  void finish() {
    for (int64_t task; (task = last_queue.next()) < lines * pieces;) {
      write_row(task / pieces, task % pieces);
      if constexpr (WithValues)
        if (task % pieces == 0)
          for (int64_t g = 0; g < group; ++g) write_out(task / pieces, g);
    }
  }

 private:
  static constexpr int kMaxHeads = 4;
  struct Partial {
    float peak, sum;
  };

  void fill(const T* base, int64_t stride_, int64_t from, int64_t count, const T** rows) const {
    for (int64_t i = 0; i < count; ++i) rows[i] = base + (from + i) * stride_;
    for (int64_t i = count; i < count + kMaxTile; ++i) rows[i] = rows[count - 1];
  }

  void piece(int thread, int64_t line, int64_t p) {
    const int64_t b = line / a.kv_heads, kv = line % a.kv_heads;
    const int64_t from = imax(p * piece_blocks * kBlock, a.ranges.begin(b));
    const int64_t to = imin((p + 1) * piece_blocks * kBlock, a.ranges.rows);
    Partial* part = partials + (line * pieces + p) * group;
    float* out = WithValues ? partial_out + (line * pieces + p) * group * stride : nullptr;
    for (int64_t g = 0; g < group; ++g) part[g] = {-kInf, 0.0f};
    if constexpr (WithValues) std::memset(out, 0, size_t(group * stride) * sizeof(float));
    if (from >= to) return;

    const T* key = static_cast<const T*>(a.key) + b * a.k_batch + kv * a.k_head;
    const T* value = WithValues ? static_cast<const T*>(a.value) + b * a.v_batch + kv * a.v_head : nullptr;
    const T* raw = static_cast<const T*>(a.query) + b * a.q_batch + kv * group * a.q_head;
    float* q = query + thread * group * stride;
    for (int64_t g = 0; g < group; ++g) to_working_order(raw + g * a.q_head, a.dim, q + g * stride);
    const T** keys = pointers + thread * 3 * (kBlock + kMaxTile);
    const T **next = keys + kBlock + kMaxTile, **values = next + kBlock + kMaxTile;

    int64_t at = from, count = imin(kBlock - from % kBlock, to - from);
    fill(key, a.k_row, at, count, keys);
    while (count) {
      const int64_t after = imin(kBlock, to - at - count), block = at / kBlock;
      if (after) fill(key, a.k_row, at + count, after, next);
      for (int64_t i = after; i < count; ++i) next[i] = keys[i];
      if constexpr (WithValues) fill(value, a.v_row, at, count, values);
      for (int64_t g = 0; g < group; g += kMaxHeads) {
        const QueryHeads<T> heads{q + g * stride, raw + g * a.q_head, stride, a.q_head};
        const int64_t slot = (line * blocks + block) * group + g;
        Block work{keys, values, g == 0 ? next : nullptr, count, part + g, weights + slot * kBlock, peaks + slot,
                   WithValues ? out + g * stride : nullptr};
        switch (imin(kMaxHeads, group - g)) {
          case 1: attend<1>(heads, work); break;
          case 2: attend<2>(heads, work); break;
          case 3: attend<3>(heads, work); break;
          default: attend<4>(heads, work);
        }
      }
      swap(keys, next);
      at += count, count = after;
    }
  }

  struct Block {
    const T *const *keys, *const *values, *const *next;  // next: to fetch ahead, or null
    int64_t count;
    Partial* part;
    float *weights, *peaks, *out;
  };

  template <int G>
  void attend(const QueryHeads<T>& heads, const Block& block) {
    float factor[G];
    const T* const* soon = WithValues ? (block.next ? block.values : nullptr) : block.next;
    dot_block<T, G, true>(block.keys, soon, block.count, heads, a.dim, block.weights);
    for (int g = 0; g < G; ++g) {
      factor[g] = softmax_update(block.weights + g * kBlock, block.count, a.scale, block.part[g].peak, block.part[g].sum);
      block.peaks[g] = block.part[g].peak;
    }
    if constexpr (WithValues)
      add_block<T, G, true>(block.values, block.next, block.count, block.weights, factor, block.out, stride, a.dim);
  }

  // The maximum and sum of a head over all pieces.
  Partial whole(int64_t line, int64_t g) const {
    Partial all{-kInf, 0.0f};
    for (int64_t p = 0; p < pieces; ++p) {
      const float peak = partials[(line * pieces + p) * group + g].peak;
      all.peak = peak > all.peak ? peak : all.peak;
    }
    const float base = all.peak == -kInf ? 0.0f : all.peak;
    for (int64_t p = 0; p < pieces; ++p) {
      const Partial& part = partials[(line * pieces + p) * group + g];
      all.sum += part.sum * vexp(splat(part.peak - base))[0];
    }
    return all;
  }

  void write_row(int64_t line, int64_t p) {
    const int64_t b = line / a.kv_heads, begin = imin(a.ranges.begin(b), a.ranges.rows);
    const int64_t from = p * piece_blocks * kBlock, to = imin(from + piece_blocks * kBlock, a.ranges.rows);
    float* out = row + line * row_line;
    for (int64_t i = from; i < imin(begin, to); ++i) out[i] = 0.0f;
    for (int64_t g = 0; g < group; ++g) {
      const Partial all = whole(line, g);
      const float base = all.peak == -kInf ? 0.0f : all.peak;
      for (int64_t at = imax(from, begin); at < to;) {
        const int64_t block = at / kBlock, count = imin(kBlock - at % kBlock, to - at);
        const int64_t slot = (line * blocks + block) * group + g;
        const float factor = vexp(splat(peaks[slot] - base))[0] / all.sum;
        const float* w = weights + slot * kBlock;
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes)
          store(out + at + i, g ? fma(load(w + i), splat(factor), load(out + at + i)) : load(w + i) * factor);
        for (; i < count; ++i) out[at + i] = g ? out[at + i] + w[i] * factor : w[i] * factor;
        at += count;
      }
    }
  }

  void write_out(int64_t line, int64_t g) {
    const Partial all = whole(line, g);
    const float base = all.peak == -kInf ? 0.0f : all.peak;
    const int64_t head = line % a.kv_heads * group + g, b = line / a.kv_heads;
    float* total = partial_out + (line * pieces * group + g) * stride;
    for (int64_t p = 0; p < pieces; ++p) {
      const float factor = vexp(splat(partials[(line * pieces + p) * group + g].peak - base))[0];
      const float* from = partial_out + ((line * pieces + p) * group + g) * stride;
      for (int64_t c = 0; c < stride; c += kLanes)
        store(total + c, p == 0 ? load(from + c) * factor : fma(load(from + c), splat(factor), load(total + c)));
    }
    const bool some = all.sum > 0.0f || all.sum != all.sum;
    from_working_order(total, some ? 1.0f / all.sum : 0.0f, a.dim, static_cast<T*>(a.out) + (b * a.heads + head) * a.dim);
  }

  const AttentionArgs& a;
  float* row;
  const int64_t row_line, lines, group, stride, blocks;
  int64_t piece_blocks, pieces;
  float *weights, *peaks;  // [line][block][group][kBlock], [line][block][group]
  Partial* partials;       // [line][piece][group]
  float *query, *partial_out = nullptr;
  const T** pointers;
  Queue first_queue, last_queue;
};

template <class T, bool WithValues>
Status run(const AttentionRowArgs& args) {
  RowAttention<T, WithValues> work(args);
  scratch.layout([&](Scratch& s) { work.layout(s); });
  parallel(args.attention.threads, [&](int thread, int threads) {
    work.read(thread);
    barrier(threads);
    work.finish();
  });
  return kOk;
}

}  // namespace

Status attention_row(const AttentionRowArgs& args) {
  if (!args.attention.ranges.valid(args.attention.batch)) return kBadRange;
  const bool half = args.attention.dtype == kBFloat16;
  if (args.attention.value) return half ? run<bf16, true>(args) : run<float, true>(args);
  return half ? run<bf16, false>(args) : run<float, false>(args);
}

}  // namespace gossamer::GOSSAMER_ISA
