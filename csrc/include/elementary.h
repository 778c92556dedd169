// exp and log in fp32, accurate to about one unit in the last place. They use only arithmetic that every vector unit has.
//
// The polynomials are minimax fits of the relative error (iteratively reweighted least squares on Chebyshev nodes).
#pragma once

#include "platform.h"

namespace maskllm {

// Natural logarithm of a positive normal number.
MASKLLM_INLINE float log_of(float x) {
  // x = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
  const uint32_t bits = bits_of(x);
  const uint32_t above_root = bits - 0x3f3504f3u;  // the bits of sqrt(1/2)
  const int32_t exponent = static_cast<int32_t>(above_root) >> 23;
  const float f = float_of((above_root & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  float p = 0.087003596f;
  p = p * f - 0.14267476f;
  p = p * f + 0.14914787f;
  p = p * f - 0.16577587f;
  p = p * f + 0.19963062f;
  p = p * f - 0.25001338f;
  p = p * f + 0.3333391f;
  // log(1 + f) = f - f^2 / 2 + f^3 P(f). e log 2 is added in two parts; the first part is exact.
  const float e = float_of(0x4b400000u + static_cast<uint32_t>(exponent)) - 12582912.0f;  // converts e: the low bits of 1.5 * 2^23 + e
  const float square = f * f;
  const float tail = square * (f * p - 0.5f) + e * -2.12194440e-4f;
  return (tail + f) + e * 0.693359375f;
}

// e^x for x <= 0. Below -87.68, where the result would be subnormal, it is 0.
MASKLLM_INLINE float exp_of(float x) {
  const float bounded = x < -88.0f ? -88.0f : x;
  // x = n log 2 + r with |r| <= log(2) / 2. Adding 1.5 * 2^23 rounds to the integer n, which is then in the low bits.
  const float shifted = bounded * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float q = 0.0013813142f;
  q = q * r + 0.008369419f;
  q = q * r + 0.041668456f;
  q = q * r + 0.16666515f;
  q = q * r + 0.49999994f;
  const float mantissa = (r * r) * q + r + 1.0f;
  // 2^n has the exponent field n + 127. For n = -127 the field, and so the result, is 0. The shift removes the constant's own bits.
  return mantissa * float_of((bits_of(shifted) + 127u) << 23);
}

}  // namespace maskllm
