// What layers apply to their outputs.
#pragma once
#include "simd.h"

namespace gossamer::GOSSAMER_ISA {

GOSSAMER_INLINE vf sigmoid(vf x) {
  const vf z = -x, low = z < 87.0f ? z : splat(87.0f);
  return 1.0f / (1.0f + vexp(low));
}

// erf to 1.2e-7 (Abramowitz and Stegun 7.1.26 has 1.5e-7 and this is its form).
GOSSAMER_INLINE vf verf(vf x) {
  const vf size = x < 0.0f ? -x : x;
  const vf t = 1.0f / (1.0f + 0.3275911f * size);
  vf p = splat(1.061405429f);
  p = fma(p, t, splat(-1.453152027f));
  p = fma(p, t, splat(1.421413741f));
  p = fma(p, t, splat(-0.284496736f));
  p = fma(p, t, splat(0.254829592f));
  const vf square = size * size, low = square < 87.0f ? square : splat(87.0f);
  const vf value = 1.0f - p * t * vexp(-low);
  return x < 0.0f ? -value : value;
}

GOSSAMER_INLINE vf activate(Activation kind, vf x) {
  switch (kind) {
    case kSilu: return x * sigmoid(x);
    case kRelu: return x < 0.0f ? vf{} : x;  // NaN stays
    case kGelu: return 0.5f * x * (1.0f + verf(x * 0.70710678f));
    default: return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
  }
}

}  // namespace gossamer::GOSSAMER_ISA
