// The winners of blocks, as the bits of patterns.pack_mask: row by row, high bit first.
#pragma once

#include "pattern.h"
#include "storage.h"

namespace maskllm {

// Index of the largest logit, the lowest index of equal ones.
template <class Value>
MASKLLM_INLINE int winner_of(const Value* logits, int candidates) {
  int best = 0;
  float largest = load(logits[0]);
  for (int c = 1; c < candidates; ++c) {
    const float value = load(logits[c]);
    best = value > largest ? c : best;
    largest = value > largest ? value : largest;
  }
  return best;
}

// Byte `byte` of the mask bits of a row with `blocks` blocks. `row` points to the row's logits.
template <class Value>
MASKLLM_INLINE uint8_t winner_byte(const AnyPattern& p, const Value* row, int64_t blocks, int64_t byte) {
  uint8_t bits = 0;
  int64_t block = byte * 8 / p.m;
  int position = static_cast<int>(byte * 8 - block * p.m);
  uint32_t kept = 0;
  bool known = false;
  for (int bit = 7; bit >= 0 && block < blocks; --bit) {
    if (!known) {
      kept = p.kept[winner_of(row + block * p.candidates, p.candidates)];
      known = true;
    }
    bits |= static_cast<uint8_t>((kept >> position & 1u) << bit);
    if (++position == p.m) {
      position = 0;
      ++block;
      known = false;
    }
  }
  return bits;
}

}  // namespace maskllm
