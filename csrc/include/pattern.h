// Candidates of an N:M pattern, in lexicographic order of the kept positions (maskllm/patterns.py).
#pragma once

#include "platform.h"

namespace maskllm {

constexpr int kMaxM = 32;
constexpr int kMaxCandidates = 128;

// 2:4 and 1:4 are known at compile time, so loops over candidates unroll and their arrays live in registers.
struct TwoOfFour {
  static constexpr int m = 4, candidates = 6, capacity_m = 4, capacity = 6;
  // Bit j of the c-th group of four bits: candidate c keeps position j. 1100, 1010, 1001, 0110, 0101, 0011.
  MASKLLM_INLINE static constexpr bool keeps(int c, int j) { return 0xCA6953u >> (4 * c + j) & 1u; }
};

struct OneOfFour {
  static constexpr int m = 4, candidates = 4, capacity_m = 4, capacity = 4;
  MASKLLM_INLINE static constexpr bool keeps(int c, int j) { return c == j; }
};

// Any other pattern with at most kMaxCandidates candidates.
struct AnyPattern {
  static constexpr int capacity_m = kMaxM, capacity = kMaxCandidates;
  int m, candidates;
  uint32_t kept[kMaxCandidates];  // bit j of entry c: candidate c keeps position j

  MASKLLM_INLINE bool keeps(int c, int j) const { return kept[c] >> j & 1u; }
};

}  // namespace maskllm
