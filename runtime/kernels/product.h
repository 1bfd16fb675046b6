// Matrix product of a few rows of activations with a panel of weights.
#pragma once

#include <utility>

#include "simd.h"

namespace latentforge {
namespace {

constexpr int64_t kChunk = 64;  // adjacent channels of activations
constexpr int64_t kPanel = kBlocks * 16;  // output channels of a panel

// m[r][j] = (add ? m[r][j] : 0) + sum over c of a[r][c] * b[c][j], for a fixed number of rows and of
// vectors of columns.
//
// a: [chunks][a_chunk], each chunk [rows][kChunk]; b: [depth][columns * kWidth]; m: rows
// m_stride apart.
template <int Rows, int Columns>
void multiply(const float* a, int64_t a_chunk, const float* b, int64_t depth, float* m,
              int64_t m_stride, bool add) {
  Vec sum[Rows][Columns];
#pragma GCC unroll 28
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
#pragma GCC unroll 28
      for (int r = 0; r < Rows; ++r) {
        const float value = p[r * kChunk];
#pragma GCC unroll 4
        for (int j = 0; j < Columns; ++j) sum[r][j] += value * column[j];
      }
    }
  }
#pragma GCC unroll 28
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < Columns; ++j) store(m + r * m_stride + j * kWidth, sum[r][j]);
}

using Multiply = void (*)(const float*, int64_t, const float*, int64_t, float*, int64_t, bool);

template <int Columns, typename Rows>
struct Table;

template <int Columns, int... Rows>
struct Table<Columns, std::integer_sequence<int, Rows...>> {
  static constexpr Multiply entries[] = {multiply<Rows + 1, Columns>...};
};

// Rows of the tile that fills the registers, for this many vectors of columns.
template <int Columns>
constexpr int kMaxTileRows = kRows * int(kPanel) / kWidth / Columns;

// multiply() for any number of rows, in tiles of nearly equal height.
template <int Columns>
void multiply_rows(const float* a, int64_t a_chunk, const float* b, int64_t depth, float* m,
                   int64_t m_stride, int64_t rows, bool add) {
  using T = Table<Columns, std::make_integer_sequence<int, kMaxTileRows<Columns>>>;
  const int64_t parts = ceil_div(rows, kMaxTileRows<Columns>);
  for (int64_t part = 0, done = 0; part < parts; ++part) {
    const int64_t now = ceil_div(rows - done, parts - part);
    T::entries[now - 1](a + done * kChunk, a_chunk, b, depth, m + done * m_stride, m_stride, add);
    done += now;
  }
}

// multiply() for any number of rows; columns is kPanel, or one to three vectors.
inline void multiply_panel(const float* a, int64_t a_chunk, const float* b, int64_t depth, float* m,
                           int64_t m_stride, int64_t rows, int64_t columns, bool add) {
  const auto run = columns == kPanel       ? multiply_rows<kPanel / kWidth>
                   : columns == kWidth     ? multiply_rows<1>
                   : columns == 2 * kWidth ? multiply_rows<2>
                                           : multiply_rows<3>;
  run(a, a_chunk, b, depth, m, m_stride, rows, add);
}

}  // namespace
}  // namespace latentforge
