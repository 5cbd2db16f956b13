// Activations in int8 with a scale for each row, and the columns of outliers beside them: what `LLM.int8()` multiplies
// (Dettmers et al., arXiv 2208.07339).
//
// A number is an outlier unless its magnitude is below the threshold, and a column is one of outliers if any of its
// numbers is. An outlier's code is 0; the other codes of such a column stay, and the product adds what x is beyond
// them.
#pragma once

#include "dtype.cuh"

namespace lowbit {

constexpr float kLargestInt8 = 127.0f;

// Where the outliers of a call are told of, int32: a bit for each column, zero at the start; how many columns have
// them, and which, in ascending order. As in rust/core/src/cuda/int8.rs.
struct Outliers {
  int32_t* memory;
  int32_t words;

  static __host__ __device__ int32_t words_of(int64_t cols) { return static_cast<int32_t>((cols + 31) / 32); }

  __device__ __forceinline__ uint32_t* flags() const { return reinterpret_cast<uint32_t*>(memory); }
  __device__ __forceinline__ int32_t* count() const { return memory + words; }
  __device__ __forceinline__ int32_t* columns() const { return memory + words + 1; }
};

// Mirrored by `RowOperands` in rust/core/src/cuda/int8.rs.
struct RowOperands {
  const void* x;
  int8_t* codes;
  float* scales;
  int32_t* outliers;  // null where there is no threshold
  int64_t x_stride;
  int64_t codes_stride;  // codes behind the last column are written, as zeros
  int32_t cols;
  float threshold;

  // Magnitudes from here on, as integers, are outliers.
  __device__ __forceinline__ uint32_t limit() const {
    return outliers == nullptr ? ~0u : __float_as_uint(threshold);
  }
};

// Mirrored by `GatherOperands` in rust/core/src/cuda/int8.rs.
struct GatherOperands {
  const void* x;
  const int8_t* codes;
  const float* scales;
  int32_t* outliers;
  const int8_t* weights;
  void* x_side;
  void* w_side;
  int64_t x_stride;
  int64_t codes_stride;
  int32_t cols;
  int32_t rows;
  int32_t tokens;
};

// Numbers of a row beside the integers: more columns of outliers than there is room for go a slower way.
constexpr int kSideCapacity = 256;

// How outliers are multiplied: in 16 bits, of which fp32 takes two times bfloat16.
template <typename T>
struct Side {
  using Number = T;
  static constexpr int kParts = 1;
};
template <>
struct Side<float> {
  using Number = bfloat16;
  static constexpr int kParts = 2;
};

// The magnitude as an integer: in the order of the numbers, NaN above infinity.
__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffff; }

// How the numbers of a row become codes and back.
struct Rounding {
  float inverse;
  float scale;

  __device__ __forceinline__ explicit Rounding(float absmax) {
    inverse = __fdiv_rn(kLargestInt8, absmax);
    const bool is_tiny = magnitude(inverse) >= 0x7f800000 && absmax < 1.0f;
    if (is_tiny) inverse = 0.0f;
    scale = is_tiny ? 0.0f : __fdiv_rn(absmax, kLargestInt8);
  }

  // The last byte of what is added to this is the nearest integer, ties to even: larger floats have no fraction.
  __device__ __forceinline__ uint8_t code(float x) const {
    constexpr float kIntegers = 12582912.0f;  // 1.5 * 2^23
    return static_cast<uint8_t>(__float_as_uint(__fadd_rn(__fmul_rn(x, inverse), kIntegers)));
  }
};

// What a number is beyond its code, in 16 bits: all, or the first or second part of fp32.
template <typename T>
__device__ __forceinline__ typename Side<T>::Number beyond_code(float x, int8_t code, float scale, int part) {
  using Number = typename Side<T>::Number;
  const float all = fmaf(-scale, static_cast<float>(code), x);
  const Number upper = from_float<Number>(all);
  if (part == 0) return upper;
  const float rest = all - to_float(upper);
  return from_float<Number>(magnitude(rest) < 0x7f800000 ? rest : 0.0f);
}

}  // namespace lowbit
