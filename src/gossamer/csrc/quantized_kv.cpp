// One query per sequence over quantised rows (layout and contract: ops/quantized_kv.py), and over recent rows in full.
//
// Scores. Sixteen rows are turned into a tile as the label cache has them (score.h), four bytes of each row side
// by side, and multiplied there by the query as two int8 digits: 15 bits of it, exact sums. Scales are applied to whole
// rows or, per channel, to the query once for a group of rows.
//
// Values. AVX-512: four rows at a time are interleaved byte by byte, so that one dot-product instruction adds four rows to
// sixteen channels; the weights, which take the step of their row, are two uint8 digits relative to the largest of a few
// dozen rows. Elsewhere, and where too few listed rows share the scales of a channel, codes become floats in registers.
#include "attend.h"
#include "score.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

thread_local Scratch scratch;

constexpr int kListedQuantized = 64;
constexpr int kHeads = kLanes == 16 ? 4 : 2;  // query heads of a pass: two digits each, and as many sums
constexpr int64_t kRun = 8;                   // rows of one group worth a tile
constexpr int64_t kBuffer = 8192;             // bytes of interleaved rows that stay in L1

// kLanes codes from channel c on, in order; c is a multiple of kLanes (of 4 for the narrowest).
template <int C>
GOSSAMER_INLINE vf unpack(const uint8_t* row, int64_t c) {
  const uint8_t* p = row + c / (32 / C) * 4;
#if defined(GOSSAMER_AVX512)
  if constexpr (C == 8) return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
  __m128i bytes;
  if constexpr (C == 4) {
    bytes = _mm_loadl_epi64((const __m128i*)p);
    bytes = _mm_unpacklo_epi32(bytes, bytes);
  } else {
    int32_t word;
    std::memcpy(&word, p, 4);
    bytes = _mm_set1_epi32(word);
  }
  const __m512i by = C == 4 ? _mm512_set_epi32(4, 4, 4, 4, 0, 0, 0, 0, 4, 4, 4, 4, 0, 0, 0, 0)
                            : _mm512_set_epi32(6, 6, 6, 6, 4, 4, 4, 4, 2, 2, 2, 2, 0, 0, 0, 0);
  const __m512i code = _mm512_and_si512(_mm512_srlv_epi32(_mm512_cvtepu8_epi32(bytes), by), _mm512_set1_epi32((1 << C) - 1));
  return _mm512_cvtepi32_ps(code);
#elif defined(GOSSAMER_AVX2)
  if constexpr (C == 8) return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
  int32_t word;
  std::memcpy(&word, p, 4);
  const int n = C == 4 ? 0 : int(c / 8 % 2) * 4;
  const __m256i by = _mm256_add_epi32(_mm256_set_epi32(C, C, C, C, 0, 0, 0, 0), _mm256_set1_epi32(n));
  const __m256i code = _mm256_and_si256(_mm256_srlv_epi32(_mm256_cvtepu8_epi32(_mm_set1_epi32(word)), by),
                                        _mm256_set1_epi32((1 << C) - 1));
  return _mm256_cvtepi32_ps(code);
#else
  vf x;
  for (int j = 0; j < kLanes; ++j) x[j] = float(p[j] >> (c % (32 / C) / 4 * C) & ((1 << C) - 1));
  return x;
#endif
}

template <int C>
GOSSAMER_INLINE float code_at(const uint8_t* row, int64_t c) {
  return float(row[c / (32 / C) * 4 + c % 4] >> (c % (32 / C) / 4 * C) & ((1 << C) - 1));
}

// Sixteen rows of `bytes` as words: tile[word][row] is four bytes.
void to_tile(const uint8_t* const* rows, int64_t bytes, uint8_t* tile) {
  int64_t at = 0;
#if defined(GOSSAMER_AVX512)
  for (; at + 16 <= bytes; at += 16) {
    // Lane l of x[i] is a piece of row 4 * l + i; a transposition within lanes brings equal words together.
    __m512i x[4];
    for (int i = 0; i < 4; ++i) {
      const auto get = [&](int r) GOSSAMER_LAMBDA { return _mm_loadu_si128((const __m128i*)(rows[r + i] + at)); };
      const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(get(0)), get(4), 1);
      const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(get(8)), get(12), 1);
      x[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    const __m512i ab = _mm512_unpacklo_epi32(x[0], x[1]), AB = _mm512_unpackhi_epi32(x[0], x[1]);
    const __m512i cd = _mm512_unpacklo_epi32(x[2], x[3]), CD = _mm512_unpackhi_epi32(x[2], x[3]);
    __m512i* out = (__m512i*)(tile + at * 16);
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(ab, cd));
    _mm512_storeu_si512(out + 1, _mm512_unpackhi_epi64(ab, cd));
    _mm512_storeu_si512(out + 2, _mm512_unpacklo_epi64(AB, CD));
    _mm512_storeu_si512(out + 3, _mm512_unpackhi_epi64(AB, CD));
  }
