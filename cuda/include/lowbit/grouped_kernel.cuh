// Rows of x, sorted by expert, times the matrices of a stack, on tensor cores. A CTA takes a tile of 128 rows of one
// expert's matrix and up to kTokens rows of x; weights are the first operand, rows of x the columns of the second. A dot
// product does not mind an order of columns that both share, so bytes of codes and of x are fed as they lie.
#pragma once

#include "grouped_plan.cuh"
#include "ptx.cuh"
#include "weight.cuh"

namespace lowbit {

constexpr int kGroupedWarps = 4;
constexpr int kGroupedThreads = 32 * kGroupedWarps;
constexpr int kWarpRows = 32;                            // of a matrix: two tiles of the first operand
constexpr int kTileRows = kWarpRows * kGroupedWarps;     // a thread each where they are copied
static_assert(kTileRows == kGroupedThreads, "a thread copies the scales of a row");
constexpr int kGroupColumns = 64;                        // columns between two applications of a scale
constexpr int kPairTableBytes = 256 * 32 * 4;
constexpr int kMapBytes = 256 * 4;

// How a stage of the ring is laid out, for tiles of kTokens rows of x and kGroups groups of columns.
template <int kTokens, int kGroups>
struct GroupedStage {
  static constexpr int kCodeBytes = kTileRows * kGroups * kGroupColumns / 2;
  static constexpr int kActivationBytes = kTokens * kGroups * kGroupColumns * 2;
  static constexpr int kScaleBytes = kTileRows * kGroups * 4;
  static constexpr int kActivations = kCodeBytes;
  static constexpr int kScales = kActivations + kActivationBytes;
  static constexpr int kScales2 = kScales + kScaleBytes;
  static constexpr int kBytes = kScales2 + kScaleBytes;
};

template <typename T>
__device__ __forceinline__ uint32_t packed_pair(float first, float second) {
  Vector<T, 2> pair = {{from_float<T>(first), from_float<T>(second)}};
  return *reinterpret_cast<uint32_t*>(&pair);
}

template <typename T, int kTokens, int kGroups, int kStages>
class GroupedProduct {
  using Stage = GroupedStage<kTokens, kGroups>;
  static constexpr int kColumns = kGroups * kGroupColumns;
  static constexpr int kTokenTiles = kTokens / 8;

 public:
  __device__ __forceinline__ GroupedProduct(const Weight& w, const GroupedOperands& operands, uint8_t* memory)
      : w_(w),
        operands_(operands),
        pairs_(reinterpret_cast<uint32_t*>(memory)),
        map_(reinterpret_cast<float*>(memory + kPairTableBytes)),
        ring_(memory + kPairTableBytes + kMapBytes),
        starts_(reinterpret_cast<GroupedStart*>(ring_ + kStages * Stage::kBytes)),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32) {}

  __device__ __forceinline__ void run() {
    fill_tables();
    const int tiles = starts_[operands_.experts].tile;
    const int row_tiles = (operands_.outputs + kTileRows - 1) / kTileRows;
    clear_rows_beyond(starts_[operands_.experts].row);
    for (int item = blockIdx.x; item < tiles * row_tiles; item += gridDim.x) {
      begin(find_tile<kTokens>(starts_, operands_.experts, item / row_tiles), item % row_tiles * kTileRows);
      multiply();
      write();
      __syncthreads();  // before the ring is filled again
    }
  }

 private:
  __device__ __forceinline__ void fill_tables() {
    for (int byte = warp_; byte < 256; byte += kGroupedWarps) {
      pairs_[byte * 32 + lane_] = packed_pair<T>(value_of(byte >> 4), value_of(byte & 15));
    }
    if (w_.scale_2 != nullptr) {
      for (int code = threadIdx.x; code < 256; code += kGroupedThreads) map_[code] = lowbit_dynamic_map[code];
      offset_ = *w_.scale_offset;
    }
    if (warp_ == 0) find_starts<kTokens>(operands_, starts_);
    __syncthreads();
  }

  __device__ __forceinline__ float value_of(int code) const {
    if (w_.codebook == nullptr) return w_.table[code];
    return code < w_.codebook_length ? w_.codebook[code] : 0.0f;
  }

