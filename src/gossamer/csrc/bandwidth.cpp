// Reads a large buffer as fast as the cores can: the bound of everything that streams.
#include "parallel.h"

namespace gossamer::GOSSAMER_ISA {

// Returns the sum of `size` floats (a multiple of 8192), so that no read can be left out.
float read_all(const float* data, int64_t size, int threads) {
  constexpr int64_t kChunk = 1 << 18;
  Queue queue;
  std::atomic<float> result{0.0f};
  parallel(threads, [&](int, int) {
    vf sum[8] = {};
    for (int64_t i; (i = queue.next() * kChunk) < size;) {
      const int64_t end = imin(i + kChunk, size);
      for (; i + 8 * kLanes <= end; i += 8 * kLanes)
        for (int j = 0; j < 8; ++j) sum[j] += load(data + i + j * kLanes);
    }
    vf total = {};
    for (const vf& part : sum) total += part;
    const float mine = hsum(total);
    for (float seen = result; !result.compare_exchange_weak(seen, seen + mine);) {
    }
  });
  return result;
}

}  // namespace gossamer::GOSSAMER_ISA
