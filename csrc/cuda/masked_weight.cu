// The masked weight on CUDA, one pass forward and one backward. A thread processes two neighbouring blocks at a time, so for 2:4 all of
// its loads and stores have 8 or 16 bytes. It strides over the tensor.
#include <cstdint>
#include <type_traits>

#include "kernels.h"
#include "launch.h"

namespace maskllm {
namespace {

constexpr int kThreads = 256;
constexpr int kPair = 2;

// Transfers `Size` values of two blocks between memory and lanes. `whole`: both blocks exist and the address is aligned for vectors.
template <class Value, int Size>
__device__ __forceinline__ void read_pair(const Value* from, bool whole, bool second, float (&lanes)[Size][kPair]) {
  using Vector = std::conditional_t<sizeof(Value) * Size * kPair % 16 == 0, uint4, uint2>;
  union {
    Value values[Size * kPair];
    Vector vectors[sizeof(Value) * Size * kPair / sizeof(Vector)];
  } local;
  if (whole) {
#pragma unroll
    for (int k = 0; k < static_cast<int>(sizeof(local) / sizeof(Vector)); ++k) {
      local.vectors[k] = reinterpret_cast<const Vector*>(from)[k];
    }
#pragma unroll
    for (int j = 0; j < Size; ++j) {
      lanes[j][0] = load(local.values[j]);
      lanes[j][1] = load(local.values[Size + j]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < Size; ++j) {
      lanes[j][0] = load(from[j]);
      lanes[j][1] = second ? load(from[Size + j]) : 0.0f;
    }
  }
}

template <class Value, int Size>
__device__ __forceinline__ void write_pair(Value* to, bool whole, bool second, const float (&lanes)[Size][kPair]) {
  using Vector = std::conditional_t<sizeof(Value) * Size * kPair % 16 == 0, uint4, uint2>;
  union {
    Value values[Size * kPair];
    Vector vectors[sizeof(Value) * Size * kPair / sizeof(Vector)];
  } local;
#pragma unroll
  for (int j = 0; j < Size; ++j) {
    store(local.values[j], lanes[j][0]);
    store(local.values[Size + j], lanes[j][1]);
  }
  if (whole) {
#pragma unroll
    for (int k = 0; k < static_cast<int>(sizeof(local) / sizeof(Vector)); ++k) {
      reinterpret_cast<Vector*>(to)[k] = local.vectors[k];
    }
  } else {
#pragma unroll
    for (int j = 0; j < Size; ++j) {
      to[j] = local.values[j];
      if (second) to[Size + j] = local.values[Size + j];
    }
  }
}

template <int W>
__device__ __forceinline__ void counters(const Shard& shard, int64_t block, uint32_t (&low)[W], uint32_t (&high)[W]) {
  int64_t row = block / shard.blocks, column = block - row * shard.blocks;
#pragma unroll
  for (int i = 0; i < W; ++i) {
    const int64_t global = shard.global_block(row, column);
    low[i] = counter_low(global);
    high[i] = counter_high(global);
    if (++column == shard.blocks) {
      column = 0;
      ++row;
    }
  }
}

// Reduces the two sums over a thread block and writes them to the block's place in `sums`.
__device__ void write_sums(double squares, double certainty, double* sums) {
  __shared__ double shared[2][kThreads];
  shared[0][threadIdx.x] = squares;
  shared[1][threadIdx.x] = certainty;
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      shared[0][threadIdx.x] += shared[0][threadIdx.x + half];
      shared[1][threadIdx.x] += shared[1][threadIdx.x + half];
    }
  }
  __syncthreads();  // thread 0 wrote the sum that thread 1 reads
  if (threadIdx.x < 2) sums[2 * blockIdx.x + threadIdx.x] = shared[threadIdx.x][0];
}

template <class P, class Weight, class Logit>
__global__ void __launch_bounds__(kThreads) forward_pairs(ForwardArgs args, int64_t blocks, bool aligned, double* sums) {
  constexpr int M = P::m, C = P::candidates;
  const P p;
  double squares = 0, certainty = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * kPair;
  for (int64_t block = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kPair; block < blocks; block += stride) {
    const bool second = block + 1 < blocks, whole = aligned && second;
    uint32_t low[kPair], high[kPair];
    float weight[M][kPair], logit[C][kPair], y[C][kPair], mask[M][kPair];
    read_pair<Weight, M>(static_cast<const Weight*>(args.weight) + block * M, whole, second, weight);
    read_pair<Logit, C>(static_cast<const Logit*>(args.logits) + block * C, whole, second, logit);
    counters<kPair>(args.shard, block, low, high);
    probabilities<P, kPair>(p, args.draw, low, high, logit, y);
    mask_of<P, kPair>(p, args.draw.hard, y, mask);
#pragma unroll
    for (int j = 0; j < M; ++j) {
      mask[j][0] *= weight[j][0];
      mask[j][1] *= weight[j][1];
    }
    write_pair<Weight, M>(static_cast<Weight*>(args.masked) + block * M, whole, second, mask);
    if (sums != nullptr) {
      float sure[kPair];
      certainty_of<P, kPair>(p, args.draw.scale, logit, sure);
      for (int i = 0; i < (second ? 2 : 1); ++i) {
        float square = 0.0f;
#pragma unroll
        for (int j = 0; j < M; ++j) square += mask[j][i] * mask[j][i];
        squares += square;
        certainty += sure[i];
      }
    }
  }
  if (sums != nullptr) write_sums(squares, certainty, sums);
}

template <class P, class Weight, class Logit, class GradLogit>
__global__ void __launch_bounds__(kThreads) backward_pairs(BackwardArgs args, int64_t blocks, bool aligned) {
  constexpr int M = P::m, C = P::candidates;
  const P p;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * kPair;
  for (int64_t block = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kPair; block < blocks; block += stride) {
    const bool second = block + 1 < blocks, whole = aligned && second;
    uint32_t low[kPair], high[kPair];
    float weight[M][kPair], grad[M][kPair], logit[C][kPair], y[C][kPair], mask[M][kPair];
    read_pair<Weight, M>(static_cast<const Weight*>(args.weight) + block * M, whole, second, weight);
    read_pair<Weight, M>(static_cast<const Weight*>(args.grad) + block * M, whole, second, grad);
    read_pair<Logit, C>(static_cast<const Logit*>(args.logits) + block * C, whole, second, logit);
    counters<kPair>(args.shard, block, low, high);
    probabilities<P, kPair>(p, args.draw, low, high, logit, y);
    mask_of<P, kPair>(p, args.draw.hard, y, mask);
    gradients<P, kPair>(p, args.draw, weight, mask, grad, y);
    GradLogit* const to = static_cast<GradLogit*>(args.grad_logits) + block * C;
    if (args.accumulate) {
      float sum[C][kPair];
      read_pair<GradLogit, C>(to, whole, second, sum);
#pragma unroll
      for (int c = 0; c < C; ++c) {
        y[c][0] += sum[c][0];
        y[c][1] += sum[c][1];
      }
    }
    write_pair<GradLogit, C>(to, whole, second, y);
    if (args.grad_weight != nullptr) {
      write_pair<Weight, M>(static_cast<Weight*>(args.grad_weight) + block * M, whole, second, grad);
    }
  }
}

// Any pattern: one block per thread; the pattern's table and the dtypes are looked up at run time.
__device__ float load_at(const void* from, Type type, int64_t index) {
  switch (type) {
    case Type::kFloat32:
      return static_cast<const float*>(from)[index];
    case Type::kBFloat16:
      return load(static_cast<const BFloat16*>(from)[index]);
    default:
      return load(static_cast<const Float16*>(from)[index]);
  }
}

__device__ void store_at(void* to, Type type, int64_t index, float value) {
  switch (type) {
    case Type::kFloat32:
      return store(static_cast<float*>(to)[index], value);
    case Type::kBFloat16:
      return store(static_cast<BFloat16*>(to)[index], value);
    default:
      return store(static_cast<Float16*>(to)[index], value);
  }
}

__device__ void draw_any(const AnyPattern& p, const MaskedWeightArgs& args, int64_t block, float (&weight)[kMaxM][1],
                         float (&logit)[kMaxCandidates][1], float (&y)[kMaxCandidates][1], float (&mask)[kMaxM][1]) {
  uint32_t low[1], high[1];
  for (int j = 0; j < p.m; ++j) weight[j][0] = load_at(args.weight, args.weight_type, block * p.m + j);
  for (int c = 0; c < p.candidates; ++c) logit[c][0] = load_at(args.logits, args.logits_type, block * p.candidates + c);
  counters<1>(args.shard, block, low, high);
  probabilities<AnyPattern, 1>(p, args.draw, low, high, logit, y);
  mask_of<AnyPattern, 1>(p, args.draw.hard, y, mask);
}

__global__ void __launch_bounds__(kThreads) forward_any(AnyPattern p, ForwardArgs args, int64_t blocks, double* sums) {
  double squares = 0, certainty = 0;
  for (int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; block < blocks;
       block += static_cast<int64_t>(gridDim.x) * kThreads) {
    float weight[kMaxM][1], logit[kMaxCandidates][1], y[kMaxCandidates][1], mask[kMaxM][1], sure[1], square = 0.0f;
    draw_any(p, args, block, weight, logit, y, mask);
    for (int j = 0; j < p.m; ++j) {
      const float masked = mask[j][0] * weight[j][0];
      square += masked * masked;
      store_at(args.masked, args.weight_type, block * p.m + j, masked);
    }
    if (sums != nullptr) {
      certainty_of<AnyPattern, 1>(p, args.draw.scale, logit, sure);
      squares += square;
      certainty += sure[0];
    }
  }
  if (sums != nullptr) write_sums(squares, certainty, sums);
}

__global__ void __launch_bounds__(kThreads) backward_any(AnyPattern p, BackwardArgs args, int64_t blocks) {
  for (int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; block < blocks;
       block += static_cast<int64_t>(gridDim.x) * kThreads) {
    float weight[kMaxM][1], grad[kMaxM][1], logit[kMaxCandidates][1], y[kMaxCandidates][1], mask[kMaxM][1];
    draw_any(p, args, block, weight, logit, y, mask);
    for (int j = 0; j < p.m; ++j) grad[j][0] = load_at(args.grad, args.weight_type, block * p.m + j);
    gradients<AnyPattern, 1>(p, args.draw, weight, mask, grad, y);
    for (int c = 0; c < p.candidates; ++c) {
      const int64_t index = block * p.candidates + c;
      const float before = args.accumulate ? load_at(args.grad_logits, args.grad_logits_type, index) : 0.0f;
      store_at(args.grad_logits, args.grad_logits_type, index, before + y[c][0]);
    }
    if (args.grad_weight != nullptr) {
      for (int j = 0; j < p.m; ++j) store_at(args.grad_weight, args.weight_type, block * p.m + j, grad[j][0]);
    }
  }
}

bool is_two_of_four(const AnyPattern& p) { return p.m == 4 && p.candidates == 6; }
bool is_one_of_four(const AnyPattern& p) { return p.m == 4 && p.candidates == 4 && p.kept[0] == 1; }

bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Logits are fp32 or bf16.
template <class Work>
void with_logits(Type type, const Work& work) {
  if (type == Type::kFloat32) return work(float{});
  work(BFloat16{});
}

template <class P>
cudaError_t forward_of(const ForwardArgs& args, int64_t blocks, int grid, double* sums, cudaStream_t stream) {
  const bool aligned = aligned16(args.weight) && aligned16(args.logits) && aligned16(args.masked);
  cudaError_t error = cudaSuccess;
  with_type(args.weight_type, [&](auto weight) {
    with_logits(args.logits_type, [&](auto logit) {
      error = launch(forward_pairs<P, decltype(weight), decltype(logit)>, grid, kThreads, stream, args, blocks, aligned, sums);
    });
  });
  return error;
}

template <class P>
cudaError_t backward_of(const BackwardArgs& args, int64_t blocks, int grid, cudaStream_t stream) {
  const bool aligned = aligned16(args.weight) && aligned16(args.logits) && aligned16(args.grad) && aligned16(args.grad_logits) &&
                       aligned16(args.grad_weight);
  cudaError_t error = cudaSuccess;
  with_type(args.weight_type, [&](auto weight) {
    with_logits(args.logits_type, [&](auto logit) {
      with_logits(args.grad_logits_type, [&](auto grad_logit) {
        error = launch(backward_pairs<P, decltype(weight), decltype(logit), decltype(grad_logit)>, grid, kThreads, stream, args, blocks,
                       aligned);
      });
    });
  });
  return error;
}

bool has_pair_kernel(const MaskedWeightArgs& args) { return args.logits_type != Type::kFloat16; }

}  // namespace

