// x times a sparse weight, for the few tokens of a decode step: bound by the bytes of the weight, which streams past once
// while x waits in the cache.
//
// Four outputs of a block are four lanes. Lists of single weights have the tokens as lanes. Where the processor permutes
// vectors: a stream picks the inputs of the next weights out of two vectors of x. A bitmask with one or two tokens is
// expanded, a vector at a time, and multiplied as if it were dense: what has no bit costs no bytes, and arithmetic is cheap
// here. In 8 bits it is always expanded, 64 weights at a time.
#include "sparse_linear.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

thread_local Scratch scratch;

constexpr int64_t kOutputs = 64;       // that a thread makes at a time
constexpr int kStreams = 4;            // of a bitmask that are read together, each over a quarter of those
constexpr int64_t kAheadBytes = 2048;  // between the weight in use and the weight being fetched

typedef float v4 __attribute__((vector_size(16)));
typedef float v8 __attribute__((vector_size(32)));

GOSSAMER_INLINE v4 add_product(v4 sum, v4 a, v4 b) {
#if defined(GOSSAMER_AVX512) || defined(GOSSAMER_AVX2)
  return _mm_fmadd_ps(a, b, sum);
#else
  return sum + a * b;
#endif
}
GOSSAMER_INLINE v8 add_product(v8 sum, v8 a, v8 b) {
#if defined(GOSSAMER_AVX512) || defined(GOSSAMER_AVX2)
  return _mm256_fmadd_ps(a, b, sum);
#else
  return sum + a * b;
#endif
}

