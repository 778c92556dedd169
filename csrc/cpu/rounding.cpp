// Random numbers for stochastic rounding on the CPU.
#include "../rounding.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

namespace maskllm {
namespace {

void rounding(int64_t blocks, int64_t first, int64_t key, int64_t sample, at::IntArrayRef shard, at::Tensor out) {
  const RoundingArgs args = rounding_args(blocks, first, key, sample, shard, out);
  int32_t* const to = out.mutable_data_ptr<int32_t>();
  at::parallel_for(0, args.count, 1 << 14, [&](int64_t begin, int64_t end) {
    int64_t row = (args.first + begin) / blocks, column = (args.first + begin) % blocks;
    for (int64_t i = begin; i < end; ++i) {
      rounding_of_block(args.key, args.shard.global_block(row, column), args.candidates, to + i * args.candidates);
      if (++column == blocks) {
        column = 0;
        ++row;
      }
    }
  });
}

}  // namespace
}  // namespace maskllm

TORCH_LIBRARY_IMPL(maskllm, CPU, library) { library.impl("rounding", maskllm::rounding); }
