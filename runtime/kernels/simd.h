// Vectors of the instruction set that the including file is compiled for.
//
// Everything here and in the headers that include it is in an unnamed namespace and uses no inline
// function of the standard library: the linker would keep one copy for all instruction sets.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace latentforge {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16, kRows = 14, kBlocks = 2;
#elif defined(__AVX2__)
constexpr int kWidth = 8, kRows = 6, kBlocks = 1;
#else
constexpr int kWidth = 4, kRows = 4, kBlocks = 1;
#endif
// A vector has kWidth floats. A tile of the matrix product has kRows x (kBlocks * 16) accumulators,
// which fill the registers.

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t IntVec __attribute__((vector_size(kWidth * 4)));
typedef uint32_t UintVec __attribute__((vector_size(kWidth * 4)));
typedef float Anywhere __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));

template <typename T>
constexpr T smaller(T a, T b) { return a < b ? a : b; }
template <typename T>
constexpr T larger(T a, T b) { return a < b ? b : a; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline Vec load(const float* p) { return *reinterpret_cast<const Anywhere*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Anywhere*>(p) = v; }
inline Vec all(float value) { return value - Vec{}; }

// Loads the first count floats, followed by zeros.
inline Vec load_some(const float* p, int64_t count) {
  if (count >= kWidth) return load(p);
  float values[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = p[i];
  return load(values);
}

inline void store_some(float* p, Vec v, int64_t count) {
  if (count >= kWidth) return store(p, v);
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}

inline float from_half(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
  uint32_t bits = (rest << 13) + (112u << 23);
  float value;
  if (rest < 0x0400) {  // subnormal
    value = float(rest) * 0x1p-24f;
    std::memcpy(&bits, &value, 4);
  } else if (rest >= 0x7c00) {
    bits += 112u << 23;
  }
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline Vec load_half(const uint16_t* p) {
#if defined(__AVX512F__)
  return Vec(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return Vec(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = from_half(p[i]);
  return v;
#endif
}

// Loads one number of each of the pairs of bf16 from p on: the first, or the second.
inline Vec load_bf16(const uint16_t* p, bool second) {
  typedef uint32_t Pairs __attribute__((vector_size(kWidth * 4), aligned(2), may_alias));
  const UintVec pairs = *reinterpret_cast<const Pairs*>(p);
  return Vec(second ? pairs & 0xffff0000 : pairs << 16);
}

// Rounds to bf16, to the nearest and to even; NaN stays NaN, and is quiet.
inline Vec round_to_bf16(Vec v) {
  const UintVec bits = UintVec(v);
  const UintVec nearest = bits + 0x7fff + ((bits >> 16) & 1), quiet = bits | 0x400000;
  return Vec((v != v ? quiet : nearest) & 0xffff0000);
}

// a > b ? a : b, which is b if either is NaN.
inline Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  return Vec(_mm512_max_ps(__m512(a), __m512(b)));
#elif defined(__AVX2__)
  return Vec(_mm256_max_ps(__m256(a), __m256(b)));
#else
  return a > b ? a : b;
#endif
}

// Returns the largest lane.
inline float largest(Vec v) {
  float lanes[kWidth];
  store(lanes, v);
#pragma GCC unroll 4
  for (int half = kWidth / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) lanes[i] = larger(lanes[i], lanes[i + half]);
  return lanes[0];
}

inline float sum_of(Vec v) {
  float sum = 0;
  for (int lane = 0; lane < kWidth; ++lane) sum += v[lane];
  return sum;
}

inline Vec pick(IntVec mask, Vec yes, Vec no) { return mask ? yes : no; }

// e^x = 2^n e^f with |f| <= ln 2 / 2 and a polynomial for e^f, to 2 ulp; x is clamped to -87..88.
inline Vec exponential(Vec x) {
  x = pick(x < all(-87.0f), all(-87.0f), x);
  x = pick(x > all(88.0f), all(88.0f), x);
  const Vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = x * 1.44269504f + magic;
  const Vec n = shifted - magic;
  const Vec f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = f * (1.0f / 5040) + (1.0f / 720);
  p = p * f + (1.0f / 120);
  p = p * f + (1.0f / 24);
  p = p * f + (1.0f / 6);
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  return Vec(IntVec(p) + (IntVec(shifted) << 23));
}

// 2^x for x <= 0, clamped to 2^-125 from below: 2^n 2^f with |f| <= 1/2, and for 2^f the minimax
// polynomial of degree 5 (relative error 7.5e-8), by the Remez algorithm.
inline Vec power_of_two(Vec x) {
  x = larger(all(-125.0f), x);
  const Vec magic = all(12582912.0f);
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
  Vec p = f * 1.3276472e-3f + 9.6755410e-3f;
  p = p * f + 5.5507131e-2f;
  p = p * f + 2.4022120e-1f;
  p = p * f + 6.9314694e-1f;
  p = p * f + 1.0000001f;
  return Vec(IntVec(p) + (IntVec(shifted) << 23));
}

inline Vec silu(Vec x) { return x / (1.0f + exponential(-x)); }

// x / 2 (1 + erf(x / sqrt 2)), with erf by Abramowitz and Stegun 7.1.26 (absolute error at most 1.5e-7).
inline Vec gelu(Vec x) {
  const Vec z = pick(x < all(0.0f), -x, x) * 0.70710678f;
  const Vec t = 1.0f / (1.0f + 0.3275911f * z);
  Vec p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vec tail = 0.5f * p * t * exponential(-z * z);  // (1 - erf(z)) / 2
  return x * pick(x < all(0.0f), tail, 1.0f - tail);
}

}  // namespace
}  // namespace latentforge
