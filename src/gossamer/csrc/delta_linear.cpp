// A product that follows its input: what changed since the last call is multiplied and added to the running output.
#include "row_sum.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

thread_local Scratch scratch;

template <class C, class T>
Status update(const DeltaArgs& a) {
  uint8_t* changed;
  int32_t* ids;
  float* factors;  // [changed][M]
  scratch.layout([&](Scratch& s) { s.take(changed, a.columns), s.take(ids, a.columns), s.take(factors, a.columns * a.rows); });

  __builtin_memset(changed, 0, size_t(a.columns));
  for (int64_t m = 0; m < a.rows; ++m) {
    const C* now = static_cast<const C*>(a.codes) + m * a.codes_row;
    const C* before = static_cast<const C*>(a.previous) + m * a.previous_row;
    int32_t count = 0;
    for (int64_t k = 0; k < a.columns; ++k) {
      const uint8_t differs = now[k] != before[k];
      changed[k] |= differs, count += differs;
    }
    a.counts[m] = count;
  }
  const int64_t count = list_marked(changed, a.columns, ids);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t k = ids[i];
    const float step = a.step[a.per_channel ? k : 0];
    for (int64_t m = 0; m < a.rows; ++m) {
      const C now = static_cast<const C*>(a.codes)[m * a.codes_row + k];
      C& before = static_cast<C*>(a.previous)[m * a.previous_row + k];
      factors[i * a.rows + m] = float(int64_t(now) - int64_t(before)) * step;
      before = now;
    }
  }
  if (!count) return kOk;
  const auto nothing = [](int64_t, int64_t) {};
  RowSum<T> sum(static_cast<const T*>(a.weight), a.w_row, {ids, factors, count}, a.out, a.out_row, a.rows, a.outputs);
  sum.add(a.threads, nothing, nothing);
  return kOk;
}

template <class C>
Status update(const DeltaArgs& args) {
  return args.dtype == kBFloat16 ? update<C, bf16>(args) : update<C, float>(args);
}

}  // namespace

Status delta_linear(const DeltaArgs& args) {
  return args.code_bytes == 2 ? update<int16_t>(args) : update<int32_t>(args);
}

}  // namespace gossamer::GOSSAMER_ISA
