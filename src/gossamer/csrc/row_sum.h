// Sums of listed rows of a matrix, each times a factor: out[m] += sum of factors[i][m] * weight[ids[i]]. It is the product
// of a weight that is stored input-major with an input of which only a few elements count, and is bound by the bytes of the
// rows that they name. Threads share the columns, so every output is summed in the order of the list, whoever adds it.
#pragma once
#include "parallel.h"

namespace gossamer::GOSSAMER_ISA {

// Writes the places of the marked elements, ascending; returns how many. No branch: which ones are marked is not to be
// foretold. `ids` has room for all.
GOSSAMER_INLINE int64_t list_marked(const uint8_t* marked, int64_t size, int32_t* ids) {
  int64_t count = 0;
  for (int64_t k = 0; k < size; ++k) {
    ids[count] = int32_t(k);
    count += marked[k] != 0;
  }
  return count;
}

// Which rows, and what each of them is multiplied with for every line of the output.
struct RowList {
  const int32_t* ids;    // [count]
  const float* factors;  // [count][lines]
  int64_t count;
};

template <class T>
class RowSum {
 public:
  RowSum(const T* weight, int64_t weight_row, const RowList& list, float* out, int64_t out_row, int64_t lines, int64_t columns)
      : weight_(weight), weight_row_(weight_row), list_(list), out_(out), out_row_(out_row), lines_(lines), columns_(columns) {}

  // Adds everything, on as many threads as the bytes are worth. Each share of the columns begins and ends with what the
  // caller does to it.
  template <class Begin, class End>
  void add(int threads, const Begin& begin, const End& end) {
    const int64_t useful = list_.count * columns_ * int64_t(sizeof(T)) / kBytesPerThread + 1;
    const int team = useful < threads ? int(useful) : threads;
    // The longer the pieces of rows, the nearer to the memory's speed. Threads take two shares in turn, since cores are not
    // equally fast, only where these stay long.
    const int64_t fair = ceil_div(columns_, team), size = sizeof(T);
    const int64_t share = imax(kMinShare / size, imax(imin(fair, kLongShare / size), ceil_div(fair, 2)));
    share_ = team == 1 ? columns_ : ceil_div(share, kStep) * kStep;
    parallel(team, [&](int, int) { run(begin, end); });
  }

 private:
  static constexpr int64_t kBytesPerThread = 1 << 17, kMinShare = 1 << 12, kLongShare = 1 << 13;
  static constexpr int64_t kStep = 64 * kLanes / 16;  // whole cache lines of out, whatever T is
  static constexpr int64_t kAhead = 4096;             // bytes between what is in use and what is being fetched

  template <class Begin, class End>
  void run(const Begin& begin, const End& end) {
    for (int64_t from; (from = queue_.next() * share_) < columns_;) {
      const int64_t to = imin(from + share_, columns_);
      begin(from, to);
      for_rows(lines_, [&]<int M>() { strip<M>(from, to); });
      end(from, to);
    }
  }

  // Eight rows at a time: the output is loaded and stored once for them, and they are as many streams as memory likes.
  static constexpr int kRows = 8;

  template <int M>
  void strip(int64_t from, int64_t to) {
    int64_t i = 0;
    for (; i + kRows <= list_.count; i += kRows) group<M, kRows>(i, from, to);
    if (i + 4 <= list_.count) group<M, 4>(i, from, to), i += 4;
    for (; i < list_.count; ++i) group<M, 1>(i, from, to);
  }

  const T* row(int64_t i) const { return weight_ + list_.ids[imin(i, list_.count - 1)] * weight_row_; }

  template <int M, int R>
  void group(int64_t i, int64_t from, int64_t to) {
    constexpr int64_t kFetch = kAhead / int64_t(sizeof(T));
    const T *rows[R], *next[R];
    for (int r = 0; r < R; ++r) rows[r] = row(i + r), next[r] = row(i + R + r);
    const float* factors = list_.factors + i * M;
    int64_t c = from;
    const int64_t whole = from + (to - from) / kLanes * kLanes, near = imax(from, whole - kFetch);
    for (; c < near; c += kLanes) {
      for (int r = 0; r < R; ++r) prefetch(rows[r] + c + kFetch);
      add_products<M, R>(rows, factors, c);
    }
    for (int64_t shift = from - near; c < whole; c += kLanes) {  // what follows is the beginning of the next rows
      for (int r = 0; r < R; ++r) prefetch(next[r] + c + shift);
      add_products<M, R>(rows, factors, c);
    }
    for (; c < to; ++c)
      for (int m = 0; m < M; ++m)
        for (int r = 0; r < R; ++r) out_[m * out_row_ + c] += factors[r * M + m] * to_float(rows[r][c]);
  }

  template <int M, int R>
  GOSSAMER_INLINE void add_products(const T* const* rows, const float* factors, int64_t c) {
    vf w[R];
    GOSSAMER_UNROLL
    for (int r = 0; r < R; ++r) w[r] = load(rows[r] + c);
    GOSSAMER_UNROLL
    for (int m = 0; m < M; ++m) {
      float* const at = out_ + m * out_row_ + c;
      vf sum = load(at);
      GOSSAMER_UNROLL
      for (int r = 0; r < R; ++r) sum = fma(w[r], splat(factors[r * M + m]), sum);
      store(at, sum);
    }
  }

  const T* const weight_;
  const int64_t weight_row_;
  const RowList list_;
  float* const out_;
  const int64_t out_row_, lines_, columns_;
  int64_t share_ = 0;
  Queue queue_;
};

}  // namespace gossamer::GOSSAMER_ISA
