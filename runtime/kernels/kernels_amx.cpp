#include <immintrin.h>

#include "direct.h"

namespace latentforge {
namespace {

struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(Configuration) == 64, "the layout is the processor's");

const Configuration kConfiguration;

// Tiles of AMX: 0 to 3 have the sums of 32 pixels and 32 output channels, 4 and 5 inputs of 16 pixels
// each, 6 and 7 weights of 16 output channels each; all have 16 rows of 64 bytes. The instruction
// takes denormal numbers as zero, and returns none.
//
// A thread configures its tiles for a task and releases them, since the system saves and restores
// configured ones whenever it switches threads.
class AmxTiles {
 public:
  static constexpr int64_t kRows = 32;

  AmxTiles() { _tile_loadconfig(&kConfiguration); }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  void multiply(const TileProduct& product) const {
    product.blocks == 2 ? multiply<2>(product) : multiply<1>(product);
  }

 private:
  static constexpr int64_t kHalf = kRows / 2;

  template <int Blocks>
  static void multiply(const TileProduct& p) {
    load_sums<Blocks>(p);
    for (int64_t tap = 0; tap < p.tap_count; ++tap)
      for (int64_t group = 0; group < p.groups; ++group) {
        const uint16_t* pixels = p.pixels + p.taps[tap] + group * kGroup;
        const uint16_t* weights = p.weights + tap * p.tap_stride + group * kTileWeights;
        const size_t stride = size_t(p.pixel_stride) * sizeof *pixels;
        _tile_loadd(6, weights, 64);
        _tile_loadd(4, pixels, stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, pixels + kHalf * p.pixel_stride, stride);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (Blocks == 2) {
          _tile_loadd(7, weights + p.block_stride, 64);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    store_sums<Blocks>(p.sums);
  }

  static constexpr size_t kStride = kPair * sizeof(float);

  template <int Blocks>
  static void load_sums(const TileProduct& p) {
    if (!p.add) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      return;
    }
    _tile_loadd(0, p.sums, kStride);
    _tile_loadd(2, p.sums + kHalf * kPair, kStride);
    if constexpr (Blocks == 2) {
      _tile_loadd(1, p.sums + kLanes, kStride);
      _tile_loadd(3, p.sums + kHalf * kPair + kLanes, kStride);
    }
  }

  template <int Blocks>
  static void store_sums(float* sums) {
    _tile_stored(0, sums, kStride);
    _tile_stored(2, sums + kHalf * kPair, kStride);
    if constexpr (Blocks == 2) {
      _tile_stored(1, sums + kLanes, kStride);
      _tile_stored(3, sums + kHalf * kPair + kLanes, kStride);
    }
  }
};

int64_t work(const Conv& conv) { return direct_work(conv, 16); }
void convolve(const Conv& conv, const Parallel& parallel) {
  DirectConvolution<AmxTiles>(conv, parallel).run();
}

}  // namespace

extern const Bf16Kernels kAmx;
const Bf16Kernels kAmx = {work, convolve};

}  // namespace latentforge
