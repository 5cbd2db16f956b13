// RMSNorm and LayerNorm of rows that are rounded to int8 on the way out, as `int8_rows` would round them: the result is
// written in its dtype, and its codes, scales and outliers beside it, without being read again.
#include "lowbit/int8_rows.cuh"
#include "lowbit/norm_kernel.cuh"

namespace lowbit {

// The largest of `value` over the lanes of a row.
template <int kLanes>
__device__ __forceinline__ uint32_t row_max(uint32_t value) {
#pragma unroll
  for (int step = (kLanes < 32 ? kLanes : 32) / 2; step > 0; step /= 2) {
    value = max(value, __shfl_xor_sync(~0u, value, step));
  }
  if constexpr (kLanes > 32) {
    __shared__ uint32_t of_warp[kLanes / 32];
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
    __syncthreads();
    value = __reduce_max_sync(~0u, of_warp[threadIdx.x % (kLanes / 32)]);
  }
  return value;
}

template <typename T, int kLanes, int kVectors>
__device__ __forceinline__ void round_row(const Norm& p, const RowOperands& o, const Row<T, kLanes, kVectors>& row) {
  const Outliers outliers{o.outliers, Outliers::words_of(o.cols)};
  const uint32_t limit = o.limit();
  uint32_t most = 0;
  uint32_t beyond[kVectors];  // a bit for each number: whether it is an outlier
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    beyond[v] = 0;
    if (!row.holds(p, v)) continue;
    float values[kVector];
    unpack(row.x[v], values);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const uint32_t bits = magnitude(values[i]);
      if (bits < limit) most = max(most, bits);
      else beyond[v] |= 1u << i;
    }
    const int column = static_cast<int>(row.column(v));
    if (beyond[v] != 0) atomicOr(outliers.flags() + column / 32, beyond[v] << column % 32);
  }
  const Rounding rounding(__uint_as_float(row_max<kLanes>(most)));
  if (!row.is_inside) return;
  if (row.lane == 0) o.scales[row.index] = rounding.scale;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t column = row.column(v);
    if (column >= o.codes_stride) continue;
    alignas(8) uint8_t codes[kVector] = {};
    if (column < p.cols) {
      float values[kVector];
      unpack(row.x[v], values);
#pragma unroll
      for (int i = 0; i < kVector; ++i) codes[i] = (beyond[v] >> i & 1) != 0 ? 0 : rounding.code(values[i]);
    }
    memcpy(__builtin_assume_aligned(o.codes + row.index * o.codes_stride + column, kVector), codes, kVector);
  }
}

}  // namespace lowbit

#define SHAPE(name, T, lanes, vectors)                                                                              \
  extern "C" __global__ void __launch_bounds__(                                                                     \
      lowbit::kBlock<lanes>, lowbit::kResident<sizeof(T) * vectors> / lowbit::kBlock<lanes>)                        \
      norm_int8_##name##_##lanes##x##vectors(const __grid_constant__ lowbit::Norm p,                                \
                                             const __grid_constant__ lowbit::RowOperands o) {                       \
    lowbit::norm_vectors_of_kind<T, lanes, vectors>(p, [&](const auto& row) { lowbit::round_row(p, o, row); });     \
  }
#define ENTRIES(name, T) LOWBIT_FOR_EACH_SHAPE(SHAPE, name, T)
LOWBIT_FOR_EACH_DTYPE(ENTRIES)
