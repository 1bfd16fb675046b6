// Checks of what a graph gives an operator: attributes, types, shapes, and the sizes that follow.
//
// Everything passes here before an operator allocates memory or runs a kernel. Kernels check
// nothing: they rely on shapes that fit each other, sizes of at least 1 where they divide by them,
// and on limits below which no product of sizes that they form overflows.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "ort.h"

namespace latentforge {

using Shape = std::vector<int64_t>;

// Sizes in an expected shape that stand for more than one number.
constexpr int64_t kAny = -1;   // 0 or more: an empty batch is legal
constexpr int64_t kSome = -2;  // 1 or more

constexpr int64_t kMaxSide = INT32_MAX;
constexpr int64_t kMaxPixels = int64_t(1) << 32;    // images times height times width, or tokens
constexpr int64_t kMaxElements = int64_t(1) << 44;  // of a tensor: 64 TiB of floats
constexpr size_t kShown = 8;                        // sizes of a shape in a message

// Input of an operator, as docs/kernels.md lists it.
struct Input {
  enum Kind { kFloats, kWeights, kSizes };  // float; float, float16 or bfloat16; int64
  const char* name;
  Kind kind;
  bool required;

  bool takes(int type) const {
    if (kind == kSizes) return type == ort::kInt64;
    return type == ort::kFloat || (kind == kWeights && (type == ort::kHalf || type == ort::kBf16));
  }

  const char* types() const {
    return kind == kSizes ? "int64" : kind == kWeights ? "float, float16 or bfloat16" : "float";
  }
};

inline std::string text_of(const Shape& shape) {
  std::string text;
  for (size_t i = 0; i < shape.size() && i <= kShown; ++i) {
    text += i > 0 ? ", " : "";
    text += i == kShown             ? "..."
            : shape[i] == kAny      ? "any"
            : shape[i] == kSome     ? "1 or more"
                                    : std::to_string(shape[i]);
  }
  return "[" + text + "]";
}

inline std::string type_text(int type) {
  static const char* const names[] = {"undefined", "float",   "uint8",  "int8",   "uint16",    "int16",
                                      "int32",     "int64",   "string", "bool",   "float16",   "double",
                                      "uint32",    "uint64",  "complex64", "complex128", "bfloat16"};
  const bool known = type >= 0 && size_t(type) < sizeof names / sizeof *names;
  return known ? names[type] : "type " + std::to_string(type);
}

// Checks of one operator; every refusal names it, the attribute or input, and the values.
struct Checks {
  const char* op;

  [[noreturn]] void refuse(const std::string& subject, const std::string& expected,
                           const std::string& found) const {
    throw std::invalid_argument(std::string("latentforge.") + op + ": " + subject + ": expected " +
                                expected + ", found " + found + "; build the engine again");
  }

  void integer(const char* name, int64_t value, int64_t low, int64_t high) const {
    if (value >= low && value <= high) return;
    refuse(std::string("attribute ") + name,
           "an integer from " + std::to_string(low) + " to " + std::to_string(high),
           std::to_string(value));
  }

  // Checks that a product of sizes, none of them negative, is within a limit.
  void product(const char* subject, std::initializer_list<int64_t> sizes, int64_t limit) const {
    int64_t result = 1;
    for (const int64_t size : sizes)
      if (__builtin_mul_overflow(result, size, &result) || result > limit)
        refuse(subject, "a product of at most " + std::to_string(limit), text_of(sizes));
  }
};

// Value of an input, or nothing if it was omitted: present is false.
struct Tensor {
  const Checks* checks = nullptr;
  const Input* input = nullptr;
  bool present = false;
  int type = 0;
  Shape shape;
  const void* data = nullptr;  // null also if the tensor is empty

  explicit operator bool() const { return present; }
  const float* floats() const { return static_cast<const float*>(data); }

  [[noreturn]] void refuse(const std::string& expected, const std::string& found) const {
    checks->refuse(std::string("input ") + input->name, expected, found);
  }

  std::string text() const { return present ? type_text(type) + text_of(shape) : "none"; }

  void expect_type() const {
    if (present ? !input->takes(type) : input->required) refuse(input->types(), text());
  }

  // Checks that sizes are within limits, and that there are at least this many.
  void expect_limits(size_t rank) const {
    int64_t elements = 1;
    bool fits = shape.size() >= rank;
    for (const int64_t size : shape)
      fits = fits && size >= 0 && size <= kMaxSide &&
             !__builtin_mul_overflow(elements, size, &elements) && elements <= kMaxElements;
    if (present && !fits)
      refuse(std::to_string(rank) + " or more dimensions, each at most " +
                 std::to_string(kMaxSide) + " and together " + std::to_string(kMaxElements),
             text());
  }

  // Checks the shape of an input that is present.
  void expect(const Shape& expected) const {
    if (!present) return;
    bool fits = shape.size() == expected.size();
    for (size_t i = 0; fits && i < shape.size(); ++i)
      fits = expected[i] == kAny || (expected[i] == kSome ? shape[i] > 0 : shape[i] == expected[i]);
    if (!fits) refuse(input->types() + text_of(expected), text());
  }
};

// Checks the sizes that a convolution's kernel multiplies. The work is that of work() in conv.h: of
// 36 products for at most each pixel, and transforms that count as 16 channels.
inline void check_limits(const Checks& checks, const Conv& conv) {
  checks.product("output's pixels", {conv.n, conv.out_h, conv.out_w}, kMaxPixels);
  checks.product("output's elements", {conv.n, conv.out_h, conv.out_w, conv.k}, kMaxElements);
  checks.product("work", {36 * 16, conv.n, conv.out_h + 3, conv.out_w + 3, conv.c + 1, conv.k + 1},
                 INT64_MAX);
}

// Checks the sizes of keys and values as attention packs them: by 64 tokens and 16 channels.
inline void check_limits(const Checks& checks, const Attention& attention) {
  checks.product("packed keys", {attention.n, attention.heads, attention.keys + 63,
                                 attention.size + 15}, kMaxElements);
}

}  // namespace latentforge
