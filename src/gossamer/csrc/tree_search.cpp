// Tree search for the best of many key blocks: halve every segment, score one block of each half, keep the best halves.
// What a level reads hangs on the level before, so a search is bound by the latency of scattered rows: all rows of a level
// are fetched ahead of their products. Segments stay in the order of their keys, so nothing is ever sorted.
#include "attend.h"
#include "select.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

thread_local Scratch scratch;

template <class T>
class TreeSearch {
 public:
  explicit TreeSearch(const TreeSearchArgs& args)
      : a(args),
        stride(ceil_div(args.dim, 2 * kLanes) * 2 * kLanes),
        per_block(ceil_div(args.block, args.step)),
        capacity(2 * args.nodes * per_block + kMaxTile) {}

  void layout(Scratch& s) {
    s.take(voters, a.threads * a.voters * stride);
    s.take(logits, a.threads * 4 * kBlock);
    s.take(scores, a.threads * 2 * a.nodes);
    s.take(segments, a.threads * 2 * (2 * a.nodes));
    s.take(sizes, a.threads * 2 * (2 * a.nodes));
    s.take(chosen, a.threads * 2 * a.nodes);
    s.take(rows, a.threads * capacity);
    s.take(owners, a.threads * capacity);
    for (int t = 0; t < a.threads; ++t) selectors[t].layout(s, 2 * a.nodes);
  }

  void run(int thread) {
    const int64_t lines = a.batch * a.heads * a.lines;
    // The last queries of a prompt search the longest context: they go first.
    for (int64_t i; (i = queue.next()) < lines;) line(thread, i % (a.batch * a.heads), a.lines - 1 - i / (a.batch * a.heads));
  }

 private:
  void line(int thread, int64_t unit, int64_t n) {
    const int64_t b = unit / a.heads, h = unit % a.heads, nodes = a.nodes, at = unit * a.lines + n;
    const int64_t begin = a.begin[b], end = a.ends[n], blocks = imax(0, ceil_div(end - begin, a.block));
    const T* raw = static_cast<const T*>(a.query) + at * a.voters * a.dim;
    float* q = voters + thread * a.voters * stride;
    for (int64_t v = 0; v < a.voters; ++v) to_working_order(raw + v * a.dim, a.dim, q + v * stride);
    const T* key = static_cast<const T*>(a.key) + b * a.k_batch + h / (a.heads / a.kv_heads) * a.k_head + begin * a.k_row;

    int32_t *start = segments + thread * 4 * nodes, *halved = start + 2 * nodes;
    int32_t *size = sizes + thread * 4 * nodes, *half = size + 2 * nodes;
    int64_t kept = 0, largest = 0;
    for (int64_t i = 0; i < nodes; ++i) {
      const int64_t from = blocks * i / nodes, to = blocks * (i + 1) / nodes;
      if (to == from) continue;
      start[kept] = int32_t(from), size[kept++] = int32_t(to - from);
      largest = imax(largest, to - from);
    }
    int64_t scored = 0;
    for (; largest > 1; largest = ceil_div(largest, 2)) {
      int64_t count = 0;
      for (int64_t i = 0; i < kept; ++i) {
        const int32_t left = size[i] / 2;
        if (left) halved[count] = start[i], half[count++] = left;
        halved[count] = start[i] + left, half[count++] = size[i] - left;
      }
      scored += 2 * nodes;
      if (count <= nodes) {
        kept = count;
        swap(start, halved), swap(size, half);
        continue;
      }
      float* best = scores + thread * 2 * nodes;
      score(thread, key, raw, q, end - begin, halved, half, count, best);
      int32_t* ids = chosen + thread * 2 * nodes;
      kept = selectors[thread].select(best, 0, count, nodes, ids);
      for (int64_t i = 0; i < kept; ++i) start[i] = halved[ids[i]], size[i] = half[ids[i]];
    }
    int32_t* out = a.blocks + at * nodes;
    std::memcpy(out, start, size_t(kept) * sizeof(int32_t));
    std::memset(out + kept, 0, size_t(nodes - kept) * sizeof(int32_t));
    a.counts[at] = int32_t(kept), a.evaluations[at] = scored;
  }

  // best[i] = highest product of a voter with a key of the block that speaks for segment i.
  void score(int thread, const T* key, const T* raw, const float* q, int64_t length, const int32_t* start,
             const int32_t* size, int64_t count, float* best) {
    const T** row = rows + thread * capacity;
    int32_t* owner = owners + thread * capacity;
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) {
      best[i] = -kInf;
      const int64_t speaker = a.representative == kCenter ? start[i] + size[i] / 2
                              : a.representative == kFirst ? start[i] : start[i] + size[i] - 1;
      for (int64_t c = 0; c < a.block && speaker * a.block + c < length; c += a.step) {
        row[total] = key + (speaker * a.block + c) * a.k_row;
        prefetch_row(row[total], a.dim * int64_t(sizeof(T)));
        owner[total++] = int32_t(i);
      }
    }
    for (int64_t i = 0; i < kMaxTile; ++i) row[total + i] = row[total - 1];
    float* out = logits + thread * 4 * kBlock;
    for (int64_t at = 0; at < total; at += kBlock) {
      const int64_t some = imin(kBlock, total - at);
      for (int64_t v = 0; v < a.voters; v += 4) {
        const QueryHeads<T> heads{q + v * stride, raw + v * a.dim, stride, a.dim};
        const int64_t together = imin(4, a.voters - v);
        switch (together) {
          case 1: dot_block<T, 1, false>(row + at, nullptr, some, heads, a.dim, out); break;
          case 2: dot_block<T, 2, false>(row + at, nullptr, some, heads, a.dim, out); break;
          case 3: dot_block<T, 3, false>(row + at, nullptr, some, heads, a.dim, out); break;
          default: dot_block<T, 4, false>(row + at, nullptr, some, heads, a.dim, out);
        }
        for (int64_t g = 0; g < together; ++g)
          for (int64_t i = 0; i < some; ++i) {
            float& to = best[owner[at + i]];
            const float x = out[g * kBlock + i];
            to = x > to ? x : to;
          }
      }
    }
  }

  const TreeSearchArgs& a;
  const int64_t stride, per_block, capacity;
  float *voters, *logits, *scores;
  int32_t *segments, *sizes, *chosen, *owners;
  const T** rows;
  Selector selectors[64];
  Queue queue;
};

template <class T>
void search(const TreeSearchArgs& args) {
  TreeSearch<T> work(args);
  scratch.layout([&](Scratch& s) { work.layout(s); });
  parallel(args.threads, [&](int thread, int) { work.run(thread); });
}

}  // namespace

Status tree_search(const TreeSearchArgs& args) {
  for (int64_t b = 0; b < args.batch; ++b)
    if (args.begin[b] < 0) return kBadRange;
  for (int64_t n = 0; n < args.lines; ++n)
    if (args.ends[n] > args.rows) return kBadRange;
  args.dtype == kBFloat16 ? search<bf16>(args) : search<float>(args);
  return kOk;
}

}  // namespace gossamer::GOSSAMER_ISA
