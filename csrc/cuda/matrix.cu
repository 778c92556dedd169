// Matrix operators on CUDA: winner bits, the N:M check, 2:4 compression and decompression. One byte or one block per thread.
#include "../include/winner.h"
#include "kernels.h"
#include "launch.h"

namespace maskllm {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxGrid = 1 << 16;

int grid_for(int64_t items) {
  const int64_t needed = (items + kThreads - 1) / kThreads;
  return static_cast<int>(needed < kMaxGrid ? needed : kMaxGrid);
}

// The indices of this thread are `for (int64_t i = first(); i < items; i += step())`.
__device__ int64_t first() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }
__device__ int64_t step() { return static_cast<int64_t>(gridDim.x) * kThreads; }

template <class Value>
__global__ void winner_kernel(AnyPattern p, const Value* logits, int64_t rows, int64_t blocks, uint8_t* bits) {
  const int64_t bytes = (blocks * p.m + 7) / 8;
  for (int64_t i = first(); i < rows * bytes; i += step()) {
    const int64_t row = i / bytes;
    bits[i] = winner_byte(p, logits + row * blocks * p.candidates, blocks, i - row * bytes);
  }
}

template <class Bits>
__global__ void violation_kernel(const Bits* matrix, Bits magnitude, int64_t blocks, int n, int m, unsigned long long* found) {
  for (int64_t i = first(); i < blocks; i += step()) {
    if (nonzeros(matrix + i * m, m, magnitude) > n) atomicMin(found, static_cast<unsigned long long>(i));
  }
}

template <class Bits>
__global__ void compress_kernel(const Bits* matrix, Bits magnitude, int64_t rows, int64_t blocks, Bits* values, uint8_t* metadata,
                                unsigned long long* found) {
  const int64_t bytes = (blocks + 1) / 2;
  for (int64_t i = first(); i < rows * bytes; i += step()) {
    const int64_t row = i / bytes;
    int64_t violation;
    if (!compress_pair(matrix + row * 4 * blocks, blocks, i - row * bytes, magnitude, values + row * 2 * blocks, metadata + row * bytes,
                       violation)) {
      atomicMin(found, static_cast<unsigned long long>(row * blocks + violation));
    }
  }
}

template <class Bits>
__global__ void decompress_kernel(const Bits* values, const uint8_t* metadata, int64_t rows, int64_t blocks, Bits* matrix) {
  const int64_t bytes = (blocks + 1) / 2;
  for (int64_t i = first(); i < rows * blocks; i += step()) {
    const int64_t row = i / blocks;
    decompress_block(values + row * 2 * blocks, metadata + row * bytes, i - row * blocks, matrix + row * 4 * blocks);
  }
}

// work(bits) with an unsigned integer as large as an element.
template <class Work>
cudaError_t with_bits(int element_size, const Work& work) {
  switch (element_size) {
    case 1:
      return work(uint8_t{});
    case 2:
      return work(uint16_t{});
    case 4:
      return work(uint32_t{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_winner_bits(const AnyPattern& pattern, const void* logits, Type type, int64_t rows, int64_t blocks, uint8_t* bits,
                               cudaStream_t stream) {
  const int64_t bytes = rows * ((blocks * pattern.m + 7) / 8);
  if (bytes == 0) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  with_type(type, [&](auto value) {
    using Value = decltype(value);
    error = launch(winner_kernel<Value>, grid_for(bytes), kThreads, stream, pattern, static_cast<const Value*>(logits), rows, blocks, bits);
  });
  return error;
}

cudaError_t launch_first_violation(const void* matrix, int element_size, Number number, int64_t blocks, int n, int m,
                                   unsigned long long* found, cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  return with_bits(element_size, [&](auto bits) {
    using Bits = decltype(bits);
    return launch(violation_kernel<Bits>, grid_for(blocks), kThreads, stream, static_cast<const Bits*>(matrix),
                  magnitude_bits<Bits>(number), blocks, n, m, found);
  });
}

cudaError_t launch_compress24(const void* matrix, int element_size, Number number, int64_t rows, int64_t blocks, void* values,
                              uint8_t* metadata, unsigned long long* found, cudaStream_t stream) {
  if (rows * blocks == 0) return cudaSuccess;
  return with_bits(element_size, [&](auto bits) {
    using Bits = decltype(bits);
    return launch(compress_kernel<Bits>, grid_for(rows * ((blocks + 1) / 2)), kThreads, stream, static_cast<const Bits*>(matrix),
                  magnitude_bits<Bits>(number), rows, blocks, static_cast<Bits*>(values), metadata, found);
  });
}

cudaError_t launch_decompress24(const void* values, const uint8_t* metadata, int element_size, int64_t rows, int64_t blocks,
                                void* matrix, cudaStream_t stream) {
  if (rows * blocks == 0) return cudaSuccess;
  return with_bits(element_size, [&](auto bits) {
    using Bits = decltype(bits);
    return launch(decompress_kernel<Bits>, grid_for(rows * blocks), kThreads, stream, static_cast<const Bits*>(values), metadata, rows,
                  blocks, static_cast<Bits*>(matrix));
  });
}

}  // namespace maskllm
