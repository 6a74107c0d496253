// x times a weight that is stored input-major, reading the rows of those inputs that are large for some row of x.
#include "row_sum.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

thread_local Scratch scratch;

template <class X, class W>
Status multiply(const ChannelSparseArgs& a) {
  uint8_t* marked;
  int32_t* ids;
  float *factors, *sums;  // [kept][M], [M][N]
  scratch.layout([&](Scratch& s) {
    s.take(marked, a.columns), s.take(ids, a.columns), s.take(factors, a.columns * a.rows);
    s.take(sums, sizeof(X) == 4 ? 0 : a.rows * a.outputs);
  });
  if constexpr (sizeof(X) == 4) sums = static_cast<float*>(a.out);
  const X *x = static_cast<const X*>(a.x), *bias = static_cast<const X*>(a.bias);

  // A NaN is kept. Without a threshold everything but zero is.
  const auto keeps = [&](int64_t m, int64_t k) GOSSAMER_LAMBDA {
    const float threshold = a.threshold ? a.threshold[a.per_channel ? k : 0] : 0.0f;
    return !(__builtin_fabsf(to_float(x[m * a.x_row + k])) <= threshold);
  };
  __builtin_memset(marked, 0, size_t(a.columns));
  for (int64_t m = 0; m < a.rows; ++m) {
    int32_t count = 0;
    for (int64_t k = 0; k < a.columns; ++k) {
      const uint8_t kept = keeps(m, k);
      marked[k] |= kept, count += kept;
    }
    if (a.counts) a.counts[m] = count;
  }
  const int64_t count = list_marked(marked, a.columns, ids);
  if (a.counts) a.counts[a.rows] = count;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t k = ids[i];
    const float scale = a.scale ? a.scale[k] : 1.0f;
    for (int64_t m = 0; m < a.rows; ++m)
      factors[i * a.rows + m] = keeps(m, k) ? to_float(x[m * a.x_row + k]) * scale : 0.0f;
  }

  RowSum<W> sum(static_cast<const W*>(a.weight), a.w_row, {ids, factors, count}, sums, a.outputs, a.rows, a.outputs);
  const auto begin = [&](int64_t from, int64_t to) {
    for (int64_t m = 0; m < a.rows; ++m)
      for (int64_t n = from; n < to; ++n) sums[m * a.outputs + n] = bias ? to_float(bias[n]) : 0.0f;
  };
  const auto end = [&](int64_t from, int64_t to) {
    if constexpr (sizeof(X) == 2)
      for (int64_t m = 0; m < a.rows; ++m)
        for (int64_t n = from; n < to; ++n) from_float(sums[m * a.outputs + n], static_cast<X*>(a.out) + m * a.outputs + n);
  };
  sum.add(a.threads, begin, end);
  return kOk;
}

}  // namespace

Status channel_sparse_linear(const ChannelSparseArgs& args) {
  if (args.dtype == kBFloat16) return args.int8 ? multiply<bf16, int8_t>(args) : multiply<bf16, bf16>(args);
  return args.int8 ? multiply<float, int8_t>(args) : multiply<float, float>(args);
}

}  // namespace gossamer::GOSSAMER_ISA
