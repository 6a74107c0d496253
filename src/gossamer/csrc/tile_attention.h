// Attention of a tile of queries over tiles of keys, for prompts: bound by arithmetic, so all is arranged for the
// multiply-adds to wait for nothing.
//
// Lanes are queries while scores are made, and columns of V while values are summed. So the query tile is transposed once,
// and nothing else ever is: a score takes single words of a key row where it lies, against vectors of queries; the weights
// come out with the keys as rows, and are taken as single words against vectors of V. Maxima and sums of a softmax run along
// the lanes and need no reduction. Keys may therefore be any rows: adjacent ones, squares off the grid, single
// columns; a tile only lists their positions.
//
// A product works on words: one float, or, where the processor multiplies bfloat16, a pair of those.
#pragma once
#include "parallel.h"
#include "transpose.h"

namespace gossamer::GOSSAMER_ISA {

constexpr int kQueries = 64, kKeys = 64;  // of a tile: scores, queries and values stay in the first two caches

template <class T>
struct Product {
  using Word = float;
  using Vector = vf;
  static constexpr int kPack = 1;  // elements of a word
  GOSSAMER_INLINE static Vector load(const float* p) { return GOSSAMER_ISA::load(p); }
  GOSSAMER_INLINE static Vector broadcast(const float* p) { return splat(*p); }
  GOSSAMER_INLINE static vf add(Vector a, Vector b, vf sum) { return fma(a, b, sum); }
};

#if defined(GOSSAMER_AVX512)
template <>
struct Product<bf16> {
  using Word = uint32_t;
  using Vector = __m512i;
  static constexpr int kPack = 2;
  GOSSAMER_INLINE static Vector load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  GOSSAMER_INLINE static Vector broadcast(const uint32_t* p) {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof word);  // rows of bfloat16 may begin between words
    return _mm512_set1_epi32(word);
  }
  GOSSAMER_INLINE static vf add(Vector a, Vector b, vf sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};
#endif

template <int N>
struct Int {
  static constexpr int value = N;
};

// Vectors across and rows down of a register tile: as many accumulators as fit beside their operands.
constexpr int kMaxAcross = kLanes == 16 ? 4 : 2;
template <int V>
constexpr int kDown = kLanes == 16 ? (V == 4 ? 6 : V == 3 ? 8 : 12) : (kLanes == 8 ? 6 : V == 2 ? 4 : 6);

// body(Int<V>, first): cuts `vectors` into nearly equal strips of at most `most`.
template <class Body>
GOSSAMER_INLINE void strips(int64_t vectors, int64_t most, const Body& body) {
  for (int64_t i = 0; i < vectors;) {
    const int64_t left = vectors - i, across = ceil_div(left, ceil_div(left, most));
    switch (across) {
      case 1: body(Int<1>{}, i); break;
      case 2: body(Int<2>{}, i); break;
#if defined(GOSSAMER_AVX512)
      case 3: body(Int<3>{}, i); break;
      default: body(Int<4>{}, i);
#else
      default: break;
#endif
    }
    i += across;
  }
}

// body(Int<R>, first): R rows at a time, what is left by fours, twos and ones.
template <int Most, class Body>
GOSSAMER_INLINE void groups(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + Most <= rows; r += Most) body(Int<Most>{}, r);
  for (; r + 4 <= rows; r += 4) body(Int<4>{}, r);
  if (r + 2 <= rows) body(Int<2>{}, r), r += 2;
  if (r < rows) body(Int<1>{}, r);
}

