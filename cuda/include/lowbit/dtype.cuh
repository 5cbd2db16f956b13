// The floating-point types of tensors, converted to and from fp32 with one rounding to nearest, ties to even.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace lowbit {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

// The numbers of dtypes that are known at run time only; as in rust/core/src/cuda/weight.rs.
enum class Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(float16 value) { return __half2float(value); }
__device__ __forceinline__ float to_float(bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) { return value; }
template <>
__device__ __forceinline__ float16 from_float<float16>(float value) { return __float2half_rn(value); }
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float value) { return __float2bfloat16_rn(value); }

// Element `index` of a buffer whose dtype is known at run time.
__device__ __forceinline__ float load(const void* buffer, Dtype dtype, int64_t index) {
  switch (dtype) {
    case Dtype::kFloat32: return static_cast<const float*>(buffer)[index];
    case Dtype::kFloat16: return to_float(static_cast<const float16*>(buffer)[index]);
    default: return to_float(static_cast<const bfloat16*>(buffer)[index]);
  }
}

// Stores `value` with one rounding and returns what was stored.
__device__ __forceinline__ float store(void* buffer, Dtype dtype, int64_t index, float value) {
  switch (dtype) {
    case Dtype::kFloat32: static_cast<float*>(buffer)[index] = value; return value;
    case Dtype::kFloat16: {
      const float16 stored = from_float<float16>(value);
      static_cast<float16*>(buffer)[index] = stored;
      return to_float(stored);
    }
    default: {
      const bfloat16 stored = from_float<bfloat16>(value);
      static_cast<bfloat16*>(buffer)[index] = stored;
      return to_float(stored);
    }
  }
}

// What `store` would return.
__device__ __forceinline__ float rounded(Dtype dtype, float value) {
  switch (dtype) {
    case Dtype::kFloat32: return value;
    case Dtype::kFloat16: return to_float(from_float<float16>(value));
    default: return to_float(from_float<bfloat16>(value));
  }
}

// Consecutive numbers, moved in 16-byte accesses: 8 of 2 bytes, or twice 4 of 4.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Vector {
  T values[kCount];
};

}  // namespace lowbit

// Expands `ENTRY(name, type)` for every dtype: the one place where kernels are instantiated for them.
#define LOWBIT_FOR_EACH_DTYPE(ENTRY) \
  ENTRY(float32, float)              \
  ENTRY(float16, lowbit::float16)    \
  ENTRY(bfloat16, lowbit::bfloat16)
