// What the kernels of sparse_linear share: the blocks of a row as lists, quantised inputs, and what follows the products.
// The formats are described in ops/sparse_formats.py.
#pragma once
#include "activate.h"
#include "parallel.h"

namespace gossamer::GOSSAMER_ISA {

constexpr int64_t kStrip = 16;  // outputs that are finished together
constexpr int64_t kFew = 8;     // tokens up to which a weight is streamed

#if defined(GOSSAMER_AVX512)
#define GOSSAMER_VBMI2 __attribute__((target("avx512vbmi2")))
inline bool has_vbmi2() { return __builtin_cpu_supports("avx512vbmi2"); }
#endif

template <class T>
GOSSAMER_INLINE vf load_some(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  alignas(64) float some[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = to_float(p[i]);
  return load(some);
}

GOSSAMER_INLINE void store_some(float* p, vf v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}
GOSSAMER_INLINE void store_some(bf16* p, vf v, int64_t count) {
  typedef uint16_t halves __attribute__((vector_size(kLanes * 2)));
  const vi u = (vi)v;
  const vi rounded = v != v ? (u | splat_i(0x400000)) : u + 0x7fff + (u >> 16 & 1);
  const halves h = __builtin_convertvector(rounded >> 16, halves);
  __builtin_memcpy(p, &h, count >= kLanes ? sizeof h : size_t(count) * 2);
}

// How the inputs of 8-bit weights are rounded: x is (q - zero) * scale. A token that is not finite gets a NaN for a scale.
struct Quantised {
  float scale, inverse;
  int32_t zero;
};

template <class T>
Quantised quantised_as(const SparseLinearArgs& a, int64_t token) {
  const T* x = static_cast<const T*>(a.x) + token * a.x_row;
  if (token + 1 < a.tokens)  // a row is too short for the hardware to see where it leads
    for (int64_t k = 0; k < a.inputs; k += 64 / int64_t(sizeof(T))) prefetch(x + a.x_row + k);
  vf low = {}, high = {}, wrong = {};
  for (int64_t k = 0; k < a.inputs; k += kLanes) {
    const vf v = load_some(x + k, a.inputs - k);
    low = v < low ? v : low, high = v > high ? v : high;
    wrong = wrong + (v - v);
  }
  if (hsum(wrong) != 0.0f) return {__builtin_nanf(""), 0.0f, 0};  // also of a NaN
  if (a.act_scale) return {a.act_scale[0], 1.0f / a.act_scale[0], int32_t(a.act_zero[0])};
  const float least = -hmax(-low), range = hmax(high) - least;
  if (!(range > 0.0f)) return {1.0f, 1.0f, 0};
  const float scale = range / 255.0f;
  return {scale, 1.0f / scale, int32_t(__builtin_rintf(-least / scale))};
}

// kLanes inputs as 0 .. 255. Halves round to even.
GOSSAMER_INLINE vi quantise(vf x, float inverse, int32_t zero) {
#if defined(GOSSAMER_AVX512)
  const __m512 bound = _mm512_set1_ps(512.0f), y = _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), bound), x * inverse);
  const __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_min_ps(y, bound)), _mm512_set1_epi32(zero));
  return (vi)_mm512_max_epi32(_mm512_setzero_si512(), _mm512_min_epi32(q, _mm512_set1_epi32(255)));
#else
  vf y = x * inverse;
  y = y < -512.0f ? splat(-512.0f) : y;
  y = y > 512.0f ? splat(512.0f) : y;
  vi q = (vi)(y + 12582912.0f) - splat_i(0x4b400000) + zero;
  q = q < 0 ? vi{} : q;
  return q > 255 ? splat_i(255) : q;
#endif
}

template <class T>
GOSSAMER_INLINE vi quantised(const T* x, int64_t count, Quantised how) {
  return quantise(load_some(x, count), how.inverse, how.zero);
}
template <>
GOSSAMER_INLINE vi quantised<uint8_t>(const uint8_t* x, int64_t count, Quantised) {
  typedef uint8_t bytes __attribute__((vector_size(kLanes)));
  bytes b = {};
  if (count >= kLanes) __builtin_memcpy(&b, x, sizeof b);
  else __builtin_memcpy(&b, x, size_t(count));
  return __builtin_convertvector(b, vi);
}

// The blocks of one block row: where they begin (in blocks, for 1x4) and their values.
struct Blocks {
  const uint16_t* columns;
  const float* values;
  int64_t count;
};

// Room that each thread has for a row that is not stored so.
struct RowBuffer {
  uint16_t* columns;
  float* values;

  void layout(Scratch& s, const SparseLinearArgs& a) {
    s.take(columns, a.threads * (a.inputs + 64));
    s.take(values, a.threads * (4 * a.inputs + 64));
  }
  RowBuffer of(int thread, const SparseLinearArgs& a) const {
    return {columns + thread * (a.inputs + 64), values + thread * (4 * a.inputs + 64)};
  }
};

