// Group normalization with channels last, as one scale and one shift per channel and image.
//
// Wu and He (2018), arXiv 1803.08494, equations 1 to 6.
#pragma once

#include "kernels.h"
#include "scratch.h"
#include "simd.h"

namespace latentforge {
namespace {

constexpr int64_t kPart = 1024;  // pixels that one task sums
constexpr int64_t kRun = 16;     // pixels summed in float32, few enough to lose no precision that matters

// Sums the channels of some pixels, and their squares, into sums[2 * c] in double precision.
inline void sum_pixels(const float* x, int64_t pixels, int64_t channels, double* sums) {
  std::memset(sums, 0, size_t(2 * channels) * sizeof(double));
  for (int64_t first = 0; first < pixels; first += kRun) {
    const int64_t count = smaller(kRun, pixels - first);
    for (int64_t c = 0; c < channels; c += kWidth) {
      const int64_t wide = smaller<int64_t>(kWidth, channels - c);
      Vec sum{}, squares{};
      for (int64_t i = 0; i < count; ++i) {
        const Vec value = load_some(x + (first + i) * channels + c, wide);
        sum += value;
        squares += value * value;
      }
      for (int64_t lane = 0; lane < wide; ++lane) {
        sums[c + lane] += double(sum[lane]);
        sums[channels + c + lane] += double(squares[lane]);
      }
    }
  }
}

// Computes scale and shift of one image from the sums of its parts.
inline void set_scale_shift(const GroupNorm& norm, int64_t image, const double* sums, int64_t parts) {
  const int64_t each = norm.c / norm.groups;
  for (int64_t group = 0; group < norm.groups; ++group) {
    double sum = 0, squares = 0;
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t c = group * each; c < (group + 1) * each; ++c) {
        sum += sums[part * 2 * norm.c + c];
        squares += sums[part * 2 * norm.c + norm.c + c];
      }
    const double count = double(each * norm.pixels), mean = sum / count;
    const double variance = larger(squares / count - mean * mean, 0.0);
    const double inverse = 1.0 / __builtin_sqrt(variance + double(norm.epsilon));
    for (int64_t c = group * each; c < (group + 1) * each; ++c) {
      const double scale = norm.gamma[c] * inverse;
      norm.scale[image * norm.c + c] = float(scale);
      norm.shift[image * norm.c + c] = float(norm.beta[c] - mean * scale);
    }
  }
}

void group_scale(const GroupNorm& norm, const Parallel& parallel) {
  const int64_t parts = ceil_div(norm.pixels, kPart);
  Shared memory(size_t(norm.n * parts * 4 * norm.c));
  double* sums = reinterpret_cast<double*>(memory.data());
  parallel(norm.n * parts, [&](int64_t task) {
    const int64_t image = task / parts, first = task % parts * kPart;
    const float* x = norm.x + (image * norm.pixels + first) * norm.c;
    sum_pixels(x, smaller(kPart, norm.pixels - first), norm.c, sums + task * 2 * norm.c);
  });
  for (int64_t image = 0; image < norm.n; ++image)
    set_scale_shift(norm, image, sums + image * parts * 2 * norm.c, parts);
}

void group_norm(const GroupNorm& norm, const Parallel& parallel) {
  group_scale(norm, parallel);
  const int64_t parts = ceil_div(norm.pixels, kPart / 8);
  parallel(norm.n * parts, [&](int64_t task) {
    const int64_t image = task / parts, first = task % parts * (kPart / 8);
    const int64_t count = smaller(kPart / 8, norm.pixels - first);
    const float *scale = norm.scale + image * norm.c, *shift = norm.shift + image * norm.c;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t place = (image * norm.pixels + first + i) * norm.c;
      for (int64_t c = 0; c < norm.c; c += kWidth) {
        const int64_t wide = norm.c - c;
        const Vec value =
            load_some(norm.x + place + c, wide) * load_some(scale + c, wide) + load_some(shift + c, wide);
        store_some(norm.y + place + c, norm.silu ? silu(value) : value, wide);
      }
    }
  });
}

}  // namespace
}  // namespace latentforge
