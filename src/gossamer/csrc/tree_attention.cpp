// What the nodes of a tree of candidates see of each other, merged into what each of them saw of the cached rows. The nodes
// are few and their rows were just written, so nothing here is bound by memory; one thread takes a head.
#include "parallel.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

constexpr int64_t kMaxNodes = 512;  // checked in Python

template <class T>
void merge_head(const TreeArgs& a, int64_t b, int64_t h) {
  const int64_t shared = h / (a.heads / a.kv_heads);
  const T* key = static_cast<const T*>(a.key) + b * a.k_batch + shared * a.k_head;
  const T* value = static_cast<const T*>(a.value) + b * a.v_batch + shared * a.v_head;
  float weights[kMaxNodes];
  for (int64_t t = 0; t < a.nodes; ++t) {
    const int64_t line = (b * a.heads + h) * a.nodes + t;
    const T* query = static_cast<const T*>(a.query) + b * a.q_batch + h * a.q_head + t * a.q_row;
    T* out = static_cast<T*>(a.out) + line * a.dim;
    const uint8_t* sees = a.mask + t * a.nodes;
    float peak = a.lse[line];
    for (int64_t j = 0; j <= t; ++j) {
      if (!sees[j]) continue;
      vf sum = {};
      float dot = 0.0f;
      int64_t c = 0;
      for (; c + kLanes <= a.dim; c += kLanes) sum = fma(load(query + c), load(key + j * a.k_row + c), sum);
      for (; c < a.dim; ++c) dot += to_float(query[c]) * to_float(key[j * a.k_row + c]);
      weights[j] = (dot + hsum(sum)) * a.scale;
      peak = weights[j] > peak ? weights[j] : peak;
    }
    const float before = vexp(splat(a.lse[line] - peak))[0];
    float total = before;
    for (int64_t j = 0; j <= t; ++j)
      if (sees[j]) total += weights[j] = vexp(splat(weights[j] - peak))[0];
    for (int64_t c = 0; c < a.dim; c += kLanes) {
      float part[kLanes];
      const int64_t width = imin(kLanes, a.dim - c);
      for (int64_t i = 0; i < width; ++i) part[i] = to_float(out[c + i]) * before;
      for (int64_t j = 0; j <= t; ++j)
        if (sees[j])
          for (int64_t i = 0; i < width; ++i) part[i] += weights[j] * to_float(value[j * a.v_row + c + i]);
      for (int64_t i = 0; i < width; ++i) from_float(part[i] / total, out + c + i);
    }
  }
}

template <class T>
void merge_all(const TreeArgs& a) {
  Queue queue;
  parallel(a.threads, [&](int, int) {
    for (int64_t i; (i = queue.next()) < a.batch * a.heads;) merge_head<T>(a, i / a.heads, i % a.heads);
  });
}

}  // namespace

Status tree_attention(const TreeArgs& args) {
  if (args.dtype == kBFloat16)
    merge_all<bf16>(args);
  else
    merge_all<float>(args);
  return kOk;
}

}  // namespace gossamer::GOSSAMER_ISA
