// Direct convolution with operands in bf16, as an implicit matrix product, for processors that
// multiply pairs of bf16 and sum them in float32.
//
// 1. Activate, round and pad the image once: [n][height][pitch][channels] in bf16.
// 2. For a block of output pixels and 32 output channels at a time: multiply by tiles of the image
//    and of the weights as they lie in the memory-mapped file, and finish the sums.
//
// A tile has neighbouring pixels, which are a constant number of bytes apart for each tap. Where rows
// of the image are no multiple of a tile, tiles run on over the padding into the next row: its two
// pixels of each row are computed in vain.
//
// Goto and van de Geijn (2008), "Anatomy of high-performance matrix multiplication", for the blocks:
// a panel of weights stays in the L1 cache while it is multiplied by a block of pixels in the L2 cache.
#pragma once

#include "fusion.h"
#include "kernels.h"
#include "scratch.h"
#include "simd.h"

namespace latentforge {
namespace {

// Product of a tile of pixels with one or two blocks of 16 output channels, for a range of groups of
// input channels and all taps: sums[row][kPair] is set, or added to.
struct TileProduct {
  const uint16_t* pixels;       // of the first pixel and group; the next pixel is pixel_stride further
  int64_t pixel_stride;
  const int64_t* taps;          // offset of each tap's pixels
  int64_t tap_count;
  const uint16_t* weights;      // of the first tap and group: [groups][16 pairs][16][2]
  int64_t tap_stride;           // from tap to tap
  int64_t block_stride;         // to the second block
  int64_t blocks, groups;
  float* sums;
  bool add;
};

constexpr int64_t kTileWeights = kGroup * kLanes;  // numbers of a group and a block

inline void store_bf16(uint16_t* p, Vec value) {
  typedef uint16_t Halves __attribute__((vector_size(kWidth * 2), aligned(2), may_alias));
  *reinterpret_cast<Halves*>(p) = __builtin_convertvector(UintVec(value) >> 16, Halves);
}

// Tiles has the rows of a tile, kRows, and multiply(const TileProduct&); an object of it is alive
// while a thread multiplies.
template <typename Tiles>
class DirectConvolution {
 public:
  DirectConvolution(const Conv& conv, const Parallel& parallel)
      : conv_(conv),
        parallel_(parallel),
        groups_(ceil_div(conv.c, kGroup)),
        pixel_((groups_ | 1) * kGroup),  // an odd number of cache lines, to use all sets
        height_((conv.out_h - 1) * conv.stride + conv.kernel),
        pitch_((conv.out_w - 1) * conv.stride + conv.kernel),
        lines_(conv.n * conv.out_h),
        places_(conv.out_w) {
    const int64_t all = conv.out_h * pitch_ - (pitch_ - conv.out_w);
    if (conv.stride == 1 && conv.n * tiles_of(all) <= lines_ * tiles_of(places_))
      lines_ = conv.n, places_ = all, through_ = true;
    for (int64_t y = 0; y < conv.kernel; ++y)
      for (int64_t x = 0; x < conv.kernel; ++x) taps_[y * conv.kernel + x] = (y * pitch_ + x) * pixel_;
  }

  void run() {
    const int64_t beyond = Tiles::kRows * conv_.stride * pixel_;  // a last tile reads further
    Shared memory(size_t(ceil_div(conv_.n * height_ * pitch_ * pixel_ + beyond, 2)));
    image_ = reinterpret_cast<uint16_t*>(memory.data());
    parallel_(conv_.n * height_, [&](int64_t row) { fill_row(row); });
    const int64_t blocks = ceil_div(lines_ * tiles_of(places_), kBlock);
    const int64_t panels = ceil_div(conv_.k, kPair), threads = larger(parallel_.threads, 1);
    const int64_t parts = smaller(panels, ceil_div(threads, blocks));
    parallel_(blocks * parts, [&](int64_t task) {
      const int64_t part = task % parts;
      multiply(task / parts, part * panels / parts, (part + 1) * panels / parts);
    });
  }

 private:
  static constexpr int64_t kBlock = 256 / Tiles::kRows;  // tiles of pixels that share weights
  static constexpr int64_t kDepth = 18;  // groups times taps of weights in the L1 cache: 36 KB

  const Conv& conv_;
  const Parallel& parallel_;
  const int64_t groups_, pixel_, height_, pitch_;
  int64_t lines_, places_;  // runs of pixels that tiles divide: rows of the output, or whole images
  bool through_ = false;    // whole images, with the padding between their rows
  int64_t taps_[9];
  uint16_t* image_ = nullptr;

  static int64_t tiles_of(int64_t places) { return ceil_div(places, Tiles::kRows); }

