// SPDX-License-Identifier: Apache-2.0
// Copy the selected tokens of every layer and KV head into the kept blocks. The specification is
// vl_cache_vllm/ops/compact.py, which has an example, and PagePool.copy_tokens.

#include <cstdint>
#include <initializer_list>

namespace {

struct Move {
  const int64_t* key_index;    // [block_size, head_size], offsets in one head's part of a page
  const int64_t* value_index;  // same for the values
  int64_t block_size, head_size;
  int64_t head_cells;  // elements of one head's part of a page
};

// Copy the key and the value of one token of one KV head. `from` and `to` are the head's parts of
// the two pages; `source` and `target` are the token's indices in them.
template <typename Cell>
void copy_token(const Move& move, const Cell* from, int64_t source, Cell* to, int64_t target) {
  for (const int64_t* index : {move.key_index, move.value_index}) {
    const int64_t* source_cells = index + source * move.head_size;
    const int64_t* target_cells = index + target * move.head_size;
    for (int64_t i = 0; i < move.head_size; ++i) to[target_cells[i]] = from[source_cells[i]];
    if (move.value_index == move.key_index) break;  // the value is a part of the key
  }
}

// As vlc_compact, for one element type.
template <typename Cell>
void compact(Cell* pages, const Move& move, const int32_t* source_pages, int64_t source_stride,
             const int64_t* kept_row, const int64_t* kept_pages, const int32_t* positions,
             int64_t num_layers, int64_t first_layer, int64_t num_moved, int64_t num_kv_heads,
             int64_t max_kept, int64_t layer_stride, int64_t block_stride) {
  const int64_t head_cells = move.head_cells;
  const auto page_at = [&](int64_t page_id) { return pages + page_id * num_kv_heads * head_cells; };
#pragma omp parallel for schedule(dynamic)
  for (int64_t moved = 0; moved < num_moved; ++moved) {
    const int64_t layer = first_layer + moved;
    int64_t page_index = 0;  // among the request's kept pages; a layer follows the layers before it
    for (int64_t before = 0; before < layer; ++before) page_index += kept_pages[before];
    for (int64_t page = 0; page < kept_pages[layer]; ++page, ++page_index) {
      Cell* to = page_at(page_index % num_layers * layer_stride +
                         kept_row[page_index / num_layers] * block_stride);
      for (int64_t head = 0; head < num_kv_heads; ++head) {
        const int32_t* kept =
            positions + (moved * num_kv_heads + head) * max_kept + page * move.block_size;
        for (int64_t token = 0; token < move.block_size; ++token) {
          const Cell* from =
              page_at(source_pages[layer * source_stride + kept[token] / move.block_size]);
          copy_token(move, from + head * head_cells, kept[token] % move.block_size,
                     to + head * head_cells, token);
        }
      }
    }
  }
}

}  // namespace

// pages: [num_pages, num_kv_heads, head_cells], elements of cell_bytes (1, 2 or 4)
// key_index, value_index: [block_size, head_size], offsets of elements in one head's part of a page
// source_pages: [num_layers, C], page ids, rows at a distance of source_stride elements
// kept_row: [M], block ids of the destination
// kept_pages: [num_layers], pages of each layer, with the sum M * num_layers
// positions: [num_moved, num_kv_heads, max_kept], indices in the source pages of the layers from
//     first_layer on, whose pages are filled
// layer_stride, block_stride: pages from layer to layer and from block to block
extern "C" void vlc_compact(void* pages, const int64_t* key_index, const int64_t* value_index,
                            const int32_t* source_pages, int64_t source_stride,
                            const int64_t* kept_row, const int64_t* kept_pages,
                            const int32_t* positions, int64_t cell_bytes, int64_t num_layers,
                            int64_t first_layer, int64_t num_moved, int64_t num_kv_heads,
                            int64_t head_cells, int64_t block_size, int64_t head_size,
                            int64_t max_kept, int64_t layer_stride, int64_t block_stride) {
  const Move move = {key_index, value_index, block_size, head_size, head_cells};
  const auto run = [&](auto* cells) {
    compact(cells, move, source_pages, source_stride, kept_row, kept_pages, positions, num_layers,
            first_layer, num_moved, num_kv_heads, max_kept, layer_stride, block_stride);
  };
  if (cell_bytes == 1) run(static_cast<uint8_t*>(pages));
  if (cell_bytes == 2) run(static_cast<uint16_t*>(pages));
  if (cell_bytes == 4) run(static_cast<uint32_t*>(pages));
}
