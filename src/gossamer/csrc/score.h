// Scores of tokens from their labels (layout: ops/labels.py), shared by label_scores and label_attention.
#pragma once
#include "parallel.h"

namespace gossamer::GOSSAMER_ISA {

constexpr int kTokens = 16;  // of a tile

// The label channels of the queries of one output group, gathered and, for packed labels, quantised.
struct LabelQuery {
  const float* values;   // [G][r]
  const int32_t* quads;  // [G][quads], four int8 channels each
  float scale, total;    // of one query: value of an int8 step, sum of the float values
};

#if defined(GOSSAMER_AVX512)
constexpr int kVectors = 1;
#else
constexpr int kVectors = kTokens / kLanes;
#endif

struct TileScores {
  vf v[kVectors];
};

// Sums over packed channels, exactly: dot[t * G + g][token] = sum of code * int8 query, for tiles `words` apart.
template <int C, int G, int Tiles = 1>
GOSSAMER_INLINE void dot_codes(const uint8_t* codes, int64_t words, const int32_t* const* quads, TileScores* dot) {
  constexpr int kSub = 8 / C;
#if defined(GOSSAMER_AVX512)
  const __m512i mask = _mm512_set1_epi8(char((1 << C) - 1));
  __m512i sum[Tiles][G];
#pragma GCC unroll 8
  for (int t = 0; t < Tiles; ++t)
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) sum[t][g] = __m512i{};
  for (int64_t w = 0; w < words; ++w) {
    __m512i word[Tiles];
#pragma GCC unroll 8
    for (int t = 0; t < Tiles; ++t) word[t] = _mm512_loadu_si512(codes + (t * words + w) * 64);
#pragma GCC unroll 8
    for (int n = 0; n < kSub; ++n) {
      __m512i code[Tiles];
#pragma GCC unroll 8
      for (int t = 0; t < Tiles; ++t) code[t] = C == 8 ? word[t] : _mm512_and_si512(_mm512_srli_epi32(word[t], n * C), mask);
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) {
        const __m512i quad = _mm512_set1_epi32(quads[g][w * kSub + n]);
#pragma GCC unroll 8
        for (int t = 0; t < Tiles; ++t) add_products(sum[t][g], code[t], quad);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < Tiles; ++t)
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) dot[t * G + g].v[0] = _mm512_cvtepi32_ps(sum[t][g]);
#elif defined(GOSSAMER_AVX2)
  if constexpr (Tiles > 1) {
    for (int t = 0; t < Tiles; ++t) dot_codes<C, G>(codes + t * words * 64, words, quads, dot + t * G);
    return;
  }
  // maddubs saturates at 16 bits, so 8-bit codes go through it as two nibbles: 2 * 15 * 127 fits.
  const __m256i mask = _mm256_set1_epi8(char((1 << (C == 8 ? 4 : C)) - 1)), ones = _mm256_set1_epi16(1);
  __m256i sum[G][2] = {}, high[G][2] = {};
  for (int64_t w = 0; w < words; ++w)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i word = _mm256_loadu_si256((const __m256i*)(codes + w * 64 + half * 32));
#pragma GCC unroll 8
      for (int n = 0; n < kSub; ++n) {
        const __m256i code = _mm256_and_si256(_mm256_srli_epi32(word, n * C), mask);
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) {
          const __m256i quad = _mm256_set1_epi32(quads[g][w * kSub + n]);
          sum[g][half] = _mm256_add_epi32(sum[g][half], _mm256_madd_epi16(_mm256_maddubs_epi16(code, quad), ones));
          if constexpr (C == 8) {
            const __m256i upper = _mm256_and_si256(_mm256_srli_epi32(word, 4), mask);
            high[g][half] = _mm256_add_epi32(high[g][half], _mm256_madd_epi16(_mm256_maddubs_epi16(upper, quad), ones));
          }
        }
      }
    }
  for (int g = 0; g < G; ++g)
    for (int half = 0; half < 2; ++half)
      dot[g].v[half] = _mm256_cvtepi32_ps(_mm256_add_epi32(sum[g][half], _mm256_slli_epi32(high[g][half], 4)));
