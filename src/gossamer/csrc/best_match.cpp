// Which centre a row is most like: the arg max over centres of max(cos k, 0) * max(cos v, 0). Bound by the two products of
// sources with centres, whose results are used while they lie in the cache and never stored as a matrix.
#include "tile.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

thread_local Scratch scratch;

constexpr int kCentres = 8 * kKeys;  // centres whose products with a block of sources are looked at together

template <class T>
class Match {
 public:
  explicit Match(const MatchArgs& args)
      : a(args), lines(args.batch * args.heads), blocks(ceil_div(args.sources, kRows)), dims{args.key_dim, args.value_dim} {}

  void layout(Scratch& s) {
    s.take(ids, lines * a.centres);
    s.take(counts, lines);
    for (int x = 0; x < 2; ++x) s.take(units[x], lines * a.centres * dims[x]);
    for (int x = 0; x < 2; ++x) s.take(packs[x], a.threads * kRows * dims[x]);
    s.take(products, a.threads * 2 * kCentres * kWide);
  }

  void run(int thread, int threads) {
    for (int64_t line; (line = first_queue.next()) < lines;) centres(line);
    barrier(threads);
    if (status != kOk) return;
    for (int64_t task; (task = last_queue.next()) < lines * blocks;) block(thread, task / blocks, task % blocks);
  }

  std::atomic<int> status{kOk};

 private:
  const T* row(int x, int64_t line, int64_t id) const {
    const int64_t b = line / a.heads, h = line % a.heads;
    return x == 0 ? static_cast<const T*>(a.key) + b * a.k_batch + h * a.k_head + id * a.k_row
                  : static_cast<const T*>(a.value) + b * a.v_batch + h * a.v_head + id * a.v_row;
  }

  // A row over its length, `step` floats apart; false if the length is not a number.
  bool unit(const T* from, int64_t dim, float* to, int64_t step) const {
    vf squares = {};
    int64_t c = 0;
    for (; c + kLanes <= dim; c += kLanes) squares = fma(load(from + c), load(from + c), squares);
    float sum = hsum(squares);
    for (; c < dim; ++c) sum += to_float(from[c]) * to_float(from[c]);
    const float size = __builtin_sqrtf(sum), factor = 1.0f / (size > 1e-30f ? size : 1e-30f);
    for (c = 0; c < dim; ++c) to[c * step] = to_float(from[c]) * factor;
    return size < kInf;
  }

  // Lists the centres that there are, and their unit vectors.
  void centres(int64_t line) {
    int64_t n = 0;
    for (int64_t i = 0; i < a.centres; ++i) {
      const int32_t id = a.centre_ids[line * a.centres + i];
      if (id < -1 || id >= a.rows) return void(status = kBadIndex);
      if (id == -1) continue;
      bool good = true;
      for (int x = 0; x < 2; ++x) good &= unit(row(x, line, id), dims[x], units[x] + (line * a.centres + n) * dims[x], 1);
      if (good) ids[line * a.centres + n++] = id;
    }
    counts[line] = n;
    for (int64_t i = 0; i < a.sources; ++i) {
      const int32_t id = a.source_ids[line * a.sources + i];
      if (id < -1 || id >= a.rows) return void(status = kBadIndex);
    }
  }

  void block(int thread, int64_t line, int64_t index) {
    const int64_t from = index * kRows, some = imin(kRows, a.sources - from), n = counts[line];
    const int32_t* sources = a.source_ids + line * a.sources + from;
    int32_t* out = a.out + line * a.sources + from;
    float* pack[2] = {packs[0] + thread * kRows * dims[0], packs[1] + thread * kRows * dims[1]};
    bool good[kRows];
    for (int64_t i = 0; i < kRows; ++i) {
      good[i] = i < some && sources[i] != -1;
      for (int x = 0; x < 2; ++x) {
        float* to = pack[x] + i / kWide * dims[x] * kWide + i % kWide;
        if (good[i]) {
          good[i] = unit(row(x, line, sources[i]), dims[x], to, kWide);
        } else {
          for (int64_t c = 0; c < dims[x]; ++c) to[c * kWide] = 0.0f;
        }
      }
    }
    float *keys = products + thread * 2 * kCentres * kWide, *values = keys + kCentres * kWide;
    alignas(64) float unused[kWide];
    for (int t = 0; t < kTiles; ++t) {
      vf best[kVectors];
      vi at[kVectors];
      for (int v = 0; v < kVectors; ++v) best[v] = splat(-kInf), at[v] = splat_i(-1);
      for (int64_t j = 0; j < n; j += kCentres) {
        const int64_t count = imin(kCentres, n - j), first = line * a.centres + j;
        tiles<float>(units[0] + first * dims[0], dims[0], count, pack[0] + t * dims[0] * kWide, dims[0], keys, unused);
        tiles<float>(units[1] + first * dims[1], dims[1], count, pack[1] + t * dims[1] * kWide, dims[1], values, unused);
        for (int64_t r = 0; r < count; ++r)
          GOSSAMER_UNROLL
          for (int v = 0; v < kVectors; ++v) {
            const vf like = top(load(keys + r * kWide + v * kLanes), vf{}) * top(load(values + r * kWide + v * kLanes), vf{});
            const vi better = like > best[v];
            best[v] = better ? like : best[v];
            at[v] = better ? splat_i(int32_t(j + r)) : at[v];
          }
      }
      for (int64_t i = t * kWide; i < imin((t + 1) * kWide, some); ++i) {
        const int v = int(i % kWide) / kLanes, lane = int(i % kLanes);
        out[i] = good[i] && at[v][lane] >= 0 && best[v][lane] >= a.tau ? ids[line * a.centres + at[v][lane]] : -1;
      }
    }
  }

  const MatchArgs& a;
  const int64_t lines, blocks, dims[2];
  int32_t* ids;  // [line][centres], those that there are
  int64_t* counts;
  float *units[2], *packs[2], *products;
  Queue first_queue, last_queue;
};

template <class T>
Status run(const MatchArgs& args) {
  Match<T> work(args);
  scratch.layout([&](Scratch& s) { work.layout(s); });
  parallel(args.threads, [&](int thread, int threads) { work.run(thread, threads); });
  return Status(work.status.load());
}

}  // namespace

Status best_match(const MatchArgs& args) { return args.dtype == kBFloat16 ? run<bf16>(args) : run<float>(args); }

}  // namespace gossamer::GOSSAMER_ISA
