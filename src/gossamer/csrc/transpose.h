// Turning squares of words.
#pragma once
#include "simd.h"

namespace gossamer::GOSSAMER_ISA {

// out[c * stride + r] = rows[r][c], 16 by 16 words.
inline void transpose_words(const uint32_t* const* rows, uint32_t* out, int64_t stride) {
#if defined(GOSSAMER_AVX512)
  __m512i a[16], b[16];
  GOSSAMER_UNROLL
  for (int r = 0; r < 16; ++r) a[r] = _mm512_loadu_si512(rows[r]);
  GOSSAMER_UNROLL
  for (int r = 0; r < 16; r += 2) {  // pairs of rows
    b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
  }
  GOSSAMER_UNROLL
  for (int r = 0; r < 16; r += 4)  // fours: a[r + j] holds column j of each block of four
    GOSSAMER_UNROLL
    for (int j = 0; j < 2; ++j) {
      a[r + 2 * j] = _mm512_unpacklo_epi64(b[r + j], b[r + 2 + j]);
      a[r + 2 * j + 1] = _mm512_unpackhi_epi64(b[r + j], b[r + 2 + j]);
    }
  GOSSAMER_UNROLL
  for (int j = 0; j < 4; ++j) {  // blocks of four columns, now of all 16 rows
    const __m512i low0 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), low1 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    const __m512i high0 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd), high1 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
    _mm512_storeu_si512(out + j * stride, _mm512_shuffle_i32x4(low0, low1, 0x88));
    _mm512_storeu_si512(out + (8 + j) * stride, _mm512_shuffle_i32x4(low0, low1, 0xdd));
    _mm512_storeu_si512(out + (4 + j) * stride, _mm512_shuffle_i32x4(high0, high1, 0x88));
    _mm512_storeu_si512(out + (12 + j) * stride, _mm512_shuffle_i32x4(high0, high1, 0xdd));
  }
#else
  for (int c = 0; c < 16; ++c)
    for (int r = 0; r < 16; ++r) out[c * stride + r] = rows[r][c];
#endif
}

}  // namespace gossamer::GOSSAMER_ISA
