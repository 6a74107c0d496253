// Tiles of a product of rows with rows, for kernels that use every product at once instead of storing a matrix. A vector
// holds kLanes rows of the one side, packed [element][row]; rows of the other side are broadcast from where they lie.
#pragma once
#include "attend.h"

namespace gossamer::GOSSAMER_ISA {

// A tile of products: kKeys broadcast rows (keys) times kVectors vectors of packed ones; as many accumulators as there are
// registers for.
constexpr int kKeys = 6;
constexpr int kVectors = kLanes == 16 ? 4 : 2;
constexpr int kTiles = kLanes == 16 ? 1 : kLanes == 8 ? 4 : 8;  // tiles of rows in a block of 64
constexpr int kWide = kVectors * kLanes, kRows = kTiles * kWide;

#if defined(GOSSAMER_AVX512)
constexpr bool kPairs = true;  // bfloat16 is multiplied as it is, two elements at a time
#else
constexpr bool kPairs = false;
#endif

GOSSAMER_INLINE vf top(vf a, vf b) {
#if defined(GOSSAMER_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(GOSSAMER_AVX2)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// What one element of a key row, or a pair of bfloat16, is to all lanes.
GOSSAMER_INLINE vf broadcast(const float* p) { return splat(*p); }
#if defined(GOSSAMER_AVX512)
GOSSAMER_INLINE vf broadcast(const bf16* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return (vf)_mm512_set1_epi32(pair);
}
GOSSAMER_INLINE vf multiply_add(const bf16*, vf key, vf rows, vf sum) {
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)rows, (__m512bh)key);
}
#endif
GOSSAMER_INLINE vf multiply_add(const float*, vf key, vf rows, vf sum) { return fma(key, rows, sum); }

// out[r][v] = products of key row r with the packed rows; `best` follows their maxima.
template <class K, int R>
GOSSAMER_INLINE void tile(const K* key, int64_t key_row, const float* rows, int64_t dim, float* out, vf* best) {
  constexpr int kWidth = sizeof(K) == 2 ? 2 : 1;
  vf sum[R][kVectors] = {};
  const int64_t whole = dim / kWidth;
  for (int64_t c = 0; c < whole; ++c, key += kWidth, rows += kWide) {
    vf q[kVectors];
    GOSSAMER_UNROLL
    for (int v = 0; v < kVectors; ++v) q[v] = load(rows + v * kLanes);
    GOSSAMER_UNROLL
    for (int r = 0; r < R; ++r) {
      const vf k = broadcast(key + r * key_row);
      GOSSAMER_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(key, k, q[v], sum[r][v]);
    }
  }
  if constexpr (kWidth == 2) {
    if (dim % 2) {
      GOSSAMER_UNROLL
      for (int r = 0; r < R; ++r) {
        const vf k = (vf)splat_i(key[r * key_row].bits);
        GOSSAMER_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(key, k, load(rows + v * kLanes), sum[r][v]);
      }
    }
  }
  GOSSAMER_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    GOSSAMER_UNROLL
    for (int r = 0; r < R; ++r) {
      store(out + r * kWide + v * kLanes, sum[r][v]);
      best[v] = top(sum[r][v], best[v]);
    }
  }
}

// The same for `count` key rows, [key][row]; `maxima` takes the maxima of the packed rows.
template <class K>
__attribute__((noinline)) void tiles(const K* key, int64_t key_row, int64_t count, const float* rows, int64_t dim,
                                     float* out, float* maxima) {
  vf best[kVectors];
  for (int v = 0; v < kVectors; ++v) best[v] = splat(-kInf);
  int64_t r = 0;
  for (; r + kKeys <= count; r += kKeys) tile<K, kKeys>(key + r * key_row, key_row, rows, dim, out + r * kWide, best);
  for (; r < count; ++r) tile<K, 1>(key + r * key_row, key_row, rows, dim, out + r * kWide, best);
  for (int v = 0; v < kVectors; ++v) store(maxima + v * kLanes, best[v]);
}

}  // namespace gossamer::GOSSAMER_ISA
