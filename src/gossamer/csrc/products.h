// Products of a few rows of x with rows of a weight that lie anywhere: the inner loop of the linear kernels.
#pragma once
#include "attend.h"

namespace gossamer::GOSSAMER_ISA {

constexpr int64_t kAhead = 2048;  // bytes between the weight in use and the weight being fetched

// Weight rows that are taken together for M rows of x: as many as there are registers for their sums, and no more streams
// than memory likes.
template <int M>
constexpr int kWeightRows = M <= 2 ? 8 / (kLanes == 16 ? 1 : M) : (kLanes == 16 ? 16 : 8) / (M > 4 ? 8 : 4);

// sum[m * R + r] += x[m] . rows[r] over whole vectors from c on; moves c behind them.
template <class T, int M, int R>
GOSSAMER_INLINE void add_rows(const T* const* rows, const QueryHeads<T>& x, int64_t& c, int64_t end, vf* sum) {
  constexpr int64_t kFetch = kAhead / int64_t(sizeof(T));
  if constexpr (sizeof(T) == 2) {
    for (; c + 2 * kLanes <= end; c += 2 * kLanes)
      GOSSAMER_UNROLL
      for (int r = 0; r < R; ++r) {
        prefetch(rows[r] + c + kFetch);
#if defined(GOSSAMER_AVX512)
        const __m512bh row = (__m512bh)_mm512_loadu_si512(rows[r] + c);
        GOSSAMER_UNROLL
        for (int m = 0; m < M; ++m)
          sum[m * R + r] = _mm512_dpbf16_ps(sum[m * R + r], row, (__m512bh)_mm512_loadu_si512(x.raw + m * x.raw_stride + c));
#else
        vf even, odd;
        load_pair(rows[r] + c, even, odd);
        GOSSAMER_UNROLL
        for (int m = 0; m < M; ++m) {
          const float* line = x.values + m * x.stride + c;
          sum[m * R + r] = fma(odd, load(line + kLanes), fma(even, load(line), sum[m * R + r]));
        }
#endif
      }
  }
  for (; c + kLanes <= end; c += kLanes)
    GOSSAMER_UNROLL
    for (int r = 0; r < R; ++r) {
      if constexpr (sizeof(T) != 2) prefetch(rows[r] + c + kFetch);
      const vf row = load(rows[r] + c);
      GOSSAMER_UNROLL
      for (int m = 0; m < M; ++m) sum[m * R + r] = fma(row, load(x.values + m * x.stride + c), sum[m * R + r]);
    }
}

// out[m * R + r] = x[m] . rows[r]; `out` has room for 16.
template <class T, int M, int R>
GOSSAMER_INLINE void multiply_rows(const T* const* rows, const QueryHeads<T>& x, int64_t columns, float* out) {
  constexpr int N = kLanes == 16 && M * R > 8 ? 16 : M * R;
  vf sum[N] = {};
  int64_t c = 0;
  add_rows<T, M, R>(rows, x, c, columns, sum);
  hsum_all<N>(sum, out);
  if (c < columns) dot_tail<T, M, R>(rows, x, c, columns, out);
}

// Vectors of columns that the sums of M rows leave registers for.
template <int M>
constexpr int kSumColumns = M == 1 ? 8 : M == 2 ? 4 : M <= 4 ? 2 : 1;

// sums[m] += weights[m * R + r] * rows[r] over all columns; sums are [M][stride], in working order.
template <class T, int M, int R>
GOSSAMER_INLINE void add_weighted_rows(const T* const* rows, const float* weights, int64_t columns, float* sums,
                                       int64_t stride) {
  constexpr int64_t kFetch = kAhead / int64_t(sizeof(T));
  constexpr int C = kLanes == 16 ? kSumColumns<M> : (M == 1 ? 4 : M == 2 ? 2 : 1);
  int64_t c = 0;
  const auto block = [&]<int W>() GOSSAMER_LAMBDA {
    vf sum[M][W];
    GOSSAMER_UNROLL
    for (int m = 0; m < M; ++m)
      GOSSAMER_UNROLL
      for (int j = 0; j < W; ++j) sum[m][j] = load(sums + m * stride + c + j * kLanes);
    GOSSAMER_UNROLL
    for (int r = 0; r < R; ++r) {
      vf row[W];
      GOSSAMER_UNROLL
      for (int64_t b = 0; b < int64_t(W * kLanes * sizeof(T)); b += 64)
        prefetch(reinterpret_cast<const char*>(rows[r] + c + kFetch) + b);
      if constexpr (W == 1) {
        row[0] = load(rows[r] + c);
      } else {
        GOSSAMER_UNROLL
        for (int j = 0; j < W; j += 2) load_pair(rows[r] + c + j * kLanes, row[j], row[j + 1]);
      }
      GOSSAMER_UNROLL
      for (int m = 0; m < M; ++m) {
        const vf w = splat(weights[m * R + r]);
        GOSSAMER_UNROLL
        for (int j = 0; j < W; ++j) sum[m][j] = fma(w, row[j], sum[m][j]);
      }
    }
    GOSSAMER_UNROLL
    for (int m = 0; m < M; ++m)
      GOSSAMER_UNROLL
      for (int j = 0; j < W; ++j) store(sums + m * stride + c + j * kLanes, sum[m][j]);
  };
  // Pairs of vectors have an order of their own (see to_working_order), so they are kept whole as far as they go.
  const int64_t paired = columns / (2 * kLanes) * 2 * kLanes;
  constexpr int W = C == 1 ? 2 : C;
  for (; c + W * kLanes <= paired; c += W * kLanes) block.template operator()<W>();
  for (; c + 2 * kLanes <= paired; c += 2 * kLanes) block.template operator()<2>();
  for (; c < columns; ++c)
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < R; ++r) sums[m * stride + c] += weights[m * R + r] * to_float(rows[r][c]);
}

}  // namespace gossamer::GOSSAMER_ISA
