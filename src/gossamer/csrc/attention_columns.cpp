// Column sums of the attention map: A[k] = sum over query rows of w * softmax(q K^T)[k].
//
// Bound by arithmetic, so the products are made once. A block of query rows meets the keys chunk by chunk; the exponentials
// over the running maximum of their row stay in a strip [key][row] with the maximum that each chunk saw. When the block has
// met all its keys, the log-sum-exp of a row is known, and one pass over the strip adds what every key received. (Without
// the strip the products would have to be made twice; it costs 8 bytes of cache traffic a logit against 2 d operations.)
//
// A vector holds kLanes query rows, and keys are broadcast from where they lie: nothing of the cache is copied or transposed,
// and maxima and sums of rows need no reduction across lanes. The rows are ordered by position, all heads of a group side by
// side, so that the rows of a block see nearly the same keys and what lies behind the diagonal is skipped.
#include "tile.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

thread_local Scratch scratch;

constexpr int kChunk = 16 * kKeys;  // keys between two updates of the running maxima
constexpr int64_t kKeep = 1 << 22;   // floats of strips that wait for the next call

// What the queries are packed to, and what the keys are read as.
template <class T>
constexpr bool kNative = sizeof(T) == 4 || kPairs;
template <class T>
constexpr int kStep = sizeof(T) == 2 && kPairs ? 2 : 1;  // elements of a row in one 32-bit lane

// 2^x to about 1 ulp for x <= 127; exactly 0 below the normal numbers. NaN stays NaN.
GOSSAMER_INLINE vf power(vf x) {
  constexpr float kMagic = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer in the low bits
  const vf shifted = x + kMagic;
  const vf r = x - (shifted - kMagic);
  vf p = splat(1.535336188319500e-4f);
  p = fma(p, r, splat(1.339887440266574e-3f));
  p = fma(p, r, splat(9.618437357674640e-3f));
  p = fma(p, r, splat(5.550332471162809e-2f));
  p = fma(p, r, splat(2.402264791363012e-1f));
  p = fma(p, r, splat(6.931472028550421e-1f));
  p = fma(p, r, splat(1.0f));
#if defined(GOSSAMER_AVX512)
  const __mmask16 some = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_add_epi32(some, (__m512i)p, _mm512_slli_epi32((__m512i)shifted, 23));
#else
  const vf result = (vf)((vi)p + ((vi)shifted << 23));
  return x < -126.0f ? vf{} : result;
#endif
}

template <class T>
class Columns {
 public:
  explicit Columns(const AttentionColumnsArgs& args)
      : a(args),
        group(a.heads / a.kv_heads),
        lines(a.batch * a.kv_heads),
        blocks(ceil_div(a.rows * group, kRows)),
        chunks(ceil_div(a.length, kChunk)),
        packed((a.dim + kStep<T> - 1) / kStep<T> * kRows),
        pieces(imax(1, imin(blocks, ceil_div(a.threads > 1 ? 4 * a.threads : 1, lines)))) {}

  // What must be known of the rows before the strips are laid out. `active` has room for [batch][rows].
  void layout_rows(Scratch& s) {
    s.take(active, a.batch * a.rows);
    s.take(counts, a.batch);
    s.take(cuts, a.batch * (pieces + 1));
  }

  // Lists the rows that count and cuts them into pieces of equal work; finds the widest strip.
  void plan() {
    for (int64_t b = 0; b < a.batch; ++b) {
      int64_t n = 0;
      for (int64_t t = 0; t < a.rows; ++t)
        if (a.weights[b * a.rows + t] != 0.0f && (!a.starts || a.positions[t] >= a.starts[b]))
          active[b * a.rows + n++] = int32_t(t);
      counts[b] = n;
      const int64_t some = ceil_div(n * group, kRows);
      int64_t total = 0;
      for (int64_t i = 0; i < some; ++i) {
        const Range keys = range(b, i);
        total += keys.end - keys.begin;
        widest = imax(widest, keys.end - keys.begin);
      }
      int64_t done = 0, i = 0;
      for (int64_t p = 0; p < pieces; ++p) {
        cuts[b * (pieces + 1) + p] = i;
        for (; i < some && (p == pieces - 1 || done * pieces < total * (p + 1)); ++i) {
          const Range keys = range(b, i);
          done += keys.end - keys.begin;
        }
      }
      cuts[b * (pieces + 1) + pieces] = i;
    }
    strip_keys = ceil_div(widest, kChunk) * kChunk;
  }

