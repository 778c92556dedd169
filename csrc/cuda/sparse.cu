// Products with stored matrices on CUDA for a few rows of activations, and the expansion of stored matrices.
#include "sparse_chunk.h"

namespace maskllm {
namespace {

constexpr int kRows = 4;  // rows of the matrix that a thread block multiplies

// Calls work(column, weight) for each 16 columns of a row with a bitmask, dense and without scales, on this lane's turns. All lanes of a warp take part: the
// values before a lane's columns are counted over the warp.
template <class Value, class Work>
__device__ __forceinline__ void over_bitmask(const SparseMatrix& matrix, int64_t row, const Work& work) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const uint8_t* const places = matrix.row_places(row);
  int64_t index = matrix.first_value(row);
  for (int64_t first = 0; first < matrix.in; first += kWarp * kColumns) {
    const int64_t column = first + lane * kColumns;
    uint32_t mask[1];
    read_bytes<2>(places, column / 8, matrix.place_bytes, false, mask);
    const int own = __popc(mask[0]);
    int up_to = own;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int before = __shfl_up_sync(~0u, up_to, distance);
      if (lane >= distance) up_to += before;
    }
    const int all = __shfl_sync(~0u, up_to, kWarp - 1);
    int64_t at = index + up_to - own;
    float weight[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) weight[c] = mask[0] >> c & 1u ? value_at<Value>(matrix, at++) : 0.0f;
    if (column < matrix.in) work(column, weight);
    index += all;
  }
}

// 16 columns of a row of activations from `column` on, zeros beyond the last one.
template <class T>
__device__ __forceinline__ void read_as(const T* row, int64_t column, int64_t in, bool aligned, float (&x)[kColumns]) {
  if (aligned && column + kColumns <= in) {
    uint32_t words[kColumns * sizeof(T) / 4];
    read_vectors<kColumns * sizeof(T)>(reinterpret_cast<const uint8_t*>(row + column), words);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) x[c] = value_in<T>(words, c);
  } else {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) x[c] = column + c < in ? load(row[column + c]) : 0.0f;
  }
}

__device__ __forceinline__ void read_inputs(const SparseProduct& product, int64_t input, int64_t column, int64_t in, bool aligned,
                                            float (&x)[kColumns]) {
  switch (product.type) {
    case Type::kFloat32:
      return read_as(static_cast<const float*>(product.inputs) + input * in, column, in, aligned, x);
    case Type::kBFloat16:
      return read_as(static_cast<const BFloat16*>(product.inputs) + input * in, column, in, aligned, x);
    default:
      return read_as(static_cast<const Float16*>(product.inputs) + input * in, column, in, aligned, x);
  }
}

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

template <class Value, int Inputs>
__device__ __forceinline__ void multiply(float scale, const float (&weight)[kColumns], const float (&x)[Inputs][kColumns],
                                         float (&sums)[Inputs]) {
#pragma unroll
  for (int i = 0; i < Inputs; ++i) {
    float sum = kQuantized<Value> ? 0.0f : sums[i];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sum += weight[c] * x[i][c];
    sums[i] = kQuantized<Value> ? sums[i] + scale * sum : sum;
  }
}

