// Threads, scratch memory, and loops for a number of rows. OpenMP is the one of the process (torch's; see
// ops/_dispatch.py).
#pragma once
#include <atomic>
#include <cstdlib>

#include "simd.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace gossamer::GOSSAMER_ISA {

// Runs body(thread, threads) on a team; without OpenMP, or for one thread, on the caller.
template <class Body>
inline void parallel(int threads, const Body& body) {
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  body(0, 1);
}

// Waits for the whole team; a no-op outside one.
GOSSAMER_INLINE void barrier(int threads) {
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp barrier
  }
#endif
}

// Hands out 0, 1, 2, ... to whoever asks: cores of a shared machine are not equally fast.
class Queue {
 public:
  int64_t next() { return next_.fetch_add(1, std::memory_order_relaxed); }

 private:
  alignas(64) std::atomic<int64_t> next_{0};
};

// Memory that only grows and is reused by later calls, so that a call of steady size allocates nothing. Kept per calling
// thread: calls run without the GIL. A call lays out what it needs with take(), twice: once to measure, once for real.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  template <class Layout>
  void layout(const Layout& plan) {
    base_ = nullptr, used_ = 0;
    plan(*this);
    if (used_ > size_) {
      std::free(data_);
      size_ = (used_ + used_ / 2 + 4095) / 4096 * 4096;
      data_ = static_cast<char*>(std::aligned_alloc(4096, size_));
      if (!data_) std::abort();
    }
    base_ = data_, used_ = 0;
    plan(*this);
  }

  template <class T>
  void take(T*& pointer, int64_t count) {
    pointer = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base_) + used_);
    used_ += (size_t(count) * sizeof(T) + 127) / 64 * 64;  // whole cache lines, and one to spare
  }

 private:
  char *data_ = nullptr, *base_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

// Runs f<M>() for a number of rows M that is known only now.
template <class F>
GOSSAMER_INLINE void for_rows(int64_t rows, const F& f) {
  switch (rows) {
    case 1: f.template operator()<1>(); break;
    case 2: f.template operator()<2>(); break;
    case 3: f.template operator()<3>(); break;
    case 4: f.template operator()<4>(); break;
    case 5: f.template operator()<5>(); break;
    case 6: f.template operator()<6>(); break;
    case 7: f.template operator()<7>(); break;
    default: f.template operator()<8>();
  }
}

}  // namespace gossamer::GOSSAMER_ISA
