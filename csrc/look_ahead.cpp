// SPDX-License-Identifier: Apache-2.0
// The decayed running maximum of the scores along the tokens. The specification is
// vl_cache_vllm/ops/look_ahead.py, which explains frames and factors.

#include <algorithm>
#include <cstdint>

// scores, inherited: [rows, num_tokens]
// growth, shrinkage: [frame], factors of the tokens of a frame
// of_frame: factor from one frame to the next
extern "C" void vlc_look_ahead(const float* scores, const double* growth, const double* shrinkage,
                               float* inherited, int64_t rows, int64_t num_tokens, int64_t frame,
                               double of_frame) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    double best = 0.0;
    for (int64_t start = 0; start < num_tokens; start += frame) {
      const float* from = scores + row * num_tokens + start;
      float* to = inherited + row * num_tokens + start;
      for (int64_t i = 0; i < std::min(frame, num_tokens - start); ++i) {
        best = std::max(best, from[i] * growth[i]);
        to[i] = static_cast<float>(best * shrinkage[i]);
      }
      best *= of_frame;
    }
  }
}
