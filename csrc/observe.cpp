// SPDX-License-Identifier: Apache-2.0
// How the observed queries attend; the specification is vl_cache_vllm/ops/observe.py.
//
// Keys are transposed once into tiles of 32 tokens. Then each task takes 16 rows (a row: one query
// of one head) of one KV head over all tiles, so that logits stay in the second-level cache, and
// adds to column sums of its own thread. Tasks are dealt to threads in a fixed order: results
// depend on the number of threads only, and on that only by rounding.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>

#include "vector.h"

namespace {

constexpr int kTile = 2 * kLanes;  // tokens
constexpr int kRows = 16;          // of a task
constexpr int kStep = 4;           // rows that share registers

struct Shape {
  int64_t num_queries, num_heads, num_kv_heads, head_size;
  int64_t first_position;
  float scale, log_threshold, softcap;

  int64_t num_keys() const { return first_position + num_queries; }
  int64_t num_tiles() const { return (num_keys() + kTile - 1) / kTile; }
  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t rows() const { return num_queries * group(); }
  int64_t tasks_per_head() const { return (rows() + kRows - 1) / kRows; }
};

// Up to 32 tokens as [head_size][32]; missing ones are zero.
FOR_EACH_ISA void transpose(const float* keys, int64_t stride, int64_t tokens, int64_t head_size,
                            float* tile) {
  for (int64_t token = 0; token < kTile; ++token)
    for (int64_t i = 0; i < head_size; ++i)
      tile[i * kTile + token] = token < tokens ? keys[token * stride + i] : 0.0f;
}

// Logits of 4 rows against one tile.
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

INLINE void cap(float* logits, int64_t width, float softcap) {
  for (int64_t i = 0; i < width; i += kLanes) {
    const Floats x = load(logits + i) / softcap;
    const Floats bounded = larger(broadcast(-20.0f), -larger(broadcast(-20.0f), -x));
    store(logits + i, softcap - 2 * softcap / (exponential(2 * bounded) + 1.0f));
  }
}

// One row of logits, of which `visible` are before or at the query; returns its dense entries.
INLINE int64_t attend(float* logits, int64_t visible, float log_threshold, float weight,
                      float* column_sums) {
  const int64_t width = (visible + kLanes - 1) / kLanes * kLanes;
  std::fill(logits + visible, logits + width, -std::numeric_limits<float>::infinity());
  Floats most = load(logits);
  for (int64_t i = kLanes; i < width; i += kLanes) most = larger(load(logits + i), most);
  const float row_max = largest(most);
  const Floats least = broadcast(row_max + log_threshold);
  Floats total = {};
  Ints dense = {};
  for (int64_t i = 0; i < width; i += kLanes) {
    const Floats x = load(logits + i);
    dense -= x >= least;
    const Floats e = exponential(x - row_max);
    total += e;
    store(logits + i, e);
  }
  const float share = weight / sum(total);
  for (int64_t i = 0; i < width; i += kLanes)
    store(column_sums + i, load(column_sums + i) + load(logits + i) * share);
  int64_t count = 0;
  for (int i = 0; i < kLanes; ++i) count += dense[i];
  return count;
}

// Rows `first` to `end` of one KV head. `logits` has room for 16 rows, `packed` for 16 queries.
FOR_EACH_ISA int64_t observe_rows(const Shape& shape, const float* query, const float* tiles,
                                  const float* weights, int64_t kv_head, int64_t first,
                                  int64_t end, float* logits, float* packed, float* column_sums) {
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
    dense += attend(own, visible, shape.log_threshold, weight, column_sums);
  }
  return dense;
}

}  // namespace

// query: [num_queries, num_heads, head_size]; key: [num_kv_heads, >= num_keys, head_size] with the
// strides given; weights: [num_kv_heads, num_queries] or null; column_sums: rows of
// column_stride floats, at least num_keys; dense_entries: one number, added to.
extern "C" void vlc_observe(const float* query, const float* key, int64_t key_head_stride,
                            int64_t key_token_stride, const float* weights, float* column_sums,
                            int64_t column_stride, int64_t* dense_entries, int64_t num_queries,
                            int64_t num_heads, int64_t num_kv_heads, int64_t head_size,
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
    const int64_t tasks = shape.tasks_per_head();
#pragma omp for schedule(static, 1)
    for (int64_t task = 0; task < num_kv_heads * tasks; ++task) {
      const int64_t head = task / tasks, first = task % tasks * kRows;
      dense += observe_rows(shape, query, tiles.get() + head * num_tiles * tile_size, weights, head,
                            first, std::min(first + kRows, shape.rows()), logits.get(),
                            packed.get(), sums + head * width);
    }
#pragma omp for schedule(static)
    for (int64_t head = 0; head < num_kv_heads; ++head)
      for (int thread = 0; thread < num_threads; ++thread)
        for (int64_t i = 0; i < shape.num_keys(); ++i)
          column_sums[head * column_stride + i] +=
              partial[thread * partial_size + head * width + i];
  }
  *dense_entries += dense;
}
