// Score, select, attend: the three operators in one parallel region, their intermediate results in scratch that is reused
// by the next call. Each phase is cut for balance by itself; a barrier costs a microsecond. Where there are KV heads enough
// to go round, a thread scores a whole head and selects at once, from scores that never leave its cache.
#include "attend.h"
#include "score.h"
#include "select.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

thread_local Scratch scratch;

template <class T>
Status attend_labels(const LabelAttentionArgs& args) {
  const int threads = int(imin(args.attention.threads, 64));
  ScoreArgs score = args.score;
  AttentionArgs attend = args.attention;
  score.threads = attend.threads = threads;
  const int64_t rows = score.ranges.rows, per_sequence = attend.select_heads, lines = attend.batch * per_sequence;
  score.out_row = ceil_div(rows, kTokens) * kTokens;
  attend.indices = args.indices, attend.counts = args.counts;

  const int64_t units = attend.batch * attend.kv_heads, unit_lines = per_sequence / attend.kv_heads;
  const bool whole = units % threads == 0 || units >= 4 * threads;

  Scorer scorer(score);
  Selector selectors[64];
  Attention<T> attention(attend);
  scratch.layout([&](Scratch& s) {
    scorer.layout(s);
    for (int t = 0; t < threads; ++t) selectors[t].layout(s, rows);
    attention.layout(s);
    s.take(score.out, (whole ? threads * unit_lines : lines) * score.out_row);
  });
  if (const Status status = scorer.plan(); status != kOk) return status;

  const auto select = [&](int thread, int64_t i, float* scores) {
    const int64_t b = i / per_sequence, begin = score.ranges.begin(b), end = score.ranges.end(b);
    if (args.protect_last && end > begin) scores[end - 1] = kInf;
    args.counts[i] = int32_t(selectors[thread].select(scores, begin, end, attend.k, args.indices + i * attend.k));
  };
  Queue queue;
  parallel(threads, [&](int thread, int team) {
    if (whole) {
      float* scores = score.out + thread * unit_lines * score.out_row;
      for (int64_t i; (i = queue.next()) < units;) {
        scorer.whole(i / attend.kv_heads, i % attend.kv_heads, scores);
        for (int64_t j = 0; j < unit_lines; ++j) select(thread, i * unit_lines + j, scores + j * score.out_row);
      }
    } else {
      scorer.run();
      barrier(team);
      for (int64_t i; (i = queue.next()) < lines;) select(thread, i, score.out + i * score.out_row);
    }
    barrier(team);
    if (thread == 0) attention.plan();
    barrier(team);
    attention.run(thread);
    barrier(team);
    attention.merge(thread, team);
  });
  return Status(attention.status.load());
}

}  // namespace

Status label_attention(const LabelAttentionArgs& args) {
  if (!args.attention.ranges.valid(args.attention.batch)) return kBadRange;
  return args.attention.dtype == kBFloat16 ? attend_labels<bf16>(args) : attend_labels<float>(args);
}

}  // namespace gossamer::GOSSAMER_ISA
