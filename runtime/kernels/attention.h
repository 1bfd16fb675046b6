// Attention without the matrix of scores, which has half a gigabyte for 4096 tokens and 8 heads.
//
// Dao et al. (2022), arXiv 2205.14135, algorithm 1: keys come in blocks, and the running sums of a
// row are rescaled when a larger score appears. Dao (2023), arXiv 2307.08691, section 3.1: the
// division by the row's sum comes last.
#pragma once

#include "kernels.h"
#include "product.h"
#include "scratch.h"

namespace latentforge {
namespace {

constexpr int64_t kQueries = 8 * kRows;  // rows of a task
constexpr int64_t kKeys = 4 * kChunk;    // keys of a block
constexpr int64_t kStep = 2 * kWidth;    // scores that are processed together
constexpr float kLowest = -3.0e38f;

class AttentionRun {
 public:
  AttentionRun(const Attention& attention, const Parallel& parallel)
      : a_(attention),
        parallel_(parallel),
        width_(a_.heads * a_.size),
        wide_(round_up(a_.size, kWidth)),
        depth_(round_up(a_.size, kChunk)),
        chunks_(ceil_div(a_.keys, kChunk)) {}

  void run() {
    Shared keys(size_t(a_.n * a_.heads * chunks_ * kChunk * a_.size));
    Shared values(size_t(a_.n * a_.heads * chunks_ * kChunk * wide_));
    keys_ = keys.data();
    values_ = values.data();
    parallel_(a_.n * a_.heads * chunks_, [&](int64_t task) { pack(task); });
    const int64_t blocks = ceil_div(a_.queries, kQueries);
    parallel_(a_.n * a_.heads * blocks, [&](int64_t task) {
      attend(task / blocks, task % blocks * kQueries);
    });
  }

 private:
  const Attention& a_;
  const Parallel& parallel_;
  const int64_t width_, wide_, depth_, chunks_;
  float *keys_ = nullptr, *values_ = nullptr;

  // Returns the offset of a head's channels of a token.
  int64_t place(int64_t head, int64_t token, int64_t tokens) const {
    return (head / a_.heads * tokens + token) * width_ + head % a_.heads * a_.size;
  }

  // Returns the columns of a panel of values; the last has three vectors rather than one.
  int64_t wide_of(int64_t panel) const {
    const int64_t left = wide_ - panel;
    return left == kWidth || left == 3 * kWidth ? left : 2 * kWidth;
  }

  // Packs kChunk keys to [panels][size][panel], and their values to [panels][keys][panel].
  void pack(int64_t task) {
    const int64_t head = task / chunks_, first = task % chunks_ * kChunk;
    const int64_t count = smaller(kChunk, a_.keys - first);
    float* keys = keys_ + task * kChunk * a_.size;
    for (int64_t i = 0; i < kChunk; ++i) {
      const float* from = a_.key + place(head, first + i, a_.keys);
      float* to = keys + i / kPanel * kPanel * a_.size + i % kPanel;
      for (int64_t d = 0; d < a_.size; ++d) to[d * kPanel] = i < count ? from[d] : 0;
    }
    for (int64_t panel = 0; panel < wide_; panel += wide_of(panel)) {
      const int64_t wide = wide_of(panel);
      float* to = values_ + (head * chunks_ * wide_ + panel * chunks_) * kChunk + first * wide;
      for (int64_t i = 0; i < count; ++i)
        for (int64_t d = 0; d < wide; d += kWidth)
          store(to + i * wide + d, load_some(a_.value + place(head, first + i, a_.keys) + panel + d,
                                             larger<int64_t>(a_.size - panel - d, 0)));
    }
  }

