#include <immintrin.h>

#include "direct.h"

namespace latentforge {
namespace {

// Tile of 14 pixels and 32 output channels, whose sums fill the registers. The instruction takes
// denormal numbers as zero, and returns none.
struct Avx512Tiles {
  static constexpr int64_t kRows = 14;

  void multiply(const TileProduct& product) const {
    product.blocks == 2 ? multiply<2>(product) : multiply<1>(product);
  }

 private:
  template <int Blocks>
  static void multiply(const TileProduct& p) {
    __m512 sums[kRows][Blocks];
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b)
        sums[r][b] = p.add ? _mm512_loadu_ps(p.sums + r * kPair + b * kLanes) : _mm512_setzero_ps();
    for (int64_t tap = 0; tap < p.tap_count; ++tap) {
      const uint16_t *weights = p.weights + tap * p.tap_stride, *pixels = p.pixels + p.taps[tap];
      const uint16_t* end = pixels + p.groups * kGroup;
      for (; pixels < end; pixels += 2, weights += kPair) {
        __m512bh columns[Blocks];
#pragma GCC unroll 2
        for (int b = 0; b < Blocks; ++b)
          columns[b] = __m512bh(_mm512_loadu_si512(weights + b * p.block_stride));
#pragma GCC unroll 14
        for (int r = 0; r < kRows; ++r) {
          int pair;
          std::memcpy(&pair, pixels + r * p.pixel_stride, sizeof pair);
#pragma GCC unroll 2
          for (int b = 0; b < Blocks; ++b)
            sums[r][b] = _mm512_dpbf16_ps(sums[r][b], __m512bh(_mm512_set1_epi32(pair)), columns[b]);
        }
      }
    }
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b)
        _mm512_storeu_ps(p.sums + r * kPair + b * kLanes, sums[r][b]);
  }
};

int64_t work(const Conv& conv) { return direct_work(conv, 2); }
void convolve(const Conv& conv, const Parallel& parallel) {
  DirectConvolution<Avx512Tiles>(conv, parallel).run();
}

}  // namespace

extern const Bf16Kernels kAvx512Bf16;
const Bf16Kernels kAvx512Bf16 = {work, convolve};

}  // namespace latentforge