// 2^x for x <= 126; 0 far below. NaN stays NaN. To about 2 ulp; `Rough` to 8e-5, for weights that become bfloat16 next.
template <bool Rough>
GOSSAMER_INLINE vf exp2_small(vf x) {
#if defined(GOSSAMER_AVX512)
  const vf f = _mm512_reduce_ps(x, 0x09);  // x - floor(x)
#else
  constexpr float kMagic = 12582912.0f;
  const vf y = x < -126.0f ? splat(-126.0f) : x, shifted = (y - 0.5f) + kMagic, f = y - (shifted - kMagic);
#endif
  vf p;
  if constexpr (Rough) {
    p = fma(splat(7.80240297e-2f), f, splat(2.26067066e-1f));
    p = fma(p, f, splat(6.95833981e-1f));
    p = fma(p, f, splat(0.999925137f));
  } else {
    p = fma(splat(1.87757274e-3f), f, splat(8.98934435e-3f));
    p = fma(p, f, splat(5.58263175e-2f));
    p = fma(p, f, splat(2.40153611e-1f));
    p = fma(p, f, splat(6.93153083e-1f));
    p = fma(p, f, splat(0.99999994f));
  }
#if defined(GOSSAMER_AVX512)
  return _mm512_scalef_ps(p, x);
#else
  const vf power = (vf)(((vi)shifted << 23) + splat_i(127 << 23));
  return x < -126.0f ? vf{} : p * power;
#endif
}

// out[r] = rows[r] . queries, R rows by V vectors of queries.
template <class T, int R, int V>
__attribute__((noinline)) void score_rows(const typename Product<T>::Word* const* rows, const typename Product<T>::Word* queries,
                                          int64_t words, float* out) {
  using P = Product<T>;
  const typename P::Word* row[R];
  GOSSAMER_UNROLL
  for (int r = 0; r < R; ++r) row[r] = rows[r];
  vf sum[R * V] = {};
  for (int64_t c = 0; c < words; ++c, queries += kQueries) {
    typename P::Vector q[V];
    GOSSAMER_UNROLL
    for (int i = 0; i < V; ++i) q[i] = P::load(queries + i * kLanes);
    GOSSAMER_UNROLL
    for (int r = 0; r < R; ++r) {
      const auto k = P::broadcast(row[r] + c);
      GOSSAMER_UNROLL
      for (int i = 0; i < V; ++i) sum[r * V + i] = P::add(k, q[i], sum[r * V + i]);
    }
  }
  GOSSAMER_UNROLL
  for (int r = 0; r < R; ++r)
    GOSSAMER_UNROLL
    for (int i = 0; i < V; ++i) store(out + r * kQueries + i * kLanes, sum[r * V + i]);
}

// out[r] += weights[.][r] . values, R queries by V vectors of columns.
template <class T, int R, int V>
__attribute__((noinline)) void add_values(const typename Product<T>::Word* weights, const typename Product<T>::Word* values,
                                          int64_t width, int64_t words, float* out, int64_t stride) {
  using P = Product<T>;
  vf sum[R * V];
  GOSSAMER_UNROLL
  for (int r = 0; r < R; ++r)
    GOSSAMER_UNROLL
    for (int i = 0; i < V; ++i) sum[r * V + i] = load(out + r * stride + i * kLanes);
  for (int64_t k = 0; k < words; ++k, weights += kQueries, values += width) {
    typename P::Vector v[V];
    GOSSAMER_UNROLL
    for (int i = 0; i < V; ++i) v[i] = P::load(values + i * kLanes);
    GOSSAMER_UNROLL
    for (int r = 0; r < R; ++r) {
      const auto w = P::broadcast(weights + r);
      GOSSAMER_UNROLL
      for (int i = 0; i < V; ++i) sum[r * V + i] = P::add(w, v[i], sum[r * V + i]);
    }
  }
  GOSSAMER_UNROLL
  for (int r = 0; r < R; ++r)
    GOSSAMER_UNROLL
    for (int i = 0; i < V; ++i) store(out + r * stride + i * kLanes, sum[r * V + i]);
}

// The queries that a thread works on: rows of one KV head, at positions of which `first` is the lowest and `last` the highest.
template <class T>
struct QueryTile {
  int count = 0;
  const T* row[kQueries];
  T* out[kQueries];
  float* lse[kQueries];
  int32_t position[kQueries];
  int32_t first, last;
};