template <class V>
GOSSAMER_INLINE V load_as(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
GOSSAMER_INLINE v4 load_four(const float* p) { return load_as<v4>(p); }
GOSSAMER_INLINE v4 load_four(const bf16* p) {
  typedef uint16_t h4 __attribute__((vector_size(8)));
  typedef int32_t i4 __attribute__((vector_size(16)));
  h4 h;
  __builtin_memcpy(&h, p, sizeof h);
  return (v4)(__builtin_convertvector(h, i4) << 16);
}

// Block rows that are read together for M tokens, each a stream of its own: one alone waits for memory half of the time.
template <int M>
constexpr int kBlockStreams = M <= 2 ? 4 : M <= 4 ? 2 : 1;

// The outputs of R block rows, `apart` block rows from each other: out[m * kOutputs + 4 * row]; x is [input][M].
template <int M, int R, class T>
__attribute__((noinline)) void add_blocks(const SparseLinearArgs& a, int64_t row, int64_t apart, const float* x, float* out) {
  const uint16_t* columns[R];
  const T* values[R];
  int64_t counts[R], common = INT64_MAX;
  GOSSAMER_UNROLL
  for (int r = 0; r < R; ++r) {
    const int64_t begin = a.pointers[row + r * apart];
    columns[r] = a.columns + begin, values[r] = static_cast<const T*>(a.values) + 4 * begin;
    counts[r] = a.pointers[row + r * apart + 1] - begin;
    common = imin(common, counts[r]);
  }
  constexpr int U = R * M >= 4 ? 1 : 4 / (R * M);  // chains of sums, so that none waits for itself
  v4 sum[R][U][M] = {};
  const auto add = [&](int r, int u, int64_t i) GOSSAMER_LAMBDA {
    const v4 w = load_four(values[r] + 4 * i);
    const float* in = x + int64_t(columns[r][i]) * M;
    GOSSAMER_UNROLL
    for (int m = 0; m < M; ++m) sum[r][u][m] = add_product(sum[r][u][m], w, in[m] - v4{});
  };
  int64_t i = 0;
  for (; i + 4 <= common; i += 4)
    GOSSAMER_UNROLL
    for (int r = 0; r < R; ++r) {
      prefetch(reinterpret_cast<const char*>(values[r] + 4 * i) + kAheadBytes);
      GOSSAMER_UNROLL
      for (int j = 0; j < 4; ++j) add(r, j % U, i + j);
    }
  GOSSAMER_UNROLL
  for (int r = 0; r < R; ++r) {
    for (int64_t rest = i; rest < counts[r]; ++rest) add(r, 0, rest);
    for (int m = 0; m < M; ++m) {
      for (int u = 1; u < U; ++u) sum[r][0][m] += sum[r][u][m];
      __builtin_memcpy(out + m * kOutputs + 4 * r * apart, &sum[r][0][m], 16);
    }
  }
}

// One output for up to 4 or 8 tokens, which are the lanes V; x is [input][lanes].
template <class V, int C>
GOSSAMER_INLINE V add_list(const Blocks& blocks, const float* x) {
  constexpr int64_t L = sizeof(V) / 4;
  const auto add = [&](V sum, int64_t i) GOSSAMER_LAMBDA {
    const float *w = blocks.values + i * C, *in = x + int64_t(blocks.columns[i]) * C * L;
    GOSSAMER_UNROLL
    for (int c = 0; c < C; ++c) sum = add_product(sum, w[c] - V{}, load_as<V>(in + c * L));
    return sum;
  };
  V s0 = {}, s1 = {}, s2 = {}, s3 = {};
  int64_t i = 0;
  for (; i + 4 <= blocks.count; i += 4) {
    prefetch(reinterpret_cast<const char*>(blocks.values + i * C) + kAheadBytes);
    s0 = add(s0, i), s1 = add(s1, i + 1), s2 = add(s2, i + 2), s3 = add(s3, i + 3);
  }
  for (; i < blocks.count; ++i) s0 = add(s0, i);
  return (s0 + s1) + (s2 + s3);
}

#if defined(GOSSAMER_AVX512)
template <class T>
GOSSAMER_INLINE const T* next_values(const SparseLinearArgs& a, int64_t row) {
  return static_cast<const T*>(a.values) + row_begin(a, row);
}

// out[m * kOutputs + r * apart] of R rows of a stream; x [M][line]. Thin: a group nearly always fits one vector; otherwise
// the second is taken without asking, since a branch that goes both ways costs more.
template <int M, int R, bool kThin>
__attribute__((noinline)) void stream_rows(const SparseLinearArgs& a, int64_t row, int64_t apart, const float* x, int64_t line,
                                           float* out) {
  const int64_t groups = ceil_div(a.inputs, 32);
  const float* values[R];
  const uint8_t *offsets[R], *counts[R];
  GOSSAMER_UNROLL
  for (int r = 0; r < R; ++r) {
    const int64_t at = row + r * apart;
    values[r] = next_values<float>(a, at), offsets[r] = a.offsets + a.pointers[at], counts[r] = a.counts + at * groups;
  }
  __m512 sum[M * R];
  GOSSAMER_UNROLL
  for (int i = 0; i < M * R; ++i) sum[i] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g, x += 32) {
    __m512 low[M], high[M];
    GOSSAMER_UNROLL
    for (int m = 0; m < M; ++m) low[m] = load(x + m * line), high[m] = load(x + m * line + 16);
    GOSSAMER_UNROLL
    for (int r = 0; r < R; ++r) {
      const uint32_t count = counts[r][g];
      const auto add = [&](int64_t i, uint32_t n) GOSSAMER_LAMBDA {
        const __mmask16 used = __mmask16(_bzhi_u32(0xffff, n));
        const __m512i place = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(offsets[r] + i)));
        const __m512 weight = _mm512_loadu_ps(values[r] + i);
        GOSSAMER_UNROLL
        for (int m = 0; m < M; ++m)
          sum[m * R + r] =
              _mm512_mask3_fmadd_ps(weight, _mm512_permutex2var_ps(low[m], place, high[m]), sum[m * R + r], used);
      };
      add(0, count);
      if (!kThin || __builtin_expect(count > 16, 0)) add(16, count > 16 ? count - 16 : 0);
      prefetch(reinterpret_cast<const char*>(values[r]) + kAheadBytes);
      if (g % 8 == 0) prefetch(offsets[r] + kAheadBytes);
      values[r] += count, offsets[r] += count;
    }
  }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) out[m * kOutputs + r * apart] = _mm512_reduce_add_ps(sum[m * R + r]);
}

