// Scales of a visit as fp32, read from a stage of the ring.
#pragma once

#include "decode_ring.cuh"

namespace lowbit {

// Of four groups of a row.
struct FourNumbers {
  float of[4];
};

// Groups that share a block get the block's number: `log_share` is log2 of the groups of a block. Numbers of 4 bytes have been
// copied for every group.
__device__ __forceinline__ void spread(FourNumbers& numbers, int log_share) {
  if (log_share == 0) return;
  numbers.of[2] = numbers.of[3] = log_share == 1 ? numbers.of[1] : numbers.of[0];
  numbers.of[1] = numbers.of[0];
}

__device__ __forceinline__ FourNumbers read_float32(const uint8_t* from) {
  const float4 values = *reinterpret_cast<const float4*>(from);
  return {values.x, values.y, values.z, values.w};
}

__device__ __forceinline__ FourNumbers read_16_bit(const uint8_t* from, Dtype dtype, int bits_below) {
  uint2 words = *reinterpret_cast<const uint2*>(from);
  words.x >>= bits_below;
  if (dtype == Dtype::kBfloat16) {
    return {__uint_as_float(words.x << 16), __uint_as_float(words.x & 0xffff0000u), __uint_as_float(words.y << 16),
            __uint_as_float(words.y & 0xffff0000u)};
  }
  const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&words.x));
  const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&words.y));
  return {low.x, low.y, high.x, high.y};
}

// `map` is this lane's copy of the values of the 8-bit codes.
__device__ __forceinline__ FourNumbers read_double_quantized(const uint8_t* from, const uint8_t* scale_2_from, const float* map,
                                                             float offset, int bits_below) {
  const uint32_t codes = *reinterpret_cast<const uint32_t*>(from) >> bits_below;
  const float scale_2 = *reinterpret_cast<const float*>(scale_2_from);
  FourNumbers scales;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float value = map[(codes >> (8 * i) & 255) * kScaleMapCopies];
    // Two roundings, by definition.
    scales.of[i] = __fadd_rn(__fmul_rn(value, scale_2), offset);
  }
  return scales;
}

}  // namespace lowbit
