// Convolution, in two steps for each block of output tiles:
//
// 1. Read the input tiles, activate, pad and transform them: [chunks][points][tiles][kChunk].
// 2. For a group of output channels: transform the weights from the memory-mapped file, multiply at
//    each point, transform back, and add bias, row and residual.
//
// Stored transformed weights would be up to four times as large as the file's. Transforming them
// for each block costs as much as a few tiles, of which a block has dozens, and the transformed
// weights stay in the cache.
#pragma once

#include "fusion.h"
#include "kernels.h"
#include "product.h"
#include "scratch.h"
#include "winograd.h"

namespace latentforge {
namespace {

constexpr int64_t kSpan = 16;  // neighbouring tiles of a row that are transformed together

// Returns a stride for arrays of this many floats that is no power of 2, to avoid conflicts between
// cache sets.
constexpr int64_t spread(int64_t floats) { return floats + 16; }

// Minimal filtering F(m x m, r x r), given its transforms of one row: see winograd.h.
template <int Tile, int Step, int Window, int Points, int Lines, typename Row>
struct Filtering {
  static constexpr int kTile = Tile, kWindow = Window, kSeen = Window * Window;
  static constexpr int kPoints = Points * Points;
  static constexpr int kLines = Lines;  // rows of points whose weights are transformed together
  static constexpr int kParts = Points / Lines;
  static int64_t taps(const Conv&) { return 1; }
  static int64_t window(const Conv&) { return Window; }
  static int64_t step(const Conv&) { return Step; }
  // Returns the transformed input that a product multiplies.
  static constexpr int64_t source(int64_t point) {
    return Row::source(point / Points) * Window + Row::source(point % Points);
  }

  // Transforms the window of one tile, for one vector of channels, in a strip that has this many
  // columns, to out[point * stride].
  static void input(const float* strip, int64_t columns, int64_t, float* out, int64_t stride,
                    int64_t) {
    Vec window[kSeen], transformed[kSeen];
#pragma GCC unroll 8
    for (int y = 0; y < kWindow; ++y)
#pragma GCC unroll 8
      for (int x = 0; x < kWindow; ++x)
        window[y * kWindow + x] = load(strip + (y * columns + x) * kChunk);
    both_ways<kWindow, kWindow, Row::input>(window, transformed);
#pragma GCC unroll 36
    for (int point = 0; point < kSeen; ++point) store(out + point * stride, transformed[point]);
  }

  // Transforms the taps w(0) to w(8) to the kLines rows of points of a part, at out[point * stride].
  template <typename Taps>
  static void weights(const Taps& w, int64_t part, float* out, int64_t stride) {
    Vec taps[9];
#pragma GCC unroll 9
    for (int tap = 0; tap < 9; ++tap) taps[tap] = w(tap);
#pragma GCC unroll 2
    for (int y = 0; y < kLines; ++y) {
      const float* g = Row::kG[part * kLines + y];
      Vec row[3], transformed[Points];
#pragma GCC unroll 4
      for (int x = 0; x < 3; ++x)
        row[x] = g[0] * taps[x] + g[1] * taps[3 + x] + g[2] * taps[6 + x];
      Row::weights(row, transformed);
#pragma GCC unroll 8
      for (int x = 0; x < Points; ++x) store(out + (y * Points + x) * stride, transformed[x]);
    }
  }

  static void output(const float* products, int64_t stride, Vec* out) {
    Vec values[kPoints];
#pragma GCC unroll 36
    for (int point = 0; point < kPoints; ++point) values[point] = load(products + point * stride);
    both_ways<Points, Tile, Row::output>(values, out);
  }
};

// Winograd convolution: 3 x 3, stride 1.
template <int Tile>
struct Fast : Filtering<Tile, Tile, Tile + 2, Tile + 2, 2, Winograd<Tile>> {
  static constexpr bool kEnlarges = true;
};

// Winograd convolution of an image enlarged by 2, with one pixel of padding at the top and left,
// computed from the image before it is enlarged.
struct Raised : Filtering<4, 2, 4, 5, 1, Doubled> {
  static constexpr bool kEnlarges = false;
};

// Direct convolution, for all other cases: a tile is one pixel, and taps are summed.
struct Plain : Distinct {
  static constexpr int kTile = 1, kSeen = 1, kPoints = 1, kParts = 1;
  static int64_t taps(const Conv& conv) { return conv.kernel * conv.kernel; }
  static int64_t window(const Conv& conv) { return conv.kernel; }
  static int64_t step(const Conv& conv) { return conv.stride; }
  static constexpr bool kEnlarges = true;

