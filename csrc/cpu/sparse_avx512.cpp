// The products with stored matrices for AVX-512 F, DQ, BW and VL.
#if defined(__x86_64__)
#include "../include/target.h"
#define MASKLLM_SPARSE kSparseAvx512
#define MASKLLM_TARGET_BEGIN MASKLLM_TARGET_REGION("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")
#include "sparse_avx512.inl"
#endif
