// Stands in for CUDA's header, so that a host compiler can build the kernels of csrc/cuda. emulator.cpp runs them on the CPU: one block
// after the other, each thread on a stack of its own. Threads change places where they meet (__syncthreads, shuffles), and go on in a
// random order, so that a missing barrier shows in the result.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace emulated {
constexpr int kWarp = 32;
cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);
void meet_block();
// The bits that lane `lane` of this thread's warp gives. All lanes of a warp take part, in the same call.
uint64_t exchange(uint64_t bits, int lane);
int lane();
}  // namespace emulated

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  return emulated::run(*config, [&] { kernel(static_cast<Parameters>(arguments)...); });
}

// One processor: grids are small there, so that loops over a grid take several turns.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1;
  return cudaSuccess;
}

inline void __syncthreads() { emulated::meet_block(); }
inline void __syncwarp(unsigned = ~0u) { emulated::exchange(0, 0); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = emulated::exchange(bits, lane & 31);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  return __shfl_sync(mask, value, emulated::lane() ^ other);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  const int lane = emulated::lane();
  return __shfl_sync(mask, value, lane < distance ? lane : lane - distance);
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline unsigned long long atomicMin(unsigned long long* to, unsigned long long value) {
  const unsigned long long before = *to;
  if (value < before) *to = value;
  return before;
}
