// Exact top-k of a line of scores, as ascending ids, without sorting: a sample gives a threshold that a few more than k
// scores pass, one vectorised pass collects those, and a radix search among them finds the k-th. Where the sample misled
// (fewer than k passed) the threshold falls and the pass is repeated, so the result never depends on it.
#pragma once
#include "parallel.h"

namespace gossamer::GOSSAMER_ISA {

// Maps floats to integers in the same order; -0 and +0 are equal.
GOSSAMER_INLINE uint32_t order_key(float x) {
  const uint32_t u = __builtin_bit_cast(uint32_t, x + 0.0f);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

GOSSAMER_INLINE float from_order_key(uint32_t key) {
  return __builtin_bit_cast(float, key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The buffers one thread needs for lines of up to `size` scores.
struct Selector {
  static constexpr int kRadixBits = 11, kBuckets = 1 << kRadixBits;
  static constexpr int64_t kSample = 1024;

  uint32_t* keys;      // [size], of the candidates
  int32_t* ids;        // [size]
  uint32_t* work;      // [size], keys that still contend
  uint32_t* buckets;   // [kBuckets]

  void layout(Scratch& scratch, int64_t size) {
    scratch.take(keys, size + 64);
    scratch.take(ids, size + 64);
    scratch.take(work, imax(size, kSample));
    scratch.take(buckets, kBuckets);
  }

  // The rank-th largest of work[0 .. count) (1 <= rank <= count) and, in `equal`, how many of its equals are among the
  // rank largest. Destroys work. The first digit is taken below the highest bit in which the keys differ.
  uint32_t nth_largest(int64_t count, int64_t rank, int64_t& equal) {
    for (;;) {
      uint32_t low = ~0u, high = 0;
      for (int64_t i = 0; i < count; ++i) {
        low = work[i] < low ? work[i] : low;
        high = work[i] > high ? work[i] : high;
      }
      if (low == high) {
        equal = rank;
        return low;
      }
      const int width = 32 - __builtin_clz(high - low), shift = width > kRadixBits ? width - kRadixBits : 0;
      std::memset(buckets, 0, (((high - low) >> shift) + 1) * sizeof(uint32_t));
      for (int64_t i = 0; i < count; ++i) ++buckets[(work[i] - low) >> shift];
      uint32_t bucket = (high - low) >> shift;
      for (; buckets[bucket] < rank; --bucket) rank -= buckets[bucket];
      int64_t kept = 0;
      for (int64_t i = 0; i < count; ++i) {
        work[kept] = work[i];
        kept += (work[i] - low) >> shift == bucket;
      }
      count = kept;
    }
  }

  // Collects ids (from `begin` on) and keys of the scores >= threshold; -inf and NaN never pass. `Rare` skips vectors without
  // any; where most vectors have some, the branch costs more than the work that it saves.
  template <bool Rare>
  int64_t collect(const float* scores, int64_t begin, int64_t end, float threshold) {
    int64_t found = 0, i = begin;
#if defined(GOSSAMER_AVX512)
    const __m512 least = _mm512_set1_ps(threshold), nothing = _mm512_set1_ps(-kInf);
    const __m512i sign = _mm512_set1_epi32(int32_t(0x80000000));
    const __m512i step = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i < end; i += 16) {
      const __mmask16 valid = end - i >= 16 ? 0xffff : (1u << (end - i)) - 1;
      const __m512 x = _mm512_add_ps(_mm512_maskz_loadu_ps(valid, scores + i), _mm512_setzero_ps());
      const __mmask16 pass = _mm512_mask_cmp_ps_mask(_mm512_mask_cmp_ps_mask(valid, x, least, _CMP_GE_OQ), x, nothing, _CMP_GT_OQ);
      if (Rare && !pass) continue;
      // Compressing into a register and storing it whole is far cheaper than a compressing store.
      const __m512i u = _mm512_castps_si512(x);
      const __m512i key = _mm512_xor_si512(u, _mm512_or_si512(_mm512_srai_epi32(u, 31), sign));
      _mm512_storeu_si512(keys + found, _mm512_maskz_compress_epi32(pass, key));
      _mm512_storeu_si512(ids + found, _mm512_maskz_compress_epi32(pass, _mm512_add_epi32(step, _mm512_set1_epi32(int32_t(i)))));
      found += __builtin_popcount(pass);
    }
#else
#if defined(GOSSAMER_AVX2)
    const __m256 least = _mm256_set1_ps(threshold), nothing = _mm256_set1_ps(-kInf);
    for (; i + 8 <= end; i += 8) {
      const __m256 x = _mm256_loadu_ps(scores + i);
      const __m256 pass = _mm256_and_ps(_mm256_cmp_ps(x, least, _CMP_GE_OQ), _mm256_cmp_ps(x, nothing, _CMP_GT_OQ));
      for (uint32_t bits = uint32_t(_mm256_movemask_ps(pass)); bits; bits &= bits - 1, ++found) {
        ids[found] = int32_t(i + __builtin_ctz(bits));
        keys[found] = order_key(scores[ids[found]]);
      }
    }
#endif
    for (; i < end; ++i) {
      ids[found] = int32_t(i);
      keys[found] = order_key(scores[i]);
      found += scores[i] >= threshold && scores[i] > -kInf;
    }
#endif
    return found;
  }

  // Writes the ids of the candidates whose key is above `last`, and of the first `equal` whose key is `last`: k in all.
  void keep([[maybe_unused]] int64_t found, int64_t k, uint32_t last, int64_t equal, int32_t* out) {
    int64_t kept = 0, i = 0;
#if defined(GOSSAMER_AVX512)
    const __m512i limit = _mm512_set1_epi32(int32_t(last));
    for (; i + 16 <= found && kept + 16 <= k; i += 16) {
      const __m512i key = _mm512_loadu_si512(keys + i);
      const __mmask16 tie = _mm512_cmpeq_epu32_mask(key, limit);
      if (__builtin_popcount(tie) > equal) break;  // the ties run out in here
      equal -= __builtin_popcount(tie);
      const __mmask16 pass = _mm512_cmpgt_epu32_mask(key, limit) | tie;
      _mm512_storeu_si512(out + kept, _mm512_maskz_compress_epi32(pass, _mm512_loadu_si512(ids + i)));
      kept += __builtin_popcount(pass);
    }
#endif
    for (; kept < k; ++i) {
      out[kept] = ids[i];
      const bool tie = keys[i] == last;
      kept += int(keys[i] > last) | (int(tie) & int(equal > 0));
      equal -= tie;
    }
  }

  // Writes the ids of the k best of scores[begin .. end) to out[0 .. k), zeros behind the last; returns how many.
  int64_t select(const float* scores, int64_t begin, int64_t end, int64_t k, int32_t* out) {
    const int64_t size = end - begin;
    int64_t found = 0, equal = 0;
    for (int64_t slack = 4;; slack *= 4) {
      float threshold = -kInf;
      if (size > 8 * kSample && k < size / 2 && slack < 64) {
        // A golden-ratio walk: even coverage, and no rhythm that the scores could share.
        int64_t sampled = 0;
        for (uint32_t i = 0, walk = 0; i < kSample; ++i, walk += 2654435769u) {
          const float x = scores[begin + int64_t(uint64_t(walk) * uint64_t(size) >> 32)];
          work[sampled] = order_key(x);
          sampled += x > -kInf;
        }
        const int64_t expected = sampled * k / size + 1;
        int64_t rank = expected;
        for (int64_t root = 1; rank < expected + slack * root && rank < sampled; ++rank) root += root * root < expected;
        if (rank < sampled) threshold = from_order_key(nth_largest(sampled, rank, equal));
      }
      found = k < size / 64 ? collect<true>(scores, begin, end, threshold) : collect<false>(scores, begin, end, threshold);
      if (found >= k || threshold == -kInf) break;
    }
    if (found <= k) {
      std::memcpy(out, ids, size_t(found) * sizeof(int32_t));
      std::memset(out + found, 0, size_t(k - found) * sizeof(int32_t));
      return found;
    }
    std::memcpy(work, keys, size_t(found) * sizeof(uint32_t));
    const uint32_t last = nth_largest(found, k, equal);
    keep(found, k, last, equal, out);
    return k;
  }
};

}  // namespace gossamer::GOSSAMER_ISA
