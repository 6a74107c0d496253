// The causal softmax map, max-pooled to blocks. Per row of a query block: the running maximum and sum of a softmax, and the
// largest logit of every key block; when the row is done, exp(largest - maximum) / sum are its largest probabilities. So the
// logits live for one tile only, and one multiplication of queries by keys is all there is.
//
// A KV head's keys are packed once, tile by tile, with the tokens of a tile side by side: a tile of logits is then a small
// matrix product with broadcast queries, kRows by kWide, and its masks are cuts of token numbers.
#include "attend.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

thread_local Scratch scratch;

constexpr int kMaxVectors = kLanes == 16 ? 4 : 2;  // of tokens side by side
constexpr int64_t kChunk = 48;                     // query rows that share a pass over the keys; a multiple of all kRows

// Tiles as wide as the key blocks are, and as many rows as registers are left for.
template <int kVectors>
class Pooled {
  static constexpr int kRows = (kLanes == 16 ? 24 : 8) / kVectors;
  static constexpr int64_t kWide = kVectors * kLanes;  // tokens of a tile

 public:
  explicit Pooled(const PooledArgs& args)
      : a(args),
        per_block(ceil_div(imin(a.key_block, a.length), kWide)),
        columns(ceil_div(a.length, a.key_block)),
        tiles(columns * per_block),
        row_blocks(ceil_div(a.rows, a.block)),
        together(imax(1, kChunk / a.block)),
        items(ceil_div(row_blocks, together)) {}

  void layout(Scratch& s) {
    s.take(keys, tiles * a.dim * kWide);
    s.take(queries, a.threads * kChunk * a.dim);
    s.take(best, a.threads * kChunk * columns);
    s.take(logits, a.threads * kRows * kWide);
  }

  void run(int thread, int threads) {
    const int64_t group = a.heads / a.kv_heads;
    for (int64_t line = 0; line < a.batch * a.kv_heads; ++line) {
      const int64_t b = line / a.kv_heads, kv = line % a.kv_heads;
      pack_keys(thread, threads, b, kv);
      barrier(threads);
      // Long rows first, so that threads finish together.
      for (int64_t work; (work = queue.next() - line * (items * group + threads)) < items * group;) {
        const int64_t head = kv * group + work % group, item = items - 1 - work / group;
        const int64_t from = item * together;
        for (int64_t m = from; m < imin(from + together, row_blocks);) {
          const int64_t some = together > 1 ? imin(together, row_blocks - m) : 1;
          const int64_t low = m * a.block, high = imin((m + some) * a.block, a.rows);
          for (int64_t row = low; row < high; row += kChunk) chunk(thread, b, head, row, imin(kChunk, high - row));
          m += some;
        }
      }
      barrier(threads);
    }
  }

 private:
  // Tile by tile [dim][kWide]; tokens behind the end of a block are zeros.
  void pack_keys(int thread, int threads, int64_t b, int64_t kv) {
    for (int64_t tile = thread; tile < tiles; tile += threads) {
      const int64_t first = first_token(tile), count = tokens(tile);
      float* to = keys + tile * a.dim * kWide;
      for (int64_t t = 0; t < kWide; ++t) {
        if (t >= count) {
          for (int64_t c = 0; c < a.dim; ++c) to[c * kWide + t] = 0.0f;
        } else if (a.dtype == kBFloat16) {
          spread(static_cast<const bf16*>(a.key) + b * a.k_batch + kv * a.k_head + (first + t) * a.k_row, to + t, kWide);
        } else {
          spread(static_cast<const float*>(a.key) + b * a.k_batch + kv * a.k_head + (first + t) * a.k_row, to + t, kWide);
        }
      }
    }
  }

  template <class T>
  void spread(const T* from, float* to, int64_t step) const {
    for (int64_t c = 0; c < a.dim; ++c) to[c * step] = to_float(from[c]);
  }

  int64_t first_token(int64_t tile) const { return tile / per_block * a.key_block + tile % per_block * kWide; }

  int64_t tokens(int64_t tile) const {
    const int64_t end = imin((tile / per_block + 1) * a.key_block, a.length);
    return imax(0, imin(kWide, end - first_token(tile)));
  }

