// One query per sequence over all rows of a range or over listed rows. The work is in attend.h.
#include "attend.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

thread_local Scratch scratch;

template <class T>
Status decode(const AttentionArgs& args) {
  Attention<T> attention(args);
  scratch.layout([&](Scratch& s) { attention.layout(s); });
  attention.plan();
  if (attention.status == kOk) {
    parallel(args.threads, [&](int thread, int threads) {
      attention.run(thread);
      barrier(threads);
      attention.merge(thread, threads);
    });
  }
  return Status(attention.status.load());
}

}  // namespace

Status decode_attention(const AttentionArgs& args) {
  if (!args.ranges.valid(args.batch)) return kBadRange;
  return args.dtype == kBFloat16 ? decode<bf16>(args) : decode<float>(args);
}

}  // namespace gossamer::GOSSAMER_ISA
