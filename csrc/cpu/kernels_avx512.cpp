// The kernels for AVX-512 F, DQ, BW and VL.
#if defined(__x86_64__)
#define MASKLLM_ISA Avx512
#define MASKLLM_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")))
#include "kernels.inl"
#endif
