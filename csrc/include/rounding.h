// Random 16-bit numbers for stochastic rounding, one per logit. Each Philox call of a block gives eight.
#pragma once

#include "philox.h"

namespace maskllm {

constexpr int kRoundingsPerCall = 8;

MASKLLM_INLINE void rounding_of_block(const Key& key, int64_t global_block, int candidates, int32_t* to) {
  for (int first = 0; first < candidates; first += kRoundingsPerCall) {
    const uint32_t call = static_cast<uint32_t>(first / kRoundingsPerCall);
    const Words c = philox({counter_low(global_block), counter_high(global_block) | call << 24, key.sample_low, key.sample_high},
                           key.low, key.high);
    const uint32_t words[4] = {c.w0, c.w1, c.w2, c.w3};
    MASKLLM_UNROLL
    for (int k = 0; k < kRoundingsPerCall; ++k) {
      if (first + k < candidates) to[first + k] = static_cast<int32_t>(words[k / 2] >> (k % 2 * 16) & 0xffffu);
    }
  }
}

}  // namespace maskllm
