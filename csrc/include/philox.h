// The noise, from Philox-4x32-10 (Salmon et al., SC 2011). maskllm/ops/noise.py documents the counter and the bit fields.
#pragma once

#include "elementary.h"

namespace maskllm {

constexpr int kDrawsPerCall = 6;

struct Key {
  uint32_t low, high;                // of the layer's key
  uint32_t sample_low, sample_high;  // of the global sample index
};

// k + 0.5, exact for k < 2^21: k becomes the low bits of 2^23 + k. On GPUs this is much faster than an integer conversion.
MASKLLM_INLINE float draw_of(uint32_t k) { return float_of(0x4b000000u | k) - 8388607.5f; }

struct Words {
  uint32_t w0, w1, w2, w3;
};

MASKLLM_INLINE Words philox(Words c, uint32_t k0, uint32_t k1) {
  MASKLLM_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c.w0) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c.w2) * 0xCD9E8D57u;
    c = {static_cast<uint32_t>(p1 >> 32) ^ c.w1 ^ k0, static_cast<uint32_t>(p1), static_cast<uint32_t>(p0 >> 32) ^ c.w3 ^ k1,
         static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// One call per block for W blocks: the six 21-bit draws of candidates 6 * call to 6 * call + 5, as floats k + 0.5 (exact).
template <int W>
MASKLLM_INLINE void draw_six(const Key& key, const uint32_t (&block_low)[W], const uint32_t (&block_high)[W], int call,
                             float (&draw)[kDrawsPerCall][W]) {
  MASKLLM_LANES
  for (int i = 0; i < W; ++i) {
    const Words c = philox({block_low[i], block_high[i] | static_cast<uint32_t>(call) << 24, key.sample_low, key.sample_high},
                           key.low, key.high);
    constexpr uint32_t mask = (1u << 21) - 1;
    draw[0][i] = draw_of(c.w0 & mask);
    draw[1][i] = draw_of((c.w0 >> 21 | c.w1 << 11) & mask);
    draw[2][i] = draw_of(c.w1 >> 10 & mask);
    draw[3][i] = draw_of(c.w2 & mask);
    draw[4][i] = draw_of((c.w2 >> 21 | c.w3 << 11) & mask);
    draw[5][i] = draw_of(c.w3 >> 10 & mask);
  }
}

// Standard Gumbel noise -log(-log u) from a draw k + 0.5, with u = (k + 0.5) 2^-21.
MASKLLM_INLINE float gumbel_of(float draw) { return -log_of(-log_of(draw * 4.76837158203125e-7f)); }

// Maps the blocks of a shard to their places in the unsharded tensor (maskllm.ops.noise.ShardMap).
struct Shard {
  int64_t blocks;  // in a local row
  int64_t blocks_per_row, block_offset, row_offset, split_row, split_offset;

  MASKLLM_INLINE int64_t global_block(int64_t row, int64_t column) const {
    const int64_t global_row = row < split_row ? row_offset + row : split_offset + (row - split_row);
    return global_row * blocks_per_row + block_offset + column;
  }
};

MASKLLM_INLINE uint32_t counter_low(int64_t block) { return static_cast<uint32_t>(block); }
MASKLLM_INLINE uint32_t counter_high(int64_t block) { return static_cast<uint32_t>(block >> 32) & 0xffffffu; }

}  // namespace maskllm
