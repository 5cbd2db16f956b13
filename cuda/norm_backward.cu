// Gradients of RMSNorm and LayerNorm of rows. With t the rows, n = (t - mean) / s and g = grad (weight + offset):
//
//     of t: (g - mean(g) - n mean(g n)) / s + grad of the sum with the residual; RMSNorm has no mean(g)
//     of weight and bias: the sums of grad n and of grad over rows
//
// Bound by memory: a row and its gradient are read once and kept in registers, and statistics are computed anew. A block
// walks rows, and keeps its sums over them in registers until the end.
#include "lowbit/norm_rows.cuh"

namespace lowbit {

// Mirrored by GradientOperands in rust/core/src/cuda/norm_backward.rs. `of_total` and `weight` may be null, and so may
// `out` and `sums`. Strides are elements from a row to the next; `out` is dense. `sums` has a line for every block: a sum
// for each weight, and behind them for LayerNorm one for each bias.
struct Gradient {
  const void* x;
  const void* grad;
  const void* of_total;
  const void* weight;
  void* out;
  float* sums;
  int64_t rows;
  int64_t cols;
  int64_t x_stride;
  int64_t grad_stride;
  int64_t of_total_stride;
  float eps;
  Dtype weight_dtype;
  int32_t is_centered;
  float offset;
};

struct Pair {
  float first;
  float second;
};

// The sums of two values over the lanes of a row. `scratch` is another than that of the call before.
template <int kLanes>
__device__ __forceinline__ Pair row_sums(Pair value, Pair* scratch) {
  value = {warp_sum<kLanes>(value.first), warp_sum<kLanes>(value.second)};
  if constexpr (kLanes > 32) {
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = {0.0f, 0.0f};
#pragma unroll
    for (int warp = 0; warp < kLanes / 32; ++warp) {
      value.first += scratch[warp].first;
      value.second += scratch[warp].second;
    }
  }
  return value;
}

// A row and its gradient in the registers of kLanes threads, as a Row of norm.cu.
template <typename T, int kLanes, int kVectors>
struct Rows {
  const Gradient& p;
  int64_t index;
  int lane;
  bool is_inside;
  Vector<T, kVector> x[kVectors];
  Vector<T, kVector> grad[kVectors];

  __device__ __forceinline__ int64_t column(int v) const { return (v * kLanes + lane) * kVector; }
  __device__ __forceinline__ bool holds(int v) const { return is_inside && column(v) < p.cols; }

  __device__ __forceinline__ void load() {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      x[v] = {};
      grad[v] = {};
      if (!holds(v)) continue;
      x[v] = vector_at<T>(p.x, index * p.x_stride + column(v));
      grad[v] = vector_at<T>(p.grad, index * p.grad_stride + column(v));
    }
  }

  __device__ __forceinline__ void forget() {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      forget_unpacked(x[v]);
      forget_unpacked(grad[v]);
    }
  }

  // The gradient by the weights, of vector v.
  __device__ __forceinline__ void scaled(int v, float (&values)[kVector]) const {
    unpack(grad[v], values);
    if (p.weight == nullptr) return;
    float factors[kVector];
    load_vector(p.weight, p.weight_dtype, column(v), factors);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] *= factors[i] + p.offset;
  }

  // Calls `add(x, scaled gradient)` for every number of the row.
  template <typename Add>
  __device__ __forceinline__ void for_each(const Add& add) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!holds(v)) continue;
      float values[kVector], gradients[kVector];
      unpack(x[v], values);
      scaled(v, gradients);
#pragma unroll
      for (int i = 0; i < kVector; ++i) add(values[i], gradients[i]);
    }
  }
};

// What the gradient of a row is made of: mean and 1 / s of its numbers, the means of g and of g n.
struct Moments {
  float mean = 0.0f;
  float rstd = 0.0f;
  float of_gradient = 0.0f;
  float of_product = 0.0f;
};

