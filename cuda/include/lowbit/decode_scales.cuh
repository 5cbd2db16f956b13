// Scales of a visit as fp32, read from a stage.
#pragma once

#include "decode_plan.cuh"

namespace lowbit {

// Of four groups of a row.
struct FourNumbers {
  float of[4];
};

// Groups that share a block get the block's number: `log_share` is log2 of the groups of a block. Numbers of 4 bytes
// have been copied for every group.
__device__ __forceinline__ void spread(FourNumbers& numbers, int log_share) {
  if (log_share == 0) return;
  numbers.of[2] = numbers.of[3] = log_share == 1 ? numbers.of[1] : numbers.of[0];
  numbers.of[1] = numbers.of[0];
}

// Both ways are short, and a choice between results leaves the order of instructions free.
__device__ __forceinline__ float float_of_16_bits(uint32_t bits, Dtype dtype) {
  const float of_float16 = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  return dtype == Dtype::kBfloat16 ? __uint_as_float(bits << 16) : of_float16;
}

// What turns stored scales into numbers.
struct ScaleMeaning {
  Dtype dtype;       // of scales of 16 bits
  int log_share;     // log2 of the groups of a block
  int bits_below;    // where the unit's first number lies in its word
  const float* map;  // the values of 8-bit codes
  float offset;      // of double-quantized scales
  int lane;
};

// Scales of a row and four groups, as they lie in the stage. Reading is apart from decoding, for as long as they are
// read the stage cannot be filled again.
template <Scales kScales>
struct StoredScales;

template <>
struct StoredScales<Scales::k32> {
  float4 values;

  __device__ __forceinline__ void read(const uint8_t* row, int quad) {
    values = *reinterpret_cast<const float4*>(row + quad * 16);
  }
  __device__ __forceinline__ FourNumbers decode(const ScaleMeaning&) const {
    return {values.x, values.y, values.z, values.w};
  }
};

template <>
struct StoredScales<Scales::k16> {
  uint2 words;

  __device__ __forceinline__ void read(const uint8_t* row, int quad) {
    words = *reinterpret_cast<const uint2*>(row + quad * 8);
  }
  __device__ __forceinline__ FourNumbers decode(const ScaleMeaning& meaning) const {
    const uint32_t first = words.x >> meaning.bits_below;
    FourNumbers scales = {
        float_of_16_bits(first & 0xffffu, meaning.dtype), float_of_16_bits(first >> 16, meaning.dtype),
        float_of_16_bits(words.y & 0xffffu, meaning.dtype), float_of_16_bits(words.y >> 16, meaning.dtype)};
    spread(scales, meaning.log_share);
    return scales;
  }
};

template <>
struct StoredScales<Scales::kDouble> {
  uint32_t codes;
  float scale_2;

  __device__ __forceinline__ void read(const uint8_t* row, int quad) {
    codes = *reinterpret_cast<const uint32_t*>(row + quad * 4);
    scale_2 = *reinterpret_cast<const float*>(row + kScale2Offset);
  }
  __device__ __forceinline__ FourNumbers decode(const ScaleMeaning& meaning) const {
    // A lane decodes the scale of its own group, t, and the four lanes of a row tell one another.
    const int t = meaning.lane % 4;
    const float value =
        meaning.map[(codes >> meaning.bits_below >> (8 * (t >> meaning.log_share)) & 255)];
    // Two roundings, by definition.
    const float scale = __fadd_rn(__fmul_rn(value, scale_2), meaning.offset);
    FourNumbers scales;
#pragma unroll
    for (int i = 0; i < 4; ++i) scales.of[i] = __shfl_sync(kWholeWarp, scale, meaning.lane - t + i);
    return scales;
  }
};

}  // namespace lowbit
