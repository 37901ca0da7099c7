// SPDX-License-Identifier: Apache-2.0
// Accumulate the attention that each key receives over the observation window, take its maximum, and
// count dense entries. The specification is vl_cache_vllm/ops/observe.py.
//
// A row is one query of one head: row r of a KV head is query r / group and head r % group of the
// KV head's group. First, transpose the keys into tiles of 32 tokens. Then each task computes 16
// rows of one KV head over all tiles, so that its logits fit the second-level cache:
//
//   keys of a KV head      tile 0 | tile 1 | tile 2 | ...    each [head_size][32]
//   task 0: rows  0-15    [      logits: 16 x width       ]  -> column sums of its thread
//   task 1: rows 16-31    [                               ]  -> column sums of its thread
//
// At the end the column sums of all threads are added up; maxima go the same way. Threads get tasks
// in a fixed order, so the result depends on the number of threads only, and only by rounding.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>

#include "vector.h"

namespace {

constexpr int kTile = 2 * kLanes;  // tokens of a tile
constexpr int kRows = 16;          // rows of a task
constexpr int kStep = 4;           // rows that share loads of the keys

struct Shape {
  int64_t num_queries, num_heads, num_kv_heads, head_size;
  int64_t first_position;               // of the first query
  float scale, log_threshold, softcap;  // softcap 0: none

