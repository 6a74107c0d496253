// Filling the label cache and scoring it (layout and definitions: ops/labels.py).
#include "score.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

thread_local Scratch scratch;

// Writes one token's labels. `codes` is its tile, `lane` its place there.
template <class K, class L>
void append_token(const LabelCache& labels, const K* key, const int32_t* channels, L* codes, int64_t lane, float* step, float* zero) {
  const int64_t r = labels.r;
  if (labels.bits == 16) {
    for (int64_t c = 0; c < r; ++c)
      if constexpr (sizeof(K) == sizeof(L)) std::memcpy(codes + c * kTokens + lane, key + channels[c], sizeof(L));
    return;
  }
  const float levels = float((1 << labels.bits) - 1);
  float low = to_float(key[channels[0]]), high = low;
  for (int64_t c = 1; c < r; ++c) {
    const float x = to_float(key[channels[c]]);
    low = x < low ? x : low, high = x > high ? x : high;
  }
  const float span = high - low == 0.0f ? 1.0f : high - low, inverse = levels / span, by = span / levels;
  const auto quantise = [&](int64_t c) {
    const float code = __builtin_nearbyintf((to_float(key[channels[c]]) - low) * inverse);
    return code > 0.0f ? (code < levels ? code : levels) : 0.0f;  // a NaN becomes 0
  };
  if constexpr (sizeof(L) == 1) {
    const int64_t size = labels.kind, sub = 8 / size;
    *step = by, *zero = low;
    for (int64_t w = 0; w < labels.words; ++w)
      for (int64_t j = 0; j < 4; ++j) {
        uint32_t byte = 0;
        for (int64_t n = 0; n < sub; ++n) {
          const int64_t c = (w * sub + n) * 4 + j;
          if (c < r) byte |= uint32_t(quantise(c)) << (n * size);
        }
        codes[(w * kTokens + lane) * 4 + j] = L(byte);
      }
  } else {
    for (int64_t c = 0; c < r; ++c) from_float(quantise(c) * by + low, codes + c * kTokens + lane);
  }
}

template <class K, class L>
void append(const AppendArgs& a) {
  const LabelCache& labels = a.labels;
  const int64_t tile_size = (sizeof(L) == 1 ? labels.words * 4 : labels.r) * kTokens;
  const int64_t first = a.start / kTokens, tiles = a.tokens ? (a.start + a.tokens - 1) / kTokens + 1 - first : 0;
  const int64_t lines = a.batch * labels.heads, share = labels.heads / a.kv_heads;
  Queue queue;
  parallel(tiles * lines < 64 ? 1 : a.threads, [&](int, int) {
    for (int64_t i; (i = queue.next()) < tiles * lines;) {
      const int64_t line = i / tiles, tile = first + i % tiles, h = line % labels.heads;
      const K* key = static_cast<const K*>(a.key) + line / labels.heads * a.k_batch + h / share * a.k_head;
      L* codes = static_cast<L*>(labels.codes) + (line * labels.tiles + tile) * tile_size;
      for (int64_t t = imax(a.start, tile * kTokens); t < imin(a.start + a.tokens, (tile + 1) * kTokens); ++t) {
        const int64_t at = line * labels.tiles * kTokens + t;
        append_token(labels, key + (t - a.start) * a.k_row, a.channels + h * labels.r, codes, t % kTokens,
                     labels.step + at, labels.zero + at);
      }
    }
  });
}

template <class K>
void append(const AppendArgs& a) {
  if (a.labels.kind <= 8) return append<K, uint8_t>(a);
  if (a.labels.kind == 16) return append<K, float>(a);
  append<K, bf16>(a);
}

}  // namespace

Status append_labels(const AppendArgs& a) {
  for (int64_t i = 0; i < a.labels.heads * a.labels.r; ++i)
    if (a.channels[i] < 0 || a.channels[i] >= a.dim) return kBadChannel;
  a.dtype == kBFloat16 ? append<bf16>(a) : append<float>(a);
  return kOk;
}

Status label_scores(const ScoreArgs& a) {
  if (!a.ranges.valid(a.batch)) return kBadRange;
  Scorer scorer(a);
  scratch.layout([&](Scratch& s) { scorer.layout(s); });
  if (const Status status = scorer.plan(); status != kOk) return status;
  parallel(a.threads, [&](int, int) { scorer.run(); });
  return kOk;
}

}  // namespace gossamer::GOSSAMER_ISA
