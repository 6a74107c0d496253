// Rows that stay move to the front of their head. A row only moves forward, so one pass without a temporary is enough;
// neighbours that stay together move together.
//
// Threads share a head: piece i writes rows [a, b) and reads rows from a on, so that it disturbs no later piece, and is
// disturbed by the next one only in what it reads from b on. Those few rows (as many as were dropped before b) are set aside
// first.
#include "parallel.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

thread_local Scratch scratch;

template <class Id>
class Compact {
 public:
  explicit Compact(const CompactArgs& args) : a(args), lines(args.batch * args.heads) {
    const Id* ids = static_cast<const Id*>(a.ids);
    int64_t shift = 0;  // rows dropped, at most
    for (int64_t line = 0; line < lines && a.kept; ++line) shift = imax(shift, ids[line * a.kept + a.kept - 1] + 1 - a.kept);
    aside = shift;
    pieces = imax(1, imin(ceil_div(2 * a.threads, imax(lines, 1)), a.kept / (8 * imax(shift, 1))));
    if (a.threads == 1) pieces = 1;
  }

  bool valid() const {
    for (int64_t line = 0; line < lines; ++line) {
      const Id* ids = static_cast<const Id*>(a.ids) + line * a.kept;
      int64_t bad = a.kept && (ids[0] < 0 || ids[a.kept - 1] >= a.length);
      for (int64_t i = 1; i < a.kept; ++i) bad |= ids[i] <= ids[i - 1];
      if (bad) return false;
    }
    return true;
  }

  void layout(Scratch& s) { s.take(saved, pieces > 1 ? lines * pieces * aside * a.row_bytes : 0); }

  void run(int threads) {
    if (pieces > 1) {
      for (int64_t task; (task = first_queue.next()) < lines * pieces;) set_aside(task);
      barrier(threads);
    }
    for (int64_t task; (task = last_queue.next()) < lines * pieces;) move(task);
  }

 private:
  struct Piece {
    const Id* ids;
    char* rows;
    int64_t begin, late, end;  // rows [late, end) come from behind the end
  };

  Piece piece(int64_t task) const {
    const int64_t line = task / pieces, p = task % pieces;
    Piece x{static_cast<const Id*>(a.ids) + line * a.kept,
            static_cast<char*>(a.storage) + line / a.heads * a.s_batch + line % a.heads * a.s_head,
            a.kept * p / pieces, 0, a.kept * (p + 1) / pieces};
    x.late = x.end;
    if (p < pieces - 1)
      while (x.late > x.begin && x.ids[x.late - 1] >= x.end) --x.late;
    return x;
  }

  void set_aside(int64_t task) {
    const Piece x = piece(task);
    for (int64_t i = x.late; i < x.end; ++i) copy(saved + (task * aside + i - x.late) * a.row_bytes, x.rows + x.ids[i] * a.s_row);
  }

  void move(int64_t task) {
    const Piece x = piece(task);
    int64_t i = x.begin;
    if (i < x.late && x.ids[i] == i) i += run_of(x, i);  // these lie where they belong
    while (i < x.late) {
      const int64_t run = run_of(x, i), from = x.ids[i];
      if (a.s_row == a.row_bytes) {
        std::memmove(x.rows + i * a.s_row, x.rows + from * a.s_row, size_t(run * a.row_bytes));
      } else {
        for (int64_t r = 0; r < run; ++r) copy(x.rows + (i + r) * a.s_row, x.rows + (from + r) * a.s_row);
      }
      i += run;
    }
    for (i = x.late; i < x.end; ++i) copy(x.rows + i * a.s_row, saved + (task * aside + i - x.late) * a.row_bytes);
  }

  // Rows from i on that stay neighbours.
  static int64_t run_of(const Piece& x, int64_t i) {
    int64_t run = 1;
    while (i + run < x.late && x.ids[i + run] == x.ids[i] + run) ++run;
    return run;
  }

  void copy(char* to, const char* from) const { std::memcpy(to, from, size_t(a.row_bytes)); }

  const CompactArgs& a;
  const int64_t lines;
  int64_t pieces = 1, aside = 0;
  char* saved = nullptr;
  Queue first_queue, last_queue;
};

template <class Id>
Status run(const CompactArgs& args) {
  Compact<Id> work(args);
  if (!work.valid()) return kBadOrder;
  scratch.layout([&](Scratch& s) { work.layout(s); });
  parallel(args.threads, [&](int, int threads) { work.run(threads); });
  return kOk;
}

}  // namespace

Status compact_rows(const CompactArgs& args) { return args.id_size == 8 ? run<int64_t>(args) : run<int32_t>(args); }

}  // namespace gossamer::GOSSAMER_ISA
