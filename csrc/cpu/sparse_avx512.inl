// The products with stored matrices for AVX-512. A file defines MASKLLM_SPARSE, the name of its table, and which extensions there are:
// MASKLLM_VNNI, MASKLLM_VBMI, MASKLLM_BF16; and includes this in a region with their targets (MASKLLM_TARGET_BEGIN).

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "../include/sparse_tables.h"
#include "sparse_kernels.h"

#if defined(MASKLLM_EMULATED)
#include "emulated.h"  // tests/ops/emulated: instructions that the processor lacks, as loops
#endif

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

MASKLLM_TARGET_BEGIN

namespace maskllm {
namespace {

constexpr int kIntKept = 64;
#if defined(MASKLLM_VNNI)
constexpr uint8_t kZero = 128;  // vpdpbusd multiplies unsigned numbers by signed ones: activations are stored 128 larger
#else
constexpr uint8_t kZero = 0;
#endif
#if defined(MASKLLM_BF16)
constexpr bool kBFloat16Products = true;
#else
constexpr bool kBFloat16Products = false;
#endif

enum class Grouping { kOne, kWide, kFine };

struct Picks {
  __m512i index;
  __mmask16 mask;
};

inline Picks picks_of(int groups) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_srl_epi32(lane, _mm_cvtsi32_si128(4 - __builtin_ctz(groups))), static_cast<__mmask16>((1u << groups) - 1)};
}

struct Groups;

inline uint32_t word32(const uint8_t* from) {
  uint32_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

constexpr int kOr = 0xfe, kOrAnd = 0xa8, kAndOr = 0xea;  // vpternlog of a, b, c: a | b | c; (a | b) & c; (a & b) | c

// 16 values as fp32.
template <Values V>
inline __m512 sixteen(const uint8_t* values) {
  if constexpr (V == Values::kFloat32) {
    return _mm512_loadu_ps(values);
  } else if constexpr (V == Values::kBFloat16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)values)), 16));
  } else {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)values));
  }
}

// 16 kept values in fp32. The activations come by vpermt2ps from two registers, or for 1:4 from four; all of one with dense values.
template <Places F, Values V>
struct FloatStep {
  using Vector = __m512;
  static constexpr int kKept = 16, kValueBytes = V == Values::kFloat32 ? 64 : 32, kPlaceBytes = F == Places::kAll ? 0 : 4;
  static constexpr int kInputBytes = F == Places::kAll ? 64 : (F == Places::kTwoOfFour ? 128 : 256);
  static constexpr bool kScaled = false;
  static constexpr int kRows = 4, kInputs = 4, kUnroll = 4;
  struct Loaded {
    __m512 values;
    __m512i index;
  };

  static Vector zero() { return _mm512_setzero_ps(); }
  static float sum(Vector v) { return _mm512_reduce_add_ps(v); }

  template <class G>
  static inline Loaded load(const G&, const uint8_t* values, [[maybe_unused]] const uint8_t* places, const float*) {
    if constexpr (F == Places::kAll) return {sixteen<V>(values), _mm512_setzero_si512()};
    const __m512i shift = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i base = F == Places::kTwoOfFour ? _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28)
                                                 : _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const __m512i bits = _mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(word32(places))), shift);
    return {sixteen<V>(values), _mm512_ternarylogic_epi32(bits, _mm512_set1_epi32(3), base, kAndOr)};
  }

  static inline Vector add(Vector sum, const Loaded& loaded, const uint8_t* inputs) {
    const auto* const x = reinterpret_cast<const float*>(inputs);
    if constexpr (F == Places::kAll) return _mm512_fmadd_ps(loaded.values, _mm512_loadu_ps(x), sum);
    __m512 gathered = _mm512_permutex2var_ps(_mm512_loadu_ps(x), loaded.index, _mm512_loadu_ps(x + 16));
    if constexpr (F == Places::kOneOfFour) {
      const __m512 high = _mm512_permutex2var_ps(_mm512_loadu_ps(x + 32), loaded.index, _mm512_loadu_ps(x + 48));
      gathered = _mm512_mask_blend_ps(0xff00, gathered, high);
    }
    return _mm512_fmadd_ps(loaded.values, gathered, sum);
  }
};

#if defined(MASKLLM_BF16)
// 32 kept values by vdpbf16ps; the activations come by vpermt2w.
template <Places F>
struct BFloat16Step {
  using Vector = __m512;
  static constexpr int kKept = 32, kValueBytes = 64, kPlaceBytes = 8, kInputBytes = F == Places::kTwoOfFour ? 128 : 256;
  static constexpr bool kScaled = false;
  static constexpr int kRows = 4, kInputs = 4, kUnroll = 4;
  struct Loaded {
    __m512i values, index;
  };