#else
  if constexpr (Tiles > 1) {
    for (int t = 0; t < Tiles; ++t) dot_codes<C, G>(codes + t * words * 64, words, quads, dot + t * G);
    return;
  }
  int32_t sum[G][kTokens] = {};
  for (int64_t w = 0; w < words; ++w)
    for (int n = 0; n < kSub; ++n)
      for (int g = 0; g < G; ++g) {
        const int32_t quad = quads[g][w * kSub + n];
        for (int t = 0; t < kTokens; ++t)
          for (int j = 0; j < 4; ++j)
            sum[g][t] += (codes[w * 64 + t * 4 + j] >> (n * C) & ((1 << C) - 1)) * int8_t(uint32_t(quad) >> (8 * j));
      }
  for (int g = 0; g < G; ++g) {
    float exact[kTokens];
    for (int t = 0; t < kTokens; ++t) exact[t] = float(sum[g][t]);
    for (int i = 0; i < kVectors; ++i) dot[g].v[i] = load(exact + i * kLanes);
  }
#endif
}

template <class T, int G>
GOSSAMER_INLINE void dot_floats(const T* codes, int64_t r, const float* const* values, TileScores* dot) {
  vf sum[G][kVectors] = {};
  for (int64_t c = 0; c < r; ++c)
    for (int i = 0; i < kVectors; ++i) {
      const vf channel = load(codes + c * kTokens + i * kLanes);
      for (int g = 0; g < G; ++g) sum[g][i] = fma(channel, splat(values[g][c]), sum[g][i]);
    }
  for (int g = 0; g < G; ++g)
    for (int i = 0; i < kVectors; ++i) dot[g].v[i] = sum[g][i];
}

class Scorer {
 public:
  explicit Scorer(const ScoreArgs& args)
      : a(args),
        packed(args.labels.kind <= 8),
        quads(packed ? args.labels.words * 8 / args.labels.kind : 0),
        summed(args.reduce == kSum && args.labels.heads == args.kv_heads),
        label_queries(summed ? 1 : args.heads / args.labels.heads),
        out_heads(args.reduce == kNone ? args.heads : args.kv_heads),
        tiles(ceil_div(args.ranges.rows, kTokens)) {}

  void layout(Scratch& scratch) {
    const int64_t count = a.batch * a.labels.heads * label_queries;
    scratch.take(queries, count);
    scratch.take(values, count * a.labels.r);
    scratch.take(codes, count * quads * 4);
  }

