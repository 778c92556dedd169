// The operators on CUDA tensors: check the arguments, allocate the outputs, launch on torch's current stream.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/where.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "../masked_weight.h"
#include "../rounding.h"
#include "../tensors.h"
#include "kernels.h"

namespace maskllm {
namespace {

int grid_on(const at::Tensor& tensor, int64_t blocks) {
  int processors = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, tensor.get_device()));
  return masked_weight_grid(blocks, processors);
}

std::tuple<at::Tensor, at::Tensor> masked_weight(const at::Tensor& weight, const at::Tensor& mask_logits, int64_t n, int64_t m,
                                                 int64_t key, int64_t sample, at::IntArrayRef shard, double scale,
                                                 double temperature, double weight_reg, bool hard, bool with_stats) {
  const c10::cuda::CUDAGuard guard(weight.device());
  const AnyPattern pattern = pattern_of(n, m);
  ForwardArgs args;
  fill({weight, mask_logits, n, m, key, sample, shard, scale, temperature, weight_reg, hard}, pattern, args);
  at::Tensor masked = at::empty_like(weight);
  args.masked = masked.mutable_data_ptr();
  const int64_t blocks = weight.numel() / m;
  const int grid = grid_on(weight, blocks);
  at::Tensor sums = at::empty({with_stats ? grid : 0, 2}, weight.options().dtype(at::kDouble));
  C10_CUDA_CHECK(launch_forward(pattern, args, blocks, grid, with_stats ? sums.mutable_data_ptr<double>() : nullptr,
                                c10::cuda::getCurrentCUDAStream()));
  if (!with_stats) return {masked, at::empty({0}, weight.options().dtype(at::kFloat))};
  return {masked, sums.sum(0).to(at::kFloat)};
}

void masked_weight_backward(const at::Tensor& grad, const at::Tensor& weight, const at::Tensor& mask_logits, int64_t n, int64_t m,
                            int64_t key, int64_t sample, at::IntArrayRef shard, double scale, double temperature, double weight_reg,
                            bool hard, at::Tensor grad_logits, bool accumulate, const std::optional<at::Tensor>& grad_weight) {
  const c10::cuda::CUDAGuard guard(weight.device());
  const AnyPattern pattern = pattern_of(n, m);
  const BackwardArgs args = backward_args({weight, mask_logits, n, m, key, sample, shard, scale, temperature, weight_reg, hard}, pattern,
                                          grad, grad_logits, accumulate, grad_weight);
  const int64_t blocks = weight.numel() / m;
  C10_CUDA_CHECK(launch_backward(pattern, args, blocks, grid_on(weight, blocks), c10::cuda::getCurrentCUDAStream()));
}

void rounding(int64_t blocks, int64_t first, int64_t key, int64_t sample, at::IntArrayRef shard, at::Tensor out) {
  const c10::cuda::CUDAGuard guard(out.device());
  const RoundingArgs args = rounding_args(blocks, first, key, sample, shard, out);
  C10_CUDA_CHECK(launch_rounding(args.key, args.shard, args.first, args.count, args.candidates, out.mutable_data_ptr<int32_t>(),
                                 c10::cuda::getCurrentCUDAStream()));
}

at::Tensor winner_bits(const at::Tensor& mask_logits, int64_t n, int64_t m) {
  const c10::cuda::CUDAGuard guard(mask_logits.device());
  const AnyPattern pattern = pattern_of(n, m);
  TORCH_CHECK(mask_logits.dim() == 3 && mask_logits.is_contiguous() && mask_logits.size(2) == pattern.candidates, "mask_logits is ",
              mask_logits.sizes(), "; wanted a contiguous [out, in / ", m, ", ", pattern.candidates, "]");
  const int64_t rows = mask_logits.size(0), blocks = mask_logits.size(1);
  at::Tensor bits = at::empty({rows, (blocks * m + 7) / 8}, mask_logits.options().dtype(at::kByte));
  C10_CUDA_CHECK(launch_winner_bits(pattern, mask_logits.const_data_ptr(), type_of(mask_logits, "mask_logits"), rows, blocks,
                                    bits.mutable_data_ptr<uint8_t>(), c10::cuda::getCurrentCUDAStream()));
  return bits;
}

constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

at::Tensor no_violation(const at::Tensor& like) { return at::full({}, kNone, like.options().dtype(at::kLong)); }

unsigned long long* address(at::Tensor& first) { return reinterpret_cast<unsigned long long*>(first.mutable_data_ptr<int64_t>()); }

at::Tensor index_of(const at::Tensor& first) { return at::where(first.eq(kNone), -1, first); }

Number number_of(const at::Tensor& tensor) { return tensor.is_floating_point() ? Number::kFloat : Number::kInteger; }

at::Tensor first_violation(const at::Tensor& matrix, int64_t n, int64_t m) {
  const c10::cuda::CUDAGuard guard(matrix.device());
  const int64_t blocks = blocks_of(matrix, m, "matrix");
  at::Tensor first = no_violation(matrix);
  C10_CUDA_CHECK(launch_first_violation(matrix.const_data_ptr(), static_cast<int>(matrix.element_size()), number_of(matrix),
                                        matrix.size(0) * blocks, static_cast<int>(n), static_cast<int>(m), address(first),
                                        c10::cuda::getCurrentCUDAStream()));
  return index_of(first);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> compress24(const at::Tensor& matrix) {
  const c10::cuda::CUDAGuard guard(matrix.device());
  const int64_t blocks = blocks_of(matrix, 4, "matrix"), rows = matrix.size(0);
  at::Tensor values = at::empty({rows, 2 * blocks}, matrix.options());
  at::Tensor metadata = at::empty({rows, (blocks + 1) / 2}, matrix.options().dtype(at::kByte));
  at::Tensor first = no_violation(matrix);
  C10_CUDA_CHECK(launch_compress24(matrix.const_data_ptr(), static_cast<int>(matrix.element_size()), number_of(matrix), rows, blocks,
                                   values.mutable_data_ptr(), metadata.mutable_data_ptr<uint8_t>(), address(first),
                                   c10::cuda::getCurrentCUDAStream()));
  return {values, metadata, index_of(first)};
}

at::Tensor decompress24(const at::Tensor& values, const at::Tensor& metadata) {
  const c10::cuda::CUDAGuard guard(values.device());
  const int64_t blocks = blocks_of(values, 2, "values"), rows = values.size(0), bytes = blocks_of(metadata, 1, "metadata");
  TORCH_CHECK(metadata.scalar_type() == at::kByte && metadata.size(0) == rows && bytes == (blocks + 1) / 2 &&
                  metadata.device() == values.device(),
              "metadata is ", metadata.scalar_type(), " ", metadata.sizes(), " on ", metadata.device(), "; wanted Byte [", rows, ", ",
              (blocks + 1) / 2, "] on ", values.device());
  at::Tensor matrix = at::empty({rows, 4 * blocks}, values.options());
  C10_CUDA_CHECK(launch_decompress24(values.const_data_ptr(), metadata.const_data_ptr<uint8_t>(),
                                     static_cast<int>(values.element_size()), rows, blocks, matrix.mutable_data_ptr(),
                                     c10::cuda::getCurrentCUDAStream()));
  return matrix;
}

}  // namespace
}  // namespace maskllm

TORCH_LIBRARY_IMPL(maskllm, CUDA, library) {
  library.impl("masked_weight", maskllm::masked_weight);
  library.impl("masked_weight_backward", maskllm::masked_weight_backward);
  library.impl("rounding", maskllm::rounding);
  library.impl("winner_bits", maskllm::winner_bits);
  library.impl("first_violation", maskllm::first_violation);
  library.impl("compress24", maskllm::compress24);
  library.impl("decompress24", maskllm::decompress24);
}
