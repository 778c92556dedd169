// Launches of the CUDA kernels, in plain types: this header and the .cu files do not need torch's headers. No launch synchronizes or
// allocates, so a CUDA graph can capture them. The graph then repeats the draw of the captured sample.
#pragma once

#include <cuda_runtime_api.h>

#include "../include/compress24.h"
#include "../include/masked_weight_args.h"
#include "../include/sparse_matrix.h"

namespace maskllm {

// Thread blocks of a masked-weight launch on a device with `processors` multiprocessors. It depends on nothing else, so the order of
// the sums is always the same.
int masked_weight_grid(int64_t blocks, int processors);

// `sums` holds two numbers per thread block (squares, certainty) and may be null.
cudaError_t launch_forward(const AnyPattern& pattern, const ForwardArgs& args, int64_t blocks, int grid, double* sums,
                           cudaStream_t stream);
cudaError_t launch_backward(const AnyPattern& pattern, const BackwardArgs& args, int64_t blocks, int grid, cudaStream_t stream);

// 16-bit random numbers for blocks [first, first + count) of the shard, `candidates` per block.
cudaError_t launch_rounding(const Key& key, const Shard& shard, int64_t first, int64_t count, int candidates, int32_t* to,
                            cudaStream_t stream);

cudaError_t launch_winner_bits(const AnyPattern& pattern, const void* logits, Type type, int64_t rows, int64_t blocks, uint8_t* bits,
                               cudaStream_t stream);

// `first` holds INT64_MAX before the launch. It becomes the flat index of the first block with more than n non-zeros, if any.
cudaError_t launch_first_violation(const void* matrix, int element_size, Number number, int64_t blocks, int n, int m,
                                   unsigned long long* first, cudaStream_t stream);
cudaError_t launch_compress24(const void* matrix, int element_size, Number number, int64_t rows, int64_t blocks, void* values,
                              uint8_t* metadata, unsigned long long* first, cudaStream_t stream);
cudaError_t launch_decompress24(const void* values, const uint8_t* metadata, int element_size, int64_t rows, int64_t blocks,
                                void* matrix, cudaStream_t stream);

// Rows of activations [rows, in] times a stored matrix. The inputs, the bias (or null) and the result have one type.
struct SparseProduct {
  const void* inputs;
  Type type;
  int64_t rows;
  const void* bias;
  void* result;  // [rows, out]
};

// The most rows of activations of `launch_sparse_linear`.
constexpr int64_t kMostRows = 16;
cudaError_t launch_sparse_linear(const SparseMatrix& matrix, const SparseProduct& product, cudaStream_t stream);

// The same on tensor cores, for matrices and inputs that `takes_tiles` accepts. A weight is rounded to the inputs' type. `aligned_inputs`:
// every row of them begins at a multiple of 16 bytes.
bool takes_tiles(const SparseMatrix& matrix, Type inputs);
cudaError_t launch_sparse_tiles(const SparseMatrix& matrix, const SparseProduct& product, bool aligned_inputs, cudaStream_t stream);

// `to` is dense [out, in].
cudaError_t launch_sparse_expand(const SparseMatrix& matrix, Type type, void* to, cudaStream_t stream);

// The first fault in the order of `Fault`, then of rows, then of their blocks, groups or values. `found` holds UINT64_MAX twice before the
// launch. It becomes `fault << kFaultShift`, plus the row (of a fault in the values of an unstructured matrix, the value's index);
// and the block, group or value in the row. Nothing changes if there is no fault.
constexpr int kFaultShift = 56;
cudaError_t launch_sparse_check(const SparseMatrix& matrix, unsigned long long* found, cudaStream_t stream);

}  // namespace maskllm
