// Products of 2:4 and 1:4 matrices with up to 16 rows of 16-bit activations on tensor cores. Each warp makes 16 rows of the matrix dense in
// shared memory, 128 columns at a time; only what is stored is read from memory.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>

#include "sparse_chunk.h"

namespace maskllm {
namespace {

namespace wmma = nvcuda::wmma;

constexpr int kTile = 16;                  // rows of the matrix, rows of activations, and columns of a product
constexpr int kSpan = 128;                 // columns of a warp at a time; a lane has half of a row of them
constexpr int kPitch = (kSpan + 8) / 2;    // words in a row of shared memory: rows begin in different banks
constexpr int kChunks = kSpan / 2 / kColumns;

template <class T>
using Element = std::conditional_t<std::is_same_v<T, BFloat16>, __nv_bfloat16, __half>;

// Two numbers as 16-bit ones in a word, the first one low.
template <class T>
__device__ __forceinline__ uint32_t pair_of(float first, float second) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  }
  return word;
#else
  T low, high;
  store(low, first);
  store(high, second);
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
#endif
}

// 16 columns as words in shared memory.
__device__ __forceinline__ void write_words(const uint32_t (&words)[kColumns / 2], uint32_t* to) {
  reinterpret_cast<uint4*>(to)[0] = {words[0], words[1], words[2], words[3]};
  reinterpret_cast<uint4*>(to)[1] = {words[4], words[5], words[6], words[7]};
}

template <Places Form, class Value, class T>
__device__ __forceinline__ void write_weights(const Chunk<Form, Value>& chunk, const SparseMatrix& matrix, int64_t row, int64_t column,
                                              uint32_t* to) {
  float weight[kColumns];
  uint32_t words[kColumns / 2] = {};
  if (column < matrix.in) {
    chunk.expand(weight);
    const float scale = scale_of<Value>(matrix, row, column, weight);
#pragma unroll
    for (int c = 0; c < kColumns; c += 2) words[c / 2] = pair_of<T>(weight[c] * scale, weight[c + 1] * scale);
  }
  write_words(words, to);
}

// 16 activations; zeros beyond the last row or column.
template <class T>
__device__ __forceinline__ void write_inputs(const SparseProduct& product, int64_t input, int64_t column, int64_t in, bool aligned,
                                             uint32_t* to) {
  uint32_t words[kColumns / 2] = {};
  if (input < product.rows) {
    const auto* const row = reinterpret_cast<const uint8_t*>(static_cast<const T*>(product.inputs) + input * in);
    read_bytes<2 * kColumns>(row, 2 * column, 2 * in, aligned, words);
  }
  write_words(words, to);
}

template <Places Form, class Value, class T>
__global__ void __launch_bounds__(kThreads) multiply_tiles(SparseMatrix matrix, SparseProduct product, bool aligned,
                                                           bool aligned_inputs) {
  alignas(32) __shared__ uint32_t weights[kWarps][kTile][kPitch];
  alignas(32) __shared__ uint32_t inputs[kWarps][kTile][kPitch];
  alignas(32) __shared__ float sums[kWarps][kTile][kTile];
  const int warp = static_cast<int>(threadIdx.x / kWarp), lane = static_cast<int>(threadIdx.x % kWarp);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t row = first_row + lane / 2 < matrix.out ? first_row + lane / 2 : matrix.out - 1;
  wmma::fragment<wmma::accumulator, kTile, kTile, kTile, float> sum;
  wmma::fill_fragment(sum, 0.0f);
  for (int64_t first = warp * kSpan; first < matrix.in; first += kWarps * kSpan) {
    const int64_t column = first + lane % 2 * (kSpan / 2);
    uint32_t* const to_weights = &weights[warp][lane / 2][lane % 2 * (kSpan / 4)];
    uint32_t* const to_inputs = &inputs[warp][lane / 2][lane % 2 * (kSpan / 4)];
    Chunk<Form, Value> chunks[kChunks];
#pragma unroll
    for (int k = 0; k < kChunks; ++k) chunks[k].read(matrix, row, column + k * kColumns, aligned);
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      write_inputs<T>(product, lane / 2, column + k * kColumns, matrix.in, aligned_inputs, to_inputs + k * kColumns / 2);
    }
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      write_weights<Form, Value, T>(chunks[k], matrix, row, column + k * kColumns, to_weights + k * kColumns / 2);
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kSpan; k += kTile) {
      wmma::fragment<wmma::matrix_a, kTile, kTile, kTile, Element<T>, wmma::row_major> a;
      wmma::fragment<wmma::matrix_b, kTile, kTile, kTile, Element<T>, wmma::col_major> b;
      wmma::load_matrix_sync(a, reinterpret_cast<const Element<T>*>(&weights[warp][0][k / 2]), 2 * kPitch);
      wmma::load_matrix_sync(b, reinterpret_cast<const Element<T>*>(&inputs[warp][0][k / 2]), 2 * kPitch);
      wmma::mma_sync(sum, a, b, sum);
    }
    __syncwarp();
  }
  wmma::store_matrix_sync(&sums[warp][0][0], sum, kTile, wmma::mem_row_major);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kTile; i += kThreads) {
    const int64_t to = first_row + i % kTile, input = i / kTile;
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += sums[w][i % kTile][i / kTile];
    if (to < matrix.out && input < product.rows) put(product, matrix.out, input, to, total);
  }
}

template <Places Form, class Value, class T>
cudaError_t start(const SparseMatrix& matrix, const SparseProduct& product, bool aligned_inputs, cudaStream_t stream) {
  return launch(multiply_tiles<Form, Value, T>, divided(matrix.out, kTile), kThreads, stream, matrix, product,
                Chunk<Form, Value>::is_aligned(matrix), aligned_inputs);
}

template <class Value, class T>
cudaError_t start_form(const SparseMatrix& matrix, const SparseProduct& product, bool aligned_inputs, cudaStream_t stream) {
  if (matrix.form == Places::kTwoOfFour) return start<Places::kTwoOfFour, Value, T>(matrix, product, aligned_inputs, stream);
  return start<Places::kOneOfFour, Value, T>(matrix, product, aligned_inputs, stream);
}

template <class T>
cudaError_t start_type(const SparseMatrix& matrix, const SparseProduct& product, bool aligned_inputs, cudaStream_t stream) {
  if (matrix.type == Values::kInt8) return start_form<Int8, T>(matrix, product, aligned_inputs, stream);
  if (matrix.type == Values::kInt4) return start_form<Int4, T>(matrix, product, aligned_inputs, stream);
  return start_form<T, T>(matrix, product, aligned_inputs, stream);
}

}  // namespace

bool takes_tiles(const SparseMatrix& matrix, Type inputs) {
  if (matrix.form == Places::kBitmask || inputs == Type::kFloat32) return false;
  return matrix.quantized() || matrix.type == (inputs == Type::kBFloat16 ? Values::kBFloat16 : Values::kFloat16);
}

cudaError_t launch_sparse_tiles(const SparseMatrix& matrix, const SparseProduct& product, bool aligned_inputs, cudaStream_t stream) {
  if (product.type == Type::kBFloat16) return start_type<BFloat16>(matrix, product, aligned_inputs, stream);
  return start_type<Float16>(matrix, product, aligned_inputs, stream);
}

}  // namespace maskllm
