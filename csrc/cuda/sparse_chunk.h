// What the CUDA kernels of stored matrices share: a lane takes 16 columns at a time, reads what is stored of them with one or two vector
// loads, and makes them 16 dense numbers in registers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../include/sparse_matrix.h"
#include "kernels.h"
#include "launch.h"

namespace maskllm {

constexpr int kWarp = 32;
constexpr int kWarps = 4;  // in a thread block
constexpr int kThreads = kWarp * kWarps;
constexpr int kColumns = 16;

struct Int8 {};
struct Int4 {};

template <class Value>
constexpr int kBits = std::is_same_v<Value, Int4> ? 4 : std::is_same_v<Value, Int8> ? 8 : 8 * sizeof(Value);
template <class Value>
constexpr bool kQuantized = kBits<Value> <= 8;

__device__ __forceinline__ float to_float(BFloat16 value) { return load(value); }
__device__ __forceinline__ float to_float(Float16 value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  return load(value);
#endif
}

// Value `index` of those in `words`. Integers become the low bits of 2^23, which is faster than a conversion.
template <class Value, int Words>
__device__ __forceinline__ float value_in(const uint32_t (&words)[Words], int index) {
  if constexpr (std::is_same_v<Value, float>) {
    return float_of(words[index]);
  } else if constexpr (std::is_same_v<Value, Int8>) {
    return float_of(0x4b000000u | ((words[index / 4] >> 8 * (index % 4) & 0xffu) ^ 0x80u)) - 8388736.0f;
  } else if constexpr (std::is_same_v<Value, Int4>) {
    return float_of(0x4b000000u | ((words[index / 8] >> 4 * (index % 8) & 0xfu) ^ 0x8u)) - 8388616.0f;
  } else {
    return to_float(Value{static_cast<uint16_t>(words[index / 2] >> 16 * (index % 2))});
  }
}

// Value `index` of the matrix.
template <class Value>
__device__ __forceinline__ float value_at(const SparseMatrix& matrix, int64_t index) {
  if constexpr (std::is_same_v<Value, Int8>) {
    return static_cast<float>(reinterpret_cast<const int8_t*>(matrix.values)[index]);
  } else if constexpr (std::is_same_v<Value, Int4>) {
    return static_cast<float>(((matrix.values[index / 2] >> 4 * (index & 1) & 15) ^ 8) - 8);
  } else if constexpr (std::is_same_v<Value, float>) {
    return reinterpret_cast<const float*>(matrix.values)[index];
  } else {
    return to_float(reinterpret_cast<const Value*>(matrix.values)[index]);
  }
}

template <int Bytes, int Words>
__device__ __forceinline__ void read_vectors(const uint8_t* from, uint32_t (&words)[Words]) {
  static_assert(Bytes <= 4 * Words);
  if constexpr (Bytes % 16 == 0) {
#pragma unroll
    for (int k = 0; k < Bytes / 16; ++k) {
      const uint4 four = reinterpret_cast<const uint4*>(from)[k];
      words[4 * k] = four.x;
      words[4 * k + 1] = four.y;
      words[4 * k + 2] = four.z;
      words[4 * k + 3] = four.w;
    }
  } else if constexpr (Bytes == 8) {
    const uint2 two = *reinterpret_cast<const uint2*>(from);
    words[0] = two.x;
    words[1] = two.y;
  } else if constexpr (Bytes == 4) {
    words[0] = *reinterpret_cast<const uint32_t*>(from);
  } else if constexpr (Bytes == 2) {
    words[0] = *reinterpret_cast<const uint16_t*>(from);
  } else {
    words[0] = from[0];
  }
}

// `Bytes` bytes from `first` on of `from`, which has `size` of them; zeros beyond. `aligned`: `from + first` suits a vector load.
template <int Bytes, int Words>
__device__ __forceinline__ void read_bytes(const uint8_t* from, int64_t first, int64_t size, bool aligned, uint32_t (&words)[Words]) {
  if (aligned && first + Bytes <= size) return read_vectors<Bytes>(from + first, words);
#pragma unroll
  for (int k = 0; k < Words; ++k) {
    words[k] = 0;
    const int64_t begin = first + 4 * k;
#pragma unroll 1
    for (int b = 0; b < (Bytes < 4 ? Bytes : 4) && begin + b < size; ++b) {
      words[k] |= static_cast<uint32_t>(from[begin + b]) << 8 * b;
    }
  }
}

// 16 columns of a row of a 2:4 or 1:4 matrix, as they are stored.
template <Places Form, class Value>
struct Chunk {
  static constexpr int kKept = Form == Places::kTwoOfFour ? 2 : 1;  // of four
  static constexpr int kValueBytes = kKept * kColumns / 4 * kBits<Value> / 8;
  static constexpr int kPlaceBytes = kKept;
  uint32_t words[(kValueBytes + 3) / 4], places[1];

