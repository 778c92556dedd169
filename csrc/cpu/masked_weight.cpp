// The masked-weight operators on the CPU, parallel over blocks in torch's thread pool.
#include "../masked_weight.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "kernels.h"

namespace maskllm {
namespace {

// Blocks in a chunk, a multiple of the kernels' lanes. Each chunk has its own sums, which are added in order, so the result does not
// depend on the number of threads.
constexpr int64_t kChunk = 4096;

template <class Work>
void over_chunks(int64_t blocks, const Work& work) {
  const int64_t chunks = (blocks + kChunk - 1) / kChunk;
  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) work(chunk, chunk * kChunk, std::min(blocks, (chunk + 1) * kChunk));
  });
}

std::tuple<at::Tensor, at::Tensor> masked_weight(const at::Tensor& weight, const at::Tensor& mask_logits, int64_t n, int64_t m,
                                                 int64_t key, int64_t sample, at::IntArrayRef shard, double scale,
                                                 double temperature, double weight_reg, bool hard, bool with_stats) {
  const AnyPattern pattern = pattern_of(n, m);
  ForwardArgs args;
  fill({weight, mask_logits, n, m, key, sample, shard, scale, temperature, weight_reg, hard}, pattern, args);
  at::Tensor masked = at::empty_like(weight);
  args.masked = masked.mutable_data_ptr();
  const int64_t blocks = weight.numel() / m;
  std::vector<Sums> sums(with_stats ? (blocks + kChunk - 1) / kChunk : 0);
  const CpuKernels& kernels = *instruction_set().masked_weight;
  over_chunks(blocks, [&](int64_t chunk, int64_t begin, int64_t end) {
    kernels.forward(pattern, args, begin, end, with_stats ? &sums[chunk] : nullptr);
  });
  at::Tensor stats = at::empty({with_stats ? 2 : 0}, weight.options().dtype(at::kFloat));
  if (with_stats) {
    Sums total;
    for (const Sums& chunk : sums) {
      total.squares += chunk.squares;
      total.certainty += chunk.certainty;
    }
    stats.mutable_data_ptr<float>()[0] = static_cast<float>(total.squares);
    stats.mutable_data_ptr<float>()[1] = static_cast<float>(total.certainty);
  }
  return {masked, stats};
}

void masked_weight_backward(const at::Tensor& grad, const at::Tensor& weight, const at::Tensor& mask_logits, int64_t n, int64_t m,
                            int64_t key, int64_t sample, at::IntArrayRef shard, double scale, double temperature, double weight_reg,
                            bool hard, at::Tensor grad_logits, bool accumulate, const std::optional<at::Tensor>& grad_weight) {
  const AnyPattern pattern = pattern_of(n, m);
  const BackwardArgs args = backward_args({weight, mask_logits, n, m, key, sample, shard, scale, temperature, weight_reg, hard}, pattern,
                                          grad, grad_logits, accumulate, grad_weight);
  const CpuKernels& kernels = *instruction_set().masked_weight;
  over_chunks(weight.numel() / m, [&](int64_t, int64_t begin, int64_t end) { kernels.backward(pattern, args, begin, end); });
}

}  // namespace
}  // namespace maskllm

TORCH_LIBRARY_IMPL(maskllm, CPU, library) {
  library.impl("masked_weight", maskllm::masked_weight);
  library.impl("masked_weight_backward", maskllm::masked_weight_backward);
}
