// What benchmarks/sparse_linear.py compares with: reading memory, and the product of one row with a dense int8 matrix by the loop of the
// sparse one (8-bit activations with a scale for 128 columns, vpdpbusd). Compiled for the machine at hand, on torch's OpenMP threads.
#include <cstdint>
#include <cstring>

#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

// The sum of the bytes as 64-bit words, so that the reads cannot be left out.
extern "C" uint64_t read_words(const uint64_t* words, int64_t count) {
  uint64_t sum = 0;
#pragma omp parallel for reduction(+ : sum) schedule(static)
  for (int64_t block = 0; block < count / 64; ++block) {
    const uint64_t* const from = words + 64 * block;
    for (int line = 0; line < 64; line += 8) __builtin_prefetch(from + 256 + line);  // 2 KiB further on, beyond the end of a page
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < 64; ++i) sum += from[i];
  }
  for (int64_t i = count / 64 * 64; i < count; ++i) sum += words[i];
  return sum;
}

// result[row] = row_scales[row] * sum over blocks of 128 columns of scales[block] * (weight . (numbers - 128)). `in` is a multiple of 128.
extern "C" void dense_int8(const int8_t* weight, const uint8_t* numbers, const float* scales, const float* row_scales, int64_t out,
                           int64_t in, float* result) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < out; ++row) {
    const int8_t* const w = weight + row * in;
#if defined(__AVX512VNNI__)
    __m512 sums = _mm512_setzero_ps();
    const __m512i zero = _mm512_set1_epi8(-128);
    for (int64_t column = 0; column < in; column += 128) {
      __builtin_prefetch(w + column + 2048);
      __builtin_prefetch(w + column + 2112);
      const __m512i a = _mm512_loadu_si512(w + column), b = _mm512_loadu_si512(w + column + 64);
      __m512i products = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(numbers + column), a);
      products = _mm512_dpbusd_epi32(products, _mm512_loadu_si512(numbers + column + 64), b);
      __m512i offset = _mm512_dpbusd_epi32(_mm512_setzero_si512(), zero, a);
      offset = _mm512_dpbusd_epi32(offset, zero, b);
      const __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(products, offset));
      sums = _mm512_fmadd_ps(whole, _mm512_set1_ps(scales[column / 128]), sums);
    }
    result[row] = _mm512_reduce_add_ps(sums) * row_scales[row];
#else
    float sum = 0;
    for (int64_t column = 0; column < in; column += 128) {
      int32_t whole = 0;
      for (int i = 0; i < 128; ++i) whole += w[column + i] * (numbers[column + i] - 128);
      sum += static_cast<float>(whole) * scales[column / 128];
    }
    result[row] = sum * row_scales[row];
#endif
  }
}