  __device__ __forceinline__ void read(const SparseMatrix& matrix, int64_t row, int64_t column, bool aligned) {
    const int64_t chunk = column / kColumns;
    read_bytes<kValueBytes>(matrix.values + row * matrix.value_bytes, chunk * kValueBytes, matrix.value_bytes, aligned, words);
    read_bytes<kPlaceBytes>(matrix.row_places(row), chunk * kPlaceBytes, matrix.place_bytes, aligned, places);
  }

  __device__ __forceinline__ void expand(float (&weight)[kColumns]) const {
#pragma unroll
    for (int block = 0; block < kColumns / 4; ++block) {
      const float first = value_in<Value>(words, kKept * block);
      const uint32_t place = places[0] >> 2 * kKept * block & 3u;
#pragma unroll
      for (int c = 0; c < 4; ++c) weight[4 * block + c] = place == static_cast<uint32_t>(c) ? first : 0.0f;
      if constexpr (kKept == 2) {
        const float second = value_in<Value>(words, 2 * block + 1);
        const uint32_t other = places[0] >> (4 * block + 2) & 3u;
#pragma unroll
        for (int c = 1; c < 4; ++c) weight[4 * block + c] = other == static_cast<uint32_t>(c) ? second : weight[4 * block + c];
      }
    }
  }

  // Whether all chunks but a row's last one can be read as vectors.
  static bool is_aligned(const SparseMatrix& matrix) {
    constexpr int kVector = kValueBytes < 16 ? kValueBytes : 16;
    return reinterpret_cast<uintptr_t>(matrix.values) % kVector == 0 && matrix.value_bytes % kVector == 0 &&
           reinterpret_cast<uintptr_t>(matrix.places) % kPlaceBytes == 0 && matrix.place_bytes % kPlaceBytes == 0;
  }
};

// The scale of the 16 columns from `column` on. If they have several, they are applied to `weight`, and the result is 1.
template <class Value>
__device__ __forceinline__ float scale_of(const SparseMatrix& matrix, int64_t row, int64_t column, float (&weight)[kColumns]) {
  if constexpr (!kQuantized<Value>) return 1.0f;
  const float* const scales = matrix.scales + row * matrix.groups;
  if (matrix.groups == 1) return scales[0];
  const uint32_t first = static_cast<uint32_t>(column), size = static_cast<uint32_t>(matrix.group_size);
  uint32_t group = first / size;
  if (size % kColumns == 0) return scales[group];
  uint32_t left = size - (first - group * size);
  float scale = scales[group];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    if (left == 0 && column + c < matrix.in) {
      scale = scales[++group];
      left = size;
    }
    weight[c] *= scale;
    --left;
  }
  return 1.0f;
}

// Adds the bias and rounds.
template <class T>
__device__ __forceinline__ void put_as(const SparseProduct& product, int64_t out, int64_t input, int64_t row, float sum) {
  if (product.bias != nullptr) sum += load(static_cast<const T*>(product.bias)[row]);
  store(static_cast<T*>(product.result)[input * out + row], sum);
}

__device__ __forceinline__ void put(const SparseProduct& product, int64_t out, int64_t input, int64_t row, float sum) {
  switch (product.type) {
    case Type::kFloat32:
      return put_as<float>(product, out, input, row, sum);
    case Type::kBFloat16:
      return put_as<BFloat16>(product, out, input, row, sum);
    default:
      return put_as<Float16>(product, out, input, row, sum);
  }
}

inline int64_t divided(int64_t items, int64_t by) { return (items + by - 1) / by; }

// Calls work(value) with the type of the values.
template <class Work>
cudaError_t with_stored(Values type, const Work& work) {
  switch (type) {
    case Values::kFloat32:
      return work(float{});
    case Values::kBFloat16:
      return work(BFloat16{});
    case Values::kFloat16:
      return work(Float16{});
    case Values::kInt8:
      return work(Int8{});
    default:
      return work(Int4{});
  }
}

}  // namespace maskllm
