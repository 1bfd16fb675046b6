// Minimal filtering F(m x m, 3 x 3): m x m outputs from (m + 2)^2 products per channel.
//
// Lavin and Gray (2015), arXiv 1509.09308, sections 4.1 and 4.3, with these matrices:
// output = A^T [(G w G^T) * (B^T d B)] A. Images that are enlarged first have a separate scheme.
#pragma once

#include "simd.h"

namespace latentforge {
namespace {

// Scheme in which every product has a different input.
struct Distinct {
  static constexpr int64_t source(int64_t point) { return point; }
};

template <int Tile>
struct Winograd;

template <>
struct Winograd<2> : Distinct {
  static inline void input(const Vec* d, Vec* out) {
    out[0] = d[0] - d[2];
    out[1] = d[1] + d[2];
    out[2] = d[2] - d[1];
    out[3] = d[1] - d[3];
  }
  static constexpr float kG[4][3] = {{1, 0, 0}, {0.5f, 0.5f, 0.5f}, {0.5f, -0.5f, 0.5f}, {0, 0, 1}};
  static inline void weights(const Vec* w, Vec* out) {
    const Vec even = 0.5f * (w[0] + w[2]), odd = 0.5f * w[1];
    out[0] = w[0];
    out[1] = even + odd;
    out[2] = even - odd;
    out[3] = w[2];
  }
  static inline void output(const Vec* m, Vec* out) {
    out[0] = m[0] + m[1] + m[2];
    out[1] = m[1] - m[2] - m[3];
  }
};

template <>
struct Winograd<4> : Distinct {
  static inline void input(const Vec* d, Vec* out) {
    const Vec a = d[4] - 4.0f * d[2], b = d[3] - 4.0f * d[1];
    const Vec c = d[4] - d[2], e = 2.0f * (d[3] - d[1]);
    out[0] = 4.0f * d[0] - 5.0f * d[2] + d[4];
    out[1] = a + b;
    out[2] = a - b;
    out[3] = c + e;
    out[4] = c - e;
    out[5] = 4.0f * d[1] - 5.0f * d[3] + d[5];
  }
  static constexpr float kG[6][3] = {{1.0f / 4, 0, 0},
                                     {-1.0f / 6, -1.0f / 6, -1.0f / 6},
                                     {-1.0f / 6, 1.0f / 6, -1.0f / 6},
                                     {1.0f / 24, 1.0f / 12, 1.0f / 6},
                                     {1.0f / 24, -1.0f / 12, 1.0f / 6},
                                     {0, 0, 1}};
  static inline void weights(const Vec* w, Vec* out) {
    const Vec even = (-1.0f / 6) * (w[0] + w[2]), odd = (-1.0f / 6) * w[1];
    const Vec wide = (1.0f / 24) * w[0] + (1.0f / 6) * w[2], tilt = (1.0f / 12) * w[1];
    out[0] = 0.25f * w[0];
    out[1] = even + odd;
    out[2] = even - odd;
    out[3] = wide + tilt;
    out[4] = wide - tilt;
    out[5] = w[2];
  }
  static inline void output(const Vec* m, Vec* out) {
    const Vec a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], d = m[3] - m[4];
    out[0] = m[0] + a + c;
    out[1] = b + 2.0f * d;
    out[2] = a + 4.0f * c;
    out[3] = b + 8.0f * d + m[5];
  }
};

// Row of 4 outputs from 4 pixels a, b, c, d of an enlarged image: a window of a b b c c d.
//
// Even outputs are F(2, 2) of w0 and w1 + w2, odd ones of w0 + w1 and w2, and each takes 3 products.
// With the points 0, 1, -1 and infinity they share the product at 1. This leaves 5 products of 4
// different inputs, which are those of F(2 x 2, 3 x 3) for the image before it is enlarged.
struct Doubled {
  static inline void input(const Vec* d, Vec* out) { Winograd<2>::input(d, out); }
  static constexpr int64_t source(int64_t point) { return point < 3 ? point : point - 1; }
  static constexpr float kG[5][3] = {
      {1, 0, 0}, {0.5f, 0.5f, 0.5f}, {-0.5f, 0.5f, 0.5f}, {0.5f, 0.5f, -0.5f}, {0, 0, 1}};
  static inline void weights(const Vec* w, Vec* out) {
    const Vec half_sum = 0.5f * (w[0] + w[1] + w[2]);
    out[0] = w[0];
    out[1] = half_sum;
    out[2] = half_sum - w[0];
    out[3] = half_sum - w[2];
    out[4] = w[2];
  }
  static inline void output(const Vec* m, Vec* out) {
    out[0] = m[0] + m[1] - m[2];
    out[1] = m[1] - m[3];
    out[2] = m[1] + m[2];
    out[3] = m[1] + m[3] - m[4];
  }
};

// Applies a transform to columns, then rows: Out x Out values from In x In.
template <int In, int Out, void (*Transform)(const Vec*, Vec*)>
inline void both_ways(const Vec* values, Vec* out) {
  Vec half[Out * In];
#pragma GCC unroll 8
  for (int x = 0; x < In; ++x) {
    Vec column[In], transformed[Out];
#pragma GCC unroll 8
    for (int y = 0; y < In; ++y) column[y] = values[y * In + x];
    Transform(column, transformed);
#pragma GCC unroll 8
    for (int y = 0; y < Out; ++y) half[y * In + x] = transformed[y];
  }
#pragma GCC unroll 8
  for (int y = 0; y < Out; ++y) Transform(half + y * In, out + y * Out);
}

}  // namespace
}  // namespace latentforge