int masked_weight_grid(int64_t blocks, int processors) {
  const int64_t needed = (blocks + kThreads * kPair - 1) / (kThreads * kPair);
  const int64_t most = static_cast<int64_t>(processors) * 16;
  return static_cast<int>(needed < most ? needed : most);
}

cudaError_t launch_forward(const AnyPattern& pattern, const ForwardArgs& args, int64_t blocks, int grid, double* sums,
                           cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  if (has_pair_kernel(args) && is_two_of_four(pattern)) return forward_of<TwoOfFour>(args, blocks, grid, sums, stream);
  if (has_pair_kernel(args) && is_one_of_four(pattern)) return forward_of<OneOfFour>(args, blocks, grid, sums, stream);
  return launch(forward_any, grid, kThreads, stream, pattern, args, blocks, sums);
}

cudaError_t launch_backward(const AnyPattern& pattern, const BackwardArgs& args, int64_t blocks, int grid, cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  const bool pairs = has_pair_kernel(args) && args.grad_logits_type != Type::kFloat16;
  if (pairs && is_two_of_four(pattern)) return backward_of<TwoOfFour>(args, blocks, grid, stream);
  if (pairs && is_one_of_four(pattern)) return backward_of<OneOfFour>(args, blocks, grid, stream);
  return launch(backward_any, grid, kThreads, stream, pattern, args, blocks);
}

}  // namespace maskllm
