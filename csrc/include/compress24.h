// A 2:4 block as two values and their positions. Works on the elements' bits. maskllm/ops/compress24.py documents the layout.
#pragma once

#include "platform.h"

namespace maskllm {

// The kind of the elements: integers have one zero, floats have two.
enum class Number : int { kInteger, kFloat };

// The bits that make an element non-zero: all bits, for floats without the sign.
template <class Bits>
MASKLLM_INLINE Bits magnitude_bits(Number number) {
  return number == Number::kFloat ? static_cast<Bits>(static_cast<Bits>(~Bits{0}) >> 1) : static_cast<Bits>(~Bits{0});
}

// Positions (p0 | p1 << 2, p0 < p1) of the two kept elements: non-zeros first, then negative zeros, then positive zeros.
// 0xff if more than two elements are non-zero.
template <class Bits>
MASKLLM_INLINE uint8_t positions_of(const Bits* block, Bits magnitude) {
  uint32_t kept = 0;
  int count = 0;
  for (int j = 0; j < 4; ++j) {
    const bool nonzero = (block[j] & magnitude) != 0;
    kept |= static_cast<uint32_t>(nonzero) << j;
    count += nonzero;
  }
  if (count > 2) return 0xff;
  for (int pass = 0; pass < 2; ++pass) {
    for (int j = 0; j < 4; ++j) {
      const bool take = count < 2 && !(kept >> j & 1u) && (pass == 1 || block[j] != 0);
      kept |= static_cast<uint32_t>(take) << j;
      count += take;
    }
  }
  const int first = kept & 1u ? 0 : (kept & 2u ? 1 : 2);
  const int last = kept & 8u ? 3 : (kept & 4u ? 2 : 1);
  return static_cast<uint8_t>(first | last << 2);
}

// Writes byte `byte` of a row's metadata, and the values of its blocks 2 * byte (low half) and 2 * byte + 1 (high half). Returns false
// if one of them is not 2:4; `violation` is then its index in the row of `blocks` blocks.
template <class Bits>
MASKLLM_INLINE bool compress_pair(const Bits* row, int64_t blocks, int64_t byte, Bits magnitude, Bits* values, uint8_t* metadata,
                                  int64_t& violation) {
  uint8_t packed = 0;
  for (int half = 0; half < 2; ++half) {
    const int64_t block = 2 * byte + half;
    if (block >= blocks) break;
    const uint8_t positions = positions_of(row + 4 * block, magnitude);
    if (positions == 0xff) {
      violation = block;
      return false;
    }
    values[2 * block] = row[4 * block + (positions & 3)];
    values[2 * block + 1] = row[4 * block + (positions >> 2)];
    packed |= static_cast<uint8_t>(positions << 4 * half);
  }
  metadata[byte] = packed;
  return true;
}

// Restores block `block` of a row from its two values and its metadata.
template <class Bits>
MASKLLM_INLINE void decompress_block(const Bits* values, const uint8_t* metadata, int64_t block, Bits* row) {
  const uint8_t positions = metadata[block / 2] >> 4 * (block & 1) & 0xf;
  for (int j = 0; j < 4; ++j) row[4 * block + j] = 0;
  row[4 * block + (positions & 3)] = values[2 * block];
  row[4 * block + (positions >> 2)] = values[2 * block + 1];
}

// The number of non-zeros in a block of m elements.
template <class Bits>
MASKLLM_INLINE int nonzeros(const Bits* block, int m, Bits magnitude) {
  int count = 0;
  for (int j = 0; j < m; ++j) count += (block[j] & magnitude) != 0;
  return count;
}

}  // namespace maskllm
