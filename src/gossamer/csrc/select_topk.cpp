// Exact top-k of each line of a score tensor; one line per task. The work is in select.h.
#include "select.h"

namespace gossamer::GOSSAMER_ISA {
namespace {
thread_local Scratch scratch;
}

Status select_topk(const SelectArgs& a) {
  if (!a.ranges.valid(a.batch)) return kBadRange;
  Selector selectors[64];
  const int threads = int(imin(imin(a.threads, 64), imax(a.batch * a.heads, 1)));
  scratch.layout([&](Scratch& s) {
    for (int t = 0; t < threads; ++t) selectors[t].layout(s, a.ranges.rows);
  });
  Queue queue;
  parallel(threads, [&](int thread, int) {
    for (int64_t i; (i = queue.next()) < a.batch * a.heads;) {
      const int64_t b = i / a.heads, h = i % a.heads;
      a.counts[i] = int32_t(selectors[thread].select(a.scores + b * a.s_batch + h * a.s_head, a.ranges.begin(b),
                                                     a.ranges.end(b), a.k, a.indices + i * a.k));
    }
  });
  return kOk;
}

}  // namespace gossamer::GOSSAMER_ISA