  bool large() const { return a.threads * strip_keys * kRows > kKeep; }

  void layout(Scratch& s) {
    s.take(queries, a.threads * packed);
    s.take(strips, a.threads * strip_keys * kRows);
    s.take(tops, a.threads * chunks * kRows);
    if constexpr (!kNative<T>) s.take(wide_keys, a.threads * kChunk * a.dim);
    if (pieces > 1) s.take(parts, lines * pieces * padded());
  }

  void run(int thread) {
    for (int64_t task; (task = queue.next()) < lines * pieces;) {
      const int64_t line = task / pieces, p = task % pieces, b = line / a.kv_heads;
      float* to = pieces > 1 ? parts + task * padded() : a.out + line * a.length;
      std::memset(to, 0, size_t(a.length) * sizeof(float));
      for (int64_t i = cuts[b * (pieces + 1) + p]; i < cuts[b * (pieces + 1) + p + 1]; ++i) block(thread, line, i, to);
    }
  }

  void join(int thread, int threads) {
    if (pieces == 1) return;
    for (int64_t line = 0; line < lines; ++line) {
      const int64_t from = a.length * thread / threads, to = a.length * (thread + 1) / threads;
      float* out = a.out + line * a.length;
      for (int64_t i = from; i < to; ++i) {
        float sum = 0.0f;
        for (int64_t p = 0; p < pieces; ++p) sum += parts[(line * pieces + p) * padded() + i];
        out[i] = sum;
      }
    }
  }

 private:
  struct Range {
    int64_t begin, end;    // keys that any row of the block sees
    int64_t first, last;   // keys [first, last) that all of them see
  };

  int64_t padded() const { return ceil_div(a.length, 16) * 16; }

  // Rows of a block: item i is row i / group of those listed, head i % group.
  Range range(int64_t b, int64_t block) const {
    const int64_t start = a.starts ? a.starts[b] : 0;
    if (!a.causal) return {start, a.length, start, a.length};
    const int32_t* rows = active + b * a.rows;
    const int64_t end = imin((block + 1) * kRows, counts[b] * group);
    const int64_t low = a.positions[rows[block * kRows / group]], high = a.positions[rows[(end - 1) / group]];
    const int64_t begin = a.window ? imax(start, low + 1 - a.window) : start;
    const int64_t first = a.window ? imax(start, high + 1 - a.window) : start;
    return {begin, high + 1, first, imax(low + 1, first)};
  }

  // Queries of a block, [tile][element][row of the tile]; a negative scale turns their sign, so that a maximum is one.
  void pack(int64_t line, int64_t block, float* out, float* weights, int32_t* positions) const {
    const int64_t b = line / a.kv_heads, kv = line % a.kv_heads, items = counts[b] * group;
    const int64_t width = packed / kRows;
    for (int64_t i = 0; i < kRows; ++i) {
      const int64_t item = block * kRows + i;
      float* to = out + i / kWide * width * kWide + i % kWide;
      const int64_t near = imin(item, items - 1), t = active[b * a.rows + near / group];
      positions[i] = a.positions[t];
      if (item >= items) {
        weights[i] = 0.0f;
        for (int64_t c = 0; c < width; ++c) to[c * kWide] = 0.0f;
        continue;
      }
      weights[i] = a.weights[b * a.rows + t];
      const int64_t row = a.order ? a.order[t] : t;
      const T* from = static_cast<const T*>(a.query) + b * a.q_batch + (kv * group + item % group) * a.q_head + row * a.q_row;
      if constexpr (kStep<T> == 2) {
        const uint32_t flip = a.scale < 0.0f ? 0x80008000u : 0u, keep = a.scale == 0.0f ? 0u : ~0u;
        for (int64_t c = 0; c < width; ++c) {
          uint32_t pair = from[2 * c].bits;
          if (2 * c + 1 < a.dim) pair |= uint32_t(from[2 * c + 1].bits) << 16;
          to[c * kWide] = __builtin_bit_cast(float, (pair ^ flip) & keep);
        }
      } else {
        const float sign = a.scale < 0.0f ? -1.0f : a.scale == 0.0f ? 0.0f : 1.0f;
        for (int64_t c = 0; c < width; ++c) to[c * kWide] = to_float(from[c]) * sign;
      }
    }
  }