// One thread's tile: begin(), then keys in any number of pieces, ascending and each once, then finish().
template <class T>
class TileAttention {
 public:
  using P = Product<T>;
  using Word = typename P::Word;
  static constexpr bool kDirect = sizeof(T) * P::kPack == sizeof(Word);  // a key row is made of words as it lies

  explicit TileAttention(const PrefillArgs& args)
      : a(args),
        words(ceil_div(args.dim, P::kPack)),
        width(ceil_div(args.dim, kLanes) * kLanes),
        pack_keys(!kDirect || args.dim % P::kPack != 0) {}

  void layout(Scratch& s) {
    s.take(queries, words * kQueries);
    s.take(scores, (kKeys + 1) * kQueries);
    s.take(values, kKeys / P::kPack * width);
    s.take(out, kQueries * width);
    s.take(packed, pack_keys ? kKeys * words : 0);
  }

  void begin(const QueryTile<T>& t, int64_t batch, int64_t kv_head) {
    tile = &t;
    low = a.starts ? a.starts[batch] : 0, high = int64_t(t.last) + 1;
    // Some query has the keys from `some` on in its window, all have those from `all` on.
    some = a.window ? imin(imax(low, t.first - a.window + 1), high) : high;
    all = a.window ? imin(imax(low, t.last - a.window + 1), high) : high;
    key = static_cast<const T*>(a.key) + batch * a.k_batch + kv_head * a.k_head;
    value = static_cast<const T*>(a.value) + batch * a.v_batch + kv_head * a.v_head;
    vectors = ceil_div(t.count, kLanes);
    filling = tiles, ready = nullptr;
    clear(*filling);
    slope = (a.scale == 0.0f ? 1.0f : __builtin_fabsf(a.scale)) * 1.44269504f;
    pack_queries();
    for (int q = 0; q < vectors * kLanes; ++q) {
      position[q] = q < t.count ? t.position[q] : t.last;
      top[q] = -kInf, sum[q] = 0.0f;
    }
    for (int64_t i = 0; i < t.count * width; i += kLanes) store(out + i, vf{});
  }

  // Keys [from, to); what the range of the sequence or causality excludes for all queries is left out.
  GOSSAMER_INLINE void add(int64_t from, int64_t to) {
    from = imax(from, low), to = imin(to, all);
    if (from >= to) return;
    if (to > some) {
      push(from, some, false);
      from = imax(from, some);
      push(some, from, true);
      some = to;
    }
    push(from, to, false);
  }

  void finish() {
    push(some, all, true);
    push(all, high, false);
    advance();
    if (ready->count) advance();
    for (int q = 0; q < tile->count; ++q) {
      const bool seen = sum[q] > 0.0f || sum[q] != sum[q];
      const float factor = seen ? 1.0f / sum[q] : 0.0f, *from = out + q * width;
      T* to = tile->out[q];
      for (int64_t c = 0; c < a.dim; ++c) from_float(from[c] * factor, to + c);
      if (a.lse) *tile->lse[q] = seen ? top[q] * (slope * 0.69314718f) + __builtin_logf(sum[q]) : -kInf;
    }
  }

 private:
  struct KeyTile {
    int64_t count = 0;
    bool any_near = false;
    bool near[kKeys];                    // read only by the queries that have it in their window
    alignas(64) int32_t at[kKeys] = {};  // positions, ascending
  };

  GOSSAMER_INLINE void push(int64_t from, int64_t to, bool near) {
    while (from < to) {
      const int64_t n = imin(to - from, kKeys - filling->count);
      int32_t* at = filling->at + filling->count;
      for (int64_t i = 0; i < n; ++i) at[i] = int32_t(from + i);
      std::memset(filling->near + filling->count, near, size_t(n));
      filling->any_near |= near;
      filling->count += n, from += n;
      if (filling->count == kKeys) advance();
    }
  }

  // Works on the tile that is ready, while the rows of the one just filled are on their way.
  void advance() {
    if (ready) attend(*ready, *filling);
    KeyTile* const empty = ready ? ready : tiles + 1;
    ready = filling, filling = empty;
    clear(*filling);
  }