#elif defined(GOSSAMER_AVX2)
  for (; at + 16 <= bytes; at += 16)
    for (int r = 0; r < 16; r += 4) {
      const auto get = [&](int i) GOSSAMER_LAMBDA { return _mm_loadu_si128((const __m128i*)(rows[r + i] + at)); };
      const __m128i a = get(0), b = get(1), c = get(2), d = get(3);
      const __m128i ab = _mm_unpacklo_epi32(a, b), AB = _mm_unpackhi_epi32(a, b);
      const __m128i cd = _mm_unpacklo_epi32(c, d), CD = _mm_unpackhi_epi32(c, d);
      __m128i* out = (__m128i*)(tile + at * 16 + r * 4);
      _mm_storeu_si128(out, _mm_unpacklo_epi64(ab, cd));
      _mm_storeu_si128(out + 4, _mm_unpackhi_epi64(ab, cd));
      _mm_storeu_si128(out + 8, _mm_unpacklo_epi64(AB, CD));
      _mm_storeu_si128(out + 12, _mm_unpackhi_epi64(AB, CD));
    }
#endif
  for (; at < bytes; at += 4)
    for (int r = 0; r < 16; ++r) std::memcpy(tile + at * 16 + r * 4, rows[r] + at, 4);
}

// A query, its steps folded in, as two int8 digits of each channel, x ~ scale * (256 * high + low).
struct Digits {
  int8_t *high, *low;
  float scale, plus;
  float base;  // what the zeros add to every row of the group (per channel), or the sum of the query
};

// The low bytes of kLanes integers.
GOSSAMER_INLINE void store_bytes(int8_t* p, vi x) {
#if defined(GOSSAMER_AVX512)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)x));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = int8_t(x[i]);
#endif
}

// What is lost in rounding the query would be multiplied by codes that all have one sign: `plus` returns the loss times
// the middle code, so that what is left is multiplied by codes around zero.
template <class S>
void to_digits(const float* q, const S* step, const S* zero, int64_t dim, float middle, float* folded, Digits& out) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the integer is in the low bits of the sum
  vf top = {}, sum = {};
  int64_t c = 0;
  for (; c + kLanes <= dim; c += kLanes) {
    const vf x = step ? load(q + c) * load(step + c) : load(q + c);
    sum = zero ? fma(load(q + c), load(zero + c), sum) : sum + load(q + c);
    top = vmax((vf)((vi)x & splat_i(0x7fffffff)), top);
    store(folded + c, x);
  }
  float most = hmax(top), base = hsum(sum);
  for (; c < dim; ++c) {
    folded[c] = step ? q[c] * to_float(step[c]) : q[c];
    base += zero ? q[c] * to_float(zero[c]) : q[c];
    most = __builtin_fabsf(folded[c]) > most ? __builtin_fabsf(folded[c]) : most;
  }
  constexpr float kLevels = 32512.0f;
  const float inverse = most > 0.0f ? kLevels / most : 0.0f, by = most / kLevels;
  vf lost = {};
  float rest = 0.0f;
  for (c = 0; c + kLanes <= dim; c += kLanes) {
    const vi x = (vi)(load(folded + c) * inverse + kMagic);
    store_bytes(out.low + c, x), store_bytes(out.high + c, (x + 128) >> 8);
    lost += load(folded + c) - (load(folded + c) * inverse + kMagic - kMagic) * by;
  }
  for (; c < dim; ++c) {
    const int32_t x = __builtin_bit_cast(int32_t, folded[c] * inverse + kMagic);
    out.low[c] = int8_t(x), out.high[c] = int8_t((x + 128) >> 8);
    rest += folded[c] - (folded[c] * inverse + kMagic - kMagic) * by;
  }
  out.scale = by, out.base = base, out.plus = (hsum(lost) + rest) * middle;
}

constexpr int kPair = 2 * kTokens;  // rows whose scores are summed at a time: two tiles share what is read of the query

// logits[g][0 .. 32) of the rows of two tiles, before the softmax scale. step and zero: of the rows, or null.
template <int C, int G>
void dot_tiles(const uint8_t* tiles, int64_t words, const Digits* q, const float* step, const float* zero, float* logits) {
  constexpr int N = 2 * G;
  const int32_t* quads[N];
  for (int g = 0; g < G; ++g) {
    quads[2 * g] = reinterpret_cast<const int32_t*>(q[g].high);
    quads[2 * g + 1] = reinterpret_cast<const int32_t*>(q[g].low);
  }
  TileScores dot[2 * N];
  dot_codes<C, N, 2>(tiles, words, quads, dot);
  for (int g = 0; g < G; ++g)
    for (int i = 0; i < 2 * kVectors; ++i) {
      const TileScores* of = dot + i / kVectors * N + 2 * g;
      vf x = of[0].v[i % kVectors] * 256.0f + of[1].v[i % kVectors];
      x = fma(x, splat(q[g].scale), splat(q[g].plus));
      store(logits + g * kBlock + i * kLanes,
            step ? fma(x, load(step + i * kLanes), load(zero + i * kLanes) * q[g].base) : x + q[g].base);
    }
}

// Where the scales of a row begin: per row one value, per channel a line of its group.
template <class S>
struct Side {
  const QuantizedRows& rows;
  const uint8_t* codes;
  const S *step, *zero;