template <bool kCentered, typename T, int kLanes, int kVectors>
__device__ __forceinline__ Moments moments(Rows<T, kLanes, kVectors>& row, Pair (&scratch)[2][32], int& turn) {
  const float count = static_cast<float>(row.p.cols);
  Moments of_row;
  if constexpr (kCentered) {
    Pair sums{0.0f, 0.0f};
    row.for_each([&](float x, float gradient) { sums.first += x, sums.second += gradient; });
    sums = row_sums<kLanes>(sums, scratch[turn ^= 1]);
    of_row.mean = sums.first / count;
    of_row.of_gradient = sums.second / count;
    row.forget();
  }
  Pair sums{0.0f, 0.0f};
  row.for_each([&](float x, float gradient) {
    const float distance = kCentered ? x - of_row.mean : x;
    sums.first = fmaf(distance, distance, sums.first);
    sums.second = fmaf(distance, gradient, sums.second);
  });
  sums = row_sums<kLanes>(sums, scratch[turn ^= 1]);
  of_row.rstd = rsqrtf(sums.first / count + row.p.eps);
  of_row.of_product = sums.second * of_row.rstd / count;
  row.forget();
  return of_row;
}

// Stores the gradient of vector v of a row whose normalized numbers are given.
template <bool kCentered, typename T, int kLanes, int kVectors>
__device__ __forceinline__ void store_gradient(const Rows<T, kLanes, kVectors>& row, const Moments& of_row, int v,
                                               const float (&normalized)[kVector]) {
  const Gradient& p = row.p;
  float values[kVector];
  row.scaled(v, values);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float rest = kCentered ? values[i] - of_row.of_gradient : values[i];
    values[i] = fmaf(-normalized[i], of_row.of_product, rest) * of_row.rstd;
  }
  if (p.of_total != nullptr) {
    float addends[kVector];
    unpack(vector_at<T>(p.of_total, row.index * p.of_total_stride + row.column(v)), addends);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] += addends[i];
  }
  *reinterpret_cast<Vector<T, kVector>*>(static_cast<T*>(p.out) + row.index * p.cols + row.column(v)) = pack<T>(values);
}

// A block's sums for the columns, one after the other where several rows were under way at once.
template <int kLanes, int kVectors>
__device__ __forceinline__ void store_sums(const Gradient& p, int lane, float (&sums)[kVectors][kVector], float* line) {
  using Sums = Vector<float, kVector>;
  constexpr int kRows = kBlock<kLanes> / kLanes;
  __shared__ Sums of_block[kRows > 1 ? kLanes * kVectors : 1];
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int at = v * kLanes + lane;
      if (static_cast<int>(threadIdx.x) / kLanes != row || at * kVector >= p.cols) continue;
      Sums all;
#pragma unroll
      for (int i = 0; i < kVector; ++i) all.values[i] = row > 0 ? of_block[at].values[i] + sums[v][i] : sums[v][i];
      if (row < kRows - 1) of_block[at] = all;
      else reinterpret_cast<Sums*>(line)[at] = all;
    }
    if constexpr (kRows > 1) __syncthreads();
  }
}

// For rows of whole vectors, aligned to them, of at most kLanes kVectors kVector columns.
template <typename T, int kLanes, int kVectors, bool kCentered, bool kHasSums>
__device__ __forceinline__ void backward_vectors(const Gradient& p) {
  constexpr int kRows = kBlock<kLanes> / kLanes;
  __shared__ Pair scratch[2][32];
  Rows<T, kLanes, kVectors> row{p};
  row.lane = threadIdx.x % kLanes;
  float of_weight[kVectors][kVector] = {}, of_bias[kVectors][kVector] = {};
  int turn = 0;
  for (int64_t first = int64_t{blockIdx.x} * kRows; first < p.rows; first += int64_t{gridDim.x} * kRows) {
    row.index = first + threadIdx.x / kLanes;
    row.is_inside = row.index < p.rows;
    row.load();
    const Moments of_row = moments<kCentered>(row, scratch, turn);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!row.holds(v)) continue;
      float normalized[kVector];
      unpack(row.x[v], normalized);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        normalized[i] = (kCentered ? normalized[i] - of_row.mean : normalized[i]) * of_row.rstd;
      }
      if constexpr (kHasSums) {
        float gradients[kVector];
        unpack(row.grad[v], gradients);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          of_weight[v][i] = fmaf(gradients[i], normalized[i], of_weight[v][i]);
          if constexpr (kCentered) of_bias[v][i] += gradients[i];
        }
      }
      if (p.out != nullptr) store_gradient<kCentered>(row, of_row, v, normalized);
    }
  }
  if constexpr (kHasSums) {
    float* line = p.sums + blockIdx.x * p.cols * (kCentered ? 2 : 1);
    store_sums<kLanes, kVectors>(p, row.lane, of_weight, line);
    if constexpr (kCentered) store_sums<kLanes, kVectors>(p, row.lane, of_bias, line + p.cols);
  }
}