  int64_t num_keys() const { return first_position + num_queries; }
  int64_t num_tiles() const { return (num_keys() + kTile - 1) / kTile; }
  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t rows() const { return num_queries * group(); }
  int64_t tasks_per_head() const { return (rows() + kRows - 1) / kRows; }
};

// Write up to 32 keys as [head_size][32]; the columns of missing tokens are zero.
FOR_EACH_ISA void transpose(const float* keys, int64_t stride, int64_t tokens, int64_t head_size,
                            float* tile) {
  for (int64_t token = 0; token < kTile; ++token)
    for (int64_t i = 0; i < head_size; ++i)
      tile[i * kTile + token] = token < tokens ? keys[token * stride + i] : 0.0f;
}

// Compute the logits of 4 rows and one tile. query: [4][head_size]; logits: rows of `width` floats.
INLINE void multiply(const float* query, const float* tile, int64_t head_size, float* logits,
                     int64_t width) {
  Floats sums[kStep][2] = {};
  for (int64_t i = 0; i < head_size; ++i) {
    const Floats left = load(tile + i * kTile), right = load(tile + i * kTile + kLanes);
#pragma GCC unroll 4
    for (int row = 0; row < kStep; ++row) {
      const float q = query[row * head_size + i];
      sums[row][0] += q * left;
      sums[row][1] += q * right;
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < kStep; ++row) {
    store(logits + row * width, sums[row][0]);
    store(logits + row * width + kLanes, sums[row][1]);
  }
}

// Replace `width` logits by softcap * tanh(logit / softcap).
INLINE void cap(float* logits, int64_t width, float softcap) {
  for (int64_t i = 0; i < width; i += kLanes) {
    const Floats x = load(logits + i) / softcap;
    const Floats bounded = larger(broadcast(-20.0f), -larger(broadcast(-20.0f), -x));
    store(logits + i, softcap - 2 * softcap / (exponential(2 * bounded) + 1.0f));
  }
}

// Add one row's attention, times `weight`, to the column sums, and raise the column maxima (unless
// null) to the attention; returns the row's number of dense entries.
// The first `visible` logits are of keys at or before the query; the array is overwritten.
INLINE int64_t attend(float* logits, int64_t visible, float log_threshold, float weight,
                      float* column_sums, float* column_maxima) {
  const int64_t width = (visible + kLanes - 1) / kLanes * kLanes;
  std::fill(logits + visible, logits + width, -std::numeric_limits<float>::infinity());
  Floats maxima = load(logits);
  for (int64_t i = kLanes; i < width; i += kLanes) maxima = larger(load(logits + i), maxima);
  const float row_max = largest(maxima);
  const Floats threshold = broadcast(row_max + log_threshold);
  Floats total = {};
  Ints dense = {};
  for (int64_t i = 0; i < width; i += kLanes) {
    const Floats x = load(logits + i);
    dense -= x >= threshold;  // a true lane is -1
    const Floats e = exponential(x - row_max);
    total += e;
    store(logits + i, e);
  }
  const float norm = 1.0f / sum(total), factor = weight * norm;
  if (factor != 0.0f)
    for (int64_t i = 0; i < width; i += kLanes)
      store(column_sums + i, load(column_sums + i) + load(logits + i) * factor);
  if (column_maxima)
    for (int64_t i = 0; i < width; i += kLanes)
      store(column_maxima + i, larger(load(logits + i) * norm, load(column_maxima + i)));
  int64_t count = 0;
  for (int i = 0; i < kLanes; ++i) count += dense[i];
  return count;
}

// Process the rows `first` to `end` (at most 16) of one KV head; returns their dense entries.
// logits: buffer of 16 rows of keys; packed: buffer of 16 queries; column_sums, column_maxima (or
// null): of one KV head.
FOR_EACH_ISA int64_t observe_rows(const Shape& shape, const float* query, const float* tiles,
                                  const float* weights, int64_t kv_head, int64_t first,
                                  int64_t end, float* logits, float* packed, float* column_sums,
                                  float* column_maxima) {
  const int64_t size = shape.head_size, group = shape.group();
  const int64_t width = shape.num_tiles() * kTile;
  for (int64_t row = first; row < first + kRows; ++row) {
    const int64_t query_index = row / group, head = kv_head * group + row % group;
    const float* from = query + (query_index * shape.num_heads + head) * size;
    float* to = packed + (row - first) * size;
    for (int64_t i = 0; i < size; ++i) to[i] = row < end ? from[i] * shape.scale : 0.0f;
  }
  const int64_t most_visible = shape.first_position + (end - 1) / group + 1;
  const int64_t num_tiles = (most_visible + kTile - 1) / kTile;
  for (int64_t tile = 0; tile < num_tiles; ++tile)
    for (int64_t row = 0; row < end - first; row += kStep)
      multiply(packed + row * size, tiles + tile * size * kTile, size,
               logits + row * width + tile * kTile, width);
  int64_t dense = 0;
  for (int64_t row = first; row < end; ++row) {
    float* own = logits + (row - first) * width;
    const int64_t query_index = row / group, visible = shape.first_position + query_index + 1;
    if (shape.softcap > 0) cap(own, (visible + kLanes - 1) / kLanes * kLanes, shape.softcap);
    const float weight = weights ? weights[kv_head * shape.num_queries + query_index] : 1.0f;
    dense += attend(own, visible, shape.log_threshold, weight, column_sums, column_maxima);
  }
  return dense;
}

}  // namespace

// query: [num_queries, num_heads, head_size], contiguous
// key: [num_kv_heads, >= num_keys, head_size], with the given strides in elements
// weights: [num_kv_heads, num_queries], or null for 1
// column_sums: [num_kv_heads, >= num_keys], rows at a distance of column_stride elements; added to
// column_maxima: the same with maxima_stride, raised; or null
// dense_entries: one number, added to
extern "C" void vlc_observe(const float* query, const float* key, int64_t key_head_stride,
                            int64_t key_token_stride, const float* weights, float* column_sums,
                            int64_t column_stride, float* column_maxima, int64_t maxima_stride,
                            int64_t* dense_entries, int64_t num_queries, int64_t num_heads,
                            int64_t num_kv_heads, int64_t head_size,
                            int64_t first_position, float scale, float log_threshold,
                            float softcap) {
  const Shape shape = {num_queries, num_heads,     num_kv_heads, head_size,
                       first_position, scale, log_threshold, softcap};
  const int64_t num_tiles = shape.num_tiles(), width = num_tiles * kTile;
  const int64_t tile_size = head_size * kTile;
  const std::unique_ptr<float[]> tiles(new float[num_kv_heads * num_tiles * tile_size]);
  const int num_threads = omp_get_max_threads();
  const int64_t partial_size = num_kv_heads * width;
  const std::unique_ptr<float[]> partial(new float[num_threads * partial_size]());
  const std::unique_ptr<float[]> partial_maxima(
      column_maxima ? new float[num_threads * partial_size]() : nullptr);
  int64_t dense = 0;
#pragma omp parallel num_threads(num_threads) reduction(+ : dense)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < num_kv_heads * num_tiles; ++i) {
      const int64_t head = i / num_tiles, token = i % num_tiles * kTile;
      transpose(key + head * key_head_stride + token * key_token_stride, key_token_stride,
                std::min<int64_t>(kTile, shape.num_keys() - token), head_size,
                tiles.get() + i * tile_size);
    }
    const std::unique_ptr<float[]> logits(new float[kRows * width]);
    const std::unique_ptr<float[]> packed(new float[kRows * head_size]);
    float* sums = partial.get() + omp_get_thread_num() * partial_size;
    float* maxima =
        column_maxima ? partial_maxima.get() + omp_get_thread_num() * partial_size : nullptr;
    const int64_t tasks = shape.tasks_per_head();
#pragma omp for schedule(static, 1)
    for (int64_t task = 0; task < num_kv_heads * tasks; ++task) {
      const int64_t head = task / tasks, first = task % tasks * kRows;
      dense += observe_rows(shape, query, tiles.get() + head * num_tiles * tile_size, weights, head,
                            first, std::min(first + kRows, shape.rows()), logits.get(),
                            packed.get(), sums + head * width,
                            maxima ? maxima + head * width : nullptr);
    }
#pragma omp for schedule(static)
    for (int64_t head = 0; head < num_kv_heads; ++head)
      for (int thread = 0; thread < num_threads; ++thread)
        for (int64_t i = 0; i < shape.num_keys(); ++i)
          column_sums[head * column_stride + i] +=
              partial[thread * partial_size + head * width + i];
    if (column_maxima) {
#pragma omp for schedule(static)
      for (int64_t head = 0; head < num_kv_heads; ++head)
        for (int thread = 0; thread < num_threads; ++thread)
          for (int64_t i = 0; i < shape.num_keys(); ++i)
            column_maxima[head * maxima_stride + i] =
                std::max(column_maxima[head * maxima_stride + i],
                         partial_maxima[thread * partial_size + head * width + i]);
    }
  }
  *dense_entries += dense;
}