  Side(const QuantizedRows& r, int64_t b, int64_t kv)
      : rows(r),
        codes(r.codes + b * r.c_batch + kv * r.c_head),
        step(static_cast<const S*>(r.step) + b * r.s_batch + kv * r.s_head),
        zero(static_cast<const S*>(r.zero) + b * r.s_batch + kv * r.s_head) {}

  int64_t line(int64_t row) const { return row / rows.group * rows.s_row; }
};

// Scores of rows one by one, scales per channel: for rows that share them with few others.
template <int C, int G, class S>
void dot_rows(const Side<S>& side, const uint8_t* const* rows, const int32_t* ids, int64_t count, const float* q,
              int64_t stride, int64_t dim, float* logits) {
  for (int64_t r = 0; r < count; ++r) {
    const S *step = side.step + side.line(ids[r]), *zero = side.zero + side.line(ids[r]);
    vf sum[G] = {};
    int64_t c = 0;
    for (; c + kLanes <= dim; c += kLanes) {
      const vf x = fma(unpack<C>(rows[r], c), load(step + c), load(zero + c));
      GOSSAMER_UNROLL
      for (int g = 0; g < G; ++g) sum[g] = fma(x, load(q + g * stride + c), sum[g]);
    }
    for (int g = 0; g < G; ++g) logits[g * kBlock + r] = hsum(sum[g]);
    for (; c < dim; ++c) {
      const float x = code_at<C>(rows[r], c) * to_float(step[c]) + to_float(zero[c]);
      for (int g = 0; g < G; ++g) logits[g * kBlock + r] += x * q[g * stride + c];
    }
  }
}

// acc[g] += sum over rows of weight * code, or of weight * value with scales per channel.
template <int C, int G, bool Channel, class S>
void add_rows(const Side<S>& side, const uint8_t* const* rows, const int32_t* ids, int64_t count, const float* weights,
              float* acc, int64_t stride, int64_t dim) {
  const auto value = [&](int64_t r, int64_t c) GOSSAMER_LAMBDA {
    const vf x = unpack<C>(rows[r], c);
    if constexpr (Channel) return fma(x, load(side.step + side.line(ids[r]) + c), load(side.zero + side.line(ids[r]) + c));
    return x;
  };
  int64_t c = 0;
  for (; c + 2 * kLanes <= dim; c += 2 * kLanes) {
    vf sum[G][2];
    for (int g = 0; g < G; ++g)
      for (int i = 0; i < 2; ++i) sum[g][i] = load(acc + g * stride + c + i * kLanes);
    for (int64_t r = 0; r < count; ++r) {
      const vf x = value(r, c), y = value(r, c + kLanes);
      GOSSAMER_UNROLL
      for (int g = 0; g < G; ++g) {
        const vf w = splat(weights[g * kBlock + r]);
        sum[g][0] = fma(w, x, sum[g][0]), sum[g][1] = fma(w, y, sum[g][1]);
      }
    }
    for (int g = 0; g < G; ++g)
      for (int i = 0; i < 2; ++i) store(acc + g * stride + c + i * kLanes, sum[g][i]);
  }
  for (; c < dim; ++c)
    for (int64_t r = 0; r < count; ++r) {
      float x = code_at<C>(rows[r], c);
      if constexpr (Channel) x = x * to_float(side.step[side.line(ids[r]) + c]) + to_float(side.zero[side.line(ids[r]) + c]);
      for (int g = 0; g < G; ++g) acc[g * stride + c] += weights[g * kBlock + r] * x;
    }
}

#if defined(GOSSAMER_AVX512)
// Four rows interleaved byte by byte, U lanes of 16 bytes at a time: out[k][lane][channel][row].
template <int C, int U>
GOSSAMER_INLINE void interleave_rows(const uint8_t* const* rows, int64_t bytes, uint8_t* out) {
  const auto get = [&](const uint8_t* p) GOSSAMER_LAMBDA {
    __m512i x;
    if constexpr (U == 4) x = _mm512_loadu_si512(p);
    if constexpr (U == 2) x = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
    if constexpr (U == 1) x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)p));
    return C == 8 ? _mm512_xor_si512(x, _mm512_set1_epi8(char(0x80))) : x;  // signed: 128 less
  };
  const auto put = [&](uint8_t* p, __m512i x) GOSSAMER_LAMBDA {
    if constexpr (U == 4) _mm512_storeu_si512(p, x);
    if constexpr (U == 2) _mm256_storeu_si256((__m256i*)p, _mm512_castsi512_si256(x));
    if constexpr (U == 1) _mm_storeu_si128((__m128i*)p, _mm512_castsi512_si128(x));
  };
  for (int64_t at = 0; at < bytes; at += 16 * U) {
    const __m512i a = get(rows[0] + at), b = get(rows[1] + at), c = get(rows[2] + at), d = get(rows[3] + at);
    const __m512i ab = _mm512_unpacklo_epi8(a, b), AB = _mm512_unpackhi_epi8(a, b);
    const __m512i cd = _mm512_unpacklo_epi8(c, d), CD = _mm512_unpackhi_epi8(c, d);
    uint8_t* to = out + at * 4;
    put(to, _mm512_unpacklo_epi16(ab, cd));
    put(to + 16 * U, _mm512_unpackhi_epi16(ab, cd));
    put(to + 32 * U, _mm512_unpacklo_epi16(AB, CD));
    put(to + 48 * U, _mm512_unpackhi_epi16(AB, CD));
  }
}