  static void input(const float* strip, int64_t columns, int64_t kernel, float* out, int64_t,
                    int64_t tap_stride) {
    for (int64_t y = 0; y < kernel; ++y)
      for (int64_t x = 0; x < kernel; ++x, out += tap_stride)
        store(out, load(strip + (y * columns + x) * kChunk));
  }

  template <typename Taps>
  static void weights(const Taps& w, int64_t tap, float* out, int64_t) {
    store(out, w(tap));
  }

  static void output(const float* products, int64_t, Vec* out) { out[0] = load(products); }
};

// Blocking: tiles per block, output channels per task, input channels per group of weights.
struct Blocking {
  int64_t tiles, columns, depth;
};

template <typename Scheme>
class Convolution {
 public:
  Convolution(const Conv& conv, const Parallel& parallel)
      : conv_(conv),
        parallel_(parallel),
        rows_(ceil_div(conv.out_h, Scheme::kTile)),
        across_(ceil_div(conv.out_w, Scheme::kTile)),
        taps_(Scheme::taps(conv)),
        chunks_(ceil_div(conv.c, kChunk)),
        cut_(blocking()) {}

  void run() {
    const int64_t total = conv_.n * rows_ * across_;
    const int64_t threads = larger<int64_t>(parallel_.threads, 1);
    if (total >= 4 * kRows * threads)
      apart(total, threads);
    else
      together(total);
  }

 private:
  // Block of output tiles, with their transformed inputs.
  struct Block {
    int64_t first, count, tile_stride, chunk_stride;
    float* inputs;

    Block(int64_t first, int64_t count)
        : first(first),
          count(count),
          tile_stride(spread(round_up(count, 2) * kChunk)),
          chunk_stride(tile_stride * Scheme::kSeen),
          inputs(nullptr) {}
  };

  const Conv& conv_;
  const Parallel& parallel_;
  const int64_t rows_, across_, taps_, chunks_;
  const Blocking cut_;

  Blocking blocking() const;

  size_t floats(const Block& block) const { return size_t(block.chunk_stride * chunks_ * taps_); }

  // Threads work on separate blocks, without waiting for each other.
  void apart(int64_t total, int64_t threads) {
    const int64_t blocks = round_up(ceil_div(total, cut_.tiles), threads);
    parallel_(blocks, [&](int64_t task) {
      const int64_t first = task * total / blocks;
      Block block(first, (task + 1) * total / blocks - first);
      block.inputs = scratch(kInputs, floats(block));
      for (int64_t part = 0; part < parts(block); ++part) transform_part(block, part);
      const int64_t wide = round_up(conv_.k, 16);
      for (int64_t k = 0; k < wide; k += cut_.columns)
        multiply_columns(block, k, smaller(cut_.columns, wide - k));
    });
  }

  // With few tiles: all threads work on the same block, and divide its output channels.
  void together(int64_t total) {
    for (int64_t first = 0; first < total; first += cut_.tiles) {
      Block block(first, smaller(cut_.tiles, total - first));
      Shared inputs(floats(block));
      block.inputs = inputs.data();
      parallel_(parts(block), [&](int64_t part) { transform_part(block, part); });
      multiply_weights(block);
    }
  }

  // Returns the number of parts to transform: spans of neighbouring tiles, by chunk of channels.
  int64_t parts(const Block& block) const {
    const int64_t lines = ceil_div(block.first + block.count, across_) - block.first / across_;
    return lines * ceil_div(across_, kSpan) * chunks_;
  }

  void transform_part(const Block& block, int64_t part) const {
    const int64_t spans = ceil_div(across_, kSpan), end = block.first + block.count;
    const int64_t chunk = part % chunks_, place = part / chunks_;
    const int64_t row = block.first / across_ + place / spans, x = place % spans * kSpan;
    const int64_t from = larger(row * across_ + x, block.first);
    const int64_t to = smaller(row * across_ + smaller(x + kSpan, across_), end);
    if (from < to) transform_span(block, from, to, chunk);
  }

