// Random numbers for stochastic rounding on CUDA, one block per thread.
#include "../include/rounding.h"
#include "kernels.h"
#include "launch.h"

namespace maskllm {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGrid = 1 << 16;

__global__ void rounding_kernel(Key key, Shard shard, int64_t first, int64_t count, int candidates, int32_t* to) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = (first + i) / shard.blocks;
    rounding_of_block(key, shard.global_block(row, first + i - row * shard.blocks), candidates, to + i * candidates);
  }
}

}  // namespace

cudaError_t launch_rounding(const Key& key, const Shard& shard, int64_t first, int64_t count, int candidates, int32_t* to,
                            cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const int64_t needed = (count + kThreads - 1) / kThreads;
  return launch(rounding_kernel, needed < kMaxGrid ? needed : kMaxGrid, kThreads, stream, key, shard, first, count, candidates, to);
}

}  // namespace maskllm
