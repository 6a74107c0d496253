// A vector of floats as wide as the instruction set allows, on GCC/Clang vector extensions; intrinsics only where the
// extensions have no word for it. Everything is in the namespace of the instruction set that the file is compiled for.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(GOSSAMER_AVX512) || defined(GOSSAMER_AVX2)
#include <immintrin.h>
#endif

#if defined(GOSSAMER_AVX512)
#define GOSSAMER_ISA avx512
#elif defined(GOSSAMER_AVX2)
#define GOSSAMER_ISA avx2
#else
#define GOSSAMER_ISA baseline
#endif

#define GOSSAMER_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define GOSSAMER_UNROLL _Pragma("unroll")
#else
#define GOSSAMER_UNROLL _Pragma("GCC unroll 16")
#endif

#define GOSSAMER_LAMBDA __attribute__((always_inline))

namespace gossamer::GOSSAMER_ISA {

#if defined(GOSSAMER_AVX512)
constexpr int kLanes = 16;
#elif defined(GOSSAMER_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));

struct bf16 {
  uint16_t bits;
};

constexpr float kInf = __builtin_huge_valf();

GOSSAMER_INLINE int64_t imin(int64_t a, int64_t b) { return a < b ? a : b; }
GOSSAMER_INLINE int64_t imax(int64_t a, int64_t b) { return a > b ? a : b; }
GOSSAMER_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
GOSSAMER_INLINE void swap(T& a, T& b) {
  const T c = a;
  a = b, b = c;
}

GOSSAMER_INLINE float to_float(float x) { return x; }
GOSSAMER_INLINE float to_float(bf16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }

GOSSAMER_INLINE void from_float(float x, float* out) { *out = x; }
GOSSAMER_INLINE void from_float(float x, bf16* out) {  // round to nearest even; NaN stays a NaN
  const uint32_t u = __builtin_bit_cast(uint32_t, x);
  out->bits = x != x ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

GOSSAMER_INLINE vf splat(float x) { return x - vf{}; }  // folds to a broadcast: x - 0 is x for every x
GOSSAMER_INLINE vi splat_i(int32_t x) { return x - vi{}; }

GOSSAMER_INLINE vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
GOSSAMER_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

// kLanes bfloat16 in order.
GOSSAMER_INLINE vf load(const bf16* p) {
#if defined(GOSSAMER_AVX512)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(GOSSAMER_AVX2)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  typedef uint16_t half __attribute__((vector_size(kLanes * 2)));
  half h;
  __builtin_memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vi) << 16);
#endif
}

// 2*kLanes bfloat16 as their even and odd elements: two cheap operations instead of two widening loads.
GOSSAMER_INLINE void load_pair(const bf16* p, vf& even, vf& odd) {
  vi v;
  __builtin_memcpy(&v, p, sizeof v);
  even = (vf)(v << 16);
  odd = (vf)(v & splat_i(int32_t(0xffff0000)));
}
GOSSAMER_INLINE void load_pair(const float* p, vf& first, vf& second) {
  first = load(p);
  second = load(p + kLanes);
}

// The inverse of load_pair; bfloat16 rounds to nearest even.
GOSSAMER_INLINE void store_pair(bf16* p, vf even, vf odd) {
  const auto round = [](vf x) {
    const vi u = (vi)x;
    return x != x ? (u | splat_i(0x400000)) : u + 0x7fff + (u >> 16 & 1);
  };
  const vi v = (round(even) >> 16 & 0xffff) | (round(odd) & splat_i(int32_t(0xffff0000)));
  __builtin_memcpy(p, &v, sizeof v);
}
GOSSAMER_INLINE void store_pair(float* p, vf first, vf second) {
  store(p, first);
  store(p + kLanes, second);
}

GOSSAMER_INLINE float to_float(int8_t x) { return x; }

// kLanes signed bytes in order.
GOSSAMER_INLINE vf load(const int8_t* p) {
#if defined(GOSSAMER_AVX512)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(GOSSAMER_AVX2)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  typedef int8_t bytes __attribute__((vector_size(kLanes)));
  bytes b;
  __builtin_memcpy(&b, p, sizeof b);
  return __builtin_convertvector(b, vf);
#endif
}
GOSSAMER_INLINE void load_pair(const int8_t* p, vf& first, vf& second) {
  first = load(p);
  second = load(p + kLanes);
}

GOSSAMER_INLINE vf fma(vf a, vf b, vf c) {
#if defined(GOSSAMER_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(GOSSAMER_AVX2)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

GOSSAMER_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }

GOSSAMER_INLINE float hmax(vf v) {
#if defined(GOSSAMER_AVX512)
  return _mm512_reduce_max_ps(v);
#else
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
#endif
}

GOSSAMER_INLINE float hsum(vf v) {
#if defined(GOSSAMER_AVX512)
  return _mm512_reduce_add_ps(v);
#elif defined(GOSSAMER_AVX2)
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// out[i] = sum of v[i], i < N. AVX-512 folds 16 vectors into one, 45 instructions instead of 16 reductions.
template <int N>
GOSSAMER_INLINE void hsum_all(const vf* v, float* out) {
#if defined(GOSSAMER_AVX512)
  if constexpr (N == 16) {
    __m512 a[8], b[4], c[2];
    for (int i = 0; i < 8; ++i)  // halves
      a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 8], 0x44), _mm512_shuffle_f32x4(v[i], v[i + 8], 0xee));
    for (int i = 0; i < 4; ++i)  // quarters
      b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
    // b[i] holds four lanes each of v[i], v[i+8], v[i+4], v[i+12] in some order of the 128-bit blocks; see kOrder.
    for (int i = 0; i < 2; ++i)
      c[i] = _mm512_add_ps(_mm512_unpacklo_ps(b[i], b[i + 2]), _mm512_unpackhi_ps(b[i], b[i + 2]));
    const __m512 r = _mm512_add_ps(_mm512_unpacklo_ps(c[0], c[1]), _mm512_unpackhi_ps(c[0], c[1]));
    // Blocks of r: v[0..3], v[8..11], v[4..7], v[12..15].
    _mm512_storeu_ps(out, _mm512_shuffle_f32x4(r, r, 0xd8));
    return;
  }
#endif
  for (int i = 0; i < N; ++i) out[i] = hsum(v[i]);
}

// exp(x) to about 1 ulp for x <= 88; 0 below the normal numbers. NaN stays NaN.
GOSSAMER_INLINE vf vexp(vf x) {
  constexpr float kLow = -87.3365f, kMagic = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer in the low bits
  const vf y = x < kLow ? splat(kLow) : x;
  const vf shifted = fma(y, splat(1.44269504f), splat(kMagic));
  const vf n = shifted - kMagic;
  vf r = fma(n, splat(-0.693359375f), y);
  r = fma(n, splat(2.12194440e-4f), r);
  vf p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  const vf power = (vf)(((vi)shifted << 23) + splat_i(127 << 23));  // the bits above the integer shift out
  return x < kLow ? vf{} : p * power;
}

#if defined(GOSSAMER_AVX512)
// sum += four unsigned bytes times four signed ones, in each lane. As an intrinsic GCC 12 keeps copies of every sum in a
// loop over many, and spills them.
GOSSAMER_INLINE void add_products(__m512i& sum, __m512i bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(signed_bytes));
}
#endif

// Into L2: fetching straight into L1 holds one of its few miss buffers for the whole way from memory, half the speed.
GOSSAMER_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace gossamer::GOSSAMER_ISA