  void transform_span(const Block& block, int64_t from, int64_t to, int64_t chunk) const {
    const int64_t window = Scheme::window(conv_), step = Scheme::step(conv_);
    const int64_t columns = (to - from - 1) * step + window;
    const int64_t wide = smaller(kChunk, conv_.c - chunk * kChunk);
    float* out = block.inputs + chunk * block.chunk_stride + (from - block.first) * kChunk;
    if (Scheme::kPoints == 1 && taps_ == 1 && step == 1 && !enlarged())
      return activate_pixels(from, to, chunk * kChunk, wide, out);
    float* strip = scratch(kStrip, size_t(window * ((kSpan - 1) * step + window) * kChunk));
    const int64_t row = from / across_ % rows_, x = from % across_;
    fill_strip(strip, from / (across_ * rows_), row * step - conv_.pad_top,
               x * step - conv_.pad_left, window, columns, chunk * kChunk, wide);
    for (int64_t tile = 0; tile < to - from; ++tile)
      for (int64_t c = 0; c < wide; c += kWidth)
        Scheme::input(strip + tile * step * kChunk + c, columns, conv_.kernel,
                      out + tile * kChunk + c, block.tile_stride, chunks_ * block.chunk_stride);
  }

  // Copies activated pixels from (y, x) on, zero outside the image, to [rows][columns][kChunk].
  void fill_strip(float* strip, int64_t image, int64_t y, int64_t x, int64_t rows, int64_t columns,
                  int64_t c, int64_t wide) const {
    const bool enlarge = Scheme::kEnlarges && enlarged();
    const int64_t height = enlarge ? conv_.seen_h : conv_.h;
    const int64_t width = enlarge ? conv_.seen_w : conv_.w;
    const float* scale = conv_.scale ? conv_.scale + image * conv_.c + c : nullptr;
    const float* shift = conv_.scale ? conv_.shift + image * conv_.c + c : nullptr;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < columns; ++i, strip += kChunk) {
        const bool outside = y + r < 0 || y + r >= height || x + i < 0 || x + i >= width;
        if (outside) {
          std::memset(strip, 0, size_t(kChunk) * sizeof(float));
          continue;
        }
        const int64_t row = enlarge ? (y + r) * conv_.h / height : y + r;
        const int64_t column = enlarge ? (x + i) * conv_.w / width : x + i;
        const int64_t pixel = (image * conv_.h + row) * conv_.w + column;
        activate(conv_.x + pixel * conv_.c + c, scale, shift, strip, wide);
      }
  }

  bool enlarged() const { return conv_.seen_h != conv_.h || conv_.seen_w != conv_.w; }

  // For 1 x 1 convolutions, which need no window.
  void activate_pixels(int64_t from, int64_t to, int64_t c, int64_t wide, float* out) const {
    const int64_t pixels = conv_.h * conv_.w;
    for (int64_t pixel = from; pixel < to; ++pixel, out += kChunk) {
      const int64_t place = pixel / pixels * conv_.c + c;
      const float* scale = conv_.scale ? conv_.scale + place : nullptr;
      activate(conv_.x + pixel * conv_.c + c, scale, conv_.scale ? conv_.shift + place : nullptr,
               out, wide);
    }
  }

  void activate(const float* x, const float* scale, const float* shift, float* out, int64_t wide) const {
    for (int64_t c = 0; c < wide; c += kWidth)
      store(out + c, activated(conv_, x + c, scale ? scale + c : nullptr,
                               shift ? shift + c : nullptr, wide - c));
  }

  // Divides output channels into a number of groups that keeps all threads busy to the end; a left
  // and a right block of a gated product stay in one group.
  void multiply_weights(const Block& block) {
    const int64_t panel = conv_.gated ? kPair : kPanel;
    const int64_t panels = ceil_div(conv_.k, panel), each = cut_.columns / panel;
    const int64_t threads = larger<int64_t>(parallel_.threads, 1);
    const int64_t groups = smaller(panels, round_up(ceil_div(panels, each), threads));
    parallel_(groups, [&](int64_t group) {
      const int64_t begin = group * panels / groups, end = (group + 1) * panels / groups;
      const int64_t k = begin * panel;
      multiply_columns(block, k, smaller(end * panel, round_up(conv_.k, 16)) - k);
    });
  }