  static Vector zero() { return _mm512_setzero_ps(); }
  static float sum(Vector v) { return _mm512_reduce_add_ps(v); }

  template <class G>
  static inline Loaded load(const G&, const uint8_t* values, const uint8_t* places, const float*) {
    // Word i takes the eight bits from bit 2 i on.
    const __m512i field = _mm512_set_epi64(0x003e003c003a0038, 0x0036003400320030, 0x002e002c002a0028, 0x0026002400220020,
                                           0x001e001c001a0018, 0x0016001400120010, 0x000e000c000a0008, 0x0006000400020000);
    const __m512i base = F == Places::kTwoOfFour
                             ? _mm512_set_epi64(0x003c003c00380038, 0x0034003400300030, 0x002c002c00280028, 0x0024002400200020,
                                                0x001c001c00180018, 0x0014001400100010, 0x000c000c00080008, 0x0004000400000000)
                             : _mm512_set_epi64(0x003c003800340030, 0x002c002800240020, 0x001c001800140010, 0x000c000800040000,
                                                0x003c003800340030, 0x002c002800240020, 0x001c001800140010, 0x000c000800040000);
    uint64_t word;
    std::memcpy(&word, places, sizeof word);
    const __m512i bits = _mm512_multishift_epi64_epi8(field, _mm512_set1_epi64(static_cast<long long>(word)));
    return {_mm512_loadu_si512(values), _mm512_ternarylogic_epi32(bits, _mm512_set1_epi16(3), base, kAndOr)};
  }

  static inline Vector add(Vector sum, const Loaded& loaded, const uint8_t* inputs) {
    __m512i gathered = _mm512_permutex2var_epi16(_mm512_loadu_si512(inputs), loaded.index, _mm512_loadu_si512(inputs + 64));
    if constexpr (F == Places::kOneOfFour) {
      const __m512i high = _mm512_permutex2var_epi16(_mm512_loadu_si512(inputs + 128), loaded.index, _mm512_loadu_si512(inputs + 192));
      gathered = _mm512_mask_blend_epi16(0xffff0000u, gathered, high);
    }
    return _mm512_dpbf16_ps(sum, (__m512bh)gathered, (__m512bh)loaded.values);
  }
};
#endif

// Four products of bytes in each 32-bit sum: `numbers` from `quantize` (kZero larger) by signed `values`.
inline __m512i dot_bytes(__m512i sum, __m512i numbers, __m512i values) {
#if defined(MASKLLM_VNNI)
  return _mm512_dpbusd_epi32(sum, numbers, values);
#else
  const __m512i signed_values = _mm512_mask_sub_epi8(values, _mm512_movepi8_mask(numbers), _mm512_setzero_si512(), values);
  const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(numbers), signed_values);  // 2 * 127 * 127 fits
  return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}

// 64 kept integers. The activations come by vpermt2b (VBMI) or by vpshufb from tables of 16 columns.
template <Places F, Values V, Grouping G>
struct IntegerStep {
  using Vector = __m512;
  static constexpr int kKept = 64, kValueBytes = V == Values::kInt8 ? 64 : 32, kPlaceBytes = 16;
  static constexpr int kColumns = F == Places::kTwoOfFour ? 128 : 256, kInputBytes = kColumns + 64;
  static constexpr bool kScaled = G == Grouping::kOne;
  static constexpr int kRows = 2, kInputs = 4, kUnroll = 2;
  struct Loaded {
    __m512i values, index, offset;
    __m512 scale;
  };

  static Vector zero() { return _mm512_setzero_ps(); }
  static float sum(Vector v) { return _mm512_reduce_add_ps(v); }

  template <class Groups>
  static inline Loaded load(const Groups& groups, const uint8_t* values, const uint8_t* places, const float* scales) {
    Loaded loaded;
    if constexpr (V == Values::kInt8) {
      loaded.values = _mm512_loadu_si512(values);
    } else {
      const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)values));
      const __m512i nibbles =
          _mm512_ternarylogic_epi32(pairs, _mm512_slli_epi16(pairs, 4), _mm512_set1_epi8(15), kOrAnd);
      const __m512i numbers = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
      loaded.values = _mm512_shuffle_epi8(numbers, nibbles);
    }
