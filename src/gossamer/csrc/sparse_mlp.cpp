// A gated MLP at the few rows of a decode step that reads up and down only for the neurons whose gate is large.
//
// Three passes of one team: all gates, as `linear` reads them; the choice, by one thread, since it only looks at the gates;
// then the kept neurons in pieces of a few, each dotted with x and at once added, by its product, to the sums of the thread.
// Rows of up and down are whole pages that lie anywhere: the beginnings of those that come next are fetched by hand, the
// rest by the loops.
#include "activate.h"
#include "products.h"
#include "select.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

thread_local Scratch scratch;

constexpr int64_t kGates = 64;    // neurons whose gates a thread takes at a time
constexpr int64_t kNeurons = 16;  // kept neurons that a thread takes at a time

template <class T>
GOSSAMER_INLINE void rows_of_x(const SparseMlpArgs& a, int64_t m, float* out) {
  to_working_order(static_cast<const T*>(a.x) + m * a.x_row, a.channels, out);
}
template <>
GOSSAMER_INLINE void rows_of_x<int8_t>(const SparseMlpArgs& a, int64_t m, float* out) {
  for (int64_t c = 0; c < a.channels; ++c)
    out[c] = a.dtype == kBFloat16 ? to_float(static_cast<const bf16*>(a.x)[m * a.x_row + c])
                                  : static_cast<const float*>(a.x)[m * a.x_row + c];
}

template <class T>
class SparseMlp {
 public:
  explicit SparseMlp(const SparseMlpArgs& args)
      : a(args),
        stride(ceil_div(args.channels, 2 * kLanes) * 2 * kLanes),
        considered(args.indices ? args.count : args.neurons),
        line(ceil_div(considered, kLanes) * kLanes + kGates) {}

  void layout(Scratch& s) {
    s.take(x, a.rows * stride);
    s.take(gate, a.rows * line);
    s.take(sums, a.threads * a.rows * stride);
    s.take(kept, considered);
    s.take(bits, considered);
    if (!a.threshold && !a.indices) selector.layout(s, considered);
  }

  void plan() {
    for (int64_t m = 0; m < a.rows; ++m) rows_of_x<T>(a, m, x + m * stride);
  }

  void run(int thread, int threads) {
    for (int64_t i; (i = gates.next() * kGates) < considered;) {
      const int64_t end = imin(i + kGates, considered);
      for_rows(a.rows, [&]<int M>() GOSSAMER_LAMBDA { gate_strip<M>(i, end); });
      for (int64_t m = 0; m < a.rows; ++m)
        for (int64_t j = i; j < end; j += kLanes)
          store(gate + m * line + j, activate(a.activation, load(gate + m * line + j)));
    }
    barrier(threads);
    if (thread == 0) choose();
    float* mine = sums + thread * a.rows * stride;
    std::memset(mine, 0, a.rows * stride * sizeof(float));
    barrier(threads);
    for (int64_t i; (i = neurons.next() * kNeurons) < kept_count;)
      for_rows(a.rows, [&]<int M>() GOSSAMER_LAMBDA { neuron_strip<M>(i, imin(i + kNeurons, kept_count), mine); });
  }

  // Sums of all threads, and the bias, in the dtype of x.
  void finish(int threads) {
    for (int64_t m = 0; m < a.rows; ++m) {
      float* total = sums + m * stride;
      for (int t = 1; t < threads; ++t)
        for (int64_t c = 0; c < stride; c += kLanes)
          store(total + c, load(total + c) + load(sums + (t * a.rows + m) * stride + c));
      write(total, m);
    }
  }

 private:
  static constexpr bool kBytes = sizeof(T) == 1;

  int64_t neuron(int64_t i) const { return a.indices ? a.indices[i] : i; }

  template <int R, class At>
  GOSSAMER_INLINE static void rows_at(const SparseMlpArgs::Matrix& matrix, const At& at, const T** rows) {
    GOSSAMER_UNROLL
    for (int r = 0; r < R; ++r) rows[r] = static_cast<const T*>(matrix.weight) + at(r) * matrix.row;
  }

  // The product of row r as the layer makes it: scaled, with its bias.
  GOSSAMER_INLINE float finished(const SparseMlpArgs::Matrix& matrix, float product, int64_t j) const {
    if constexpr (kBytes) product *= matrix.scale[j];
    if (!matrix.bias) return product;
    return product + (a.dtype == kBFloat16 ? to_float(static_cast<const bf16*>(matrix.bias)[j])
                                           : static_cast<const float*>(matrix.bias)[j]);
  }

  QueryHeads<T> lines() const { return {x, static_cast<const T*>(a.x), stride, a.x_row}; }

  template <int M>
  void gate_strip(int64_t from, int64_t to) {
    constexpr int R = kWeightRows<M>;
    const int64_t apart = (to - from) / R;
    for (int64_t i = 0; i < apart; ++i) gate_tile<M, R>(from + i, apart);
    if constexpr (R > 1)
      for (from += apart * R; from < to; ++from) gate_tile<M, 1>(from, 0);
  }