  static void clear(KeyTile& t) { t.count = 0, t.any_near = false; }

  // Transposes the tile. Queries of a negative scale change their sign, so that the highest score has the highest weight.
  void pack_queries() {
    int64_t q = 0;
#if defined(GOSSAMER_AVX512)
    if (kDirect && a.scale > 0.0f)
      for (; q + kLanes <= tile->count; q += kLanes) {
        int64_t c = 0;
        for (; c + kLanes <= a.dim / P::kPack; c += kLanes) {
          const uint32_t* rows[kLanes];
          for (int i = 0; i < kLanes; ++i) rows[i] = reinterpret_cast<const uint32_t*>(tile->row[q + i] + c * P::kPack);
          transpose_words(rows, reinterpret_cast<uint32_t*>(queries + c * kQueries + q), kQueries);
        }
        for (int i = 0; i < kLanes; ++i) pack_query(tile->row[q + i], c, queries + q + i);
      }
#endif
    for (; q < tile->count; ++q) pack_query(tile->row[q], 0, queries + q);
    for (; q < vectors * kLanes; ++q)
      for (int64_t c = 0; c < words; ++c) queries[c * kQueries + q] = 0;
  }

  // Words of one query from c on.
  void pack_query(const T* row, int64_t c, Word* to) {
    const auto element = [&](int64_t i) { return i < a.dim && a.scale != 0.0f ? to_float(row[i]) : 0.0f; };
    for (; c < words; ++c) {
      if constexpr (P::kPack == 2) {
        const float flip = a.scale < 0.0f ? -1.0f : 1.0f;
        bf16 low_half, high_half;
        from_float(element(2 * c) * flip, &low_half), from_float(element(2 * c + 1) * flip, &high_half);
        to[c * kQueries] = low_half.bits | uint32_t(high_half.bits) << 16;
      } else {
        to[c * kQueries] = a.scale < 0.0f ? -element(c) : element(c);
      }
    }
  }

  // One row of floats as words, zero up to `size`.
  static void widen(const T* row, int64_t dim, int64_t size, float* to) {
    int64_t c = 0;
    for (; c + kLanes <= dim; c += kLanes) store(to + c, load(row + c));
    for (; c < dim; ++c) to[c] = to_float(row[c]);
    for (; c < size; ++c) to[c] = 0.0f;
  }

  void pack_key(const T* row, Word* to) {
    if constexpr (P::kPack == 2) {
      std::memcpy(to, row, size_t(a.dim) * sizeof(T));
      reinterpret_cast<uint16_t*>(to)[a.dim] = 0;
    } else {
      widen(row, a.dim, a.dim, to);
    }
  }

  // Rows of the next tile, as many as this one's share of the work.
  void fetch(const KeyTile& soon, const T* rows, int64_t stride, int64_t first, int64_t count) const {
    for (int64_t k = first; k < imin(first + count, soon.count); ++k) {
      const char* row = reinterpret_cast<const char*>(rows + soon.at[k] * stride);
      for (int64_t i = 0; i < a.dim * int64_t(sizeof(T)); i += 64) prefetch(row + i);
    }
  }