template <int M, int R, bool kThin>
__attribute__((noinline)) void stream_rows(const SparseLinearArgs& a, int64_t row, int64_t apart, const bf16* x, int64_t line,
                                           float* out) {
  const int64_t groups = ceil_div(a.inputs, 64);
  const bf16* values[R];
  const uint8_t *offsets[R], *counts[R];
  GOSSAMER_UNROLL
  for (int r = 0; r < R; ++r) {
    const int64_t at = row + r * apart;
    values[r] = next_values<bf16>(a, at), offsets[r] = a.offsets + a.pointers[at], counts[r] = a.counts + at * groups;
  }
  __m512 sum[M * R];
  GOSSAMER_UNROLL
  for (int i = 0; i < M * R; ++i) sum[i] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g, x += 64) {
    __m512i low[M], high[M];
    GOSSAMER_UNROLL
    for (int m = 0; m < M; ++m) low[m] = _mm512_loadu_si512(x + m * line), high[m] = _mm512_loadu_si512(x + m * line + 32);
    GOSSAMER_UNROLL
    for (int r = 0; r < R; ++r) {
      const uint32_t count = counts[r][g];
      const auto add = [&](int64_t i, uint32_t n) GOSSAMER_LAMBDA {
        const __mmask32 used = __mmask32(_bzhi_u32(0xffffffff, n));
        const __m512i place = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(offsets[r] + i)));
        const __m512i weight = _mm512_maskz_loadu_epi16(used, values[r] + i);
        GOSSAMER_UNROLL
        for (int m = 0; m < M; ++m) {
          const __m512i in = _mm512_maskz_permutex2var_epi16(used, low[m], place, high[m]);
          sum[m * R + r] = _mm512_dpbf16_ps(sum[m * R + r], (__m512bh)weight, (__m512bh)in);
        }
      };
      add(0, count);
      if (!kThin || __builtin_expect(count > 32, 0)) add(32, count > 32 ? count - 32 : 0);
      prefetch(reinterpret_cast<const char*>(values[r]) + kAheadBytes);
      if (g % 4 == 0) prefetch(offsets[r] + kAheadBytes);
      values[r] += count, offsets[r] += count;
    }
  }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) out[m * kOutputs + r * apart] = _mm512_reduce_add_ps(sum[m * R + r]);
}

// sums[m * kOutputs + r * apart] of R rows of a bitmask; x [M][line] in floats, line in whole words of the mask.
// Thin: few enough weights that half a vector of them nearly always fills a vector of inputs, and crosses fewer cache lines.
template <int M, int R, bool kThin, class T>
__attribute__((noinline)) void expand_rows(const SparseLinearArgs& a, int64_t row, int64_t apart, const float* x, int64_t line,
                                           float* out) {
  const int64_t words = line / 64;
  const T* values[R];
  const uint64_t* masks[R];
  GOSSAMER_UNROLL
  for (int r = 0; r < R; ++r) values[r] = next_values<T>(a, row + r * apart), masks[r] = a.masks + (row + r * apart) * words;
  vf sum[M * R] = {};
  for (int64_t w = 0; w < words; ++w, x += 64)
    GOSSAMER_UNROLL
    for (int r = 0; r < R; ++r) {
      const uint64_t mask = masks[r][w];
      prefetch(reinterpret_cast<const char*>(values[r]) + kAheadBytes);
      GOSSAMER_UNROLL
      for (int q = 0; q < 4; ++q) {
        const uint32_t bits = uint16_t(mask >> 16 * q);
        const int count = __builtin_popcount(bits);
        vf some;
        if constexpr (kThin && sizeof(T) == 4)
          some = __builtin_expect(count <= 8, 1) ? (vf)_mm512_castps256_ps512(_mm256_loadu_ps(values[r])) : load(values[r]);
        else
          some = load(values[r]);
        const vf weight = _mm512_maskz_expand_ps(__mmask16(bits), some);
        values[r] += count;
        GOSSAMER_UNROLL
        for (int m = 0; m < M; ++m) sum[m * R + r] = fma(weight, load(x + m * line + 16 * q), sum[m * R + r]);
      }
    }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) out[m * kOutputs + r * apart] = hsum(sum[m * R + r]);
}

