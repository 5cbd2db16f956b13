// y = x W^T + bias on CUDA cores: fp32 products and sums for every dtype, format, block size and shape, on every GPU.
// Tensor-core kernels take over where they can; this is what is right everywhere.
#include "lowbit/weight.cuh"

extern "C" __device__ float lowbit_dynamic_map[256] = {};

namespace lowbit {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr uint32_t kAllLanes = 0xffffffffu;

// Rows of activations or gradients and where results go. Mirrored in rust/core/src/cuda/linear.rs.
struct Operands {
  const void* x;
  const void* bias;  // null where there is none
  void* out;
  uint32_t x_stride;  // elements from one token of x to the next
  int32_t tokens;
  Dtype bias_dtype;
};
static_assert(sizeof(Operands) == 40, "the beginning of what rust/core/src/cuda/linear.rs has");

// A lane works on units of 16 weights, which never straddle a block of a row-aligned weight.
constexpr int kUnit = 16;
// Warps that share the rows' columns between them, and groups of such warps with rows of their own.
constexpr int kSplits = 4;
constexpr int kGroups = kWarps / kSplits;

// Rows of a warp, for which activations are loaded once, and of a CTA, as rust/core/src/cuda/plan.rs says again.
template <int kTokens>
struct Shape {
  static constexpr int kWarpRows = kTokens <= 2 ? 8 : 4;
  static constexpr int kRows = kWarpRows * kGroups;
};

template <int kTokens>
struct Scratch {
  float table[kCodebookLength];
  float partial[kSplits][Shape<kTokens>::kRows][kTokens];
};

// The 16 codes of a unit, 4 or 8 bits each.
template <int kBits>
struct Unit {
  uint32_t words[kBits / 2];
};

template <int kBits>
__device__ __forceinline__ Unit<kBits> load_unit(const Weight& w, int64_t row, int64_t col, bool is_aligned) {
  const uint8_t* from = w.codes + (row * w.row_codes + col) * kBits / 8;
  if (is_aligned) {
    // Read once: they leave the cache to the activations.
    if constexpr (kBits == 8) {
      const uint4 words = __ldcs(reinterpret_cast<const uint4*>(from));
      return {words.x, words.y, words.z, words.w};
    } else {
      const uint2 words = __ldcs(reinterpret_cast<const uint2*>(from));
      return {words.x, words.y};
    }
  }
  Unit<kBits> unit = {};
  const int bytes = static_cast<int>((min(w.cols - col, static_cast<int64_t>(kUnit)) * kBits + 7) / 8);
#pragma unroll
  for (int i = 0; i < kUnit * kBits / 8; ++i) {
    if (i < bytes) unit.words[i / 4] |= static_cast<uint32_t>(from[i]) << (8 * (i % 4));
  }
  return unit;
}

// One unit of each row of a warp, with its scales and shifts.
template <int kBits, int kWarpRows>
struct Units {
  Unit<kBits> codes[kWarpRows];
  float scales[kWarpRows];
  float shifts[kWarpRows];

  __device__ __forceinline__ void load(const Weight& w, int64_t first_row, int64_t col, bool is_aligned) {
    const int64_t block = divided_by_block_size(w, col);
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      // Rows behind the last one repeat it; their sums are not written.
      const int64_t row = min(first_row + r, w.rows - 1);
      codes[r] = load_unit<kBits>(w, row, col, is_aligned);
      scales[r] = scale_of(w, row * w.blocks_per_row + block);
      shifts[r] = w.shifts == nullptr ? 0.0f : shift_of(w, row * w.blocks_per_row + block);
    }
  }
};

// Numbers that codes stand for. In 4 bits, codes are first made byte offsets into the table, four in a word: even ones, then
// odd ones of each word of codes. A byte of them is an address after one instruction.
template <int kBits>
struct Decoded {
  uint32_t words[4];
  const float* table;

  __device__ __forceinline__ Decoded(const float* codebook, const Unit<kBits>& unit) : table(codebook) {
    if constexpr (kBits == 8) {
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = unit.words[i];
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        words[2 * i] = unit.words[i] >> 2 & 0x3c3c3c3cu;
        words[2 * i + 1] = unit.words[i] << 2 & 0x3c3c3c3cu;
      }
    }
  }
  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (kBits == 8) {
      return static_cast<float>(signed_byte(words[i / 4], i % 4));
    } else {
      const uint32_t offset = __byte_perm(words[i / 8 * 2 + i % 2], 0, 0x4440 | i % 8 / 2);
      return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(table) + offset);
    }
  }
};

