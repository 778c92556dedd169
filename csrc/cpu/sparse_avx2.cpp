// The products with stored matrices for AVX2, FMA and F16C.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "../include/sparse_tables.h"
#include "../include/target.h"
#include "sparse_kernels.h"

MASKLLM_TARGET_REGION("avx2,fma,f16c")

namespace maskllm {
namespace {

constexpr int kIntKept = 32;
constexpr uint8_t kZero = 0;
constexpr bool kBFloat16Products = false;

enum class Grouping { kOne, kWide, kFine };

struct Picks {
  __m256i index, mask;
};

inline Picks picks_of(int groups) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_srl_epi32(lane, _mm_cvtsi32_si128(3 - __builtin_ctz(groups))), _mm256_cmpgt_epi32(_mm256_set1_epi32(groups), lane)};
}

struct Groups;

inline float sum_of(__m256 v) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// 8 values as fp32.
template <Values V>
inline __m256 eight(const uint8_t* values) {
  if constexpr (V == Values::kFloat32) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(values));
  } else if constexpr (V == Values::kBFloat16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)values)), 16));
  } else {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)values));
  }
}

// 8 kept values in fp32. The activations come by vpermps from registers of eight columns each, which are blended.
template <Places F, Values V>
struct FloatStep {
  using Vector = __m256;
  static constexpr int kKept = 8, kValueBytes = V == Values::kFloat32 ? 32 : 16, kPlaceBytes = F == Places::kAll ? 0 : 2;
  static constexpr int kInputBytes = F == Places::kAll ? 32 : (F == Places::kTwoOfFour ? 64 : 128);
  static constexpr bool kScaled = false;
  static constexpr int kRows = 2, kInputs = 2, kUnroll = 4;
  struct Loaded {
    __m256 values;
    __m256i index;
  };

  static Vector zero() { return _mm256_setzero_ps(); }
  static float sum(Vector v) { return sum_of(v); }

  template <class G>
  static inline Loaded load(const G&, const uint8_t* values, [[maybe_unused]] const uint8_t* places, const float*) {
    if constexpr (F == Places::kAll) return {eight<V>(values), _mm256_setzero_si256()};
    uint16_t word;
    std::memcpy(&word, places, sizeof word);
    const __m256i base =
        F == Places::kTwoOfFour ? _mm256_setr_epi32(0, 0, 4, 4, 0, 0, 4, 4) : _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4);
    const __m256i bits = _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
    return {eight<V>(values), _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi32(3)), base)};
  }

  static inline Vector add(Vector sum, const Loaded& loaded, const uint8_t* inputs) {
    const auto* const x = reinterpret_cast<const float*>(inputs);
    if constexpr (F == Places::kAll) return _mm256_fmadd_ps(loaded.values, _mm256_loadu_ps(x), sum);
    const __m256 a = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x), loaded.index);
    const __m256 b = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x + 8), loaded.index);
    __m256 gathered;
    if constexpr (F == Places::kTwoOfFour) {
      gathered = _mm256_blend_ps(a, b, 0xf0);
    } else {
      const __m256 c = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x + 16), loaded.index);
      const __m256 d = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x + 24), loaded.index);
      gathered = _mm256_blend_ps(_mm256_blend_ps(a, b, 0x0c), _mm256_blend_ps(c, d, 0xc0), 0xf0);
    }
    return _mm256_fmadd_ps(loaded.values, gathered, sum);
  }
};

// 32 kept integers. The activations come by vpshufb from tables of 16 columns a lane.
template <Places F, Values V, Grouping G>
struct IntegerStep {
  using Vector = __m256;
  static constexpr int kKept = 32, kValueBytes = V == Values::kInt8 ? 32 : 16, kPlaceBytes = 8;
  static constexpr int kColumns = F == Places::kTwoOfFour ? 64 : 128, kInputBytes = kColumns + 32;
  static constexpr bool kScaled = G == Grouping::kOne;
  static constexpr int kRows = 2, kInputs = 2, kUnroll = 2;
  struct Loaded {
    __m256i values, index;
    __m256 scale;
  };

  static Vector zero() { return _mm256_setzero_ps(); }
  static float sum(Vector v) { return sum_of(v); }

