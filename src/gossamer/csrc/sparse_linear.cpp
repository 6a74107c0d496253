// x times a sparse weight, for many rows of x (tokens). Tokens are the lanes: x is turned once into tiles [input][64 tokens],
// and a block row of the weight makes its outputs for a whole tile in registers, one broadcast weight times vectors of the
// tile at a time. A tile stays in L2 while the weight streams past. Sixteen outputs are then turned back together, so that
// whole cache lines of the output are written.
//
// In 8 bits a vector holds 16 tokens times four inputs, whose rows lie anywhere in the tile: they are laced together as they
// are read, once for four outputs.
#include "sparse_linear.h"
#include "transpose.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

thread_local Scratch scratch;

constexpr int64_t kUnit = 16;       // tokens of a square
constexpr int64_t kTile = 64;       // tokens of a tile
constexpr int kTileVectors = kLanes == 16 ? 4 : 2;  // vectors of tokens whose sums fit the registers, for four outputs
constexpr int64_t kPacked = 256;    // inputs that are turned in one piece of work
constexpr int64_t kTileBytes = 832 << 10;  // of a tile of floats that stays in L2

// Tiles of x, [inputs][width] each; the last may be narrower. E: float, or uint8_t in 8 bits.
template <class E>
struct Tiles {
  int64_t tokens, inputs, tile, rows;  // rows: inputs in whole squares
  E* data;

  Tiles(const SparseLinearArgs& a, int64_t size)
      : tokens(a.tokens), inputs(a.inputs), tile(size), rows(ceil_div(a.inputs, kUnit) * kUnit) {}
  int64_t count() const { return ceil_div(tokens, tile); }
  int64_t width(int64_t i) const { return imin(tile, ceil_div(tokens - i * tile, kUnit) * kUnit); }
  E* at(int64_t i) const { return data + i * tile * rows; }
  void layout(Scratch& s) { s.take(data, count() * tile * rows); }
};

// Sixteen inputs from k on of sixteen tokens: out[input * width + token].
template <class T>
GOSSAMER_INLINE void turn(const SparseLinearArgs& a, int64_t token, int64_t k, float* out, int64_t width) {
  const T* x = static_cast<const T*>(a.x) + token * a.x_row + k;
  const int64_t here = imin(kUnit, a.tokens - token), columns = imin(kUnit, a.inputs - k);
  alignas(64) float copy[kUnit][kUnit];
  const uint32_t* rows[kUnit];
  for (int64_t r = 0; r < kUnit; ++r) {
    if (r < here) prefetch(x + r * a.x_row + 8 * kUnit);  // sixteen rows at once are more than the hardware follows
    if (sizeof(T) == 4 && r < here && columns == kUnit) {
      rows[r] = reinterpret_cast<const uint32_t*>(x + r * a.x_row);
      continue;
    }
    rows[r] = reinterpret_cast<const uint32_t*>(copy[r]);
    for (int64_t j = 0; j < kUnit; j += kLanes)
      store(copy[r] + j, r < here && j < columns ? load_some(x + r * a.x_row + j, columns - j) : vf{});
  }
  transpose_words(rows, reinterpret_cast<uint32_t*>(out), width);
}

// out[r][v] = sums of R outputs for V vectors of tokens, over blocks of R outputs by C inputs.
template <int R, int C, int V>
__attribute__((noinline)) void multiply_blocks(const Blocks& blocks, const float* x, int64_t width, float* out, int64_t stride) {
  vf sum[R][V] = {};
  const float* w = blocks.values;
  for (int64_t i = 0; i < blocks.count; ++i, w += R * C) {
    const float* row = x + int64_t(blocks.columns[i]) * C * width;
    GOSSAMER_UNROLL
    for (int c = 0; c < C; ++c, row += width) {
      vf in[V];
      GOSSAMER_UNROLL
      for (int v = 0; v < V; ++v) in[v] = load(row + v * kLanes);
      GOSSAMER_UNROLL
      for (int r = 0; r < R; ++r) {
        const vf weight = splat(w[r * C + c]);
        GOSSAMER_UNROLL
        for (int v = 0; v < V; ++v) sum[r][v] = fma(weight, in[v], sum[r][v]);
      }
    }
  }
  GOSSAMER_UNROLL
  for (int r = 0; r < R; ++r)
    GOSSAMER_UNROLL
    for (int v = 0; v < V; ++v) store(out + r * stride + v * kLanes, sum[r][v]);
}

