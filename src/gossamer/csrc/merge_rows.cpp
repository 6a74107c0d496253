// Rows of a cache become the weighted means of themselves and the rows merged into them. The sources of a target are strung
// together first, so that a target is read and written once, in an order that does not depend on the threads.
#include "attend.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

thread_local Scratch scratch;

constexpr int64_t kTask = 32;  // sources of a head that a thread takes at a time

template <class T>
class Merge {
 public:
  explicit Merge(const MergeArgs& args)
      : a(args),
        lines(args.batch * args.heads),
        stride(ceil_div(args.dim, 2 * kLanes) * 2 * kLanes),
        tasks(ceil_div(args.count, kTask)) {}

  void layout(Scratch& s) {
    s.take(first, lines * a.rows);
    s.take(next, lines * a.count);
    s.take(buffers, a.threads * 2 * stride);
  }

  // Strings the sources of a head together; finds ids that cannot be.
  void link(int64_t line) {
    const int32_t *from = a.sources + line * a.count, *to = a.targets + line * a.count;
    int32_t *head = first + line * a.rows, *after = next + line * a.count;
    for (int64_t i = 0; i < a.rows; ++i) head[i] = -1;
    for (int64_t i = a.count - 1; i >= 0; --i) {
      if (to[i] == -1) continue;
      if (to[i] < 0 || to[i] >= a.rows || from[i] < 0 || from[i] >= a.rows) return void(status = kBadIndex);
      after[i] = head[to[i]];
      head[to[i]] = int32_t(i);
    }
    for (int64_t i = 0; i < a.count; ++i)
      if (to[i] != -1 && head[from[i]] != -1) return void(status = kBadMerge);
  }

  void run(int thread, int threads) {
    for (int64_t line; (line = first_queue.next()) < lines;) link(line);
    barrier(threads);
    if (status != kOk) return;
    for (int64_t task; (task = last_queue.next()) < lines * tasks;) {
      const int64_t line = task / tasks, begin = task % tasks * kTask;
      for (int64_t i = begin; i < imin(begin + kTask, a.count); ++i) {
        const int32_t target = a.targets[line * a.count + i];
        if (target != -1 && first[line * a.rows + target] == i) merge(thread, line, target, i);
      }
    }
  }

  std::atomic<int> status{kOk};

 private:
  // sum += weight * row, or weight * row / |row|; returns weight, or weight * |row|.
  float add(const T* row, float weight, float* wide, float* sum) const {
    to_working_order(row, a.dim, wide);
    float factor = weight, measure = weight;
    if (a.keep_norm) {
      vf squares = {};
      for (int64_t c = 0; c < stride; c += kLanes) squares = fma(load(wide + c), load(wide + c), squares);
      const float size = __builtin_sqrtf(hsum(squares));
      measure = weight * size;
      factor = size == 0.0f ? 0.0f : weight / size;
    }
    for (int64_t c = 0; c < stride; c += kLanes) store(sum + c, fma(load(wide + c), splat(factor), load(sum + c)));
    return measure;
  }

  void merge(int thread, int64_t line, int64_t target, int64_t source) {
    T* base = static_cast<T*>(a.data) + line / a.heads * a.s_batch + line % a.heads * a.s_head;
    const float* scores = a.scores + line * a.rows;
    float *wide = buffers + thread * 2 * stride, *sum = wide + stride;
    std::memset(wide, 0, size_t(2 * stride) * sizeof(float));
    float total = scores[target], measure = add(base + target * a.s_row, total, wide, sum);
    for (int64_t i = source; i != -1; i = next[line * a.count + i]) {
      const int64_t row = a.sources[line * a.count + i];
      total += scores[row];
      measure += add(base + row * a.s_row, scores[row], wide, sum);
    }
    a.out[line * a.rows + target] = total;
    if (total == 0.0f) return;
    float factor = 1.0f / total;
    if (a.keep_norm) {
      vf squares = {};
      for (int64_t c = 0; c < stride; c += kLanes) squares = fma(load(sum + c), load(sum + c), squares);
      const float size = __builtin_sqrtf(hsum(squares));
      if (size == 0.0f) return;  // the directions cancel
      factor *= measure / size;
    }
    from_working_order(sum, factor, a.dim, base + target * a.s_row);
  }

  const MergeArgs& a;
  const int64_t lines, stride, tasks;
  int32_t *first, *next;  // [line][rows], the first source of each row; [line][count], the one behind it
  float* buffers;
  Queue first_queue, last_queue;
};

template <class T>
Status run(const MergeArgs& args) {
  Merge<T> work(args);
  scratch.layout([&](Scratch& s) { work.layout(s); });
  parallel(args.threads, [&](int thread, int threads) { work.run(thread, threads); });
  return Status(work.status.load());
}

}  // namespace

Status merge_rows(const MergeArgs& args) { return args.dtype == kBFloat16 ? run<bf16>(args) : run<float>(args); }

}  // namespace gossamer::GOSSAMER_ISA