// acc[g][place] += by[g] * sum over rows of (256 * high + low) * code, places as `place_of` has them.
template <int C, int G, int N>
GOSSAMER_INLINE void add_places(const uint8_t* rows, int64_t row_step, int64_t quads, const uint8_t* high, const uint8_t* low,
                                int shift, const float* by, float* acc, int64_t stride) {
  __m512i h[G][N] = {}, l[G][N] = {};
  const __m512i mask = _mm512_set1_epi8(char((1 << C) - 1));
  for (int64_t t = 0; t < quads; ++t) {
    __m512i code[N];
    GOSSAMER_UNROLL
    for (int i = 0; i < N; ++i) {
      if constexpr (C == 8) code[i] = _mm512_loadu_si512(rows + t * row_step + i * 64);
      else code[i] = _mm512_and_si512(_mm512_srl_epi32(_mm512_loadu_si512(rows + t * row_step), _mm_cvtsi32_si128(shift + i * C)), mask);
    }
    GOSSAMER_UNROLL
    for (int g = 0; g < G; ++g) {
      int32_t hw, lw;
      std::memcpy(&hw, high + g * kBlock + t * 4, 4), std::memcpy(&lw, low + g * kBlock + t * 4, 4);
      const __m512i x = _mm512_set1_epi32(hw), y = _mm512_set1_epi32(lw);
      GOSSAMER_UNROLL
      for (int i = 0; i < N; ++i) {
        add_products(h[g][i], x, code[i]);
        add_products(l[g][i], y, code[i]);
      }
    }
  }
  for (int g = 0; g < G; ++g)
    for (int i = 0; i < N; ++i) {
      const vf x = fma(_mm512_cvtepi32_ps(h[g][i]), splat(256.0f), _mm512_cvtepi32_ps(l[g][i]));
      store(acc + g * stride + i * 16, fma(x, splat(by[g]), load(acc + g * stride + i * 16)));
    }
}

template <int C, int G>
void add_quads(const uint8_t* buffer, int64_t bytes, int64_t quads, const uint8_t* high, const uint8_t* low, const float* by,
               float* acc, int64_t stride) {
  const int64_t step = 4 * bytes;
  if constexpr (C == 8) {
    int64_t v = 0;
    for (; v + 128 <= step; v += 128) add_places<8, G, 2>(buffer + v, step, quads, high, low, 0, by, acc + v / 4, stride);
    if (v < step) add_places<8, G, 1>(buffer + v, step, quads, high, low, 0, by, acc + v / 4, stride);
  } else {
    for (int64_t v = 0; v < step; v += 64)
      for (int n = 0; n < 8 / C; n += 2)
        add_places<C, G, 2>(buffer + v, step, quads, high, low, n * C, by, acc + (v / 64 * (8 / C) + n) * 16, stride);
  }
}

template <int C>
void interleave(const uint8_t* const* rows, int64_t quads, int64_t bytes, int lanes, uint8_t* out) {
  for (int64_t t = 0; t < quads; ++t, rows += 4, out += 4 * bytes) {
    if (lanes == 4) interleave_rows<C, 4>(rows, bytes, out);
    else if (lanes == 2) interleave_rows<C, 2>(rows, bytes, out);
    else interleave_rows<C, 1>(rows, bytes, out);
  }
}
#endif

// The channel that lies at a place of the interleaved sums.
int64_t channel_at(int64_t place, int bits, int lanes) {
  const int64_t sub = 8 / bits, vector = place / 16 / sub, n = place / 16 % sub;
  const int64_t unit = vector * 4 + place % 16 / 4, inside = unit % (4 * lanes);
  const int64_t word = unit / (4 * lanes) * (4 * lanes) + inside % lanes * 4 + inside / lanes;
  return word * (32 / bits) + 4 * n + place % 4;
}

template <class T, class S>
class QuantizedAttention : public Pieces<T, QuantizedAttention<T, S>> {
  using Base = Pieces<T, QuantizedAttention<T, S>>;
  friend Base;
  using typename Base::Partial;
  using Base::a, Base::block_rows, Base::group_heads, Base::per_sequence, Base::stride;

 public:
  explicit QuantizedAttention(const QuantizedArgs& args)
      : Base(args.attention, args.attention.indices ? kListedQuantized : kBlock),
        x(args),
        v_bytes(a.dim * args.value.bits / 8),
        lanes(v_bytes % 64 == 0 ? 4 : v_bytes % 32 == 0 ? 2 : v_bytes % 16 == 0 ? 1 : 0),
        digits_at(ceil_div(a.dim, 64) * 64),
        middle(float((1 << args.key.bits) - 1) / 2) {
#if !defined(GOSSAMER_AVX512)
    lanes = 0;
#endif
  }

  void layout(Scratch& s) {
    Base::layout(s);
    s.take(places, lanes ? a.dim : 0);
    s.take(work, a.threads);
    s.take(floats, a.threads * float_count());
    s.take(bytes, a.threads * byte_count());
    s.take(ids, a.threads * 2 * kBlock);
    s.take(pointers, a.threads * 4 * (kBlock + 16));
  }

