// The operators of maskllm/ops/sparse_linear.py on CUDA tensors.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../sparse_matrix.h"
#include "kernels.h"

namespace maskllm {
namespace {

using Optional = std::optional<at::Tensor>;

SparseMatrix matrix_on_device(const SparseTensors& tensors, int64_t in, int64_t n, int64_t m, int64_t bits, int64_t group_size) {
  const auto check = [&](const at::Tensor& tensor, const char* name) {
    TORCH_CHECK(tensor.device() == tensors.values.device(), name, " are on ", tensor.device(), "; wanted ", tensors.values.device(),
                ", where the values are");
  };
  check(tensors.places, "places");
  if (tensors.scales.has_value()) check(*tensors.scales, "scales");
  if (tensors.row_starts.has_value()) check(*tensors.row_starts, "row_starts");
  return sparse_matrix(tensors, in, n, m, bits, group_size);
}

// More rows than the kernel takes: maskllm/ops/sparse_many_rows.py.
at::Tensor many_rows(const at::Tensor& input, const SparseTensors& tensors, const Optional& bias, int64_t n, int64_t m, int64_t bits,
                     int64_t group_size) {
  using Schema = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const Optional&, const Optional&, const Optional&,
                            int64_t, int64_t, int64_t, int64_t);
  static const auto operation = c10::Dispatcher::singleton().findSchemaOrThrow("maskllm::sparse_linear_many_rows", "").typed<Schema>();
  return operation.call(input, tensors.values, tensors.places, tensors.scales, tensors.row_starts, bias, n, m, bits, group_size);
}

at::Tensor sparse_linear(const at::Tensor& input, const at::Tensor& values, const at::Tensor& places, const Optional& scales,
                         const Optional& row_starts, const Optional& bias, int64_t n, int64_t m, int64_t bits, int64_t group_size) {
  TORCH_CHECK(input.dim() >= 1, "input is a scalar; wanted [..., in]");
  const SparseTensors tensors{values, places, scales, row_starts};
  const SparseMatrix matrix = matrix_on_device(tensors, input.size(-1), n, m, bits, group_size);
  TORCH_CHECK(input.device() == values.device() && (!bias.has_value() || bias->device() == values.device()),
              "input and bias: wanted on ", values.device(), ", where the values are");
  const c10::cuda::CUDAGuard guard(values.device());
  const auto [rows, shape] = activations(input, bias, matrix);
  if (rows.size(0) > kMostRows) return many_rows(rows, tensors, bias, n, m, bits, group_size).view(shape);
  at::Tensor result = at::empty(shape, input.options());
  if (result.numel() > 0) {
    const SparseProduct product{rows.const_data_ptr(), type_of(input, "input"), rows.size(0),
                                bias.has_value() ? bias->const_data_ptr() : nullptr, result.mutable_data_ptr()};
    C10_CUDA_CHECK(launch_sparse_linear(matrix, product, c10::cuda::getCurrentCUDAStream()));
  }
  return result;
}

at::Tensor sparse_expand(const at::Tensor& values, const at::Tensor& places, const Optional& scales, const Optional& row_starts,
                         int64_t in_features, int64_t n, int64_t m, int64_t bits, int64_t group_size, at::ScalarType dtype) {
  const SparseMatrix matrix = matrix_on_device({values, places, scales, row_starts}, in_features, n, m, bits, group_size);
  const c10::cuda::CUDAGuard guard(values.device());
  at::Tensor dense = at::empty({matrix.out, matrix.in}, values.options().dtype(dtype));
  C10_CUDA_CHECK(
      launch_sparse_expand(matrix, type_of(dense, "dtype"), dense.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return dense;
}

// The result is on the CPU: whoever checks wants to know.
at::Tensor sparse_check(const at::Tensor& values, const at::Tensor& places, const Optional& scales, const Optional& row_starts,
                        int64_t in_features, int64_t n, int64_t m, int64_t bits, int64_t group_size) {
  const SparseMatrix matrix = matrix_on_device({values, places, scales, row_starts}, in_features, n, m, bits, group_size);
  const c10::cuda::CUDAGuard guard(values.device());
  at::Tensor found = at::full({2}, -1, values.options().dtype(at::kLong));
  C10_CUDA_CHECK(launch_sparse_check(matrix, reinterpret_cast<unsigned long long*>(found.mutable_data_ptr<int64_t>()),
                                     c10::cuda::getCurrentCUDAStream()));
  found = found.cpu();
  at::Tensor result = at::full({3}, 0, found.options());
  const auto code = static_cast<uint64_t>(found.const_data_ptr<int64_t>()[0]);
  if (code == ~uint64_t{0}) return result;
  auto* const to = result.mutable_data_ptr<int64_t>();
  const auto place = static_cast<int64_t>(code & ((uint64_t{1} << kFaultShift) - 1));
  const bool in_values = static_cast<Fault>(code >> kFaultShift) == Fault::kValue && matrix.row_starts != nullptr;
  to[0] = static_cast<int64_t>(code >> kFaultShift);
  to[1] = in_values ? 0 : place;
  to[2] = in_values ? place : found.const_data_ptr<int64_t>()[1];
  return result;
}

}  // namespace
}  // namespace maskllm

TORCH_LIBRARY_IMPL(maskllm, CUDA, library) {
  library.impl("sparse_linear", maskllm::sparse_linear);
  library.impl("sparse_expand", maskllm::sparse_expand);
  library.impl("sparse_check", maskllm::sparse_check);
}
