// Checks int8_rows and linear_int8 against fp64 and times them: nvcc -std=c++17 -O3 -I cuda/include
// -gencode arch=compute_90a,code=sm_90a -o linear_int8 benches/cuda/linear_int8.cu && ./linear_int8 [check|time|all]
//
// Times are medians of CUDA-graph replays over weights and activations that rotate through more than 300 MB. "rows"
// rounds the activations, "product" multiplies, "both" is what a layer does: zeroes flags, rounds, multiplies.
#include <cuda.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "../../cuda/int8_rows.cu"
#include "../../cuda/linear_int8.cu"
#include "harness.cuh"

namespace {

using namespace lowbit;
using T = bfloat16;

struct Variant {
  const char* name;
  void (*kernel)(ProductMaps, ProductOperands);
  int columns, shared;
};

const Variant kVariants[] = {
    {"128x256", linear_int8_bfloat16_256, 256, Product<T, 256>::kSharedBytes},
    {"128x128", linear_int8_bfloat16_128, 128, Product<T, 128>::kSharedBytes},
    {"128x64", linear_int8_bfloat16_64, 64, Product<T, 64>::kSharedBytes},
};

int multiprocessors;

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

TensorMap map_of(const void* matrix, int64_t rows, int64_t cols, int64_t stride, int box_rows, bool is_side = false) {
  static Encode encode = nullptr;
  if (encode == nullptr) {
    cudaDriverEntryPointQueryResult found;
    CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", reinterpret_cast<void**>(&encode), 12000,
                                           cudaEnableDefault, &found));
  }
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride)};
  const cuuint32_t box[] = {is_side ? kStageRow / 2u : kStageRow, static_cast<cuuint32_t>(box_rows)}, ones[] = {1, 1};
  alignas(64) CUtensorMap map;
  const CUresult result = encode(&map, is_side ? CU_TENSOR_MAP_DATA_TYPE_UINT16 : CU_TENSOR_MAP_DATA_TYPE_UINT8, 2,
                                 const_cast<void*>(matrix), sizes, strides, box,
                                 ones, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) std::printf("cuTensorMapEncodeTiled: %d\n", result), std::exit(1);
  TensorMap copy;
  std::memcpy(&copy, &map, sizeof(copy));
  return copy;
}

// ---- data

__device__ float normal(uint64_t i, uint64_t seed) {
  float sum = 0;
  for (int round = 0; round < 4; ++round) {
    uint64_t x = (i * 4 + round + 1) * 0x9e3779b97f4a7c15ull + seed * 0xd1342543de82ef95ull;
    x ^= x >> 31, x *= 0xbf58476d1ce4e5b9ull, x ^= x >> 29;
    sum += static_cast<float>(x >> 40) * 0x1p-24f - 0.5f;
  }
  return sum * 1.7f;
}
__global__ void fill_x(T* x, int64_t count, int cols, int every, uint64_t seed) {
  for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll) {
    const int col = i % cols;
    const float value = normal(i, seed);
    x[i] = from_float<T>(every > 0 && col % every == every / 2 && (i / cols) % 3 == 0 ? 20 * value + 30 : value);
  }
}
__global__ void fill_w(int8_t* w, int64_t count, uint64_t seed) {
  for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll) {
    w[i] = static_cast<int8_t>(max(-127, min(127, __float2int_rn(normal(i, seed) * 40))));
  }
}
__global__ void fill_scale(float* scale, int count) {
  for (int i = blockIdx.x * 256 + threadIdx.x; i < count; i += gridDim.x * 256) scale[i] = 0.001f * (1 + i % 7);
}
__global__ void mark(const T* x, int tokens, int cols, float threshold, int* is_outlier) {
  const int col = blockIdx.x * 256 + threadIdx.x;
  if (col >= cols) return;
  int found = 0;
  for (int token = 0; token < tokens; ++token) found |= !(fabsf(to_float(x[int64_t{token} * cols + col])) < threshold);
  is_outlier[col] = found;
}
// By the definition: columns of outliers as they are, the rest in int8.
__global__ void multiply_in_fp64(ProductOperands o, float threshold, const int* is_outlier, double* out) {
  const int row = blockIdx.x * 128 + threadIdx.x, token = blockIdx.y;
  if (row >= o.rows) return;
  float absmax = 0;
  const T* x = static_cast<const T*>(o.x) + token * o.x_stride;
  for (int col = 0; col < o.cols; ++col) {
    const float magnitude = fabsf(to_float(x[col]));
    if (magnitude < threshold) absmax = fmaxf(absmax, magnitude);
  }
  const float inverse = __fdiv_rn(127.0f, absmax), scale = __fdiv_rn(absmax, 127.0f);
  double sum = 0;
  for (int col = 0; col < o.cols; ++col) {
    const float value = to_float(x[col]);
    const double a = is_outlier[col] ? double{value} : double{scale} * rintf(value * inverse);
    sum += a * o.weights[int64_t{row} * o.cols + col];
  }
  const double y = sum * static_cast<const float*>(o.weight_scales)[row];
  out[int64_t{token} * o.rows + row] = y + (o.bias == nullptr ? 0 : to_float(static_cast<const T*>(o.bias)[row]));
}

