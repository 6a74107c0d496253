// Rows that stay move to the front of their head. A row only moves forward, so one pass without a temporary is enough;
// neighbours that stay together move together.
#include "parallel.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

template <class Id>
Status compact(const CompactArgs& a) {
  const Id* all = static_cast<const Id*>(a.ids);
  const int64_t lines = a.batch * a.heads;
  for (int64_t line = 0; line < lines; ++line) {  // before anything moves
    const Id* ids = all + line * a.kept;
    int64_t bad = a.kept && (ids[0] < 0 || ids[a.kept - 1] >= a.length);
    for (int64_t i = 1; i < a.kept; ++i) bad |= ids[i] <= ids[i - 1];
    if (bad) return kBadOrder;
  }
  Queue queue;
  parallel(a.threads, [&](int, int) {
    for (int64_t line; (line = queue.next()) < lines;) {
      const Id* ids = all + line * a.kept;
      char* rows = static_cast<char*>(a.storage) + line / a.heads * a.s_batch + line % a.heads * a.s_head;
      int64_t i = 0;
      while (i < a.kept && ids[i] == i) ++i;  // these lie where they belong
      while (i < a.kept) {
        const int64_t from = ids[i];
        int64_t run = 1;
        while (i + run < a.kept && ids[i + run] == from + run) ++run;
        if (a.s_row == a.row_bytes) {
          std::memmove(rows + i * a.s_row, rows + from * a.s_row, size_t(run * a.row_bytes));
        } else {
          for (int64_t r = 0; r < run; ++r)
            std::memcpy(rows + (i + r) * a.s_row, rows + (from + r) * a.s_row, size_t(a.row_bytes));
        }
        i += run;
      }
    }
  });
  return kOk;
}

}  // namespace

Status compact_rows(const CompactArgs& args) {
  return args.id_size == 8 ? compact<int64_t>(args) : compact<int32_t>(args);
}

}  // namespace gossamer::GOSSAMER_ISA
