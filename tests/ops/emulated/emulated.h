// Instructions of AVX-512 VNNI, VBMI, VBMI2 and BF16 as loops, so that a processor with plain AVX-512 can run the code that uses them.
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

#define _mm512_permutex2var_epi8 emulated_permutex2var_epi8
#define _mm512_multishift_epi64_epi8 emulated_multishift_epi64_epi8
#define _mm512_dpbusd_epi32 emulated_dpbusd_epi32
#define _mm512_dpbf16_ps emulated_dpbf16_ps
#define _mm512_maskz_expand_epi16 emulated_maskz_expand_epi16
