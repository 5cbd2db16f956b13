// Scales to 8-bit codes: double quantization.
#pragma once

#include "quantize_codes.cuh"

namespace lowbit {

// Sums of both numbers over the CTA, in an order that does not change, in thread 0.
__device__ __forceinline__ double2 sum_over_cta(double2 value) {
  __shared__ double2 scratch[kThreads];
  scratch[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      scratch[threadIdx.x].x += scratch[threadIdx.x + half].x;
      scratch[threadIdx.x].y += scratch[threadIdx.x + half].y;
    }
    __syncthreads();
  }
  return scratch[0];
}

// Sums and counts of the finite scales that fall to each CTA, into sums[2 * blockIdx.x].
__device__ void sum_scales(const float* scales, int64_t count, double* sums) {
  double sum = 0.0, finite = 0.0;
  constexpr int kUnroll = 8;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += kUnroll * step) {
    float values[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) values[u] = i + u * step < count ? scales[i + u * step] : NAN;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const bool is_finite = fabsf(values[u]) < INFINITY;
      sum += is_finite ? values[u] : 0.0f;
      finite += is_finite ? 1.0 : 0.0;
    }
  }
  const double2 total = sum_over_cta(make_double2(sum, finite));
  if (threadIdx.x == 0) {
    sums[2 * blockIdx.x] = total.x;
    sums[2 * blockIdx.x + 1] = total.y;
  }
}

// The largest number that is nearer to value `code` of the dynamic map than to the next one, a tie going to the even
// code: to tell codes apart, comparing in fp32 is as good as comparing in fp64.
__device__ __forceinline__ float upper_end(int code) {
  const double middle = 0.5 * (static_cast<double>(lowbit_dynamic_map[code]) + lowbit_dynamic_map[code + 1]);
  const float end = __double2float_rd(middle);
  return code % 2 == 1 && static_cast<double>(end) == middle ? nextafterf(end, -INFINITY) : end;
}

// Where the end of a code lies in a table: those that one step of a search reads, 2^n apart, are in different banks.
__device__ __forceinline__ int place_of_end(int code) { return code + code / kWarp; }

// The code of the dynamic map's value nearest to u. NaN takes the lowest.
__device__ __forceinline__ int nearest(const float* ends, float u) {
  int code = 0;
#pragma unroll
  for (int step = 128; step > 0; step /= 2) code += u > ends[place_of_end(code + step - 1)] ? step : 0;
  return code;
}

__device__ __forceinline__ double sum_over_warp(double value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// A warp for each 256 scales, a CTA after the other: codes, the second-level scale, and once for all the offset.
__device__ void quantize_scales(const float* scales, int64_t count, const double* sums, int32_t sum_count,
                                uint8_t* codes, float* scale_2, float* scale_offset) {
  constexpr int kEach = kScalesPerScale2 / kWarp;
  __shared__ float ends[kScalesPerScale2 + kScalesPerScale2 / kWarp];
  const int thread = threadIdx.x, lane = thread % kWarp;
  ends[place_of_end(thread)] = thread < kScalesPerScale2 - 1 ? upper_end(thread) : INFINITY;
  double sum = 0.0, finite = 0.0;
#pragma unroll
  for (int i = 0; i < kThreads / kWarp; ++i) {
    // All loads at once; as many partial sums as one for each thread are the most there are.
    const int at = i * kWarp + lane;
    const bool is_there = at < sum_count;
    sum += is_there ? sums[2 * at] : 0.0;
    finite += is_there ? sums[2 * at + 1] : 0.0;
  }
  const float offset = static_cast<float>(sum_over_warp(sum) / fmax(sum_over_warp(finite), 1.0));
  if (blockIdx.x == 0 && thread == 0) *scale_offset = offset;
  __syncthreads();
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kThreads + thread - lane;
  for (int64_t first = begin; first * kEach < count; first += step) {
    float values[kEach];
    float absmax = 0.0f;
    bool all_finite = true;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t index = first * kEach + i * kWarp + lane;
      values[i] = index < count ? scales[index] : offset;
      all_finite = all_finite && fabsf(values[i]) < INFINITY;
      absmax = fmaxf(absmax, fabsf(values[i] - offset));
    }
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      absmax = fmaxf(absmax, __shfl_xor_sync(kAllLanes, absmax, lanes));
    }
    if (!__all_sync(kAllLanes, all_finite)) absmax = NAN;
    const float inverse = 1.0f / absmax;
    const float factor = fabsf(inverse) < INFINITY ? inverse : 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t index = first * kEach + i * kWarp + lane;
      if (index < count) codes[index] = static_cast<uint8_t>(nearest(ends, __fmul_rn(values[i] - offset, factor)));
    }
    if (lane == 0) scale_2[first / kWarp] = absmax;
  }
}

}  // namespace lowbit
