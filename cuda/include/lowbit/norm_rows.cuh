// What the kernels of norms share: vectors of a row in registers, and sums over the threads that have a row.
#pragma once

// What norms are built for: threads that have a row, and vectors of it that each has. The host has the same list.
#define LOWBIT_FOR_EACH_SHAPE(SHAPE, name, T) \
  SHAPE(name, T, 16, 1)                       \
  SHAPE(name, T, 32, 1)                       \
  SHAPE(name, T, 32, 2)                       \
  SHAPE(name, T, 128, 1)                      \
  SHAPE(name, T, 256, 1)                      \
  SHAPE(name, T, 256, 2)                      \
  SHAPE(name, T, 256, 4)                      \
  SHAPE(name, T, 512, 4)

#include <type_traits>

#include "dtype.cuh"

namespace lowbit {

constexpr int kThreads = 256;
constexpr int kVector = 8;

// Threads of a block: one row, or several where a warp or less is enough for one.
template <int kLanes>
inline constexpr int kBlock = kLanes > 32 ? kLanes : kThreads;

template <typename T>
inline constexpr Dtype kDtypeOf = Dtype::kFloat32;
template <>
inline constexpr Dtype kDtypeOf<float16> = Dtype::kFloat16;
template <>
inline constexpr Dtype kDtypeOf<bfloat16> = Dtype::kBfloat16;

template <typename T>
__device__ __forceinline__ Vector<T, kVector> vector_at(const void* buffer, int64_t index) {
  return *reinterpret_cast<const Vector<T, kVector>*>(static_cast<const T*>(buffer) + index);
}

template <typename T>
__device__ __forceinline__ void unpack(const Vector<T, kVector>& vector, float (&values)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; i += 2) {
    if constexpr (std::is_same_v<T, bfloat16>) {
      // As words: an instruction each, and no register for a half of one.
      const uint32_t pair = reinterpret_cast<const uint32_t&>(vector.values[i]);
      values[i] = __uint_as_float(pair << 16);
      values[i + 1] = __uint_as_float(pair & 0xffff0000u);
    } else {
      values[i] = to_float(vector.values[i]);
      values[i + 1] = to_float(vector.values[i + 1]);
    }
  }
}

template <typename T>
__device__ __forceinline__ Vector<T, kVector> pack(const float (&values)[kVector]) {
  Vector<T, kVector> vector;
#pragma unroll
  for (int i = 0; i < kVector; i += 2) {
    // Two at once, which the compiler does not make of conversions of one.
    if constexpr (std::is_same_v<T, float16>) {
      reinterpret_cast<__half2&>(vector.values[i]) = __floats2half2_rn(values[i], values[i + 1]);
    } else if constexpr (std::is_same_v<T, bfloat16>) {
      reinterpret_cast<__nv_bfloat162&>(vector.values[i]) = __floats2bfloat162_rn(values[i], values[i + 1]);
    } else {
      vector.values[i] = values[i];
      vector.values[i + 1] = values[i + 1];
    }
  }
  return vector;
}

// A vector of a buffer whose dtype is known at run time.
__device__ __forceinline__ void load_vector(const void* buffer, Dtype dtype, int64_t index, float (&values)[kVector]) {
  switch (dtype) {
    case Dtype::kFloat32: unpack(vector_at<float>(buffer, index), values); break;
    case Dtype::kFloat16: unpack(vector_at<float16>(buffer, index), values); break;
    default: unpack(vector_at<bfloat16>(buffer, index), values);
  }
}

// Makes the compiler unpack the numbers anew in what follows. It would keep what it unpacked for a sum in twice the
// registers, of which there are too few.
template <typename T>
__device__ __forceinline__ void forget_unpacked(Vector<T, kVector>& vector) {
  if constexpr (sizeof(T) == 2) {
    uint4& words = reinterpret_cast<uint4&>(vector);
    asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
  }
}

// The sum of `value` over the lanes of a row that are in one warp, the same in each of them.
template <int kLanes>
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = (kLanes < 32 ? kLanes : 32) / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// The sum of `value` over the lanes of a row, the same in each of them. `scratch` is this call's own, of the block.
template <int kLanes>
__device__ __forceinline__ float row_sum(float value, float* scratch) {
  value = warp_sum<kLanes>(value);
  if constexpr (kLanes > 32) {
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kLanes / 32; ++warp) value += scratch[warp];
  }
  return value;
}

}  // namespace lowbit