// ---- calls

struct Buffers {
  T *x, *out, *bias;
  int8_t *w, *codes;
  float *scales, *w_scales;
  int32_t* outliers;
  T *x_side, *w_side;
};

Buffers allocate(const Shape& s, int tokens) {
  Buffers b;
  CHECK(cudaMalloc(&b.x, size_t{2} * tokens * s.cols));
  CHECK(cudaMalloc(&b.out, size_t{2} * tokens * s.rows));
  CHECK(cudaMalloc(&b.bias, 2 * s.rows));
  CHECK(cudaMalloc(&b.w, size_t{1} * s.rows * s.cols));
  CHECK(cudaMalloc(&b.codes, size_t{1} * tokens * s.cols));
  CHECK(cudaMalloc(&b.scales, 4 * tokens));
  CHECK(cudaMalloc(&b.w_scales, 4 * s.rows));
  CHECK(cudaMalloc(&b.outliers, 4 * (1 + (s.cols + 31) / 32 + s.cols)));
  CHECK(cudaMalloc(&b.x_side, 2 * kSideCapacity * tokens));
  CHECK(cudaMalloc(&b.w_side, 2 * kSideCapacity * s.rows));
  CHECK(cudaMemset(b.x_side, 0xff, 2 * kSideCapacity * tokens));
  CHECK(cudaMemset(b.w_side, 0xff, 2 * kSideCapacity * s.rows));
  fill_w<<<512, 256>>>(b.w, int64_t{s.rows} * s.cols, 7);
  fill_scale<<<64, 256>>>(b.w_scales, s.rows);
  fill_x<<<64, 256>>>(b.bias, s.rows, s.rows, 0, 5);
  return b;
}
void release(Buffers& b) {
  for (void* p : {(void*)b.x, (void*)b.out, (void*)b.bias, (void*)b.w, (void*)b.codes, (void*)b.scales,
                  (void*)b.w_scales,
                  (void*)b.outliers, (void*)b.x_side, (void*)b.w_side}) {
    CHECK(cudaFree(p));
  }
}

void round_rows(const Buffers& b, const Shape& s, int tokens, float threshold, cudaStream_t stream) {
  RowOperands o{b.x, b.codes, b.scales, threshold > 0 ? b.outliers : nullptr, s.cols, s.cols, s.cols, threshold};
  if (threshold > 0) CHECK(cudaMemsetAsync(b.outliers, 0, 4 * ((s.cols + 31) / 32), stream));
  const int threads = std::min(512, std::max(64, ((s.cols / (s.cols % 8 == 0 ? 8 : 1) + 7) / 8 + 31) / 32 * 32));
  if (s.cols % 8 == 0) {
    int8_rows_bfloat16<<<tokens, threads, 0, stream>>>(o);
  } else {
    int8_elements_bfloat16<<<tokens, threads, 0, stream>>>(o);
  }
  if (threshold <= 0) return;
  const GatherOperands g{b.x,      b.codes, b.scales, b.outliers, b.w,    b.x_side,
                         b.w_side, s.cols,  s.cols,   s.cols,     s.rows, tokens};
  cudaLaunchConfig_t config = {};
  config.gridDim = std::min((tokens + s.rows + 7) / 8, 8 * multiprocessors);
  config.blockDim = 256;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  CHECK(cudaLaunchKernelEx(&config, int8_gather_bfloat16, g));
}

