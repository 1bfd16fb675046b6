// Interface of the kernels: their arguments, and a table that every instruction set implements.
//
// Activations are float32 with channels last. Weights are packed as [blocks, c, taps, 16]: output
// channel k is lane k % 16 of block k / 16; lanes beyond the last channel are zero. In bf16 they are
// packed as [blocks, taps, pairs, 16, 2]: input channel c is number c % 2 of pair c / 2, and there are
// pairs for whole groups of 32 channels, so that 16 pairs are a tile of AMX.
//
// With weights in bf16, inputs are rounded to bf16, to the nearest and to even, once they are
// activated. Products are exact and sums are in float32, by whatever instructions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace latentforge {

constexpr int64_t kLanes = 16;  // output channels of a block of packed weights
constexpr int64_t kPair = 2 * kLanes;  // channels of a left and a right block of a gated product
constexpr int64_t kGroup = 32;  // input channels that bf16 weights are padded to

enum class Weights { kFloat, kHalf, kBf16 };

// Runs body(data, i) for every i below count on the threads of ONNX Runtime's session.
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
  int64_t seen_h, seen_w;    // the input enlarged by nearest neighbours, before padding
  int64_t kernel, stride, pad_top, pad_left;
  bool silu;                 // with scale and shift: silu(x * scale + shift), before padding
  Weights weights;           // type and layout of weight
  bool gated;                // blocks alternate left, right; y = left * gelu(right) has k / 2
                             // channels. For 1 x 1 products only, without row and residual.
  const float* x;
  const void* weight;
  const float* bias;         // [k], or null; likewise all of the following
  const float* scale;        // [n, c]
  const float* shift;        // [n, c]
  const float* row;          // [n or 1, k], added to every pixel of an image
  int64_t row_stride;        // between images: k, or 0 if all images share a row
  const float* residual;     // same shape as y
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
  float* y;                  // same shape as x; written by group_norm only
};

// softmax(query key^T * scale) value for each head; a token's heads are adjacent in memory.
struct Attention {
  int64_t n, queries, keys, heads, size;  // size: channels of a head
  float scale;
  const float* query;        // [n, queries, heads * size]
  const float* key;          // [n, keys, heads * size]
  const float* value;        // same shape as key
  float* y;                  // same shape as query
};

// Convolution by instructions that multiply bf16.
struct Bf16Kernels {
  int64_t (*work)(const Conv&);  // in multiply-adds of float32
  void (*conv)(const Conv&, const Parallel&);
};

struct Kernels {
  const char* name;
  int64_t (*work)(const Conv&);  // in multiply-adds
  void (*conv)(const Conv&, const Parallel&);
  void (*attention)(const Attention&, const Parallel&);
  void (*group_scale)(const GroupNorm&, const Parallel&);
  void (*group_norm)(const GroupNorm&, const Parallel&);
  double (*peak)();     // multiply-adds per second of one thread on registers alone
  double (*product)();  // multiply-adds per second of the matrix product inside conv
  const Bf16Kernels* bf16 = nullptr;  // for weights in bf16, where it is less work than conv
};

// Tables of the instruction sets; compiler.py says which are linked.
extern const Kernels kPortable, kAvx2, kAvx512;
extern const Bf16Kernels kAvx512Bf16, kAmx;

// Returns the fastest table that this processor supports, or the one that LATENTFORGE_KERNELS names;
// throws std::invalid_argument if it names none of them.
const Kernels& kernels();

// Return the names of the tables of this library, or of those that this processor runs, the fastest
// first, with a space between two.
const char* compiled_kernels();
const char* supported_kernels();

// Computes a convolution by the faster of a table's ways.
inline void run_conv(const Kernels& table, const Conv& conv, const Parallel& parallel) {
  const bool bf16 = table.bf16 != nullptr && conv.weights == Weights::kBf16 &&
                    table.bf16->work(conv) <= table.work(conv);
  (bf16 ? table.bf16->conv : table.conv)(conv, parallel);
}

}  // namespace latentforge
