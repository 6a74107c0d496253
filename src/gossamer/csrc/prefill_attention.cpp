// Prefill over chosen blocks of keys, and over columns and diagonals. The arithmetic is in tile_attention.h; here is which
// keys each block of queries reads.
#include "tile_attention.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

thread_local Scratch scratch;

class Blocks {
 public:
  explicit Blocks(const BlockSparseArgs& args)
      : a(args), group(args.prefill.heads / args.select_heads), limit(ceil_div(args.prefill.rows, args.key_block_size)) {}

  bool shared() const { return a.select_heads != a.prefill.heads; }

  template <class To>
  Status give(To& to, int64_t b, int64_t head, int64_t block) const {
    const int64_t line = head / group, at = b * a.b_batch + line * a.b_head + block * a.b_row;
    if (a.mask) {
      const bool* chosen = a.mask + at;
      for (int64_t j = 0; j < a.columns; ++j)
        if (chosen[j]) to.add(j * a.key_block_size, (j + 1) * a.key_block_size);
      return kOk;
    }
    const int64_t count = a.counts[(b * a.select_heads + line) * ceil_div(a.prefill.queries, a.prefill.block_size) + block];
    if (count < 0 || count > a.columns) return kBadCount;
    int64_t before = -1;
    for (int64_t n = 0; n < count; ++n) {
      const int64_t j = a.blocks[at + n];
      if (j <= before || j >= limit) return kBadIndex;
      to.add(j * a.key_block_size, (j + 1) * a.key_block_size);
      before = j;
    }
    return kOk;
  }

 private:
  const BlockSparseArgs& a;
  const int64_t group, limit;
};

class Diagonals {
 public:
  explicit Diagonals(const VerticalSlashArgs& args) : a(args) {}

  bool shared() const { return false; }

  bool valid() const {
    const int64_t lines = a.prefill.batch * a.prefill.heads;
    return ordered(a.verticals, lines, a.vertical_count, 1) && ordered(a.slashes, lines, a.slash_count, -1);
  }

  // square(first key) and column(key) of one block of queries, each ascending.
  template <class Square, class Column>
  GOSSAMER_INLINE void walk(int64_t line, int64_t block, const Square& square, const Column& column) const {
    const int32_t *vertical = a.verticals + line * a.vertical_count, *slash = a.slashes + line * a.slash_count;
    const int64_t size = a.prefill.block_size, last = (block + 1) * size;
    int64_t v = 0, end = -size - 1, before = -1;  // end: of the square before, none yet
    const auto columns_until = [&](int64_t stop) GOSSAMER_LAMBDA {
      for (; v < a.vertical_count && vertical[v] < stop; ++v)
        if (vertical[v] >= end && vertical[v] != before) column(before = vertical[v]);
    };
    for (int64_t s = 0; s < a.slash_count; ++s) {
      if (slash[s] >= last) continue;
      const int64_t stop = imax(last - slash[s], size);
      if (stop <= end) continue;
      const int64_t begin = stop > end + size ? stop - size : end;
      columns_until(begin);
      square(begin);
      end = begin + size;
    }
    columns_until(last);
  }

  template <class To>
  Status give(To& to, int64_t b, int64_t head, int64_t block) const {
    walk(
        b * a.prefill.heads + head, block, [&](int64_t from) { to.add(from, from + a.prefill.block_size); },
        [&](int64_t key) { to.add(key, key + 1); });
    return kOk;
  }

 private:
  bool ordered(const int32_t* ids, int64_t lines, int64_t count, int sign) const {
    for (int64_t l = 0; l < lines; ++l)
      for (int64_t i = 0; i < count; ++i) {
        const int32_t id = ids[l * count + i];
        if (id < 0 || id >= a.prefill.rows || (i && (id - ids[l * count + i - 1]) * sign < 0)) return false;
      }
    return true;
  }

  const VerticalSlashArgs& a;
};

template <class T, class Keys>
Status attend(const PrefillArgs& args, const Keys& keys) {
  PrefillAttention<T, Keys> attention(args, keys);
  std::atomic<int> status{kOk};
  parallel(args.threads, [&](int thread, int) {
    const Status mine = attention.run(thread, scratch);
    if (mine != kOk) status = mine;
  });
  return Status(status.load());
}

template <class Keys>
Status attend(const PrefillArgs& args, const Keys& keys) {
  for (int64_t b = 0; args.starts && b < args.batch; ++b)
    if (args.starts[b] < 0 || args.starts[b] > args.rows) return kBadRange;
  return args.dtype == kBFloat16 ? attend<bf16>(args, keys) : attend<float>(args, keys);
}

}  // namespace

Status block_sparse_attention(const BlockSparseArgs& args) { return attend(args.prefill, Blocks(args)); }

Status vertical_slash_attention(const VerticalSlashArgs& args) {
  const Diagonals diagonals(args);
  return diagonals.valid() ? attend(args.prefill, diagonals) : kBadIndex;
}

Status vertical_slash_index(const VerticalSlashArgs& args) {
  const Diagonals diagonals(args);
  if (!diagonals.valid()) return kBadIndex;
  const int64_t blocks = ceil_div(args.prefill.rows, args.prefill.block_size);
  Queue queue;
  parallel(args.prefill.threads, [&](int, int) {
    for (int64_t i; (i = queue.next()) < args.prefill.batch * args.prefill.heads * blocks;) {
      int32_t *ranges = args.ranges + i * args.max_ranges, *columns = args.columns + i * args.vertical_count;
      int64_t squares = 0, singles = 0;
      diagonals.walk(
          i / blocks, i % blocks, [&](int64_t from) { ranges[squares++] = int32_t(from); },
          [&](int64_t key) { columns[singles++] = int32_t(key); });
      args.range_counts[i] = int32_t(squares), args.column_counts[i] = int32_t(singles);
      for (; squares < args.max_ranges; ++squares) ranges[squares] = 0;
      for (; singles < args.vertical_count; ++singles) columns[singles] = 0;
    }
  });
  return kOk;
}

}  // namespace gossamer::GOSSAMER_ISA
