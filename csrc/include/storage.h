// 16-bit floats in memory, converted with integer arithmetic that vectorizes. Rounds to nearest, ties to even.
#pragma once

#include "platform.h"

namespace maskllm {

enum class Type : int { kFloat32, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Calls work(value) with a value of the storage type: float, BFloat16 or Float16. Host code.
template <class Work>
void with_type(Type type, const Work& work) {
  switch (type) {
    case Type::kFloat32:
      return work(float{});
    case Type::kBFloat16:
      return work(BFloat16{});
    case Type::kFloat16:
      return work(Float16{});
  }
}

MASKLLM_INLINE float load(float value) { return value; }

MASKLLM_INLINE float load(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

MASKLLM_INLINE float load(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  // 0x0400 is the smallest normal number. Its exponent and larger ones are rebiased by 112. Smaller numbers are multiples of 2^-24.
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 5.9604644775390625e-8f;
  const uint32_t rebiased = (magnitude << 13) + (magnitude >= 0x7c00u ? 224u << 23 : 112u << 23);
  return float_of(sign | (magnitude < 0x0400u ? bits_of(subnormal) : rebiased));
}

MASKLLM_INLINE void store(float& to, float value) { to = value; }

MASKLLM_INLINE void store(BFloat16& to, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
}

MASKLLM_INLINE void store(Float16& to, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t rebiased = magnitude - (112u << 23);
  const uint32_t normal = (rebiased + 0xfffu + (rebiased >> 13 & 1u)) >> 13;
  // Adding 0.5 rounds a magnitude below 2^-14 to a multiple of 2^-24, which is then in the low bits.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to.bits = static_cast<uint16_t>(sign | half);
}

}  // namespace maskllm