// The same with pairs of bfloat16; x [M][line] as it is stored.
template <int M, int R>
GOSSAMER_VBMI2 __attribute__((noinline)) void expand_pairs(const SparseLinearArgs& a, int64_t row, int64_t apart, const bf16* x,
                                                           int64_t line, float* out) {
  const int64_t words = line / 64;
  const bf16* values[R];
  const uint64_t* masks[R];
  GOSSAMER_UNROLL
  for (int r = 0; r < R; ++r) values[r] = next_values<bf16>(a, row + r * apart), masks[r] = a.masks + (row + r * apart) * words;
  __m512 sum[M * R];
  for (int i = 0; i < M * R; ++i) sum[i] = _mm512_setzero_ps();
  for (int64_t w = 0; w < words; ++w, x += 64)
    GOSSAMER_UNROLL
    for (int r = 0; r < R; ++r) {
      const uint64_t mask = masks[r][w];
      prefetch(reinterpret_cast<const char*>(values[r]) + kAheadBytes);
      GOSSAMER_UNROLL
      for (int q = 0; q < 2; ++q) {
        const __mmask32 bits = __mmask32(mask >> 32 * q);
        const __m512i weight = _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(values[r]));
        values[r] += __builtin_popcount(bits);
        GOSSAMER_UNROLL
        for (int m = 0; m < M; ++m)
          sum[m * R + r] = _mm512_dpbf16_ps(sum[m * R + r], (__m512bh)weight, (__m512bh)_mm512_loadu_si512(x + m * line + 32 * q));
      }
    }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) out[m * kOutputs + r * apart] = _mm512_reduce_add_ps(sum[m * R + r]);
}

// The same in 8 bits.
template <int M, int R>
GOSSAMER_VBMI2 __attribute__((noinline)) void expand_bytes(const SparseLinearArgs& a, int64_t row, int64_t apart,
                                                           const uint8_t* x, int64_t line, int32_t* out) {
  const int64_t words = line / 64;
  const int8_t* values[R];
  const uint64_t* masks[R];
  GOSSAMER_UNROLL
  for (int r = 0; r < R; ++r) values[r] = next_values<int8_t>(a, row + r * apart), masks[r] = a.masks + (row + r * apart) * words;
  __m512i sum[M * R];
  for (int i = 0; i < M * R; ++i) sum[i] = _mm512_setzero_si512();
  for (int64_t w = 0; w < words; ++w, x += 64)
    GOSSAMER_UNROLL
    for (int r = 0; r < R; ++r) {
      prefetch(reinterpret_cast<const char*>(values[r]) + kAheadBytes);
      const __m512i weight = _mm512_maskz_expand_epi8(masks[r][w], _mm512_loadu_si512(values[r]));
      values[r] += __builtin_popcountll(masks[r][w]);
      GOSSAMER_UNROLL
      for (int m = 0; m < M; ++m) add_products(sum[m * R + r], _mm512_loadu_si512(x + m * line), weight);
    }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) out[m * kOutputs + r * apart] = _mm512_reduce_add_epi32(sum[m * R + r]);
}
#endif

