// Checks linear_decode against fp64 and times it: nvcc -std=c++17 -O3 -rdc=true -I cuda/include
// -gencode arch=compute_90a,code=sm_90a -o linear_decode benches/cuda/linear_decode.cu &&
// ./linear_decode [check|short|time|all] [part of a format's name, or = and the name]
//
// Times are medians of CUDA-graph replays over weights that rotate through more than 300 MB, without dependent launch
// and with it ("chain"). The roof is 1.5 us + bytes / rate, with the rate of a read-only stream of 768 MiB
// measured in the same run.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../../cuda/linear_decode.cu"
#include "harness.cuh"

namespace {

using lowbit::DecodeOperands;
using lowbit::Dtype;
using lowbit::Weight;

constexpr size_t kPoolBytes = size_t{768} << 20;
constexpr double kRoofStart = 1.5e-6;
constexpr int kReplays = 11;

enum class Storage { kPlain, kDouble };

struct Format {
  const char* name;
  int bits;
  int block_size;  // 0: a row
  Dtype scale_dtype;
  Storage storage;
  bool has_shift;
  bool is_integer;  // codebook 0..15 or -8..7 instead of NF4
};

using Kernel = void (*)(Weight, DecodeOperands);

// ---- the launch, as the host of the library computes it

struct Launch {
  Kernel kernel;
  int grid, threads, shared;
  DecodeOperands plan;  // without the call's pointers
};

int multiprocessors, most_shared;

Kernel pick(const Format& f, bool is_bfloat16, bool is_wide) {
#define PICK(weight)                                                                                    \
  (is_bfloat16 ? (is_wide ? linear_decode_bfloat16_##weight##_16 : linear_decode_bfloat16_##weight##_8) \
               : (is_wide ? linear_decode_float16_##weight##_16 : linear_decode_float16_##weight##_8))
#define PICK_SCALE(weight)                                     \
  (f.storage == Storage::kDouble      ? PICK(weight##_double)  \
   : f.scale_dtype == Dtype::kFloat32 ? PICK(weight##_scale32) \
                                      : PICK(weight##_scale16))
#define PICK_INT8 (f.scale_dtype == Dtype::kFloat32 ? PICK(int8_scale32) : PICK(int8_scale16))
  if (f.bits == 8) return PICK_INT8;
  if (f.block_size == 32) return f.has_shift ? PICK_SCALE(int4_block32_shift) : PICK_SCALE(int4_block32);
  return f.has_shift ? PICK_SCALE(int4_shift) : PICK_SCALE(int4);
#undef PICK
#undef PICK_SCALE
#undef PICK_INT8
}

int round_up_columns(int tokens) { return tokens > 8 ? 16 : tokens > 4 ? 8 : tokens > 2 ? 4 : 2; }

Launch plan(const Format& f, const Shape& shape, int tokens, bool is_bfloat16, int warps_asked) {
  const bool is_wide = tokens > 8;
  const int units = (shape.cols * f.bits / 8 + 127) / 128;
  // More than 8 tokens: 12 warps where there are units enough for them to share evenly.
  const int warps = warps_asked > 0 ? warps_asked : !is_wide ? 16 : units >= 24 ? 12 : 8;
  const int groups = f.bits == 4 && f.block_size == 32 ? 8 : 4;
  const int stage = 2048 + 64 * groups * (f.has_shift ? 2 : 1);
  const int tables = (f.bits == 4 ? 65536 : 0) + (f.storage == Storage::kDouble ? 1024 : 0);
  const int in_gaps = f.bits == 4 ? 32768 : 0;
  const int grid = std::min(multiprocessors, shape.rows);
  const int tiles = ((shape.rows + grid - 1) / grid + 15) / 16;
  const int tile = 64 * warps * round_up_columns(tokens);
  const int sums = std::max(tiles * tile - in_gaps, 0);
  // Two visits of a warp under way at a time where there are many.
  const bool is_deep = units * tiles >= 12 * warps && tables + 2 * warps * stage + sums <= most_shared;
  const int depth = is_deep ? 2 : 1, fixed = tables + warps * depth * stage;
  const int shared = std::min(most_shared, fixed + sums);
  const int room = (in_gaps + shared - fixed) / tile, passes = (tiles + room - 1) / room;
  DecodeOperands o = {};
  o.tokens = tokens;
  o.rows_each = shape.rows / grid, o.rows_rest = shape.rows % grid;
  o.full_rounds = units / warps, o.rest_units = units % warps;
  o.rest_parts = o.rest_units > 0 ? warps / o.rest_units : 1;
  o.tiles_a_pass = (tiles + passes - 1) / passes;
  o.depth = depth;
  return {pick(f, is_bfloat16, is_wide), grid, warps * 32, shared, o};
}

void launch(const Launch& l, const Weight& w, DecodeOperands operands, cudaStream_t stream, bool is_dependent) {
  operands.is_dependent = is_dependent;
  cudaLaunchConfig_t config = {};
  config.gridDim = l.grid;
  config.blockDim = l.threads;
  config.dynamicSmemBytes = l.shared;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = is_dependent ? 1 : 0;
  CHECK(cudaFuncSetAttribute(l.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, l.shared));
  CHECK(cudaLaunchKernelEx(&config, l.kernel, w, operands));
}

// ---- data

struct Data {
  uint8_t *codes, *numbers, *shifts;
  float *scale_2, *offset;
  void *x, *bias, *out;
  double* reference;

  Data() {
    CHECK(cudaMalloc(&codes, kPoolBytes));
    CHECK(cudaMalloc(&numbers, kPoolBytes / 4));
    CHECK(cudaMalloc(&shifts, kPoolBytes / 4));
    CHECK(cudaMalloc(&scale_2, kPoolBytes / 64));
    CHECK(cudaMalloc(&offset, 4));
    CHECK(cudaMalloc(&x, 16 * 65536 * 2));
    CHECK(cudaMalloc(&bias, 65536 * 4));
    CHECK(cudaMalloc(&out, 16 * 65536 * 4));
    CHECK(cudaMalloc(&reference, 16 * 65536 * 8));
    fill_bytes<<<2048, 256>>>(reinterpret_cast<uint32_t*>(codes), kPoolBytes / 4, 7);
    fill_numbers<<<2048, 256>>>(scale_2, Dtype::kFloat32, kPoolBytes / 256, 0.01f, 0.02f, 77);
    const float value = 0.013f;
    CHECK(cudaMemcpy(offset, &value, 4, cudaMemcpyHostToDevice));
    float map[256];
    for (int i = 0; i < 256; ++i) map[i] = (i - 127) / 160.0f;
    CHECK(cudaMemcpyToSymbol(lowbit_dynamic_map, map, sizeof map));
    fill_numbers<<<256, 256>>>(bias, Dtype::kFloat32, 65536, -1.0f, 2.0f, 5);
  }

  void prepare(const Format& f, Dtype activation) {
    if (f.storage == Storage::kDouble) {
      fill_bytes<<<2048, 256>>>(reinterpret_cast<uint32_t*>(numbers), kPoolBytes / 16, 55);
    } else {
      const size_t size = f.scale_dtype == Dtype::kFloat32 ? 4 : 2;
      fill_numbers<<<2048, 256>>>(numbers, f.scale_dtype, kPoolBytes / 4 / size, 0.01f, 0.02f, 99);
    }
    const size_t size = f.scale_dtype == Dtype::kFloat32 ? 4 : 2;
    if (f.has_shift) fill_numbers<<<2048, 256>>>(shifts, f.scale_dtype, kPoolBytes / 4 / size, -0.3f, 0.2f, 41);
    fill_numbers<<<512, 256>>>(x, activation, 16 * 65536, -1.7f, 3.4f, 3);
    CHECK(cudaDeviceSynchronize());
  }
};

int blocks_per_row(const Format& f, const Shape& s) {
  return f.block_size == 0 ? 1 : (s.cols + f.block_size - 1) / f.block_size;
}
size_t code_bytes(const Format& f, const Shape& s) { return size_t(s.rows) * s.cols * f.bits / 8; }
size_t number_bytes(const Format& f) { return f.scale_dtype == Dtype::kFloat32 ? 4 : 2; }
size_t scale_bytes(const Format& f, const Shape& s) {
  const size_t blocks = size_t(s.rows) * blocks_per_row(f, s);
  return f.storage == Storage::kDouble ? blocks + (blocks + 255) / 256 * 4 : blocks * number_bytes(f);
}
// What a product has to read.
size_t weight_bytes(const Format& f, const Shape& s) {
  const size_t shift = f.has_shift ? size_t(s.rows) * blocks_per_row(f, s) * number_bytes(f) : 0;
  return code_bytes(f, s) + scale_bytes(f, s) + shift;
}


Weight weight(const Data& d, const Format& f, const Shape& s, int copy) {
  Weight w = {};
  const size_t blocks = size_t(s.rows) * blocks_per_row(f, s);
  w.codes = d.codes + copy * aligned(code_bytes(f, s));
  w.scales = d.numbers + copy * aligned(blocks * (f.storage == Storage::kDouble ? 1 : number_bytes(f)));
  if (f.storage == Storage::kDouble) {
    w.scale_2 = d.scale_2 + copy * aligned(blocks / 256 + 1);
    w.scale_offset = d.offset;
  }
  if (f.has_shift) w.shifts = d.shifts + copy * aligned(blocks * number_bytes(f));
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

DecodeOperands operands(const Data& d, const Launch& l, const Shape& s, bool has_bias) {
  DecodeOperands o = l.plan;
  o.x = d.x, o.out = d.out, o.x_stride = s.cols;
  o.bias = has_bias ? d.bias : nullptr, o.bias_dtype = Dtype::kFloat32;
  return o;
}

// ---- the check

// One row a block, all in fp64 but the weight itself.
__global__ void multiply_in_fp64(Weight w, DecodeOperands o, Dtype activation, double* out) {
  __shared__ float table[16];
  __shared__ double sums[256];
  lowbit::load_codebook(w, table);
  for (int token = 0; token < o.tokens; ++token) {
    double sum = 0.0;
    for (int64_t col = threadIdx.x; col < w.cols; col += blockDim.x) {
      sum += double(lowbit::weight_at(w, table, blockIdx.x, col)) *
             lowbit::load(o.x, activation, token * o.x_stride + col);
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

// Relative error (Frobenius) of one product; infinite where a result is not finite or was not written.
double error_of(Data& d, const Format& f, const Shape& s, int tokens, bool is_bfloat16, int warps, bool is_dependent,
                bool* is_same) {
  const Dtype activation = is_bfloat16 ? Dtype::kBfloat16 : Dtype::kFloat16;
  const Weight w = weight(d, f, s, 0);
  const Launch l = plan(f, s, tokens, is_bfloat16, warps);
  const DecodeOperands o = operands(d, l, s, true);
  const size_t count = size_t(tokens) * s.rows;
  multiply_in_fp64<<<s.rows, 256>>>(w, o, activation, d.reference);
  std::vector<uint16_t> first(count), second(count);
  std::vector<double> expected(count);
  for (std::vector<uint16_t>* to : {&first, &second}) {
    CHECK(cudaMemset(d.out, 0xff, count * 2));
    launch(l, w, o, nullptr, is_dependent);
    CHECK(cudaMemcpy(to->data(), d.out, count * 2, cudaMemcpyDeviceToHost));
  }
  CHECK(cudaMemcpy(expected.data(), d.reference, count * 8, cudaMemcpyDeviceToHost));
  *is_same = first == second;
  double error = 0.0, norm = 0.0;
  for (size_t i = 0; i < count; ++i) {
    const double got = as_double(first[i], activation);
    if (!std::isfinite(got)) return INFINITY;
    error += (got - expected[i]) * (got - expected[i]), norm += expected[i] * expected[i];
  }
  return std::sqrt(error / norm);
}

// ---- times

__global__ void read_stream(const uint4* from, size_t count, uint32_t* never) {
  uint32_t sum = 0;
  const size_t step = size_t{gridDim.x} * blockDim.x * 4;
  for (size_t i = (blockIdx.x * size_t{blockDim.x}) * 4 + threadIdx.x; i < count; i += step) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (i + j * blockDim.x >= count) continue;
      const uint4 value = __ldcs(from + i + j * blockDim.x);
      sum ^= value.x ^ value.y ^ value.z ^ value.w;
    }
  }
  if (sum == 0x12345678u) *never = sum;
}

double stream_seconds(const Data& d, size_t bytes) {
  const int copies = static_cast<int>(std::min<size_t>(40, kPoolBytes / bytes));
  return seconds_of(
      [&](int i, cudaStream_t stream) {
        const size_t count = bytes / 16;
        const int grid = static_cast<int>(std::min<size_t>((count + 4 * 512 - 1) / (4 * 512), 1 << 20));
        read_stream<<<grid, 512, 0, stream>>>(reinterpret_cast<const uint4*>(d.codes + i * bytes / 256 * 256), count,
                                              reinterpret_cast<uint32_t*>(d.out));
      },
      copies, kReplays);
}

double linear_seconds(const Data& d, const Format& f, const Shape& s, int tokens, bool is_bfloat16, int warps,
                      bool is_dependent) {
  const size_t bytes = weight_bytes(f, s);
  const int copies = static_cast<int>(std::min<size_t>(60, (size_t{600} << 20) / bytes + 1));
  const Launch l = plan(f, s, tokens, is_bfloat16, warps);
  std::vector<Weight> weights;
  for (int i = 0; i < copies; ++i) weights.push_back(weight(d, f, s, i));
  const DecodeOperands o = operands(d, l, s, false);
  return seconds_of([&](int i, cudaStream_t stream) { launch(l, weights[i], o, stream, is_dependent); }, copies, kReplays);
}

constexpr Dtype kF32 = Dtype::kFloat32, kF16 = Dtype::kFloat16, kBf16 = Dtype::kBfloat16;
constexpr Storage kPlain = Storage::kPlain, kDouble = Storage::kDouble;
const Format kFormats[] = {
    {"nf4", 4, 64, kF32, kPlain, false, false},           {"nf4-double", 4, 64, kF32, kDouble, false, false},
    {"nf4-scale16", 4, 64, kF16, kPlain, false, false},   {"nf4-block32", 4, 32, kF32, kPlain, false, false},
    {"nf4-block128", 4, 128, kF32, kPlain, false, false}, {"int4-g128", 4, 128, kF16, kPlain, false, true},
    {"uint4-g64", 4, 64, kF16, kPlain, true, true},       {"uint4-g128", 4, 128, kF16, kPlain, true, true},
    {"int8-row", 8, 0, kF32, kPlain, false, true},        {"int8-block128", 8, 128, kF32, kPlain, false, true},
};
const Format kMoreFormats[] = {
    {"nf4-bf16", 4, 64, kBf16, kPlain, false, false},      {"uint4-f32", 4, 64, kF32, kPlain, true, true},
    {"uint4-double", 4, 64, kF32, kDouble, true, true},    {"nf4-256", 4, 256, kF32, kPlain, false, false},
    {"nf4-256-f16", 4, 256, kF16, kPlain, false, false},   {"nf4-1024", 4, 1024, kF32, kPlain, false, false},
    {"nf4-4096-f16", 4, 4096, kF16, kPlain, false, false}, {"nf4-row", 4, 0, kF32, kPlain, false, false},
    {"nf4-128-dq", 4, 128, kF32, kDouble, false, false},   {"nf4-512-dq", 4, 512, kF32, kDouble, false, false},
    {"nf4-32-f16", 4, 32, kF16, kPlain, false, false},     {"nf4-32-dq", 4, 32, kF32, kDouble, false, false},
    {"uint4-32-f32", 4, 32, kF32, kPlain, true, true},     {"uint4-32-f16", 4, 32, kF16, kPlain, true, true},
    {"uint4-32-dq", 4, 32, kF16, kDouble, true, true},     {"uint4-256-f16", 4, 256, kF16, kPlain, true, true},
    {"int8-32-f16", 8, 32, kF16, kPlain, false, true},     {"int8-64", 8, 64, kF32, kPlain, false, true},
    {"int8-row-f16", 8, 0, kBf16, kPlain, false, true},    {"int8-256", 8, 256, kF32, kPlain, false, true},
};
const Shape kTimedShapes[] = {{4096, 4096}, {14336, 4096}, {4096, 14336}, {8192, 28672}, {1024, 4096}, {6144, 4096}};

bool is_admitted(const Format& f, const Shape& s) {
  const int unit = f.bits == 4 ? 256 : 128, size = f.block_size == 0 ? s.cols : f.block_size;
  const int c = std::max(1, unit / size), blocks = blocks_per_row(f, s);
  const auto fits = [&](int bytes) { return blocks * bytes % std::min(4, c * bytes) == 0; };
  const int number = static_cast<int>(number_bytes(f));
  if (f.storage == Storage::kDouble && blocks % c != 0) return false;
  return s.cols % 64 == 0 && fits(f.storage == Storage::kDouble ? 1 : number) && (!f.has_shift || fits(number));
}

// Whether `filter` is empty, part of the name, or "=" and the name.
bool is_chosen(const Format& f, const std::string& filter) {
  const std::string name = f.name;
  return filter == "=" + name || name.find(filter) != std::string::npos;
}

int check(Data& d, const Format& f, const Shape& s, int tokens, bool is_bfloat16, int warps) {
  bool is_same = false, is_same_dependent = false;
  const double error = error_of(d, f, s, tokens, is_bfloat16, warps, false, &is_same);
  const double dependent = error_of(d, f, s, tokens, is_bfloat16, warps, true, &is_same_dependent);
  // Rounding of results and, in bf16, of the codebook's values.
  const double bound = is_bfloat16 ? 4e-3 : 5e-4;
  const bool is_good = error < bound && dependent == error && is_same && is_same_dependent;
  if (!is_good) {
    std::printf("WRONG %s %dx%d tokens %d %s warps %d: error %.2e, dependent %.2e, repeatable %d %d\n", f.name, s.rows,
                s.cols, tokens, is_bfloat16 ? "bf16" : "fp16", warps, error, dependent, is_same, is_same_dependent);
  }
  return is_good ? 0 : 1;
}

int check_all(Data& d, const std::string& filter, bool is_short) {
  int wrong = 0, count = 0;
  const Shape shapes[] = {{4096, 4096}, {1000, 4160}, {77, 896}, {3000, 11008}, {16, 64}, {5000, 1536}};
  std::vector<Format> formats(std::begin(kFormats), std::end(kFormats));
  formats.insert(formats.end(), std::begin(kMoreFormats), std::end(kMoreFormats));
  for (const Format& f : formats) {
    if (!is_chosen(f, filter)) continue;
    for (bool is_bfloat16 : {true, false}) {
      d.prepare(f, is_bfloat16 ? kBf16 : kF16);
      for (const Shape& s : shapes) {
        if (!is_admitted(f, s) || (is_short && s.rows > 1000)) continue;
        for (int tokens : {1, 2, 3, 5, 8, 9, 16}) {
          if (is_short && tokens != 1 && tokens != 5 && tokens != 16) continue;
          for (int warps : {0, 4}) wrong += check(d, f, s, tokens, is_bfloat16, warps), ++count;
        }
      }
    }
  }
  std::printf("checked %d products, %d wrong\n", count, wrong);
  return wrong;
}

void time_row(const Data& d, const Format& f, const Shape& s, int tokens, bool is_bfloat16, int warps, double rate) {
  const double roof = kRoofStart + weight_bytes(f, s) / rate;
  const double alone = linear_seconds(d, f, s, tokens, is_bfloat16, warps, false);
  const double chain = linear_seconds(d, f, s, tokens, is_bfloat16, warps, true);
  std::printf("%-13s %5dx%-5d M=%-2d %s %7.2f us %5.1f%%   chain %7.2f us %5.1f%%\n", f.name, s.rows, s.cols,
              tokens, is_bfloat16 ? "bf16" : "fp16", alone * 1e6, 100 * roof / alone, chain * 1e6,
              100 * roof / chain);
  std::fflush(stdout);
}

void time_all(Data& d, const std::string& filter) {
  const double rate = (kPoolBytes) / (stream_seconds(d, kPoolBytes) - kRoofStart);
  std::printf("read stream of %zu MiB: %.3f TB/s\n", kPoolBytes >> 20, rate * 1e-12);
  for (const Shape& s : kTimedShapes) {
    const size_t bytes = weight_bytes(kFormats[0], s);
    const double seconds = stream_seconds(d, bytes);
    std::printf("read stream of %5dx%-5d nf4 bytes: %7.2f us, %.1f%%\n", s.rows, s.cols, seconds * 1e6,
                100 * (kRoofStart + bytes / rate) / seconds);
  }
  for (const Format& f : kFormats) {
    if (!is_chosen(f, filter)) continue;
    d.prepare(f, kBf16);
    const bool is_first = &f == kFormats;
    for (const Shape& s : kTimedShapes) {
      for (int tokens : {1, 2, 4, 8, 16}) {
        const bool is_timed = is_first || (tokens == 1 || (tokens == 8 && f.bits == 8));
        if (is_timed) time_row(d, f, s, tokens, true, 0, rate);
      }
    }
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
  if (mode == "check" || mode == "all") wrong = check_all(data, filter, false);
  if (mode == "short") wrong = check_all(data, filter, true);
  if (mode == "time" || mode == "all") time_all(data, filter);
  CHECK(cudaDeviceSynchronize());
  return wrong == 0 ? 0 : 1;
}
