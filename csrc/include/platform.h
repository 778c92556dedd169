// What the arithmetic headers need to know about who compiles them: the host's compiler or nvcc.
//
// Every function here and in the other headers works on W blocks side by side ("lanes"): a CUDA thread takes one (W = 1), the CPU
// loops take enough to fill vector registers, and the innermost loops over lanes are what the host's compiler vectorizes.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MASKLLM_INLINE __host__ __device__ __forceinline__
#define MASKLLM_LANES
#define MASKLLM_UNROLL _Pragma("unroll")
#else
#define MASKLLM_INLINE inline __attribute__((always_inline))
#define MASKLLM_LANES _Pragma("omp simd")  // with -fopenmp-simd: no OpenMP runtime is linked
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
