// What the kernels are asked to do. Every instruction set implements the same table.
//
// Activations are float32 with channels last. Weights are packed as [blocks, c, taps, 16]: output
// channel k is lane k % 16 of block k / 16, zero where there is none.
#pragma once

#include <cstddef>
#include <cstdint>

namespace latentforge {

constexpr int64_t kLanes = 16;  // output channels of one block of packed weights
constexpr int64_t kPair = 2 * kLanes;  // and of left and right of a gated product

// Runs body(data, i) for every i below count, on as many threads as the host has.
struct Parallel {
  using Body = void (*)(void* data, size_t index);
  void (*run)(void* host, Body body, size_t count, void* data);
  void* host;
  int threads;

  template <typename F>
  void operator()(int64_t count, F&& body) const {
    auto call = [](void* data, size_t index) { (*static_cast<F*>(data))(int64_t(index)); };
    run(host, call, size_t(count), &body);
  }
};

struct Conv {
  int64_t n, h, w, c;        // input
  int64_t out_h, out_w, k;   // output
  int64_t kernel, stride, pad_top, pad_left, upsample;
  bool silu;                 // with scale and shift: x * scale + shift, then this, before padding
  bool half;                 // weights are float16
  bool gated;                // blocks are left and right in turn, and y is left * gelu(right), of
                             // k / 2 channels; of products alone, without row and residual
  const float* x;
  const void* weight;
  const float* bias;         // [k], or none, as all of the following
  const float* scale;        // [n, c]
  const float* shift;        // [n, c]
  const float* row;          // [n or 1, k], added to every pixel of an image
  int64_t row_stride;        // between images: k, or 0 for one row for all
  const float* residual;     // like y
  float* y;
};

struct GroupNorm {
  int64_t n, pixels, c, groups;
  float epsilon;
  bool silu;
  const float* x;
  const float* gamma;        // [c]
  const float* beta;         // [c]
  float* scale;              // [n, c]: the normalization is x * scale + shift
  float* shift;              // [n, c]
  float* y;                  // like x; of group_norm alone
};

// Softmax(query key^T * scale) value, for each head; heads lie next to each other in a row.
struct Attention {
  int64_t n, queries, keys, heads, size;  // size of a head
  float scale;
  const float* query;        // [n, queries, heads * size]
  const float* key;          // [n, keys, heads * size]
  const float* value;        // like key
  float* y;                  // like query
};

struct Kernels {
  const char* name;
  void (*conv)(const Conv&, const Parallel&);
  void (*attention)(const Attention&, const Parallel&);
  void (*group_scale)(const GroupNorm&, const Parallel&);
  void (*group_norm)(const GroupNorm&, const Parallel&);
  double (*peak)();     // multiplications and additions a second of one thread's registers
  double (*product)();  // and of the product inside conv
};

extern const Kernels kPortable;
#ifndef LATENTFORGE_PORTABLE
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// The fastest table whose instructions this processor has; LATENTFORGE_KERNELS names another.
const Kernels& kernels();

}  // namespace latentforge