  // The values of a tile as words, and how many lie from one row to the next. Rows that follow each other closely serve as
  // they are; far apart they would drive each other out of the first cache, which a copy costs less than.
  const Word* value_words(const int32_t* at, int64_t keys, int64_t& stride) {
    stride = width;
    if constexpr (P::kPack == 2) {
#if defined(GOSSAMER_AVX512)
      for (int64_t k = 0; k < keys; k += 2) {
        const T* even = value + at[k] * a.v_row;
        if (k + 1 < keys)
          pair_rows(even, value + at[k + 1] * a.v_row, values + k / 2 * width);
        else
          for (int64_t c = 0; c < width; ++c) values[k / 2 * width + c] = c < a.dim ? even[c].bits : 0;
      }
#endif
    } else {
      if constexpr (kDirect)
        if (width == a.dim && a.v_row <= 2 * width && at[keys - 1] - at[0] == keys - 1) {
          stride = a.v_row;
          return reinterpret_cast<const Word*>(value + at[0] * a.v_row);
        }
      for (int64_t k = 0; k < keys; ++k) widen(value + at[k] * a.v_row, a.dim, width, values + k * width);
    }
    return values;
  }

#if defined(GOSSAMER_AVX512)
  // to[c] = even[c] | odd[c] << 16, zero from dim on.
  void pair_rows(const bf16* even, const bf16* odd, uint32_t* to) {
    alignas(64) static constexpr uint16_t kFirst[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i first = _mm512_load_si512(kFirst), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    int64_t c = 0;
    for (; c + 2 * kLanes <= a.dim; c += 2 * kLanes) {
      const __m512i x = _mm512_loadu_si512(even + c), y = _mm512_loadu_si512(odd + c);
      _mm512_storeu_si512(to + c, _mm512_permutex2var_epi16(x, first, y));
      _mm512_storeu_si512(to + c + kLanes, _mm512_permutex2var_epi16(x, second, y));
    }
    for (; c < width; ++c) to[c] = c < a.dim ? even[c].bits | uint32_t(odd[c].bits) << 16 : 0;
  }
#endif

  void attend(const KeyTile& now, const KeyTile& soon) {
    const int64_t keys = now.count;
    const Word* rows[kKeys];
    for (int64_t k = 0; k < keys; ++k) {
      const T* row = key + now.at[k] * a.k_row;
      if (pack_keys) {
        pack_key(row, packed + k * words);
        rows[k] = packed + k * words;
      } else {
        rows[k] = reinterpret_cast<const Word*>(row);
      }
    }
    // At the edge of causality, narrow strips of queries leave out the keys behind them.
    const bool edge = now.at[keys - 1] > tile->first, jump = now.at[keys - 1] + 1 != soon.at[0];
    strips(vectors, edge ? 2 : kMaxAcross, [&](auto across, int64_t i) GOSSAMER_LAMBDA {
      constexpr int V = decltype(across)::value;
      groups<kDown<V>>(edge ? seen(now, i * kLanes, V * kLanes) : keys, [&](auto down, int64_t k) GOSSAMER_LAMBDA {
        constexpr int R = decltype(down)::value;
        if (i == 0 && jump) fetch(soon, key, a.k_row, k, R);
        for (int64_t r = k + R; r < imin(k + 2 * R, keys); ++r)  // rows that lie apart are no stream: into L1 by hand
          for (int64_t c = 0; c < words; c += 16) __builtin_prefetch(rows[r] + c, 0, 3);
        score_rows<T, R, V>(rows + k, queries + i * kLanes, words, scores + k * kQueries + i * kLanes);
      });
    });
    if (edge || now.any_near) mask(now);
    bool moved = false;
    for (int64_t i = 0; i < vectors; ++i) moved |= weigh(i, keys);
    if (moved) rescale();
    int64_t stride;
    const Word *columns = value_words(now.at, keys, stride), *weights = reinterpret_cast<const Word*>(scores);
    strips(width / kLanes, kMaxAcross, [&](auto across, int64_t i) GOSSAMER_LAMBDA {
      constexpr int V = decltype(across)::value;
      groups<kDown<V>>(tile->count, [&](auto down, int64_t q) GOSSAMER_LAMBDA {
        constexpr int R = decltype(down)::value;
        if (i == 0 && jump) fetch(soon, value, a.v_row, q, R);
        const int64_t count = edge ? seen(now, q, R) : keys;
        add_values<T, R, V>(weights + q, columns + i * kLanes, stride, ceil_div(count, P::kPack),
                            out + q * width + i * kLanes, width);
      });
    });
  }

  // How many keys of a tile the queries q to q + count - 1 see at most.
  int64_t seen(const KeyTile& t, int64_t q, int64_t count) const {
    int32_t last = position[q];
    for (int64_t i = 1; i < count; ++i) last = position[q + i] > last ? position[q + i] : last;
    int64_t n = t.count;
    while (n && t.at[n - 1] > last) --n;
    return n;
  }

  // Hides keys from the queries that stand before them, and those for windows from the queries behind.
  void mask(const KeyTile& t) {
    for (int64_t k = 0; k < t.count; ++k) {
      const bool near = t.any_near && t.near[k];
      if (t.at[k] <= tile->first && !near) continue;
      const vi from = splat_i(t.at[k]), until = splat_i(near ? int32_t(t.at[k] + a.window) : INT32_MAX);
      for (int64_t i = 0; i < vectors; ++i) {
        float* s = scores + k * kQueries + i * kLanes;
        vi where;
        __builtin_memcpy(&where, position + i * kLanes, sizeof where);
        store(s, ((where >= from) & (where < until)) != 0 ? load(s) : splat(-kInf));
      }
    }
  }

  // Turns the scores of kLanes queries into weights and adds to their sums. The running maximum follows only when it would
  // move by more than kSlack powers of two: weights of up to 2^kSlack do no harm, and the sums of values rarely need a new
  // factor. Says whether one moved; `factor` is what to multiply earlier sums with.
  bool weigh(int64_t i, int64_t keys) {
    constexpr float kSlack = 8.0f;
    float* s = scores + i * kLanes;
    vf best[4] = {splat(-kInf), splat(-kInf), splat(-kInf), splat(-kInf)};
    int64_t k = 0;
    for (; k + 4 <= keys; k += 4)
      GOSSAMER_UNROLL
      for (int j = 0; j < 4; ++j) best[j] = vmax(load(s + (k + j) * kQueries), best[j]);
    for (; k < keys; ++k) best[0] = vmax(load(s + k * kQueries), best[0]);
    const vf highest = vmax(vmax(best[0], best[1]), vmax(best[2], best[3])), before = load(top + i * kLanes);
    const auto rises = (highest - before) * slope > kSlack;  // the first time too: before is -inf
    const vf now = rises ? highest : before;
    const bool moved = hmax(rises ? splat(1.0f) : vf{}) > 0.0f;
    vf total = load(sum + i * kLanes);
    if (moved) {
      const vf by = rises ? exp2_small<false>((before - now) * slope) : splat(1.0f);
      store(factor + i * kLanes, by);
      store(top + i * kLanes, now);
      total = total * by;
    } else {
      store(factor + i * kLanes, splat(1.0f));
    }
    const vf shift = now == -kInf ? vf{} : now * -slope, by = splat(slope);
    vf more = {};
    const auto weight = [&](int64_t key) GOSSAMER_LAMBDA {
      return exp2_small<P::kPack == 2>(fma(load(s + key * kQueries), by, shift));
    };
    for (k = 0; k + 2 <= keys; k += 2) {
      const vf even = weight(k), odd = weight(k + 1);
      total += even, more += odd;
      put_weights(even, odd, k, i);
    }
    if (k < keys) {
      const vf last = weight(k);
      total += last;
      put_weights(last, vf{}, k, i);
    }
    store(sum + i * kLanes, total + more);
    return moved;
  }

  GOSSAMER_INLINE void put_weights(vf even, vf odd, int64_t k, int64_t i) {
    if constexpr (P::kPack == 2) {
#if defined(GOSSAMER_AVX512)
      const __m512i half = _mm512_set1_epi32(0x8000);  // rounds: weights are not negative
      const __m512i low_half = _mm512_srli_epi32(_mm512_add_epi32((__m512i)even, half), 16);
      const __m512i high_half = _mm512_add_epi32((__m512i)odd, half);
      const __m512i pair = _mm512_ternarylogic_epi32(high_half, _mm512_set1_epi32(int(0xffff0000)), low_half, 0xea);
      _mm512_storeu_si512(reinterpret_cast<Word*>(scores) + k / 2 * kQueries + i * kLanes, pair);  // high & mask | low
#endif
    } else {
      store(scores + k * kQueries + i * kLanes, even);
      store(scores + (k + 1) * kQueries + i * kLanes, odd);
    }
  }

  void rescale() {
    for (int q = 0; q < tile->count; ++q)
      if (factor[q] != 1.0f)
        for (int64_t c = 0; c < width; c += kLanes) store(out + q * width + c, load(out + q * width + c) * factor[q]);
  }

  const PrefillArgs& a;
  const int64_t words, width;  // of a query row; of a row of V, whole vectors
  const bool pack_keys;
  const QueryTile<T>* tile = nullptr;
  const T *key = nullptr, *value = nullptr;
  int64_t low = 0, high = 0, some = 0, all = 0, vectors = 0;
  float slope = 1.0f;  // from a score to the exponent of two
  Word *queries, *values, *packed;  // [words][kQueries], [kKeys / kPack][width], [kKeys][words]
  float *scores, *out;              // [kKeys][kQueries], then the weights as words; [kQueries][width]
  KeyTile tiles[2];
  KeyTile *filling = nullptr, *ready = nullptr;
  alignas(64) int32_t position[kQueries];
  alignas(64) float top[kQueries], sum[kQueries], factor[kQueries];
};

// The whole prompt, tile after tile, handed out from the last rows to the first: those have most to read, and a long tile
// that starts late would keep one thread while the others are done. `Keys` says what a block of queries reads.
template <class T, class Keys>
class PrefillAttention {
 public:
  PrefillAttention(const PrefillArgs& args, const Keys& source)
      : a(args),
        keys(source),
        group(args.heads / args.kv_heads),
        blocks(ceil_div(args.queries, args.block_size)),
        pieces(ceil_div(args.block_size, kQueries)),
        // Heads that read the same keys share a tile where a block does not fill it.
        together(source.shared() ? imin(group, imax(kQueries / args.block_size, 1)) : 1),
        parts(ceil_div(group, together)),
        per_head(blocks * pieces * parts) {}

