// From codes to operand A of linear_batch: 16 rows of the weight and 16 in-features, in their natural order, as numbers of
// the activations' type T.
//
// A code's value is rounded to T (those of integers are exact), a scale is the sum of two T's, and their product is rounded
// once: |w' - w| <= (2 u + u^2) |w| with the unit roundoff u of T. A shift is such a sum as well, and costs one rounding
// of the sum more.
#pragma once

#include "batch_plan.cuh"
#include "decode_math.cuh"

namespace lowbit {

template <typename T>
struct PairOf;
template <>
struct PairOf<bfloat16> {
  using Type = __nv_bfloat162;
};
template <>
struct PairOf<float16> {
  using Type = __half2;
};
template <typename T>
using Pair = typename PairOf<T>::Type;

template <typename T>
__device__ __forceinline__ Pair<T> pair_of(uint32_t bits) {
  return *reinterpret_cast<const Pair<T>*>(&bits);
}
template <typename P>
__device__ __forceinline__ uint32_t bits_of_pair(const P& pair) {
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// A number as the sum of two T's, each of them twice.
template <typename T>
__device__ __forceinline__ uint2 split_number(float value) {
  const T high = from_float<T>(value);
  const float rest = value - to_float(high);
  const uint32_t high_bits = bits_of<T>(value), low_bits = isfinite(to_float(high)) ? bits_of<T>(rest) : 0;
  return make_uint2(high_bits * 0x10001u, low_bits * 0x10001u);
}

// What int8 codes are divided by: scales of fp16 would else be too small for its full precision.
template <typename T>
constexpr float kInt8Divisor = 1.0f;
template <>
constexpr float kInt8Divisor<float16> = 128.0f;

// Of a code, `lane` % 16, its value; and what the table is divided by: a power of two that makes the largest at least 1 and
// less than 2, where fp16 has its full precision. Powers that fp32 has, and their inverses; a table of zeros stays one.
struct BatchCodebook {
  float value, divisor, inverse;

  __device__ __forceinline__ BatchCodebook(const Weight& w, int lane) {
    const int code = lane % kCodebookLength;
    value = w.codebook == nullptr ? w.table[code] : code < w.codebook_length ? w.codebook[code] : 0.0f;
    float largest = fabsf(value);
#pragma unroll
    for (int i = 1; i < kCodebookLength; i *= 2) largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, i));
    const uint32_t exponent = min(max(__float_as_uint(largest) >> 23, 1u), 253u);
    divisor = __uint_as_float(exponent << 23);
    inverse = __uint_as_float((254 - exponent) << 23);
  }
};

// Bytes 0 and 1 of `codes`, int8, divided by kInt8Divisor. Exact.
template <typename T>
__device__ __forceinline__ uint32_t int8_pair(uint32_t codes);
template <>
__device__ __forceinline__ uint32_t int8_pair<bfloat16>(uint32_t codes) {
  return convert_int8_pair<bfloat16>(codes, 0);
}
template <>
__device__ __forceinline__ uint32_t int8_pair<float16>(uint32_t codes) {
  // 1024 + 128 + the code, as fp16.
  const uint32_t shifted = __byte_perm(codes ^ 0x80808080u, 0x64646464u, 0x4140);
  return bits_of_pair(__hfma2(pair_of<float16>(shifted), __float2half2_rn(1.0f / 128.0f), __float2half2_rn(-9.0f)));
}

// Of a row and a block: both parts of the scale, and of the shift.
struct SplitNumbers {
  uint2 scale, shift;
};

// Of rows g and g + 8 of a lane.
struct RowNumbers {
  SplitNumbers upper, lower;
};

template <typename T, bool kShift>
__device__ __forceinline__ uint32_t scaled_pair(uint32_t values, const SplitNumbers& numbers) {
  const Pair<T> value = pair_of<T>(values), high = pair_of<T>(numbers.scale.x), low = pair_of<T>(numbers.scale.y);
  if constexpr (!kShift) return bits_of_pair(__hfma2(value, high, __hmul2(value, low)));
  const Pair<T> rest = __hfma2(value, low, pair_of<T>(numbers.shift.y));
  return bits_of_pair(__hadd2(__hfma2(value, high, pair_of<T>(numbers.shift.x)), rest));
}

