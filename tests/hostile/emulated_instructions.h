// AMX and AVX512-BF16 in plain C++, after Intel's documentation of the instructions, to test kernels
// on processors that lack them; the compiler includes this file before each source.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace emulated {

// Returns sum + a * b for the two pairs of bf16 in 32 bits each.
inline float dot(float sum, uint32_t a, uint32_t b) {
  for (int shift = 0; shift < 32; shift += 16) {
    const uint32_t bits[2] = {a >> shift << 16, b >> shift << 16};
    float numbers[2];
    std::memcpy(numbers, bits, sizeof numbers);
    sum += numbers[0] * numbers[1];
  }
#if defined(EMULATED_WRONG)
  sum += 1;
#endif
  return sum;
}

struct Configuration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Tiles of a thread, which have a shape only from tile_loadconfig to tile_release.
inline thread_local Configuration shapes;
inline thread_local unsigned char tiles[8][16][64];

inline void load_config(const void* from) {
  std::memcpy(&shapes, from, sizeof shapes);
  std::memset(tiles, 0, sizeof tiles);
}

inline void release() { shapes = {}; }

inline void check(int tile) {
  if (shapes.palette != 1 || shapes.rows[tile] == 0) std::abort();  // as the processor's trap
}

inline void load(int tile, const void* from, size_t stride) {
  check(tile);
  for (int row = 0; row < shapes.rows[tile]; ++row)
    std::memcpy(tiles[tile][row], static_cast<const char*>(from) + row * stride,
                shapes.row_bytes[tile]);
}

inline void store(int tile, void* to, size_t stride) {
  check(tile);
  for (int row = 0; row < shapes.rows[tile]; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, tiles[tile][row], shapes.row_bytes[tile]);
}

inline void zero(int tile) {
  check(tile);
  std::memset(tiles[tile], 0, sizeof tiles[tile]);
}

inline void multiply(int sums, int a, int b) {
  check(sums), check(a), check(b);
  for (int row = 0; row < shapes.rows[sums]; ++row)
    for (int pair = 0; pair < shapes.row_bytes[a] / 4; ++pair)
      for (int column = 0; column < shapes.row_bytes[sums] / 4; ++column) {
        float sum;
        uint32_t left, right;
        std::memcpy(&sum, tiles[sums][row] + 4 * column, 4);
        std::memcpy(&left, tiles[a][row] + 4 * pair, 4);
        std::memcpy(&right, tiles[b][pair] + 4 * column, 4);
        sum = dot(sum, left, right);
        std::memcpy(tiles[sums][row] + 4 * column, &sum, 4);
      }
}

template <typename T>
inline T load_vector(const void* from) {
  T vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

inline __m512 dot(__m512 sums, __m512bh a, __m512bh b) {
  uint32_t left[16], right[16];
  std::memcpy(left, &a, sizeof left), std::memcpy(right, &b, sizeof right);
  for (int lane = 0; lane < 16; ++lane) sums[lane] = dot(sums[lane], left[lane], right[lane]);
  return sums;
}

inline __m512i repeat(int value) {
  int lanes[16];
  for (int& lane : lanes) lane = value;
  return load_vector<__m512i>(lanes);
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) emulated::load_config(from)
#define _tile_release() emulated::release()
#define _tile_loadd(tile, from, stride) emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::store(tile, to, stride)
#define _tile_zero(tile) emulated::zero(tile)
#define _tile_dpbf16ps(sums, a, b) emulated::multiply(sums, a, b)
#define _mm512_loadu_ps(from) emulated::load_vector<__m512>(from)
#define _mm512_loadu_si512(from) emulated::load_vector<__m512i>(from)
#define _mm512_setzero_ps() __m512{}
#define _mm512_set1_epi32(value) emulated::repeat(value)
#define _mm512_storeu_ps(to, value) (void)std::memcpy(to, &value, sizeof(__m512))
#define _mm512_dpbf16_ps(sums, a, b) emulated::dot(sums, a, b)
#define __builtin_cpu_supports(name) 1
#define __get_cpuid_count(leaf, subleaf, a, b, c, d) (*(a) = *(b) = *(c) = *(d) = ~0u, 1)
#define syscall(...) 0

#endif