  void block(int thread, int64_t line, int64_t index, float* columns) {
    const int64_t b = line / a.kv_heads, kv = line % a.kv_heads;
    const T* key = static_cast<const T*>(a.key) + b * a.k_batch + kv * a.k_head;
    float* rows = queries + thread * packed;
    float* strip = strips + thread * strip_keys * kRows;
    float* seen = tops + thread * chunks * kRows;  // the maximum of each row, chunk by chunk
    alignas(64) float weights[kRows], best[kRows], sums[kRows], here[kWide];
    alignas(64) int32_t positions[kRows];
    pack(line, index, rows, weights, positions);
    const Range keys = range(b, index);
    // Logits count in powers of 2.
    const float scale = a.scale == 0.0f ? 1.0f : __builtin_fabsf(a.scale) * 1.44269504f;
    for (int i = 0; i < kRows; ++i) best[i] = -kInf, sums[i] = 0.0f;

    for (int64_t at = keys.begin, chunk = 0; at < keys.end; at += kChunk, ++chunk) {
      const int64_t count = imin(kChunk, keys.end - at);
      const bool partly = at < keys.first || at + count > keys.last;
      if constexpr (!kNative<T>) widen(key + at * a.k_row, count, thread);
      for (int t = 0; t < kTiles; ++t) {
        float* out = strip + (t * strip_keys + at - keys.begin) * kWide;
        const float* packed_rows = rows + t * (packed / kTiles);
        if constexpr (kNative<T>)
          tiles<T>(key + at * a.k_row, a.k_row, count, packed_rows, a.dim, out, here);
        else
          tiles<float>(wide_keys + thread * kChunk * a.dim, a.dim, count, packed_rows, a.dim, out, here);
        if (partly) hide(at, count, positions + t * kWide, out, here);
        for (int v = 0; v < kVectors; ++v) store(seen + (chunk * kTiles + t) * kWide + v * kLanes, load(here + v * kLanes));
        raise(count, scale, out, seen + (chunk * kTiles + t) * kWide, best + t * kWide, sums + t * kWide);
      }
    }
    for (int t = 0; t < kTiles; ++t)
      collect(keys.end - keys.begin, scale, strip + t * strip_keys * kWide, seen + t * kWide, best + t * kWide,
              sums + t * kWide, weights + t * kWide, columns + keys.begin);
  }

  void widen(const T* key, int64_t count, int thread) {
    float* to = wide_keys + thread * kChunk * a.dim;
    for (int64_t r = 0; r < count; ++r, key += a.k_row, to += a.dim) {
      int64_t c = 0;
      for (; c + kLanes <= a.dim; c += kLanes) store(to + c, load(key + c));
      for (; c < a.dim; ++c) to[c] = to_float(key[c]);
    }
  }

  // Takes out what a row does not see, and finds the maxima again.
  void hide(int64_t at, int64_t count, const int32_t* positions, float* logits, float* maxima) const {
    for (int v = 0; v < kVectors; ++v) {
      vi last, first;
      __builtin_memcpy(&last, positions + v * kLanes, sizeof last);
      first = a.window ? last - int32_t(imin(a.window, INT32_MAX)) : splat_i(-1);
      vf best = splat(-kInf);
      for (int64_t r = 0; r < count; ++r) {
        const vi column = splat_i(int32_t(at + r));
        float* p = logits + r * kWide + v * kLanes;
        const vf x = ((column <= last) & (column > first)) ? load(p) : splat(-kInf);
        store(p, x);
        best = top(x, best);
      }
      store(maxima + v * kLanes, best);
    }
  }

