// Macros and bit casts that differ between the host's compiler and nvcc.
//
// The functions in these headers work on W blocks side by side ("lanes"). A CUDA thread has one or two lanes. The CPU loops have enough
// to fill vector registers, and the host's compiler vectorizes the innermost loops over lanes.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MASKLLM_INLINE __host__ __device__ __forceinline__
#define MASKLLM_LANES
#define MASKLLM_UNROLL _Pragma("unroll")
#else
#define MASKLLM_INLINE inline __attribute__((always_inline))
#define MASKLLM_LANES _Pragma("omp simd")  // vectorizes the loop; needs no OpenMP runtime
#define MASKLLM_UNROLL _Pragma("GCC unroll 16")
#endif

namespace maskllm {

MASKLLM_INLINE uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

MASKLLM_INLINE float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

}  // namespace maskllm