// The same for any width.
template <int R, int C>
GOSSAMER_INLINE void multiply_blocks(const Blocks& blocks, const float* x, int64_t width, float* out, int64_t stride) {
  for (int64_t n = 0; n < width;) {
    const int64_t vectors = imin(kTileVectors, (width - n) / kLanes);
    switch (vectors) {
      case 1: multiply_blocks<R, C, 1>(blocks, x + n, width, out + n, stride); break;
      case 2: multiply_blocks<R, C, 2>(blocks, x + n, width, out + n, stride); break;
#if defined(GOSSAMER_AVX512)
      case 3: multiply_blocks<R, C, 3>(blocks, x + n, width, out + n, stride); break;
#endif
      default: multiply_blocks<R, C, kTileVectors>(blocks, x + n, width, out + n, stride);
    }
    n += vectors * kLanes;
  }
}

#if defined(GOSSAMER_AVX512)
// Four rows of 16 tokens each, as 16 lanes of four inputs.
GOSSAMER_INLINE __m512i lace(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
  const auto piece = [](const uint8_t* p) GOSSAMER_LAMBDA { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
  __m512i v = _mm512_castsi128_si512(piece(a));
  v = _mm512_inserti32x4(v, piece(b), 1);
  v = _mm512_inserti32x4(v, piece(c), 2);
  v = _mm512_inserti32x4(v, piece(d), 3);
  const __m512i quads = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(quads, v), order);
}

// Groups of four blocks; U units of tokens. Tiles of 64 are stored in the order that lacing whole vectors undoes.
template <int U>
__attribute__((noinline)) void multiply_groups(const uint16_t* columns, const int8_t* values, int64_t count, const uint8_t* x,
                                               int32_t* out, int64_t stride) {
  __m512i sum[4][U];
  GOSSAMER_UNROLL
  for (int r = 0; r < 4; ++r)
    GOSSAMER_UNROLL
    for (int u = 0; u < U; ++u) sum[r][u] = _mm512_setzero_si512();
  constexpr int64_t kWidth = U * kUnit;
  for (int64_t g = 0; g < count; ++g, columns += 4, values += 16) {
    const uint8_t *a = x + columns[0] * kWidth, *b = x + columns[1] * kWidth, *c = x + columns[2] * kWidth,
                  *d = x + columns[3] * kWidth;
    __m512i in[U];
    if constexpr (U == 4) {
      const __m512i va = _mm512_loadu_si512(a), vb = _mm512_loadu_si512(b), vc = _mm512_loadu_si512(c), vd = _mm512_loadu_si512(d);
      const __m512i ab = _mm512_unpacklo_epi8(va, vb), AB = _mm512_unpackhi_epi8(va, vb);
      const __m512i cd = _mm512_unpacklo_epi8(vc, vd), CD = _mm512_unpackhi_epi8(vc, vd);
      in[0] = _mm512_unpacklo_epi16(ab, cd), in[1] = _mm512_unpackhi_epi16(ab, cd);
      in[2] = _mm512_unpacklo_epi16(AB, CD), in[3] = _mm512_unpackhi_epi16(AB, CD);
    } else {
      GOSSAMER_UNROLL
      for (int u = 0; u < U; ++u) in[u] = lace(a + u * 16, b + u * 16, c + u * 16, d + u * 16);
    }
    GOSSAMER_UNROLL
    for (int r = 0; r < 4; ++r) {
      int32_t four;
      __builtin_memcpy(&four, values + 4 * r, 4);
      const __m512i weight = _mm512_set1_epi32(four);
      GOSSAMER_UNROLL
      for (int u = 0; u < U; ++u) add_products(sum[r][u], in[u], weight);
    }
  }
  GOSSAMER_UNROLL
  for (int r = 0; r < 4; ++r)
    GOSSAMER_UNROLL
    for (int u = 0; u < U; ++u) _mm512_storeu_si512(out + r * stride + u * 16, sum[r][u]);
}
#else
// Exact without instructions for it: products of 16 bits (AVX2: pairs of them) are added in 32.
inline void multiply_groups_plain(const uint16_t* columns, const int8_t* values, int64_t count, const uint8_t* x, int64_t width,
                                  int32_t* out, int64_t stride) {
  for (int64_t n = 0; n < width; n += kLanes) {
    vi sum[4] = {};
    const uint16_t* column = columns;
    const int8_t* w = values;
    for (int64_t g = 0; g < count; ++g, column += 4, w += 16) {
#if defined(GOSSAMER_AVX2)
      for (int c = 0; c < 4; c += 2) {
        const __m128i a = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x + column[c] * width + n));
        const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x + column[c + 1] * width + n));
        const __m256i in = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b));
        for (int r = 0; r < 4; ++r) {
          const uint32_t pair = uint32_t(uint16_t(w[4 * r + c])) | uint32_t(uint16_t(w[4 * r + c + 1])) << 16;
          sum[r] += (vi)_mm256_madd_epi16(in, _mm256_set1_epi32(int32_t(pair)));
        }
      }
