// Instructions of AVX-512 VNNI, VBMI, VBMI2 and BF16 and of AMX as loops, so that a processor with plain AVX-512 can run the code that uses
// them.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define EMULATED static __attribute__((noinline, unused, target("avx512f,avx512bw")))

template <class T>
struct Lanes {
  T lane[64 / sizeof(T)];
};

template <class T, class V>
EMULATED Lanes<T> lanes_of(V vector) {
  Lanes<T> lanes;
  std::memcpy(&lanes, &vector, sizeof lanes);
  return lanes;
}

template <class V, class T>
EMULATED V vector_of(const Lanes<T>& lanes) {
  V vector;
  std::memcpy(&vector, &lanes, sizeof vector);
  return vector;
}

// Bit 6 of an index selects the second table.
EMULATED __m512i emulated_permutex2var_epi8(__m512i a, __m512i index, __m512i b) {
  const auto low = lanes_of<uint8_t>(a), high = lanes_of<uint8_t>(b), at = lanes_of<uint8_t>(index);
  Lanes<uint8_t> result;
  for (int i = 0; i < 64; ++i) result.lane[i] = at.lane[i] & 64 ? high.lane[at.lane[i] & 63] : low.lane[at.lane[i] & 63];
  return vector_of<__m512i>(result);
}

// Each byte takes eight bits of its quadword, from the bit that its control names, around the end.
EMULATED __m512i emulated_multishift_epi64_epi8(__m512i control, __m512i quadwords) {
  const auto at = lanes_of<uint8_t>(control);
  const auto words = lanes_of<uint64_t>(quadwords);
  Lanes<uint8_t> result;
  for (int i = 0; i < 64; ++i) {
    const int shift = at.lane[i] & 63;
    const uint64_t word = words.lane[i / 8];
    result.lane[i] = static_cast<uint8_t>(shift == 0 ? word : word >> shift | word << (64 - shift));
  }
  return vector_of<__m512i>(result);
}

EMULATED __m512i emulated_dpbusd_epi32(__m512i sums, __m512i unsigned_bytes, __m512i signed_bytes) {
  auto result = lanes_of<int32_t>(sums);
  const auto a = lanes_of<uint8_t>(unsigned_bytes);
  const auto b = lanes_of<int8_t>(signed_bytes);
  for (int i = 0; i < 64; ++i) result.lane[i / 4] += a.lane[i] * b.lane[i];
  return vector_of<__m512i>(result);
}

template <class A, class B>
EMULATED __m512 emulated_dpbf16_ps(__m512 sums, A first, B second) {
  auto result = lanes_of<float>(sums);
  const auto a = lanes_of<uint16_t>(first), b = lanes_of<uint16_t>(second);
  for (int i = 0; i < 32; ++i) {
    const uint32_t x = static_cast<uint32_t>(a.lane[i]) << 16, y = static_cast<uint32_t>(b.lane[i]) << 16;
    float u, v;
    std::memcpy(&u, &x, 4);
    std::memcpy(&v, &y, 4);
    result.lane[i / 2] += u * v;
  }
  return vector_of<__m512>(result);
}

EMULATED __m512i emulated_maskz_expand_epi16(uint32_t mask, __m512i words) {
  const auto from = lanes_of<uint16_t>(words);
  Lanes<uint16_t> result{};
  for (int i = 0, next = 0; i < 32; ++i) {
    if (mask >> i & 1) result.lane[i] = from.lane[next++];
  }
  return vector_of<__m512i>(result);
}

// Rounds to the nearest, to even ones in a tie.
EMULATED __m256i emulated_cvtneps_pbh(__m512 numbers) {
  const auto bits = lanes_of<uint32_t>(numbers);
  uint16_t words[16];
  for (int i = 0; i < 16; ++i) {
    const bool nan = (bits.lane[i] & 0x7fffffff) > 0x7f800000;
    words[i] = static_cast<uint16_t>((nan ? bits.lane[i] | 0x400000 : bits.lane[i] + 0x7fff + (bits.lane[i] >> 16 & 1)) >> 16);
  }
  __m256i vector;
  std::memcpy(&vector, words, sizeof vector);
  return vector;
}

// Eight tiles of 16 rows of 64 bytes, and what was last given to _tile_loadconfig; palette 0 without.
struct EmulatedTile {
  uint8_t row[16][64];
};
static EmulatedTile emulated_tile[8];
static uint8_t emulated_tile_config[64];

EMULATED void emulated_tile_loadconfig(const void* from) { std::memcpy(emulated_tile_config, from, 64); }
EMULATED void emulated_tile_storeconfig(void* to) { std::memcpy(to, emulated_tile_config, 64); }
EMULATED void emulated_tile_release() { std::memset(emulated_tile_config, 0, 64); }

// Without a configuration of whole tiles, a tile has no contents.
EMULATED void emulated_tile_loadd(int tile, const void* from, int64_t stride) {
  const bool whole = emulated_tile_config[0] == 1 && emulated_tile_config[16 + 2 * tile] == 64 && emulated_tile_config[48 + tile] == 16;
  std::memset(emulated_tile[tile].row, 0xff, sizeof(EmulatedTile));
  for (int i = 0; whole && i < 16; ++i) std::memcpy(emulated_tile[tile].row[i], static_cast<const uint8_t*>(from) + i * stride, 64);
}

EMULATED void emulated_tile_stored(int tile, void* to, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<uint8_t*>(to) + i * stride, emulated_tile[tile].row[i], 64);
}

EMULATED void emulated_tile_zero(int tile) { std::memset(emulated_tile[tile].row, 0, sizeof(EmulatedTile)); }

EMULATED float emulated_bf16(const uint8_t* row, int number) {
  uint32_t bits = static_cast<uint32_t>(row[2 * number]) << 16 | static_cast<uint32_t>(row[2 * number + 1]) << 24;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

EMULATED void emulated_tile_dpbf16ps(int sums, int a, int b) {
  for (int m = 0; m < 16; ++m) {
    float row[16];
    std::memcpy(row, emulated_tile[sums].row[m], 64);
    for (int k = 0; k < 32; ++k) {
      for (int n = 0; n < 16; ++n) {
        row[n] += emulated_bf16(emulated_tile[a].row[m], k) * emulated_bf16(emulated_tile[b].row[k / 2], 2 * n + k % 2);
      }
    }
    std::memcpy(emulated_tile[sums].row[m], row, 64);
  }
}

#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_tile_loadconfig
#define _tile_storeconfig emulated_tile_storeconfig
#define _tile_release emulated_tile_release
#define _tile_loadd emulated_tile_loadd
#define _tile_stored emulated_tile_stored
#define _tile_zero emulated_tile_zero
#define _tile_dpbf16ps emulated_tile_dpbf16ps
#define _mm512_cvtneps_pbh emulated_cvtneps_pbh
#define _mm512_permutex2var_epi8 emulated_permutex2var_epi8
#define _mm512_multishift_epi64_epi8 emulated_multishift_epi64_epi8
#define _mm512_dpbusd_epi32 emulated_dpbusd_epi32
#define _mm512_dpbf16_ps emulated_dpbf16_ps
#define _mm512_maskz_expand_epi16 emulated_maskz_expand_epi16