#if defined(GOSSAMER_AVX512)
GOSSAMER_VBMI2 inline void list_bits_vbmi2(const uint64_t* masks, int64_t words, uint16_t* out) {
  alignas(64) uint8_t count[64];
  for (int i = 0; i < 64; ++i) count[i] = uint8_t(i);
  const __m512i places = _mm512_load_si512(count);
  for (int64_t w = 0; w < words; ++w) {
    const int n = __builtin_popcountll(masks[w]);
    const __m512i kept = _mm512_maskz_compress_epi8(masks[w], places), base = _mm512_set1_epi16(short(w * 64));
    const __m512i first = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(kept));
    _mm512_storeu_si512(out, _mm512_add_epi16(first, base));
    if (n > 32) {
      const __m512i second = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(kept, 1));
      _mm512_storeu_si512(out + 32, _mm512_add_epi16(second, base));
    }
    out += n;
  }
}
#endif

// Places of the bits that are set; room for 64 more.
inline void list_bits(const uint64_t* masks, int64_t words, uint16_t* out) {
#if defined(GOSSAMER_AVX512)
  if (has_vbmi2()) return list_bits_vbmi2(masks, words, out);
#endif
  for (int64_t w = 0; w < words; ++w)
    for (uint64_t rest = masks[w]; rest; rest &= rest - 1) *out++ = uint16_t(w * 64 + __builtin_ctzll(rest));
}

// Inputs that share a count of a stream: what one permutation reaches.
template <class T>
constexpr int64_t kGroup = 128 / int64_t(sizeof(T));

// Places that a row of a stream names; room for 64 more.
inline void list_offsets(const uint8_t* offsets, const uint8_t* counts, int64_t groups, int64_t size, uint16_t* out) {
  typedef uint8_t bytes __attribute__((vector_size(16)));
  typedef uint16_t halves __attribute__((vector_size(32)));
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t n = counts[g];
    for (int64_t i = 0; i < n; i += 16) {  // both sides have room
      bytes b;
      __builtin_memcpy(&b, offsets + i, sizeof b);
      const halves h = __builtin_convertvector(b, halves) + uint16_t(g * size);
      __builtin_memcpy(out + i, &h, sizeof h);
    }
    out += n, offsets += n;
  }
}

GOSSAMER_INLINE int64_t row_begin(const SparseLinearArgs& a, int64_t row) {
  return a.pointers ? a.pointers[row] : row * a.kept_per_row;
}

template <class V>
GOSSAMER_INLINE const float* as_floats(const V* values, int64_t count, float* room) {
  if constexpr (sizeof(V) == 4) return reinterpret_cast<const float*>(values);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(room + i, load(values + i));
  for (; i < count; ++i) room[i] = to_float(values[i]);
  return room;
}

template <class V>
GOSSAMER_INLINE Blocks blocks_of(const SparseLinearArgs& a, int64_t row, const RowBuffer& room) {
  const int64_t begin = row_begin(a, row), count = row_begin(a, row + 1) - begin;
  const int64_t size = a.format == kBlock4x1 || a.format == kBlock1x4 ? 4 : 1;
  const float* values = as_floats(static_cast<const V*>(a.values) + begin * size, count * size, room.values);
  // By the format: a weight of zeros has no columns to point to.
  if (a.format <= kCsr) return {a.columns + begin, values, count};
  if (a.format == kStream) {
    const int64_t groups = ceil_div(a.inputs, kGroup<V>);
    list_offsets(a.offsets + begin, a.counts + row * groups, groups, kGroup<V>, room.columns);
    return {room.columns, values, count};
  }
  const int64_t words = ceil_div(a.inputs, 64);
  list_bits(a.masks + row * words, words, room.columns);
  return {room.columns, values, count};
}

// What follows the products: zero point and scales (8 bits), bias, what is added, activation, rounding.
template <class T>
class Finish {
 public:
  Finish(const SparseLinearArgs& args, const Quantised* how) : a(args), how_(how) {}

  // sums [tokens][stride]: 16 outputs from m on of tokens from n on; floats, or int32 in 8 bits. What lies behind the last
  // output may be anything.
  void write(const uint32_t* sums, int64_t stride, int64_t n, int64_t tokens, int64_t m) const {
    const int64_t count = imin(kStrip, a.outputs - m);
    if (a.raw) {
      for (int64_t t = 0; t < tokens; ++t)
        __builtin_memcpy(static_cast<int32_t*>(a.out) + (n + t) * a.outputs + m, sums + t * stride, size_t(count) * 4);
      return;
    }
    for (int64_t j = 0; j < count; j += kLanes) {
      const int64_t part = count - j;
      const vf bias = a.bias ? load_some(static_cast<const T*>(a.bias) + m + j, part) : vf{};
      vf scale = {};
      vi total = {};
      if (a.int8) {
        scale = load_some(a.scale + m + j, part);
        __builtin_memcpy(&total, a.sums + m + j, size_t(imin(part, kLanes)) * 4);
      }
      for (int64_t t = 0; t < tokens; ++t) {
        vf v;
        __builtin_memcpy(&v, sums + t * stride + j, sizeof v);
        if (a.int8) {
          const Quantised how = how_[n + t];
          v = __builtin_convertvector((vi)v - total * how.zero, vf) * (scale * how.scale);
        }
        v = v + bias;
        if (a.added) v = v + load_some(static_cast<const T*>(a.added) + (n + t) * a.added_row + m + j, part);
        if (a.activation >= 0) v = activate(Activation(a.activation), v);
        store_some(static_cast<T*>(a.out) + (n + t) * a.outputs + m + j, v, part);
      }
    }
  }

 private:
  const SparseLinearArgs& a;
  const Quantised* how_;
};

Status sparse_linear_few(const SparseLinearArgs&);

}  // namespace gossamer::GOSSAMER_ISA
