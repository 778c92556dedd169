// Converts the arguments of the operators of maskllm/ops/sparse_linear.py to a SparseMatrix. The shapes must fit together exactly, so
// that a matrix that has passed `sparse_check` is read inside of its tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "include/sparse_matrix.h"
#include "tensors.h"

namespace maskllm {

struct SparseTensors {
  const at::Tensor &values, &places;
  const std::optional<at::Tensor>&scales, &row_starts;
};

inline Values values_of(int64_t bits, const at::Tensor& values) {
  const auto type = values.scalar_type();
  if (bits == 32 && type == at::kFloat) return Values::kFloat32;
  if (bits == 16 && type == at::kBFloat16) return Values::kBFloat16;
  if (bits == 16 && type == at::kHalf) return Values::kFloat16;
  if (bits == 8 && type == at::kChar) return Values::kInt8;
  if (bits == 4 && type == at::kByte) return Values::kInt4;
  TORCH_CHECK(false, "values are ", type, " with bits ", bits, "; wanted Float 32, BFloat16 or Half 16, Char 8 or Byte 4");
}

inline void check_shape(const at::Tensor& tensor, const char* name, at::ScalarType type, at::IntArrayRef shape) {
  TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous() && tensor.sizes() == shape, name, " is ", tensor.scalar_type(), " ",
              tensor.sizes(), tensor.is_contiguous() ? "" : ", not contiguous", "; wanted a contiguous ", type, " ", shape);
}

inline SparseMatrix sparse_matrix(const SparseTensors& tensors, int64_t in, int64_t n, int64_t m, int64_t bits, int64_t group_size) {
  const at::Tensor& places = tensors.places;
  const bool structured = n != 0 || m != 0;
  TORCH_CHECK(!structured || (0 < n && n < m && m <= 64), "pattern ", n, ":", m, ": wanted 0 < N < M <= 64, or 0:0");
  TORCH_CHECK(0 <= in && in < int64_t{1} << 31 && (!structured || in % m == 0), "in_features is ", in, "; wanted a multiple of ", m,
              " below 2^31");
  TORCH_CHECK(places.dim() == 2 && places.size(0) < int64_t{1} << 31, "places are ", places.sizes(), "; wanted [out, bytes]");
  SparseMatrix matrix{};
  matrix.out = places.size(0);
  matrix.in = in;
  matrix.n = static_cast<int>(n);
  matrix.m = static_cast<int>(m);
  matrix.type = values_of(bits, tensors.values);
  matrix.form = n == 2 && m == 4 ? Places::kTwoOfFour : (n == 1 && m == 4 ? Places::kOneOfFour : Places::kBitmask);
  matrix.place_bytes = matrix.form == Places::kOneOfFour ? (in + 15) / 16 : (in + 7) / 8;
  check_shape(places, "places", at::kByte, {matrix.out, matrix.place_bytes});
  const int64_t values_a_byte = bits == 4 ? 2 : 1;
  TORCH_CHECK(tensors.row_starts.has_value() != structured, "row_starts: wanted with unstructured places, and with them only");
  if (structured) {
    matrix.kept = in / m * n;
    const int64_t elements = (matrix.kept + values_a_byte - 1) / values_a_byte;
    check_shape(tensors.values, "values", tensors.values.scalar_type(), {matrix.out, elements});
    matrix.value_bytes = elements * tensors.values.element_size();
  } else {
    check_shape(tensors.values, "values", tensors.values.scalar_type(), {tensors.values.numel()});
    check_shape(*tensors.row_starts, "row_starts", at::kLong, {matrix.out + 1});
    matrix.row_starts = tensors.row_starts->const_data_ptr<int64_t>();
  }
  matrix.all_values = tensors.values.numel() * values_a_byte;
  matrix.values = static_cast<const uint8_t*>(tensors.values.const_data_ptr());
  matrix.places = places.const_data_ptr<uint8_t>();
  TORCH_CHECK(tensors.scales.has_value() == matrix.quantized(), "scales: wanted with bits 8 and 4, and with them only");
  TORCH_CHECK(group_size == -1 || (matrix.quantized() && group_size > 0 && (!structured || group_size % m == 0)), "group_size is ",
              group_size, "; wanted -1 or, with bits 8 and 4, a positive multiple of ", m);
  matrix.group_size = group_size == -1 || group_size > in ? std::max<int64_t>(in, 1) : group_size;
  matrix.groups = group_size == -1 ? 1 : (in == 0 ? 0 : (in - 1) / group_size + 1);
  if (matrix.quantized()) {
    check_shape(*tensors.scales, "scales", at::kFloat, {matrix.out, matrix.groups});
    matrix.scales = tensors.scales->const_data_ptr<float>();
  }
  return matrix;
}

// Activations [..., in] as rows, and the shape of the result [..., out].
struct Activations {
  at::Tensor rows;
  std::vector<int64_t> shape;
};

inline Activations activations(const at::Tensor& input, const std::optional<at::Tensor>& bias, const SparseMatrix& matrix) {
  type_of(input, "input");
  if (bias.has_value()) check_shape(*bias, "bias", input.scalar_type(), {matrix.out});
  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  shape.back() = matrix.out;
  int64_t rows = 1;
  for (size_t d = 0; d + 1 < shape.size(); ++d) rows *= shape[d];
  return {input.contiguous().view({rows, matrix.in}), std::move(shape)};
}

}  // namespace maskllm