// out[m * kOutputs] += of one row in 8 bits, listed; x [input][8] as integers.
inline void add_integers(const uint16_t* columns, const int8_t* values, int64_t count, const int32_t* x, int64_t rows, int32_t* out) {
  int32_t sum[kFew] = {};
  for (int64_t i = 0; i < count; ++i)
    for (int64_t m = 0; m < kFew; ++m) sum[m] += int32_t(values[i]) * x[columns[i] * kFew + m];
  for (int64_t m = 0; m < rows; ++m) out[m * kOutputs] = sum[m];
}

// Runs f<M>() for a number of tokens M that is known only now, at most kMost.
template <int kMost = 8, class F>
GOSSAMER_INLINE void for_tokens(int64_t tokens, const F& f) {
  if constexpr (kMost > 1)
    if (tokens < kMost) return for_tokens<kMost - 1>(tokens, f);
  f.template operator()<kMost>();
}

// Strips of 64 outputs go to whichever thread is free; make(thread, first output, how many, sums [tokens][64]).
template <class Make, class Out>
void run_strips(const SparseLinearArgs& a, const Finish<Out>& finish, const Make& make) {
  Queue queue;
  parallel(a.threads, [&](int thread, int) {
    alignas(64) uint32_t sums[kFew * kOutputs];
    for (int64_t m; (m = queue.next() * kOutputs) < a.outputs;) {
      const int64_t count = imin(kOutputs, a.outputs - m);
      make(thread, m, count, sums);
      for (int64_t s = 0; s < count; s += kStrip) finish.write(sums + s, kOutputs, 0, a.tokens, m + s);
    }
  });
}

// Cuts rows into streams of equal length, and what is left over into single rows.
template <int kCount = kStreams, class Rows>
GOSSAMER_INLINE void in_streams(int64_t count, const Rows& rows) {
  const int64_t apart = count / kCount;
  for (int64_t i = 0; i < apart; ++i) rows.template operator()<kCount>(i, apart);
  for (int64_t i = apart * kCount; i < count; ++i) rows.template operator()<1>(i, 0);
}

template <class T>
class Few {
 public:
  explicit Few(const SparseLinearArgs& args) : a(args), finish(args, nullptr) {
#if defined(GOSSAMER_AVX512)
    expands = a.format == kBitmask && a.tokens <= 2;
    streams = a.format == kStream;
    pairs = (streams || (expands && has_vbmi2())) && sizeof(T) == 2;
    thin = a.multiplied * 20 <= a.inputs * a.outputs * 7 || (!a.pointers && a.kept_per_row * 2 <= a.inputs);
#endif
    line = ceil_div(a.inputs, 64) * 64;
    width = a.format == kBlock4x1 ? a.tokens : a.tokens <= 4 ? 4 : 8;
  }

  Status run() {
    scratch.layout([&](Scratch& s) {
      s.take(x, expands || streams ? (pairs ? 0 : a.tokens * line) : ceil_div(a.inputs, 4) * 4 * width);
      s.take(raw, pairs ? a.tokens * line : 0);
      room.layout(s, a);
    });
    read();
    if (streams)
      run_strips(a, finish, [&](int, int64_t m, int64_t count, uint32_t* out) { stream(m, count, reinterpret_cast<float*>(out)); });
    else if (expands)
      run_strips(a, finish, [&](int, int64_t m, int64_t count, uint32_t* out) { expand(m, count, reinterpret_cast<float*>(out)); });
    else if (a.format == kBlock4x1)
      run_strips(a, finish, [&](int, int64_t m, int64_t count, uint32_t* out) { blocks(m, count, reinterpret_cast<float*>(out)); });
    else
      run_strips(a, finish, [&](int thread, int64_t m, int64_t count, uint32_t* out) {
        list(room.of(thread, a), m, count, reinterpret_cast<float*>(out));
      });
    return kOk;
  }

