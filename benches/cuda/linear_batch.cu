// Checks linear_batch against fp64 and times it: nvcc -std=c++17 -O3 -Xcompiler -fpermissive -I cuda/include
// -gencode arch=compute_90a,code=sm_90a -o linear_batch benches/cuda/linear_batch.cu &&
// ./linear_batch [check|sanitize|time|profile|all] [part of a format's name]
// With arch=compute_90,code=sm_90 the kernels use mma.sync, as on other GPUs. -rdc=true, in place of -fpermissive, costs the
// products registers.
//
// Times are medians of CUDA-graph replays over weights that rotate through more than 300 MB: for every number of tokens of
// a tile that is built, and for one CTA a tile ("whole") and as many as there are multiprocessors ("shared").
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../../cuda/linear_batch.cu"

#if !defined(LOWBIT_MMA_SYNC)
LOWBIT_BATCH(linear_batch_narrow, bfloat16, 32, 2, true)
LOWBIT_BATCH(linear_batch_narrow, bfloat16, 64, 2, true)
LOWBIT_BATCH(linear_batch_narrow, bfloat16, 96, 2, true)
LOWBIT_BATCH(linear_batch_narrow, float16, 64, 2, true)
LOWBIT_BATCH(linear_batch_wide, bfloat16, 128, 1)
LOWBIT_BATCH(linear_batch_wide, bfloat16, 192, 1)
LOWBIT_BATCH(linear_batch_wide, bfloat16, 256, 1, false, 2)
LOWBIT_BATCH(linear_batch_wide, float16, 128, 1)
LOWBIT_BATCH(linear_batch_wide, float16, 256, 1, false, 2)
#endif

#include <cuda.h>

#include "harness.cuh"

namespace {

using lowbit::BatchMaps;
using lowbit::BatchOperands;
using lowbit::Dtype;
using lowbit::Weight;

constexpr size_t kPoolBytes = size_t{640} << 20;
constexpr int kMaxTokens = 1024, kMaxWidth = 32768;
constexpr int kReplays = 7;
constexpr int kRows = 128;  // of a tile

struct Format {
  const char* name;
  int bits;
  int block_size;  // 0: a row
  Dtype scale_dtype;
  bool is_double, has_shift, is_integer;  // codebook 0..15 or -8..7 instead of NF4
};

struct Kernel {
  const char* name;
  void (*function)(Weight, BatchOperands, BatchMaps);
  Dtype dtype;
  int tokens, panels;
  bool is_narrow;
};

const Kernel kKernels[] = {
    {"", linear_batch_bfloat16_32, Dtype::kBfloat16, 32, 2, false},
    {"", linear_batch_bfloat16_64, Dtype::kBfloat16, 64, 2, false},
    {"", linear_batch_float16_32, Dtype::kFloat16, 32, 2, false},
    {"", linear_batch_float16_64, Dtype::kFloat16, 64, 2, false},
#if !defined(LOWBIT_MMA_SYNC)
    {"narrow ", linear_batch_narrow_bfloat16_32, Dtype::kBfloat16, 32, 2, true},
    {"narrow ", linear_batch_narrow_bfloat16_64, Dtype::kBfloat16, 64, 2, true},
    {"narrow ", linear_batch_narrow_bfloat16_96, Dtype::kBfloat16, 96, 2, true},
    {"narrow ", linear_batch_narrow_float16_64, Dtype::kFloat16, 64, 2, true},
    {"wide ", linear_batch_wide_bfloat16_128, Dtype::kBfloat16, 128, 1, false},
    {"wide ", linear_batch_wide_bfloat16_192, Dtype::kBfloat16, 192, 1, false},
    {"wide ", linear_batch_wide_bfloat16_256, Dtype::kBfloat16, 256, 1, false},
    {"wide ", linear_batch_wide_float16_128, Dtype::kFloat16, 128, 1, false},
    {"wide ", linear_batch_wide_float16_256, Dtype::kFloat16, 256, 1, false},
#endif
};

int multiprocessors, most_shared;

// ---- data

struct Data {
  uint8_t *codes, *scales, *shifts;
  float *scale_2, *offset, *partials;
  uint32_t* arrivals;
  void *x, *bias, *out;
  double* reference;

