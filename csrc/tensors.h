// Shared by the operators: the table of a pattern's candidates, and dispatch over dtypes and element sizes.
#pragma once

#include <ATen/core/Tensor.h>

#include "include/compress24.h"
#include "include/pattern.h"
#include "include/storage.h"

namespace maskllm {

inline AnyPattern pattern_of(int64_t n, int64_t m) {
  TORCH_CHECK(0 < n && n < m && m <= kMaxM, "pattern ", n, ":", m, ": wanted 0 < N < M <= ", kMaxM);
  AnyPattern pattern{static_cast<int>(m), 0, {}};
  // All masks with n bits, in lexicographic order of the kept positions.
  int position[kMaxM];
  for (int k = 0; k < n; ++k) position[k] = k;
  while (true) {
    TORCH_CHECK(pattern.candidates < kMaxCandidates, "pattern ", n, ":", m, " has more than ", kMaxCandidates, " candidates");
    uint32_t kept = 0;
    for (int k = 0; k < n; ++k) kept |= 1u << position[k];
    pattern.kept[pattern.candidates++] = kept;
    int k = static_cast<int>(n) - 1;
    while (k >= 0 && position[k] == m - n + k) --k;
    if (k < 0) return pattern;
    ++position[k];
    for (int after = k + 1; after < n; ++after) position[after] = position[after - 1] + 1;
  }
}

inline Type type_of(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Type::kFloat32;
    case at::kBFloat16:
      return Type::kBFloat16;
    case at::kHalf:
      return Type::kFloat16;
    default:
      TORCH_CHECK(false, name, " is ", tensor.scalar_type(), "; wanted Float, BFloat16 or Half");
  }
}

// Calls work(value) with a value of the tensor's storage type: float, BFloat16 or Float16.
template <class Work>
void with_values(const at::Tensor& tensor, const char* name, const Work& work) {
  with_type(type_of(tensor, name), work);
}

// Calls work(bits, number) with an unsigned integer as large as an element.
template <class Work>
void with_bits(const at::Tensor& tensor, const char* name, const Work& work) {
  const Number number = tensor.is_floating_point() ? Number::kFloat : Number::kInteger;
  switch (tensor.element_size()) {
    case 1:
      return work(uint8_t{}, number);
    case 2:
      return work(uint16_t{}, number);
    case 4:
      return work(uint32_t{}, number);
    default:
      TORCH_CHECK(false, name, " is ", tensor.scalar_type(), "; wanted elements of 1, 2 or 4 bytes");
  }
}

// The number of blocks of `m` elements in a row. Checks that `tensor` is a contiguous matrix whose rows split into such blocks.
inline int64_t blocks_of(const at::Tensor& tensor, int64_t m, const char* name) {
  TORCH_CHECK(tensor.dim() == 2 && tensor.is_contiguous() && m > 0 && tensor.size(1) % m == 0, name, " is ", tensor.sizes(),
              "; wanted a contiguous [out, in] with in a multiple of ", m);
  return tensor.size(1) / m;
}

}  // namespace maskllm
