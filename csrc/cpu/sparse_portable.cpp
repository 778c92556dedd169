// The products with stored matrices without special instructions, for every processor.
#include <algorithm>
#include <cstring>

#include "sparse_kernels.h"

namespace maskllm {
namespace {

// Column of each value of a row in turn, for 2:4, 1:4 and dense matrices.
inline int64_t column_of(const SparseMatrix& matrix, const uint8_t* places, int64_t value) {
  if (matrix.form == Places::kAll) return value;
  const int place = places[value / 4] >> 2 * (value & 3) & 3;
  return (matrix.form == Places::kTwoOfFour ? 4 * (value / 2) : 4 * value) + place;
}

Inputs inputs(const SparseMatrix& matrix, bool) {
  return multiplies_integers(matrix) ? Inputs::kQuantized : Inputs::kFloat32;
}

// Quantized: `in` bytes, padded to a multiple of 4, and a scale for each kColumnsAScale columns.
int64_t padded(int64_t in) { return (in + 3) / 4 * 4; }

int64_t row_bytes(const SparseMatrix& matrix, Inputs inputs) {
  if (inputs == Inputs::kFloat32) return matrix.in * 4;
  return padded(matrix.in) + 4 * ((matrix.in + kColumnsAScale - 1) / kColumnsAScale);
}

void prepare(const SparseMatrix& matrix, Inputs inputs, const float* row, uint8_t* to) {
  if (inputs == Inputs::kFloat32) {
    std::memcpy(to, row, matrix.in * 4);
    return;
  }
  uint8_t* scales = to + padded(matrix.in);
  for (int64_t first = 0; first < matrix.in; first += kColumnsAScale, scales += 4) {
    const int64_t end = std::min(first + kColumnsAScale, matrix.in);
    uint32_t largest = 0;
    for (int64_t i = first; i < end; ++i) largest = std::max(largest, bits_of(row[i]) & 0x7fffffffu);
    const bool finite = largest < 0x7f800000u;
    const float most = finite && float_of(largest) > 1e-30f ? float_of(largest) : 0.0f;
    const float scale = finite ? most / 127.0f : float_of(0x7fc00000u), inverse = most > 0.0f ? 127.0f / most : 0.0f;
    for (int64_t i = first; i < end; ++i) to[i] = static_cast<uint8_t>(bits_of(row[i] * inverse + 12582912.0f));
    std::memcpy(scales, &scale, 4);
  }
}

float quantized_row(const SparseMatrix& matrix, const uint8_t* numbers, int64_t row) {
  const auto* const scales = reinterpret_cast<const float*>(numbers + padded(matrix.in));
  const uint8_t* const places = matrix.row_places(row);
  const int64_t first = matrix.first_value(row);
  float sum = 0.0f;
  for (int64_t value = 0; value < matrix.kept;) {
    const int64_t column = column_of(matrix, places, value), block = column / kColumnsAScale, group = column / matrix.group_size;
    // Values up to the next group or the next scale of the activations.
    const int64_t stop = std::min((block + 1) * kColumnsAScale, (group + 1) * matrix.group_size);
    const int64_t end = std::min(matrix.kept, stop / 4 * matrix.n);
    int32_t whole = 0;
    for (; value < end; ++value) {
      whole += static_cast<int>(stored_value(matrix, first + value)) * static_cast<int8_t>(numbers[column_of(matrix, places, value)]);
    }
    sum += static_cast<float>(whole) * (scales[block] * matrix.scales[row * matrix.groups + (matrix.groups == 1 ? 0 : group)]);
  }
  return sum;
}

float float_row(const SparseMatrix& matrix, const float* x, int64_t row) {
  const uint8_t* const places = matrix.row_places(row);
  const int64_t first = matrix.first_value(row);
  float sums[4] = {};
  for (int64_t value = 0; value < matrix.kept; ++value) {
    sums[value & 3] += stored_value(matrix, first + value) * x[column_of(matrix, places, value)];
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

void expand_to_floats(const SparseMatrix& matrix, int64_t row, float* to) {
  const uint8_t* const places = matrix.row_places(row);
  const float* const scales = matrix.scales + row * matrix.groups;
  int64_t index = matrix.first_value(row);
  for (int64_t column = 0; column < matrix.in; column += 8) {
    const uint32_t mask = kept_byte(matrix, places, column / 8);
    for (int64_t c = column; c < std::min(column + 8, matrix.in); ++c) {
      float value = mask >> (c - column) & 1u ? stored_value(matrix, index++) : 0.0f;
      if (matrix.scales != nullptr) value *= scales[matrix.groups == 1 ? 0 : c / matrix.group_size];
      to[c] = value;
    }
  }
}

template <class T>
void expand_as(const SparseMatrix& matrix, T* to, const float* from) {
  for (int64_t column = 0; column < matrix.in; ++column) store(to[column], from[column]);
}

void expand(const SparseMatrix& matrix, int64_t row, Type type, void* to, float* scratch) {
  expand_to_floats(matrix, row, scratch);
  with_type(type, [&](auto value) { expand_as(matrix, static_cast<decltype(value)*>(to), scratch); });
}

void linear(const SparseMatrix& matrix, Inputs inputs, const Product& product, int64_t begin, int64_t end, float* scratch) {
  for (int64_t row = begin; row < end; ++row) {
    const bool dense = matrix.form == Places::kBitmask || (matrix.quantized() && inputs != Inputs::kQuantized);
    if (dense) expand_to_floats(matrix, row, scratch);
    for (int64_t input = 0; input < product.rows; ++input) {
      const uint8_t* const from = product.inputs + input * product.row_bytes;
      const auto* const x = reinterpret_cast<const float*>(from);
      float sum = 0.0f;
      if (dense) {
        for (int64_t column = 0; column < matrix.in; ++column) sum += scratch[column] * x[column];
      } else {
        sum = inputs == Inputs::kQuantized ? quantized_row(matrix, from, row) : float_row(matrix, x, row);
      }
      put(matrix, product, input, row, sum);
    }
  }
}

}  // namespace

const SparseKernels kSparsePortable = {1, inputs, row_bytes, prepare, linear, expand, nullptr};

}  // namespace maskllm
