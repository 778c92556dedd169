// Stands in for CUDA's products on tensor cores. Lane 0 of a warp has the whole matrices.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <type_traits>

#include "include/storage.h"

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major };

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 16);
  float at[16][16];
};

inline float value_of(float value) { return value; }
inline float value_of(__nv_bfloat16 value) { return maskllm::load(maskllm::BFloat16{value.bits}); }
inline float value_of(__half value) { return maskllm::load(maskllm::Float16{value.bits}); }

inline void check(const void* memory, unsigned pitch_bytes) {
  if (reinterpret_cast<uintptr_t>(memory) % 32 == 0 && pitch_bytes % 16 == 0) return;
  std::fprintf(stderr, "CUDA on the CPU: a matrix at %p with %u bytes between rows; wanted multiples of 32 and 16\n", memory, pitch_bytes);
  std::abort();
}

template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& to, const T* from, unsigned pitch) {
  check(from, pitch * sizeof(T));
  __syncwarp();
  if (emulated::lane() != 0) return;
  for (unsigned i = 0; i < 16; ++i) {
    for (unsigned j = 0; j < 16; ++j) {
      to.at[i][j] = value_of(std::is_same_v<Layout, row_major> ? from[i * pitch + j] : from[j * pitch + i]);
    }
  }
}

template <class T>
void fill_fragment(fragment<accumulator, 16, 16, 16, T>& to, T value) {
  for (auto& row : to.at) std::fill(row, row + 16, value);
}

template <class A, class B>
void mma_sync(fragment<accumulator, 16, 16, 16, float>& to, const A& a, const B& b, const fragment<accumulator, 16, 16, 16, float>& add) {
  __syncwarp();
  if (emulated::lane() != 0) return;
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) {
      float sum = add.at[i][j];
      for (int k = 0; k < 16; ++k) sum += a.at[i][k] * b.at[k][j];
      to.at[i][j] = sum;
    }
  }
}

inline void store_matrix_sync(float* to, const fragment<accumulator, 16, 16, 16, float>& from, unsigned pitch, layout_t) {
  check(to, pitch * sizeof(float));
  __syncwarp();
  if (emulated::lane() != 0) return;
  for (unsigned i = 0; i < 16; ++i) std::copy(from.at[i], from.at[i] + 16, to + i * pitch);
}

}  // namespace nvcuda::wmma
