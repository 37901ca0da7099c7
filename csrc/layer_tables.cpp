// SPDX-License-Identifier: Apache-2.0
// Compute each layer's block table, sequence lengths and slot mapping. The specification is
// vl_cache_vllm/ops/layer_tables.py, which has an example.
// One thread: the work takes less time than waking other threads.

#include <algorithm>
#include <cstdint>

// block_table: [num_reqs, columns], block ids, rows at a distance of row_stride elements
// query_start_loc: [num_reqs + 1], index of each request's first token in the step
// seq_lens: [num_reqs], logical tokens including this step's
// evicted_tokens: [num_reqs], E, a multiple of block_size; 0: not evicted
// kept_blocks: [num_reqs, kept_columns], ids of the kept blocks
// kept_pages: [num_reqs, num_layers], pages of each layer
// out_table: [num_layers, num_reqs, width], page ids
// out_lens: [num_layers, num_reqs], stored tokens
// out_slots: [num_layers, num_tokens], page id * block_size + offset; -1 after the last token
// layer_stride, block_stride: pages from layer to layer and from block to block
extern "C" void vlc_layer_tables(const int32_t* block_table, int64_t row_stride, int64_t columns,
                                 const int32_t* query_start_loc, const int32_t* seq_lens,
                                 const int64_t* evicted_tokens, const int64_t* kept_blocks,
                                 int64_t kept_columns, const int64_t* kept_pages,
                                 int32_t* out_table, int32_t* out_lens, int64_t* out_slots,
                                 int64_t num_layers, int64_t num_reqs, int64_t width,
                                 int64_t num_tokens, int64_t block_size, int64_t layer_stride,
                                 int64_t block_stride) {
  for (int64_t row = 0; row < num_reqs; ++row) {
    const int32_t* blocks = block_table + row * row_stride;
    const auto block_at = [&](int64_t column) {
      return static_cast<int64_t>(blocks[std::clamp<int64_t>(column, 0, columns - 1)]);
    };
    const int64_t evicted = evicted_tokens[row];
    const int64_t* kept_row = kept_blocks + row * kept_columns;
    const int64_t first_token = query_start_loc[row];
    const int64_t end_token = std::min<int64_t>(query_start_loc[row + 1], num_tokens);
    const int64_t first_position = seq_lens[row] - (query_start_loc[row + 1] - first_token);
    int64_t first_page = 0;  // index of the layer's first page among the request's kept pages
    for (int64_t layer = 0; layer < num_layers; ++layer) {
      const int64_t kept = kept_pages[row * num_layers + layer];
      int32_t* table = out_table + (layer * num_reqs + row) * width;
      for (int64_t entry = 0; entry < width; ++entry) {
        const bool is_kept = entry < kept;
        const int64_t page_index = first_page + entry;
        const int64_t block = is_kept ? kept_row[page_index / num_layers]
                                      : block_at(evicted / block_size + entry - kept);
        const int64_t page_layer = is_kept ? page_index % num_layers : layer;
        table[entry] = static_cast<int32_t>(page_layer * layer_stride + block * block_stride);
      }
      first_page += kept;
      out_lens[layer * num_reqs + row] =
          static_cast<int32_t>(kept * block_size + seq_lens[row] - evicted);
      for (int64_t token = first_token; token < end_token; ++token) {
        const int64_t position = first_position + token - first_token;
        const int64_t block = block_at(position / block_size);
        out_slots[layer * num_tokens + token] =
            (layer * layer_stride + block * block_stride) * block_size + position % block_size;
      }
    }
  }
  for (int64_t layer = 0; layer < num_layers; ++layer)
    std::fill(out_slots + layer * num_tokens +
                  std::min<int64_t>(query_start_loc[num_reqs], num_tokens),
              out_slots + (layer + 1) * num_tokens, int64_t{-1});
}