  Status run(int thread, Scratch& s) {
    (void)thread;
    TileAttention<T> attention(a);
    s.layout([&](Scratch& scratch) { attention.layout(scratch); });
    QueryTile<T> tile;
    Status status = kOk;
    for (int64_t i; status == kOk && (i = queue.next()) < a.batch * a.kv_heads * per_head;) {
      const int64_t line = i / per_head, unit = per_head - 1 - i % per_head;
      const int64_t b = line / a.kv_heads, kv = line % a.kv_heads;
      const int64_t block = unit / parts / pieces, piece = unit / parts % pieces, part = unit % parts;
      const int64_t first = block * a.block_size + piece * kQueries;
      const int64_t last = imin(imin(first + kQueries, (block + 1) * a.block_size), a.queries);
      if (first >= last) continue;
      const int64_t head = kv * group + part * together;
      fill(tile, b, head, imin(head + together, (kv + 1) * group), first, last);
      attention.begin(tile, b, kv);
      status = keys.give(attention, b, head, block);
      attention.finish();
    }
    return status;
  }

 private:
  void fill(QueryTile<T>& tile, int64_t b, int64_t head, int64_t end, int64_t first, int64_t last) {
    const int64_t before = a.rows - a.queries;
    tile.count = 0;
    tile.first = int32_t(before + first), tile.last = int32_t(before + last - 1);
    for (int64_t h = head; h < end; ++h)
      for (int64_t q = first; q < last; ++q, ++tile.count) {
        const int64_t line = (b * a.heads + h) * a.queries + q;
        tile.row[tile.count] = static_cast<const T*>(a.query) + b * a.q_batch + h * a.q_head + q * a.q_row;
        tile.out[tile.count] = static_cast<T*>(a.out) + line * a.dim;
        tile.lse[tile.count] = a.lse + line;
        tile.position[tile.count] = int32_t(before + q);
      }
  }

  const PrefillArgs& a;
  const Keys& keys;
  const int64_t group, blocks, pieces, together, parts, per_head;
  Queue queue;
};

}  // namespace gossamer::GOSSAMER_ISA
