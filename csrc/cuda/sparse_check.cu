// The check of stored matrices on CUDA: one row a warp. Its order of faults is that of `first_fault` in maskllm/ops/sparse_reference.py.
#include "sparse_chunk.h"

namespace maskllm {
namespace {

// The number of ones among `count` bits from bit `first` on.
__device__ int ones(const uint8_t* bits, int64_t first, int64_t count) {
  int found = 0;
  for (int64_t byte = first / 8; byte * 8 < first + count; ++byte) {
    uint32_t here = bits[byte];
    if (byte * 8 < first) here &= 0xffu << (first - byte * 8);
    if (byte * 8 + 8 > first + count) here &= 0xffu >> (byte * 8 + 8 - first - count);
    found += __popc(here);
  }
  return found;
}

// Calls report(value) for each integer in byte `byte` that is smaller than the negative of the largest. `value` counts from byte 0.
template <class Report>
__device__ void check_values(const SparseMatrix& matrix, const uint8_t* values, int64_t byte, const Report& report) {
  if (matrix.type == Values::kInt8) {
    if (values[byte] == 128) report(byte);
  } else {
    if ((values[byte] & 15) == 8) report(2 * byte);
    if (values[byte] >> 4 == 8) report(2 * byte + 1);
  }
}

// Calls report(fault, index) for every fault of a row. Nothing that is read depends on what is stored. All lanes of a warp take part.
template <class Report>
__device__ void check_row(const SparseMatrix& matrix, int64_t row, const Report& report) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const uint8_t* const places = matrix.row_places(row);
  const bool unstructured = matrix.row_starts != nullptr;
  if (unstructured) {
    const int64_t start = matrix.row_starts[row], end = matrix.row_starts[row + 1];
    const int64_t a_byte = matrix.type == Values::kInt4 ? 2 : 1;
    const bool all = end >= 0 && end <= matrix.all_values && (end + a_byte - 1) / a_byte * a_byte == matrix.all_values;
    const bool bad = end < start || (row == 0 && start != 0) || (row + 1 == matrix.out && !all);
    if (lane == 0 && bad) report(Fault::kRowStarts, 0);
    int count = 0;
    for (int64_t byte = lane; byte < matrix.place_bytes; byte += kWarp) {
      count += ones(places, 8 * byte, 8 * byte + 8 < matrix.in ? 8 : matrix.in - 8 * byte);
    }
    for (int distance = kWarp / 2; distance > 0; distance /= 2) count += __shfl_xor_sync(~0u, count, distance);
    const bool same = static_cast<uint64_t>(count) == static_cast<uint64_t>(end) - static_cast<uint64_t>(start);
    if (lane == 0 && !same) report(Fault::kCount, 0);
  } else if (matrix.form == Places::kTwoOfFour) {
    for (int64_t block = lane; block < matrix.in / 4; block += kWarp) {
      const uint32_t two = places[block / 2] >> 4 * (block & 1) & 15u;
      if ((two & 3u) >= two >> 2) report(Fault::kPlaces, block);
    }
  } else if (matrix.form == Places::kBitmask) {
    for (int64_t block = lane; block < matrix.in / matrix.m; block += kWarp) {
      if (ones(places, block * matrix.m, matrix.m) != matrix.n) report(Fault::kCount, block);
    }
  }
  const int64_t bits = matrix.form == Places::kOneOfFour ? matrix.in / 2 : matrix.in;  // 2:4 has 4 bits for 4 columns
  if (lane == 0 && bits % 8 != 0 && places[matrix.place_bytes - 1] >> bits % 8 != 0) report(Fault::kPadding, 0);
  if (!matrix.quantized()) return;
  for (int64_t group = lane; group < matrix.groups; group += kWarp) {
    const uint32_t scale = bits_of(matrix.scales[row * matrix.groups + group]);
    if (scale == 0 || scale >= 0x7f800000u) report(Fault::kScale, group);  // zero, negative, infinite or NaN
  }
  if (unstructured) return;
  for (int64_t byte = lane; byte < matrix.value_bytes; byte += kWarp) {
    check_values(matrix, matrix.values + row * matrix.value_bytes, byte, [&](int64_t value) { report(Fault::kValue, value); });
  }
}

__device__ unsigned long long code_of(Fault fault, int64_t place) {
  return static_cast<unsigned long long>(fault) << kFaultShift | static_cast<unsigned long long>(place);
}

__global__ void __launch_bounds__(kThreads) find_fault(SparseMatrix matrix, unsigned long long* found) {
  const int64_t blocks = gridDim.x;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; row < matrix.out; row += blocks * kWarps) {
    check_row(matrix, row, [&](Fault fault, int64_t) { atomicMin(found, code_of(fault, row)); });
  }
  if (matrix.row_starts == nullptr || !matrix.quantized()) return;
  const int64_t bytes = matrix.type == Values::kInt4 ? matrix.all_values / 2 : matrix.all_values;
  for (int64_t byte = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; byte < bytes; byte += blocks * kThreads) {
    check_values(matrix, matrix.values, byte, [&](int64_t value) { atomicMin(found, code_of(Fault::kValue, value)); });
  }
}

// One warp: the first block, group or value at fault in the row that was found.
__global__ void __launch_bounds__(kWarp) find_index(SparseMatrix matrix, unsigned long long* found) {
  const Fault wanted = static_cast<Fault>(found[0] >> kFaultShift);
  if (found[0] == ~0ull || (wanted == Fault::kValue && matrix.row_starts != nullptr)) return;
  const int64_t row = static_cast<int64_t>(found[0] & ((1ull << kFaultShift) - 1));
  check_row(matrix, row, [&](Fault fault, int64_t index) {
    if (fault == wanted) atomicMin(found + 1, static_cast<unsigned long long>(index));
  });
}

}  // namespace

cudaError_t launch_sparse_check(const SparseMatrix& matrix, unsigned long long* found, cudaStream_t stream) {
  if (matrix.out == 0) return cudaSuccess;
  const int64_t blocks = divided(matrix.out, kWarps);
  const cudaError_t error = launch(find_fault, blocks < 1 << 16 ? blocks : 1 << 16, kThreads, stream, matrix, found);
  return error != cudaSuccess ? error : launch(find_index, 1, kWarp, stream, matrix, found);
}

}  // namespace maskllm
