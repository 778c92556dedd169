// A matrix of which only the non-zeros are stored, as the kernels see it. maskllm/ops/sparse_linear.py documents the stored form.
#pragma once

#include "storage.h"

namespace maskllm {

enum class Places : int { kTwoOfFour, kOneOfFour, kBitmask, kAll };  // kAll: a dense matrix, which has no places
enum class Values : int { kFloat32, kBFloat16, kFloat16, kInt8, kInt4 };

// What the check finds. maskllm/ops/sparse_reference.py has the same numbers.
enum class Fault : int { kFine, kRowStarts, kPlaces, kCount, kPadding, kScale, kValue };

struct SparseMatrix {
  const uint8_t* values;
  const uint8_t* places;
  const float* scales;        // null without
  const int64_t* row_starts;  // null but for unstructured matrices
  Places form;
  Values type;
  int n, m;  // 0 if unstructured
  int64_t out, in;
  int64_t kept;         // values in a row; 0 if unstructured
  int64_t all_values;   // values that the tensor has room for
  int64_t value_bytes;  // bytes of `values` in a row; 0 if unstructured
  int64_t place_bytes;  // bytes of `places` in a row
  int64_t groups, group_size;  // scales in a row; the columns of each

  MASKLLM_INLINE const uint8_t* row_places(int64_t row) const { return places + row * place_bytes; }
  MASKLLM_INLINE bool quantized() const { return type == Values::kInt8 || type == Values::kInt4; }
  // Index of a row's first value, counted over the whole tensor (bits 4, N:M: rows begin at a whole byte).
  MASKLLM_INLINE int64_t first_value(int64_t row) const {
    if (row_starts != nullptr) return row_starts[row];
    return row * (type == Values::kInt4 ? 2 * value_bytes : kept);
  }
};

// The bits of column 8 * byte + k (bit k) that are kept in a row.
MASKLLM_INLINE uint32_t kept_byte(const SparseMatrix& matrix, const uint8_t* places, int64_t byte) {
  if (matrix.form == Places::kBitmask) return places[byte];
  uint32_t mask = 0;
  for (int half = 0; half < 2; ++half) {
    const int64_t block = 2 * byte + half;
    if (4 * block >= matrix.in) break;
    if (matrix.form == Places::kTwoOfFour) {
      const uint32_t two = places[byte] >> 4 * half & 15u;
      mask |= (1u << (two & 3u) | 1u << (two >> 2)) << 4 * half;
    } else {
      mask |= 1u << (places[block / 4] >> 2 * (block & 3) & 3u) << 4 * half;
    }
  }
  return mask;
}

// Value `index` of the tensor, as stored (without its scale).
MASKLLM_INLINE float stored_value(const SparseMatrix& matrix, int64_t index) {
  switch (matrix.type) {
    case Values::kFloat32:
      return reinterpret_cast<const float*>(matrix.values)[index];
    case Values::kBFloat16:
      return load(reinterpret_cast<const BFloat16*>(matrix.values)[index]);
    case Values::kFloat16:
      return load(reinterpret_cast<const Float16*>(matrix.values)[index]);
    case Values::kInt8:
      return static_cast<float>(static_cast<int8_t>(matrix.values[index]));
    default: {
      const int nibble = matrix.values[index / 2] >> 4 * (index & 1) & 15;
      return static_cast<float>((nibble ^ 8) - 8);
    }
  }
}

}  // namespace maskllm
