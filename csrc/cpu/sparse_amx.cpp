// The products with stored matrices for AMX with bf16 numbers.
#if defined(__x86_64__)
#include "../include/target.h"
#define MASKLLM_TILES kAmxTiles
#define MASKLLM_TARGET_BEGIN MASKLLM_TARGET_REGION("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")
#include "sparse_amx.inl"
#endif
