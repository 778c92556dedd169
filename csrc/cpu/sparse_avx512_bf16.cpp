// The products with stored matrices for AVX-512 with VNNI, VBMI, VBMI2 and BF16.
#if defined(__x86_64__)
#include "../include/target.h"
#define MASKLLM_SPARSE kSparseAvx512Bf16
#define MASKLLM_VNNI
#define MASKLLM_VBMI
#define MASKLLM_BF16
#define MASKLLM_TARGET_BEGIN MASKLLM_TARGET_REGION("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,avx512vnni,avx512vbmi,avx512vbmi2,avx512bf16")
#include "sparse_avx512.inl"
#endif
