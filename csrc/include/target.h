// A region of code for one instruction set. Everything in it has internal linkage: the linker merges equal inline functions of all files,
// so one compiled for AVX-512 could run on a processor without it.
#pragma once

#define MASKLLM_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define MASKLLM_TARGET_REGION(set) MASKLLM_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define MASKLLM_TARGET_END _Pragma("clang attribute pop")
#else
#define MASKLLM_TARGET_REGION(set) _Pragma("GCC push_options") MASKLLM_PRAGMA(GCC target(set))
#define MASKLLM_TARGET_END _Pragma("GCC pop_options")
#endif
