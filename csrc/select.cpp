// SPDX-License-Identifier: Apache-2.0
// Select the tokens with the highest scores, for every layer and KV head, and rank them. The
// specification is vl_cache_vllm/ops/select.py.
//
// Each token gets an integer key that is larger the earlier the token is kept. No two keys are
// equal, since they contain the position: [precedence, 64 bits][score, 32][inverted position, 32].
// std::nth_element then finds the key of the last kept token without sorting.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>

namespace {

typedef unsigned __int128 Wide;

// An integer in the order of the scores.
uint32_t ordered(float score) {
  uint32_t bits = 0x7f800000u;  // NaN: the highest score, as in torch
  if (score == score) {
    score += 0.0f;  // -0 becomes 0
    std::memcpy(&bits, &score, sizeof bits);
  }
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The key without precedence: the higher score first, then the lower position.
uint64_t order_key(float score, int64_t position) {
  return uint64_t{ordered(score)} << 32 | (0xffffffffu - static_cast<uint32_t>(position));
}

// Write the positions of the `count` largest keys of the first `candidates` tokens, in increasing
// order, then all positions from `candidates` to `end`, the recent window. keys: buffer.
template <typename Key, typename KeyOf>
void keep(KeyOf key_of, int64_t candidates, int64_t end, int64_t count, Key* keys,
          int32_t* positions) {
  if (count > 0) {
    for (int64_t i = 0; i < candidates; ++i) keys[i] = key_of(i);
    std::nth_element(keys, keys + count - 1, keys + candidates, std::greater<Key>());
    const Key last = keys[count - 1];  // of the last kept token
    for (int64_t i = 0; i < candidates; ++i)
      if (key_of(i) >= last) *positions++ = static_cast<int32_t>(i);
  }
  for (int64_t i = candidates; i < end; ++i) *positions++ = static_cast<int32_t>(i);
}

}  // namespace

// scores: [num_layers, num_kv_heads, width]
// num_tokens: [num_layers], tokens of each layer that can be selected, at most width
// kept_tokens: [num_layers], budget of each layer in tokens, at most max_kept and num_tokens
// precedence: [width], or null if all tokens are in one group
// positions: [num_layers, num_kv_heads, max_kept]; the first kept_tokens of a layer are written
// recent_ratio: fraction of the budget for the most recent tokens
extern "C" void vlc_select(const float* scores, const int64_t* num_tokens,
                           const int64_t* kept_tokens, const int64_t* precedence,
                           int32_t* positions, int64_t num_layers, int64_t num_kv_heads,
                           int64_t width, int64_t max_kept, double recent_ratio) {
#pragma omp parallel
  {
    const std::unique_ptr<Wide[]> keys(new Wide[width]);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < num_layers * num_kv_heads; ++i) {
      const int64_t kept = kept_tokens[i / num_kv_heads], end = num_tokens[i / num_kv_heads];
      const int64_t recent =
          std::ceil(std::nearbyint(kept * recent_ratio * 1e9) / 1e9);  // so that 0.1 * 30 is 3
      const float* own = scores + i * width;
      const auto plain = [&](int64_t token) { return order_key(own[token], token); };
      const auto preceding = [&](int64_t token) {
        const uint64_t group = static_cast<uint64_t>(precedence[token]) ^ (uint64_t{1} << 63);
        return Wide{group} << 64 | plain(token);
      };
      const int64_t candidates = end - recent, count = kept - recent;
      int32_t* to = positions + i * max_kept;
      if (precedence)
        keep<Wide>(preceding, candidates, end, count, keys.get(), to);
      else
        keep<uint64_t>(plain, candidates, end, count, reinterpret_cast<uint64_t*>(keys.get()), to);
    }
  }
}

// scores: [rows, num_tokens]
// ranks: [rows, num_tokens], index of each token in the order of its row
// A radix sort of the keys with their positions, 11 bits per pass: it keeps equal keys in the order
// of their positions, and takes a fraction of the time of a sort by comparison.
extern "C" void vlc_rank(const float* scores, int64_t* ranks, int64_t rows, int64_t num_tokens) {
  constexpr int kBits = 11, kPasses = 3, kBuckets = 1 << kBits;
#pragma omp parallel
  {
    struct Item {
      uint32_t key, position;
    };
    const std::unique_ptr<Item[]> buffer(new Item[2 * num_tokens]);
    const std::unique_ptr<int64_t[]> starts(new int64_t[kBuckets]);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      Item *from = buffer.get(), *to = from + num_tokens;
      for (int64_t i = 0; i < num_tokens; ++i)
        from[i] = {~ordered(scores[row * num_tokens + i]), static_cast<uint32_t>(i)};
      for (int pass = 0; pass < kPasses; ++pass) {
        const auto bucket = [&](Item item) { return item.key >> pass * kBits & (kBuckets - 1); };
        std::fill_n(starts.get(), kBuckets, 0);
        for (int64_t i = 0; i < num_tokens; ++i) ++starts[bucket(from[i])];
        int64_t total = 0;
        for (int b = 0; b < kBuckets; ++b) total += std::exchange(starts[b], total);
        for (int64_t i = 0; i < num_tokens; ++i) to[starts[bucket(from[i])]++] = from[i];
        std::swap(from, to);
      }
      for (int64_t i = 0; i < num_tokens; ++i) ranks[row * num_tokens + from[i].position] = i;
    }
  }
}
