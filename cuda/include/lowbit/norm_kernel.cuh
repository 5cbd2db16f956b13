// RMSNorm and LayerNorm of rows, after the addition of a residual where there is one. Bound by memory: a row is read once
// and kept in registers.
#pragma once

#include "norm_rows.cuh"

namespace lowbit {

// Mirrored by NormOperands in rust/core/src/cuda/norm.rs. `residual` and `total` are both null or neither; `weight` and
// `bias` may be null. Strides are elements from a row to the next; `out` and `total` are dense.
struct Norm {
  const void* x;
  const void* residual;
  const void* weight;
  const void* bias;
  void* out;
  void* total;
  int64_t rows;
  int64_t cols;
  int64_t x_stride;
  int64_t residual_stride;
  float eps;
  Dtype weight_dtype;
  Dtype bias_dtype;
  // LayerNorm: the mean is subtracted.
  int32_t is_centered;
  // What is added to the weight: 1 for Gemma.
  float offset;
  // Llama: the normalized number is rounded to the dtype before it meets the weight.
  int32_t rounds_normalized;
};

// What differs in every number is known when a kernel is compiled: it has as many instructions as memory leaves time for.
template <bool kCentered, bool kRounded>
struct Kind {
  static constexpr bool is_centered = kCentered;
  static constexpr bool rounds_normalized = kRounded;
};

struct Statistics {
  float mean;
  float rstd;
};

// The factors of columns, as they are multiplied.
__device__ __forceinline__ void load_factors(const Norm& p, int64_t column, float (&factors)[kVector]) {
  if (p.weight == nullptr) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) factors[i] = 1.0f - p.offset;
  } else {
    load_vector(p.weight, p.weight_dtype, column, factors);
  }
}

// A row in the registers of kLanes threads, kVectors vectors each: vector v of a lane begins at column
// (v kLanes + lane) kVector. Those behind the last column are zero.
template <typename T, int kLanes, int kVectors>
struct Row {
  Vector<T, kVector> x[kVectors];
  int64_t index;
  int lane;
  bool is_inside;

  __device__ __forceinline__ int64_t column(int v) const { return (v * kLanes + lane) * kVector; }
  __device__ __forceinline__ bool holds(const Norm& p, int v) const { return is_inside && column(v) < p.cols; }

  __device__ __forceinline__ void load(const Norm& p) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      x[v] = {};
      if (holds(p, v)) x[v] = vector_at<T>(p.x, index * p.x_stride + column(v));
    }
  }

  // The sum is rounded as a sum of tensors is, and what follows sees it rounded.
  __device__ __forceinline__ void add_residual(const Norm& p) {
    Vector<T, kVector> residual[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (holds(p, v)) residual[v] = vector_at<T>(p.residual, index * p.residual_stride + column(v));
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!holds(p, v)) continue;
      float sums[kVector], addends[kVector];
      unpack(x[v], sums);
      unpack(residual[v], addends);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sums[i] += addends[i];
      x[v] = pack<T>(sums);
      *reinterpret_cast<Vector<T, kVector>*>(static_cast<T*>(p.total) + index * p.cols + column(v)) = x[v];
    }
  }

  __device__ __forceinline__ void forget() {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) forget_unpacked(x[v]);
  }

  __device__ __forceinline__ float sum() const {
    float sum = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float values[kVector];
      unpack(x[v], values);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum += values[i];
    }
    return sum;
  }

  template <typename K>
  __device__ __forceinline__ float squares(const Norm& p, float mean) const {
    float sum = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (K::is_centered && !holds(p, v)) continue;  // zeros add nothing unless they are moved
      float values[kVector];
      unpack(x[v], values);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float distance = K::is_centered ? values[i] - mean : values[i];
        sum = __fmaf_rn(distance, distance, sum);
      }
    }
    return sum;
  }
};

// A vector of the result: as exact as fp32 is, but for the rounding that Llama asks for.
template <typename T, typename K>
__device__ __forceinline__ Vector<T, kVector> scaled(const Norm& p, const Statistics& row, const Vector<T, kVector>& x,
                                                     const float (&factors)[kVector], int64_t column) {
  float values[kVector];
  unpack(x, values);
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = (K::is_centered ? values[i] - row.mean : values[i]) * row.rstd;
  if constexpr (K::rounds_normalized && sizeof(T) < 4) unpack(pack<T>(values), values);
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = __fmul_rn(values[i], factors[i] + p.offset);
  if (p.bias != nullptr) {
    float addends[kVector];
    load_vector(p.bias, p.bias_dtype, column, addends);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] += addends[i];
  }
  return pack<T>(values);
}

// For rows of whole vectors, aligned to them, of at most kLanes kVectors kVector columns. Weights of the dtype of x are
// on their way with the row; those of another are read after the sums. `finish(row)` is called at the end, with the
// result in the place of x.
template <typename T, int kLanes, int kVectors, typename K, typename Finish>
__device__ __forceinline__ void norm_vectors(const Norm& p, const Finish& finish) {
  constexpr int kRows = kBlock<kLanes> / kLanes;
  __shared__ alignas(16) float scratch[2][32];
  Row<T, kLanes, kVectors> row;
  row.index = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kLanes;
  row.lane = threadIdx.x % kLanes;
  row.is_inside = row.index < p.rows;
  row.load(p);
  const bool is_early = p.weight != nullptr && p.weight_dtype == kDtypeOf<T>;
  Vector<T, kVector> weights[kVectors];
  if (is_early) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (row.holds(p, v)) weights[v] = vector_at<T>(p.weight, row.column(v));
    }
  }
  if (p.residual != nullptr) row.add_residual(p);
  const float count = static_cast<float>(p.cols);
  Statistics of_row{0.0f, 0.0f};
  if constexpr (K::is_centered) {
    of_row.mean = row_sum<kLanes>(row.sum(), scratch[0]) / count;
    row.forget();
  }
  of_row.rstd = rsqrtf(row_sum<kLanes>(row.template squares<K>(p, of_row.mean), scratch[1]) / count + p.eps);
  row.forget();
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (!row.holds(p, v)) continue;
    float factors[kVector];
    if (is_early) unpack(weights[v], factors);
    else load_factors(p, row.column(v), factors);
    row.x[v] = scaled<T, K>(p, of_row, row.x[v], factors, row.column(v));
    *reinterpret_cast<Vector<T, kVector>*>(static_cast<T*>(p.out) + row.index * p.cols + row.column(v)) = row.x[v];
  }
  finish(row);
}

template <typename T, int kLanes, int kVectors, typename Finish>
__device__ __forceinline__ void norm_vectors_of_kind(const Norm& p, const Finish& finish) {
  if (p.is_centered) norm_vectors<T, kLanes, kVectors, Kind<true, false>>(p, finish);
  else if (p.rounds_normalized) norm_vectors<T, kLanes, kVectors, Kind<false, true>>(p, finish);
  else norm_vectors<T, kLanes, kVectors, Kind<false, false>>(p, finish);
}

// A thread may have as many registers as leave room for this many threads on a multiprocessor: with fewer rows under way,
// memory waits while one of them is summed.
template <int kBytes>
inline constexpr int kResident = kBytes > 8 ? 512 : kBytes > 4 ? 1024 : kBytes > 2 ? 1536 : 2048;

}  // namespace lowbit