// Blocks of four: `Inputs` rows of activations times kRows rows of the matrix a thread block, whose warps share the columns. The slices
// of activations that multiply the same rows of the matrix are neighbours, so that these come from memory once.
template <Places Form, class Value, int Inputs>
__global__ void __launch_bounds__(kThreads) multiply_blocks(SparseMatrix matrix, SparseProduct product, bool aligned,
                                                            bool aligned_inputs) {
  __shared__ float of_warps[kWarps][kRows * Inputs];
  const int64_t slices = (product.rows + Inputs - 1) / Inputs;
  const int64_t first_input = blockIdx.x % slices * Inputs, first_row = blockIdx.x / slices * kRows;
  float sums[kRows][Inputs] = {};
  for (int64_t column = static_cast<int64_t>(threadIdx.x) * kColumns; column < matrix.in; column += kThreads * kColumns) {
    Chunk<Form, Value> chunks[kRows];
    float x[Inputs][kColumns];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first_row + r < matrix.out ? first_row + r : matrix.out - 1;
      chunks[r].read(matrix, row, column, aligned);
    }
#pragma unroll
    for (int i = 0; i < Inputs; ++i) {
      const int64_t input = first_input + i < product.rows ? first_input + i : product.rows - 1;
      read_inputs(product, input, column, matrix.in, aligned_inputs, x[i]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float weight[kColumns];
      chunks[r].expand(weight);
      const float scale = scale_of<Value>(matrix, first_row + r < matrix.out ? first_row + r : matrix.out - 1, column, weight);
      multiply<Value, Inputs>(scale, weight, x, sums[r]);
    }
  }
  const int warp = static_cast<int>(threadIdx.x / kWarp), lane = static_cast<int>(threadIdx.x % kWarp);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < Inputs; ++i) {
      const float sum = sum_of_warp(sums[r][i]);
      if (lane == 0) of_warps[warp][r * Inputs + i] = sum;
    }
  }
  __syncthreads();
  if (threadIdx.x < kRows * Inputs) {
    const int64_t row = first_row + threadIdx.x / Inputs, input = first_input + threadIdx.x % Inputs;
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += of_warps[w][threadIdx.x];
    if (row < matrix.out && input < product.rows) put(product, matrix.out, input, row, sum);
  }
}

// A bitmask: one row of the matrix a warp.
template <class Value, int Inputs>
__global__ void __launch_bounds__(kThreads) multiply_bitmask(SparseMatrix matrix, SparseProduct product, bool aligned_inputs) {
  const int64_t slices = (product.rows + Inputs - 1) / Inputs;
  const int64_t first_input = blockIdx.x % slices * Inputs;
  const int64_t row = blockIdx.x / slices * kWarps + threadIdx.x / kWarp;
  if (row >= matrix.out) return;
  float sums[Inputs] = {};
  over_bitmask<Value>(matrix, row, [&](int64_t column, float(&weight)[kColumns]) {
    float x[Inputs][kColumns];
#pragma unroll
    for (int i = 0; i < Inputs; ++i) {
      const int64_t input = first_input + i < product.rows ? first_input + i : product.rows - 1;
      read_inputs(product, input, column, matrix.in, aligned_inputs, x[i]);
    }
    multiply<Value, Inputs>(scale_of<Value>(matrix, row, column, weight), weight, x, sums);
  });
#pragma unroll
  for (int i = 0; i < Inputs; ++i) {
    const float sum = sum_of_warp(sums[i]);
    if (threadIdx.x % kWarp == 0 && first_input + i < product.rows) put(product, matrix.out, first_input + i, row, sum);
  }
}

template <class T>
__device__ __forceinline__ void write_as(const SparseMatrix& matrix, void* to, int64_t row, int64_t column, float scale,
                                         const float (&weight)[kColumns]) {
  T* const first = static_cast<T*>(to) + row * matrix.in + column;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    if (column + c < matrix.in) store(first[c], weight[c] * scale);
  }
}

template <class Value>
__device__ __forceinline__ void write_row(const SparseMatrix& matrix, Type type, void* to, int64_t row, int64_t column,
                                          float (&weight)[kColumns]) {
  const float scale = scale_of<Value>(matrix, row, column, weight);
  switch (type) {
    case Type::kFloat32:
      return write_as<float>(matrix, to, row, column, scale, weight);
    case Type::kBFloat16:
      return write_as<BFloat16>(matrix, to, row, column, scale, weight);
    default:
      return write_as<Float16>(matrix, to, row, column, scale, weight);
  }
}

template <Places Form, class Value>
__global__ void __launch_bounds__(kThreads) expand_blocks(SparseMatrix matrix, bool aligned, Type type, void* to) {
  const int64_t chunks = (matrix.in + kColumns - 1) / kColumns;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < matrix.out * chunks; i += step) {
    const int64_t row = i / chunks, column = (i - row * chunks) * kColumns;
    Chunk<Form, Value> chunk;
    float weight[kColumns];
    chunk.read(matrix, row, column, aligned);
    chunk.expand(weight);
    write_row<Value>(matrix, type, to, row, column, weight);
  }
}

