// The kernels for AVX2 and FMA.
#if defined(__x86_64__)
#define MASKLLM_ISA Avx2
#define MASKLLM_TARGET __attribute__((target("avx2,fma")))
#include "kernels.inl"
#endif