  Data() {
    CHECK(cudaMalloc(&codes, kPoolBytes));
    CHECK(cudaMalloc(&scales, kPoolBytes / 2));
    CHECK(cudaMalloc(&shifts, kPoolBytes / 2));
    CHECK(cudaMalloc(&scale_2, kPoolBytes / 64));
    CHECK(cudaMalloc(&offset, 4));
    CHECK(cudaMalloc(&partials, size_t{2} * 256 * 256 * 512));
    CHECK(cudaMalloc(&arrivals, 1 << 20));
    CHECK(cudaMemset(arrivals, 0, 1 << 20));
    CHECK(cudaMalloc(&x, size_t{kMaxTokens} * kMaxWidth * 2));
    CHECK(cudaMalloc(&bias, kMaxWidth * 4));
    CHECK(cudaMalloc(&out, size_t{kMaxTokens} * kMaxWidth * 2));
    CHECK(cudaMalloc(&reference, size_t{kMaxTokens} * kMaxWidth * 8));
    fill_bytes<<<2048, 256>>>(reinterpret_cast<uint32_t*>(codes), kPoolBytes / 4, 7);
    fill_numbers<<<2048, 256>>>(scale_2, Dtype::kFloat32, kPoolBytes / 256, 0.01f, 0.02f, 77);
    const float value = 0.013f;
    CHECK(cudaMemcpy(offset, &value, 4, cudaMemcpyHostToDevice));
    float map[256];
    for (int i = 0; i < 256; ++i) map[i] = (i - 127) / 160.0f;
    CHECK(cudaMemcpyToSymbol(lowbit_dynamic_map, map, sizeof map));
    fill_numbers<<<256, 256>>>(bias, Dtype::kFloat32, kMaxWidth, -1.0f, 2.0f, 5);
  }

