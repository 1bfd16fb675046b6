// Attention without its matrix of scores, which for 4096 tokens and 8 heads has half a gigabyte.
//
// Dao et al. (2022), arXiv 2205.14135, algorithm 1: keys come in blocks, and what is summed up so
// far is scaled down whenever a row meets a larger score. Dao (2023), arXiv 2307.08691, section
// 3.1: the division by the row's sum comes last.
#pragma once

#include "kernels.h"
#include "product.h"
#include "scratch.h"

namespace latentforge {
namespace {

constexpr int64_t kQueries = 4 * kRows;  // rows of a task
constexpr int64_t kKeys = 4 * kChunk;    // keys of a block

class Attending {
 public:
  Attending(const Attention& attention, const Parallel& parallel)
      : a_(attention),
        parallel_(parallel),
        width_(a_.heads * a_.size),
        wide_(round_up(a_.size, 16)),
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

  // Where a head of an image begins in a row of tokens.
  int64_t place(int64_t head, int64_t token, int64_t tokens) const {
    return (head / a_.heads * tokens + token) * width_ + head % a_.heads * a_.size;
  }

  // kChunk keys as [panels][size][panel], and their values as [panels][keys][panel].
  void pack(int64_t task) {
    const int64_t head = task / chunks_, first = task % chunks_ * kChunk;
    const int64_t count = smaller(kChunk, a_.keys - first);
    float* keys = keys_ + task * kChunk * a_.size;
    for (int64_t i = 0; i < kChunk; ++i) {
      const float* from = a_.key + place(head, first + i, a_.keys);
      float* to = keys + i / kPanel * kPanel * a_.size + i % kPanel;
      for (int64_t d = 0; d < a_.size; ++d) to[d * kPanel] = i < count ? from[d] : 0;
    }
    for (int64_t panel = 0; panel < wide_; panel += kPanel) {
      const int64_t wide = smaller(kPanel, wide_ - panel);
      float* to = values_ + (head * chunks_ * wide_ + panel * chunks_) * kChunk + first * wide;
      for (int64_t i = 0; i < count; ++i)
        for (int64_t d = 0; d < wide; d += kWidth)
          store(to + i * wide + d, load_some(a_.value + place(head, first + i, a_.keys) + panel + d,
                                             larger<int64_t>(a_.size - panel - d, 0)));
    }
  }

  // A block of queries of one head.
  void attend(int64_t head, int64_t first) {
    const int64_t count = smaller(kQueries, a_.queries - first);
    float* query = scratch(kStrip, size_t(kQueries * depth_));
    float* scores = scratch(kProducts, size_t(kQueries * kKeys));
    float* sums = scratch(kRowsOfHead, size_t(kQueries * (wide_ + 2)));
    float *most = sums + kQueries * wide_, *total = most + kQueries;
    take_queries(head, first, count, query);
    for (int64_t r = 0; r < count; ++r) most[r] = -3.0e38f, total[r] = 0;
    for (int64_t key = 0; key < a_.keys; key += kKeys) {
      const int64_t keys = smaller(kKeys, a_.keys - key);
      score(head, key, keys, count, query, scores);
      for (int64_t r = 0; r < count; ++r)
        soften(scores + r * kChunk, count * kChunk, keys, sums + r * wide_, key > 0, most[r],
               total[r]);
      sum_values(head, key, keys, count, scores, sums);
    }
    for (int64_t r = 0; r < count; ++r) {
      float* y = a_.y + place(head, first + r, a_.queries);
      for (int64_t d = 0; d < a_.size; d += kWidth)
        store_some(y + d, load(sums + r * wide_ + d) / total[r], a_.size - d);
    }
  }

  // Scaled, as [chunks of the head's size][rows][kChunk].
  void take_queries(int64_t head, int64_t first, int64_t count, float* out) const {
    for (int64_t r = 0; r < count; ++r) {
      const float* from = a_.query + place(head, first + r, a_.queries);
      for (int64_t d = 0; d < a_.size; d += kWidth)
        store(out + d / kChunk * count * kChunk + r * kChunk + d % kChunk,
              load_some(from + d, a_.size - d) * a_.scale);
    }
  }

  // To [chunks of keys][rows][kChunk].
  void score(int64_t head, int64_t key, int64_t keys, int64_t count, const float* query,
             float* scores) const {
    for (int64_t chunk = 0; chunk * kChunk < keys; ++chunk) {
      const float* packed = keys_ + (head * chunks_ + key / kChunk + chunk) * kChunk * a_.size;
      const int64_t left = round_up(smaller(kChunk, keys - chunk * kChunk), 16);
      for (int64_t j = 0; j < left; j += kPanel)
        multiply_panel(query, count * kChunk, packed + j * a_.size, a_.size,
                       scores + chunk * count * kChunk + j, kChunk, count, kPanel, false);
    }
  }

  // One row of scores becomes e^(score - most); sums and total follow a most that grows.
  void soften(float* scores, int64_t stride, int64_t keys, float* sums, bool again, float& most,
              float& total) const {
    Vec largest = all(most);
    for (int64_t i = 0; i < keys; i += kWidth) {
      const Vec row = valid(scores + i / kChunk * stride + i % kChunk, keys - i);
      largest = pick(row > largest, row, largest);
    }
    float now = largest[0];
    for (int lane = 1; lane < kWidth; ++lane) now = larger(now, largest[lane]);
    Vec sum{};
    for (int64_t i = 0; i < keys; i += kWidth) {
      float* place = scores + i / kChunk * stride + i % kChunk;
      const Vec power = exponential(valid(place, keys - i) - now);
      sum += keys - i >= kWidth ? power : load_some(reinterpret_cast<const float*>(&power), keys - i);
      store(place, power);
    }
    const float shrink = again ? exponential(all(most - now))[0] : 0;
    for (int64_t d = 0; d < wide_; d += kWidth) store(sums + d, again ? load(sums + d) * shrink : Vec{});
    float added = 0;
    for (int lane = 0; lane < kWidth; ++lane) added += sum[lane];
    total = total * shrink + added;
    most = now;
  }

  static Vec valid(const float* scores, int64_t count) {
    if (count >= kWidth) return load(scores);
    Vec row = all(-3.0e38f);
    for (int64_t lane = 0; lane < count; ++lane) row[lane] = scores[lane];
    return row;
  }

  void sum_values(int64_t head, int64_t key, int64_t keys, int64_t count, const float* scores,
                  float* sums) const {
    for (int64_t panel = 0; panel < wide_; panel += kPanel) {
      const int64_t wide = smaller(kPanel, wide_ - panel);
      const float* packed =
          values_ + (head * chunks_ * wide_ + panel * chunks_) * kChunk + key * wide;
      multiply_panel(scores, count * kChunk, packed, keys, sums + panel, wide_, count, wide, true);
    }
  }
};

void attend(const Attention& attention, const Parallel& parallel) {
  Attending(attention, parallel).run();
}

}  // namespace
}  // namespace latentforge