  template <class Groups>
  static inline Loaded load(const Groups& groups, const uint8_t* values, const uint8_t* places, const float* scales) {
    Loaded loaded;
    if constexpr (V == Values::kInt8) {
      loaded.values = _mm256_loadu_si256((const __m256i*)values);
    } else {
      const __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)values));
      const __m256i nibbles =
          _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), _mm256_set1_epi8(15));
      const __m256i numbers = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
      loaded.values = _mm256_shuffle_epi8(numbers, nibbles);
    }
    const __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)places));
    const __m256i low = _mm256_or_si256(b, _mm256_slli_epi32(b, 6));
    const __m256i bits = _mm256_and_si256(_mm256_or_si256(low, _mm256_slli_epi32(low, 12)), _mm256_set1_epi8(3));
    const __m256i base = F == Places::kTwoOfFour ? _mm256_set1_epi64x(0x0c0c080804040000) : _mm256_set1_epi32(0x0c080400);
    loaded.index = _mm256_or_si256(bits, base);
    if constexpr (G == Grouping::kWide) loaded.scale = _mm256_set1_ps(*scales);
    if constexpr (G == Grouping::kFine) {
      loaded.scale = _mm256_permutevar8x32_ps(_mm256_maskload_ps(scales, groups.picks.mask), groups.picks.index);
    }
    return loaded;
  }

  static inline Vector add(Vector sum, const Loaded& loaded, const uint8_t* inputs) {
    const __m256i a = pick(inputs, loaded.index), b = pick(inputs + 32, loaded.index);
    __m256i gathered;
    if constexpr (F == Places::kTwoOfFour) {
      gathered = _mm256_blend_epi32(a, b, 0xcc);
    } else {
      const __m256i c = pick(inputs + 64, loaded.index), d = pick(inputs + 96, loaded.index);
      gathered = _mm256_blend_epi32(_mm256_blend_epi32(a, b, 0x22), _mm256_blend_epi32(c, d, 0x88), 0xcc);
    }
    // vpmaddubsw multiplies unsigned numbers by signed ones: |x| * (w with the sign of x). 2 * 127 * 127 fits in its sums.
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(gathered), _mm256_sign_epi8(loaded.values, gathered));
    const __m256 products = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    __m256 scale = _mm256_loadu_ps(reinterpret_cast<const float*>(inputs + kColumns));
    if constexpr (G != Grouping::kOne) scale = _mm256_mul_ps(scale, loaded.scale);
    return _mm256_fmadd_ps(products, scale, sum);
  }

 private:
  static inline __m256i pick(const uint8_t* table, __m256i index) {
    return _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i*)table), index);
  }
};

// The order of a step's activations: 16 columns of each lane in a table of their own.
template <int columns>
void arrange(const uint8_t* numbers, uint8_t* to) {
  constexpr int tables = columns / 32;
  for (int lane = 0; lane < 2; ++lane) {
    for (int table = 0; table < tables; ++table) std::memcpy(to + 32 * table + 16 * lane, numbers + 16 * (tables * lane + table), 16);
  }
}

// 8 numbers, spread to the columns that a byte keeps.
inline __m256 spread(__m256 numbers, uint32_t byte) {
  const __m256i rank = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)kRankOfColumn[byte].data()));
  const __m256 moved = _mm256_permutevar8x32_ps(numbers, rank);
  return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_srai_epi32(rank, 31), _mm256_castps_si256(moved)));
}

// 16 columns of a row: the values from `index` on, spread to the columns of `mask`.
template <Values V>
inline void expand_16(const uint8_t* values, int64_t index, uint32_t mask, float scale, float* to) {
  for (int half = 0; half < 2; ++half) {
    const uint32_t byte = mask >> 8 * half & 255;
    __m256 numbers;
    if constexpr (V == Values::kInt8 || V == Values::kInt4) {
      const __m256i whole = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(values + index)));
      numbers = _mm256_mul_ps(_mm256_cvtepi32_ps(whole), _mm256_set1_ps(scale));
    } else {
      numbers = eight<V>(values + index * (V == Values::kFloat32 ? 4 : 2));
    }
    _mm256_storeu_ps(to + 8 * half, spread(numbers, byte));
    index += __builtin_popcount(byte);
  }
}

inline float dot(const float* a, const float* b, int64_t count) {
  __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    for (int u = 0; u < 4; ++u) sums[u] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8 * u), _mm256_loadu_ps(b + i + 8 * u), sums[u]);
  }
  for (; i < count; i += 8) sums[0] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), sums[0]);
  return sum_of(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
}

template <Places F, class G>
void bf16_product(const SparseMatrix&, const G&, const Product&, int64_t, int64_t) {}

#include "sparse_loops.inl"

}  // namespace

const SparseKernels kSparseAvx2 = {kFewRows, inputs, row_bytes, prepare, linear, expand, nullptr};

}  // namespace maskllm

MASKLLM_TARGET_END
#endif