#if defined(MASKLLM_VBMI)
    // Byte i takes the bits from bit 2 i on.
    const __m512i field = _mm512_set1_epi64(0x0e0c0a0806040200);
    const __m512i first = _mm512_setr_epi64(0x0c0c080804040000, 0x1c1c181814141010, 0x2c2c282824242020, 0x3c3c383834343030,
                                            0x4c4c484844444040, 0x5c5c585854545050, 0x6c6c686864646060, 0x7c7c787874747070);
    const __m512i each = _mm512_setr_epi64(0x1c1814100c080400, 0x3c3834302c282420, 0x5c5854504c484440, 0x7c7874706c686460,
                                           0x1c1814100c080400, 0x3c3834302c282420, 0x5c5854504c484440, 0x7c7874706c686460);
    const __m512i words = _mm512_cvtepu16_epi64(_mm_loadu_si128((const __m128i*)places));
    loaded.index = _mm512_ternarylogic_epi32(_mm512_multishift_epi64_epi8(field, words), _mm512_set1_epi8(3),
                                             F == Places::kTwoOfFour ? first : each, kAndOr);
#else
    const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)places));
    const __m512i three = _mm512_ternarylogic_epi32(b, _mm512_slli_epi32(b, 6), _mm512_slli_epi32(b, 12), kOr);
    const __m512i bits = _mm512_ternarylogic_epi32(three, _mm512_slli_epi32(b, 18), _mm512_set1_epi8(3), kOrAnd);
    const __m512i base = F == Places::kTwoOfFour ? _mm512_set_epi32(0x0c0c0808, 0x04040000, 0x0c0c0808, 0x04040000, 0x0c0c0808,
                                                                    0x04040000, 0x0c0c0808, 0x04040000, 0x0c0c0808, 0x04040000,
                                                                    0x0c0c0808, 0x04040000, 0x0c0c0808, 0x04040000, 0x0c0c0808,
                                                                    0x04040000)
                                                 : _mm512_set1_epi32(0x0c080400);
    loaded.index = _mm512_or_si512(bits, base);
#endif
#if defined(MASKLLM_VNNI)
    const __m512i sums = dot_bytes(_mm512_setzero_si512(), _mm512_set1_epi8(static_cast<char>(kZero)), loaded.values);
    loaded.offset = _mm512_sub_epi32(_mm512_setzero_si512(), sums);
#else
    loaded.offset = _mm512_setzero_si512();
#endif
    if constexpr (G == Grouping::kWide) loaded.scale = _mm512_set1_ps(*scales);
    if constexpr (G == Grouping::kFine) {
      loaded.scale = _mm512_permutexvar_ps(groups.picks.index, _mm512_maskz_loadu_ps(groups.picks.mask, scales));
    }
    return loaded;
  }

  static inline Vector add(Vector sum, const Loaded& loaded, const uint8_t* inputs) {
    const __m512i index = loaded.index;
    __m512i gathered;
#if defined(MASKLLM_VBMI)
    gathered = _mm512_permutex2var_epi8(_mm512_loadu_si512(inputs), index, _mm512_loadu_si512(inputs + 64));
    if constexpr (F == Places::kOneOfFour) {
      const __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(inputs + 128), index, _mm512_loadu_si512(inputs + 192));
      gathered = _mm512_mask_blend_epi32(0xff00, gathered, high);
    }
#else
    gathered = _mm512_shuffle_epi8(_mm512_loadu_si512(inputs), index);
    if constexpr (F == Places::kTwoOfFour) {
      gathered = _mm512_mask_shuffle_epi8(gathered, 0xff00ff00ff00ff00, _mm512_loadu_si512(inputs + 64), index);
    } else {
      gathered = _mm512_mask_shuffle_epi8(gathered, 0x00f000f000f000f0, _mm512_loadu_si512(inputs + 64), index);
      gathered = _mm512_mask_shuffle_epi8(gathered, 0x0f000f000f000f00, _mm512_loadu_si512(inputs + 128), index);
      gathered = _mm512_mask_shuffle_epi8(gathered, 0xf000f000f000f000, _mm512_loadu_si512(inputs + 192), index);
    }
#endif
    __m512 scale = _mm512_loadu_ps(inputs + kColumns);
    if constexpr (G != Grouping::kOne) scale = _mm512_mul_ps(scale, loaded.scale);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot_bytes(loaded.offset, gathered, loaded.values)), scale, sum);
  }
};