// The same value, which the compiler does not know how to make again: it stays in a register, and loops do not begin with
// arithmetic on thread numbers and parameters.
__device__ __forceinline__ uint32_t kept(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// One lane: of operand A it has rows g and g + 8, and in-features 2 t, 2 t + 1, 2 t + 8, 2 t + 9. It begins with `row` of the
// tile and the 16 in-features `first` of a step; others are told relative to these.
template <typename T, typename Shape>
struct BatchDecoder {
  uint32_t table;          // where this lane's copy lies in shared memory
  uint32_t codes, scales;  // places in a stage
  uint32_t selector;       // of 4 bits: byte t of a word as an address; of 8 bits: 16 bits t of two words
  uint32_t shift_distance; // from scales to shifts
  int bits, first, blocks_shift;  // blocks_shift: from 16 in-features of a step to their block
  bool has_shift;

  __device__ __forceinline__ BatchDecoder(const Weight& w, const BatchOperands& operands, const BatchStage& layout,
                                          const uint8_t* table_, int row, int first_, int lane)
      : table(shared_address(table_)),
        selector(kept(w.bits == 4 ? 0x7604 | lane % 4 << 4 : 0x10 + 0x22 * (lane % 4))),
        shift_distance(layout.shifts - layout.scales),
        bits(w.bits),
        first(first_),
        blocks_shift(kLogSixteenths - operands.log_blocks),
        has_shift(w.shifts != nullptr) {
    const int g = lane / 4, chunks = Shape::kCols * w.bits / 128, chunk = w.bits == 4 ? first / 2 : first;
    codes = kept(layout.codes + ((row + g) * chunks + code_place(row + g, chunk, chunks)) * 16);
    scales = kept(layout.scales + (row + g + (first >> blocks_shift) * Shape::kRows) * Shape::kNumberBytes);
    lane_offset = kept(lane * 4);
  }

  // The 16 rows of row tile `tile`, and `kCount` times 16 in-features from `sixteenth` on, before their scales.
  template <bool kIsCommon, int kCount>
  __device__ __forceinline__ void decode_values(uint32_t (&a)[kCount][4], uint32_t stage, int tile, int sixteenth) const {
    // Uniform in a warp.
    if (kIsCommon || bits == 4) look_up(a, stage, tile, sixteenth);
    else convert(a, stage, tile, sixteenth);
  }

  // And with their scales and shifts. Common weights keep `numbers` for 64 in-features.
  template <bool kIsCommon, int kCount>
  __device__ __forceinline__ void decode(uint32_t (&a)[kCount][4], uint32_t stage, int tile, int sixteenth,
                                         RowNumbers& numbers) const {
    if (kIsCommon && sixteenth % 4 == 0) numbers = load_numbers<false>(stage, tile, sixteenth);
    decode_values<kIsCommon>(a, stage, tile, sixteenth);
    if (has_shift && !kIsCommon) scale<true, false>(a, stage, tile, sixteenth, numbers);
    else scale<false, kIsCommon>(a, stage, tile, sixteenth, numbers);
  }

  // Whether it is of what most weights are: 4 bits, no shifts, and blocks of at least 64.
  __device__ __forceinline__ bool is_common() const { return bits == 4 && !has_shift && blocks_shift >= 2; }

  // fp32 scales of rows g and g + 8, of the block of `sixteenth`.
  __device__ __forceinline__ float2 scales_of_sums(uint32_t stage, int sixteenth) const {
    const uint32_t from = stage + scales + (sixteenth >> blocks_shift) * (Shape::kRows * 4);
    return {__uint_as_float(load_shared_4(from)), __uint_as_float(load_shared_4(from + 32))};
  }

 private:
  static constexpr int kLogSixteenths = Shape::kPanels == 1 ? 2 : 3;
  uint32_t lane_offset;

  template <bool kShift>
  __device__ __forceinline__ RowNumbers load_numbers(uint32_t stage, int tile, int sixteenth) const {
    RowNumbers numbers;
    const int block = ((first + sixteenth) >> blocks_shift) - (first >> blocks_shift);
    const uint32_t from = stage + scales + tile * 128 + block * (Shape::kRows * 8);
    numbers.upper.scale = load_shared_8(from), numbers.lower.scale = load_shared_8(from + 64);
    if constexpr (kShift) {
      numbers.upper.shift = load_shared_8(from + shift_distance);
      numbers.lower.shift = load_shared_8(from + shift_distance + 64);
    }
    return numbers;
  }

  // With numbers that are loaded, or of the block of each sixteenth.
  template <bool kShift, bool kIsLoaded, int kCount>
  __device__ __forceinline__ void scale(uint32_t (&a)[kCount][4], uint32_t stage, int tile, int sixteenth,
                                        RowNumbers& numbers) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if constexpr (!kIsLoaded) numbers = load_numbers<kShift>(stage, tile, sixteenth + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) a[i][j] = scaled_pair<T, kShift>(a[i][j], j % 2 == 0 ? numbers.upper : numbers.lower);
    }
  }

  __device__ __forceinline__ uint32_t look_up_byte(uint32_t word) const {
    return load_shared_4(table + __byte_perm(word, lane_offset, selector));
  }

  // Four lanes read the same 16 bytes of a row, 32 in-features, and each takes its byte of every word.
  template <int kCount>
  __device__ __forceinline__ void look_up(uint32_t (&a)[kCount][4], uint32_t stage, int tile, int sixteenth) const {
    static_assert(kCount % 2 == 0, "16 bytes are 32 codes");
    constexpr int kRowBytes = Shape::kCols / 2;
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const uint32_t from = ((stage + codes) ^ (sixteenth + i) / 2 * 16) + tile * (16 * kRowBytes);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 words = load_shared_16(from + half * (8 * kRowBytes));
        a[i][half] = look_up_byte(words.x);
        a[i][half + 2] = look_up_byte(words.y);
        a[i + 1][half] = look_up_byte(words.z);
        a[i + 1][half + 2] = look_up_byte(words.w);
      }
    }
  }

  template <int kCount>
  __device__ __forceinline__ void convert(uint32_t (&a)[kCount][4], uint32_t stage, int tile, int sixteenth) const {
    constexpr int kRowBytes = Shape::kCols;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t from = ((stage + codes) ^ (sixteenth + i) * 16) + tile * (16 * kRowBytes);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 words = load_shared_16(from + half * (8 * kRowBytes));
        a[i][half] = int8_pair<T>(__byte_perm(words.x, words.y, selector));
        a[i][half + 2] = int8_pair<T>(__byte_perm(words.z, words.w, selector));
      }
    }
  }
};

}  // namespace lowbit