template <class Value>
__global__ void __launch_bounds__(kThreads) expand_bitmask(SparseMatrix matrix, Type type, void* to) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; row < matrix.out; row += step) {
    over_bitmask<Value>(matrix, row, [&](int64_t column, float(&weight)[kColumns]) {
      write_row<Value>(matrix, type, to, row, column, weight);
    });
  }
}

constexpr int64_t kMostOnLoops = 4;  // rows that need no tensor cores: the loops above are limited by memory
constexpr int64_t kMostBlocks = 1 << 16;  // of grids whose threads take several turns

template <Places Form, class Value>
cudaError_t linear_of_blocks(const SparseMatrix& matrix, const SparseProduct& product, bool aligned_inputs, cudaStream_t stream) {
  const bool aligned = Chunk<Form, Value>::is_aligned(matrix);
  const int64_t parts = divided(matrix.out, kRows);
  if (product.rows == 1) {
    return launch(multiply_blocks<Form, Value, 1>, parts, kThreads, stream, matrix, product, aligned, aligned_inputs);
  }
  return launch(multiply_blocks<Form, Value, 4>, parts * divided(product.rows, 4), kThreads, stream, matrix, product, aligned,
                aligned_inputs);
}

template <class Value>
cudaError_t linear_of_bitmask(const SparseMatrix& matrix, const SparseProduct& product, bool aligned_inputs, cudaStream_t stream) {
  const int64_t parts = divided(matrix.out, kWarps);
  if (product.rows == 1) return launch(multiply_bitmask<Value, 1>, parts, kThreads, stream, matrix, product, aligned_inputs);
  return launch(multiply_bitmask<Value, 4>, parts * divided(product.rows, 4), kThreads, stream, matrix, product, aligned_inputs);
}

template <Places Form, class Value>
cudaError_t expansion_of_blocks(const SparseMatrix& matrix, Type type, void* to, cudaStream_t stream) {
  const int64_t blocks = divided(matrix.out * divided(matrix.in, kColumns), kThreads);
  return launch(expand_blocks<Form, Value>, blocks < kMostBlocks ? blocks : kMostBlocks, kThreads, stream, matrix,
                Chunk<Form, Value>::is_aligned(matrix), type, to);
}

}  // namespace

cudaError_t launch_sparse_linear(const SparseMatrix& matrix, const SparseProduct& product, cudaStream_t stream) {
  const int size = product.type == Type::kFloat32 ? 4 : 2;
  const bool aligned_inputs = reinterpret_cast<uintptr_t>(product.inputs) % 16 == 0 && matrix.in * size % 16 == 0;
  if (product.rows > kMostOnLoops && takes_tiles(matrix, product.type)) {
    return launch_sparse_tiles(matrix, product, aligned_inputs, stream);
  }
  return with_stored(matrix.type, [&](auto value) {
    using Value = decltype(value);
    if (matrix.form == Places::kTwoOfFour) return linear_of_blocks<Places::kTwoOfFour, Value>(matrix, product, aligned_inputs, stream);
    if (matrix.form == Places::kOneOfFour) return linear_of_blocks<Places::kOneOfFour, Value>(matrix, product, aligned_inputs, stream);
    return linear_of_bitmask<Value>(matrix, product, aligned_inputs, stream);
  });
}

cudaError_t launch_sparse_expand(const SparseMatrix& matrix, Type type, void* to, cudaStream_t stream) {
  if (matrix.out == 0 || matrix.in == 0) return cudaSuccess;
  return with_stored(matrix.type, [&](auto value) {
    using Value = decltype(value);
    if (matrix.form == Places::kTwoOfFour) return expansion_of_blocks<Places::kTwoOfFour, Value>(matrix, type, to, stream);
    if (matrix.form == Places::kOneOfFour) return expansion_of_blocks<Places::kOneOfFour, Value>(matrix, type, to, stream);
    const int64_t blocks = divided(matrix.out, kWarps);
    return launch(expand_bitmask<Value>, blocks < kMostBlocks ? blocks : kMostBlocks, kThreads, stream, matrix, type, to);
  });
}

}  // namespace maskllm
