// Launches of the CUDA kernels, in plain types: neither this nor the .cu files need torch's headers. Nothing here synchronizes or
// allocates, so that launches can be captured in a CUDA graph (which then repeats the draw of the sample it was captured with).
#pragma once

#include <cuda_runtime_api.h>

#include "../include/compress24.h"
#include "../include/masked_weight_args.h"

namespace maskllm {

// Thread blocks of a masked-weight launch on a device with `processors` multiprocessors: a function of nothing else, so that the
// order of the sums is always the same.
int masked_weight_grid(int64_t blocks, int processors);

// `sums`, two for each thread block (squares, certainty), may be null.
cudaError_t launch_forward(const AnyPattern& pattern, const ForwardArgs& args, int64_t blocks, int grid, double* sums,
                           cudaStream_t stream);
cudaError_t launch_backward(const AnyPattern& pattern, const BackwardArgs& args, int64_t blocks, int grid, cudaStream_t stream);

// 16-bit random numbers of blocks [first, first + count) of the shard, `candidates` for each.
cudaError_t launch_rounding(const Key& key, const Shard& shard, int64_t first, int64_t count, int candidates, int32_t* to,
                            cudaStream_t stream);

cudaError_t launch_winner_bits(const AnyPattern& pattern, const void* logits, Type type, int64_t rows, int64_t blocks, uint8_t* bits,
                               cudaStream_t stream);

// `first`, which holds INT64_MAX, becomes the flat index of the first block with more than n non-zeros, if there is one.
cudaError_t launch_first_violation(const void* matrix, int element_size, Number number, int64_t blocks, int n, int m,
                                   unsigned long long* first, cudaStream_t stream);
cudaError_t launch_compress24(const void* matrix, int element_size, Number number, int64_t rows, int64_t blocks, void* values,
                              uint8_t* metadata, unsigned long long* first, cudaStream_t stream);
cudaError_t launch_decompress24(const void* values, const uint8_t* metadata, int element_size, int64_t rows, int64_t blocks,
                                void* matrix, cudaStream_t stream);

}  // namespace maskllm