 private:
  // x as the loops want it; zeros behind its end.
  void read() {
    const T* in = static_cast<const T*>(a.x);
    if (pairs) {
      for (int64_t m = 0; m < a.tokens; ++m) {
        __builtin_memcpy(raw + m * line, in + m * a.x_row, size_t(a.inputs) * sizeof(T));
        __builtin_memset(raw + m * line + a.inputs, 0, size_t(line - a.inputs) * sizeof(T));
      }
    } else if (expands || streams) {
      for (int64_t m = 0; m < a.tokens; ++m)
        for (int64_t k = 0; k < line; k += kLanes)
          store(x + m * line + k, k < a.inputs ? load_some(in + m * a.x_row + k, a.inputs - k) : vf{});
    } else {
      const int64_t rows = ceil_div(a.inputs, 4) * 4;
      for (int64_t k = 0; k < rows; ++k)
        for (int64_t m = 0; m < width; ++m)
          x[k * width + m] = m < a.tokens && k < a.inputs ? to_float(in[m * a.x_row + k]) : 0.0f;
    }
  }

  void blocks(int64_t first, int64_t count, float* out) {
    for_tokens(a.tokens, [&]<int M>() GOSSAMER_LAMBDA {
      in_streams<kBlockStreams<M>>(ceil_div(count, 4), [&]<int R>(int64_t i, int64_t apart) GOSSAMER_LAMBDA {
        add_blocks<M, R, T>(a, first / 4 + i, apart, x, out + 4 * i);
      });
    });
  }

  template <class V, int C>
  void list_as(const RowBuffer& mine, int64_t first, int64_t count, float* out) {
    for (int64_t o = 0; o < count; ++o) {
      const V sum = add_list<V, C>(blocks_of<T>(a, first + o, mine), x);
      for (int64_t m = 0; m < a.tokens; ++m) out[m * kOutputs + o] = sum[m];
    }
  }

  void list(const RowBuffer& mine, int64_t first, int64_t count, float* out) {
    if (a.format == kBlock1x4)
      width == 4 ? list_as<v4, 4>(mine, first, count, out) : list_as<v8, 4>(mine, first, count, out);
    else
      width == 4 ? list_as<v4, 1>(mine, first, count, out) : list_as<v8, 1>(mine, first, count, out);
  }

  // Four tokens at a time: so many vectors of x stay in registers over all streams.
  void stream(int64_t first, int64_t count, float* out) {
#if defined(GOSSAMER_AVX512)
    const T* in;
    if constexpr (sizeof(T) == 2) in = raw;
    else in = x;
    for (int64_t t = 0; t < a.tokens; t += 4)
      for_tokens<4>(imin(4, a.tokens - t), [&]<int M>() GOSSAMER_LAMBDA {
        in_streams(count, [&]<int R>(int64_t i, int64_t apart) GOSSAMER_LAMBDA {
          float* to = out + t * kOutputs + i;
          if (thin) stream_rows<M, R, true>(a, first + i, apart, in + t * line, line, to);
          else stream_rows<M, R, false>(a, first + i, apart, in + t * line, line, to);
        });
      });
#else
    (void)first, (void)count, (void)out;
#endif
  }

  void expand(int64_t first, int64_t count, float* out) {
#if defined(GOSSAMER_AVX512)
    const auto go = [&]<int M>() GOSSAMER_LAMBDA {
      in_streams(count, [&]<int R>(int64_t i, int64_t apart) GOSSAMER_LAMBDA {
        if constexpr (sizeof(T) == 2)
          if (pairs) return expand_pairs<M, R>(a, first + i, apart, raw, line, out + i);
        if (thin) expand_rows<M, R, true, T>(a, first + i, apart, x, line, out + i);
        else expand_rows<M, R, false, T>(a, first + i, apart, x, line, out + i);
      });
    };
    a.tokens == 1 ? go.template operator()<1>() : go.template operator()<2>();
#else
    (void)first, (void)count, (void)out;
#endif
  }