  void prepare() {
    if (lanes)
      for (int64_t p = 0; p < a.dim; ++p) places[p] = int32_t(channel_at(p, x.value.bits, lanes));
    for (int t = 0; t < a.threads; ++t) {
      Work& w = work[t];
      float* f = floats + t * float_count();
      const auto take = [&](int64_t count) { return f += count, f - count; };
      w.query = take(group_heads * stride), w.working = take(group_heads * stride);
      w.placed = take(group_heads * stride), w.natural = take(group_heads * stride);
      w.logits = take(group_heads * kBlock);
      w.shift = take(ceil_div(group_heads, 16) * 16), w.factor = take(ceil_div(group_heads, 16) * 16);
      w.step = take(kBlock), w.zero = take(kBlock), w.weights = take(4 * kBlock);
      w.folded = take(stride), w.group_step = take(stride), w.group_zero = take(stride), w.sums = take(4 * stride);
      uint8_t* p = bytes + t * byte_count();
      const auto claim = [&](int64_t count) { return p += count, p - count; };
      w.tile = claim(kPair * a.dim + 64), w.buffer = claim(buffer_size());
      w.high = claim(4 * kBlock), w.low = claim(4 * kBlock);
      w.digits = reinterpret_cast<int8_t*>(claim(group_heads * 2 * digits_at));
      w.queries = reinterpret_cast<Digits*>(claim(group_heads * int64_t(sizeof(Digits)) + 64));
      for (int64_t g = 0; g < group_heads; ++g)
        w.queries[g] = {w.digits + 2 * g * digits_at, w.digits + (2 * g + 1) * digits_at, 0.0f, 0.0f, 0.0f};
      std::memset(w.digits, 0, size_t(group_heads * 2 * digits_at));
      w.old_ids = ids + t * 2 * kBlock, w.new_ids = w.old_ids + kBlock;
      w.keys = pointers + t * 4 * (kBlock + 16), w.values = w.keys + kBlock + 16;
    }
  }

 private:
  // What one thread works with.
  struct Work {
    float *query, *working;    // [heads][stride]: in order, and as attend.h has it
    float *placed, *natural;   // [heads][stride] sums of values, as interleaved and in order
    float *logits;             // [heads][kBlock]
    float *shift, *factor;     // [heads]: what is added to every channel; what earlier sums are multiplied by
    float *step, *zero;        // [kBlock] of rows
    float *weights;            // [4][kBlock]
    float *folded, *group_step, *group_zero, *sums;
    uint8_t *tile, *buffer, *high, *low;
    int8_t* digits;
    Digits* queries;
    int32_t *old_ids, *new_ids;
    const uint8_t **keys, **values;
    int64_t key_group, value_group;
    bool placed_used, natural_used, recent_used;
  };

  int64_t float_count() const {
    const int64_t count = group_heads * (4 * stride + kBlock) + 2 * ceil_div(group_heads, 16) * 16 + 6 * kBlock + 7 * stride;
    return ceil_div(count, 16) * 16;
  }
  int64_t buffer_size() const { return imax(kBuffer, 64 * v_bytes) + 64; }
  int64_t byte_count() const {
    const int64_t count = kPair * a.dim + 64 + buffer_size() + 8 * kBlock + group_heads * (2 * digits_at + int64_t(sizeof(Digits))) + 64;
    return ceil_div(count, 64) * 64;
  }

  void segment(int thread, int64_t group, int64_t from, int64_t to, Partial* part, float* out) {
    const int64_t b = group / per_sequence, head = group % per_sequence, kv = head / (per_sequence / a.kv_heads);
    const int64_t low = a.ranges.begin(b), high = a.ranges.end(b);
    Work& w = work[thread];
    const Side<S> key(x.key, b, kv), value(x.value, b, kv);
    const T* raw = static_cast<const T*>(a.query) + b * a.q_batch + head * group_heads * a.q_head;
    for (int64_t g = 0; g < group_heads; ++g) {
      for (int64_t c = 0; c < a.dim; ++c) w.query[g * stride + c] = to_float(raw[g * a.q_head + c]);
      if (!x.key.group) to_digits<S>(w.query + g * stride, nullptr, nullptr, a.dim, middle, w.folded, w.queries[g]);
      w.shift[g] = 0.0f;
    }
    w.key_group = w.value_group = -1;
    w.placed_used = w.natural_used = w.recent_used = false;
    std::memset(w.placed, 0, size_t(2 * group_heads * stride) * sizeof(float));
    for (int64_t count; from < to; from += count) {
      count = imin(block_rows, to - from);
      int64_t old = 0, fresh = 0;
      if (a.indices) {
        const int32_t* chosen = a.indices + group * a.k + from;
        int64_t bad = 0;
        for (int64_t i = 0; i < count; ++i) bad |= (chosen[i] < low) | (chosen[i] >= high);
        if (bad) return void(this->status = kBadIndex);
        for (int64_t i = 0; i < count; ++i)
          if (chosen[i] < x.split) w.old_ids[old++] = chosen[i];
          else w.new_ids[fresh++] = chosen[i];
      } else {
        old = imin(imax(x.split - (low + from), 0), count), fresh = count - old;
        for (int64_t i = 0; i < old; ++i) w.old_ids[i] = int32_t(low + from + i);
        for (int64_t i = 0; i < fresh; ++i) w.new_ids[i] = int32_t(low + from + old + i);
      }
      if (old) attend_old(w, key, value, old, part, out);
      if (fresh) attend_recent(w, raw, b, kv, fresh, part, out);
    }
    for (int64_t g = 0; g < group_heads; ++g) {
      float *natural = w.natural + g * stride, *to_order = out + g * stride;
      if (w.placed_used)
        for (int64_t p = 0; p < a.dim; ++p) natural[places[p]] += w.placed[g * stride + p];
      const int64_t pairs = a.dim / (2 * kLanes) * 2 * kLanes;
      for (int64_t c = 0; c < a.dim; ++c) {
        const int64_t at = sizeof(T) == 2 && c < pairs ? c / (2 * kLanes) * (2 * kLanes) + c % 2 * kLanes + c % (2 * kLanes) / 2 : c;
        to_order[at] += natural[c] + w.shift[g];
      }
    }
  }