  void multiply_columns(const Block& block, int64_t k, int64_t columns) const {
    const int64_t point_stride = spread(round_up(block.count, 2) * columns);
    constexpr int64_t kEach = Scheme::kPoints / Scheme::kParts;
    float* weights = scratch(kWeights, size_t(kEach * spread(cut_.depth * columns)));
    float* products = scratch(kProducts, size_t(Scheme::kPoints * point_stride));
    for (int64_t tap = 0; tap < taps_; ++tap)
      for (int64_t c = 0; c < conv_.c; c += cut_.depth) {
        const int64_t depth = smaller(cut_.depth, conv_.c - c);
        const float* inputs = block.inputs + (tap * chunks_ + c / kChunk) * block.chunk_stride;
        for (int64_t part = 0; part < Scheme::kParts; ++part) {
          transform_weights(k, columns, tap + part, c, depth, weights);
          for (int64_t each = 0; each < kEach; ++each) {
            const int64_t point = part * kEach + each;
            for (int64_t j = 0; j < columns; j += kPanel)
              multiply_panel(inputs + Scheme::source(point) * block.tile_stride, block.chunk_stride,
                             weights + each * spread(depth * columns) + j * depth, depth,
                             products + point * point_stride + j, columns, block.count,
                             smaller(kPanel, columns - j), tap > 0 || c > 0);
          }
        }
      }
    write_outputs(block, products, point_stride, k, columns);
  }

  // Transforms the weights of a tap, or of rows of points, to [points][panels][depth][panel].
  void transform_weights(int64_t k, int64_t columns, int64_t which, int64_t c, int64_t depth,
                         float* out) const {
    const int64_t taps = conv_.kernel * conv_.kernel;
    for (int64_t lane = 0; lane < columns; lane += kLanes) {
      const int64_t panel = lane / kPanel * kPanel, wide = smaller(kPanel, columns - panel);
      const int64_t block = (k + lane) / kLanes, from = (block * conv_.c + c) * taps * kLanes;
      const int64_t stride = spread(depth * columns);
      float* to = out + panel * depth + (lane - panel);
      if (conv_.weights == Weights::kBf16)
        widen_lane(block, which, c, depth, to, wide, stride);
      else if (conv_.weights == Weights::kHalf)
        transform_lane<load_half>(static_cast<const uint16_t*>(conv_.weight) + from, which, depth,
                                  to, wide, stride);
      else
        transform_lane<load>(static_cast<const float*>(conv_.weight) + from, which, depth, to,
                             wide, stride);
    }
  }

  template <auto Load, typename T>
  void transform_lane(const T* from, int64_t which, int64_t depth, float* to, int64_t wide,
                      int64_t stride) const {
    const int64_t step = conv_.kernel * conv_.kernel * kLanes;
    for (int64_t i = 0; i < depth; ++i, from += step, to += wide)
      for (int64_t lane = 0; lane < kLanes; lane += kWidth)
        Scheme::weights([=](int64_t tap) { return Load(from + tap * kLanes + lane); }, which,
                        to + lane, stride);
  }

  // transform_lane() for weights in bf16, whose taps are apart and whose channels are in pairs.
  void widen_lane(int64_t block, int64_t which, int64_t c, int64_t depth, float* to, int64_t wide,
                  int64_t stride) const {
    const int64_t tap_stride = round_up(conv_.c, kGroup) * kLanes;
    const uint16_t* weight = static_cast<const uint16_t*>(conv_.weight) +
                             block * conv_.kernel * conv_.kernel * tap_stride;
    for (int64_t i = c; i < c + depth; ++i, to += wide)
      for (int64_t lane = 0; lane < kLanes; lane += kWidth) {
        const uint16_t* from = weight + i / 2 * 2 * kLanes + 2 * lane;
        Scheme::weights([=](int64_t tap) { return load_bf16(from + tap * tap_stride, i % 2 != 0); },
                        which, to + lane, stride);
      }
  }

