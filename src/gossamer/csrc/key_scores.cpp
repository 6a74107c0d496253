// Scores of one query per head against whole keys: what an exact selection ranks by. Bound by the bytes of the keys, which
// are read once for all query heads of a group.
#include "attend.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

constexpr int64_t kPieceRows = 4 * kBlock;

thread_local Scratch scratch;

template <class T>
class KeyScorer {
 public:
  explicit KeyScorer(const KeyScoreArgs& args)
      : a(args),
        group(args.heads / args.kv_heads),
        stride(ceil_div(args.dim, 2 * kLanes) * 2 * kLanes),
        pieces(ceil_div(args.ranges.rows, kPieceRows)) {}

  void layout(Scratch& s) {
    s.take(query, a.threads * group * stride);
    s.take(logits, a.threads * 4 * kBlock);
    s.take(lines, a.threads * (kBlock + kMaxTile));
  }

  void run(int thread) {
    const int64_t work = a.batch * a.kv_heads * pieces;
    for (int64_t i; (i = queue.next()) < work;) piece(thread, i / pieces, i % pieces * kPieceRows);
  }

 private:
  void piece(int thread, int64_t unit, int64_t row) {
    const int64_t b = unit / a.kv_heads, kv = unit % a.kv_heads;
    const T* key = static_cast<const T*>(a.key) + b * a.k_batch + kv * a.k_head;
    const T* raw = static_cast<const T*>(a.query) + b * a.q_batch + kv * group * a.q_head;
    float* q = query + thread * group * stride;
    for (int64_t g = 0; g < group; ++g) to_working_order(raw + g * a.q_head, a.dim, q + g * stride);
    const int64_t stop = imin(row + kPieceRows, a.ranges.rows), begin = a.ranges.begin(b), end = a.ranges.end(b);
    const T** rows = lines + thread * (kBlock + kMaxTile);
    for (; row < stop; row += kBlock) {
      const int64_t count = imin(kBlock, stop - row);
      const int64_t low = imin(imax(begin - row, 0), count), high = imax(low, imin(end - row, count));
      for (int64_t i = low; i < high; ++i) rows[i] = key + (row + i) * a.k_row;
      for (int64_t i = high; high > low && i < high + kMaxTile; ++i) rows[i] = rows[high - 1];
      for (int64_t g = 0; g < group; g += 4) {
        const QueryHeads<T> heads{q + g * stride, raw + g * a.q_head, stride, a.q_head};
        float* out = logits + thread * 4 * kBlock;
        switch (imin(group - g, 4)) {
          case 1: dot_block<T, 1, true>(rows + low, nullptr, high - low, heads, a.dim, out); break;
          case 2: dot_block<T, 2, true>(rows + low, nullptr, high - low, heads, a.dim, out); break;
          case 3: dot_block<T, 3, true>(rows + low, nullptr, high - low, heads, a.dim, out); break;
          default: dot_block<T, 4, true>(rows + low, nullptr, high - low, heads, a.dim, out);
        }
        for (int64_t i = 0; i < imin(group - g, 4); ++i) put(b, kv, g + i, row, count, low, high, out + i * kBlock);
      }
    }
  }

  // Stores the scores of one query head for rows [row, row + count), or joins them with those of the heads before it.
  void put(int64_t b, int64_t kv, int64_t g, int64_t row, int64_t count, int64_t low, int64_t high, const float* from) {
    const int64_t line = a.reduce == kNone ? (b * a.kv_heads + kv) * group + g : b * a.kv_heads + kv;
    float* out = a.out + line * a.ranges.rows + row;
    for (int64_t i = 0; i < low; ++i) out[i] = -kInf;
    if (a.reduce == kNone || g == 0) {
      std::memcpy(out + low, from, size_t(high - low) * sizeof(float));
    } else if (a.reduce == kSum) {
      for (int64_t i = low; i < high; ++i) out[i] += from[i - low];
    } else {  // a NaN wins, as in torch
      for (int64_t i = low; i < high; ++i) {
        const float x = out[i], y = from[i - low];
        out[i] = x != x ? x : (x > y ? x : y);
      }
    }
    for (int64_t i = high; i < count; ++i) out[i] = -kInf;
  }

  const KeyScoreArgs& a;
  const int64_t group, stride, pieces;
  float *query, *logits;
  const T** lines;
  Queue queue;
};

template <class T>
void score(const KeyScoreArgs& args) {
  KeyScorer<T> scorer(args);
  scratch.layout([&](Scratch& s) { scorer.layout(s); });
  parallel(args.threads, [&](int thread, int) { scorer.run(thread); });
}

}  // namespace

Status key_scores(const KeyScoreArgs& args) {
  if (!args.ranges.valid(args.batch)) return kBadRange;
  args.dtype == kBFloat16 ? score<bf16>(args) : score<float>(args);
  return kOk;
}

}  // namespace gossamer::GOSSAMER_ISA