  static void scale_by(float* p, float factor, int64_t count) {
    for (int64_t c = 0; c < count; c += kLanes) store(p + c, load(p + c) * factor);
  }

  // Softmax over the block's logits, for all heads; what was summed before is brought to the new maximum.
  void weigh(Work& w, int64_t count, Partial* part, float* out) {
    for (int64_t g = 0; g < group_heads; ++g) {
      const float f = softmax_update(w.logits + g * kBlock, count, a.scale, part[g].peak, part[g].sum);
      if (f == 1.0f) continue;
      w.shift[g] *= f;
      if (w.placed_used) scale_by(w.placed + g * stride, f, stride);
      if (w.natural_used) scale_by(w.natural + g * stride, f, stride);
      if (w.recent_used) scale_by(out + g * stride, f, stride);
    }
  }

  // Runs body(bits as a constant, heads as a constant, first head) for all heads.
  template <int Most, class Body>
  void for_heads(int bits, const Body& body) {
    for (int64_t g = 0; g < group_heads; g += Most) {
      const int64_t n = imin(Most, group_heads - g);
      const auto with = [&](auto c) {
        if (n == 1) body(c, Constant<1>{}, g);
        else if (n == 2) body(c, Constant<2>{}, g);
        else if constexpr (Most > 2) {
          if (n == 3) body(c, Constant<3>{}, g);
          else body(c, Constant<4>{}, g);
        }
      };
      if (bits == 8) with(Constant<8>{});
      else if (bits == 4) with(Constant<4>{});
      else with(Constant<2>{});
    }
  }
  template <int N>
  struct Constant {
    static constexpr int value = N;
  };

  // End of the rows from i on that share the scales of their channels.
  static int64_t run_end(const QuantizedRows& rows, const int32_t* ids, int64_t i, int64_t count) {
    const int64_t first = ids[i] / rows.group * rows.group, last = first + rows.group;
    while (i < count && ids[i] >= first && ids[i] < last) ++i;
    return i;
  }

