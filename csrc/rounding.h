// Converts the arguments of the operator `maskllm::rounding` to those of its kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include "include/rounding.h"

namespace maskllm {

struct RoundingArgs {
  Key key;
  Shard shard;
  int64_t first, count;
  int candidates;
};

inline RoundingArgs rounding_args(int64_t blocks, int64_t first, int64_t key, int64_t sample, at::IntArrayRef shard,
                                  const at::Tensor& out) {
  TORCH_CHECK(out.dim() == 2 && out.is_contiguous() && out.scalar_type() == at::kInt, "out is ", out.scalar_type(), " ", out.sizes(),
              "; wanted a contiguous Int [blocks, candidates]");
  TORCH_CHECK(blocks > 0 && first >= 0 && shard.size() == 5, "blocks ", blocks, ", first ", first, ", shard of ", shard.size(),
              "; wanted a positive, a non-negative number and 5");
  const auto k = static_cast<uint64_t>(key), s = static_cast<uint64_t>(sample);
  return {{static_cast<uint32_t>(k), static_cast<uint32_t>(k >> 32), static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32)},
          {blocks, shard[0], shard[1], shard[2], shard[3], shard[4]},
          first,
          out.size(0),
          static_cast<int>(out.size(1))};
}

}  // namespace maskllm