  // Computes the output of a block of queries of one head.
  void attend(int64_t head, int64_t first) {
    const int64_t count = smaller(kQueries, a_.queries - first);
    float* query = scratch(kStrip, size_t(kQueries * depth_));
    float* scores = scratch(kProducts, size_t(kQueries * kKeys));
    float* sums = scratch(kRowsOfHead, size_t(kQueries * (wide_ + kWidth + 1)));
    float *totals = sums + kQueries * wide_, *maxima = totals + kQueries * kWidth;
    scale_queries(head, first, count, query);
    for (int64_t r = 0; r < count; ++r) maxima[r] = kLowest, store(totals + r * kWidth, Vec{});
    for (int64_t key = 0; key < a_.keys; key += kKeys) {
      const int64_t keys = smaller(kKeys, a_.keys - key);
      score(head, key, keys, count, query, scores);
      for (int64_t r = 0; r < count; ++r) {
        const float now = row_maximum(scores + r * kChunk, count * kChunk, keys, maxima[r]);
        if (key > 0 && now > maxima[r])
          rescale(power_of_two(all(maxima[r] - now)), sums + r * wide_, totals + r * kWidth);
        maxima[r] = now;
        exponentiate(scores + r * kChunk, count * kChunk, keys, now, totals + r * kWidth);
      }
      sum_values(head, key, keys, count, scores, sums);
    }
    for (int64_t r = 0; r < count; ++r) {
      float* y = a_.y + place(head, first + r, a_.queries);
      const float total = sum_of(load(totals + r * kWidth));
      for (int64_t d = 0; d < a_.size; d += kWidth)
        store_some(y + d, load(sums + r * wide_ + d) / total, a_.size - d);
    }
  }

  // Copies queries, scaled also by log2(e) for powers of two, to [chunks of the size][rows][kChunk].
  void scale_queries(int64_t head, int64_t first, int64_t count, float* out) const {
    constexpr float kLog2 = 1.44269504f;
    for (int64_t r = 0; r < count; ++r) {
      const float* from = a_.query + place(head, first + r, a_.queries);
      for (int64_t d = 0; d < a_.size; d += kWidth)
        store(out + d / kChunk * count * kChunk + r * kChunk + d % kChunk,
              load_some(from + d, a_.size - d) * (a_.scale * kLog2));
    }
  }

  // Writes scores to [chunks of keys][rows][kChunk]; scores beyond the last key become zero weights.
  void score(int64_t head, int64_t key, int64_t keys, int64_t count, const float* query,
             float* scores) const {
    for (int64_t chunk = 0; chunk * kChunk < keys; ++chunk) {
      const float* packed = keys_ + (head * chunks_ + key / kChunk + chunk) * kChunk * a_.size;
      const int64_t left = smaller(kChunk, keys - chunk * kChunk), wide = round_up(left, kStep);
      float* out = scores + chunk * count * kChunk;
      for (int64_t j = 0; j < wide; j += kPanel)
        multiply_panel(query, count * kChunk, packed + j * a_.size, a_.size, out + j, kChunk, count,
                       kPanel, false);
      for (int64_t r = 0; left < wide && r < count; ++r)
        for (int64_t j = left; j < wide; ++j) out[r * kChunk + j] = kLowest;
    }
  }

  // Returns the largest score of a row, at least the maximum so far.
  static float row_maximum(const float* scores, int64_t stride, int64_t keys, float maximum) {
    Vec even = all(maximum), odd = even;
    for (; keys > 0; keys -= kChunk, scores += stride)
      for (int64_t i = 0; i < smaller(keys, kChunk); i += kStep) {
        even = larger(load(scores + i), even);
        odd = larger(load(scores + i + kWidth), odd);
      }
    return largest(larger(even, odd));
  }

  void rescale(Vec factor, float* sums, float* totals) const {
    for (int64_t d = 0; d < wide_; d += kWidth) store(sums + d, load(sums + d) * factor);
    store(totals, load(totals) * factor);
  }

  // Replaces a row of scores by 2^(score - maximum) and adds them to the row's totals.
  static void exponentiate(float* scores, int64_t stride, int64_t keys, float maximum, float* totals) {
    Vec even = load(totals), odd{};
    for (; keys > 0; keys -= kChunk, scores += stride)
      for (int64_t i = 0; i < smaller(keys, kChunk); i += kStep) {
        const Vec one = power_of_two(load(scores + i) - maximum);
        const Vec other = power_of_two(load(scores + i + kWidth) - maximum);
        store(scores + i, one);
        store(scores + i + kWidth, other);
        even += one;
        odd += other;
      }
    store(totals, even + odd);
  }

  void sum_values(int64_t head, int64_t key, int64_t keys, int64_t count, const float* scores,
                  float* sums) const {
    for (int64_t panel = 0; panel < wide_; panel += wide_of(panel)) {
      const int64_t wide = wide_of(panel);
      const float* packed =
          values_ + (head * chunks_ * wide_ + panel * chunks_) * kChunk + key * wide;
      multiply_panel(scores, count * kChunk, packed, keys, sums + panel, wide_, count, wide, key > 0);
    }
  }
};

void attend(const Attention& attention, const Parallel& parallel) {
  AttentionRun(attention, parallel).run();
}

}  // namespace
}  // namespace latentforge