// The order of a step's activations: as they are for vpermt2b; else 16 columns of each lane in a table of their own.
template <int columns>
void arrange(const uint8_t* numbers, uint8_t* to) {
#if defined(MASKLLM_VBMI)
  std::memcpy(to, numbers, columns);
#else
  constexpr int tables = columns / 64;
  for (int lane = 0; lane < 4; ++lane) {
    for (int table = 0; table < tables; ++table) std::memcpy(to + 64 * table + 16 * lane, numbers + 16 * (tables * lane + table), 16);
  }
#endif
}

// 16 columns of a row: the values from `index` on, spread to the columns of `mask`.
template <Values V>
inline void expand_16(const uint8_t* values, int64_t index, uint32_t mask, float scale, float* to) {
  __m512 numbers;
  if constexpr (V == Values::kInt8 || V == Values::kInt4) {
    const __m512i whole = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(values + index)));
    numbers = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(scale));
  } else {
    numbers = sixteen<V>(values + index * (V == Values::kFloat32 ? 4 : 2));
  }
  _mm512_storeu_ps(to, _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), numbers));
}

inline float dot(const float* a, const float* b, int64_t count) {
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    for (int u = 0; u < 4; ++u) sums[u] = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16 * u), _mm512_loadu_ps(b + i + 16 * u), sums[u]);
  }
  for (; i < count; i += 16) sums[0] = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), sums[0]);
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

template <Places F, class G>
void bf16_product(const SparseMatrix& matrix, const G& groups, const Product& product, int64_t begin, int64_t end);

#include "sparse_loops.inl"

template <Places F, class G>
void bf16_product([[maybe_unused]] const SparseMatrix& matrix, [[maybe_unused]] const G& groups, [[maybe_unused]] const Product& product,
                  [[maybe_unused]] int64_t begin, [[maybe_unused]] int64_t end) {
#if defined(MASKLLM_BF16)
  product_of<BFloat16Step<F>>(matrix, groups, product, begin, end);
#endif
}

#if defined(MASKLLM_BF16)
// 16 integers times a scale, rounded to the nearest bf16 numbers.
inline __m256i scaled_words(const uint8_t* integers, float scale) {
  const __m512i whole = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)integers));
  return (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(scale)));
}

inline __m512i first_bytes(const uint8_t* from, int64_t bytes) {
  return _mm512_maskz_loadu_epi8(bytes >= 64 ? ~uint64_t{0} : (uint64_t{1} << bytes) - 1, from);
}

// The columns that places of 2:4 keep, a bit each, as a bitmask has them.
inline __m512i two_of_four_bits(const uint8_t* places, int64_t bytes) {
  // A half byte holds two columns of four; the table has the bits of the two.
  const __m512i low = _mm512_broadcast_i32x4(_mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8));
  const __m512i high = _mm512_slli_epi16(low, 4), half = _mm512_set1_epi8(15), both = first_bytes(places, bytes);
  return _mm512_or_si512(_mm512_shuffle_epi8(low, _mm512_and_si512(both, half)),
                         _mm512_shuffle_epi8(high, _mm512_and_si512(_mm512_srli_epi16(both, 4), half)));
}

// The first 32 (2:4 and 1:4 in integers: 16) values as bf16 numbers.
template <Places F, Values V>
inline __m512i words_of(const uint8_t* values, float scale) {
  if constexpr (V == Values::kBFloat16) return _mm512_loadu_si512(values);
  const __m512i words = _mm512_castsi256_si512(scaled_words(values, scale));
  return F == Places::kBitmask ? _mm512_inserti64x4(words, scaled_words(values + 16, scale), 1) : words;
}

