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
  int64_t x_stride;  // elements from one token of x to the next
  int32_t tokens;
  Dtype bias_dtype;
  int32_t is_dependent;  // of the kernels in linear_decode.cu, which take the same
};
static_assert(sizeof(Operands) == 48, "as rust/core/src/cuda/linear.rs has it");

// A lane works on units of 16 weights, which never straddle a block of a row-aligned weight.
constexpr int kUnit = 16;
// A unit of x in shared memory takes 20 words: lanes that read 16 bytes each of neighbouring units meet no bank twice.
constexpr int kPaddedUnit = 20;
// Warps that share the rows' columns between them, and groups of such warps with rows of their own.
constexpr int kSplits = 4;
constexpr int kGroups = kWarps / kSplits;

// How a CTA cuts its work, for a number of tokens. `rows_per_cta` in rust/core/src/cuda/plan.rs says kRows again.
template <int kTokens>
struct Shape {
  static constexpr int kWarpRows = kTokens == 1 ? 8 : 4;
  static constexpr int kRows = kWarpRows * kGroups;
  // Units of x that are staged at once.
  static constexpr int kTile = kTokens <= 2 ? 256 : 128;
};

template <int kTokens>
struct Scratch {
  float table[kCodebookLength];
  alignas(16) float tile[kTokens * Shape<kTokens>::kTile * kPaddedUnit];
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
    if constexpr (kBits == 8) {
      const uint4 words = __ldg(reinterpret_cast<const uint4*>(from));
      return {words.x, words.y, words.z, words.w};
    } else {
      const uint2 words = __ldg(reinterpret_cast<const uint2*>(from));
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

// Columns [first, first + kTile units) of every token, widened, zeros behind the last column and the last token.
template <typename T, int kTokens>
__device__ __forceinline__ void stage_x(const Weight& w, const Operands& io, int64_t token, int64_t first, float* tile) {
  constexpr int kTile = Shape<kTokens>::kTile;
  const T* x = static_cast<const T*>(io.x);
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const bool is_there = token + t < io.tokens;
    for (int i = threadIdx.x; i < kTile * kUnit; i += kThreads) {
      const int64_t col = first + i;
      float value = 0.0f;
      if (is_there && col < w.cols) value = to_float(x[(token + t) * io.x_stride + col]);
      tile[(t * kTile + i / kUnit) * kPaddedUnit + i % kUnit] = value;
    }
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
__device__ __forceinline__ void multiply_unit(const Weight& w, const float* table,
                                              const Unit<kBits> (&units)[kWarpRows],
                                              const float (&scales)[kWarpRows], const float (&shifts)[kWarpRows],
                                              const float* x, int x_step, float (&sums)[kWarpRows][kTokens]) {
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    float values[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; i += 4) {
      const float4 part = *reinterpret_cast<const float4*>(x + t * x_step + i);
      values[i] = part.x;
      values[i + 1] = part.y;
      values[i + 2] = part.z;
      values[i + 3] = part.w;
    }
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const Decoded<kBits> weights(table, units[r]);
      float dot = 0.0f;
#pragma unroll
      for (int i = 0; i < kUnit; ++i) dot = fmaf(weights[i], values[i], dot);
      sums[r][t] = fmaf(scales[r], dot, sums[r][t]);
    }
    if (w.shifts != nullptr) {
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < kUnit; ++i) total += values[i];
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) sums[r][t] = fmaf(shifts[r], total, sums[r][t]);
    }
  }
}

// Up to kTokens tokens times kRows rows of a row-aligned weight, a CTA. Blocks along x walk rows, along y tokens.
template <typename T, int kTokens, int kBits>
__device__ void linear(const Weight& w, const Operands& io, Scratch<kTokens>& scratch) {
  using S = Shape<kTokens>;
  load_codebook(w, scratch.table);
  const int lane = threadIdx.x % kWarp, split = threadIdx.x / kWarp % kSplits, group = threadIdx.x / kWarp / kSplits;
  const int64_t token = static_cast<int64_t>(blockIdx.y) * kTokens;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * S::kRows + group * S::kWarpRows;
  const bool is_aligned = w.row_codes % 16 == 0 && w.cols % 16 == 0 && reinterpret_cast<uintptr_t>(w.codes) % 16 == 0;
  float sums[S::kWarpRows][kTokens] = {};
  for (int64_t first = 0; first < w.cols; first += S::kTile * kUnit) {
    __syncthreads();
    stage_x<T, kTokens>(w, io, token, first, scratch.tile);
    __syncthreads();
#pragma unroll 2
    for (int i = split * kWarp + lane; i < S::kTile; i += kSplits * kWarp) {
      const int64_t col = first + i * kUnit;
      if (col >= w.cols) break;
      Unit<kBits> units[S::kWarpRows];
      float scales[S::kWarpRows], shifts[S::kWarpRows];
      const int64_t block = divided_by_block_size(w, col);
#pragma unroll
      for (int r = 0; r < S::kWarpRows; ++r) {
        // Rows behind the last one repeat it; their sums are not written.
        const int64_t row = min(first_row + r, w.rows - 1);
        units[r] = load_unit<kBits>(w, row, col, is_aligned);
        scales[r] = scale_of(w, row * w.blocks_per_row + block);
        shifts[r] = w.shifts == nullptr ? 0.0f : shift_of(w, row * w.blocks_per_row + block);
      }
      multiply_unit<kTokens, S::kWarpRows, kBits>(w, scratch.table, units, scales, shifts,
                                                  scratch.tile + i * kPaddedUnit, S::kTile * kPaddedUnit, sums);
    }
  }
#pragma unroll
  for (int r = 0; r < S::kWarpRows; ++r) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const float sum = sum_over_warp(sums[r][t]);
      if (lane == 0) scratch.partial[split][group * S::kWarpRows + r][t] = sum;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < S::kRows * kTokens; i += kThreads) {
    const int r = i / kTokens, t = i % kTokens;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * S::kRows + r;
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

#define ENTRY(name)                                                \
  extern "C" __global__ void __launch_bounds__(lowbit::kThreads)   \
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