  // Scales of the block's rows as floats; a dense range has them side by side.
  void gather(const S* from, const int32_t* ids, int64_t count, float* to) const {
    if (a.indices)
      for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[ids[i]]);
    else
      for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[ids[0] + i]);
  }

  void attend_old(Work& w, const Side<S>& key, const Side<S>& value, int64_t count, Partial* part, float* out) {
    const int64_t k_bytes = a.dim * x.key.bits / 8;
    for (int64_t i = 0; i < count; ++i) {
      w.keys[i] = key.codes + w.old_ids[i] * x.key.c_row;
      w.values[i] = value.codes + w.old_ids[i] * x.value.c_row;
    }
    for (int64_t i = count; i < count + 16; ++i) w.keys[i] = w.keys[count - 1], w.values[i] = w.values[count - 1];
    if (a.indices)
      for (int64_t i = 0; i < count; ++i) prefetch_row(w.keys[i], k_bytes);
    score(w, key, count, k_bytes);
    weigh(w, count, part, out);
    add(w, value, count);
  }

  void score(Work& w, const Side<S>& key, int64_t count, int64_t k_bytes) {
    if (!x.key.group) {
      gather(key.step, w.old_ids, count, w.step), gather(key.zero, w.old_ids, count, w.zero);
      for (int64_t i = 0; i < count; i += kPair) tile(w, i, imin(kPair, count - i), k_bytes, w.step + i, w.zero + i);
      return;
    }
    for (int64_t i = 0, end; i < count; i = end) {
      end = run_end(x.key, w.old_ids, i, count);
      if (end - i < kRun) {
        for (int64_t r = i; r < end; ++r) prefetch_row(w.values[r], v_bytes);
        for_heads<4>(x.key.bits, [&](auto c, auto n, int64_t g) {
          dot_rows<c.value, n.value>(key, w.keys + i, w.old_ids + i, end - i, w.query + g * stride, stride, a.dim,
                                     w.logits + g * kBlock + i);
        });
        continue;
      }
      const int64_t line = key.line(w.old_ids[i]);
      if (line != w.key_group) {
        for (int64_t g = 0; g < group_heads; ++g)
          to_digits<S>(w.query + g * stride, key.step + line, key.zero + line, a.dim, middle, w.folded, w.queries[g]);
        w.key_group = line;
      }
      for (int64_t r = i; r < end; r += kPair) tile(w, r, imin(kPair, end - r), k_bytes, nullptr, nullptr);
    }
  }

  void tile(Work& w, int64_t at, int64_t rows, int64_t k_bytes, const float* step, const float* zero) {
    for (int64_t i = at; i < at + rows; ++i) prefetch_row(w.values[i], v_bytes);
    to_tile(w.keys + at, k_bytes, w.tile);
    to_tile(w.keys + at + (rows > kTokens ? kTokens : 0), k_bytes, w.tile + k_bytes * kTokens);  // a short run takes rows of the next along: their scores are overwritten
    for_heads<kHeads>(x.key.bits, [&](auto c, auto n, int64_t g) {
      const auto dot = dot_tiles<c.value, n.value>;
      if (at + kPair <= kBlock) {
        dot(w.tile, k_bytes / 4, w.queries + g, step, zero, w.logits + g * kBlock + at);
      } else {
        alignas(64) float some[n.value][kBlock];
        dot(w.tile, k_bytes / 4, w.queries + g, step, zero, some[0]);
        for (int h = 0; h < n.value; ++h) std::memcpy(w.logits + (g + h) * kBlock + at, some[h], size_t(rows) * sizeof(float));
      }
    });
  }

  void add(Work& w, const Side<S>& value, int64_t count) {
    const bool channel = x.value.group;
    if (!channel) {
      gather(value.step, w.old_ids, count, w.step), gather(value.zero, w.old_ids, count, w.zero);
      for (int64_t i = count; i % 16; ++i) w.step[i] = w.zero[i] = 0.0f;
    }
    if (lanes && !channel) return add_interleaved(w, value, 0, count);
    if (channel) {
      for (int64_t i = 0, end; i < count; i = end) {
        end = run_end(x.value, w.old_ids, i, count);
        if (lanes && end - i >= kRun) add_interleaved(w, value, i, end);
        else add_floats<true>(w, value, i, end);
      }
    } else {
      for (int64_t g = 0; g < group_heads; ++g) {
        float* p = w.logits + g * kBlock;
        vf sum = {};
        for (int64_t i = 0; i < count; i += kLanes) {
          sum = fma(load(p + i), load(w.zero + i), sum);
          store(p + i, load(p + i) * load(w.step + i));
        }
        w.shift[g] += hsum(sum);
      }
      add_floats<false>(w, value, 0, count);
    }
  }

  template <bool Channel>
  void add_floats(Work& w, const Side<S>& value, int64_t i, int64_t end) {
    w.natural_used = true;
    for_heads<kHeads>(x.value.bits, [&](auto c, auto n, int64_t g) {
      add_rows<c.value, n.value, Channel>(value, w.values + i, w.old_ids + i, end - i, w.logits + g * kBlock + i,
                                          w.natural + g * stride, stride, a.dim);
    });
  }

  // Rows [from, to) of the block by the dot-product instructions; with scales per channel they share them.
  void add_interleaved([[maybe_unused]] Work& w, [[maybe_unused]] const Side<S>& value, [[maybe_unused]] int64_t from,
                       [[maybe_unused]] int64_t to) {
#if defined(GOSSAMER_AVX512)
    const bool channel = x.value.group;
    const int64_t some = imax(kBuffer / v_bytes / 16 * 16, 16);
    w.placed_used = true;
    if (channel) {
      const int64_t line = value.line(w.old_ids[from]);
      if (line != w.value_group)
        for (int64_t p = 0; p < a.dim; ++p) {
          w.group_step[p] = to_float(value.step[line + places[p]]);
          w.group_zero[p] = to_float(value.zero[line + places[p]]);
        }
      w.value_group = line;
    }
    for (int64_t i = from; i < to; i += some) {
      const int64_t rows = imin(some, to - i), quads = ceil_div(rows, 4);
      const int bits = x.value.bits;
      if (!a.indices)  // the keys of the next block come while values are added
        for (int64_t r = i; r < i + rows; ++r) prefetch_row(w.keys[r] + block_rows * x.key.c_row, a.dim * x.key.bits / 8);
      if (bits == 8) interleave<8>(w.values + i, quads, v_bytes, lanes, w.buffer);
      else if (bits == 4) interleave<4>(w.values + i, quads, v_bytes, lanes, w.buffer);
      else interleave<2>(w.values + i, quads, v_bytes, lanes, w.buffer);
      for_heads<4>(bits, [&](auto c, auto n, int64_t g) {
        float by[n.value], plus[n.value], mass[n.value];
        for (int h = 0; h < n.value; ++h) {
          const float* p = w.logits + (g + h) * kBlock + i;
          float* weight = w.weights + h * kBlock;
          vf top = {}, zeros = {}, sum = {};
          for (int64_t r = 0; r < rows; r += 16) {
            const __mmask16 real = __mmask16(rows - r >= 16 ? 0xffff : (1 << (rows - r)) - 1);
            const vf probability = _mm512_maskz_loadu_ps(real, p + r);
            const vf x16 = channel ? probability : probability * load(w.step + i + r);
            if (!channel) zeros = fma(probability, load(w.zero + i + r), zeros);
            sum += probability;
            top = vmax(x16, top);
            store(weight + r, x16);
          }
          const float most = hmax(top), inverse = most > 0.0f ? 65535.0f / most : 0.0f;
          __m512i total = {};
          for (int64_t r = 0; r < rows; r += 16) {
            const __m512i code = _mm512_cvtps_epi32(load(weight + r) * inverse);
            total = _mm512_add_epi32(total, code);
            _mm_storeu_si128((__m128i*)(w.high + h * kBlock + r), _mm512_cvtepi32_epi8(_mm512_srli_epi32(code, 8)));
            _mm_storeu_si128((__m128i*)(w.low + h * kBlock + r), _mm512_cvtepi32_epi8(code));
          }
          by[h] = most / 65535.0f;
          plus[h] = c.value == 8 ? 128.0f * by[h] * hsum(_mm512_cvtepi32_ps(total)) : 0.0f;
          mass[h] = hsum(sum);
          if (!channel) w.shift[g + h] += plus[h] + hsum(zeros);
        }
        if (!channel) {
          add_quads<c.value, n.value>(w.buffer, v_bytes, quads, w.high, w.low, by, w.placed + g * stride, stride);
          return;
        }
        std::memset(w.sums, 0, size_t(n.value * stride) * sizeof(float));
        add_quads<c.value, n.value>(w.buffer, v_bytes, quads, w.high, w.low, by, w.sums, stride);
        for (int h = 0; h < n.value; ++h)
          for (int64_t p = 0; p < a.dim; p += 16) {
            float* to_place = w.placed + (g + h) * stride + p;
            const vf value16 = (load(w.sums + h * stride + p) + plus[h]) * load(w.group_step + p);
            store(to_place, load(to_place) + fma(load(w.group_zero + p), splat(mass[h]), value16));
          }
      });
    }
#endif
  }

  void attend_recent(Work& w, const T* raw, int64_t b, int64_t kv, int64_t count, Partial* part, float* out) {
    const T* key = static_cast<const T*>(a.key) + b * a.k_batch + kv * a.k_head;
    const T* value = static_cast<const T*>(a.value) + b * a.v_batch + kv * a.v_head;
    const T **keys = reinterpret_cast<const T**>(w.keys), **values = reinterpret_cast<const T**>(w.values);
    for (int64_t i = 0; i < count + 16; ++i) {
      const int64_t row = w.new_ids[imin(i, count - 1)] - x.split;
      keys[i] = key + row * a.k_row, values[i] = value + row * a.v_row;
    }
    if (!w.recent_used)
      for (int64_t g = 0; g < group_heads; ++g) to_working_order(raw + g * a.q_head, a.dim, w.working + g * stride);
    heads_of_four([&](auto n, int64_t g) {
      const QueryHeads<T> heads{w.working + g * stride, raw + g * a.q_head, stride, a.q_head};
      dot_block<T, n.value, true>(keys, nullptr, count, heads, a.dim, w.logits + g * kBlock);
    });
    weigh(w, count, part, out);
    w.recent_used = true;
    constexpr float ones[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    heads_of_four([&](auto n, int64_t g) {
      add_block<T, n.value, true>(values, nullptr, count, w.logits + g * kBlock, ones, out + g * stride, stride, a.dim);
    });
  }

  template <class Body>
  void heads_of_four(const Body& body) {
    for (int64_t g = 0; g < group_heads; g += 4) switch (imin(4, group_heads - g)) {
        case 1: body(Constant<1>{}, g); break;
        case 2: body(Constant<2>{}, g); break;
        case 3: body(Constant<3>{}, g); break;
        default: body(Constant<4>{}, g);
      }
  }

  const QuantizedArgs& x;
  const int64_t v_bytes;
  int lanes;  // of 16 bytes that are interleaved at a time; 0: values go the way of floats
  const int64_t digits_at;
  const float middle;
  int32_t* places;
  Work* work;
  float* floats;
  uint8_t* bytes;
  int32_t* ids;
  const uint8_t** pointers;
};

template <class T, class S>
Status attend(const QuantizedArgs& args) {
  QuantizedAttention<T, S> attention(args);
  scratch.layout([&](Scratch& s) { attention.layout(s); });
  attention.prepare();
  attention.plan();
  if (attention.status == kOk) {
    parallel(args.attention.threads, [&](int thread, int threads) {
      attention.run(thread);
      barrier(threads);
      attention.merge(thread, threads);
    });
  }
  return Status(attention.status.load());
}

}  // namespace

Status quantized_attention(const QuantizedArgs& args) {
  if (!args.attention.ranges.valid(args.attention.batch)) return kBadRange;
  const bool half = args.scales == kBFloat16;
  if (args.attention.dtype == kBFloat16) return half ? attend<bf16, bf16>(args) : attend<bf16, float>(args);
  return half ? attend<float, bf16>(args) : attend<float, float>(args);
}

}  // namespace gossamer::GOSSAMER_ISA
