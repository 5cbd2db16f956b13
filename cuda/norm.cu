// RMSNorm and LayerNorm of rows, after the addition of a residual where there is one.
#include "lowbit/norm_kernel.cuh"

namespace lowbit {

// For every row: a block each, which reads it anew for each sum.
template <typename T>
__device__ __forceinline__ void norm_elements(const Norm& p) {
  __shared__ alignas(16) float scratch[2][32];
  const float count = static_cast<float>(p.cols);
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    if (p.residual != nullptr) {
      const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
      T* total = static_cast<T*>(p.total) + row * p.cols;
      for (int64_t col = threadIdx.x; col < p.cols; col += kThreads) {
        total[col] = from_float<T>(to_float(x[col]) + to_float(residual[col]));
      }
      x = total;  // each thread reads what it wrote itself
    }
    Statistics of_row{0.0f, 0.0f};
    if (p.is_centered) {
      float sum = 0.0f;
      for (int64_t col = threadIdx.x; col < p.cols; col += kThreads) sum += to_float(x[col]);
      of_row.mean = row_sum<kThreads>(sum, scratch[0]) / count;
    }
    float squares = 0.0f;
    for (int64_t col = threadIdx.x; col < p.cols; col += kThreads) {
      const float distance = to_float(x[col]) - of_row.mean;
      squares = __fmaf_rn(distance, distance, squares);
    }
    of_row.rstd = rsqrtf(row_sum<kThreads>(squares, scratch[1]) / count + p.eps);
    for (int64_t col = threadIdx.x; col < p.cols; col += kThreads) {
      const float factor = p.weight == nullptr ? 1.0f : load(p.weight, p.weight_dtype, col) + p.offset;
      float value = (to_float(x[col]) - of_row.mean) * of_row.rstd;
      if (p.rounds_normalized) value = to_float(from_float<T>(value));
      value = __fmul_rn(value, factor);
      if (p.bias != nullptr) value += load(p.bias, p.bias_dtype, col);
      static_cast<T*>(p.out)[row * p.cols + col] = from_float<T>(value);
    }
    __syncthreads();  // before the next row's sums take the place of these
  }
}

}  // namespace lowbit

#define SHAPE(name, T, lanes, vectors)                                                                              \
  extern "C" __global__ void __launch_bounds__(                                                                     \
      lowbit::kBlock<lanes>, lowbit::kResident<sizeof(T) * vectors> / lowbit::kBlock<lanes>)                        \
      norm_##name##_##lanes##x##vectors(const __grid_constant__ lowbit::Norm p) {                                   \
    lowbit::norm_vectors_of_kind<T, lanes, vectors>(p, [](const auto&) {});                                         \
  }
#define ENTRIES(name, T)                                                                                            \
  LOWBIT_FOR_EACH_SHAPE(SHAPE, name, T)                                                                             \
  extern "C" __global__ void __launch_bounds__(lowbit::kThreads)                                                    \
      norm_elements_##name(const __grid_constant__ lowbit::Norm p) {                                                \
    lowbit::norm_elements<T>(p);                                                                                    \
  }
LOWBIT_FOR_EACH_DTYPE(ENTRIES)