  // Logits of a chunk become exponentials over the running maxima, which `seen` takes.
  static void raise(int64_t count, float scale, float* logits, float* seen, float* best, float* sums) {
    vf base[kVectors], total[kVectors];
    const vf by = splat(scale);
    GOSSAMER_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const vf before = load(best + v * kLanes), now = top(load(seen + v * kLanes), before);
      const vf shift = now == -kInf ? vf{} : now * scale;  // nothing seen yet: -inf minus -inf is NaN
      base[v] = -shift;
      total[v] = load(sums + v * kLanes) * power(fma(before, by, base[v]));
      store(best + v * kLanes, now);
      store(seen + v * kLanes, now);
    }
    for (int64_t r = 0; r < count; ++r)
      GOSSAMER_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        float* p = logits + r * kWide + v * kLanes;
        const vf e = power(fma(load(p), by, base[v]));
        store(p, e);
        total[v] += e;
      }
    GOSSAMER_UNROLL
    for (int v = 0; v < kVectors; ++v) store(sums + v * kLanes, total[v]);
  }

  // Adds what the rows of a tile gave to each key.
  static void collect(int64_t count, float scale, const float* strip, const float* seen, const float* best,
                      const float* sums, const float* weights, float* columns) {
    const vf by = splat(scale);
    for (int64_t at = 0; at < count; at += kChunk, strip += kChunk * kWide, seen += kRows) {
      vf factor[kVectors];
      GOSSAMER_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const vf w = load(weights + v * kLanes);
        const vf then = power((load(seen + v * kLanes) - load(best + v * kLanes)) * by);
        factor[v] = w == 0.0f ? vf{} : then * w / load(sums + v * kLanes);
      }
      const int64_t some = imin(kChunk, count - at);
      int64_t r = 0;
      for (; r + 16 <= some; r += 16) {
        vf sum[16];
        float given[16];
        GOSSAMER_UNROLL
        for (int i = 0; i < 16; ++i) {
          const float* p = strip + (r + i) * kWide;
          sum[i] = load(p) * factor[0];
          GOSSAMER_UNROLL
          for (int v = 1; v < kVectors; ++v) sum[i] = fma(load(p + v * kLanes), factor[v], sum[i]);
        }
        hsum_all<16>(sum, given);
        for (int i = 0; i < 16; ++i) columns[at + r + i] += given[i];
      }
      for (; r < some; ++r) {
        const float* p = strip + r * kWide;
        vf sum = load(p) * factor[0];
        for (int v = 1; v < kVectors; ++v) sum = fma(load(p + v * kLanes), factor[v], sum);
        columns[at + r] += hsum(sum);
      }
    }
  }

  const AttentionColumnsArgs& a;
  const int64_t group, lines, blocks, chunks, packed, pieces;
  int32_t* active;  // [batch][rows], those that count, by position
  int64_t *counts, *cuts;
  int64_t widest = 0, strip_keys = 0;
  float *queries, *strips, *tops, *wide_keys = nullptr, *parts = nullptr;
  Queue queue;
};

thread_local Scratch row_scratch;

template <class T>
Status run(const AttentionColumnsArgs& args) {
  Columns<T> work(args);
  row_scratch.layout([&](Scratch& s) { work.layout_rows(s); });
  work.plan();
  Scratch once;  // what a very long context needs is given back
  (work.large() ? once : scratch).layout([&](Scratch& s) { work.layout(s); });
  parallel(args.threads, [&](int thread, int threads) {
    work.run(thread);
    barrier(threads);
    work.join(thread, threads);
  });
  return kOk;
}

}  // namespace

Status attention_columns(const AttentionColumnsArgs& args) {
  for (int64_t b = 0; args.starts && b < args.batch; ++b)
    if (args.starts[b] < 0) return kBadRange;
  return args.dtype == kBFloat16 ? run<bf16>(args) : run<float>(args);
}

}  // namespace gossamer::GOSSAMER_ISA