// Columns [column, column + kPart) of a row as bf16 numbers, 32 at a time by vpexpandw.
template <Places F, Values V>
void expand_words(const SparseMatrix& matrix, int64_t row, int64_t column, int64_t& index, uint16_t* to, bool whole) {
  constexpr int kBytes = V == Values::kBFloat16 ? 2 : 1;
  constexpr int64_t kMost = F == Places::kTwoOfFour ? kPart / 2 : (F == Places::kOneOfFour ? kPart / 4 : kPart);  // values
  const int64_t columns = std::min(kPart, matrix.in - column);
  // The bits of the columns that are kept, and all kept values, with zeros after them.
  const uint8_t* const places = matrix.row_places(row) + (F == Places::kOneOfFour ? column / 16 : column / 8);
  const uint8_t* values = matrix.values + index * kBytes;
  const float* const scales = matrix.scales + row * matrix.groups;
  alignas(64) uint32_t bits[16];
  [[maybe_unused]] alignas(64) int8_t numbers[kPart + 64];
  const int64_t bytes = (columns + 7) / 8, all = matrix.all_values - index;
  if constexpr (F == Places::kTwoOfFour) {
    _mm512_store_si512(bits, two_of_four_bits(places, bytes));
  } else if constexpr (F == Places::kBitmask) {
    _mm512_store_si512(bits, first_bytes(places, bytes));
  } else {
    const __m512i bytes_of = first_bytes(places, (columns + 15) / 16);
    alignas(64) uint8_t of_16[64];
    _mm512_store_si512(of_16, bytes_of);
    for (int i = 0; i < kPart / 32; ++i) bits[i] = kOneOfFourMask[of_16[2 * i]] | kOneOfFourMask[of_16[2 * i + 1]] << 16;
  }
  if (columns < kPart) bits[columns / 32] &= (1u << columns % 32) - 1;  // a last block of places may be half of a byte
  constexpr int64_t kNext = V == Values::kInt4 ? kMost / 2 : kMost * kBytes;  // bytes to the next part
  __builtin_prefetch(places + kPart / 8, 0, 2);
  if constexpr (V == Values::kInt4) {
    values = matrix.values + index / 2;
    for (int64_t line = 0; line < kNext; line += 64) __builtin_prefetch(values + kNext + line, 0, 2);
    unpack_nibbles(matrix.values, index, std::min(all, kMost), numbers);
    values = reinterpret_cast<const uint8_t*>(numbers);
  }
  int64_t taken = 0;
  for (int64_t step = 0; 32 * step < columns; ++step) {
    const uint8_t* from = values + taken * kBytes;
    if constexpr (V != Values::kInt4) __builtin_prefetch(from + kNext, 0, 2);
    alignas(64) uint8_t last[64];
    if (V != Values::kInt4 && taken + 32 > all) {
      std::memset(last, 0, sizeof last);
      std::memcpy(last, from, std::max<int64_t>(0, all - taken) * kBytes);
      from = last;
    }
    __m512i words = words_of<F, V>(from, V == Values::kBFloat16 ? 1.0f : scales[(column + 32 * step) / matrix.group_size]);
    asm("" : "+v"(words));  // of a number in memory, vpexpandw takes ten times as long
    words = _mm512_maskz_expand_epi16(bits[step], words);
    if (whole || 32 * step + 32 <= columns) {
      _mm512_storeu_si512(to + 32 * step, words);
    } else {
      _mm512_mask_storeu_epi16(to + 32 * step, (1u << columns % 32) - 1, words);
    }
    taken += F == Places::kTwoOfFour ? 16 : (F == Places::kOneOfFour ? 8 : __builtin_popcount(bits[step]));
  }
  index += taken;
}

template <Places F>
ExpandPart expand_form_to_words(const SparseMatrix& matrix) {
  if (matrix.type == Values::kBFloat16) return expand_words<F, Values::kBFloat16>;
  if (matrix.groups > 1 && matrix.group_size % 32 != 0) return nullptr;  // 32 columns have more than one scale
  if (matrix.type == Values::kInt8) return expand_words<F, Values::kInt8>;
  return matrix.type == Values::kInt4 ? expand_words<F, Values::kInt4> : nullptr;
}
#endif

ExpandPart expand_to_words([[maybe_unused]] const SparseMatrix& matrix) {
#if defined(MASKLLM_BF16)
  if (matrix.form == Places::kTwoOfFour) return expand_form_to_words<Places::kTwoOfFour>(matrix);
  if (matrix.form == Places::kOneOfFour) return expand_form_to_words<Places::kOneOfFour>(matrix);
  return expand_form_to_words<Places::kBitmask>(matrix);
#else
  return nullptr;
#endif
}

void expand_row(const SparseMatrix& matrix, int64_t row, Type type, void* to, float* scratch) {
  const ExpandPart expand_part = type == Type::kBFloat16 ? expand_to_words(matrix) : nullptr;
  if (expand_part == nullptr) return expand(matrix, row, type, to, scratch);
  int64_t index = matrix.first_value(row);
  for (int64_t column = 0; column < matrix.in; column += kPart) {
    expand_part(matrix, row, column, index, static_cast<uint16_t*>(to) + column, false);
  }
}

}  // namespace

const SparseKernels MASKLLM_SPARSE = {kFewRows, inputs, row_bytes, prepare, linear, expand_row, expand_to_words};

}  // namespace maskllm

MASKLLM_TARGET_END
