// Score, select, attend: the three operators in one parallel region, their intermediate results in scratch that is reused
// by the next call. Each phase is cut for balance by itself; a barrier costs a microsecond.
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

  Scorer scorer(score);
  Selector selectors[64];
  Attention<T> attention(attend);
  scratch.layout([&](Scratch& s) {
    scorer.layout(s);
    for (int t = 0; t < threads; ++t) selectors[t].layout(s, rows);
    attention.layout(s);
    s.take(score.out, lines * score.out_row);
  });
  if (const Status status = scorer.plan(); status != kOk) return status;

  Queue queue;
  parallel(threads, [&](int thread, int team) {
    scorer.run();
    barrier(team);
    for (int64_t i; (i = queue.next()) < lines;) {
      const int64_t b = i / per_sequence, begin = score.ranges.begin(b), end = score.ranges.end(b);
      float* line = score.out + i * score.out_row;
      if (args.protect_last && end > begin) line[end - 1] = kInf;
      args.counts[i] = int32_t(selectors[thread].select(line, begin, end, attend.k, args.indices + i * attend.k));
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
