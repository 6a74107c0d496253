// x times weight transposed, for the few rows of a decode step: bound by the bytes of the weight, which pass once while all
// rows of x wait in the cache. A thread reads several rows of weight at a time that lie far apart, and goes on to the next
// row in each place: a single stream waits for memory half of the time, several long ones keep it busy.
#include "products.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

thread_local Scratch scratch;

// Weight that a thread takes at a time: long enough to stream, short enough that threads finish together.
constexpr int64_t kMinChunk = 1 << 16, kMaxChunk = 1 << 18;
template <class T>
class Linear {
 public:
  explicit Linear(const LinearArgs& args) : a(args), stride(ceil_div(args.columns, 2 * kLanes) * 2 * kLanes) {
    const int64_t row_bytes = imax(a.columns, 1) * int64_t(sizeof(T));
    const int64_t share = imax(kMinChunk, imin(kMaxChunk, a.outputs * row_bytes / (a.threads * 4)));
    chunk = imax(ceil_div(share / row_bytes, kStep), 1) * kStep;
  }

  void layout(Scratch& s) { s.take(x, a.rows * stride); }

  void plan() {
    for (int64_t m = 0; m < a.rows; ++m) to_working_order(static_cast<const T*>(a.x) + m * a.x_row, a.columns, x + m * stride);
  }

  void run() {
    for (int64_t i; (i = queue.next() * chunk) < a.outputs;) {
      const int64_t end = imin(i + chunk, a.outputs);
      for_rows(a.rows, [&]<int M>() { strip<M>(i, end); });
    }
  }

 private:
  static constexpr int64_t kStep = 16;  // a multiple of every tile

  template <int M>
  void strip(int64_t from, int64_t to) {
    constexpr int R = kWeightRows<M>;
    const int64_t apart = (to - from) / R;
    for (int64_t i = 0; i < apart; ++i) tile<M, R>(from + i, apart);
    if constexpr (R > 1)
      for (from += apart * R; from < to; ++from) tile<M, 1>(from, 0);
  }

  // Rows n, n + apart, ... of the weight.
  template <int M, int R>
  void tile(int64_t n, int64_t apart) {
    const QueryHeads<T> lines{x, static_cast<const T*>(a.x), stride, a.x_row};
    const T* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = static_cast<const T*>(a.weight) + (n + r * apart) * a.w_row;
    float out[16];
    multiply_rows<T, M, R>(rows, lines, a.columns, out);
    const T* bias = static_cast<const T*>(a.bias);
    for (int r = 0; r < R; ++r) {
      const int64_t column = n + r * apart;
      const float added = bias ? to_float(bias[column]) : 0.0f;
      for (int m = 0; m < M; ++m) from_float(out[m * R + r] + added, static_cast<T*>(a.out) + m * a.outputs + column);
    }
  }

  const LinearArgs& a;
  const int64_t stride;
  int64_t chunk;
  float* x;  // [M][stride], in working order
  Queue queue;
};

template <class T>
Status multiply(const LinearArgs& args) {
  Linear<T> linear(args);
  scratch.layout([&](Scratch& s) { linear.layout(s); });
  linear.plan();
  parallel(args.threads, [&](int, int) { linear.run(); });
  return kOk;
}

}  // namespace

Status linear(const LinearArgs& args) {
  return args.dtype == kBFloat16 ? multiply<bf16>(args) : multiply<float>(args);
}

}  // namespace gossamer::GOSSAMER_ISA