  void write_outputs(const Block& block, const float* products, int64_t stride, int64_t k,
                     int64_t columns) const {
    if (conv_.gated) {  // then a tile is one pixel
      for (int64_t tile = 0; tile < block.count; ++tile)
        write_gated(conv_, block.first + tile, k, products + tile * columns, columns);
      return;
    }
    for (int64_t tile = 0; tile < block.count; ++tile) {
      const int64_t place = block.first + tile, image = place / (across_ * rows_);
      const int64_t y = place / across_ % rows_ * Scheme::kTile;
      const int64_t x = place % across_ * Scheme::kTile;
      for (int64_t j = 0; j < columns && k + j < conv_.k; j += kWidth) {
        Vec values[Scheme::kTile * Scheme::kTile];
        Scheme::output(products + tile * columns + j, stride, values);
        write_tile(values, image, y, x, k + j);
      }
    }
  }

  void write_tile(const Vec* values, int64_t image, int64_t y, int64_t x, int64_t k) const {
    const Vec more = summand(conv_, image, k);
    for (int64_t i = 0; i < smaller<int64_t>(Scheme::kTile, conv_.out_h - y); ++i)
      for (int64_t j = 0; j < smaller<int64_t>(Scheme::kTile, conv_.out_w - x); ++j) {
        const int64_t pixel = (image * conv_.out_h + y + i) * conv_.out_w + x + j;
        write_channels(conv_, pixel, k, values[i * Scheme::kTile + j] + more);
      }
  }
};

// Weights and products of a task fit into the L2 cache, inputs of a block into the L3 cache. Direct
// convolution has wide tasks, since writing long pieces of a row is faster than short ones.
template <typename Scheme>
Blocking Convolution<Scheme>::blocking() const {
  constexpr bool kPlain = Scheme::kPoints == 1;
  constexpr int64_t kFloats = 4 << 20, kMaxRows = kPlain ? 32 : 8;
  constexpr int64_t kColumns = kPlain ? 320 : 2 * kPanel, kDepth = kPlain ? 192 : 128;
  static_assert(kColumns % kPair == 0 && kColumns % kPanel == 0, "a task has whole pairs");
  static_assert(kDepth % kChunk == 0, "inputs are in chunks");
  const int64_t fitting = kFloats / (Scheme::kSeen * taps_ * conv_.c) / kRows;
  return {larger<int64_t>(smaller(fitting, kMaxRows), 2) * kRows, kColumns, kDepth};
}

// Estimates the work of a scheme in multiply-adds; transforms count as some of them. It is that of
// two images, whatever their number: an image must not depend on how many others are with it.
template <typename Scheme>
int64_t work(const Conv& conv) {
  constexpr int64_t kImages = 2;
  const int64_t tiles =
      kImages * ceil_div(conv.out_h, Scheme::kTile) * ceil_div(conv.out_w, Scheme::kTile);
  const int64_t sums = Scheme::kPoints * Scheme::taps(conv);
  constexpr int64_t kWeights = 10, kTransforms = 16;
  return sums * (conv.c * conv.k * (tiles + kWeights) + tiles * kTransforms * (conv.c + conv.k));
}

template <typename Scheme>
void run(const Conv& conv, const Parallel& parallel) {
  Convolution<Scheme>(conv, parallel).run();
}

// Way to compute a convolution, and its work.
struct Candidate {
  int64_t work;
  void (*run)(const Conv&, const Parallel&);
};

Candidate best_way(const Conv& conv) {
  Candidate best{work<Plain>(conv), run<Plain>};
  const auto consider = [&](Candidate other) { best = other.work < best.work ? other : best; };
  if (conv.kernel == 3 && conv.stride == 1) {
    consider({work<Fast<2>>(conv), run<Fast<2>>});
    consider({work<Fast<4>>(conv), run<Fast<4>>});
    const bool doubled = conv.seen_h == 2 * conv.h && conv.seen_w == 2 * conv.w;
    if (doubled && conv.pad_top == 1 && conv.pad_left == 1)
      consider({work<Raised>(conv), run<Raised>});
  }
  return best;
}

int64_t least_work(const Conv& conv) { return best_way(conv).work; }

void convolve(const Conv& conv, const Parallel& parallel) { best_way(conv).run(conv, parallel); }

}  // namespace
}  // namespace latentforge
