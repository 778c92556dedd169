// Tables from bytes of `places` to the columns that they keep.
#pragma once

#include <array>
#include <cstdint>

namespace maskllm {

// Bit c of entry b: a byte b of 2:4 places keeps column c of eight.
inline constexpr std::array<uint8_t, 256> kTwoOfFourMask = [] {
  std::array<uint8_t, 256> table{};
  for (int b = 0; b < 256; ++b) {
    table[b] = static_cast<uint8_t>(1 << (b & 3) | 1 << (b >> 2 & 3) | 16 << (b >> 4 & 3) | 16 << (b >> 6));
  }
  return table;
}();

// Bit c of entry b: a byte b of 1:4 places keeps column c of sixteen.
inline constexpr std::array<uint16_t, 256> kOneOfFourMask = [] {
  std::array<uint16_t, 256> table{};
  for (int b = 0; b < 256; ++b) {
    table[b] = static_cast<uint16_t>(1 << (b & 3) | 16 << (b >> 2 & 3) | 256 << (b >> 4 & 3) | 4096 << (b >> 6));
  }
  return table;
}();

// Entry b: for each of eight columns, which of the values that b keeps is its value; 0x80 if b does not keep the column.
inline constexpr std::array<std::array<uint8_t, 8>, 256> kRankOfColumn = [] {
  std::array<std::array<uint8_t, 8>, 256> table{};
  for (int b = 0; b < 256; ++b) {
    uint8_t rank = 0;
    for (int c = 0; c < 8; ++c) table[b][c] = b >> c & 1 ? rank++ : 0x80;
  }
  return table;
}();

}  // namespace maskllm