  template <int M, int R>
  void gate_tile(int64_t i, int64_t apart) {
    const T* rows[R];
    rows_at<R>(a.gate, [&](int r) GOSSAMER_LAMBDA { return neuron(i + r * apart); }, rows);
    float out[16];
    multiply_rows<T, M, R>(rows, lines(), a.channels, out);
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m)
        gate[m * line + i + r * apart] = finished(a.gate, out[m * R + r], neuron(i + r * apart));
  }

  // Which rows keep which neurons, and the list of those that some row keeps.
  void choose() {
    if (a.indices || a.threshold)
      for (int64_t i = 0; i < considered; ++i) {
        unsigned keep = 0;
        if (a.indices)
          keep = (1u << a.rows) - 1;
        else
          for (int64_t m = 0; m < a.rows; ++m)
            keep |= unsigned(!(__builtin_fabsf(gate[m * line + i]) <= a.threshold[i * a.threshold_step])) << m;
        bits[i] = uint8_t(keep);
      }
    else
      choose_largest();
    for (int64_t m = 0; m <= a.rows; ++m) a.counts[m] = 0;
    kept_count = 0;
    for (int64_t i = 0; i < considered; ++i) {
      kept[kept_count] = int32_t(i);
      kept_count += bits[i] != 0;
      for (int64_t m = 0; m < a.rows; ++m) a.counts[m] += bits[i] >> m & 1;
    }
    a.counts[a.rows] = kept_count;
  }

  void choose_largest() {
    std::memset(bits, 0, considered);
    if (a.count == 0) return;
    for (int64_t m = 0; m < a.rows; ++m) {
      const float* g = gate + m * line;
      // Without their sign, the bits of floats are in their order, NaN above all.
      const auto key = [&](int64_t i) { return __builtin_bit_cast(uint32_t, g[i]) & 0x7fffffffu; };
      for (int64_t i = 0; i < considered; ++i) selector.work[i] = key(i);
      int64_t equal = 0;
      const uint32_t last = selector.nth_largest(considered, imin(a.count, considered), equal);
      for (int64_t i = 0; i < considered; ++i) {
        const uint32_t k = key(i);
        bool keep = k > last;
        if (k == last && equal > 0) keep = true, --equal;
        bits[i] |= uint8_t(keep) << m;
      }
    }
  }

  template <int M>
  void neuron_strip(int64_t from, int64_t to, float* mine) {
    constexpr int R = kWeightRows<M>;
    for (; from + R <= to; from += R) neuron_tile<M, R>(from, to, mine);
    if constexpr (R > 1)
      for (; from < to; ++from) neuron_tile<M, 1>(from, to, mine);
  }

  template <int M, int R>
  void neuron_tile(int64_t from, int64_t to, float* mine) {
    const T *up[R], *down[R];
    const auto at = [&](int r) GOSSAMER_LAMBDA { return neuron(kept[from + r]); };
    rows_at<R>(a.up, at, up);
    rows_at<R>(a.down, at, down);
    const int64_t bytes = imin(kAhead, a.channels * int64_t(sizeof(T)));
    for (int r = 0; r < R; ++r) prefetch_row(down[r], bytes);
    float out[16];
    multiply_rows<T, M, R>(up, lines(), a.channels, out);
    for (int64_t i = from + R; i < imin(from + 2 * R, to); ++i)
      prefetch_row(static_cast<const T*>(a.up.weight) + neuron(kept[i]) * a.up.row, bytes);
    float weights[16];
    for (int r = 0; r < R; ++r) {
      const int64_t i = kept[from + r], j = neuron(i);
      for (int m = 0; m < M; ++m) {
        float product = gate[m * line + i] * finished(a.up, out[m * R + r], j);
        if constexpr (kBytes) product *= a.down.scale[j];
        weights[m * R + r] = bits[i] >> m & 1 ? product : 0.0f;
      }
    }
    add_weighted_rows<T, M, R>(down, weights, a.channels, mine, stride);
  }

  void write(float* total, int64_t m) const {
    if (a.dtype == kBFloat16)
      write_as(total, static_cast<bf16*>(a.out) + m * a.channels, static_cast<const bf16*>(a.down.bias));
    else
      write_as(total, static_cast<float*>(a.out) + m * a.channels, static_cast<const float*>(a.down.bias));
  }

  template <class Out>
  void write_as(float* total, Out* out, const Out* bias) const {
    if (bias) {
      float* line = x;  // has served
      if constexpr (kBytes)
        for (int64_t c = 0; c < a.channels; ++c) line[c] = to_float(bias[c]);
      else
        to_working_order(bias, a.channels, line);
      for (int64_t c = 0; c < a.channels; ++c) total[c] += line[c];
    }
    if constexpr (kBytes)
      for (int64_t c = 0; c < a.channels; ++c) from_float(total[c], out + c);
    else
      from_working_order(total, 1.0f, a.channels, out);
  }

  const SparseMlpArgs& a;
  const int64_t stride, considered, line;
  int64_t kept_count = 0;
  float* x;        // [M][stride], in working order
  float* gate;     // [M][line], activated
  float* sums;     // [threads][M][stride], in working order
  int32_t* kept;   // places in the gates of neurons that some row keeps
  uint8_t* bits;   // for each place, the rows that keep it
  Selector selector{};
  Queue gates, neurons;
};

template <class T>
Status compute(const SparseMlpArgs& args) {
  if (args.indices)
    for (int64_t i = 0; i < args.count; ++i)
      if (args.indices[i] < 0 || args.indices[i] >= args.neurons || (i && args.indices[i] <= args.indices[i - 1]))
        return kBadOrder;
  SparseMlp<T> mlp(args);
  scratch.layout([&](Scratch& s) { mlp.layout(s); });
  mlp.plan();
  int team = 1;
  parallel(args.threads, [&](int thread, int threads) {
    if (thread == 0) team = threads;
    mlp.run(thread, threads);
  });
  mlp.finish(team);
  return kOk;
}

}  // namespace

Status sparse_mlp(const SparseMlpArgs& args) {
  if (args.int8) return compute<int8_t>(args);
  return args.dtype == kBFloat16 ? compute<bf16>(args) : compute<float>(args);
}

}  // namespace gossamer::GOSSAMER_ISA
