// From codes to operand A of linear_batch: 16 rows of the weight and 16 in-features, in their natural order, each
// weight rounded once to the type of the activations.
//
// The values of codes are looked up as fp16, all of a table divided by one power of two so that its largest lies near
// the top of fp16's range: relative to the largest a value keeps 11 bits down to 2^-29. fp32 takes it from there.
#pragma once

#include "batch_plan.cuh"
#include "decode_math.cuh"

namespace lowbit {

// log2 of where the largest value of a table is put: at least 2^14.
constexpr int kTableTop = 14;

// Writes the table of code values and returns what they were divided by.
__device__ __forceinline__ float write_batch_table(const Weight& w, uint8_t* table, int warp, int warps, int lane) {
  if (w.bits == 8) return 1.0f;
  const int code = lane % kCodebookLength;
  const float value = w.codebook == nullptr ? w.table[code] : code < w.codebook_length ? w.codebook[code] : 0.0f;
  float largest = fabsf(value);
#pragma unroll
  for (int i = 1; i < kCodebookLength; i *= 2) largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, i));
  // Powers of two that fp32 has; a table of zeros stays one.
  const int exponent = min(max(static_cast<int>(__float_as_uint(largest) >> 23) - 127 - kTableTop, -126), 126);
  const float divisor = __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23);
  const float inverse = __uint_as_float(static_cast<uint32_t>(127 - exponent) << 23);
  write_pair_table<float16>(table, value * inverse, warp, warps, lane);
  return divisor;
}

__device__ __forceinline__ uint32_t pack_pair(float low, float high, bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ uint32_t pack_pair(float low, float high, float16) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// A pair of code values as weights.
template <typename T>
__device__ __forceinline__ uint32_t scaled_pair(uint32_t halves, float scale, float shift) {
  const float2 values = __half22float2(*reinterpret_cast<const __half2*>(&halves));
  return pack_pair(fmaf(values.x, scale, shift), fmaf(values.y, scale, shift), T{});
}

// The scales and shifts of rows g and g + 8 in a block.
struct RowNumbers {
  float scales[2], shifts[2];
};

// One lane: of operand A it has rows g and g + 8, and in-features 2 t, 2 t + 1, 2 t + 8, 2 t + 9.
struct BatchDecoder {
  const uint8_t* table;
  const BatchStage& layout;
  int bits, log_blocks;
  bool has_shift;
  int g;
  uint32_t lane_offset;  // of this lane's copy of the table
  uint32_t selector;     // of 4 bits: byte t of a word as an address; of 8 bits: 16 bits t of two words

  __device__ __forceinline__ BatchDecoder(const Weight& w, const BatchOperands& operands, const BatchStage& layout_,
                                          const uint8_t* table_, int lane)
      : table(table_),
        layout(layout_),
        bits(w.bits),
        log_blocks(operands.log_blocks),
        has_shift(w.shifts != nullptr),
        g(lane / 4),
        lane_offset(lane * 4),
        selector(w.bits == 4 ? 0x7604 | lane % 4 << 4 : 0x10 + 0x22 * (lane % 4)) {}

  // The 16 rows from `row` on and `kCount` times 16 in-features, from `first` on, of a step.
  template <typename T, int kCount>
  __device__ __forceinline__ void decode(uint32_t (&a)[kCount][4], const uint8_t* stage, int row, int first) const {
    uint32_t halves[kCount][4];
    if (bits == 4) look_up(halves, stage + layout.codes, row + g, first);
    else convert(halves, stage + layout.codes, row + g, first);
    RowNumbers numbers;
    read_numbers(numbers, stage, row + g);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (log_blocks > 0) read_numbers(numbers, stage, ((first + i) >> (2 - log_blocks)) * kBatchRows + row + g);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        a[i][j] = scaled_pair<T>(halves[i][j], numbers.scales[j % 2], numbers.shifts[j % 2]);
      }
    }
  }

 private:
  __device__ __forceinline__ void read_numbers(RowNumbers& numbers, const uint8_t* stage, int place) const {
    const float* scales = reinterpret_cast<const float*>(stage + layout.scales) + place;
    numbers.scales[0] = scales[0], numbers.scales[1] = scales[8];
    numbers.shifts[0] = numbers.shifts[1] = 0.0f;
    if (has_shift) {
      const float* shifts = reinterpret_cast<const float*>(stage + layout.shifts) + place;
      numbers.shifts[0] = shifts[0], numbers.shifts[1] = shifts[8];
    }
  }

  __device__ __forceinline__ uint32_t look_up_byte(uint32_t word) const {
    return *reinterpret_cast<const uint32_t*>(table + __byte_perm(word, lane_offset, selector));
  }

  // Four lanes read the same 16 bytes of a row, 32 in-features, and each takes its byte of every word.
  template <int kCount>
  __device__ __forceinline__ void look_up(uint32_t (&halves)[kCount][4], const uint8_t* codes, int row,
                                          int first) const {
    static_assert(kCount % 2 == 0, "16 bytes are 32 codes");
    const uint8_t* from = codes + row * (kStepCols / 2);
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int place = ((first + i) / 2 ^ (row >> 2 & 1)) * 16 + half * (8 * kStepCols / 2);
        const uint4 words = *reinterpret_cast<const uint4*>(from + place);
        halves[i][half] = look_up_byte(words.x);
        halves[i][half + 2] = look_up_byte(words.y);
        halves[i + 1][half] = look_up_byte(words.z);
        halves[i + 1][half + 2] = look_up_byte(words.w);
      }
    }
  }

  template <int kCount>
  __device__ __forceinline__ void convert(uint32_t (&halves)[kCount][4], const uint8_t* codes, int row,
                                          int first) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint8_t* from = codes + (row + half * 8) * kStepCols + (first + i) * 16;
        const uint4 words = *reinterpret_cast<const uint4*>(from);
        halves[i][half] = convert_int8_pair<float16>(__byte_perm(words.x, words.y, selector), 0);
        halves[i][half + 2] = convert_int8_pair<float16>(__byte_perm(words.z, words.w, selector), 0);
      }
    }
  }
};

}  // namespace lowbit