#else
      for (int c = 0; c < 4; ++c) {
        const vi in = quantised(x + column[c] * width + n, kLanes, {});
        for (int r = 0; r < 4; ++r) sum[r] += in * int32_t(w[4 * r + c]);
      }
#endif
    }
    for (int r = 0; r < 4; ++r) __builtin_memcpy(out + r * stride + n, &sum[r], sizeof sum[r]);
  }
}
#endif

// The work of a call: first all tiles, then strips of outputs for each of them.
template <class E, class Pack, class Strip, class Write>
void run_tiles(const SparseLinearArgs& a, const Tiles<E>& tiles, const Pack& pack, const Strip& strip, const Write& write) {
  const int64_t pieces = ceil_div(tiles.rows, kPacked), strips = ceil_div(a.outputs, kStrip), count = tiles.count();
  const int64_t chunk = imax(1, imin(16, strips * count / (a.threads * 8))), chunks = ceil_div(strips, chunk);
  const int64_t out_bytes = a.dtype == kBFloat16 && !a.raw ? 2 : 4;
  Queue packing, working;
  parallel(a.threads, [&](int thread, int threads) {
    for (int64_t i; (i = packing.next()) < count * pieces;)
      for (int64_t k = i % pieces * kPacked, end = imin(k + kPacked, tiles.rows); k < end; k += kUnit) pack(i / pieces, k);
    barrier(threads);
    alignas(64) uint32_t sums[kStrip * kTile], turned[kUnit * kStrip];
    for (int64_t i; (i = working.next()) < count * chunks;) {
      const int64_t tile = i / chunks, width = tiles.width(tile);
      for (int64_t s = i % chunks * chunk, end = imin(s + chunk, strips); s < end; ++s) {
        // The lines that will be written are far apart: they come while the strip is computed.
        char* line = static_cast<char*>(a.out) + (tile * tiles.tile * a.outputs + s * kStrip) * out_bytes;
        for (int64_t n = imin(width, a.tokens - tile * tiles.tile); n > 0; --n, line += a.outputs * out_bytes)
          __builtin_prefetch(line, 1, 2);
        strip(thread, tile, s * kStrip, sums);
        for (int64_t n = 0; n < width; n += kUnit) {
          const uint32_t* rows[kStrip];
          for (int64_t r = 0; r < kStrip; ++r) rows[r] = sums + r * kTile + n;
          transpose_words(rows, turned, kStrip);
          const int64_t token = tile * tiles.tile + n;
          write(turned, token, imin(kUnit, a.tokens - token), s * kStrip);
        }
      }
    }
  });
}

template <class T>
Status multiply(const SparseLinearArgs& a) {
  // A tile that does not fit L2 would come from L3 for every block row.
  int64_t tile = kTile;
  while (tile > kUnit && tile * a.inputs * 4 > kTileBytes) tile /= 2;
  Tiles<float> tiles(a, tile);
  RowBuffer room;
  scratch.layout([&](Scratch& s) { tiles.layout(s), room.layout(s, a); });
  const Finish<T> finish(a, nullptr);
  const int64_t step = a.format == kBlock4x1 ? 4 : 1;
  run_tiles(
      a, tiles,
      [&](int64_t i, int64_t k) {
        const int64_t width = tiles.width(i);
        for (int64_t n = 0; n < width; n += kUnit) turn<T>(a, i * tile + n, k, tiles.at(i) + k * width + n, width);
      },
      [&](int thread, int64_t i, int64_t m, uint32_t* words) {
        float* sums = reinterpret_cast<float*>(words);
        const int64_t width = tiles.width(i), end = imin(m + kStrip, a.outputs);
        for (int64_t r = m; r < end; r += step, sums += step * kTile) {
          const Blocks blocks = blocks_of<T>(a, r / step, room.of(thread, a));
          if (a.format == kBlock4x1)
            multiply_blocks<4, 1>(blocks, tiles.at(i), width, sums, kTile);
          else if (a.format == kBlock1x4)
            multiply_blocks<1, 4>(blocks, tiles.at(i), width, sums, kTile);
          else
            multiply_blocks<1, 1>(blocks, tiles.at(i), width, sums, kTile);
        }
      },
      [&](const uint32_t* sums, int64_t n, int64_t tokens, int64_t m) { finish.write(sums, kStrip, n, tokens, m); });
  return kOk;
}