ProductOperands operands(const Buffers& b, const Shape& s, int tokens, float threshold) {
  return {b.x,    b.codes, b.scales, threshold > 0 ? b.outliers : nullptr, b.w, b.w_scales, b.bias, b.out, s.cols,
          s.cols,
          s.cols, s.rows,  tokens,   Dtype::kFloat32,  Dtype::kBfloat16,      s.rows % 8 == 0};
}

void multiply(const Variant& v, const Buffers& b, const Shape& s, int tokens, float threshold, bool depends,
              cudaStream_t stream) {
  static bool asked = false;
  if (!asked) {
    for (const Variant& each : kVariants) {
      CHECK(cudaFuncSetAttribute(each.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, each.shared));
    }
    asked = true;
  }
  const int tiles = (tokens + 127) / 128 * ((s.rows + v.columns - 1) / v.columns);
  cudaLaunchConfig_t config = {};
  config.gridDim = std::min(tiles, multiprocessors);
  config.blockDim = kProductThreads;
  config.dynamicSmemBytes = v.shared;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = depends;
  const int box_rows = v.columns;
  const ProductMaps maps{map_of(b.codes, tokens, s.cols, s.cols, 128), map_of(b.w, s.rows, s.cols, s.cols, box_rows),
                         map_of(b.x_side, tokens, kSideCapacity, 2 * kSideCapacity, 128, true),
                         map_of(b.w_side, s.rows, kSideCapacity, 2 * kSideCapacity, box_rows, true)};
  CHECK(cudaLaunchKernelEx(&config, v.kernel, maps, operands(b, s, tokens, threshold)));
}

bool check(const Shape& s, int tokens, float threshold, int every) {
  Buffers b = allocate(s, tokens);
  fill_x<<<512, 256>>>(b.x, int64_t{tokens} * s.cols, s.cols, every, 3);
  double* exact;
  int* is_outlier;
  CHECK(cudaMalloc(&exact, size_t{8} * tokens * s.rows));
  CHECK(cudaMalloc(&is_outlier, 4 * s.cols));
  const float limit = threshold > 0 ? threshold : INFINITY;
  mark<<<(s.cols + 255) / 256, 256>>>(b.x, tokens, s.cols, limit, is_outlier);
  const ProductOperands o = operands(b, s, tokens, threshold);
  multiply_in_fp64<<<dim3((s.rows + 127) / 128, tokens), 128>>>(o, limit, is_outlier, exact);
  std::vector<double> want(size_t{1} * tokens * s.rows);
  std::vector<T> got(want.size());
  CHECK(cudaMemcpy(want.data(), exact, 8 * want.size(), cudaMemcpyDeviceToHost));
  round_rows(b, s, tokens, threshold, 0);
  bool is_right = true;
  for (const Variant& v : kVariants) {
    CHECK(cudaMemset(b.out, 0xff, 2 * got.size()));
    multiply(v, b, s, tokens, threshold, false, 0);
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaMemcpy(got.data(), b.out, 2 * got.size(), cudaMemcpyDeviceToHost));
    double error = 0, norm = 0, worst = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      const double off = __bfloat162float(got[i]) - want[i];
      error += off * off, norm += want[i] * want[i];
      worst = std::max(worst, std::isnan(off) ? INFINITY : std::fabs(off));
    }
    const double relative = std::sqrt(error / norm);
    const bool is_fine = relative < 2.5e-3;
    is_right &= is_fine;
    int32_t found = 0;
    if (threshold > 0) CHECK(cudaMemcpy(&found, b.outliers + (s.cols + 31) / 32, 4, cudaMemcpyDeviceToHost));
    std::printf("%s %dx%d M=%d threshold %g outliers %d %s: relative %.2e worst %.3g\n", is_fine ? "ok  " : "BAD ",
                s.rows, s.cols, tokens, threshold, found, v.name, relative, worst);
  }
  CHECK(cudaFree(exact));
  CHECK(cudaFree(is_outlier));
  release(b);
  return is_right;
}