  // Gathers and quantises the label channels of all queries. Called by one thread, before the chunks.
  Status plan() {
    const int64_t r = a.labels.r, heads = a.labels.heads, group = a.heads / heads;
    for (int64_t i = 0; i < heads * r; ++i)
      if (a.channels[i] < 0 || a.channels[i] >= a.dim) return kBadChannel;
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t g = 0; g < label_queries; ++g) {
          const int64_t i = (b * heads + h) * label_queries + g;
          gather(b, h * group + g, summed ? group : 1, a.channels + h * r, values + i * r);
          quantise(values + i * r, queries[i], codes + i * quads * 4);
          queries[i].values = values + i * r;
          queries[i].quads = reinterpret_cast<const int32_t*>(codes + i * quads * 4);
        }
    // Enough chunks for balance, each long enough to stream.
    chunk_tiles = imax(ceil_div(tiles * a.batch * a.kv_heads, a.threads * 16), 16);
    chunks = ceil_div(tiles, chunk_tiles);
    return kOk;
  }

  // Scores chunks of tokens until none is left.
  void run() {
    const int64_t lines = out_heads / a.kv_heads;
    for (int64_t i; (i = queue.next()) < a.batch * a.kv_heads * chunks;) {
      const int64_t unit = i / chunks, first = i % chunks * chunk_tiles;
      chunk(unit / a.kv_heads, unit % a.kv_heads, first, imin(first + chunk_tiles, tiles), a.out + unit * lines * a.out_row);
    }
  }

  // Scores all tokens for one KV head of one sequence, into the lines that belong to it.
  void whole(int64_t b, int64_t kv, float* out) { chunk(b, kv, 0, tiles, out); }

 private:
  enum Mode { kStore, kJoinMax, kJoinSum };

  void gather(int64_t b, int64_t head, int64_t count, const int32_t* channels, float* out) {
    for (int64_t c = 0; c < a.labels.r; ++c) {
      double sum = 0.0;  // sums of queries are taken in double, so that their order doesn't show
      for (int64_t g = 0; g < count; ++g) {
        const int64_t at = b * a.q_batch + (head + g) * a.q_head + channels[c];
        sum += a.dtype == kBFloat16 ? to_float(static_cast<const bf16*>(a.query)[at]) : static_cast<const float*>(a.query)[at];
      }
      out[c] = float(sum);
    }
  }

  void quantise(const float* x, LabelQuery& query, int8_t* out) {
    const int64_t r = a.labels.r;
    float top = 0.0f;
    double total = 0.0;
    for (int64_t c = 0; c < r; ++c) {
      top = __builtin_fabsf(x[c]) > top ? __builtin_fabsf(x[c]) : top;
      total += x[c];
    }
    query.scale = top / 127.0f, query.total = float(total);
    const float inverse = top > 0.0f ? 127.0f / top : 0.0f;
    for (int64_t c = 0; c < quads * 4; ++c) {
      const float code = c < r ? __builtin_nearbyintf(x[c] * inverse) : 0.0f;
      out[c] = code >= -127.0f && code <= 127.0f ? int8_t(code) : 0;  // out of range only for a NaN or infinite query
    }
  }

  void chunk(int64_t b, int64_t kv, int64_t first, int64_t last, float* lines) {
    const int64_t share = a.labels.heads / a.kv_heads;  // label heads that belong to this KV head
    for (int64_t s = 0; s < share; ++s) {
      const int64_t label = kv * share + s;
      for (int64_t g = 0; g < label_queries; g += 4) {
        float* out = lines + (a.reduce == kNone ? s * label_queries + g : 0) * a.out_row;
        const Mode mode = a.reduce == kNone || (s == 0 && g == 0) ? kStore : a.reduce == kMax ? kJoinMax : kJoinSum;
        const LabelQuery* q = queries + (b * a.labels.heads + label) * label_queries + g;
        switch (imin(label_queries - g, 4)) {
          case 1: typed<1>(b, label, q, first, last, out, mode); break;
          case 2: typed<2>(b, label, q, first, last, out, mode); break;
          case 3: typed<3>(b, label, q, first, last, out, mode); break;
          default: typed<4>(b, label, q, first, last, out, mode);
        }
      }
    }
  }

  template <int G>
  void typed(int64_t b, int64_t label, const LabelQuery* q, int64_t first, int64_t last, float* out, Mode mode) {
    switch (a.labels.kind) {
      case 1: score<1, uint8_t, G>(b, label, q, first, last, out, mode); break;
      case 2: score<2, uint8_t, G>(b, label, q, first, last, out, mode); break;
      case 4: score<4, uint8_t, G>(b, label, q, first, last, out, mode); break;
      case 8: score<8, uint8_t, G>(b, label, q, first, last, out, mode); break;
      case 16: score<0, float, G>(b, label, q, first, last, out, mode); break;
      default: score<0, bf16, G>(b, label, q, first, last, out, mode);
    }
  }

  // Scores tiles first .. last - 1 of one label head for G queries; C is the container in bits, 0 for floats.
  template <int C, class T, int G>
  void score(int64_t b, int64_t label, const LabelQuery* q, int64_t first, int64_t last, float* out, Mode mode) {
    const int64_t begin = a.ranges.begin(b), end = a.ranges.end(b), line = b * a.labels.heads + label;
    const int64_t tile_size = (C ? a.labels.words * 4 : a.labels.r) * kTokens;
    const T* tile = static_cast<const T*>(a.labels.codes) + (line * a.labels.tiles + first) * tile_size;
    const float *values[G], *step = a.labels.step + (line * a.labels.tiles + first) * kTokens,
                            *zero = a.labels.zero + (line * a.labels.tiles + first) * kTokens;
    const int32_t* quad[G];
    float scale[G], total[G];
    for (int g = 0; g < G; ++g) {
      values[g] = q[g].values, quad[g] = q[g].quads;
      scale[g] = q[g].scale, total[g] = q[g].total;
    }
    const bool join = a.reduce != kNone;
    for (int64_t t = first; t < last; ++t, tile += tile_size, step += kTokens, zero += kTokens) {
      TileScores dot[G];
      if (t * kTokens >= end || (t + 1) * kTokens <= begin) {
        for (int g = 0; g < G; ++g)
          for (vf& v : dot[g].v) v = splat(-kInf);
      } else {
        if constexpr (C) {
          dot_codes<C ? C : 8, G>(reinterpret_cast<const uint8_t*>(tile), a.labels.words, quad, dot);
          for (int i = 0; i < kVectors; ++i) {
            const vf by = load(step + i * kLanes), plus = load(zero + i * kLanes);
            for (int g = 0; g < G; ++g) dot[g].v[i] = by * scale[g] * dot[g].v[i] + plus * total[g];
          }
        } else {
          dot_floats<T, G>(tile, a.labels.r, values, dot);
        }
        if (t * kTokens < begin || (t + 1) * kTokens > end)
          for (int g = 0; g < G; ++g)
            for (int i = 0; i < kTokens; ++i)
              if (t * kTokens + i < begin || t * kTokens + i >= end) reinterpret_cast<float*>(dot + g)[i] = -kInf;
      }
      if (join)
        for (int g = 1; g < G; ++g)
          for (int i = 0; i < kVectors; ++i)
            dot[0].v[i] = a.reduce == kMax ? join_max(dot[0].v[i], dot[g].v[i]) : dot[0].v[i] + dot[g].v[i];
      for (int g = 0; g < (join ? 1 : G); ++g) put(dot[g], out + g * a.out_row + t * kTokens, a.ranges.rows - t * kTokens, mode);
    }
  }

  GOSSAMER_INLINE static vf join_max(vf x, vf y) { return x != x ? x : (x > y ? x : y); }  // a NaN wins, as in torch

  GOSSAMER_INLINE void put(TileScores& scores, float* out, int64_t room, Mode mode) {
    float edge[kTokens];
    float* to = out;
    if (room < kTokens) {  // the last tile of an exactly sized output
      std::memcpy(edge, out, size_t(room) * sizeof(float));
      for (int64_t i = room; i < kTokens; ++i) edge[i] = 0.0f;
      to = edge;
    }
    for (int i = 0; i < kVectors; ++i) {
      vf x = scores.v[i];
      if (mode == kJoinMax) x = join_max(load(to + i * kLanes), x);
      if (mode == kJoinSum) x = load(to + i * kLanes) + x;
      store(to + i * kLanes, x);
    }
    if (room < kTokens) std::memcpy(out, edge, size_t(room) * sizeof(float));
  }

  const ScoreArgs& a;
  const bool packed;
  const int64_t quads;
  const bool summed;              // the sum over the group is taken on the query
  const int64_t label_queries;    // query vectors of one label head
  const int64_t out_heads, tiles;
  LabelQuery* queries;
  float* values;
  int8_t* codes;
  int64_t chunk_tiles = 1, chunks = 0;
  Queue queue;
};

}  // namespace gossamer::GOSSAMER_ISA