  // Rows [row, row + count) of a head against all keys that they see.
  void chunk(int thread, int64_t b, int64_t head, int64_t row, int64_t count) {
    const int64_t start = a.starts ? a.starts[b] : 0, position = a.length - a.rows + row;
    float* q = queries + thread * kChunk * a.dim;
    float* top = best + thread * kChunk * columns;
    float* tile_logits = logits + thread * kRows * kWide;
    for (int64_t i = 0; i < kChunk; ++i) {  // rows behind the last repeat it
      const int64_t r = row + imin(i, count - 1);
      const int64_t at = b * a.q_batch + head * a.q_head + r * a.q_row;
      if (a.dtype == kBFloat16) spread(static_cast<const bf16*>(a.query) + at, q + i * a.dim, 1);
      else spread(static_cast<const float*>(a.query) + at, q + i * a.dim, 1);
      for (int64_t c = 0; c < a.dim; ++c) q[i * a.dim + c] *= a.scale;
    }
    float peak[kChunk], sum[kChunk];
    for (int64_t i = 0; i < kChunk; ++i) peak[i] = -kInf, sum[i] = 0.0f;
    const int64_t last = (position + count - 1) / a.key_block, begin = start / a.key_block;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t n = begin; n <= last; ++n) top[i * columns + n] = -kInf;
    const int64_t strips = ceil_div(count, kRows);
    for (int64_t n = begin; n <= last; ++n)
      for (int64_t tile = n * per_block; tile < (n + 1) * per_block; ++tile) {
        const int64_t first = first_token(tile), size = tokens(tile);
        if (size == 0 || first > position + count - 1 || first + size <= start) continue;
        const int64_t low = imax(0, start - first);
        const float* k = keys + tile * a.dim * kWide;
        for (int64_t s = 0; s < strips; ++s) {
          const int64_t i = s * kRows;
          multiply(q + i * a.dim, k, tile_logits);
          for (int64_t r = 0; r < kRows && i + r < count; ++r) {
            const int64_t high = imin(size, position + i + r + 1 - first);
            if (high > low) update(tile_logits + r * kWide, low, high, top[(i + r) * columns + n], peak[i + r], sum[i + r]);
          }
        }
      }
    for (int64_t i = 0; i < count; ++i) {
      if (sum[i] <= 0.0f) continue;  // sees nothing
      float* out = a.out + ((b * a.heads + head) * row_blocks + (row + i) / a.block) * columns;
      const float factor = 1.0f / sum[i];
      for (int64_t n = begin; n <= last; n += kLanes) {
        float lane[kLanes];
        for (int j = 0; j < kLanes; ++j) lane[j] = n + j <= last ? top[i * columns + n + j] - peak[i] : -kInf;
        store(lane, vexp(load(lane)) * factor);
        for (int j = 0; j < kLanes && n + j <= last; ++j) out[n + j] = lane[j] > out[n + j] ? lane[j] : out[n + j];
      }
    }
  }

  // out[r][t] = query r times token t of a tile.
  void multiply(const float* q, const float* k, float* out) const {
    vf sum[kRows][kVectors] = {};
    for (int64_t c = 0; c < a.dim; ++c) {
      vf token[kVectors];
      GOSSAMER_UNROLL
      for (int j = 0; j < kVectors; ++j) token[j] = load(k + c * kWide + j * kLanes);
      GOSSAMER_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const vf x = splat(q[r * a.dim + c]);
        GOSSAMER_UNROLL
        for (int j = 0; j < kVectors; ++j) sum[r][j] = fma(x, token[j], sum[r][j]);
      }
    }
    GOSSAMER_UNROLL
    for (int r = 0; r < kRows; ++r)
      GOSSAMER_UNROLL
      for (int j = 0; j < kVectors; ++j) store(out + r * kWide + j * kLanes, sum[r][j]);
  }

  // Takes tokens [low, high) of one row of a tile into its block maximum, its maximum and its sum.
  static void update(float* row, int64_t low, int64_t high, float& block_top, float& peak, float& sum) {
    for (int64_t t = 0; t < low; ++t) row[t] = -kInf;
    const int64_t end = ceil_div(high, kLanes) * kLanes;
    for (int64_t t = high; t < end; ++t) row[t] = -kInf;
    vf most = load(row);
    for (int64_t t = kLanes; t < end; t += kLanes) most = vmax(load(row + t), most);
    const float top = hmax(most);
    block_top = top > block_top ? top : block_top;
    if (top > peak) {
      sum = peak == -kInf ? 0.0f : sum * vexp(splat(peak - top))[0];
      peak = top;
    }
    vf total = {};
    for (int64_t t = 0; t < end; t += kLanes) total += vexp(load(row + t) - peak);
    sum += hsum(total);
  }

  const PooledArgs& a;
  const int64_t per_block, columns, tiles, row_blocks, together, items;
  float *keys, *queries, *best, *logits;
  Queue queue;
};

template <int kVectors>
Status pool(const PooledArgs& args) {
  Pooled<kVectors> pooled(args);
  scratch.layout([&](Scratch& s) { pooled.layout(s); });
  parallel(args.threads, [&](int thread, int threads) { pooled.run(thread, threads); });
  return kOk;
}

}  // namespace

Status pooled_attention(const PooledArgs& args) {
  for (int64_t b = 0; args.starts && b < args.batch; ++b)
    if (args.starts[b] < 0 || args.starts[b] > args.length) return kBadRange;
  const int64_t wanted = ceil_div(imin(args.key_block, args.length), kLanes);
  return wanted <= 1 ? pool<1>(args) : wanted <= 2 || kMaxVectors == 2 ? pool<2>(args) : pool<kMaxVectors>(args);
}

}  // namespace gossamer::GOSSAMER_ISA