  __device__ __forceinline__ void clear_rows_beyond(int first) {
    const int64_t from = static_cast<int64_t>(first) * operands_.outputs;
    const int64_t to = static_cast<int64_t>(operands_.rows) * operands_.outputs;
    for (int64_t i = from + blockIdx.x * kGroupedThreads + threadIdx.x; i < to; i += gridDim.x * kGroupedThreads) {
      static_cast<T*>(operands_.out)[i] = from_float<T>(0.0f);
    }
  }

  __device__ __forceinline__ void begin(GroupedTile tile, int first_output) {
    tile_ = tile;
    first_output_ = first_output;
    matrix_row_ = static_cast<int64_t>(tile.expert) * operands_.outputs + first_output;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int k = 0; k < 4; ++k) sums_[i][n][k] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ int64_t block_at(int row, int column) const {
    return (matrix_row_ + row) * w_.blocks_per_row + (w_.blocks_per_row == 1 ? 0 : column >> w_.block_shift);
  }

  __device__ __forceinline__ int scale_bytes() const {
    return w_.scale_2 != nullptr ? 1 : w_.scale_dtype == Dtype::kFloat32 ? 4 : 2;
  }

  // Copies are of 16 bytes, neighbours of a row by neighbouring threads. A 16-byte unit of a row lies at a place that
  // makes the reads of `multiply` free of bank conflicts.
  __device__ __forceinline__ void copy(int step) {
    const uint32_t stage = shared_address(ring_ + step % kStages * Stage::kBytes);
    const int column = step * kColumns;
    constexpr int kCodeUnits = kColumns / 32;
    for (int i = threadIdx.x; i < kTileRows * kCodeUnits; i += kGroupedThreads) {
      const int row = i / kCodeUnits;
      const int unit = i % kCodeUnits;
      const int place = kGroups == 2 ? unit ^ (row >> 1 & 1) << 1 : unit;
      const bool is_inside = first_output_ + row < operands_.outputs && column + unit * 32 < w_.cols;
      const uint8_t* from = w_.codes + ((matrix_row_ + row) * w_.row_codes + column) / 2 + unit * 16;
      copy_16_async(stage + row * (kColumns / 2) + place * 16, is_inside ? from : w_.codes, is_inside);
    }
    constexpr int kUnits = kColumns / 8;
    for (int i = threadIdx.x; i < kTokens * kUnits; i += kGroupedThreads) {
      const int row = i / kUnits;
      const int unit = i % kUnits;
      const bool is_inside = row < tile_.rows && column + unit * 8 < w_.cols;
      const T* from = static_cast<const T*>(operands_.x) +
                      static_cast<int64_t>(tile_.first_row + row) * operands_.x_stride + column + unit * 8;
      const uint32_t to = stage + Stage::kActivations + row * (kColumns * 2) + (unit ^ (row & 1)) * 16;
      copy_16_async(to, is_inside ? from : operands_.x, is_inside);
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) copy_scale(stage, group, column + group * kGroupColumns);
  }

  // The word that a scale lies in, and with double quantization that of its second level.
  __device__ __forceinline__ void copy_scale(uint32_t stage, int group, int column) {
    const int row = threadIdx.x;
    const bool is_inside = first_output_ + row < operands_.outputs && column < w_.cols;
    const int64_t block = is_inside ? block_at(row, column) : 0;
    const uint8_t* scales = static_cast<const uint8_t*>(w_.scales);
    const uint32_t to = stage + Stage::kScales + (group * kTileRows + row) * 4;
    copy_4_async(to, scales + (block * scale_bytes() & ~int64_t{3}), is_inside);
    if (w_.scale_2 != nullptr) {
      copy_4_async(to + Stage::kScaleBytes, w_.scale_2 + block / kScalesPerScale2, is_inside);
    }
  }

  __device__ __forceinline__ float scale_at(const uint8_t* stage, int row, int group, int column) const {
    const int place = (group * kTileRows + row) * 4;
    const uint32_t word = *reinterpret_cast<const uint32_t*>(stage + Stage::kScales + place);
    if (w_.scale_2 == nullptr && w_.scale_dtype == Dtype::kFloat32) return __uint_as_float(word);
    const int block = static_cast<int>(block_at(row, column));
    if (w_.scale_2 != nullptr) {
      const float scale_2 = *reinterpret_cast<const float*>(stage + Stage::kScales2 + place);
      return __fadd_rn(__fmul_rn(map_[word >> 8 * (block & 3) & 255], scale_2), offset_);
    }
    const uint32_t bits = word >> 16 * (block & 1) & 0xffff;
    if (w_.scale_dtype == Dtype::kBfloat16) return __uint_as_float(bits << 16);
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }

  __device__ __forceinline__ void multiply() {
    const int steps = static_cast<int>((w_.cols + kColumns - 1) / kColumns);
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) copy(step);
      commit_copies();
    }
    for (int step = 0; step < steps; ++step) {
      wait_for_copies<kStages - 2>();
      __syncthreads();
      if (step + kStages - 1 < steps) copy(step + kStages - 1);
      commit_copies();
      const uint8_t* stage = ring_ + step % kStages * Stage::kBytes;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) multiply_group(stage, group, step * kColumns);
    }
    wait_for_copies<0>();
  }

  __device__ __forceinline__ void multiply_group(const uint8_t* stage, int group, int column) {
    const int g = lane_ / 4;
    const int t = lane_ % 4;
    uint32_t weights[2][4][4];
    float scales[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_ * kWarpRows + i * 16 + half * 8 + g;
        const int place = kGroups == 2 ? group ^ (row >> 1 & 1) : group;
        const uint2 codes = *reinterpret_cast<const uint2*>(stage + row * (kColumns / 2) + place * 32 + t * 8);
        decode(codes, weights[i], half);
        scales[i][half] = scale_at(stage, row, group, column + group * kGroupColumns);
      }
    }
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      if (n * 8 >= tile_.rows) break;
      const int token = n * 8 + g;
      const uint8_t* x = stage + Stage::kActivations + token * (kColumns * 2) + group * 128;
      const uint4 first = *reinterpret_cast<const uint4*>(x + ((2 * t) ^ (token & 1)) * 16);
      const uint4 second = *reinterpret_cast<const uint4*>(x + ((2 * t + 1) ^ (token & 1)) * 16);
      const uint32_t b[4][2] = {{first.x, first.y}, {first.z, first.w}, {second.x, second.y}, {second.z, second.w}};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float d[4];
        multiply_tile<T>(d, weights[i][0], b[0][0], b[0][1], 0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int s = 1; s < 4; ++s) multiply_tile<T>(d, weights[i][s], b[s][0], b[s][1], d[0], d[1], d[2], d[3]);
#pragma unroll
        for (int k = 0; k < 4; ++k) sums_[i][n][k] = fmaf(scales[i][k / 2], d[k], sums_[i][n][k]);
      }
    }
  }

  // Sixteen codes of a row to its pairs of four steps: those of columns 2 t and 2 t + 8 of the first operand.
  __device__ __forceinline__ void decode(uint2 codes, uint32_t (&weights)[4][4], int half) const {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const uint32_t word = s < 2 ? codes.x : codes.y;
      weights[s][half] = pairs_[(word >> (s % 2 * 16) & 255) * 32 + lane_];
      weights[s][half + 2] = pairs_[(word >> (s % 2 * 16 + 8) & 255) * 32 + lane_];
    }
  }

  __device__ __forceinline__ void write() const {
    const int g = lane_ / 4;
    const int t = lane_ % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int output = first_output_ + warp_ * kWarpRows + i * 16 + k / 2 * 8 + g;
          const int token = n * 8 + 2 * t + k % 2;
          if (output >= operands_.outputs || token >= tile_.rows) continue;
          const int64_t row = tile_.first_row + token;
          static_cast<T*>(operands_.out)[row * operands_.outputs + output] = from_float<T>(sums_[i][n][k]);
        }
      }
    }
  }

  const Weight& w_;
  const GroupedOperands& operands_;
  uint32_t* pairs_;  // a pair of weights for every byte, a copy for every lane
  float* map_;
  uint8_t* ring_;
  GroupedStart* starts_;
  int lane_;
  int warp_;
  float offset_ = 0.0f;
  GroupedTile tile_;
  int first_output_;
  int64_t matrix_row_;
  float sums_[2][kTokenTiles][4];
};

}  // namespace lowbit