  void prepare(const Format& f, Dtype activation) {
    const size_t size = f.scale_dtype == Dtype::kFloat32 ? 4 : 2;
    if (f.is_double) fill_bytes<<<2048, 256>>>(reinterpret_cast<uint32_t*>(scales), kPoolBytes / 8, 55);
    else fill_numbers<<<2048, 256>>>(scales, f.scale_dtype, kPoolBytes / 2 / size, 0.01f, 0.02f, 99);
    if (f.has_shift) fill_numbers<<<2048, 256>>>(shifts, f.scale_dtype, kPoolBytes / 2 / size, -0.3f, 0.2f, 41);
    fill_numbers<<<512, 256>>>(x, activation, size_t{kMaxTokens} * kMaxWidth, -1.7f, 3.4f, 3);
    CHECK(cudaDeviceSynchronize());
  }
};

int blocks_per_row(const Format& f, const Shape& s) {
  return f.block_size == 0 ? 1 : (s.cols + f.block_size - 1) / f.block_size;
}
size_t code_bytes(const Format& f, const Shape& s) { return size_t(s.rows) * s.cols * f.bits / 8; }

Weight weight(const Data& d, const Format& f, const Shape& s, int copy) {
  Weight w = {};
  const size_t blocks = size_t(s.rows) * blocks_per_row(f, s), size = f.scale_dtype == Dtype::kFloat32 ? 4 : 2;
  w.codes = d.codes + copy * aligned(code_bytes(f, s));
  w.scales = d.scales + copy * aligned(blocks * (f.is_double ? 1 : size));
  if (f.is_double) {
    w.scale_2 = d.scale_2 + copy * aligned(blocks / 256 + 1);
    w.scale_offset = d.offset;
  }
  if (f.has_shift) w.shifts = d.shifts + copy * aligned(blocks * size);
  w.rows = s.rows, w.cols = s.cols, w.row_codes = s.cols;
  w.blocks_per_row = blocks_per_row(f, s);
  w.block_size = f.block_size > 0 ? f.block_size : s.cols;
  w.block_shift = f.block_size > 0 ? static_cast<int>(std::log2(f.block_size) + 0.5) : -1;
  w.bits = f.bits;
  w.scale_dtype = f.scale_dtype;
  w.codebook_length = 16;
  for (int i = 0; i < 16; ++i) w.table[i] = f.is_integer ? (f.has_shift ? i : i - 8) : kNf4[i];
  return w;
}

// ---- the launch, as the host of the library computes it

struct Launch {
  Kernel kernel;
  int grid, shared;
  BatchOperands operands;
};

Launch plan(const Data& d, const Kernel& kernel, const Format& f, const Shape& s, int tokens, int grid, bool has_bias) {
  BatchOperands o = {};
  o.x = d.x, o.out = d.out, o.partials = d.partials, o.arrivals = d.arrivals;
  o.x_stride = s.cols, o.tokens = tokens;
  o.bias = has_bias ? d.bias : nullptr, o.bias_dtype = Dtype::kFloat32;
  o.token_tiles = (tokens + kernel.tokens - 1) / kernel.tokens;
  o.steps = (s.cols + 64 * kernel.panels - 1) / (64 * kernel.panels);
  const int total = (s.rows + kRows - 1) / kRows * o.token_tiles * o.steps;
  if (grid <= 0) grid = grid < 0 ? total / o.steps : multiprocessors;
  grid = std::min(grid, total);
  o.steps_each = total / grid, o.steps_rest = total % grid;
  o.log_blocks = 0;
  for (int size = 64 * kernel.panels; f.block_size > 0 && size > f.block_size; size /= 2) ++o.log_blocks;
  const int numbers = (kRows * (kernel.is_narrow ? 4 : 8) << o.log_blocks) * (f.has_shift ? 2 : 1);
  const int stage = ((128 * kernel.tokens + 8 * kRows * f.bits) * kernel.panels + numbers + 1023) / 1024 * 1024;
  for (int stages : {8, 7, 6, 5, 4, 3}) {
    o.stages = stages;
    if (65536 + stages * (stage + 16) <= most_shared) break;
  }
  o.stage_bytes = stage;
  return {kernel, grid, 65536 + o.stages * (stage + 16), o};
}

// A map of a row-major matrix and its boxes.
void encode(lowbit::TensorMap& map, CUtensorMapDataType type, int element, const void* from, uint64_t cols, uint64_t rows,
            uint64_t row_bytes, uint32_t box_cols, uint32_t box_rows) {
  static decltype(&cuTensorMapEncodeTiled) function = nullptr;
  if (function == nullptr) {
    cudaDriverEntryPointQueryResult result;
    CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", reinterpret_cast<void**>(&function), cudaEnableDefault, &result));
  }
  const cuuint64_t sizes[2] = {cols, rows}, strides[1] = {row_bytes};
  const cuuint32_t box[2] = {box_cols, box_rows}, steps[2] = {1, 1};
  const uint32_t bytes = box_cols * element;
  const CUtensorMapSwizzle swizzle = bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                   : CU_TENSOR_MAP_SWIZZLE_32B;
  const CUresult result =
      function(reinterpret_cast<CUtensorMap*>(&map), type, 2, const_cast<void*>(from), sizes, strides, box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) std::printf("cuTensorMapEncodeTiled: %d\n", result), std::exit(1);
}

BatchMaps maps_of(const Launch& l, const Weight& w) {
  BatchMaps maps;
  const BatchOperands& o = l.operands;
  encode(maps.x, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, o.x, w.cols, o.tokens, o.x_stride * 2, 64, l.kernel.tokens);
  encode(maps.codes, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, w.codes, w.row_codes * w.bits / 8, w.rows, w.row_codes * w.bits / 8,
         8 * l.kernel.panels * w.bits, kRows);
  return maps;
}

void launch(const Launch& l, const Weight& w, cudaStream_t stream) {
#if defined(LOWBIT_MMA_SYNC)
  const int threads = 512;
#else
  const int threads = 384;
#endif
  CHECK(cudaFuncSetAttribute(l.kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, l.shared));
  l.kernel.function<<<l.grid, threads, l.shared, stream>>>(w, l.operands, maps_of(l, w));
  CHECK(cudaGetLastError());
}

// ---- the check

// One row a block, all in fp64 but the weight itself.
__global__ void multiply_in_fp64(Weight w, BatchOperands o, Dtype activation, double* out) {
  __shared__ float table[16];
  __shared__ double sums[256];
  lowbit::load_codebook(w, table);
  for (int token = blockIdx.y; token < o.tokens; token += gridDim.y) {
    double sum = 0.0;
    for (int64_t col = threadIdx.x; col < w.cols; col += blockDim.x) {
      sum += double(lowbit::weight_at(w, table, blockIdx.x, col)) *
             lowbit::load(o.x, activation, int64_t{token} * o.x_stride + col);
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int half = 128; half > 0; half /= 2) {
      if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x == 0) {
      out[token * w.rows + blockIdx.x] =
          sums[0] + (o.bias == nullptr ? 0.0 : double(lowbit::load(o.bias, o.bias_dtype, blockIdx.x)));
    }
    __syncthreads();
  }
}

// 0 if a product is right and the same twice.
int check(Data& d, const Kernel& kernel, const Format& f, const Shape& s, int tokens, int grid) {
  const Weight w = weight(d, f, s, 0);
  const Launch l = plan(d, kernel, f, s, tokens, grid, true);
  const size_t count = size_t(tokens) * s.rows;
  multiply_in_fp64<<<dim3(s.rows, 16), 256>>>(w, l.operands, kernel.dtype, d.reference);
  std::vector<uint16_t> first(count), second(count);
  std::vector<double> expected(count);
  for (std::vector<uint16_t>* to : {&first, &second}) {
    CHECK(cudaMemset(d.out, 0xff, count * 2));
    launch(l, w, nullptr);
    CHECK(cudaMemcpy(to->data(), d.out, count * 2, cudaMemcpyDeviceToHost));
  }
  CHECK(cudaMemcpy(expected.data(), d.reference, count * 8, cudaMemcpyDeviceToHost));
  double error = 0.0, norm = 0.0;
  for (size_t i = 0; i < count; ++i) {
    const double got = as_double(first[i], kernel.dtype);
    error += (got - expected[i]) * (got - expected[i]), norm += expected[i] * expected[i];
  }
  // Rounding of weights and of results.
  const double relative = std::sqrt(error / norm), bound = kernel.dtype == Dtype::kBfloat16 ? 4e-3 : 5e-4;
  if (relative < bound && first == second) return 0;
  static int told = 0;
  if (++told > 20) return 1;
  std::printf("WRONG %s %dx%d tokens %d kernel %s%d dtype %d grid %d: error %.2e, repeatable %d\n", f.name, s.rows, s.cols,
              tokens, kernel.name, kernel.tokens, int(kernel.dtype), l.grid, relative, first == second);
  return 1;
}

constexpr Dtype kF32 = Dtype::kFloat32, kF16 = Dtype::kFloat16, kBf16 = Dtype::kBfloat16;
const Format kFormats[] = {
    {"nf4-64", 4, 64, kF32, false, false, false},        {"nf4-double", 4, 64, kF32, true, false, false},
    {"int4-g128-f16", 4, 128, kF16, false, false, true}, {"uint4-g64-f16", 4, 64, kF16, false, true, true},
    {"uint4-16-bf16", 4, 16, kBf16, false, true, true},  {"uint4-double", 4, 32, kF32, true, true, true},
    {"nf4-16-double", 4, 16, kF32, true, false, false},  {"nf4-row", 4, 0, kF32, false, false, false},
    {"int8-row", 8, 0, kF32, false, false, true},        {"int8-32", 8, 32, kF32, false, false, true},
    {"nf4-4096", 4, 4096, kF16, false, false, false},
};

bool takes(const Kernel& kernel, const Format& f) {
  return !kernel.is_narrow || (!f.has_shift && (f.block_size == 0 || f.block_size >= 64));
}

// What is checked.
struct Cases {
  std::vector<Shape> shapes;
  std::vector<int> tokens, grids;
};
const Cases kAllCases = {
    {{512, 1024}, {1000, 4160}, {77, 896}, {77, 1536}, {130, 96}, {16, 64}}, {1, 17, 33, 64, 100, 257}, {-1, 0, 7}};
// For compute-sanitizer, which takes its time: tiles that are whole, shared and cut off.
const Cases kFewCases = {{{130, 1536}}, {33, 257}, {-1, 3}};

int check_all(Data& d, const std::string& filter, const Cases& cases) {
  int wrong = 0, count = 0;
  for (const Format& f : kFormats) {
    if (std::string(f.name).find(filter) == std::string::npos) continue;
    for (Dtype dtype : {kBf16, kF16}) {
      d.prepare(f, dtype);
      for (const Kernel& kernel : kKernels) {
        if (kernel.dtype != dtype || !takes(kernel, f)) continue;
        for (const Shape& s : cases.shapes) {
          for (int tokens : cases.tokens) {
            for (int grid : cases.grids) wrong += check(d, kernel, f, s, tokens, grid), ++count;
          }
        }
      }
    }
  }
  std::printf("checked %d products, %d wrong\n", count, wrong);
  return wrong;
}

// ---- times

double linear_seconds(const Data& d, const Kernel& kernel, const Format& f, const Shape& s, int tokens, int grid) {
  const int copies = static_cast<int>(std::min<size_t>(40, (size_t{400} << 20) / code_bytes(f, s) + 1));
  const Launch l = plan(d, kernel, f, s, tokens, grid, false);
  return seconds_of([&](int i, cudaStream_t stream) { launch(l, weight(d, f, s, i), stream); }, copies, kReplays);
}

void time_all(Data& d, const std::string& filter) {
  const Shape shapes[] = {{4096, 4096}, {14336, 4096}, {4096, 14336}, {8192, 28672}, {6144, 4096}, {1024, 4096}};
  for (const Format& f : kFormats) {
    if (std::string(f.name).find(filter) == std::string::npos) continue;
    d.prepare(f, kBf16);
    for (const Shape& s : shapes) {
      for (int tokens : {24, 32, 48, 64, 96, 128, 192, 256, 512, 1024}) {
        std::printf("%-10s %5dx%-5d M=%-4d", f.name, s.rows, s.cols, tokens);
        for (const Kernel& kernel : kKernels) {
          const int tiles = (tokens + kernel.tokens - 1) / kernel.tokens;
          if (kernel.dtype != kBf16 || tiles > 4 || !takes(kernel, f)) continue;
          if (kernel.tokens > tokens + 31 || (tiles > 1 && tokens % kernel.tokens != 0)) continue;
          const double shared = linear_seconds(d, kernel, f, s, tokens, 0);
          const double whole = linear_seconds(d, kernel, f, s, tokens, -1);
          std::printf("  %s%d: %7.2f %7.2f", kernel.name, kernel.tokens, shared * 1e6, whole * 1e6);
        }
        std::printf("\n");
        std::fflush(stdout);
      }
    }
  }
}

// One launch of every kernel, for ncu.
void profile(Data& d) {
  const Shape s = {14336, 4096};
  d.prepare(kFormats[0], kBf16);
  for (const Kernel& kernel : kKernels) {
    if (kernel.dtype == kBf16) launch(plan(d, kernel, kFormats[0], s, kernel.tokens, 0, false), weight(d, kFormats[0], s, 1), nullptr);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "all", filter = argc > 2 ? argv[2] : "";
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  multiprocessors = properties.multiProcessorCount;
  most_shared = static_cast<int>(properties.sharedMemPerBlockOptin);
  std::printf("%s, %d SMs\n", properties.name, multiprocessors);
  Data data;
  int wrong = 0;
  if (mode == "check" || mode == "all") wrong = check_all(data, filter, kAllCases);
  if (mode == "sanitize") wrong = check_all(data, filter, kFewCases);
  if (mode == "time" || mode == "all") time_all(data, filter);
  if (mode == "profile") profile(data);
  CHECK(cudaDeviceSynchronize());
  return wrong == 0 ? 0 : 1;
}