// Median microseconds of one of `calls`.
double time_graph(int calls, const std::function<void(int, cudaStream_t)>& call) { return seconds_of(call, calls, 7) * 1e6; }

void time_shape(const Shape& s, int tokens) {
  const double bytes = 1.0 * s.rows * s.cols + 3.0 * tokens * s.cols + 2.0 * tokens * s.rows;
  const int sets = std::min(12, static_cast<int>(300e6 / bytes) + 2);
  std::vector<Buffers> pool;
  for (int i = 0; i < sets; ++i) pool.push_back(allocate(s, tokens));
  const double operations = 2.0 * tokens * s.rows * s.cols;
  const int calls = std::max(sets, std::min(2 * sets, static_cast<int>(4e15 / 1000 / operations) + 1));
  for (const int every : {0, 200}) {
    const float threshold = every > 0 ? 6 : 0;
    for (Buffers& b : pool) fill_x<<<512, 256>>>(b.x, int64_t{tokens} * s.cols, s.cols, every, 3);
    for (Buffers& b : pool) round_rows(b, s, tokens, threshold, 0);
    CHECK(cudaDeviceSynchronize());
    const double rows = time_graph(calls, [&](int i, cudaStream_t stream) {
      round_rows(pool[i % sets], s, tokens, threshold, stream);
    });
    const char* share = every > 0 ? "0.5%" : "none";
    std::printf("%5dx%-5d M=%-4d outliers %s: rows %6.1f us", s.rows, s.cols, tokens, share, rows);
    for (const Variant& v : kVariants) {
      const double product = time_graph(calls, [&](int i, cudaStream_t stream) {
        multiply(v, pool[i % sets], s, tokens, threshold, false, stream);
      });
      const double both = time_graph(calls, [&](int i, cudaStream_t stream) {
        round_rows(pool[i % sets], s, tokens, threshold, stream);
        multiply(v, pool[i % sets], s, tokens, threshold, true, stream);
      });
      std::printf(" | %s product %6.1f (%4.0f TOPS) both %6.1f", v.name, product, operations / product * 1e-6, both);
    }
    std::printf("\n");
    std::fflush(stdout);
  }
  for (Buffers& b : pool) release(b);
}

}  // namespace

int main(int argc, char** argv) {
  const char* what = argc > 1 ? argv[1] : "all";
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  multiprocessors = properties.multiProcessorCount;
  std::printf("%s, %d multiprocessors\n", properties.name, multiprocessors);
  bool is_right = true;
  if (std::strcmp(what, "time") != 0) {
    for (const Shape& s : {Shape{256, 128}, Shape{264, 144}, Shape{1000, 1040}, Shape{777, 4096}}) {
      for (const int tokens : {1, 100, 300}) {
        for (const int every : {0, 200, 7}) is_right &= check(s, tokens, every > 0 ? 6 : 0, every);
      }
    }
    is_right &= check({4096, 4096}, 2048, 6, 200);
  }
  if (std::strcmp(what, "check") != 0) {
    for (const Shape& s : {Shape{4096, 4096}, Shape{14336, 4096}, Shape{4096, 14336}, Shape{8192, 28672}}) {
      for (const int tokens : {32, 64, 128, 256, 512, 1024, 2048, 4096}) time_shape(s, tokens);
    }
  }
  std::printf(is_right ? "all right\n" : "WRONG\n");
  return is_right ? 0 : 1;
}