  const SparseLinearArgs& a;
  const Finish<T> finish;
  bool expands = false, streams = false, pairs = false, thin = false;
  int64_t line, width;
  float* x;
  bf16* raw;
  RowBuffer room;
};

// A bitmask in 8 bits; T as in sparse_linear.cpp.
template <class T, class Out>
Status multiply_int8(const SparseLinearArgs& a) {
  Quantised how[kFew];
  bool expands = false;
#if defined(GOSSAMER_AVX512)
  expands = has_vbmi2();
#endif
  const int64_t line = ceil_div(a.inputs, 64) * 64;
  uint8_t* bytes;
  int32_t* words;
  RowBuffer room;
  scratch.layout([&](Scratch& s) {
    s.take(bytes, expands ? a.tokens * line : 0), s.take(words, expands ? 0 : a.inputs * kFew), room.layout(s, a);
  });
  for (int64_t m = 0; m < a.tokens; ++m) {
    if constexpr (sizeof(T) > 1) how[m] = quantised_as<T>(a, m);
    for (int64_t k = 0; k < (expands ? line : a.inputs); k += kLanes) {
      const T* x = static_cast<const T*>(a.x) + m * a.x_row + k;
      const vi q = k < a.inputs ? quantised(x, a.inputs - k, sizeof(T) > 1 ? how[m] : Quantised{}) : vi{};
      for (int64_t i = 0; i < kLanes; ++i) {
        if (expands) bytes[m * line + k + i] = uint8_t(q[i]);
        else if (k + i < a.inputs) words[(k + i) * kFew + m] = q[i];
      }
    }
  }
  if (!expands)
    for (int64_t k = 0; k < a.inputs; ++k)
      for (int64_t m = a.tokens; m < kFew; ++m) words[k * kFew + m] = 0;
  const Finish<Out> finish(a, how);
  run_strips(a, finish, [&](int thread, int64_t first, int64_t count, uint32_t* sums) {
    int32_t* out = reinterpret_cast<int32_t*>(sums);
#if defined(GOSSAMER_AVX512)
    if (expands)
      return for_tokens(a.tokens, [&]<int M>() GOSSAMER_LAMBDA {
        in_streams(count, [&]<int R>(int64_t i, int64_t apart) GOSSAMER_LAMBDA {
          expand_bytes<M, R>(a, first + i, apart, bytes, line, out + i);
        });
      });
#endif
    const RowBuffer mine = room.of(thread, a);
    for (int64_t o = 0; o < count; ++o) {
      const int64_t row = first + o, begin = row_begin(a, row);
      list_bits(a.masks + row * ceil_div(a.inputs, 64), ceil_div(a.inputs, 64), mine.columns);
      const int8_t* values = static_cast<const int8_t*>(a.values) + begin;
      add_integers(mine.columns, values, row_begin(a, row + 1) - begin, words, a.tokens, out + o);
    }
  });
  return kOk;
}

}  // namespace

Status sparse_linear_few(const SparseLinearArgs& args) {
  if (!args.int8) return args.dtype == kBFloat16 ? Few<bf16>(args).run() : Few<float>(args).run();
  SparseLinearArgs a = args;
  const int64_t in = args.raw ? 1 : args.dtype == kBFloat16 ? 2 : 4, size = args.raw ? 4 : in;
  for (int64_t n = 0; n < args.tokens; n += kFew) {
    a.tokens = imin(kFew, args.tokens - n);
    a.x = static_cast<const char*>(args.x) + n * args.x_row * in;
    a.out = static_cast<char*>(args.out) + n * args.outputs * size;
    if (args.added) a.added = static_cast<const char*>(args.added) + n * args.added_row * size;
    if (args.raw) multiply_int8<uint8_t, float>(a);
    else if (args.dtype == kBFloat16) multiply_int8<bf16, bf16>(a);
    else multiply_int8<float, float>(a);
  }
  return kOk;
}

}  // namespace gossamer::GOSSAMER_ISA
