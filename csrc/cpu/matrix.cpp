// Matrix operators on the CPU: winner bits, the N:M check, 2:4 compression and decompression. Parallel over rows.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <tuple>

#include "../include/winner.h"
#include "../tensors.h"

namespace maskllm {
namespace {

constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

void lower(std::atomic<int64_t>& first, int64_t value) {
  int64_t seen = first.load();
  while (value < seen && !first.compare_exchange_weak(seen, value)) {
  }
}

at::Tensor index_of(const std::atomic<int64_t>& first) {
  return at::scalar_tensor(first.load() == kNone ? -1 : first.load(), at::kLong);
}

// The least number of rows per task, so that small matrices are not split.
int64_t rows_a_task(int64_t columns) { return std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, columns)); }

at::Tensor winner_bits(const at::Tensor& mask_logits, int64_t n, int64_t m) {
  const AnyPattern pattern = pattern_of(n, m);
  TORCH_CHECK(mask_logits.dim() == 3 && mask_logits.is_contiguous() && mask_logits.size(2) == pattern.candidates, "mask_logits is ",
              mask_logits.sizes(), "; wanted a contiguous [out, in / ", m, ", ", pattern.candidates, "]");
  const int64_t rows = mask_logits.size(0), blocks = mask_logits.size(1), bytes = (blocks * m + 7) / 8;
  at::Tensor bits = at::empty({rows, bytes}, mask_logits.options().dtype(at::kByte));
  uint8_t* to = bits.mutable_data_ptr<uint8_t>();
  with_values(mask_logits, "mask_logits", [&](auto value) {
    const auto* from = static_cast<const decltype(value)*>(mask_logits.const_data_ptr());
    at::parallel_for(0, rows, rows_a_task(blocks * pattern.candidates), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t byte = 0; byte < bytes; ++byte) {
          to[row * bytes + byte] = winner_byte(pattern, from + row * blocks * pattern.candidates, blocks, byte);
        }
      }
    });
  });
  return bits;
}

at::Tensor first_violation(const at::Tensor& matrix, int64_t n, int64_t m) {
  const int64_t blocks = blocks_of(matrix, m, "matrix");
  std::atomic<int64_t> first{kNone};
  with_bits(matrix, "matrix", [&](auto bits, Number number) {
    using Bits = decltype(bits);
    const auto* from = static_cast<const Bits*>(matrix.const_data_ptr());
    const Bits magnitude = magnitude_bits<Bits>(number);
    at::parallel_for(0, matrix.size(0) * blocks, 1 << 16, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        if (nonzeros(from + block * m, static_cast<int>(m), magnitude) > n) return lower(first, block);
      }
    });
  });
  return index_of(first);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> compress24(const at::Tensor& matrix) {
  const int64_t blocks = blocks_of(matrix, 4, "matrix"), rows = matrix.size(0), bytes = (blocks + 1) / 2;
  at::Tensor values = at::empty({rows, 2 * blocks}, matrix.options());
  at::Tensor metadata = at::empty({rows, bytes}, matrix.options().dtype(at::kByte));
  uint8_t* positions = metadata.mutable_data_ptr<uint8_t>();
  std::atomic<int64_t> first{kNone};
  with_bits(matrix, "matrix", [&](auto bits, Number number) {
    using Bits = decltype(bits);
    const auto* from = static_cast<const Bits*>(matrix.const_data_ptr());
    auto* to = static_cast<Bits*>(values.mutable_data_ptr());
    const Bits magnitude = magnitude_bits<Bits>(number);
    at::parallel_for(0, rows, rows_a_task(matrix.size(1)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t byte = 0; byte < bytes; ++byte) {
          int64_t violation;
          if (!compress_pair(from + row * 4 * blocks, blocks, byte, magnitude, to + row * 2 * blocks, positions + row * bytes,
                             violation)) {
            return lower(first, row * blocks + violation);
          }
        }
      }
    });
  });
  return {values, metadata, index_of(first)};
}

at::Tensor decompress24(const at::Tensor& values, const at::Tensor& metadata) {
  const int64_t blocks = blocks_of(values, 2, "values"), rows = values.size(0), bytes = blocks_of(metadata, 1, "metadata");
  TORCH_CHECK(metadata.scalar_type() == at::kByte && metadata.size(0) == rows && bytes == (blocks + 1) / 2, "metadata is ",
              metadata.scalar_type(), " ", metadata.sizes(), "; wanted Byte [", rows, ", ", (blocks + 1) / 2, "]");
  at::Tensor matrix = at::empty({rows, 4 * blocks}, values.options());
  const uint8_t* positions = metadata.const_data_ptr<uint8_t>();
  with_bits(values, "values", [&](auto bits, Number) {
    using Bits = decltype(bits);
    const auto* from = static_cast<const Bits*>(values.const_data_ptr());
    auto* to = static_cast<Bits*>(matrix.mutable_data_ptr());
    at::parallel_for(0, rows, rows_a_task(4 * blocks), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t block = 0; block < blocks; ++block) {
          decompress_block(from + row * 2 * blocks, positions + row * bytes, block, to + row * 4 * blocks);
        }
      }
    });
  });
  return matrix;
}

}  // namespace
}  // namespace maskllm

TORCH_LIBRARY_IMPL(maskllm, CPU, library) {
  library.impl("winner_bits", maskllm::winner_bits);
  library.impl("first_violation", maskllm::first_violation);
  library.impl("compress24", maskllm::compress24);
  library.impl("decompress24", maskllm::decompress24);
}
