// The product of a few rows of activations with a panel of weights.
#pragma once

#include "simd.h"

namespace latentforge {
namespace {

constexpr int64_t kChunk = 64;  // channels of activations that lie together
constexpr int64_t kPanel = kBlocks * 16;  // output channels of a panel

// m[r][j] (+)= sum over c of a[r][c] * b[c][j], for so many rows and vectors of columns.
//
// a: [chunks][a_chunk], each chunk [rows][kChunk]; b: [depth][columns * kWidth], columns of b and
// m next to each other; m: rows kept m_stride apart.
template <int Rows, int Columns>
void multiply(const float* a, int64_t a_chunk, const float* b, int64_t depth, float* m,
              int64_t m_stride, bool add) {
  Vec sum[Rows][Columns];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < Columns; ++j)
      sum[r][j] = add ? load(m + r * m_stride + j * kWidth) : Vec{};
  for (; depth > 0; depth -= kChunk, a += a_chunk) {
    const float* end = a + smaller(depth, kChunk);
    for (const float* p = a; p < end; ++p, b += Columns * kWidth) {
      Vec column[Columns];
#pragma GCC unroll 4
      for (int j = 0; j < Columns; ++j) column[j] = load(b + j * kWidth);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const float value = p[r * kChunk];
#pragma GCC unroll 4
        for (int j = 0; j < Columns; ++j) sum[r][j] += value * column[j];
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < Columns; ++j) store(m + r * m_stride + j * kWidth, sum[r][j]);
}

using Multiply = void (*)(const float*, int64_t, const float*, int64_t, float*, int64_t, bool);

template <int Columns, int... Rows>
struct Table {
  static constexpr Multiply entries[] = {multiply<Rows, Columns>...};
};

template <int Columns>
Multiply multiply_rows(int64_t rows) {
#if defined(__AVX512F__)
  using T = Table<Columns, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>;
#elif defined(__AVX2__)
  using T = Table<Columns, 1, 2, 3, 4, 5, 6>;
#else
  using T = Table<Columns, 1, 2, 3, 4>;
#endif
  return T::entries[rows - 1];
}

// The same for any number of rows, cut into parts as equal as can be.
//
// columns: of this panel, 16 or kPanel.
inline void multiply_panel(const float* a, int64_t a_chunk, const float* b, int64_t depth, float* m,
                           int64_t m_stride, int64_t rows, int64_t columns, bool add) {
  const int64_t parts = ceil_div(rows, kRows);
  for (int64_t part = 0, done = 0; part < parts; ++part) {
    const int64_t now = ceil_div(rows - done, parts - part);
    const Multiply run = columns == kPanel ? multiply_rows<kPanel / kWidth>(now)
                                           : multiply_rows<16 / kWidth>(now);
    run(a + done * kChunk, a_chunk, b, depth, m + done * m_stride, m_stride, add);
    done += now;
  }
}

}  // namespace
}  // namespace latentforge