// 4x1 blocks in 8 bits. T: float or bf16, or uint8_t for inputs that are quantised already.
template <class T, class Out>
Status multiply_int8(const SparseLinearArgs& a) {
  Tiles<uint8_t> tiles(a, kTile);
  Quantised* how;
  scratch.layout([&](Scratch& s) { tiles.layout(s), s.take(how, a.tokens); });
  if constexpr (sizeof(T) > 1) {
    Queue queue;
    parallel(a.threads, [&](int, int) {
      for (int64_t n; (n = queue.next() * kUnit) < a.tokens;)
        for (int64_t t = n; t < imin(n + kUnit, a.tokens); ++t) how[t] = quantised_as<T>(a, t);
    });
  }
  const Finish<Out> finish(a, how);
  // Four tokens side by side are a word of a column. Word q of a tile of 64 holds the tokens from `first` on.
  const auto first = [](int64_t q, int64_t width) { return 4 * (kLanes == 16 && width == kTile ? q % 4 * 4 + q / 4 : q); };
  const auto pack = [&](int64_t i, int64_t k) {
    const int64_t width = tiles.width(i), columns = imin(kUnit, a.inputs - k);
    alignas(64) uint32_t words[kUnit][kUnit], turned[kUnit][kUnit];
    const uint32_t* rows[kUnit];
    for (int64_t q = 0; q < kUnit; ++q) {
      rows[q] = words[q];
      for (int64_t j = 0; j < kUnit; j += kLanes) {
        vi word = {};
        for (int64_t b = 0; b < 4; ++b) {
          const int64_t token = i * kTile + first(q, width) + b;
          if (4 * q < width && token < a.tokens && j < columns) {
            const T* x = static_cast<const T*>(a.x) + token * a.x_row + k + j;
            if constexpr (sizeof(T) == 1) prefetch(x + 16 * kUnit);
            word |= quantised(x, columns - j, sizeof(T) > 1 ? how[token] : Quantised{}) << int32_t(8 * b);
          }
        }
        __builtin_memcpy(words[q] + j, &word, sizeof word);
      }
    }
    uint8_t* out = tiles.at(i) + k * width;
    if (width == kTile) {
      transpose_words(rows, reinterpret_cast<uint32_t*>(out), kUnit);
    } else {
      transpose_words(rows, turned[0], kUnit);
      for (int64_t c = 0; c < kUnit; ++c) __builtin_memcpy(out + c * width, turned[c], size_t(width));
    }
  };
  run_tiles(
      a, tiles, pack,
      [&](int, int64_t i, int64_t m, uint32_t* words) {
        int32_t* sums = reinterpret_cast<int32_t*>(words);
        const uint8_t* x = tiles.at(i);
        const int64_t width = tiles.width(i), end = imin(m + kStrip, a.outputs);
        for (int64_t r = m; r < end; r += 4, sums += 4 * kTile) {
          const int64_t begin = a.pointers[r / 4], count = a.pointers[r / 4 + 1] - begin;
          const uint16_t* columns = a.columns + 4 * begin;
          const int8_t* values = static_cast<const int8_t*>(a.values) + 16 * begin;
#if defined(GOSSAMER_AVX512)
          switch (width / kUnit) {
            case 1: multiply_groups<1>(columns, values, count, x, sums, kTile); break;
            case 2: multiply_groups<2>(columns, values, count, x, sums, kTile); break;
            case 3: multiply_groups<3>(columns, values, count, x, sums, kTile); break;
            default: multiply_groups<4>(columns, values, count, x, sums, kTile);
          }
#else
          multiply_groups_plain(columns, values, count, x, width, sums, kTile);
#endif
        }
      },
      [&](const uint32_t* sums, int64_t n, int64_t tokens, int64_t m) { finish.write(sums, kStrip, n, tokens, m); });
  return kOk;
}

}  // namespace

Status sparse_linear(const SparseLinearArgs& a) {
  if (!a.tokens || !a.outputs) return kOk;
  if (a.int8 && a.format == kBlock4x1) {
    if (a.raw) return multiply_int8<uint8_t, float>(a);
    return a.dtype == kBFloat16 ? multiply_int8<bf16, bf16>(a) : multiply_int8<float, float>(a);
  }
  if (a.int8 || a.tokens <= kFew) return sparse_linear_few(a);
  return a.dtype == kBFloat16 ? multiply<bf16>(a) : multiply<float>(a);
}

}  // namespace gossamer::GOSSAMER_ISA