  // Activates a row of the padded image; channels beyond the last are zero.
  void fill_row(int64_t row) const {
    const int64_t n = row / height_, y = row % height_ - conv_.pad_top;
    uint16_t* out = image_ + row * pitch_ * pixel_;
    for (int64_t column = 0; column < pitch_; ++column, out += pixel_) {
      const int64_t x = column - conv_.pad_left;
      if (y < 0 || y >= conv_.seen_h || x < 0 || x >= conv_.seen_w)
        std::memset(out, 0, size_t(groups_ * kGroup) * sizeof *out);
      else
        fill_pixel(n, y * conv_.h / conv_.seen_h, x * conv_.w / conv_.seen_w, out);
    }
  }

  void fill_pixel(int64_t n, int64_t y, int64_t x, uint16_t* out) const {
    const float* from = conv_.x + ((n * conv_.h + y) * conv_.w + x) * conv_.c;
    const float* scale = conv_.scale ? conv_.scale + n * conv_.c : nullptr;
    const float* shift = conv_.scale ? conv_.shift + n * conv_.c : nullptr;
    for (int64_t c = 0; c < groups_ * kGroup; c += kWidth)
      store_bf16(out + c, c < conv_.c ? activated(conv_, from + c, scale ? scale + c : nullptr,
                                                  shift ? shift + c : nullptr, conv_.c - c)
                                      : Vec{});
  }

  // Multiplies a block of tiles by panels of two blocks of output channels.
  void multiply(int64_t block, int64_t panel, int64_t end) const {
    Tiles tiles;
    const int64_t first = block * kBlock;
    const int64_t count = smaller(kBlock, lines_ * tiles_of(places_) - first);
    float* sums = scratch(kProducts, size_t(kBlock * Tiles::kRows * kPair));
    const int64_t depth = larger<int64_t>(kDepth / (conv_.kernel * conv_.kernel), 1);
    for (; panel < end; ++panel) {
      for (int64_t group = 0; group < groups_; group += depth)
        for (int64_t tile = 0; tile < count; ++tile)
          tiles.multiply(product(first + tile, panel, group, smaller(depth, groups_ - group),
                                 sums + tile * Tiles::kRows * kPair));
      for (int64_t tile = 0; tile < count; ++tile)
        finish(first + tile, panel * kPair, sums + tile * Tiles::kRows * kPair);
    }
  }

  TileProduct product(int64_t tile, int64_t panel, int64_t group, int64_t groups,
                      float* sums) const {
    const int64_t line = tile / tiles_of(places_), place = tile % tiles_of(places_) * Tiles::kRows;
    const int64_t row = through_ ? line * height_
                                 : line / conv_.out_h * height_ + line % conv_.out_h * conv_.stride;
    const int64_t taps = conv_.kernel * conv_.kernel, tap_stride = groups_ * kTileWeights;
    TileProduct product;
    product.pixels = image_ + (row * pitch_ + place * conv_.stride) * pixel_ + group * kGroup;
    product.pixel_stride = conv_.stride * pixel_;
    product.taps = taps_, product.tap_count = taps;
    product.block_stride = taps * tap_stride, product.tap_stride = tap_stride;
    product.weights = static_cast<const uint16_t*>(conv_.weight) +
                      2 * panel * product.block_stride + group * kTileWeights;
    product.blocks = smaller<int64_t>(ceil_div(conv_.k, kLanes) - 2 * panel, 2);
    product.groups = groups, product.sums = sums, product.add = group > 0;
    return product;
  }

  // Finishes the sums of a tile from output channel k on.
  void finish(int64_t tile, int64_t k, const float* sums) const {
    const int64_t line = tile / tiles_of(places_), first = tile % tiles_of(places_) * Tiles::kRows;
    const int64_t end = smaller(first + Tiles::kRows, places_), width = through_ ? pitch_ : places_;
    for (int64_t place = first; place < end; ++place, sums += kPair) {
      const int64_t y = place / width, x = place % width;
      if (x < conv_.out_w) finish_pixel((line * (through_ ? conv_.out_h : 1) + y) * conv_.out_w + x, k, sums);
    }
  }

  void finish_pixel(int64_t pixel, int64_t k, const float* sums) const {
    if (conv_.gated) return write_gated(conv_, pixel, k, sums, kPair);
    const int64_t image = pixel / (conv_.out_h * conv_.out_w);
    for (int64_t j = 0; j < kPair && k + j < conv_.k; j += kWidth)
      write_channels(conv_, pixel, k + j, load(sums + j) + summand(conv_, image, k + j));
  }
};

// Estimates the work in multiply-adds, like work() in conv.h: that of two images, with transforms.
// gain: multiply-adds in the time of one in float32.
inline int64_t direct_work(const Conv& conv, int64_t gain) {
  constexpr int64_t kImages = 2, kTransforms = 16;
  const int64_t pixels = kImages * conv.out_h * conv.out_w, taps = conv.kernel * conv.kernel;
  return pixels * (taps * conv.c * conv.k / gain + kTransforms * (conv.c + conv.k));
}

}  // namespace
}  // namespace latentforge
