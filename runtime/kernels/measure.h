// Measures the speed of the matrix product in product.h, and of multiply-adds on registers alone.
#pragma once

#include <ctime>

#include "kernels.h"
#include "product.h"
#include "scratch.h"

namespace latentforge {
namespace {

inline double now() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return double(time.tv_sec) + double(time.tv_nsec) * 1e-9;
}

// Returns operations per second of one thread's CPU time, in the best of 50 short runs.
template <typename Work>
double rate(double operations, Work work) {
  double best = 0;
  for (int run = 0; run < 50; ++run) {
    const double start = now();
    work();
    best = larger(best, operations / (now() - start));
  }
  return best;
}

// Multiply-adds per second without memory access.
double peak() {
  constexpr int kSums = 12;
  constexpr int64_t kTimes = 200000;
  Vec sums[kSums] = {};
  Vec factor = all(1.0f), summand = all(1.0f);
  const double measured = rate(double(kTimes) * kSums * kWidth, [&] {
    for (int64_t time = 0; time < kTimes; ++time) {
      __asm__ volatile("" : "+g"(time));
#pragma GCC unroll 12
      for (int i = 0; i < kSums; ++i) sums[i] = sums[i] * factor + summand;
    }
  });
  Vec total{};
  for (const Vec& sum : sums) total += sum;
  return total[0] < 0 ? 0 : measured;
}

// Multiply-adds per second of a matrix product of the size that convolutions repeat.
double product() {
  constexpr int64_t kTiles = 8 * kRows, kDepth = 3 * kChunk;
  Shared memory(size_t(kTiles * kDepth + kDepth * kPanel + kTiles * kPanel));
  float *a = memory.data(), *b = a + kTiles * kDepth, *m = b + kDepth * kPanel;
  std::memset(a, 0, size_t(kTiles * kDepth + kDepth * kPanel) * sizeof(float));
  return rate(double(kTiles * kDepth * kPanel) * 50, [&] {
    for (int time = 0; time < 50; ++time)
      multiply_panel(a, kTiles * kChunk, b, kDepth, m, kPanel, kTiles, kPanel, false);
  });
}

}  // namespace
}  // namespace latentforge
