// The work of a convolution besides its sums: activation of inputs, and additions to outputs.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace latentforge {
namespace {

// Returns a vector of activated channels of a pixel, of which the first count exist, rounded to bf16
// if the weights are in it; scale and shift are those of the channels, or null.
inline Vec activated(const Conv& conv, const float* x, const float* scale, const float* shift,
                     int64_t count) {
  Vec value = load_some(x, count);
  if (scale) value = value * load_some(scale, count) + load_some(shift, count);
  if (scale && conv.silu) value = silu(value);
  return conv.weights == Weights::kBf16 ? round_to_bf16(value) : value;
}

// Returns what is added to output channels from k on of every pixel of an image.
inline Vec summand(const Conv& conv, int64_t image, int64_t k) {
  const int64_t count = conv.k - k;
  Vec sum = conv.bias ? load_some(conv.bias + k, count) : Vec{};
  if (conv.row) sum += load_some(conv.row + image * conv.row_stride + k, count);
  return sum;
}

// Writes output channels from k on of a pixel, and adds the residual.
inline void write_channels(const Conv& conv, int64_t pixel, int64_t k, Vec value) {
  const int64_t place = pixel * conv.k + k, count = conv.k - k;
  if (conv.residual) value += load_some(conv.residual + place, count);
  store_some(conv.y + place, value, count);
}

// Writes left * gelu(right) of a pixel's products from k on; k and columns are multiples of kPair.
inline void write_gated(const Conv& conv, int64_t pixel, int64_t k, const float* products,
                        int64_t columns) {
  float* y = conv.y + (pixel * conv.k + k) / 2;
  for (int64_t pair = 0; pair < columns; pair += kPair)
    for (int64_t j = pair; j < pair + kLanes; j += kWidth, y += kWidth) {
      Vec left = load(products + j), right = load(products + j + kLanes);
      if (conv.bias) {
        left += load(conv.bias + k + j);
        right += load(conv.bias + k + j + kLanes);
      }
      store(y, left * gelu(right));
    }
}

}  // namespace
}  // namespace latentforge