// For every row: read anew for each sum, and sums for columns kept in memory, each thread's own.
template <typename T>
__device__ __forceinline__ void backward_elements(const Gradient& p) {
  __shared__ Pair scratch[2][32];
  const float count = static_cast<float>(p.cols);
  float* of_weight = p.sums == nullptr ? nullptr : p.sums + blockIdx.x * p.cols * (p.is_centered ? 2 : 1);
  for (int64_t col = threadIdx.x; of_weight != nullptr && col < p.cols; col += kThreads) {
    of_weight[col] = 0.0f;
    if (p.is_centered) of_weight[p.cols + col] = 0.0f;
  }
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const T* grad = static_cast<const T*>(p.grad) + row * p.grad_stride;
    const auto scaled = [&](int64_t col) {
      const float factor = p.weight == nullptr ? 1.0f : load(p.weight, p.weight_dtype, col) + p.offset;
      return to_float(grad[col]) * factor;
    };
    Moments of_row;
    if (p.is_centered) {
      Pair sums{0.0f, 0.0f};
      for (int64_t col = threadIdx.x; col < p.cols; col += kThreads) {
        sums.first += to_float(x[col]), sums.second += scaled(col);
      }
      sums = row_sums<kThreads>(sums, scratch[0]);
      of_row.mean = sums.first / count;
      of_row.of_gradient = sums.second / count;
    }
    Pair sums{0.0f, 0.0f};
    for (int64_t col = threadIdx.x; col < p.cols; col += kThreads) {
      const float distance = to_float(x[col]) - of_row.mean;
      sums.first = fmaf(distance, distance, sums.first);
      sums.second = fmaf(distance, scaled(col), sums.second);
    }
    sums = row_sums<kThreads>(sums, scratch[1]);
    of_row.rstd = rsqrtf(sums.first / count + p.eps);
    of_row.of_product = sums.second * of_row.rstd / count;
    for (int64_t col = threadIdx.x; col < p.cols; col += kThreads) {
      const float normalized = (to_float(x[col]) - of_row.mean) * of_row.rstd;
      if (of_weight != nullptr) {
        of_weight[col] = fmaf(to_float(grad[col]), normalized, of_weight[col]);
        if (p.is_centered) of_weight[p.cols + col] += to_float(grad[col]);
      }
      if (p.out == nullptr) continue;
      float value = fmaf(-normalized, of_row.of_product, scaled(col) - of_row.of_gradient) * of_row.rstd;
      if (p.of_total != nullptr) {
        value += to_float(static_cast<const T*>(p.of_total)[row * p.of_total_stride + col]);
      }
      static_cast<T*>(p.out)[row * p.cols + col] = from_float<T>(value);
    }
    __syncthreads();  // before the next row's sums take the place of these
  }
}

// Blocks that a multiprocessor is to have at once, by the bytes that a thread has of a row.
template <int kBytes>
inline constexpr int kResidentThreads = kBytes > 32 ? 512 : kBytes > 16 ? 768 : 1024;

}  // namespace lowbit

#define SHAPE(name, T, lanes, vectors)                                                                              \
  extern "C" __global__ void __launch_bounds__(                                                                     \
      lowbit::kBlock<lanes>, lowbit::kResidentThreads<16 * vectors> / lowbit::kBlock<lanes>)                        \
      norm_backward_##name##_##lanes##x##vectors(const __grid_constant__ lowbit::Gradient p) {                      \
    if (p.is_centered && p.sums != nullptr) lowbit::backward_vectors<T, lanes, vectors, true, true>(p);             \
    else if (p.is_centered) lowbit::backward_vectors<T, lanes, vectors, true, false>(p);                            \
    else if (p.sums != nullptr) lowbit::backward_vectors<T, lanes, vectors, false, true>(p);                        \
    else lowbit::backward_vectors<T, lanes, vectors, false, false>(p);                                              \
  }
#define ENTRIES(name, T)                                                                                            \
  LOWBIT_FOR_EACH_SHAPE(SHAPE, name, T)                                                                             \
  extern "C" __global__ void __launch_bounds__(lowbit::kThreads)                                                    \
      norm_backward_elements_##name(const __grid_constant__ lowbit::Gradient p) {                                   \
    lowbit::backward_elements<T>(p);                                                                                \
  }
LOWBIT_FOR_EACH_DTYPE(ENTRIES)