// 16 activations of one token, widened; zeros behind the last column.
template <typename T>
__device__ __forceinline__ void load_x(const T* x, int64_t col, int64_t cols, bool is_aligned, float (&values)[kUnit]) {
  constexpr int kPart = 16 / sizeof(T);
  if (is_aligned && col + kUnit <= cols) {
#pragma unroll
    for (int part = 0; part < kUnit; part += kPart) {
      const auto loaded = *reinterpret_cast<const Vector<T, kPart>*>(x + col + part);
#pragma unroll
      for (int i = 0; i < kPart; ++i) values[part + i] = to_float(loaded.values[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) values[i] = col + i < cols ? to_float(x[col + i]) : 0.0f;
  }
}

__device__ __forceinline__ float sum_over_warp(float value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

template <typename T>
__device__ __forceinline__ void write_result(const Operands& io, int64_t token, int64_t row, int64_t rows, float sum) {
  if (io.bias != nullptr) sum += load(io.bias, io.bias_dtype, row);
  static_cast<T*>(io.out)[token * rows + row] = from_float<T>(sum);
}

// Adds the products of one unit of each row with each token. Inside a block, scale and shift leave the sum.
template <int kTokens, int kWarpRows, int kBits>
__device__ __forceinline__ void multiply(const Weight& w, const float* table, const Units<kBits, kWarpRows>& units,
                                         const float (&x)[kTokens][kUnit], float (&sums)[kTokens][kWarpRows]) {
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    const Decoded<kBits> weights(table, units.codes[r]);
    float dots[kTokens] = {};
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const float weight = weights[i];
#pragma unroll
      for (int t = 0; t < kTokens; ++t) dots[t] = fmaf(weight, x[t][i], dots[t]);
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) sums[t][r] = fmaf(units.scales[r], dots[t], sums[t][r]);
  }
  if (w.shifts == nullptr) return;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) total += x[t][i];
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) sums[t][r] = fmaf(units.shifts[r], total, sums[t][r]);
  }
}

// Up to kTokens tokens times kRows rows of a row-aligned weight, a CTA. Blocks along x walk rows, along y tokens.
template <typename T, int kTokens, int kBits>
__device__ void linear(const Weight& w, const Operands& io, Scratch<kTokens>& scratch) {
  constexpr int kWarpRows = Shape<kTokens>::kWarpRows, kRows = Shape<kTokens>::kRows;
  load_codebook(w, scratch.table);
  const int lane = threadIdx.x % kWarp, split = threadIdx.x / kWarp % kSplits, group = threadIdx.x / kWarp / kSplits;
  const int64_t token = static_cast<int64_t>(blockIdx.y) * kTokens;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows + group * kWarpRows;
  const bool is_aligned = w.row_codes % 16 == 0 && w.cols % 16 == 0 && reinterpret_cast<uintptr_t>(w.codes) % 16 == 0;
  const bool x_is_aligned = reinterpret_cast<uintptr_t>(io.x) % 16 == 0 && io.x_stride * sizeof(T) % 16 == 0;
  constexpr int kStep = kSplits * kWarp * kUnit;
  float sums[kTokens][kWarpRows] = {};
#pragma unroll 1
  for (int64_t col = (split * kWarp + lane) * kUnit; col < w.cols; col += kStep) {
    Units<kBits, kWarpRows> units;
    units.load(w, first_row, col, is_aligned);
    float x[kTokens][kUnit];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      // Tokens behind the last one repeat it; their sums are not written.
      const int64_t row_of_x = min(token + t, static_cast<int64_t>(io.tokens) - 1);
      load_x(static_cast<const T*>(io.x) + row_of_x * io.x_stride, col, w.cols, x_is_aligned, x[t]);
    }
    multiply(w, scratch.table, units, x, sums);
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const float sum = sum_over_warp(sums[t][r]);
      if (lane == 0) scratch.partial[split][group * kWarpRows + r][t] = sum;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kTokens; i += kThreads) {
    const int r = i / kTokens, t = i % kTokens;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + r;
    float sum = 0.0f;
#pragma unroll
    for (int s = 0; s < kSplits; ++s) sum += scratch.partial[s][r][t];
    if (row < w.rows && token + t < io.tokens) write_result<T>(io, token + t, row, w.rows, sum);
  }
}

// A warp a row and token, a weight a lane: where blocks straddle rows.
template <typename T>
__device__ void linear_straddling(const Weight& w, const Operands& io) {
  __shared__ float table[kCodebookLength];
  load_codebook(w, table);
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= w.rows) return;
  for (int64_t token = blockIdx.y; token < io.tokens; token += gridDim.y) {
    const T* x = static_cast<const T*>(io.x) + token * io.x_stride;
    float sum = 0.0f;
    for (int64_t col = lane; col < w.cols; col += kWarp) {
      sum = fmaf(weight_at(w, table, row, col), to_float(x[col]), sum);
    }
    sum = sum_over_warp(sum);
    if (lane == 0) write_result<T>(io, token, row, w.rows, sum);
  }
}

}  // namespace lowbit

#define ENTRY(name)                                                 \
  extern "C" __global__ void __launch_bounds__(lowbit::kThreads, 2) \
      name(const __grid_constant__ lowbit::Weight w, const __grid_constant__ lowbit::Operands io)
#define LINEAR_ENTRY(name, T, tokens)                                          \
  ENTRY(linear_##name##_##tokens) {                                            \
    __shared__ lowbit::Scratch<tokens> scratch;                                \
    if (w.bits == 8) lowbit::linear<T, tokens, 8>(w, io, scratch);             \
    else lowbit::linear<T, tokens, 4>(w, io, scratch);                         \
  }
#define ENTRIES(name, T)                                                             \
  LINEAR_ENTRY(name, T, 1)                                                           \
  LINEAR_ENTRY(name, T, 2)                                                           \
  LINEAR_ENTRY(name, T, 4)                                                           \
  ENTRY(linear_straddling_##name) { lowbit::linear_straddling<T>(w, io); }
LOWBIT_FOR_EACH_DTYPE(ENTRIES)
